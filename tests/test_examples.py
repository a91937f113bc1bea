"""The answer that the page opens with, the answers to examples that all visitors share, and links to them."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl, urlencode

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from ldvc.web import temporary, texts
from ldvc.web.examples import OPENING, Example, Link, answer_examples, link_to, read_examples, read_link
from ldvc.web.inputs import InputPanel
from ldvc.web.models import LITE, ModelRegistry
from ldvc.web.page import build_page
from ldvc.web.segmenter import ALL_DECODERS, Segmenter
from ldvc.web.session import Answer, Session, Visits, size_of
from ldvc.web.tabs import VIEWER_DEFAULT
from ldvc.web.tabs.segment import SegmentTab
from tests.browsing import DOG, EVIL, Visitor, open_tab
from tests.test_web_handlers import ask, by_id, event, values_of
from tests.tiny import save_tiny_checkpoint

EXAMPLES = {each.key: each for each in read_examples()}
ADDRESSES = (  # and the notice beside the answer that each opens
    ("?example=nothing&names=dog", texts.LINK_EXAMPLE),
    ("?example=../../app.py", texts.LINK_EXAMPLE),
    (f"?{urlencode({'example': EVIL, 'names': EVIL})}", texts.LINK_EXAMPLE),
    (f"?example=dog&names={','.join(f'n{number}' for number in range(3000))}", texts.LINK_NAMES),
    (f"?example=dog&names={5000 * 'x'}", texts.LINK_NAMES),
    ("?example=dog&names=%20,%00", texts.LINK_NAMES),
    ("?example=dog&model=full", texts.LINK_MODEL),
    ("?example=dog&model=/etc/passwd", texts.LINK_MODEL),
    ("?example=dog", ""),
    ("?names=dog", ""),
)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> ModelRegistry:
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / LITE)
    return ModelRegistry(str(folder), str(folder))


@pytest.fixture(scope="module")
def segmenter(registry: ModelRegistry) -> Segmenter:
    segmenter = Segmenter(registry)
    answer_examples(segmenter)
    return segmenter


@pytest.fixture
def opening() -> Example:
    return EXAMPLES[OPENING]


def test_visitors_share_what_does_not_change(segmenter: Segmenter, opening: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    main = segmenter.registry.get(None).main
    monkeypatch.setattr(main, "encode_image", lambda image: pytest.fail("the photo was encoded again"))
    with monkeypatch.context() as context:
        context.setattr(type(main), "segment", lambda *_, **__: pytest.fail("a result was computed again"))
        first, second = (segmenter.segment(opening.path, opening.names) for _ in range(2))
        assert all(segmenter.results(first, *ALL_DECODERS))
        segmenter.segment(EXAMPLES["dog"].path, EXAMPLES["dog"].names)
    assert first.image is second.image
    for name in ("results", "pictures", "drawn", "parsed_names", "names"):
        assert getattr(first, name) is not getattr(second, name), name
    first.drawn["segment"], first.results["mine", False] = (), None
    assert not second.drawn and ("mine", False) not in second.results
    other = segmenter.segment(opening.path, "boat", previous=first)
    assert other.image is first.image and other.names == ["boat"] and list(other.results) == [(other.decoder, True)]


def test_shared_memory_is_nobodys(segmenter: Segmenter, opening: Example) -> None:
    answer = segmenter.segment(opening.path, opening.names)
    assert size_of(answer) < 2_000 < 100_000 < size_of(answer.kept)
    other = segmenter.segment(opening.path, "boat, tree", previous=answer)
    (result,) = segmenter.results(other, other.decoder)
    own = sum(output.logits.nbytes for output in result.outputs)
    assert own < size_of(other) < size_of(answer.kept), "its own result, without the photo"
    visits, sessions = Visits(10_000), [Session(segmenter.segment(opening.path, opening.names)) for _ in range(4)]
    for session in sessions:
        visits.keep(session)
    assert all(session.answer is not None for session in sessions)


def test_a_click_borrows_no_gpu(segmenter: Segmenter, opening: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not segmenter.is_kept(opening.fingerprint, "full") and segmenter.is_kept(opening.fingerprint, None)
    monkeypatch.setattr(segmenter.registry.get("full"), "borrows_gpu", True)
    assert segmenter.is_kept(opening.fingerprint, "full")
    answer = segmenter.segment_example(opening.path, opening.names, model="full")
    assert (answer.model, answer.chosen) == (LITE, "full") and "Press Segment to ask “full”" in answer.notice


def test_links(segmenter: Segmenter, opening: Example, tmp_path: Path) -> None:
    registry, examples = segmenter.registry, list(EXAMPLES.values())
    for names, model in (("boat | ship, 100 % tree+sky = 1 #2", None), (f"狗, {EVIL}", "full")):
        answer = segmenter.segment(opening.path, names, model=model)
        query = dict(parse_qsl(link_to(answer, examples, registry).removeprefix("?")))
        assert read_link(query, examples, registry) == Link(opening, names, model, True)
    own = tmp_path / "opening.jpg"
    own.write_bytes(Path(opening.path).read_bytes() + b" ")
    assert link_to(segmenter.segment(str(own), "tree"), examples, registry) == ""


@pytest.mark.parametrize(("address", "notice"), ADDRESSES)
def test_bad_links(registry: ModelRegistry, opening: Example, address: str, notice: str) -> None:
    only = ModelRegistry(registry.get(None))  # full is not loaded
    link = read_link(dict(parse_qsl(address[1:])), list(EXAMPLES.values()), only)
    example = EXAMPLES["dog"] if address.startswith("?example=dog") else opening
    assert (link.example, link.names, link.model, link.notice) == (example, example.names, None, notice)


def test_a_question_during_the_opening_counts(registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    page, session = build_page(registry), Session()
    opening = event(page, "open_page")
    request, values = SimpleNamespace(query_params={"example": "dog", "names": "sky"}), values_of(opening, session)
    segment = page.segmenter.segment_example

    def slow(*question: object, **options: object) -> Answer:
        ask(page, session, EXAMPLES["horses"].path, "dog, cat", overlay=VIEWER_DEFAULT)
        return segment(*question, **options)

    monkeypatch.setattr(page.segmenter, "segment_example", slow)
    shown, answered = map(by_id, opening.fn(values, request))
    assert shown["names"] == "sky" and session.answer.names == ["dog", "cat"] and set(answered) == {"state"}

    monkeypatch.undo()
    monkeypatch.setattr(SegmentTab, "draw", None)
    shown, answered = map(by_id, opening.fn(values_of(opening, Session()), request))
    assert texts.UNEXPECTED in answered["run-problem"]


def test_uploads_of_others_leave_the_photo_of_an_example(
    segmenter: Segmenter, opening: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo, cache = tmp_path / "photo.jpg", tmp_path / "cache"
    photo.write_bytes(Path(opening.path).read_bytes())
    os.utime(photo, (0, 0))
    with gr.Blocks():
        panel = InputPanel(segmenter, gr.State())
    monkeypatch.setattr(panel.photo, "GRADIO_CACHE", str(cache))
    monkeypatch.setenv(temporary.VARIABLE, str(cache))
    shown = panel.example(replace(opening, path=str(photo)), "dog")[panel.photo]
    temporary.remove_oldest()
    assert Path(shown).is_file()


def test_the_page_opens_with_an_answer(browser, url: str, opening: Example) -> None:
    visitor = Visitor(browser, url)
    page, names = visitor.page, opening.names.split(", ")
    assert visitor.legend() == [*names, "none of these"] and visitor.download("data")[0] == f"{OPENING}-segmentation.json"
    assert page.locator("#names textarea").input_value() == opening.names and page.locator("#stale .ldvc-notice").count() == 0
    assert f"{OPENING}.jpg" in page.locator("#photo img").get_attribute("src")
    places = {"Attention": "#attention-grid img", "Routing": "#routing-view .ldvc-stage", "Space": "#space-view svg"}
    for name, place in {**places, "Compare": "#compare-view img", "Segment": "#overlay canvas"}.items():
        open_tab(visitor, name, place)
        assert page.locator(f"#tab-{name.lower()} .ldvc-look").inner_text() == texts.LOOK_FOR[name.lower()]
    visitor.close()


def test_of_two_examples_that_are_not_answered_yet_the_last_counts(browser, page: gr.Blocks, monkeypatch) -> None:
    go_on, segment = threading.Event(), Segmenter.segment_example
    monkeypatch.setattr(Segmenter, "segment_example", lambda *each, **more: go_on.wait(60) and segment(*each, **more))
    visitor = Visitor(browser, page.local_url, opening=False)
    page, field = visitor.page, "names => document.querySelector('#names textarea').value === names"
    assert not page.locator("#photo img").count() and not page.locator("#share button").count()
    for example in (EXAMPLES["drums"], EXAMPLES["horses"]):
        page.get_by_role("button", name=example.title).click()
        page.wait_for_function(field, arg=EXAMPLES["drums"].names)  # at once, before the answer
    assert visitor.answers() == 0
    go_on.set()
    page.wait_for_function(field, arg=example.names)
    page.locator("#legend").get_by_text("horse").wait_for()
    assert visitor.legend()[:3] == example.names.split(", ")
    assert f"{example.key}.jpg" in page.locator("#photo img").get_attribute("src")
    assert visitor.download("data")[0] == f"{example.key}-segmentation.json"
    visitor.close()


def test_a_link_opens_the_answer_but_never_an_own_photo(browser, url: str, tmp_path: Path) -> None:
    visitor = Visitor(browser, url)
    page, button = visitor.page, visitor.page.get_by_role("button", name="Copy link")
    visitor.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visitor.ask(f"tower, 100 % tree+sky = 1 #2, {EVIL}")
    button.click()
    page.locator("#share").get_by_text(texts.LINK_COPIED).wait_for()
    friend = Visitor(browser, page.evaluate("navigator.clipboard.readText()"))
    assert friend.legend() == visitor.legend() and EVIL in friend.legend()
    assert np.array_equal(friend.painted(), visitor.painted())
    friend.close()
    own = tmp_path / "own.png"
    Image.open(DOG).resize((300, 200)).save(own)
    visitor.upload(own)
    visitor.ask("dog")
    page.locator("#share").get_by_text(texts.NO_LINK).wait_for()
    assert button.is_disabled()
    visitor.close()


def test_a_bad_link_opens_an_example(browser, url: str, opening: Example) -> None:
    visitor = Visitor(browser, url + ADDRESSES[2][0])
    visitor.page.locator("#run-problem").get_by_text(texts.LINK_EXAMPLE).wait_for()
    assert EVIL not in visitor.page.locator("body").inner_text() and visitor.legend()[0] == opening.names.split(", ")[0]
    visitor.close()
