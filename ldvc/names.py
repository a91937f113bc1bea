"""Class names in: cleaned, counted, and compared with the names that a checkpoint saw in training.

A class may be given by several words for the same thing, "sofa | couch". Each word is encoded by itself, so that none blurs
the other; the class fits a pixel as well as the best of its words does, and is called by the first.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from ldvc.data.class_names import canonical, load_classes, plain
from ldvc.errors import InvalidNamesError

MAX_NAMES = 200
MAX_NAME_LENGTH = 80
SYNONYM_MARK = "|"
JOINERS = "\u200c\u200d"
NEVER_TYPED = ("Cc", "Cf", "Cs")  # Unicode's control, format and surrogate characters

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

    A name was seen if it, its singular, or another spelling that `ldvc.data.class_names` knows for it was learned: after
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
