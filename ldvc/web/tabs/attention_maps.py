"""The maps of the Attention tab: a table of names and decoders, a slider between two decoders, all layers and heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np

from ldvc.result import Segmentation
from ldvc.visualize import colours_for, fit_size
from ldvc.web import html, texts
from ldvc.web.html import MAP_SIDE, escape, percent
from ldvc.web.segmenter import LCSA_OFF
from ldvc.web.tabs import head_text

SLIDER_SIDE = 224

COLUMNS = {
    "ldvc": "patches attend to similar patches, then to names",
    "ldvc_without_lcsa": "patches attend to names only",
    "zegclip": "names attend to patches",
    LCSA_OFF: "the weights of the first column, without LCSA",
}
INTERVENTION = "intervention"
FIXED_SCALE = "Share of attention, one fixed scale from 0 to 1 for all maps"
RESCALED = "Share of attention, rescaled to the lowest and highest value shown: not 0 to 1"
SHARES = "inside its mask {inside}, outside {outside}"
COMPANY_HELP = "Words that share the attention with a single name; they are not part of the overlay."
SLIDER_LABEL = "Position of the line between the two maps, in percent from the left"
HEADS_TITLE = "All layers and heads"
HEADS_HELP = (
    "One small map for each layer and head. Choose one to enlarge it: the whole tab then shows its layer and head. Below a "
    "map is its mean inside the name’s mask and outside."
)
SHORT_SHARES = "{inside}&#8239;/&#8239;{outside}"


class Column:
    """One decoder's maps at one layer and one head (None = mean of all). `result` is None for a missing decoder.

    On the patch grid: `maps` (C, h, w) is the attention to the names, `company` (h, w) the attention to all words of
    `result.company` together, `none` (h, w) the attention to "none of these" in the last layer. Each may be None.
    """

    def __init__(self, decoder: str, result: Segmentation | None = None, layer: int = -1, head: int | None = None) -> None:
        self.decoder, self.result, self.is_intervention = decoder, result, decoder == LCSA_OFF
        self.maps = self.company = self.none = None
        if result is not None:
            self.maps = result.cross_attention(layer=layer, head=head)
            self.company = result.company_attention(layer=layer, head=head) if result.company else None
            none = result.none_attention(layer=layer, head=head)
            self.none = none if none.any() else None

    @property
    def mark(self) -> str:
        """Further CSS classes of the column's elements."""
        return " ldvc-is-intervention" if self.is_intervention else ""

    @cached_property
    def drawn(self) -> np.ndarray:
        """The maps at the size in the table, (C, height, width)."""
        return self.enlarged(self.maps)

    @cached_property
    def labels(self) -> np.ndarray:
        """The decoder's label map (height, width) at the same size, -1 = none of these."""
        return self.result.labels_at(self.drawn.shape[1:])

    def enlarged(self, attention: np.ndarray, long_side: int = MAP_SIDE) -> np.ndarray:
        """Maps (..., h, w) at a size of the photo, (..., height, width), without padding."""
        return self.result.attention_at(attention, fit_size(*self.result.size, long_side=long_side))

    def inside_outside(self, index: int) -> tuple[float | None, float | None]:
        """Mean attention to a name inside and outside its mask; None if there is no such pixel."""
        return inside_outside(self.drawn[index], self.labels == index)


def inside_outside(values: np.ndarray, inside: np.ndarray) -> tuple[float | None, float | None]:
    """Mean of a map (height, width) where `inside` is true and where it is false; None if there is no such pixel."""
    return tuple(float(values[part].mean()) if part.any() else None for part in (inside, ~inside))


def shares_text(means: Sequence[float | None], form: str = SHARES, write: Callable[[float], str] = percent) -> str:
    """The two values of `inside_outside` as HTML; `write` formats each of them."""
    inside, outside = ("–" if mean is None else write(mean) for mean in means)
    return form.format(inside=inside, outside=outside)


def value_range(columns: Sequence[Column], shown: Sequence[int], *, rescale: bool) -> tuple[float, float]:
    """The scale of the maps: (0, 1), or with `rescale` the lowest and highest value shown, if they differ."""
    values = [column.maps[list(shown)] for column in columns if column.maps is not None]
    values += [extra for column in columns for extra in (column.company, column.none) if extra is not None]
    if not rescale or not values:
        return 0.0, 1.0
    low, high = float(min(array.min() for array in values)), float(max(array.max() for array in values))
    return (low, high) if high - low > 1e-6 else (0.0, 1.0)


def attention_grid(columns: Sequence[Column], shown: Sequence[int], *, photo: str, rescale: bool) -> str:
    """A table with a row for each name of `shown`, for company and for "none of these", and a column for each decoder.

    `photo` is the data URI of the grey photo under every map. `rescale` stretches the scale to the values shown.
    """
    scale = value_range(columns, shown, rescale=rescale)
    main = next(column.result for column in columns if column.result is not None)
    names, colours = main.names, colours_for(main.names)

    def row(head: str, cells: Iterable[str], kind: str = "") -> str:
        return f'<div class="ldvc-maps-row{kind}">{head}{"".join(cells)}</div>'

    rows = [row("<span></span>", map(_column_head, columns), " ldvc-maps-head")]
    for index in shown:
        label = html.name_label(names[index], main.seen[index], colours[index])
        rows.append(row(label, (_name_map(column, index, *scale) for column in columns)))
    company = f"<b>{texts.COMPANY}</b>: {escape(', '.join(main.company))} <small>{COMPANY_HELP}</small>"
    others = [
        (texts.COMPANY, company, [column.company for column in columns]),
        (texts.NONE_OF_THESE, f"<b>{texts.NONE_OF_THESE}</b>", [column.none for column in columns]),
    ]
    for title, head, maps in others:
        if any(values is not None for values in maps):
            pairs = zip(columns, maps, strict=True)
            enlarged = ((column, None if values is None else column.enlarged(values)) for column, values in pairs)
            cells = (_map(column, values, title, *scale) for column, values in enlarged)
            rows.append(row(f'<div class="ldvc-label ldvc-company"><span>{head}</span></div>', cells))
    height, width = main.size
    return (
        f'<div class="ldvc-maps" style="--photo:url({photo});--aspect:{width}/{height};--columns:{len(columns)}">'
        f"{html.scale_bar(RESCALED if rescale else FIXED_SCALE, *scale)}{''.join(rows)}</div>"
    )


