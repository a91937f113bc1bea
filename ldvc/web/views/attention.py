"""The Attention tab's pictures: every name's map under every decoder on one scale, and two of them under a slider.

Under each map of a name stands the mean attention inside the name's own mask and outside it. The mask is the decoder's own
answer, threshold included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldvc.result import Segmentation
from ldvc.visualize import fit_size
from ldvc.web.html import escape, percent
from ldvc.web.tabs import texts
from ldvc.web.views.inline import heat_uri, photo_uri, scale_bar

MAP_SIDE = 112  # pixels of a map in the grid before the browser enlarges it: four for each patch of lite
SLIDER_SIDE = 224
PHOTO_SIDE = 420
INTERVENTION = "ldvc_lcsa_off"


@dataclass(frozen=True)
class Column:
    """One decoder's maps.

    Attributes:
        decoder: key of `texts.DECODER_TITLES`.
        maps: (C, h, w) attention on the patch grid for all names, or None if there is no such decoder.
        result: where the maps are from, to enlarge them.
        company: (h, w) attention to the words of `result.company` together, or None if there are none.
        labels: the decoder's answer at the size of the drawn maps, (height, width), -1 = none of these.
    """

    decoder: str
    maps: np.ndarray | None = None
    result: Segmentation | None = None
    company: np.ndarray | None = None
    labels: np.ndarray | None = None

    @classmethod
    def of(cls, decoder: str, result: Segmentation | None, *, layer: int, head: int | None) -> Column:
        """Read one layer, and one head or the mean of all, from a result."""
        if result is None:
            return cls(decoder)
        maps = result.cross_attention(layer=layer, head=head)
        company = result.company_attention(layer=layer, head=head) if result.company else None
        return cls(decoder, maps, result, company, result.labels_at(fit_size(*result.size, long_side=MAP_SIDE)))

    @property
    def title(self) -> str:
        """What the decoder is called."""
        return texts.DECODER_TITLES[self.decoder]

    def enlarged(self, attention: np.ndarray, long_side: int) -> np.ndarray:
        """A map (h, w) at a size of the photo, (height, width), padding cut off."""
        return self.result.attention_at(attention, fit_size(*self.result.size, long_side=long_side))

    def inside_outside(self, index: int) -> tuple[float | None, float | None]:
        """Mean attention to a name inside its mask and outside it; None where there is no such pixel."""
        values, inside = self.enlarged(self.maps[index], MAP_SIDE), self.labels == index
        return tuple(float(values[part].mean()) if part.any() else None for part in (inside, ~inside))


def value_range(columns: Sequence[Column], shown: Sequence[int], *, rescale: bool) -> tuple[float, float]:
    """(0, 1), or the lowest and highest value of what is shown when rescaled, unless they are the same."""
    values = [column.maps[list(shown)] for column in columns if column.maps is not None]
    values += [column.company for column in columns if column.company is not None]
    if not rescale or not values:
        return 0.0, 1.0
    low, high = float(min(each.min() for each in values)), float(max(each.max() for each in values))
    return (low, high) if high - low > 1e-6 else (0.0, 1.0)


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
    """Rows are names, columns decoders, under one colour bar. A single name's company has a row of its own.

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
    if any(column.company is not None for column in columns):
        rows += _company_row(columns, low, high)
    bar = scale_bar(texts.ATTENTION_SCALE_RESCALED if rescale else texts.ATTENTION_SCALE, low, high)
    height, width = next(column.result.size for column in columns if column.result is not None)
    return (
        f'<div class="ldvc-maps" style="--photo:url({photo});--aspect:{width}/{height};--columns:{len(columns)}">{bar}'
        f'<div class="ldvc-maps-row ldvc-maps-head"><span></span>{heads}</div>{rows}</div>'
    )


def _column_head(column: Column) -> str:
    is_intervention = column.decoder == INTERVENTION
    tag = f'<span class="ldvc-tag ldvc-intervention">{texts.INTERVENTION}</span>' if is_intervention else ""
    extra = " ldvc-is-intervention" if is_intervention else ""
    return (
        f'<div class="ldvc-maps-title{extra}"><b>{column.title}</b>{tag}'
        f"<small>{texts.ATTENTION_COLUMNS[column.decoder]}</small></div>"
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


def _company_row(columns: Sequence[Column], low: float, high: float) -> str:
    words = next(column.result.company for column in columns if column.company is not None)
    label = (
        f'<div class="ldvc-label ldvc-company"><span><b>{texts.COMPANY}:</b> {escape(", ".join(words))} '
        f"<small>{texts.COMPANY_HELP}</small></span></div>"
    )
    cells = "".join(
        _missing(column) if column.company is None else _map(column, column.company, texts.COMPANY, "", low, high)
        for column in columns
    )
    return f'<div class="ldvc-maps-row">{label}{cells}</div>'


def _cell(column: Column, index: int, name: str, low: float, high: float) -> str:
    if column.maps is None:
        return _missing(column)
    inside, outside = ("–" if share is None else percent(share) for share in column.inside_outside(index))
    said = texts.ATTENTION_SHARES.format(inside=inside, outside=outside)
    return _map(column, column.maps[index], name, said, low, high)


def _missing(column: Column) -> str:
    return f'<figure class="ldvc-map ldvc-map-missing{_extra(column)}"><span>{texts.DECODER_MISSING}</span></figure>'


def _extra(column: Column) -> str:
    return " ldvc-is-intervention" if column.decoder == INTERVENTION else ""


def _map(column: Column, values: np.ndarray, name: str, said: str, low: float, high: float) -> str:
    """One map with a caption that is HTML already."""
    picture = heat_uri(column.enlarged(values, MAP_SIDE), low=low, high=high)
    kind = f"{column.title} ({texts.INTERVENTION})" if column.decoder == INTERVENTION else column.title
    return (
        f'<figure class="ldvc-map{_extra(column)}"><div class="ldvc-heat"><img src="{picture}" '
        f'alt="Attention to {escape(name)}, {kind}{f": {said}" if said else ""}"></div>'
        f"{f'<figcaption>{said}</figcaption>' if said else ''}</figure>"
    )


def attention_slider(left: Column, right: Column, index: int, name: str, *, photo: str, low: float, high: float) -> str:
    """Two decoders' maps of one name over each other, parted by a line that a range input moves."""
    height, width = left.result.size
    sides = []
    for column, side in ((left, "left"), (right, "right")):
        picture = heat_uri(column.enlarged(column.maps[index], SLIDER_SIDE), low=low, high=high)
        mark = f' <i class="ldvc-tag ldvc-intervention">{texts.INTERVENTION}</i>' if column.decoder == INTERVENTION else ""
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
