"""Downloads: the files agree with each other and with what is shown."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldvc.export import KINDS, Identity, OverlayStyle, make_file, safe_name
from ldvc.predictor import Predictor
from ldvc.result import Segmentation
from ldvc.visualize import colours_for, rgb
from ldvc.web.models import LoadedModel
from ldvc.web.tabs.segment import DOWNLOADS

EVIL = "<img src=x onerror=alert(1)>"
IDENTITY = Identity("tiny", "0" * 64)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> LoadedModel:
    return LoadedModel(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def result(model: LoadedModel) -> Segmentation:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8))
    photo = model.main.encode_image(small.resize((360, 240), Image.Resampling.BICUBIC))
    found = model.main.segment(f"dog, {EVIL}, 空 | sky, dog/../cat", image=photo)
    found.background = float(np.median(found.scores.max(axis=0)))
    return found


def made(kind: str, result: Segmentation, style: OverlayStyle | None = None) -> tuple[str, bytes]:
    return make_file(kind, result, style=style or OverlayStyle(), identity=IDENTITY, photo="my photo.v2.png")


def test_mask_and_data_agree(result: Segmentation) -> None:
    name, content = made("mask", result)
    mask = Image.open(io.BytesIO(content))
    assert name == "my_photo_v2-mask.png" and mask.mode == "P" and mask.size == (360, 240)
    assert np.array_equal(np.asarray(mask), result.labels + 1)
    palette = np.array(mask.getpalette()[: 3 * 5]).reshape(5, 3)
    name, content = made("data", result)
    data = json.loads(content)
    assert name == "my_photo_v2-segmentation.json"
    assert [each["name"] for each in data["classes"]] == ["dog", EVIL, "空", "dog/../cat"]
    assert data["classes"][2]["synonyms"] == ["sky"] and data["classes"][0]["seen"] is True
    for each in data["classes"]:
        inside = np.asarray(mask) == each["index"]
        assert each["pixels"] == inside.sum() and each["area"] == pytest.approx(inside.mean(), abs=1e-6)
        assert tuple(palette[each["index"]]) == rgb(each["colour"])
        scores = result.scores[each["index"] - 1]
        assert each["score"]["highest"] == pytest.approx(scores.max(), abs=1e-4)
        if inside.any():
            assert each["score"]["mean"] == pytest.approx(scores[inside].mean(), abs=1e-4)
        else:
            assert each["score"]["mean"] is None
    assert data["none_of_these"]["pixels"] == (np.asarray(mask) == 0).sum() > 0
    assert data["threshold"] == result.background
    assert data["model"] == {"checkpoint": "tiny", "decoder": "ldvc", "weights_sha256": "0" * 64, "software": "ldvc 0.1.0"}


def test_masks_in_a_zip(result: Segmentation) -> None:
    name, content = made("masks", result)
    archive = zipfile.ZipFile(io.BytesIO(content))
    assert name == "my_photo_v2-masks.zip"
    assert archive.namelist() == [
        "0_none_of_these.png", "1_dog.png", "2_img_src_x_onerror_alert_1.png", "3_空.png", "4_dog_cat.png", "classes.json",
    ]  # fmt: skip
    for index, member in enumerate(archive.namelist()[:-1]):
        mask = np.asarray(Image.open(archive.open(member)))
        assert set(np.unique(mask)) <= {0, 255}
        assert np.array_equal(mask == 255, result.labels + 1 == index)
    assert json.loads(archive.read("classes.json")) == json.loads(made("data", result)[1])


def test_overlay_file(result: Segmentation) -> None:
    name, content = made("overlay", result, OverlayStyle(opacity=1.0, outline=False, names=False, alone="dog"))
    painted = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    inside = result.labels == 0
    assert name == "my_photo_v2-overlay.png" and inside.any()
    assert (painted[inside] == rgb(colours_for(result.names)[0])).all()
    others = painted[~inside]
    assert (others == others[:, :1]).all(), "the others are grey"
    _, content = made("overlay", result, OverlayStyle(opacity=0.0, outline=False, names=False))
    untouched = np.asarray(Image.open(io.BytesIO(content)))
    assert np.array_equal(untouched[result.labels >= 0], result.picture[result.labels >= 0])


def test_safe_names() -> None:
    assert safe_name("../../etc/passwd") == "etc_passwd"
    assert safe_name("???") == "class" and safe_name("CON:\\a*b") == "CON_a_b"
    assert len(safe_name("long " * 40)) <= 40
    assert set(KINDS) == set(DOWNLOADS)


def test_digest_is_of_the_weights(model: LoadedModel) -> None:
    main = model.main
    again = Predictor.from_pretrained(main.source)
    assert re.fullmatch("[0-9a-f]{64}", main.weights_digest) and again.weights_digest == main.weights_digest
    other = Predictor.from_pretrained(main.source)
    with torch.no_grad():
        next(iter(other.model.decoder.parameters())).add_(1e-3)
    assert other.weights_digest != main.weights_digest
