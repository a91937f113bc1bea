"""The Compare tab (the paper's Figure 4): the same photo segmented in four ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import gradio as gr
import numpy as np

from ldvc.figures import compare_figure, figure_bytes
from ldvc.result import Segmentation
from ldvc.visualize import NONE_COLOUR, colours_for, fit_size, overlay, resize_picture
from ldvc.web import html, texts
from ldvc.web.html import escape, percent
from ldvc.web.segmenter import Segmenter
from ldvc.web.session import OWN_THRESHOLD, Answer
from ldvc.web.tabs import Changes, Shared, Tab, Values

SIDE = 600
NAMES = 8  # names in a caption: those with the largest areas

HELP = "Same photo, same names, same colours. Names of which the model saw no mask are marked."
DECODERS = {
    "clip": "No decoder: cosine of patch and name in CLIP.",
    "zegclip": "Names are queries and move; patches stay.",
    "ldvc_without_lcsa": "Patches attend to the names and move, each on its own.",
    "ldvc": "Patches attend to similar patches, then names, and move.",
}
OWN_THRESHOLDS = "Each decoder has its own threshold of “none of these”."
DIFFERS = "Another name than LDVC with LCSA on {share} of the photo."
FOOTNOTE = (
    "Marked and striped: the model saw no mask of this name. All four use the same CLIP; lite’s CLIP was trained on the same "
    "masks."
)


class CompareTab(Tab):
    """See the module."""

    key, title = "compare", "Compare"
    empty_text = "Segment a photo first. Then you see the results of four decoders side by side."

    def __init__(self, segmenter: Segmenter, shared: Shared) -> None:
        super().__init__(segmenter, shared)
        with gr.Column(visible=False, elem_classes="ldvc-tab") as self.body:
            gr.HTML(html.section("One photo, four decoders", HELP))
            self.view = gr.HTML(elem_id="compare-view", apply_default_css=False)
            self.files = self.figure_buttons()
        self.pictures = [self.view]
        self.outputs = [self.empty, self.body, self.view, self.files.problem]

    def draw(self, answer: Answer, values: Values) -> Changes:
        """The four pictures."""
        pictures, missing = paint_all(self.results(answer, values, *DECODERS)), self.segmenter.missing(answer, *DECODERS)
        own_thresholds = answer.background(self.shared.settings(values).background) == OWN_THRESHOLD
        return {**self.filled(), self.view: compare_html(pictures, missing, own_thresholds=own_thresholds)}

    def draw_file(self, kind: str, answer: Answer, values: Values) -> bytes:
        """The four pictures as a figure."""
        results = self.results(answer, values, *DECODERS)
        return figure_bytes(compare_figure(dict(zip(DECODERS, results, strict=True))), kind)


class Painted:
    """One decoder's `labels` (height, width; -1 = none of these), `overlay` (height, width, 3; uint8), and area `shares`."""

    def __init__(self, result: Segmentation, *, long_side: int = SIDE) -> None:
        self.result, size = result, fit_size(*result.size, long_side=long_side)
        self.labels, striped = result.labels_at(size), [not seen for seen in result.seen]
        self.overlay = overlay(resize_picture(result.picture, size), self.labels, colours_for(result.names), striped=striped)
        self.shares = result.area_shares(self.labels)

    def differing_share(self, other: Painted) -> float:
        """Share of the photo on which two label maps differ."""
        return float((self.labels != other.labels).mean())


def paint_all(results: Sequence[Segmentation | None]) -> dict[str, Painted | None]:
    """Paint the results, which are in the order of `DECODERS`; None if the checkpoint has no such decoder."""
    return {decoder: result and Painted(result) for decoder, result in zip(DECODERS, results, strict=True)}


def compare_html(pictures: dict[str, Painted | None], missing: Mapping[str, str], *, own_thresholds: bool = False) -> str:
    """Pictures of `paint_all` with captions. For `missing` see `Segmenter.missing`; `own_thresholds` adds a sentence."""
    figures = []
    for decoder, picture in pictures.items():
        head = f"<figcaption><b>{texts.DECODER_TITLES[decoder]}</b><small>{DECODERS[decoder]}</small></figcaption>"
        if picture is None:
            body = f'<div class="ldvc-map-missing"><span>{escape(missing[decoder])}</span></div>'
        else:
            body = _figure(texts.DECODER_TITLES[decoder], picture, pictures["ldvc"])
        figures.append(f'<figure class="ldvc-compared">{head}{body}</figure>')
    note = f"{FOOTNOTE} {OWN_THRESHOLDS}" if own_thresholds else FOOTNOTE
    return f'<div class="ldvc-compare">{"".join(figures)}</div><p class="ldvc-footnote">{note}</p>'


def _figure(title: str, picture: Painted, reference: Painted | None) -> str:
    names, seen, colours = picture.result.names, picture.result.seen, colours_for(picture.result.names)
    order = [i for i in np.argsort(-np.array(picture.shares), kind="stable") if picture.shares[i] > 0]
    chips = "".join(_chip(names[i], seen[i], colours[i], picture.shares[i]) for i in order[:NAMES])
    if len(order) > NAMES:
        chips += f'<li class="ldvc-subdued">and {len(order) - NAMES} more</li>'
    if (picture.labels < 0).any():
        chips += _chip(texts.NONE_OF_THESE, True, NONE_COLOUR, max(0.0, 1 - sum(picture.shares)))
    shares = ", ".join(f"{names[i]} {round(picture.shares[i] * 100)} %" for i in order[:NAMES])
    differs = ""
    if reference is not None and picture is not reference:
        differs = f'<p class="ldvc-differs">{DIFFERS.format(share=percent(picture.differing_share(reference)))}</p>'
    source = html.photo_uri(picture.overlay, long_side=SIDE, quality=80)
    return f'<img src="{source}" alt="{escape(f"{title}: {shares}")}"><ul class="ldvc-chips">{chips}</ul>{differs}'


def _chip(name: str, seen: bool, colour: str, share: float) -> str:
    mark, stripes, word = ("", "", "") if seen else (" ldvc-chip-unseen", " ldvc-striped", f" <em>{texts.UNSEEN}</em>")
    return (
        f'<li class="ldvc-chip{mark}"><span class="ldvc-swatch{stripes}" style="--c:{colour}"></span>'
        f"<span>{escape(name)}{word}</span><span class='ldvc-number'>{percent(share)}</span></li>"
    )
