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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from huggingface_hub import SpaceHardware
from packaging.requirements import Requirement
from PIL import Image

from tests.tiny import save_tiny_checkpoint
from tools.page_latency import NAMES, Bench
from tools.publish_space import ROOT, space_files
from tools.remote import PageError, Served, Visitor, serve

HOSTING = Path(__file__).with_name("hosting")
DOG = ROOT / "assets" / "examples" / "dog.jpg"

# ---- what Spaces accepts ---------------------------------------------------------------------------------------------

COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
ZEROGPU_TORCH = ("2.8.0", "2.9.1", "2.10.0", "2.11.0")  # as its own error message lists them


def requirements() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {each.name: each for each in found}


def test_front_matter() -> None:
    """Fields and values as the configuration reference of Spaces has them."""
    _, block, _ = (ROOT / "README.md").read_text("utf-8").split("---\n", 2)
    card = yaml.safe_load(block)
    accepted = "title emoji colorFrom colorTo sdk sdk_version python_version app_file pinned license short_description"
    assert set(card) <= {*accepted.split(), "suggested_hardware", "tags"}
    assert card["sdk"] == "gradio" and card["app_file"] in space_files()
    assert card["colorFrom"] in COLOURS and card["colorTo"] in COLOURS
    assert len(card["emoji"]) <= 2 and not card["emoji"].isascii()
    assert 0 < len(card["short_description"]) <= 60
    assert isinstance(card["python_version"], str) and card["python_version"] in ("3.10", "3.11", "3.12")
    assert card["license"] in {"apache-2.0", "other"}
    assert card["suggested_hardware"] in {each.value for each in SpaceHardware}
    assert isinstance(card["pinned"], bool)
    # Spaces installs this version of Gradio together with requirements.txt, so the two must agree.
    assert requirements()["gradio"].specifier.contains(card["sdk_version"])


def test_requirements_have_room_for_zerogpu() -> None:
    """Every torch that ZeroGPU supports, the torchvision that belongs to it, and what the tests ran with."""
    torch, torchvision = (requirements()[name].specifier for name in ("torch", "torchvision"))
    for version in ZEROGPU_TORCH:
        minor = int(version.split(".")[1])
        assert torch.contains(version) and torchvision.contains(f"0.{minor + 15}.0")
    assert not torch.contains("2.7.1")
    import torch as installed

    assert torch.contains(installed.__version__.split("+")[0])


# ---- the page on a Space ---------------------------------------------------------------------------------------------


def space_variables(scratch: Path) -> dict[str, str]:
    """The environment of a Space, and nothing of ours but the guard that is its missing network."""
    home = scratch / "home"
    home.mkdir()
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "SYSTEM": "spaces",
        "SPACE_ID": "ann/ldvc",
        "SPACE_AUTHOR_NAME": "ann",
        "SPACE_REPO_NAME": "ldvc",
        "SPACE_TITLE": "LDVC",
        "SPACE_HOST": "ann-ldvc.hf.space",
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_NUM_PORTS": "1",
        "GRADIO_THEME": "huggingface",
        "GRADIO_ALLOW_FLAGGING": "never",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(copy_packages(scratch)),
        "LDVC_SPACES_RECORD": str(scratch / "spaces.txt"),
        "LDVC_GUARD_RECORD": str(scratch / "guard.txt"),
        "LDVC_GUARD_FOLDER": str(ROOT),
        **{name: value for name, value in os.environ.items() if name == "OMP_NUM_THREADS"},
    }


def copy_packages(scratch: Path) -> Path:
    """The guard and the stand-in for `spaces`, in a folder of their own: the served process must open nothing of ours."""
    folder = scratch / "packages"
    shutil.copytree(HOSTING / "packages", folder)
    information = folder / "spaces-0.51.3.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: spaces\nVersion: 0.51.3\n")
    return folder


def copy_space(folder: Path) -> set[str]:
    """Exactly what would be uploaded."""
    names = space_files()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (os.link if name.endswith(".safetensors") else shutil.copy)(ROOT / name, folder / name)  # weights are only read
    return set(names)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    scratch = tmp_path_factory.mktemp("space")
    pushed = copy_space(scratch / "app")
    variables = space_variables(scratch)
    with serve(scratch, folder=scratch / "app", environment=variables) as served:
        yield served
        record = scratch / "guard.txt"
        assert not record.exists(), f"the page reached for what a Space does not have:\n{record.read_text()}"
        assert "Traceback" not in served.log.read_text(), served.log.read_text()
    after = {path.relative_to(scratch / "app").as_posix() for path in (scratch / "app").rglob("*") if path.is_file()}
    assert after == pushed, "the page wrote into its own folder"


def test_the_guard_guards(tmp_path: Path) -> None:
    """Otherwise the tests below would say nothing."""
    variables = space_variables(tmp_path)
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
    run = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["PermissionError", "PermissionError"]
    record = (tmp_path / "guard.txt").read_text().splitlines()
    assert record[0] == f"opened {ROOT / 'LICENSE'}"
    assert record[1].endswith("huggingface.co") and record[2].endswith("8.8.8.8")


