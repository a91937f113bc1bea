"""The tabs without a browser: their output for an answer and widget values, and the results of the endpoints."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image
from pypdf import PdfReader

from ldvc.export import KINDS
from ldvc.predictor import COMPANY, Predictor
from ldvc.web import html, texts
from ldvc.web.api import Api, layer_and_head
from ldvc.web.models import ModelRegistry
from ldvc.web.segmenter import LCSA_OFF, Segmenter
from ldvc.web.session import Answer, Session
from ldvc.web.tabs import VIEWER_DEFAULT, Shared, Tab
from ldvc.web.tabs.attention import SHOWN, AttentionTab, make_company
from ldvc.web.tabs.attention_maps import INTERVENTION, RESCALED
from ldvc.web.tabs.compare import CompareTab
from ldvc.web.tabs.routing import RoutingTab
from ldvc.web.tabs.segment import SegmentTab, make_viewer
from ldvc.web.tabs.space import SpaceTab
from tests.test_tabs_views import Page
from tests.tiny import save_tiny_checkpoint

KINDS_OF_TABS = (SegmentTab, AttentionTab, RoutingTab, SpaceTab, CompareTab)


def build(segmenter: Segmenter) -> tuple[dict[type, Any], list[Any]]:
    """The tabs in a new page, and the events of this page."""
    with gr.Blocks() as page:
        shared = Shared(gr.State(Session()), make_viewer(), make_company())
        tabs = {kind: kind(segmenter, shared) for kind in KINDS_OF_TABS}
        for tab in tabs.values():
            tab.wire()
            tab.wire_files()
    return tabs, list(page.fns.values())


@pytest.fixture(scope="module")
def tabs(segmenter: Segmenter) -> dict:
    return build(segmenter)[0]


@pytest.fixture
def answer(segmenter: Segmenter, photo: str) -> Answer:
    return segmenter.segment(photo, "dog, zebra, sofa | couch")


def values(tab: Tab, session: Session | None = None, **changes: object) -> dict:
    """Values of a tab's inputs; `changes` are attributes of the tab, keys of the viewer's value, or `company`."""
    inputs = {widget: getattr(widget, "value", None) for widget in tab.inputs}
    viewer = VIEWER_DEFAULT | {key: changes.pop(key) for key in ("background", "alone", "thresholds") if key in changes}
    inputs |= {tab.shared.session: session or Session(), tab.shared.viewer: viewer}
    inputs[tab.shared.company] = changes.pop("company", True)
    return inputs | {getattr(tab, name): value for name, value in changes.items()}


def value(update: object) -> object:
    """The value that an update sets."""
    return update["value"] if isinstance(update, dict) else getattr(update, "value", update)


def shown_text(changes: dict) -> str:
    """The whole text of the updates of a tab."""
    return " ".join(str(getattr(change, "props", "")) + str(value(change)) for change in changes.values())


def test_before_the_first_question_there_is_a_sentence(tabs: dict) -> None:
    for tab in tabs.values():
        session = Session()
        changes = tab.open(values(tab, session))
        assert list(changes) == [tab.empty] and tab.empty_text in value(changes[tab.empty])
        assert session.open_tab == tab.key


def test_tabs_compute_nothing_twice(tabs: dict, answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Predictor, "encode_image", lambda *_: pytest.fail("the photo was encoded again"))
    session = Session(answer)
    for tab in tabs.values():
        assert set(tab.open(values(tab, session))) <= set(tab.outputs)
    assert {decoder for decoder, _ in answer.results} == {"ldvc", "ldvc_without_lcsa", "zegclip", "clip"}
    monkeypatch.setattr(Predictor, "segment", lambda *_, **__: pytest.fail("a result was computed again"))
    for tab in tabs.values():
        assert tab.open(values(tab, session)) == gr.skip(), "a tab with the present answer must not be drawn again"
        assert set(tab.open(values(tab, session, background=0.7))) <= set(tab.outputs)
        assert tab.open(values(tab, session, background=0.7)) == gr.skip()


@pytest.mark.parametrize("kind", KINDS_OF_TABS)
def test_no_tab_shows_an_answer_to_an_older_question(
    tabs: dict, answer: Answer, segmenter: Segmenter, photo: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question is answered while the tab is being drawn."""
    tab, session, drawn_answers = tabs[kind], Session(answer), []
    newer, draw = segmenter.segment(photo, "cat, dog"), tab.draw

    def overtaken(present: Answer, present_values: dict) -> dict:
        drawn_answers.append(present)
        session.answer = newer
        return draw(present, present_values)

    monkeypatch.setattr(tab, "draw", overtaken)
    changes = tab.open(values(tab, session))
    assert drawn_answers == [answer, newer] and "cat" in shown_text(changes) and "zebra" not in shown_text(changes)
    assert "zebra" not in shown_text(tab.blank(values(tab)))


