"""The state of one visitor, the memory of all visitors, and problems as sentences. No widgets and no models here."""

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

OWN_THRESHOLD = "default"  # the decoder's threshold, see `Predictor.segment`


class Problem(LdvcError):
    """A sentence for the visitor, shown beside a field: "photo", "names", "model" or "run"."""

    def __init__(self, field: str, sentence: str) -> None:
        super().__init__(sentence)
        self.field = field


@dataclass
class Answer:
    """A photo segmented by names. Later events add results and never change existing ones."""

    model: str  # key of the model choice
    decoder: str  # the decoder of `PREDICTOR_DECODERS` that answers, see `LoadedModel.decoder`
    photo: str  # path of the uploaded file
    fingerprint: str  # SHA-256 of the file
    image: ImageState  # the encoded photo: new names do not encode it again
    parsed_names: list[ClassName]  # all names of the question
    names: list[str]  # titles of the classes among them; equal to `names` of every result
    company: bool = True  # whether a single name was segmented together with `ldvc.predictor.COMPANY`
    none_named: bool = False  # whether a name such as "background" allows "none of these"
    chosen: str | None = None  # key of the chosen model, if lite answered in its place
    notice: str = ""  # a sentence about this replacement
    results: dict[tuple[str, bool], Segmentation | None] = field(default_factory=dict)  # by (decoder, company)
    pictures: dict[tuple, str] = field(default_factory=dict)  # see `Tab.photo`; shared by answers about the same photo
    drawn: dict[str, tuple] = field(default_factory=dict)  # the settings with which each tab was drawn, by the key of the tab
    kept: Answer | None = None  # the answer whose photo and results all visitors share, see `Segmenter.keep`

    @property
    def photo_name(self) -> str:
        """Name of the uploaded file."""
        return Path(self.photo).name

    def background(self, wanted: float | str | None) -> float | str | None:
        """The threshold of "none of these": `wanted`, or `OWN_THRESHOLD` if `wanted` is None and a name allows it."""
        return OWN_THRESHOLD if self.none_named and wanted is None else wanted


@dataclass(eq=False)
class Session:
    """One visitor's state, never shared."""

    answer: Answer | None = None  # the answer to the last question
    open_tab: str = "segment"  # key of the tab that the visitor looks at
    choice: object = None  # identity of the last event that chose a model; older events, which may wait for a download, end
    expired: bool = False  # whether an answer was forgotten

    def forget(self) -> None:
        """Remove the answer."""
        self.expired = self.expired or self.answer is not None
        self.answer = None


class Visits:
    """Limits the memory of all answers. The answer of the visitor whose last event is the oldest is removed first.

    Args:
        limit: bytes for all answers together. The newest answer is kept even if it is larger.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._sizes: WeakKeyDictionary[Session, int] = WeakKeyDictionary()  # the oldest event first

    @property
    def total(self) -> int:
        """Bytes of all answers, each measured at the last event of its visitor."""
        return sum(self._sizes.values())

    def keep(self, session: Session) -> None:
        """Measure a visitor's answer after an event, and remove the oldest other answers until the limit holds."""
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
    """Bytes of the arrays, tensors and texts of an answer, each counted once, without those that all visitors share."""
    counted: set[Any] = set()
    if answer.kept is not None:
        _size(answer.kept, counted)
    return _size(answer, counted)


def _size(root: Any, counted: set[Any]) -> int:
    """Bytes of the values that an object refers to and that are not counted yet; adds them to `counted`."""
    total, stack = 0, [root]
    while stack:
        value: Any = stack.pop()
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            identity, size = ("tensor", storage.data_ptr()), storage.nbytes()
        elif isinstance(value, np.ndarray):
            while isinstance(value.base, np.ndarray):
                value = value.base
            identity, size = id(value), value.nbytes
        else:
            identity, size = id(value), len(value) if isinstance(value, str | bytes) else 0
        if identity in counted:
            continue
        counted.add(identity)
        total += size
        if isinstance(value, list | tuple):
            stack += value
        elif isinstance(value, dict) or type(value).__module__.startswith("ldvc."):
            stack += (value if isinstance(value, dict) else vars(value)).values()
    return total
