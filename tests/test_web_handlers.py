"""What the page does, without a browser: answers, sentences for problems, and nothing lost or shared."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ldvc.web import html, texts
from ldvc.web.handlers import MAPS_SHOWN, Handlers, Models, Problem, Visit
from ldvc.web.layout import EXAMPLES_FOLDER, build_page, read_examples, uploaded_file
from tests.tiny import save_tiny_checkpoint

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def handlers(models: Models) -> Handlers:
    return Handlers(models)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (6, 9, 3), dtype=np.uint8))
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    small.resize((360, 240), Image.Resampling.BICUBIC).save(path)
    return str(path)


def test_first_answer(handlers: Handlers, photo: str) -> None:
    view, visit = handlers.segment(photo, " dog, Zebra,dog ", False, 0.5, Visit())
    assert view.names == "dog, Zebra"
    assert view.overlay.shape == (240, 360, 3)
    assert [(entry.name, entry.seen) for entry in view.legend] == [("dog", True), ("Zebra", False)]
    assert sum(entry.share for entry in view.legend) == pytest.approx(1)
    assert view.none_share is None and not view.context_added
    assert len(view.maps) == 2 and "unseen" in view.maps[1][1]
    assert view.attention.name == "dog" and not view.attention.note
    assert view.attention.with_lcsa.shape == view.attention.without_lcsa.shape
    assert (view.attention.with_lcsa != view.attention.without_lcsa).any()
    assert view.summary["classes"][1] == {
        "name": "Zebra", "seen": False, "area": round(view.legend[1].share, 4), "colour": view.legend[1].colour
    }  # fmt: skip
    assert set(np.unique(view.label_map)) <= {1, 2}
    assert "/" not in view.summary["model"], "where the checkpoint lies is nobody's business"


def test_new_names_do_not_encode_the_photo_again(
    handlers: Handlers, photo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, visit = handlers.segment(photo, "dog, cat", False, 0.5, Visit())
    main = handlers.models.main
    monkeypatch.setattr(main, "encode_image", lambda image: pytest.fail("the photo was encoded again"))
    view, after = handlers.segment(photo, "sky, dog, tree", False, 0.5, visit)
    assert after.image is visit.image and len(view.legend) == 3


def test_threshold(handlers: Handlers, photo: str) -> None:
    view, visit = handlers.segment(photo, "dog, cat", True, 1.0, Visit())
    assert view.none_share == pytest.approx(1, abs=0.01)
    view, visit = handlers.rethreshold(True, 0.0, visit)
    assert view.none_share == 0
    view, visit = handlers.rethreshold(False, 1.0, visit)
    assert view.none_share is None and view.summary["threshold"] is None
    assert handlers.rethreshold(True, 0.5, Visit()) is None


def test_attention_to_another_name(handlers: Handlers, photo: str) -> None:
    first, visit = handlers.segment(photo, "dog, cat", False, 0.5, Visit())
    view, visit = handlers.attend("cat", visit)
    assert view.name == "cat" and (view.with_lcsa != first.attention.with_lcsa).any()
    again, _ = handlers.segment(photo, "sky, cat", False, 0.5, visit)
    assert again.attention.name == "cat"  # the choice stays while the name does
    assert handlers.attend("horse", visit) is None
    assert handlers.attend("cat", Visit()) is None


def test_one_name_gets_company_that_can_be_removed(handlers: Handlers, photo: str) -> None:
    view, visit = handlers.segment(photo, "dog", False, 0.5, Visit())
    assert view.names == "dog, background" and view.context_added
    view, visit = handlers.remove_context(photo, view.names, False, 0.5, visit)
    assert view.names == "dog" and not view.context_added
    assert view.attention.note == texts.ATTENTION_ONE
    view, visit = handlers.segment(photo, "Dog", False, 0.5, visit)
    assert view.names == "Dog" and not view.context_added  # still declined
    view, visit = handlers.segment(photo, "cat", False, 0.5, visit)
    assert view.names == "cat, background"  # another name, another question
    view, visit = handlers.segment(photo, "cat", False, 0.5, visit)
    assert view.names == "cat"  # deleted by hand is declined, too
    view, visit = handlers.segment(photo, "background", False, 0.5, visit)
    assert view.names == "background"
    view, _ = handlers.segment(photo, "dog", False, 0.5, Visit(), add_context=False)
    assert view.names == "dog"
    with pytest.raises(Problem, match="at least one") as caught:  # the names were deleted before the button was pressed
        handlers.remove_context(photo, "", False, 0.5, visit)
    assert caught.value.field == "names"


@pytest.mark.parametrize(
    ("photo_kind", "names", "field", "says"),
    [
        (None, "dog", "photo", texts.NO_PHOTO),
        ("gone", "dog", "photo", texts.NO_PHOTO),
        ("text", "dog", "photo", "not a picture"),
        ("good", " , ", "names", "at least one"),
        ("good", None, "names", "at least one"),
        ("good", "x" * 100, "names", "commas"),
        ("good", ",".join(f"n{i}" for i in range(300)), "names", "at most 200"),
    ],
)
def test_problems_are_sentences_beside_a_field(
    handlers: Handlers, photo: str, tmp_path: Path, photo_kind: str | None, names: str, field: str, says: str
) -> None:
    text = tmp_path / "notes.jpg"
    text.write_text("not a picture")
    path = {None: None, "gone": str(tmp_path / "gone.png"), "text": str(text), "good": photo}[photo_kind]
    visit = Visit()
    with pytest.raises(Problem, match=says) as caught:
        handlers.segment(path, names, False, 0.5, visit)
    assert caught.value.field == field
    assert visit == Visit()


def test_answers_and_problems_can_be_handed_to_another_process(handlers: Handlers, photo: str) -> None:
    """ZeroGPU runs the actions in a process of its own."""
    view, visit = pickle.loads(pickle.dumps(handlers.segment(photo, "dog, cat", False, 0.5, Visit())))
    assert view.names == "dog, cat" and handlers.rethreshold(True, 1.0, visit)[0].none_share == pytest.approx(1, abs=0.01)
    problem = pickle.loads(pickle.dumps(Problem("names", "Type a name.")))
    assert (problem.field, str(problem)) == ("names", "Type a name.")


def test_many_names(handlers: Handlers, photo: str) -> None:
    view, _ = handlers.segment(photo, ",".join(f"thing {i}" for i in range(80)), False, 0.5, Visit())
    assert len(view.legend) == 80 and len(view.maps) == MAPS_SHOWN


def test_checkpoint_without_the_other_arm(tmp_path: Path, photo: str) -> None:
    lonely = Handlers(Models(str(save_tiny_checkpoint(tmp_path, arms=("ldvc",)))))
    view, _ = lonely.segment(photo, "dog, cat", False, 0.5, Visit())
    assert view.attention.without_lcsa is None and view.attention.note == texts.ATTENTION_MISSING
    assert view.attention.with_lcsa is not None


def test_names_are_text(handlers: Handlers, photo: str) -> None:
    view, _ = handlers.segment(photo, f"dog, {EVIL}", False, 0.5, Visit())
    for fragment in (html.legend(view.legend, 0.2), html.problem(EVIL), html.notice(EVIL), html.header(EVIL)):
        assert "<img" not in fragment
    assert "&lt;img src=x onerror=alert(1)&gt;" in html.legend(view.legend, None)


def test_legend_says_seen_and_unseen_in_words() -> None:
    entries = [html.LegendEntry("dog", True, "#112233", 0.004), html.LegendEntry("zebra", False, "#445566", 0.5)]
    fragment = html.legend(entries, 0.496)
    assert ">seen<" in fragment and ">unseen<" in fragment and "ldvc-striped" in fragment
    assert "&lt;1&#8239;%" in fragment and "50&#8239;%" in fragment
    assert texts.NONE_OF_THESE in fragment


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


def test_page_is_declared_with_documented_endpoints(models: Models) -> None:
    page = build_page(models)
    endpoints = page.get_api_info()["named_endpoints"]
    assert set(endpoints) == {"/segment", "/attention"}
    for endpoint in endpoints.values():
        assert endpoint["description"]
    assert [each["parameter_name"] for each in endpoints["/segment"]["parameters"]] == [
        "photo", "names", "use_background", "threshold"
    ]  # fmt: skip
