"""Validation during training. It does not change the run: random numbers, modes and data order stay as they were.

The figures of all validations show the same few photos. A row of a figure: photo | truth | prediction | mistakes (red if the
prediction differs from the truth). Names that were not learned are striped in the pictures and marked in the legend.
"""

from __future__ import annotations

import math
import random
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from ldvc.class_names import SeenNames
from ldvc.errors import DataError
from ldvc.modeling.model import LDVC
from ldvc.predictor import Predictor
from ldvc.visualize import colours_for, grey_version, overlay
from train.config import TrainConfig
from train.data import SegmentationDataset, Vocabulary, open_sets
from train.evaluation import PhotoReader, Photos, ask, evaluate_set, gather, unlimited
from train.metrics import iou_measures
from train.tables import COLUMNS

PHOTOS = 6  # number of photos in a figure
TITLES = ("photo", "truth", "prediction", "mistakes")
WRONG = (214, 39, 40)


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Restores every module's mode and all random number generators at the end."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        random.setstate(states[0])
        np.random.set_state(states[1])


class Validation:
    """Evaluates the model of a run on photos with masks, and draws a figure; DataError if a data set is missing."""

    def __init__(self, config: TrainConfig, vocabulary: Vocabulary, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        names = config.validation_sets or list(config.sets)
        every = dict.fromkeys(names, config.validation_every)
        self.datasets = open_sets(config.data, names, "val", every=every)
        self.photos = fixed_photos(self.datasets)
        self.seen = SeenNames(vocabulary.spellings, vocabulary.seen_words)  # as in train/evaluate.py

    def __call__(self, model: LDVC, step: int) -> tuple[dict[str, dict[str, float]], np.ndarray | None]:
        """Evaluates; every process must call it.

        Returns set -> measure -> value, and on the main process figures/step-N.png as (H, W, 3) uint8.
        """
        with unchanged(model):
            metadata = {"inference": unlimited(self.config.inference)}
            predictor = Predictor(model, metadata, device=next(model.parameters()).device)
            results = {dataset.name: self._evaluate(predictor, dataset) for dataset in self.datasets}
            with_figure = self.accelerator.is_main_process and self.photos
            figure = self._figure(predictor, step, results) if with_figure else None
        self.accelerator.wait_for_everyone()
        return results, figure

    def _evaluate(self, predictor: Predictor, dataset: SegmentationDataset) -> dict[str, float]:
        photos = Photos(self.config.cache_dir if self.config.views_per_photo else None)
        seen = [name in self.seen for name in dataset.names()]
        counts = gather(evaluate_set(predictor, dataset, photos, seen=seen, offset=None, joint_only=True))
        return {COLUMNS.get(key, key): value for key, value in iou_measures(counts.joint, seen).items()}

    def _figure(self, predictor: Predictor, step: int, results: dict[str, dict[str, float]]) -> np.ndarray:
        rows = examples(predictor, self.datasets, self.photos)
        available = {name: values["mIoU"] for name, values in results.items() if not math.isnan(values["mIoU"])}
        scores = ", ".join(f"{name} mIoU {value:.3f}" for name, value in available.items())
        figure = draw_figure(rows, seen=self.seen, title=f"step {step}: {scores}")
        path = Path(self.config.output_dir) / "figures" / f"step-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(figure).save(path)
        return figure


@dataclass(frozen=True)
class Example:
    """One row of a figure."""

    photo: np.ndarray  # (H, W, 3) uint8
    truth: np.ndarray  # (H, W) int, index into `names`, negative where there is no truth
    prediction: np.ndarray  # (H, W) int
    names: list[str]  # class names of the photo's data set


def fixed_photos(datasets: Sequence[SegmentationDataset], count: int = PHOTOS) -> list[tuple[int, int]]:
    """(data set, photo) for a figure, spread evenly over data sets and lists. The next photo replaces an unreadable one."""
    chosen: list[tuple[int, int]] = []
    for index, dataset in enumerate(datasets):
        share = min(count // len(datasets) + (index < count % len(datasets)), len(dataset))
        for number in range(share):
            first = (2 * number + 1) * len(dataset) // (2 * share)
            for photo in (*range(first, len(dataset)), *range(first)):
                with suppress(DataError):
                    dataset.pair(photo)
                    chosen.append((index, photo))
                    break
    return list(dict.fromkeys(chosen))


def examples(
    predictor: Predictor, datasets: Sequence[SegmentationDataset], chosen: Sequence[tuple[int, int]]
) -> list[Example]:
    """Predictions for the photos of a figure: at each pixel the best of all names."""
    rows = []
    for set_index, photo_index in chosen:
        photo, names = PhotoReader(datasets[set_index])[photo_index], datasets[set_index].names()
        result = ask(predictor, names, predictor.encode_image(photo.picture), background=None)
        rows.append(Example(photo.picture, photo.target.numpy(), result.labels, names))
    return rows


def panels(row: Example, colours: Mapping[str, str], seen: Container[str]) -> list[np.ndarray]:
    """The four pictures of a row, each (H, W, 3) uint8."""
    palette, striped = [colours[name] for name in row.names], [name not in seen for name in row.names]
    mistakes = np.repeat(grey_version(row.photo) * 0.6 + 90, 3, axis=2).clip(0, 255).astype(np.uint8)
    mistakes[(row.truth >= 0) & (row.truth != row.prediction)] = WRONG
    truth, prediction = (overlay(row.photo, np.maximum(x, -1), palette, striped=striped) for x in (row.truth, row.prediction))
    return [row.photo, truth, prediction, mistakes]


def draw_figure(rows: Sequence[Example], *, seen: Container[str], title: str) -> np.ndarray:
    """Draws a figure of at least one row, (H, W, 3) uint8. `seen`: the names that have been learned."""
    names = list(dict.fromkeys(name for row in rows for name in row.names))
    colours = dict(zip(names, colours_for(names), strict=True))
    figure = Figure(figsize=(10, 2 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots(len(rows), len(TITLES), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, picture in zip(line, panels(row, colours, seen), strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
    for axis, heading in zip(axes[0], TITLES, strict=True):
        axis.set_title(heading)
    visible = {row.names[i] for row in rows for labels in (row.truth, row.prediction) for i in np.unique(labels) if i >= 0}
    labels = {name: name if name in seen else f"{name} (unseen)" for name in names if name in visible}
    legend = [Patch(color=colours[name], label=label) for name, label in labels.items()]
    figure.suptitle(title)
    figure.legend(handles=legend, loc="outside lower center", ncols=6, fontsize="small")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