def files_of(segmenter: Segmenter, kind: type, answer: Answer, **changes: object) -> dict[str, Path]:
    """The files of all buttons of a tab, by file name without the photo's name. Without an answer there is a sentence."""
    tabs, events = build(segmenter)
    tab, files = tabs[kind], {}
    for make in [each.fn for each in events if each.fn is not None and tab.files.file in each.outputs]:
        path, problem = make(values(tab, Session(answer), **changes))
        files[Path(path).name.partition("-")[2]] = Path(path)
        assert not problem and make(values(tab))[1] == html.problem(texts.EXPIRED)
    return files


def test_downloads_hold_what_is_on_the_screen(segmenter: Segmenter, answer: Answer) -> None:
    files = files_of(segmenter, SegmentTab, answer, background=1.0, alone="zebra")
    assert set(files) == set(KINDS.values())
    assert not np.asarray(Image.open(files["mask.png"])).any(), "no score reaches the threshold 1"


def test_all_tabs_and_files_follow_the_thresholds_of_single_classes(tabs: dict, answer: Answer) -> None:
    tab, viewer = tabs[SegmentTab], {"background": 0.0, "thresholds": {"zebra": 1.5, "gone": 0.3}}
    (usual,) = tab.results(answer, values(tab, background=0.0), "ldvc")
    assert (usual.labels == 1).any() and (usual.labels >= 0).all()
    mask = np.asarray(Image.open(io.BytesIO(tab.make("mask", answer, values(tab, **viewer))[1])))
    assert np.array_equal(mask, np.where(usual.labels == 1, 0, usual.labels + 1))
    for other in tabs.values():
        (result,) = other.results(answer, values(other, **viewer), "ldvc")
        assert result.thresholds == {"zebra": 1.0} and not (result.labels == 1).any()
        (result,) = other.results(answer, values(other, background=None, thresholds={"zebra": 1}), "ldvc")
        assert np.array_equal(result.labels, usual.labels), "thresholds have no effect without none of these"


@pytest.mark.parametrize(
    ("kind", "words"), [(AttentionTab, "switched off"), (SpaceTab, "before the decoder"), (CompareTab, "plain CLIP")]
)
def test_figures_of_a_tab(kind: type, words: str, segmenter: Segmenter, answer: Answer) -> None:
    options = {"layer": 0, "head": 1, "off": True} if kind is AttentionTab else {}
    files = files_of(segmenter, kind, answer, **options)
    suffixes = ["pdf", "svg", "png", *(["npz"] if kind is AttentionTab else [])]
    assert list(files) == [f"{kind.key}.{suffix}" for suffix in suffixes]
    (page,) = PdfReader(files[f"{kind.key}.pdf"]).pages
    assert "ZegCLIP" in page.extract_text() and words in page.extract_text()
    if kind is AttentionTab:
        assert {"ldvc/attention", "ldvc_lcsa_off/attention"} <= set(np.load(files["attention.npz"]))


def test_attention_follows_its_widgets(tabs: dict, answer: Answer) -> None:
    tab = tabs[AttentionTab]
    changes = tab.draw(answer, values(tab, layer=0, head=1, rescale=True, off=True))
    assert value(changes[tab.layer]) == 0 and value(changes[tab.head]) == 1 and RESCALED in changes[tab.grid]
    assert changes[tab.grid].count("<figure") == 3 * 4 and INTERVENTION in changes[tab.grid]
    assert (LCSA_OFF, False) in answer.results
    changes = tab.draw(answer, values(tab, layer=7, head=99))  # indices beyond the layers and heads of this checkpoint
    assert value(changes[tab.layer]) == 1 and value(changes[tab.head]) == -1
    table, slider = tab.draw_table(answer, values(tab, layer=0)), tab.draw_slider(answer, values(tab, layer=0))
    assert set(table) == {tab.note, tab.grid} and set(slider) == {tab.slider}, "table and slider are drawn separately"
    grids = {tab.draw(answer, values(tab, layer=layer, head=head))[tab.grid] for layer in (0, 1) for head in (-1, 0, 1)}
    assert len(grids) == 6
    assert value(tab.draw(answer, values(tab, alone="zebra"))[tab.name]) == "zebra"
    assert value(tab.draw(answer, values(tab, name="sofa"))[tab.name]) == "sofa"
    assert value(tab.draw(answer, values(tab, name="horse"))[tab.name]) == "dog"


