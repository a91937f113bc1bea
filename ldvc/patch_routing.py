"""The LCSA routing of a single patch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldvc.inference import Window
from ldvc.modeling.attention import Routing


@dataclass(frozen=True)
class PatchRouting:
    """The regions to which LCSA routed one patch. Coordinates are patches of the window's grid.

    Attributes:
        grid: (h, w) of the window.
        patch: (row, column) of the patch in that grid.
        window: the part of the model's input that the grid covers.
        regions: (k,) indices of the chosen regions, best first.
        affinity: (k,) of the chosen regions to the patch's own region.
        all_affinities: (R,) of all regions.
        own_region: index of the region that contains the patch.
        boxes: {region: (top, left, bottom, right)} of the chosen regions and the patch's own; bottom and right exclusive.
        token_attention: (heads, h, w), zero outside the chosen regions; sums to 1 per head.
        region_grid: (rows, columns) of regions, which are numbered row by row.
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


def distance_to_centre(window: Window, at: tuple[float, float]) -> float:
    """Distance of a point (y, x) of the model's input to the centre of a window; 0.5 at its border."""
    return max(
        abs(window.top + window.height / 2 - at[0]) / window.height,
        abs(window.left + window.width / 2 - at[1]) / window.width,
    )


def patch_routing(routing: Routing, *, row: int, column: int, grid: tuple[int, int], window: Window) -> PatchRouting:
    """The routing of the patch in `row`, `column` of a window's grid."""
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
