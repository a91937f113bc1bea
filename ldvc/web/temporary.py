"""The folder for uploaded photos and downloads. This module does not import Gradio, which reads the folder's name at import."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from ldvc.errors import LdvcError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

VARIABLE = "GRADIO_TEMP_DIR"
MAX_BYTES = 2_000_000_000
MAX_SECONDS = 4 * 3600  # age of aborted uploads; Gradio removes the other files
PREFIX = "ldvc-page-"
NEW_SECONDS = 60  # the server of a newer folder may not have locked it yet
HOW = f"Set {VARIABLE} to a folder that you may write to, on a disk with free space."


def choose_folder() -> str:
    """Return the folder of `GRADIO_TEMP_DIR`, or create a new one, which is removed when the process ends.

    Folders of killed servers are removed now. A running server holds a lock on its folder.

    From now on SIGTERM ends the process at once; Python would wait for running computations.

    Returns:
        Path of the folder; "" if the system has no folder for temporary files.
    """
    named, own, owner = os.environ.get(VARIABLE), "", os.getpid()
    if not named:
        with contextlib.suppress(OSError):
            own = tempfile.mkdtemp(prefix=PREFIX)
            if fcntl is not None:
                _lock(own)
                _remove_abandoned()

    def remove() -> None:
        if own and os.getpid() == owner:  # not in a forked process
            shutil.rmtree(own, ignore_errors=True)

    def end(*_: Any) -> None:
        remove()
        os._exit(0)

    atexit.register(remove)
    signal.signal(signal.SIGTERM, end)
    return named or own


def _lock(folder: str | Path) -> int:
    """Lock a folder until the returned descriptor is closed or the process ends.

    Raises:
        OSError: the path is not a folder, or another process has the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_abandoned() -> None:
    """Remove the folders of killed servers: those that belong to this user and that no process has locked."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > NEW_SECONDS:
                descriptor = _lock(path)
                shutil.rmtree(path, ignore_errors=True)
                os.close(descriptor)


def check_folder() -> None:
    """Check that a file can be written to the folder.

    Raises:
        LdvcError: the folder cannot be written.
    """
    try:
        path = folder()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"1")
    except OSError as error:
        named = os.environ.get(VARIABLE) or "of the system"
        raise LdvcError(f"The folder for temporary files ({named}) cannot be written: {error.strerror}. {HOW}") from error


def folder() -> Path:
    """The folder that Gradio uses for temporary files."""
    return Path(os.environ.get(VARIABLE) or Path(tempfile.gettempdir()) / "gradio")


def remove_oldest(limit: int = MAX_BYTES) -> None:
    """Remove the files of the folder that are older than `MAX_SECONDS`, and the oldest files until the rest fits.

    Args:
        limit: bytes of all files together. Half of the space that the disk has for them is a second limit.
    """
    files = []
    for path in folder().rglob("*"):
        with contextlib.suppress(OSError):  # removed in the meantime
            status = path.lstat()
            if not path.is_dir():
                files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    with contextlib.suppress(OSError):
        limit = min(limit, (total + shutil.disk_usage(folder()).free) // 2)
    for moment, size, path in sorted(files):
        if total <= limit and time.time() - moment <= MAX_SECONDS:
            return
        path.unlink(missing_ok=True)
        total -= size
