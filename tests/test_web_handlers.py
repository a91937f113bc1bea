"""What the page does, without a browser: answers, sentences for problems, and nothing lost or shared."""

from __future__ import annotations

import io
import json
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from ldvc.class_names import class_lists, synonyms_of
from ldvc.predictor import COMPANY
from ldvc.web import html, models, texts
from ldvc.web.downloads import KINDS, Identity
from ldvc.web.handlers import LCSA_OFF, Handlers, checked_background
from ldvc.web.inputs import EXAMPLES_FOLDER, read_examples, uploaded_file
from ldvc.web.models import Catalogue, Models
from ldvc.web.page import build_page
from ldvc.web.session import OWN_THRESHOLD, Problem, Visit
from ldvc.web.tabs.segment import SegmentTab
from ldvc.web.views.inline import photo_uri
from ldvc.web.views.segmentation import MAPS_SHOWN, class_maps, viewer_data
from tests.tiny import save_tiny_checkpoint

EVIL = "<img src=x onerror=alert(1)>"
IDENTITY = Identity("tiny", "0" * 64)


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def catalogue(checkpoint_folder: Path) -> Catalogue:
    return Catalogue(str(checkpoint_folder))


@pytest.fixture(scope="module")
def handlers(catalogue: Catalogue) -> Handlers:
    return Handlers(catalogue)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (6, 9, 3), dtype=np.uint8))
    path = tmp_path_factory.mktemp("photos") / "my photo.v2.png"
    small.resize((360, 240), Image.Resampling.BICUBIC).save(path)
    return str(path)


# ---- asking -----------------------------------------------------------------------------------------------------------


def test_first_answer(handlers: Handlers, photo: str) -> None:
    visit = handlers.segment(photo, " dog, Zebra | donkey,dog ", None, Visit())
    assert visit.asked == ["dog", "Zebra | donkey"] and visit.names == ["dog", "Zebra"]
    assert visit.chosen == "dog" and visit.background is None
    (result,) = handlers.results(visit, "ldvc")
    assert result.size == (240, 360) and result.seen == [True, False]
    assert visit.photo_name == "my photo.v2.png"


def test_programs_may_give_a_list_and_mistakes_of_theirs_are_sentences(handlers: Handlers, photo: str) -> None:
    visit = handlers.segment(photo, ["dog", "sofa | couch"], None, Visit())
    assert visit.asked == ["dog", "sofa | couch"]
    for names in ({"dog": 1}, ["dog", 3]):
        with pytest.raises(Problem) as caught:
            handlers.segment(photo, names, None, Visit())
        assert caught.value.field == "names"


def test_what_programs_say_about_none_of_these() -> None:
    for flag in (None, False, 0):
        assert checked_background(flag, None) is None and checked_background(flag, "abc") is None
    assert checked_background(True, None) == OWN_THRESHOLD and checked_background(True, 0.3) == 0.3
    with pytest.raises(Problem, match="true or false, not “no”") as caught:
        checked_background("no", 0.5)
    assert caught.value.field == "run"
    for threshold in (-0.1, 1.5, "abc", float("nan")):
        with pytest.raises(Problem, match="number from 0 to 1"):
            checked_background(True, threshold)


def test_a_forgotten_visit_is_answered_with_a_sentence(handlers: Handlers, photo: str) -> None:
    with gr.Blocks():
        tab = SegmentTab(handlers, gr.State(Visit()))
    for kind in KINDS:
        _, problem = tab._maker(kind)(Visit(), None)
        assert html.problem(texts.FORGOTTEN) == problem.value and problem.visible
    set_there = {"opacity": 0.5, "outline": True, "alone": None, "background": 0.5}
    assert texts.FORGOTTEN in tab._move_threshold(Visit(), set_there)[tab.problem].value
    after = handlers.segment(photo, "dog, cat", None, Visit())
    for changes in (tab.update(after), tab.repaint(after)):
        assert not changes[tab.problem].visible and tab.problem in tab.outputs, "once there is an answer, it goes"


