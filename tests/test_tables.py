"""Tables and pictures of an evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from train import tables
from train.tables import confusion_picture


@pytest.mark.parametrize("benchmark", ["voc", "coco_stuff"])
def test_published_numbers_are_consistent(benchmark: str) -> None:
    """hIoU is the harmonic mean of the other two, up to their rounding."""
    for method, row in tables.published()[benchmark]["methods"].items():
        s, u = row["mIoU_S"], row["mIoU_U"]
        assert row["hIoU"] == pytest.approx(2 * s * u / (s + u), abs=0.11), method


def test_confusion_picture_shows_shares() -> None:
    counts = np.array([[8, 2, 0], [0, 5, 5], [0, 0, 0]])
    picture = np.asarray(confusion_picture(counts, ["dog", "cat", "a long name"], ["cat"]))
    side = 3 * 24
    cells = picture[-8 - side : -8, -8 - side : -8][12::24, 12::24].astype(int)
    light = cells.sum(axis=-1)
    assert light[0, 0] > light[1, 1] > light[0, 1] > light[0, 2] == light[1, 0]
    assert (cells[2] == 225).all(), "a class without ground truth"
    red = picture[..., 0].astype(int) - picture[..., 1] > 80
    first = picture.shape[0] - 8 - side  # where the cells begin
    across = [red[:first, first + 24 * number :][:, :24].any() for number in range(3)]
    down = [red[first + 24 * number :, :first][:24].any() for number in range(3)]
    assert across == down == [False, True, False], "unseen names are red"
