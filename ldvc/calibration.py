"""From mask logits to scores in 0..1.

score = sigmoid(scale * (logit - peak * p) + bias), where p is how high the name's logit gets in this photo. With peak = 0 one
threshold serves every name and photo; but some names are spoken louder than others, and a name that reaches less everywhere
would stay below it as a whole. So the threshold goes along with the name's own best patches, part of the way: all the way, and
names that are not in the photo would always be found somewhere.

Names are compared with each other in the same way, but a name that is nowhere ahead of all others gets no such help: at the
edge between a dog and its lawn both are unsure, and a cat that is nowhere would win there for being expected low. That is why
a label need not be the name with the highest score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Share of a photo's patches whose mean counts as the name's peak: steadier than the single best, and no more than a cup has.
BEST_PATCHES = 0.005
SHORT_LIST = 8  # names; who gives more than these does not mean that each of them is in the photo
STEEP = 2.0  # how fast a name that is ahead of the others, or behind them, counts as there, or not


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
        content = dict(content or {})
        return cls(**{key: float(content[key]) for key in ("scale", "bias", "peak") if key in content})

    def scored(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """Logits of scores: (C, h, w) of each window of a photo -> the same shapes."""
        lowered = self.scale * self.peak * peaks(logits)[:, None, None] if self.peak else 0.0
        return [self.scale * each + self.bias - lowered for each in logits]

    def compared(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """What decides between names: as `scored`, but peaks are evened out only between names that seem to be there.

        With w = sigmoid(STEEP * scale * lead) (see `leads`), the peak p of a name counts as w * p + (1 - w) * the highest
        of all. And the more names are in the list, the less is evened out: with 80 names most are absent.
        """
        lowered = self._lowered_by(logits)[:, None, None]
        return [self.scale * each + self.bias - lowered for each in logits]

    @staticmethod
    def evenness(names: int) -> float:
        """1 for a short list, then falling with its length."""
        return min(1.0, SHORT_LIST / max(names, 1))

    def score_offset(self, logits: Sequence[Tensor]) -> Tensor:
        """(C,): `scored` minus `compared`, the same at every patch of a name."""
        return self._lowered_by(logits) - self.scale * self.peak * peaks(logits)

    def _lowered_by(self, logits: Sequence[Tensor]) -> Tensor:
        """(C,): what `compared` takes off."""
        own = peaks(logits)
        if not self.peak:
            return torch.zeros_like(own)
        there = torch.sigmoid(STEEP * self.scale * leads(logits))
        return self.scale * self.peak * self.evenness(len(own)) * torch.lerp(own.max().expand_as(own), own, there)


def peaks(logits: Sequence[Tensor]) -> Tensor:
    """(C,): mean of each name's highest logits, over all windows of a photo."""
    return _mean_of_best(torch.cat([each.flatten(1) for each in logits], dim=1))


def leads(logits: Sequence[Tensor]) -> Tensor:
    """(C,): how far each name is ahead of the best other one, where it is most so; below 0 for a name that is best nowhere.

    One name alone is 0 ahead.
    """
    values = torch.cat([each.flatten(1) for each in logits], dim=1)  # (C, patches)
    if len(values) == 1:
        return values.new_zeros(1)
    best, second = values.topk(2, dim=0).values
    return _mean_of_best(values - torch.where(values == best, second, best))


def _mean_of_best(values: Tensor) -> Tensor:
    """(C, patches) -> (C,)"""
    count = max(1, int(BEST_PATCHES * values.shape[1]))
    return values.topk(count, dim=1).values.mean(dim=1)
