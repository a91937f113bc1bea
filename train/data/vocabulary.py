"""One list of names to learn over several data sets, and the names that each data set annotates.

A name of another data set may be visible in a photo, so it has no mask loss there. A name of the photo's own data set
without pixels is a true negative. Inductive setting: held-out names are not learned, their pixels are VOID or
BACKGROUND (as with ZegCLIP's ignore label). Transductive: the names are known, their pixels are HELD_OUT, and
self-training gives them labels.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldvc.class_names import canonical, plain
from ldvc.errors import DataError
from train.data.reader import SegmentationDataset

ROOT = Path(__file__).resolve().parents[2]

VOID = -1  # ignored
BACKGROUND = -2  # none of the data set's classes: a negative for each of them
HELD_OUT = -3  # a held-out class whose name is known (transductive setting)


def lookup(dataset: SegmentationDataset, codes: Iterable[int]) -> np.ndarray:
    """(256,) int16: mask index -> code of its class, one for each of the set's `names`; BACKGROUND or VOID for the others."""
    table = np.full(256, VOID, dtype=np.int16)
    table[dataset.class_indices()] = list(codes)
    if dataset.background_index not in (None, dataset.ignore_index):
        table[dataset.background_index] = BACKGROUND
    return table


class Vocabulary:
    """Names merged over data sets, with held-out classes removed.

    Attributes:
        names: canonical spellings, in order of first appearance; these are learned. In the transductive setting the held-out
            names come last.
        texts: the text tower's input for each of `names`: the spelling of the first data set that has it ("sofa" in VOC,
            "couch" in COCO), so that training and evaluation on one data set use the same words.
        other_words: for each of `names`, further words that may stand for it in training, none of which is itself one of
            `names` or means a held-out class.
        words: all inputs of the text tower: `texts`, then `other_words` in the same order.
        shared: (words,) bool; words that stand for several names ("animal" for each kind of animal).
        seen_words: name that a mask shows -> its other words, if it has any.
        spellings: every spelling that the data sets use for the names that a mask shows, for "seen" flags.
        unseen: (names,) bool; held out, known by name only. All False in the inductive setting.
        annotated: (sets, names) bool; whether a data set annotates a name (or would, if it were not held out).
        partially_annotated: (sets, names) bool; annotated names that a photo may show although its mask does not, because the
            data set is not exhaustive.
        tables: per data set, (256,) int16 that maps a mask index to an index of `names`, VOID, BACKGROUND or HELD_OUT.

    Args:
        held_out: canonical names. transductive: the held-out names are known; their pixels become HELD_OUT instead of VOID.
        held_out_as_background: in the inductive setting, their pixels become BACKGROUND instead of VOID.
        other_words: canonical name -> further words for it; names that are not learned are ignored.
    """

    def __init__(
        self,
        datasets: Sequence[SegmentationDataset],
        held_out: Collection[str] = (),
        *,
        transductive: bool = False,
        held_out_as_background: bool = False,
        other_words: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        seen: dict[str, str] = {}  # name -> text
        unseen: dict[str, str] = {}
        used: dict[str, None] = {}
        for dataset in datasets:
            for index in dataset.class_indices():
                spelling = dataset.classes[index]
                name = canonical(spelling)
                if name not in held_out:
                    seen.setdefault(name, plain(spelling))
                    if dataset.shown is None or index in dataset.shown:
                        used[name] = used[plain(spelling)] = None
                elif transductive:
                    unseen.setdefault(name, plain(spelling))
        self.names, self.texts = [*seen, *unseen], [*seen.values(), *unseen.values()]
        self.other_words = [self._usable((other_words or {}).get(name, ()), name, held_out) for name in seen]
        self.other_words += [[] for _ in unseen]  # only the name of a held-out class is known
        self.words = [*self.texts, *(word for words in self.other_words for word in words)]
        counts = Counter(self.words)
        self.shared = torch.tensor([counts[word] > 1 for word in self.words], dtype=torch.bool)
        pairs = zip(self.names, self.other_words, strict=True)
        self.seen_words = {name: words for name, words in pairs if words and name in used}
        self.spellings = list(used)
        self.unseen = torch.tensor([name in unseen for name in self.names], dtype=torch.bool)
        index_of = {name: index for index, name in enumerate(self.names)}

        self.tables: list[np.ndarray] = []
        self.annotated = torch.zeros(len(datasets), len(self.names), dtype=torch.bool)
        held_out_code = BACKGROUND if held_out_as_background else VOID
        for dataset, annotated in zip(datasets, self.annotated, strict=True):
            indices = [index_of.get(canonical(name)) for name in dataset.names()]
            annotated[[index for index in indices if index is not None]] = True
            codes = [held_out_code if index is None else HELD_OUT if self.unseen[index] else index for index in indices]
            self.tables.append(lookup(dataset, codes))
        exhaustive = torch.tensor([dataset.exhaustive for dataset in datasets], dtype=torch.bool)
        self.partially_annotated = self.annotated & ~exhaustive[:, None]

    def _usable(self, words: Sequence[str], name: str, held_out: Collection[str]) -> list[str]:
        """The words that name no other class, learned or held out, and are not in `texts`."""
        others = {*self.names, *held_out} - {name}
        return [word for word in map(plain, words) if word not in self.texts and canonical(word) not in others]

    def __len__(self) -> int:
        return len(self.names)

    def present(self, labels: Tensor) -> Tensor:
        """(names,) bool: which names occur in label maps, which hold indices of `names` or the negative codes above."""
        codes = -HELD_OUT
        counts = torch.bincount(labels.long().flatten() + codes, minlength=len(self) + codes)
        return counts[codes:] > 0


# ---- words in files of the user -----------------------------------------------------------------------------------------


def read_other_words(paths: str | Sequence[str]) -> dict[str, list[str]]:
    """Canonical name -> further words, from JSON files (paths may be relative to this project); DataError otherwise."""
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


def rename_classes(datasets: Sequence[SegmentationDataset], path: str) -> None:
    """Renames classes of data sets, in place. A JSON file maps a class, as a data set spells it, to its new name.

    DataError if the file cannot be used, no set has one of the classes, or two classes of a set become one.
    """
    words = _read(path, lambda word: isinstance(word, str) and word != "", '{"grass": "lawn"}')
    if unknown := sorted(set(words) - {name for dataset in datasets for name in dataset.names()}):
        raise DataError(f"No data set has the class {', '.join(unknown)} that is to be renamed.")
    for dataset in datasets:
        renamed = [words.get(name, name) for name in dataset.classes]
        if repeated := [name for name in renamed if renamed.count(name) > 1]:
            raise DataError(f"With other words, {dataset.name} has two classes called {repeated[0]}.")
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
