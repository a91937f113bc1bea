"""Calibration: from mask logits to scores in 0..1, and the threshold of "none of these".

    decoders        score = sigmoid(scale * logit + bias)
    dense CLIP      score = softmax(scale * cosine) over the names and the best stuff word; 0 where this word is better

Both increase with the logit of a class, so the class with the highest score also has the highest logit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, PositiveFloat, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from ldvc.config import first_mistake


@dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False))
class Calibration:
    """How logits of a decoder become scores and labels; `train/evaluate.py --calibrate` measures it."""

    scale: PositiveFloat = 1.0
    bias: float = 0.0
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5  # a pixel whose best score is lower is "none of these"

    @classmethod
    def from_metadata(cls, content: Mapping[str, Any] | None) -> Calibration:
        """From the metadata of a checkpoint; raises ValueError or TypeError if a value cannot be used."""
        try:
            return cls(**(content or {}))
        except ValidationError as error:
            raise ValueError(f"in the calibration, {first_mistake(error)}") from None

    def __call__(self, logits: Tensor) -> Tensor:
        """Calibrated logits of any shape; their sigmoid is the score."""
        return self.scale * logits + self.bias

    @property
    def none_logit(self) -> float:
        """The calibrated logit whose score is the threshold."""
        return math.log(max(self.threshold, 1e-6) / max(1 - self.threshold, 1e-6))


@dataclass(frozen=True)
class SoftmaxCalibration:
    """How cosines of dense CLIP become scores and labels. Where a stuff word is best, a pixel is "none of these"."""

    scale: float = 40.0  # factor of the cosines before the softmax
    threshold: float = 0.15  # a pixel whose best score is lower is "none of these"

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits of the softmax, of any shape."""
        return self.scale * logits

    @staticmethod
    def total(logits: Tensor, stuff: Tensor) -> Tensor:
        """Logarithm of the softmax's denominator: (C, ...) logits of classes and (...) of the best stuff word -> (...)."""
        return torch.logaddexp(stuff, logits.logsumexp(dim=0))

    @staticmethod
    def scores(logits: Tensor, total: Tensor, stuff: Tensor) -> Tensor:
        """Scores of logits that broadcast to (..., H, W); `total` and `stuff` (H, W) are those of all classes."""
        return torch.where(logits >= stuff, (logits - total).exp(), 0.0)
