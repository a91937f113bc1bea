"""Several visitors at once: each sees what they would see alone, and no photo outlives its session."""

from __future__ import annotations

import gc
import json
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from ldvc.predictor import ImageState, Predictor
from ldvc.result import Segmentation
from ldvc.web.models import ModelRegistry
from ldvc.web.page import build_page, launch_options
from ldvc.web.segmenter import Segmenter
from ldvc.web.session import Session
from ldvc.web.tabs import VIEWER_DEFAULT
from tests.tiny import save_tiny_checkpoint
from tools.publish_space import ROOT
from tools.remote import Visitor

EXAMPLES = ROOT / "assets" / "examples"
ROUNDS = 4
SIZES = {
    "dog": (151, 113),
    "street": (127, 169),
    "coffee": (167, 109),
}  # no two alike, and like nothing else on the page
NAMES = {
    "dog": ("dog, grass, fence", "wolf, meadow"),
    "street": ("building, sky, car", "tower, cloud, road, person"),
    "coffee": ("cup, spoon, table", "mug, saucer, plate, napkin"),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small photos that differ in content and size."""
    folder = tmp_path_factory.mktemp("photos")
    for name, size in SIZES.items():
        Image.open(EXAMPLES / f"{name}.jpg").convert("RGB").resize(size).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in SIZES}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> ModelRegistry:
    return ModelRegistry(str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")))


@pytest.fixture(scope="module")
def page(registry: ModelRegistry) -> Iterator[gr.Blocks]:
    """The page, served by this process so that its memory can be looked into."""
    page = build_page(registry)
    page.launch(**launch_options(), prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield page
    page.close()


def act(address: str, name: str, photo: Path) -> list[str]:
    """One visitor's way over the page: everything that they were shown, step by step."""
    visitor, shown = Visitor(address), []
    visitor.set("photo", visitor.upload(photo))
    for names in NAMES[name]:
        visitor.set("names", names)
        visitor.set("overlay", {**VIEWER_DEFAULT, "background": 0.4})
        tabs = ("attention", "routing", "space", "compare", "segment")
        for event in [("run", "click"), *((f"tab-{tab}", "select") for tab in tabs)]:
            shown.append(json.dumps(visitor.trigger(*event), sort_keys=True))
    visitor.close()
    return shown


def test_visitors_at_once_see_what_they_see_alone(page: gr.Blocks, photos: dict[str, Path]) -> None:
    """Three visitors with different photos and names, several times at the same moment."""
    alone = {name: act(page.local_url, name, photos[name]) for name in photos}
    for name, steps in alone.items():  # each sees their own names, and the answers differ, so a mix-up would show
        others = [each for other in NAMES if other != name for names in NAMES[other] for each in names.split(", ")]
        everything = " ".join(steps)
        assert all(each in everything for names in NAMES[name] for each in names.split(", "))
        assert not any(f'"{other}"' in everything or f">{other}<" in everything for other in others)
    assert len({steps[0] for steps in alone.values()}) == len(alone)

    together: list[tuple[str, list[str]]] = []
    failures: list[BaseException] = []
    start = threading.Barrier(len(photos))

    def visit(name: str) -> None:
        try:
            for _ in range(ROUNDS):
                start.wait(timeout=120)
                together.append((name, act(page.local_url, name, photos[name])))
        except BaseException as error:
            failures.append(error)
            start.abort()

    threads = [threading.Thread(target=visit, args=(name,)) for name in photos]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert len(together) == ROUNDS * len(photos)
    for name, steps in together:
        assert steps == alone[name], f"{name} was shown something else than alone"


def predictors(registry: ModelRegistry) -> list[Predictor]:
    model = registry.get(None)
    return [model.predictor(decoder) for decoder in model.decoders()]


def foreign(each: Any) -> bool:
    """Whether something is another library's module, function or class: from there one reaches everything."""
    if isinstance(each, ModuleType):
        return not each.__name__.startswith("ldvc")
    return isinstance(each, (FunctionType, type)) and not (each.__module__ or "").startswith("ldvc")


def photos_within(roots: list[Any]) -> list[str]:
    """Photos and what was computed from them that can be reached from some objects, without looking into other libraries.

    A photo is anything with the height and width of one of `SIZES`, or the state or result of one.
    """
    shapes = {size[::-1] for size in SIZES.values()}
    found, todo, known = [], list(roots), set()
    while todo:
        each = todo.pop()
        if id(each) in known:
            continue
        known.add(id(each))
        if isinstance(each, (ImageState, Segmentation)):
            found.append(type(each).__name__)
        elif isinstance(each, (np.ndarray, torch.Tensor)) and any(
            tuple(each.shape[start : start + 2]) in shapes for start in range(max(1, each.ndim - 1))
        ):
            found.append(f"{type(each).__name__} {tuple(each.shape)}")
        elif isinstance(each, Image.Image) and each.size[::-1] in shapes:
            found.append(f"picture {each.size}")
        elif not foreign(each):
            todo += gc.get_referents(each)
    return found


def shared_objects(registry: ModelRegistry) -> list[Any]:
    """What all visitors share: our modules with their globals, and the models."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "ldvc"]
    return [*modules, registry, *predictors(registry)]


def test_nothing_shared_holds_a_photo(registry: ModelRegistry, photos: dict[str, Path]) -> None:
    segmenter = Segmenter(registry)
    answers = [segmenter.segment(str(photos[name]), NAMES[name][0]) for name in photos]
    for answer in answers:
        segmenter.results(answer, *registry.get(None).decoders())
    assert all(predictor.image is None for predictor in predictors(registry))
    assert photos_within(shared_objects(registry)) == []
    # The search finds one in an answer, and in a predictor that was given a photo to keep.
    assert "ImageState" in photos_within([answers[0]])
    registry.get(None).main.set_image(photos["dog"])
    try:
        assert "ImageState" in photos_within(shared_objects(registry))
    finally:
        registry.get(None).main.image = None

    states = [weakref.ref(answer.image) for answer in answers]
    del answers, answer
    gc.collect()
    assert [state() for state in states] == [None] * len(states), "something keeps the photo of a visitor who left"


def test_sessions_forget(page: gr.Blocks, photos: dict[str, Path]) -> None:
    """What the server knows of a photo is in its visitor's session, and is gone with it."""

    def alive() -> list[ImageState | Segmentation]:
        gc.collect()
        return [each for each in gc.get_objects() if type(each) in (ImageState, Segmentation)]

    before = {id(each) for each in alive()}  # of other tests
    for name in photos:
        act(page.local_url, name, photos[name])
    sessions = page.app.state_holder.session_data
    kept = [value for session in sessions.values() for value in session.state_data.values()]
    assert sum(isinstance(value, Session) and value.answer is not None for value in kept) >= len(photos)
    del kept
    sessions.clear()
    left = [each for each in alive() if id(each) not in before]
    assert not left, f"{len(left)} photos or results are kept outside the sessions"
