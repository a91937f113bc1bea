"""Names written on the overlay, cut-outs, and thresholds of single classes; files are read by Pillow."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldvc.arrays import arrays
from ldvc.export import Identity, OverlayStyle, make_file
from ldvc.predictor import Predictor
from ldvc.result import Segmentation
from ldvc.visualize import overlay, place_for
from tests.results import make_result

SIZE = (96, 160)


@pytest.fixture
def result() -> Segmentation:
    """Three classes side by side with a photo of random pixels; the third has no pixel."""
    logits = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))
    logits[0, :, :5] += 6
    logits[1, :, 5:] += 6
    logits[2] -= 9
    found = make_result(logits, SIZE, synonyms=[["dog", "hound"], ["\u72d7"], ["cat"]], background=0.5)
    found.picture = np.random.default_rng(0).integers(1, 255, (*SIZE, 3), dtype=np.uint8)
    return found


def file_of(kind: str, result: Segmentation, style: OverlayStyle | None = None) -> bytes:
    return make_file(kind, result, style=style or OverlayStyle(), identity=Identity("tiny", ""))[1]


def test_a_name_is_placed_where_the_class_has_most_room() -> None:
    disc = np.hypot(*(np.indices((200, 300)) - np.array([80, 190])[:, None, None])) < 60
    assert place_for((20, 40), disc) == pytest.approx((80, 190), abs=8)
    everywhere = np.ones((200, 300), dtype=bool)
    assert place_for((20, 40), everywhere) == pytest.approx((100, 150), abs=8)
    bar = np.zeros((200, 300), dtype=bool)
    bar[50:100, 10:250] = bar[:, :30] = True  # a wide part and a high part
    y, x = place_for((20, 120), bar)
    assert bar[int(y) - 9 : int(y) + 9, int(x) - 55 : int(x) + 55].all()
    assert place_for((20, 290), bar) is None and place_for((20, 40), np.zeros_like(bar)) is None
    assert place_for((300, 40), everywhere) is None, "higher than the photo"


def test_names_are_written_inside_their_areas() -> None:
    labels = np.zeros((300, 500), dtype=int)
    labels[:, 300:] = 1
    labels[:4] = 2  # too small for a name
    labels[250:] = -1
    picture = np.full((*labels.shape, 3), 90, dtype=np.uint8)
    colours = ["#f0e442", "#14161c", "#ffffff"]
    written = {
        names: (overlay(picture, labels, colours, names=names) != overlay(picture, labels, colours)).any(axis=2)
        for names in (("dog", "gr\u00e4\u00df", "sky"), ("\u72d7", "gr\u00e4\u00df", "sky"), ("1", "gr\u00e4\u00df", "sky"))
    }
    latin, chinese, number = written.values()
    assert set(np.unique(labels[latin])) == {0, 1}
    assert np.array_equal(chinese, number) and not np.array_equal(latin, number), "the font has no such letter"
    alone = overlay(picture, labels, colours, only=1, names=("dog", "grass", "sky"))
    assert set(np.unique(labels[(alone != overlay(picture, labels, colours, only=1)).any(axis=2)])) == {1}


def test_the_overlay_follows_the_switch(result: Segmentation) -> None:
    files = (file_of("overlay", result, OverlayStyle(names=names)) for names in (True, False))
    first, second = (np.asarray(Image.open(io.BytesIO(content))) for content in files)
    differs = (first != second).any(axis=2)
    assert {0, 1} == set(np.unique(result.labels[differs])) and differs.mean() < 0.2


@pytest.mark.parametrize(("alone", "members"), [(None, {0: "1_dog.png", 1: "2_\u72d7.png"}), ("dog", {0: "1_dog.png"})])
def test_cutouts(result: Segmentation, alone: str | None, members: dict[int, str]) -> None:
    name, content = make_file("cutouts", result, style=OverlayStyle(alone=alone), identity=Identity("tiny", ""), photo="a.jpg")
    archive = zipfile.ZipFile(io.BytesIO(content))
    assert name == "a-cutouts.zip" and archive.namelist() == list(members.values())
    for index, member in members.items():
        picture = Image.open(archive.open(member))
        assert picture.mode == "RGBA" and picture.size == SIZE[::-1]
        inside, pixels = result.labels == index, np.asarray(picture)
        assert np.array_equal(pixels[inside], np.insert(result.picture[inside], 3, 255, axis=1))
        assert inside.any() and not pixels[~inside].any(), "nothing of the photo is hidden there"


@pytest.mark.parametrize("size", [SIZE, (40, 70)])
def test_labels_follow_the_threshold_of_their_class(result: Segmentation, size: tuple[int, int]) -> None:
    best, scores = result.best_at(size)
    least = float(np.median(scores[best == 0]))
    result.thresholds = {"dog": least, "cat": 1.0}
    labels = result.labels_at(size)
    expected = np.where(scores < np.where(best == 0, np.float32(least), np.float32(0.5)), -1, best)
    assert np.array_equal(labels, expected) and (labels == 0).any() and (labels[best == 0] < 0).any()
    assert result.area_shares(labels)[0] == pytest.approx((expected == 0).mean())
    result.thresholds, result.background = {"dog": 1.0}, None
    assert np.array_equal(result.labels_at(size), best), "none of these is not allowed"


def test_files_name_the_threshold_of_each_class(result: Segmentation) -> None:
    result.thresholds = {"\u72d7": 0.875}
    data = json.loads(file_of("data", result))
    assert data["threshold"] == 0.5 and [each["threshold"] for each in data["classes"]] == [0.5, 0.875, 0.5]
    assert [each["pixels"] for each in data["classes"]] == [(result.labels == index).sum() for index in range(3)]
    assert arrays({"ldvc": result})["ldvc/thresholds"].tolist() == [0.5, 0.875, 0.5]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file_of("mask", result)))), result.labels + 1)


def test_thresholds_of_the_predictor(tiny_checkpoint: Path) -> None:
    predictor = Predictor.from_pretrained(str(tiny_checkpoint), device="cpu")
    predictor.set_image(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    names = "dog, sofa | couch, cat"
    usual = predictor.segment(names, background=0)
    found = predictor.segment(names, background=0, thresholds={"sofa": 1})
    assert np.array_equal(found.labels, np.where(usual.labels == 1, -1, usual.labels))
    for wrong in ({"couch": 0.5}, {"dog": 1.5}, {"dog": True}, {"dog": None}):
        with pytest.raises(ValueError, match="thresholds has a number between 0 and 1"):
            predictor.segment(names, thresholds=wrong)
