"""Results: one rule for labels and scores, attention, the same at any size and with any number of windows."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldvc.calibration import Calibration, SoftmaxCalibration
from ldvc.errors import LdvcError
from ldvc.inference import Window
from ldvc.predictor import Predictor
from ldvc.window_output import DecoderFeatures
from tests.results import PATCH, make_result, random_photo

INPUT = (53, 75)
SIZES = [INPUT, (150, 230), (9, 31), (1, 1)]  # of label and score maps
WINDOWS = {
    "one window": [Window(0, 0, *INPUT)],
    "several windows": [Window(top, left, 32, 48) for top in (0, 21) for left in (0, 24, 27)],
}
several_windows = pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)


def grid_of(window: Window) -> tuple[int, int]:
    return -(-window.height // PATCH), -(-window.width // PATCH)


def random_logits(windows: list[Window], classes: int, *, scale: float = 2.0, offset: float = 0.0) -> list[Tensor]:
    return [scale * torch.randn(classes, *grid_of(window)) + offset for window in windows]


def random_scores(windows: list[Window], words: int, heads: int = 3) -> list[list[Tensor]]:
    """For each window the attention scores of two layers."""
    return [[torch.randn(heads, words, *grid_of(window)) for _ in range(2)] for window in windows]


def test_scores_follow_the_formula() -> None:
    logits = torch.randn(4, 6, 8)
    result = make_result(logits, (96, 128), calibration=Calibration(scale=1.5, bias=0.3))
    expected = 1 / (1 + np.exp(-(1.5 * logits.numpy() + 0.3)))
    np.testing.assert_allclose(result.scores_at((6, 8)), expected, atol=1e-6)
    np.testing.assert_allclose(result.patch_scores(2, 3), expected[:, 2, 3], atol=1e-6)
    labels = logits.argmax(dim=0).numpy()
    assert np.array_equal(result.labels_at((6, 8)), labels) and np.array_equal(result.patch_labels[0], labels.flatten())
    assert all(result.patch_label(y, x) == labels[y, x] for y, x in ((0, 0), (1, 3), (2, 4)))


@several_windows
@pytest.mark.parametrize(
    ("classes", "scale", "offset", "calibration"),
    [
        (3, 2.0, 0.0, Calibration()),
        (150, 2.0, 0.0, Calibration()),
        (5, 2.0, 25.0, Calibration()),  # sigmoids of float32 are 1 from 17 on
        (40, 0.01, 30.0, Calibration()),
        (5, 3.0, -120.0, Calibration()),  # and 0 below -104
        (5, 0.0, 1.0, Calibration()),  # all classes are equal: the first wins
        (3, 0.03, 0.0, SoftmaxCalibration()),  # with stuff words
    ],
)
def test_labels_are_the_argmax_of_the_scores(
    windows: list[Window], classes: int, scale: float, offset: float, calibration: Calibration | SoftmaxCalibration
) -> None:
    logits = random_logits(windows, classes, scale=scale, offset=offset)
    result = make_result(logits, INPUT, windows=windows, calibration=calibration)
    if isinstance(calibration, SoftmaxCalibration):
        for output, (stuff,) in zip(result.outputs, random_logits(windows, 1, scale=scale), strict=True):
            output.stuff = stuff
    for size in SIZES:
        result.background, scores = None, result.scores_at(size)
        np.testing.assert_allclose(result.scores_at(size, 1), scores[1], rtol=3e-7)
        assert scores.dtype == np.float32 and scores.min() >= 0 and scores.max() <= 1
        best, score = result.best_at(size)
        assert np.array_equal(best, scores.argmax(axis=0)) and np.array_equal(score, scores.max(axis=0))
        assert np.array_equal(result.labels_at(size), best)
        result.background = float(np.median(score))
        assert np.array_equal(result.labels_at(size), np.where(score < result.background, -1, best))
        assert np.array_equal(result.best_at(size)[0], best), "the threshold does not change the best class"


@several_windows
@pytest.mark.parametrize("logit", [20.0, 30.0])
def test_the_higher_logit_wins_where_scores_round_to_one(windows: list[Window], logit: float) -> None:
    logits = [torch.tensor([0.0, 2.0, 1.0])[:, None, None].expand(3, *grid_of(window)) + logit for window in windows]
    result = make_result(logits, INPUT, windows=windows, background=1.0)
    assert (result.labels == 1).all() and (result.scores.argmax(axis=0) == 1).all()
    assert result.patch_label(1, 2) == 1 and all((labels == 1).all() for labels in result.patch_labels)


@several_windows
@pytest.mark.parametrize("size", SIZES[:2])
def test_results_do_not_depend_on_how_many_classes_are_computed_at_once(
    windows: list[Window], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sigmoid's last bit depends on the length of the array, so scores are compared with a tolerance."""
    logits = random_logits(windows, 20, scale=5.0)
    result = make_result(logits, INPUT, windows=windows)
    scores, labels = result.scores_at(size), result.labels_at(size)
    for index in range(20):
        alone = result.scores_at(size, index)
        np.testing.assert_allclose(alone, scores[index], rtol=3e-7)
        assert (alone[labels != index] < scores.max(axis=0)[labels != index]).all()
    monkeypatch.setattr("ldvc.result.CHUNK", size[0] * size[1] * 7)
    in_parts = make_result(logits, INPUT, windows=windows)
    assert np.array_equal(in_parts.labels_at(size), labels)
    np.testing.assert_allclose(in_parts.scores_at(size), scores, rtol=3e-7)


