"""A run that is killed and resumed is the run that was not: to the last bit, wherever the kill hits."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.forked import history, make_workplace, run, train_here
from train.checkpoints import checkpoints_of, read_state

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_clip_folder: Path) -> Path:
    return make_workplace(tmp_path_factory.mktemp("resume"), tiny_clip_folder)


def same_end(left: Path, right: Path) -> None:
    """Two finished runs agree in weights, optimiser state and loss curve, bit by bit."""
    first, second = (checkpoints_of(folder)[-1] for folder in (left, right))
    assert first.name == second.name
    for file in ("trainable.safetensors", "../model.safetensors"):
        one, two = load_file(first / file), load_file(second / file)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), file
    one, two = (torch.load(path / "optimizer.bin", weights_only=True) for path in (first, second))
    assert one["param_groups"] == two["param_groups"] and one["state"].keys() == two["state"].keys()
    assert all(
        torch.equal(one["state"][index][key], two["state"][index][key])
        for index in one["state"]
        for key in ("step", "exp_avg", "exp_avg_sq")
    )
    assert history(left) == history(right)


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (1, ("num_workers=1", "log_steps=4", "checkpointing_steps=1")),
        (1, ("gradient_accumulation_steps=2", "arm=zegclip")),
        (2, ("gradient_accumulation_steps=2", "checkpoints_total_limit=1")),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(root: Path, processes: int, changes: tuple[str, ...]) -> None:
    name = f"run{processes}{len(changes)}"
    assert run(train_here, root, f"{name}-whole", changes, processes=processes) == [0] * processes
    codes = run(train_here, root, f"{name}-cut", changes, None, ("step", 3), processes=processes)
    assert KILLED in codes and not (root / f"{name}-cut" / "config.json").exists()
    assert checkpoints_of(root / f"{name}-cut")[-1].name == "checkpoint-2"
    assert run(train_here, root, f"{name}-cut", changes, "latest", processes=processes) == [0] * processes
    assert "resumed from" in (root / f"{name}-cut" / "log.txt").read_text()
    same_end(root / f"{name}-whole", root / f"{name}-cut")
