"""Photos with masks, augmentation and sampling."""

from train.data.folder import FolderDataset
from train.data.inspection import inspect_masks
from train.data.layouts import LAYOUTS, open_set, open_sets
from train.data.reader import SegmentationDataset
from train.data.sampling import NameSampler, SampleSchedule, TrainingViews, WordSampler, dropout_seed
from train.data.skipped import SkippedPhotos
from train.data.transforms import Augmentation, random_view
from train.data.views import ViewCache, build_caches, normalise, weights_digest
from train.data.vocabulary import BACKGROUND, HELD_OUT, VOID, Vocabulary

__all__ = [
    "BACKGROUND",
    "HELD_OUT",
    "LAYOUTS",
    "VOID",
    "Augmentation",
    "FolderDataset",
    "NameSampler",
    "SampleSchedule",
    "SegmentationDataset",
    "SkippedPhotos",
    "TrainingViews",
    "ViewCache",
    "Vocabulary",
    "WordSampler",
    "build_caches",
    "dropout_seed",
    "inspect_masks",
    "normalise",
    "open_set",
    "open_sets",
    "random_view",
    "weights_digest",
]
