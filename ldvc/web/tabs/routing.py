"""The Routing tab: the regions to which the clicked patch was routed, and the attention of the patch in these regions."""

from __future__ import annotations

import gradio as gr
import numpy as np

from ldvc.result import Segmentation
from ldvc.visualize import NONE_COLOUR, colours_for
from ldvc.web import html, texts
from ldvc.web.html import escape, name_label, number, percent
from ldvc.web.segmenter import Segmenter
from ldvc.web.session import Answer
from ldvc.web.tabs import Changes, LayerTab, Shared, Values, head_text
from ldvc.web.tabs.patch import Box, heat_layer, patch_box, rect, similarity_html, stage, svg, verdict

PHOTO_SIDE = 720
BARS = 12  # names in the list, the highest share first

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


class RoutingTab(LayerTab):
    """See the module. The value of `view` is the [row, column] of the patch; its prop `route` is the HTML."""

    key, title = "routing", "Routing"
    empty_text = "Segment a photo first. Then click on it to see to which regions a patch attends."

    def __init__(self, segmenter: Segmenter, shared: Shared) -> None:
        super().__init__(segmenter, shared)
        with gr.Column(visible=False, elem_classes="ldvc-tab") as self.body:
            gr.HTML(html.section("Which regions does this patch attend to?", HELP))
            with gr.Row(elem_classes="ldvc-controls"):
                self.declare_layer_and_head()
                self.row = gr.Number(label="Row", precision=0, elem_id="routing-row", min_width=90)
                self.column = gr.Number(label="Column", precision=0, elem_id="routing-column", min_width=90)
            options = {"elem_id": "routing-view", "apply_default_css": False, "js_on_load": html.static("routing.js")}
            self.view = gr.HTML(None, html_template="${route}", route="", **options)
        self.settings = [self.layer, self.head, self.row, self.column, self.view]
        self.pictures = [self.view]
        self.outputs = [self.empty, self.body, *self.settings]

    def draw(self, answer: Answer, values: Values) -> Changes:
        """The picture, and the widgets with the choices for this answer."""
        (result,) = self.results(answer, values, "ldvc")
        if result is None:
            return self.filled(f"{NEEDS_LCSA} {self.segmenter.missing(answer, 'ldvc')['ldvc']}")
        if not result.has_routing:
            return self.filled(MISSING)
        return {**self.filled(), **self.choices(result, values), **self.draw_patch(answer, values, place=True)}

    def blank(self, values: Values) -> Changes:
        """The chosen patch stays chosen."""
        return {**super().blank(values), self.view: gr.HTML(route="")}

    def draw_patch(self, answer: Answer, values: Values, *, place: bool = False) -> Changes:
        """Draw the last chosen patch, or the middle of the photo. With `place`, the view's value becomes the nearest patch."""
        (result,) = self.results(answer, values, "ldvc")
        row, column = values[self.view] or (result.grid[0] // 2, result.grid[1] // 2)
        patch = RoutedPatch(result, row, column, *self.layer_and_head(result, values))
        value = {"value": values[self.view] and [patch.row, patch.column]} if place else {}
        route = route_html(patch, photo=self.photo(answer, long_side=PHOTO_SIDE, quality=72))
        return {self.view: gr.HTML(**value, route=route), self.row: patch.row + 1, self.column: patch.column + 1}

    def wire(self) -> None:
        """Declare the events: clicks, keys and widgets draw the picture again."""

        def typed(answer: Answer, values: Values) -> Changes:
            """Draw the typed patch. The number is not written back, because that would delete a digit typed in the meantime."""
            row, column = values[self.row], values[self.column]
            if row is None or column is None:
                return gr.skip()
            changes = self.draw_patch(answer, {**values, self.view: [int(row) - 1, int(column) - 1]}, place=True)
            return {widget: change for widget, change in changes.items() if values[widget] != change}

        parts = [self.view, self.row, self.column]
        self.on([self.view.input, self.layer.input, self.head.input], self.draw_patch, parts)
        self.on([self.row.input, self.column.input], typed, parts)


class RoutedPatch:
    """One patch of a result with LCSA, and all values that are drawn for it; head None = mean of all heads.

    Row and column refer to the grid of the whole photo. A place outside the grid is moved to the nearest patch.
    """

    def __init__(self, result: Segmentation, row: int, column: int, layer: int, head: int | None) -> None:
        row, column = (min(max(int(index), 0), side - 1) for index, side in zip((row, column), result.grid, strict=True))
        self.result, self.row, self.column, self.layer, self.head = result, row, column, layer, head
        self.routing = routing = result.routing(row, column, layer)
        # Origin of the routed grid on the photo, in patches: (0, 0) except in sliding windows.
        self.origin = (routing.window.top / result.patch, routing.window.left / result.patch)
        # (h, w) token attention on the routed grid
        self.attention = routing.token_attention.mean(axis=0) if head is None else routing.token_attention[head]
        chosen = [routing.boxes[int(region)] for region in routing.regions]
        self.boxes = [self._on_photo(box) for box in chosen]  # the highest affinity first
        self.own_box = self._on_photo(routing.boxes[routing.own_region])
        # The share of attention inside each chosen region; the shares add up to 1.
        self.inside = [float(self.attention[top:bottom, left:right].sum()) for top, left, bottom, right in chosen]
        # (C,) attention to the names; the sum is below 1 if company or "none of these" has a share.
        self.shares = result.cross_attention(layer=layer, head=head)[:, row, column]
        self.none = float(result.none_attention(layer=layer, head=head)[row, column])
        self.label = result.patch_label(row, column)
        self.score = float(result.patch_scores(row, column)[self.label])

    def _on_photo(self, box: tuple[int, int, int, int]) -> Box:
        top, left, bottom, right = box
        (y, x), (height, width) = self.origin, self.result.extent
        top, bottom = min(top + y, height), min(bottom + y, height)
        left, right = min(left + x, width), min(right + x, width)
        return left, top, right - left, bottom - top

    @property
    def aria_text(self) -> str:
        """The patch in words, for screen readers, without HTML escaping."""
        (rows, columns), affinities = self.result.grid, ", ".join(number(float(each), 1) for each in self.routing.affinity)
        return (
            f"Row {self.row + 1} of {rows}, column {self.column + 1} of {columns}. Routed to {len(self.inside)} "
            f"of {len(self.routing.all_affinities)} regions, affinities {affinities}"
        )


def route_html(patch: RoutedPatch, *, photo: str) -> str:
    """The clickable photo (a data URI), the similar patches, and the three steps beside the photo."""
    alike = similarity_html(patch.result, patch.row, patch.column, chosen=patch.boxes)
    return (
        f'<div class="ldvc-route" style="--photo:url({photo})"><div class="ldvc-route-photo">{photo_panel(patch)}{alike}</div>'
        f"{steps(patch)}</div>"
    )


def photo_panel(patch: RoutedPatch) -> str:
    """The photo with heat in the chosen regions, other regions dimmed, and lines from the patch to the regions."""
    (height, width), boxes, own = patch.result.extent, patch.boxes, patch.own_box
    here = patch_box(patch.result, patch.row, patch.column)
    inside = np.zeros(patch.attention.shape, dtype=bool)
    for region in patch.routing.regions:
        top, left, bottom, right = patch.routing.boxes[int(region)]
        inside[top:bottom, left:right] = True
    holes = "".join(f"M{x:.3f} {y:.3f}h{w:.3f}v{h:.3f}h{-w:.3f}z" for x, y, w, h in boxes)
    veil = f'<path class="ldvc-veil" fill-rule="evenodd" d="M0 0h{width:.4f}v{height:.4f}h{-width:.4f}z{holes}"/>'
    heat = heat_layer(patch.result, patch.attention, "Token attention inside the chosen regions", patch.origin, inside=inside)
    centre = (here[0] + here[2] / 2, here[1] + here[3] / 2)
    lines = "".join(
        f'<path class="ldvc-ray" style="stroke-width:{1.5 + 5 * share:.2f}px" d="{_ray(centre, (x + w / 2, y + h / 2))}"/>'
        for (x, y, w, h), share in zip(boxes, patch.inside, strict=True)
        if abs(x + w / 2 - centre[0]) + abs(y + h / 2 - centre[1]) > 0.75
    )
    rects = "".join([*(rect(box, "region") for box in boxes), rect(own, "own"), rect(here, "patch")])
    ranked = enumerate(zip(boxes, patch.routing.affinity, strict=True), start=1)
    badges = "".join(_badge(rank, affinity, box, patch.result.extent) for rank, (box, affinity) in ranked)
    content = svg(patch.result.extent, veil) + heat + svg(patch.result.extent, lines + rects) + badges
    step, text = (max(1, round(own[3])), max(1, round(own[2]))), patch.aria_text
    return stage(patch.result, patch.row, patch.column, content, key="routing", label=PHOTO_LABEL, text=text, step=step)


def _ray(start: tuple[float, float], end: tuple[float, float]) -> str:
    """A curved line, so that lines to regions behind each other stay apart."""
    (x0, y0), (x1, y1) = start, end
    bend = 0.14
    middle = ((x0 + x1) / 2 - (y1 - y0) * bend, (y0 + y1) / 2 + (x1 - x0) * bend)
    return f"M{x0:.3f} {y0:.3f}Q{middle[0]:.3f} {middle[1]:.3f} {x1:.3f} {y1:.3f}"


def _badge(rank: int, affinity: float, box: Box, extent: tuple[float, float]) -> str:
    """Rank and affinity at the top left of a region; moved down or to the right edge where the photo ends."""
    x, y, w, _ = box
    height, width = extent
    side = f"right:{(1 - (x + w) / width) * 100:.2f}%" if x > 0.7 * width else f"left:{x / width * 100:.2f}%"
    low = " ldvc-badge-low" if y < 0.08 * height else ""
    style = f"{side};top:{y / height * 100:.2f}%"
    return f'<span class="ldvc-badge{low}" style="{style}"><b>{rank}</b> {number(float(affinity), 1)}</span>'


def _thumbnail(box: Box, extent: tuple[float, float]) -> str:
    """A crop of the photo with the region."""
    x, y, w, h = box
    height, width = extent
    across, down = (start / max(side - size, 1e-6) for start, size, side in ((x, w, width), (y, h, height)))
    return (
        f'<span class="ldvc-thumbnail" style="background-size:{width / w * 100:.1f}% {height / h * 100:.1f}%;'
        f'background-position:{across * 100:.2f}% {down * 100:.2f}%"></span>'
    )


def steps(patch: RoutedPatch) -> str:
    """The three steps beside the photo: route, attend to regions, attend to names."""
    regions = zip(patch.routing.regions, patch.boxes, patch.routing.affinity, patch.inside, strict=True)
    lines = "".join(
        f'<li><span class="ldvc-rank">{rank}</span>{_thumbnail(box, patch.result.extent)}'
        f'<span class="ldvc-number">{number(float(affinity), 2)}</span>{html.bar(share, "var(--color-accent)")}'
        f'<span class="ldvc-number">{percent(share)}</span>'
        f"{OWN_MARK if region == patch.routing.own_region else ''}</li>"
        for rank, (region, box, affinity, share) in enumerate(regions, start=1)
    )
    table = (
        '<ol class="ldvc-chosen"><li class="ldvc-chosen-head" aria-hidden="true"><span></span><span></span>'
        f"<span>affinity</span><span>share of attention</span></li>{lines}</ol>"
    )
    head = head_text(patch.head)
    scale = html.scale_bar(f"Share of token attention, {head}", 0, float(patch.attention.max()), strength=1)
    help_texts = (text.format(k=len(patch.inside), layer=patch.layer + 1, head=head) for text in STEP_HELP)
    contents = (affinity_map(patch), scale + table, f'<ul class="ldvc-softmax">{name_shares(patch)}</ul>')
    sections = "".join(
        f'<section class="ldvc-step"><h3><span class="ldvc-step-number">{index}</span>{title}</h3><p>{text}</p>{body}</section>'
        for index, (title, text, body) in enumerate(zip(STEPS, help_texts, contents, strict=True), start=1)
    )
    return f'<div class="ldvc-steps">{verdict(patch.result, patch.row, patch.column)}{sections}</div>'


def name_shares(patch: RoutedPatch) -> str:
    """List items with the attention of a patch to the strongest names, to company, and to "none of these"."""
    result, shares = patch.result, patch.shares

    def line(tag: str, title: str, share: float, colour: str) -> str:
        return f'{tag}{title}{html.bar(share, colour)}<span class="ldvc-number">{number(float(share))}</span></li>'

    order = np.argsort(-shares, kind="stable")[:BARS]
    colours = colours_for(result.names)
    titles = [name_label(*each, tag="span") for each in zip(result.names, result.seen, colours, strict=True)]
    lines = [line("<li>", titles[i], shares[i], colours[i]) for i in order]
    if len(titles) > len(order):
        rest = number(float(shares.sum() - shares[order].sum()))
        lines.append(f'<li class="ldvc-subdued">and {len(titles) - len(order)} more names: {rest} together</li>')
    company = float(1 - shares.sum()) - patch.none if result.company else 0
    for title, words, share in ((texts.COMPANY, result.company, company), (texts.NONE_OF_THESE, [], patch.none)):
        tag = f'<li class="ldvc-subdued" title="{escape(", ".join(words))}">'
        lines += [line(tag, f"<span>{title}</span>", share, NONE_COLOUR)] if share else []
    return "".join(lines)


def affinity_map(patch: RoutedPatch) -> str:
    """A map of the affinity of all regions, from the lowest to the highest value; the chosen regions are outlined."""
    rows, columns = patch.routing.region_grid
    values = patch.routing.all_affinities.reshape(rows, columns)
    low, high = float(values.min()), float(values.max())
    picture = html.heat_uri(values, low=low, high=high if high > low else low + 1)

    outlined = [*((region, "region") for region in patch.routing.regions), (patch.routing.own_region, "own")]
    marks = "".join(rect((int(region) % columns, int(region) // columns, 1, 1), kind) for region, kind in outlined)
    text = f"Affinity of all {rows * columns} regions: from {number(low, 1)} (dark) to {number(high, 1)} (bright)"
    height, width = patch.result.extent
    return (
        f'<div class="ldvc-affinity"><div class="ldvc-affinity-map" style="--aspect:{width:.3f}/{height:.3f}">'
        f'<img src="{picture}" alt="{escape(text)}; chosen ones outlined"><svg viewBox="0 0 {columns} {rows}" '
        f'preserveAspectRatio="none" aria-hidden="true">{marks}</svg></div>'
        f"<small>{text}. Only their order matters.</small></div>"
    )
