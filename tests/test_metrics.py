"""Metrics against their definitions, counted by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ldvc.metrics import ConfusionMatrix, ThresholdCurve, fit_calibration, harmonic_mean, mean_iou


def jaccard(truth: np.ndarray, guess: np.ndarray) -> float:
    """Intersection over union of two masks; 0 when both are empty."""
    union = np.logical_or(truth, guess).sum()
    return float(np.logical_and(truth, guess).sum() / union) if union else 0.0


@pytest.mark.parametrize("classes", [2, 7])
def test_confusion_iou_and_accuracy_equal_their_definitions(classes: int) -> None:
    target = torch.randint(-2, classes, (3, 17, 11))
    prediction = torch.where(torch.rand(3, 17, 11) < 0.5, target.clamp(min=0), torch.randint(0, classes, (3, 17, 11)))
    matrix = ConfusionMatrix(classes)
    for photo in range(3):
        matrix.update(target[photo], prediction[photo])
    kept = target >= 0
    truth, guess = target[kept].numpy(), prediction[kept].numpy()
    labels = list(range(classes))
    counts = [[((truth == row) & (guess == column)).sum() for column in labels] for row in labels]
    np.testing.assert_array_equal(matrix.counts.numpy(), counts)
    expected = np.array([jaccard(truth == label, guess == label) for label in labels])
    np.testing.assert_allclose(matrix.iou().numpy(), expected)
    assert matrix.pixel_accuracy() == pytest.approx((truth == guess).mean())
    seen = [index % 2 == 0 for index in labels]
    assert mean_iou(matrix.iou(), seen) == pytest.approx(expected[::2].mean())


def test_a_class_without_ground_truth_stays_out_of_the_mean() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]))
    iou = matrix.iou()
    assert iou[:2].tolist() == [0.5, 1.0] and math.isnan(iou[2])
    assert mean_iou(iou) == 0.75
    assert math.isnan(mean_iou(iou, [False, False, True])) and math.isnan(mean_iou(iou, [False] * 3))
    assert ConfusionMatrix(2).pixel_accuracy() == 0


def test_harmonic_mean() -> None:
    assert harmonic_mean(0.6, 0.3) == pytest.approx(0.4)
    assert harmonic_mean(0.0, 0.0) == 0
    assert math.isnan(harmonic_mean(0.5, math.nan))


def test_threshold_curve_equals_brute_force() -> None:
    curve = ThresholdCurve()
    logits = torch.randn(4, 9, 13) * 6
    truth, valid = torch.rand(4, 9, 13) < 0.3, torch.rand(9, 13) < 0.8
    curve.update(logits[:1], truth[:1], valid)
    curve.update(logits[1:], truth[1:], valid)
    for threshold in (-6.0, -0.5, 0.0, 3.0):
        mask = (logits >= threshold)[:, valid].numpy()
        scores = [jaccard(truth[pair][valid].numpy(), mask[pair]) for pair in range(4)]
        assert curve.mean_iou_at(threshold) == pytest.approx(np.mean(scores), abs=1e-9)
    x = torch.tensor(curve.edges[:-1] + 0.05)[((logits - curve.low) / 0.1).floor().long()]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(0.7 * x - 0.2, truth.double(), reduction="none")
    assert curve.log_loss(0.7, -0.2) == pytest.approx(expected[:, valid].mean().item(), rel=1e-6)


def test_calibration_finds_threshold_and_scale() -> None:
    curve = ThresholdCurve()
    # pixels of the class follow sigmoid(0.5 x + 1.5): the best threshold of a single mask lies near and the slope is 0.5
    logits = torch.empty(1, 400, 400).uniform_(-15, 9)
    truth = torch.rand(1, 400, 400) < torch.sigmoid(0.5 * logits + 1.5)
    curve.update(logits, truth, torch.ones(400, 400, dtype=torch.bool))
    scale, bias = fit_calibration([curve, ThresholdCurve()])
    threshold = -bias / scale
    best = max(curve.mean_iou_at(edge) for edge in np.arange(-15, 9, 0.1))
    assert curve.mean_iou_at(threshold) == pytest.approx(best)
    assert 0.3 < scale < 0.7
    assert math.isnan(ThresholdCurve().mean_iou_at(0.0))
