"""What a decoder returns for the windows of a photo, and what a result computes from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from ldvc.errors import LdvcError
from ldvc.inference import Window
from ldvc.modeling.attention import Routing


@dataclass(frozen=True)
class DecoderFeatures:
    """Inputs and outputs of the decoder for one window; d is CLIP's joint width.

    Attributes:
        patches_before, patches_after: (N, d), float32.
        classes_before, classes_after: (E, d), float32, one for each word (see `Segmentation.embedding_classes`).
            `classes_before` is the output of the text adapter.
    """

    patches_before: Tensor
    patches_after: Tensor
    classes_before: Tensor
    classes_after: Tensor


@dataclass
class WindowOutput:
    """What the decoder returned for one window.

    Attributes:
        window: its place in the model's input.
        logits: (C, h, w), one value per patch, padding included.
        attention_scores: for each layer (heads, E, h, w), scores of cross-attention before the softmax: first the words of
            all classes, class by class, then those of `Segmentation.company`.
        routing: for each layer; empty without LCSA.
        features: before and after the decoder, or None if not asked for.
        stuff: (h, w), cosines of the best stuff word, with a `SoftmaxCalibration`.
        patch_attention: (N, N) of patches to patches in the last block of the image tower, with plain CLIP.
        patch_features: (N, d), with plain CLIP, which has no decoder; None if not asked for.
    """

    window: Window
    logits: Tensor
    attention_scores: list[Tensor] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)
    features: DecoderFeatures | None = None
    stuff: Tensor | None = None
    patch_attention: Tensor | None = None
    patch_features: Tensor | None = None

    def unit_patches(self, *, after: bool) -> Tensor:
        """Patch features (d, h, w) of unit length, before or after the decoder.

        Raises:
            LdvcError: they were not asked for.
        """
        features = self.patch_features
        if self.features is not None:
            features = self.features.patches_after if after else self.features.patches_before
        if features is None:
            raise LdvcError("This result holds no features of patches: segment with features=True.")
        return normalize(features, dim=1).T.unflatten(1, self.logits.shape[-2:])


class Best(NamedTuple):
    """The best class of each pixel, and what a softmax needs for scores.

    Attributes:
        values: (H, W), its value in `Segmentation._maps`.
        labels: (H, W), its index.
        total, stuff: (H, W), see `SoftmaxCalibration`; None with sigmoids.
    """

    values: Tensor
    labels: Tensor
    total: Tensor | None = None
    stuff: Tensor | None = None


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


def patch_routing(outputs: Sequence[WindowOutput], y: int, x: int, *, layer: int, patch: int) -> PatchRouting:
    """The routing of the patch in row `y`, column `x` of the whole photo's grid, in the window whose centre is closest.

    Args:
        outputs: of all windows.
        y, x: of the patch.
        layer: of the decoder.
        patch: side of a patch in input pixels.
    """
    at = ((y + 0.5) * patch, (x + 0.5) * patch)  # input pixels

    def distance(output: WindowOutput) -> float:
        """From the patch to the centre of the window; 0.5 at its border."""
        window = output.window
        return max(
            abs(window.top + window.height / 2 - at[0]) / window.height,
            abs(window.left + window.width / 2 - at[1]) / window.width,
        )

    output = min(outputs, key=distance)
    window, routing = output.window, output.routing[layer]
    height, width = routing.layout.grid
    row = min(max(int((at[0] - window.top) // patch), 0), height - 1)
    column = min(max(int((at[1] - window.left) // patch), 0), width - 1)
    own, regions = routing.layout.region_of(row, column), routing.chosen(row, column)
    affinities = routing.affinity[0, own].float()
    return PatchRouting(
        grid=(height, width),
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
