"""From a picture to windows and back to pixels: labels and scores are at the right place at any size, in any number of windows.

The "patch features" of the test model are mean colours and its "class embeddings" are colours, so that the right label of
every pixel is known.
"""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from ldvc.calibration import Calibration
from ldvc.inference import Window, axes, cut_windows, model_input_size, sliding_windows, upsample, upsampled_argmax
from tests.colours import BLUE, COLOURS, colour_predictor, halves
from tests.results import make_result, random_photo


@pytest.mark.parametrize("size", [(448, 448), (433, 448), (101, 267), (480, 640), (61, 1000), (900, 700)])
@pytest.mark.parametrize("axis", [0, 1])
def test_boundaries_are_at_the_right_place(size: tuple[int, int], axis: int) -> None:
    """Labels differ from the truth by at most half a patch, even if the model's input ends within a patch."""
    split = round(size[axis] * 0.6)
    predictor = colour_predictor()
    picture = halves(*size, split, axis=axis)
    state = predictor.set_image(picture)
    labels = predictor.segment(["red", "green"]).labels
    assert labels.shape == size
    half_patch = 16 * size[axis] / state.input_size[axis] * 0.5 + 1  # in photo pixels
    far = np.abs(np.arange(size[axis]) + 0.5 - split) > half_patch
    wrong = ((labels == 1) != (picture[..., 1] > 0)).any(axis=1 - axis)
    assert not wrong[far].any()


@pytest.mark.parametrize("size", [(64, 96), (55, 83)])
def test_upsampling_is_bilinear_interpolation(size: tuple[int, int]) -> None:
    """Reference: `F.interpolate` to whole patches, then a crop."""
    logits = torch.randn(3, 4, 6)
    result = make_result(logits, size, calibration=Calibration(2.0, -0.5))
    whole = F.interpolate(logits[None] * 2.0 - 0.5, size=(64, 96), mode="bilinear", align_corners=False)
    expected = whole[0, :, : size[0], : size[1]].sigmoid()
    assert torch.allclose(torch.from_numpy(result.scores), expected, atol=1e-5)
    assert np.array_equal(result.labels, expected.argmax(dim=0).numpy())


def test_sliding_window_equals_slow_reference() -> None:
    inference = {"short_side": 64, "window": 48, "stride": 40}
    picture = np.asarray(Image.fromarray(random_photo(8, 14)).resize((150, 80)))
    predictor = colour_predictor(inference=inference)
    predictor.set_image(picture)
    result = predictor.segment(["red", "green", "blue"])
    pixels = np.asarray(Image.fromarray(picture).resize((120, 64), Image.Resampling.BICUBIC, reducing_gap=3.0))
    pixels = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    total, count = torch.zeros(3, 64, 120), torch.zeros(64, 120)
    for top in (0, 16):
        for left in (0, 40, 72):
            crop = pixels[:, :, top : top + 48, left : left + 48]
            tokens = F.avg_pool2d(crop, 16).flatten(2)[0].T
            logits = (4 - 8 * torch.cdist(torch.tensor([COLOURS[n] for n in result.names]).float(), tokens)).view(1, 3, 3, 3)
            part = F.interpolate(logits, size=(48, 48), mode="bilinear", align_corners=False)[0].sigmoid()
            total[:, top : top + 48, left : left + 48] += part
            count[top : top + 48, left : left + 48] += 1
    assert torch.allclose(torch.from_numpy(result.scores_at((64, 120))), total / count, atol=1e-5)
    assert result.labels.shape == (80, 150)
    assert np.allclose(result.cross_attention().sum(axis=0) + result.none_attention(), 1, atol=1e-5)
    assert result.cross_attention().shape == (3, *result.grid)


def test_windows_cover_everything() -> None:
    for length in (1, 15, 48, 49, 88, 89, 500):
        covered = np.zeros((length, 60), dtype=bool)
        for window in sliding_windows(length, 60, inference={"window": 48, "stride": 40}):
            assert window.top >= 0 and window.top + window.height <= length
            covered[window.top : window.top + window.height, window.left : window.left + window.width] = True
        assert covered.all()


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (3, 5), (16, 16), (17, 31), (2300, 40), (1200, 3000)])
def test_any_size(size: tuple[int, int]) -> None:
    predictor = colour_predictor(inference={"long_side": 128})
    predictor.set_image(np.full((*size, 3), BLUE, dtype=np.uint8))
    result = predictor.segment(["red", "blue"])
    assert result.labels.shape == size
    assert (result.labels == 1).all()
    assert result.cross_attention().shape == (2, *result.grid)


def test_size_of_the_models_input() -> None:
    lite, full = {"long_side": 448}, {"short_side": 512, "window": 512, "stride": 426}
    wide = {"long_side": 576, "enlarge": 1.4}
    cases = [
        (lite, (768, 1024), (336, 448)), (lite, (150, 200), (300, 400)), (lite, (1, 4000), (16, 448)),
        (lite, (300, 200), (448, 299)),  # at most twice as large
        (lite, (20, 10), (224, 112)),  # very small: 14 patches
        (wide, (960, 1280), (432, 576)), (wide, (100, 120), (187, 224)),
        (wide, (200, 320), (280, 448)),  # at most 1.4 times as large
        (full, (768, 1024), (512, 683)),
        (full, (300, 30_000), (20, 2048)),  # at most four windows long
    ]  # fmt: skip
    for inference, size, expected in cases:
        assert model_input_size(*size, inference=inference, patch=16) == expected


SIZES = [(64, 80), (61, 77), (150, 230), (9, 300), (3, 2), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("names", [1, 3, 200])
@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0])
@pytest.mark.parametrize("chunk", [1, 10**6])
def test_upsampled_argmax_is_the_argmax_of_upsampled_maps(
    size: tuple[int, int], names: int, scale: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and classes to the last bit; the model's input ends within a patch."""
    monkeypatch.setattr("ldvc.inference.CHUNK", chunk)
    logits = scale * torch.randn(names, 4, 5)
    logits[-1] = logits[0]  # of equal classes the first wins
    place = {"window": Window(0, 0, 61, 77), "input_size": (61, 77), "patch": 16}
    maps = upsample(logits, *axes(size, cells=(4, 5), **place))
    best, labels = upsampled_argmax(logits, size, **place)
    assert torch.equal(best, maps.amax(dim=0)) and torch.equal(labels, maps.argmax(dim=0))


def test_photos_are_cut_into_whole_patches() -> None:
    picture = Image.new("RGB", (120, 90), (200, 0, 0))
    input_size, windows, pixels = cut_windows(picture, inference={"long_side": 80}, patch=16)
    assert pixels.shape == (1, 64, 80, 3) and input_size == (60, 80) and len(windows) == 1
    assert (pixels == (200, 0, 0)).all()
    sliding = {"short_side": 60, "window": 32, "stride": 24}
    photo = Image.fromarray(random_photo(60, 84))
    input_size, windows, pixels = cut_windows(photo, inference=sliding, patch=16)
    assert input_size == (60, 84)
    assert [(w.top, w.left) for w in windows] == list(itertools.product((0, 24, 28), (0, 24, 48, 52)))
    for window, piece in zip(windows, pixels, strict=True):
        part = np.asarray(photo)[window.top : window.top + 32, window.left : window.left + 32]
        np.testing.assert_array_equal(piece, part)
    assert cut_windows(photo, inference={"short_side": 30}, patch=16)[0] == (30, 42)
