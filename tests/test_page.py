"""The Segment tab for a visitor: app.py as a separate process, and a real Chromium."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from ldvc.web.examples import read_examples
from tests.browsing import DOG, EVIL, Visitor, open_tab, percent, pixels, set_range

NAMES = "dog, grass, \u8349"
OWN = "#legend .ldvc-own-threshold"


@pytest.fixture
def visitor(browser, url: str) -> Iterator[Visitor]:
    visitor = Visitor(browser, url)
    yield visitor
    visitor.close()


def test_segment_isolate_download(visitor: Visitor) -> None:
    """Painted photo, legend and maps, every control of the viewer, and the content of every file."""
    page = visitor.page
    visitor.upload(DOG)
    visitor.type_names(f"dog | hound, grass, {EVIL}")
    chips = page.locator("#chips")
    chips.get_by_text(EVIL).wait_for()
    assert EVIL in chips.inner_text() and chips.locator("img").count() == 0
    assert [each.inner_text() for each in chips.locator(".ldvc-tag").all()] == ["seen", "seen", "unseen"]
    page.get_by_label("Class names").press("Enter")
    visitor.wait_for_answer()

    original = pixels(DOG.read_bytes())
    painted = visitor.painted()
    assert painted.shape == original.shape and np.abs(painted - original).mean() > 5
    assert visitor.legend() == ["dog | hound", "grass", EVIL, "none of these"], "none of these is allowed by default"
    own = json.loads(visitor.download("data")[1])["threshold"]
    assert own == pytest.approx(float(page.locator("#overlay output").inner_text()), abs=0.005)
    painted = visitor.changed_by(lambda: page.get_by_label("Allow “none of these”").uncheck())
    assert visitor.legend() == ["dog | hound", "grass", EVIL]
    legend = page.locator("#legend")
    assert legend.locator("img").count() == 0 and legend.locator("button").count() == 3
    assert [each.inner_text() for each in legend.locator(".ldvc-tag").all()] == ["seen", "seen", "unseen"]
    assert page.locator("#class-maps figure").count() == 3
    assert EVIL in page.locator("#class-maps").inner_text()

    # The downloaded PNG equals the picture on the page, except for the noise of JPEG.
    name, content = visitor.download("overlay")
    saved = pixels(content)
    assert name == "dog-overlay.png" and saved.shape == original.shape
    assert np.abs(saved - painted).mean() < 4

    name, content = visitor.download("data")
    data = json.loads(content)
    assert name == "dog-segmentation.json"
    assert [each["name"] for each in data["classes"]] == ["dog", "grass", EVIL]
    assert data["classes"][0]["synonyms"] == ["hound"] and data["threshold"] is None
    assert len(data["model"]["weights_sha256"]) == 64
    assert visitor.shares() == [pytest.approx(100 * each["area"], abs=1) for each in data["classes"]]

    name, content = visitor.download("mask")
    indices = np.asarray(Image.open(io.BytesIO(content)))
    assert name == "dog-mask.png" and indices.shape == original.shape[:2]

    # A class alone, by keyboard, and back; then opacity and outlines. The file has the same settings.
    entry = legend.locator("button").first
    entry.focus()
    alone = visitor.changed_by(lambda: page.keyboard.press("Enter"))
    assert entry.get_attribute("aria-pressed") == "true"
    grass = scipy.ndimage.binary_erosion(indices == 2)  # without its outline
    assert (np.ptp(alone[grass], axis=1) <= 1).all(), "all pixels outside the class alone are grey"
    _, content = visitor.download("overlay")
    saved = pixels(content)
    assert np.abs(saved - alone).mean() < 4
    visitor.changed_by(lambda: page.keyboard.press("Escape"))
    assert entry.get_attribute("aria-pressed") == "false"
    visitor.changed_by(lambda: page.locator("#overlay canvas").click())  # in the middle of the photo, by mouse
    assert legend.locator("button[aria-pressed=true]").count() == 1
    assert page.locator("#overlay .ldvc-tip").is_visible()
    visitor.changed_by(lambda: page.keyboard.press("Escape"))
    visitor.changed_by(lambda: page.get_by_label("Outlines").uncheck())
    bare = visitor.changed_by(lambda: set_range(page, "#overlay .opacity", 0))
    assert np.abs(bare - original).mean() < 4, "without paint and outlines the picture is the photo"

    # None of these is painted by the browser; the file has the same threshold.
    visitor.changed_by(lambda: set_range(page, "#overlay .opacity", 55))
    visitor.changed_by(lambda: page.get_by_label("Allow “none of these”").check())
    assert json.loads(visitor.download("data")[1])["threshold"] == own
    visitor.changed_by(lambda: set_range(page, "#overlay .threshold", 0.9))
    assert visitor.legend()[-1] == "none of these"
    data = json.loads(visitor.download("data")[1])
    assert data["threshold"] == 0.9
    assert visitor.shares()[-1] == pytest.approx(100 * data["none_of_these"]["area"], abs=1)


def test_problems_are_sentences_and_nothing_is_lost(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    visitor.remove_photo()
    visitor.type_names("dog, grass")
    visitor.segment()
    assert "Choose a photo first" in page.locator("#photo-problem [role=alert]").inner_text()

    visitor.upload(DOG)
    visitor.type_names(" , ,")
    visitor.segment()
    assert "at least one class name" in page.locator("#names-problem [role=alert]").inner_text()
    page.locator("#photo-problem [role=alert]").wait_for(state="detached")

    visitor.type_names("dog, grass")
    visitor.segment()
    visitor.wait_for_answer()
    before = visitor.painted()
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"this is no picture")
    visitor.remove_photo()
    page.locator("#photo input[type=file]").set_input_files(broken)
    page.locator("#photo-problem [role=alert]").wait_for()  # before any question
    assert "not a picture" in page.locator("#photo-problem [role=alert]").inner_text()
    visitor.segment()
    assert "not a picture" in page.locator("#photo-problem [role=alert]").inner_text()
    assert page.get_by_label("Class names").input_value() == "dog, grass"
    assert np.array_equal(visitor.painted(), before)
    assert "Traceback" not in page.locator("body").inner_text()
    visitor.upload(DOG)
    page.locator("#photo-problem [role=alert]").wait_for(state="detached")


def test_example_one_name_chips_vocabularies_and_models(visitor: Visitor) -> None:
    page = visitor.page
    names = page.get_by_label("Class names")
    page.get_by_role("button", name="Dog on grass", exact=True).wait_for()
    page.get_by_role("button", name="Dog on grass", exact=True).click()
    visitor.wait_for_answer()
    assert visitor.legend() == ["dog", "grass", "cat", "none of these"], "the example is answered without the button"
    page.locator("#chips").get_by_text("grass").wait_for()
    page.wait_for_function("document.querySelector('#names textarea').value === 'dog, grass, cat'")
    page.locator("#chips li").nth(3).wait_for(state="detached")
    assert page.locator("#chips li").count() == 3
    page.get_by_role("button", name="Remove grass").click()
    page.locator("#chips li").nth(2).wait_for(state="detached")
    assert names.input_value() == "dog, cat"

    before = visitor.answers()
    visitor.type_names("dog")
    names.press("Enter")
    visitor.wait_for_answer(before)
    assert names.input_value() == "dog" and visitor.legend() == ["dog", "none of these"]
    visitor.changed_by(lambda: page.get_by_label("Allow “none of these”").uncheck())
    for typed, legend in (("dog, cat", ["dog", "cat"]), ("dog, other", ["dog", "none of these"])):
        visitor.ask(typed)
        assert names.input_value() == typed and visitor.legend() == legend
    assert "“other” is no class" in page.locator("#names-problem [role=status]").inner_text()
    visitor.type_names("dog")
    page.locator("#chips li").nth(1).wait_for(state="detached")

    page.locator("#vocabulary input").click()
    page.get_by_role("option", name="PASCAL VOC 2012").click()
    page.locator("#chips li").nth(19).wait_for()
    assert names.input_value().startswith("aeroplane, bicycle") and page.locator("#chips li").count() == 20
    assert "20 classes" in page.locator("#chips").inner_text()
    page.locator("#vocabulary input").click()
    page.get_by_role("option", name="My own names").click()
    page.locator("#chips li").nth(1).wait_for(state="detached")
    assert names.input_value() == "dog", "the visitor's own names are restored"

    page.locator("#model input").click()
    page.get_by_role("option", name="full").click()
    assert "LDVC_CLIP_WEIGHTS" in page.locator("#model-problem [role=status]").inner_text()


def test_of_two_quick_clicks_on_examples_the_last_counts(visitor: Visitor) -> None:
    page, examples, pending = visitor.page, read_examples(), set()
    page.locator("#examples button").nth(3).wait_for()
    page.on("request", lambda request: pending.add(request) if request.method == "POST" else None)
    page.on("requestfinished", lambda request: pending.discard(request))
    for first, last in ((3, 0), (1, 2)):
        page.evaluate("each => each.forEach(at => document.querySelectorAll('#examples button')[at].click())", [first, last])
        while pending:
            page.wait_for_event("requestfinished")
        names, photo = examples[last].names, Path(examples[last].path)
        page.wait_for_function("names => document.querySelector('#names textarea').value === names", arg=names)
        page.locator("#legend").get_by_text(names.split(", ")[0], exact=True).first.wait_for()
        assert visitor.legend() == [*names.split(", "), "none of these"]
        assert photo.name in page.locator("#photo img").get_attribute("src")
        assert visitor.download("data")[0] == f"{photo.stem}-segmentation.json"
        assert page.locator("#stale .ldvc-notice").count() == 0


def wait_until_drawn(page) -> None:
    """Wait until the browser has drawn all changes."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_names_are_written_and_can_be_switched_off(dog_visitor: Visitor) -> None:
    page, switch = dog_visitor.page, dog_visitor.page.locator("#overlay .names")
    dog_visitor.changed_by(lambda: page.locator("#overlay .background").uncheck())
    assert switch.is_checked()
    written = dog_visitor.painted()
    saved = pixels(dog_visitor.download("overlay")[1])
    assert np.abs(saved - written).mean() < 4
    bare = dog_visitor.changed_by(switch.uncheck)
    saved_bare = pixels(dog_visitor.download("overlay")[1])
    for first, second in ((written, bare), (saved, saved_bare)):
        differs = (first != second).any(axis=2)
        assert 0.0005 < differs.mean() < 0.05 and np.ptp(first[differs].max(axis=1)) > 150, "light letters with dark outlines"
    dog_visitor.ask("dog, grass")
    assert not switch.is_checked(), "the setting is kept for the next question"
    page.set_viewport_size({"width": 500, "height": 900})
    small = dog_visitor.changed_by(switch.check)
    page.set_viewport_size({"width": 1280, "height": 900})
    page.wait_for_function("width => document.querySelector('#overlay canvas').clientWidth > width", arg=600)
    wait_until_drawn(page)
    assert not np.array_equal(dog_visitor.painted(), small), "letters have one size on every screen"
    dog_visitor.changed_by(lambda: page.locator("#overlay .background").check())


