"""A visitor who is faster than the server: requests are held back by the test, so that no timing decides."""

from __future__ import annotations

import json

from tests.browsing import Visitor, held_back, open_tab, set_range

NAMES = "dog, grass"
LOCKED = "document.querySelector('.ldvc-columns').inert"


def clicked(page, selector: str) -> None:
    """A click of the mouse where an element is, whether it takes clicks or not."""
    box = page.locator(selector).first.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def test_while_a_question_is_answered_the_page_takes_no_input(asked: Visitor) -> None:
    page, before = asked.page, asked.answers()
    field = page.get_by_label("Class names").first
    asked.type_names("boat, grass")
    with held_back(page) as held:
        field.press("Enter")
        page.wait_for_function(LOCKED)
        assert page.locator(".ldvc-question").evaluate("element => getComputedStyle(element).opacity") < "1", "it is seen"
        page.keyboard.type("more")
        for selector in ("#run", "#examples button", "#legend button", "#tabs [role=tab][data-tab-id=compare]"):
            clicked(page, selector)
        assert len(held) == 1 and field.input_value() == "boat, grass"
    asked.wait_for_answer(before)
    asked.wait_until_unlocked()
    assert asked.legend() == ["boat", "grass", "none of these"] and page.locator("#overlay canvas").is_visible()
    assert field.evaluate("element => element === document.activeElement"), "the keyboard goes on where it was"


def test_after_an_error_the_page_takes_input_again(asked: Visitor) -> None:
    page = asked.page
    page.route("**/queue/join*", lambda route: route.fulfill(status=503, json={"detail": "The queue is full."}))
    with page.expect_response("**/queue/join*"):  # then the page is locked
        page.locator("#run").click()
    asked.wait_until_unlocked()
    page.unroute("**/queue/join*")
    asked.ask("dog, grass")
    assert asked.legend() == ["dog", "grass", "none of these"]


def test_a_tab_that_is_opened_before_a_question_shows_its_answer(asked: Visitor) -> None:
    """The request for the tab arrives when the newer question is answered already."""
    page, before = asked.page, asked.answers()
    held: list = []
    page.route("**/queue/join*", lambda route: route.continue_() if held else held.append(route))  # holds back the first
    with page.expect_request("**/queue/join*"):
        page.get_by_role("tab", name="Compare", exact=True).click()
    asked.type_names("chair, grass")
    asked.segment()
    held[0].continue_()
    page.unroute("**/queue/join*")
    page.locator("#compare-view").get_by_text("grass").first.wait_for()
    assert "dog" not in page.locator("#compare-view").inner_text()
    open_tab(asked, "Segment", "#overlay canvas")
    asked.wait_for_answer(before)
    assert asked.legend()[:2] == ["chair", "grass"]
    asked.type_names("dog, grass")
    with held_back(page):
        page.locator("#run").click()
        page.wait_for_function(LOCKED)
    asked.wait_until_unlocked()
    page.get_by_role("tab", name="Compare", exact=True).click()
    page.locator("#compare-view").get_by_text("dog").first.wait_for()
    assert "chair" not in page.locator("#compare-view").inner_text()
    open_tab(asked, "Segment", "#overlay canvas")


def test_a_download_holds_what_is_on_the_screen(asked: Visitor) -> None:
    """The settings go with the click; while the file is made, no newer question can be asked."""
    page = asked.page
    set_range(page, "#overlay .threshold", 0.4)
    with page.expect_download() as caught, held_back(page) as held:
        page.locator("#download-data").click()
        page.wait_for_function(LOCKED)
        clicked(page, "#run")
        assert len(held) == 1
    data = json.loads(caught.value.path().read_bytes())
    assert data["threshold"] == 0.4 and [each["name"] for each in data["classes"]] == asked.legend()[:2]
    asked.wait_until_unlocked()


def test_settings_hold_for_the_next_question_and_the_other_tabs(asked: Visitor) -> None:
    page = asked.page
    set_range(page, "#overlay .threshold", 1)
    page.locator("#legend button").first.click()
    asked.ask("grass, dog, sky")
    assert page.locator("#overlay output").inner_text() == "1.00"
    assert page.locator("#legend button[aria-pressed=true] .ldvc-name").inner_text() == "dog"
    assert json.loads(asked.download("data")[1])["threshold"] == 1
    open_tab(asked, "Compare", "#compare-view img")
    assert page.locator("#compare-view figure").last.get_by_text("none of these").is_visible()
    open_tab(asked, "Segment", "#overlay canvas")
    asked.changed_by(lambda: page.locator("#overlay .background").uncheck())
    open_tab(asked, "Compare", "#compare-view img")
    page.locator("#compare-view figure").get_by_text("none of these").first.wait_for(state="detached")
