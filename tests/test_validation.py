"""Validation, figures, trackers, uploads and flags of a run; validation does not change the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, create_autospec

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file

from ldvc.errors import DataError
from ldvc.visualize import colours_for, rgb
from tests.forked import config_of, history
from train import hub
from train.data import open_sets
from train.evaluate import evaluate, open_predictor
from train.train import main, train
from train.validation import WRONG, Example, draw_figure, fixed_photos, panels


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()


@pytest.fixture(scope="module")
def watched(root: Path) -> Path:
    """A run with everything on."""
    return train(config_of(root, "watched", "validation_steps=2", "report_to=tensorboard"))


def test_validation_does_not_change_the_run(root: Path, watched: Path) -> None:
    plain = train(config_of(root, "plain"))
    assert len(history(plain)) == 4 and history(watched) == history(plain)
    one, two = (load_file(folder / "model.safetensors") for folder in (plain, watched))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_validation_equals_the_evaluator(root: Path, watched: Path) -> None:
    lines = [json.loads(line) for line in (watched / "history.jsonl").read_text().splitlines()]
    found = [line for line in lines if "validation" in line]
    assert [line["step"] for line in found] == [2, 4]
    datasets = open_sets(root / "data", ["meadow", "pets"], "val")
    held_out = frozenset({"airplane", "cat"})
    result = evaluate(open_predictor(str(watched)), datasets, unseen=held_out, joint_only=True)
    for name, measures in found[-1]["validation"].items():
        for ours, theirs in (("pAcc", "pAcc"), ("mIoU(S)", "mIoU_S"), ("mIoU(U)", "mIoU_U"), ("hIoU", "hIoU")):
            assert measures[ours] == pytest.approx(result["sets"][name][theirs], abs=1e-3)


def test_every_evaluation_has_a_figure(watched: Path) -> None:
    first, last = (np.asarray(Image.open(watched / "figures" / f"step-00000{step}.png")) for step in (2, 4))
    assert len(list((watched / "figures").iterdir())) == 2 and first.std() > 20
    height, width, _ = first.shape
    rows = slice(height // 8, -height // 4)  # without title and legend
    assert np.array_equal(first[rows, : width // 4], last[rows, : width // 4]), "the photos"
    assert not np.array_equal(first[rows, width // 2 :], last[rows, width // 2 :]), "the predictions"


def test_trackers_get_losses_and_figures(watched: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watched / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([e["loss"] for e in history(watched)])
    assert "validation/meadow/mIoU" in events.Tags()["scalars"] and events.Tags()["images"] == ["validation"]


def test_a_figure_shows_mistakes_and_a_legend() -> None:
    truth = np.zeros((40, 56), dtype=np.int64)
    truth[:, 28:], truth[:10] = 1, -1
    row = Example(np.full((40, 56, 3), 128, dtype=np.uint8), truth, np.zeros_like(truth), ["grass", "cat", "sky"])
    colours = dict(zip(row.names, colours_for(row.names), strict=True))
    photo, _, _, mistakes = panels(row, colours, {"grass", "sky"})
    assert np.array_equal(photo, row.photo)
    red = (mistakes == WRONG).all(axis=2)
    assert red[10:, 28:].all() and not red[:10].any() and not red[:, :28].any()  # void is no mistake
    figure = draw_figure([row], seen={"grass", "sky"}, title="step 1")
    legend = figure[-figure.shape[0] // 6 :]
    grass, cat, sky = ((legend == rgb(colours[name])).all(axis=2).any() for name in row.names)
    assert grass and cat and not sky  # only names that the pictures show


def test_photos_of_a_figure_are_spread_evenly() -> None:
    many, one = MagicMock(__len__=lambda _: 100), MagicMock(__len__=lambda _: 1)
    assert fixed_photos([many, one], 6) == [(0, 16), (0, 50), (0, 83), (1, 0)]
    many.pair.side_effect = [None, DataError("broken"), DataError("broken"), None, None]
    assert fixed_photos([many], 3) == [(0, 16), (0, 52), (0, 83)]


def test_push_to_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = create_autospec(HfApi, instance=True)
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    here = config_of(root, "watched", "push_to_hub=true", "hub_model_id=ldvc-tiny")
    config = replace(here, model=replace(here.model, clip="lite"))
    api.create_repo.side_effect = RuntimeError("403 Forbidden: you have no write access.\nRequest ID 1")
    for given, token, words in (
        (here, "hf_test", "folder of this machine"),
        (config, None, "HF_TOKEN"),
        (config, "hf_test", "403 Forbidden: you have no write access[.]$"),
    ):
        monkeypatch.setattr(hub, "get_token", lambda token=token: token)
        with pytest.raises(hub.HubError, match=words):
            hub.open_repository(given)
    api.create_repo.side_effect = lambda repo_id, exist_ok: SimpleNamespace(repo_id=f"me/{repo_id}")
    assert hub.open_repository(config) == "me/ldvc-tiny"

    folder, kept = root / "upload", {"config.json", "model.safetensors", "train.json", "figures/step-000004.png"}
    for name in (*kept, ".training", "checkpoint-4/optimizer.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    hub.push(folder, "me/ldvc-tiny", config)
    options = api.upload_folder.call_args.kwargs
    assert options["repo_id"] == "me/ldvc-tiny" and options["folder_path"] == folder
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert {*filter_repo_objects(files, ignore_patterns=options["ignore_patterns"])} == {"README.md", *kept}
    assert 'from_pretrained("me/ldvc-tiny")' in (folder / "README.md").read_text()
    api.upload_folder.side_effect = ConnectionError("no network")
    with pytest.raises(hub.HubError, match="resume_from_checkpoint latest"):
        hub.push(folder, "me/ldvc-tiny", config)


BAD = {
    "--max_train_steps=0": "max_train_steps must be greater than 0, not '0'",
    "--mixed_precision=fp16": "needs a GPU",
    "--push_to_hub": "--hub_model_id",
    "--data=/nowhere": "/nowhere does not exist",
    "--resume_from_checkpoint=/nowhere": "no checkpoint to resume from",
    "--validation_steps=1 --validation_sets nothing": "nothing",
    "--output_dir=/proc/ldvc": "cannot be written",
    "--config=nonsense": "Known ones",
    "--report_to=wandb": "pip install wandb",
}


@pytest.mark.parametrize("flags", BAD)
def test_a_wrong_flag_is_one_sentence(root: Path, flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("train.progress.get_available_trackers", lambda: [])
    with pytest.raises(SystemExit) as error:
        main(["--config", str(root / "tiny.yaml"), "--output_dir", str(root / "bad"), *flags.split()])
    words = str(error.value.code)
    assert words.startswith("error: ") and BAD[flags] in words and "Traceback" not in words
