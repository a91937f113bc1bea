"""Tables and figures of an evaluation."""

from __future__ import annotations

import csv
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest

from train import tables

# Quoted from the publications a second time: pAcc, S, U, hIoU.
QUOTED = {
    ("voc", "inductive", "ZegCLIP"): ("0.946", "0.919", "0.778", "0.843"),
    ("voc", "inductive", "Cascade-CLIP"): ("-", "0.925", "0.830", "0.875"),
    ("voc", "transductive", "ZegCLIP"): ("-", "0.923", "0.899", "0.911"),
    ("coco_stuff", "inductive", "ZegCLIP"): ("0.620", "0.402", "0.414", "0.408"),
    ("coco_stuff", "inductive", "CLIP-RC"): ("-", "0.409", "0.416", "0.412"),
    ("coco_stuff", "transductive", "Cascade-CLIP"): ("-", "0.417", "0.625", "0.500"),
    ("context", "inductive", "Cascade-CLIP"): ("-", "0.559", "0.472", "0.512"),
}


@pytest.mark.parametrize(("benchmark", "setting", "method"), QUOTED)
def test_quoted_rows_have_the_columns_with_which_they_were_measured(benchmark: str, setting: str, method: str) -> None:
    """The authors subtract 0.1 from the scores of seen classes in the inductive setting and nothing in the transductive one."""
    rows = tables.quoted_rows(benchmark, list(tables.COLUMNS))
    ((_, source, *cells),) = [row for row in rows if row[0] == method and f"; {setting}," in row[1]]
    numbers = dict(zip(tables.COLUMNS, cells, strict=True))
    measures = ("pAcc", "mIoU_S", "mIoU_U", "hIoU")
    with_offset = tuple(numbers.pop(f"{key}_offset") for key in measures)
    without = tuple(numbers.pop(key) for key in measures)
    nothing = ("-",) * 4
    expected = QUOTED[benchmark, setting, method]
    assert (with_offset, without) == ((expected, nothing) if setting == "inductive" else (nothing, expected))
    assert set(numbers.values()) == {"-"}
    assert ("offset 0.1" in source) == (setting == "inductive") and source.startswith("quoted: ")


def test_a_csv_file_has_a_row_for_each_source_decoder_and_set(tmp_path: Path) -> None:
    facts = {"split": "val", "photos": 3, "pAcc": 0.25, "mIoU": 0.5, "mIoU_U": math.nan, "hIoU": None, "classes": []}
    sets = {"msrc": facts, "pets": facts}
    results = [{"source": "runs/a, b", "decoder": "ldvc", "sets": sets, "command": "python x", "commit": "abc"}]
    results.append({"source": "lite", "decoder": "clip", "sets": {"msrc": facts}})
    tables.write_csv(tmp_path / "table.csv", results)
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    keys = ("source", "decoder", "set", "split", "photos", "pAcc", "mIoU", "mIoU_U", "hIoU", "command", "commit")
    assert [[row[key] for key in keys] for row in rows] == [
        ["runs/a, b", "ldvc", "msrc", "val", "3", "0.25", "0.5", "", "", "python x", "abc"],
        ["runs/a, b", "ldvc", "pets", "val", "3", "0.25", "0.5", "", "", "python x", "abc"],
        ["lite", "clip", "msrc", "val", "3", "0.25", "0.5", "", "", "", ""],
    ]
    assert rows[0].keys() >= tables.COLUMNS.keys() and "classes" not in rows[0]


def test_the_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    assert tables.current_commit(tmp_path) == ""
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True)
    commit = tables.current_commit(tmp_path)
    assert len(commit) >= 7 and head.stdout.startswith(commit)


def test_confusion_figure_shows_shares() -> None:
    counts = np.array([[8, 2, 0], [0, 5, 5], [0, 0, 0]])
    (axis,) = tables.confusion_figure(counts, ["dog", "cat", "a long name"], ["cat"]).axes
    shares = axis.images[0].get_array()
    assert shares[:2].tolist() == [[0.8, 0.2, 0.0], [0.0, 0.5, 0.5]]
    assert shares.mask.tolist() == [[False] * 3, [False] * 3, [True] * 3], "a class without ground truth is grey"
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["dog", "cat", "a long name"]
        assert [label.get_color() == "#b3261e" for label in labels] == [False, True, False], "unseen names are red"
