"""Masks that lite's decoders learn from: what becomes of the teacher's detections. The teacher itself is not run here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldvc.data import open_sets
from train.lite import teacher_masks
from train.lite.teacher_masks import ANIMALS, VOID, compose, contradicted, write_set

CUP, TABLE = 41, 60


def detections(*found: tuple[int, float, tuple[slice, slice]]) -> dict[str, np.ndarray]:
    """As `detect` returns them, on a grid of 12 x 16 cells. found: class, confidence, where."""
    masks = np.zeros((len(found), 12, 16), dtype=bool)
    for mask, (_, _, where) in zip(masks, found, strict=True):
        mask[where] = True
    return {
        "classes": np.array([each for each, _, _ in found], dtype=np.uint8),
        "confidences": np.array([each for _, each, _ in found], dtype=np.float16),
        "shape": np.array(masks.shape[1:]),
        "masks": np.packbits(masks.reshape(len(found), 12 * 16), axis=1),
    }


def test_small_things_lie_upon_large_ones_and_doubts_are_void() -> None:
    found = detections(
        (CUP, 0.6, np.s_[4:6, 4:6]),
        (TABLE, 0.9, np.s_[2:10, 0:8]),
        (0, 0.3, np.s_[0:4, 12:16]),
    )
    mask = compose(found, (16, 12), set())
    assert mask is not None and mask.dtype == np.uint8
    assert (mask[4:6, 4:6] == 1 + CUP).all()
    assert (mask == 1 + TABLE).sum() == 8 * 8 - 4
    assert (mask[0:4, 12:16] == VOID).all() and (mask == VOID).sum() == 16
    assert (mask == 0).sum() == 12 * 16 - 64 - 16  # everything else is background


def test_what_the_label_contradicts_is_void_however_sure() -> None:
    found = detections((16, 0.95, np.s_[0:4, 0:4]), (TABLE, 0.9, np.s_[6:12, 0:16]))
    mask = compose(found, (16, 12), {16})
    assert mask is not None
    assert (mask[0:4, 0:4] == VOID).all() and (mask[6:12] == 1 + TABLE).all()


@pytest.mark.parametrize(
    "found",
    [
        detections(),
        detections((CUP, 0.4, np.s_[0:4, 0:4])),  # nothing sure
        detections((CUP, 0.9, np.s_[0:1, 0:1]), (TABLE, 0.3, np.s_[2:12, 0:16])),  # mostly doubts
    ],
    ids=["nothing", "nothing sure", "mostly doubts"],
)
def test_photos_that_teach_nothing_are_left_out(found: dict[str, np.ndarray]) -> None:
    assert compose(found, (16, 12), set()) is None


def test_masks_have_the_size_of_the_photo() -> None:
    mask = compose(detections((CUP, 0.9, np.s_[3:9, 4:12])), (160, 120), set())
    assert mask is not None and mask.shape == (120, 160)
    rows, columns = np.nonzero(mask == 1 + CUP)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == pytest.approx((30, 89, 40, 119), abs=1)


def test_captions_tell_of_animals() -> None:
    row = {"captions": "Two puppies run . || A brown dog and a horse on grass .", "wnid": "", "class": ""}
    assert contradicted(row, None) == set(ANIMALS) - {"dog", "horse"}
    assert contradicted({"captions": "", "wnid": "", "class": ""}, None) == set()


def test_what_the_label_says_needs_less_confidence() -> None:
    found = detections((CUP, 0.3, np.s_[0:4, 0:4]), (TABLE, 0.3, np.s_[6:12, 0:8]))
    assert compose(found, (16, 12), set()) is None
    mask = compose(found, (16, 12), set(), label=CUP)
    assert mask is not None
    assert (mask[0:4, 0:4] == 1 + CUP).all() and (mask[6:12, 0:8] == VOID).all()


def test_photos_of_what_there_is_enough_of_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_masks, "PHOTOS", 2)
    photos = tmp_path / "photos"
    photos.mkdir()
    masks = {}
    for name, classes in (("a", (1,)), ("b", (1,)), ("c", (1,)), ("d", (1, 2))):
        masks[f"{name}.jpg"] = np.array([(0, VOID, *classes)] * 8, dtype=np.uint8)
        Image.new("RGB", (2 + len(classes), 8)).save(photos / f"{name}.jpg")
    write_set(tmp_path / "set", photos, masks, ["dog", "cup"])
    (found,) = open_sets(tmp_path, ["set"], "train")
    assert len(found) == 2 and [Path(stem).name for stem in found.stems] == ["a", "d"]  # most classes first
    _, labels = found.pair(1)
    assert sorted(np.unique(labels)) == [0, 1, 2, VOID]
    assert json.loads((tmp_path / "set" / "dataset.json").read_text())["background_index"] == 0
