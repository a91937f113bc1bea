"""Ready lists of class names, from the files of ldvc/data/classes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "data" / "classes"
ORDER = ("household", "voc20", "coco80", "context59", "coco_stuff171")  # others follow in the order of their names


@dataclass(frozen=True)
class Vocabulary:
    """A list of names: `key` of the file, `title` for people, `source` says who made it, `classes` as they are asked."""

    key: str
    title: str
    source: str
    classes: tuple[str, ...]


@cache
def vocabularies() -> dict[str, Vocabulary]:
    """All ready lists by key, in the order in which the page offers them."""
    found = {}
    for path in sorted(FOLDER.glob("*.json"), key=lambda path: (path.stem not in ORDER, path.stem)):
        content = json.loads(path.read_text(encoding="utf-8"))
        found[path.stem] = Vocabulary(path.stem, content["title"], content["source"], tuple(content["classes"]))
    first = [found[key] for key in ORDER if key in found]
    return {each.key: each for each in (*first, *found.values())}
