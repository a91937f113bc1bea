"""The predictor: names, results, caches, threads. `test_inference.py` tests where labels are."""

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
from ldvc.class_names import ClassName
from ldvc.config import DECODERS
from ldvc.errors import CheckpointError, InvalidImageError, InvalidNamesError, LdvcError
from ldvc.modeling.clip import build_clip, save_clip_folder
from ldvc.predictor import COMPANY, PREDICTOR_DECODERS, indistinguishable_words
from tests.colours import colour_predictor, halves
from tests.results import random_photo
from tests.tiny import save_tiny_checkpoint


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.asarray(Image.fromarray(random_photo(6, 9)).resize((230, 150), Image.Resampling.BICUBIC))


def test_a_result_has_clean_names_and_which_were_seen(tiny_predictor: Predictor, photo: np.ndarray) -> None:
    image = tiny_predictor.encode_image(photo)
    result = tiny_predictor.segment(["Dogs", "zebra", " grass ", "dogs", "people"], image=image)
    assert result.names == ["Dogs", "zebra", "grass", "people"] and result.seen == [True, False, True, True]
    asked = tiny_predictor.segment([ClassName(("background",)), ClassName(("dog", "other"))], image=image)
    assert asked.names == ["background", "dog"], "a ClassName is used as it is"


@pytest.mark.parametrize("decoder", ["ldvc", "zegclip", "clip"])
def test_synonyms_are_one_class(tiny_predictor: Predictor, photo: np.ndarray, decoder: str) -> None:
    """Against a result with one class for each word."""
    asked = tiny_predictor.sibling(decoder)
    options = {"image": tiny_predictor.encode_image(photo), "features": True}
    joined = asked.segment(["sofa | dog", "cat", "tv | tv monitor|telly"], background=None, **options)
    words = asked.segment(["sofa", "dog", "cat", "tv", "tv monitor", "telly"], background=None, **options)
    assert joined.names == ["sofa", "cat", "tv"]
    assert joined.synonyms == [["sofa", "dog"], ["cat"], ["tv", "tv monitor", "telly"]]
    assert joined.seen == [True, False, False]
    groups = [[0, 1], [2], [3, 4, 5]]
    for index, group in enumerate(groups):
        assert torch.equal(joined.outputs[0].logits[index], words.outputs[0].logits[group].amax(dim=0))
    owners = [0, 0, 1, 2, 2, 2]
    if decoder != "clip":
        apart, together = words.cross_attention(), joined.cross_attention()
        assert np.allclose(together, np.stack([apart[group].sum(axis=0) for group in groups]), atol=1e-6)
        assert joined.features[0].classes_after.equal(words.features[0].classes_after)
        assert joined.embedding_classes == owners
    assert np.array_equal(joined.patch_labels[0], np.take(owners, words.patch_labels[0]))


def test_calibration_and_threshold_are_the_checkpoints(photo: np.ndarray) -> None:
    plain, calibrated = colour_predictor(), colour_predictor(calibration={"scale": 0.5, "bias": 1.0, "threshold": 0.9})
    for predictor, threshold in ((plain, 0.5), (calibrated, 0.9)):
        predictor.set_image(photo)
        result = predictor.segment(["red", "white"])
        assert result.background == threshold
        assert np.array_equal(result.labels, predictor.segment(["red", "white"], background=threshold).labels)
        assert (predictor.segment(["red", "white"], background=None).labels >= 0).all()
    logit = torch.from_numpy(plain.segment(["red"]).scores).double().logit()
    np.testing.assert_allclose(calibrated.segment(["red"]).scores, (0.5 * logit + 1).sigmoid(), atol=1e-5)
    both = {"calibration": {"threshold": 0.9}, "clip_calibration": {"threshold": 0.3}}
    assert Predictor(plain.model, both, decoder="clip", device="cpu").calibration.threshold == 0.3


