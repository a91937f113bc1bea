"""Runs a command and keeps a copy of a folder that it writes, from which a later run of the command continues.

    python -m train.mirror runs/voc12/ldvc /bucket/runs/voc12/ldvc -- python train/train.py ...

A mounted bucket has no locks, and nothing can be appended. So the command writes to the local disk, and this program
copies what has changed, once a minute and at the end, in the order of writing: the file that marks a checkpoint as
complete arrives last.
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
PARTIAL = (".part", ".new")  # names of files that are not complete yet end so


def scan(folder: Path) -> dict[Path, State]:
    """The complete files of a folder, relative to it, with their states."""
    found = {}
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # the command deletes files at any time
            if path.is_file() and path.suffix not in PARTIAL:
                found[path.relative_to(folder)] = (path.stat().st_mtime_ns, path.stat().st_size)
    return found


def copy_changes(source: Path, target: Path, copied: dict[Path, State]) -> None:
    """Copies files that are new or have changed, oldest first; then deletes those that are gone, newest first.

    `copied` holds the files of `target` with the states in which they were copied, and is brought up to date.
    """
    found = scan(source)
    for name, state in sorted(found.items(), key=lambda item: item[1]):
        if copied.get(name) != state:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                shutil.copyfile(source / name, target / name)
                copied[name] = state
    for name in sorted(copied.keys() - found.keys(), key=lambda name: copied[name], reverse=True):
        (target / name).unlink(missing_ok=True)
        del copied[name]


def run(source: Path, target: Path, command: Sequence[str]) -> int:
    """Keeps a copy, `target`, of the folder that a command writes into, and fills the folder from it if it does not exist.

    Returns the command's exit status, or 1 if the last update failed.
    """
    if not source.exists() and target.is_dir():
        shutil.copytree(target, source)
    copied = scan(source) if target.is_dir() else {}
    process = subprocess.Popen(command)
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(INTERVAL)
        status, failed = process.returncode, False  # before the update, which then sees everything
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
