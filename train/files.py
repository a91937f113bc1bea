"""Writes files as a whole, so that an interruption leaves the old or the new file, and lists the files of the project."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. It replaces `path` at the end of the block, and is deleted if the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.new")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def for_json(value: Any) -> Any:
    """The value with NaN, which JSON does not have, replaced by None."""
    if isinstance(value, Mapping):
        return {key: for_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [for_json(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; rows of integers (confusion matrices) take one line each."""
    text = json.dumps(for_json(content), indent=2, ensure_ascii=False)
    text = re.sub(r"\[\s+(-?\d+(?:,\s+-?\d+)*)\s+\]", lambda row: f"[{' '.join(row[1].split())}]", text)
    with written(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def project_files(root: Path, *parts: str) -> set[str]:
    """The files of a project, or of some of its parts, relative to `root`; without links and files that git ignores."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *parts]
    listed = subprocess.run(command, capture_output=True, encoding="utf-8") if shutil.which("git") else None
    if listed and listed.returncode == 0:
        names = set(filter(None, listed.stdout.split("\0")))
    else:  # a downloaded archive
        places = [root / part for part in parts or ("",)]
        names = {path.relative_to(root).as_posix() for place in places for path in (place, *place.rglob("*"))}
    return real_files(root, names)


def real_files(root: Path, names: Iterable[str]) -> set[str]:
    """The names of files below `root`, without links."""
    return {name for name in names if (root / name).is_file() and (root / name).resolve() == root.resolve() / name}
