"""The Attention tab (the paper's Figures 1 and 5): the share of each patch's attention that goes to each name.

For models with dense plain CLIP it also shows the attention of one patch to all patches, see `ldvc.web.tabs.patch`.
"""

from __future__ import annotations

import gradio as gr

from ldvc.arrays import npz
from ldvc.figures import attention_figure, figure_bytes
from ldvc.predictor import PLAIN_CLIP
from ldvc.result import Segmentation
from ldvc.web import html, texts
from ldvc.web.segmenter import LCSA_OFF, Segmenter
from ldvc.web.session import Answer
from ldvc.web.tabs import Changes, LayerTab, Shared, Values, message, patch
from ldvc.web.tabs import attention_maps as maps
from ldvc.web.tabs.attention_maps import Column, value_range

DECODERS = ("ldvc", "ldvc_without_lcsa", "zegclip")
SHOWN = 8  # maximum number of names in the table, so that it is drawn quickly
PATCH_PHOTO = {"long_side": 720, "quality": 72}  # arguments of `photo_uri`, the same as on the Routing tab

HELP = (
    "Every patch spreads its attention over the class names and, in the last layer, “none of these”. The shares add up to 1. "
    "The masks are read from the scores behind the last layer’s map. Rows: names. Columns: three decoders."
)
ONE_NAME = "Before the last layer, the attention to a single name without company is 1 everywhere."
TO_NAMES = "Attention to the names:"
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


def make_company() -> gr.Checkbox:
    """The checkbox that adds company to a single name."""
    info = "A few words for stuff, asked beside a single name."
    return gr.Checkbox(
        True, label=texts.COMPANY, info=info, visible=False, elem_id="attention-company", min_width=140, render=False
    )


