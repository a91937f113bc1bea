"""A run that is killed and resumed equals an uninterrupted run to the last bit, wherever the kill hits."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from unittest.mock import patch

import pytest
from safetensors.torch import load_file

from ldvc.errors import CheckpointError
from ldvc.weights import load_tensors
from tests.forked import Configure, history, make_workplace, run, same_end, train_here
from tools.kill_training import kill_at_random
from train.checkpoints import checkpoints_of, find_checkpoint, read_state
from train.config import ConfigError
from train.train import train

KILLED = -signal.SIGKILL


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (1, ("num_workers=1", "log_steps=4", "checkpointing_steps=1", "views_per_photo={meadow: 2, pets: 1}")),
        (1, ("gradient_accumulation_steps=2", "decoder=zegclip")),
        (2, ("gradient_accumulation_steps=2", "checkpoints_total_limit=1")),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(root: Path, processes: int, changes: tuple[str, ...]) -> None:
    whole, cut = (f"{name}{processes}{len(changes)}" for name in ("whole", "cut"))
    assert run(train_here, root, whole, changes, processes=processes) == [0] * processes
    assert KILLED in run(train_here, root, cut, changes, None, ("step", 3), processes=processes)
    assert checkpoints_of(root / cut)[-1].name == "checkpoint-2" and not (root / cut / "config.json").exists()
    assert run(train_here, root, cut, changes, "latest", processes=processes) == [0] * processes
    log = (root / cut / "log.txt").read_text()
    assert "resumed from" in log and "note:" not in log
    same_end(root / whole, root / cut)


# The function whose n-th call is killed while the second checkpoint is written, and the step that a resumed run starts from.
MOMENTS = {
    "before anything is written": ("train.checkpoints.save_file", 2, 2),
    "weights are written, the optimiser is not": ("accelerate.checkpointing.save", 2, 2),
    "everything is written but step.json": ("train.checkpoints.fsync_folder", 3, 2),
    "complete, the older one still there": ("train.checkpoints.clean_up", 3, 4),
    "the older one marked as incomplete, not yet deleted": ("shutil.rmtree", 1, 4),
    "all steps done, the result not written": ("train.train.save_checkpoint", 1, 4),
}


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """A run without interruption, whose newest checkpoint alone is kept."""
    assert run(train_here, root, "whole", ("checkpoints_total_limit=1",)) == [0]
    assert [path.name for path in checkpoints_of(root / "whole")] == ["checkpoint-4"]
    return root / "whole"


@pytest.mark.parametrize(("function", "number", "left"), MOMENTS.values(), ids=MOMENTS)
def test_a_kill_while_a_checkpoint_is_written_loses_nothing(
    root: Path, whole: Path, function: str, number: int, left: int
) -> None:
    name, changes = f"{function}-{number}", ("checkpoints_total_limit=1",)
    assert run(train_here, root, name, changes, None, ("call", function, number)) == [KILLED]
    assert not (root / name / "config.json").exists()
    assert run(train_here, root, name, changes, "latest") == [0]
    assert f"resumed from {root / name / f'checkpoint-{left}'} at step {left}" in (root / name / "log.txt").read_text()
    same_end(whole, root / name)
    assert [path.name for path in (root / name).glob("checkpoint-*")] == ["checkpoint-4"]


def test_kills_at_random_moments_lose_nothing(tmp_path: Path, tiny_clip_folder: Path) -> None:
    """`python -m tools.kill_training --kills 30` does it for longer; docs/trust.md has its output."""
    kill_at_random(make_workplace(tmp_path, tiny_clip_folder), kills=2, processes=2, seed=2, steps=8)


FULL = {
    "weights": ("train.checkpoints.save_file", OSError(errno.ENOSPC, "No space left on device")),
    "optimiser": ("accelerate.checkpointing.save", RuntimeError("PytorchStreamWriter: file write failed")),
    "step": ("train.checkpoints.fsync_folder", OSError(errno.ENOSPC, "No space left on device")),
}


@pytest.mark.parametrize(("function", "error"), FULL.values(), ids=FULL)
def test_a_full_disk_leaves_the_earlier_checkpoint(configure: Configure, function: str, error: Exception) -> None:
    config = configure(f"full-{function}", "max_train_steps=2")
    folder = train(configure(f"full-{function}", "max_train_steps=1"))
    before = {path.name: path.read_bytes() for path in (folder / "checkpoint-1").iterdir()}
    with patch(function, side_effect=error):
        words = r"checkpoint-2 cannot be written \(.*(No space|write failed).*\); checkpoint-1 is complete\. Free some space"
        with pytest.raises(CheckpointError, match=words):
            train(config, resume="latest")
    assert {path.name: path.read_bytes() for path in (folder / "checkpoint-1").iterdir()} == before
    assert checkpoints_of(train(config, resume="latest"))[-1].name == "checkpoint-2"


def test_a_damaged_optimiser_state_is_a_sentence(configure: Configure) -> None:
    """A damaged train.json does not matter."""
    folder = train(configure("damaged", "max_train_steps=1"))
    (folder / "train.json").write_text('{"model": {"cl')
    config = configure("damaged", "max_train_steps=2")
    train(config, resume="latest")
    assert json.loads((folder / "train.json").read_text())["max_train_steps"] == 2 and not [*folder.glob("*.new")]
    os.truncate(folder / "checkpoint-2" / "optimizer.bin", 1000)
    with pytest.raises(CheckpointError, match="checkpoint-2 cannot be read .*resume from another checkpoint"):
        train(config, resume="latest")


def test_only_what_learns_is_stored(whole: Path, tiny_clip_folder: Path) -> None:
    """Names and sizes, file by file: prompts, adapter and decoder; the frozen towers are a path in train.json."""
    stored = load_file(whole / "checkpoint-4" / "trainable.safetensors")
    assert {name.split(".")[0] for name in stored} == {"image_tower", "text_tower", "adapter", "decoder"}
    learnable = sum(tensor.numel() for tensor in stored.values())
    frozen = sum(tensor.numel() for tensor in load_tensors(tiny_clip_folder).values())
    assert learnable < frozen / 10
    sizes = {path.name: path.stat().st_size for path in (whole / "checkpoint-4").iterdir()}
    assert set(sizes) == {"trainable.safetensors", "optimizer.bin", "random_states_0.pkl", "step.json"}
    assert 4 * learnable <= sizes["trainable.safetensors"] < 4 * learnable + 20_000
    assert 8 * learnable <= sizes["optimizer.bin"] < 8 * learnable + 100_000  # two moments
    assert json.loads((whole / "train.json").read_text())["model"]["clip"] == str(tiny_clip_folder)
    assert read_state(whole / "checkpoint-4")["step"] == 4


def test_a_folder_of_checkpoints_is_not_trained_over_by_mistake(tmp_path: Path) -> None:
    early, late, incomplete = (tmp_path / f"checkpoint-{step}" for step in (2, 10, 12))
    incomplete.mkdir()
    for folder in (early, late):
        folder.mkdir()
        (folder / "step.json").write_text('{"step": 1}')
    assert find_checkpoint(tmp_path, "latest") == find_checkpoint(tmp_path, str(late)) == late
    for wanted, message in (
        (None, "resume_from_checkpoint latest"),
        (str(early), "checkpoint-10, which is not"),
        (str(incomplete), "no checkpoint"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_checkpoint(tmp_path, wanted)
    (late / "step.json").write_text('{"step"')
    with pytest.raises(CheckpointError, match="another checkpoint"):
        read_state(late)


def test_a_resumed_run_logs_changed_settings(root: Path, whole: Path) -> None:
    folder = shutil.copytree(whole, root / "longer")
    with open(folder / "history.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 0}\n{"step": 6, "lo')  # of a run that was killed
    changes = ("train_batch_size=1", "max_train_steps=5", "checkpoints_total_limit=1")
    assert run(train_here, root, "longer", changes, "latest") == [0]
    log = (folder / "log.txt").read_text()
    assert "photos per step 2 -> 1" in log and "max_train_steps 4 -> 5" in log and "seed" not in log
    assert [entry["step"] for entry in history(folder)] == [1, 2, 3, 4, 5]
