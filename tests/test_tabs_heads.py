"""All layers and heads of a name, and patches that are alike: what is drawn, and that nothing is drawn before it is wanted."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from ldvc.predictor import Predictor
from ldvc.visualize import heat_table
from ldvc.web import texts
from ldvc.web.html import number
from ldvc.web.segmenter import LCSA_OFF
from ldvc.web.session import Answer
from ldvc.web.tabs.attention import AttentionTab
from ldvc.web.tabs.attention_maps import FIXED_SCALE, INTERVENTION, RESCALED
from ldvc.web.tabs.heads import heads_html
from ldvc.web.tabs.routing import RoutedPatch, route_html
from ldvc.web.tabs.similarity import CHOSEN, NO_DECODER, similarity_html, within
from tests.test_tabs import answer, photo, tabs, value, values  # noqa: F401  fixtures
from tests.test_tabs_views import EVIL, Page, pixels, predictor, results  # noqa: F401  fixtures

CHOSEN_MAP = {"layer": 1, "head": None, "photo": "data:"}


# ---- all layers and heads ---------------------------------------------------------------------------------------------


def test_a_map_for_each_layer_and_head(results: dict) -> None:  # noqa: F811
    result = results["ldvc"]
    layers, count = result.attention_shape
    source = heads_html(result, "ldvc", 1, **CHOSEN_MAP, rescale=False)
    page = Page(source)
    buttons, pictures = page.all("button"), page.all("img")
    places = [(int(each["data-layer"]), int(each["data-head"])) for each in buttons]
    assert places == [(layer, head) for layer in range(layers) for head in range(-1, count)]
    assert [place for place, each in zip(places, buttons, strict=True) if each["aria-pressed"] == "true"] == [(1, -1)]
    assert len({each["aria-label"] for each in buttons}) == len(buttons) and FIXED_SCALE in page.text
    assert EVIL in page.text and "<img src=x" not in source and INTERVENTION not in page.text

    drawn = [pixels(each["src"]) for each in pictures]
    for (layer, head), picture in zip(places, drawn, strict=False):  # the last picture is the enlarged one
        attention = result.cross_attention(layer, None if head < 0 else head)[1]
        expected = heat_table()[(result.attention_at(attention, picture.shape[:2]) * 255).round().astype(int)]
        assert np.abs(picture - expected).max() <= 4  # one of 255 steps
    assert len(drawn) == len(buttons) + 1 and (drawn[-1] == drawn[places.index((1, -1))]).all()
    shares = result.attention_at(result.cross_attention()[1], drawn[0].shape[:2])
    inside = result.labels_at(shares.shape) == 1
    said = f"inside its mask {shares[inside].mean() * 100:.0f}\u202f%, outside {shares[~inside].mean() * 100:.0f}\u202f%"
    assert page.text.endswith(said) and buttons[places.index((1, -1))]["aria-label"].endswith(said)


def test_an_intervention_and_another_scale_are_marked(results: dict) -> None:  # noqa: F811
    page = Page(heads_html(results["ldvc"], LCSA_OFF, 0, **CHOSEN_MAP, rescale=True))
    assert INTERVENTION in page.text and page.all("div", "ldvc-is-intervention") and RESCALED in page.text
    palest = max(pixels(each["src"]).sum(axis=2).max() for each in page.all("img"))
    assert palest > heat_table()[230].astype(int).sum()  # the scale is used to its end


def test_heads_are_drawn_when_they_are_wanted(tabs: dict, answer: Answer) -> None:  # noqa: F811
    tab: AttentionTab = tabs[AttentionTab]
    assert tab.draw(answer, values(tab))[tab.heads_view].props["maps"] == ""
    wanted = {"heads": True, "heads_name": "zebra", "layer": 0, "head": 1}
    for chosen, off, decoder in (("zegclip", False, "zegclip"), (LCSA_OFF, False, "ldvc"), (LCSA_OFF, True, LCSA_OFF)):
        changes = tab.draw(answer, values(tab, **wanted, heads_decoder=chosen, off=off))
        page = Page(changes[tab.heads_view].props["maps"])
        (pressed,) = [each for each in page.all("button") if each["aria-pressed"] == "true"]
        assert (pressed["data-layer"], pressed["data-head"], value(changes[tab.heads_decoder])) == ("0", "1", decoder)
        assert "zebra" in page.text and texts.DECODER_TITLES[decoder] in page.text
    assert value(tab.draw(answer, values(tab, heads=True, alone="sofa"))[tab.heads_name]) == "sofa"


# ---- patches alike ----------------------------------------------------------------------------------------------------


def test_patches_alike_before_and_after(results: dict) -> None:  # noqa: F811
    result = results["ldvc"]
    patch = RoutedPatch(result, 2, 3, 1, 0)
    page = Page(similarity_html(result, 2, 3, chosen=patch.boxes))
    inside = result.outputs[0].routing[1].token_attention(2, 3)[0].numpy() > 0
    for picture, after in zip(page.all("img"), (False, True), strict=True):
        similarity = result.patch_similarity(2, 3, after=after)
        drawn = pixels(picture["src"])
        expected = result.attention_at(similarity, drawn.shape[:2]).clip(0, 1)
        assert np.abs(drawn - heat_table()[(expected * 255).round().astype(int)]).max() <= 4
        means = {"inside": number(similarity[inside].mean()), "outside": number(similarity[~inside].mean())}
        assert CHOSEN.format(**means) in page.text
    assert len(page.all("rect", "ldvc-region")) == 2 * len(patch.boxes) and len(page.all("rect", "ldvc-patch")) == 2
    assert "negative values are drawn as 0" in page.text
    assert page.text in Page(route_html(patch, photo="data:")).text


def test_patches_in_the_chosen_regions(results: dict) -> None:  # noqa: F811
    """Those at the edge of the photo, too, which are mostly padding."""
    result = results["ldvc"]
    for row, column in np.ndindex(*result.grid):
        boxes = RoutedPatch(result, row, column, 1, 0).boxes
        expected = result.outputs[0].routing[1].token_attention(row, column)[0].numpy() > 0
        assert np.array_equal(within(boxes, result.grid, result.extent), expected)


def test_plain_clip_has_one_map_of_patches_alike(predictor: Predictor, results: dict) -> None:  # noqa: F811
    image = predictor.encode_image(results["ldvc"].picture)
    result = predictor.sibling("clip").segment("dog, grass", image=image, features=True)
    page = Page(similarity_html(result, 0, 0))
    assert len(page.all("img")) == 1 and NO_DECODER in page.text and not page.all("rect", "ldvc-region")


# ---- the name of a patch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_patch_below_the_threshold_is_none_of_these(results: dict, threshold: float) -> None:  # noqa: F811
    result = copy.copy(results["ldvc"])
    patch = RoutedPatch(result, 2, 3, 1, 0)
    name = result.names[patch.label]
    result.background, result.thresholds = 0.0, {name: threshold}
    text = Page(route_html(patch, photo="data:")).text
    verdict = texts.NONE_OF_THESE if threshold else name
    assert f"Row 3, column 4 is {verdict}" in text and (f"score {number(patch.score)}" in text) == (not threshold)
