"""Questions and answers without a browser: results, sentences for problems, and what the page is made of."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import pytest
import torch
from gradio.blocks import BlockFunction
from PIL import ImageFile

from ldvc.class_names import SeenNames, class_lists, parse_names, plain
from ldvc.predictor import COMPANY
from ldvc.web import models, texts
from ldvc.web.examples import EXAMPLES_FOLDER, OPENING, read_examples
from ldvc.web.inputs import chips
from ldvc.web.models import LoadedModel, ModelRegistry
from ldvc.web.page import build_page
from ldvc.web.segmenter import LCSA_OFF, Segmenter
from ldvc.web.session import OWN_THRESHOLD, Problem, Session
from ldvc.web.tabs import VIEWER_DEFAULT
from ldvc.web.tabs.segment import SegmentTab
from tests.tiny import save_tiny_checkpoint


def test_first_answer(segmenter: Segmenter, photo: str) -> None:
    answer = segmenter.segment(photo, " dog, Zebra | donkey,dog ")
    assert [name.text for name in answer.parsed_names] == ["dog", "Zebra | donkey"] and answer.names == ["dog", "Zebra"]
    (result,) = segmenter.results(answer, "ldvc")
    assert result.size == (130, 215) and result.seen == [True, False] and answer.photo_name == "my photo.v2.png"
    assert segmenter.segment(photo, ["dog", "sofa | couch"]).names == ["dog", "sofa"]


def test_new_names_do_not_encode_the_photo_again(segmenter: Segmenter, photo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = segmenter.segment(photo, "dog, cat")
    main = segmenter.model(answer).main
    monkeypatch.setattr(main, "encode_image", lambda image: pytest.fail("the photo was encoded again"))
    trained, off = segmenter.results(answer, "ldvc", LCSA_OFF, background=0.5)
    assert trained.background == off.background == 0.5
    assert not torch.allclose(trained.outputs[0].logits, off.outputs[0].logits)
    after = segmenter.segment(photo, "sky, cat, tree", previous=answer)
    assert after.image is answer.image and after.names == ["sky", "cat", "tree"] and after.pictures is answer.pictures


def test_every_decoder_has_its_own_threshold_unless_one_is_set(tmp_path: Path, photo: str) -> None:
    folder = save_tiny_checkpoint(tmp_path)
    for decoder, threshold in (("ldvc", 0.25), ("zegclip", 0.75)):
        path = folder / decoder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"calibration": {"threshold": threshold}}))
    segmenter = Segmenter(ModelRegistry(str(folder)))
    answer, decoders = segmenter.segment(photo, "dog, cat"), ("ldvc", LCSA_OFF, "zegclip")
    assert [each.background for each in segmenter.results(answer, *decoders)] == [0.25, 0.25, 0.75]
    assert [each.background for each in segmenter.results(answer, *decoders, background=0.5)] == [0.5] * 3
    strict, loose, without = (segmenter.results(answer, "ldvc", background=each)[0] for each in (1.0, 0.0, None))
    assert (strict.labels == -1).mean() > 0.99 and (loose.labels >= 0).all() and (without.labels >= 0).all()


def test_background_as_a_name_allows_none_of_these(segmenter: Segmenter, photo: str) -> None:
    answer = segmenter.segment(photo, "dog, Background, cat")
    assert answer.names == ["dog", "cat"] and answer.background(None) == OWN_THRESHOLD and answer.background(0.3) == 0.3
    assert segmenter.results(answer, "ldvc")[0].names == ["dog", "cat"]
    assert segmenter.segment(photo, "dog, cat").background(None) is None
    with pytest.raises(Problem, match="at least one class name") as caught:
        segmenter.segment(photo, "background, other")
    assert caught.value.field == "names"


def test_a_single_name_is_segmented_with_company(segmenter: Segmenter, photo: str) -> None:
    (result,) = segmenter.results(segmenter.segment(photo, "grass"), "ldvc")
    assert result.names == ["grass"] and result.company == [word for word in COMPANY if word != "grass"]
    assert segmenter.results(segmenter.segment(photo, "dog", company=False), "ldvc")[0].company == []
    many = segmenter.segment(photo, "dog, cat")
    segmenter.results(many, "ldvc", company=False)
    assert len(many.results) == 1, "several names have no company, so nothing is computed again"


def test_problems_are_sentences_beside_a_field(
    segmenter: Segmenter, photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "notes.jpg").write_text("not a picture")
    for path, names, model, field, sentence in (
        (None, "dog", None, "photo", texts.NO_PHOTO),
        (str(tmp_path / "gone.png"), "dog", None, "photo", texts.NO_PHOTO),
        (str(tmp_path / "notes.jpg"), "dog", None, "photo", "not a picture"),
        (photo, " , ", None, "names", "at least one"),
        (photo, None, None, "names", "at least one"),
        (photo, {"dog": 1}, None, "names", "a text, or a list of texts"),
        (photo, ["dog", 3], None, "names", "must be text"),
        (photo, "x" * 100, None, "names", "commas"),
        (photo, ",".join(f"n{i}" for i in range(300)), None, "names", "at most 200"),
        (photo, "dog", "full", "model", "cannot be reached.*LDVC_CLIP_WEIGHTS"),
        (photo, "dog", "huge", "model", "choose one of"),
    ):
        with pytest.raises(Problem, match=sentence) as caught:
            segmenter.segment(path, names, model=model)
        assert caught.value.field == field


def test_a_photo_is_decoded_once_and_by_the_button(
    registry: ModelRegistry, photo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it arrives, its header is read; for a second question about it, nothing is."""
    page, session, inputs, decoded = build_page(registry), Session(), {"photo": photo, "names": "dog"}, []
    prepare = ImageFile.ImageFile.load_prepare
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", lambda self: decoded.append(1) or prepare(self))
    change = event(page, "change_photo")
    change.fn({each: session if isinstance(each, gr.State) else inputs.get(each.elem_id) for each in change.inputs})
    assert not change.queue and not decoded
    for names in ("dog", "cat"):
        assert "answer" in ask(page, session, photo, names, overlay=VIEWER_DEFAULT)["overlay"].props
        assert len(decoded) == 1
    assert event(page, "answer_question").queue