def _column_head(column: Column) -> str:
    tag = f'<span class="ldvc-tag ldvc-intervention">{INTERVENTION}</span>' if column.is_intervention else ""
    title = f"<b>{texts.DECODER_TITLES[column.decoder]}</b>{tag}<small>{COLUMNS[column.decoder]}</small>"
    return f'<div class="ldvc-maps-title{column.mark}">{title}</div>'


def _name_map(column: Column, index: int, low: float, high: float) -> str:
    if column.maps is None:
        return _map(column, None, "", low, high)
    caption = shares_text(column.inside_outside(index))
    return _map(column, column.drawn[index], column.result.names[index], low, high, caption)


def _map(column: Column, values: np.ndarray | None, name: str, low: float, high: float, caption: str = "") -> str:
    """One map, already enlarged; `caption` is HTML."""
    if values is None:
        return f'<figure class="ldvc-map ldvc-map-missing{column.mark}"><span>{texts.DECODER_MISSING}</span></figure>'
    picture = html.heat_uri(values, low=low, high=high)
    title = texts.DECODER_TITLES[column.decoder] + (f" ({INTERVENTION})" if column.is_intervention else "")
    return (
        f'<figure class="ldvc-map{column.mark}"><div class="ldvc-heat"><img src="{picture}" '
        f'alt="Attention to {escape(name)}, {title}{f": {caption}" if caption else ""}"></div>'
        f"{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"
    )


def attention_slider(left: Column, right: Column, index: int, name: str, *, photo: str, low: float, high: float) -> str:
    """Two decoders' maps of one name over each other, with a line between them that a range input moves."""
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


def heads_html(
    result: Segmentation, decoder: str, index: int, *, layer: int, head: int | None, photo: str, rescale: bool
) -> str:
    """A table of buttons with a row for each layer, and a column for the mean (head None) and for each head.

    The map of the chosen `layer` and `head` is enlarged below the table. `index` is the index of the name; see
    `attention_grid` for the other arguments.
    """
    layers, heads = (range(count) for count in result.attention_shape)
    columns = [None, *heads]
    maps = np.array([[result.cross_attention(each, column)[index] for column in columns] for each in layers])
    low, high = (float(maps.min()), float(maps.max())) if rescale and np.ptp(maps) > 1e-6 else (0.0, 1.0)
    drawn = result.attention_at(maps, fit_size(*result.size, long_side=MAP_SIDE))  # (layers, 1 + heads, height, width)
    inside = result.labels_at(drawn.shape[2:]) == index
    name, title = escape(result.names[index]), texts.DECODER_TITLES[decoder]
    is_intervention = decoder == LCSA_OFF

    def heat(values: np.ndarray) -> str:
        return f'<span class="ldvc-heat"><img src="{html.heat_uri(values, low=low, high=high)}" alt=""></span>'

    def cell(at: int, column: int | None) -> str:
        values, is_chosen = drawn[at, columns.index(column)], (at, column) == (layer, head)
        shares = inside_outside(values, inside)
        label = f"{place(at, column)}: {shares_text(shares)}"
        return (
            f'<td><button type="button" class="ldvc-head" data-layer="{at}" data-head="{-1 if column is None else column}" '
            f'aria-pressed="{str(is_chosen).lower()}" aria-label="{label}" title="{label}">{heat(values)}'
            f"<small>{shares_text(shares, SHORT_SHARES)}</small></button></td>"
        )

    titles = "".join(f'<th scope="col">{texts.MEAN if each is None else f"{texts.HEAD} {each + 1}"}</th>' for each in columns)
    rows = "".join(
        f'<tr><th scope="row"><span>{texts.LAYER} </span>{at + 1}</th>{"".join(cell(at, each) for each in columns)}</tr>'
        for at in layers
    )
    chosen = drawn[layer, columns.index(head)]
    mark = f' <span class="ldvc-tag ldvc-intervention">{INTERVENTION}</span>' if is_intervention else ""
    label = f"Attention to {name}, {title}"
    height, width = result.size
    return (
        f'<div class="ldvc-heads{" ldvc-is-intervention" if is_intervention else ""}" '
        f'style="--photo:url({photo});--aspect:{width}/{height}">'
        f"{html.scale_bar(RESCALED if rescale else FIXED_SCALE, low, high)}"
        f'<div class="ldvc-heads-scroll"><table aria-label="{label}"><thead><tr><td></td>{titles}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div><figure class="ldvc-heads-large">{heat(chosen)}<figcaption role="status">'
        f"<b>{title}</b>{mark}<br>Attention to {name}<br>{place(layer, head)}<br>"
        f"{shares_text(inside_outside(chosen, inside))}</figcaption></figure></div>"
    )


def place(layer: int, head: int | None) -> str:
    """A layer and a head in words."""
    return f"{texts.LAYER} {layer + 1}, {head_text(head)}"
