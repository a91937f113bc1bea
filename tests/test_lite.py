"""The bundled model on real photos, without network."""

import socket
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ldvc import Predictor
from ldvc.bundled import ASSETS
from ldvc.predictor import PREDICTOR_DECODERS
from ldvc.result import Segmentation
from ldvc.weights import load_tensors
from train.config import load_config

LITE, EXAMPLES = ASSETS / "lite", ASSETS / "examples"
DECODERS = PREDICTOR_DECODERS  # "clip" is the last


@pytest.fixture(scope="module")
def predictors() -> dict[str, Predictor]:
    first = Predictor.from_pretrained("lite", decoder="ldvc", device="cpu")
    return {decoder: first.sibling(decoder) for decoder in DECODERS}


def share(result: Segmentation, name: str) -> float:
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
    for place, name in ((socket.socket, "connect"), (socket, "getaddrinfo")):
        monkeypatch.setattr(place, name, lambda *_: pytest.fail("the bundled model used the network"))
    Predictor.from_pretrained("lite", decoder="zegclip")


PHOTOS = {  # photo -> names that it shows, names that it does not show
    "dog.jpg": (["dog", "grass"], ["giraffe", "oven", "airplane"]),
    "horses.jpg": (["horse", "grass", "sky"], ["boat", "keyboard", "pizza"]),
}


@pytest.fixture(scope="module")
def ask(predictors: dict[str, Predictor]) -> Callable[..., Segmentation]:
    """Asks a decoder about a photo. All decoders use the same towers, so each photo is encoded once."""
    states = {photo: predictors["ldvc"].encode_image(EXAMPLES / photo) for photo in PHOTOS}
    return lambda decoder, photo, names, **options: predictors[decoder].segment(names, image=states[photo], **options)


@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_labels_are_the_argmax_of_the_scores(ask: Callable[..., Segmentation], decoder: str, photo: str) -> None:
    """For every pixel at half the size, with absent names in the list, at any threshold."""
    shown, absent = PHOTOS[photo]
    for names in (shown, shown + absent, absent):
        result = ask(decoder, photo, names, background=None)
        size = (result.size[0] // 2, result.size[1] // 2)
        scores = result.scores_at(size)
        best, score = scores.argmax(axis=0), scores.max(axis=0)
        assert np.array_equal(result.labels_at(size), best)
        for threshold in ("default", float(np.median(score))):
            found = ask(decoder, photo, names, background=threshold)
            assert np.array_equal(found.labels_at(size), np.where(score >= np.float32(found.background), best, -1))


@pytest.mark.parametrize("decoder", DECODERS[:3])
def test_absent_names_get_few_pixels_at_the_default_threshold(ask: Callable[..., Segmentation], decoder: str) -> None:
    for photo, (shown, absent) in PHOTOS.items():
        result = ask(decoder, photo, [*shown, *absent])
        assert share(result, shown[0]) > 0.05
        assert sum(share(result, name) for name in absent) < 0.05


@pytest.mark.parametrize("decoder", DECODERS[:3])
def test_a_single_name_covers_its_object_only(ask: Callable[..., Segmentation], decoder: str) -> None:
    """The dog's flank is labelled, the bushes in the upper left are not."""
    for names in ("dog", "dog, background", "Dog, none of these"):
        result = ask(decoder, "dog.jpg", names)
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
    predictors: dict[str, Predictor], ask: Callable[..., Segmentation], decoder: str
) -> None:
    """The pixels of "dog" and "grass" are those of "puppy" and "meadow"."""
    own, other = (ask(decoder, "dog.jpg", names, background=None) for names in ("dog, grass", "puppy, meadow"))
    assert (own.labels == other.labels).mean() > 0.7
    seen = predictors[decoder].seen_names
    assert other.seen == [True, True] and seen.source("puppy") == "dog"
    assert all(name in seen for name in ("pizza", "skirt", "pavement")) and "glockenspiel" not in seen
