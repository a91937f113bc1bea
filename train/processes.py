"""The processes of a run: how they are started, and what they share.

`accelerate launch --cpu --num_processes 2 train/train.py` starts one process only (accelerate 1.15 leaves several processes on
a CPU to MPI), so that process starts the two itself, with PyTorch's own launcher. With GPUs, accelerate starts them.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn import functional as F

from ldvc.modeling.model import LDVC
from train.losses import Processes
from train.options import ConfigError, TrainConfig

_RANKS = ("LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_STARTER = "LDVC_STARTER"  # number of the process that started the others
_PATIENCE = timedelta(hours=6)  # the others wait while one process builds a bank of views


def asked_for(command: Sequence[str]) -> int:
    """How many processes a command line of `accelerate launch` asks for on this machine; 1 if it is none.

    Args:
        command: the words of the command, such as ["python", "/bin/accelerate", "launch", "--num_processes", "2", ...].
    """
    for place, word in enumerate(command):
        if word == "accelerate.commands.launch" or Path(word).name == "accelerate-launch":
            start = place + 1
            break
        if Path(word).name == "accelerate" and command[place + 1 : place + 2] == ["launch"]:
            start = place + 2
            break
    else:
        return 1
    options = launch_command_parser().parse_args(list(command[start:]))
    file = options.config_file or (default_config_file if not options.cpu else None)
    given = load_config_from_file(file) if file and Path(file).is_file() else None
    count = options.num_processes or (given.num_processes if given else 1)
    machines = options.num_machines or (given.num_machines if given else 1)
    if machines > 1:
        raise ConfigError(
            "Several machines without GPUs need torchrun: torchrun --nnodes N --nproc_per_node M train/train.py ..."
        )
    return count or 1


def start_processes(script: str, arguments: Sequence[str]) -> None:
    """Makes sure that as many processes run as were asked for; call it first thing, once the arguments are known to be good.

    In a process that already has its rank, or that was started alone on purpose, it returns. In the one process that
    `accelerate launch --cpu --num_processes N` has started, it starts the N, waits for them and ends with their exit code.
    """
    ranked = any(name in os.environ for name in _RANKS)
    if ranked:
        if _STARTER in os.environ:
            _end_with(int(os.environ[_STARTER]))
        if not torch.accelerator.is_available():
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # or accelerate takes torchrun's ranks for GPU ranks
        return
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true" and torch.accelerator.is_available():
        return
    count = asked_for(_launcher_command())
    if count < 2:
        return
    os.environ |= {"ACCELERATE_USE_CPU": "true", _STARTER: str(os.getpid())}
    _end_with(os.getppid())
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port, so that two runs share a machine
        max_restarts=0,
        monitor_interval=0.1,
    )
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # reports of codes, which follow below in words
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        elastic_launch(launch, sys.executable)("-u", script, *arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if own := [code for code in codes if code > 0]:
            sys.exit(own[0])  # the process itself has said why
        sys.exit(
            f"error: a process of the run was killed (signal {-codes[0]}); if nobody did it, memory was short: take a smaller "
            "--train_batch_size. Continue with the same command and --resume_from_checkpoint latest."
        )
    sys.exit(0)


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent is gone: a killed launcher must not leave a run behind that goes on writing."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _launcher_command() -> list[str]:
    """The command line of the process that started this one; empty where it cannot be known."""
    import psutil  # comes with accelerate

    with suppress(psutil.Error):
        parent = psutil.Process().parent()
        return parent.cmdline() if parent else []
    return []


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run.

    Raises:
        ConfigError: the device cannot do what the configuration wants.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()
    if config.mixed_precision == "fp16" and on_cpu:
        raise ConfigError("mixed_precision fp16 needs a GPU; on a CPU take bf16 or no.")
    # Of the depthwise convolution in LCSA, whose gradient comes in another memory layout; the values are right.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return Accelerator(
        mixed_precision=resolved_precision(config.mixed_precision, on_cpu=on_cpu),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_dir=config.output_dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )


def resolved_precision(wanted: str, *, on_cpu: bool) -> str:
    """What "auto" means here: bf16 where it is faster, else no. A processor without instructions for it only emulates it."""
    if wanted != "auto":
        return wanted
    if on_cpu:  # PyTorch has no public question for it
        able = any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    else:
        able = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if able else "no"


def sentence(error: Exception) -> str:
    """What an error says; one that comes from a loader's worker carries that worker's stack, which is left out."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    return text.rpartition(f"{type(error).__name__}: ")[2].strip()


def shared_loss(accelerator: Accelerator) -> Processes:
    """What the losses need to know of the other processes."""
    return Processes(total=lambda value: accelerator.reduce(value, "sum"), count=accelerator.num_processes)


def share_dropout(model: LDVC, *, process: int, count: int) -> None:
    """Replaces all dropout of a model. Photos are along axis 1 of the projected prompts, and along axis 0 elsewhere."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout and child.p:
                dim = 1 if parent is model.image_tower else 0
                setattr(parent, name, SharedDropout(child.p, dim=dim, process=process, count=count))


class SharedDropout(nn.Dropout):
    """Dropout of a batch that is spread over processes, equal to that of one process with the whole batch.

    Every process draws the mask of the whole batch from the same seed and applies the rows of its own photos.

    Args:
        p: probability of a zero.
        dim: axis of the photos.
        process, count: which process this is, of how many.
    """

    def __init__(self, p: float, *, dim: int, process: int, count: int) -> None:
        super().__init__(p)
        self.dim, self.process, self.count = dim, process, count

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with the photos of this process along `dim` -> the same shape."""
        if not self.training or self.p == 0:
            return x
        photos, shape = x.shape[self.dim], list(x.shape)
        shape[self.dim] *= self.count
        mask = F.dropout(x.new_ones(shape), self.p)
        return x * mask.narrow(self.dim, self.process * photos, photos)
