"""The choice "full": a CLIP that needs no decoder, with a tiny one in place of ViT-B/16, and its download."""

import inspect
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError

from ldvc.config import DECODERS, FULL_CLIP_SETTINGS
from ldvc.errors import WeightsNotFoundError
from ldvc.modeling import clip_weights
from ldvc.predictor import Predictor
from ldvc.web import models, texts
from ldvc.web.api import Api
from ldvc.web.models import ModelRegistry
from ldvc.web.page import build_page, launch_options
from ldvc.web.segmenter import LCSA_OFF, Segmenter
from ldvc.web.session import Problem, Session
from ldvc.web.tabs.attention import AttentionTab
from ldvc.web.tabs.compare import CompareTab
from ldvc.web.tabs.patch import READINGS
from ldvc.web.tabs.routing import RoutingTab
from ldvc.web.tabs.segment import SegmentTab
from ldvc.web.tabs.space import SpaceTab
from tests.browsing import DOG, Visitor, open_tab
from tests.test_tabs import build, shown_text, value, values
from tests.tiny import name_tiny_clip, save_tiny_checkpoint


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelRegistry]:
    """A tiny checkpoint in place of lite, and a tiny CLIP in place of the full one."""
    with pytest.MonkeyPatch.context() as patch:
        name_tiny_clip(tmp_path_factory.mktemp("clip"), patch)
        yield ModelRegistry(str(save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "small")))


@pytest.fixture(scope="module")
def segmenter(registry: ModelRegistry) -> Segmenter:
    return Segmenter(registry)


def test_every_tab_works_or_says_how_to_get_what_is_missing(segmenter: Segmenter, photo: str) -> None:
    answer, (tabs, _) = segmenter.segment(photo, "dog, grass", model="full"), build(segmenter)
    assert (answer.model, answer.decoder) == ("full", "clip") and segmenter.model(answer).decoders() == ["clip"]
    (result, *missing) = segmenter.results(answer, "clip", *DECODERS, LCSA_OFF)
    assert result.background == segmenter.threshold(answer) == 0.15 and missing == [None] * 4
    drawn = {kind: tab.draw(answer, values(tab)) for kind, tab in tabs.items()}
    viewer = drawn[SegmentTab][tabs[SegmentTab].viewer].props["answer"]
    assert [each["seen"] for each in viewer["classes"]] == [False, False] and viewer["own_threshold"] == 0.15
    assert shown_text(drawn[CompareTab]).count(texts.NO_DECODER.replace("<", "&lt;").replace(">", "&gt;")) == 3
    assert tabs[CompareTab].draw_file("png", answer, values(tabs[CompareTab])).startswith(b"\x89PNG")
    for kind in (AttentionTab, RoutingTab, SpaceTab):
        assert "LDVC_FULL=" in shown_text(drawn[kind]) and not drawn[kind][tabs[kind].body].visible, kind


def test_the_attention_of_the_patch_that_was_clicked(segmenter: Segmenter, photo: str) -> None:
    answer, tab = segmenter.segment(photo, "dog, grass", model="full"), build(segmenter)[0][AttentionTab]
    (result,) = segmenter.results(answer, "clip")
    rows, columns = result.grid
    route = tab.draw(answer, values(tab))[tab.patch].props["route"]
    assert f'data-row="{rows // 2}" data-column="{columns // 2}"' in route, "before a click it is the middle"
    assert READINGS["sc_clip"] in route
    clicked = tab.draw_patch(answer, values(tab, patch=[2, 3]))[tab.patch].props["route"]
    attention = result.patch_attention(2, 3)
    row, column = np.unravel_index(attention.argmax(), attention.shape)
    assert f"to row {row + 1}, column {column + 1}." in clicked and 'data-row="2" data-column="3"' in clicked
    outside = tab.draw_patch(answer, values(tab, patch=[900, -5]))[tab.patch].props["route"]
    assert f'data-row="{rows - 1}" data-column="0"' in outside
    assert tab.blank(values(tab))[tab.patch].props["route"] == ""
    small = segmenter.segment(photo, "dog, grass")
    changes = tab.draw(small, values(tab))
    assert not changes[tab.patch_body].visible and changes[tab.body].visible and value(changes[tab.missing]) == ""


def test_programs(segmenter: Segmenter, photo: str) -> None:
    tabs = build(segmenter)[0]
    api, names = Api(segmenter, tabs[SegmentTab].write), "dog, grass"
    _, labels, data, session = api.segment(photo, names, model="full")
    assert (data["model"], data["decoder"], data["threshold"]) == ("full", "clip", 0.15) and labels.max() <= 2
    gallery, data, session = api.compare(photo, names, model="full", session=session)
    assert [title for _, title in gallery] == [texts.DECODER_TITLES["clip"]]
    assert data["decoders"]["clip"]["differs_from_ldvc"] is None
    assert data["missing"] == dict.fromkeys(("zegclip", "ldvc_without_lcsa", "ldvc"), texts.NO_DECODER)
    *maps, data, session = api.attention(photo, names, "dog", row=2, column=3, model="full", session=session)
    assert maps == [None] * 3 and data["attention"] == {} and set(data["missing"]) == {*DECODERS, LCSA_OFF}
    assert (data["patch"]["row"], data["patch"]["column"]) == (2, 3)
    (result,) = segmenter.results(session.answer, "clip")
    np.testing.assert_allclose(data["patch"]["attention"], result.patch_attention(1, 2), atol=1e-5)
    for endpoint in (api.routing, api.space):
        with pytest.raises(gr.Error, match="train one .* LDVC_FULL"):
            endpoint(photo, names, model="full", session=session)
    path, session = api.download(photo, names, kind="data", model="full", session=session)
    assert json.loads(Path(path).read_text("utf-8"))["model"]["decoder"] == "clip"
    with pytest.raises(gr.Error, match="choose one of"):
        api.segment(photo, names, model="huge")


