"""Hosting on Hugging Face Spaces: whether Spaces accepts what is uploaded, and whether the page runs there.

The last part starts the page as a Space does: a fresh folder with exactly the uploaded files, the variables of a Space, and no
network; and once more with a stand-in for ZeroGPU's package, which runs functions in another process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import gradio as gr
import gradio_client
import numpy as np
import open_clip
import pytest
from gradio_client import Client, handle_file
from huggingface_hub import SpaceHardware
from packaging.requirements import Requirement
from PIL import Image

from ldvc.class_names import parse_names
from ldvc.config import ModelConfig
from ldvc.modeling.clip_weights import PUBLISHED_FILES
from ldvc.predictor import ImageState
from ldvc.web import gpu
from ldvc.web.segmenter import gpu_seconds
from tests.browsing import DOG
from tests.tiny import save_tiny_checkpoint
from tools.page_latency import NAMES, Bench
from tools.publish_space import ROOT, TORCH, make_plan, space_files
from tools.remote import PageError, Served, Visitor, serve

PACKAGES = Path(__file__).with_name("hosting") / "packages"
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
ZEROGPU_PYTHON = ("3.12.12", "3.10.13")
ZEROGPU_TORCH = ("2.8.0", "2.9.1", "2.10.0", "2.11.0")  # as its own error message lists them


@pytest.fixture(scope="module")
def requirements() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {each.name: each for each in found}


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    """The front matter of README.md as it is uploaded."""
    return make_plan("ann/ldvc", full="ann/ldvc-voc12").card.data.to_dict()


def test_front_matter(card: dict[str, Any], requirements: dict[str, Requirement]) -> None:
    """Fields and values as the configuration reference of Spaces has them."""
    accepted = "title emoji colorFrom colorTo sdk sdk_version python_version app_file pinned license short_description"
    more = "suggested_hardware startup_duration_timeout models preload_from_hub tags thumbnail"
    assert set(card) == {*accepted.split(), *more.split()}
    assert card["sdk"] == "gradio" and card["app_file"] in space_files() and isinstance(card["pinned"], bool)
    assert card["colorFrom"] in COLOURS and card["colorTo"] in COLOURS
    assert len(card["emoji"]) <= 2 and not card["emoji"].isascii()
    assert 0 < len(card["short_description"]) <= 60 and card["license"] in {"apache-2.0", "other"}
    assert card["python_version"] in ZEROGPU_PYTHON and card["suggested_hardware"] == SpaceHardware.ZERO_A10G
    assert re.fullmatch(r"\d+[mh]", card["startup_duration_timeout"])
    # Spaces installs this version of Gradio together with requirements.txt, so the two must agree.
    assert requirements["gradio"].specifier.contains(card["sdk_version"])


def test_preloaded_files_are_those_that_are_loaded(card: dict[str, Any]) -> None:
    """Of the full CLIP the first file that is looked for, and no other format of the same weights; all of the checkpoint."""
    config = ModelConfig()
    repository = open_clip.get_pretrained_cfg(config.clip, config.pretrained)["hf_hub"].rstrip("/")
    assert card["models"] == [repository, "ann/ldvc-voc12"]
    assert card["preload_from_hub"] == [f"{repository} {PUBLISHED_FILES[0]}", "ann/ldvc-voc12"]


def test_torch_is_one_that_zerogpu_supports(requirements: dict[str, Requirement]) -> None:
    """The newest, the torchvision that belongs to it, and within what the tests ran with."""
    sent = make_plan("ann/ldvc").files["requirements.txt"].decode().splitlines()
    torch, torchvision = TORCH["torch"], TORCH["torchvision"]
    assert {f"torch=={torch}", f"torchvision=={torchvision}"} <= set(sent)
    assert torch == ZEROGPU_TORCH[-1] and torchvision == f"0.{int(torch.split('.')[1]) + 15}.0"
    for version in ZEROGPU_TORCH:
        minor = int(version.split(".")[1])
        assert requirements["torch"].specifier.contains(version)
        assert requirements["torchvision"].specifier.contains(f"0.{minor + 15}.0")


def space_variables(scratch: Path) -> dict[str, str]:
    """The environment of a Space, with the stand-in for `spaces` and the guard that is its missing network."""
    packages = scratch / "packages"  # copied, because the served process must open nothing of this project
    shutil.copytree(PACKAGES, packages)
    information = packages / "spaces-0.51.3.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: spaces\nVersion: 0.51.3\n")
    (scratch / "home").mkdir()
    (scratch / "quota.txt").write_text("60")
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(scratch / "home"),
        "SYSTEM": "spaces",
        "SPACE_ID": "ann/ldvc",
        "SPACE_HOST": "ann-ldvc.hf.space",
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_NUM_PORTS": "1",
        "GRADIO_THEME": "huggingface",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(packages),
        "LDVC_SPACES_RECORD": str(scratch / "spaces.txt"),
        "LDVC_SPACES_QUOTA": str(scratch / "quota.txt"),
        "LDVC_GUARD_RECORD": str(scratch / "guard.txt"),
        "LDVC_GUARD_FOLDER": str(ROOT),
        **{name: value for name, value in os.environ.items() if name == "OMP_NUM_THREADS"},
    }


def copy_space(folder: Path) -> set[str]:
    """Exactly what would be uploaded."""
    files = make_plan("ann/ldvc").files
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (os.link if name.endswith(".safetensors") else shutil.copy)(content, folder / name)  # weights are only read
    return set(files)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    scratch = tmp_path_factory.mktemp("space")
    pushed = copy_space(scratch / "app")
    with serve(scratch, folder=scratch / "app", environment=space_variables(scratch)) as served:
        yield served
        record = scratch / "guard.txt"
        assert not record.exists(), f"the page reached for what a Space does not have:\n{record.read_text()}"
        assert "Traceback" not in served.log.read_text(), served.log.read_text()
    after = {path.relative_to(scratch / "app").as_posix() for path in (scratch / "app").rglob("*") if path.is_file()}
    assert after == pushed, "the page wrote into its own folder"


def test_the_guard_guards(tmp_path: Path) -> None:
    """A file of this project and two connections are recorded, and the connections fail."""
    program = f"""