def test_what_is_set_while_an_answer_is_computed_is_set_in_the_answer(
    catalogue: Catalogue, photo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = Handlers.segment
    before = segment(Handlers(catalogue), photo, "dog, cat", None, Visit())

    def meanwhile(self: Handlers, *asked: object, **options: object) -> Visit:
        after = segment(self, *asked, **options)
        assert self.rethreshold(0.8, before) and self.choose("cat", before)
        return after

    page = build_page(catalogue)
    (press,) = (each for each in page.fns.values() if each.name == "press_segment")
    monkeypatch.setattr(Handlers, "segment", meanwhile)
    changes = press.fn(photo, "dog, cat, cow", None, before)
    (after,) = (value for value in changes.values() if isinstance(value, Visit))
    assert (after.names, after.background, after.chosen) == (["dog", "cat", "cow"], 0.8, "cat")
    assert before.latest is after
    refused = press.fn(photo, " ", None, after)
    assert after.latest is after and not any(isinstance(value, Visit) for value in refused.values())

    def fails(*_: object) -> None:
        raise RuntimeError("no drawing today")

    monkeypatch.setattr(Handlers, "segment", segment)
    monkeypatch.setattr(SegmentTab, "update", fails)
    told = press.fn(photo, "dog, sky", None, after)
    assert after.latest is after, "what is shown stays, and so does what is set in it"
    assert any(texts.UNEXPECTED in str(getattr(value, "value", "")) for value in told.values())


def test_who_asks_for_a_loaded_model_does_not_wait_for_one_that_is_being_loaded(
    checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, go_on = threading.Event(), threading.Event()
    catalogue = Catalogue(str(checkpoint_folder), full=str(checkpoint_folder))
    real = models.Models

    def slow(source: str) -> Models:
        loading.set()
        assert go_on.wait(30)
        return real(source)

    monkeypatch.setattr(models, "Models", slow)
    with ThreadPoolExecutor(1) as pool:
        full = pool.submit(catalogue.get, "full")
        assert loading.wait(30)
        assert catalogue.get(None) is catalogue.get(catalogue.default)  # while the other is on its way
        go_on.set()
        assert full.result() is catalogue.get("full")


def test_decoders_are_computed_when_they_are_asked_for(
    handlers: Handlers, photo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit = handlers.segment(photo, "dog, cat", 0.5, Visit())
    assert list(visit.results) == ["ldvc"]
    main = handlers.models(visit).main
    monkeypatch.setattr(main, "encode_image", lambda image: pytest.fail("the photo was encoded again"))
    decoders = ["ldvc_without_lcsa", "zegclip", "clip", LCSA_OFF]
    results = handlers.results(visit, *decoders)
    assert [result.decoder for result in results[:3]] == decoders[:3]
    assert all(result.background == 0.5 for result in results)
    main_logits, off = visit.results["ldvc"]._outputs[0].logits, visit.results[LCSA_OFF]._outputs[0].logits
    assert off.shape == main_logits.shape and not torch.allclose(off, main_logits)
    assert handlers.results(visit, "zegclip")[0] is results[1], "a result is kept"


def test_new_names_do_not_encode_the_photo_again(
    handlers: Handlers, photo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit = handlers.segment(photo, "dog, cat", None, Visit())
    main = handlers.models(visit).main
    monkeypatch.setattr(main, "encode_image", lambda image: pytest.fail("the photo was encoded again"))
    after = handlers.segment(photo, "sky, cat, tree", None, visit)
    assert after.image is visit.image and after.names == ["sky", "cat", "tree"]
    assert after.version > visit.version and list(after.results) == ["ldvc"]
    handlers.choose("cat", after)
    assert handlers.segment(photo, "cat, tree", None, after).chosen == "cat", "the choice stays while the name does"
    assert not handlers.choose("horse", after) and after.chosen == "cat"


def test_threshold(handlers: Handlers, photo: str) -> None:
    visit = handlers.segment(photo, "dog, cat", 1.0, Visit())
    assert (handlers.results(visit, "ldvc")[0].labels == -1).mean() > 0.99
    assert handlers.rethreshold(0.0, visit) and visit.background == 0.0
    assert (handlers.results(visit, "ldvc")[0].labels >= 0).all()
    version = visit.version
    assert not handlers.rethreshold(0.0, visit) and visit.version == version, "nothing new, nothing drawn"
    assert handlers.rethreshold(7, visit) and visit.background == 1.0
    assert handlers.rethreshold(None, visit) and visit.background is None
    assert not handlers.rethreshold(0.5, Visit())


def test_none_of_these_is_the_default_and_stays_unticked(handlers: Handlers, photo: str) -> None:
    first = Visit()
    visit = handlers.segment(photo, "dog, cat", first.background, first)
    own = handlers.models(visit).main.calibration.threshold
    assert handlers.threshold(visit) == own and handlers.results(visit, "ldvc")[0].background == own
    assert not handlers.rethreshold(own, visit), "the checkpoint's own threshold is what it was"
    assert handlers.rethreshold(0.7, visit) and handlers.rethreshold(own, visit) and visit.background == OWN_THRESHOLD
    assert handlers.rethreshold(None, visit)
    visit = handlers.segment(photo, "sky, tree", visit.background, visit)
    assert visit.background is None and (handlers.results(visit, "ldvc")[0].labels >= 0).all()


def test_every_decoder_has_its_own_threshold_unless_one_is_set(tmp_path: Path, photo: str) -> None:
    """Thresholds are measured for each decoder."""
    folder = save_tiny_checkpoint(tmp_path)
    for decoder, threshold in (("ldvc", 0.25), ("zegclip", 0.75)):
        path = folder / decoder / "config.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"calibration": {"threshold": threshold}}))
    own = Handlers(Catalogue(str(folder)))
    visit = own.segment(photo, "dog, cat", OWN_THRESHOLD, Visit())
    decoders = ("ldvc", LCSA_OFF, "zegclip")
    assert [each.background for each in own.results(visit, *decoders)] == [0.25, 0.25, 0.75]
    assert own.rethreshold(0.5, visit)
    assert [each.background for each in own.results(visit, *decoders)] == [0.5] * 3


def test_background_as_a_name_allows_none_of_these(handlers: Handlers, photo: str) -> None:
    visit = handlers.segment(photo, "dog, Background, cat", None, Visit())
    assert (visit.asked, visit.names) == (["dog", "Background", "cat"], ["dog", "cat"])
    (result,) = handlers.results(visit, "ldvc")
    assert result.names == ["dog", "cat"] and result.background == handlers.models(visit).main.calibration.threshold
    assert not handlers.rethreshold(result.background, visit), "the box is ticked already"
    after = handlers.segment(photo, "dog, cat", visit.background, visit)
    assert handlers.threshold(after) is None, "the box was unticked, and is so again without that name"
    assert handlers.rethreshold(None, visit) and handlers.results(visit, "ldvc")[0].background is None
    with pytest.raises(Problem, match="at least one class name") as caught:
        handlers.segment(photo, "background, other", None, visit)
    assert caught.value.field == "names"


def test_the_answer_says_that_background_is_no_class(catalogue: Catalogue, photo: str) -> None:
    page = build_page(catalogue)
    (press,) = (each for each in page.fns.values() if each.name == "press_segment")
    for names, said in (("dog, background, rest", "“background” and “rest” are no classes"), ("dog, cat", None)):
        notes = [str(getattr(change, "value", "")) for change in press.fn(photo, names, None, Visit()).values()]
        assert any("none of these" in note and "ldvc-notice" in note for note in notes) == (said is not None)
        assert said is None or any(said in note for note in notes)


def test_one_name_is_asked_with_company_until_it_is_removed(handlers: Handlers, photo: str) -> None:
    visit = handlers.segment(photo, "grass", None, Visit())
    assert visit.asked == visit.names == ["grass"]
    (result,) = handlers.results(visit, "ldvc")
    assert result.names == ["grass"] and result.company == [word for word in COMPANY if word != "grass"]
    assert handlers.keep_company(False, visit) and not handlers.keep_company(False, visit)
    assert all(each.company == [] for each in handlers.results(visit, "ldvc", "zegclip"))
    after = handlers.segment(photo, "dog", None, visit)
    assert handlers.results(after, "ldvc")[0].company == [], "removed for all questions of the visitor"
    many = handlers.segment(photo, "dog, cat", None, after)
    assert not handlers.keep_company(True, many), "several names have none, so nothing is to be drawn anew"
    assert handlers.results(handlers.segment(photo, "dog", None, many), "ldvc")[0].company == list(COMPANY)


@pytest.mark.parametrize(
    ("photo_kind", "names", "model", "field", "says"),
    [
        (None, "dog", None, "photo", texts.NO_PHOTO),
        ("gone", "dog", None, "photo", texts.NO_PHOTO),
        ("text", "dog", None, "photo", "not a picture"),
        ("good", " , ", None, "names", "at least one"),
        ("good", None, None, "names", "at least one"),
        ("good", "x" * 100, None, "names", "commas"),
        ("good", ",".join(f"n{i}" for i in range(300)), None, "names", "at most 200"),
        ("good", "dog", "full", "model", "LDVC_FULL"),
        ("good", "dog", "huge", "model", "choose one of"),
    ],
)
def test_problems_are_sentences_beside_a_field(
    handlers: Handlers, photo: str, tmp_path: Path, photo_kind: str | None, names: str, model: str, field: str, says: str
) -> None:
    text = tmp_path / "notes.jpg"
    text.write_text("not a picture")
    path = {None: None, "gone": str(tmp_path / "gone.png"), "text": str(text), "good": photo}[photo_kind]
    visit = Visit()
    with pytest.raises(Problem, match=says) as caught:
        handlers.segment(path, names, None, visit, model=model)
    assert caught.value.field == field
    assert visit == Visit()


def test_full_model_when_it_is_there(handlers: Handlers, photo: str, tmp_path: Path) -> None:
    """A second checkpoint answers under the key "full"; a photo goes to its own towers, not to the other's."""
    full_calibration = {"scale": 1.0, "bias": 0.0, "threshold": 0.375}
    full = save_tiny_checkpoint(tmp_path, metadata={"seen_names": ["cat"], "calibration": full_calibration})
    assert full_calibration["threshold"] != handlers.catalogue.get(None).main.calibration.threshold
    both = Handlers(Catalogue(handlers.catalogue.get(None), str(full)))
    visit = both.segment(photo, "dog, cat", None, Visit())
    after = both.segment(photo, "dog, cat", None, visit, model="full")
    assert after.model == "full" and after.image is not visit.image
    assert both.results(after, "ldvc")[0].seen == [False, True]
    assert after.background is None, "who unticked the box has it unticked with the other model, too"
    with gr.Blocks():
        tab = SegmentTab(both, gr.State(Visit()))
    for background in (OWN_THRESHOLD, 0.8):  # one that was chosen for another checkpoint's scores means nothing here
        visit = both.segment(photo, "dog, cat", background, Visit())
        after = both.segment(photo, "dog, cat", visit.background, visit, model="full")
        assert both.threshold(after) == both.results(after, "ldvc")[0].background == 0.375
        data = tab.update(after)[tab.viewer]
        assert data["threshold"] == data["own_threshold"] == 0.375
    broken = Handlers(Catalogue(handlers.catalogue.get(None), str(tmp_path / "nothing")))
    with pytest.raises(Problem, match="could not be loaded.*no folder"):
        broken.segment(photo, "dog", None, Visit(), model="full")


def test_visits_and_problems_can_be_handed_to_another_process(handlers: Handlers, photo: str) -> None:
    """ZeroGPU runs the actions in a process of its own."""
    visit = pickle.loads(pickle.dumps(handlers.segment(photo, "dog, cat", None, Visit())))
    assert handlers.rethreshold(1.0, visit) and (handlers.results(visit, "ldvc")[0].labels == -1).mean() > 0.99
    problem = pickle.loads(pickle.dumps(Problem("names", "Type a name.")))
    assert (problem.field, str(problem)) == ("names", "Type a name.")


def test_checkpoint_without_the_other_decoder(tmp_path: Path, photo: str) -> None:
    lonely = Handlers(Catalogue(Models(str(save_tiny_checkpoint(tmp_path, decoders=("ldvc",))))))
    visit = lonely.segment(photo, "dog, cat", None, Visit())
    assert lonely.results(visit, "ldvc_without_lcsa", "clip")[0] is None
    assert lonely.models(visit).decoders() == ["ldvc", "clip"]


# ---- what is shown ----------------------------------------------------------------------------------------------------


def decoded(uri: str) -> np.ndarray:
    import base64

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_data_of_the_viewer(handlers: Handlers, photo: str) -> None:
    visit = handlers.segment(photo, f"dog, {EVIL}, sky | heaven", 0.6, Visit())
    (result,) = handlers.results(visit, "ldvc")
    data = viewer_data(
        result, photo=photo_uri(result.picture, long_side=1024), own_threshold=0.5, opacity=0.3, outline=False
    )
    marks = decoded(data["labels"])
    assert np.array_equal(marks[..., 0].astype(int) - 1, result.labels_at((240, 360)))
    assert np.array_equal(marks[..., 1].astype(int) - 1, result.scores.argmax(axis=0))
    scores = decoded(data["scores"])
    assert np.abs(scores / 255 - result.scores_at(scores.shape).max(axis=0)).max() <= 0.5 / 255 + 1e-6
    assert [each["title"] for each in data["classes"]] == ["dog", EVIL, "sky | heaven"]
    assert [each["name"] for each in data["classes"]] == result.names
    assert (data["threshold"], data["own_threshold"], data["opacity"], data["outline"]) == (0.6, 0.5, 0.3, False)
    assert decoded(data["photo"]).shape == (240, 360, 3)
    assert "/" not in handlers.models(visit).name, "where the checkpoint lies is nobody's business"


def test_class_maps(handlers: Handlers, photo: str) -> None:
    visit = handlers.segment(photo, ",".join([EVIL, "dog", *(f"thing {i}" for i in range(80))]), None, Visit())
    fragment = class_maps(handlers.results(visit, "ldvc")[0])
    assert fragment.count("<figure") == MAPS_SHOWN and f"{MAPS_SHOWN} classes that cover most" in fragment
    visit = handlers.segment(photo, f"dog, {EVIL}", None, Visit())
    fragment = class_maps(handlers.results(visit, "ldvc")[0])
    assert fragment.count("<figure") == fragment.count("<img src=\"data:image/png") == fragment.count("<img") == 2
    assert "&lt;img src=x onerror=alert(1)&gt;" in fragment


def test_names_are_text() -> None:
    chips = html.chips([(EVIL, EVIL)]), html.chips([("dog", EVIL)])
    for fragment in (*chips, html.problem(EVIL), html.notice(EVIL), html.empty(EVIL)):
        assert "<img" not in fragment and "&lt;img src=x onerror=alert(1)&gt;" in fragment


def test_chips_say_seen_and_unseen_in_words() -> None:
    fragment = html.chips([("Dog", "dog"), ("settee | sofa", "couch"), ("zebra | donkey", None)])
    kinds = re.findall(r'ldvc-tag ldvc-(\w+)"( title="[^"]*")?>(\w+)<', fragment)
    assert [(kind, word) for kind, _, word in kinds] == [("seen", "seen"), ("seen", "seen"), ("unseen", "unseen")]
    assert [bool(title) for _, title, _ in kinds] == [False, True, False] and "the name “couch”" in kinds[1][1]
    assert 'data-name="zebra | donkey" aria-label="Remove zebra | donkey"' in fragment
    assert "20 classes" in html.chips([(f"thing {i}", "thing" if i < 7 else None) for i in range(20)])
    assert "masks of 7 " in html.chips([(f"thing {i}", "thing" if i < 7 else None) for i in range(20)])
    assert html.chips([]) == ""
    fragment = html.chips([("other", "other"), ("dog", "dog")], none={"other"})
    assert fragment.count(">seen<") == 1 and 'ldvc-none">none of these<' in fragment


# ---- what the page is made of -----------------------------------------------------------------------------------------


def test_vocabularies() -> None:
    lists = class_lists()
    sizes = {key: len(each.classes) for key, each in lists.items()}
    assert list(sizes)[:5] == ["household", "voc20", "coco80", "context59", "coco_stuff171"]
    assert (sizes["voc20"], sizes["coco80"], sizes["context59"], sizes["coco_stuff171"]) == (20, 80, 59, 171)
    for each in lists.values():
        words = [word.casefold() for name in each.classes for word in synonyms_of(name)]
        assert len(set(words)) == len(words) <= 200 and each.title and each.source
        assert not any("," in word for word in words)
    assert set(lists["coco80"].classes) < set(lists["coco_stuff171"].classes)


def test_examples_are_complete() -> None:
    examples = read_examples()
    licences = (EXAMPLES_FOLDER / "README.md").read_text(encoding="utf-8")
    photos = sorted(path.name for path in EXAMPLES_FOLDER.glob("*.jpg"))
    assert sorted(Path(path).name for path, _, _ in examples) == photos and 6 <= len(photos) <= 8
    for path, title, names in examples:
        assert Path(path).stat().st_size < 300_000
        assert f"`{Path(path).name}`" in licences and title and "," in names


def test_uploaded_file() -> None:
    assert uploaded_file(None) is None
    assert uploaded_file(SimpleNamespace(path="/tmp/x.jpg")) == "/tmp/x.jpg"


def test_page_is_declared_with_documented_endpoints(catalogue: Catalogue) -> None:
    endpoints = build_page(catalogue).get_api_info()["named_endpoints"]
    assert set(endpoints) == {
        "/segment", "/attention", "/routing", "/space", "/compare", "/vocabulary", "/download"
    }  # fmt: skip
    for name, endpoint in endpoints.items():
        assert len(endpoint["description"]) > 60, name
    assert [each["parameter_name"] for each in endpoints["/segment"]["parameters"]] == [
        "photo", "names", "use_background", "threshold"
    ]  # fmt: skip
    for name in ("/segment", "/download", "/compare"):
        defaults = {each["parameter_name"]: each["parameter_default"] for each in endpoints[name]["parameters"][2:4]}
        assert defaults == {"use_background": True, "threshold": None}, name
        assert all(each["parameter_has_default"] for each in endpoints[name]["parameters"][2:])
