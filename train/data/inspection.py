"""Checks the masks before training, so that a wrong numbering is an error and not a run that learns nothing."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ldvc.class_names import canonical
from ldvc.errors import DataError
from train.data.reader import SegmentationDataset, read_numbers

SAMPLE = 100  # masks of a benchmark that are checked, if the first ones show no class


def inspect_masks(datasets: Sequence[SegmentationDataset]) -> list[str]:
    """Checks the masks of users' own data sets, and sets `shown` of each. Of benchmarks, only a few masks are read.

    Returns sentences about possible mistakes. DataError if nothing can be learned from a set, or its numbers are
    shifted.
    """
    notes = []
    for dataset in datasets:
        notes += _synonyms(dataset)
        notes += _inspect(dataset) if dataset.layout == "folder" else _require_labels(dataset)
    return notes


def _require_labels(dataset: SegmentationDataset) -> list[str]:
    """Checks that at least one mask of a sample, spread over the list, shows a class. Returns no notes."""
    sample, reason = range(0, len(dataset), max(1, len(dataset) // SAMPLE)), ""
    for index in sample:
        try:
            if np.isin(dataset.mask(index), dataset.class_indices()).any():
                return []
        except DataError as error:
            reason = reason or str(error)
    reason = reason or "All their pixels are void."
    raise DataError(f"None of {len(sample)} masks of {dataset.name} shows a class, so nothing can be learned. {reason}")


def _inspect(dataset: SegmentationDataset) -> list[str]:
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda index: _numbers(dataset, index), range(len(dataset))))
    problems = [each for each in results if isinstance(each, DataError)]
    present = frozenset().union(*(each for each in results if not isinstance(each, DataError)))
    if len(problems) == len(results):
        raise DataError(f"None of the {len(results)} photos of {dataset.name} can be used. The first: {problems[0]}")

    allowed = {*range(len(dataset.classes)), dataset.ignore_index}
    dataset.shown = frozenset(present & set(dataset.class_indices()))
    names = {index: dataset.classes[index] for index in dataset.class_indices()}
    absent = [name for index, name in names.items() if index not in dataset.shown]
    meaning = f"{_listed(present)} occur in the masks of {dataset.name}. {_key(dataset)}"
    if absent:
        meaning += f" No mask shows {_listed(absent)}."
    invalid = sorted(present - allowed)
    if invalid == [len(dataset.classes)]:
        raise DataError(
            f"The numbers of {dataset.name} are shifted: {meaning} Numbers start at 0, so {invalid[0]} is no class: subtract 1 "
            'in the masks, or put "background" first in \'classes\' and set "background_index": 0.'
        )
    if not dataset.shown:
        raise DataError(
            f"No mask of {dataset.name} shows a class, so nothing can be learned: {meaning} If white marks an object, write "
            "its class number instead of 255."
        )
    if len(dataset.shown) == 1 and dataset.background_index not in present and not invalid:
        raise DataError(
            f"The masks of {dataset.name} show one class and nothing else, so every pixel would be learned as it: {meaning} "
            f'Number the surroundings: put "background" first in \'classes\', set "background_index": 0, and write 0 for '
            "surroundings and 1 for the class."
        )

    notes = []
    if problems:
        notes.append(f"{len(problems)} of {len(results)} photos of {dataset.name} cannot be used; the first: {problems[0]}")
    if invalid:
        notes.append(f"photos of {dataset.name} with the numbers {_listed(invalid)} are skipped. {_key(dataset)}")
    if absent:
        notes.append(f"no mask of {dataset.name} shows {_listed(absent)}, so they do not count as seen")
        if 0 in names and names[0] in absent:
            notes.append(f"no mask of {dataset.name} holds 0; if its masks count from 1, every name is one place off")
    return notes


def _numbers(dataset: SegmentationDataset, index: int) -> set[int] | DataError:
    """The numbers of one mask file, or the error if its photo cannot be used."""
    try:
        try:
            numbers = read_numbers(dataset.mask_path(dataset.stems[index]))
        except Exception:  # `mask` raises a DataError that explains it
            dataset.mask(index)
            raise
        dataset.require_size(index, numbers.shape)
    except DataError as error:
        return error
    return set(np.unique(numbers).tolist())


def _key(dataset: SegmentationDataset) -> str:
    """What the numbers of a data set mean, in one sentence."""
    parts = [f"{index} is '{dataset.classes[index]}'" for index in dataset.class_indices()[:3]]
    if len(dataset.class_indices()) > 3:
        last = dataset.class_indices()[-1]
        parts.append(f"and so on to {last}, '{dataset.classes[last]}'")
    if dataset.background_index is not None:
        parts.insert(0, f"{dataset.background_index} is background")
    return f"There {', '.join(parts)}, and {dataset.ignore_index} is void, which counts nowhere."


def _listed(values: Sequence[object] | frozenset[int], limit: int = 12) -> str:
    ordered = sorted(values) if isinstance(values, frozenset) else list(values)
    text = ", ".join(str(value) for value in ordered[:limit])
    return f"{text} and {len(ordered) - limit} more" if len(ordered) > limit else text or "no numbers"


def _synonyms(dataset: SegmentationDataset) -> list[str]:
    first: dict[str, str] = {}
    pairs = [(first.setdefault(canonical(name), name), name) for name in dataset.names()]
    same = "mean the same and are learned as one class"
    return [f"{dataset.name}: '{other}' and '{name}' {same}" for other, name in pairs if other != name]