def test_impossible_thresholds_are_refused_in_a_sentence() -> None:
    predictor = colour_predictor()
    with pytest.raises(InvalidImageError, match="set_image"):
        predictor.segment(["red"])
    predictor.set_image(halves(32, 32, 16))
    for wrong in (-0.1, 1.5, float("nan"), "yes", "0.5", True, [0.5]):
        with pytest.raises(ValueError, match=r'a threshold between 0 and 1, None or "default", not .*\.$'):
            predictor.segment(["red"], background=wrong)
    assert predictor.segment(["red"], background=np.float32(0.25)).background == 0.25


@pytest.mark.parametrize("background", [None, "default"])
def test_none_words_allow_none_of_these(background: str | None) -> None:
    predictor = colour_predictor(calibration={"threshold": 0.7})
    predictor.set_image(halves(64, 64, 32))
    for names in (["red", "Background"], "red, none of these", "other | rest, red | nothing"):
        result = predictor.segment(names, background=background)
        assert result.names == ["red"] and result.background == 0.7
        assert (result.labels[:, :24] == 0).all() and (result.labels[:, 40:] == -1).all()
    assert predictor.segment(["red", "background"], background=0.2).background == 0.2
    assert "background" not in {name.lower() for name in predictor.model.encoded_names}
    with pytest.raises(InvalidNamesError, match="“none” means none of the other names"):
        predictor.segment("none")


@pytest.mark.parametrize("decoder", DECODERS)
def test_one_name_has_company(tiny_predictor: Predictor, photo: np.ndarray, decoder: str) -> None:
    asked = tiny_predictor.sibling(decoder)
    state = tiny_predictor.encode_image(photo)
    result = asked.segment("dog", image=state)
    assert result.names == ["dog"] and result.company == list(COMPANY)
    attention = result.cross_attention()
    assert attention.shape == (1, *result.grid) and attention.min() > 0 and attention.max() < 1
    np.testing.assert_allclose(attention[0] + result.company_attention() + result.none_attention(), 1, atol=1e-6)
    together = asked.segment(["dog", *COMPANY], image=state)
    np.testing.assert_allclose(together.scores[0], result.scores[0], atol=1e-6)
    np.testing.assert_allclose(together.cross_attention()[0], attention[0], atol=1e-6)
    assert together.company == [] and not together.company_attention().any()
    assert asked.segment("Grass", image=state).company == [word for word in COMPANY if word != "grass"]
    alone = asked.segment("dog | hound", image=state, company=(), features=True)
    assert alone.company == [] and np.allclose(alone.cross_attention()[0] + alone.none_attention(), 1)
    assert alone.embedding_classes == [0, 0] and len(alone.features[0].classes_after) == 2


@pytest.mark.parametrize("decoder", PREDICTOR_DECODERS)
def test_works_under_autocast(tiny_predictor: Predictor, photo: np.ndarray, decoder: str) -> None:
    results = []
    for enabled in (False, True):
        asked = Predictor(tiny_predictor.sibling(decoder).model, decoder=decoder, device="cpu")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            asked.set_image(photo)
            results.append(asked.segment(["dog", "grass", "dogs", "hound"], background=None))
            assert np.array_equal(results[-1].labels, results[-1].scores.argmax(axis=0))
            assert results[-1].indistinguishable_words == []
    assert np.abs(results[0].scores - results[1].scores).max() < 0.05


def test_words_of_different_classes_with_one_embedding_are_reported() -> None:
    """They are compared in full precision."""
    dog = torch.randn(64)
    nearly = dog + 0.03 * torch.randn(64)
    assert 0.998 < torch.cosine_similarity(dog, nearly, dim=0) < 0.9999, "bfloat16 would round it to 1"
    embeddings = torch.stack([dog, nearly, torch.zeros(64), torch.zeros(64), 2 * dog])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        classes = [ClassName((word,)) for word in ("dog", "nearly", "zero", "nil", "double")]
        assert indistinguishable_words(classes, embeddings) == [["dog", "double"]], "zero vectors are like nothing"
    predictor = colour_predictor()  # to which all words that it does not know are the same grey
    predictor.set_image(halves(32, 32, 16))
    assert predictor.segment(["red", "mauve", "beige | green"]).indistinguishable_words == [["mauve", "beige"]]
    assert predictor.segment(["red", "mauve | beige"]).indistinguishable_words == [], "they are one class"


