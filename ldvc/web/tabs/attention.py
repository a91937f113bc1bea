"""The Attention tab (the paper's Figures 1 and 5): which share of each patch's attention goes to which name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from ldvc.visualize import colours_for, fit_size, heat_map, resize_picture
from ldvc.web import html
from ldvc.web.handlers import LCSA_OFF, Handlers
from ldvc.web.inputs import unchecked
from ldvc.web.session import Visit
from ldvc.web.tabs import Tab, program, texts
from ldvc.web.views.attention import Column, attention_grid, attention_slider, grey_photo, value_range

DECODERS = ("ldvc", "ldvc_without_lcsa", "zegclip")
PICTURE_SIDE = 896  # of the pictures that programs get
SHOWN = 8  # names at a time, so that the table is drawn at once

# gr.ImageSlider cannot be moved with the keyboard; a range input can. The line's place is kept on the element itself, which
# stays when its content is drawn anew.
SLIDER_SCRIPT = """
const move = (event) => {
    if (event.target.type === 'range') element.style.setProperty('--at', event.target.value + '%');
};
element.addEventListener('input', move);
"""


@dataclass
class Settings:
    """What the visitor chose here; stays from one question to the next.

    Attributes:
        layer: 0 is the first; None = the last.
        head: None = mean of all.
        names: which are shown, where there are more than `SHOWN`.
        rescale, off: see the check boxes.
        left, right: decoders under the slider.
    """

    layer: int | None = None
    head: int | None = None
    names: list[str] = field(default_factory=list)
    rescale: bool = False
    off: bool = False
    left: str = "ldvc"
    right: str = "ldvc_without_lcsa"


class AttentionTab(Tab):
    """See the module."""

    key, title = "attention", "Attention"

    def __init__(self, handlers: Handlers, visit: gr.State) -> None:
        super().__init__(handlers, visit)
        self.empty = gr.HTML(html.empty(texts.ATTENTION_EMPTY))
        with gr.Column(visible=False, elem_classes="ldvc-tab") as self.body:
            gr.HTML(html.section(texts.ATTENTION_TITLE, texts.ATTENTION_HELP))
            with gr.Row(elem_classes="ldvc-controls"):
                self.layer = gr.Radio([], label=texts.ATTENTION_LAYER, elem_id="attention-layer", min_width=210)
                self.head = gr.Dropdown([], label=texts.ATTENTION_HEAD, elem_id="attention-head", min_width=110)
                self.rescale = gr.Checkbox(
                    label=texts.ATTENTION_RESCALE,
                    info=texts.ATTENTION_RESCALE_INFO,
                    elem_id="attention-rescale",
                    min_width=120,
                )
                self.off = gr.Checkbox(
                    label=texts.ATTENTION_OFF, info=texts.ATTENTION_OFF_INFO, elem_id="attention-off", min_width=140
                )
                self.company = gr.Checkbox(
                    True,
                    label=texts.COMPANY,
                    info=texts.COMPANY_INFO,
                    visible=False,
                    elem_id="attention-company",
                    min_width=140,
                )
            self.names = gr.Dropdown(
                [],
                label=texts.ATTENTION_NAMES,
                info=texts.ATTENTION_NAMES_INFO,
                multiselect=True,
                max_choices=SHOWN,
                visible=False,
                elem_id="attention-names",
            )
            self.note = gr.HTML(visible=False, elem_id="attention-note")
            self.grid = gr.HTML(elem_id="attention-grid", apply_default_css=False)
            gr.HTML(html.section(texts.SLIDER_TITLE, texts.SLIDER_HELP), elem_classes="ldvc-later")
            with gr.Row(elem_classes="ldvc-controls"):
                self.name = gr.Dropdown([], label=texts.SLIDER_NAME, elem_id="slider-name", min_width=120)
                self.left = gr.Dropdown([], label=texts.SLIDER_LEFT, elem_id="slider-left", min_width=120)
                self.right = gr.Dropdown([], label=texts.SLIDER_RIGHT, elem_id="slider-right", min_width=120)
            self.slider = gr.HTML(elem_id="attention-slider", apply_default_css=False, js_on_load=SLIDER_SCRIPT)
            gr.HTML(
                f'<details class="ldvc-exactly"><summary>{texts.ATTENTION_EXACTLY}</summary>'
                f"{texts.ATTENTION_EXACTLY_TEXT}</details>",
                apply_default_css=False,
            )
        self.controls = [self.layer, self.head, self.names, self.rescale, self.off, self.name, self.left, self.right]
        self.pictures = [self.note, self.grid, self.slider]
        self.outputs = [self.empty, self.body, *self.controls, self.company, *self.pictures]
        self.waiting = [self.empty, self.grid]

    # ---- drawing ----

    def update(self, visit: Visit) -> dict:
        """Controls that fit the result, and the pictures."""
        if visit.empty:
            return {self.empty: gr.HTML(visible=True), self.body: gr.Column(visible=False)}
        settings = self.settings(visit)
        (main,) = self.handlers.results(visit, "ldvc")
        layers, heads = main.attention_shape
        if settings.layer is not None and settings.layer >= layers:
            settings.layer = None
        if settings.head is not None and settings.head >= heads:
            settings.head = None
        shown = [visit.names[index] for index in self.shown(visit, settings)]
        decoders = self.decoders(visit, settings)
        return {
            self.empty: gr.HTML(visible=False),
            self.body: gr.Column(visible=True),
            self.layer: gr.Radio(
                [(str(layer + 1), layer) for layer in range(layers)],
                value=layers - 1 if settings.layer is None else settings.layer,
            ),
            self.head: gr.Dropdown(
                [(texts.ATTENTION_MEAN, -1), *((str(head + 1), head) for head in range(heads))],
                value=-1 if settings.head is None else settings.head,
            ),
            self.names: gr.Dropdown(visit.names, value=shown, multiselect=True, visible=len(visit.names) > SHOWN),
            self.rescale: settings.rescale,
            self.off: settings.off,
            self.company: gr.Checkbox(visit.company, visible=len(visit.names) == 1),
            self.name: gr.Dropdown(visit.names, value=visit.chosen),
            **self.slider_choices(decoders, settings),
            **self.draw_pictures(visit),
        }

    def slider_choices(self, decoders: list[str], settings: Settings) -> dict:
        """The decoders that can be laid over each other."""
        if settings.left not in decoders:
            settings.left = decoders[0]
        if settings.right not in decoders:
            settings.right = decoders[min(1, len(decoders) - 1)]
        choices = [(texts.DECODER_TITLES[decoder], decoder) for decoder in decoders]
        return {
            self.left: gr.Dropdown(choices, value=settings.left),
            self.right: gr.Dropdown(choices, value=settings.right),
        }

    def draw_pictures(self, visit: Visit) -> dict:
        """Table and slider; nothing is computed by a model that was computed before."""
        settings = self.settings(visit)
        columns = self.columns(visit, settings)
        main = columns[0].result
        photo = visit.kept.setdefault("attention-photo", None) or grey_photo(main.picture)
        visit.kept["attention-photo"] = photo
        shown, colours = self.shown(visit, settings), colours_for(visit.names)
        low, high = value_range(columns, shown, rescale=settings.rescale)
        index = visit.names.index(visit.chosen)
        by_decoder = {column.decoder: column for column in columns if column.maps is not None}
        left, right = by_decoder.get(settings.left, columns[0]), by_decoder.get(settings.right, columns[0])
        note = html.notice(texts.ATTENTION_ONE) if len(visit.names) == 1 and not main.company else ""
        return {
            self.note: gr.HTML(note, visible=bool(note)),
            self.grid: attention_grid(
                columns, visit.names, main.seen, colours, shown, photo=photo, rescale=settings.rescale
            ),
            self.slider: attention_slider(left, right, index, visit.chosen, photo=photo, low=low, high=high),
        }

    def columns(self, visit: Visit, settings: Settings) -> list[Column]:
        """One for each decoder of the table."""
        decoders = (*DECODERS, LCSA_OFF) if settings.off else DECODERS
        results = self.handlers.results(visit, *decoders)
        layer = -1 if settings.layer is None else settings.layer
        return [
            Column.of(decoder, result, layer=layer, head=settings.head)
            for decoder, result in zip(decoders, results, strict=True)
        ]

    def decoders(self, visit: Visit, settings: Settings) -> list[str]:
        """The decoders that this checkpoint has and that are shown."""
        return [column.decoder for column in self.columns(visit, settings) if column.maps is not None]

    @staticmethod
    def settings(visit: Visit) -> Settings:
        """What the visitor chose here."""
        return visit.settings.setdefault("attention", Settings())

    @staticmethod
    def shown(visit: Visit, settings: Settings) -> list[int]:
        """Indices of the names in the table: all, or those chosen, or the first."""
        if len(visit.names) <= SHOWN:
            return list(range(len(visit.names)))
        chosen = [index for index, name in enumerate(visit.names) if name in settings.names][:SHOWN]
        return chosen or list(range(SHOWN))

    # ---- events ----

    def wire(self) -> None:
        """Every control draws the pictures anew."""

        def change(
            layer: int | None,
            head: int | None,
            names: list[str] | None,
            rescale: bool,
            off: bool,
            name: str | None,
            left: str | None,
            right: str | None,
            visit: Visit,
        ) -> dict[Any, Any]:
            visit = visit.latest
            if visit.empty:
                return gr.skip()
            settings = self.settings(visit)
            settings.layer, settings.head = layer, None if head is None or head < 0 else head
            settings.names, settings.rescale = list(names or ()), bool(rescale)
            settings.left, settings.right = left or settings.left, right or settings.right
            self.handlers.choose(name, visit)
            visit.drawn[self.key] = self.stamp(visit)
            choices = {}
            if settings.off != bool(off):
                settings.off = bool(off)
                if settings.off:
                    settings.right = LCSA_OFF
                choices = self.slider_choices(self.decoders(visit, settings), settings)
            return self.unless_overtaken(visit, lambda present: {**choices, **self.draw_pictures(present)})

        gr.on(
            [control.input for control in self.controls],
            change,
            [*self.controls, self.visit],
            [self.left, self.right, *self.pictures],
            trigger_mode="always_last",
            **self.quiet,
        )

        def keep_company(company: bool, visit: Visit) -> dict[Any, Any]:
            visit = visit.latest
            if not self.handlers.keep_company(bool(company), visit):
                return gr.skip()
            visit.drawn[self.key] = self.stamp(visit)
            return self.unless_overtaken(visit, self.draw_pictures)

        self.company.input(
            keep_company, [self.company, self.visit], self.pictures, trigger_mode="always_last", **self.quiet
        )

    def endpoints(self) -> None:
        """/attention."""

        def attention(
            photo: str | None,
            names: str,
            name: str,
            layer: float | None = 0,
            head: float | None = 0,
            use_company: bool = True,
            visit: Visit | None = None,
        ) -> tuple:
            """Cross-attention of a decoder layer to one of the names, on one fixed scale from 0 to 1.

            name is one of names. layer counts from 1, 0 is the last; head counts from 1, 0 is the mean of all. A single name
            shares the attention with a few words for stuff, unless use_company is false. Returns three heat maps over the
            photo (LDVC with LCSA, LDVC trained without it, ZegCLIP's decoder; none where the checkpoint has no such decoder)
            and the data. For each of these decoders, and for LDVC with LCSA switched off in the same weights (an
            intervention): "attention", the softmax over the names of every patch, row by row; "inside" and "outside", its
            mean inside the name's mask of that decoder and outside (null: no such pixel). "company" has the words and the
            attention that goes to all of them together.
            """
            visit = program.ask(self, photo, names, visit, company=use_company)
            title = next((each for each in visit.names if each.casefold() == (name or "").strip().casefold()), None)
            if title is None:
                raise program.refusal(texts.NOT_ASKED_FOR.format(name=name))
            decoders = (*DECODERS, LCSA_OFF)
            results = dict(zip(decoders, self.handlers.results(visit, *decoders), strict=True))
            main = results["ldvc"]
            at, which = program.layer_and_head(main, layer, head)
            index = visit.names.index(title)
            columns = {decoder: Column.of(decoder, results[decoder], layer=at, head=which) for decoder in decoders}
            size = fit_size(*main.size, long_side=PICTURE_SIDE)
            picture = resize_picture(main.picture, size)
            maps = [
                None if column.maps is None else heat_map(column.enlarged(column.maps[index], PICTURE_SIDE), picture)
                for column in (columns[decoder] for decoder in DECODERS)
            ]
            there = {decoder: column for decoder, column in columns.items() if column.maps is not None}
            shares = {decoder: column.inside_outside(index) for decoder, column in there.items()}
            data = {
                "name": title,
                "layer": at + 1,
                "head": "mean" if which is None else which + 1,
                "grid": {"rows": main.grid[0], "columns": main.grid[1]},
                "attention": {decoder: program.rounded(column.maps[index]) for decoder, column in there.items()},
                "inside": {decoder: inside for decoder, (inside, _) in shares.items()},
                "outside": {decoder: outside for decoder, (_, outside) in shares.items()},
                "company": {
                    "words": main.company,
                    "attention": {
                        decoder: program.rounded(column.company)
                        for decoder, column in there.items()
                        if column.company is not None
                    },
                },
            }
            return *maps, data, visit

        program.declare(
            self,
            attention,
            [
                lambda: gr.Textbox(label="One of the class names"),
                lambda: unchecked(gr.Number(0, precision=0, label="Layer from 1; 0 = last")),
                lambda: unchecked(gr.Number(0, precision=0, label="Head from 1; 0 = mean")),
                lambda: gr.Checkbox(True, label="Company for a single name"),
            ],
            [
                lambda: gr.Image(label="LDVC with LCSA", format="jpeg"),
                lambda: gr.Image(label="LDVC without LCSA", format="jpeg"),
                lambda: gr.Image(label="ZegCLIP's decoder", format="jpeg"),
                lambda: gr.JSON(label="Data"),
            ],
            "attention",
        )
