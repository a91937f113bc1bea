"""Figures for papers, drawn from results with matplotlib: attention (the paper's Figures 1 and 5), comparison of decoders
(Figure 4), embedding space (Figure 2).

Names have the colours of the page; a dagger marks those that the model saw no mask of. Heat maps use the page's fixed scale
from 0 to 1. Text stays text in PDF and SVG, and the same result gives the same file.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ldvc.embedding_space import Space
from ldvc.result import Segmentation
from ldvc.visualize import NONE_COLOUR, colours_for, heat_map, heat_table, overlay, resize_picture, rgb

FORMATS = ("png", "svg", "pdf")
COLUMN = 3.5  # inches: the width of a column in a paper with two
DPI = 300
ROWS = 12  # names in a figure of attention
LETTERS, FRAME = 6.5, 0.4  # points: size of letters, width of frames
LINE = 0.12  # inches, height of a line of text
GAP = 0.04  # inches, between pictures
HEAT_STRENGTH = 0.8  # of the heat over the grey photo, see `heat_map`
DAGGER = "†"
UNSEEN = f"{DAGGER} The model saw no mask of this name in training."
TITLES = {
    "clip": "plain CLIP",
    "zegclip": "ZegCLIP",
    "ldvc_without_lcsa": "LDVC\nwithout LCSA",
    "ldvc": "LDVC\nwith LCSA",
    "ldvc_lcsa_off": "LDVC, LCSA\nswitched off",
}
_LOCK = threading.Lock()  # matplotlib's settings are those of the process
METADATA = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}  # the same file at any time


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """The content of a file of a kind in `FORMATS`; PNG has `DPI` dots per inch."""
    buffer = io.BytesIO()
    with _LOCK, rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "ldvc"}):
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=METADATA[kind])
    return buffer.getvalue()


def attention_figure(
    results: Mapping[str, Segmentation | None],
    *,
    layer: int = -1,
    head: int | None = None,
    shown: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """A row for each name: the photo, and the cross-attention to the name under each decoder, over one colour bar.

    Args:
        results: of the decoders to show, from left to right, in the same names; None where there is no such decoder.
        layer, head: see `Segmentation.cross_attention`.
        shown: indices of the names; None = at most `ROWS`, those that cover most.
        width: of the figure in inches.
    """
    there = present(results)
    first = next(iter(there.values()))
    rows = largest(first, ROWS) if shown is None else shown
    notes = [f"Attention is shared with {', '.join(first.company)}."] if first.company else []
    grid = Grid(first, rows=len(rows), columns=1 + len(there), width=width, left=0.16, below=3.2 * LINE, notes=notes)
    photo = resize_picture(first.picture, grid.pixels)
    maps = {decoder: result.attention_at(result.cross_attention(layer, head), grid.pixels) for decoder, result in there.items()}
    colours = colours_for(first.names)
    for row, index in enumerate(rows):
        grid.show(row, 0, photo)
        for column, decoder in enumerate(there, start=1):
            grid.show(row, column, heat_map(maps[decoder][index], photo, strength=HEAT_STRENGTH))
        grid.name_row(row, first.names[index], colours[index], seen=first.seen[index])
    grid.titles(["photo", *(TITLES[decoder] for decoder in there)])
    scale = ListedColormap((heat_table() * HEAT_STRENGTH + 128 * (1 - HEAT_STRENGTH)) / 255)
    bar = grid.figure.colorbar(ScalarMappable(cmap=scale), cax=grid.below(0.25, 0.5, height=0.07), orientation="horizontal")
    bar.outline.set_linewidth(FRAME)
    bar.ax.tick_params(labelsize=LETTERS - 1, length=2, pad=1, width=FRAME)
    bar.set_ticks([0, 0.5, 1])
    bar.set_label("share of attention", fontsize=LETTERS - 0.5, labelpad=1)
    return grid.figure


def compare_figure(results: Mapping[str, Segmentation | None], *, width: float = COLUMN) -> Figure:
    """The photo, and what each decoder made of it, over a legend of the names that are anywhere; arguments as above."""
    there = present(results)
    first = next(iter(there.values()))
    found = {int(label) for result in there.values() for label in np.unique(result.labels)}
    colours, shown = colours_for(first.names), sorted(found - {-1})
    legend = [(marked(first, index), colours[index]) for index in shown]
    if -1 in found:
        legend.append(("none of these", NONE_COLOUR))
    lines = legend_lines(legend, width)
    grid = Grid(first, rows=1, columns=1 + len(there), width=width, below=(lines + 0.6) * LINE, only=shown)
    photo = resize_picture(first.picture, grid.pixels)
    grid.show(0, 0, photo)
    for column, result in enumerate(there.values(), start=1):
        striped = [not seen for seen in result.seen]
        grid.show(0, column, overlay(photo, result.labels_at(grid.pixels), colours, striped=striped))
    grid.titles(["photo", *(TITLES[decoder] for decoder in there)])
    draw_legend(grid.figure, legend, bottom=grid.foot, width=width)
    return grid.figure


def space_figure(space: Space, result: Segmentation, *, width: float = COLUMN) -> Figure:
    """A row for each decoder: patches (dots) and names (diamonds) before it and after it, in one plane.

    Args:
        space: of `shared_space`.
        result: of one of the decoders, for the names.
        width: of the figure in inches.
    """
    colours = np.array(colours_for(result.names))
    legend = [(marked(result, index), colour) for index, colour in enumerate(colours)]
    left, low, right, high = space.bounds
    margin = 0.05 * max(right - left, high - low, 1e-9)
    side = (width - 0.21 - GAP) / 2
    tall = side * float(np.clip((high - low + 2 * margin) / (right - left + 2 * margin), 0.6, 1.0))
    notes = [UNSEEN] if not all(result.seen) else []
    foot = (len(notes) + 0.3) * LINE
    bottom = foot + (legend_lines(legend, width) + 1.8) * LINE
    height = bottom + len(space.decoders) * (tall + GAP) + 1.2 * LINE
    figure = Figure(figsize=(width, height))
    for row, (decoder, part) in enumerate(space.decoders.items()):
        y = bottom + (len(space.decoders) - 1 - row) * (tall + GAP)
        for column, moment in enumerate(("before", "after")):
            place = (0.2 + column * (side + GAP)) / width, y / height, side / width, tall / height
            axis = figure.add_axes(place, xticks=[], yticks=[])
            axis.spines[:].set_linewidth(FRAME)
            patches, names = getattr(part, f"patches_{moment}"), getattr(part, f"embeddings_{moment}")
            axis.scatter(*patches.T, s=2, c=colours[part.movement.class_of_patch], linewidths=0, alpha=0.7)
            axis.scatter(
                *names.T, s=22, c=colours[part.movement.class_of_embedding], marker="D", edgecolors="black", linewidths=0.6
            )
            axis.set(xlim=(left - margin, right + margin), ylim=(low - margin, high + margin))
            axis.set_aspect("equal", adjustable="datalim")
            if row == 0:
                axis.set_title(f"{moment} the decoder", fontsize=LETTERS, pad=3)
            if column == 0:
                axis.set_ylabel(TITLES[decoder].replace("\n", " "), fontsize=LETTERS, labelpad=2)
    across, up = space.plane.explained
    axes_note = f"Two principal components: {across:.0%} and {up:.0%} of the variance."
    write_notes(figure, [axes_note], bottom=bottom - 1.5 * LINE)
    draw_legend(figure, legend, bottom=foot, width=width)
    write_notes(figure, notes, bottom=0.2 * LINE)
    return figure


# ---- parts of figures -------------------------------------------------------------------------------------------------


class Grid:
    """Pictures in rows and columns under titles, with room for a legend and notes below.

    Args:
        result: gives the aspect of the photo and the names that are marked.
        rows, columns: of pictures.
        width: of the figure in inches.
        left: room for the names of rows, in inches.
        below: room between the pictures and the notes, in inches.
        notes: lines at the foot; a line about daggers is added where one is needed.
        only: indices of the names in the figure; None = all.

    Attributes:
        pixels: (height, width) of a picture.
        foot: height of the notes in inches.
    """

    def __init__(
        self,
        result: Segmentation,
        *,
        rows: int,
        columns: int,
        width: float,
        left: float = 0.0,
        below: float,
        notes: Sequence[str] = (),
        only: Sequence[int] | None = None,
    ) -> None:
        chosen = range(len(result.seen)) if only is None else only
        notes = [*notes, *([] if all(result.seen[index] for index in chosen) else [UNSEEN])]
        self.side = (width - left - (columns - 1) * GAP) / columns
        self.tall = self.side * result.size[0] / result.size[1]
        self.left, self.rows = left, rows
        self.foot = (len(notes) + 0.3) * LINE
        self.bottom = self.foot + below
        self.height = self.bottom + rows * (self.tall + GAP) + 2.1 * LINE
        self.figure = Figure(figsize=(width, self.height))
        self.width = width
        self.pixels = max(1, round(self.tall * DPI)), max(1, round(self.side * DPI))
        self.first_row: list[Axes] = []
        write_notes(self.figure, notes, bottom=0.2 * LINE)

    def show(self, row: int, column: int, picture: np.ndarray) -> None:
        """Draw a picture of `pixels`."""
        x, y = self.left + column * (self.side + GAP), self._y(row)
        place = (x / self.width, y / self.height, self.side / self.width, self.tall / self.height)
        axis = self.figure.add_axes(place)
        axis.imshow(picture, interpolation="none", aspect="auto")
        axis.set_axis_off()
        if row == 0:
            self.first_row.append(axis)

    def titles(self, texts: Sequence[str]) -> None:
        """Write titles over the first row."""
        for axis, text in zip(self.first_row, texts, strict=True):
            axis.set_title(text, fontsize=LETTERS, pad=3, linespacing=1.1)

    def name_row(self, row: int, name: str, colour: str, *, seen: bool) -> None:
        """Write a name upright at the left of a row, in a box of its colour."""
        text = name if seen else f"{name} {DAGGER}"
        size = min(LETTERS, max(3.0, 72 * self.tall / (0.62 * len(text))))
        self.figure.text(
            0.5 * (self.left - GAP / 2) / self.width,
            (self._y(row) + self.tall / 2) / self.height,
            text,
            rotation=90,
            ha="center",
            va="center",
            fontsize=size,
            color="black" if np.dot(rgb(colour), (0.299, 0.587, 0.114)) > 110 else "white",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2},
            parse_math=False,
        )

    def below(self, left: float, width: float, *, height: float) -> Axes:
        """An axis right under the pictures; left and width in shares of the figure, height in inches."""
        return self.figure.add_axes((left, (self.bottom - height - GAP) / self.height, width, height / self.height))

    def _y(self, row: int) -> float:
        return self.bottom + (self.rows - 1 - row) * (self.tall + GAP)


def present(results: Mapping[str, Segmentation | None]) -> dict[str, Segmentation]:
    """The results that there are."""
    return {decoder: result for decoder, result in results.items() if result is not None}


def largest(result: Segmentation, count: int) -> list[int]:
    """Indices of at most `count` classes, those that cover most, in their order."""
    shares = result.area_shares(result.labels)
    return sorted(sorted(range(len(shares)), key=lambda index: -shares[index])[:count])


def marked(result: Segmentation, index: int) -> str:
    """A name, with a dagger if the model saw no mask of it."""
    return result.names[index] if result.seen[index] else f"{result.names[index]} {DAGGER}"


def legend_columns(legend: Sequence[tuple[str, Any]], width: float) -> int:
    """How many names there is room for in a line."""
    return max(1, min(len(legend), int(width / (0.3 + 0.057 * max(len(name) for name, _ in legend)))))


def legend_lines(legend: Sequence[tuple[str, Any]], width: float) -> int:
    """How many lines the names take."""
    return -(-len(legend) // legend_columns(legend, width))


def draw_legend(figure: Figure, legend: Sequence[tuple[str, Any]], *, bottom: float, width: float) -> None:
    """Draw names with their colours in the middle, above `bottom` (inches)."""
    drawn = figure.legend(
        handles=[Patch(facecolor=colour, label=name) for name, colour in legend],
        loc="lower center",
        bbox_to_anchor=(0.5, bottom / figure.get_figheight()),
        ncols=legend_columns(legend, width),
        fontsize=LETTERS,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.0,
        handleheight=0.7,
        handletextpad=0.4,
        columnspacing=1.0,
        labelspacing=0.25,
    )
    for text in drawn.get_texts():
        text.set_parse_math(False)


def write_notes(figure: Figure, notes: Sequence[str], *, bottom: float) -> None:
    """Write lines in the middle, above `bottom` (inches)."""
    for line, note in enumerate(reversed(notes)):
        y = (bottom + line * LINE) / figure.get_figheight()
        figure.text(0.5, y, note, ha="center", va="bottom", fontsize=LETTERS - 1, parse_math=False)
