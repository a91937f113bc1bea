"""What the page does, as plain functions of values: no widgets here, so that tests need no browser.

A `Visit` holds what one visitor is looking at. It travels with the visitor's own session and is never shared.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldvc.errors import CheckpointError, InvalidImageError, InvalidNamesError, LdvcError, WeightsNotFoundError
from ldvc.names import clean_names
from ldvc.pictures import load_picture
from ldvc.predictor import ImageState, Predictor
from ldvc.result import Segmentation
from ldvc.visualize import colours_for, fit_size, heat_map, overlay, resize_picture
from ldvc.web import texts
from ldvc.web.html import LegendEntry

PHOTO_SIDE = 1600  # photos are shrunk to this long side when they come in
OVERLAY_SIDE = 1280
MAP_SIDE = 448
MAPS_SHOWN = 60  # class maps drawn at once; longer lists show those that cover most

WITH_LCSA, WITHOUT_LCSA = "ldvc", "ldvc_without_lcsa"


class Problem(LdvcError):
    """A sentence for the visitor and the field beside which it belongs: "photo", "names" or "run"."""

    def __init__(self, field: str, sentence: str) -> None:
        super().__init__(field, sentence)  # both, or it could not be handed to another process
        self.field, self.sentence = field, sentence

    def __str__(self) -> str:
        return self.sentence


class Models:
    """The arms of one checkpoint, loaded when first needed and shared by all visitors."""

    def __init__(self, source: str = "lite", *, load: Callable[..., Predictor] = Predictor.from_pretrained) -> None:
        self.name = source.rstrip("/").rsplit("/", 1)[-1]  # of a path, its last part: visitors need not know folders
        self._lock = threading.Lock()
        self.main = load(source, arm=WITH_LCSA)
        self._others: dict[str, Predictor | None] = {WITH_LCSA: self.main}

    def other(self, arm: str) -> Predictor | None:
        """Another arm of the checkpoint, or None if the checkpoint has no such arm."""
        with self._lock:
            if arm not in self._others:
                try:
                    self._others[arm] = self.main.sibling(arm)
                except (CheckpointError, WeightsNotFoundError):
                    self._others[arm] = None
            return self._others[arm]


@dataclass
class Visit:
    """What one visitor is looking at.

    Attributes:
        photo: fingerprint of the photo that `image` encodes.
        image: the encoded photo: new names do not encode it again.
        result: segmentation by the arm with LCSA.
        without: by the arm without, or None.
        attended: name whose attention is shown.
        context_declined: the single name for which the visitor removed the context word, in lower case.
    """

    photo: str = ""
    image: ImageState | None = None
    result: Segmentation | None = None
    without: Segmentation | None = None
    attended: str = ""
    context_declined: str = ""


@dataclass
class View:
    """What the page shows after an action. `label_map` has 0 for none of these and i + 1 for name i."""

    overlay: np.ndarray
    label_map: np.ndarray
    legend: list[LegendEntry]
    none_share: float | None
    summary: dict[str, Any]
    names: str = ""
    maps: list[tuple[np.ndarray, str]] = field(default_factory=list)
    attention: AttentionView | None = None
    context_added: bool = False


@dataclass
class AttentionView:
    """Attention to one name, with and without LCSA; `note` says why a map is missing or says nothing."""

    names: list[str]
    name: str
    with_lcsa: np.ndarray | None = None
    without_lcsa: np.ndarray | None = None
    note: str = ""


class Handlers:
    """The actions of the page."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def segment(
        self,
        photo: str | None,
        names: str,
        use_background: bool,
        threshold: float,
        visit: Visit,
        *,
        add_context: bool = True,
    ) -> tuple[View, Visit]:
        """Segment a photo by names.

        Args:
            photo: path of the uploaded file.
            names: separated by commas.
            use_background: allow "none of these".
            threshold: score that a name must reach then.
            visit: what the visitor was looking at.
            add_context: give a single name the context word for company.

        Raises:
            Problem: the visitor can put it right. The visit is unchanged.
        """
        if not photo:
            raise Problem("photo", texts.NO_PHOTO)
        cleaned = self._cleaned(names)
        context_added, declined = False, visit.context_declined
        if add_context:
            cleaned, context_added, declined = self._with_context(cleaned, visit)
        try:
            fingerprint = hashlib.sha256(Path(photo).read_bytes()).hexdigest()
            image = visit.image if fingerprint == visit.photo else None
            if image is None:
                image = self.models.main.encode_image(load_picture(photo, max_side=PHOTO_SIDE))
        except InvalidImageError as error:
            raise Problem("photo", str(error)) from error
        except OSError as error:
            raise Problem("photo", texts.NO_PHOTO) from error
        background = float(threshold) if use_background else None
        result = self.models.main.segment(cleaned, background=background, image=image)
        other = self.models.other(WITHOUT_LCSA)
        without = None if other is None else other.segment(cleaned, image=image)
        attended = visit.attended if visit.attended in cleaned else cleaned[0]
        visit = Visit(fingerprint, image, result, without, attended, declined)
        view = self.segmentation_view(visit)
        view.names = ", ".join(cleaned)
        view.context_added = context_added
        view.maps = self._class_maps(result)
        view.attention = self._attention_view(visit)
        return view, visit

    def remove_context(
        self, photo: str | None, names: str, use_background: bool, threshold: float, visit: Visit
    ) -> tuple[View, Visit]:
        """Segment again without the context word that the page had added.

        Raises:
            Problem: as `segment`.
        """
        kept = [name for name in self._cleaned(names) if name.casefold() != texts.CONTEXT_WORD]
        if len(kept) == 1:
            visit = Visit(**{**vars(visit), "context_declined": kept[0].casefold()})
        return self.segment(photo, ", ".join(kept), use_background, threshold, visit)

    def rethreshold(self, use_background: bool, threshold: float, visit: Visit) -> tuple[View, Visit] | None:
        """Draw the label map anew with another threshold; None if there is nothing to draw yet."""
        if visit.result is None:
            return None
        visit.result.background = float(threshold) if use_background else None
        return self.segmentation_view(visit), visit

    def attend(self, name: str, visit: Visit) -> tuple[AttentionView, Visit] | None:
        """Show the attention to another name; None if there is nothing to show yet."""
        if visit.result is None or name not in visit.result.names:
            return None
        visit.attended = name
        return self._attention_view(visit), visit

    @staticmethod
    def _cleaned(names: str | None) -> list[str]:
        try:
            return clean_names(names or "")
        except InvalidNamesError as error:
            raise Problem("names", str(error)) from error

    @staticmethod
    def _with_context(names: list[str], visit: Visit) -> tuple[list[str], bool, str]:
        """Names, whether the context word was added, and the name for which it is declined from now on."""
        if len(names) > 1:
            return names, False, ""
        name = names[0].casefold()
        shown_last = [] if visit.result is None else [each.casefold() for each in visit.result.names]
        # Whoever deletes the word from the list by hand and asks again has declined it, too.
        deleted = shown_last == [name, texts.CONTEXT_WORD]
        if name in (texts.CONTEXT_WORD, visit.context_declined) or deleted:
            return names, False, name
        return [*names, texts.CONTEXT_WORD], True, ""

    def segmentation_view(self, visit: Visit) -> View:
        """Overlay, legend and data of the visit's result; draws, computes nothing anew."""
        result = visit.result
        size = fit_size(*result.size, long_side=OVERLAY_SIDE)
        labels = result.labels_at(size)
        shares = result.area_shares(labels)
        colours = colours_for(result.names)
        painted = overlay(
            resize_picture(result.picture, size), labels, colours, striped=[not seen for seen in result.seen]
        )
        rows = zip(result.names, result.seen, colours, shares, strict=True)
        legend = [LegendEntry(name, seen, colour, share) for name, seen, colour, share in rows]
        none_share = None if result.background is None else max(0.0, 1 - sum(shares))
        summary = {
            "model": self.models.name,
            "arm": result.arm,
            "size": {"width": result.size[1], "height": result.size[0]},
            "classes": [
                {"name": entry.name, "seen": entry.seen, "area": round(entry.share, 4), "colour": entry.colour}
                for entry in legend
            ],
            "threshold": result.background,
            "none_of_these": None if none_share is None else round(none_share, 4),
        }
        label_map = (labels + 1).astype(np.uint8)
        return View(painted, label_map, legend, none_share, summary)

    @staticmethod
    def _class_maps(result: Segmentation) -> list[tuple[np.ndarray, str]]:
        size = fit_size(*result.size, long_side=MAP_SIDE)
        picture = resize_picture(result.picture, size)
        order = list(range(len(result.names)))
        if len(order) > MAPS_SHOWN:
            shares = result.area_shares(result.labels_at(size))
            order = sorted(sorted(order, key=lambda index: -shares[index])[:MAPS_SHOWN])
        maps = []
        for index in order:
            scores = result.scores_at(size, index)
            kind = texts.SEEN if result.seen[index] else texts.UNSEEN
            maps.append((heat_map(scores, picture), f"{result.names[index]} · {kind} · up to {scores.max():.2f}"))
        return maps

    @staticmethod
    def _attention_view(visit: Visit) -> AttentionView:
        result = visit.result
        view = AttentionView(names=result.names, name=visit.attended)
        if len(result.names) == 1:
            view.note = texts.ATTENTION_ONE
        size = fit_size(*result.size, long_side=2 * MAP_SIDE)
        picture = resize_picture(result.picture, size)
        index = result.names.index(visit.attended)

        def draw(segmentation: Segmentation) -> np.ndarray:
            return heat_map(segmentation.attention_at(segmentation.cross_attention()[index], size), picture)

        view.with_lcsa = draw(result)
        if visit.without is None:
            view.note = texts.ATTENTION_MISSING
        else:
            view.without_lcsa = draw(visit.without)
        return view
