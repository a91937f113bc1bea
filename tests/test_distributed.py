"""Two processes are one process with twice the batch, and `accelerate launch` really starts two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tests.forked import history, make_workplace, run, train_here
from train.options import ConfigError
from train.processes import SharedDropout, _end_with, asked_for, start_processes

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "train" / "configs" / "accelerate"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_clip_folder: Path) -> Path:
    return make_workplace(tmp_path_factory.mktemp("distributed"), tiny_clip_folder)


@pytest.mark.parametrize(
    ("decoder", "views", "changes"),
    [("ldvc", 0, ()), ("zegclip", 2, ()), ("zegclip", 0, ("start_at_clip=false", "gate_init=null"))],  # with its dropout
)
def test_two_processes_learn_as_one_with_twice_the_batch(
    root: Path, decoder: str, views: int, changes: tuple[str, ...]
) -> None:
    """With dropout, augmentation and sampled names; with views made afresh, and with stored ones that each run builds for
    itself (two processes: one data set each). Photos differ in how many masks and pixels they have, so a loss that each
    process normalised for itself would differ; a parameter without gradient would stop the second step.
    (Weights are not compared: where a gradient is zero but for rounding, Adam makes a whole step of the rounding.)"""
    shared = (f"decoder={decoder}", "focal_normalise=masks", "validation_steps=4", *changes)
    kind = f"{decoder}{len(changes)}"
    for name, batch, processes in (("one", 4, 1), ("two", 2, 2)):
        own = (f"train_batch_size={batch}", f"views_per_photo={views}", f"cache_dir={root / f'cache-{decoder}-{name}'}")
        assert run(train_here, root, f"{kind}-{name}", (*shared, *own), processes=processes) == [0] * processes
    one, two = history(root / f"{kind}-one"), history(root / f"{kind}-two")
    assert [entry["step"] for entry in two] == [1, 2, 3, 4]
    for left, right in zip(one, two, strict=True):
        assert left == pytest.approx(right, rel=1e-3)
    assert one[0] == pytest.approx(two[0], rel=1e-5)

    def validation(name: str) -> dict:
        lines = (root / f"{kind}-{name}" / "history.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["validation"]

    for name in ("meadow", "pets"):  # three photos each: the shares are uneven
        assert validation("one")[name] == pytest.approx(validation("two")[name], abs=0.02)


def test_shared_dropout_is_the_dropout_of_the_whole_batch() -> None:
    x = torch.randn(3, 4, 2, 5)
    torch.manual_seed(7)
    whole = torch.nn.functional.dropout(x, 0.4)
    for process, part in enumerate(x.split(2, dim=1)):
        layer = SharedDropout(0.4, dim=1, process=process, count=2)
        torch.manual_seed(7)
        torch.testing.assert_close(layer(part), whole.split(2, dim=1)[process])
        assert torch.equal(layer.eval()(part), part)


def test_one_command_starts_two_processes(root: Path) -> None:
    """The command of the README, word by word, in a process of its own."""
    assert run(train_here, root, "forked", ("max_train_steps=2",), processes=2) == [0, 0]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "train/train.py"]
    command += ["--config", str(root / "tiny.yaml"), "--output_dir", str(root / "launched"), "--max_train_steps", "2"]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes x 2 x 1") == 1  # said once, by the main process
    assert history(root / "launched") == history(root / "forked")
    assert (root / "launched" / "config.json").is_file()
    stored = load_file(root / "launched" / "checkpoint-2" / "trainable.safetensors")
    assert {name.split(".")[0] for name in stored} == {"image_tower", "text_tower", "adapter", "decoder"}


def _leave_an_orphan(file: Path) -> None:
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _end_with(parent)
        time.sleep(60)
    file.write_text(str(child))
    os.kill(parent, signal.SIGKILL)


def test_no_process_outlives_a_killed_launcher(tmp_path: Path) -> None:
    assert run(_leave_an_orphan, tmp_path / "child") == [-signal.SIGKILL]
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.1)
                continue
        return
    os.kill(child, signal.SIGKILL)
    pytest.fail("the process went on without its launcher")


@pytest.mark.parametrize(
    ("codes", "told"), [([2, -15], 2), ([-9], "error: a process of the run was killed (signal 9)")]
)
def test_the_launcher_ends_as_its_processes_do(
    codes: list[int], told: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ChildFailedError("train.py", {rank: ProcessFailure(rank, 1, code, "") for rank, code in enumerate(codes)})

    for name in ("LOCAL_RANK", "LDVC_STARTER"):
        monkeypatch.setenv(name, "")  # and back to what it was
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("train.processes.asked_for", lambda command: 2)
    monkeypatch.setattr("train.processes._end_with", lambda parent: None)
    monkeypatch.setattr("train.processes.elastic_launch", lambda launch, program: fail)
    with pytest.raises(SystemExit) as ended:
        start_processes("train.py", [])
    assert ended.value.code == told or str(ended.value.code).startswith(str(told))


def test_the_number_of_processes_is_read_from_the_launcher(tmp_path: Path) -> None:
    launch = ["python", "/venv/bin/accelerate", "launch"]
    script = ["train/train.py", "--config", "lite", "--num_workers", "3"]
    assert asked_for([*launch, "--cpu", "--num_processes", "2", *script]) == 2
    assert asked_for([*launch, "--cpu", "--num-processes=4", *script]) == 4
    assert asked_for(["python", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "3", *script]) == 3
    assert asked_for(["/venv/bin/accelerate-launch", "--cpu", "--num_processes", "2", *script]) == 2
    assert asked_for([*launch, "--config_file", str(CONFIGS / "cpu_2.yaml"), *script]) == 2
    assert asked_for([*launch, "--config_file", str(CONFIGS / "cpu_2.yaml"), "--num_processes", "1", *script]) == 1
    assert asked_for([*launch, "--cpu", *script]) == 1
    assert asked_for(["bash", "-c", "python train/train.py"]) == 1 and asked_for([]) == 1
    with pytest.raises(ConfigError, match="torchrun"):
        asked_for([*launch, "--cpu", "--num_machines", "2", "--num_processes", "4", *script])


def test_shipped_launch_configurations_parse() -> None:
    """By accelerate's own classes; what a GPU machine would do with them was not run."""
    expected = {"cpu_2": "MULTI_CPU", "ddp": "MULTI_GPU"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(expected)
    for name, kind in expected.items():
        config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
        assert config.distributed_type == kind and config.num_processes >= 2 and config.mixed_precision == "no"
        assert config.use_cpu == (name == "cpu_2")
