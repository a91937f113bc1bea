"""Class names in: cleaned, counted, and compared with the names that a checkpoint saw in training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ldvc.errors import InvalidNamesError

MAX_NAMES = 200
MAX_NAME_LENGTH = 80

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

    Args:
        names: a list of names, or one text with names separated by commas, semicolons or line breaks.

    Raises:
        InvalidNamesError: nothing is left, there are more than `MAX_NAMES`, or one is longer than `MAX_NAME_LENGTH`.
    """
    if isinstance(names, str):
        names = re.split(r"[,;\n\r\u3001\uff0c]", names)
    kept: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str):
            raise InvalidNamesError(f"A class name must be text, not {type(name).__name__}: {name!r}.")
        # Control characters are neither letters nor blanks, and nobody types them on purpose.
        name = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())
        if len(name) > MAX_NAME_LENGTH:
            raise InvalidNamesError(
                f"The name “{name[:40]}…” has {len(name)} characters; a name may have {MAX_NAME_LENGTH}. "
                "Separate names with commas."
            )
        if name:
            kept.setdefault(name.casefold(), name)
    if not kept:
        raise InvalidNamesError("Type at least one class name, for example: dog, grass, sky.")
    if len(kept) > MAX_NAMES:
        raise InvalidNamesError(f"These are {len(kept)} names; at most {MAX_NAMES} can be compared at once.")
    return list(kept.values())


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
    """The names that a checkpoint saw masks of, ready to be asked."""

    def __init__(self, names: Iterable[str]) -> None:
        self._forms: set[str] = set()
        for name in names:
            self._forms |= singular_forms(name)

    def __contains__(self, name: str) -> bool:
        return not self._forms.isdisjoint(singular_forms(name))
