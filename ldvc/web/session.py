"""What one visitor is looking at, and problems as sentences. No widgets and no models here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ldvc.errors import LdvcError
from ldvc.predictor import ImageState
from ldvc.result import Segmentation

OWN_THRESHOLD = "default"  # as `Predictor.segment` calls it


class Problem(LdvcError):
    """A sentence for the visitor and the field beside which it belongs: "photo", "names", "model" or "run"."""

    def __init__(self, field: str, sentence: str) -> None:
        super().__init__(field, sentence)  # both, or it could not be handed to another process
        self.field, self.sentence = field, sentence

    def __str__(self) -> str:
        return self.sentence


@dataclass
class Visit:
    """What one visitor is looking at; lives in their own session and is never shared.

    Attributes:
        model: key of the model choice; empty = the page's own.
        photo: path of the uploaded file.
        fingerprint: of the photo that `image` encodes.
        photo_name: the name of its file.
        image: the encoded photo: new names do not encode it again.
        asked: the cleaned names of the question, synonyms joined by " | "; what a model is asked.
        names: one title per class, the first of its synonyms, the same as `names` of every result; empty before the first
            question.
        background: what the visitor wants of "none of these": the decoders' own thresholds (`OWN_THRESHOLD`), a threshold in
            0..1 for all of them, or None: not allowed.
        none_named: "background" or the like is among the names asked, and so "none of these" is allowed.
        company: whether a single name is asked with the words of `ldvc.predictor.COMPANY`.
        results: by decoder, filled when first asked for; see `Handlers.results`.
        chosen: the class that the tabs show, one of `names`; shared by them.
        version: grows with every question and every new threshold; what was drawn for an older one is stale.
        drawn: by tab, the stamp of what it shows.
        kept: whatever a tab wants to remember until the next question; keys start with the tab's own.
        settings: by tab, what the visitor set there; one object for all questions of a visitor.
        successor: the visit that answers the visitor's next question, once there is one.
    """

    model: str = ""
    photo: str = ""
    fingerprint: str = ""
    photo_name: str = ""
    image: ImageState | None = None
    asked: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    background: float | str | None = OWN_THRESHOLD
    none_named: bool = False
    company: bool = True
    results: dict[str, Segmentation] = field(default_factory=dict)
    chosen: str = ""
    version: int = 0
    drawn: dict[str, tuple] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    successor: Visit | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing has been segmented yet."""
        return self.image is None or not self.names

    @property
    def threshold(self) -> float | str | None:
        """Of "none of these" in this answer: `background`, unless it is None and a name says otherwise."""
        return OWN_THRESHOLD if self.none_named and self.background is None else self.background

    @property
    def open_tab(self) -> str:
        """Key of the tab that the visitor looks at; a tab that is opened while a question is answered counts for both."""
        return self.settings.get("open tab", "segment")

    @open_tab.setter
    def open_tab(self, key: str) -> None:
        self.settings["open tab"] = key

    @property
    def latest(self) -> Visit:
        """The visit of the visitor's newest question that was answered: this one, unless a slow event was overtaken."""
        visit = self
        while visit.successor is not None:
            visit = visit.successor
        return visit
