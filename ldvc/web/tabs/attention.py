"""The Attention tab (the paper's Figures 1 and 5): which share of each patch's attention goes to which name.

Where plain CLIP is read densely, also to which patches a patch attends, see `ldvc.web.tabs.patch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import gradio as gr
import numpy as np

from ldvc.arrays import npz
from ldvc.figures import attention_figure, figure_bytes
from ldvc.predictor import PLAIN_CLIP
from ldvc.result import Segmentation
from ldvc.visualize import colours_for, fit_size
from ldvc.web import html, texts
from ldvc.web.html import MAP_SIDE, escape, percent
from ldvc.web.segmenter import LCSA_OFF, Segmenter
from ldvc.web.session import Answer
from ldvc.web.tabs import (
    Changes,
    Shared,
    Tab,
    Values,
    choices_for,
    chosen_layer_and_head,
    layer_and_head,
    message,
    patch,
)

DECODERS = ("ldvc", "ldvc_without_lcsa", "zegclip")
SHOWN = 8  # names at a time, so that the table is drawn at once
SLIDER_SIDE = 224
PATCH_PHOTO = {"long_side": 720, "quality": 72}  # options of `photo_uri`, as on the Routing tab

HELP = (
    "Every patch spreads its attention over the class names and, in the last layer, “none of these”. The shares add up to 1. "
    "The masks are read from the scores behind the last layer’s map. Rows: names. Columns: three decoders."
)
COLUMNS = {
    "ldvc": "patches attend to similar patches, then to names",
    "ldvc_without_lcsa": "patches attend to names only",
    "zegclip": "names attend to patches",
    LCSA_OFF: "the weights of the first column, without LCSA",
}
INTERVENTION = "intervention"
FIXED_SCALE = "Share of attention, one fixed scale from 0 to 1 for all maps"
RESCALED = "Share of attention, rescaled to the lowest and highest value shown: not 0 to 1"
ONE_NAME = "Before the last layer, the attention to a single name without company is 1 everywhere."
SHARES = "inside its mask {inside}, outside {outside}"
TO_NAMES = "Attention to the names:"
COMPANY_HELP = "Words that share the attention with a single name; they are not part of the overlay."
DETAILS = (
    "<p><b>The maps.</b> Drawn is the softmax over the names of the scores q·k / √d<sub>head</sub> of the chosen layer, of one "
    "head or of the mean score of all heads. For all three decoders the masks are read from the last layer’s mean scores. So "
    "“none of these” takes part in the last layer, with the score of the threshold: a patch attends most to its label.</p>"
    "<p><b>What differs.</b> In LDVC patches are the queries and names the keys. In ZegCLIP’s decoder names are the queries "
    "and patches the keys; its own softmax, in the layers before the last, runs over the patches.</p>"
    "<p><b>Inside and outside.</b> The mean of a map over the pixels to which its own decoder gives that name, “none of "
    "these” included, and over all others.</p>"
    "<p><b>Company.</b> A single name is segmented with a few words for stuff; their shares are added into one map.</p>"
    "<p><b>Without LCSA</b> is a decoder of its own, trained without the sub-layer: the paper’s ablation. "
    "<b>LCSA switched off</b> is the trained LDVC with the sub-layer left out at inference: an intervention. It shows what the "
    "other layers do by themselves, not what training without LCSA would have given.</p>"
    "<p>Synonyms of one name share a map: their shares are added.</p>"
)
COMPARE = "Compare two decoders"
SLIDER_LABEL = "Position of the line between the two maps, in percent from the left"


def make_company() -> gr.Checkbox:
    """Whether a single name is segmented with company."""
    info = "A few words for stuff, asked beside a single name."
    return gr.Checkbox(
        True, label=texts.COMPANY, info=info, visible=False, elem_id="attention-company", min_width=140, render=False
    )


class AttentionTab(Tab):
    """See the module."""

    key, title = "attention", "Attention"
    empty_text = "Segment a photo first. Then you see which share of each patch’s attention goes to which name."

    def __init__(self, segmenter: Segmenter, shared: Shared) -> None:
        super().__init__(segmenter, shared)
        with gr.Column(visible=False, elem_classes="ldvc-tab") as self.body:
            gr.HTML(html.section("Which name does each patch attend to?", HELP))
            with gr.Row(elem_classes="ldvc-controls"):
                self.layer, self.head = layer_and_head("attention")
                self.rescale = gr.Checkbox(
                    label="Rescale", info="From the lowest to the highest value shown.", elem_id="attention-rescale",
                    min_width=120,
                )  # fmt: skip
                self.off = gr.Checkbox(
                    label="Switch LCSA off", info="In the same weights: an intervention, not trained like this.",
                    elem_id="attention-off", min_width=140,
                )  # fmt: skip
                self.company = shared.company.render()
            self.names = gr.Dropdown(
                [], label="Names shown", info="Eight at a time.", multiselect=True, max_choices=SHOWN, visible=False,
                elem_id="attention-names",
            )  # fmt: skip
            self.note = message(elem_id="attention-note")
            self.grid = gr.HTML(elem_id="attention-grid", apply_default_css=False)
            self.files = self.figure_buttons(npz="Arrays (NPZ)")
            gr.HTML(html.section(COMPARE, "Drag the line, or move it with the arrow keys."), elem_classes="ldvc-later")
            with gr.Row(elem_classes="ldvc-controls"):
                self.name = gr.Dropdown([], label="Attention to", elem_id="slider-name", min_width=120)
                self.left = gr.Dropdown([], label="Left", elem_id="slider-left", min_width=120)
                self.right = gr.Dropdown([], label="Right", elem_id="slider-right", min_width=120)
            self.slider = gr.HTML(elem_id="attention-slider", apply_default_css=False, js_on_load=html.static("slider.js"))
            gr.HTML(html.details("What exactly is drawn", DETAILS), apply_default_css=False)
        with gr.Column(visible=False, elem_classes="ldvc-tab") as self.patch_body:
            gr.HTML(html.section(patch.TITLE, patch.HELP), elem_classes="ldvc-later")
            options = {"elem_id": "attention-patch", "apply_default_css": False, "js_on_load": html.static("routing.js")}
            self.patch = gr.HTML(None, html_template="${route}", route="", **options)
        self.missing = message(elem_id="attention-missing")
        self.settings = [
            self.layer, self.head, self.names, self.rescale, self.off, self.name, self.left, self.right, self.patch,
        ]  # fmt: skip
        self.pictures = [self.grid, self.slider, self.missing, self.files.problem]
        self.outputs = [self.empty, self.body, *self.settings, self.company, self.note, *self.pictures, self.patch_body]

    def blank(self, values: Values) -> Changes:
        """The patch that was chosen stays chosen."""
        return {**super().blank(values), self.patch: gr.HTML(route="")}

    def draw(self, answer: Answer, values: Values) -> Changes:
        """Attention to names, if there is a decoder, and of a patch, if CLIP is read densely."""
        dense, decodes = self.segmenter.model(answer).has_dense_clip, answer.decoder != PLAIN_CLIP
        changes = {
            self.empty: "",
            self.files.problem: "",
            self.body: gr.Column(visible=decodes),
            self.patch_body: gr.Column(visible=dense),
            self.missing: "" if decodes else html.notice(f"{TO_NAMES} {texts.NO_DECODER}"),
        }
        changes |= self.draw_names(answer, values) if decodes else {}
        return changes | (self.draw_patch(answer, values) if dense else {})

    def draw_patch(self, answer: Answer, values: Values) -> Changes:
        """The attention of the patch that was chosen last, or of the middle of the photo."""
        (result,) = self.results(answer, values, PLAIN_CLIP)
        chosen = values[self.patch] or [side // 2 for side in result.grid]
        row, column = (min(max(int(place), 0), side - 1) for place, side in zip(chosen, result.grid, strict=True))
        photo, reading = self.photo(answer, **PATCH_PHOTO), self.segmenter.model(answer).main.plain_clip.dense
        return {self.patch: gr.HTML(route=patch.patch_html(result, row, column, photo=photo, reading=reading))}

    def draw_names(self, answer: Answer, values: Values) -> Changes:
        """Widgets with the choices that the answer has, and the pictures."""
        (main,) = self.results(answer, values, answer.decoder)
        names, alone = answer.names, self.shared.settings(values).alone
        values = {**values, self.name: alone if alone in names else values[self.name]}
        layer, head = choices_for(main, *chosen_layer_and_head(main, values[self.layer], values[self.head]))
        shown = [names[index] for index in self.shown(names, values)]
        return {
            self.layer: layer,
            self.head: head,
            self.names: gr.Dropdown(names, value=shown, multiselect=True, visible=len(names) > SHOWN),
            self.company: gr.Checkbox(visible=len(names) == 1),
            self.name: gr.Dropdown(names, value=names[self.chosen(names, values)]),
            **self.draw_table(answer, values),
            **self.draw_slider_and_sides(answer, values),
        }

    def draw_table(self, answer: Answer, values: Values) -> Changes:
        """The maps of the names shown."""
        columns, names = self.columns(answer, values), answer.names
        options = {"photo": self.photo(answer, **html.GREY), "rescale": values[self.rescale]}
        alone = [ONE_NAME] if len(names) == 1 and columns[0].company is columns[0].none is None else []
        how = self.segmenter.missing(answer, *DECODERS).values()
        return {
            self.note: html.notice(" ".join(dict.fromkeys([*alone, *how]))),
            self.grid: attention_grid(columns, self.shown(names, values), **options),
        }

    def draw_slider(self, answer: Answer, values: Values) -> Changes:
        """Two decoders' maps of one name, on the scale of the table."""
        columns, names = self.columns(answer, values), answer.names
        low, high = value_range(columns, self.shown(names, values), rescale=values[self.rescale])
        there = {column.decoder: column for column in columns if column.maps is not None}
        sides, index = [there[decoder] for decoder in self.sides(list(there), values)], self.chosen(names, values)
        photo = self.photo(answer, **html.GREY)
        return {self.slider: attention_slider(*sides, index, names[index], photo=photo, low=low, high=high)}

    def draw_slider_and_sides(self, answer: Answer, values: Values) -> Changes:
        """The slider, and the decoders that can be chosen under it."""
        decoders = [column.decoder for column in self.columns(answer, values) if column.maps is not None]
        choices = [(texts.DECODER_TITLES[decoder], decoder) for decoder in decoders]
        left, right = self.sides(decoders, values)
        return {
            self.left: gr.Dropdown(choices, value=left),
            self.right: gr.Dropdown(choices, value=right),
            **self.draw_slider(answer, values),
        }

    def draw_file(self, kind: str, answer: Answer, values: Values) -> bytes:
        """The table as a figure, or all arrays of its decoders."""
        results = {column.decoder: column.result for column in self.columns(answer, values)}
        if kind == "npz":
            return npz(results)
        layer, head = chosen_layer_and_head(results[answer.decoder], values[self.layer], values[self.head])
        shown = self.shown(answer.names, values)
        return figure_bytes(attention_figure(results, layer=layer, head=head, shown=shown), kind)

    def columns(self, answer: Answer, values: Values) -> list[Column]:
        """Every decoder's maps at the chosen layer and head; what a model computed before is not computed again."""
        decoders = (*DECODERS, LCSA_OFF) if values[self.off] else DECODERS
        results = self.results(answer, values, *decoders)
        layer, head = chosen_layer_and_head(results[0], values[self.layer], values[self.head])
        return [Column.of(decoder, result, layer, head) for decoder, result in zip(decoders, results, strict=True)]

    def sides(self, decoders: list[str], values: Values) -> tuple[str, str]:
        """The decoders under the slider, of those that there are."""
        left, right = values[self.left], values[self.right]
        return (
            left if left in decoders else decoders[0],
            right if right in decoders else decoders[min(1, len(decoders) - 1)],
        )

    def shown(self, names: list[str], values: Values) -> list[int]:
        """Indices of the names in the table: all, or those chosen, or the first."""
        chosen = [index for index, name in enumerate(names) if name in (values[self.names] or ())][:SHOWN]
        return chosen if chosen and len(names) > SHOWN else list(range(min(len(names), SHOWN)))

    def chosen(self, names: list[str], values: Values) -> int:
        """Index of the name under the slider."""
        return names.index(values[self.name]) if values[self.name] in names else 0

    def wire(self) -> None:
        """The table is drawn before the slider: Gradio answers the events of a widget in the order of their declaration."""
        both = [self.layer, self.head, self.names, self.rescale, self.company]
        self.on([each.input for each in (*both, self.off)], self.draw_table, [self.note, self.grid])
        self.on([each.input for each in (*both, self.name, self.left, self.right)], self.draw_slider, [self.slider])

        def switch(answer: Answer, values: Values) -> Changes:
            """The new column goes under the slider."""
            return self.draw_slider_and_sides(answer, {**values, self.right: LCSA_OFF})

        self.on([self.off.input], switch, [self.left, self.right, self.slider])
        self.on([self.patch.input], self.draw_patch, [self.patch])


