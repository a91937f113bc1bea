"""What the page remembers of one visitor, and problems as sentences. No widgets and no models here."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

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
    """A photo segmented by names. Nothing of it changes; what is computed later is added.

    Attributes:
        model: key of the model choice.
        photo, photo_name: path of the uploaded file, and its name.
        fingerprint: SHA-256 of the file.
        image: the encoded photo: new names do not encode it again.
        asked: the parsed names.
        names: the titles of those that are classes; the same as `names` of every result.
        company: whether a single name was segmented together with `ldvc.predictor.COMPANY`.
        none_named: "background" or the like is among the names, and so "none of these" is allowed.
        chosen, notice: if lite answered because the chosen model got no GPU: the key of that model, and a sentence.
        results: by decoder, with company or without.
        pictures: the photo as data for HTML, by the options of `html.photo_uri`; shared by answers about the same photo.
        drawn: by tab, the shared settings with which it was drawn last.
    """

    model: str
    photo: str
    photo_name: str
    fingerprint: str
    image: ImageState
    asked: list[ClassName]
    names: list[str]
    company: bool = True
    none_named: bool = False
    chosen: str | None = None
    notice: str = ""
    results: dict[tuple[str, bool], Segmentation | None] = field(default_factory=dict)
    pictures: dict[tuple, str] = field(default_factory=dict)
    drawn: dict[str, tuple] = field(default_factory=dict)

    def background(self, wanted: float | str | None) -> float | str | None:
        """The threshold of "none of these": the wanted one, unless it is None (not allowed) and a name allows it."""
        return OWN_THRESHOLD if self.none_named and wanted is None else wanted


@dataclass
class Session:
    """One visitor's state, never shared.

    Attributes:
        answer: to the last question; None before the first.
        open_tab: key of the tab that the visitor looks at.
        decoded: path and pixels of an upload that no question was asked about yet.
    """

    answer: Answer | None = None
    open_tab: str = "segment"
    decoded: tuple[str, np.ndarray] | None = None
