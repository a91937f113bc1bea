"""The bundled model, as a visitor meets it: real photos, no network."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch

from ldvc import Predictor
from ldvc.weights import load_tensors
from train.lite.wordnet import EVERYDAY_CONCEPTS, Concept, with_everyday
from train.options import load_config

ROOT = Path(__file__).resolve().parents[1]
LITE = ROOT / "assets" / "lite"
EXAMPLES = ROOT / "assets" / "examples"
ARMS = ("ldvc", "ldvc_without_lcsa", "zegclip", "clip")


@pytest.fixture(scope="module")
def predictors() -> dict[str, Predictor]:
    first = Predictor.from_pretrained("lite", arm="ldvc")
    return {arm: first.sibling(arm) for arm in ARMS}


def share(result, name: str) -> float:
    """Part of the picture that a name covers."""
    return float((result.labels == result.names.index(name)).mean())


def test_files_fit_a_space() -> None:
    files = [path for path in LITE.rglob("*") if path.is_file()]
    sizes = {path.relative_to(LITE): path.stat().st_size for path in files}
    assert max(sizes.values()) < 10_000_000, sizes
    assert sum(sizes.values()) < 80_000_000


def test_masks_changed_the_image_tower_alone_and_not_its_first_stages(predictors: dict[str, Predictor]) -> None:
    """The experiment with held-out classes stands on the tower that saw no mask, the page on the tuned one."""
    changed, base = load_tensors(LITE / "clip_tuned"), load_tensors(LITE / "clip")
    assert changed and not any(torch.equal(tensor, base[name]) for name, tensor in changed.items())
    early = ("visual.conv1.scale", "visual.conv1.backbone.conv_stem", *(f"visual.conv1.backbone.blocks.{n}." for n in range(2)))
    assert all(name.startswith("visual.") and not name.startswith(early) for name in changed)
    assert load_config("lite_experiment").model_config().clip == "lite"
    for arm in ARMS:
        assert predictors[arm].inference == load_config("lite_release").inference
        tower = predictors[arm].model.clip.model.state_dict()
        assert all(torch.equal(tower[name], tensor) for name, tensor in changed.items())


def test_loads_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the bundled model asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    Predictor.from_pretrained("lite", arm="zegclip")


@pytest.mark.parametrize("arm", ARMS[:3])
def test_dog_on_grass(predictors: dict[str, Predictor], arm: str) -> None:
    """The photo shows one dog in its left half; no cat."""
    predictor = predictors[arm]
    predictor.set_image(EXAMPLES / "dog.jpg")
    result = predictor.segment(["dog", "grass", "cat"])
    assert share(result, "dog") > 0.1 and share(result, "grass") > 0.1
    assert share(result, "cat") < 0.05


@pytest.mark.parametrize("arm", ARMS[:3])
def test_other_words_find_what_the_class_finds(predictors: dict[str, Predictor], arm: str) -> None:
    """Nobody types a data set's own words: a puppy on a meadow is where the dog on grass is."""
    predictor = predictors[arm]
    predictor.set_image(EXAMPLES / "dog.jpg")
    own, other = predictor.segment(["dog", "grass"]), predictor.segment(["puppy", "meadow"])
    assert (own.labels == other.labels).mean() > 0.7
    assert other.seen == [True, True] and predictor.seen_names.source("puppy") == "dog"


@pytest.mark.parametrize(("photo", "shown", "absent"), [("cat.jpg", "cat", "pizza"), ("horses.jpg", "horse", "boat")])
def test_animals_score_above_what_is_not_there(
    predictors: dict[str, Predictor], photo: str, shown: str, absent: str
) -> None:
    predictor = predictors["ldvc"]
    predictor.set_image(EXAMPLES / photo)
    result = predictor.segment([shown, absent], background=0.5)
    assert share(result, shown) > 0.1
    assert share(result, absent) < 0.02
    assert result.scores[0].max() > 0.5 > result.scores[1].mean()


def test_seen_names_are_those_of_the_checkpoint(predictors: dict[str, Predictor]) -> None:
    predictor = predictors["ldvc"]
    predictor.set_image(EXAMPLES / "dog.jpg")
    assert predictor.segment(["dog", "grass", "accordion", "lighthouse"]).seen == [True, True, False, False]
    listed = json.loads((LITE / "ldvc" / "config.json").read_text())["seen_names"]
    assert {"dog", "grass", "pizza", "skirt", "pavement"} <= set(listed)


def test_attention_with_and_without_lcsa_differ(predictors: dict[str, Predictor]) -> None:
    maps = []
    for arm in ("ldvc", "ldvc_without_lcsa"):
        predictors[arm].set_image(EXAMPLES / "dog.jpg")
        result = predictors[arm].segment(["dog", "grass", "cat"])
        attention = np.asarray(result.cross_attention(layer=-1))
        assert attention.sum(axis=0) == pytest.approx(1.0, abs=1e-4)
        maps.append(attention)
    assert np.abs(maps[0] - maps[1]).max() > 0.01


def test_routing_stays_among_the_chosen_regions(predictors: dict[str, Predictor]) -> None:
    predictors["ldvc"].set_image(EXAMPLES / "dog.jpg")
    result = predictors["ldvc"].segment(["dog", "grass"])
    height, width = result.grid
    routing = result.routing(height // 2, width // 2)
    chosen = np.zeros(routing.grid, dtype=bool)
    for region in routing.regions:
        top, left, bottom, right = routing.boxes[region]
        chosen[top:bottom, left:right] = True
    assert 0 < chosen.sum() < chosen.size
    assert (routing.token_attention[:, ~chosen] == 0).all()
    assert routing.token_attention.sum(axis=(1, 2)) == pytest.approx(1.0, abs=1e-4)


def test_everyday_words_join_the_concepts_of_hypernyms() -> None:
    titles = [description.split(",")[0] for description in timm.data.ImageNetInfo("imagenet-1k").label_descriptions()]
    sheep = Concept("sheep", "02411705", (titles.index("bighorn"),))
    joined = {concept.name: concept for concept in with_everyday([sheep, Concept("dog", "02084071", (151,))], titles)}
    assert joined["sheep"].leaves == (titles.index("ram"), titles.index("bighorn")) and joined["sheep"].everyday
    assert joined["sheep"].offset == "02411705"
    assert joined["banana"] == Concept("banana", "", (titles.index("banana"),), everyday=True)
    assert joined["dog"] == Concept("dog", "02084071", (151,))
    words = [name for entry in json.loads(EVERYDAY_CONCEPTS.read_text()) for name in entry["names"]]
    assert len(words) == len(set(words)) == sum(concept.everyday for concept in joined.values())
    with pytest.raises(ValueError):  # a class that the classifier does not have
        with_everyday([], titles[:10])
