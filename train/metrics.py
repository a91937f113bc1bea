"""Measures of segmentation: confusion matrices, single masks, attention maps, and curves for the calibration.

Sums over photos can be merged, so that several processes can share the photos.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

SMALLEST_FRAGMENT = 64  # pixels
LIMIT = 40.0  # largest absolute logit of the bins


class ConfusionMatrix:
    """`counts` (C, C) int64: pixels of many photos by true class (rows) and predicted class."""

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)

    def update(self, target: Tensor, prediction: Tensor) -> None:
        """Add the pixels of a photo, integer classes of any shape; pixels with a negative target are left out."""
        classes = self.counts.shape[0]
        labelled = target >= 0
        joint = target[labelled].long() * classes + prediction[labelled].long()
        self.counts += torch.bincount(joint, minlength=classes * classes).view(classes, classes).cpu()

    def merge(self, other: ConfusionMatrix) -> None:
        self.counts += other.counts

    def iou(self) -> Tensor:
        """Intersection over union of each class, (C,) float64; NaN for a class without ground truth; means skip it."""
        hit = self.counts.diag().double()
        truth, predicted = self.counts.sum(dim=1).double(), self.counts.sum(dim=0).double()
        return torch.where(truth > 0, hit / (truth + predicted - hit), torch.nan)

    def accuracy(self) -> Tensor:
        """Share of correct pixels of each class, (C,) float64; NaN for a class without ground truth."""
        return self.counts.diag().double() / self.counts.sum(dim=1).double()

    def pixel_accuracy(self) -> float:
        """pAcc: share of correct pixels; NaN without pixels."""
        return float(self.counts.diag().sum().double() / self.counts.sum().double())


def mean_iou(iou: Tensor, classes: Sequence[bool] | None = None) -> float:
    """Mean of the IoUs that are not NaN, over all classes or those marked True; NaN if there are none."""
    return float(torch.nanmean(iou if classes is None else iou[torch.tensor(classes, dtype=torch.bool)]))


def harmonic_mean(seen: float, unseen: float) -> float:
    """hIoU = 2 S U / (S + U); 0 if both are 0, NaN if one is NaN."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen != 0 else 0.0


def iou_measures(confusion: ConfusionMatrix, seen: Sequence[bool]) -> dict[str, float]:
    """The measures of the literature; NaN where one does not exist (mIoU_U if every class is seen)."""
    iou = confusion.iou()
    miou_seen, miou_unseen = mean_iou(iou, seen), mean_iou(iou, [not flag for flag in seen])
    return {
        "pAcc": confusion.pixel_accuracy(),
        "mIoU": mean_iou(iou),
        "mIoU_S": miou_seen,
        "mIoU_U": miou_unseen,
        "hIoU": harmonic_mean(miou_seen, miou_unseen),
    }


class Means:
    """Running means of named values, single ones or arrays. NaN is left out."""

    def __init__(self) -> None:
        self._totals: dict[str, np.ndarray] = {}  # sum and count

    def add(self, name: str, values: float | np.ndarray) -> None:
        values = np.asarray(values, dtype=np.float64)
        self._totals[name] = self._totals.get(name, 0) + np.array([np.nansum(values), np.sum(~np.isnan(values))])

    def merge(self, other: Means) -> None:
        for name, total in other._totals.items():
            self._totals[name] = self._totals.get(name, 0) + total

    def __iter__(self) -> Iterator[str]:
        return iter(self._totals)

    def __getitem__(self, name: str) -> float:
        """The mean; NaN without values."""
        total, count = self._totals.get(name, (0, 0))
        return float(total / count) if count else math.nan


# ---- one mask, one map --------------------------------------------------------------------------------------------------


