"""Photos with masks, augmentation and sampling."""
# ruff: noqa: F401

from train.data.benchmarks import open_set, open_sets
from train.data.folder import FolderDataset
from train.data.inspection import inspect_masks
from train.data.reader import SegmentationDataset
from train.data.sampling import NameSampler, SampleSchedule, TrainingViews, WordSampler, dropout_seed
from train.data.transforms import Augmentation, random_view
from train.data.views import SkippedPhotos, ViewCache, build_caches, normalise, weights_digest
from train.data.vocabulary import BACKGROUND, HELD_OUT, VOID, Vocabulary
