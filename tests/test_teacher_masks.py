"""Masks that lite's decoders learn from: what becomes of the teacher's detections. The teacher itself is not run here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from recipes.lite import teacher_masks
from recipes.lite.teacher_masks import ANIMAL, ANIMALS, VOID, class_of_row, compose, contradicted, rare, write_set
from train.data import open_sets

CUP, TABLE, VASE = 41, 60, 75


class FewNouns:
    """A WordNet of nine nouns: name -> offsets, its own first, then those above."""

    NOUNS = {
        "dog": ("1", ANIMAL), "dalmatian": ("2", "1", ANIMAL), "lion": ("3", ANIMAL), "okapi": ("4", "5", ANIMAL),
        "giraffe": ("5", ANIMAL), "cougar": ("6", "7", ANIMAL), "cat": ("7", ANIMAL), "camera": ("8",), "yawl": ("99",),
    }  # fmt: skip

    def visible_sense(self, name: str) -> SimpleNamespace | None:
        return SimpleNamespace(offset=self.NOUNS[name][0]) if name in self.NOUNS else None

    def ancestors(self, offset: str) -> set[str]:
        return next(set(above) for above in self.NOUNS.values() if above[0] == offset)


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
        detections((CUP, 0.45, np.s_[0:4, 0:4])),  # nothing sure
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
    assert contradicted({"captions": "", "wnid": "", "label": "", "class": ""}, None) == set()


def test_a_label_names_a_class_by_its_words_or_by_what_stands_above_it() -> None:
    names, of_synset = ["dog", "cat", "giraffe", "boat", "hot dog"], {"n1": "dog", "n5": "giraffe", "n7": "cat", "n99": "boat"}

    def named(label: str, wnid: str = "") -> str:
        return class_of_row({"label": label, "wnid": wnid}, names, of_synset, FewNouns())

    assert named("Hotdog") == "hot dog" and named("dog") == "dog"
    assert named("dalmatian") == "dog" and named("ketch") == "boat"
    assert named("yawl", "n99") == "boat", "ImageNet's own synset comes before the word"
    assert named("lion") == named("camera") == named("yin_yang") == named("") == ""
    assert named("okapi") == named("cougar") == "", "WordNet puts them below giraffe and cat"


def test_a_label_in_words_contradicts_other_animals_too() -> None:
    def row(label: str, name: str) -> dict[str, str]:
        return {"captions": "", "wnid": "", "label": label, "class": name}

    assert contradicted(row("lion", ""), FewNouns()) == set(ANIMALS)
    assert contradicted(row("dalmatian", "dog"), FewNouns()) == set(ANIMALS) - {"dog"}
    assert contradicted(row("camera", ""), FewNouns()) == contradicted(row("yin_yang", ""), FewNouns()) == set()


def test_what_is_large_is_what_the_label_names_and_so_not_another_class() -> None:
    """Unless it holds it or carries it. What is small may well lie beside it, but the teacher must be surer."""
    large, small = np.s_[0:6, 0:8], np.s_[8:10, 10:12]
    found = detections((VASE, 0.95, large), (CUP, 0.65, small), (0, 0.55, np.s_[8:10, 0:2]), (TABLE, 0.9, np.s_[0:6, 8:16]))
    mask = compose(found, (16, 12), set(), beside={TABLE})
    assert mask is not None
    assert (mask[large] == VOID).all() and (mask[small] == 1 + CUP).all() and (mask[8:10, 0:2] == VOID).all()
    assert (mask[0:6, 8:16] == 1 + TABLE).all()
    named = compose(found, (16, 12), set(), label=VASE, beside={TABLE})
    assert named is not None and (named[large] == 1 + VASE).all()
    unlabelled = compose(found, (16, 12), set())
    assert unlabelled is not None and (unlabelled[large] == 1 + VASE).all() and (unlabelled[8:10, 0:2] == 1).all()


def test_photos_of_rare_classes_are_given_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_masks, "RARE", 2)
    masks = {name: np.array([0, VOID, *classes], np.uint8) for name, classes in (("a", [1]), ("b", [1, 2]), ("c", [1]))}
    assert rare(masks) == {"b": masks["b"]}


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