def test_space_serves_its_first_page(space: Served) -> None:
    page = httpx.get(space.address, trust_env=False)
    assert page.status_code == 200 and "LDVC" in page.text


def test_space_finds_the_dog_on_the_grass(space: Served) -> None:
    from gradio_client import Client, handle_file

    client = Client(space.address, verbose=False)
    answer = client.predict(
        photo=handle_file(str(DOG)), names="dog, grass", use_background=False, threshold=0.5, api_name="/segment"
    )
    labels = np.asarray(Image.open(answer[1]).convert("L"))
    assert labels.shape == Image.open(DOG).size[::-1]
    assert (labels[240:420, 320:700] == 1).mean() > 0.9  # its flank
    assert (labels[680:768, 0:1024] == 2).mean() > 0.6  # most of the meadow before it; lite draws animals too fat
    client.close()


def test_program_of_the_readme(space: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Runs as it stands in the README, and leaves no endpoint of the page out."""
    import gradio_client

    readme = (ROOT / "README.md").read_text("utf-8")
    (program,) = [each for each in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "gradio_client" in each]
    client = gradio_client.Client(space.address, verbose=False)
    asked_for = []
    monkeypatch.setattr(gradio_client, "Client", lambda address: asked_for.append(address) or client)
    monkeypatch.chdir(ROOT)
    found: dict[str, Any] = {}
    exec(program, found)

    assert asked_for == ["http://127.0.0.1:7860/"]
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == set(re.findall(r'api_name="(/\w+)"', program))
    assert capsys.readouterr().out.startswith("dog seen 0.")
    size = Image.open(DOG).size
    labels = np.asarray(Image.open(found["labels"]).convert("L"))
    assert Image.open(found["overlay"]).size == size == labels.shape[::-1]
    for index, each in enumerate(found["data"]["classes"], start=1):
        assert each["area"] == pytest.approx((labels == index).mean(), abs=1e-3)
    assert [each["name"] for each in found["data"]["classes"]] == ["dog", "grass", "cat"]
    assert json.loads(Path(found["file"]).read_text("utf-8"))  # the last kind: data
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
    shown = {}
    for action, component, prop in [
        (bench.first_overlay, "overlay", "answer"),
        (bench.new_names, "overlay", "answer"),
        (bench.layer, "attention-grid", "value"),
        (bench.click, "routing-view", "route"),
    ]:
        before = [bench.visitor.value(component, prop)]
        for seconds in action():
            assert seconds > 0
            assert bench.visitor.value(component, prop) not in before, f"{action.__name__} changed nothing"
            before.append(bench.visitor.value(component, prop))
        shown[action.__name__] = before[-1]
    assert [each["name"] for each in shown["first_overlay"]["classes"]] == list(NAMES)
    assert not {each["name"] for each in shown["new_names"]["classes"]} & set(NAMES)
    with pytest.raises(PageError, match="has no event 'hover'"):
        bench.timed("run", "hover", shows="overlay")
    bench.visitor.close()


# ---- ZeroGPU ---------------------------------------------------------------------------------------------------------


def test_zerogpu_borrows_a_gpu_for_each_computation(tmp_path: Path) -> None:
    """Functions that need the model run in another process, and the page works."""
    pushed = tmp_path / "app"
    copy_space(pushed)
    variables = space_variables(tmp_path)
    variables |= {"SPACES_ZERO_GPU": "true", "LDVC_MODEL": str(save_tiny_checkpoint(tmp_path / "tiny"))}
    with serve(tmp_path, folder=pushed, environment=variables) as served:
        visitor = Visitor(served.address)
        visitor.set("photo", visitor.upload(DOG))
        visitor.set("names", "dog, grass, sky")
        visitor.trigger("run", "click")
        first = visitor.value("overlay", "answer")
        for tab in ("attention", "routing", "space", "compare", "segment"):
            visitor.trigger(f"tab-{tab}", "select")
        visitor.set("names", "cup, spoon")
        visitor.trigger("run", "click")
        assert visitor.value("overlay", "answer")["labels"] != first["labels"]
        assert not visitor.value("run-problem")
        visitor.close()
        assert "Traceback" not in served.log.read_text(), served.log.read_text()
    imported, *calls = [json.loads(line) for line in (tmp_path / "spaces.txt").read_text().splitlines()]
    assert imported == {"event": "imported", "torch_was_there": False}, "spaces must be imported before torch"
    assert calls and all(call["process"] != call["main"] and call["duration"] <= 60 for call in calls)


def test_without_zerogpu_functions_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from ldvc.web import gpu

    def double(value: int) -> int:
        return 2 * value

    monkeypatch.setattr(gpu, "spaces", None)
    assert gpu.on_gpu(double) is double
    monkeypatch.setattr(gpu, "spaces", object())  # installed, as on a Space with other hardware
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    assert gpu.on_gpu(double) is double
