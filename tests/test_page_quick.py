"""A visitor who is faster than the server: what was set or opened last counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browsing import DOG, Visitor, open_tab


@pytest.fixture(scope="module")
def asked(browser, url: str) -> Iterator[Visitor]:
    visitor = Visitor(browser, url)
    visitor.upload(DOG)
    visitor.type_names("dog, grass")
    visitor.segment()
    visitor.wait_for_answer()
    yield visitor
    visitor.close()


def test_a_tab_that_is_opened_again_before_it_is_drawn_is_the_open_one(asked: Visitor) -> None:
    page = asked.page
    open_tab(asked, "Segment", "#overlay canvas")
    asked.type_names("boat, grass")
    before = asked.answers()
    page.locator("#run").click()
    asked.wait_for_answer(before)
    page.evaluate(
        """async () => {
            for (const tab of ["attention", "segment", "attention"]) {
                document.querySelector(`[role=tab][data-tab-id=${tab}]`).click();
                await new Promise(resolve => setTimeout(resolve, 20));
            }
        }"""
    )
    page.locator("#attention-grid").get_by_text("boat").first.wait_for()
    page.wait_for_timeout(500)
    asked.type_names("chair, grass")
    page.locator("#run").click()
    page.locator("#attention-grid").get_by_text("chair").first.wait_for()
    before = asked.answers()
    open_tab(asked, "Segment", "#overlay canvas")
    asked.wait_for_answer(before)  # it is drawn when it is opened


def test_what_is_set_in_quick_succession_ends_at_the_last(asked: Visitor) -> None:
    """Faster than the server answers: the file has what is on the screen, and so have the other tabs."""
    page = asked.page

    def drag(*values: float) -> None:
        page.locator("#overlay .threshold").evaluate(
            """async (slider, values) => {
                for (const value of values) {
                    slider.value = value;
                    for (const kind of ["input", "change"]) slider.dispatchEvent(new Event(kind, { bubbles: true }));
                    await new Promise(resolve => setTimeout(resolve, 15));
                }
            }""",
            values,
        )

    page.locator("#overlay .background").check()
    drag(0, 0.01, 0.02, 1)
    page.wait_for_timeout(1500)  # all events have arrived
    assert page.locator("#overlay output").inner_text() == "1.00"
    open_tab(asked, "Compare", "#compare-view img")
    page.wait_for_function("document.querySelector('#compare-view figure').innerText.includes('none of these')")
    open_tab(asked, "Segment", "#overlay canvas")
    with page.expect_download() as caught:
        page.locator("#overlay .threshold").evaluate(
            """slider => {
                slider.value = 0.4;
                document.querySelector("#download-data").click(); // before any event has told the server
            }"""
        )
    assert json.loads(Path(caught.value.path()).read_bytes())["threshold"] == 0.4
    before = asked.answers()
    page.locator("#overlay .background").uncheck()
    asked.wait_for_answer(before)
