"""Figures for papers, drawn from results with matplotlib: attention (the paper's Figures 1 and 5), comparison of decoders
(Figure 4), embedding space (Figure 2).

Names have the colours of the page; a dagger marks names without masks in training. Heat maps use the page's fixed scale
from 0 to 1. Text stays text in PDF and SVG, and the same result gives the same file.
"""

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
ROWS = 12  # most names in a figure of attention
LETTERS, FRAME = 6.5, 0.4  # points: size of letters, width of frames
LINE = 0.12  # inches, height of a line of text
GAP, RIGHT = 0.04, 0.01  # inches, between pictures and at the right of them
HEAT_STRENGTH = 0.8  # share of the heat colour over the grey photo, see `heat_map`
DAGGER = "†"
NONE = "none of these"
UNSEEN = f"{DAGGER} The model saw no mask of this name in training."
TITLES = {
    "clip": "plain CLIP",
    "zegclip": "ZegCLIP",
    "ldvc_without_lcsa": "LDVC\nwithout LCSA",
    "ldvc": "LDVC\nwith LCSA",
    "ldvc_lcsa_off": "LDVC, LCSA\nswitched off",
}
_LOCK = threading.Lock()  # matplotlib's settings are global
METADATA = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}  # without dates, files are reproducible


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
    """A row for each name and, in the last layer, for "none of these": the photo, and the cross-attention under each decoder.

    Args:
        results: one for each decoder, from left to right, with the same names; None = no such decoder.
        layer, head: see `Segmentation.cross_attention`.
        shown: indices of the names to show; None = at most `ROWS` names, those with the largest areas.
        width: width of the figure in inches.
    """
    available = present(results)
    first = next(iter(available.values()))
    shown = list(largest(first, ROWS) if shown is None else shown)
    colours = colours_for(first.names)
    rows = [(marked(first, index), colours[index]) for index in shown]
    if any(result.none_attention(layer, head).any() for result in available.values()):  # earlier layers have none
        rows.append((NONE, NONE_COLOUR))
    notes = [f"Attention is shared with {', '.join(first.company)}."] if first.company else []
    room = {"left": 0.16, "below": 3.2 * LINE, "notes": notes + dagger(first)}
    sheet = Sheet(len(rows), ["photo", *map(TITLES.get, available)], width=width, aspect=aspect(first), **room)
    photo, maps = resize_picture(first.picture, sheet.pixels), []
    for result in available.values():
        attention = [*result.cross_attention(layer, head)[shown], result.none_attention(layer, head)]
        maps.append(result.attention_at(np.stack(attention), sheet.pixels))
    for place, (axes, (name, colour)) in enumerate(zip(sheet.axes, rows, strict=True)):
        show_row(axes, [photo, *(heat_map(each[place], photo, strength=HEAT_STRENGTH) for each in maps)])
        name_row(axes[0], name, colour, left=0.16)
    scale = ListedColormap((heat_table() * HEAT_STRENGTH + 128 * (1 - HEAT_STRENGTH)) / 255)
    height = sheet.figure.get_figheight()
    under = sheet.figure.add_axes((0.25, (sheet.bottom - 0.07 - GAP) / height, 0.5, 0.07 / height))
    bar = sheet.figure.colorbar(ScalarMappable(cmap=scale), cax=under, orientation="horizontal")
    bar.outline.set_linewidth(FRAME)
    bar.ax.tick_params(labelsize=LETTERS - 1, length=2, pad=1, width=FRAME)
    bar.set_ticks([0, 0.5, 1])
    bar.set_label("share of attention", fontsize=LETTERS - 0.5, labelpad=1)
    return sheet.figure


