"""One list of learnable names over several data sets, and what each data set knows of it.

A photo is labelled with its own data set's classes only. A name from another data set may well be visible in it, so it is
*unknown* there and earns no mask loss; a name of its own data set that no pixel carries is a true negative.

Held-out classes: in the inductive setting their names are unknown and their pixels VOID, or BACKGROUND: that these pixels are
none of the seen classes is what ZegCLIP's ignore label tells, too. In the transductive setting their names are known and their
pixels are HIDDEN, which self-training later fills with labels of its own.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ldvc.class_names import canonical, plain
from ldvc.errors import DataError
from train.data.reader import SegmentationDataset

VOID = -1  # counts nowhere
BACKGROUND = -2  # none of the data set's classes: a negative for each of them
HIDDEN = -3  # of a held-out class whose name is known (transductive setting)


class Vocabulary:
    """Names merged over data sets, with held-out classes removed.

    Attributes:
        names: canonical spellings, in order of first appearance; these are learned. In the transductive setting the held-out
            names stand behind all others.
        texts: what the text tower reads for each of `names`: the spelling of the first data set that has it ("sofa" in VOC,
            "couch" in COCO), so that training and evaluation on one data set use the same words.
        other_words: for each of `names`, further words that may stand for it in training, none of which is itself one of
            `names` or means a held-out class.
        words: all words that the text tower reads: `texts`, then `other_words` in the same order.
        shared: (words,) bool; words that stand for several names ("animal" for each kind of animal).
        seen_words: name -> its other words, where it has some.
        spellings: every spelling that the data sets use for the names with masks, for "seen" flags.
        unseen: (names,) bool; held out, known by name only. All False in the inductive setting.
        known: (sets, names) bool; which data set labels which name (or would, were it not held out).
        tables: per data set, (256,) int16 that maps a mask index to an index of `names`, VOID, BACKGROUND or HIDDEN.

    Args:
        datasets: the data sets, whose order the first axis of `known` and `tables` follows.
        hidden: canonical names that are held out.
        transductive: held-out names are known, and their pixels become HIDDEN instead of VOID.
        hidden_as_background: in the inductive setting, their pixels become BACKGROUND instead of VOID.
        other_words: canonical name -> further words for it; names that are not learned are passed over.
    """

    def __init__(
        self,
        datasets: Sequence[SegmentationDataset],
        hidden: Collection[str] = (),
        *,
        transductive: bool = False,
        hidden_as_background: bool = False,
        other_words: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        seen: dict[str, str] = {}  # name -> text
        unseen: dict[str, str] = {}
        used: dict[str, None] = {}
        for dataset in datasets:
            for spelling in dataset.names():
                name = canonical(spelling)
                if name not in hidden:
                    seen.setdefault(name, plain(spelling))
                    used[name] = used[plain(spelling)] = None
                elif transductive:
                    unseen.setdefault(name, plain(spelling))
        self.names, self.texts = [*seen, *unseen], [*seen.values(), *unseen.values()]
        self.other_words = [self._usable((other_words or {}).get(name, ()), name, hidden) for name in seen]
        self.other_words += [[] for _ in unseen]  # of held-out names nothing but the name is known
        self.words = [*self.texts, *(word for words in self.other_words for word in words)]
        counts = Counter(self.words)
        self.shared = torch.tensor([counts[word] > 1 for word in self.words], dtype=torch.bool)
        self.seen_words = {name: words for name, words in zip(self.names, self.other_words, strict=True) if words}
        self.spellings = list(used)
        self.unseen = torch.tensor([name in unseen for name in self.names], dtype=torch.bool)
        index_of = {name: index for index, name in enumerate(self.names)}

        self.tables: list[np.ndarray] = []
        self.known = torch.zeros(len(datasets), len(self.names), dtype=torch.bool)
        for dataset, known in zip(datasets, self.known, strict=True):
            table = np.full(256, VOID, dtype=np.int16)
            for index in dataset.class_indices():
                place = index_of.get(canonical(dataset.classes[index]))
                if place is not None:
                    table[index] = HIDDEN if self.unseen[place] else place
                    known[place] = True
                elif hidden_as_background:
                    table[index] = BACKGROUND
            if dataset.background_index is not None:
                table[dataset.background_index] = BACKGROUND
            table[dataset.ignore_index] = VOID
            self.tables.append(table)
        self._datasets = list(datasets)

    def _usable(self, words: Sequence[str], name: str, hidden: Collection[str]) -> list[str]:
        """Those words that name no other class, learned or held out, and are not how the name is read anyway."""
        others = {*self.names, *hidden} - {name}
        return [word for word in map(plain, words) if word not in self.texts and canonical(word) not in others]

    def doubtful(self, photos: int) -> Tensor:
        """(sets, names) bool: names whose absence from a mask does not mean that the photo lacks them.

        Those are the names that fewer than `photos` photos of a data set show, and all names of a data set that is not
        exhaustive. With `photos` > 0 every mask is read.
        """
        exhaustive = torch.tensor([dataset.exhaustive for dataset in self._datasets])
        return self.known & (self._rare(photos) | ~exhaustive[:, None])

    def _rare(self, photos: int) -> Tensor:
        """(sets, names) bool: names that fewer than `photos` photos of a data set show."""
        counts = torch.zeros(self.known.shape, dtype=torch.int64)
        if photos < 1:
            return counts < photos
        for count, dataset, table in zip(counts, self._datasets, self.tables, strict=True):
            for index in range(len(dataset)):
                try:
                    shown = np.unique(table[np.unique(dataset.mask(index))])
                except DataError:  # a broken mask shows nothing; whoever draws it says so
                    continue
                count[torch.from_numpy(shown[shown >= 0]).long()] += 1
        return counts < photos

    def __len__(self) -> int:
        return len(self.names)

    def present(self, labels: Tensor) -> Tensor:
        """Which names occur in a batch of label maps.

        Args:
            labels: integer indices of `names`, or the negative codes above; any shape.

        Returns:
            (names,) bool.
        """
        codes = -HIDDEN
        counts = torch.bincount(labels.long().flatten() + codes, minlength=len(self) + codes)
        return counts[codes:] > 0
