"""The Space tab (the paper's Figure 2): patches and names before and after two decoders, in one plane."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import gradio as gr
import numpy as np

from ldvc.embedding_space import Movement, Space, movement_of, shared_space
from ldvc.figures import figure_bytes, space_figure
from ldvc.result import Segmentation
from ldvc.visualize import colours_for
from ldvc.web import html, texts
from ldvc.web.html import escape, number, percent
from ldvc.web.segmenter import Segmenter
from ldvc.web.session import Answer
from ldvc.web.tabs import Changes, Shared, Tab, Values, message

DECODERS = ("ldvc", "zegclip")
WIDTH = 480.0  # width of a plot in SVG units
MARGIN = 34.0
PATCHES = 260  # maximum number of patches drawn in each plot; all patches are measured
LINE = 17.0  # height of a label
LABELS = 16  # labels in each plot; of a longer list, the words of the classes with the most patches
LONGEST = 18  # maximum number of letters in a label
LETTER = 8.6  # approximate width of a letter

HELP = (
    "Dots are patches, diamonds are class names. LDVC keeps the names and moves the patches; ZegCLIP keeps the patches and "
    "moves the names. Drag from before to after."
)
NEEDS_DECODER = "This shows what a decoder moves."
MOVED = {"patches": "the patches moved", "names": "the names moved"}
SLIDER = (
    '<div class="ldvc-space-slider"><span aria-hidden="true">before the decoder</span>'
    '<input type="range" min="0" max="100" step="1" value="100" aria-label="From before the decoder (0) to after it (100)">'
    '<span aria-hidden="true">after</span><button type="button" class="ldvc-play">Play</button></div>'
)
TABLE = ("", "names moved by", "patches moved by", "patch and its class: before → after")
DETAILS = (
    "<p><b>Moved by</b> is the mean of 1 − cos between the input and the output of the decoder, over all names or all "
    "patches, in CLIP’s full joint space and not in the plane. Before is after the text adapter: the names as this "
    "photo’s decoder gets them. After is the input of the last cross-attention, from whose scores the masks are read. 0 means "
    "identical to the bit.</p>"
    "<p><b>Patch and its class</b> is the mean cosine of a patch and the class that this decoder gave it, both before or "
    "both after. It may fall: for the mask only the order of the names matters, and their scores follow a query and a key "
    "projection, which are left out here.</p>"
    "<p><b>The plane</b> is fitted once to the points of both decoders, before and after together, each counting once. "
    "Colours are the classes that a decoder gave its patches. Two names that look close here may be far apart in the "
    "dimensions that the plane does not show.</p>"
)


class SpaceTab(Tab):
    """See the module."""

    key, title = "space", "Space"
    empty_text = "Segment a photo first. Then you see which moved, the patches or the names."

    def __init__(self, segmenter: Segmenter, shared: Shared) -> None:
        super().__init__(segmenter, shared)
        with gr.Column(visible=False, elem_classes="ldvc-tab") as self.body:
            gr.HTML(html.section("Which moved, the patches or the names?", HELP))
            self.note = message(elem_id="space-note")
            self.view = gr.HTML(elem_id="space-view", apply_default_css=False, js_on_load=html.static("space.js"))
            self.files = self.figure_buttons()
            gr.HTML(html.details("How this was measured", DETAILS), apply_default_css=False)
        self.pictures = [self.view]
        self.outputs = [self.empty, self.body, self.note, self.view, self.files.problem]

    def draw(self, answer: Answer, values: Values) -> Changes:
        """Draw both plots."""
        results, missing = self.results(answer, values, *DECODERS), self.segmenter.missing(answer, *DECODERS)
        if not any(results):
            return self.filled(f"{NEEDS_DECODER} {missing['ldvc']}")
        space, words = space_of(results)
        note = " ".join(f"{texts.DECODER_TITLES[decoder]}: {sentence}" for decoder, sentence in missing.items())
        picture = space_html(space, words, answer.names, colours_for(answer.names))
        return {**self.filled(), self.note: html.notice(note), self.view: picture}

    def draw_file(self, kind: str, answer: Answer, values: Values) -> bytes:
        """Both plots as a figure, before and after."""
        available_results = [result for result in self.results(answer, values, *DECODERS) if result]
        return figure_bytes(space_figure(space_of(available_results)[0], available_results[0]), kind)


def space_of(results: Sequence[Segmentation | None]) -> tuple[Space, list[str]]:
    """The plane of the decoders whose results are not None, and the word of each class embedding."""
    available_results = [result for result in results if result]
    words = [word for synonyms in available_results[0].synonyms for word in synonyms]
    return shared_space({result.decoder: movement_of(result) for result in available_results}), words


class Frame:
    """Maps points of the plane to a plot. Both axes have the same scale, so that distances stay comparable."""

    def __init__(self, space: Space) -> None:
        left, low, right, high = space.bounds
        spans = max(right - left, 1e-9), max(high - low, 1e-9)
        self.height = float(np.clip(WIDTH * spans[1] / spans[0], 0.6 * WIDTH, 0.95 * WIDTH))
        self.scale = min((WIDTH - 2 * MARGIN) / spans[0], (self.height - 2 * MARGIN) / spans[1])
        self.middle = (left + right) / 2, (low + high) / 2

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Points (n, 2) in the plane -> (n, 2) in units of the plot, y downwards."""
        x = WIDTH / 2 + (points[:, 0] - self.middle[0]) * self.scale
        y = self.height / 2 - (points[:, 1] - self.middle[1]) * self.scale
        return np.stack([x, y], axis=1)