def test_many_names_are_chosen_from(tabs: dict, segmenter: Segmenter, photo: str) -> None:
    tab = tabs[AttentionTab]
    answer = segmenter.segment(photo, ", ".join(f"thing {i}" for i in range(20)))
    assert tab.draw(answer, values(tab))[tab.grid].count("<figure") == 3 * (SHOWN + 1)
    changes = tab.draw(answer, values(tab, names=["thing 19", "thing 3", "gone"]))
    assert value(changes[tab.names]) == ["thing 3", "thing 19"] and changes[tab.grid].count("<figure") == 3 * 3


def test_heads_are_drawn_when_they_are_wanted(tabs: dict, answer: Answer) -> None:
    tab: AttentionTab = tabs[AttentionTab]
    assert tab.draw(answer, values(tab))[tab.heads_view].props["maps"] == ""
    settings = {"heads": True, "heads_name": "zebra", "layer": 0, "head": 1}
    for chosen, off, decoder in (("zegclip", False, "zegclip"), (LCSA_OFF, False, "ldvc"), (LCSA_OFF, True, LCSA_OFF)):
        changes = tab.draw(answer, values(tab, **settings, heads_decoder=chosen, off=off))
        page = Page(changes[tab.heads_view].props["maps"])
        (pressed,) = [each for each in page.all("button") if each["aria-pressed"] == "true"]
        assert (pressed["data-layer"], pressed["data-head"], value(changes[tab.heads_decoder])) == ("0", "1", decoder)
        assert "zebra" in page.text and texts.DECODER_TITLES[decoder] in page.text
    assert value(tab.draw(answer, values(tab, heads=True, alone="sofa"))[tab.heads_name]) == "sofa"


