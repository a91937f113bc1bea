"""Downloads agree with each other and with what is shown: names on the overlay, thresholds of classes, masks, cut-outs."""

from __future__ import annotations

import io
import json
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ldvc.arrays import arrays
from ldvc.export import KINDS, Identity, OverlayStyle, make_file, safe_name
from ldvc.predictor import Predictor
from ldvc.result import Segmentation
from ldvc.visualize import colours_for, overlay, place_for, rgb
from ldvc.web.tabs.segment import DOWNLOADS
from tests.browsing import EVIL
from tests.results import make_result, random_photo

SIZE = (96, 160)
BARE = {"outline": False, "names": False}  # of an overlay


@pytest.fixture
def result() -> Segmentation:
    """Two classes side by side, and two without pixels; a tenth of the photo is none of these."""
    logits = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0))
    logits[0, :, :5] += 6
    logits[1, :, 5:] += 6
    logits[2:] -= 9
    found = make_result(logits, SIZE, synonyms=[["dog", "hound"], ["空"], [EVIL], ["dog/../cat"]])
    found.background = float(np.quantile(found.best_at(SIZE)[1], 0.1))
    found.picture = random_photo(*SIZE) + np.uint8(1)
    return found


def made(kind: str, result: Segmentation, **style: object) -> tuple[str, bytes]:
    return make_file(
        kind, result, style=OverlayStyle(**style), identity=Identity("tiny", "0" * 64), photo="my photo.v2.png"
    )


def picture(kind: str, result: Segmentation, **style: object) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(made(kind, result, **style)[1])))


def test_mask_and_data_agree(result: Segmentation) -> None:
    result.thresholds = {"空": 0.998}
    (mask_name, content), (data_name, data) = made("mask", result), made("data", result)
    assert (mask_name, data_name) == ("my_photo_v2-mask.png", "my_photo_v2-segmentation.json")
    image, data = Image.open(io.BytesIO(content)), json.loads(data)
    mask = np.asarray(image)
    assert image.mode == "P" and np.array_equal(mask, result.labels + 1)
    palette = np.array(image.getpalette()[: 3 * 5]).reshape(5, 3)
    assert [each["name"] for each in data["classes"]] == ["dog", "空", EVIL, "dog/../cat"]
    assert data["classes"][0]["synonyms"] == ["hound"] and data["classes"][0]["seen"] is True
    for each in data["classes"]:
        inside = mask == each["index"]
        assert each["pixels"] == inside.sum() and each["area"] == pytest.approx(inside.mean(), abs=1e-6)
        assert tuple(palette[each["index"]]) == rgb(each["colour"])
        scores = result.scores[each["index"] - 1]
        assert each["score"]["highest"] == pytest.approx(scores.max(), abs=1e-4)
        mean = pytest.approx(scores[inside].mean(), abs=1e-4) if inside.any() else None
        assert each["score"]["mean"] == mean
    assert data["none_of_these"]["pixels"] == (mask == 0).sum() > 0
    own = result.background
    assert data["threshold"] == own and [each["threshold"] for each in data["classes"]] == [own, 0.998, own, own]
    assert arrays({"ldvc": result})["ldvc/thresholds"].tolist() == pytest.approx([own, 0.998, own, own])
    assert data["model"] == {"checkpoint": "tiny", "decoder": "ldvc", "weights_sha256": "0" * 64, "software": "ldvc 0.1.0"}


def test_masks_in_a_zip(result: Segmentation) -> None:
    name, content = made("masks", result)
    archive = zipfile.ZipFile(io.BytesIO(content))
    assert name == "my_photo_v2-masks.zip"
    assert archive.namelist() == [
        "0_none_of_these.png", "1_dog.png", "2_空.png", "3_img_src_x_onerror_alert_1.png", "4_dog_cat.png", "classes.json",
    ]  # fmt: skip
    for index, member in enumerate(archive.namelist()[:-1]):
        mask = np.asarray(Image.open(archive.open(member)))
        assert set(np.unique(mask)) <= {0, 255} and np.array_equal(mask == 255, result.labels + 1 == index)
    assert json.loads(archive.read("classes.json")) == json.loads(made("data", result)[1])


