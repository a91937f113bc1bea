"""The bundled model on real photos, without network."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from ldvc import Predictor
from ldvc.inference import ImageState
from ldvc.predictor import PREDICTOR_DECODERS
from ldvc.weights import load_tensors
from train.config import load_config

ROOT = Path(__file__).resolve().parents[1]
LITE = ROOT / "assets" / "lite"
EXAMPLES = ROOT / "assets" / "examples"
DECODERS = PREDICTOR_DECODERS  # "clip" is the last


@pytest.fixture(scope="module")
def predictors() -> dict[str, Predictor]:
    first = Predictor.from_pretrained("lite", decoder="ldvc", device="cpu")
    return {decoder: first.sibling(decoder) for decoder in DECODERS}


def share(result, name: str) -> float:
    """Share of the photo that gets a name."""
    return float((result.labels == result.names.index(name)).mean())


def test_files_fit_a_space() -> None:
    sizes = {path.relative_to(LITE): path.stat().st_size for path in LITE.rglob("*") if path.is_file()}
    assert max(sizes.values()) < 10_000_000, sizes
    assert sum(sizes.values()) < 80_000_000


def test_tuning_changed_the_image_tower_except_its_first_stages(predictors: dict[str, Predictor]) -> None:
    """The experiment with held-out classes uses the tower before tuning, the page uses the tuned one."""
    changed, base = load_tensors(LITE / "clip_tuned"), load_tensors(LITE / "clip")
    assert changed and not any(torch.equal(tensor, base[name]) for name, tensor in changed.items())
    early = ("visual.conv1.scale", "visual.conv1.backbone.conv_stem", *(f"visual.conv1.backbone.blocks.{n}." for n in range(2)))
    assert all(name.startswith("visual.") and not name.startswith(early) for name in changed)
    assert load_config("lite_experiment").model.clip == "lite"
    for decoder in DECODERS:
        assert predictors[decoder].inference == load_config("lite_release").inference
        tower = predictors[decoder].model.clip.model.state_dict()
        assert all(torch.equal(tower[name], tensor) for name, tensor in changed.items())


def test_loads_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the bundled model used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    Predictor.from_pretrained("lite", decoder="zegclip")


PHOTOS = {  # photo -> names that it shows, names that it does not show
    "dog.jpg": (["dog", "grass"], ["giraffe", "oven", "airplane"]),
    "horses.jpg": (["horse", "grass", "sky"], ["boat", "keyboard", "pizza"]),
}


@pytest.fixture(scope="module")
def states(predictors: dict[str, Predictor]) -> dict[str, ImageState]:
    """All decoders use the same towers, so each photo is encoded once."""
    return {photo: predictors["ldvc"].encode_image(EXAMPLES / photo) for photo in PHOTOS}


@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_labels_are_the_argmax_of_the_scores(
    predictors: dict[str, Predictor], states: dict[str, ImageState], decoder: str, photo: str
) -> None:
    """For every pixel, with absent names in the list, at any threshold."""
    predictor, (shown, absent) = predictors[decoder], PHOTOS[photo]
    for names in (shown, shown + absent, absent):
        result = predictor.segment(names, background=None, image=states[photo])
        best, score = result.scores.argmax(axis=0), result.scores.max(axis=0)
        assert np.array_equal(result.labels, best)
        for threshold in ("default", float(np.median(score))):
            labels = predictor.segment(names, background=threshold, image=states[photo]).labels
            limit = predictor.calibration.threshold if threshold == "default" else threshold
            assert np.array_equal(labels, np.where(score >= np.float32(limit), best, -1))


@pytest.mark.parametrize("decoder", DECODERS[:3])
def test_absent_names_get_few_pixels_at_the_default_threshold(
    predictors: dict[str, Predictor], states: dict[str, ImageState], decoder: str
) -> None:
    for photo, (shown, absent) in PHOTOS.items():
        result = predictors[decoder].segment([*shown, *absent], image=states[photo])
        assert share(result, shown[0]) > 0.05
        assert sum(share(result, name) for name in absent) < 0.05


@pytest.mark.parametrize("decoder", DECODERS[:3])
@pytest.mark.parametrize("names", ["dog", "dog, background", "Dog, none of these"])
def test_a_single_name_covers_its_object_only(
    predictors: dict[str, Predictor], states: dict[str, ImageState], decoder: str, names: str
) -> None:
    """The dog's flank is labelled, the bushes in the upper left are not."""
    result = predictors[decoder].segment(names, image=states["dog.jpg"])
    assert result.names in (["dog"], ["Dog"]) and 0.03 < share(result, result.names[0]) < 0.7
    dog = result.labels == 0
    height, width = result.size
    flank = dog[int(0.35 * height) : int(0.5 * height), int(0.4 * width) : int(0.65 * width)]
    bushes = dog[: int(0.2 * height), : int(0.6 * width)]
    assert flank.mean() > 0.9 and bushes.mean() < 0.1
    attention = result.attention_at(result.cross_attention(), result.size)[0]
    assert attention[dog].mean() > attention[~dog].mean() + 0.05, "other names get the attention of the background"


@pytest.mark.parametrize("decoder", DECODERS[:3])
def test_synonyms_give_similar_label_maps(
    predictors: dict[str, Predictor], states: dict[str, ImageState], decoder: str
) -> None:
    """"puppy" and "meadow" get the pixels of "dog" and "grass"."""
    own, other = (
        predictors[decoder].segment(names, background=None, image=states["dog.jpg"])
        for names in (["dog", "grass"], ["puppy", "meadow"])
    )
    assert (own.labels == other.labels).mean() > 0.7
    assert other.seen == [True, True] and predictors[decoder].seen_names.source("puppy") == "dog"


def test_seen_names_are_the_checkpoints(predictors: dict[str, Predictor], states: dict[str, ImageState]) -> None:
    result = predictors["ldvc"].segment(["dog", "grass", "glockenspiel", "castanets"], image=states["dog.jpg"])
    assert result.seen == [True, True, False, False]
    listed = json.loads((LITE / "ldvc" / "config.json").read_text())["seen_names"]
    assert {"dog", "grass", "pizza", "skirt", "pavement"} <= set(listed)