def test_photo_and_names_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = colour_predictor()
    predictor.set_image(halves(64, 64, 32))
    for names in (["red", "green"], ["Green", "blue", "red"], ["blue"]):
        predictor.segment(names, background=0.2, company=())
    assert predictor.model.photos == 1
    assert sorted(predictor.model.encoded_names) == ["blue", "green", "red"]
    monkeypatch.setattr("ldvc.predictor.NAME_CACHE_SIZE", 2)
    limited = colour_predictor()
    for names in (["red", "green"], ["red", "blue"], ["red"], ["green", "red"]):
        limited.encode_names(names)
    assert limited.model.encoded_names == ["red", "green", "blue", "green"], "the oldest name was dropped"


def test_embeddings_do_not_depend_on_earlier_names(tiny_predictor: Predictor) -> None:
    """Names share a cached embedding only if the tokenizer reads them alike."""
    asked_before, fresh = (Predictor(tiny_predictor.model, device="cpu") for _ in range(2))
    asked_before.encode_names(["fuss", "DOG", "wine_glass"])
    words = ["fu\u00df", "dog", "wine glass"]
    torch.testing.assert_close(asked_before.encode_names(words), fresh.encode_names(words))


def test_a_decoder_with_other_towers_loads_them(tmp_path: Path, photo: np.ndarray) -> None:
    folder = save_tiny_checkpoint(tmp_path / "mixed", decoders=("ldvc", "zegclip"))
    other = build_clip(str(folder / "clip")).model
    with torch.no_grad():
        other.visual.proj.mul_(-1)
    save_clip_folder(other, folder / "clip2", {"base": "../clip"})
    config = json.loads((folder / "zegclip" / "config.json").read_text())
    config["model"]["clip"] = "../clip2"
    (folder / "zegclip" / "config.json").write_text(json.dumps(config))
    sibling = Predictor.from_pretrained(str(folder), decoder="ldvc", device="cpu").sibling("zegclip")
    alone = Predictor.from_pretrained(str(folder), decoder="zegclip", device="cpu")
    with pytest.raises(CheckpointError, match="ldvc_without_lcsa"):
        alone.sibling("ldvc_without_lcsa")
    assert sibling.weights_digest == alone.weights_digest
    for each in (sibling, alone):
        each.set_image(photo)
    np.testing.assert_array_equal(sibling.segment(["dog", "cat"]).scores, alone.segment(["dog", "cat"]).scores)


