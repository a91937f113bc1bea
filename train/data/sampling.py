"""What a training step sees: which photos, which of their views, which names.

Every random choice is a function of the seed and the number of the draw, never of what was drawn before by whom. So a run
that resumes at step N, or is spread over several processes, sees what an uninterrupted single process sees.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from train.data.reader import SegmentationDataset
from train.data.skipped import SkippedPhotos
from train.data.transforms import Augmentation
from train.data.views import ViewCache, normalise, readable_view
from train.data.vocabulary import Vocabulary

_SETS, _ORDER, _VIEW, _NAMES, _WORDS = 1, 2, 3, 4, 6  # (5 is dropout's) streams of random numbers that must not coincide
_BLOCK = 4096


class DrawSchedule:
    """Draw number -> (data set, photo, round): data sets by weight, the photos of each in shuffled rounds.

    Args:
        sizes: photos in each data set.
        weights: probability of each data set, up to a common factor.
        seed: of the run.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        assert len(sizes) == len(weights) and min(sizes) > 0 and min(weights) >= 0 and sum(weights) > 0
        self.sizes, self.seed = list(sizes), seed
        self.probabilities = np.asarray(weights, dtype=np.float64) / sum(weights)
        self._sets = np.zeros(0, dtype=np.int64)  # data set of each draw so far
        self._ranks = np.zeros(0, dtype=np.int64)  # how often that data set was drawn before
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def _extend(self) -> None:
        block = len(self._sets) // _BLOCK
        generator = np.random.default_rng((self.seed, _SETS, block))
        sets = generator.choice(len(self.sizes), size=_BLOCK, p=self.probabilities)
        ranks = np.zeros(_BLOCK, dtype=np.int64)
        for index in range(len(self.sizes)):
            here = sets == index
            ranks[here] = np.arange(here.sum()) + (self._sets == index).sum()
        self._sets, self._ranks = np.concatenate([self._sets, sets]), np.concatenate([self._ranks, ranks])

    def __getitem__(self, draw: int) -> tuple[int, int, int]:
        while draw >= len(self._sets):
            self._extend()
        index, rank = int(self._sets[draw]), int(self._ranks[draw])
        turn, place = divmod(rank, self.sizes[index])
        if (index, turn) not in self._orders:
            self._orders[index, turn] = np.random.default_rng((self.seed, _ORDER, index, turn)).permutation(
                self.sizes[index]
            )
        return index, int(self._orders[index, turn][place]), turn


class TrainingViews(Dataset):
    """Draw number -> one view, ready for the model. Its length is the number of draws of a whole run.

    An item holds `labels` (H, W) int16 (indices of the vocabulary, VOID, BACKGROUND), `set` (int) and either
    `images` (3, crop, crop) float32, or `patch_tokens` (width, h, w) and `features` (h * w, d) in bfloat16.

    Args:
        datasets: photos with masks. vocabulary: made from the same data sets, in the same order.
        schedule: which photo a draw takes.
        draws: length.
        augmentation, mean, std, seed: for views that are made afresh.
        caches: one per data set, complete; None makes every view afresh.
        skipped: where photos that cannot be used are listed; another photo takes their place, see `readable_view`.
    """

    def __init__(
        self,
        datasets: Sequence[SegmentationDataset],
        vocabulary: Vocabulary,
        schedule: DrawSchedule,
        *,
        draws: int,
        augmentation: Augmentation,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        caches: Sequence[ViewCache] | None = None,
        skipped: SkippedPhotos | None = None,
    ) -> None:
        self.datasets, self.vocabulary, self.schedule, self.draws = datasets, vocabulary, schedule, draws
        self.augmentation, self.mean, self.std, self.seed, self.caches = augmentation, mean, std, seed, caches
        self.skipped = SkippedPhotos() if skipped is None else skipped
        self.tables = [torch.from_numpy(table) for table in vocabulary.tables]

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, draw: int) -> dict[str, Tensor | int]:
        index, photo, turn = self.schedule[draw]
        if self.caches is None:
            seed = (self.seed, _VIEW, draw)
            pixels, raw = readable_view(self.datasets[index], photo, self.augmentation, seed, self.skipped)
            labels = self.tables[index][torch.from_numpy(raw).int()]
            return {"images": normalise(pixels, self.mean, self.std), "labels": labels, "set": index}
        cache = self.caches[index]
        number = photo * cache.views + turn % cache.views
        labels = self.tables[index][cache.labels[number].int()]
        return {"patch_tokens": cache.patch_tokens[number], "features": cache.features[number], "labels": labels, "set": index}