@dataclass(frozen=True)
class Column:
    """One decoder's maps.

    Attributes:
        decoder: key of `texts.DECODER_TITLES`.
        maps: (C, h, w) attention on the patch grid for all names, or None if there is no such decoder.
        result: where the maps are from.
        company: (h, w) attention to the words of `result.company` together, or None if there are none.
        none: (h, w) attention to "none of these", or None before the last layer.
    """

    decoder: str
    maps: np.ndarray | None = None
    result: Segmentation | None = None
    company: np.ndarray | None = None
    none: np.ndarray | None = None

    @classmethod
    def of(cls, decoder: str, result: Segmentation | None, layer: int, head: int | None) -> Column:
        """Read one layer, and one head or the mean of all, from a result."""
        if result is None:
            return cls(decoder)
        maps = result.cross_attention(layer=layer, head=head)
        company = result.company_attention(layer=layer, head=head) if result.company else None
        none = result.none_attention(layer=layer, head=head)
        return cls(decoder, maps, result, company, none if none.any() else None)

    @property
    def is_intervention(self) -> bool:
        """Whether the decoder was not trained like this."""
        return self.decoder == LCSA_OFF

    @cached_property
    def drawn(self) -> np.ndarray:
        """(C, height, width) maps at the size of the table's."""
        return self.enlarged(self.maps, MAP_SIDE)

    @cached_property
    def labels(self) -> np.ndarray:
        """(height, width), the decoder's label map at that size, -1 = none of these."""
        return self.result.labels_at(self.drawn.shape[1:])

    def enlarged(self, attention: np.ndarray, long_side: int) -> np.ndarray:
        """Maps (..., h, w) at a size of the photo, (..., height, width), padding cut off."""
        return self.result.attention_at(attention, fit_size(*self.result.size, long_side=long_side))

    def inside_outside(self, index: int) -> tuple[float | None, float | None]:
        """Mean attention to a name inside its mask and outside it; None where there is no such pixel."""
        values, inside = self.drawn[index], self.labels == index
        return tuple(float(values[part].mean()) if part.any() else None for part in (inside, ~inside))


