"""The machines of Hugging Face Jobs: GPUs, prices, and how long a training takes on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

PRICES_READ = "2026-11-29"
TRAINING_HOURS = {"voc2012": (20_000, 3.0), "pascal_context59": (40_000, 8.0), "coco_stuff164k": (80_000, 20.0)}
"""Benchmark -> steps of 16 photos, and their hours on four RTX 3090, as the authors of Cascade-CLIP publish them."""
SPEEDS = {"T4": 0.3, "L4": 0.6, "A10G": 0.8, "L40S": 1.6, "A100": 1.6, "RTX PRO 6000": 2.0, "H200": 3.0}
"""GPU -> speed over an RTX 3090. Assumed from specifications, not measured: an estimate may be wrong by a factor of 1.5."""
WITHOUT_ESTIMATE = 12  # hours of the timeout
_FACTOR = 1.5


class Flavor(NamedTuple):
    """A machine: number and kind of its GPUs, and USD an hour."""

    gpus: int
    gpu: str
    price: float


_TABLE = {
    "T4": {"t4-small": (1, 0.40), "t4-medium": (1, 0.60)},
    "L4": {"l4x1": (1, 0.80), "l4x4": (4, 3.80)},
    "L40S": {"l40sx1": (1, 1.80), "l40sx4": (4, 8.30), "l40sx8": (8, 23.50)},
    "A10G": {"a10g-small": (1, 1.00), "a10g-large": (1, 1.50), "a10g-largex2": (2, 3.00), "a10g-largex4": (4, 5.00)},
    "A100": {"a100-large": (1, 2.50), "a100x4": (4, 10.00), "a100x8": (8, 20.00)},
    "H200": {"h200": (1, 5.00), "h200x2": (2, 10.00), "h200x4": (4, 20.00), "h200x8": (8, 40.00)},
    "RTX PRO 6000": {"rtx-pro-6000": (1, 2.75)} | {f"rtx-pro-6000x{n}": (n, n * 2.75) for n in (2, 4, 8)},
}
FLAVORS = {name: Flavor(n, gpu, price) for gpu, rows in _TABLE.items() for name, (n, price) in rows.items()}
"""The GPU flavors as https://huggingface.co/docs/hub/jobs-pricing listed them on `PRICES_READ`."""


def from_api(hardware: Iterable[Any]) -> dict[str, Flavor]:
    """Flavors as `HfApi.list_jobs_hardware` returns them; machines without a GPU are left out."""
    an_hour = {"second": 3600, "minute": 60, "hour": 1}
    return {
        each.name: Flavor(int(gpu.quantity), gpu.model, each.unit_cost_usd * an_hour[each.unit_label])
        for each in hardware
        if (gpu := each.accelerator) and gpu.type == "gpu"
    }


def hours_of(timeout: str) -> float:
    """The hours of a time such as "90m"."""
    return float(timeout[:-1]) * {"s": 1 / 3600, "m": 1 / 60, "h": 1, "d": 24}[timeout[-1]]


def estimate(flavor: Flavor, sets: Sequence[str], steps: int, photos: int, seconds_per_step: float | None) -> tuple[str, str]:
    """How long trainings on data sets take: one sentence with hours, costs and their basis, and a timeout that is long enough.

    Args:
        steps: of all trainings together. photos: of one step. seconds_per_step: as somebody measured it on this flavor.
    """
    basis = f"{steps:,} steps"
    if seconds_per_step:
        low = high = steps * seconds_per_step / 3600
        basis += f" of {seconds_per_step:g} measured seconds"
    elif len(sets) == 1 and sets[0] in TRAINING_HOURS and flavor.gpu in SPEEDS:
        reference, hours = TRAINING_HOURS[sets[0]]
        middle = 4 * hours * steps / reference * photos / 16 / flavor.gpus / SPEEDS[flavor.gpu]
        low, high = middle / _FACTOR, middle * _FACTOR
        basis += f"; Cascade-CLIP publishes {hours:g} hours on four RTX 3090 for {reference:,}, and one {flavor.gpu} is assumed"
        basis += f" to be {SPEEDS[flavor.gpu]:g} times as fast"
    else:
        return f"none: no time is published for {basis} on {', '.join(sets)}; give --seconds_per_step", f"{WITHOUT_ESTIMATE}h"
    span, cost = f"{low:.1f}", f"{low * flavor.price:.2f}"
    if low < high:
        span, cost = f"{span} to {high:.1f}", f"{cost} to {high * flavor.price:.2f}"
    text = f"{span} hours of training, {cost} USD ({basis}); installation, data and evaluation come on top"
    return text, f"{math.ceil(2 * high) + 3}h"
