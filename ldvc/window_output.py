"""Outputs of a decoder for the windows of a photo, and what a result computes from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldvc.errors import LdvcError
from ldvc.inference import Window, stitch
from ldvc.modeling.attention import Routing
from ldvc.modeling.decoders import DecoderOutput


class DecoderFeatures(NamedTuple):
    """Inputs and outputs of the decoder for one window, float32; d is CLIP's joint width."""

    patches_before: Tensor  # (N, d)
    patches_after: Tensor
    classes_before: Tensor  # (E, d), one for each word (see `Segmentation.embedding_classes`), from the text adapter
    classes_after: Tensor

    @classmethod
    def of(cls, decoded: DecoderOutput, words: int) -> DecoderFeatures:
        """Features of the first picture of a batch, with its first `words` embeddings, on the CPU."""
        patches = (decoded.patch_features_before, decoded.patch_features)
        classes = (decoded.class_embeddings_before[:, :words], decoded.class_embeddings[:, :words])
        return cls(*(values[0].float().cpu() for values in (*patches, *classes)))


@dataclass
class WindowOutput:
    """The output of a decoder for one window."""

    window: Window  # its place in the model's input
    logits: Tensor  # (C, h, w), one value per patch, padding included
    # for each layer, scores before the softmax (heads, E, h, w): all words, class by class, then `Segmentation.company`
    attention_scores: list[Tensor] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)  # for each layer; empty without LCSA
    features: DecoderFeatures | None = None  # None if not requested
    stuff: Tensor | None = None  # (h, w), cosines of the best stuff word, with a `SoftmaxCalibration`
    patch_attention: Tensor | None = None  # (N, N) in the last block of the image tower, with plain CLIP
    patch_features: Tensor | None = None  # (N, d), with plain CLIP, which has no decoder

    def unit_patches(self, *, after: bool) -> Tensor:
        """Patch features (d, h, w) of unit length, before or after the decoder; raises LdvcError without them."""
        features = self.patch_features
        if self.features is not None:
            features = self.features.patches_after if after else self.features.patches_before
        if features is None:
            raise LdvcError("This result holds no features of patches: segment with features=True.")
        return normalize(features, dim=1).T.unflatten(1, self.logits.shape[-2:])


class Best(NamedTuple):
    """The best class of each pixel, and what a softmax needs for scores; all tensors are (H, W)."""

    values: Tensor  # value of the best class, see `Segmentation._maps`
    labels: Tensor  # its index
    total: Tensor | None = None  # see `SoftmaxCalibration.total`; None with sigmoids
    stuff: Tensor | None = None  # logit of the best stuff word; None with sigmoids


@dataclass(frozen=True)
class PatchRouting:
    """The regions to which LCSA routed one patch. Coordinates are patches of the window's grid."""

    grid: tuple[int, int]  # (h, w) of the window
    patch: tuple[int, int]  # (row, column) in that grid
    window: Window  # the part of the model's input that the grid covers
    regions: np.ndarray  # (k,) indices of the chosen regions, best first
    affinity: np.ndarray  # (k,) of the chosen regions to the patch's own region
    all_affinities: np.ndarray  # (R,) of all regions
    own_region: int  # the region that contains the patch
    boxes: dict[int, tuple[int, int, int, int]]  # top, left, bottom, right (exclusive) of the chosen and the own region
    token_attention: np.ndarray  # (heads, h, w), zero outside the chosen regions; sums to 1 per head
    region_grid: tuple[int, int]  # (rows, columns) of regions, which are numbered row by row


def patch_routing(outputs: Sequence[WindowOutput], y: int, x: int, *, layer: int, patch: int) -> PatchRouting:
    """The routing of the patch in row `y`, column `x` of the whole photo's grid, in the window whose centre is closest.

    `patch` is the side of a patch in input pixels.
    """
    at_y, at_x = (y + 0.5) * patch, (x + 0.5) * patch  # input pixels

    def distance(window: Window) -> float:
        """From the patch to the centre of the window; 0.5 at its border."""
        offset_y, offset_x = at_y - window.top - window.height / 2, at_x - window.left - window.width / 2
        return max(abs(offset_y) / window.height, abs(offset_x) / window.width)

    output = min(outputs, key=lambda each: distance(each.window))
    window, routing = output.window, output.routing[layer]
    layout, (height, width) = routing.layout, routing.layout.grid
    row = min(max(int((at_y - window.top) // patch), 0), height - 1)
    column = min(max(int((at_x - window.left) // patch), 0), width - 1)
    own_region, regions = layout.region_of(row, column), routing.chosen(row, column)
    affinities = routing.affinity[0, own_region].float()
    return PatchRouting(
        grid=(height, width),
        patch=(row, column),
        window=window,
        regions=np.array(regions),
        affinity=affinities[regions].numpy(),
        all_affinities=affinities.numpy(),
        own_region=own_region,
        boxes={region: layout.box(region) for region in (*regions, own_region)},
        token_attention=routing.token_attention(row, column).numpy(),
        region_grid=layout.count,
    )


def attention_of_patch(outputs: Sequence[WindowOutput], y: int, x: int, *, input_size: tuple[int, int], patch: int) -> Tensor:
    """Attention (h, w) of the patch in row `y`, column `x` of the whole photo's grid to all patches.

    It is the mean over the windows that hold both patches, and 0 where no window does. `input_size`, `patch`: see `stitch`.
    """
    at_y, at_x = (min((place + 0.5) * patch, side - 0.5) for place, side in zip((y, x), input_size, strict=True))
    maps, windows = [], [output.window for output in outputs]
    for output, window in zip(outputs, windows, strict=True):
        grid, local_y, local_x = tuple(output.logits.shape[-2:]), at_y - window.top, at_x - window.left
        attention, holds_patch = torch.zeros(grid), 0 <= local_y < window.height and 0 <= local_x < window.width
        if holds_patch:
            attention = output.patch_attention[int(local_y // patch) * grid[1] + int(local_x // patch)].unflatten(0, grid)
        maps.append(torch.stack([attention, torch.full(grid, float(holds_patch))]))
    size = (-(-input_size[0] // patch), -(-input_size[1] // patch))
    total, count = stitch(maps, windows, size, input_size=input_size, patch=patch, grid=True)
    return total / count.clamp(min=torch.finfo(count.dtype).tiny)
