"""The temporary folders of servers that were killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldvc.web import temporary

SERVER = "from ldvc.web import temporary; print(temporary.choose_folder(), flush=True); input()"


def start(system: Path) -> tuple[subprocess.Popen, Path]:
    """A process that has chosen its folder, and the folder."""
    environment = {**os.environ, "TMPDIR": str(system), temporary.VARIABLE: ""}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen) -> None:
    process.communicate("\n", timeout=60)
    assert process.returncode == 0


def age(*folders: Path) -> None:
    """Make folders look old."""
    for folder in folders:
        os.utime(folder, (0, 0))


def test_the_folder_of_a_killed_server_is_removed_by_the_next(tmp_path: Path) -> None:
    """Those of living servers stay, also new ones, those of other programs, and what a link leads to."""
    (killed, abandoned), (young, fresh), (living, used) = (start(tmp_path) for _ in range(3))
    for process in (killed, young):
        process.kill()
        process.communicate()
    (abandoned / "gradio").mkdir()
    (abandoned / "gradio" / "photo.jpg").write_bytes(b"1")
    other, target, link = tmp_path / "ldvc-other", tmp_path / "target", tmp_path / f"{temporary.PREFIX}link"
    other.mkdir(), target.mkdir(), link.symlink_to(target)
    (target / "file").write_bytes(b"1")
    age(abandoned, used, other, target)
    os.utime(link, (0, 0), follow_symlinks=False)
    process, own = start(tmp_path)
    assert set(tmp_path.iterdir()) == {fresh, used, own, other, target, link} and (target / "file").is_file()
    age(fresh, used, own)
    end(process)
    assert used.is_dir() and not own.exists(), "a server that ends removes its own"
    end(living)
    assert set(tmp_path.iterdir()) == {fresh, other, target, link}


def test_folders_of_other_users_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, folder = start(tmp_path)
    process.kill()
    process.communicate()
    age(folder)
    monkeypatch.delenv(temporary.VARIABLE, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("atexit.register", lambda _: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    uid = os.getuid()
    monkeypatch.setattr("os.getuid", lambda: uid + 1)
    temporary.choose_folder()
    assert folder.is_dir()
    monkeypatch.setattr("os.getuid", lambda: uid)
    temporary.choose_folder()
    assert not folder.exists()
