"""Results of the evaluator as Markdown, JSON and pictures, with published numbers beside them where they belong."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont

from ldvc.class_names import canonical, load_split
from ldvc.errors import LdvcError
from ldvc.visualize import heat_map

COLUMNS = {
    "pAcc": "pAcc",
    "mIoU_S": "mIoU(S)",
    "mIoU_U": "mIoU(U)",
    "hIoU": "hIoU",
    "mIoU_S_offset": "S, offset",
    "mIoU_U_offset": "U, offset",
    "hIoU_offset": "hIoU, offset",
    "present_accuracy": "acc, present names",
    "right": "right",
    "iou_present": "IoU, present",
    "attention_ap": "attention AP",
    "attention_contrast": "contrast",
    "fragments": "fragments",
}


def show(value: float | None) -> str:
    """Three decimals, or a dash for what does not exist."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


# ---- published numbers --------------------------------------------------------------------------------------------------


@cache
def published() -> dict[str, Any]:
    """train/published.yaml: benchmark -> what it is and what others report on it."""
    return yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8"))


def quoted_benchmark(dataset: Any, unseen: Sequence[str]) -> str | None:
    """The benchmark of train/published.yaml that an evaluation is, or None.

    Data set, split, number of photos, words and unseen classes must all be the benchmark's: published numbers stand beside no
    others.
    """
    if not dataset.own_words:
        return None
    for key, benchmark in published().items():
        facts = (benchmark["layout"], benchmark["split"], benchmark["photos"])
        if facts == (dataset.layout, dataset.split, len(dataset)):
            wanted = load_split(benchmark["unseen"])
            if {canonical(name) for name in unseen} == wanted & {canonical(name) for name in dataset.names()}:
                return key
    return None


def quoted_rows(benchmark: str | None, columns: Sequence[str], *, before: int) -> list[str]:
    """Table lines of published numbers, each marked as quoted.

    Args:
        benchmark: of `quoted_benchmark`; None gives no lines.
        columns: measures of the table, of which the literature has some.
        before: cells before the measures; the first two say what the line is.
    """
    if benchmark is None:
        return []
    facts, lines = published()[benchmark], []
    for method, numbers in facts["methods"].items():
        first = [method, f"quoted: {numbers['source']}; {facts['setting']}", *[""] * before][:before]
        cells = [show(numbers[key] / 100) if key in numbers else "-" for key in columns]
        lines.append("| " + " | ".join([*first, *cells]) + " |")
    return lines


def quoted_note(benchmark: str | None) -> list[str]:
    """What must be known about the quoted lines, as a paragraph."""
    if benchmark is None:
        return []
    return ["", f"Lines marked as quoted are published numbers, not run here. {published()[benchmark]['note']}"]


# ---- Markdown -----------------------------------------------------------------------------------------------------------


def _how(inference: Mapping[str, Any]) -> str:
    if "window" in inference:
        return "short side {short_side}, windows of {window} every {stride} pixels".format(**inference)
    key = "long_side" if "long_side" in inference else "short_side"
    enlarged = f", at most {inference['enlarge']:g} times enlarged" if "enlarge" in inference else ""
    return f"{key.replace('_', ' ')} {inference[key]}, whole{enlarged}"


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """One table per data set, one line per checkpoint, published numbers below where they belong."""
    lines: list[str] = []
    for name in dict.fromkeys(name for result in results for name in result["sets"]):
        mine = [result for result in results if name in result["sets"]]
        facts = mine[0]["sets"][name]
        unseen = {", ".join(result["sets"][name]["unseen"]) or "none" for result in mine}
        listed = "differ between checkpoints, see below" if len(unseen) > 1 else next(iter(unseen))
        columns = [key for key in COLUMNS if any(_exists(result["sets"][name][key]) for result in mine)]
        if unseen == {"none"}:  # then the offset changes nothing
            columns = [key for key in columns if not key.endswith("_offset")]
        lines += [f"### {name} {facts['split']}, {facts['photos']} photos; unseen: {listed}", ""]
        ways = {_how(result["inference"]): None for result in mine}
        offsets = {f"{result['offset']:g}" for result in mine}
        offset = f" Offset: {', '.join(sorted(offsets))}." if any(key.endswith("_offset") for key in columns) else ""
        lines += [f"Photos shown with {'; '.join(ways)}.{offset}", ""]
        lines += ["| decoder | checkpoint | " + " | ".join(COLUMNS[key] for key in columns) + " |"]
        lines += ["|---|---|" + "---|" * len(columns)]
        for result in mine:
            values = " | ".join(show(result["sets"][name][key]) for key in columns)
            lines.append(f"| {result['decoder']} | {result['source']} | {values} |")
        benchmarks = {result["sets"][name]["benchmark"] for result in mine}
        benchmark = benchmarks.pop() if len(benchmarks) == 1 else None
        lines += quoted_rows(benchmark, columns, before=2) + quoted_note(benchmark)
        if _exists(facts["fragments_truth"]):
            lines += ["", f"Fragments in the truth: {facts['fragments_truth']:.3f}."]
        lines += _layer_table(mine, name)
        broken = facts["broken"]
        if broken:
            lines += ["", f"{len(broken)} photos were skipped because they cannot be read:"]
            lines += [f"- {sentence}" for sentence in broken]
        lines.append("")
    return "\n".join(lines)


