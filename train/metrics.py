"""Measures of segmentation: the literature's (confusion matrix), and those of single masks and attention maps.

What is summed over photos can be merged, so that processes which saw different photos can add up what they found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score
from torch import Tensor

SMALLEST_FRAGMENT = 64  # pixels


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


class Means:
    """Running means of named values. A value that does not exist (NaN) is left out of its mean."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, values: float | np.ndarray) -> None:
        """Adds one value or an array of them."""
        values = np.asarray(values, dtype=np.float64)
        there = ~np.isnan(values)
        self._sums[name] = self._sums.get(name, 0.0) + float(values[there].sum())
        self._counts[name] = self._counts.get(name, 0) + int(there.sum())

    def merge(self, other: Means) -> None:
        """Adds the values of other photos."""
        for name, total in other._sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0) + other._counts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __getitem__(self, name: str) -> float:
        """The mean; NaN without values."""
        count = self._counts.get(name, 0)
        return self._sums[name] / count if count else math.nan


# ---- one mask, one map --------------------------------------------------------------------------------------------------


def mask_iou(guess: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two bool masks of any shape; NaN when both are empty."""
    union = int((guess | truth).sum())
    return int((guess & truth).sum()) / union if union else math.nan


def average_precision(values: np.ndarray, inside: np.ndarray) -> float:
    """How well a map ranks the pixels of a class: AP = sum over n of (R_n - R_{n-1}) P_n.

    P_n and R_n are precision and recall of "value >= n-th highest distinct value"; so pixels of equal value count together.
    1 = all pixels of the class come first; the share of the class's pixels = what chance gives.

    Args:
        values: (N,) float. inside: (N,) bool, the pixels of the class. Leave void pixels out of both.

    Returns:
        0..1; NaN unless there are pixels of both kinds.
    """
    return float(average_precision_score(inside, values)) if 0 < inside.sum() < inside.size else math.nan


def contrast(values: np.ndarray, inside: np.ndarray) -> float:
    """Mean of a map inside a class minus its mean outside; arguments and NaN as of `average_precision`."""
    if not 0 < inside.sum() < inside.size:
        return math.nan
    return float(values[inside].mean(dtype=np.float64) - values[~inside].mean(dtype=np.float64))


def fragments(mask: np.ndarray, smallest: int = SMALLEST_FRAGMENT) -> int:
    """Number of connected components of a bool mask (H, W) that have at least `smallest` pixels.

    Pixels that touch at a side or a corner are connected.
    """
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    return int((np.bincount(labels.ravel())[1:] >= smallest).sum())


# ---- calibration --------------------------------------------------------------------------------------------------------


def bins_of(logits: Tensor, low: float, high: float, bins: int) -> Tensor:
    """The bin of each logit, int64. One on an edge belongs to the bin above it: sums from a bin on mean "greater or equal"."""
    return ((logits - low) / ((high - low) / bins)).floor().clamp(0, bins - 1).long()


class BackgroundCurve:
    """What a threshold on the logit of each pixel's best name gives, at every threshold at once.

    A pixel whose best logit is below the threshold is "none of the names". Two things are summed in bins of that logit, so
    that the threshold can be chosen after one pass over the photos: how many pixels are right, pixels that truly are none of
    the names included, and the IoU of every present class.

    Args:
        low, high: range of the logits; beyond it they fall into the outermost bins.
        bins: number of bins.
    """

    def __init__(self, low: float = -40.0, high: float = 40.0, bins: int = 4000) -> None:
        self.low, self.high, self.bins = low, high, bins
        self.edges = np.linspace(low, high, bins + 1)
        self._right = np.zeros(bins, dtype=np.int64)  # number of right pixels with the threshold at each bin's lower edge
        self._pixels = 0
        self._iou = np.zeros(bins)  # sum over (photo, present class)
        self._pairs = 0

    def __len__(self) -> int:
        """Number of (photo, present class) pairs."""
        return self._pairs

    def update(self, best: Tensor, labels: Tensor, truth: Tensor, *, present: int) -> None:
        """Adds the pixels of one photo; void is left out.

        Args:
            best: (N,) float, logit of the best name. labels: (N,) int, which name that is.
            truth: (N,) int, the true name or -1, none of them.
            present: names 0 .. present - 1 are the classes of the photo.
        """
        place = bins_of(best, self.low, self.high, self.bins)

        def at_least(chosen: Tensor) -> np.ndarray:  # (present, bins): chosen pixels of each label from each bin on
            key = (labels * self.bins + place)[chosen & (labels < present)]
            counts = torch.bincount(key, minlength=present * self.bins).view(present, self.bins).cpu().numpy()
            return counts[:, ::-1].cumsum(axis=1)[:, ::-1]

        hit, predicted = at_least(labels == truth), at_least(torch.ones_like(labels, dtype=torch.bool))
        area = torch.bincount(truth[truth >= 0], minlength=present)[:present].cpu().numpy()[:, None]
        none = torch.bincount(place[truth < 0], minlength=self.bins).cpu().numpy()
        self._right += hit.sum(axis=0) + none.cumsum() - none  # below a bin's edge lie the bins before it
        self._pixels += len(truth)
        self._iou += (hit / np.maximum(area + predicted - hit, 1)).sum(axis=0)
        self._pairs += present

    def merge(self, other: BackgroundCurve) -> None:
        """Adds the pixels of other photos; both curves must have the same bins."""
        assert (self.low, self.high, self.bins) == (other.low, other.high, other.bins), "the curves have other bins"
        self._right += other._right
        self._pixels += other._pixels
        self._iou += other._iou
        self._pairs += other._pairs

    def right(self) -> np.ndarray:
        """(bins,) share of right pixels with the threshold at each bin's lower edge."""
        return self._right / max(self._pixels, 1)

    def iou_present(self) -> np.ndarray:
        """(bins,) mean IoU of present classes with the threshold at each bin's lower edge."""
        return self._iou / max(self._pairs, 1)


def best_threshold(curves: Sequence[BackgroundCurve]) -> float:
    """The bin edge with the highest mean of `right` and `iou_present`; each curve weighs the same, all have the same bins."""
    filled = [curve for curve in curves if len(curve)]
    return float(filled[0].edges[int(sum(curve.right() + curve.iou_present() for curve in filled).argmax())])


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
            logits: (P, H, W) float, one mask per name.
            truth: (P, H, W) bool. valid: (H, W) bool; void is False.
        """
        bins = bins_of(logits, self.low, self.high, self.bins)  # (P, H, W)
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
        curves: one per data set; each weighs the same; all with the same bins.

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
