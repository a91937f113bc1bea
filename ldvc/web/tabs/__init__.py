"""The tabs of the answer, one module each: widgets, texts, and HTML.

A tab depends on an answer and the values of its widgets only: `draw(answer, values)` returns {component: update}. `values`
holds the value of each widget in `inputs`, which Gradio passes with every event.

After a question only the open tab is drawn, so that the first overlay does not wait for the other tabs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import gradio as gr

from ldvc.export import OverlayStyle, photo_stem
from ldvc.result import Segmentation
from ldvc.visualize import OPACITY
from ldvc.web import html, texts
from ldvc.web.downloads import PRIVATE, Downloads
from ldvc.web.segmenter import Segmenter
from ldvc.web.session import OWN_THRESHOLD, Answer

Values = dict[Any, Any]
Changes = dict[Any, Any]

VIEWER_DEFAULT = {"opacity": OPACITY, "outline": True, "names": True}
VIEWER_DEFAULT |= {"alone": None, "background": OWN_THRESHOLD, "thresholds": {}}
QUIET = {"show_progress": "hidden", **PRIVATE}


class Settings(NamedTuple):
    """Settings that all tabs share: thresholds and company (see `Segmenter.results`), and the class that is shown alone."""

    background: float | str | None
    thresholds: dict[str, float]
    alone: str | None
    company: bool


@dataclass(frozen=True)
class Shared:
    """The widgets that several tabs read: the visitor's session, the Segment tab's viewer, and the checkbox for company."""

    session: gr.State
    viewer: gr.HTML
    company: gr.Checkbox

    def settings(self, values: Values) -> Settings:
        """The settings that the visitor chose in these widgets."""
        viewer = values[self.viewer]
        background, thresholds = viewer["background"], viewer["thresholds"]
        background = background if background in (None, OWN_THRESHOLD) else share(background)
        thresholds = {name: share(value) for name, value in thresholds.items()}
        return Settings(background, thresholds, viewer["alone"], bool(values[self.company]))

    def style(self, values: Values) -> OverlayStyle:
        """The style of the overlay that the visitor chose."""
        viewer = values[self.viewer]
        return OverlayStyle(share(viewer["opacity"]), bool(viewer["outline"]), viewer["alone"], bool(viewer["names"]))


class Tab:
    """The widgets of a tab, and functions that draw an answer in them."""

    key = title = empty_text = ""  # `empty_text` is shown before the first question

    def __init__(self, segmenter: Segmenter, shared: Shared) -> None:
        self.segmenter, self.shared = segmenter, shared
        self.settings: list[Any] = []  # widgets that `draw` reads, in addition to those of `shared`
        self.outputs: list[Any] = []  # components that `draw` may change
        self.pictures: list[Any] = []  # components that show the answer; the first one shows progress
        self.body: gr.Column  # the whole tab except `empty`
        self.files: Downloads | None = None
        self.empty = message(html.empty(self.empty_text))

    def draw(self, answer: Answer, values: Values) -> Changes:
        """Updates that draw the whole tab for an answer."""
        raise NotImplementedError

    def filled(self, sentence: str = "") -> Changes:
        """Updates that show the body, or a sentence in its place."""
        changes = {self.empty: html.empty(sentence), self.body: gr.Column(visible=not sentence)}
        return changes | ({self.files.problem: ""} if self.files else {})

    def blank(self, values: Values) -> Changes:
        """Updates that remove an older answer; opening the tab draws the new one."""
        return {self.empty: html.empty(texts.DRAWING), **dict.fromkeys(self.pictures, "")}

    def show(self, answer: Answer, values: Values, draw: Callable[[Answer, Values], Changes] | None = None) -> Changes:
        """Call `draw`, or a function that draws a part, and record the settings with which the tab shows the answer."""
        changes = (draw or self.draw)(answer, values)
        answer.drawn[self.key] = self.shared.settings(values)
        return changes

    def wire(self) -> None:
        """Declare the tab's own events."""

    def wire_files(self) -> None:
        """Declare the events of `files`."""
        if self.files is not None:
            self.files.wire(self.shared.session, self.inputs)

    def figure_buttons(self, **other_labels: str) -> Downloads:
        """Buttons for the figure of `draw_file` in all formats, and for other kinds of files with these labels."""
        labels = {kind: f"Figure ({kind.upper()})" for kind in ("pdf", "svg", "png")}
        return Downloads(f"{self.key}-file", {**labels, **other_labels}, self.make_file)

    def make_file(self, kind: str, answer: Answer, values: Values) -> tuple[str, bytes]:
        """Name and content of the file of a button."""
        return f"{photo_stem(answer.photo_name)}-{self.key}.{kind}", self.draw_file(kind, answer, values)

    def draw_file(self, kind: str, answer: Answer, values: Values) -> bytes:
        """The content of a file of `make_file`."""
        raise NotImplementedError

    @property
    def inputs(self) -> set[Any]:
        """Inputs of all events that draw the tab."""
        return {self.shared.session, self.shared.viewer, self.shared.company, *self.settings}

    def results(self, answer: Answer, values: Values, *decoders: str) -> list[Segmentation | None]:
        """Segmentations with the visitor's settings; see `Segmenter.results`."""
        background, thresholds, _, company = self.shared.settings(values)
        options = {"background": background, "thresholds": thresholds, "company": company}
        return self.segmenter.results(answer, *decoders, **options)

    def photo(self, answer: Answer, **options: Any) -> str:
        """The data URI of the photo, made once for all questions about it; `options` are those of `html.photo_uri`."""
        key = tuple(options.items())
        if key not in answer.pictures:
            (result,) = self.segmenter.results(answer, answer.decoder)
            answer.pictures[key] = html.photo_uri(result.picture, **options)
        return answer.pictures[key]

    def redraw(self, values: Values, draw: Callable[[Answer, Values], Changes] | None = None) -> Changes:
        """Draw the session's answer. If a newer answer arrives in the meantime, draw that one instead."""
        session = values[self.shared.session]
        while session.answer is not None:
            answer = session.answer
            changes = self.show(answer, values, draw)
            if answer is session.answer:
                return changes
        return {self.empty: html.empty(texts.EXPIRED if session.expired else self.empty_text)}

    def open(self, values: Values) -> Changes:
        """Draw the tab when the visitor opens it, unless it shows the answer already."""
        session = values[self.shared.session]
        session.open_tab = self.key
        answer = session.answer
        if answer is not None and answer.drawn.get(self.key) == self.shared.settings(values):
            return gr.skip()
        return self.redraw(values)

    def on(self, triggers: Sequence[Any], draw: Callable[[Answer, Values], Changes], outputs: Sequence[Any]) -> None:
        """Draw parts of the tab on events of its widgets. Of several quick events only the last one is answered."""
        outputs = [self.empty, *outputs]
        gr.on(triggers, lambda values: self.redraw(values, draw), self.inputs, outputs, trigger_mode="always_last", **QUIET)


