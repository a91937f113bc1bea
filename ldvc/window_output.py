"""What a decoder returns for the windows of a photo, and what a result computes from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

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
    """

    window: Window
    logits: Tensor
    attention_scores: list[Tensor] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)
    features: DecoderFeatures | None = None
    stuff: Tensor | None = None
    patch_attention: Tensor | None = None


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
