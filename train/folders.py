"""Folders that a command writes to."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ldvc.errors import LdvcError


def make_writable(folder: str | Path, option: str) -> None:
    """Makes a folder and checks that it can be written, before anything is computed.

    Args:
        option: of the command line that names the folder, for the message.

    Raises:
        LdvcError: it cannot be made or written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LdvcError(f"The folder {folder} cannot be written: {error.strerror}; give another {option}.") from None
