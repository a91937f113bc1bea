"""The Routing tab's picture: one patch, the regions that its own was routed to, and what it drew from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldvc.patch_routing import PatchRouting
from ldvc.result import Segmentation
from ldvc.visualize import NONE_COLOUR
from ldvc.web.html import escape, percent
from ldvc.web.tabs import texts
from ldvc.web.views.attention import name_label
from ldvc.web.views.inline import heat_uri, number, scale_bar

OWN_MARK = '<span class="ldvc-own-mark">its own region</span>'
BARS = 12  # names listed, the strongest first


@dataclass(frozen=True)
class Spot:
    """One patch of a result, with everything that is drawn about it.

    Attributes:
        row, column: in the grid of the whole photo.
        grid: (rows, columns) of the photo.
        extent: (rows, columns) of the photo in patches, not whole where the last ones are partly padding.
        origin: (row, column) on the photo, in patches, where the grid of `routing` begins: (0, 0) but for sliding windows.
        patch: (row, column) in the grid of `routing`.
        routing: regions, affinities, token attention.
        attention: (h, w) token attention on the grid of `routing`, of one head or the mean of all.
        inside: for each chosen region the share of attention that falls into it; they add up to 1.
        shares: (C,) softmax over the names; with company they add up to less than 1.
        company: words that share the attention with a single name.
        label: index of the name that the patch got.
        score: its score, 0..1.
    """

    row: int
    column: int
    grid: tuple[int, int]
    extent: tuple[float, float]
    origin: tuple[float, float]
    patch: tuple[int, int]
    routing: PatchRouting
    attention: np.ndarray
    inside: list[float]
    shares: np.ndarray
    company: list[str]
    label: int
    score: float

    @classmethod
    def of(cls, result: Segmentation, row: int, column: int, *, layer: int, head: int | None) -> Spot:
        """Read a spot from a result with LCSA; a row or column outside the grid becomes the nearest one."""
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
            patch=routing.patch,
            routing=routing,
            attention=attention,
            inside=[float(attention[top:bottom, left:right].sum()) for top, left, bottom, right in boxes],
            shares=result.cross_attention(layer=layer, head=head)[:, row, column],
            company=result.company,
            label=label,
            score=float(result.patch_scores(row, column)[label]),
        )

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """(left, top, width, height) of the chosen regions on the photo in patches, best first, cut off at its edges."""
        return [self._on_photo(self.routing.boxes[int(region)]) for region in self.routing.regions]

    @property
    def own_box(self) -> tuple[float, float, float, float]:
        """The same for the region of the patch."""
        return self._on_photo(self.routing.boxes[self.routing.own_region])

    @property
    def patch_box(self) -> tuple[float, float, float, float]:
        """The same for the patch."""
        row, column = self.patch
        return self._on_photo((row, column, row + 1, column + 1))

    def _on_photo(self, box: tuple[int, int, int, int]) -> tuple[float, float, float, float]:
        top, left, bottom, right = box
        top, bottom = (min(side + self.origin[0], self.extent[0]) for side in (top, bottom))
        left, right = (min(side + self.origin[1], self.extent[1]) for side in (left, right))
        return left, top, right - left, bottom - top

    @property
    def spoken(self) -> str:
        """The spot in words, for screen readers; not escaped."""
        return (
            f"Row {self.row + 1} of {self.grid[0]}, column {self.column + 1} of {self.grid[1]}. Routed to {len(self.inside)} "
            f"of {len(self.routing.all_affinities)} regions, affinities "
            + ", ".join(number(float(value), 1) for value in self.routing.affinity)
        )


def route(
    spot: Spot,
    names: Sequence[str],
    seen: Sequence[bool],
    colours: Sequence[str],
    *,
    photo: str,
    layer: int,
    head: int | None,
) -> str:
    """The whole picture: the photo to click on, and the three steps beside it.

    Args:
        spot: what was clicked.
        names, seen, colours: of all names.
        photo: data of the photo.
        layer, head: what the spot was read from; head None = mean of all.
    """
    who = f"{texts.ATTENTION_MEAN} of all heads" if head is None else f"head {head + 1}"
    told = steps(spot, names, seen, colours, layer=layer, who=who)
    return f'<div class="ldvc-route" style="--photo:url({photo})">{stage(spot)}{told}</div>'


def stage(spot: Spot) -> str:
    """The photo: chosen regions with their heat, all else dimmed; lines from the patch to whom it asks."""
    height, width = spot.extent
    boxes, own, patch = spot.boxes, spot.own_box, spot.patch_box
    inside = np.zeros(spot.attention.shape, dtype=bool)
    for region in spot.routing.regions:
        top, left, bottom, right = spot.routing.boxes[int(region)]
        inside[top:bottom, left:right] = True
    heat = heat_uri(spot.attention, high=float(spot.attention.max()), inside=inside)
    rows, columns = spot.attention.shape
    at_y, at_x = spot.origin
    place = (
        f"left:{at_x / width * 100:.3f}%;top:{at_y / height * 100:.3f}%;"
        f"width:{columns / width * 100:.3f}%;height:{rows / height * 100:.3f}%"
    )
    holes = "".join(f"M{x:.3f} {y:.3f}h{w:.3f}v{h:.3f}h{-w:.3f}z" for x, y, w, h in boxes)
    centre = (patch[0] + patch[2] / 2, patch[1] + patch[3] / 2)
    lines = "".join(
        f'<path class="ldvc-ray" style="stroke-width:{1.5 + 5 * share:.2f}px" '
        f'd="{_ray(centre, (x + w / 2, y + h / 2))}"/>'
        for (x, y, w, h), share in zip(boxes, spot.inside, strict=True)
        if abs(x + w / 2 - centre[0]) + abs(y + h / 2 - centre[1]) > 0.75
    )
    badges = "".join(
        _badge(rank, affinity, box, spot.extent)
        for rank, (box, affinity) in enumerate(zip(boxes, spot.routing.affinity, strict=True), start=1)
    )
    return (
        f'<div class="ldvc-stage" tabindex="0" role="application" aria-label="{texts.ROUTING_STAGE}" '
        f'aria-describedby="routing-spoken" data-rows="{spot.grid[0]}" data-columns="{spot.grid[1]}" data-row="{spot.row}" '
        f'data-column="{spot.column}" data-height="{height:.4f}" data-width="{width:.4f}" '
        f'data-step="{max(1, round(own[3]))},{max(1, round(own[2]))}" style="--aspect:{width:.4f}/{height:.4f}">'
        f'<svg viewBox="0 0 {width:.4f} {height:.4f}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="ldvc-veil" fill-rule="evenodd" d="M0 0h{width:.4f}v{height:.4f}h{-width:.4f}z{holes}"/></svg>'
        f'<img class="ldvc-stage-heat" src="{heat}" style="{place}" alt="Token attention inside the chosen regions">'
        f'<svg viewBox="0 0 {width:.4f} {height:.4f}" preserveAspectRatio="none" aria-hidden="true">'
        f"{lines}{''.join(_rect(box, 'ldvc-region') for box in boxes)}{_rect(own, 'ldvc-own')}{_rect(patch, 'ldvc-patch')}"
        f"</svg>{badges}</div>"
        f'<p id="routing-spoken" class="ldvc-spoken" role="status">{escape(spot.spoken)}</p>'
    )


def _ray(start: tuple[float, float], end: tuple[float, float]) -> str:
    """A gently bent line, so that rays to regions behind each other stay apart."""
    (x0, y0), (x1, y1) = start, end
    bend = 0.14
    middle = ((x0 + x1) / 2 - (y1 - y0) * bend, (y0 + y1) / 2 + (x1 - x0) * bend)
    return f"M{x0:.3f} {y0:.3f}Q{middle[0]:.3f} {middle[1]:.3f} {x1:.3f} {y1:.3f}"


def _badge(rank: int, affinity: float, box: tuple[float, float, float, float], extent: tuple[float, float]) -> str:
    """Rank and affinity over a region; below its upper edge, or left from its right one, where there is no room."""
    x, y, w, _ = box
    height, width = extent
    side = f"right:{(1 - (x + w) / width) * 100:.2f}%" if x > 0.7 * width else f"left:{x / width * 100:.2f}%"
    low = " ldvc-badge-low" if y < 0.08 * height else ""
    return (
        f'<span class="ldvc-badge{low}" style="{side};top:{y / height * 100:.2f}%"><b>{rank}</b> '
        f"{number(float(affinity), 1)}</span>"
    )


def _thumbnail(box: tuple[float, float, float, float], extent: tuple[float, float]) -> str:
    """The region cut out of the photo."""
    x, y, w, h = box
    height, width = extent

    def share(start: float, size: float, whole: float) -> str:
        return f"{start / max(whole - size, 1e-6) * 100:.2f}%"

    return (
        f'<span class="ldvc-thumbnail" style="background-size:{width / w * 100:.1f}% {height / h * 100:.1f}%;'
        f'background-position:{share(x, w, width)} {share(y, h, height)}"></span>'
    )


def _rect(box: tuple[float, float, float, float], kind: str) -> str:
    x, y, width, height = box
    return f'<rect class="{kind}" x="{x:.3f}" y="{y:.3f}" width="{width:.3f}" height="{height:.3f}"/>'


def steps(
    spot: Spot, names: Sequence[str], seen: Sequence[bool], colours: Sequence[str], *, layer: int, who: str
) -> str:
    """The three steps beside the photo: route, attend to regions, attend to names."""
    verdict = (
        f'<p class="ldvc-verdict">Row {spot.row + 1}, column {spot.column + 1} is '
        f"{name_label(names[spot.label], seen[spot.label], colours[spot.label], tag='span')}"
        f'<span class="ldvc-subdued">score {number(spot.score)}</span></p>'
    )
    lines = "".join(
        f'<li><span class="ldvc-rank">{rank}</span>{_thumbnail(box, spot.extent)}'
        f'<span class="ldvc-number">{number(float(affinity), 2)}</span>'
        f'<span class="ldvc-bar"><i style="width:{share * 100:.1f}%;--c:var(--color-accent)"></i></span>'
        f'<span class="ldvc-number">{percent(share)}</span>'
        f"{OWN_MARK if region == spot.routing.own_region else ''}</li>"
        for rank, (region, box, affinity, share) in enumerate(
            zip(spot.routing.regions, spot.boxes, spot.routing.affinity, spot.inside, strict=True), start=1
        )
    )
    table = (
        '<ol class="ldvc-chosen"><li class="ldvc-chosen-head" aria-hidden="true"><span></span><span></span>'
        f"<span>affinity</span><span>attention drawn from it</span></li>{lines}</ol>"
    )
    order = np.argsort(-spot.shares, kind="stable")[:BARS]
    bars = "".join(
        f"<li>{name_label(names[i], seen[i], colours[i], tag='span')}"
        f'<span class="ldvc-bar"><i style="width:{spot.shares[i] * 100:.1f}%;--c:{colours[i]}"></i></span>'
        f'<span class="ldvc-number">{number(float(spot.shares[i]))}</span></li>'
        for i in order
    )
    rest = float(spot.shares.sum() - spot.shares[order].sum())
    more = len(names) - len(order)
    tail = f'<li class="ldvc-subdued">and {more} more names: {number(rest)} together</li>' if more else ""
    if spot.company:
        tail += (
            f'<li class="ldvc-subdued" title="{escape(", ".join(spot.company))}"><span>{texts.COMPANY}</span>'
            f'<span class="ldvc-bar"><i style="width:{(1 - spot.shares.sum()) * 100:.1f}%;--c:{NONE_COLOUR}"></i></span>'
            f'<span class="ldvc-number">{number(float(1 - spot.shares.sum()))}</span></li>'
        )
    helps = texts.ROUTING_STEP_HELP
    bar = scale_bar(texts.ROUTING_SCALE.format(head=who), 0, float(spot.attention.max()), strength=1)
    said = (helps[0].format(k=len(spot.inside)), helps[1], helps[2].format(layer=layer + 1, head=who))
    shown = (affinity_map(spot), bar + table, f'<ul class="ldvc-softmax">{bars}{tail}</ul>')
    listed = "".join(
        f'<section class="ldvc-step"><h3><span class="ldvc-step-number">{index}</span>{title}</h3><p>{text}</p>{body}</section>'
        for index, (title, text, body) in enumerate(zip(texts.ROUTING_STEPS, said, shown, strict=True), start=1)
    )
    return f'<div class="ldvc-steps">{verdict}{listed}</div>'


def affinity_map(spot: Spot) -> str:
    """All regions in their places, coloured from the lowest to the highest affinity; the chosen ones outlined."""
    rows, columns = spot.routing.region_grid
    values = spot.routing.all_affinities.reshape(rows, columns)
    low, high = float(values.min()), float(values.max())
    picture = heat_uri(values, low=low, high=high if high > low else low + 1)
    places = [divmod(int(region), columns) for region in spot.routing.regions]
    marks = "".join(
        f'<rect class="ldvc-region" x="{column}" y="{row}" width="1" height="1"/>' for row, column in places
    )
    row, column = divmod(spot.routing.own_region, columns)
    marks += f'<rect class="ldvc-own" x="{column}" y="{row}" width="1" height="1"/>'
    label = texts.ROUTING_MAP.format(total=rows * columns)
    said = f"{label}: from {number(low, 1)} (dark) to {number(high, 1)} (bright); chosen ones outlined"
    height, width = spot.extent
    return (
        f'<div class="ldvc-affinity"><div class="ldvc-affinity-map" style="--aspect:{width:.3f}/{height:.3f}">'
        f'<img src="{picture}" alt="{escape(said)}"><svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" '
        f'aria-hidden="true">{marks}</svg></div>'
        f"<small>{label}: from {number(low, 1)} (dark) to {number(high, 1)} (bright). Only their order counts.</small></div>"
    )
