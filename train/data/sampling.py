"""The samples of a training step: photos, their views, and names.

Every random choice is a function of the seed and the sample's index alone. So a run that resumes at step N, or that has several
processes, sees the same samples as an uninterrupted single process.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from train.data.reader import SegmentationDataset
from train.data.transforms import Augmentation
from train.data.views import SkippedPhotos, ViewCache, normalise, readable_view
from train.data.vocabulary import Vocabulary

_SETS, _ORDER, _VIEW, _NAMES, _DROPOUT, _WORDS = 1, 2, 3, 4, 5, 6  # streams of random numbers that must differ
_BLOCK = 4096


def dropout_seed(seed: int, step: int) -> int:
    """Seed of the dropout of a (micro) step, so that a resumed step has the same dropout."""
    return int(np.random.SeedSequence((seed, _DROPOUT, step, 0)).generate_state(1, dtype=np.uint64)[0] >> 1)


class SampleSchedule:
    """Sample index -> (data set, photo, epoch): data sets by weight, the photos of each in a new order each epoch."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.sizes, self.seed = list(sizes), seed
        self.probabilities = np.asarray(weights, dtype=np.float64) / sum(weights)
        self._sets = np.zeros(0, dtype=np.int64)  # data set of each sample so far
        self._ranks = np.zeros(0, dtype=np.int64)  # number of earlier samples of that data set
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def _extend(self) -> None:
        block = len(self._sets) // _BLOCK
        generator = np.random.default_rng((self.seed, _SETS, block))
        sets = generator.choice(len(self.sizes), size=_BLOCK, p=self.probabilities)
        ranks = np.zeros(_BLOCK, dtype=np.int64)
        for index in range(len(self.sizes)):
            of_set = sets == index
            ranks[of_set] = np.arange(of_set.sum()) + (self._sets == index).sum()
        self._sets, self._ranks = np.concatenate([self._sets, sets]), np.concatenate([self._ranks, ranks])

    def __getitem__(self, sample_index: int) -> tuple[int, int, int]:
        while sample_index >= len(self._sets):
            self._extend()
        index, rank = int(self._sets[sample_index]), int(self._ranks[sample_index])
        epoch, position = divmod(rank, self.sizes[index])
        if (index, epoch) not in self._orders:
            generator = np.random.default_rng((self.seed, _ORDER, index, epoch))
            self._orders[index, epoch] = generator.permutation(self.sizes[index])
        return index, int(self._orders[index, epoch][position]), epoch


@dataclass(eq=False)
class TrainingViews(Dataset):
    """Sample index -> one view, ready for the model. Its length is the number of samples of a whole run.

    An item holds `labels` (H, W) int16 (indices of the vocabulary, VOID, BACKGROUND), `set` (int) and either
    `images` (3, crop, crop) float32, or `patch_tokens` (width, h, w) and `features` (h * w, d) in bfloat16.
    """

    datasets: Sequence[SegmentationDataset]
    vocabulary: Vocabulary  # of these data sets, in this order
    schedule: SampleSchedule
    _: KW_ONLY
    samples: int
    augmentation: Augmentation  # this field to `seed`: for views that are not stored
    mean: Sequence[float]
    std: Sequence[float]
    seed: int
    caches: Sequence[ViewCache] | None = None  # one for each data set, complete; None = no view is stored
    skipped: SkippedPhotos = field(default_factory=SkippedPhotos)  # unreadable photos, see `readable_view`

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, sample_index: int) -> dict[str, Tensor | int]:
        index, photo, epoch = self.schedule[sample_index]
        if self.caches is None:
            seed = (self.seed, _VIEW, sample_index)
            pixels, raw = readable_view(self.datasets[index], photo, self.augmentation, seed, self.skipped)
            inputs = {"images": normalise(pixels, self.mean, self.std)}
        else:
            cache = self.caches[index]
            number = photo * cache.views + epoch % cache.views
            raw = cache.labels[number].numpy()
            inputs = {"patch_tokens": cache.patch_tokens[number], "features": cache.features[number]}
        return {**inputs, "labels": torch.from_numpy(self.vocabulary.tables[index][raw]), "set": index}


@dataclass(eq=False)
class NameSampler:
    """Samples the names of a training step.

    The paper uses all names at every step. Here a step may have the names of its photos and a random part of the others
    instead, so that a decoder does not rely on one fixed list.
    """

    names: int  # number of names to learn
    distillation_names: int  # number of further names for distillation
    _: KW_ONLY
    distilled: int  # largest number of distillation names in a step
    full_probability: float  # probability that a step has all names; 1 = as in the paper
    seed: int
    unseen: Tensor | None = None  # (names,) bool; names that are held out
    self_training_from: int = 0  # first step with the held-out names; all later steps have them, too
    limit: int = 0
    """Largest number of names in a step, besides those that its photos show; 0 = no limit. With a long vocabulary, the text
    tower takes more time than the rest of the step."""

    def sample(self, step: int, present: Tensor) -> tuple[Tensor, Tensor]:
        """Sorted indices of names to learn (C,) and indices of distillation names (K,), int64, of a (micro) step.

        Args:
            present: (names,) bool, the names that the step's photos show; they are always sampled.
        """
        generator = np.random.default_rng((self.seed, _NAMES, step))
        full_lot, share = generator.random(2)
        priorities = generator.random(self.names)
        count = min(self.distilled, self.distillation_names)
        distilled = generator.choice(self.distillation_names, size=count, replace=False) if count else np.zeros(0, np.int64)
        chosen = present.clone() if full_lot >= self.full_probability else torch.ones(self.names, dtype=torch.bool)
        chosen |= torch.from_numpy(priorities < share)  # a random part of random size
        if self.limit:
            chosen &= present | torch.from_numpy(priorities.argsort().argsort() < self.limit)
        if self.unseen is not None:
            chosen[self.unseen] = step >= self.self_training_from
        return chosen.nonzero(as_tuple=True)[0], torch.from_numpy(distilled)


class WordSampler:
    """Samples the word that stands for each name in a training step.

    A decoder that is trained on "grass" alone learns one embedding and forgets that "lawn" means the same. So with the
    probability `share`, a step uses another word for a name that has other words.
    """

    def __init__(self, other_words: Sequence[Sequence[str]], *, seed: int, share: float = 0.4) -> None:
        self.counts = np.array([len(words) for words in other_words], dtype=np.int64)
        self.first = len(other_words) + np.cumsum(self.counts) - self.counts  # place of each name's first other word
        self.share, self.seed = share, seed

    def sample(self, step: int, names: Tensor) -> Tensor:
        """(C,) int64, the index in `Vocabulary.words` of the word for each of `names` (C,) in a (micro) step."""
        generator = np.random.default_rng((self.seed, _WORDS, step))
        replace, choice = generator.random((2, len(self.counts)))
        others = self.first + (choice * self.counts).astype(np.int64)
        words = np.where((replace < self.share) & (self.counts > 0), others, np.arange(len(self.counts)))
        return torch.from_numpy(words)[names.cpu()]