class NameSampler:
    """Draws the names of a training step.

    The paper learns with all names at every step. Here every second step takes the batch's own names and a random part of the
    others instead, so that a decoder cannot rely on one fixed list; `full_probability` = 1 gives the paper's way.

    Args:
        names: how many names are learned. concepts: how many further names exist to be preserved.
        preserve: how many of those join each step.
        full_probability: how often the list is the full one.
        limit: names in a list at most, apart from those that the step's photos carry; 0 = no limit. The text tower of a long
            vocabulary would cost more than the rest of the step.
        seed: of the run.
        unseen: (names,) bool; held-out names, which are in no list before the step `self_training_from` and in every list
            from then on. None: there are none.
    """

    def __init__(
        self,
        names: int,
        concepts: int,
        *,
        preserve: int,
        full_probability: float,
        seed: int,
        unseen: Tensor | None = None,
        self_training_from: int = 0,
        limit: int = 0,
    ) -> None:
        self.names, self.concepts, self.seed, self.limit = names, concepts, seed, limit
        self.unseen = torch.zeros(names, dtype=torch.bool) if unseen is None else unseen
        self.self_training_from = self_training_from
        self.preserve = min(preserve, concepts)
        self.full_probability = full_probability

    def sample(self, step: int, present: Tensor) -> tuple[Tensor, Tensor]:
        """The names of a step.

        Args:
            step: number of the (micro) step.
            present: (names,) bool, the names that the step's photos carry; they are always in the list.

        Returns:
            Sorted indices of names to learn (C,) and indices of concepts to preserve (K,), int64.
        """
        generator = np.random.default_rng((self.seed, _NAMES, step))
        full, share = generator.random(2)
        lots = generator.random(self.names)
        concepts = (
            generator.choice(self.concepts, size=self.preserve, replace=False)
            if self.preserve
            else np.zeros(0, dtype=np.int64)
        )
        chosen = present.clone() if full >= self.full_probability else torch.ones(self.names, dtype=torch.bool)
        chosen |= torch.from_numpy(lots < share)  # a random part of random size
        if self.limit:
            chosen &= present | torch.from_numpy(lots.argsort().argsort() < self.limit)
        chosen[self.unseen] = step >= self.self_training_from
        return chosen.nonzero(as_tuple=True)[0], torch.from_numpy(concepts)


class WordSampler:
    """Draws the word that stands for each name in a training step.

    A decoder that only ever reads "grass" learns the one embedding and forgets that "lawn" means the same. So a name is read as
    another of its words now and then.

    Args:
        other_words: for each name its other words, maybe none.
        share: probability that a step reads another word for a name that has some.
        seed: of the run.
    """

    def __init__(self, other_words: Sequence[Sequence[str]], *, share: float, seed: int) -> None:
        self.counts = np.array([len(words) for words in other_words], dtype=np.int64)
        self.first = len(other_words) + np.cumsum(self.counts) - self.counts  # place of each name's first other word
        self.share, self.seed = share, seed

    def sample(self, step: int, names: Tensor) -> Tensor:
        """(C,) int64, the index in `Vocabulary.words` of what is read for each of `names` (C,) in a (micro) step."""
        generator = np.random.default_rng((self.seed, _WORDS, step))
        another, which = generator.random((2, len(self.counts)))
        drawn = self.first + (which * self.counts).astype(np.int64)
        read = np.where((another < self.share) & (self.counts > 0), drawn, np.arange(len(self.counts)))
        return torch.from_numpy(read)[names.cpu()]
