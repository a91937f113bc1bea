"""The explaining tabs without a browser: what they draw for a visit, what they remember, and what they never compute again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from ldvc.predictor import COMPANY
from ldvc.web.handlers import LCSA_OFF, Handlers
from ldvc.web.models import Catalogue
from ldvc.web.session import Visit
from ldvc.web.tabs import program, texts
from ldvc.web.tabs.attention import SHOWN, AttentionTab
from ldvc.web.tabs.compare import CompareTab
from ldvc.web.tabs.routing import RoutingTab, spot_data
from ldvc.web.tabs.space import SpaceTab, space_data
from ldvc.web.views.routing import Spot
from tests.tiny import save_tiny_checkpoint

KINDS = (AttentionTab, RoutingTab, SpaceTab, CompareTab)


@pytest.fixture(scope="module")
def handlers(tmp_path_factory: pytest.TempPathFactory) -> Handlers:
    return Handlers(Catalogue(str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))))


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8))
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    small.resize((215, 130), Image.Resampling.BICUBIC).save(path)
    return str(path)


def build(handlers: Handlers) -> tuple[dict[type, Any], dict[str, Callable]]:
    """The tabs, in a page of their own, and the functions of their events and endpoints by name."""
    with gr.Blocks() as page:
        visit = gr.State(Visit())
        tabs = {kind: kind(handlers, visit) for kind in KINDS}
        for tab in tabs.values():
            tab.wire()
            tab.endpoints()
    return tabs, {each.name: each.fn for each in page.fns.values()}


@pytest.fixture(scope="module")
def built(handlers: Handlers) -> tuple[dict, dict]:
    return build(handlers)


@pytest.fixture(scope="module")
def tabs(built: tuple) -> dict:
    return built[0]


@pytest.fixture
def visit(handlers: Handlers, photo: str) -> Visit:
    return handlers.segment(photo, "dog, zebra, sofa | couch", None, Visit())


def value(update: object) -> object:
    """What an update sets."""
    return update["value"] if isinstance(update, dict) else getattr(update, "value", update)


def test_before_the_first_question_there_is_a_sentence(tabs: dict) -> None:
    for tab in tabs.values():
        changes = tab.update(Visit())
        assert set(changes) <= set(tab.outputs) and len(changes) == 2
        assert "Segment a photo first" in tab.empty.value


def test_drawing_encodes_nothing_again(
    tabs: dict, visit: Visit, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = handlers.models(visit).main
    monkeypatch.setattr(type(main), "encode_image", lambda *_: pytest.fail("the photo was encoded again"))
    for tab in tabs.values():
        changes = tab.draw(visit)
        assert set(changes) <= set(tab.outputs)
    assert set(visit.results) == {"ldvc", "ldvc_without_lcsa", "zegclip", "clip"}

    def segment(*_: object, **__: object) -> None:
        pytest.fail("an answer that was kept was computed again")

    monkeypatch.setattr(type(main), "segment", segment)
    for tab in tabs.values():
        tab.draw(visit)


def test_tabs_are_drawn_again_only_when_what_they_show_has_changed(
    tabs: dict, visit: Visit, handlers: Handlers
) -> None:
    for tab in tabs.values():
        tab.draw(visit)
    handlers.choose("zebra", visit)
    redrawn = [kind for kind, tab in tabs.items() if visit.drawn[tab.key] != tab.stamp(visit)]
    assert AttentionTab in redrawn and SpaceTab not in redrawn and CompareTab not in redrawn
    assert handlers.rethreshold(0.7, visit)
    assert all(visit.drawn[tab.key] != tab.stamp(visit) for tab in tabs.values())


def test_a_slow_drawing_never_covers_a_newer_answer(
    tabs: dict, visit: Visit, handlers: Handlers, photo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tab that is opened, and one that is clicked in, while a newer question is answered."""
    tab, drawn = tabs[CompareTab], []
    update = tab.update

    def overtaken(present: Visit) -> dict:
        drawn.append(present.names)
        changes = update(present)
        if len(drawn) == 1:
            visit.successor = handlers.segment(photo, "cat, dog", None, visit)
        return changes

    monkeypatch.setattr(tab, "update", overtaken)
    changes = tab.open(visit)
    assert drawn == [["dog", "zebra", "sofa"], ["cat", "dog"]]
    assert "cat" in changes[tab.view] and "zebra" not in changes[tab.view]
    assert visit.latest.open_tab == "compare" and visit.latest.drawn["compare"] == tab.stamp(visit.latest)
    assert tab.open(visit)["__type__"] == "update" and len(drawn) == 2, "what is shown is not drawn again"


    def click(present: Visit) -> dict:
        drawn.append(present.names)
        if len(drawn) == 4:
            present.successor = visit
        return tabs[RoutingTab].draw_pictures(present)

    old = handlers.segment(photo, "dog, zebra", None, Visit())
    assert tabs[RoutingTab].view in tab.unless_overtaken(old, click)
    assert tab.unless_overtaken(old, click)["__type__"] == "update"