@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("head", [None, 0, 2])
def test_attention_is_the_softmax_over_the_words(layer: int, head: int | None) -> None:
    """Of one head's scores, or of the mean of all heads' scores; the shares of synonyms are added.

    In the last layer the scores are calibrated, and the score of the threshold takes part.
    """
    windows = WINDOWS["one window"]
    scores, synonyms = random_scores(windows, 6), [["sofa", "couch"], ["dog"], ["tv", "telly", "monitor"]]
    options = {"calibration": Calibration(scale=1.5, bias=-0.3, threshold=0.2), "scores": scores, "synonyms": synonyms}
    result = make_result(random_logits(windows, 3), INPUT, **options)
    assert result.attention_shape == (2, 3)
    maps = scores[0][layer].numpy()
    maps = maps.mean(axis=0) if head is None else maps[head]
    exponentials, none = (np.exp(maps), 0.0) if layer == 0 else (np.exp(1.5 * maps - 0.3), 0.2 / 0.8)
    total = exponentials.sum(axis=0) + none
    words = exponentials / total
    expected = np.stack([words[:2].sum(axis=0), words[2], words[3:].sum(axis=0)])
    np.testing.assert_allclose(result.cross_attention(layer, head), expected, atol=1e-6)
    np.testing.assert_allclose(result.none_attention(layer, head), none / total, atol=1e-6)
    assert not result.company_attention(layer, head).any()


def test_the_label_of_a_patch_is_what_it_attends_to_most() -> None:
    """"None of these" included, with the checkpoint's own threshold."""
    logits, calibration = 2 * torch.randn(4, 3, 5) - 1, Calibration(2.0, 0.1, 0.3)
    result = make_result(logits, (48, 80), scores=[[logits[None]]], calibration=calibration, background=0.3)
    maps = np.concatenate([result.none_attention()[None], result.cross_attention()])
    labels = result.labels_at(result.grid)
    assert np.array_equal(maps.argmax(axis=0) - 1, labels) and (labels < 0).any() and (labels >= 0).any()


@several_windows
def test_attention_at_any_size_sums_to_one(windows: list[Window]) -> None:
    result = make_result(random_logits(windows, 4), INPUT, windows=windows, scores=random_scores(windows, 4))
    attention = np.concatenate([result.cross_attention(), result.none_attention()[None]])
    for size in SIZES:
        maps = result.attention_at(attention, size)
        assert maps.shape == (5, *size)
        np.testing.assert_allclose(maps.sum(axis=0), 1, atol=1e-5)
        assert np.array_equal(result.attention_at(attention[2], size), maps[2])


@pytest.mark.parametrize("after", [False, True])
def test_patches_are_compared_with_all_patches(after: bool) -> None:
    """Patch by patch, as a cosine; where two windows overlap, in the mean of their unit vectors."""
    windows = [Window(0, 0, 48, 48), Window(0, 32, 48, 48)]  # columns 0 to 2 and 2 to 4
    result = make_result(random_logits(windows, 2), (48, 80), windows=windows)
    total = torch.zeros(3, 5, 6)
    for output, columns in zip(result.outputs, (slice(3), slice(2, 5)), strict=True):
        output.features = DecoderFeatures(*(torch.randn(count, 6) for count in (9, 9, 2, 2)))
        values = output.features.patches_after if after else output.features.patches_before
        total[:, columns] += normalize(values, dim=-1).unflatten(0, (3, 3))
    for y, x in ((0, 0), (1, 2), (2, 4)):
        expected = torch.cosine_similarity(total, total[y, x], dim=-1)
        np.testing.assert_allclose(result.patch_similarity(y, x, after=after), expected, atol=1e-6)


def test_similarity_without_a_decoder_and_without_features(tiny_predictor: Predictor) -> None:
    image = tiny_predictor.encode_image(random_photo())
    clip = tiny_predictor.sibling("clip").segment("dog", image=image, features=True)
    before, after = (clip.patch_similarity(1, 1, after=each) for each in (False, True))
    assert np.array_equal(before, after) and before[1, 1] == pytest.approx(1) and np.ptp(before) > 0
    with pytest.raises(LdvcError, match="features=True"):
        tiny_predictor.segment("dog", image=image).patch_similarity(1, 1, after=True)
