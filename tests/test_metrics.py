"""Metrics against their definitions, counted by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, log_loss, recall_score

from train import metrics
from train.metrics import BackgroundCurve, ConfusionMatrix, Means, ThresholdCurve


def iou_at(curve: ThresholdCurve, threshold: float) -> float:
    """Mean IoU of a curve at the bin edge nearest to a threshold."""
    return float(curve.mean_iou()[np.abs(curve.edges[:-1] - threshold).argmin()])


def by_sklearn(target: np.ndarray, prediction: np.ndarray, classes: int) -> dict[str, np.ndarray | float]:
    """The same measures from scikit-learn, void left out; classes without ground truth are NaN, as we define it."""
    truth, guess, labels = target[target >= 0], prediction[target >= 0], list(range(classes))
    present, options = np.isin(labels, truth), {"labels": labels, "average": None, "zero_division": 0}
    return {
        "counts": confusion_matrix(truth, guess, labels=labels),
        "iou": np.where(present, jaccard_score(truth, guess, **options), np.nan),
        "accuracy": np.where(present, recall_score(truth, guess, **options), np.nan),
        "pAcc": accuracy_score(truth, guess),
    }


EDGE_CASES = {
    "random": (5, lambda t, p: (t, p)),
    "half right": (5, lambda t, p: (t, torch.where(torch.rand(t.shape) < 0.5, t.clamp(min=0), p))),
    "perfect": (5, lambda t, p: (t, t.clamp(min=0))),
    "a class absent in the truth": (5, lambda t, p: (t.where(t != 2, torch.tensor(1)), p)),
    "a class absent in the prediction": (5, lambda t, p: (t, p.where(p != 3, torch.tensor(0)))),
    "a class absent in both": (5, lambda t, p: (t.where(t != 4, torch.tensor(0)), p.where(p != 4, torch.tensor(0)))),
    "one class": (1, lambda t, p: (t, p)),
    "one class in the truth": (5, lambda t, p: (torch.full_like(t, 3), p)),
    "never right": (2, lambda t, p: (t, 1 - t.clamp(min=0))),
}


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("case", EDGE_CASES)
def test_all_measures_equal_those_of_scikit_learn(case: str) -> None:
    classes, change = EDGE_CASES[case]
    target, prediction = change(torch.randint(-2, classes, (4, 13, 17)), torch.randint(0, classes, (4, 13, 17)))
    matrix, halves = ConfusionMatrix(classes), [ConfusionMatrix(classes), ConfusionMatrix(classes)]
    for photo in range(4):
        matrix.update(target[photo], prediction[photo])
        halves[photo % 2].update(target[photo], prediction[photo])
    halves[0].merge(halves[1])
    assert torch.equal(halves[0].counts, matrix.counts), "shares of several processes add up"
    expected = by_sklearn(target.numpy(), prediction.numpy(), classes)
    np.testing.assert_array_equal(matrix.counts.numpy(), expected["counts"])
    np.testing.assert_allclose(matrix.iou().numpy(), expected["iou"])
    np.testing.assert_allclose(matrix.accuracy().numpy(), expected["accuracy"])
    np.testing.assert_allclose(matrix.pixel_accuracy(), expected["pAcc"])
    assert ConfusionMatrix(classes).iou().isnan().all() and math.isnan(ConfusionMatrix(classes).pixel_accuracy())
    for seen in ([True] * classes, [False] * classes, [index % 2 == 0 for index in range(classes)]):
        of_seen = expected["iou"][seen][~np.isnan(expected["iou"][seen])]
        found = metrics.mean_iou(matrix.iou(), seen)
        assert math.isnan(found) if not of_seen.size else found == pytest.approx(of_seen.mean())


def test_harmonic_mean() -> None:
    assert metrics.harmonic_mean(0.6, 0.3) == pytest.approx(0.4)
    assert metrics.harmonic_mean(0.0, 0.0) == 0
    assert math.isnan(metrics.harmonic_mean(0.5, math.nan))


def test_means_leave_out_what_does_not_exist_and_add_up() -> None:
    whole, other = Means(), Means()
    whole.add("a", 1.0)
    whole.add("a", math.nan)
    other.add("a", np.array([True, False, False]))
    other.add("b", math.nan)
    whole.merge(other)
    assert whole["a"] == pytest.approx(0.5) and math.isnan(whole["b"]) and math.isnan(whole["c"])
    assert list(whole) == ["a", "b"]


def test_fragments_are_large_components_of_eight_neighbours() -> None:
    mask = np.zeros((20, 40), dtype=bool)
    mask[:8, :4], mask[8:16, 4:8] = True, True  # 64 pixels that touch at a corner
    mask[:7, 20:29] = True  # 63 pixels
    assert metrics.fragments(mask) == 1 and metrics.fragments(mask, 63) == 2


def test_a_map_is_measured_where_there_is_something_to_rank() -> None:
    values = np.array([0.9, 0.8, 0.1], dtype=np.float32)
    assert metrics.average_precision(values, values > 0.5) == 1
    assert metrics.contrast(values, values > 0.5) == pytest.approx(0.75)
    assert metrics.average_precision(np.ones(4), np.arange(4) < 1) == 0.25, "no ranking: the share of the class"
    for inside in (np.ones(3, dtype=bool), np.zeros(3, dtype=bool)):
        assert math.isnan(metrics.average_precision(values, inside)) and math.isnan(metrics.contrast(values, inside))


def test_background_curve_equals_brute_force() -> None:
    curve, share, photos = BackgroundCurve(), BackgroundCurve(), []
    for number in range(3):
        best = torch.randn(400) * 6
        truth = torch.randint(-1, 2, (400,))  # two present classes, and none of them
        labels = torch.where((torch.rand(400) < 0.6) & (truth >= 0), truth, torch.randint(0, 5, (400,)))
        photos.append((best, labels, truth))
        (share if number else curve).update(best, labels, truth, present=2)
    for other in (share, BackgroundCurve()):  # of other processes, one of which saw nothing
        curve.merge(other)
    assert len(curve) == 6
    for bin_ in (0, 1500, 2000, 2120, 3999):
        right, ious = [], []
        for best, labels, truth in photos:
            guess = labels.where(best >= curve.edges[bin_] - 1e-6, torch.tensor(-1)) if bin_ else labels
            right.append((guess == truth).numpy())
            ious += [jaccard_score(truth == name, guess == name, zero_division=0) for name in (0, 1)]
        assert curve.right()[bin_] == pytest.approx(np.mean(right)), bin_
        assert curve.mean_iou()[bin_] == pytest.approx(np.mean(ious)), bin_
    other = BackgroundCurve()
    other.update(torch.randn(300) * 2 - 3, torch.zeros(300).long(), torch.zeros(300).long(), present=1)
    place = int(round((metrics.best_threshold([curve, other, BackgroundCurve()]) - curve.edges[0]) / 0.02))
    total = sum(each.right() + each.mean_iou() for each in (curve, other))
    assert total.max() == total[place]


def test_threshold_curve_equals_scikit_learn() -> None:
    curve, share, valid = ThresholdCurve(), ThresholdCurve(), torch.rand(9, 13) < 0.8
    logits, truth = torch.randn(3, 9, 13) * 6, torch.rand(3, 9, 13) < 0.3
    truth[2] = False  # a mask without pixels: its IoU is 0 whatever is predicted
    curve.update(logits[:1], truth[:1], valid)
    share.update(logits[1:], truth[1:], valid)
    for other in (share, ThresholdCurve()):  # of other processes, one of which saw nothing
        curve.merge(other)
    flat = [(truth[pair][valid].numpy(), logits[pair][valid].numpy()) for pair in range(3)]
    for threshold in (-6.0, 0.0, 3.0, 39.0):
        scores = [jaccard_score(inside, values >= threshold, zero_division=0) for inside, values in flat]
        assert iou_at(curve, threshold) == pytest.approx(np.mean(scores), abs=1e-9)
    centre = [(inside, curve.edges[:-1][((values - curve.edges[0]) / 0.1).astype(int)] + 0.05) for inside, values in flat]
    losses = [log_loss(inside, 1 / (1 + np.exp(0.2 - 0.7 * x)), labels=[False, True]) for inside, x in centre]
    assert curve.log_loss(0.7, -0.2) == pytest.approx(np.mean(losses), rel=1e-4)


def test_calibration_finds_threshold_and_scale() -> None:
    curve = ThresholdCurve()
    # pixels of the class follow sigmoid(0.5 x + 1.5): the best threshold of a single mask lies near and the slope is 0.5
    logits = torch.empty(1, 400, 400).uniform_(-15, 9)
    truth = torch.rand(1, 400, 400) < torch.sigmoid(0.5 * logits + 1.5)
    curve.update(logits, truth, torch.ones(400, 400, dtype=torch.bool))
    scale, bias = metrics.fit_calibration([curve, ThresholdCurve()])
    threshold = -bias / scale
    best = max(iou_at(curve, edge) for edge in np.arange(-15, 9, 0.1))
    assert iou_at(curve, threshold) == pytest.approx(best)
    assert 0.3 < scale < 0.7
    assert math.isnan(iou_at(ThresholdCurve(), 0.0))
