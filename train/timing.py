"""Clock and memory of this process, for the benchmark."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


def in_turn(
    candidates: Mapping[str, Callable[[], Any]], rounds: int, clock: str, device: str
) -> dict[str, list[float]]:
    """Seconds of every round of every candidate; a first round that warms up is not counted.

    Args:
        candidates: what to time, called once a round in this order.
        clock: "wall", or "cpu": time on the processor, all threads together, which other programs disturb less.
    """
    now = time.process_time if clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, function in candidates.items():
            synchronize(device)
            started = now()
            function()
            synchronize(device)
            if number:
                seconds[name].append(now() - started)
    return seconds


def synchronize(device: str) -> None:
    """Waits until a GPU has done what it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()


def resident() -> int:
    """Bytes of memory that this process holds now (Linux); elsewhere its peak."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * resource.getpagesize() if path.is_file() else peak_resident()


def peak_resident() -> int:
    """Bytes of memory that this process has held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def fit_exponent(tokens: Sequence[int], seconds: Sequence[float]) -> float:
    """e of seconds ~ tokens^e, least squares on logarithms."""
    return float(np.polyfit(np.log(tokens), np.log(seconds), 1)[0])
