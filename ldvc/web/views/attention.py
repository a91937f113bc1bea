"""The Attention tab's pictures: every name's map under every decoder on one scale, and two of them under a slider."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldvc.result import Segmentation
from ldvc.visualize import fit_size
from ldvc.web.html import escape
from ldvc.web.tabs import texts
from ldvc.web.views.inline import heat_uri, number, photo_uri, scale_bar

MAP_SIDE = 112  # pixels of a map in the grid before the browser enlarges it: four for each patch of lite
SLIDER_SIDE = 224
PHOTO_SIDE = 420
INTERVENTION = "ldvc_lcsa_off"


@dataclass(frozen=True)
class Column:
    """One decoder's maps.

    Attributes:
        arm: key of `texts.ARM_TITLES`.
        maps: (C, h, w) attention on the patch grid for all names, or None if there is no such decoder.
        result: where the maps are from, to enlarge them.
    """

    arm: str
    maps: np.ndarray | None
    result: Segmentation | None

    @classmethod
    def of(cls, arm: str, result: Segmentation | None, *, layer: int, head: int | None) -> Column:
        """Read one layer, and one head or the mean of all, from a result."""
        maps = None if result is None else result.cross_attention(layer=layer, head=head)
        return cls(arm, maps, result)

    @property
    def title(self) -> str:
        """What the decoder is called."""
        return texts.ARM_TITLES[self.arm]

    def enlarged(self, index: int, long_side: int) -> np.ndarray:
        """The map of one name, (height, width), padding cut off."""
        size = fit_size(*self.result.size, long_side=long_side)
        return self.result.attention_at(self.maps[index], size)


def value_range(columns: Sequence[Column], shown: Sequence[int], *, rescale: bool) -> tuple[float, float]:
    """(0, 1), or the lowest and highest value of the names shown when rescaled."""
    values = [column.maps[list(shown)] for column in columns if column.maps is not None]
    if not rescale or not values:
        return 0.0, 1.0
    return float(min(each.min() for each in values)), float(max(each.max() for each in values))


def attention_grid(
    columns: Sequence[Column],
    names: Sequence[str],
    seen: Sequence[bool],
    colours: Sequence[str],
    shown: Sequence[int],
    *,
    photo: str,
    rescale: bool,
) -> str:
    """Rows are names, columns decoders, under one colour bar.

    Args:
        columns: of the table.
        names, seen, colours: of all names.
        shown: indices of the names to draw.
        photo: data of the grey photo that lies under every map.
        rescale: stretch the scale to the values shown, and say so.
    """
    low, high = value_range(columns, shown, rescale=rescale)
    heads = "".join(_column_head(column) for column in columns)
    rows = "".join(_row(columns, index, names[index], seen[index], colours[index], low, high) for index in shown)
    bar = scale_bar(texts.ATTENTION_SCALE_RESCALED if rescale else texts.ATTENTION_SCALE, low, high)
    height, width = next(column.result.size for column in columns if column.result is not None)
    return (
        f'<div class="ldvc-maps" style="--photo:url({photo});--aspect:{width}/{height};--columns:{len(columns)}">{bar}'
        f'<div class="ldvc-maps-row ldvc-maps-head"><span></span>{heads}</div>{rows}</div>'
    )


def _column_head(column: Column) -> str:
    is_intervention = column.arm == INTERVENTION
    tag = f'<span class="ldvc-tag ldvc-intervention">{texts.INTERVENTION}</span>' if is_intervention else ""
    extra = " ldvc-is-intervention" if is_intervention else ""
    return (
        f'<div class="ldvc-maps-title{extra}"><b>{column.title}</b>{tag}'
        f"<small>{texts.ATTENTION_COLUMNS[column.arm]}</small></div>"
    )


def _row(columns: Sequence[Column], index: int, name: str, seen: bool, colour: str, low: float, high: float) -> str:
    cells = "".join(_cell(column, index, name, low, high) for column in columns)
    return f'<div class="ldvc-maps-row">{name_label(name, seen, colour)}{cells}</div>'


def name_label(name: str, seen: bool, colour: str, *, tag: str = "div") -> str:
    """A name with its colour, and a mark if the model saw no mask of it."""
    unseen = "" if seen else '<span class="ldvc-tag ldvc-unseen">unseen</span>'
    stripes = "" if seen else " ldvc-striped"
    return (
        f'<{tag} class="ldvc-label"><span class="ldvc-swatch{stripes}" style="--c:{colour}"></span>'
        f'<span class="ldvc-label-name" title="{escape(name)}">{escape(name)}</span>{unseen}</{tag}>'
    )


def _cell(column: Column, index: int, name: str, low: float, high: float) -> str:
    extra = " ldvc-is-intervention" if column.arm == INTERVENTION else ""
    if column.maps is None:
        return f'<figure class="ldvc-map ldvc-map-missing{extra}"><span>{texts.ARM_MISSING}</span></figure>'
    values = column.maps[index]
    said = f"mean {number(float(values.mean()))}, highest {number(float(values.max()))}"
    picture = heat_uri(column.enlarged(index, MAP_SIDE), low=low, high=high)
    kind = f"{column.title} ({texts.INTERVENTION})" if extra else column.title
    return (
        f'<figure class="ldvc-map{extra}"><div class="ldvc-heat"><img src="{picture}" '
        f'alt="Attention to {escape(name)}, {kind}: {said}"></div>'
        f"<figcaption>mean {number(float(values.mean()))} · max {number(float(values.max()))}</figcaption></figure>"
    )


def attention_slider(left: Column, right: Column, index: int, name: str, *, photo: str, low: float, high: float) -> str:
    """Two decoders' maps of one name over each other, parted by a line that a range input moves."""
    height, width = left.result.size
    sides = []
    for column, side in ((left, "left"), (right, "right")):
        picture = heat_uri(column.enlarged(index, SLIDER_SIDE), low=low, high=high)
        mark = f' <i class="ldvc-tag ldvc-intervention">{texts.INTERVENTION}</i>' if column.arm == INTERVENTION else ""
        sides.append(
            f'<img class="ldvc-slide-{side}" src="{picture}" alt="Attention to {escape(name)}, {column.title}">'
            f'<span class="ldvc-slide-label ldvc-slide-label-{side}" aria-hidden="true">{column.title}{mark}</span>'
        )
    return (
        f'<div class="ldvc-slide ldvc-heat" style="--photo:url({photo});--aspect:{width}/{height}">{"".join(sides)}'
        f'<span class="ldvc-slide-line" aria-hidden="true"></span>'
        f'<input class="ldvc-slide-input" type="range" min="0" max="100" step="1" aria-label="{texts.SLIDER_LABEL}"></div>'
    )


def grey_photo(picture: np.ndarray) -> str:
    """What lies under the maps."""
    return photo_uri(picture, long_side=PHOTO_SIDE, grey=True, quality=75)