def mask_iou(guess: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two bool masks of any shape; NaN if both are empty."""
    union = int((guess | truth).sum())
    return int((guess & truth).sum()) / union if union else math.nan


def average_precision(values: np.ndarray, inside: np.ndarray) -> float:
    """Average precision of a map as a ranking of the pixels of a class: AP = sum over n of (R_n - R_{n-1}) P_n.

    P_n and R_n are precision and recall of "value >= n-th highest distinct value", so pixels of equal value count together.
    AP is 1 if all pixels of the class come first; the AP of a random map is the share of these pixels. NaN if all or no pixels
    are inside.
    `values` (N,) float, without void pixels; `inside` (N,) bool, the pixels of the class.
    """
    from sklearn.metrics import average_precision_score  # slow to import, and few commands need it

    return float(average_precision_score(inside, values)) if 0 < inside.sum() < inside.size else math.nan


def contrast(values: np.ndarray, inside: np.ndarray) -> float:
    """Mean of a map inside a class minus its mean outside; arguments and NaN as in `average_precision`."""
    if not 0 < inside.sum() < inside.size:
        return math.nan
    return float(values[inside].mean(dtype=np.float64) - values[~inside].mean(dtype=np.float64))


def fragments(mask: np.ndarray, smallest: int = SMALLEST_FRAGMENT) -> int:
    """Number of connected components (8 neighbours) of a bool mask (H, W) with at least `smallest` pixels."""
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    return int((np.bincount(labels.ravel())[1:] >= smallest).sum())


# ---- calibration --------------------------------------------------------------------------------------------------------


class _Curve:
    """Sums in bins of a logit, so that a threshold can be chosen after one pass over the photos.

    Logits beyond -40 to 40 count in the outermost bins. `edges`, among them 0, bound the bins.
    """

    bins: int
    parts: tuple[str, ...]  # what is summed in each bin, besides the IoU

    def __init__(self) -> None:
        self.edges = np.linspace(-LIMIT, LIMIT, self.bins + 1)
        self._sums = {part: np.zeros(self.bins) for part in ("iou", *self.parts)}
        self._pairs = self._pixels = 0

    def __len__(self) -> int:
        """Number of (photo, name) pairs."""
        return self._pairs

    def merge(self, other: _Curve) -> None:
        self._pairs, self._pixels = self._pairs + other._pairs, self._pixels + other._pixels
        for part, values in other._sums.items():
            self._sums[part] += values

    def mean_iou(self) -> np.ndarray:
        """(bins,) mean IoU over pairs with the threshold at each bin's lower edge; NaN without pairs."""
        return self._sums["iou"] / self._pairs if self._pairs else np.full(self.bins, np.nan)

    def _bins_of(self, logits: Tensor) -> Tensor:
        """The bin of each logit, int64. A logit on an edge is in the bin above, so that sums from a bin upwards mean ">="."""
        width = 2 * LIMIT / self.bins
        return ((logits + LIMIT) / width).floor().clamp(0, self.bins - 1).long()

    def _add_iou(self, hit: np.ndarray, false: np.ndarray, area: np.ndarray) -> None:
        """Add pairs from correct and wrong pixels per bin, (P, bins) each, and the area of the true masks, (P, 1)."""
        hit, false = (counts[:, ::-1].cumsum(axis=1)[:, ::-1] for counts in (hit, false))
        self._sums["iou"] += (hit / np.maximum(area + false, 1)).sum(axis=0)
        self._pairs += len(hit)


class BackgroundCurve(_Curve):
    """Correct pixels and IoU of present classes at every threshold of the highest logit of a pixel.

    A pixel whose highest logit is below the threshold is "none of the names".
    """

    bins = 4000
    parts = ("right",)  # correct pixels with the threshold at each bin's lower edge

    def update(self, best: Tensor, labels: Tensor, truth: Tensor, *, present: int) -> None:
        """Add the N pixels of a photo that are not void; names 0 .. present - 1 are the classes of the photo.

        `best` (N,) float, the highest logit; `labels` (N,) int, its name; `truth` (N,) int, -1 for none of the names.
        """
        bin_of = self._bins_of(best)

        def count(chosen: Tensor) -> np.ndarray:  # (present, bins): chosen pixels of each label in each bin
            key = (labels * self.bins + bin_of)[chosen & (labels < present)]
            return torch.bincount(key, minlength=present * self.bins).view(present, self.bins).cpu().numpy()

        hit, false = count(labels == truth), count(labels != truth)
        unnamed = torch.bincount(bin_of[truth < 0], minlength=self.bins).cpu().numpy()
        # correct names at or above each bin's lower edge, and correct "none of the names" below it
        self._sums["right"] += hit.sum(axis=0)[::-1].cumsum()[::-1] + unnamed.cumsum() - unnamed
        self._pixels += len(truth)
        self._add_iou(hit, false, torch.bincount(truth[truth >= 0], minlength=present)[:present].cpu().numpy()[:, None])

    def right(self) -> np.ndarray:
        """(bins,) share of correct pixels with the threshold at each bin's lower edge."""
        return self._sums["right"] / max(self._pixels, 1)


def best_threshold(curves: Sequence[BackgroundCurve]) -> float:
    """The bin edge with the highest mean of `right` and `mean_iou`; curves have equal weights."""
    filled = [curve for curve in curves if len(curve)]
    return float(filled[0].edges[int(sum(curve.right() + curve.mean_iou() for curve in filled).argmax())])


class ThresholdCurve(_Curve):
    """IoU and log loss of single masks at every threshold of the logit."""

    bins = 800
    parts = ("inside", "outside")  # sums over pairs of the share of the pixels that lie in the bin, by the truth

    def update(self, logits: Tensor, truth: Tensor, valid: Tensor) -> None:
        """Add the P masks of a photo: logits (P, H, W), true masks (P, H, W), and `valid` (H, W), False at void pixels."""
        pairs = logits.shape[0]
        key = (torch.arange(pairs, device=logits.device)[:, None, None] * 2 + truth.long()) * self.bins + self._bins_of(logits)
        counts = torch.bincount(key[:, valid].flatten(), minlength=pairs * 2 * self.bins).view(pairs, 2, self.bins)
        outside, inside = counts.cpu().numpy().astype(np.float64).transpose(1, 0, 2)  # (P, bins) each
        area = inside.sum(axis=1, keepdims=True)
        pixels = np.maximum(area + outside.sum(axis=1, keepdims=True), 1)
        self._add_iou(inside, outside, area)
        self._sums["inside"] += (inside / pixels).sum(axis=0)
        self._sums["outside"] += (outside / pixels).sum(axis=0)

    def log_loss(self, scale: float, bias: float) -> float:
        """Mean over pairs of the pixel-mean log loss of sigmoid(scale * logit + bias), with logits at the bin centres."""
        x = scale * (self.edges[:-1] + self.edges[1:]) / 2 + bias
        inside, outside = self._sums["inside"], self._sums["outside"]
        return float((inside @ np.logaddexp(0, -x) + outside @ np.logaddexp(0, x)) / max(1, self._pairs))


def fit_calibration(curves: Sequence[ThresholdCurve]) -> tuple[float, float]:
    """Scale and bias for which score = sigmoid(scale * logit + bias) > 0.5 is the best single mask on average.

    The threshold -bias / scale is the bin edge with the highest mean IoU over all curves, one per data set, with equal weights.
    With this threshold fixed, the scale has the lowest log loss on a grid.
    """
    filled = [curve for curve in curves if len(curve)]
    mean = sum(curve.mean_iou() for curve in filled) / len(filled)
    threshold = float(filled[0].edges[int(mean.argmax())])
    scales = np.geomspace(0.1, 4.0, 60)
    scale = float(min(scales, key=lambda scale: sum(curve.log_loss(scale, -scale * threshold) for curve in filled)))
    return scale, -scale * threshold