def test_the_chosen_patch_stays_within_the_grid(tabs: dict, answer: Answer) -> None:
    tab = tabs[RoutingTab]
    (result,) = tab.results(answer, values(tab), "ldvc")
    changes = tab.draw(answer, values(tab, view=[500, -3]))
    assert (changes[tab.row], changes[tab.column]) == (result.grid[0], 1)
    assert value(changes[tab.view]) == [result.grid[0] - 1, 0]
    changes = tab.draw(answer, values(tab))
    assert (changes[tab.row], changes[tab.column]) == (result.grid[0] // 2 + 1, result.grid[1] // 2 + 1)


def test_checkpoint_with_one_decoder(tmp_path: Path, photo: str) -> None:
    segmenter = Segmenter(ModelRegistry(str(save_tiny_checkpoint(tmp_path, decoders=("ldvc",)))))
    answer, tabs = segmenter.segment(photo, "dog, cat"), build(segmenter)[0]
    drawn = {kind: tab.draw(answer, values(tab)) for kind, tab in tabs.items()}
    assert drawn[AttentionTab][tabs[AttentionTab].grid].count(texts.DECODER_MISSING) == 3 * 2
    assert segmenter.model(answer).decoders() == ["ldvc", "clip"]
    assert "/" not in segmenter.model(answer).name, "the name must have no folder"
    assert drawn[CompareTab][tabs[CompareTab].view].count(texts.DECODER_HOW) == 2
    for kind in (AttentionTab, SpaceTab):
        assert value(drawn[kind][tabs[kind].note]).count(texts.DECODER_HOW) == 1


@pytest.fixture(scope="module")
def api(segmenter: Segmenter, tabs: dict) -> Api:
    return Api(segmenter, tabs[SegmentTab].write)


def test_places_of_programs_count_from_one(api: Api, photo: str, answer: Answer, segmenter: Segmenter) -> None:
    (result,) = segmenter.results(answer, "ldvc")
    assert layer_and_head(result, 0, None) == (1, None) and layer_and_head(result, 1, 2) == (0, 1)
    for wrong, sentence in (
        ({"layer": 3}, "no layer 3; ask for 1 to 2"),
        ({"head": 5}, "no head 5"),
        ({"row": 999}, "no patch in row 999"),
    ):
        with pytest.raises(gr.Error, match=sentence):
            api.routing(photo, "dog", **wrong)


def test_numbers_for_programs(api: Api, photo: str) -> None:
    names = "dog, zebra, sofa | couch"
    data, session = api.routing(photo, names, 1, 2)
    assert data["company"] == [] and data["patch"] == {"row": 1, "column": 2}
    assert np.sum(data["token_attention"]) == pytest.approx(1, abs=5e-3)
    shares = [*data["softmax"].values(), data["none_of_these"]]
    assert sum(shares) == pytest.approx(1, abs=1e-3) and list(data["softmax"]) == session.answer.names
    assert max(np.ravel(data["affinities"])) == pytest.approx(data["regions"][0]["affinity"], abs=1e-3)
    image = session.answer.image
    numbers, after = api.space(photo, names, session=session)
    assert after is session and session.answer.image is image, "the photo must not be encoded again"
    ldvc, zegclip = numbers["decoders"]["ldvc"], numbers["decoders"]["zegclip"]
    assert ldvc["drift"]["classes"] == 0 == zegclip["drift"]["patches"]
    assert [each["class"] for each in ldvc["names"]] == ["dog", "zebra", "sofa", "sofa"]
    assert len(ldvc["patches"]["after"]) == data["grid"]["rows"] * data["grid"]["columns"]


def test_attention_for_programs(api: Api, segmenter: Segmenter, photo: str) -> None:
    """The means inside and outside a name's mask, against the pixels of the photo."""
    names, decoders = "dog, zebra, sofa | couch", ["ldvc", "ldvc_without_lcsa", "zegclip", LCSA_OFF]
    *_, data, session = api.attention(photo, names, "zebra", 1, 2)
    assert list(data["attention"]) == list(data["inside"]) == list(data["outside"]) == decoders
    assert data["company"] == {"words": [], "attention": {}}
    for decoder, result in zip(decoders, segmenter.results(session.answer, *decoders), strict=True):
        attention = result.attention_at(result.cross_attention(layer=0, head=1)[1], result.size)
        inside = result.labels == 1
        for mean, part in ((data["inside"][decoder], inside), (data["outside"][decoder], ~inside)):
            assert (mean is None) == (not part.any()) or part.mean() < 0.01, "maps are measured at a smaller size"
            assert mean is None or mean == pytest.approx(attention[part].mean(), abs=0.01)


def test_company_for_programs(api: Api, photo: str) -> None:
    """Each call chooses whether a single name has company."""
    session = None
    for use_company in (True, False, True):
        *_, data, session = api.attention(photo, "dog", "dog", use_company=use_company, session=session)
        assert data["company"]["words"] == (list(COMPANY) if use_company else [])
        company, none = data["company"]["attention"].get("ldvc", 0), data["none_of_these"]["ldvc"]
        assert np.allclose(np.array(data["attention"]["ldvc"]) + company + none, 1, atol=1e-3)


def test_thresholds_for_programs(api: Api, photo: str) -> None:
    for endpoint in (api.segment, api.compare, api.download):
        with pytest.raises(gr.Error, match="true or false, not “no”"):
            endpoint(photo, "dog", "no")
        for threshold in (-0.1, 1.5, "abc", float("nan")):
            with pytest.raises(gr.Error, match="number from 0 to 1"):
                endpoint(photo, "dog", True, threshold)
        *_, session = endpoint(photo, "dog", True, 1.0)
        assert session.answer.names == ["dog"]


def test_areas_for_programs(api: Api, photo: str) -> None:
    painted, labels, data, _ = api.segment(photo, ["dog", "zebra"], True, 0.5)
    assert painted.shape[:2] == labels.shape and [each["name"] for each in data["classes"]] == ["dog", "zebra"]
    areas = [data["none_of_these"], *(each["area"] for each in data["classes"])]
    assert areas == pytest.approx([(labels == index).mean() for index in range(3)], abs=1e-3)
    _, _, data, _ = api.segment(photo, "dog", use_background=False)
    assert data["threshold"] is data["none_of_these"] is None
    pictures, compared, _ = api.compare(photo, "dog, zebra", use_background=False)
    assert len(pictures) == len(compared["decoders"]) == 4
    assert all(sum(each["area"].values()) == pytest.approx(1, abs=1e-3) for each in compared["decoders"].values())


def test_vocabularies_for_programs(api: Api) -> None:
    titles, voc = api.vocabulary("")["vocabularies"], api.vocabulary("voc20")
    assert voc["title"] == titles["voc20"] and len(voc["classes"]) == 20
    assert voc["classes"][11] == {"name": "dog", "seen": True}
    with pytest.raises(gr.Error, match="no vocabulary “klingon”; choose one of household"):
        api.vocabulary("klingon")
    with pytest.raises(gr.Error, match="choose one of overlay"):
        api.download(None, "dog", kind="klingon")


def test_numbers_and_scale_bar() -> None:
    assert [html.number(0.5), html.number(-12.049, 1), html.number(-0.001)] == ["0.50", "−12.0", "0.00"]
    bar = html.scale_bar("Share", 0.031, 0.043)
    assert re.findall(r">(0\.\d{3})<", bar) == ["0.031", "0.034", "0.037", "0.040", "0.043"] and 'aria-label="Share' in bar
