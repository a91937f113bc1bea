"""A picture sheet of an evaluation: the same few photos every time, so that sheets of one run can be leafed through.

Each row: photo | truth | prediction | mistakes (red where the prediction is wrong, only where there is a truth). Below, what
each colour means; a name that was not learned is striped in the pictures and marked in the legend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldvc.errors import DataError
from ldvc.predictor import Predictor
from ldvc.visualize import colours_for, grey_version, overlay, rgb
from train.data import SegmentationDataset, Vocabulary
from train.evaluation import ask

CELL, GAP, TITLE, ROW = 224, 6, 22, 20  # pixels: width of a picture, space around it, title line, legend line
TITLES = ("photo", "truth", "prediction", "mistakes")
_PAPER, _INK, _WRONG = (255, 255, 255), (30, 30, 30), (214, 39, 40)


@dataclass(frozen=True)
class Example:
    """One row of a sheet.

    Attributes:
        photo: (H, W, 3) uint8.
        truth: (H, W) int, index into `names`, negative where nothing is to be said.
        prediction: (H, W) int.
        names: the names of the photo's data set.
    """

    photo: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    names: list[str]


def fixed_photos(datasets: Sequence[SegmentationDataset], count: int) -> list[tuple[int, int]]:
    """(data set, photo) of a sheet: evenly over data sets and over the list of each, so that they never change.

    A photo that cannot be used gives its place to the next that can.
    """
    chosen: list[tuple[int, int]] = []
    for index, dataset in enumerate(datasets):
        share = count // len(datasets) + (index < count % len(datasets))
        share = min(share, len(dataset))
        wanted = [(2 * place + 1) * len(dataset) // (2 * share) for place in range(share)]
        chosen += [(index, photo) for first in wanted for photo in _first_usable(dataset, first)]
    return list(dict.fromkeys(chosen))


def _first_usable(dataset: SegmentationDataset, first: int) -> list[int]:
    for photo in (*range(first, len(dataset)), *range(first)):
        with suppress(DataError):
            dataset.pair(photo)
            return [photo]
    return []


def examples(
    predictor: Predictor, datasets: Sequence[SegmentationDataset], chosen: Sequence[tuple[int, int]]
) -> list[Example]:
    """Predictions for the photos of a sheet: at each pixel the best of all names."""
    rows = []
    for index in dict.fromkeys(index for index, _ in chosen):
        dataset = datasets[index]
        table, names = Vocabulary([dataset]).tables[0], dataset.names()
        for photo in [photo for other, photo in chosen if other == index]:
            picture = np.asarray(dataset.image(photo))
            result = ask(predictor, names, predictor.encode_image(picture), background=None)
            rows.append(Example(picture, table[dataset.mask(photo)].astype(np.int64), result.labels, names))
    return rows


def draw_sheet(rows: Sequence[Example], *, seen: Callable[[str], bool], title: str) -> Image.Image:
    """Draws a sheet.

    Args:
        rows: what to draw.
        seen: whether a name has been learned.
        title: line above everything.
    """
    everything = list(dict.fromkeys(name for row in rows for name in row.names))
    colours = dict(zip(everything, colours_for(everything), strict=True))
    pictures = [_row(row, colours, seen) for row in rows]
    shown = list(
        dict.fromkeys(
            row.names[index]
            for row in rows
            for labels in (row.truth, row.prediction)
            for index in np.unique(labels)
            if index >= 0
        )
    )
    font = ImageFont.load_default(13)
    width = len(TITLES) * (CELL + GAP) + GAP
    legend = _legend_places([_legend_text(name, seen) for name in shown], width, font)
    lines = 1 + max((line for line, _ in legend), default=-1)
    height = 2 * TITLE + sum(picture.height + GAP for picture in pictures) + lines * ROW + GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 4), title, fill=_INK, font=font)
    for column, words in enumerate(TITLES):
        draw.text((GAP + column * (CELL + GAP), TITLE + 2), words, fill=_INK, font=font)
    y = 2 * TITLE
    for picture in pictures:
        sheet.paste(picture, (GAP, y))
        y += picture.height + GAP
    for name, (line, x) in zip(shown, legend, strict=True):
        top = y + line * ROW
        draw.rectangle((x, top + 3, x + 12, top + 15), fill=rgb(colours[name]), outline=_INK)
        draw.text((x + 17, top + 1), _legend_text(name, seen), fill=_INK, font=font)
    return sheet


def _legend_text(name: str, seen: Callable[[str], bool]) -> str:
    return name if seen(name) else f"{name} (unseen)"


def _legend_places(texts: Sequence[str], width: int, font: ImageFont.FreeTypeFont) -> list[tuple[int, int]]:
    """(line, x) of each entry."""
    places, line, x = [], 0, GAP
    for text in texts:
        space = 17 + int(font.getlength(text)) + 16
        if x + space > width and x > GAP:
            line, x = line + 1, GAP
        places.append((line, x))
        x += space
    return places


def _row(row: Example, colours: dict[str, str], seen: Callable[[str], bool]) -> Image.Image:
    """The four pictures side by side."""
    height = max(1, round(row.photo.shape[0] * CELL / row.photo.shape[1]))
    photo = np.asarray(Image.fromarray(row.photo).resize((CELL, height), Image.Resampling.BICUBIC))
    truth, prediction = (_shrink(labels, height) for labels in (row.truth, row.prediction))
    own, striped = [colours[name] for name in row.names], [not seen(name) for name in row.names]
    mistakes = np.repeat(grey_version(photo) * 0.6 + 90, 3, axis=2)
    mistakes[(truth >= 0) & (truth != prediction)] = _WRONG
    cells = [
        photo,
        overlay(photo, np.where(truth < 0, -1, truth), own, striped=striped),
        overlay(photo, prediction, own, striped=striped),
        mistakes.clip(0, 255).astype(np.uint8),
    ]
    strip = Image.new("RGB", (len(cells) * (CELL + GAP) - GAP, height), _PAPER)
    for column, cell in enumerate(cells):
        strip.paste(Image.fromarray(cell), (column * (CELL + GAP), 0))
    return strip


def _shrink(labels: np.ndarray, height: int) -> np.ndarray:
    """Nearest neighbour, to the size of a cell."""
    return np.asarray(Image.fromarray(labels.astype(np.int32)).resize((CELL, height), Image.Resampling.NEAREST))


def save_sheet(sheet: Image.Image, folder: Path, step: int) -> Path:
    """Writes `folder`/step-000040.png in one piece."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.png"
    temporary = path.with_suffix(".png.new")
    sheet.save(temporary, format="PNG")
    temporary.replace(path)
    return path