def test_a_loaded_model_answers_while_another_is_being_loaded(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, go_on = threading.Event(), threading.Event()
    registry = ModelRegistry(str(tiny_checkpoint), full=str(tiny_checkpoint))
    real = models.LoadedModel

    def slow(source: str) -> LoadedModel:
        loading.set()
        assert go_on.wait(60)
        return real(source)

    monkeypatch.setattr(models, "LoadedModel", slow)
    with ThreadPoolExecutor(1) as pool:
        full = pool.submit(registry.get, "full")
        assert loading.wait(60)
        assert registry.get(None) is registry.get(registry.default)
        go_on.set()
        assert full.result() is registry.get("full")


def test_full_model(segmenter: Segmenter, photo: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A second checkpoint encodes the photo itself; one that cannot be loaded is a sentence."""
    first = segmenter.segment(photo, "dog, cat")
    both, broken = (
        Segmenter(ModelRegistry(segmenter.registry.get(None), str(full))) for full in (tiny_checkpoint, tmp_path / "nothing")
    )
    answer = both.segment(photo, "dog, cat", model="full", previous=first)
    assert answer.model == "full" and answer.image is not first.image
    with pytest.raises(Problem, match="could not be loaded.*no folder"):
        broken.segment(photo, "dog", model="full")


def event(page: gr.Blocks, name: str) -> BlockFunction:
    """The function of an event, by its name, and its inputs."""
    (found,) = (each for each in page.fns.values() if each.name == name)
    return found


def ask(page: gr.Blocks, session: Session, photo: str | None, names: str, **settings: object) -> dict:
    """Press the button; returns the changes by elem_id. `settings` are values by elem_id, "-" replaced by "_"."""
    press = event(page, "answer_question")
    return by_id(press.fn(values_of(press, session, photo=photo, names=names, **settings)))


def values_of(event: BlockFunction, session: Session, **settings: object) -> dict:
    """The values that an event gets from the page."""
    values = {}
    for component in event.inputs:
        values[component] = getattr(component, "value", None)
        key = (component.elem_id or "").replace("-", "_")
        if isinstance(component, gr.State):
            values[component] = session
        elif key in settings:
            values[component] = settings[key]
    return values


def by_id(changes: dict) -> dict:
    return {component.elem_id or component.get_block_name(): change for component, change in changes.items()}


def test_the_answer_replaces_the_older_one_on_every_tab(registry: ModelRegistry, photo: str) -> None:
    page, session = build_page(registry), Session()
    changes = ask(page, session, photo, "dog, cat", overlay=VIEWER_DEFAULT)
    assert [each["name"] for each in changes["overlay"].props["answer"]["classes"]] == ["dog", "cat"] == session.answer.names
    assert changes["attention-grid"] == changes["compare-view"] == "" and changes["routing-view"].props["route"] == ""
    session.open_tab = "compare"
    changes = ask(page, session, photo, "sky, cat", overlay=VIEWER_DEFAULT)
    assert "sky" in changes["compare-view"] and changes["overlay"].props["answer"] is None
    assert "attention-grid" not in changes, "it is blank already"


def test_settings_of_the_viewer_hold_for_the_next_question(segmenter: Segmenter, photo: str, tmp_path: Path) -> None:
    full = save_tiny_checkpoint(tmp_path, metadata={"calibration": {"threshold": 0.375}})
    page = build_page(ModelRegistry(segmenter.registry.get(None), str(full)))
    session, viewer = Session(), {**VIEWER_DEFAULT, "background": 0.8, "alone": "cat", "thresholds": {"sky": 0.6}}
    for names, alone in (("dog, cat", "cat"), ("dog, sky", None)):
        changes = ask(page, session, photo, names, overlay=viewer)
        assert changes["overlay"].value == {**viewer, "alone": alone}
    changes = ask(page, session, photo, "dog, sky", overlay=viewer, model="full")
    shown = changes["overlay"].value
    assert (shown["background"], shown["thresholds"]) == (OWN_THRESHOLD, {}), "they belong to the scores of one checkpoint"
    assert changes["overlay"].props["answer"]["own_threshold"] == 0.375
    unticked = {**VIEWER_DEFAULT, "background": None}
    assert ask(page, session, photo, "dog, sky", overlay=unticked, model="full")["overlay"].value["background"] is None
    changes = ask(page, session, photo, "dog, other", overlay=unticked, model="full")
    assert changes["overlay"].value["background"] == OWN_THRESHOLD, "a name allows it"
    assert "“other” is no class" in changes["names-problem"] and changes["names"] == "dog, other"

    session.open_tab = "compare"
    for model, sent in (("full", True), ("full", False), (None, True)):
        model = {"model": model} if model else {}
        assert ("overlay" in ask(page, session, photo, "dog, sky", overlay=viewer, **model)) is sent


def test_a_refused_question_changes_nothing(registry: ModelRegistry, photo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page, session = build_page(registry), Session()
    ask(page, session, photo, "dog,cat", overlay=VIEWER_DEFAULT)
    answer = session.answer
    changes = ask(page, session, photo, " ", overlay=VIEWER_DEFAULT)
    assert session.answer is answer and set(changes) == {f"{field}-problem" for field in ("photo", "names", "run", "model")}
    assert "at least one class name" in changes["names-problem"]

    def fails(*_: object) -> None:
        raise RuntimeError("no drawing today")

    monkeypatch.setattr(SegmentTab, "draw", fails)
    changes = ask(page, session, photo, "dog, sky", overlay=VIEWER_DEFAULT)
    assert session.answer is answer and texts.UNEXPECTED in changes["run-problem"]


def test_chips() -> None:
    seen = SeenNames(["dog", "couch"])
    fragment = chips(parse_names("Dog, settee | sofa, zebra | donkey, other"), seen)
    kinds = re.findall(r'ldvc-tag ldvc-(\w+)"( title="[^"]*")?>([\w ]+)<', fragment)
    expected = [("seen", "seen"), ("seen", "seen"), ("unseen", "unseen"), ("none", "none of these")]
    assert [(kind, word) for kind, _, word in kinds] == expected
    assert [bool(title) for _, title, _ in kinds] == [False, True, False, False] and "the name “couch”" in kinds[1][1]
    assert 'data-name="zebra | donkey" aria-label="Remove zebra | donkey"' in fragment
    things = [f"thing {chr(97 + index)}" for index in range(20)]
    many = chips(parse_names(things), SeenNames(things[:7]))
    assert "20 classes" in many and "masks of 7 " in many
    assert chips([], seen) == ""


def test_class_lists() -> None:
    lists = class_lists()
    assert [len(lists[key].classes) for key in ("voc20", "coco80", "context59", "coco_stuff171")] == [20, 80, 59, 171]
    for each in lists.values():
        words = [plain(word) for name in each.classes for word in name.split("|")]
        assert len(set(words)) == len(words) <= 200 and each.title and each.source
    assert set(lists["coco80"].classes) < set(lists["coco_stuff171"].classes)


def test_examples_are_complete() -> None:
    examples = read_examples()
    licences = (EXAMPLES_FOLDER / "README.md").read_text(encoding="utf-8")
    photos = sorted(path.name for path in EXAMPLES_FOLDER.glob("*.jpg"))
    assert sorted(Path(each.path).name for each in examples) == photos and 6 <= len(photos) <= 8
    assert OPENING in [each.key for each in examples]
    for each in examples:
        assert Path(each.path).stat().st_size < 300_000
        assert f"`{Path(each.path).name}`" in licences and each.title and "," in each.names


def test_documented_endpoints(registry: ModelRegistry) -> None:
    endpoints = build_page(registry).get_api_info()["named_endpoints"]
    assert set(endpoints) == {"/segment", "/attention", "/routing", "/space", "/compare", "/vocabulary", "/download"}
    assert all(len(endpoint["description"]) > 60 for endpoint in endpoints.values())
    for name in ("/segment", "/download", "/compare"):
        photo, names, *others = endpoints[name]["parameters"]
        assert (photo["parameter_name"], names["parameter_name"]) == ("photo", "names")
        assert all(each["parameter_has_default"] for each in others), name
        defaults = {each["parameter_name"]: each["parameter_default"] for each in others}
        assert (defaults["use_background"], defaults["threshold"], defaults["model"]) == (True, None, None), name
