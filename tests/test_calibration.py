"""From logits to scores and labels: the formula by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldvc.calibration import Calibration
from ldvc.inference import Window
from ldvc.result import Segmentation, WindowOutput
from tests.colours import colour_predictor, halves


def test_scores_follow_the_formula() -> None:
    logits = torch.randn(4, 6, 8)
    result = Segmentation(
        names=list("abcd"), seen=[True] * 4, decoder="ldvc", picture=np.zeros((96, 128, 3), np.uint8), input_size=(96, 128),
        patch=16, outputs=[WindowOutput(Window(0, 0, 96, 128), logits)], calibration=Calibration(scale=1.5, bias=0.3),
    )  # fmt: skip
    expected = 1 / (1 + np.exp(-(1.5 * logits.numpy() + 0.3)))
    np.testing.assert_allclose(result.scores_at((6, 8)), expected, atol=1e-6)
    np.testing.assert_allclose(result.patch_scores(2, 3), expected[:, 2, 3], atol=1e-6)
    assert np.array_equal(result.labels_at((6, 8)), logits.argmax(dim=0)), "it is the same for every name"


def test_the_checkpoints_calibration_is_used() -> None:
    plain, calibrated = colour_predictor(), colour_predictor(calibration={"scale": 0.5, "bias": 1.0})
    for predictor in (plain, calibrated):
        predictor.set_image(halves(64, 64, 32))
    scores = plain.segment(["red"]).scores.astype(np.float64)
    logit = np.log(scores) - np.log1p(-scores)
    assert np.allclose(calibrated.segment(["red"]).scores, 1 / (1 + np.exp(-(0.5 * logit + 1))), atol=1e-5)


def test_absent_settings_take_their_defaults() -> None:
    assert Calibration.from_metadata(None) == Calibration.from_metadata({}) == Calibration(1.0, 0.0, 0.5)
    assert Calibration.from_metadata({"scale": 2, "note": "left out"}) == Calibration(scale=2.0)
    assert Calibration.from_metadata({"threshold": 0}).threshold == 0.0


@pytest.mark.parametrize("threshold", [-0.1, 1.01, float("nan")])
def test_a_threshold_that_is_no_score_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold must be in 0\.\.1"):
        Calibration(threshold=threshold)
