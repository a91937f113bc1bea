"""Several visitors at once: each sees what they would see alone, and no photo outlives its session."""

from __future__ import annotations

import gc
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from ldvc.predictor import ImageState
from ldvc.result import Segmentation
from ldvc.web.tabs import VIEWER_DEFAULT
from tools.remote import ROOT, Visitor

EXAMPLES = ROOT / "assets" / "examples"
ROUNDS = 2
SIZES = {"dog": (151, 113), "street": (127, 169), "coffee": (167, 109)}  # no two alike, and like nothing else on the page
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

    start = threading.Barrier(len(photos), timeout=120)

    def visit(name: str) -> None:
        for _ in range(ROUNDS):
            start.wait()
            assert act(page.local_url, name, photos[name]) == alone[name], f"{name} was shown something else than alone"

    with ThreadPoolExecutor(len(photos)) as pool:
        list(pool.map(visit, photos))


def photos_alive() -> set[int]:
    """Of everything that is alive in this process: arrays and pictures with the size of a photo, states, and results."""
    gc.collect()
    shapes, found = {size[::-1] for size in SIZES.values()}, set()
    for holder in gc.get_objects():
        for each in (holder, *gc.get_referents(holder)):  # arrays themselves are not listed
            kind = type(each)
            if kind in (ImageState, Segmentation) or (kind is Image.Image and each.size[::-1] in shapes):
                found.add(id(each))
            elif kind in (np.ndarray, torch.Tensor):
                shape = tuple(each.shape)
                found |= {id(each)} if any(shape[at : at + 2] in shapes for at in range(len(shape) - 1)) else set()
    return found


def test_sessions_forget(page: gr.Blocks, photos: dict[str, Path]) -> None:
    """What the server keeps of a photo is in its visitor's session, and is gone with it."""
    before = photos_alive()  # of other tests
    for name in photos:
        act(page.local_url, name, photos[name])
    assert len(photos_alive() - before) > 3 * len(photos)
    page.app.state_holder.session_data.clear()
    assert not photos_alive() - before