def value_range(columns: Sequence[Column], shown: Sequence[int], *, rescale: bool) -> tuple[float, float]:
    """(0, 1), or the lowest and highest value of what is shown when rescaled, unless they are the same."""
    values = [column.maps[list(shown)] for column in columns if column.maps is not None]
    values += [shares for column in columns for shares in (column.company, column.none) if shares is not None]
    if not rescale or not values:
        return 0.0, 1.0
    low, high = float(min(each.min() for each in values)), float(max(each.max() for each in values))
    return (low, high) if high - low > 1e-6 else (0.0, 1.0)


def attention_grid(columns: Sequence[Column], shown: Sequence[int], *, photo: str, rescale: bool) -> str:
    """Rows are names, then a single name's company and "none of these"; columns are decoders; above is one colour bar.

    Args:
        shown: indices of the names to draw.
        photo: data of the grey photo under every map.
        rescale: stretch the scale to the values shown, and say so.
    """
    scale = value_range(columns, shown, rescale=rescale)
    main = next(column.result for column in columns if column.result is not None)
    names, colours = main.names, colours_for(main.names)
    rows = ["<span></span>" + "".join(map(_column_head, columns))]
    for index in shown:
        cells = "".join(_cell(column, index, names[index], *scale) for column in columns)
        rows.append(html.name_label(names[index], main.seen[index], colours[index]) + cells)
    help_text = f'{escape(", ".join(main.company))} <small>{COMPANY_HELP}</small>'
    rows += _row([(column, column.company) for column in columns], texts.COMPANY, f": {help_text}", *scale)
    first, *others = [*rows, *_row([(column, column.none) for column in columns], texts.NONE_OF_THESE, "", *scale)]
    table = f'<div class="ldvc-maps-row ldvc-maps-head">{first}</div>' + "".join(
        f'<div class="ldvc-maps-row">{row}</div>' for row in others
    )
    height, width = main.size
    return (
        f'<div class="ldvc-maps" style="--photo:url({photo});--aspect:{width}/{height};--columns:{len(columns)}">'
        f"{html.scale_bar(RESCALED if rescale else FIXED_SCALE, *scale)}{table}</div>"
    )


