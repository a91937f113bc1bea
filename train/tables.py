"""Results of evaluations as Markdown, JSON, CSV and figures, with published numbers where they are comparable."""

from __future__ import annotations

import csv
import math
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib import colormaps
from matplotlib.figure import Figure

from ldvc.class_names import canonical, load_split
from train.data.reader import file_name
from train.files import for_json, write_json

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {  # measure -> head of its column
    "pAcc": "pAcc",
    "mIoU_S": "mIoU(S)",
    "mIoU_U": "mIoU(U)",
    "hIoU": "hIoU",
    "pAcc_offset": "pAcc, offset",
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
CSV_COLUMNS = ("source", "decoder", "set", "split", "photos", "mIoU", *COLUMNS, "fragments_truth", "command", "commit")


# ---- published numbers --------------------------------------------------------------------------------------------------


@cache
def published() -> dict[str, Any]:
    """Content of train/published.yaml: the sources, and each benchmark with the numbers that others report on it."""
    return yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8"))


def quoted_benchmark(dataset: Any, unseen: Sequence[str]) -> str | None:
    """The benchmark of train/published.yaml with the same layout, split, photos, class names and unseen classes, or None."""
    if not dataset.own_words:
        return None
    for key, benchmark in published()["benchmarks"].items():
        facts = (benchmark["layout"], benchmark["split"], benchmark["photos"])
        if facts == (dataset.layout, dataset.split, len(dataset)):
            expected = load_split(benchmark["unseen"])
            if {canonical(name) for name in unseen} == expected & {canonical(name) for name in dataset.names()}:
                return key
    return None


def quoted_rows(benchmark: str | None, columns: Sequence[str]) -> list[list[str]]:
    """Table rows of published numbers: method, source, then the measures in `columns`. No rows without a benchmark.

    Numbers that were measured with an offset appear in the columns with an offset, the others in those without.
    """
    if benchmark is None:
        return []
    facts, sources, rows = published()["benchmarks"][benchmark], published()["sources"], []
    for setting, reported in facts["results"].items():
        suffix = "_offset" if reported["offset"] else ""
        measured = f"offset {reported['offset']:g}" if suffix else "no offset"
        for method, numbers in reported["methods"].items():
            values = {key + suffix: value / 100 for key, value in numbers.items()}
            cells = [show(values.get(key)) for key in columns]
            rows.append([method, f"quoted: {sources[method]}; {setting}, {measured}, ViT-B/16", *cells])
    return rows


def quoted_note(benchmark: str | None) -> list[str]:
    """The paragraph below quoted rows. No lines without a benchmark."""
    note = "Lines marked as quoted are published numbers, not run here."
    return [] if benchmark is None else ["", f"{note} {published()['benchmarks'][benchmark]['note']}"]


# ---- Markdown -----------------------------------------------------------------------------------------------------------


def exists(value: float | None) -> bool:
    """Whether a value is neither None nor NaN."""
    return value is not None and not math.isnan(value)


def show(value: float | None) -> str:
    """Three decimals, or a dash if the value does not exist."""
    return f"{value:.3f}" if exists(value) else "-"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (heads, *rows)]
    return [lines[0], "|" + "---|" * len(heads), *lines[1:]]


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """One table per data set with a row per checkpoint, and published numbers where they are comparable."""
    lines: list[str] = []
    for name, set_results in _by_set(results).items():
        sets = [result["sets"][name] for result in set_results]
        facts = sets[0]
        unseen = {", ".join(each["unseen"]) or "none" for each in sets}
        unseen_names = "differ between checkpoints, see below" if len(unseen) > 1 else min(unseen)
        columns = [key for key in COLUMNS if any(exists(each[key]) for each in sets)]
        if unseen == {"none"}:  # then the offset changes nothing
            columns = [key for key in columns if not key.endswith("_offset")]
        sizes = "; ".join({describe_inference(result["inference"]): None for result in set_results})
        offsets = ", ".join(sorted({f"{result['offset']:g}" for result in set_results}))
        offset = f" Offset: {offsets}." if any(key.endswith("_offset") for key in columns) else ""
        lines += [f"### {name} {facts['split']}, {facts['photos']} photos; unseen: {unseen_names}", ""]
        lines += [f"Photos shown with {sizes}.{offset}", ""]
        rows = [[each["decoder"], each["source"], *(show(each["sets"][name][key]) for key in columns)] for each in set_results]
        benchmarks = {each["benchmark"] for each in sets}
        benchmark = benchmarks.pop() if len(benchmarks) == 1 else None
        rows += quoted_rows(benchmark, columns)
        lines += table(["decoder", "checkpoint", *(COLUMNS[key] for key in columns)], rows) + quoted_note(benchmark)
        if exists(facts["fragments_truth"]):
            lines += ["", f"Fragments in the truth: {facts['fragments_truth']:.3f}."]
        lines += _layer_table(set_results, name)
        if facts["broken"]:
            lines += ["", f"{len(facts['broken'])} photos were skipped because they cannot be read:"]
            lines += [f"- {message}" for message in facts["broken"]]
        lines.append("")
    return "\n".join(lines)


