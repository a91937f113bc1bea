"""Which patches are alike: the cosine similarity of a patch and all others, before and after the decoder, as two maps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldvc.predictor import PLAIN_CLIP
from ldvc.result import Segmentation
from ldvc.visualize import fit_size
from ldvc.web import html
from ldvc.web.html import MAP_SIDE, number
from ldvc.web.tabs.attention_maps import inside_outside, shares_text

Box = tuple[float, float, float, float]  # left, top, width, height on the photo, in patches

TITLE = "Which patches are alike?"
MOMENTS = {False: "before the decoder", True: "after the decoder"}
NO_DECODER = "in CLIP, which has no decoder"
SCALE = "Cosine similarity to this patch, one fixed scale from 0 to 1; negative values are drawn as 0"
CHOSEN_HELP = "White: the regions that LCSA chose."
CHOSEN = "mean in them {inside}, elsewhere {outside}"


def similarity_html(result: Segmentation, row: int, column: int, *, chosen: Sequence[Box] = ()) -> str:
    """Two maps side by side, or one with plain CLIP.

    Args:
        row, column: of the patch, within `result.grid`.
        chosen: the regions that LCSA chose for it.
    """
    moments = {False: NO_DECODER} if result.decoder == PLAIN_CLIP else MOMENTS
    figures = "".join(_figure(result, row, column, chosen, after, title) for after, title in moments.items())
    help_text = f"<p>{CHOSEN_HELP}</p>" if chosen else ""
    height, width = result.extent
    return (
        f'<section class="ldvc-step ldvc-alike" style="--aspect:{width:.4f}/{height:.4f}"><h3>{TITLE}</h3>{help_text}'
        f"<div>{figures}</div>{html.scale_bar(SCALE)}</section>"
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
    """A drawing over the photo; its unit is a patch."""
    height, width = extent
    return f'<svg viewBox="0 0 {width:.4f} {height:.4f}" preserveAspectRatio="none" aria-hidden="true">{content}</svg>'


def patch_box(result: Segmentation, row: int, column: int) -> Box:
    """The box of a patch, cut off at the edges of the photo."""
    height, width = result.extent
    return column, row, min(1, width - column), min(1, height - row)


def rect(box: Box, kind: str) -> str:
    """A rectangle of an SVG; `kind` chooses its style."""
    x, y, width, height = box
    return f'<rect class="ldvc-{kind}" x="{x:.3f}" y="{y:.3f}" width="{width:.3f}" height="{height:.3f}"/>'


def within(boxes: Sequence[Box], grid: tuple[int, int], extent: tuple[float, float]) -> np.ndarray:
    """(h, w), whether the centre of a patch is in one of the boxes, which end where the photo ends."""
    y, x = (np.minimum(np.arange(side) + 0.5, end - 1e-6) for side, end in zip(grid, extent, strict=True))
    found = np.zeros(grid, dtype=bool)
    for left, top, width, height in boxes:
        found |= ((y >= top) & (y < top + height))[:, None] & ((x >= left) & (x < left + width))
    return found
