"""Augmentation: measured on the views themselves, and colours against Pillow and the standard library."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from train.data import Augmentation, random_view
from train.data.transforms import colour_change

PIXELS = np.random.default_rng(7).integers(60, 190, (12, 16, 3), dtype=np.uint8)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class Chosen:
    """A generator whose draws are chosen: one change is on, with a strength from -1 to 1."""

    def __init__(self, change: int, strength: float) -> None:
        self.draws = np.array([0.99] * 4 + [0.5] * 4)
        self.draws[change], self.draws[4 + change] = 0.0, (strength + 1) / 2

    def random(self, count: int) -> np.ndarray:
        assert count == 8
        return self.draws


def changed(change: int, strength: float, **how: float) -> np.ndarray:
    return colour_change(PIXELS, 0.5, Chosen(change, strength), **how).astype(float)  # type: ignore[arg-type]


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1.01) -> None:
    assert np.abs(found - np.asarray(expected, dtype=float).clip(0, 255)).max() <= tolerance


@pytest.mark.parametrize("strength", [-1.0, -0.3, 0.6, 1.0])
def test_brightness_contrast_and_saturation(strength: float) -> None:
    photo = Image.fromarray(PIXELS)
    assert_close(changed(BRIGHTNESS, strength), PIXELS + 32 * strength)
    assert_close(changed(CONTRAST, strength), PIXELS * (1 + 0.5 * strength))
    # Pillow's Color blends with grey, which is what a factor on saturation means
    assert_close(changed(SATURATION, strength), np.asarray(ImageEnhance.Color(photo).enhance(1 + 0.5 * strength)), 1.6)


@pytest.mark.parametrize("degrees", [18.0, 36.0])
def test_hue_turns_by_the_given_angle_and_keeps_grey_values(degrees: float) -> None:
    def hues(pixels: np.ndarray) -> np.ndarray:
        return np.array([360 * colorsys.rgb_to_hsv(*(pixel / 255))[0] for pixel in pixels.reshape(-1, 3)])

    luma = [0.299, 0.587, 0.114]
    colourful = (PIXELS.max(axis=-1).astype(int) - PIXELS.min(axis=-1) > 50).ravel()  # of grey there is no hue
    turns = []
    for strength in (1.0, -1.0, 0.0):
        result = changed(HUE, strength, hue=degrees)
        assert np.abs(result @ luma - PIXELS @ luma).max() < 1.5
        turn = (hues(result) - hues(PIXELS.astype(float)) + 180) % 360 - 180
        turns.append(np.abs(turn[colourful]).mean())
        assert len(set(np.sign(turn[colourful]))) <= 1 or strength == 0.0
    assert turns[:2] == pytest.approx([degrees] * 2, rel=0.15) and turns[2] < 1
    grey = np.full((2, 2, 3), 130, dtype=np.uint8)
    assert_close(colour_change(grey, 0.5, Chosen(HUE, 1.0), hue=degrees), grey)  # type: ignore[arg-type]


def test_each_change_comes_half_of_the_time() -> None:
    views = (colour_change(PIXELS, 0.5, np.random.default_rng(seed)) for seed in range(2000))
    untouched = sum(np.array_equal(view, PIXELS) for view in views)
    assert 0.5**4 * 2000 * 0.75 < untouched < 0.5**4 * 2000 * 1.25
    assert np.array_equal(colour_change(PIXELS, 0.0, np.random.default_rng(0)), PIXELS)


# A photo whose red value is the column: the slope along a row of a view is the inverse zoom, its sign shows a mirrored view.
RAMP = np.zeros((200, 200, 3), dtype=np.uint8)
RAMP[..., 0] = np.arange(200)


def slopes(augmentation: Augmentation, views: int) -> np.ndarray:
    found = []
    photo, mask = Image.fromarray(RAMP), np.zeros((200, 200), np.uint8)
    for seed in range(views):
        view, _ = random_view(photo, mask, augmentation, np.random.default_rng(seed))
        row = view[augmentation.crop // 2].astype(float)
        inside = (row[:, 1] == 0).nonzero()[0][2:-2]  # the frame around a small photo is grey
        found.append(np.polyfit(inside, row[inside, 0], 1)[0])
    return np.array(found)


@pytest.mark.parametrize("uniform", [True, False])
def test_scale_has_its_range_and_law_and_half_of_the_views_are_mirrored(uniform: bool) -> None:
    found = slopes(Augmentation(crop=64, short_side=200, uniform_scale=uniform, photometric=0.0), 400)
    zooms = 1 / np.abs(found)
    assert zooms.min() > 0.45 and zooms.max() < 2.15 and zooms.min() < 0.56 and zooms.max() > 1.85
    # mean of a uniform zoom 1.25, of a log-uniform one 1.5 / ln 4; standard error below 0.025
    assert zooms.mean() == pytest.approx(1.25 if uniform else 1.5 / np.log(4), abs=0.08)
    assert 0.42 < (found < 0).mean() < 0.58


def test_short_side_and_long_side_set_the_size_at_scale_one() -> None:
    for size, sides in ((100, {"short_side": 100}), (400, {"short_side": None, "long_side": 400})):
        augmentation = Augmentation(crop=64, scale=(1.0, 1.0), photometric=0.0, **sides)
        assert 1 / np.abs(slopes(augmentation, 5)) == pytest.approx(size / 200, rel=0.05)


def test_crops_that_one_class_fills_are_drawn_again() -> None:
    mask = np.zeros((120, 160), dtype=np.uint8)
    mask[:, 100:], mask[:20] = 1, 255
    photo = Image.fromarray(np.zeros((120, 160, 3), dtype=np.uint8))

    def largest_shares(limit: float) -> np.ndarray:
        augmentation = Augmentation(crop=48, short_side=120, scale=(1.0, 1.0), largest_class=limit)
        shares = []
        for seed in range(80):
            labels = random_view(photo, mask, augmentation, np.random.default_rng(seed))[1]
            labelled = labels[labels != 255]
            shares.append(np.unique(labelled, return_counts=True)[1].max() / labelled.size)
        return np.array(shares)

    assert (largest_shares(1.0) < 0.75).mean() < 0.35 and (largest_shares(0.75) < 0.75).mean() > 0.9
    alone = np.full((120, 160), 3, dtype=np.uint8)  # nothing to mix: after ten more tries any crop will do
    augmentation = Augmentation(crop=48, short_side=120, largest_class=0.75)
    labels = random_view(photo, alone, augmentation, np.random.default_rng(0))[1]
    assert set(np.unique(labels)) <= {3, 255} and 3 in labels
