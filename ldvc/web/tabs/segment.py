"""The Segment tab: the painted photo, a legend, a map of every class, downloads.

The browser paints the photo, so changes of opacity, outlines, names, thresholds and the class shown alone need no server.
These settings are the value of the viewer; other tabs and downloads read it.
"""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np

from ldvc.export import Identity, OverlayStyle, make_file
from ldvc.result import Segmentation
from ldvc.visualize import NONE_COLOUR, OPACITY, colours_for, fit_size
from ldvc.web import html, texts
from ldvc.web.downloads import Downloads
from ldvc.web.segmenter import Segmenter
from ldvc.web.session import Answer
from ldvc.web.tabs import VIEWER_DEFAULT, Changes, Shared, Tab, Values

VIEW_SIDE = 1024  # long side of the painted photo in the browser; downloads have the photo's own size
MAPS_SHOWN = 60  # class maps; of a longer list, those with the largest areas

SEEN_HELP = (
    "seen: the model saw masks of this class in training. unseen: it knows only the name (striped in the picture)."
)
DOWNLOADS_TITLE = "Download"
DOWNLOADS = {
    "overlay": "Overlay (PNG)",
    "mask": "Mask (indexed PNG)",
    "masks": "Mask per class (ZIP)",
    "cutouts": "Cut-outs (ZIP)",
    "data": "Data (JSON)",
    "coco": "COCO (JSON)",
    "yolo": "YOLO (ZIP)",
}
MAPS_TITLE = "One map per class"
MAPS_LEFT_OUT = "The {shown} classes that cover most of the photo are shown."
MAPS_HELP = (
    "How sure the model is that a pixel belongs to the class. Each name has a score of its own; they need not add up to 1."
)
SCALE = "One fixed scale from 0 to 1 for all maps"


def make_viewer() -> gr.HTML:
    """The painted photo. Its value holds the visitor's settings, see `VIEWER_DEFAULT`; `answer` holds the data to paint."""
    options = {"html_template": html.static("viewer.html"), "js_on_load": html.static("viewer.js"), "apply_default_css": False}
    return gr.HTML(VIEWER_DEFAULT, elem_id="overlay", answer=None, render=False, **options)


class SegmentTab(Tab):
    """See the module."""

    key, title, empty_text = "segment", "Segment", "Your photo will appear here, painted by class name."

    def __init__(self, segmenter: Segmenter, shared: Shared) -> None:
        super().__init__(segmenter, shared)
        self.viewer = shared.viewer.render()
        with gr.Column(visible=False, elem_classes="ldvc-downloads") as self.downloads_part:
            gr.HTML(html.caption(DOWNLOADS_TITLE))
            self.files = Downloads("download", DOWNLOADS, self.make)
        with gr.Column(visible=False, elem_classes="ldvc-later") as self.maps_part:
            gr.HTML(html.section(MAPS_TITLE, MAPS_HELP))
            self.maps = gr.HTML(elem_id="class-maps")
            gr.HTML(html.scale_bar(SCALE))
        self.pictures = [self.viewer, self.maps]
        self.outputs = [self.empty, self.viewer, self.downloads_part, self.maps_part, self.maps, self.files.problem]

    def draw(self, answer: Answer, values: Values) -> Changes:
        """Draw the viewer and the maps."""
        (result,) = self.results(answer, values, answer.decoder)
        photo, style = self.photo(answer, long_side=VIEW_SIDE, quality=80), values[self.viewer]
        data = viewer_data(result, photo=photo, own_threshold=self.segmenter.threshold(answer))
        style = {**style, "alone": style["alone"] if style["alone"] in result.names else None}
        return {
            self.empty: "",
            self.viewer: gr.HTML(style, answer=data),
            self.downloads_part: gr.Column(visible=True),
            self.maps_part: gr.Column(visible=True),
            self.maps: class_maps(result, photo=self.photo(answer, **html.GREY)),
            self.files.problem: "",
        }

    def blank(self, values: Values) -> Changes:
        """The viewer keeps the visitor's settings."""
        return {**super().blank(values), self.viewer: gr.HTML(values[self.viewer], answer=None)}

    def make(self, kind: str, answer: Answer, values: Values) -> tuple[str, bytes]:
        """Name and content of a file of a kind in `KINDS`, with the visitor's settings."""
        (result,) = self.results(answer, values, answer.decoder)
        return self.content(kind, answer, result, self.shared.style(values))

    def write(self, kind: str, answer: Answer, background: float | str | None, style: OverlayStyle) -> str:
        """Write a file of a kind in `KINDS` and return its path."""
        (result,) = self.segmenter.results(answer, answer.decoder, background=background)
        return self.files.write(*self.content(kind, answer, result, style))

    def content(self, kind: str, answer: Answer, result: Segmentation, style: OverlayStyle) -> tuple[str, bytes]:
        """Name and content of a file of a kind in `KINDS`."""
        identity = Identity(self.segmenter.model(answer).name, self.segmenter.weights_digest(answer))
        return make_file(kind, result, style=style, identity=identity, photo=answer.photo_name)


