"""What a result says: one rule for labels and scores, the attention, the same at any size and in any number of windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ldvc.calibration import Calibration
from ldvc.inference import Window
from ldvc.result import Segmentation, WindowOutput

PATCH = 16
SIZES = [(53, 75), (150, 230), (9, 31), (1, 1)]  # of the photo's maps; the input_size is 53 x 75
WINDOWS = {
    "one window": [Window(0, 0, 53, 75)],
    "several windows": [Window(top, left, 32, 48) for top in (0, 21) for left in (0, 24, 27)],
}
several_windows = pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)


def grid_of(window: Window) -> tuple[int, int]:
    return -(-window.height // PATCH), -(-window.width // PATCH)


def random_logits(windows: list[Window], names: int, *, scale: float = 2.0, around: float = 0.0) -> list[Tensor]:
    return [scale * torch.randn(names, *grid_of(window)) + around for window in windows]


def random_scores(windows: list[Window], names: int, heads: int = 3) -> list[list[Tensor]]:
    """For each window the attention scores of two layers."""
    return [[torch.randn(heads, names, *grid_of(window)) for _ in range(2)] for window in windows]


def make_result(
    logits: list[Tensor],
    windows: list[Window],
    *,
    scores: list[list[Tensor]] | None = None,
    calibration: Calibration | None = None,
    synonyms: list[list[str]] | None = None,
    company: list[str] | None = None,
    background: float | None = None,
) -> Segmentation:
    names = [f"name {i}" for i in range(len(logits[0]))]
    scores = scores or [[] for _ in windows]
    return Segmentation(
        names=names,
        seen=[True] * len(names),
        decoder="ldvc",
        picture=np.zeros((53, 75, 3), dtype=np.uint8),
        input_size=(53, 75),
        patch=PATCH,
        outputs=[WindowOutput(*each) for each in zip(windows, logits, scores, strict=True)],
        calibration=calibration,
        synonyms=synonyms,
        company=company,
        background=background,
    )


# ---- one rule


@several_windows
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("names", "scale", "around"),
    [
        (3, 2.0, 0.0),
        (150, 2.0, 0.0),
        (5, 2.0, 25.0),  # sigmoids of float32 are 1 from 17 on
        (40, 0.01, 30.0),
        (5, 3.0, -120.0),  # and 0 below -104
        (5, 0.0, 1.0),  # all names are equal: the first
    ],
)
def test_labels_are_the_argmax_of_the_scores(
    windows: list[Window], size: tuple[int, int], names: int, scale: float, around: float
) -> None:
    result = make_result(random_logits(windows, names, scale=scale, around=around), windows)
    scores = result.scores_at(size)
    assert scores.dtype == np.float32 and scores.min() >= 0 and scores.max() <= 1
    assert np.array_equal(result.labels_at(size), scores.argmax(axis=0))
    best, score = result.best_at(size)
    assert np.array_equal(best, result.labels_at(size)) and np.array_equal(score, scores.max(axis=0))
    result.background = float(np.median(score))
    expected = np.where(score < result.background, -1, best)
    assert np.array_equal(result.labels_at(size), expected)
    assert np.array_equal(result.best_at(size)[0], best), "the best name, whatever the threshold"


@several_windows
@pytest.mark.parametrize("logit", [20.0, 30.0])
def test_of_scores_that_round_to_one_the_higher_logit_wins(windows: list[Window], logit: float) -> None:
    logits = [torch.tensor([0.0, 2.0, 1.0])[:, None, None].expand(3, *grid_of(window)) + logit for window in windows]
    result = make_result(logits, windows, background=1.0)
    assert (result.labels == 1).all() and (result.scores.argmax(axis=0) == 1).all()
    assert result.patch_label(1, 2) == 1 and all((labels == 1).all() for labels in result.patch_labels)


def test_labels_with_a_threshold() -> None:
    windows = WINDOWS["one window"]
    logits = torch.zeros(2, 4, 5)
    logits[0, :, :2], logits[1, :, 3:] = 3.0, -3.0
    result = make_result([logits], windows)
    assert (result.labels == 0).all()
    result.background = 0.9
    labels = result.labels
    assert (labels[:, :24] == 0).all() and (labels[:, 56:] == -1).all()
    shares = result.area_shares(labels)
    assert shares == [pytest.approx((labels == 0).mean()), 0.0]
    result.background = 0.0
    assert (result.labels == 0).all()


@several_windows
def test_scores_and_labels_do_not_depend_on_how_many_are_computed_at_once(
    windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, size = random_logits(windows, 60), (80, 110)
    result = make_result(logits, windows)
    labels, scores = result.labels_at(size), result.scores_at(size)
    monkeypatch.setattr("ldvc.result.CHUNK", size[0] * size[1] * 7)
    result = make_result(logits, windows)
    assert np.array_equal(result.labels_at(size), labels)
    np.testing.assert_allclose(result.scores_at(size), scores, atol=1e-7)


@several_windows
@pytest.mark.parametrize("size", SIZES)
def test_the_scores_of_one_name_are_those_among_all(windows: list[Window], size: tuple[int, int]) -> None:
    result = make_result(random_logits(windows, 6, scale=20.0), windows)
    scores, labels = result.scores_at(size), result.labels_at(size)
    for index in range(6):
        alone = result.scores_at(size, index)
        assert alone.shape == size
        np.testing.assert_allclose(alone, scores[index], rtol=3e-7)  # a sigmoid's last bit depends on the array's length
        wins = labels == index
        assert np.array_equal(alone[wins], scores[index][wins])
        assert (alone[~wins] < scores.max(axis=0)[~wins]).all()


def test_patches_have_the_labels_of_their_pixels() -> None:
    """With whole patches, a pixel in the middle of a patch shows what the patch says."""
    window = Window(0, 0, 48, 80)
    logits = 3 * torch.randn(4, 3, 5)
    result = Segmentation(
        names=list("abcd"), seen=[True] * 4, decoder="ldvc", picture=np.zeros((48, 80, 3), np.uint8), input_size=(48, 80),
        patch=PATCH, outputs=[WindowOutput(window, logits)],
    )  # fmt: skip
    expected = logits.argmax(dim=0).numpy()
    assert np.array_equal(result.patch_labels[0], expected.flatten())
    assert np.array_equal(result.labels_at((3, 5)), expected)
    for y, x in ((0, 0), (1, 3), (2, 4)):
        assert result.patch_label(y, x) == expected[y, x]
        np.testing.assert_allclose(result.patch_scores(y, x), logits[:, y, x].sigmoid(), rtol=1e-6)


# ---- attention


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("head", [None, 0, 2])
def test_attention_is_the_softmax_over_the_names(layer: int, head: int | None) -> None:
    """Of one head's scores, or of the mean of all heads' scores; synonyms add up."""
    windows = WINDOWS["one window"]
    synonyms = [["sofa", "couch"], ["dog"], ["tv", "telly", "monitor"]]
    scores = random_scores(windows, 6)
    result = make_result(random_logits(windows, 3), windows, scores=scores, synonyms=synonyms)
    assert result.attention_shape == (2, 3)
    maps = scores[0][layer].numpy()
    exponentials = np.exp(maps.mean(axis=0) if head is None else maps[head])
    words = exponentials / exponentials.sum(axis=0)
    expected = np.stack([words[:2].sum(axis=0), words[2], words[3:].sum(axis=0)])
    found = result.cross_attention(layer, head)
    assert found.dtype == np.float32 and found.shape == (3, *result.grid)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.allclose(found.sum(axis=0), 1, atol=1e-6) and not result.company_attention(layer, head).any()


@several_windows
@pytest.mark.parametrize("head", [None, 1])
def test_company_takes_what_the_names_do_not(windows: list[Window], head: int | None) -> None:
    """One name with two words, and three words of company: without them its attention would be 1 everywhere."""
    scores = random_scores(windows, 5)
    options = {"scores": scores, "synonyms": [["sofa", "couch"]]}
    result = make_result(random_logits(windows, 1), windows, company=["wall", "sky", "road"], **options)
    own, company = result.cross_attention(head=head), result.company_attention(head=head)
    assert own.shape == (1, *result.grid) and company.shape == result.grid
    np.testing.assert_allclose(own[0] + company, 1, atol=1e-6)
    assert own.min() > 0 and own.max() < 1
    if len(windows) == 1:
        last = scores[0][-1]
        expected = (last.mean(dim=0) if head is None else last[head]).softmax(dim=0)[2:].sum(dim=0)
        np.testing.assert_allclose(company, expected, atol=1e-6)
    alone = [[layer[:, :2] for layer in layers] for layers in scores]
    result = make_result(random_logits(windows, 1), windows, scores=alone, synonyms=[["sofa", "couch"]])
    np.testing.assert_allclose(result.cross_attention(head=head), 1, atol=1e-6)
    assert not result.company_attention(head=head).any()


@several_windows
def test_attention_at_any_size_still_sums_to_one(windows: list[Window]) -> None:
    result = make_result(random_logits(windows, 4), windows, scores=random_scores(windows, 4))
    attention = result.cross_attention()
    for size in SIZES:
        maps = result.attention_at(attention, size)
        assert maps.shape == (4, *size)
        np.testing.assert_allclose(maps.sum(axis=0), 1, atol=1e-5)
        assert np.array_equal(result.attention_at(attention[2], size), maps[2])


def test_attention_at_the_grid_keeps_the_maps() -> None:
    """Where the input_size is whole patches and a pixel is a patch, nothing is interpolated."""
    attention = np.random.default_rng(0).random((2, 3, 5), dtype=np.float32)
    result = Segmentation(
        names=["a", "b"], seen=[True] * 2, decoder="ldvc", picture=np.zeros((48, 80, 3), np.uint8), input_size=(48, 80),
        patch=PATCH, outputs=[WindowOutput(Window(0, 0, 48, 80), torch.zeros(2, 3, 5))],
    )  # fmt: skip
    np.testing.assert_allclose(result.attention_at(attention, (3, 5)), attention, atol=1e-6)
