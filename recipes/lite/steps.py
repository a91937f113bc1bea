"""Shared by the steps of lite: command line, tables, data sets, and a training of limited time that can resume."""

import argparse
import csv
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from train.files import write_json, written

VOID = 255  # in masks


def options_of(description: str, **further: Any) -> argparse.Namespace:
    """The command line of a step: --data, --work, and further options by name, with defaults of their types."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"data": Path("data"), "work": Path("runs/lite_recipe"), **further}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    return parser.parse_args()


def read_table(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(file, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def read_json(name: str) -> Any:
    """The content of a JSON file of this folder."""
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))


def write_set(
    folder: Path,
    photos: Path,
    masks: Iterable[tuple[str, np.ndarray]],
    classes: Sequence[str],
    lists: Sequence[str],
    *,
    exhaustive: bool = True,
) -> None:
    """Write a data set as a plain folder (format: `train/data/folder.py`), with links to the photos; replaces `folder`.

    Args:
        masks: pairs (file of a photo, mask); a mask has 0 for background, 1 + class, or `VOID`. classes: names, without the
            background. lists: splits, each with all photos. exhaustive: a class without pixels is absent from the photo.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    stems = []
    for file, mask in masks:
        stems.append(Path(file).stem)
        (folder / "images" / file).symlink_to((photos / file).resolve())
        Image.fromarray(mask).save(folder / "masks" / f"{stems[-1]}.png")
    for name in lists:
        (folder / f"{name}.txt").write_text("\n".join(sorted(stems)) + "\n", encoding="utf-8")
    facts = {"classes": ["none of these", *classes], "ignore_index": VOID, "background_index": 0, "exhaustive": exhaustive}
    write_json(folder / "dataset.json", facts)
    print(f"{folder}: {len(classes)} classes, {len(stems)} photos")


class Training:
    """Trains a module with AdamW for some minutes and resumes from a file.

    The learning rate rises to `rate` in 100 steps and falls linearly with the time of all runs. Iteration yields the
    share of the time that has passed; `learn` does a step. The file holds the module as "student" and the optimiser.
    """

    def __init__(self, file: Path, student: nn.Module, groups: list[dict], *, rate: float, minutes: float) -> None:
        self.file, self.student, self.rate, self.budget = file, student, rate, minutes * 60
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
        self.elapsed, self.step = 0.0, 0
        if file.exists():
            saved = torch.load(file, weights_only=True)
            student.load_state_dict(saved["student"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.elapsed, self.step = saved["elapsed"], saved["step"]

    def __iter__(self) -> Iterator[float]:
        start = time.time() - self.elapsed
        while (passed := (time.time() - start) / self.budget) < 1:
            self.elapsed = passed * self.budget
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * min(1.0, (self.step + 1) / 100) * max(0.01, 1 - passed)
            yield passed
        self.elapsed = self.budget
        self._save()

    def learn(self, loss: Tensor, **parts: Tensor) -> None:
        """One step of the optimiser. Every 40 steps the loss and its parts are printed, every 200 steps the state is saved."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        if self.step % 40 == 0:
            values = ", ".join(f"{name} {value.item():.4f}" for name, value in {"loss": loss, **parts}.items())
            print(f"step {self.step}, {values}, {self.elapsed:.0f} of {self.budget:.0f} s", flush=True)
        if self.step % 200 == 0:
            self._save()

    def _save(self) -> None:
        state = {"student": self.student.state_dict(), "optimizer": self.optimizer.state_dict()}
        with written(self.file) as temporary:
            torch.save({**state, "elapsed": self.elapsed, "step": self.step}, temporary)