def _column_head(column: Column) -> str:
    tag = f'<span class="ldvc-tag ldvc-intervention">{INTERVENTION}</span>' if column.is_intervention else ""
    title = f"<b>{texts.DECODER_TITLES[column.decoder]}</b>{tag}<small>{COLUMNS[column.decoder]}</small>"
    return f'<div class="ldvc-maps-title{_mark(column)}">{title}</div>'


def _mark(column: Column) -> str:
    return " ldvc-is-intervention" if column.is_intervention else ""


def _row(shares: Sequence[tuple[Column, np.ndarray | None]], title: str, more: str, low: float, high: float) -> list[str]:
    """The row of what shares the attention with the names; `more` is HTML. No row where no column has it."""
    if all(values is None for _, values in shares):
        return []
    cells = "".join(
        _missing(column) if values is None else _map(column, column.enlarged(values, MAP_SIDE), title, "", low, high)
        for column, values in shares
    )
    return [f'<div class="ldvc-label ldvc-company"><span><b>{title}</b>{more}</span></div>{cells}']


def _cell(column: Column, index: int, name: str, low: float, high: float) -> str:
    if column.maps is None:
        return _missing(column)
    inside, outside = ("–" if share is None else percent(share) for share in column.inside_outside(index))
    return _map(column, column.drawn[index], name, SHARES.format(inside=inside, outside=outside), low, high)