def test_a_class_gets_a_threshold_of_its_own(dog_visitor: Visitor) -> None:
    page, own = dog_visitor.page, dog_visitor.page.locator(OWN)
    dog_visitor.ask("dog, grass, cat")
    set_range(page, "#overlay .threshold", 0.2)
    wait_until_drawn(page)
    dog_before, grass_before = dog_visitor.shares()[:2]
    assert own.count() == 0
    dog_visitor.changed_by(page.locator("#legend button").first.click)
    assert own.locator("span").inner_text() == "0.20" and own.get_by_role("button").is_hidden()
    dog_visitor.changed_by(lambda: set_range(page, f"{OWN} input", 0.9))
    dog_after, grass_after = dog_visitor.shares()[:2]
    assert dog_after < dog_before and grass_after == grass_before
    name, content = dog_visitor.download("cutouts")
    archive = zipfile.ZipFile(io.BytesIO(content))
    assert name == "dog-cutouts.zip" and archive.namelist() == ["1_dog.png"]
    alpha = np.asarray(Image.open(archive.open("1_dog.png")))[..., 3]
    assert (alpha == 255).mean() * 100 == pytest.approx(dog_after, abs=1)
    own.locator("input").focus()
    dog_visitor.changed_by(lambda: page.keyboard.press("Escape"))
    assert own.is_hidden() and page.evaluate("document.activeElement.className") == "ldvc-entry", "the focus is kept"

    dog_visitor.ask("dog, sky")
    dog_visitor.ask("grass, dog, cat")
    assert dog_visitor.shares()[1] == pytest.approx(dog_after, abs=1), "the threshold is kept for the same name"
    data = json.loads(dog_visitor.download("data")[1])
    assert [each["threshold"] for each in data["classes"]] == [0.2, 0.9, 0.2] and data["threshold"] == 0.2
    assert 100 * data["classes"][1]["area"] == pytest.approx(dog_after, abs=1)
    open_tab(dog_visitor, "Compare", "#compare-view img")
    chips = page.locator("#compare-view figure").last.locator(".ldvc-chip").all_inner_texts()
    (dog,) = (chip for chip in chips if chip.startswith("dog"))
    assert percent(dog.split()[1]) == pytest.approx(dog_after, abs=1)
    open_tab(dog_visitor, "Segment", "#overlay canvas")

    page.locator("#legend button").nth(1).click()
    own.get_by_role("button", name="Reset").click()
    own.get_by_role("button").wait_for(state="hidden")
    wait_until_drawn(page)
    assert dog_visitor.shares()[1] == pytest.approx(dog_before, abs=1) and own.locator("span").inner_text() == "0.20"
    dog_visitor.changed_by(lambda: set_range(page, f"{OWN} input", 0.7))
    page.locator("#overlay .background").uncheck()
    own.wait_for(state="hidden")
    assert [each["threshold"] for each in json.loads(dog_visitor.download("data")[1])["classes"]] == 3 * [None]
