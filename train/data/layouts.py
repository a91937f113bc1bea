"""Opens data sets by name and detects their layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ldvc.errors import DataError
from train.data.benchmarks import CocoStuff164k, PascalContext59, Voc2012
from train.data.folder import FolderDataset
from train.data.reader import SegmentationDataset

LAYOUTS: dict[str, type[SegmentationDataset]] = {
    reader.layout: reader for reader in (Voc2012, CocoStuff164k, PascalContext59, FolderDataset)
}
"""Layout, as a configuration calls it -> reader."""

NAMES = {"voc2012": "voc", "coco_stuff164k": "coco_stuff", "pascal_context59": "pascal_context"}
"""Name of a benchmark -> layout."""

# Where each layout may lie under the data folder or under a folder of the set's own name, and a file or folder that marks it.
_PLACES = {
    "voc": ("VOCdevkit/VOC2012", "VOC2012", ""),
    "pascal_context": ("VOCdevkit/VOC2010", "VOC2010", ""),
    "coco_stuff": ("coco_stuff164k", ""),
    "folder": ("",),
}
_MARKS = {
    "folder": "dataset.json",
    "pascal_context": "SegmentationClassContext",
    "voc": "JPEGImages",
    "coco_stuff": "annotations/train2017",
}


def _find(root: Path, name: str, layout: str) -> Path:
    """The folder of a set: the first place that exists, or the usual one, which an error then names."""
    places = [root / name / place for place in _PLACES[layout]]
    if layout != "folder":
        places += [root / place for place in _PLACES[layout]]
    marked = [place for place in places if (place / _MARKS[layout]).exists()]
    if marked:
        return marked[0]
    usual = root / name if layout == "folder" else root / _PLACES[layout][0]
    return next((place for place in places if place.is_dir() and place != root), usual)


def _layout_of(root: Path, name: str) -> str:
    """Detects the layout of a set."""
    if (root / name / _MARKS["folder"]).is_file():
        return "folder"
    if name in NAMES:
        return NAMES[name]
    for layout in _MARKS:
        if any((root / name / place / _MARKS[layout]).exists() for place in _PLACES[layout]):
            return layout
    return "folder"


def open_set(
    root: str | Path, name: str, split: str, *, layout: str | None = None, every: int = 1
) -> SegmentationDataset:
    """Opens one split of one data set.

    Args:
        root: the folder that holds the data sets.
        name: "voc2012", "coco_stuff164k", "pascal_context59", or the name of a folder under `root`.
        split: "train" or "val".
        layout: one of `LAYOUTS`; None = detect it.
        every: take every n-th photo only.

    Raises:
        DataError: there is no such set, or its files do not have the layout.
    """
    if layout is not None and layout not in LAYOUTS:
        raise DataError(f"'{layout}' is no layout of data sets; choose one of {', '.join(LAYOUTS)}.")
    if every < 1:
        raise DataError(f"Every {every}-th photo of {name} cannot be taken; give a number of at least 1.")
    try:
        return _open(Path(root), name, split, layout, every)
    except OSError as error:
        raise DataError(f"The data set {name} cannot be read: {error.filename}: {error.strerror}.") from None


def _open(root: Path, name: str, split: str, layout: str | None, every: int) -> SegmentationDataset:
    layout = layout or _layout_of(root, name)
    if layout == "folder" and not (root / name).is_dir():
        there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "nothing"
        raise DataError(
            f"There is no data set '{name}' in {root}, which holds {there}. Benchmarks are called {', '.join(NAMES)}; "
            f"any other set is a folder with\n{FolderDataset.tree}"
        )
    return LAYOUTS[layout](_find(root, name, layout), split, every=every, name=name)


def open_sets(
    root: str | Path,
    names: Sequence[str],
    split: str,
    *,
    every: Mapping[str, int] | None = None,
    layouts: Mapping[str, str] | None = None,
) -> list[SegmentationDataset]:
    """Opens several data sets that lie side by side, see `open_set`.

    Args:
        every: set -> take every n-th photo only. layouts: set -> layout, where it cannot be detected.

    Raises:
        DataError: the root or one of the sets is missing or does not have its layout.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(
            f"The data folder {root} does not exist. Give the folder that holds {', '.join(names)} with --data."
        )
    return [
        open_set(root, name, split, layout=(layouts or {}).get(name), every=(every or {}).get(name, 1))
        for name in names
    ]
