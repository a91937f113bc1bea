"""The log of a run: a progress bar, log lines, a history file, trackers. Only the main process writes.

log.txt         the lines that the screen shows
history.jsonl   one object per line: {"step", "loss", its parts, "lr"}, means over `log_steps` steps and all processes; and
                {"step", "validation": {set: {measure: value}}}
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor
from tqdm import tqdm

from ldvc.errors import LdvcError
from train.config import ConfigError, TrainConfig
from train.files import for_json, written

_ADVICE = (
    ", so training stops. Resume from the last checkpoint with a lower learning rate (--set learning_rate=...), "
    "or without bfloat16 (--set mixed_precision=no)."
)


class DivergedError(LdvcError):
    """Loss or weights became NaN or infinite."""


def require_finite(loss: float, step: int) -> None:
    """Raises `DivergedError` if the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise DivergedError(f"The loss is {loss} by step {step}{_ADVICE}")


def require_finite_weights(parameters: Iterable[Tensor], step: int) -> None:
    """Raises `DivergedError` if a weight is NaN or infinite, for example after an infinite gradient of a finite loss."""
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise DivergedError(f"Weights are NaN or infinite by step {step}{_ADVICE}")


def check_tracker(name: str | None) -> None:
    """Raises `ConfigError` if the tracker's package is not installed."""
    if name and name not in [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]:
        raise ConfigError(f"report_to {name} needs the package {name}: pip install {name}, or leave report_to out.")


class Progress:
    """Counts steps, averages losses and writes the log. `state`: the state of the interrupted run, {} for a new run."""

    def __init__(
        self, accelerator: Accelerator, config: TrainConfig, *, photos_per_step: int, state: Mapping[str, Any]
    ) -> None:
        self.accelerator, self.config, self.photos_per_step = accelerator, config, photos_per_step
        self.folder = Path(config.output_dir)
        self.main = accelerator.is_main_process
        self.first = self.step = state.get("step", 0)
        self._earlier_photos = state.get("photos", photos_per_step)
        # Sums of the parts of the loss since the last line. Checkpoints keep them, so that a resumed run logs the same means.
        self._names: list[str] = state.get("parts", [])
        self._sums = torch.tensor(state["sums"], device=accelerator.device) if state.get("sums") else None
        self._count: int = state.get("count", 0)
        self._started, self._refreshed = time.monotonic(), 0.0
        if config.report_to:
            options = {"tensorboard": {"purge_step": self.first + 1}} if self.first else {}
            project = "tensorboard" if config.report_to == "tensorboard" else "ldvc"  # a folder, or the name of a project
            accelerator.init_trackers(project, init_kwargs=options)
        if self.main and (self.folder / "history.jsonl").is_file():
            self._cut_history()
        disable = None if self.main else True  # None: no bar if the output is no terminal; log lines remain
        steps = {"total": config.max_train_steps, "initial": self.first, "unit": "step"}
        self.bar = tqdm(disable=disable, dynamic_ncols=True, **steps)

    def _cut_history(self) -> None:
        """Removes the lines that a killed run wrote after its last checkpoint; those steps are computed again."""
        lines, path = "", self.folder / "history.jsonl"
        with suppress(ValueError):  # the last line may be incomplete
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                lines += line if json.loads(line)["step"] <= self.first else ""
        with written(path) as temporary:
            temporary.write_text(lines, encoding="utf-8")

    def state(self) -> dict[str, Any]:
        """The values that a checkpoint must store."""
        return {
            "step": self.step,
            "parts": self._names,
            "sums": None if self._sums is None else self._sums.tolist(),
            "count": self._count,
            "photos": self.photos_per_step,
        }

    def log(self, line: str) -> None:
        """One line to the screen, above the bar, and to log.txt."""
        if self.main:
            if self.bar.disable:
                print(line, flush=True)
            else:
                self.bar.write(line)
            with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def log_resumed(self, checkpoint: Path, changes: str) -> None:
        """Logs where the run continues, and what differs from the interrupted run."""
        self.log(f"resumed from {checkpoint} at step {self.step}")
        if self._earlier_photos != self.photos_per_step:
            changes = ", ".join(filter(None, [f"photos per step {self._earlier_photos} -> {self.photos_per_step}", changes]))
        if changes:
            self.log(f"note: these settings differ from the interrupted run: {changes}")

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Adds the losses of one micro step; the mean over processes is that of the whole batch."""
        self._names = list(losses)
        values = self.accelerator.reduce(torch.stack([value.detach().float() for value in losses.values()]), "mean")
        self._sums = values if self._sums is None else self._sums + values
        self._count += 1

    def advance(self, learning_rate: float) -> None:
        """Counts an optimiser step."""
        self.step += 1
        seconds = (time.monotonic() - self._started) / (self.step - self.first)
        speed = self.photos_per_step / seconds
        if not self.bar.disable:
            if time.monotonic() - self._refreshed > 0.5:  # reading the loss waits for a GPU
                self._refreshed = time.monotonic()
                text = f"loss {self._means()['loss']:.3f}, lr {learning_rate:.1e}, {speed:.1f} images/s"
                self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        if self.step % self.config.log_steps and self.step != self.config.max_train_steps:
            return
        means = self._means()
        require_finite(means["loss"], self.step)
        parts = " ".join(f"{name} {value:.4f}" for name, value in means.items())
        minutes_left = seconds * (self.config.max_train_steps - self.step) / 60
        self.log(
            f"step {self.step}/{self.config.max_train_steps} {parts} lr {learning_rate:.2e} "
            f"{speed:.1f} images/s {seconds:.2f} s/step {minutes_left:.1f} min left"
        )
        self._record({"step": self.step, **means, "lr": learning_rate})
        if self.config.report_to:
            self.accelerator.log({**means, "lr": learning_rate}, step=self.step)
        self._sums, self._count = None, 0

    def require_finite(self) -> None:
        """Raises `DivergedError` if the mean loss since the last log line is NaN or infinite."""
        if self._count:
            require_finite(self._means()["loss"], self.step)

    def _means(self) -> dict[str, float]:
        return dict(zip(self._names, (self._sums / self._count).tolist(), strict=True))

    def _record(self, entry: dict[str, Any]) -> None:
        if self.main:
            with open(self.folder / "history.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time of the block from the speed of training and from the estimate of the time left."""
        begun = time.monotonic()
        yield
        self._started += time.monotonic() - begun

    def log_validation(self, results: Mapping[str, Mapping[str, float]], figure: np.ndarray | None) -> None:
        """Logs one line per data set of `results` (set -> measure -> value); the tracker gets the values and the figure."""
        tracked: dict[str, float] = {}
        for name, measures in results.items():
            available = {measure: value for measure, value in measures.items() if not math.isnan(value)}
            values = ", ".join(f"{measure} {value:.3f}" for measure, value in available.items())
            self.log(f"validation at step {self.step}, {name}: {values}")
            tracked |= {f"validation/{name}/{measure}": value for measure, value in available.items()}
        self._record({"step": self.step, "validation": for_json(results)})
        if self.config.report_to:
            self.accelerator.log(tracked, step=self.step)
            if self.main and figure is not None and self.config.report_to == "tensorboard":
                tracker = self.accelerator.get_tracker("tensorboard")
                tracker.log_images({"validation": figure[None]}, step=self.step, dataformats="NHWC")

    def close(self) -> None:
        """Ends the bar and the trackers."""
        self.bar.close()
        self.accelerator.end_training()