def space_html(space: Space, words: Sequence[str], classes: Sequence[str], colours: Sequence[str]) -> str:
    """One plot for each decoder, a slider from before to after, and a table. `words` has the word of each class embedding."""
    frame = Frame(space)
    written = labelled(space, words, len(classes))
    plots = "".join(_plot(decoder, part, frame, words, classes, colours, written) for decoder, part in space.decoders.items())
    across, up = space.plane.explained
    count = len(next(iter(space.decoders.values())).patches_before)
    drawn = f"{PATCHES} of {count} patches are drawn, all are measured." if count > PATCHES else ""
    if len(written) < len(words):
        drawn += f" Of the {len(words)} names, the {len(written)} that most patches got are written;"
        drawn += " point at a diamond to read its name."
    return (
        f'<div class="ldvc-space">{SLIDER}<div class="ldvc-plots">{plots}</div>'
        f'<p class="ldvc-footnote">One principal component analysis of all points of both plots, before and after, all of '
        f"length 1: the axes show {percent(across)} (across) and {percent(up)} (up) of their variance. {drawn}</p>"
        f"{_table(space)}</div>"
    )


def labelled(space: Space, words: Sequence[str], classes: int) -> set[int]:
    """Indices of the words that get a label: all words, or of a long list those of the classes with the most patches."""
    if len(words) <= LABELS:
        return set(range(len(words)))
    patches = sum(np.bincount(part.class_of_patch, minlength=classes) for part in space.decoders.values())
    class_of = next(iter(space.decoders.values())).class_of_embedding
    order = sorted(range(len(words)), key=lambda index: -patches[class_of[index]])
    return {index for index in order[:LABELS] if patches[class_of[index]]}


def _plot(
    decoder: str, part: Movement, frame: Frame, words: Sequence[str], classes: Sequence[str], colours: Sequence[str],
    written: set[int],
) -> str:  # fmt: skip
    before, after, labels = frame(part.patches_before), frame(part.patches_after), part.class_of_patch
    # A random choice, because a regular one would follow the grid; the seed gives every plot the same patches.
    drawn = np.sort(np.random.default_rng(0).permutation(len(before))[:PATCHES])
    trails = ""
    for label in np.unique(labels[drawn]):
        moved = [i for i in drawn if labels[i] == label and np.abs(after[i] - before[i]).max() >= 0.05]
        lines = "".join(_line(before[i], after[i]) for i in moved)
        trails += f'<path class="ldvc-trail" style="--c:{colours[label]}" d="{lines}"/>'
    dots = "".join(
        f'<circle cx="{before[i, 0]:.1f}" cy="{before[i, 1]:.1f}" r="3" '
        f'style="--c:{colours[labels[i]]};{_step(before[i], after[i])}"/>'
        for i in drawn
    )
    names, drift, similarity = _names(part, frame, words, colours, written), part.drift, part.similarity
    summary = (
        f"{texts.DECODER_TITLES[decoder]}: class names moved by {number(drift['classes'], 3)}, patches by "
        f"{number(drift['patches'], 3)}; similarity of a patch and its class {number(similarity['before'])} before, "
        f"{number(similarity['after'])} after. Classes: {', '.join(classes)}"
    )
    moved = "patches" if drift["patches"] > drift["classes"] else "names"
    return (
        f'<figure class="ldvc-plot"><figcaption><b>{texts.DECODER_TITLES[decoder]}</b><small>{MOVED[moved]}</small>'
        f'</figcaption><svg viewBox="0 0 {WIDTH:.0f} {frame.height:.0f}" role="img" aria-label="{escape(summary)}">'
        f"{trails}{dots}{names}</svg></figure>"
    )


def _line(start: Sequence[float], end: Sequence[float]) -> str:
    return f"M{start[0]:.1f} {start[1]:.1f}L{end[0]:.1f} {end[1]:.1f}"