def _layer_table(results: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Attention of every layer on the data set `name`; no lines where only the last layer was measured."""
    maps = [(result, result["sets"][name]["attention_ap_by_layer"]) for result in results]
    layers = sorted({layer for _, found in maps for layer in found})
    if all(len(found) < 2 for _, found in maps):
        return []
    heads = [f"{measure}, layer {layer}" for measure in ("AP", "contrast") for layer in layers]
    lines = ["", "| decoder | checkpoint | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for result, found in maps:
        contrasts = result["sets"][name]["attention_contrast_by_layer"]
        cells = [show(values.get(layer)) for values in (found, contrasts) for layer in layers]
        lines.append(f"| {result['decoder']} | {result['source']} | " + " | ".join(cells) + " |")
    return lines


def _exists(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def class_tables(results: Sequence[Mapping[str, Any]]) -> str:
    """One table per data set with a line per class: IoU and accuracy of every checkpoint."""
    lines: list[str] = []
    for name in dict.fromkeys(name for result in results for name in result["sets"]):
        mine = [result for result in results if name in result["sets"]]
        heads = [f"{number}" for number in range(1, len(mine) + 1)] if len(mine) > 1 else [""]
        lines += [f"### {name}, class by class", ""]
        if len(mine) > 1:
            lines += [f"- {head}: {result['decoder']} {result['source']}" for head, result in zip(heads, mine, strict=True)]
            lines.append("")
        pairs = " | ".join(f"{head} seen as | {head} IoU | {head} acc".replace("|  ", "| ").strip() for head in heads)
        lines += [f"| class | pixels | {pairs} |", "|---|---|" + "---|---|---|" * len(mine)]
        for rows in zip(*(result["sets"][name]["classes"] for result in mine), strict=True):
            cells = [
                f"{row['seen_as'] if row['seen'] else '**unseen**'} | {show(row['iou'])} | {show(row['accuracy'])}"
                for row in rows
            ]
            lines.append(f"| {rows[0]['name']} | {rows[0]['pixels']} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


# ---- files --------------------------------------------------------------------------------------------------------------


def for_json(value: Any) -> Any:
    """NaN has no place in JSON; it becomes null."""
    if isinstance(value, Mapping):
        return {key: for_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [for_json(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_json(path: Path, content: Any) -> None:
    """Writes a file in one piece; rows of whole numbers (confusion matrices) take one line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    text = json.dumps(for_json(content), indent=2, ensure_ascii=False)
    text = re.sub(r"\[\s+(-?\d+(?:,\s+-?\d+)*)\s+\]", lambda row: f"[{' '.join(row[1].split())}]", text)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def make_room(output: str) -> None:
    """Makes the folder of OUTPUT.json; asked before an evaluation, so that its numbers find a place.

    Raises:
        LdvcError: it cannot be made or written.
    """
    folder = Path(output).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LdvcError(f"Results cannot be written to {folder}: {error.strerror}; give another --output.") from None
    if not os.access(folder, os.W_OK):
        raise LdvcError(f"Results cannot be written to {folder}: no permission; give another --output.")


def write_tables(results: Sequence[Mapping[str, Any]], output: str) -> None:
    """OUTPUT.json with everything, OUTPUT.md with both kinds of tables, a picture of every confusion matrix."""
    write_json(Path(f"{output}.json"), list(results))
    Path(f"{output}.md").write_text(markdown(results) + "\n" + class_tables(results), encoding="utf-8")
    for number, result in enumerate(results, 1):
        which = f"{number}-{result['decoder']}" if len(results) > 1 else result["decoder"]
        for name, facts in result["sets"].items():
            picture = confusion_picture(
                np.array(facts["confusion"]), [row["name"] for row in facts["classes"]], facts["unseen"]
            )
            picture.save(f"{output}-{which}-{name}.png")


def confusion_picture(counts: np.ndarray, names: Sequence[str], unseen: Sequence[str] = ()) -> Image.Image:
    """A confusion matrix as a heat map: rows are the truth, each divided by its sum; black is 0, pale yellow 1.

    Args:
        counts: (C, C), truth by prediction.
        names: C labels; those in `unseen` are set in red.
    """
    total = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    cell, size = (24, 14) if len(names) <= 40 else (12, 10)
    font = ImageFont.load_default(size)
    margin = round(max(font.getlength(name) for name in (*names, "column: guess"))) + 14
    side = cell * len(names)
    picture = Image.new("RGB", (margin + side + 8, margin + side + 8), "white")
    colours = heat_map(shares)
    colours[total[:, 0] == 0] = 225  # a class without ground truth has no shares
    picture.paste(Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST), (margin, margin))

    def labels(at: float, anchor: str) -> Image.Image:  # one name a row; turned, one a column
        part = Image.new("RGB", (margin, side), "white")
        draw = ImageDraw.Draw(part)
        for row, name in enumerate(names):
            colour = "#b3261e" if name in unseen else "#202124"
            draw.text((at, (row + 0.5) * cell), name, font=font, fill=colour, anchor=anchor)
        return part

    picture.paste(labels(margin - 6, "rm"), (0, margin))
    picture.paste(labels(6, "lm").transpose(Image.Transpose.ROTATE_90), (margin, 0))
    ImageDraw.Draw(picture).text((6, 6), "row: truth\ncolumn: guess", font=font, fill="#5f6368")
    return picture