def test_attention_settings_stay_for_the_next_question(
    tabs: dict, visit: Visit, handlers: Handlers, photo: str
) -> None:
    tab = tabs[AttentionTab]
    settings = tab.settings(visit)
    settings.layer, settings.head, settings.rescale, settings.off = 0, 1, True, True
    after = handlers.segment(photo, "cat, dog", None, visit)
    changes = tab.update(after)
    assert value(changes[tab.layer]) == 0 and value(changes[tab.head]) == 1
    assert texts.ATTENTION_SCALE_RESCALED in changes[tab.grid]
    assert changes[tab.grid].count("<figure") == 2 * 4  # two names, three decoders and the intervention
    assert texts.INTERVENTION in changes[tab.grid] and LCSA_OFF in after.results
    settings.layer, settings.head = 7, 99  # of a checkpoint with more of them
    assert value(tab.update(after)[tab.layer]) == 1 and value(tab.update(after)[tab.head]) == -1


def test_layers_and_heads_differ(tabs: dict, visit: Visit) -> None:
    tab = tabs[AttentionTab]
    drawn = set()
    for layer in (0, 1):
        for head in (None, 0, 1):
            settings = tab.settings(visit)
            settings.layer, settings.head = layer, head
            drawn.add(tab.draw_pictures(visit)[tab.grid])
    assert len(drawn) == 6


def test_many_names_are_chosen_from(tabs: dict, handlers: Handlers, photo: str) -> None:
    tab = tabs[AttentionTab]
    visit = handlers.segment(photo, ", ".join(f"thing {i}" for i in range(20)), None, Visit())
    changes = tab.update(visit)
    assert changes[tab.grid].count("<figure") == 3 * SHOWN
    tab.settings(visit).names = ["thing 19", "thing 3", "gone"]
    assert tab.shown(visit, tab.settings(visit)) == [3, 19]
    assert "thing 19" in tab.draw_pictures(visit)[tab.grid]


def test_one_name_has_company_that_can_be_removed(built: tuple, handlers: Handlers, photo: str) -> None:
    tabs, functions = built
    visit = handlers.segment(photo, "dog", None, Visit())
    tab, many = tabs[AttentionTab], handlers.segment(photo, "dog, cat", None, Visit())
    assert not tab.update(many)[tab.company].visible and texts.COMPANY_HELP not in tab.update(many)[tab.grid]
    for each in tabs.values():
        each.draw(visit)
    changes = tab.update(visit)
    assert changes[tab.company].visible and value(changes[tab.company]) and not value(changes[tab.note])
    assert texts.COMPANY_HELP in changes[tab.grid] and changes[tab.grid].count("<img") == 2 * 3

    changes = functions["keep_company"](False, visit)
    assert texts.COMPANY_HELP not in changes[tab.grid] and texts.ATTENTION_ONE in value(changes[tab.note])
    assert visit.drawn["attention"] == tab.stamp(visit)
    assert all(visit.drawn[each.key] != each.stamp(visit) for each in tabs.values() if each is not tab)
    after = handlers.segment(photo, "cat", None, visit)
    assert not value(tab.update(after)[tab.company]), "removed for the next question, too"


def test_spot_stays_within_the_next_grid(tabs: dict, visit: Visit) -> None:
    tab = tabs[RoutingTab]
    visit.kept["routing-spot"] = (500, -3)
    changes = tab.draw_pictures(visit)
    (result,) = tab.handlers.results(visit, "ldvc")
    assert (value(changes[tab.row]), value(changes[tab.column])) == (result.grid[0], 1)
    assert visit.kept["routing-spot"] == (result.grid[0] - 1, 0)


