"""Two processes learn as one process with twice the batch, and torchrun starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.forked import history, run, train_here
from train.config import ConfigError, load_config
from train.processes import build_accelerator

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize(("decoder", "views"), [("ldvc", 0), ("zegclip", 2)])
def test_two_processes_learn_as_one_with_twice_the_batch(root: Path, decoder: str, views: int) -> None:
    """Without dropout, of which every process draws its own; with augmentation and sampled names, with and without stored
    views. Photos have different numbers of masks and pixels, so a loss that each process normalised for itself would differ.
    (Weights are not compared: where a gradient is zero but for rounding, Adam turns the rounding into a whole step.)"""
    shared = (f"decoder={decoder}", "focal_normalise=masks", "visual_prompt_dropout=0")
    shared += ("max_train_steps=3", "validation_steps=3")
    for name, batch, processes in (("one", 4, 1), ("two", 2, 2)):
        own = (f"train_batch_size={batch}", f"views_per_photo={views}", f"cache_dir={root / f'cache-{decoder}-{name}'}")
        assert run(train_here, root, f"{decoder}-{name}", (*shared, *own), processes=processes) == [0] * processes
    one, two = history(root / f"{decoder}-one"), history(root / f"{decoder}-two")
    assert [entry["step"] for entry in two] == [1, 2, 3]
    for left, right in zip(one, two, strict=True):
        assert left == pytest.approx(right, rel=1e-3)
    assert one[0] == pytest.approx(two[0], rel=1e-5)

    def validation(name: str) -> dict:
        lines = (root / f"{decoder}-{name}" / "history.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["validation"]

    for name in ("meadow", "pets"):  # three photos each: the shares are uneven
        assert validation("one")[name] == pytest.approx(validation("two")[name], abs=0.02)


def test_torchrun_starts_two_processes(root: Path) -> None:
    """The command of the README, in a process of its own."""
    assert run(train_here, root, "forked", ("max_train_steps=2",), processes=2) == [0, 0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train/train.py"]
    command += ["--config", str(root / "tiny.yaml"), "--output_dir", str(root / "launched"), "--max_train_steps", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes x 2 x 1") == 1  # printed by the main process alone
    assert history(root / "launched") == history(root / "forked")
    assert (root / "launched" / "config.json").is_file()


def test_accelerate_launch_with_several_processes_on_a_cpu_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets these two variables and starts one process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ConfigError, match="use torchrun --nproc_per_node"):
        build_accelerator(load_config(root / "tiny.yaml"))


def test_the_shipped_launch_configuration_parses() -> None:
    """With accelerate's own class; no test machine has several GPUs."""
    config = load_config_from_file(str(REPOSITORY / "train" / "configs" / "accelerate" / "ddp.yaml"))
    assert config.distributed_type == "MULTI_GPU" and config.num_processes >= 2 and config.mixed_precision == "no"
