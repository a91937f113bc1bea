"""Figures: the same few photos at every validation, and confusion matrices.

Each row of a validation figure: photo | truth | prediction | mistakes (red where the prediction differs from the truth). The
legend below names the colours; names that were not learned are striped in the pictures and marked in the legend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ldvc.errors import DataError
from ldvc.predictor import Predictor
from ldvc.visualize import colours_for, grey_version, overlay
from train.data import SegmentationDataset, Vocabulary
from train.evaluation import ask

PHOTOS = 6  # of a figure
TITLES = ("photo", "truth", "prediction", "mistakes")
WRONG = (214, 39, 40)


@dataclass(frozen=True)
class Example:
    """One row of a figure.

    Attributes:
        photo: (H, W, 3) uint8.
        truth: (H, W) int, index into `names`, negative where there is no truth.
        prediction: (H, W) int.
        names: the names of the photo's data set.
    """

    photo: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    names: list[str]


def fixed_photos(datasets: Sequence[SegmentationDataset], count: int = PHOTOS) -> list[tuple[int, int]]:
    """(data set, photo) of a figure, spread evenly over data sets and over the list of each.

    The next readable photo replaces one that cannot be read.
    """
    chosen: list[tuple[int, int]] = []
    for index, dataset in enumerate(datasets):
        share = min(count // len(datasets) + (index < count % len(datasets)), len(dataset))
        for place in range(share):
            first = (2 * place + 1) * len(dataset) // (2 * share)
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
    for index, photo in chosen:
        dataset = datasets[index]
        names, picture = dataset.names(), np.asarray(dataset.image(photo))
        truth = Vocabulary([dataset]).tables[0][dataset.mask(photo)].astype(np.int64)
        result = ask(predictor, names, predictor.encode_image(picture), background=None)
        rows.append(Example(picture, truth, result.labels, names))
    return rows


def panels(row: Example, colours: Mapping[str, str], seen: Callable[[str], bool]) -> list[np.ndarray]:
    """The four pictures of a row, each (H, W, 3) uint8."""
    own, striped = [colours[name] for name in row.names], [not seen(name) for name in row.names]
    mistakes = np.repeat(grey_version(row.photo) * 0.6 + 90, 3, axis=2).clip(0, 255).astype(np.uint8)
    mistakes[(row.truth >= 0) & (row.truth != row.prediction)] = WRONG
    truth, prediction = (
        overlay(row.photo, np.where(labels < 0, -1, labels), own, striped=striped) for labels in (row.truth, row.prediction)
    )
    return [row.photo, truth, prediction, mistakes]


def draw_figure(rows: Sequence[Example], *, seen: Callable[[str], bool], title: str) -> np.ndarray:
    """Draws a figure of at least one row: (H, W, 3) uint8.

    Args:
        rows: what to draw.
        seen: whether a name has been learned.
        title: line above everything.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.names))
    colours = dict(zip(names, colours_for(names), strict=True))
    figure = Figure(figsize=(10, 2 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots(len(rows), len(TITLES), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, picture in zip(line, panels(row, colours, seen), strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
    for axis, words in zip(axes[0], TITLES, strict=True):
        axis.set_title(words)
    shown = {row.names[i] for row in rows for labels in (row.truth, row.prediction) for i in np.unique(labels) if i >= 0}
    legend = [
        Patch(color=colours[name], label=name if seen(name) else f"{name} (unseen)") for name in names if name in shown
    ]
    figure.suptitle(title)
    figure.legend(handles=legend, loc="outside lower center", ncols=6, fontsize="small")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def confusion_figure(counts: np.ndarray, names: Sequence[str], unseen: Sequence[str] = ()) -> Figure:
    """A confusion matrix as a heat map: rows are the truth, each divided by its sum. Classes without truth are grey.

    Args:
        counts: (C, C), truth by prediction.
        names: C labels; those in `unseen` are red.
    """
    total = counts.sum(axis=1, keepdims=True)
    shares = np.ma.masked_array(counts / np.maximum(total, 1), mask=np.broadcast_to(total == 0, counts.shape))
    # The margins follow from the longest name; a layout engine would measure every label several times.
    margin, side = 0.6 + 0.08 * max(map(len, names)), 0.16 * len(names) + 1
    size = margin + side + 0.2
    figure = Figure(figsize=(size, size))
    axis = figure.add_axes((margin / size, margin / size, side / size, side / size))
    axis.imshow(shares, cmap=colormaps["inferno"].with_extremes(bad="lightgrey"), vmin=0, vmax=1, interpolation="nearest")
    axis.set(xlabel="prediction", ylabel="truth")
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
        label.set_color("#b3261e" if label.get_text() in unseen else "#202124")
    return figure