def _missing(column: Column) -> str:
    return f'<figure class="ldvc-map ldvc-map-missing{_mark(column)}"><span>{texts.DECODER_MISSING}</span></figure>'


def _map(column: Column, values: np.ndarray, name: str, caption: str, low: float, high: float) -> str:
    """One map, enlarged; the caption is HTML already."""
    picture = html.heat_uri(values, low=low, high=high)
    title = texts.DECODER_TITLES[column.decoder] + (f" ({INTERVENTION})" if column.is_intervention else "")
    return (
        f'<figure class="ldvc-map{_mark(column)}"><div class="ldvc-heat"><img src="{picture}" '
        f'alt="Attention to {escape(name)}, {title}{f": {caption}" if caption else ""}"></div>'
        f"{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"
    )


def attention_slider(left: Column, right: Column, index: int, name: str, *, photo: str, low: float, high: float) -> str:
    """Two decoders' maps of one name over each other, parted by a line that a range input moves."""
    height, width = left.result.size
    sides = []
    for column, side in ((left, "left"), (right, "right")):
        picture = html.heat_uri(column.enlarged(column.maps[index], SLIDER_SIDE), low=low, high=high)
        title = texts.DECODER_TITLES[column.decoder]
        mark = f' <i class="ldvc-tag ldvc-intervention">{INTERVENTION}</i>' if column.is_intervention else ""
        sides.append(
            f'<img class="ldvc-slide-{side}" src="{picture}" alt="Attention to {escape(name)}, {title}">'
            f'<span class="ldvc-slide-label ldvc-slide-label-{side}" aria-hidden="true">{title}{mark}</span>'
        )
    return (
        f'<div class="ldvc-slide ldvc-heat" style="--photo:url({photo});--aspect:{width}/{height}">{"".join(sides)}'
        f'<span class="ldvc-slide-line" aria-hidden="true"></span>'
        f'<input class="ldvc-slide-input" type="range" min="0" max="100" step="1" aria-label="{SLIDER_LABEL}"></div>'
    )
