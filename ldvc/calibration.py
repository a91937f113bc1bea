"""From mask logits to scores in 0..1.

score = sigmoid(scale * (logit - peak * p) + bias), where p is how high the name's logit gets in this photo. With peak = 0 one
threshold serves every name and photo; but some names are spoken louder than others, and a name that reaches less everywhere
would stay below it as a whole. So the threshold goes along with the name's own best patches, part of the way: all the way, and
names that are not in the photo would always be found somewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BEST_PATCHES = 0.02  # share of a photo's patches whose mean counts as the name's peak: steadier than the single best
SHORT_LIST = 8  # names; who gives more than these does not mean that each of them is in the photo


@dataclass(frozen=True)
class Calibration:
    """How a decoder's logits become scores; fitted by `train/evaluate.py --calibrate`.

    Attributes:
        scale, bias: of the sigmoid.
        peak: share of the name's peak that is subtracted, 0..1.
    """

    scale: float = 1.0
    bias: float = 0.0
    peak: float = 0.0

    @classmethod
    def from_metadata(cls, content: Mapping[str, Any] | None) -> Calibration:
        """From a checkpoint's metadata; what is absent takes its default."""
        content = content or {}
        return cls(**{key: float(content[key]) for key in ("scale", "bias", "peak") if key in content})

    def scored(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """Logits of scores: (C, h, w) of each window of a photo -> the same shapes."""
        return self._adjusted(logits, self.peak)

    def compared(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """What decides between names: as `scored`, but the more names are in the list, the less their peaks are evened out.

        With 80 names most are absent, and evening out would help those.
        """
        return self._adjusted(logits, self.peak * self.evenness(logits[0].shape[0]))

    @staticmethod
    def evenness(names: int) -> float:
        """1 for a short list, then falling with its length."""
        return min(1.0, SHORT_LIST / max(names, 1))

    def score_offset(self, logits: Sequence[Tensor]) -> Tensor:
        """(C,): `scored` minus `compared`, the same at every patch of a name."""
        return self.scale * self.peak * (self.evenness(logits[0].shape[0]) - 1) * peaks(logits)

    def _adjusted(self, logits: Sequence[Tensor], share: float) -> list[Tensor]:
        lowered = self.scale * share * peaks(logits)[:, None, None] if share else 0.0
        return [self.scale * each + self.bias - lowered for each in logits]


def peaks(logits: Sequence[Tensor]) -> Tensor:
    """(C,): mean of each name's highest logits, over all windows of a photo."""
    values = torch.cat([each.flatten(1) for each in logits], dim=1)  # (C, patches)
    count = max(1, int(BEST_PATCHES * values.shape[1]))
    return values.topk(count, dim=1).values.mean(dim=1)
