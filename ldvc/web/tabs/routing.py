"""The Routing tab: click a spot of the photo and see which regions it was routed to, and what it drew from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from ldvc.visualize import colours_for
from ldvc.web import html
from ldvc.web.handlers import Handlers
from ldvc.web.inputs import unchecked
from ldvc.web.session import Visit
from ldvc.web.tabs import Tab, program, texts
from ldvc.web.views.inline import photo_uri
from ldvc.web.views.routing import Spot, route

PHOTO_SIDE = 720

# A click or a key says which patch; the server answers with what it did. The patch is remembered here, too, so that keys that
# are pressed faster than answers come are not lost. The photo's element stays when its content is drawn anew, and with it
# the focus.
STAGE_SCRIPT = """
let at = null;
let waiting = 0; // milliseconds: until when answers to earlier keys do not count
const stage = () => element.querySelector('.ldvc-stage');
const go = (row, column) => {
    const data = stage().dataset;
    row = Math.min(Math.max(row, 0), data.rows - 1);
    column = Math.min(Math.max(column, 0), data.columns - 1);
    at = [row, column];
    waiting = performance.now() + 5000;
    element.dataset.picked = JSON.stringify(at);
    trigger('pick');
};
element.addEventListener('click', (event) => {
    if (!stage() || !stage().contains(event.target)) return;
    const box = stage().getBoundingClientRect(), data = stage().dataset;
    go(Math.floor((event.clientY - box.top) / box.height * data.height),
       Math.floor((event.clientX - box.left) / box.width * data.width));
});
element.addEventListener('keydown', (event) => {
    if (event.target !== stage()) return;
    const data = stage().dataset, [down, along] = event.shiftKey ? data.step.split(',').map(Number) : [1, 1];
    const [row, column] = at || [Number(data.row), Number(data.column)];
    const goals = {ArrowUp: [row - down, column], ArrowDown: [row + down, column], ArrowLeft: [row, column - along],
        ArrowRight: [row, column + along], Home: [row, 0], End: [row, data.columns - 1]};
    if (!(event.key in goals)) return;
    event.preventDefault();
    go(...goals[event.key]);
});
watch('value', () => {
    const data = stage() && stage().dataset, shown = data ? [Number(data.row), Number(data.column)] : null;
    if (`${shown}` === `${at}` || performance.now() > waiting) [at, waiting] = [shown, 0];
});
"""

# The patch that was picked last, as an event's inputs at the moment in which it is sent; see `SAID` of the Segment tab.
PICKED = """() => [null, JSON.parse(document.querySelector('#routing-view [data-picked]').dataset.picked)]"""


@dataclass
class Settings:
    """What the visitor chose here; stays from one question to the next.

    Attributes:
        layer: 0 is the first; None = the last.
        head: None = mean of all.
    """

    layer: int | None = None
    head: int | None = None


class RoutingTab(Tab):
    """See the module."""

    key, title = "routing", "Routing"

    def __init__(self, handlers: Handlers, visit: gr.State) -> None:
        super().__init__(handlers, visit)
        self.empty = gr.HTML(html.empty(texts.ROUTING_EMPTY))
        with gr.Column(visible=False, elem_classes="ldvc-tab") as self.body:
            gr.HTML(html.section(texts.ROUTING_TITLE, texts.ROUTING_HELP))
            with gr.Row(elem_classes="ldvc-controls"):
                self.layer = gr.Radio([], label=texts.ATTENTION_LAYER, elem_id="routing-layer", min_width=120)
                self.head = gr.Dropdown([], label=texts.ATTENTION_HEAD, elem_id="routing-head", min_width=110)
                self.row = gr.Number(label=texts.ROUTING_ROW, precision=0, elem_id="routing-row", min_width=90)
                self.column = gr.Number(label=texts.ROUTING_COLUMN, precision=0, elem_id="routing-column", min_width=90)
            self.view = gr.HTML(elem_id="routing-view", apply_default_css=False, js_on_load=STAGE_SCRIPT)
            self.picked = gr.JSON(visible=False, elem_id="routing-picked")  # see `PICKED`
        self.controls = [self.layer, self.head, self.row, self.column]
        self.pictures = [self.view, self.row, self.column]
        self.outputs = [self.empty, self.body, self.layer, self.head, *self.pictures]
        self.waiting = [self.empty, self.view]

    def update(self, visit: Visit) -> dict:
        """Controls that fit the result, and the pictures."""
        if visit.empty:
            return {self.empty: gr.HTML(visible=True), self.body: gr.Column(visible=False)}
        (result,) = self.handlers.results(visit, "ldvc")
        if not result.has_routing:
            return {self.empty: html.empty(texts.ROUTING_MISSING), self.body: gr.Column(visible=False)}
        settings = self.settings(visit)
        layers, heads = result.attention_shape
        if settings.layer is not None and settings.layer >= layers:
            settings.layer = None
        if settings.head is not None and settings.head >= heads:
            settings.head = None
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
            **self.draw_pictures(visit),
        }

    def draw_pictures(self, visit: Visit) -> dict:
        """The spot that was clicked last, or the middle of the photo."""
        settings = self.settings(visit)
        (result,) = self.handlers.results(visit, "ldvc")
        photo = visit.kept.get("routing-photo") or photo_uri(result.picture, long_side=PHOTO_SIDE, quality=72)
        visit.kept["routing-photo"] = photo
        rows, columns = result.grid
        row, column = visit.kept.get("routing-spot") or (rows // 2, columns // 2)
        layer = result.attention_shape[0] - 1 if settings.layer is None else settings.layer
        spot = Spot.of(result, row, column, layer=layer, head=settings.head)
        visit.kept["routing-spot"] = (spot.row, spot.column)
        return {
            self.view: route(
                spot,
                result.names,
                result.seen,
                colours_for(result.names),
                photo=photo,
                layer=layer,
                head=settings.head,
            ),
            self.row: spot.row + 1,  # no bounds: Gradio raises an error beyond them, `Spot.of` takes the nearest patch
            self.column: spot.column + 1,
        }

    @staticmethod
    def settings(visit: Visit) -> Settings:
        """What the visitor chose here."""
        return visit.settings.setdefault("routing", Settings())

    def wire(self) -> None:
        """Clicks, keys and controls draw the pictures anew."""

        def change(layer: int | None, head: int | None, row: float | None, column: float | None, visit: Visit) -> Any:
            visit = visit.latest
            if visit.empty or row is None or column is None:  # a number is being typed
                return gr.skip()
            settings = self.settings(visit)
            settings.layer, settings.head = layer, None if head is None or head < 0 else head
            visit.kept["routing-spot"] = (int(row) - 1, int(column) - 1)
            drawing = self.draw_pictures(visit)
            # What was typed is not written back, or the next digit, typed before this answer comes, would be lost.
            typed = {self.row: row, self.column: column}
            drawing = {each: change for each, change in drawing.items() if typed.get(each) != change}
            return self.unless_overtaken(visit, lambda _: drawing)

        def pick(visit: Visit, picked: list[int]) -> Any:
            visit = visit.latest
            if visit.empty:
                return gr.skip()
            visit.kept["routing-spot"] = tuple(picked)
            return self.unless_overtaken(visit, self.draw_pictures)

        options = {"trigger_mode": "always_last", **self.quiet}
        self.view.pick(pick, [self.visit, self.picked], self.pictures, js=PICKED, **options)
        changes = [self.layer.input, self.head.input, self.row.input, self.column.input]
        gr.on(changes, change, [*self.controls, self.visit], self.pictures, **options)

    def endpoints(self) -> None:
        """/routing."""

        def routing(
            photo: str | None,
            names: str,
            row: float | None,
            column: float | None,
            layer: float | None,
            head: float | None,
            visit: Visit | None,
        ) -> tuple:
            """Where local-consensus self-attention (LCSA) routed one patch of the photo, and what the patch drew from there.

            row and column count patches from 1, 0 is the middle; layer counts from 1, 0 is the last; head counts from 1, 0
            is the mean of all. Returns data: the patch and the grid, the class that it got and its score, the regions that
            its own region was routed to (best first; box as left, top, width, height in patches of the photo; affinity;
            share of the token attention that falls into it), the affinity of all regions row by row, the token attention
            of all patches row by row (0 outside those regions), and the patch's softmax over the names. A single name shares
            it with the words of "company".
            """
            visit = program.ask(self, photo, names, visit)
            (result,) = self.handlers.results(visit, "ldvc")
            if not result.has_routing:
                raise program.refusal(texts.ROUTING_MISSING)
            at, which = program.layer_and_head(result, layer, head)
            rows, columns = result.grid
            row = program.whole(row, "row") or rows // 2 + 1
            column = program.whole(column, "column") or columns // 2 + 1
            if not (1 <= row <= rows and 1 <= column <= columns):
                raise program.refusal(texts.NO_SUCH_PATCH.format(row=row, column=column, rows=rows, columns=columns))
            spot = Spot.of(result, row - 1, column - 1, layer=at, head=which)
            return spot_data(spot, result.names) | {
                "layer": at + 1,
                "head": "mean" if which is None else which + 1,
            }, visit

        program.declare(
            self,
            routing,
            [
                lambda: unchecked(gr.Number(0, precision=0, label="Row of the patch from 1; 0 = middle")),
                lambda: unchecked(gr.Number(0, precision=0, label="Column of the patch from 1; 0 = middle")),
                lambda: unchecked(gr.Number(0, precision=0, label="Layer from 1; 0 = last")),
                lambda: unchecked(gr.Number(0, precision=0, label="Head from 1; 0 = mean")),
            ],
            [lambda: gr.JSON(label="Data")],
            "routing",
        )


def spot_data(spot: Spot, names: list[str]) -> dict[str, Any]:
    """A spot as numbers; see the endpoint."""
    regions = zip(spot.boxes, spot.routing.affinity, spot.inside, strict=True)
    return {
        "patch": {"row": spot.row + 1, "column": spot.column + 1},
        "grid": {"rows": spot.grid[0], "columns": spot.grid[1]},
        "class": {"name": names[spot.label], "score": round(spot.score, 4)},
        "own_region": [round(side, 4) for side in spot.own_box],
        "regions": [
            {
                "box": [round(side, 4) for side in box],
                "affinity": round(float(affinity), 4),
                "attention": round(share, 4),
            }
            for box, affinity, share in regions
        ],
        "affinities": program.rounded(spot.routing.all_affinities.reshape(spot.routing.region_grid)),
        "token_attention": program.rounded(spot.attention, 5),
        "softmax": dict(zip(names, program.rounded(spot.shares), strict=True)),
        "company": spot.company,
    }