def titles(result: Segmentation) -> list[str]:
    """All words of each class, joined by "|"."""
    return [" | ".join(words) for words in result.synonyms]


def viewer_data(result: Segmentation, *, photo: str, own_threshold: float) -> dict[str, Any]:
    """Data with which `viewer.js` paints the photo without the server.

    Args:
        photo: data URI of the photo, with a long side of `VIEW_SIDE`.
        own_threshold: threshold of the checkpoint.

    Returns:
        "labels" has the index of the best class of each pixel, row by row, without any threshold. "scores" has the score of
        this class in 0..255, rounded so that the comparison with `own_threshold` gives the same result as in float32.
    """
    size = fit_size(*result.size, long_side=VIEW_SIDE)
    best, exact = result.best_at(size)
    limit = int(np.ceil(own_threshold * 255))
    scores = (exact * 255).round()
    scores = np.where(exact < own_threshold, np.minimum(scores, limit - 1), np.maximum(scores, limit))
    rows = zip(result.names, titles(result), result.seen, colours_for(result.names), strict=True)
    return {
        "photo": photo,
        "labels": html.packed(best),
        "scores": html.packed(scores),
        "width": size[1],
        "height": size[0],
        "classes": [dict(zip(("name", "title", "seen", "colour"), row, strict=True)) for row in rows],
        "own_threshold": own_threshold,
        "usual_opacity": OPACITY,
        "none": texts.NONE_OF_THESE,
        "none_colour": NONE_COLOUR,
        "note": SEEN_HELP,
    }


def class_maps(result: Segmentation, *, photo: str) -> str:
    """One heat map per class over the grey photo: the score of the class at every pixel, on a scale from 0 to 1."""
    size = fit_size(*result.size, long_side=html.MAP_SIDE)
    words, maps, left_out = titles(result), result.scores_at(size), ""
    order = list(range(len(words)))
    if len(order) > MAPS_SHOWN:
        shares = result.area_shares(result.labels_at(size))
        order = sorted(sorted(order, key=lambda index: -shares[index])[:MAPS_SHOWN])
        left_out = f'<p class="ldvc-footnote">{MAPS_LEFT_OUT.format(shown=MAPS_SHOWN)}</p>'
    figures = []
    for index in order:
        name, kind = html.escape(words[index]), texts.SEEN if result.seen[index] else texts.UNSEEN
        highest = f"up to {maps[index].max():.2f}"
        figures.append(
            f'<figure class="ldvc-map"><div class="ldvc-heat"><img src="{html.heat_uri(maps[index])}" '
            f'alt="Score of {name}: {highest}"></div><figcaption><b>{name}</b> '
            f'<span class="ldvc-tag ldvc-{kind}">{kind}</span> {highest}</figcaption></figure>'
        )
    height, width = result.size
    style = f"--photo:url({photo});--aspect:{width}/{height}"
    return f'<div class="ldvc-classmaps" style="{style}">{"".join(figures)}</div>{left_out}'
