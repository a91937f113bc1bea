"""Other words for classes than those of the data sets, for training and evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldvc.class_names import canonical
from ldvc.errors import DataError
from train.data import SegmentationDataset

ROOT = Path(__file__).resolve().parents[1]


def read_other_words(paths: str | Sequence[str]) -> dict[str, list[str]]:
    """Canonical name -> further words for it, from one JSON file or several. A path may be relative to this project.

    Raises:
        DataError: it cannot be used.
    """
    merged: dict[str, list[str]] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        content = _read(
            path if Path(path).is_file() else ROOT / path,
            lambda words: isinstance(words, list) and all(isinstance(word, str) for word in words),
            '{"grass": ["lawn", "meadow"]}; or do without one: --set other_words=null',
        )
        for name, words in content.items():
            merged.setdefault(canonical(name), []).extend(words)
    return merged


def read_renamed(path: str) -> dict[str, str]:
    """Class as a data set spells it -> its new name, from a JSON file.

    Raises:
        DataError: it cannot be used.
    """
    return _read(path, lambda word: isinstance(word, str) and word != "", '{"grass": "lawn"}')


def rename_classes(datasets: Sequence[SegmentationDataset], words: Mapping[str, str]) -> None:
    """Renames classes of data sets, in place.

    Raises:
        DataError: no set has one of the classes, or two classes of a set become one.
    """
    if nowhere := sorted(set(words) - {name for dataset in datasets for name in dataset.names()}):
        raise DataError(f"No data set has the class {', '.join(nowhere)} that is to be renamed.")
    for dataset in datasets:
        renamed = [words.get(name, name) for name in dataset.classes]
        if twice := [name for name in renamed if renamed.count(name) > 1]:
            raise DataError(f"With other words, {dataset.name} has two classes called {twice[0]}.")
        dataset.own_words = dataset.own_words and renamed == dataset.classes
        dataset.classes = renamed


def _read(path: str | Path, fits: Callable[[Any], bool], example: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not all(map(fits, content.values())):
            raise TypeError("it is no list of words by class")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"The words {path} cannot be used ({error}); it should hold {example}.") from None
    return content