def test_decoders_share_the_encoding_of_a_photo(
    tiny_predictor: Predictor, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tiny_predictor.encode_image(photo)
    embedded = []
    for decoder in ("ldvc_without_lcsa", "zegclip", "clip"):
        other = tiny_predictor.sibling(decoder)
        assert other.model.clip is tiny_predictor.model.clip
        monkeypatch.setattr(other.model.image_tower, "embed_patches", lambda images: embedded.append(images))
        assert other.segment(["dog", "cat"], image=state).labels.shape == photo.shape[:2]
    assert not embedded
    assert set(state.features) == {"ldvc", "ldvc_without_lcsa", "zegclip", "clip"}
    assert tiny_predictor.sibling("ldvc") is tiny_predictor


def test_plain_similarity(tiny_predictor: Predictor, photo: np.ndarray) -> None:
    plain, state = tiny_predictor.sibling("clip"), tiny_predictor.encode_image(photo)
    result = plain.segment(["dog", "grass"], image=state)
    expected = plain.model.frozen_logits(patch_tokens=state.patch_tokens[0], names=["dog", "grass"])[0]
    assert torch.allclose(result.outputs[0].logits, expected, atol=1e-5)
    for without in (result, tiny_predictor.segment(["dog", "cat"], image=state, attention=False)):
        with pytest.raises(LdvcError, match="attention=True"):
            without.cross_attention()


def test_the_result_is_the_models_forward_pass(tiny_predictor: Predictor) -> None:
    """For a picture that needs no resizing, up to the sigmoid."""
    picture = random_photo(320, 448)
    result = tiny_predictor.segment(["dog", "grass", "cat"], image=tiny_predictor.encode_image(picture))
    pixels = (torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        output = tiny_predictor.model(pixels, ["dog", "grass", "cat"], return_attention=True)
    expected = F.interpolate(output.mask_logits, size=(320, 448), mode="bilinear", align_corners=False)[0].sigmoid()
    assert torch.allclose(torch.from_numpy(result.scores), expected, atol=1e-4)
    logits = F.pad(output.mask_logits[0], (0, 0, 0, 0, 0, 1))  # 0, the logit of the threshold 0.5
    assert torch.allclose(torch.from_numpy(result.cross_attention()), logits.softmax(dim=0)[:-1], atol=1e-5)


def test_routing(tiny_predictor: Predictor, photo: np.ndarray) -> None:
    """`test_attention.py` compares the attention inside the regions."""
    state = tiny_predictor.encode_image(photo)
    result = tiny_predictor.segment(["dog", "grass"], image=state)
    assert result.patch_at(0, 0) == (0, 0)
    assert result.patch_at(*photo.shape[:2]) == (result.grid[0] - 1, result.grid[1] - 1)
    found = result.routing(2, 5)
    assert (np.sort(found.all_affinities)[::-1][:2] == found.affinity).all()
    top, left, bottom, right = found.boxes[found.own_region]
    assert top <= 2 < bottom and left <= 5 < right
    with pytest.raises(LdvcError, match="routing"):
        tiny_predictor.sibling("ldvc_without_lcsa").segment(["dog"], image=state).routing(0, 0)
    sizes = {"inference": {"short_side": 128, "window": 128, "stride": 100}}
    windowed = Predictor(tiny_predictor.model, sizes, device="cpu")
    windowed.set_image(photo)
    result = windowed.segment(["dog", "grass"])
    assert np.allclose(result.cross_attention().sum(axis=0) + result.none_attention(), 1, atol=1e-5)
    last = result.routing(result.grid[0] - 1, result.grid[1] - 1)
    assert len(result.outputs) > 1 and last.window.left + last.window.width == result.input_size[1]
    assert last.patch[0] == last.grid[0] - 1


def test_threads_do_not_mix_photos(tiny_predictor: Predictor) -> None:
    photos = [random_photo(60 + 7 * i, 90) for i in range(4)]
    questions = [["dog", "grass"], ["cat", "sky", "dog"], ["road", "tree"], ["sea", "boat", "dog"]]

    def ask(index: int) -> np.ndarray:
        return tiny_predictor.segment(questions[index], image=tiny_predictor.encode_image(photos[index])).labels

    alone = [ask(index) for index in range(4)]
    with ThreadPoolExecutor(8) as pool:
        for index, labels in enumerate(pool.map(ask, [0, 1, 2, 3] * 4)):
            assert np.array_equal(labels, alone[index % 4])


def test_states_and_results_can_be_pickled(tiny_predictor: Predictor, photo: np.ndarray) -> None:
    state = tiny_predictor.encode_image(photo)
    result = tiny_predictor.segment(["dog", "grass"], image=state)
    state, copy = pickle.loads(pickle.dumps((state, result)))
    assert np.array_equal(copy.labels, result.labels)
    assert np.array_equal(tiny_predictor.segment(["dog", "grass"], image=state).labels, result.labels)
    assert copy.routing(0, 0).own_region == 0
