"""Calibration: settings of a checkpoint, defaults and limits."""

from __future__ import annotations

import numpy as np

from ldvc.calibration import Calibration
from tests.colours import colour_predictor, halves


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
