"""Measures of segmentation: the literature's (confusion matrix) and a visitor's (one name at a time).

Both kinds are sums over photos, so that processes which saw different photos can add up what they found (`merge`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class ConfusionMatrix:
    """Counts of (true class, predicted class) over the pixels of many photos.

    Attributes:
        counts: (C, C) int64, rows are the truth.
    """

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)

    def update(self, target: Tensor, prediction: Tensor) -> None:
        """Adds the pixels of a photo.

        Args:
            target: integer classes, any shape; a negative target is left out.
            prediction: integer classes, same shape.
        """
        classes = self.counts.shape[0]
        kept = target >= 0
        joint = target[kept].long() * classes + prediction[kept].long()
        self.counts += torch.bincount(joint, minlength=classes * classes).view(classes, classes).cpu()

    def merge(self, other: ConfusionMatrix) -> None:
        """Adds the counts of other photos."""
        self.counts += other.counts

    def iou(self) -> Tensor:
        """Intersection over union of each class, (C,) float64; NaN for a class that no pixel of the truth carries.

        A class without ground truth says nothing about recall, so it stays out of every mean; in the published benchmarks
        every class has ground truth and this is the usual definition.
        """
        hit = self.counts.diag().double()
        truth, predicted = self.counts.sum(dim=1).double(), self.counts.sum(dim=0).double()
        return torch.where(truth > 0, hit / (truth + predicted - hit), torch.nan)

    def accuracy(self) -> Tensor:
        """Share of each class's pixels that are right, (C,) float64; NaN for a class without ground truth."""
        return self.counts.diag().double() / self.counts.sum(dim=1).double()

    def pixel_accuracy(self) -> float:
        """pAcc: share of the pixels that are right; NaN when there are none."""
        return float(self.counts.diag().sum().double() / self.counts.sum().double())


def mean_iou(iou: Tensor, classes: Sequence[bool] | None = None) -> float:
    """Mean of the IoUs that exist, over all classes or those marked True; NaN if there are none."""
    if classes is not None:
        iou = iou[torch.tensor(classes, dtype=torch.bool)]
    return float(torch.nanmean(iou)) if iou.numel() else float("nan")


def harmonic_mean(seen: float, unseen: float) -> float:
    """hIoU = 2 S U / (S + U); 0 when both are 0, NaN when one of them does not exist."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen != 0 else 0.0


class ThresholdCurve:
    """IoU of single masks against everything else, at every threshold of the logit at once.

    For each (photo, name) pair the logits of the pixels inside and outside the true mask are counted in bins; cumulative sums
    of the two histograms give the IoU at every bin edge. So the threshold can be chosen after one pass over the photos, and
    only sums over pairs are kept, whatever their number.

    Args:
        low, high: range of the logits; beyond it they fall into the outermost bins.
        bins: number of bins; 0 is a bin edge for a symmetric range and an even number.
    """

    def __init__(self, low: float = -40.0, high: float = 40.0, bins: int = 800) -> None:
        self.low, self.high, self.bins = low, high, bins
        self.edges = np.linspace(low, high, bins + 1)
        self._pairs = 0
        self._iou = np.zeros(bins)  # sum over pairs of the IoU from each bin's lower edge on
        self._inside = np.zeros(bins)  # sum over pairs of the share of pixels that are inside the mask and in the bin
        self._outside = np.zeros(bins)

    def __len__(self) -> int:
        """Number of (photo, name) pairs."""
        return self._pairs

    def update(self, logits: Tensor, truth: Tensor, valid: Tensor) -> None:
        """Adds the masks of one photo.

        Args:
            logits: (P, H, W) float, one mask per name that is present.
            truth: (P, H, W) bool. valid: (H, W) bool; void is False.
        """
        step = (self.high - self.low) / self.bins
        # A logit on an edge belongs to the bin above it, so "greater or equal" is what the sums below mean.
        bins = ((logits - self.low) / step).floor().clamp(0, self.bins - 1).long()  # (P, H, W)
        pairs = logits.shape[0]
        key = (torch.arange(pairs, device=logits.device)[:, None, None] * 2 + truth.long()) * self.bins + bins
        counts = torch.bincount(key[:, valid].flatten(), minlength=pairs * 2 * self.bins).view(pairs, 2, self.bins)
        outside, inside = counts.cpu().numpy().astype(np.float64).transpose(1, 0, 2)  # (P, bins) each
        hit = inside[:, ::-1].cumsum(axis=1)[:, ::-1]
        false = outside[:, ::-1].cumsum(axis=1)[:, ::-1]
        area = inside.sum(axis=1, keepdims=True)
        pixels = np.maximum(area + outside.sum(axis=1, keepdims=True), 1)
        self._iou += (hit / np.maximum(area + false, 1)).sum(axis=0)
        self._inside += (inside / pixels).sum(axis=0)
        self._outside += (outside / pixels).sum(axis=0)
        self._pairs += pairs

    def merge(self, other: ThresholdCurve) -> None:
        """Adds the pairs of other photos; both curves must have the same bins."""
        assert (self.low, self.high, self.bins) == (other.low, other.high, other.bins), "the curves have other bins"
        self._iou += other._iou
        self._inside += other._inside
        self._outside += other._outside
        self._pairs += other._pairs

    def mean_iou(self) -> np.ndarray:
        """(bins,) mean IoU over pairs when a pixel belongs to the mask from each bin's lower edge on; NaN without pairs."""
        return self._iou / self._pairs if self._pairs else np.full(self.bins, np.nan)

    def mean_iou_at(self, threshold: float) -> float:
        """Mean over pairs at the bin edge nearest to a threshold of the logit; NaN without pairs."""
        edge = int(np.clip(round((threshold - self.low) / (self.high - self.low) * self.bins), 0, self.bins - 1))
        return float(self.mean_iou()[edge])

    def log_loss(self, scale: float, bias: float) -> float:
        """Mean over pairs of the pixel-mean log loss of sigmoid(scale * logit + bias), with logits at the bin centres."""
        x = scale * (self.edges[:-1] + self.edges[1:]) / 2 + bias
        return float((self._inside @ np.logaddexp(0, -x) + self._outside @ np.logaddexp(0, x)) / max(1, self._pairs))


def fit_calibration(curves: Sequence[ThresholdCurve]) -> tuple[float, float]:
    """Scale and bias so that score = sigmoid(scale * logit + bias) > 0.5 is the best single mask on average.

    Where the threshold lies (-bias / scale) decides the masks: the bin edge with the highest mean IoU over all curves. How
    steep the score is decides only how sure it looks: the scale with the least log loss on a grid, the threshold held.

    Args:
        curves: one per way of asking (several names, one name); each weighs the same; all with the same bins.

    Returns:
        (scale, bias).
    """
    filled = [curve for curve in curves if len(curve)]
    assert filled, "no masks to calibrate on"
    mean = sum(curve.mean_iou() for curve in filled) / len(filled)
    threshold = float(filled[0].edges[int(mean.argmax())])
    scales = np.geomspace(0.1, 4.0, 60)
    losses = [sum(curve.log_loss(scale, -scale * threshold) for curve in filled) for scale in scales]
    scale = float(scales[int(np.argmin(losses))])
    return scale, -scale * threshold
