"""The Routing tab: click on a patch of the photo and see to which regions it was routed, and what it attended to there."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr
import numpy as np

from ldvc.result import Segmentation
from ldvc.visualize import NONE_COLOUR, colours_for
from ldvc.web import html, texts
from ldvc.web.html import escape, name_label, number, percent
from ldvc.web.segmenter import Segmenter
from ldvc.web.session import Answer
from ldvc.web.tabs import Changes, Shared, Tab, Values, choices_for, chosen_layer_and_head, head_text, layer_and_head
from ldvc.web.tabs.patch import verdict
from ldvc.web.tabs.similarity import Box, rect, similarity_html
from ldvc.window_output import PatchRouting

PHOTO_SIDE = 720
BARS = 12  # names listed, the strongest first

HELP = "Local-consensus self-attention, step by step. Click on the photo, or focus it and use the arrow keys."
PHOTO_LABEL = (
    "The photo with the routing of one patch. Arrow keys move by one patch, with Shift by one region, Home and End to the "
    "ends of the row."
)
MISSING = "This checkpoint has no LCSA, so there is no routing to show."
NEEDS_LCSA = "Routing is a part of LDVC’s decoder."
STEPS = ("Route", "Attend to regions", "Attend to names")
STEP_HELP = (
    "The patch’s region (dashed) compares its mean query with the mean key of every region. The {k} with the highest "
    "affinity are chosen; the patch attends to no other.",
    "The patch attends to single patches inside those regions only. Shares add up to 100&#8239;%.",
    "Then the patch attends to the class names. Shares of its attention in layer {layer}, {head}.",
)
OWN_MARK = '<span class="ldvc-own-mark">its own region</span>'


class RoutingTab(Tab):
    """See the module. The value of `view` is the [row, column] of the patch, its prop `route` the HTML."""

    key, title = "routing", "Routing"
    empty_text = "Segment a photo first. Then click on it to see to which regions a patch attends."

    def __init__(self, segmenter: Segmenter, shared: Shared) -> None:
        super().__init__(segmenter, shared)
        with gr.Column(visible=False, elem_classes="ldvc-tab") as self.body:
            gr.HTML(html.section("Which regions does this patch attend to?", HELP))
            with gr.Row(elem_classes="ldvc-controls"):
                self.layer, self.head = layer_and_head("routing")
                self.row = gr.Number(label="Row", precision=0, elem_id="routing-row", min_width=90)
                self.column = gr.Number(label="Column", precision=0, elem_id="routing-column", min_width=90)
            options = {"elem_id": "routing-view", "apply_default_css": False, "js_on_load": html.static("routing.js")}
            self.view = gr.HTML(None, html_template="${route}", route="", **options)
        self.settings = [self.layer, self.head, self.row, self.column, self.view]
        self.pictures = [self.view]
        self.outputs = [self.empty, self.body, *self.settings]

    def draw(self, answer: Answer, values: Values) -> Changes:
        """Widgets with the choices that the answer has, and the picture."""
        (result,) = self.results(answer, values, "ldvc")
        if result is None or not result.has_routing:
            sentence = MISSING if result is not None else f"{NEEDS_LCSA} {self.segmenter.missing(answer, 'ldvc')['ldvc']}"
            return {self.empty: html.empty(sentence), self.body: gr.Column(visible=False)}
        layer, head = choices_for(result, *chosen_layer_and_head(result, values[self.layer], values[self.head]))
        return {
            self.empty: "",
            self.body: gr.Column(visible=True),
            self.layer: layer,
            self.head: head,
            **self.place(answer, values),
        }

    def blank(self, values: Values) -> Changes:
        """The patch that was chosen stays chosen."""
        return {**super().blank(values), self.view: gr.HTML(route="")}

    def draw_patch(self, answer: Answer, values: Values) -> Changes:
        """The patch that was chosen last, or the middle of the photo."""
        patch, route = self.route(answer, values)
        return {self.view: gr.HTML(route=route), self.row: patch.row + 1, self.column: patch.column + 1}

    def place(self, answer: Answer, values: Values) -> Changes:
        """The same, and the view gets the nearest patch of the grid as its value."""
        patch, route = self.route(answer, values)
        value = values[self.view] and [patch.row, patch.column]
        return {self.view: gr.HTML(value, route=route), self.row: patch.row + 1, self.column: patch.column + 1}

    def route(self, answer: Answer, values: Values) -> tuple[RoutedPatch, str]:
        """The chosen patch and its HTML."""
        (result,) = self.results(answer, values, "ldvc")
        photo = self.photo(answer, long_side=PHOTO_SIDE, quality=72)
        row, column = values[self.view] or (result.grid[0] // 2, result.grid[1] // 2)
        layer, head = chosen_layer_and_head(result, values[self.layer], values[self.head])
        patch = RoutedPatch.of(result, row, column, layer=layer, head=head)
        return patch, route_html(patch, result, photo=photo, layer=layer, head=head)

    def wire(self) -> None:
        """Clicks, keys and widgets draw the picture anew."""

        def typed(answer: Answer, values: Values) -> Changes:
            """A typed number is not written back, or the next digit, typed before this answer, would be lost."""
            row, column = values[self.row], values[self.column]
            if row is None or column is None:
                return gr.skip()
            changes = self.place(answer, {**values, self.view: [int(row) - 1, int(column) - 1]})
            return {widget: change for widget, change in changes.items() if values[widget] != change}

        parts = [self.view, self.row, self.column]
        self.on([self.view.input, self.layer.input, self.head.input], self.draw_patch, parts)
        self.on([self.row.input, self.column.input], typed, parts)


@dataclass(frozen=True)
class RoutedPatch:
    """One patch of a result, with everything that is drawn about it.

    Attributes:
        row, column: in the grid of the whole photo.
        grid: (rows, columns) of the photo.
        extent: (rows, columns) of the photo in patches, not whole where the last ones are partly padding.
        origin: (row, column) on the photo, in patches, where the grid of `routing` begins: (0, 0) but for sliding windows.
        routing: regions, affinities, token attention.
        attention: (h, w) token attention on the grid of `routing`, of one head or the mean of all.
        inside: for each chosen region the share of attention that falls into it; they add up to 1.
        shares: (C,) attention to the names; with company and "none of these" they add up to less than 1.
        none: attention to "none of these"; 0 before the last layer.
        company: words that share the attention with a single name.
        label, score: index of the name that the patch got, and its score, 0..1.
    """

    row: int
    column: int
    grid: tuple[int, int]
    extent: tuple[float, float]
    origin: tuple[float, float]
    routing: PatchRouting
    attention: np.ndarray
    inside: list[float]
    shares: np.ndarray
    none: float
    company: list[str]
    label: int
    score: float

    @classmethod
    def of(cls, result: Segmentation, row: int, column: int, *, layer: int, head: int | None) -> RoutedPatch:
        """Read a patch from a result with LCSA; a row or column outside the grid becomes the nearest one."""
        row = min(max(int(row), 0), result.grid[0] - 1)
        column = min(max(int(column), 0), result.grid[1] - 1)
        routing = result.routing(row, column, layer)
        attention = routing.token_attention.mean(axis=0) if head is None else routing.token_attention[head]
        boxes = [routing.boxes[int(region)] for region in routing.regions]
        label = result.patch_label(row, column)
        return cls(
            row=row,
            column=column,
            grid=result.grid,
            extent=result.extent,
            origin=(routing.window.top / result.patch, routing.window.left / result.patch),
            routing=routing,
            attention=attention,
            inside=[float(attention[top:bottom, left:right].sum()) for top, left, bottom, right in boxes],
            shares=result.cross_attention(layer=layer, head=head)[:, row, column],
            none=float(result.none_attention(layer=layer, head=head)[row, column]),
            company=result.company,
            label=label,
            score=float(result.patch_scores(row, column)[label]),
        )

    @property
    def boxes(self) -> list[Box]:
        """Of the chosen regions, best first, cut off at the edges of the photo."""
        return [self._on_photo(self.routing.boxes[int(region)]) for region in self.routing.regions]

    @property
    def own_box(self) -> Box:
        """Of the region of the patch."""
        return self._on_photo(self.routing.boxes[self.routing.own_region])

    @property
    def patch_box(self) -> Box:
        """Of the patch."""
        row, column = self.routing.patch
        return self._on_photo((row, column, row + 1, column + 1))

    def _on_photo(self, box: tuple[int, int, int, int]) -> Box:
        top, left, bottom, right = box
        top, bottom = (min(side + self.origin[0], self.extent[0]) for side in (top, bottom))
        left, right = (min(side + self.origin[1], self.extent[1]) for side in (left, right))
        return left, top, right - left, bottom - top

    @property
    def aria_text(self) -> str:
        """The patch in words, for screen readers; not escaped."""
        return (
            f"Row {self.row + 1} of {self.grid[0]}, column {self.column + 1} of {self.grid[1]}. Routed to {len(self.inside)} "
            f"of {len(self.routing.all_affinities)} regions, affinities "
            + ", ".join(number(float(value), 1) for value in self.routing.affinity)
        )


def route_html(patch: RoutedPatch, result: Segmentation, *, photo: str, layer: int, head: int | None) -> str:
    """The photo to click on, which patches are alike, and the three steps beside it.

    Args:
        result: where the patch is from.
        photo: as data.
        layer, head: of the patch's attention; head None = mean of all.
    """
    listed = steps(patch, result, layer=layer, head=head_text(head))
    alike = similarity_html(result, patch.row, patch.column, chosen=patch.boxes)
    return (
        f'<div class="ldvc-route" style="--photo:url({photo})"><div class="ldvc-route-photo">{photo_panel(patch)}{alike}</div>'
        f"{listed}</div>"
    )


def photo_panel(patch: RoutedPatch) -> str:
    """The photo: chosen regions with their heat, all else dimmed; lines from the patch to the regions."""
    height, width = patch.extent
    boxes, own, here = patch.boxes, patch.own_box, patch.patch_box
    inside = np.zeros(patch.attention.shape, dtype=bool)
    for region in patch.routing.regions:
        top, left, bottom, right = patch.routing.boxes[int(region)]
        inside[top:bottom, left:right] = True
    heat = html.heat_uri(patch.attention, high=float(patch.attention.max()), inside=inside)
    (rows, columns), (at_y, at_x) = patch.attention.shape, patch.origin
    place = (
        f"left:{at_x / width * 100:.3f}%;top:{at_y / height * 100:.3f}%;"
        f"width:{columns / width * 100:.3f}%;height:{rows / height * 100:.3f}%"
    )
    holes = "".join(f"M{x:.3f} {y:.3f}h{w:.3f}v{h:.3f}h{-w:.3f}z" for x, y, w, h in boxes)
    centre = (here[0] + here[2] / 2, here[1] + here[3] / 2)
    lines = "".join(
        f'<path class="ldvc-ray" style="stroke-width:{1.5 + 5 * share:.2f}px" '
        f'd="{_ray(centre, (x + w / 2, y + h / 2))}"/>'
        for (x, y, w, h), share in zip(boxes, patch.inside, strict=True)
        if abs(x + w / 2 - centre[0]) + abs(y + h / 2 - centre[1]) > 0.75
    )
    badges = "".join(
        _badge(rank, affinity, box, patch.extent)
        for rank, (box, affinity) in enumerate(zip(boxes, patch.routing.affinity, strict=True), start=1)
    )
    rects = "".join([*(rect(box, "region") for box in boxes), rect(own, "own"), rect(here, "patch")])
    svg = f'<svg viewBox="0 0 {width:.4f} {height:.4f}" preserveAspectRatio="none" aria-hidden="true">'
    return (
        f'<div class="ldvc-stage" tabindex="0" role="application" aria-label="{PHOTO_LABEL}" '
        f'aria-describedby="routing-text" data-rows="{patch.grid[0]}" data-columns="{patch.grid[1]}" data-row="{patch.row}" '
        f'data-column="{patch.column}" data-height="{height:.4f}" data-width="{width:.4f}" '
        f'data-step="{max(1, round(own[3]))},{max(1, round(own[2]))}" style="--aspect:{width:.4f}/{height:.4f}">'
        f'{svg}<path class="ldvc-veil" fill-rule="evenodd" d="M0 0h{width:.4f}v{height:.4f}h{-width:.4f}z{holes}"/></svg>'
        f'<img class="ldvc-stage-heat" src="{heat}" style="{place}" alt="Token attention inside the chosen regions">'
        f"{svg}{lines}{rects}</svg>{badges}</div>"
        f'<p id="routing-text" class="ldvc-aria-text" role="status">{escape(patch.aria_text)}</p>'
    )


def _ray(start: tuple[float, float], end: tuple[float, float]) -> str:
    """A gently bent line, so that rays to regions behind each other stay apart."""
    (x0, y0), (x1, y1) = start, end
    bend = 0.14
    middle = ((x0 + x1) / 2 - (y1 - y0) * bend, (y0 + y1) / 2 + (x1 - x0) * bend)
    return f"M{x0:.3f} {y0:.3f}Q{middle[0]:.3f} {middle[1]:.3f} {x1:.3f} {y1:.3f}"


def _badge(rank: int, affinity: float, box: Box, extent: tuple[float, float]) -> str:
    """Rank and affinity over a region; below its upper edge, or left from its right one, where there is no room."""
    x, y, w, _ = box
    height, width = extent
    side = f"right:{(1 - (x + w) / width) * 100:.2f}%" if x > 0.7 * width else f"left:{x / width * 100:.2f}%"
    low = " ldvc-badge-low" if y < 0.08 * height else ""
    style = f"{side};top:{y / height * 100:.2f}%"
    return f'<span class="ldvc-badge{low}" style="{style}"><b>{rank}</b> {number(float(affinity), 1)}</span>'


def _thumbnail(box: Box, extent: tuple[float, float]) -> str:
    """The region cut out of the photo."""
    x, y, w, h = box
    height, width = extent
    across, down = (start / max(whole - size, 1e-6) for start, size, whole in ((x, w, width), (y, h, height)))
    return (
        f'<span class="ldvc-thumbnail" style="background-size:{width / w * 100:.1f}% {height / h * 100:.1f}%;'
        f'background-position:{across * 100:.2f}% {down * 100:.2f}%"></span>'
    )


def steps(patch: RoutedPatch, result: Segmentation, *, layer: int, head: str) -> str:
    """The three steps beside the photo: route, attend to regions, attend to names."""
    names, seen, colours = result.names, result.seen, colours_for(result.names)
    regions = zip(patch.routing.regions, patch.boxes, patch.routing.affinity, patch.inside, strict=True)
    lines = "".join(
        f'<li><span class="ldvc-rank">{rank}</span>{_thumbnail(box, patch.extent)}'
        f'<span class="ldvc-number">{number(float(affinity), 2)}</span>{html.bar(share, "var(--color-accent)")}'
        f'<span class="ldvc-number">{percent(share)}</span>'
        f"{OWN_MARK if region == patch.routing.own_region else ''}</li>"
        for rank, (region, box, affinity, share) in enumerate(regions, start=1)
    )
    table = (
        '<ol class="ldvc-chosen"><li class="ldvc-chosen-head" aria-hidden="true"><span></span><span></span>'
        f"<span>affinity</span><span>share of attention</span></li>{lines}</ol>"
    )
    order = np.argsort(-patch.shares, kind="stable")[:BARS]
    bars = "".join(
        f"<li>{name_label(names[i], seen[i], colours[i], tag='span')}{html.bar(patch.shares[i], colours[i])}"
        f'<span class="ldvc-number">{number(float(patch.shares[i]))}</span></li>'
        for i in order
    )
    if len(names) > len(order):
        rest = number(float(patch.shares.sum() - patch.shares[order].sum()))
        bars += f'<li class="ldvc-subdued">and {len(names) - len(order)} more names: {rest} together</li>'
    others = [(texts.COMPANY, ", ".join(patch.company), float(1 - patch.shares.sum()) - patch.none)] if patch.company else []
    others += [(texts.NONE_OF_THESE, "", patch.none)] if patch.none else []
    for title, words, share in others:
        bars += (
            f'<li class="ldvc-subdued" title="{escape(words)}"><span>{title}</span>'
            f'{html.bar(share, NONE_COLOUR)}<span class="ldvc-number">{number(share)}</span></li>'
        )
    scale = html.scale_bar(f"Share of token attention, {head}", 0, float(patch.attention.max()), strength=1)
    help_texts = (text.format(k=len(patch.inside), layer=layer + 1, head=head) for text in STEP_HELP)
    contents = (affinity_map(patch), scale + table, f'<ul class="ldvc-softmax">{bars}</ul>')
    sections = "".join(
        f'<section class="ldvc-step"><h3><span class="ldvc-step-number">{index}</span>{title}</h3><p>{text}</p>{body}</section>'
        for index, (title, text, body) in enumerate(zip(STEPS, help_texts, contents, strict=True), start=1)
    )
    return f'<div class="ldvc-steps">{verdict(result, patch.row, patch.column)}{sections}</div>'


def affinity_map(patch: RoutedPatch) -> str:
    """All regions in their places, coloured from the lowest to the highest affinity; the chosen ones outlined."""
    rows, columns = patch.routing.region_grid
    values = patch.routing.all_affinities.reshape(rows, columns)
    low, high = float(values.min()), float(values.max())
    picture = html.heat_uri(values, low=low, high=high if high > low else low + 1)

    def mark(region: int, kind: str) -> str:
        row, column = divmod(int(region), columns)
        return f'<rect class="ldvc-{kind}" x="{column}" y="{row}" width="1" height="1"/>'

    marks = "".join([*(mark(region, "region") for region in patch.routing.regions), mark(patch.routing.own_region, "own")])
    text = f"Affinity of all {rows * columns} regions: from {number(low, 1)} (dark) to {number(high, 1)} (bright)"
    height, width = patch.extent
    return (
        f'<div class="ldvc-affinity"><div class="ldvc-affinity-map" style="--aspect:{width:.3f}/{height:.3f}">'
        f'<img src="{picture}" alt="{escape(text)}; chosen ones outlined"><svg viewBox="0 0 {columns} {rows}" '
        f'preserveAspectRatio="none" aria-hidden="true">{marks}</svg></div>'
        f"<small>{text}. Only their order matters.</small></div>"
    )
