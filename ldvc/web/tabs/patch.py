"""One patch of the photo: its attention to all patches in plain CLIP (in the Attention tab), and its similarity to them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldvc.predictor import PLAIN_CLIP
from ldvc.result import Segmentation
from ldvc.visualize import NONE_COLOUR, colours_for, fit_size
from ldvc.web import html, texts
from ldvc.web.html import MAP_SIDE, escape, name_label, number
from ldvc.web.tabs.attention_maps import inside_outside, shares_text

Box = tuple[float, float, float, float]  # left, top, width, height on the photo, in patches

TITLE = "Which patches does this patch attend to?"
HELP = (
    "The attention of one patch to all patches in the last block of CLIP’s image tower, mean of the heads. Click on the photo, "
    "or focus it and use the arrow keys."
)
LABEL = (
    "The photo with the attention of one patch. Arrow keys move by one patch, with Shift by four, Home and End to the ends of "
    "the row."
)
SCALE = "Share of attention, from 0 to the highest"
READINGS = {
    "plain": "The last block is computed as in CLIP.",
    "naclip": "The last block is read as in NACLIP: a patch attends to its neighbours and to patches with similar keys.",
    "sc_clip": "The last block is read as in SC-CLIP: a patch attends to patches that resemble it in an earlier block, and to "
    "patches with similar keys.",
}
WINDOWS = "The photo is read in overlapping windows, and a patch attends only within its windows."
ALIKE_TITLE = "Which patches are alike?"
MOMENTS = {False: "before the decoder", True: "after the decoder"}
NO_DECODER = "in CLIP, which has no decoder"
ALIKE_SCALE = "Cosine similarity to this patch, one fixed scale from 0 to 1; negative values are drawn as 0"
CHOSEN_HELP = "White: the regions that LCSA chose."
CHOSEN = "mean in them {inside}, elsewhere {outside}"

STEP = 4  # patches by which an arrow key with Shift moves


def patch_html(result: Segmentation, row: int, column: int, *, photo: str, reading: str) -> str:
    """The clickable photo (a data URI) under the attention of plain CLIP; `reading` is a key of `READINGS`."""
    attention, (rows, columns) = result.patch_attention(row, column), result.grid
    strongest = np.unravel_index(int(attention.argmax()), attention.shape)
    text = (
        f"Row {row + 1} of {rows}, column {column + 1} of {columns}. The most attention goes to row {strongest[0] + 1}, "
        f"column {strongest[1] + 1}."
    )
    here = svg(result.extent, rect(patch_box(result, row, column), "patch"))
    content = heat_layer(result, attention, "Attention of the patch") + here
    clickable = stage(result, row, column, content, key="patch", label=LABEL, text=text, step=(STEP, STEP))
    windows = f" {WINDOWS}" if len(result.outputs) > 1 else ""
    return (
        f'<div class="ldvc-route" style="--photo:url({photo})">{clickable}<div class="ldvc-steps">'
        f"{verdict(result, row, column)}{html.scale_bar(SCALE, 0, float(attention.max()))}"
        f'<p class="ldvc-footnote">{READINGS[reading]}{windows}</p>{similarity_html(result, row, column)}</div></div>'
    )


def stage(
    result: Segmentation, row: int, column: int, content: str, *, key: str, label: str, text: str, step: tuple[int, int]
) -> str:
    """The clickable photo (see routing.js) under `content`, and the patch in words for screen readers.

    An arrow key with Shift moves by `step` = (rows, columns).
    """
    (rows, columns), (height, width) = result.grid, result.extent
    return (
        f'<div class="ldvc-stage" tabindex="0" role="application" aria-label="{label}" aria-describedby="{key}-text" '
        f'data-rows="{rows}" data-columns="{columns}" data-row="{row}" data-column="{column}" data-height="{height:.4f}" '
        f'data-width="{width:.4f}" data-step="{step[0]},{step[1]}" style="--aspect:{width:.4f}/{height:.4f}">{content}</div>'
        f'<p id="{key}-text" class="ldvc-aria-text" role="status">{escape(text)}</p>'
    )


def heat_layer(
    result: Segmentation, values: np.ndarray, alt: str, origin: tuple[float, float] = (0, 0), inside: np.ndarray | None = None
) -> str:
    """Heat of values on a grid of patches that begins at `origin` on the photo, from 0 to the maximum; see `html.heat_uri`."""
    (rows, columns), (top, left), (height, width) = values.shape, origin, result.extent
    place = (
        f"left:{left / width * 100:.3f}%;top:{top / height * 100:.3f}%;"
        f"width:{columns / width * 100:.3f}%;height:{rows / height * 100:.3f}%"
    )
    heat = html.heat_uri(values, high=float(values.max()), inside=inside)
    return f'<img class="ldvc-stage-heat" src="{heat}" style="{place}" alt="{alt}">'


def verdict(result: Segmentation, row: int, column: int) -> str:
    """Place, name and score of a patch; without a score if the patch is none of these."""
    label = result.patch_label(row, column)
    score = float(result.patch_scores(row, column)[label])
    threshold = result.threshold_of(result.names[label])
    if threshold is not None and score < threshold:
        name = name_label(texts.NONE_OF_THESE, True, NONE_COLOUR, tag="span")
    else:
        name = name_label(result.names[label], result.seen[label], colours_for(result.names)[label], tag="span")
        name += f'<span class="ldvc-subdued">score {number(score)}</span>'
    return f'<p class="ldvc-verdict">Row {row + 1}, column {column + 1} is {name}</p>'


def similarity_html(result: Segmentation, row: int, column: int, *, chosen: Sequence[Box] = ()) -> str:
    """Maps of the similarity to a patch before and after the decoder; plain CLIP has one. LCSA chose the regions `chosen`."""
    moments = {False: NO_DECODER} if result.decoder == PLAIN_CLIP else MOMENTS
    figures = "".join(_figure(result, row, column, chosen, after, title) for after, title in moments.items())
    help_text = f"<p>{CHOSEN_HELP}</p>" if chosen else ""
    height, width = result.extent
    return (
        f'<section class="ldvc-step ldvc-alike" style="--aspect:{width:.4f}/{height:.4f}"><h3>{ALIKE_TITLE}</h3>{help_text}'
        f"<div>{figures}</div>{html.scale_bar(ALIKE_SCALE)}</section>"
    )


def _figure(result: Segmentation, row: int, column: int, chosen: Sequence[Box], after: bool, title: str) -> str:
    similarity = result.patch_similarity(row, column, after=after)
    picture = html.heat_uri(result.attention_at(similarity, fit_size(*result.size, long_side=MAP_SIDE)))
    rects = "".join([*(rect(box, "region") for box in chosen), rect(patch_box(result, row, column), "patch")])
    means = inside_outside(similarity, within(chosen, similarity.shape, result.extent))
    caption = f"<br>{shares_text(means, CHOSEN, write=number)}" if chosen else ""
    return (
        f'<figure><div class="ldvc-heat"><img src="{picture}" alt="Cosine similarity to this patch {title}">'
        f"{svg(result.extent, rects)}</div><figcaption><b>{title}</b>{caption}</figcaption></figure>"
    )


def svg(extent: tuple[float, float], content: str) -> str:
    """A drawing over the photo, in units of patches."""
    height, width = extent
    return f'<svg viewBox="0 0 {width:.4f} {height:.4f}" preserveAspectRatio="none" aria-hidden="true">{content}</svg>'


def patch_box(result: Segmentation, row: int, column: int) -> Box:
    """The box of a patch, clipped to the photo."""
    height, width = result.extent
    return column, row, min(1, width - column), min(1, height - row)


def rect(box: Box, kind: str) -> str:
    """A rectangle of an SVG; `kind` chooses its style."""
    x, y, width, height = box
    return f'<rect class="ldvc-{kind}" x="{x:.3f}" y="{y:.3f}" width="{width:.3f}" height="{height:.3f}"/>'


def within(boxes: Sequence[Box], grid: tuple[int, int], extent: tuple[float, float]) -> np.ndarray:
    """A mask (h, w) of the patches whose centre is in one of the boxes, which are clipped to the photo."""
    y, x = (np.minimum(np.arange(side) + 0.5, end - 1e-6) for side, end in zip(grid, extent, strict=True))
    inside = np.zeros(grid, dtype=bool)
    for left, top, width, height in boxes:
        inside |= ((y >= top) & (y < top + height))[:, None] & ((x >= left) & (x < left + width))
    return inside
