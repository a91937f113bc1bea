"""What a run tells while it goes, and that telling changes nothing: validation, picture sheets, trackers, uploads, flags."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file

from ldvc.errors import DataError
from ldvc.visualize import colours_for, rgb
from tests.forked import history, make_workplace
from train import hub
from train.data import Vocabulary, open_sets
from train.figures import CELL, GAP, TITLE, Example, draw_sheet, fixed_photos
from train.options import ConfigError, TrainConfig, load_config
from train.progress import Progress, check_trackers
from train.train import main, train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_clip_folder: Path) -> Path:
    return make_workplace(tmp_path_factory.mktemp("validation"), tiny_clip_folder)


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()


def config_of(root: Path, name: str, *changes: str, **fields: Any) -> TrainConfig:
    return load_config(root / "tiny.yaml", list(changes), output_dir=str(root / name), **fields)


@pytest.fixture(scope="module")
def watched(root: Path) -> Path:
    """A run with everything on."""
    return train(config_of(root, "watched", "validation_steps=1", "report_to=tensorboard", "sheet_photos=4"))


def test_validation_does_not_change_the_run(root: Path, watched: Path) -> None:
    plain = train(config_of(root, "plain"))
    assert len(history(plain)) == 4 and history(watched) == history(plain)
    one, two = (load_file(folder / "model.safetensors") for folder in (plain, watched))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_validation_is_what_the_evaluator_says(root: Path, watched: Path) -> None:
    from train.evaluate import evaluate, open_predictor

    lines = [json.loads(line) for line in (watched / "history.jsonl").read_text().splitlines()]
    found = [line for line in lines if "validation" in line]
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    datasets = open_sets(root / "data", ["meadow", "pets"], "val")
    hidden = frozenset({"airplane", "cat"})
    result = evaluate(open_predictor(str(watched)), datasets, unseen=hidden, joint_only=True)
    for name, measures in found[-1]["validation"].items():
        for ours, theirs in (("pAcc", "pAcc"), ("mIoU(S)", "mIoU_S"), ("mIoU(U)", "mIoU_U"), ("hIoU", "hIoU")):
            assert measures[ours] == pytest.approx(result["sets"][name][theirs], abs=1e-3)


def test_sheets_show_the_same_photos_at_every_evaluation(watched: Path) -> None:
    sheets = [np.asarray(Image.open(path)) for path in sorted((watched / "sheets").iterdir())]
    assert [path.name for path in sorted((watched / "sheets").iterdir())] == [
        f"step-00000{n}.png" for n in (1, 2, 3, 4)
    ]
    photos = [sheet[2 * TITLE :, GAP : GAP + CELL][: 4 * 160] for sheet in sheets]
    truths = [sheet[2 * TITLE :, 2 * GAP + CELL : 2 * (GAP + CELL)][: 4 * 160] for sheet in sheets]
    predictions = [sheet[2 * TITLE :, 3 * GAP + 2 * CELL : 3 * (GAP + CELL)][: 4 * 160] for sheet in sheets]
    assert all((other == photos[0]).all() for other in photos) and all((other == truths[0]).all() for other in truths)
    assert photos[0].std() > 20 and any((other != predictions[0]).any() for other in predictions)


def test_trackers_get_losses_and_sheets(watched: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watched / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([e["loss"] for e in history(watched)])
    assert "validation/meadow/mIoU" in events.Tags()["scalars"] and events.Tags()["images"] == ["validation"]


def test_a_sheet_says_what_it_shows() -> None:
    truth = np.zeros((40, 56), dtype=np.int64)
    truth[:, 28:] = 1
    truth[:10] = -1
    row = Example(np.full((40, 56, 3), 128, dtype=np.uint8), truth, np.zeros_like(truth), ["grass", "cat", "sky"])
    sheet = np.asarray(draw_sheet([row], seen=lambda name: name != "cat", title="step 1"))
    cell = sheet[2 * TITLE : 2 * TITLE + 160]
    mistakes = cell[:, 4 * GAP + 3 * CELL :][:, :CELL]
    red = (mistakes == (214, 39, 40)).all(axis=2)
    assert red[45:, 115:].all() and not red[:38].any() and not red[:, :110].any()  # void is no mistake
    legend = sheet[2 * TITLE + 160 + GAP :]
    grass, cat, sky = ((legend == rgb(colour)).all(axis=2).any() for colour in colours_for(["grass", "cat", "sky"]))
    assert grass and cat and not sky  # only what is in the pictures


class Photos:
    """A data set of which only the number of photos matters, and which of them are broken."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def pair(self, index: int) -> None:
        if index in self.broken:
            raise DataError("broken")


