"""Photos with masks, class names, augmentation and sampling."""

from ldvc.data.class_names import canonical, canonical_set, load_classes, load_split, spellings
from ldvc.data.folder import FolderDataset
from ldvc.data.layouts import LAYOUTS, open_set, open_sets
from ldvc.data.reader import SegmentationDataset
from ldvc.data.sampling import DrawSchedule, NameSampler, TrainingViews, WordSampler
from ldvc.data.skipped import SkippedPhotos
from ldvc.data.transforms import Augmentation, random_view
from ldvc.data.views import ViewCache, build_caches, normalise, weights_digest
from ldvc.data.vocabulary import BACKGROUND, HIDDEN, VOID, Vocabulary

__all__ = [
    "BACKGROUND",
    "HIDDEN",
    "LAYOUTS",
    "VOID",
    "Augmentation",
    "DrawSchedule",
    "FolderDataset",
    "NameSampler",
    "SegmentationDataset",
    "SkippedPhotos",
    "TrainingViews",
    "ViewCache",
    "Vocabulary",
    "WordSampler",
    "build_caches",
    "canonical",
    "canonical_set",
    "load_classes",
    "load_split",
    "normalise",
    "open_set",
    "open_sets",
    "random_view",
    "spellings",
    "weights_digest",
]
