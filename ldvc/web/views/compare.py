"""The Compare tab's picture: one photo segmented in four ways, with the same colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldvc.result import Segmentation
from ldvc.visualize import NONE_COLOUR, fit_size, overlay, resize_picture
from ldvc.web.html import escape, percent
from ldvc.web.tabs import texts
from ldvc.web.views.inline import photo_uri

SIDE = 600
NAMES = 8  # in a caption, those that cover most


@dataclass(frozen=True)
class Painted:
    """One decoder's answer.

    Attributes:
        decoder: key of `texts.DECODER_TITLES`.
        overlay: uint8 (height, width, 3).
        labels: (height, width), -1 = none of these.
        shares: of the area, for each name.
    """

    decoder: str
    overlay: np.ndarray
    labels: np.ndarray
    shares: list[float]

    @classmethod
    def of(cls, decoder: str, result: Segmentation, colours: Sequence[str], *, long_side: int = SIDE) -> Painted:
        """Paint a result."""
        size = fit_size(*result.size, long_side=long_side)
        labels = result.labels_at(size)
        striped = [not seen for seen in result.seen]
        painted = overlay(resize_picture(result.picture, size), labels, colours, striped=striped)
        return cls(decoder, painted, labels, result.area_shares(labels))


def compare_view(
    pictures: Sequence[Painted | str],
    names: Sequence[str],
    seen: Sequence[bool],
    colours: Sequence[str],
    *,
    own_thresholds: bool = False,
) -> str:
    """Four pictures with captions.

    Args:
        pictures: a decoder's answer, or the key of a decoder that the checkpoint does not have.
        names, seen, colours: of all names.
        own_thresholds: say that "none of these" is at each decoder's own threshold.
    """
    reference = next((each for each in pictures if isinstance(each, Painted) and each.decoder == "ldvc"), None)
    figures = "".join(_figure(each, reference, names, seen, colours) for each in pictures)
    note = f"{texts.COMPARE_FOOTNOTE} {texts.COMPARE_THRESHOLDS if own_thresholds else ''}".rstrip()
    return f'<div class="ldvc-compare">{figures}</div><p class="ldvc-footnote">{note}</p>'


def _figure(
    picture: Painted | str,
    reference: Painted | None,
    names: Sequence[str],
    seen: Sequence[bool],
    colours: Sequence[str],
) -> str:
    decoder = picture if isinstance(picture, str) else picture.decoder
    head = f"<b>{texts.DECODER_TITLES[decoder]}</b><small>{texts.COMPARE_DECODERS[decoder]}</small>"
    if isinstance(picture, str):
        missing = f'<div class="ldvc-map-missing"><span>{texts.DECODER_MISSING}</span></div>'
        return f'<figure class="ldvc-compared"><figcaption>{head}</figcaption>{missing}</figure>'
    order = [i for i in np.argsort(-np.array(picture.shares), kind="stable") if picture.shares[i] > 0]
    chips = "".join(_chip(names[i], seen[i], colours[i], picture.shares[i]) for i in order[:NAMES])
    if len(order) > NAMES:
        chips += f'<li class="ldvc-subdued">and {len(order) - NAMES} more</li>'
    none = max(0.0, 1 - sum(picture.shares))
    if (picture.labels < 0).any():
        chips += _chip(texts.NONE, True, NONE_COLOUR, none)
    said = ", ".join(f"{names[i]} {round(picture.shares[i] * 100)} %" for i in order[:NAMES])
    differs = ""
    if reference is not None and picture is not reference:
        share = float((picture.labels != reference.labels).mean())
        differs = f'<p class="ldvc-differs">{texts.COMPARE_DIFFERS.format(share=percent(share))}</p>'
    source = photo_uri(picture.overlay, long_side=SIDE, quality=80)
    return (
        f'<figure class="ldvc-compared"><figcaption>{head}</figcaption>'
        f'<img src="{source}" alt="{escape(f"{texts.DECODER_TITLES[decoder]}: {said}")}">'
        f'<ul class="ldvc-chips">{chips}</ul>{differs}</figure>'
    )


def _chip(name: str, seen: bool, colour: str, share: float) -> str:
    mark = "" if seen else " ldvc-chip-unseen"
    word = "" if seen else " <em>unseen</em>"
    stripes = "" if seen else " ldvc-striped"
    return (
        f'<li class="ldvc-chip{mark}"><span class="ldvc-swatch{stripes}" style="--c:{colour}"></span>'
        f"<span>{escape(name)}{word}</span><span class='ldvc-number'>{percent(share)}</span></li>"
    )
