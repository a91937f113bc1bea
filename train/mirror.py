"""Runs a command and copies the folder that it writes to, so that a later run of the command continues from the copy.

    python -m train.mirror runs/voc12/ldvc /bucket/runs/voc12/ldvc -- python train/train.py ...

A mounted bucket has no locks, and files cannot be appended to. So the command writes to the local disk, and this program
copies the changed files, once a minute and at the end. It copies them in the order of writing: the file that marks a
checkpoint as complete arrives last.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

State = tuple[int, int]  # time of the last change in nanoseconds, size in bytes
INTERVAL = 60.0  # seconds between two updates of the copy
PARTIAL = (".part", ".new")  # suffixes of incomplete files


def scan(folder: Path) -> dict[Path, State]:
    """The complete files of a folder, relative to it, with their states."""
    files = {}
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # the command deletes files at any time
            if path.is_file() and path.suffix not in PARTIAL:
                files[path.relative_to(folder)] = (path.stat().st_mtime_ns, path.stat().st_size)
    return files


def copy_changes(source: Path, target: Path, copied: dict[Path, State]) -> None:
    """Copies files that are new or have changed, oldest first; then deletes files that no longer exist, newest first.

    `copied`: the files of `target`, with the states in which they were copied; it is updated.
    """
    files = scan(source)
    for name, state in sorted(files.items(), key=lambda item: item[1]):
        if copied.get(name) != state:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                shutil.copyfile(source / name, target / name)
                copied[name] = state
    for name in sorted(copied.keys() - files.keys(), key=lambda name: copied[name], reverse=True):
        (target / name).unlink(missing_ok=True)
        del copied[name]


def run(source: Path, target: Path, command: Sequence[str]) -> int:
    """Runs a command and keeps `target` as a copy of `source`, the folder that the command writes to.

    If `source` does not exist, it is first restored from `target`. Returns the command's exit status, or 1 if the last update
    of the copy failed.
    """
    if not source.exists() and target.is_dir():
        shutil.copytree(target, source)
    copied = scan(source) if target.is_dir() else {}
    process = subprocess.Popen(command)
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(INTERVAL)
        status, failed = process.returncode, False  # read before the update, so that the last update copies everything
        try:
            copy_changes(source, target, copied)
        except OSError as error:
            print(f"{source} was not copied to {target}: {error}", file=sys.stderr, flush=True)
            failed = True
        if status is not None:
            return status or int(failed)


if __name__ == "__main__":
    folder, copy, dashes, *words = sys.argv[1:]
    sys.exit(run(Path(folder), Path(copy), words))
