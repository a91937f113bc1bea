"""Class names: cleaned, compared, counted as seen or unseen; synonyms, class lists and splits. Loads no torch.

A class may be given by several words for the same thing, "sofa | couch". Each word is encoded by itself, so that none blurs
the other; the class fits a pixel as well as the best of its words does, and is called by the first.

Data sets disagree about spellings ("aeroplane" in MSRC and VOC, "airplane" in COCO). A name learned under one spelling must
not be held out under another, so every comparison of names in training and evaluation goes through `canonical`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ldvc.errors import DataError, InvalidNamesError

_FOLDER = Path(__file__).parent
MAX_NAMES = 200
MAX_NAME_LENGTH = 80
SYNONYM_MARK = "|"
JOINERS = "\u200c\u200d"
NEVER_TYPED = ("Cc", "Cf", "Cs")  # Unicode's control, format and surrogate characters

LIST_ORDER = ("household", "voc20", "coco80", "context59", "coco_stuff171")  # others follow in the order of their names

# What separates names in a pasted text: commas and semicolons of all scripts, line breaks, tabs, bullets, and " . ".
SEPARATORS = re.compile(r"[,;\n\r\t\u3001\uff0c\uff1b\u060c\u061b\u2022\u30fb\ufe50\ufe51\ufe54]|\s\.(?=\s|$)")
LIST_MARK = re.compile(r"^(?:[-*+\u2022\u2013\u2014]\s+|\(?\d{1,3}[.)]\s+)")
ARTICLE = re.compile(r"^(?:an?|the)\s+(?=\S)", re.IGNORECASE)
BRACKETS = {")": "(", "]": "[", "}": "{"}
QUOTES = "\"'`\u00b4\u00ab\u00bb\u2018\u2019\u201a\u201c\u201d\u201e\u2039\u203a\u300c\u300d\u300e\u300f"
FINAL_MARKS = ".:!?\u2026\u3002\uff01\uff1a\uff1f\u061f"

# What class lists call "none of the others". It is no word for a CLIP text tower.
NONE_WORDS = frozenset(
    {"background", "other", "others", "rest", "everything else", "none", "none of these", "none of the above"}
    | {"nothing", "unlabeled", "unlabelled"}
)

# Nouns of everyday class lists whose plural is not made with an "s".
IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "mice": "mouse",
    "geese": "goose",
    "feet": "foot",
    "teeth": "tooth",
    "knives": "knife",
    "leaves": "leaf",
    "shelves": "shelf",
    "wolves": "wolf",
}


def clean_names(names: str | Sequence[str]) -> list[str]:
    """Strip names, drop empty ones and repetitions (whatever their case), keep the order.

    A word that was there before is dropped from later classes: of "sofa | couch, couch | bench" remain "sofa | couch" and
    "bench".

    Args:
        names: a list of names, or one text with names separated by commas, semicolons, line breaks or " . ", as people paste
            them: quotes, brackets, list marks, articles and final marks are no part of a name. "|" stands between synonyms.

    Returns:
        One text for each class, its synonyms joined by " | "; see `synonyms_of`.

    Raises:
        InvalidNamesError: nothing is left, there are more than `MAX_NAMES` words, or one is longer than `MAX_NAME_LENGTH`.
    """
    if isinstance(names, str):
        names = SEPARATORS.split(names)
    classes: list[str] = []
    known: set[str] = set()
    for name in names:
        if not isinstance(name, str):
            raise InvalidNamesError(f"A class name must be text, not {type(name).__name__}: {name!r}.")
        kept = []
        for word in map(_clean_word, name.split(SYNONYM_MARK)):
            if word and word.casefold() not in known:
                known.add(word.casefold())
                kept.append(word)
        if kept:
            classes.append(f" {SYNONYM_MARK} ".join(kept))
    if not classes:
        raise InvalidNamesError("Type at least one class name, for example: dog, grass, sky.")
    if len(known) > MAX_NAMES:
        raise InvalidNamesError(f"These are {len(known)} names; at most {MAX_NAMES} can be compared at once.")
    return classes


def without_none_words(classes: Sequence[str]) -> tuple[list[str], bool]:
    """Cleaned classes without `NONE_WORDS`, and whether there was one.

    Raises:
        InvalidNamesError: nothing else is left.
    """
    kept = []
    for name in classes:
        words = [word for word in synonyms_of(name) if plain(word) not in NONE_WORDS]
        if words:
            kept.append(f" {SYNONYM_MARK} ".join(words))
    if not kept:
        raise InvalidNamesError(f"“{classes[0]}” means none of the other names; type at least one class name beside it.")
    return kept, kept != list(classes)


def _clean_word(word: str) -> str:
    """Single blanks; no control characters and marks of writing direction, which nobody types on purpose.

    Joiners stay: they shape Persian words and hold together emoji like the service dog.

    Raises:
        InvalidNamesError: it is longer than `MAX_NAME_LENGTH`.
    """
    word = "".join(" " if letter not in JOINERS and unicodedata.category(letter) in NEVER_TYPED else letter for letter in word)
    word = _bare(" ".join(word.split()).strip(JOINERS + " "))  # together: blanks may stand between joiners
    if len(word) > MAX_NAME_LENGTH:
        raise InvalidNamesError(
            f"The name “{word[:40]}…” has {len(word)} characters; a name may have {MAX_NAME_LENGTH}. "
            "Separate names with commas."
        )
    return word


def _bare(word: str) -> str:
    """Without list mark, quotes, unmatched or enclosing brackets, article and final marks."""
    before = None
    while word != before:
        before = word
        word = LIST_MARK.sub("", word).strip(QUOTES + " ").rstrip(FINAL_MARKS).rstrip()
        for closing, opening in BRACKETS.items():
            if word.endswith(closing) and opening not in word[:-1]:  # "orange (fruit)" keeps its own
                word = word[:-1]
            if word.startswith(opening) and closing not in word[1:]:
                word = word[1:]
            if word.startswith(opening) and word.endswith(closing) and closing not in word[1:-1]:
                word = word[1:-1]
    return ARTICLE.sub("", word)


def synonyms_of(name: str) -> list[str]:
    """The words of a cleaned class: "sofa | couch" -> ["sofa", "couch"]; the first is its title."""
    return name.split(f" {SYNONYM_MARK} ")


def singular_forms(name: str) -> set[str]:
    """What a name may read in the singular, itself included: "wine glasses" -> {"wine glasses", "wine glass", ...}.

    Only the last word changes. The set is generous: it serves to compare two names, not to print one.
    """
    words = re.sub(r"[\s_\-]+", " ", name.casefold()).strip().split(" ")
    last = words[-1]
    forms = {last, IRREGULAR.get(last, last)}
    if len(last) > 3 and last.endswith("s") and not last.endswith("ss"):
        forms.add(last[:-1])
        if last.endswith("es"):
            forms.add(last[:-2])
        if last.endswith("ies"):
            forms.add(last[:-3] + "y")
    stem = " ".join(words[:-1])
    return {f"{stem} {form}".strip() for form in forms}


class SeenNames:
    """The names that a checkpoint saw masks of, ready to be asked; page and evaluation both ask here.

    A name was seen if it, its singular, or another spelling that `ldvc.class_names` knows for it was learned: after
    "couch", "sofas" counts as seen. COCO-Stuff's "wall-brick" is a wall, and so stands for "wall", too. A class with synonyms
    was seen if one of its words was.

    Args:
        names: that masks were seen of.
        words: name -> other words that were read for it in training; they, too, count as seen, as that name.
    """

    def __init__(self, names: Iterable[str], words: Mapping[str, Iterable[str]] | None = None) -> None:
        self._learned: dict[str, str] = {}  # every form under which a learned name counts as seen -> the learned name
        for name in names:
            kind = name.partition("-")[0] if name in _coco_stuff() else ""
            for form in _spellings(name) | (_spellings(kind) if kind else set()):
                if form:
                    self._learned.setdefault(form, name)
        for name, others in (words or {}).items():
            for form in set().union(*map(_spellings, others)):
                self._learned.setdefault(form, name)

    def source(self, name: str) -> str | None:
        """The learned name that makes a class seen, or None: unseen. An exact match is preferred."""
        words = name.split(SYNONYM_MARK)
        exact = (self._learned.get(canonical(word)) for word in words)
        related = (self._learned.get(form) for word in words for form in sorted(_spellings(word)))
        return next(filter(None, (*exact, *related)), None)

    def __contains__(self, name: str) -> bool:
        return self.source(name) is not None


@cache
def _coco_stuff() -> frozenset[str]:
    """The names of COCO-Stuff, whose hyphens part a kind from its variety: "wall-brick". "T-shirt" is one word."""
    return frozenset(load_classes("coco_stuff171"))


def _spellings(name: str) -> set[str]:
    """The canonical spellings of a name and of its singular."""
    return {canonical(form) for form in {name, *singular_forms(name)}}


# ---- one spelling for names that mean the same, class lists, splits


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
        name: a file of `ldvc/class_lists` without ".json".

    Raises:
        DataError: no such list.
    """
    path = _FOLDER / "class_lists" / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.json")))
        raise DataError(f"There is no class list called '{name}'. Known lists: {known}.")
    return json.loads(path.read_text(encoding="utf-8"))["classes"]


def load_split(name: str | None) -> frozenset[str]:
    """The unseen classes (canonical spellings) of a split.

    Args:
        name: a file of `ldvc/splits` without ".json", a path to such a file, or None / "none" for "all are seen".

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


@dataclass(frozen=True)
class ClassList:
    """A list of names: `key` of the file, `title` for people, `source` says who made it, `classes` as they are asked."""

    key: str
    title: str
    source: str
    classes: tuple[str, ...]


@cache
def class_lists() -> dict[str, ClassList]:
    """All ready lists by key, in the order in which the page offers them."""
    found = {}
    for path in sorted((_FOLDER / "class_lists").glob("*.json"), key=lambda path: (path.stem not in LIST_ORDER, path.stem)):
        content = json.loads(path.read_text(encoding="utf-8"))
        found[path.stem] = ClassList(path.stem, content["title"], content["source"], tuple(content["classes"]))
    first = [found[key] for key in LIST_ORDER if key in found]
    return {each.key: each for each in (*first, *found.values())}