def test_checkpoint_with_one_decoder(tmp_path: Path, photo: str) -> None:
    handlers = Handlers(Catalogue(str(save_tiny_checkpoint(tmp_path, decoders=("ldvc",)))))
    visit = handlers.segment(photo, "dog, cat", None, Visit())
    tabs, _ = build(handlers)
    for tab in tabs.values():
        assert tab.draw(visit)
    attention, space, compare = tabs[AttentionTab], tabs[SpaceTab], tabs[CompareTab]
    assert attention.update(visit)[attention.grid].count(texts.DECODER_MISSING) == 2 * 2
    assert texts.DECODER_MISSING in value(space.update(visit)[space.note])
    assert compare.update(visit)[compare.view].count(texts.DECODER_MISSING) == 2


# ---- programs ---------------------------------------------------------------------------------------------------------


def test_layers_and_heads_of_programs_count_from_one(visit: Visit, handlers: Handlers) -> None:
    (result,) = handlers.results(visit, "ldvc")
    assert program.layer_and_head(result, 0, None) == (1, None)
    assert program.layer_and_head(result, 1, 2) == (0, 1)
    with pytest.raises(gr.Error, match="no layer 3; ask for 1 to 2"):
        program.layer_and_head(result, 3, 0)
    with pytest.raises(gr.Error, match="no head 5"):
        program.layer_and_head(result, 1, 5)


def test_numbers_for_programs(tabs: dict, visit: Visit, handlers: Handlers) -> None:
    (result,) = handlers.results(visit, "ldvc")
    data = spot_data(Spot.of(result, 0, 1, layer=1, head=None), result.names)
    assert data["company"] == []
    assert np.sum(data["token_attention"]) == pytest.approx(1, abs=5e-3)
    assert sum(data["softmax"].values()) == pytest.approx(1, abs=1e-3) and list(data["softmax"]) == visit.names
    assert max(np.ravel(data["affinities"])) == pytest.approx(data["regions"][0]["affinity"], abs=1e-3)
    found, words, missing = tabs[SpaceTab].space(visit)
    numbers = space_data(found, words, visit.names)
    assert not missing and words == ["dog", "zebra", "sofa", "couch"]
    ldvc, zegclip = numbers["decoders"]["ldvc"], numbers["decoders"]["zegclip"]
    assert ldvc["drift"]["classes"] == 0 == zegclip["drift"]["patches"]
    assert [each["class"] for each in ldvc["names"]] == ["dog", "zebra", "sofa", "sofa"]
    assert len(ldvc["patches"]["after"]) == result.grid[0] * result.grid[1]


def test_attention_for_programs(built: tuple, handlers: Handlers, photo: str) -> None:
    """Inside and outside a name's mask: by hand from the pixels; what is not there is nothing."""
    ask = built[1]["attention"]
    names = "dog, zebra, sofa | couch"
    *_, data, visit = ask(photo, names, "zebra", 1, 2)
    decoders = ["ldvc", "ldvc_without_lcsa", "zegclip", LCSA_OFF]
    assert list(data["attention"]) == list(data["inside"]) == list(data["outside"]) == decoders
    assert data["company"] == {"words": [], "attention": {}}
    for decoder, result in zip(decoders, handlers.results(visit, *decoders), strict=True):
        values = result.attention_at(result.cross_attention(layer=0, head=1)[1], result.size)
        inside = result.labels == 1
        for found, part in ((data["inside"][decoder], inside), (data["outside"][decoder], ~inside)):
            assert (found is None) == (not part.any()) or part.mean() < 0.01, "maps are measured at a smaller size"
            assert found is None or found == pytest.approx(values[part].mean(), abs=0.01)
    *_, data, visit = ask(photo, "dog", "dog")
    assert data["company"]["words"] == list(COMPANY) and list(data["company"]["attention"]) == decoders
    for decoder in decoders:
        both = np.add(data["attention"][decoder], data["company"]["attention"][decoder])
        assert np.allclose(both, 1, atol=1e-3)
    *_, data, visit = ask(photo, "dog", "dog", use_company=False, visit=visit)
    assert data["company"]["words"] == [] and np.allclose(data["attention"]["ldvc"], 1)
    *_, data, visit = ask(photo, "dog", "dog", visit=visit)
    assert data["company"]["words"] == list(COMPANY), "each call says for itself"
