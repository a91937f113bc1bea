"""The tabs in a real browser, with one visitor for all tests."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from PIL import Image

from tests.browsing import DOG, EVIL, Visitor, held_back, open_tab, pixels, set_range

LOCKED = "document.querySelector('.ldvc-columns').inert"
NAMES = f"dog, grass | lawn, {EVIL}"


def changed(visitor: Visitor, selector: str, attribute: str, action) -> None:
    """Call `action` and wait until an attribute of the first match has changed."""
    before = visitor.page.locator(selector).first.get_attribute(attribute)
    action()
    visitor.page.wait_for_function(
        "([selector, name, before]) => document.querySelector(selector)?.getAttribute(name) !== before",
        arg=[selector, attribute, before],
    )


def decoded(source: str) -> np.ndarray:
    return pixels(base64.b64decode(source.partition(",")[2]))


def test_attention_of_every_name(dog_visitor: Visitor) -> None:
    page = dog_visitor.page
    open_tab(dog_visitor, "Attention", "#attention-grid img")
    heats = page.locator("#attention-grid .ldvc-heat img")
    assert heats.count() == 4 * 3 and EVIL in page.locator("#attention-grid").inner_text()
    cut_short = "labels => labels.filter(each => each.scrollWidth > each.clientWidth).map(each => each.textContent)"
    assert page.locator("#attention-grid .ldvc-label-name").evaluate_all(cut_short) == []
    with_lcsa, without, zegclip = (decoded(heats.nth(index).get_attribute("src")) for index in range(3))
    for other in (without, zegclip):
        assert (np.abs(with_lcsa - other).max(axis=2) > 0).mean() > 0.05, "two decoders must not show the same map"
    height, width = Image.open(DOG).size[::-1]
    box = heats.first.bounding_box()
    assert box["height"] / box["width"] == pytest.approx(height / width, abs=0.02)

    changed(dog_visitor, "#attention-grid img", "src", lambda: page.locator("#attention-layer").get_by_label("1").click())
    changed(dog_visitor, "#attention-grid img", "src", lambda: page.locator("#attention-layer").get_by_label("3").click())
    assert "fixed scale from 0 to 1" in page.locator("#attention-grid").inner_text()
    changed(dog_visitor, "#attention-grid img", "src", lambda: page.locator("#attention-rescale input").check())
    assert "not 0 to 1" in page.locator("#attention-grid").inner_text()
    page.locator("#attention-off input").check()
    page.locator("#attention-grid .ldvc-map.ldvc-is-intervention").first.wait_for()
    assert heats.count() == 4 * 4 and "intervention" in page.locator("#attention-grid").inner_text()
    page.locator("#attention-slider").get_by_text("intervention").first.wait_for()
    assert "inside its mask" in page.locator("#attention-grid figcaption").first.inner_text()
    assert not page.locator("#attention-company").is_visible(), "several names need no company"


def test_all_layers_and_heads_by_keyboard(dog_visitor: Visitor) -> None:
    page = dog_visitor.page
    open_tab(dog_visitor, "Attention", "#attention-grid img")
    maps = page.locator("#heads-view button")
    assert maps.count() == 0, "the maps are drawn only after a click"
    page.locator("#heads input").check()
    maps.first.wait_for()
    assert maps.count() == 3 * 9
    maps.nth(3).focus()
    changed(dog_visitor, "#attention-grid img", "src", lambda: page.keyboard.press("Enter"))
    page.locator("#heads-view button[aria-pressed=true][data-layer='0'][data-head='2']").wait_for()
    assert page.locator("#attention-layer").get_by_label("1").is_checked()
    assert page.locator("#attention-head input").input_value() == "3"
    assert page.evaluate("document.activeElement.dataset.head") == "2", "the focus must stay after the answer"
    page.locator("#attention-layer").get_by_label("3").click()
    page.locator("#heads-view button[aria-pressed=true][data-layer='2'][data-head='2']").wait_for()
    page.locator("#heads input").uncheck()
    maps.first.wait_for(state="detached")


def test_attention_slider_by_keyboard(dog_visitor: Visitor) -> None:
    page = dog_visitor.page
    open_tab(dog_visitor, "Attention", "#attention-slider img")
    line = page.locator("#attention-slider .ldvc-slide-line")
    before = line.bounding_box()["x"]
    page.locator("#attention-slider input").focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    frame = page.locator("#attention-slider .ldvc-slide").bounding_box()
    assert line.bounding_box()["x"] - before == pytest.approx(frame["width"] / 10, abs=2)


def test_routing_by_click_key_and_number(dog_visitor: Visitor) -> None:
    page = dog_visitor.page
    open_tab(dog_visitor, "Routing", "#routing-view .ldvc-stage")
    stage = page.locator("#routing-view .ldvc-stage")
    rows, columns = (int(stage.get_attribute(f"data-{side}")) for side in ("rows", "columns"))
    box = stage.bounding_box()

    def patch() -> tuple[int, int]:
        return int(stage.get_attribute("data-row")), int(stage.get_attribute("data-column"))

    corner = {"x": box["width"] - 3, "y": 3}
    changed(dog_visitor, "#routing-view .ldvc-stage", "data-column", lambda: stage.click(position=corner))
    assert patch() == (0, columns - 1)
    assert page.locator("#routing-row input").input_value() == "1"
    assert page.locator("#routing-column input").input_value() == str(columns)
    assert stage.locator("rect.ldvc-patch").count() == 1
    assert stage.locator("rect.ldvc-region").count() == 4 == page.locator(".ldvc-badge").count()
    shares = [float(each) for each in page.locator(".ldvc-softmax .ldvc-number").all_inner_texts()]
    assert len(shares) == 4 and sum(shares) == pytest.approx(1, abs=0.02)  # three names and none of these

    stage.focus()
    changed(dog_visitor, "#routing-view .ldvc-stage", "data-row", lambda: page.keyboard.press("ArrowDown"))
    assert patch() == (1, columns - 1)
    changed(dog_visitor, "#routing-view .ldvc-alike img", "src", lambda: page.keyboard.press("Home"))
    assert patch() == (1, 0) and page.locator("#routing-view .ldvc-alike img").count() == 2
    assert page.evaluate("document.activeElement.className") == "ldvc-stage", "the focus must stay after the answer"

    for _ in range(6):  # faster than the answers of the server
        page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('#routing-view .ldvc-stage').dataset.column === '6'")
    page.keyboard.press("Home")
    page.wait_for_function("document.querySelector('#routing-view .ldvc-stage').dataset.column === '0'")

    field = page.locator("#routing-row input")
    changed(dog_visitor, "#routing-view .ldvc-stage", "data-row", lambda: field.fill(str(rows)))
    assert patch() == (rows - 1, 0)
    changed(dog_visitor, "#routing-view .ldvc-stage", "data-row", lambda: field.fill("1"))
    field.fill("")  # an empty field stays empty while a number is typed
    changed(dog_visitor, "#routing-view .ldvc-stage", "data-row", lambda: field.fill("999"))
    assert patch() == (rows - 1, 0)
    page.wait_for_function(f"document.querySelector('#routing-row input').value === '{rows}'")
    first_layer = page.locator("#routing-layer").get_by_label("1")
    changed(dog_visitor, "#routing-view .ldvc-stage-heat", "src", first_layer.click)


def test_space_moves_from_before_to_after(dog_visitor: Visitor) -> None:
    page = dog_visitor.page
    open_tab(dog_visitor, "Space", "#space-view svg")
    assert page.locator("#space-view .ldvc-plot").count() == 2
    assert page.locator("#space-view td.ldvc-still").count() == 2
    names = page.locator("#space-view .ldvc-plot").first.locator("text").all_text_contents()
    assert names[:3] == ["dog", "grass", "lawn"]

    def dot() -> dict:
        return page.locator("#space-view .ldvc-plot").first.locator("circle").nth(5).bounding_box()

    after = dot()
    slider = page.locator("#space-view input[type=range]")
    slider.focus()
    page.keyboard.press("Home")
    before = dot()
    assert abs(after["x"] - before["x"]) + abs(after["y"] - before["y"]) > 2, "LDVC moves the patches"
    page.locator("#space-view .ldvc-play").click()
    page.wait_for_function("document.querySelector('#space-view input').value === '100'")
    assert dot()["x"] == pytest.approx(after["x"], abs=1)


def test_a_long_list_is_sorted_by_area(dog_visitor: Visitor) -> None:
    open_tab(dog_visitor, "Compare", "#compare-view img")
    open_tab(dog_visitor, "Segment", "#overlay canvas")
    assert not dog_visitor.page.locator("#download-file").is_visible()
    dog_visitor.ask("boat, bus, cake, chair, clock, fork, kite, knife, oven, sink, spoon, toilet, grass, dog")
    shares = dog_visitor.shares()
    assert len(shares) == 15 and shares[:-1] == sorted(shares[:-1], reverse=True) and shares[0] > 0
    assert dog_visitor.legend()[-1] == "none of these"


def test_an_answer_says_when_it_is_that_of_another_question(dog_visitor: Visitor) -> None:
    stale = dog_visitor.page.locator("#stale .ldvc-notice")
    dog_visitor.ask("dog,grass;  dog")
    stale.wait_for(state="hidden")
    assert dog_visitor.page.get_by_label("Class names").first.input_value() == "dog, grass"
    dog_visitor.type_names("dog, grass, sky")
    stale.wait_for()
    dog_visitor.type_names(" dog;grass,")
    stale.wait_for(state="hidden")  # the same question
    dog_visitor.upload(DOG.with_name("coffee.jpg"))
    stale.wait_for()
    dog_visitor.upload(DOG)
    dog_visitor.ask("grass, dog")
    stale.wait_for(state="hidden")


def test_a_changed_class_list_is_the_visitors_own(dog_visitor: Visitor) -> None:
    page = dog_visitor.page
    chosen = page.locator("#vocabulary input").first
    chosen.click()
    page.get_by_role("option", name="PASCAL VOC 2012 (20)").click()
    page.locator("#chips li").nth(19).wait_for()
    assert chosen.input_value() == "PASCAL VOC 2012 (20)"
    page.locator("#chips button").first.click()
    page.wait_for_function("document.querySelectorAll('#chips li').length === 19")
    page.wait_for_function("document.querySelector('#vocabulary input').value === 'My own names'")


@pytest.mark.parametrize("together", [True, False])
def test_removed_names_stay_away_in_whatever_order_the_server_answers(dog_visitor: Visitor, together: bool) -> None:
    """Several names together, or one after the other, before the first answer."""
    page, removed = dog_visitor.page, ["bird", "bottle", "cat", "dog"]
    dog_visitor.type_names("bird, bottle, cat, dog, horse, sheep")
    page.wait_for_function("document.querySelectorAll('#chips li').length === 6")
    with held_back(page, "**/run/*"):
        for names in [removed] if together else [[name] for name in removed]:
            page.evaluate("names => names.forEach(name => document.querySelector(`[data-name=${name}]`).click())", names)
        assert page.locator("#chips li:visible .ldvc-name").all_inner_texts() == ["horse", "sheep"], "before the answer"
    page.wait_for_function("document.querySelectorAll('#chips li').length === 2")
    page.wait_for_function("document.querySelector('#names textarea').value === 'horse, sheep'")


def test_the_company_of_a_single_name_can_be_removed(dog_visitor: Visitor) -> None:
    page = dog_visitor.page
    dog_visitor.ask("dog")
    open_tab(dog_visitor, "Attention", "#attention-grid .ldvc-company")
    others = page.locator("#attention-grid .ldvc-company")
    words = page.locator("#attention-grid").get_by_text("Words that share")
    assert others.count() == 2 and "not part of the overlay" in words.inner_text()  # company and none of these
    page.locator("#attention-company input").uncheck()
    words.wait_for(state="detached")
    assert others.count() == 1
    page.locator("#attention-layer").get_by_label("1").click()
    page.locator("#attention-note").get_by_text("1 everywhere").wait_for()
    assert np.ptp(decoded(page.locator("#attention-grid .ldvc-heat img").first.get_attribute("src"))[..., 0]) == 0
    open_tab(dog_visitor, "Segment", "#overlay canvas")
    dog_visitor.ask("grass")
    open_tab(dog_visitor, "Attention", "#attention-note .ldvc-notice")
    assert not page.locator("#attention-company input").is_checked(), "company is also removed for the next question"
    open_tab(dog_visitor, "Segment", "#overlay canvas")


def test_words_that_the_model_cannot_read_are_named(dog_visitor: Visitor) -> None:
    remark = dog_visitor.page.locator("#names-problem .ldvc-notice")
    for names, expected in (("\u72d7, dog, \u8349", True), ("dog, dogs", False)):
        dog_visitor.ask(names)
        remark.wait_for(state="visible" if expected else "hidden")
        if expected:
            assert "\u201c\u72d7\u201d and \u201c\u8349\u201d apart" in remark.inner_text()


# A visitor who is faster than the server. Requests are held back, so the tests do not depend on timing.


def click_at(page, selector: str) -> None:
    """Click with the mouse at the position of an element, also if the element is inert."""
    box = page.locator(selector).first.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def test_while_a_question_is_answered_the_page_takes_no_input(dog_visitor: Visitor) -> None:
    page, before = dog_visitor.page, dog_visitor.answers()
    field = page.get_by_label("Class names").first
    dog_visitor.type_names("boat, grass")
    with held_back(page) as held:
        field.press("Enter")
        page.wait_for_function(LOCKED)
        assert page.locator(".ldvc-question").evaluate("element => getComputedStyle(element).opacity") < "1", "locked"
        page.keyboard.type("more")
        for selector in ("#run", "#examples button", "#legend button", "#tabs [role=tab][data-tab-id=compare]"):
            click_at(page, selector)
        assert len(held) == 1 and field.input_value() == "boat, grass"
    dog_visitor.wait_for_answer(before)
    dog_visitor.wait_until_unlocked()
    assert dog_visitor.legend() == ["boat", "grass", "none of these"] and page.locator("#overlay canvas").is_visible()
    assert field.evaluate("element => element === document.activeElement"), "the field keeps the focus"


def test_after_an_error_the_page_takes_input_again(dog_visitor: Visitor) -> None:
    page = dog_visitor.page
    page.route("**/queue/join*", lambda route: route.fulfill(status=503, json={"detail": "The queue is full."}))
    with page.expect_response("**/queue/join*"):  # the page is locked by then
        page.locator("#run").click()
    dog_visitor.wait_until_unlocked()
    page.unroute("**/queue/join*")
    dog_visitor.ask("dog, grass")
    assert dog_visitor.legend() == ["dog", "grass", "none of these"]


def test_a_tab_that_is_opened_before_a_question_shows_its_answer(dog_visitor: Visitor) -> None:
    """The request for the tab arrives after the newer question is answered."""
    page, before = dog_visitor.page, dog_visitor.answers()
    routes: list = []
    page.route("**/queue/join*", lambda route: route.continue_() if routes else routes.append(route))  # holds back the first
    with page.expect_request("**/queue/join*"):
        page.get_by_role("tab", name="Compare", exact=True).click()
    dog_visitor.type_names("chair, grass")
    dog_visitor.segment()
    routes[0].continue_()
    page.unroute("**/queue/join*")
    page.locator("#compare-view").get_by_text("grass").first.wait_for()
    assert "dog" not in page.locator("#compare-view").inner_text()
    open_tab(dog_visitor, "Segment", "#overlay canvas")
    dog_visitor.wait_for_answer(before)
    assert dog_visitor.legend()[:2] == ["chair", "grass"]


def test_a_download_holds_what_is_on_the_screen(dog_visitor: Visitor) -> None:
    """The click sends the settings. While the file is made, no newer question can be asked."""
    page = dog_visitor.page
    set_range(page, "#overlay .threshold", 0.4)
    with page.expect_download() as download, held_back(page) as held:
        page.locator("#download-data").click()
        page.wait_for_function(LOCKED)
        click_at(page, "#run")
        assert len(held) == 1
    data = json.loads(download.value.path().read_bytes())
    assert data["threshold"] == 0.4 and [each["name"] for each in data["classes"]] == dog_visitor.legend()[:2]
    dog_visitor.wait_until_unlocked()


def test_phone_in_the_dark(browser, url: str) -> None:
    """At 390 px nothing overflows and every tab can be reached; in dark mode the text is light."""
    visitor = Visitor(browser, url, width=390, dark=True)
    page = visitor.page
    assert page.evaluate("scrollY") == 0, "opening the page must not scroll to the answer"
    visitor.type_names(f"dog, {80 * 'w'}")
    page.locator("#chips li").get_by_text(80 * "w").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "the longest name that is allowed"
    visitor.upload(DOG)
    visitor.ask(NAMES)
    page.wait_for_function("document.querySelector('#tabs').getBoundingClientRect().top < 300")  # the answer is shown
    places = {
        "Attention": "#attention-grid img",
        "Routing": "#routing-view .ldvc-stage",
        "Space": "#space-view .ldvc-plot svg",
        "Compare": "#compare-view img",
        "Segment": "#overlay canvas",
    }
    for name, place in places.items():
        open_tab(visitor, name, place)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        for element in (page.get_by_role("tab", name=name, exact=True), page.locator(place).first):
            box = element.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390, name
        colour = page.locator(f"#tab-{name.lower()} h2").first.evaluate("element => getComputedStyle(element).color")
        assert min(int(part) for part in colour[4:-1].split(",")[:3]) > 180, f"{name}: dark text on a dark page"
    assert page.locator("#overlay canvas").bounding_box()["width"] > 300, "the painted photo has the width of the phone"
    open_tab(visitor, "Attention", "#attention-grid img")
    page.locator("#heads input").check()
    page.locator("#heads-view button").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    scrolls = "element => element.scrollWidth > element.clientWidth"
    assert page.locator(".ldvc-heads-scroll").evaluate(scrolls), "the maps stay readable"
    visitor.close()
