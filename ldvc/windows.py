"""What a decoder said about the windows of a photo, patch by patch, and how maps of windows become one map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ldvc.enlarge import resampling_matrix
from ldvc.pictures import Window

if TYPE_CHECKING:
    from ldvc.modeling.attention import Routing


@dataclass(frozen=True)
class DecoderFeatures:
    """What went into the decoder and what came out, of one window; d is CLIP's joint width.

    Attributes:
        patches_before, patches_after: (N, d), float32.
        classes_before, classes_after: (E, d), float32, one for each word (a class may have several, see
            `Segmentation.embedding_classes`); before is what the text adapter made of the words for this photo.
    """

    patches_before: Tensor
    patches_after: Tensor
    classes_before: Tensor
    classes_after: Tensor


@dataclass
class WindowOutput:
    """What the decoder said about one window.

    Attributes:
        window: where it is on the canvas.
        logits: (C, h, w), one value per patch, padding included.
        cross_attention: for each layer (heads, C, h, w), softmax over the names.
        routing: for each layer; empty without LCSA.
        features: before and after the decoder, or None if not asked for.
    """

    window: Window
    logits: Tensor
    cross_attention: list[Tensor] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)
    features: DecoderFeatures | None = None


@dataclass(frozen=True)
class PatchRouting:
    """Where LCSA routed one patch; all coordinates are patches of the window's grid.

    Attributes:
        grid: (h, w) of the window.
        patch: (row, column) that was asked for, in that grid.
        window: the part of the canvas that the grid covers.
        regions: (k,) numbers of the regions that were chosen, best first.
        affinity: (k,) of each of them to the patch's own region; `all_affinities` has every region.
        all_affinities: (regions,).
        own_region: number of the region that holds the patch.
        boxes: {region: (top, left, bottom, right)} for the chosen ones and the patch's own; bottom and right exclusive.
        token_attention: (heads, h, w), zero outside the chosen regions; sums to 1 per head.
        region_grid: (rows, columns) of regions, numbered row by row.
    """

    grid: tuple[int, int]
    patch: tuple[int, int]
    window: Window
    regions: np.ndarray
    affinity: np.ndarray
    all_affinities: np.ndarray
    own_region: int
    boxes: dict[int, tuple[int, int, int, int]]
    token_attention: np.ndarray
    region_grid: tuple[int, int]


def stitch(
    maps: Sequence[Tensor],
    windows: Sequence[Window],
    size: tuple[int, int],
    *,
    canvas: tuple[int, int],
    patch: int,
    after: Callable[[Tensor], Tensor] | None = None,
    grid: bool = False,
) -> Tensor:
    """Maps on the patches of each window (C, h, w) -> one map of the whole photo (C, height, width).

    Args:
        maps: one for each window.
        windows: where they are on the canvas.
        size: pixels (or patches) of the result.
        canvas: (height, width) of the canvas in its pixels.
        patch: canvas pixels per patch.
        after: applied to each enlarged map before overlapping windows are averaged; a single window stays as it is.
        grid: `size` spans whole patches, padding included.
    """
    whole = tuple(-(-side // patch) * patch for side in canvas) if grid else canvas
    device = maps[0].device

    def enlargement(axis: int, window: Window, cells: int) -> tuple[Tensor, Tensor]:
        start = (window.top, window.left)[axis]
        return resampling_matrix(size[axis], canvas=whole[axis], start=start, cells=cells, patch=patch)

    if len(maps) == 1:
        rows, columns = (enlargement(axis, windows[0], maps[0].shape[1 + axis])[0].to(device) for axis in (0, 1))
        return rows @ maps[0] @ columns.T
    total = torch.zeros(maps[0].shape[0], *size, device=device)
    count = torch.zeros(size, device=device)
    for window, values in zip(windows, maps, strict=True):
        rows, at_rows = enlargement(0, window, values.shape[1])
        columns, at_columns = enlargement(1, window, values.shape[2])
        rows, columns = rows.to(device), columns.to(device)
        # Pixels beyond the canvas (padding, where `grid`) belong to the windows at the border.
        at_rows, at_columns = at_rows.clamp(max=canvas[0] - 0.5), at_columns.clamp(max=canvas[1] - 0.5)
        down = ((at_rows >= window.top) & (at_rows < window.top + window.height)).nonzero().flatten()
        along = ((at_columns >= window.left) & (at_columns < window.left + window.width)).nonzero().flatten()
        if not len(down) or not len(along):  # the result is coarser than the windows
            continue
        box = (slice(int(down[0]), int(down[-1]) + 1), slice(int(along[0]), int(along[-1]) + 1))
        part = rows[box[0]] @ values @ columns[box[1]].T
        total[:, box[0], box[1]] += part if after is None else after(part)
        count[box] += 1
    return total / count


def distance_to_centre(window: Window, at: tuple[float, float]) -> float:
    """Of a point (y, x) of the canvas to the middle of a window, 0.5 at its border."""
    return max(
        abs(window.top + window.height / 2 - at[0]) / window.height,
        abs(window.left + window.width / 2 - at[1]) / window.width,
    )


def patch_routing(routing: Routing, *, row: int, column: int, grid: tuple[int, int], window: Window) -> PatchRouting:
    """Read the routing of one patch; see `PatchRouting`."""
    own = routing.layout.region_of(row, column)
    regions = routing.chosen(row, column)
    affinities = routing.affinity[0, own].float()
    return PatchRouting(
        grid=grid,
        patch=(row, column),
        window=window,
        regions=np.array(regions),
        affinity=affinities[regions].numpy(),
        all_affinities=affinities.numpy(),
        own_region=own,
        boxes={region: routing.layout.box(region) for region in (*regions, own)},
        token_attention=routing.token_attention(row, column).numpy(),
        region_grid=routing.layout.count,
    )
