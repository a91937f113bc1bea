"""A patch in plain CLIP: to which patches it attends in the last block of the image tower. A part of the Attention tab."""

from __future__ import annotations

import numpy as np

from ldvc.result import Segmentation
from ldvc.visualize import NONE_COLOUR, colours_for
from ldvc.web import html, texts
from ldvc.web.html import escape, name_label, number
from ldvc.web.tabs.similarity import patch_box, rect, similarity_html, svg

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
STEP = 4  # patches, of an arrow key with Shift


def patch_html(result: Segmentation, row: int, column: int, *, photo: str, reading: str) -> str:
    """The photo to click on with the attention over it, and the name of the patch beside it.

    Args:
        result: of the decoder "clip".
        row, column: of the patch, within `result.grid`.
        photo: as data.
        reading: key of `READINGS`.
    """
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
    """The photo to click on (see routing.js) with something over it, and the patch in words for screen readers.

    Args:
        step: rows and columns that an arrow key with Shift moves by.
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
    """Values on a grid of patches whose first one is at `origin` on the photo, from 0 to the highest; see `html.heat_uri`."""
    (rows, columns), (top, left), (height, width) = values.shape, origin, result.extent
    place = (
        f"left:{left / width * 100:.3f}%;top:{top / height * 100:.3f}%;"
        f"width:{columns / width * 100:.3f}%;height:{rows / height * 100:.3f}%"
    )
    heat = html.heat_uri(values, high=float(values.max()), inside=inside)
    return f'<img class="ldvc-stage-heat" src="{heat}" style="{place}" alt="{alt}">'


def verdict(result: Segmentation, row: int, column: int) -> str:
    """Place, name and score of a patch; no score where it is none of these."""
    label = result.patch_label(row, column)
    score = float(result.patch_scores(row, column)[label])
    threshold = result.threshold_of(result.names[label])
    if threshold is not None and score < threshold:
        name = name_label(texts.NONE_OF_THESE, True, NONE_COLOUR, tag="span")
    else:
        name = name_label(result.names[label], result.seen[label], colours_for(result.names)[label], tag="span")
        name += f'<span class="ldvc-subdued">score {number(score)}</span>'
    return f'<p class="ldvc-verdict">Row {row + 1}, column {column + 1} is {name}</p>'