class AttentionTab(LayerTab):
    """See the module."""

    key, title = "attention", "Attention"
    empty_text = "Segment a photo first. Then you see which share of each patch’s attention goes to which name."

    def __init__(self, segmenter: Segmenter, shared: Shared) -> None:
        super().__init__(segmenter, shared)
        with gr.Column(visible=False, elem_classes="ldvc-tab") as self.body:
            gr.HTML(html.section("Which name does each patch attend to?", HELP))
            with gr.Row(elem_classes="ldvc-controls"):
                self.declare_layer_and_head()
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
            gr.HTML(html.section(maps.HEADS_TITLE, maps.HEADS_HELP), elem_classes="ldvc-later")
            with gr.Row(elem_classes="ldvc-controls"):
                self.heads = gr.Checkbox(label="Show them", elem_id="heads", min_width=120)
                options = {"visible": False, "min_width": 120}
                self.heads_name = gr.Dropdown([], label="Attention to", elem_id="heads-name", **options)
                self.heads_decoder = gr.Dropdown([], label="Decoder", elem_id="heads-decoder", **options)
            options = {"elem_id": "heads-view", "apply_default_css": False, "js_on_load": html.static("heads.js")}
            self.heads_view = gr.HTML(None, html_template="${maps}", maps="", **options)
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
            self.heads, self.heads_name, self.heads_decoder, self.heads_view,
        ]  # fmt: skip
        self.pictures = [self.grid, self.slider, self.missing, self.files.problem]
        self.outputs = [self.empty, self.body, *self.settings, self.company, self.note, *self.pictures, self.patch_body]

    def blank(self, values: Values) -> Changes:
        """The patch that was chosen stays chosen."""
        return {**super().blank(values), self.patch: gr.HTML(route=""), self.heads_view: gr.HTML(maps="")}

    def draw(self, answer: Answer, values: Values) -> Changes:
        """The attention to names, if there is a decoder, and the attention of a patch, if plain CLIP is dense."""
        dense, decodes = self.segmenter.model(answer).has_dense_clip, answer.decoder != PLAIN_CLIP
        changes = {
            **self.filled(),
            self.body: gr.Column(visible=decodes),
            self.patch_body: gr.Column(visible=dense),
            self.missing: "" if decodes else html.notice(f"{TO_NAMES} {texts.NO_DECODER}"),
        }
        changes |= self.draw_names(answer, values) if decodes else {}
        return changes | (self.draw_patch(answer, values) if dense else {})

    def draw_patch(self, answer: Answer, values: Values) -> Changes:
        """The attention of the last chosen patch, or of the patch in the middle of the photo."""
        (result,) = self.results(answer, values, PLAIN_CLIP)
        chosen = values[self.patch] or [side // 2 for side in result.grid]
        row, column = (min(max(int(place), 0), side - 1) for place, side in zip(chosen, result.grid, strict=True))
        photo, reading = self.photo(answer, **PATCH_PHOTO), self.segmenter.model(answer).main.plain_clip.dense
        return {self.patch: gr.HTML(route=patch.patch_html(result, row, column, photo=photo, reading=reading))}

    def draw_names(self, answer: Answer, values: Values) -> Changes:
        """The pictures, and the widgets with the choices for this answer."""
        (main,) = self.results(answer, values, answer.decoder)
        names, alone = answer.names, self.shared.settings(values).alone
        if alone in names:
            values = {**values, self.name: alone, self.heads_name: alone}
        visible_names = [names[index] for index in self.shown_indices(names, values)]
        return {
            **self.choices(main, values),
            self.names: gr.Dropdown(names, value=visible_names, multiselect=True, visible=len(names) > SHOWN),
            self.company: gr.Checkbox(visible=len(names) == 1),
            self.name: gr.Dropdown(names, value=pick(values[self.name], names)),
            self.heads_name: gr.Dropdown(names, value=pick(values[self.heads_name], names)),
            **self.draw_table(answer, values),
            **self.draw_slider_and_heads(answer, values),
        }

    def draw_table(self, answer: Answer, values: Values) -> Changes:
        """The table of maps."""
        columns, names = self.columns(answer, values), answer.names
        options = {"photo": self.photo(answer, **html.GREY), "rescale": values[self.rescale]}
        one_name = [ONE_NAME] if len(names) == 1 and columns[0].company is columns[0].none is None else []
        missing = self.segmenter.missing(answer, *DECODERS).values()
        return {
            self.note: html.notice(" ".join(dict.fromkeys([*one_name, *missing]))),
            self.grid: maps.attention_grid(columns, self.shown_indices(names, values), **options),
        }

    def draw_slider(self, answer: Answer, values: Values) -> Changes:
        """The maps of one name from two decoders, on the scale of the table."""
        columns, name = self.columns(answer, values), pick(values[self.name], answer.names)
        low, high = value_range(columns, self.shown_indices(answer.names, values), rescale=values[self.rescale])
        available = {column.decoder: column for column in columns if column.maps is not None}
        left, right = (available[decoder] for decoder in self.sides(list(available), values))
        options = {"photo": self.photo(answer, **html.GREY), "low": low, "high": high}
        return {self.slider: maps.attention_slider(left, right, answer.names.index(name), name, **options)}

    def draw_heads(self, answer: Answer, values: Values) -> Changes:
        """The maps of one name from one decoder at all layers and heads, if the visitor wants them."""
        if not values[self.heads]:
            return {self.heads_view: gr.HTML(maps="")}
        available = self.available_results(answer, values)
        index = answer.names.index(pick(values[self.heads_name], answer.names))
        decoder = pick(values[self.heads_decoder], list(available))
        layer, head = self.layer_and_head(available[decoder], values)
        options = {"layer": layer, "head": head, "photo": self.photo(answer, **html.GREY), "rescale": values[self.rescale]}
        return {self.heads_view: gr.HTML(maps=maps.heads_html(available[decoder], decoder, index, **options))}

    def draw_slider_and_heads(self, answer: Answer, values: Values) -> Changes:
        """Slider and heads, and the choices of decoders for them."""
        decoders = list(self.available_results(answer, values))
        choices = [(texts.DECODER_TITLES[decoder], decoder) for decoder in decoders]
        chosen = (*self.sides(decoders, values), pick(values[self.heads_decoder], decoders))
        widgets = zip((self.left, self.right, self.heads_decoder), chosen, strict=True)
        return {
            **{widget: gr.Dropdown(choices, value=decoder) for widget, decoder in widgets},
            **self.draw_slider(answer, values),
            **self.draw_heads(answer, values),
        }

    def draw_file(self, kind: str, answer: Answer, values: Values) -> bytes:
        """The table as a figure, or the arrays of its decoders as NPZ."""
        results = self.decoders(answer, values)
        if kind == "npz":
            return npz(results)
        layer, head = self.layer_and_head(results[answer.decoder], values)
        figure = attention_figure(results, layer=layer, head=head, shown=self.shown_indices(answer.names, values))
        return figure_bytes(figure, kind)

    def columns(self, answer: Answer, values: Values) -> list[Column]:
        """The maps of every decoder at the chosen layer and head."""
        results = self.decoders(answer, values)
        chosen = self.layer_and_head(results[DECODERS[0]], values)
        return [Column(decoder, result, *chosen) for decoder, result in results.items()]

    def decoders(self, answer: Answer, values: Values) -> dict[str, Segmentation | None]:
        """The result of each decoder of the tab; None if the checkpoint has no such decoder."""
        decoders = (*DECODERS, LCSA_OFF) if values[self.off] else DECODERS
        return dict(zip(decoders, self.results(answer, values, *decoders), strict=True))

    def available_results(self, answer: Answer, values: Values) -> dict[str, Segmentation]:
        """The results of `decoders` that are not None."""
        return {decoder: result for decoder, result in self.decoders(answer, values).items() if result is not None}

    def sides(self, decoders: list[str], values: Values) -> tuple[str, str]:
        """The decoders on the two sides of the slider, chosen from `decoders`."""
        return pick(values[self.left], decoders), pick(values[self.right], decoders[1:2] + decoders)

    def shown_indices(self, names: list[str], values: Values) -> list[int]:
        """Indices of the names in the table: all names, or of a long list the chosen names or the first ones."""
        chosen = [index for index, name in enumerate(names) if name in (values[self.names] or ())][:SHOWN]
        return chosen if chosen and len(names) > SHOWN else list(range(min(len(names), SHOWN)))

    def wire(self) -> None:
        """Declare the events. Gradio answers them in this order, so the table is drawn first."""
        common = [self.layer, self.head, self.names, self.rescale, self.company]
        self.on([widget.input for widget in (*common, self.off)], self.draw_table, [self.note, self.grid])
        slider_widgets = (*common, self.name, self.left, self.right)
        self.on([widget.input for widget in slider_widgets], self.draw_slider, [self.slider])

        def switch(answer: Answer, values: Values) -> Changes:
            """Put the new column on the right side of the slider."""
            return self.draw_slider_and_heads(answer, {**values, self.right: LCSA_OFF})

        def enlarge(answer: Answer, values: Values) -> Changes:
            """Choose the layer and head of the small map that the visitor clicked."""
            (main,) = self.results(answer, values, answer.decoder)
            layer, head = (int(index) for index in values[self.heads_view])
            values = {**values, self.layer: max(layer, 0), self.head: head}
            pictures = [draw(answer, values) for draw in (self.draw_heads, self.draw_table, self.draw_slider)]
            return {**self.choices(main, values), **pictures[0], **pictures[1], **pictures[2]}

        def show_heads(answer: Answer, values: Values) -> Changes:
            widgets = dict.fromkeys((self.heads_name, self.heads_decoder), gr.Dropdown(visible=values[self.heads]))
            return widgets | self.draw_heads(answer, values)

        self.on([self.off.input], switch, [self.left, self.right, self.heads_decoder, self.slider, self.heads_view])
        self.on([self.patch.input], self.draw_patch, [self.patch])
        heads_widgets = [self.layer, self.head, self.rescale, self.company, self.heads_name, self.heads_decoder]
        self.on([widget.input for widget in heads_widgets], self.draw_heads, [self.heads_view])
        pictures = [self.heads_view, self.note, self.grid, self.slider]
        self.on([self.heads_view.input], enlarge, [self.layer, self.head, *pictures])
        self.on([self.heads.input], show_heads, [self.heads_name, self.heads_decoder, self.heads_view])


def pick(chosen: str | None, choices: list[str]) -> str:
    """The chosen value, or the first choice if the value is not among the choices."""
    return chosen if chosen in choices else choices[0]