def test_with_a_decoder_plain_clip_is_dense_beside_it(tmp_path: Path, registry: ModelRegistry, photo: str) -> None:
    full = save_tiny_checkpoint(tmp_path / "full", metadata={"plain_clip": FULL_CLIP_SETTINGS, "seen_names": []})
    both = Segmenter(ModelRegistry(registry.get(None), str(full)))
    answer, (tabs, _) = both.segment(photo, "dog, grass", model="full"), build(both)
    assert answer.decoder == "ldvc" and both.missing(answer, *DECODERS, "clip", LCSA_OFF) == {}
    tab = tabs[AttentionTab]
    changes = tab.draw(answer, values(tab))
    assert changes[tab.body].visible and changes[tab.patch_body].visible and "<figure" in changes[tab.grid]
    assert READINGS["sc_clip"] in changes[tab.patch].props["route"]


def test_the_page_can_open_with_it(registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDVC_MODEL", "full")
    monkeypatch.delenv("LDVC_FULL", raising=False)
    opened = ModelRegistry.from_environment()
    assert opened.choices == ["full", "lite"] and opened.get(None).decoder == "clip" and opened.get(None).name == "full"
    monkeypatch.setenv("LDVC_CLIP_WEIGHTS", "/nowhere/weights.pt")
    with pytest.raises(Problem, match="could not be loaded.*no file /nowhere/weights.pt"):
        ModelRegistry.from_environment()


def test_a_decoder_that_could_not_be_fetched_is_fetched_again(
    tmp_path: Path, photo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = Segmenter(ModelRegistry(str(save_tiny_checkpoint(tmp_path, decoders=("ldvc", "zegclip")))))
    answer, real, fails = segmenter.segment(photo, "dog, cat"), Predictor.sibling, [True]

    def sibling(self: Predictor, decoder: str) -> Predictor:
        if fails:
            raise WeightsNotFoundError("The Hub does not answer.")
        return real(self, decoder)

    monkeypatch.setattr(Predictor, "sibling", sibling)
    assert segmenter.results(answer, "zegclip") == [None]
    assert segmenter.missing(answer, "zegclip") == {"zegclip": texts.DECODER_FAILED}
    fails.clear()
    (result,) = segmenter.results(answer, "zegclip")
    assert result.decoder == "zegclip" and segmenter.missing(answer, "zegclip") == {}
    assert segmenter.missing(answer, "ldvc_without_lcsa") == {"ldvc_without_lcsa": texts.DECODER_HOW}


class Hub:
    """A stand-in for `find_pretrained` that waits for `go_on`, or fails."""

    def __init__(self) -> None:
        self.calls, self.fails, self.done = 0, False, False
        self.started, self.go_on = threading.Event(), threading.Event()

    def fetch(self, clip: str, pretrained: str, *, tqdm_class: Any = None) -> None:
        self.calls += 1
        with tqdm_class(total=600_000_000, initial=0, unit="B", unit_scale=True, desc="weights", disable=None) as bar:
            bar.update(150_000_000)
            self.started.set()
            assert self.go_on.wait(60)
            if self.fails:
                raise WeightsNotFoundError("The connection broke.")
        self.done = True


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The weights are missing until they are downloaded from this Hub."""
    hub = Hub()
    monkeypatch.setattr(models, "find_pretrained", hub.fetch)
    monkeypatch.setattr(models, "hub_reachable", lambda: True)
    missing = {True: None, False: ("ViT", "openai")}
    monkeypatch.setattr(models, "clip_to_download", lambda source: missing[source != "full" or hub.done])
    return hub


@pytest.fixture
def fresh(registry: ModelRegistry, hub: Hub) -> ModelRegistry:
    return ModelRegistry(registry.get(None))


def choose(page: gr.Blocks, session: Session, model: str) -> Iterator[dict]:
    """Choose a model; yields the changes by elem_id."""
    (event,) = (each for each in page.fns.values() if each.name == "choose_model")
    given = {each: session if isinstance(each, gr.State) else {"model": model}.get(each.elem_id) for each in event.inputs}
    for changes in event.fn(given):
        yield {component.elem_id: value(change) for component, change in changes.items()}


def test_a_download_shows_how_far_it_is_and_lite_answers_meanwhile(fresh: ModelRegistry, hub: Hub, photo: str) -> None:
    page, session, segmenter = build_page(fresh), Session(), Segmenter(fresh)
    assert texts.FULL_DOWNLOAD in str(page.get_config_file()["components"]), "size and time are said before"
    steps = choose(page, session, "full")
    next(steps)
    assert hub.started.wait(60)
    during = next(steps)["model-problem"]
    assert "150 of 600 MB" in during and 'value="0.250"' in during
    assert segmenter.segment(photo, "dog").model == fresh.default
    with pytest.raises(Problem, match="being downloaded: 150 of 600 MB. Ask again"):
        segmenter.segment(photo, "dog", model="full")
    other = choose(page, Session(), "full")
    assert "150 of 600 MB" in next(other)["model-problem"] and hub.calls == 1, "two visitors wait for one download"
    left = Session()
    steps_of_left = choose(page, left, "full")
    next(steps_of_left)
    assert [changes["model-problem"] for changes in choose(page, left, fresh.default)] == [""]
    assert list(steps_of_left) == [], "who chooses lite meanwhile gets no more news of the download"
    hub.go_on.set()
    *_, last = steps
    assert last["model-problem"] == "" and segmenter.segment(photo, "dog", model="full").decoder == "clip"
    assert texts.FULL_DOWNLOAD not in str(build_page(fresh).get_config_file()["components"])


def test_a_failed_download_is_tried_again(fresh: ModelRegistry, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    page, session = build_page(fresh), Session()
    monkeypatch.setattr(models, "hub_reachable", lambda: False)
    *_, last = choose(page, session, "full")
    assert "cannot be reached: connect to the network" in last["model-problem"] and hub.calls == 0
    monkeypatch.setattr(models, "hub_reachable", lambda: True)
    hub.fails = True
    hub.go_on.set()
    *_, last = choose(page, session, "full")
    assert "could not be loaded" in last["model-problem"] and "The connection broke." in last["model-problem"]
    hub.fails = False
    *_, last = choose(page, session, "full")
    assert last["model-problem"] == "" and hub.calls == 2 and fresh.get("full").decoder == "clip"


def test_weights_come_from_the_hub_with_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As safetensors, or where there are none as open_clip's other file; a stand-in has the true signature."""
    monkeypatch.delenv("LDVC_CLIP_WEIGHTS", raising=False)
    monkeypatch.setattr(clip_weights, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(clip_weights, "hub_reachable", lambda: True)
    signature, asked = inspect.signature(huggingface_hub.hf_hub_download), []

    def download(*arguments: Any, **options: Any) -> str:
        given = signature.bind(*arguments, **options).arguments
        asked.append((given["repo_id"], given["filename"], given["tqdm_class"]))
        if given["filename"].endswith(".safetensors"):
            raise EntryNotFoundError("404")
        return str(tmp_path / given["filename"])

    monkeypatch.setattr(clip_weights, "hf_hub_download", download)
    path, _ = clip_weights.find_pretrained("ViT-B-16-quickgelu", "openai", tqdm_class=dict)
    repository = "timm/vit_base_patch16_clip_224.openai"
    names = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    assert asked == [(repository, name, dict) for name in names] and path == tmp_path / names[1]


@pytest.fixture
def address(registry: ModelRegistry) -> Iterator[str]:
    page = build_page(registry)
    page.launch(**launch_options(), prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield page.local_url
    page.close()


def test_a_visitor_chooses_full(browser, address: str) -> None:
    visitor = Visitor(browser, address, opening=False)
    page = visitor.page
    visitor.upload(DOG)
    page.locator("#model input").click()
    with page.expect_response("**/queue/join*"):
        page.get_by_role("option", name="full").click()
    chip = page.locator("#chips .ldvc-unseen")  # of the full model, which has seen no masks
    visitor.type_names("dog")
    chip.wait_for()
    page.locator("#model-problem .ldvc-notice").wait_for(state="detached")
    visitor.ask("dog, grass, sky")
    assert visitor.legend()[:3] == ["dog", "grass", "sky"]
    open_tab(visitor, "Attention", "#attention-patch .ldvc-stage")
    stage = page.locator("#attention-patch .ldvc-stage")
    before = stage.get_attribute("data-column")
    assert "LDVC_FULL" in page.locator("#attention-missing").inner_text() and page.locator("#attention-grid").is_hidden()
    stage.click(position={"x": 12, "y": 12})
    page.locator('#attention-patch .ldvc-stage[data-row="0"][data-column="0"]').wait_for()
    assert before != "0"
    stage.press("ArrowRight")
    page.locator('#attention-patch .ldvc-stage[data-row="0"][data-column="1"]').wait_for()
    for name, sentence in (("Routing", "Routing is a part"), ("Space", "what a decoder moves")):
        page.get_by_role("tab", name=name, exact=True).click()
        said = page.locator(f"#tab-{name.lower()} .ldvc-empty")
        said.get_by_text(sentence).wait_for()
        assert "LDVC_FULL" in said.inner_text()
    open_tab(visitor, "Compare", "#compare-view img")
    assert page.locator("#compare-view img").count() == 1
    assert page.locator("#compare-view .ldvc-map-missing").get_by_text("LDVC_FULL").count() == 3
    visitor.close()
