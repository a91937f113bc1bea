"""Class names: one spelling for names that mean the same, class lists, and the splits into seen and unseen.

Data sets disagree about spellings ("aeroplane" in MSRC and VOC, "airplane" in COCO). A name learned under one spelling must
not be held out under another, so every comparison of names in training and evaluation goes through `canonical`.
"""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ldvc.errors import DataError

_FOLDER = Path(__file__).parent


def plain(name: str) -> str:
    """Lower case, single spaces, no underscores: "Dining_Table " -> "dining table"."""
    return " ".join(name.replace("_", " ").lower().split())


@cache
def _synonyms() -> dict[str, list[str]]:
    """The synonym file: canonical name -> its other spellings."""
    return json.loads((_FOLDER / "synonyms.json").read_text(encoding="utf-8"))


@cache
def _canonical_of() -> dict[str, str]:
    return {other: name for name, others in _synonyms().items() for other in others}


def canonical(name: str) -> str:
    """The one spelling under which a name is learned: "aeroplane" -> "airplane"; unknown names come back plain."""
    name = plain(name)
    return _canonical_of().get(name, name)


def spellings(name: str) -> list[str]:
    """Every known spelling of a name, the canonical one first."""
    name = canonical(name)
    return [name, *_synonyms().get(name, [])]


def canonical_set(names: Iterable[str]) -> frozenset[str]:
    """The canonical spellings of some names, for membership tests."""
    return frozenset(canonical(name) for name in names)


def load_classes(name: str) -> list[str]:
    """The names of a class list in the order of its labels.

    Args:
        name: a file of `ldvc/data/classes` without ".json".

    Raises:
        DataError: no such list.
    """
    path = _FOLDER / "classes" / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.json")))
        raise DataError(f"There is no class list called '{name}'. Known lists: {known}.")
    return json.loads(path.read_text(encoding="utf-8"))["classes"]


def load_split(name: str | None) -> frozenset[str]:
    """The unseen classes (canonical spellings) of a split.

    Args:
        name: a file of `ldvc/data/splits` without ".json", a path to such a file, or None / "none" for "all are seen".

    Raises:
        DataError: no such split, or the file holds none.
    """
    if name is None or name == "none":
        return frozenset()
    path = _FOLDER / "splits" / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (_FOLDER / "splits").glob("*.json")))
        raise DataError(f"There is no split called '{name}'. Known splits: {known}; or give the path of a JSON file.")
    try:
        unseen = json.loads(path.read_text(encoding="utf-8"))["unseen"]
        if not (isinstance(unseen, list) and all(isinstance(each, str) for each in unseen)):
            raise TypeError("it is no list of names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'The split {path} cannot be used ({error}); it should hold {{"unseen": ["cow", "train"]}}.'
        ) from None
    return canonical_set(unseen)