@pytest.mark.parametrize(("alone", "members"), [(None, {0: "1_dog.png", 1: "2_空.png"}), ("dog", {0: "1_dog.png"})])
def test_cutouts(result: Segmentation, alone: str | None, members: dict[int, str]) -> None:
    name, content = made("cutouts", result, alone=alone)
    archive = zipfile.ZipFile(io.BytesIO(content))
    assert name == "my_photo_v2-cutouts.zip" and archive.namelist() == list(members.values())
    for index, member in members.items():
        image = Image.open(archive.open(member))
        assert image.mode == "RGBA" and image.size == SIZE[::-1]
        inside, pixels = result.labels == index, np.asarray(image)
        assert np.array_equal(pixels[inside], np.insert(result.picture[inside], 3, 255, axis=1))
        assert inside.any() and not pixels[~inside].any(), "nothing of the photo is hidden there"


def test_overlay_file(result: Segmentation) -> None:
    inside, labelled = result.labels == 0, result.labels >= 0
    painted = picture("overlay", result, opacity=1.0, alone="dog", **BARE).astype(int)
    assert inside.any() and (painted[inside] == rgb(colours_for(result.names)[0])).all()
    assert (np.ptp(painted[~inside], axis=1) == 0).all(), "the others are grey"
    untouched = picture("overlay", result, opacity=0.0, **BARE)
    assert np.array_equal(untouched[labelled], result.picture[labelled])


def test_safe_names() -> None:
    assert safe_name("../../etc/passwd") == "etc_passwd"
    assert safe_name("???") == "class" and safe_name("CON:\\a*b") == "CON_a_b"
    assert len(safe_name("long " * 40)) <= 40
    assert set(KINDS) == set(DOWNLOADS)


def test_digest_is_of_the_weights(tiny_predictor: Predictor) -> None:
    other = Predictor.from_pretrained(tiny_predictor.source)
    assert re.fullmatch("[0-9a-f]{64}", other.weights_digest) and other.weights_digest == tiny_predictor.weights_digest
    other = Predictor.from_pretrained(tiny_predictor.source)
    with torch.no_grad():
        next(iter(other.model.decoder.parameters())).add_(1e-3)
    assert other.weights_digest != tiny_predictor.weights_digest


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
    photo, colours = np.full((*labels.shape, 3), 90, dtype=np.uint8), ["#f0e442", "#14161c", "#ffffff"]

    def written(first: str, **options: int) -> np.ndarray:
        names = overlay(photo, labels, colours, names=(first, "gräß", "sky"), **options)
        return (names != overlay(photo, labels, colours, **options)).any(axis=2)

    assert set(np.unique(labels[written("dog")])) == {0, 1} and set(np.unique(labels[written("dog", only=1)])) == {1}
    assert np.array_equal(written("狗"), written("1")), "the font has no such letter"
    assert not np.array_equal(written("dog"), written("1"))


@pytest.mark.parametrize("size", [SIZE, (40, 70)])
def test_labels_follow_the_threshold_of_their_class(result: Segmentation, size: tuple[int, int]) -> None:
    best, scores = result.best_at(size)
    least = float(np.median(scores[best == 0]))
    result.background, result.thresholds = 0.5, {"dog": least, EVIL: 1.0}
    labels = result.labels_at(size)
    expected = np.where(scores < np.where(best == 0, np.float32(least), np.float32(0.5)), -1, best)
    assert np.array_equal(labels, expected) and (labels == 0).any() and (labels[best == 0] < 0).any()
    assert result.area_shares(labels)[0] == pytest.approx((expected == 0).mean())
    result.thresholds, result.background = {"dog": 1.0}, None
    assert np.array_equal(result.labels_at(size), best), "none of these is not allowed"


def test_thresholds_of_the_predictor(tiny_predictor: Predictor) -> None:
    names, image = "dog, sofa | couch, cat", tiny_predictor.encode_image(random_photo())
    usual = tiny_predictor.segment(names, image=image, background=0)
    found = tiny_predictor.segment(names, image=image, background=0, thresholds={"sofa": 1})
    assert np.array_equal(found.labels, np.where(usual.labels == 1, -1, usual.labels))
    for wrong in ({"couch": 0.5}, {"dog": 1.5}, {"dog": True}, {"dog": None}):
        with pytest.raises(ValueError, match="thresholds has a number between 0 and 1"):
            tiny_predictor.segment(names, image=image, thresholds=wrong)
