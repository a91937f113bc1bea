"""Colours that can be told apart, overlays and heat maps."""

import itertools

import numpy as np
import pytest

from ldvc.visualize import (
    HEAT_STOPS,
    NONE_COLOUR,
    PALETTE,
    colours_for,
    heat_gradient,
    heat_map,
    heat_table,
    overlay,
    perceived,
    rgb,
)

LISTS = [
    ["dog", "grass", "cat"],
    ["building", "sky", "tree", "car", "road", "grass"],
    ["person", "guitar", "trumpet", "sky", "wall", "floor", "chair", "table", "lamp", "window"],
]


@pytest.mark.parametrize("names", LISTS)
def test_colours_of_one_picture_can_be_told_apart(names: list[str]) -> None:
    """For usual vision, deuteranopes and protanopes."""
    seen_as = perceived(np.array([rgb(colour) for colour in colours_for(names)]))
    for first, second in itertools.combinations(range(len(names)), 2):
        distance = np.linalg.norm(seen_as[:, first] - seen_as[:, second], axis=1).min()
        assert distance > 0.08, (names[first], names[second])


def test_a_name_keeps_its_colour_and_no_two_have_the_same() -> None:
    dog, grass = colours_for(["dog", "grass"])
    assert colours_for(["dog"]) == colours_for(["DOG"]) == [dog] and colours_for(["dog", "horse"])[0] == dog
    assert dog in PALETTE and grass in PALETTE
    colours = set(colours_for([f"thing {i}" for i in range(200)]))
    assert len(colours) == 200 and NONE_COLOUR not in colours


def test_oklab_of_known_colours() -> None:
    """White, black and red as in the publication of Oklab."""
    usual = perceived(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]]))[0]
    np.testing.assert_allclose(usual, [[1, 0, 0], [0, 0, 0], [0.628, 0.225, 0.126]], atol=1e-3)


def test_overlay_paints_the_label_map() -> None:
    picture = np.full((40, 60, 3), 128, dtype=np.uint8)
    labels = np.zeros((40, 60), dtype=int)
    labels[:, 30:] = 1
    labels[30:] = -1
    painted = overlay(picture, labels, ["#ff0000", "#0000ff"], opacity=1.0)
    assert painted[10, 10].tolist() == [255, 0, 0] and painted[10, 50].tolist() == [0, 0, 255]
    none = painted[36, 30]
    assert none[0] == none[1] == none[2] and none[0] < 128  # grey and dimmed
    assert (painted[10, 29:31] > 180).all() and (painted[10, [28, 31], 1] == 0).all()  # a light line between classes
    assert (painted[29:31, 10] > 180).all()


def test_unseen_classes_are_striped() -> None:
    picture, labels = np.full((120, 120, 3), 128, dtype=np.uint8), np.zeros((120, 120), dtype=int)
    plain, striped = (overlay(picture, labels, ["#ff0000"], striped=[each])[..., 0] for each in (False, True))
    assert len(np.unique(plain)) == 1
    assert len(np.unique(striped)) == len(np.unique(striped[60])) == len(np.unique(striped[:, 60])) == 2  # diagonal


def test_the_heat_scale_is_fixed_and_its_lightness_grows() -> None:
    table = heat_table()
    assert table.shape == (256, 3)
    lightness = perceived(table)[0][:, 0]
    assert (np.diff(lightness) > -1e-3).all() and lightness[0] < 0.25 and lightness[-1] > 0.9
    mixed = heat_map(np.array([[0.2, 1.0]]))
    assert (heat_map(np.full((4, 4), 0.2)) == mixed[0, 0]).all()  # the colour of a value does not depend on the others
    assert mixed[0, 1].tolist() == list(rgb(HEAT_STOPS[-1]))
    assert (heat_map(np.array([[-1.0, 2.0]])) == heat_map(np.array([[0.0, 1.0]]))).all()
    grey = np.full((2, 2, 3), 128, dtype=np.uint8)
    drawn = heat_map(np.ones((2, 2)), grey, strength=0.8)[0, 0]
    last = heat_gradient(strength=0.8).rstrip(")").split(", ")[-1]
    assert np.abs(drawn.astype(int) - np.array(rgb(last))).max() <= 1
