"""A patch in plain CLIP: to which patches it attends in the last block of the image tower. A part of the Attention tab."""

from __future__ import annotations

import numpy as np

from ldvc.result import Segmentation
from ldvc.visualize import NONE_COLOUR, colours_for
from ldvc.web import html, texts
from ldvc.web.html import escape, name_label, number
from ldvc.web.tabs.similarity import similarity_html

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
    attention = result.patch_attention(row, column)
    (rows, columns), (height, width) = result.grid, result.extent
    highest = float(attention.max())
    strongest = np.unravel_index(int(attention.argmax()), attention.shape)
    aria_text = (
        f"Row {row + 1} of {rows}, column {column + 1} of {columns}. The most attention goes to row {strongest[0] + 1}, "
        f"column {strongest[1] + 1}."
    )
    place = f"left:0;top:0;width:{columns / width * 100:.3f}%;height:{rows / height * 100:.3f}%"
    stage = (
        f'<div class="ldvc-stage" tabindex="0" role="application" aria-label="{LABEL}" aria-describedby="patch-text" '
        f'data-rows="{rows}" data-columns="{columns}" data-row="{row}" data-column="{column}" data-height="{height:.4f}" '
        f'data-width="{width:.4f}" data-step="{STEP},{STEP}" style="--aspect:{width:.4f}/{height:.4f}">'
        f'<img class="ldvc-stage-heat" src="{html.heat_uri(attention, high=highest)}" style="{place}" '
        'alt="Attention of the patch">'
        f'<svg viewBox="0 0 {width:.4f} {height:.4f}" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="ldvc-patch" x="{column}" y="{row}" width="{min(1, width - column):.3f}" '
        f'height="{min(1, height - row):.3f}"/></svg></div>'
        f'<p id="patch-text" class="ldvc-aria-text" role="status">{escape(aria_text)}</p>'
    )
    windows = f" {WINDOWS}" if len(result.outputs) > 1 else ""
    return (
        f'<div class="ldvc-route" style="--photo:url({photo})">{stage}<div class="ldvc-steps">{verdict(result, row, column)}'
        f'{html.scale_bar(SCALE, 0, highest)}<p class="ldvc-footnote">{READINGS[reading]}{windows}</p>'
        f"{similarity_html(result, row, column)}</div></div>"
    )


def verdict(result: Segmentation, row: int, column: int) -> str:
    """Place, name and score of a patch; no score where it is none of these."""
    label, scores = result.patch_label(row, column), result.patch_scores(row, column)
    threshold = result.threshold_of(result.names[label])
    none = threshold is not None and scores[label] < threshold
    name, seen, colour = (
        (texts.NONE_OF_THESE, True, NONE_COLOUR)
        if none
        else (result.names[label], result.seen[label], colours_for(result.names)[label])
    )
    score = "" if none else f'<span class="ldvc-subdued">score {number(float(scores[label]))}</span>'
    return (
        f'<p class="ldvc-verdict">Row {row + 1}, column {column + 1} is {name_label(name, seen, colour, tag="span")}{score}</p>'
    )