def compare_figure(results: Mapping[str, Segmentation | None], *, width: float = COLUMN) -> Figure:
    """The photo and the overlay of each decoder, above a legend of the names that occur; arguments as above."""
    available = present(results)
    first = next(iter(available.values()))
    labels = {int(label) for result in available.values() for label in np.unique(result.labels)}
    colours, classes = colours_for(first.names), sorted(labels - {-1})
    legend = [(marked(first, index), colours[index]) for index in classes]
    if -1 in labels:
        legend.append((NONE, NONE_COLOUR))
    below = (legend_shape(legend, width)[1] + 0.6) * LINE
    titles = ["photo", *map(TITLES.get, available)]
    sheet = Sheet(1, titles, width=width, aspect=aspect(first), below=below, notes=dagger(first, classes))
    photo = resize_picture(first.picture, sheet.pixels)
    striped = [not seen for seen in first.seen]
    painted = [overlay(photo, result.labels_at(sheet.pixels), colours, striped=striped) for result in available.values()]
    show_row(sheet.axes[0], [photo, *painted])
    draw_legend(sheet.figure, legend, bottom=sheet.foot, width=width)
    return sheet.figure


def space_figure(space: Space, result: Segmentation, *, width: float = COLUMN) -> Figure:
    """A row for each decoder: patches (dots) and names (diamonds) before it and after it, in one plane.

    `result`, of any of the decoders, provides the names.
    """
    colours = np.array(colours_for(result.names))
    legend = [(marked(result, index), colour) for index, colour in enumerate(colours)]
    left, low, right, high = space.bounds
    margin = 0.05 * max(right - left, high - low, 1e-9)
    limits = {"xlim": (left - margin, right + margin), "ylim": (low - margin, high + margin)}
    tall = float(np.clip((high - low + 2 * margin) / (right - left + 2 * margin), 0.6, 1.0))
    below = (legend_shape(legend, width)[1] + 1.8) * LINE
    titles = ["before the decoder", "after the decoder"]
    sheet = Sheet(len(space.decoders), titles, width=width, aspect=tall, left=0.2, below=below, notes=dagger(result))
    for axes, (decoder, part) in zip(sheet.axes, space.decoders.items(), strict=True):
        axes[0].set_ylabel(TITLES[decoder].replace("\n", " "), fontsize=LETTERS, labelpad=2)
        for axis, moment in zip(axes, ("before", "after"), strict=True):
            axis.set(**limits, xticks=[], yticks=[])
            axis.set_aspect("equal", adjustable="datalim")
            axis.spines[:].set_linewidth(FRAME)
            patches, names = getattr(part, f"patches_{moment}"), getattr(part, f"embeddings_{moment}")
            axis.scatter(*patches.T, s=2, c=colours[part.class_of_patch], linewidths=0, alpha=0.7)
            diamonds = {"marker": "D", "edgecolors": "black", "linewidths": 0.6}
            axis.scatter(*names.T, s=22, c=colours[part.class_of_embedding], **diamonds)
    across, up = space.plane.explained
    axes_note = f"Two principal components: {across:.0%} and {up:.0%} of the variance."
    write_notes(sheet.figure, [axes_note], bottom=sheet.bottom - 1.5 * LINE)
    draw_legend(sheet.figure, legend, bottom=sheet.foot, width=width)
    return sheet.figure


# ---- parts of figures -------------------------------------------------------------------------------------------------


class Sheet:
    """A figure of axes in rows and columns under titles, with room for a legend and notes below.

    `width`, `left` (room for the names of rows) and `below` (room between axes and notes) are inches, `aspect` is height over
    width of an axis.
    """

    def __init__(
        self,
        rows: int,
        titles: Sequence[str],
        *,
        width: float,
        aspect: float,
        left: float = 0.0,
        below: float,
        notes: Sequence[str] = (),
    ) -> None:
        columns = len(titles)
        side = (width - left - RIGHT - (columns - 1) * GAP) / columns
        tall = side * aspect
        self.pixels = max(1, round(tall * DPI)), max(1, round(side * DPI))  # size of a picture that fills an axis
        self.foot = (len(notes) + 0.3) * LINE  # height of the notes
        self.bottom = self.foot + below  # height of the room below the axes
        top = self.bottom + rows * (tall + GAP) - GAP
        height = top + GAP + (1.1 + max(title.count("\n") for title in titles)) * LINE
        self.figure = Figure(figsize=(width, height))
        place = {"left": left / width, "right": 1 - RIGHT / width, "bottom": self.bottom / height, "top": top / height}
        space = {"wspace": GAP / side, "hspace": GAP / tall}
        self.axes = self.figure.subplots(rows, columns, squeeze=False, gridspec_kw=place | space)  # (rows, columns)
        write_notes(self.figure, notes, bottom=0.2 * LINE)
        for axis, title in zip(self.axes[0], titles, strict=True):
            axis.set_title(title, fontsize=LETTERS, pad=3, linespacing=1.1)


