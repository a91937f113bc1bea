"""Calibration: from mask logits to scores in 0..1, and the threshold of "none of these".

    score = sigmoid(scale * logit + bias)

The function is the same for every class and photo, so the class with the highest score also has the highest logit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """How logits of a decoder become scores and labels; `train/evaluate.py --calibrate` measures it.

    Attributes:
        scale, bias: of the sigmoid.
        threshold: in 0..1. A pixel whose best score is lower is "none of these".
    """

    scale: float = 1.0
    bias: float = 0.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"the calibration's threshold must be in 0..1, not {self.threshold}")

    @classmethod
    def from_metadata(cls, content: Mapping[str, Any] | None) -> Calibration:
        """From the metadata of a checkpoint; absent values take their defaults."""
        content = dict(content or {})
        return cls(**{key: float(content[key]) for key in ("scale", "bias", "threshold") if key in content})

    def __call__(self, logits: Tensor) -> Tensor:
        """Calibrated logits of any shape; their sigmoid is the score."""
        return self.scale * logits + self.bias