def test_photos_of_a_sheet_are_spread_evenly() -> None:
    assert fixed_photos([Photos(100), Photos(1)], 6) == [(0, 16), (0, 50), (0, 83), (1, 0)]
    assert fixed_photos([Photos(100, broken=(50, 51))], 3) == [(0, 16), (0, 52), (0, 83)]


def test_a_resumed_run_forgets_what_was_said_after_its_checkpoint(root: Path) -> None:
    from accelerate import Accelerator

    folder = root / "forgets"
    folder.mkdir()
    lines = [json.dumps({"step": step, "loss": step / 2}) for step in (1, 2, 3)]
    (folder / "history.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    state = {"step": 2, "parts": ["loss"], "sums": [1.5], "count": 1}
    progress = Progress(Accelerator(cpu=True), config_of(root, "forgets", "log_steps=3"), photos=2, state=state)
    assert [entry["step"] for entry in history(folder)] == [1, 2]
    progress.add({"loss": torch.tensor(2.5)})
    progress.advance(0.1)
    progress.close()
    assert history(folder)[-1] == {"step": 3, "loss": 2.0, "lr": 0.1}  # the mean of before and after


class FakeHub:
    """Stands in for huggingface_hub.HfApi and remembers what it was asked."""

    calls: list[tuple[str, dict[str, Any]]] = []
    broken = False

    def __init__(self, token: str) -> None:
        assert token == "hf_test"

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if repo_id.startswith("stranger/"):
            raise RuntimeError("403 Forbidden: you have no write access.\nRequest ID 1")
        self.calls.append(("create", {"repo_id": repo_id, **options}))
        return type("Url", (), {"repo_id": f"me/{repo_id}"})

    def upload_folder(self, **options: Any) -> str:
        if self.broken:
            raise ConnectionError("no network")
        self.calls.append(("upload", options))
        return f"https://huggingface.co/{options['repo_id']}/commit/1"


def test_push_to_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    monkeypatch.setattr(hub, "HfApi", FakeHub)
    FakeHub.calls.clear()
    config = config_of(root, "watched", push_to_hub=True, hub_model_id="ldvc-tiny")
    with pytest.raises(hub.HubError, match="folder of this machine"):
        hub.open_repository(config)
    config = config_of(root, "watched", push_to_hub=True, hub_model_id="ldvc-tiny", clip="lite")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(hub.HubError, match="HF_TOKEN"):
        hub.open_repository(config)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with pytest.raises(hub.HubError, match="403 Forbidden: you have no write access[.]$"):
        hub.open_repository(config_of(root, "x", push_to_hub=True, hub_model_id="stranger/x", clip="lite"))
    assert hub.open_repository(config) == "me/ldvc-tiny"

    folder = root / "upload"
    for name in (
        "config.json",
        "model.safetensors",
        "train.json",
        ".training",
        "checkpoint-4/optimizer.bin",
        "sheets/step-000004.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    assert hub.push(folder, "me/ldvc-tiny", config).endswith("/commit/1")
    kind, asked = FakeHub.calls[-1]
    assert kind == "upload" and asked["repo_id"] == "me/ldvc-tiny" and asked["folder_path"] == folder
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    kept = set(filter_repo_objects(files, ignore_patterns=asked["ignore_patterns"]))
    assert kept == {"README.md", "config.json", "model.safetensors", "train.json", "sheets/step-000004.png"}
    assert 'from_pretrained("me/ldvc-tiny")' in (folder / "README.md").read_text()
    monkeypatch.setattr(FakeHub, "broken", True)
    with pytest.raises(hub.HubError, match="resume_from_checkpoint latest"):
        hub.push(folder, "me/ldvc-tiny", config)


BAD = {
    "--max_train_steps=0": "max_train_steps must be at least 1",
    "--learning_rate=-1": "learning_rate must be more than 0",
    "--mixed_precision=half": "mixed_precision is auto, no, bf16 or fp16",
    "--mixed_precision=fp16": "needs a GPU",
    "--report_to=paper": "report_to is tensorboard or wandb",
    "--push_to_hub": "--hub_model_id",
    "--data=/nowhere": "/nowhere does not exist",
    "--resume_from_checkpoint=/nowhere": "no checkpoint to resume from",
    "--validation_steps=1 --validation_sets nothing": "nothing",
    "--output_dir=/proc/ldvc": "cannot be written",
    "--config=nonsense": "Known ones",
}


@pytest.mark.parametrize("flags", BAD)
def test_a_wrong_flag_is_one_sentence(root: Path, flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as error:
        main(["--config", str(root / "tiny.yaml"), "--output_dir", str(root / "bad"), *flags.split()])
    words = str(error.value.code)
    assert words.startswith("error: ") and BAD[flags] in words and "Traceback" not in words


def test_wrong_kinds_of_flags_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--seed", "three"], ["--decoder", "unet"], ["--max_train_steps", "1.5"], ["--nonsense"]):
        with pytest.raises(SystemExit) as error:
            main(flags)
        assert error.value.code == 2 and flags[0] in capsys.readouterr().err


def test_a_tracker_that_is_not_installed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.progress.get_available_trackers", lambda: [])
    check_trackers(None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        check_trackers("tensorboard")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("max_train_steps=many", "whole number, not 'many'"),
        ("train_batch_size=0", "at least 1"),
        ("sets={meadow: a}", "mapping of numbers"),
        ("sets={meadow: 0}", "one must be more than 0"),
        ("validation_sets=meadow", "must be a list"),
        ("scale=[2, 1]", "smallest and largest"),
        ("learning_rate=.nan", "a number"),
        ("model=3", "mapping of fields"),
        ("sets={", "not valid YAML"),
    ],
)
def test_wrong_values_of_fields(root: Path, change: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(root, "unused", change)


def test_numbers_as_people_write_them(root: Path) -> None:
    config = config_of(
        root, "2026", "max_train_steps=2e4", "learning_rate=3e-4", "weight_decay=0", "decoder=zegclip", "gate_init=5e-2",
        "inference={long_side: 448, enlarge: 1e1}",
    )  # fmt: skip
    assert config.model["gate_init"] == 0.05 and config.inference == {"long_side": 448, "enlarge": 10}
    assert config.max_train_steps == 20_000 and config.learning_rate == 3e-4 and config.model["decoder"] == "zegclip"
    assert load_config(root / "tiny.yaml", ["output_dir=2026"]).output_dir == "2026"


def test_validation_touches_no_random_numbers(root: Path, watched: Path) -> None:
    from accelerate import Accelerator

    from ldvc.checkpoint import load_checkpoint
    from train.validation import Validation

    config = config_of(root, "apart", "validation_split=val", "sheet_photos=2")
    vocabulary = Vocabulary(open_sets(root / "data", ["meadow", "pets"], "train"), config.held_out())
    model, _ = load_checkpoint(watched)
    model.train()
    modes = [module.training for module in model.modules()]
    validation = Validation(config, vocabulary, Accelerator(cpu=True))

    def next_numbers() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = next_numbers()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    results, sheet = validation(model, 9)
    assert next_numbers() == expected and [module.training for module in model.modules()] == modes
    assert set(results) == {"meadow", "pets"} and sheet.dtype == np.uint8
    assert (root / "apart" / "sheets" / "step-000009.png").is_file()
