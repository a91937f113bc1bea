"""The example photos, and links to answers about them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from ldvc.bundled import ASSETS
from ldvc.web import texts
from ldvc.web.models import ModelRegistry
from ldvc.web.segmenter import ALL_DECODERS, Segmenter, read_names
from ldvc.web.session import Answer, Problem

log = logging.getLogger(__name__)

EXAMPLES_FOLDER = ASSETS / "examples"
OPENING = "street"  # key of the example that the page opens with


@dataclass(frozen=True)
class Example:
    """A photo of the project."""

    path: str
    title: str
    names: str  # fitting class names, separated by commas
    fingerprint: str  # SHA-256 of the file, see `Answer.fingerprint`

    @property
    def key(self) -> str:
        """The name of the example in a link: the file name without its suffix."""
        return Path(self.path).stem


@dataclass(frozen=True)
class Link:
    """The example, names and model that the page opens with."""

    example: Example  # the example in the address, or the one with the key `OPENING`
    names: str  # class names for the example, separated by commas
    model: str | None = None  # key of a model choice; None = the main model
    is_explicit: bool = False  # whether the address names an example; it is answered even if that takes a while
    notice: str = ""  # a sentence about the part of the address that could not be used


def read_examples(folder: Path = EXAMPLES_FOLDER) -> list[Example]:
    """Read the examples of a folder from its examples.json."""
    examples = []
    for entry in json.loads((folder / "examples.json").read_text(encoding="utf-8")):
        path = folder / entry["file"]
        fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        examples.append(Example(str(path), entry["title"], ", ".join(entry["names"]), fingerprint))
    return examples


def answer_opening(segmenter: Segmenter, *decoders: str) -> None:
    """Answer the example that the page opens with, for all visitors; for `decoders` see `Segmenter.keep`."""
    opening = next(example for example in read_examples() if example.key == OPENING)
    segmenter.keep(opening.path, opening.names, *decoders)


def answer_examples(segmenter: Segmenter) -> None:
    """Answer every example with its names, for all visitors. The opening example is answered by all decoders."""
    for example in read_examples():
        segmenter.keep(example.path, example.names)
    answer_opening(segmenter, *ALL_DECODERS)
    log.info("The examples are answered.")


def link_to(answer: Answer, examples: Sequence[Example], registry: ModelRegistry) -> str:
    """The query of an address that opens an answer; "" if the photo of the answer is not an example."""
    for example in examples:
        if example.fingerprint == answer.fingerprint:
            query = {"example": example.key, "names": ", ".join(name.text for name in answer.parsed_names)}
            return "?" + urlencode(query | ({} if answer.model == registry.default else {"model": answer.model}))
    return ""


def read_link(query: Mapping[str, str], examples: Sequence[Example], registry: ModelRegistry) -> Link:
    """Read the query of an address. A value that cannot be used leads to a notice.

    A link loads no model, because that may take minutes.
    """
    by_key = {example.key: example for example in examples}
    key, names, model = (query.get(name) for name in ("example", "names", "model"))
    if key is None:
        return Link(by_key[OPENING], by_key[OPENING].names)
    if key not in by_key:
        return Link(by_key[OPENING], by_key[OPENING].names, notice=texts.LINK_EXAMPLE)
    example, notice = by_key[key], ""
    if model and (model not in registry.choices or not registry.is_loaded(model)):
        model, notice = None, texts.LINK_MODEL
    try:
        read_names(names or example.names)
    except Problem:
        names, notice = None, texts.LINK_NAMES
    return Link(example, names or example.names, model or None, True, notice)
