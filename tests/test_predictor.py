"""The predictor: names, answers, caches, threads. Where labels lie is tested in test_geometry.py."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from ldvc import Predictor
from ldvc.errors import CheckpointError, InvalidImageError, LdvcError, WeightsNotFoundError
from ldvc.modeling.clip import build_clip, save_clip_folder
from ldvc.names import MAX_NAMES
from ldvc.pictures import Window
from ldvc.result import Segmentation
from ldvc.windows import WindowOutput
from tests.colours import colour_predictor, halves
from tests.tiny import save_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    return Predictor.from_pretrained(str(checkpoint), device="cpu")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (6, 9, 3), dtype=np.uint8))
    return np.asarray(small.resize((230, 150), Image.Resampling.BICUBIC))


# ---- names ------------------------------------------------------------------------------------------------------------


def test_result_says_which_names_were_seen(predictor: Predictor, photo: np.ndarray) -> None:
    predictor.set_image(photo)
    result = predictor.segment(["Dogs", "zebra", " grass ", "dogs", "people"])
    assert result.names == ["Dogs", "zebra", "grass", "people"]
    assert result.seen == [True, False, True, True]


@pytest.mark.parametrize("arm", ["ldvc", "zegclip", "clip"])
def test_synonyms_are_one_class(predictor: Predictor, photo: np.ndarray, arm: str) -> None:
    """The reference asks the same words as classes of their own and joins what it reads there."""
    asked = predictor.sibling(arm)
    state = predictor.encode_image(photo)
    joined = asked.segment(["sofa | dog", "cat", "tv | tv monitor|telly"], image=state, features=True)
    words = asked.segment(["sofa", "dog", "cat", "tv", "tv monitor", "telly"], image=state, features=True)
    assert joined.names == ["sofa", "cat", "tv"]
    assert joined.synonyms == [["sofa", "dog"], ["cat"], ["tv", "tv monitor", "telly"]]
    assert joined.seen == [True, False, False]
    groups = [[0, 1], [2], [3, 4, 5]]
    for index, group in enumerate(groups):
        best = words._outputs[0].logits[group].max(dim=0).values
        assert torch.equal(joined._outputs[0].logits[index], best)
    if arm != "clip":
        apart, together = words.cross_attention(), joined.cross_attention()
        assert np.allclose(together, np.stack([apart[group].sum(axis=0) for group in groups]), atol=1e-6)
        assert joined.features[0].classes_after.equal(words.features[0].classes_after)
        assert joined.embedding_classes == [0, 0, 1, 2, 2, 2]
    titles = np.array([0, 0, 1, 2, 2, 2])
    word_labels = words._outputs[0].logits.argmax(dim=0).numpy()
    assert np.array_equal(joined._outputs[0].logits.argmax(dim=0).numpy(), titles[word_labels])


# ---- answers ----------------------------------------------------------------------------------------------------------


def test_threshold(predictor: Predictor, photo: np.ndarray) -> None:
    predictor.set_image(photo)
    best = predictor.segment(["dog", "grass", "cat"])
    assert np.array_equal(best.labels, best.scores.argmax(axis=0))
    assert best.scores.dtype == np.float32 and best.scores.min() >= 0 and best.scores.max() <= 1
    threshold = float(np.median(best.scores.max(axis=0)))
    some = predictor.segment(["dog", "grass", "cat"], background=threshold)
    assert np.array_equal(some.labels, np.where(best.scores.max(axis=0) >= threshold, best.labels, -1))
    assert 0 < (some.labels == -1).mean() < 1
    assert sum(some.area_shares(some.labels)) == pytest.approx((some.labels >= 0).mean())
    assert (predictor.segment(["dog", "grass"], background=0.0).labels >= 0).all()
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            predictor.segment(["dog"], background=wrong)


def test_scores_that_saturate_still_have_an_order() -> None:
    logits = torch.tensor([40.0, 60.0, 50.0])[:, None, None].expand(3, 2, 2)
    result = Segmentation(
        names=["a", "b", "c"], seen=[False] * 3, arm="ldvc", picture=np.zeros((32, 32, 3), np.uint8), canvas=(32, 32),
        patch=16, outputs=[WindowOutput(Window(0, 0, 32, 32), logits)], background=1.0,
    )  # fmt: skip
    assert (result.labels == 1).all()


def test_long_lists_are_worked_on_in_parts(
    predictor: Predictor, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor.set_image(photo)
    names = [f"thing {i}" for i in range(MAX_NAMES)]
    whole = predictor.segment(names).labels
    monkeypatch.setattr("ldvc.result.CHUNK", photo.shape[0] * photo.shape[1] * 7)
    assert np.array_equal(predictor.segment(names).labels, whole)


@pytest.mark.parametrize("size", [(150, 230), (20, 31), (400, 300), (1, 1)])
def test_label_maps_made_of_tiles(predictor: Predictor, photo: np.ndarray, size: tuple[int, int]) -> None:
    """Label maps leave out names that cannot win somewhere; the reference draws every name everywhere."""
    result = predictor.segment([f"thing {i}" for i in range(60)], image=predictor.encode_image(photo))
    scores = result.scores_at(size)
    assert scores.shape == (60, *size)
    best, labels = scores.max(axis=0), result.labels_at(size)
    assert np.allclose(result.best_scores_at(size), best, atol=1e-6)
    assert np.allclose(np.take_along_axis(scores, labels[None], axis=0)[0], best, atol=1e-6)  # ties may fall either way
    assert (labels == scores.argmax(axis=0)).mean() > 0.999
    result.background = float(np.median(best)) - 1e-4
    far = np.abs(best - result.background) > 1e-5
    assert np.array_equal(result.labels_at(size)[far], np.where(best >= result.background, labels, -1)[far])


def test_one_name_works(predictor: Predictor, photo: np.ndarray) -> None:
    predictor.set_image(photo)
    result = predictor.segment("dog")
    assert (result.labels == 0).all()
    assert np.allclose(result.cross_attention(), 1)


def test_calibration() -> None:
    plain, calibrated = colour_predictor(), colour_predictor(calibration={"scale": 0.5, "bias": 1.0})
    picture = halves(64, 64, 32)
    for predictor in (plain, calibrated):
        predictor.set_image(picture)
    logit = np.log(plain.segment(["red"]).scores) - np.log1p(-plain.segment(["red"]).scores)
    assert np.allclose(calibrated.segment(["red"]).scores, 1 / (1 + np.exp(-(0.5 * logit + 1))), atol=1e-5)


def test_photo_and_names_are_encoded_once() -> None:
    predictor = colour_predictor()
    predictor.set_image(halves(64, 64, 32))
    predictor.segment(["red", "green"])
    predictor.segment(["Green", "blue", "red"])
    predictor.segment(["blue"], background=0.5)
    assert predictor.model.photos == 1
    assert sorted(predictor.model.encoded_names) == ["blue", "green", "red"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldvc.predictor.NAME_CACHE_SIZE", 2)
        predictor.segment(["red", "white"])
        assert len(predictor._embeddings) == 2
        assert predictor.segment(["red", "blue", "white"]).labels.shape == (64, 64)


def test_a_name_has_its_own_embedding_whoever_asked_before(checkpoint: Path) -> None:
    """The cache knows no more names as one than the tokenizer does, which lowers letters and nothing else."""
    asked_first, alone = (Predictor.from_pretrained(str(checkpoint), device="cpu") for _ in range(2))
    asked_first.encode_names(["fuss", "DOG"])
    words = ["fu\u00df", "dog"]
    torch.testing.assert_close(asked_first.encode_names(words), alone.encode_names(words))
    assert len(asked_first._embeddings) == 3


def test_words_of_different_classes_that_are_one_to_the_model_are_told() -> None:
    """The model of colours knows no "mauve" and no "beige": both are the same grey to it."""
    predictor = colour_predictor()
    predictor.set_image(halves(32, 32, 16))
    assert predictor.segment(["red", "mauve", "beige | green"]).alike == [["mauve", "beige"]]
    assert predictor.segment(["red", "mauve | beige"]).alike == [], "they are one class anyway"


def test_patches_belong_to_the_class_that_the_picture_shows() -> None:
    """With evened peaks the best logit need not be the best name: red is louder everywhere, and blue is there all the same."""
    predictor = colour_predictor(calibration={"scale": 1.0, "bias": 0.0, "peak": 0.8})
    logits = torch.tensor([[[6.0, 2.1]], [[-2.0, 2.0]]])
    result = Segmentation(
        names=["red", "blue"],
        seen=[True, True],
        arm="ldvc",
        picture=np.zeros((16, 32, 3), dtype=np.uint8),
        canvas=(16, 32),
        patch=16,
        outputs=[WindowOutput(Window(0, 0, 16, 32), logits)],
        calibration=predictor.calibration,
    )
    expected = [result.patch_label(0, column) for column in (0, 1)]
    assert result.patch_labels[0].tolist() == expected == result.labels[8, [4, 28]].tolist()
    assert expected != logits.argmax(dim=0)[0].tolist(), "here the bare logits say otherwise"


def test_an_arm_on_other_towers_gets_its_own(tmp_path: Path, photo: np.ndarray) -> None:
    folder = save_tiny_checkpoint(tmp_path / "mixed", arms=("ldvc", "zegclip"))
    other = build_clip(str(folder / "clip")).model
    with torch.no_grad():
        other.visual.proj.mul_(-1)
    save_clip_folder(other, folder / "clip2", {"base": "../clip"})
    config = json.loads((folder / "zegclip" / "config.json").read_text())
    config["model"]["clip"] = "../clip2"
    (folder / "zegclip" / "config.json").write_text(json.dumps(config))
    sibling = Predictor.from_pretrained(str(folder), arm="ldvc", device="cpu").sibling("zegclip")
    alone = Predictor.from_pretrained(str(folder), arm="zegclip", device="cpu")
    assert sibling.weights_digest == alone.weights_digest
    for each in (sibling, alone):
        each.set_image(photo)
    np.testing.assert_array_equal(sibling.segment(["dog", "cat"]).scores, alone.segment(["dog", "cat"]).scores)


def test_arms_share_the_encoding_of_a_photo(
    predictor: Predictor, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = predictor.encode_image(photo)
    stems = []
    for arm in ("ldvc_without_lcsa", "zegclip", "clip"):
        other = predictor.sibling(arm)
        assert other.model.clip is predictor.model.clip
        monkeypatch.setattr(other.model.image_tower, "stem", lambda images: stems.append(images))
        assert other.segment(["dog", "cat"], image=state).labels.shape == photo.shape[:2]
    assert not stems
    assert set(state.features) == {"ldvc", "ldvc_without_lcsa", "zegclip", "clip"}
    assert predictor.sibling("ldvc") is predictor


def test_state_of_other_towers_is_not_used(predictor: Predictor, photo: np.ndarray) -> None:
    foreign = colour_predictor()
    state = foreign.encode_image(photo)
    own = predictor.segment(["dog", "cat"], image=predictor.encode_image(photo))
    assert np.array_equal(predictor.segment(["dog", "cat"], image=state).labels, own.labels)


def test_plain_similarity(checkpoint: Path, photo: np.ndarray) -> None:
    plain = Predictor.from_pretrained(str(checkpoint), arm="clip", device="cpu")
    state = plain.set_image(photo)
    result = plain.segment(["dog", "grass"])
    expected = plain.model.frozen_logits(stem=state.stems[0], names=["dog", "grass"])[0]
    assert torch.allclose(result._outputs[0].logits, expected, atol=1e-5)
    with pytest.raises(LdvcError, match="attention"):
        result.cross_attention()


def test_same_answer_as_the_model_itself(predictor: Predictor) -> None:
    """For a picture that needs no resizing: the predictor is the model's forward pass and a sigmoid."""
    rng = np.random.default_rng(5)
    picture = rng.integers(0, 255, (320, 448, 3), dtype=np.uint8)
    predictor.set_image(picture)
    result = predictor.segment(["dog", "grass", "cat"])
    pixels = (torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        output = predictor.model(pixels, ["dog", "grass", "cat"], return_attention=True)
    expected = F.interpolate(output.mask_logits, size=(320, 448), mode="bilinear", align_corners=False)[0].sigmoid()
    assert torch.allclose(torch.from_numpy(result.scores), expected, atol=1e-4)
    attention = torch.from_numpy(result.cross_attention())
    assert torch.allclose(attention, output.cross_attention[-1][0].mean(dim=0), atol=1e-5)


def test_cross_attention(predictor: Predictor, photo: np.ndarray) -> None:
    predictor.set_image(photo)
    result = predictor.segment(["dog", "grass", "cat"])
    mean = result.cross_attention()
    assert mean.shape == (3, *result.grid) and np.allclose(mean.sum(axis=0), 1, atol=1e-5)
    heads = [result.cross_attention(layer=-1, head=head) for head in (0, 1)]
    assert np.allclose(np.mean(heads, axis=0), mean, atol=1e-6)
    assert not np.allclose(result.cross_attention(layer=0), mean)
    assert result.attention_at(mean, (50, 60)).shape == (3, 50, 60)
    assert np.allclose(result.attention_at(mean, (50, 60)).sum(axis=0), 1, atol=1e-5)
    with pytest.raises(LdvcError, match="attention=True"):
        predictor.segment(["dog", "cat"], attention=False).cross_attention()


def test_routing(predictor: Predictor, photo: np.ndarray) -> None:
    predictor.set_image(photo)
    result = predictor.segment(["dog", "grass"])
    assert result.patch_at(0, 0) == (0, 0)
    assert result.patch_at(*photo.shape[:2]) == (result.grid[0] - 1, result.grid[1] - 1)
    found = result.routing(2, 5)
    assert len(found.regions) == len(found.affinity) == 2
    assert (np.sort(found.all_affinities)[::-1][:2] == found.affinity).all()
    allowed = np.zeros(found.grid, dtype=bool)
    for region in found.regions:
        top, left, bottom, right = found.boxes[region]
        allowed[top:bottom, left:right] = True
    assert (found.token_attention[:, ~allowed] == 0).all()
    assert np.allclose(found.token_attention.sum(axis=(1, 2)), 1, atol=1e-5)
    top, left, bottom, right = found.boxes[found.own_region]
    assert top <= 2 < bottom and left <= 5 < right
    with pytest.raises(LdvcError, match="routing"):
        predictor.sibling("ldvc_without_lcsa").segment(["dog"], image=predictor._image).routing(0, 0)


def test_routing_through_sliding_windows(predictor: Predictor, photo: np.ndarray) -> None:
    windowed = Predictor(
        predictor.model, {"inference": {"short_side": 128, "window": 128, "stride": 100}}, device="cpu"
    )
    windowed.set_image(photo)
    result = windowed.segment(["dog", "grass"])
    assert len(result._outputs) > 1
    assert np.allclose(result.cross_attention().sum(axis=0), 1, atol=1e-5)
    last = result.routing(result.grid[0] - 1, result.grid[1] - 1)
    assert last.window.left + last.window.width == windowed._image.canvas[1]
    assert last.patch[0] == last.grid[0] - 1


# ---- several visitors -------------------------------------------------------------------------------------------------


def test_threads_do_not_mix_photos(predictor: Predictor) -> None:
    rng = np.random.default_rng(7)
    photos = [rng.integers(0, 255, (60 + 7 * i, 90, 3), dtype=np.uint8) for i in range(4)]
    questions = [["dog", "grass"], ["cat", "sky", "dog"], ["road", "tree"], ["sea", "boat", "dog"]]

    def ask(index: int) -> np.ndarray:
        return predictor.segment(questions[index], image=predictor.encode_image(photos[index])).labels

    alone = [ask(index) for index in range(4)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, [0, 1, 2, 3] * 4))
    for index, labels in enumerate(together):
        assert np.array_equal(labels, alone[index % 4])


def test_state_and_result_can_be_handed_to_another_process(predictor: Predictor, photo: np.ndarray) -> None:
    state = predictor.encode_image(photo)
    result = predictor.segment(["dog", "grass"], image=state)
    state, copy = pickle.loads(pickle.dumps((state, result)))
    assert np.array_equal(copy.labels, result.labels)
    assert np.array_equal(predictor.segment(["dog", "grass"], image=state).labels, result.labels)
    assert copy.routing(0, 0).own_region == 0


# ---- what goes wrong --------------------------------------------------------------------------------------------------


def test_no_photo() -> None:
    with pytest.raises(InvalidImageError, match="set_image"):
        colour_predictor().segment(["red"])


def test_no_such_checkpoint_or_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsNotFoundError):
        Predictor.from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="arm"):
        Predictor.from_pretrained("lite", arm="sam")
    folder = save_tiny_checkpoint(tmp_path, arms=("ldvc",))
    with pytest.raises(CheckpointError, match="ldvc_without_lcsa"):
        Predictor.from_pretrained(str(folder), device="cpu").sibling("ldvc_without_lcsa")