import socket, urllib.request
open({str(ROOT / "LICENSE")!r}).close()
socket.create_server(("127.0.0.1", 0)).close()
for attempt in (lambda: urllib.request.urlopen("http://huggingface.co"), lambda: socket.create_connection(("8.8.8.8", 53))):
    try:
        attempt()
    except Exception as error:
        print(type(getattr(error, "reason", error)).__name__)
"""
    command, variables = [sys.executable, "-c", program], space_variables(tmp_path)
    run = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["PermissionError", "PermissionError"]
    record = (tmp_path / "guard.txt").read_text().splitlines()
    assert record[0] == f"opened {ROOT / 'LICENSE'}"
    assert record[1].endswith("huggingface.co") and record[2].endswith("8.8.8.8")


def test_program_of_the_documents(space: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Runs as it is in docs/api.md, and leaves no endpoint of the page out."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text("utf-8"), re.DOTALL)
    client = Client(space.address, verbose=False)
    asked_for = []
    monkeypatch.setattr(gradio_client, "Client", lambda address: asked_for.append(address) or client)
    monkeypatch.chdir(ROOT)
    found: dict[str, Any] = {}
    exec(program, found)

    assert asked_for == ["http://127.0.0.1:7860/"]
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == set(re.findall(r'api_name="(/\w+)"', program))
    assert capsys.readouterr().out.startswith("dog seen 0.")
    labels = np.asarray(Image.open(found["labels"]).convert("L"))
    assert Image.open(found["overlay"]).size == Image.open(DOG).size == labels.shape[::-1]
    assert (labels[240:420, 320:700] == 1).mean() > 0.9, "the flank of the dog"
    assert (labels[680:768] == 1).mean() < 0.4, "the meadow before it; lite draws animals too fat"
    for index, each in enumerate(found["data"]["classes"], start=1):
        assert each["area"] == pytest.approx((labels == index).mean(), abs=1e-3)
    assert [each["name"] for each in found["data"]["classes"]] == ["dog", "grass", "cat"]
    assert zipfile.ZipFile(found["file"]).namelist(), "the last kind: YOLO"
    shares = np.array(found["share"])
    assert shares.shape == (found["attention"]["grid"]["rows"], found["attention"]["grid"]["columns"])
    assert 0 <= shares.min() < shares.max() <= 1
    pictures = [np.asarray(Image.open(found[name]).convert("RGB")) for name in ("ldvc", "without_lcsa", "zegclip")]
    assert len({picture.shape for picture in pictures}) == 1 and (pictures[0] != pictures[1]).any()
    assert (found["routing"]["patch"]["row"], found["routing"]["patch"]["column"]) == (12, 14)
    assert sum(region["attention"] for region in found["routing"]["regions"]) == pytest.approx(1, abs=0.01)
    assert {"ldvc", "zegclip"} <= set(found["space"]["decoders"])
    assert len(found["pictures"]) == len(found["compared"]["decoders"]) >= 3
    assert "pottedplant" in {each["name"].replace(" ", "") for each in found["vocabulary"]["classes"]}
    client.close()


def test_latency_is_measured_on_the_page(space: Served, tmp_path: Path) -> None:
    """Every action does what its title says; its time is not checked on a machine that runs tests."""
    bench = Bench(space.address, tmp_path, runs=2)
    for action, component, prop, names in [
        (bench.first_overlay, "overlay", "answer", set(NAMES)),
        (bench.new_names, "overlay", "answer", set()),
        (bench.layer, "attention-grid", "value", None),
        (bench.click, "routing-view", "route", None),
    ]:
        shown = [bench.visitor.value(component, prop)]
        for seconds in action():
            assert seconds > 0
            assert bench.visitor.value(component, prop) not in shown, f"{action.__name__} changed nothing"
            shown.append(bench.visitor.value(component, prop))
        if names is not None:
            assert {each["name"] for each in shown[-1]["classes"]} & set(NAMES) == names
    with pytest.raises(PageError, match="has no event 'hover'"):
        bench.timed("run", "hover", shows="overlay")
    bench.visitor.close()


def test_zerogpu_lends_a_gpu_to_the_full_model_only(tmp_path: Path) -> None:
    """Once for a question, whatever is looked at and downloaded; whose time is used up gets a sentence and lite's answer."""
    copy_space(tmp_path / "app")
    variables = space_variables(tmp_path)
    full = save_tiny_checkpoint(tmp_path / "tiny", metadata={"seen_names": ["zebra"]})
    variables |= {"SPACES_ZERO_GPU": "true", "LDVC_MODEL": "full", "LDVC_FULL": str(full)}
    quota, record = tmp_path / "quota.txt", tmp_path / "spaces.txt"

    def calls() -> list[dict[str, Any]]:
        return [json.loads(line) for line in record.read_text().splitlines()[1:]]

    with serve(tmp_path, folder=tmp_path / "app", environment=variables) as served:
        visitor = Visitor(served.address)
        assert visitor.value("model") == "full"
        visitor.ask("dog, grass, sky", DOG)
        first = visitor.value("overlay", "answer")
        assert not any(each["seen"] for each in first["classes"]) and not visitor.value("run-problem")
        for tab in ("attention", "routing", "space", "compare", "segment"):
            visitor.trigger(f"tab-{tab}", "select")
        (call,) = calls()
        assert call["process"] != call["main"] and 0 < call["duration"] <= 20

        client = Client(served.address, verbose=False)
        question = {"photo": handle_file(str(DOG)), "names": "dog, grass"}
        data = json.loads(Path(client.predict(**question, kind="data", api_name="/download")).read_text("utf-8"))
        assert data["model"]["checkpoint"] == "tiny" and len(data["model"]["weights_sha256"]) == 64
        assert len(calls()) == 2, "a download needs no GPU"

        quota.write_text("3")
        visitor.ask("dog, grass, tree")
        second = visitor.value("overlay", "answer")
        assert all(each["seen"] for each in second["classes"]), "lite saw masks of all three"
        assert "Lite answered" in visitor.value("model-problem") and "vs. 3s left" in visitor.value("model-problem")
        assert not visitor.value("stale") and not visitor.value("run-problem")
        answer = client.predict(**question, api_name="/segment")[2]
        assert answer["model"] == "lite"
        assert len(calls()) == 2

        visitor.set("model", "lite")
        visitor.ask("cup, spoon")
        visitor.trigger("tab-compare", "select")
        assert not visitor.value("model-problem") and visitor.value("overlay", "answer") != second
        assert len(calls()) == 2

        quota.write_text("60")
        visitor.set("model", "full")
        visitor.trigger("run", "click")
        assert len(calls()) == 3 and not visitor.value("model-problem")
        visitor.close()
        client.close()
        assert "Traceback" not in served.log.read_text(), served.log.read_text()
    imported = json.loads(record.read_text().splitlines()[0])
    assert imported == {"event": "imported", "torch_was_there": False}, "spaces must be imported before torch"


