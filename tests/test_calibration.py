"""From logits to scores: the formula by hand, and what the peak does to labels."""

import numpy as np
import pytest
import torch

from ldvc.calibration import BEST_PATCHES, SHORT_LIST, STEEP, Calibration, leads, peaks
from ldvc.pictures import Window
from ldvc.result import Segmentation
from ldvc.windows import WindowOutput


def result(logits: torch.Tensor, calibration: Calibration, background: float | None = None) -> Segmentation:
    names, height, width = logits.shape
    return Segmentation(
        names=[f"name {i}" for i in range(names)],
        seen=[True] * names,
        arm="ldvc",
        picture=np.zeros((height * 16, width * 16, 3), dtype=np.uint8),
        canvas=(height * 16, width * 16),
        patch=16,
        outputs=[WindowOutput(Window(0, 0, height * 16, width * 16), logits)],
        calibration=calibration,
        background=background,
    )


def test_peak_is_the_mean_of_the_best_patches_over_all_windows() -> None:
    windows = [torch.randn(3, 19, 21), torch.randn(3, 5, 9)]
    values = np.concatenate([window.flatten(1).numpy() for window in windows], axis=1)
    count = int(BEST_PATCHES * values.shape[1])
    assert count == 2
    np.testing.assert_allclose(peaks(windows).numpy(), np.sort(values, axis=1)[:, -count:].mean(axis=1), rtol=1e-6)
    assert peaks([torch.tensor([[[4.0, 1.0]]])]).item() == 4.0  # never fewer than one patch


def test_scores_follow_the_formula() -> None:
    logits = torch.randn(4, 6, 8)
    calibration = Calibration(scale=1.5, bias=0.3, peak=0.5)
    top = np.sort(logits.flatten(1).numpy(), axis=1)[:, -1]  # half a percent of 48 patches is one
    expected = 1 / (1 + np.exp(-(1.5 * (logits.numpy() - 0.5 * top[:, None, None]) + 0.3)))
    scores = result(logits, calibration).scores_at((96, 128))  # pixels of which every 16th pair averages four patches
    np.testing.assert_allclose(scores[:, 0, 0], expected[:, 0, 0], atol=1e-5)
    np.testing.assert_allclose(scores[:, -1, -1], expected[:, -1, -1], atol=1e-5)
    np.testing.assert_allclose(result(logits, calibration).patch_scores(2, 3), expected[:, 2, 3], atol=1e-5)


def test_a_lead_is_counted_over_the_best_other_name_and_all_windows() -> None:
    windows = [torch.randn(3, 19, 21), torch.randn(3, 5, 9)]
    values = np.concatenate([window.flatten(1).numpy() for window in windows], axis=1)
    expected = []
    for name in range(3):
        ahead = values[name] - np.delete(values, name, axis=0).max(axis=0)
        expected.append(np.sort(ahead)[-2:].mean())
    np.testing.assert_allclose(leads(windows).numpy(), expected, rtol=1e-5)
    assert leads([torch.ones(2, 3, 3)]).tolist() == [0, 0]  # equal everywhere
    assert leads([torch.randn(1, 3, 3)]).tolist() == [0]


@pytest.mark.parametrize("names", [2, 4, SHORT_LIST, 20 * SHORT_LIST])
def test_names_are_compared_by_the_formula(names: int) -> None:
    windows = [torch.randn(names, 6, 5) * 3, torch.randn(names, 6, 3) * 3]
    values = torch.cat([each.flatten(1) for each in windows], dim=1).numpy()
    top = values.max(axis=1)  # half a percent of 48 patches is one
    ahead = [(values[name] - np.delete(values, name, axis=0).max(axis=0)).max() for name in range(names)]
    there = 1 / (1 + np.exp(-STEEP * 1.5 * np.array(ahead)))
    lowered = 0.5 * min(1, SHORT_LIST / names) * (there * top + (1 - there) * top.max())
    calibration = Calibration(scale=1.5, bias=0.3, peak=0.5)
    compared, scored = calibration.compared(windows), calibration.scored(windows)
    offset = calibration.score_offset(windows)[:, None, None]
    for window, found, score in zip(windows, compared, scored, strict=True):
        expected = 1.5 * (window.numpy() - lowered[:, None, None]) + 0.3
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
        torch.testing.assert_close(found + offset, score)
    alone = result(windows[0], calibration)
    assert (alone.labels_at((6, 5)) == calibration.compared(windows[:1])[0].argmax(dim=0).numpy()).all()


def test_one_name_is_compared_by_its_score() -> None:
    logits = torch.randn(1, 5, 5)
    calibration = Calibration(scale=0.7, bias=1.0, peak=0.5)
    torch.testing.assert_close(calibration.compared([logits]), calibration.scored([logits]))


def test_a_quiet_name_that_is_there_gets_more_than_where_it_is_loudest() -> None:
    logits = torch.full((2, 1, 4), -4.0)
    logits[0, 0] = torch.tensor([3.0, 2.0, -1.0, -4.0])  # loud
    logits[1, 0] = torch.tensor([-6.0, -6.0, -2.0, -1.0])  # quiet, its peak is on the right
    assert result(logits, Calibration()).labels_at((1, 4)).tolist() == [[0, 0, 0, 1]]
    assert result(logits, Calibration(peak=0.5)).labels_at((1, 4)).tolist() == [[0, 0, 1, 1]]


def test_a_name_that_is_best_nowhere_does_not_get_the_edge_between_two_others() -> None:
    logits = torch.full((3, 1, 5), -9.0)
    logits[0, 0] = torch.tensor([6.0, 6.0, -3.5, -5.0, -5.0])  # a dog ...
    logits[1, 0] = torch.tensor([-5.0, -5.0, -4.0, 4.0, 4.0])  # ... on grass
    logits[2, 0] = torch.tensor([-4.0, -4.0, -4.5, -6.0, -6.0])  # no cat
    calibration = Calibration(peak=0.5)
    assert calibration.scored([logits])[0].argmax(dim=0)[0, 2] == 2
    found = result(logits, calibration)
    assert 2 not in found.labels_at((1, 5))
    labels = [found.patch_label(0, x) for x in range(5)]
    assert labels == calibration.compared([logits])[0].argmax(dim=0)[0].tolist() and found.patch_scores(0, 2).argmax() == 2


def test_long_lists_are_compared_by_nearly_bare_logits_and_none_of_these_by_scores() -> None:
    logits = torch.randn(20 * SHORT_LIST, 5, 5) * 2
    calibration = Calibration(scale=1.0, bias=-1.0, peak=0.5)
    compared = calibration.compared([logits])[0]
    assert (compared - (logits - 1)).abs().max() <= 0.5 / 20 * float(peaks([logits]).max()) + 1e-5
    everywhere = result(logits, calibration)
    best, scores = everywhere.labels_at((5, 5)), everywhere.scores_at((5, 5))
    assert (best == compared.argmax(dim=0).numpy()).all()
    of_best = np.take_along_axis(scores, best[None], axis=0)[0]
    np.testing.assert_allclose(everywhere.best_scores_at((5, 5)), of_best, atol=1e-5)
    threshold = float(np.median(of_best))
    labels = result(logits, calibration, background=threshold).labels_at((5, 5))
    assert ((labels == -1) == (of_best < threshold)).all() and 0 < (labels == -1).mean() < 1


def test_absent_settings_take_their_defaults() -> None:
    assert Calibration.from_metadata(None) == Calibration(1.0, 0.0, 0.0)
    assert Calibration.from_metadata({"scale": 2, "note": "kept out"}) == Calibration(scale=2.0)
