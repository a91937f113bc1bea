"""From mask logits to scores in 0..1, and the threshold below which a pixel is none of the names.

    score = sigmoid(scale * logit + bias)

It is the same function for every name and photo, so the label of a pixel, the name with the highest score, is also the name
with the highest logit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """How a decoder's logits become scores and labels; measured by `train/evaluate.py --calibrate`.

    Attributes:
        scale, bias: of the sigmoid.
        threshold: score that the best name of a pixel must reach, or the pixel is "none of these"; 0..1.
    """

    scale: float = 1.0
    bias: float = 0.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"the calibration's threshold must be in 0..1, not {self.threshold}")

    @classmethod
    def from_metadata(cls, content: Mapping[str, Any] | None) -> Calibration:
        """From a checkpoint's metadata; what is absent takes its default."""
        content = dict(content or {})
        return cls(**{key: float(content[key]) for key in ("scale", "bias", "threshold") if key in content})

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits of the scores, before the sigmoid; any shape."""
        return self.scale * logits + self.bias
