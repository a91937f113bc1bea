"""Class names: parsing, comparison, seen or unseen; class lists and splits. Does not import torch.

A class has one name or several synonyms, "sofa | couch". `parse_names` converts the input of a user to `ClassName` objects.
Names are compared in three ways: by `plain` (what the text tower reads), by `canonical` (one spelling for all that mean the
same), and by `SeenNames`, which also compares singular and plural to decide whether a name counts as seen in training.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ldvc.errors import DataError, InvalidNamesError
from ldvc.pasted_names import SYNONYM_MARK, split_text, without_numbers, words_of

_FOLDER = Path(__file__).parent
MAX_NAMES = 200
MAX_NAME_LENGTH = 80

LIST_ORDER = ("household", "voc20", "coco80", "context59", "coco_stuff171")  # other lists follow in alphabetical order

# Words of class lists that mean "none of the other classes". CLIP's text tower has no useful embedding of them.
NONE_WORDS = frozenset(
    {"background", "other", "others", "rest", "everything else", "none", "none of these", "none of the above"}
    | {"nothing", "unlabeled", "unlabelled"}
)

# Nouns of everyday class lists whose plural is not made with an "s".
IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose",
    "feet": "foot", "teeth": "tooth", "knives": "knife", "leaves": "leaf", "shelves": "shelf", "wolves": "wolf",
}  # fmt: skip


@dataclass(frozen=True)
class ClassName:
    """The name of one class. The score of a class is that of its best word."""

    words: tuple[str, ...]  # synonyms, mostly one; a word may be "wine glass"

    @property
    def title(self) -> str:
        """The first word, which stands for the class in tables and pictures."""
        return self.words[0]

    @property
    def text(self) -> str:
        """All words, as people type them: "sofa | couch"."""
        return f" {SYNONYM_MARK} ".join(self.words)

    @property
    def keys(self) -> tuple[str, ...]:
        """The words in `plain` form, for comparison."""
        return tuple(map(plain, self.words))

    @property
    def means_none(self) -> bool:
        """Whether all words are in `NONE_WORDS`, so that this is not a class."""
        return NONE_WORDS.issuperset(self.keys)


# ---- typed or pasted names ----------------------------------------------------------------------------------------------


def parse_names(names: str | Sequence[str]) -> list[ClassName]:
    """Parse names that a user typed, pasted or listed into classes, in their order and without repetitions.

    A text may be separated by commas, semicolons, line breaks, tabs, bullets or " . "; it may be a JSON or Python list, a
    numbered list, a table, or a class file of a data set ("0: background"). Marks of such lists, quotes, brackets and articles
    are removed. "|" separates synonyms. In a list, an element is a class, and commas in it separate synonyms
    (ADE20K's "door, double door"); a list of one element is read as a text.

    A word that an earlier class has is dropped: "sofa | couch, couch | bench" becomes "sofa | couch" and "bench".

    Raises:
        InvalidNamesError: no name is left, there are more than `MAX_NAMES` words, or one is longer than `MAX_NAME_LENGTH`.
    """
    entries = split_text(names) if isinstance(names, str) else list(names)
    for entry in entries:
        if not isinstance(entry, str):
            raise InvalidNamesError(f"A class name must be text, not {type(entry).__name__}: {entry!r}.")
    if len(entries) == 1 and not isinstance(names, str):
        entries = split_text(entries[0])
    classes: list[ClassName] = []
    used_words: set[str] = set()
    for entry in dict.fromkeys(without_numbers(entries)):
        words = []
        for word in words_of(entry):
            if len(word) > MAX_NAME_LENGTH:
                raise InvalidNamesError(
                    f"The name “{word[:40]}…” has {len(word)} characters; a name may have {MAX_NAME_LENGTH}. "
                    "Separate names with commas."
                )
            if plain(word) not in used_words:
                used_words.add(plain(word))
                words.append(word)
        if len(used_words) > MAX_NAMES:
            raise InvalidNamesError(f"These are too many names: at most {MAX_NAMES} can be compared at once.")
        if words:
            classes.append(ClassName(tuple(words)))
    if not classes:
        raise InvalidNamesError("Type at least one class name, for example: dog, grass, sky.")
    return classes


def drop_none_words(classes: Sequence[ClassName]) -> tuple[list[ClassName], bool]:
    """Remove `NONE_WORDS`; also returns whether there was one. Raises InvalidNamesError if no class is left."""
    without_none = [ClassName(tuple(word for word in each.words if plain(word) not in NONE_WORDS)) for each in classes]
    remaining = [each for each in without_none if each.words]
    if not remaining:
        name = classes[0].text
        raise InvalidNamesError(f"“{name}” means none of the other names; type at least one class name beside it.")
    return remaining, remaining != list(classes)


# ---- names that mean the same -------------------------------------------------------------------------------------------


def plain(name: str) -> str:
    """Lower case, single spaces, no underscores: "Dining_Table " -> "dining table"."""
    return " ".join(name.replace("_", " ").lower().split())


@cache
def _canonical_of() -> dict[str, str]:
    """Other spelling -> canonical name, from the synonym file."""
    synonyms = json.loads((_FOLDER / "synonyms.json").read_text(encoding="utf-8"))
    return {other: name for name, others in synonyms.items() for other in others}


def canonical(name: str) -> str:
    """The one spelling under which a name is learned, from `synonyms.json`; other names are returned in `plain` form.

    Data sets disagree ("aeroplane" in VOC, "airplane" in COCO), and a name that is learned under one spelling must not be held
    out under another.
    """
    name = plain(name)
    return _canonical_of().get(name, name)


def canonical_set(names: Iterable[str]) -> frozenset[str]:
    """The canonical spellings of some names, for membership tests."""
    return frozenset(canonical(name) for name in names)


def singular_forms(name: str) -> set[str]:
    """Possible singular forms of a plain name, and the name itself: "wine glasses" -> {"wine glasses", "wine glass", ...}."""
    words = plain(name).replace("-", " ").split() or [""]
    last = words[-1]
    forms = {last, IRREGULAR.get(last, last)}
    if len(last) > 3 and not last.endswith("ss"):
        forms |= {last.removesuffix(end) + new for end, new in (("s", ""), ("es", ""), ("ies", "y")) if last.endswith(end)}
    return {" ".join([*words[:-1], form]) for form in forms}


def _related(name: str) -> set[str]:
    """The canonical spellings of a name and of its singular."""
    return canonical_set({name, *singular_forms(name)})


@cache
def _coco_stuff_kinds() -> dict[str, str]:
    """COCO-Stuff's name -> its kind: "wall-brick" -> "wall". Hyphens in names of other lists ("T-shirt") mark no kind."""
    return {name: name.partition("-")[0] for name in load_classes("coco_stuff171") if "-" in name}


class SeenNames:
    """The names that count as seen in training: `names` had masks, `words` are other words that training used for them.

    A name counts as seen if it, its singular or another spelling of it was learned: after "couch", "sofas" is seen. After
    COCO-Stuff's "wall-brick", "wall" is seen. A class with synonyms is seen if one of its words is.
    """

    def __init__(self, names: Iterable[str], words: Mapping[str, Iterable[str]] | None = None) -> None:
        self._learned: dict[str, str] = {}  # every form under which a learned name counts as seen -> the learned name
        for name in names:
            for form in _related(name) | _related(_coco_stuff_kinds().get(name, name)):
                self._learned.setdefault(form, name)
        for name, others in (words or {}).items():
            for form in set().union(*map(_related, others)):
                self._learned.setdefault(form, name)

    def source(self, name: ClassName | str) -> str | None:
        """The learned name that makes a class seen, or None if it is unseen. An exact match is preferred."""
        words = name.words if isinstance(name, ClassName) else name.split(SYNONYM_MARK)
        exact = (self._learned.get(canonical(word)) for word in words)
        related = (self._learned.get(form) for word in words for form in sorted(_related(word)))
        return next(filter(None, (*exact, *related)), None)

    def __contains__(self, name: ClassName | str) -> bool:
        return self.source(name) is not None


# ---- class lists and splits ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassList:
    """A list of class names: `key` is the stem of its file, `title` is for display, `source` names its authors."""

    key: str
    title: str
    source: str
    classes: tuple[str, ...]


@cache
def class_lists() -> dict[str, ClassList]:
    """All class lists by key, in the order in which the page offers them."""
    files = {path.stem: path for path in sorted((_FOLDER / "class_lists").glob("*.json"))}
    contents = {key: json.loads(files[key].read_text(encoding="utf-8")) for key in dict.fromkeys((*LIST_ORDER, *files))}
    return {key: ClassList(key, each["title"], each["source"], tuple(each["classes"])) for key, each in contents.items()}


def load_classes(name: str) -> list[str]:
    """The names of a file of `ldvc/class_lists` in the order of its labels; raises DataError if there is none."""
    if name not in class_lists():
        raise DataError(f"There is no class list called '{name}'. Known lists: {', '.join(sorted(class_lists()))}.")
    return list(class_lists()[name].classes)


def load_split(name: str | None) -> frozenset[str]:
    """The unseen classes (canonical spellings) of a split; raises DataError if it does not exist or cannot be used.

    `name` is a file of `ldvc/splits` without ".json", a path to such a file, or None / "none" for "all are seen".
    """
    if name is None or name == "none":
        return frozenset()
    splits = {file.stem: file for file in sorted((_FOLDER / "splits").glob("*.json"))}
    path = splits.get(name, Path(name))
    if not path.is_file():
        split_names = ", ".join(splits)
        raise DataError(f"There is no split called '{name}'. Known splits: {split_names}; or give the path of a JSON file.")
    try:
        unseen = json.loads(path.read_text(encoding="utf-8"))["unseen"]
        if not (isinstance(unseen, list) and all(isinstance(each, str) for each in unseen)):
            raise TypeError("it is no list of names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        example = '{"unseen": ["cow", "train"]}'
        raise DataError(f"The split {path} cannot be used ({error}); it should hold {example}.") from None
    return canonical_set(unseen)
