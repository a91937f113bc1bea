"""What the page remembers of one visitor, and problems as sentences. No widgets and no models here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ldvc.class_names import ClassName
from ldvc.errors import LdvcError
from ldvc.predictor import ImageState
from ldvc.result import Segmentation

OWN_THRESHOLD = "default"  # as `Predictor.segment` calls it


class Problem(LdvcError):
    """A sentence for the visitor and the field beside which it belongs: "photo", "names", "model" or "run"."""

    def __init__(self, field: str, sentence: str) -> None:
        super().__init__(sentence)
        self.field = field


@dataclass
class Answer:
    """A photo segmented by names. Nothing of it changes; what is computed later is added."""

    model: str  # key of the model choice
    decoder: str  # the one of `PREDICTOR_DECODERS` that answers, see `LoadedModel.decoder`
    photo: str  # path of the uploaded file
    fingerprint: str  # SHA-256 of the file
    image: ImageState  # the encoded photo: new names do not encode it again
    asked: list[ClassName]
    names: list[str]  # the titles of those that are classes; the same as `names` of every result
    company: bool = True  # a single name was segmented together with `ldvc.predictor.COMPANY`
    none_named: bool = False  # "background" or the like is among the names, and so "none of these" is allowed
    chosen: str | None = None  # key of the chosen model, if lite answered because that one got no GPU
    notice: str = ""  # a sentence about that
    results: dict[tuple[str, bool], Segmentation | None] = field(default_factory=dict)  # by decoder, with company or without
    pictures: dict[tuple, str] = field(default_factory=dict)  # see `Tab.photo`; shared by answers about the same photo
    drawn: dict[str, tuple] = field(default_factory=dict)  # the settings with which a tab shows it, by the tab's key
    kept: Answer | None = None  # what it shares with all visitors, see `Segmenter.keep`

    @property
    def photo_name(self) -> str:
        """Name of the uploaded file."""
        return Path(self.photo).name

    def background(self, wanted: float | str | None) -> float | str | None:
        """The threshold of "none of these": the wanted one, unless it is None (not allowed) and a name allows it."""
        return OWN_THRESHOLD if self.none_named and wanted is None else wanted


@dataclass(eq=False)
class Session:
    """One visitor's state, never shared."""

    answer: Answer | None = None  # to the last question
    open_tab: str = "segment"  # key of the tab that the visitor looks at
    choice: object = None  # a mark of the last event that chose a model; older ones, which may wait for a download, end
    expired: bool = False  # there was an answer and it is forgotten

    def forget(self) -> None:
        """Remove the answer; the next question starts anew."""
        self.expired = self.expired or self.answer is not None
        self.answer = None


class Visits:
    """Bounds the memory of all answers: the visitor whose last event is the oldest is forgotten first.

    Args:
        limit: bytes that all answers may take together. The newest one is kept even if it is larger.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._sizes: WeakKeyDictionary[Session, int] = WeakKeyDictionary()  # the oldest first

    @property
    def total(self) -> int:
        """Bytes of all answers, each measured at the last event of its visitor."""
        return sum(self._sizes.values())

    def keep(self, session: Session) -> None:
        """Measure a visitor's answer after an event; forget others, the oldest first, until the limit holds."""
        self._sizes.pop(session, None)
        if session.answer is None:
            return
        session.expired = False
        self._sizes[session] = size_of(session.answer)
        while len(self._sizes) > 1 and self.total > self.limit:
            self.forget(next(iter(self._sizes)))

    def forget(self, session: Session) -> None:
        """Forget the answer of one visitor."""
        self._sizes.pop(session, None)
        session.forget()


def size_of(answer: Answer) -> int:
    """Bytes of the arrays, tensors and texts of an answer, each counted once, without what it shares with all visitors."""
    known: set[Any] = set()
    if answer.kept is not None:
        _size(answer.kept, known)
    return _size(answer, known)


def _size(root: Any, known: set[Any]) -> int:
    """Bytes that can be reached from an object and are not known yet."""
    total, todo = 0, [root]
    while todo:
        each: Any = todo.pop()
        if isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            identity, size = ("tensor", storage.data_ptr()), storage.nbytes()
        elif isinstance(each, np.ndarray):
            while isinstance(each.base, np.ndarray):
                each = each.base
            identity, size = id(each), each.nbytes
        else:
            identity, size = id(each), len(each) if isinstance(each, str | bytes) else 0
        if identity in known:
            continue
        known.add(identity)
        total += size
        if isinstance(each, list | tuple):
            todo += each
        elif isinstance(each, dict) or type(each).__module__.startswith("ldvc."):
            todo += (each if isinstance(each, dict) else vars(each)).values()
    return total