def _step(start: np.ndarray, end: np.ndarray) -> str:
    return f"--dx:{end[0] - start[0]:.2f};--dy:{end[1] - start[1]:.2f}"


def _names(part: Movement, frame: Frame, words: Sequence[str], colours: Sequence[str], written: set[int]) -> str:
    """For each word a hollow diamond (before), a filled one that moves, and a label; without a label only a small diamond."""
    before, after, chosen = frame(part.embeddings_before), frame(part.embeddings_after), sorted(written)
    label_heights = spread(after[chosen, 1], after[chosen, 0], low=LINE, high=frame.height - 6)
    heights = dict(zip(chosen, label_heights, strict=True))
    pieces, labels = [], []  # labels are drawn over all diamonds
    for index, word in sorted(enumerate(words), key=lambda item: item[0] in written):  # words with a label are drawn last
        (x, y), colour = before[index], colours[part.class_of_embedding[index]]
        group = f'<g class="ldvc-name-moves" style="--c:{colour};{_step(before[index], after[index])}">'
        moves = f"{group}<title>{escape(word)}: moved by {number(float(part.embedding_drift[index]), 3)}</title>"
        if index not in written:
            pieces.append(f'{moves}<path class="ldvc-diamond" d="{_diamond(x, y, 4.0)}"/></g>')
            continue
        short = word if len(word) <= LONGEST else word[: LONGEST - 1] + "…"
        room = LETTER * len(short) + 16
        left = after[index, 0] + room > WIDTH and after[index, 0] - room > 0
        label_x = x - 12 if left else x + 12
        label_y = y + heights[index] - after[index, 1] + 5
        far = abs(heights[index] - after[index, 1]) > LINE / 2
        leader = f'<path class="ldvc-leader" d="{_line((x, y), (label_x, label_y - 5))}"/>' if far else ""
        pieces.append(
            f'<path class="ldvc-diamond-before" d="{_diamond(x, y)}"/>'
            f'<path class="ldvc-name-trail" d="{_line((x, y), after[index])}"/>'
            f'{moves}{leader}<path class="ldvc-diamond" d="{_diamond(x, y)}"/></g>'
        )
        anchor = "end" if left else "start"
        labels.append(f'{group}<text x="{label_x:.1f}" y="{label_y:.1f}" text-anchor="{anchor}">{escape(short)}</text></g>')
    return "".join(pieces + labels)


def _diamond(x: float, y: float, radius: float = 8.0) -> str:
    return f"M{x:.1f} {y - radius:.1f}l{radius} {radius}l{-radius} {radius}l{-radius} {-radius}z"


def spread(heights: np.ndarray, places: np.ndarray, *, low: float, high: float, near: float = 150.0) -> np.ndarray:
    """Move labels up and down until none covers another.

    Args:
        heights: (n,) y of each label before.
        places: (n,) x of each label; labels further apart than `near` cannot cover each other.
        low, high: lowest and highest y of a label.

    Returns:
        (n,) y of each label; labels that are near in x are at least `LINE` apart, as far as there is room.
    """
    spread_heights = np.clip(np.asarray(heights, dtype=float), low, high)
    for _ in range(80):
        moved = False
        for first, second in itertools.combinations(np.argsort(spread_heights, kind="stable"), 2):
            gap = spread_heights[second] - spread_heights[first]
            if gap < LINE - 0.01 and abs(places[first] - places[second]) < near:
                push, moved = (LINE - gap) / 2, True
                spread_heights[first], spread_heights[second] = spread_heights[first] - push, spread_heights[second] + push
        spread_heights = np.clip(spread_heights, low, high)
        if not moved:
            break
    return spread_heights


def _table(space: Space) -> str:
    rows = []
    for decoder, part in space.decoders.items():
        before, after = part.similarity["before"], part.similarity["after"]
        rows.append(
            f'<tr><th scope="row">{texts.DECODER_TITLES[decoder]}</th>{_moved(part.drift["classes"])}'
            f"{_moved(part.drift['patches'])}<td>{number(before)} → <b>{number(after)}</b> "
            f'<span class="ldvc-subdued">({"+" if after >= before else ""}{number(after - before)})</span></td></tr>'
        )
    heads = "".join(f'<th scope="col">{head}</th>' for head in TABLE)
    return f'<table class="ldvc-table"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _moved(distance: float) -> str:
    """A cell of the table. A distance of exactly 0 is marked as "stayed", to distinguish it from a rounded one."""
    text = "0 (stayed)" if distance == 0 else number(distance, 3)
    return f'<td class="{"ldvc-still" if distance == 0 else "ldvc-moved"}">{text}</td>'
