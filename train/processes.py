"""The accelerator of a run: device, precision and processes."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from train.config import ConfigError, TrainConfig

_TIMEOUT = timedelta(hours=6)  # the other processes wait while one process computes stored views


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run; ConfigError if the device or the launcher cannot do what the configuration asks for."""
    launched_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    on_cpu = launched_on_cpu or not torch.accelerator.is_available()
    if config.mixed_precision == "fp16" and on_cpu:
        raise ConfigError("mixed_precision fp16 needs a GPU; on a CPU take bf16 or no.")
    # The depthwise convolution of LCSA returns a gradient in another memory layout; its values are correct.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=resolved_precision(config.mixed_precision, on_cpu=on_cpu),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_dir=config.output_dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)],
    )
    # accelerate launch --cpu --num_processes 2 sets MASTER_ADDR, but starts several processes with MPI only
    if launched_on_cpu and "MASTER_ADDR" in os.environ and "LOCAL_RANK" not in os.environ and accelerator.num_processes == 1:
        raise ConfigError(
            "accelerate launch starts a single process on a CPU; for several use torchrun --nproc_per_node N train/train.py ..."
        )
    return accelerator


def resolved_precision(wanted: str, *, on_cpu: bool) -> str:
    """The precision; "auto" becomes bf16 if the hardware supports it, otherwise no."""
    if wanted != "auto":
        return wanted
    if on_cpu:  # PyTorch has no public function for it
        supported = any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    else:
        supported = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if supported else "no"


def message_of(error: Exception) -> str:
    """The message of an error, without the stack trace that PyTorch adds to errors of a loader's worker."""
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2].strip() if text.startswith("Caught ") else text