def test_refusals_of_zerogpu_become_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason; elsewhere functions stay as they are."""
    problem, asked = Mock(side_effect=[None, gr.Error("No GPU. ", title="ZeroGPU error"), RuntimeError("500")]), []

    def decorator(*, duration: Any) -> Any:
        def lent(function: Any, *arguments: Any) -> Any:
            asked.append(duration(*arguments))
            problem()
            return function(*arguments)

        return lambda function: partial(lent, function)

    monkeypatch.setattr(gpu, "spaces", None)
    assert gpu.on_gpu(abs, float) is abs
    monkeypatch.setattr(gpu, "spaces", SimpleNamespace(GPU=decorator))  # installed, as on a Space with other hardware
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    assert gpu.on_gpu(abs, float) is abs
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    lent = gpu.on_gpu(abs, lambda value: value + 10)
    assert lent(-4) == 4 and asked == [6]
    for reason in ("ZeroGPU error: No GPU.", "ZeroGPU does not answer."):
        with pytest.raises(gpu.NoGpu) as caught:
            lent(4)
        assert caught.value.reason == reason and caught.value.message == f"{reason} The model “lite” needs no GPU."


def test_time_that_is_asked_for() -> None:
    """Grows with what there is to do, and stays far below the minutes that a visitor has."""
    photo, state = np.zeros((8, 8, 3), np.uint8), object.__new__(ImageState)

    def seconds(image: Any, *names: str) -> int:
        return gpu_seconds("full", image, parse_names(list(names)), ("ldvc",), False)

    many = [f"thing {index}" for index in range(200)]
    assert seconds(state, "dog") < seconds(photo, "dog") < seconds(photo, *many) <= 30
