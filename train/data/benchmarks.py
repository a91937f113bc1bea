"""The benchmarks of the paper in their official layouts, which are mmsegmentation's too; opens data sets by name."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldvc.class_names import load_classes
from ldvc.errors import DataError
from train.data.folder import FolderDataset
from train.data.reader import IGNORE, SegmentationDataset, is_usable

logger = logging.getLogger(__name__)


class _Benchmark(SegmentationDataset):
    """Base class of the benchmarks. Opens every n-th photo of `folder`, which is the last folder in the first line of `tree`.

    DataError names the first file or folder that is missing, and the expected tree.
    """

    class_list: str

    def __init__(self, folder: Path, split: str, *, every: int, name: str) -> None:
        self.folder, self.split, self.name = folder, split, name
        self.classes = load_classes(self.class_list)
        self._keep(self._open(), every)

    @abstractmethod
    def _open(self) -> list[str]:
        """Checks the folders, sets the meaning of the numbers in masks, and returns the stems of the split."""


class _VocKit(_Benchmark):
    """Base class of VOC 2012 and PASCAL Context: a folder with JPEGImages, masks and lists.

    Both ignore background pixels, number 0 (mmsegmentation's `reduce_zero_label`): void, and class k is index k - 1.
    """

    masks: tuple[str, ...]  # folders that may hold a mask, in order of preference
    lists: str  # folder of the lists

    def _open(self) -> list[str]:
        self._set_numbers(first=1, ignored=(0, IGNORE))
        self._require(self.folder, self.folder / "JPEGImages")
        self._mask_folders = [self.folder / part for part in self.masks if (self.folder / part).is_dir()]
        if not self._mask_folders:
            raise self._missing(self.folder / self.masks[0])
        return self._read_list(*self._list_files(self.folder / self.lists))

    def _list_files(self, folder: Path) -> list[Path]:
        return [folder / f"{self.split}.txt"]

    def photo_path(self, stem: str) -> Path:
        return self.folder / "JPEGImages" / f"{stem}.jpg"

    def mask_path(self, stem: str) -> Path:
        paths = [folder / f"{stem}.png" for folder in self._mask_folders]
        existing = [path for path in paths if path.is_file()]
        if len(existing) > 1:  # one of them may hold colours instead of class numbers
            return next(filter(is_usable, existing), existing[0])
        return existing[0] if existing else paths[-1]


class Voc2012(_VocKit):
    """PASCAL VOC 2012 with the additional masks of SBD (SegmentationClassAug): 20 classes, 10,582 and 1,449 photos.

    A photo with a mask in SegmentationClass uses that mask, as in mmsegmentation, whose training list is the official
    train.txt followed by SBD's aug.txt. Without any list of additional masks, "train" is the official train.txt alone.
    """

    layout = "voc"
    title = "PASCAL VOC 2012 with SegmentationClassAug"
    tree = """  VOCdevkit/VOC2012/
    JPEGImages/2007_000032.jpg
    SegmentationClass/2007_000032.png
    SegmentationClassAug/2008_000002.png     numbers: 0 background, 1 to 20 classes, 255 border
    ImageSets/Segmentation/trainaug.txt      or train_aug.txt, or both train.txt and aug.txt
    ImageSets/Segmentation/val.txt"""
    class_list = "voc20"
    masks = ("SegmentationClass", "SegmentationClassAug")
    lists = "ImageSets/Segmentation"

    def _list_files(self, folder: Path) -> list[Path]:
        if self.split != "train":
            return super()._list_files(folder)
        for names in ("trainaug.txt", "train_aug.txt", "train.txt aug.txt", "train.txt"):
            files = [folder / name for name in names.split()]
            if all(file.is_file() for file in files):
                if names == "train.txt":
                    logger.warning("%s has neither trainaug.txt nor aug.txt: 1,464 photos instead of 10,582", folder)
                return files
        return [folder / "trainaug.txt"]


class PascalContext59(_VocKit):
    """PASCAL Context: 59 classes of things and stuff on some 5,000 and 5,100 photos of VOC 2010."""

    layout = "pascal_context"
    title = "PASCAL Context (59 classes)"
    tree = """  VOCdevkit/VOC2010/
    JPEGImages/2008_000002.jpg
    SegmentationClassContext/2008_000002.png   numbers: 0 background, 1 to 59 classes
    ImageSets/SegmentationContext/train.txt
    ImageSets/SegmentationContext/val.txt
  (the masks and lists are made by mmsegmentation's tools/dataset_converters/pascal_context.py)"""
    class_list = "context59"
    masks = ("SegmentationClassContext",)
    lists = "ImageSets/SegmentationContext"


class CocoStuff164k(_Benchmark):
    """COCO-Stuff 164k: 171 classes of things and stuff on the 118,287 and 5,000 photos of COCO 2017."""

    layout = "coco_stuff"
    title = "COCO-Stuff 164k"
    tree = """  coco_stuff164k/
    images/train2017/000000000009.jpg
    images/val2017/000000000139.jpg
    annotations/train2017/000000000009_labelTrainIds.png   numbers: 0 to 170 classes, 255 unlabelled
    annotations/val2017/000000000139_labelTrainIds.png
  (the masks are made by mmsegmentation's tools/dataset_converters/coco_stuff164k.py)"""

    class_list = "coco_stuff171"

    def _open(self) -> list[str]:
        self._set_numbers()
        images = self.folder / "images" / f"{self.split}2017"
        self._require(self.folder, images, self.folder / "annotations" / f"{self.split}2017")
        with os.scandir(images) as entries:
            stems = sorted(Path(entry.name).stem for entry in entries if entry.name.endswith(".jpg"))
        if not stems:
            raise self._missing(images, "holds no photos")
        return stems

    def photo_path(self, stem: str) -> Path:
        return self.folder / "images" / f"{self.split}2017" / f"{stem}.jpg"

    def mask_path(self, stem: str) -> Path:
        return self.folder / "annotations" / f"{self.split}2017" / f"{stem}_labelTrainIds.png"


# ---- data sets by name --------------------------------------------------------------------------------------------------

NAMES: dict[str, type[_Benchmark]] = {"voc2012": Voc2012, "coco_stuff164k": CocoStuff164k, "pascal_context59": PascalContext59}
"""Name of a benchmark -> reader."""

# Reader -> possible folders, below the data folder or below a folder with the name of the set, and a path inside them.
_PLACES: dict[type[_Benchmark], tuple[tuple[str, ...], str]] = {
    PascalContext59: (("VOCdevkit/VOC2010", "VOC2010", ""), "SegmentationClassContext"),
    Voc2012: (("VOCdevkit/VOC2012", "VOC2012", ""), "JPEGImages"),
    CocoStuff164k: (("coco_stuff164k", ""), "annotations/train2017"),
}


def _reader_of(root: Path, name: str) -> type[SegmentationDataset]:
    if (root / name / "dataset.json").is_file():
        return FolderDataset
    if name in NAMES:
        return NAMES[name]
    for reader, (places, mark) in _PLACES.items():
        if any((root / name / place / mark).exists() for place in places):
            return reader
    return FolderDataset


def _find(root: Path, name: str, reader: type[_Benchmark]) -> Path:
    """The folder of a benchmark: the first place that exists, otherwise the usual place, which the error then names."""
    parts, mark = _PLACES[reader]
    places = [folder / part for folder in (root / name, root) for part in parts]
    marked = [place for place in places if (place / mark).exists()]
    existing = [place for place in places if place.is_dir() and place != root]
    return next(iter((*marked, *existing)), root / parts[0])


def open_set(root: str | Path, name: str, split: str, *, every: int = 1) -> SegmentationDataset:
    """Opens one split of one data set, with every n-th photo; DataError if its files do not have the layout.

    `name`: "voc2012", "coco_stuff164k", "pascal_context59", or the name of a folder under `root`.
    """
    root = Path(root)
    try:
        reader = _reader_of(root, name)
        if reader is not FolderDataset:
            return reader(_find(root, name, reader), split, every=every, name=name)
        if not (root / name).is_dir():
            names = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "nothing"
            problem = f"There is no data set '{name}' in {root}, which holds {names}. Benchmarks are called {', '.join(NAMES)}"
            raise DataError(f"{problem}; any other set is a folder with\n{FolderDataset.tree}")
        return FolderDataset(root / name, split, every=every, name=name)
    except OSError as error:
        raise DataError(f"The data set {name} cannot be read: {error.filename}: {error.strerror}.") from None


def open_sets(
    root: str | Path, names: Sequence[str], split: str, *, every: Mapping[str, int] | None = None
) -> list[SegmentationDataset]:
    """Opens several data sets that lie side by side, see `open_set`; `every` maps sets to n, to take every n-th photo only."""
    if not Path(root).is_dir():
        raise DataError(f"The data folder {root} does not exist. Give the folder that holds {', '.join(names)} with --data.")
    return [open_set(root, name, split, every=(every or {}).get(name, 1)) for name in names]
