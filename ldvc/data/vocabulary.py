"""One list of learnable names over several data sets, and what each data set knows of it.

A photo is labelled with its own data set's classes only. A name from another data set may well be visible in it, so it is
*unknown* there and earns no mask loss; a name of its own data set that no pixel carries is a true negative.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from ldvc.data.class_names import canonical, plain
from ldvc.data.folder import FolderDataset

VOID = -1  # counts nowhere
BACKGROUND = -2  # none of the data set's classes: a negative for each of them


class Vocabulary:
    """Names merged over data sets, with held-out classes removed.

    Attributes:
        names: canonical spellings, in order of first appearance; these are learned.
        spellings: every spelling that the data sets use for them, for "seen" flags.
        known: (sets, names) bool; which data set labels which name.
        tables: per data set, (256,) int16 that maps a mask index to an index of `names`, VOID or BACKGROUND.

    Args:
        datasets: the data sets, whose order the first axis of `known` and `tables` follows.
        hidden: canonical names that are held out: their pixels become VOID and their names vanish.
    """

    def __init__(self, datasets: Sequence[FolderDataset], hidden: Collection[str] = ()) -> None:
        index_of: dict[str, int] = {}
        used: dict[str, None] = {}
        self.tables: list[np.ndarray] = []
        for dataset in datasets:
            table = np.full(256, VOID, dtype=np.int16)
            for index, spelling in enumerate(dataset.classes):
                name = canonical(spelling)
                if index == dataset.background_index:
                    table[index] = BACKGROUND
                elif name not in hidden:
                    table[index] = index_of.setdefault(name, len(index_of))
                    used[name] = used[plain(spelling)] = None
            table[dataset.ignore_index] = VOID
            self.tables.append(table)
        self.names = list(index_of)
        self.spellings = list(used)
        self.known = torch.zeros(len(datasets), len(self.names), dtype=torch.bool)
        for row, table in zip(self.known, self.tables, strict=True):
            row[torch.from_numpy(table[table >= 0]).long()] = True

    def __len__(self) -> int:
        return len(self.names)

    def present(self, labels: Tensor) -> Tensor:
        """Which names occur in a batch of label maps.

        Args:
            labels: integer indices of `names`, VOID or BACKGROUND; any shape.

        Returns:
            (names,) bool.
        """
        counts = torch.bincount(labels.long().flatten() + 2, minlength=len(self) + 2)
        return counts[2:] > 0