class LayerTab(Tab):
    """A tab with widgets for a decoder layer and an attention head (None = mean of all heads)."""

    def declare_layer_and_head(self) -> None:
        """Declare the widgets `layer` and `head`."""
        self.layer = gr.Radio([], label=texts.LAYER, elem_id=f"{self.key}-layer", min_width=120)
        self.head = gr.Dropdown([], label=texts.HEAD, elem_id=f"{self.key}-head", min_width=110)

    def layer_and_head(self, result: Segmentation, values: Values) -> tuple[int, int | None]:
        """The chosen layer and head. Default: the last layer and the mean, also if the result has no such layer or head."""
        (layers, heads), layer, head = result.attention_shape, values[self.layer], values[self.head]
        in_range = head is not None and 0 <= head < heads
        return layer if layer is not None and layer < layers else layers - 1, head if in_range else None

    def choices(self, result: Segmentation, values: Values) -> Changes:
        """Updates of the two widgets: the layers and heads of a result as choices."""
        (layers, heads), (layer, head) = result.attention_shape, self.layer_and_head(result, values)
        numbers = [(str(index + 1), index) for index in range(max(layers, heads))]
        return {
            self.layer: gr.Radio(numbers[:layers], value=layer),
            self.head: gr.Dropdown([(texts.MEAN, -1), *numbers[:heads]], value=-1 if head is None else head),
        }


def head_text(head: int | None) -> str:
    """A head in words; None = mean of all heads."""
    return f"{texts.MEAN} of all heads" if head is None else f"head {head + 1}"


def share(value: Any) -> float:
    """A number from the browser, clipped to 0..1."""
    return min(max(float(value), 0.0), 1.0)


def message(value: str = "", **options: Any) -> gr.HTML:
    """A place for a sentence of `html.problem`, `html.notice` or `html.empty`. The style sheet hides an empty one."""
    return gr.HTML(value, elem_classes="ldvc-message", **options)