def describe_inference(inference: Mapping[str, Any]) -> str:
    """The size of photos in words."""
    if "window" in inference:
        return "short side {short_side}, windows of {window} every {stride} pixels".format(**inference)
    key = "long_side" if "long_side" in inference else "short_side"
    enlarged = f", at most {inference['enlarge']:g} times enlarged" if "enlarge" in inference else ""
    return f"{key.replace('_', ' ')} {inference[key]}, whole{enlarged}"


def _by_set(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    names = dict.fromkeys(name for result in results for name in result["sets"])
    return {name: [result for result in results if name in result["sets"]] for name in names}


def _layer_table(results: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Attention of every layer on the data set `name`; no lines if only the last layer was measured."""
    heads, rows = ["decoder", "checkpoint"], [[result["decoder"], result["source"]] for result in results]
    for head, measure in (("AP", "attention_ap_by_layer"), ("contrast", "attention_contrast_by_layer")):
        values = [result["sets"][name][measure] for result in results]
        if all(len(by_layer) < 2 for by_layer in values):
            return []
        for layer in sorted(set().union(*values)):
            heads.append(f"{head}, layer {layer}")
            for row, by_layer in zip(rows, values, strict=True):
                row.append(show(by_layer.get(layer)))
    return ["", *table(heads, rows)]


def class_tables(results: Sequence[Mapping[str, Any]]) -> str:
    """One table per data set with a row per class: IoU and accuracy of every checkpoint."""
    lines: list[str] = []
    for name, set_results in _by_set(results).items():
        several = len(set_results) > 1
        lines += [f"### {name}, class by class", ""]
        if several:
            lines += [f"- {number}: {each['decoder']} {each['source']}" for number, each in enumerate(set_results, 1)] + [""]
        heads = ["class", "pixels"]
        for number in range(1, len(set_results) + 1):
            heads += [f"{number} {head}" if several else head for head in ("seen as", "IoU", "acc")]
        rows = []
        for classes in zip(*(result["sets"][name]["classes"] for result in set_results), strict=True):
            row = [classes[0]["name"], str(classes[0]["pixels"])]
            for each in classes:
                row += [each["seen_as"] if each["seen"] else "**unseen**", show(each["iou"]), show(each["accuracy"])]
            rows.append(row)
        lines += [*table(heads, rows), ""]
    return "\n".join(lines)


# ---- files --------------------------------------------------------------------------------------------------------------


def write_csv(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write one row per (source, decoder, set) with all measures, the command and the commit; see `CSV_COLUMNS`."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for result in for_json(list(results)):
            writer.writerows({**result, **facts, "set": name} for name, facts in result["sets"].items())


def confusion_figure(counts: np.ndarray, names: Sequence[str], unseen: Sequence[str] = ()) -> Figure:
    """A confusion matrix (C, C) as a heat map: rows are the truth, each divided by its sum. Classes without truth are grey.

    Labels of the names in `unseen` are red.
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


def current_commit(folder: Path = ROOT) -> str:
    """Short hash of the commit in a git checkout, by default of this project; empty for other folders."""
    command = ["git", f"--git-dir={folder / '.git'}", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return ""


def write_tables(results: Sequence[Mapping[str, Any]], output: str) -> None:
    """Write OUTPUT.json with everything, OUTPUT.csv, OUTPUT.md with both kinds of tables, and a figure per confusion matrix."""
    write_json(Path(f"{output}.json"), list(results))
    write_csv(Path(f"{output}.csv"), results)
    Path(f"{output}.md").write_text(markdown(results) + "\n" + class_tables(results), encoding="utf-8")
    for number, result in enumerate(results, 1):
        which = f"{number}-{result['decoder']}" if len(results) > 1 else result["decoder"]
        for name, facts in result["sets"].items():
            names = [row["name"] for row in facts["classes"]]
            figure = confusion_figure(np.array(facts["confusion"]), names, facts["unseen"])
            figure.savefig(f"{output}-{which}-{file_name(name)}.png")