def show_row(axes: Sequence[Axes], pictures: Sequence[np.ndarray]) -> None:
    """Draw a picture on each axis."""
    for axis, picture in zip(axes, pictures, strict=True):
        axis.imshow(picture, interpolation="none", aspect="auto")
        axis.set_axis_off()


def name_row(axis: Axes, name: str, colour: str, *, left: float) -> None:
    """Write a name vertically, on its colour, in the `left` inches beside an axis."""
    width, height = axis.figure.get_size_inches()
    box = axis.get_position()
    axis.figure.text(
        0.5 * (left - GAP / 2) / width,
        (box.y0 + box.y1) / 2,
        name,
        rotation=90,
        ha="center",
        va="center",
        fontsize=min(LETTERS, max(3.0, 72 * box.height * height / (0.62 * len(name)))),
        color="black" if np.dot(rgb(colour), (0.299, 0.587, 0.114)) > 110 else "white",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2},
        parse_math=False,
    )


def aspect(result: Segmentation) -> float:
    """Height of the photo over its width."""
    return result.size[0] / result.size[1]


def dagger(result: Segmentation, shown: Sequence[int] | None = None) -> list[str]:
    """The note about daggers, if one of the names has a dagger; `shown` are the indices of the names, None = all."""
    seen = result.seen if shown is None else [result.seen[index] for index in shown]
    return [] if all(seen) else [UNSEEN]


def present(results: Mapping[str, Segmentation | None]) -> dict[str, Segmentation]:
    """The results that are not None."""
    return {decoder: result for decoder, result in results.items() if result is not None}


def largest(result: Segmentation, count: int) -> list[int]:
    """Indices of the at most `count` classes with the largest areas, in the order of the classes."""
    shares = result.area_shares(result.labels)
    return sorted(sorted(range(len(shares)), key=lambda index: -shares[index])[:count])


def marked(result: Segmentation, index: int) -> str:
    """A name, with a dagger if it had no masks in training."""
    return result.names[index] if result.seen[index] else f"{result.names[index]} {DAGGER}"


def legend_shape(legend: Sequence[tuple[str, Any]], width: float) -> tuple[int, int]:
    """(columns, lines) of a legend with as many columns as fit."""
    columns = max(1, min(len(legend), int(width / (0.3 + 0.057 * max(len(name) for name, _ in legend)))))
    return columns, -(-len(legend) // columns)


def draw_legend(figure: Figure, legend: Sequence[tuple[str, Any]], *, bottom: float, width: float) -> None:
    """Draw names with their colours, centred, above `bottom` (inches)."""
    handles = [Patch(facecolor=colour, label=name) for name, colour in legend]
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, bottom / figure.get_figheight())}
    space = {"borderpad": 0, "borderaxespad": 0, "columnspacing": 1.0, "labelspacing": 0.25}
    patches = {"handlelength": 1.0, "handleheight": 0.7, "handletextpad": 0.4}
    space["ncols"] = legend_shape(legend, width)[0]
    drawn_legend = figure.legend(handles=handles, fontsize=LETTERS, frameon=False, **place, **space, **patches)
    for text in drawn_legend.get_texts():
        text.set_parse_math(False)


def write_notes(figure: Figure, notes: Sequence[str], *, bottom: float) -> None:
    """Write lines of text, centred, above `bottom` (inches)."""
    for line, note in enumerate(reversed(notes)):
        y = (bottom + line * LINE) / figure.get_figheight()
        figure.text(0.5, y, note, ha="center", va="bottom", fontsize=LETTERS - 1, parse_math=False)
