"""The attention to one name at all layers and heads of a decoder, as small maps. A part of the Attention tab."""

from __future__ import annotations

import numpy as np

from ldvc.result import Segmentation
from ldvc.visualize import fit_size
from ldvc.web import html, texts
from ldvc.web.html import MAP_SIDE, escape
from ldvc.web.segmenter import LCSA_OFF
from ldvc.web.tabs import head_text
from ldvc.web.tabs.attention_maps import FIXED_SCALE, INTERVENTION, RESCALED, inside_outside, shares_text

TITLE = "All layers and heads"
HELP = (
    "One small map for each layer and head. Choose one to enlarge it: the whole tab then shows its layer and head. Below a "
    "map is its mean inside the name’s mask and outside."
)
SHORT_SHARES = "{inside}&#8239;/&#8239;{outside}"


def heads_html(
    result: Segmentation, decoder: str, index: int, *, layer: int, head: int | None, photo: str, rescale: bool
) -> str:
    """A table of buttons, a row for each layer, a column for the mean and each head; the chosen map is enlarged below it.

    Args:
        decoder: of the result, a key of `texts.DECODER_TITLES`.
        index: of the name.
        layer, head: the chosen ones; head None = mean of all.
        photo: data of the grey photo under every map.
        rescale: stretch the scale to the values shown, and say so.
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
