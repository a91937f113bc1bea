"""Training runs of a second on tiny towers and tiny data, also in processes of their own, which may be killed.

A fork server imports the trainer once; every run is a fork of it, so that a process costs no import, and the test process keeps
no process group, no accelerator state and no killed files of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.tiny_data import make_sets

if TYPE_CHECKING:
    from train.config import TrainConfig

Configure = Callable[..., "TrainConfig"]
"""The fixture `configure`: (name of a run, *changes) -> its configuration."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.train"])
CONCEPTS = ["zebra", "teapot", "dog", "aeroplane", "kitten", "violin", "bridge", "lamp", "river"]
SETTINGS = """
model: {{clip: {clip}, pretrained: null, visual_prompts: 2, decoder_layers: 2, decoder_heads: 4, regions: 2, topk: 2}}
data: {root}/data
cache_dir: {root}/cache
sets: {{meadow: 0.5, pets: 0.5}}
unseen: lite_experiment
crop: 64
long_side: 80
short_side: null
loss_stride: 4
full_vocabulary: 0.5
distill_per_step: 4
distill_weight: 100.0
distill_unannotated_weight: 100.0
distillation_names: {root}/concepts.txt
focal_normalise: pairs
ignore_as_negative: false
learning_rate: 1.0e-3
prompt_multiplier: 1.0
head_multiplier: 1.0
warmup_steps: 1
max_train_steps: 4
train_batch_size: 2
checkpointing_steps: 2
log_steps: 1
inference: {{long_side: 80}}
"""


def make_workplace(root: Path, clip: Path) -> Path:
    """Photos, concepts and a configuration `tiny.yaml`: visual-prompt dropout, augmentation, sampled names, all at random."""
    make_sets(root / "data")
    (root / "concepts.txt").write_text("\n".join(CONCEPTS) + "\n")
    (root / "tiny.yaml").write_text(SETTINGS.format(root=root, clip=clip))
    return root


def config_of(root: Path, name: str, *changes: str) -> TrainConfig:
    """The configuration of the run `name` in a workplace."""
    from train.config import load_config

    return load_config(root / "tiny.yaml", changes, output_dir=str(root / name))


def history(folder: Path) -> list[dict[str, Any]]:
    """The loss curve that a run has written, without its validations."""
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "validation" not in entry]


def same_end(left: Path, right: Path) -> None:
    """Two finished runs agree in weights, optimiser state and loss curve, bit by bit."""
    import torch
    from safetensors.torch import load_file

    from train.checkpoints import checkpoints_of

    first, second = (checkpoints_of(folder)[-1] for folder in (left, right))
    assert first.name == second.name
    for file in ("trainable.safetensors", "../model.safetensors"):
        one, two = load_file(first / file), load_file(second / file)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), file
    one, two = (torch.load(path / "optimizer.bin", weights_only=True) for path in (first, second))
    assert one["param_groups"] == two["param_groups"] and one["state"].keys() == two["state"].keys()
    for index, state in one["state"].items():
        assert all(torch.equal(state[key], two["state"][index][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert history(left) == history(right)


def _work(function: Callable, arguments: tuple, rank: int, count: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for workers of a loader, as in a process of one's own
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(*arguments)


def run(function: Callable, *arguments: Any, processes: int = 1, seconds: float = 240) -> list[int]:
    """Calls a function in every process of a group and returns the exit codes; a process that dies takes the others along."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    jobs = [(function, arguments, rank, processes, port) for rank in range(processes)]
    group = [CONTEXT.Process(target=_work, args=job) for job in jobs]
    for process in group:
        process.start()
    end = time.monotonic() + seconds
    while any(process.is_alive() for process in group):
        failed = any(process.exitcode not in (None, 0) for process in group)
        if failed or time.monotonic() > end:
            for process in group:
                process.kill()
        time.sleep(0.02)
    return [process.exitcode for process in group]


def train_here(root: Path, name: str, changes: Sequence[str] = (), resume: str | None = None, die: tuple = ()) -> None:
    """One training in this process, with changes "key=value" of the configuration.

    `die`: ("step", n): killed as soon as step n is done. ("call", "module.function", n): killed at the n-th call of it.
    """
    import train.train as trainer

    on_step = None
    if die[:1] == ("step",):
        on_step = lambda step, _: step == die[1] and os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    elif die:
        kill_at(die[1], die[2])
    trainer.train(config_of(root, name, *changes), resume=resume, on_step=on_step)


def kill_at(target: str, number: int) -> None:
    """From now on the n-th call of a function kills this process before the function does anything."""
    import importlib

    module_name, _, attribute = target.rpartition(".")
    module = importlib.import_module(module_name)
    original, calls = getattr(module, attribute), iter(range(1, number + 1))

    def wrapper(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(module, attribute, wrapper)
