"""Names on the overlay, thresholds of single classes, and cut-outs in a real browser, with one visitor for all tests."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.browsing import Visitor, open_tab, pixels, set_range

NAMES = "dog, grass, \u8349"
OWN = "#legend .ldvc-own-threshold"


def drawn(page) -> None:
    """Wait until the browser has drawn what was changed."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def share(visitor: Visitor, line: int) -> float:
    return float(visitor.shares()[line].split("\u202f")[0].replace("<1", "0.5"))


def test_names_are_written_and_can_be_switched_off(asked: Visitor) -> None:
    page, switch = asked.page, asked.page.locator("#overlay .names")
    asked.changed_by(lambda: page.locator("#overlay .background").uncheck())
    assert switch.is_checked()
    written = asked.painted()
    saved = pixels(asked.download("overlay")[1])
    assert np.abs(saved - written).mean() < 4
    bare = asked.changed_by(switch.uncheck)
    saved_bare = pixels(asked.download("overlay")[1])
    for first, second in ((written, bare), (saved, saved_bare)):
        differs = (first != second).any(axis=2)
        assert 0.0005 < differs.mean() < 0.05 and np.ptp(first[differs].max(axis=1)) > 150, "light letters, dark outlines"
    asked.ask("dog, grass")
    assert not switch.is_checked(), "kept for the next question"
    page.set_viewport_size({"width": 500, "height": 900})
    small = asked.changed_by(switch.check)
    page.set_viewport_size({"width": 1280, "height": 900})
    page.wait_for_function("width => document.querySelector('#overlay canvas').clientWidth > width", arg=600)
    drawn(page)
    assert not np.array_equal(asked.painted(), small), "letters have one size on every screen"
    asked.changed_by(lambda: page.locator("#overlay .background").check())


def test_a_class_gets_a_threshold_of_its_own(asked: Visitor) -> None:
    page, own = asked.page, asked.page.locator(OWN)
    asked.ask("dog, grass, cat")
    set_range(page, "#overlay .threshold", 0.2)
    drawn(page)
    usual, others = share(asked, 0), share(asked, 1)
    assert own.count() == 0
    asked.changed_by(page.locator("#legend button").first.click)
    assert own.locator("span").inner_text() == "0.20" and own.get_by_role("button").is_hidden()
    asked.changed_by(lambda: set_range(page, f"{OWN} input", 0.9))
    lower = share(asked, 0)
    assert lower < usual and share(asked, 1) == others
    name, content = asked.download("cutouts")
    archive = zipfile.ZipFile(io.BytesIO(content))
    assert name == "dog-cutouts.zip" and archive.namelist() == ["1_dog.png"]
    alpha = np.asarray(Image.open(archive.open("1_dog.png")))[..., 3]
    assert (alpha == 255).mean() * 100 == pytest.approx(lower, abs=1)
    own.locator("input").focus()
    asked.changed_by(lambda: page.keyboard.press("Escape"))
    assert own.is_hidden() and page.evaluate("document.activeElement.className") == "ldvc-entry", "the focus is not lost"

    asked.ask("dog, sky")
    asked.ask("grass, dog, cat")
    assert share(asked, 1) == pytest.approx(lower, abs=1), "kept when the name is asked again"
    data = json.loads(asked.download("data")[1])
    assert [each["threshold"] for each in data["classes"]] == [0.2, 0.9, 0.2] and data["threshold"] == 0.2
    assert 100 * data["classes"][1]["area"] == pytest.approx(lower, abs=1)
    open_tab(asked, "Compare", "#compare-view img")
    chips = page.locator("#compare-view figure").last.locator(".ldvc-chip").all_inner_texts()
    (dog,) = (chip for chip in chips if chip.startswith("dog"))
    assert float(dog.split()[1].replace("<1", "0.5")) == pytest.approx(lower, abs=1)
    open_tab(asked, "Segment", "#overlay canvas")

    page.locator("#legend button").nth(1).click()
    own.get_by_role("button", name="Reset").click()
    own.get_by_role("button").wait_for(state="hidden")
    drawn(page)
    assert share(asked, 1) == pytest.approx(usual, abs=1) and own.locator("span").inner_text() == "0.20"
    asked.changed_by(lambda: set_range(page, f"{OWN} input", 0.7))
    page.locator("#overlay .background").uncheck()
    own.wait_for(state="hidden")
    assert [each["threshold"] for each in json.loads(asked.download("data")[1])["classes"]] == 3 * [None]
