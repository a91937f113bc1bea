"""The published archives of the benchmarks, and what each of them becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train.data.convert import COCO, CONTEXT, VOC, VOC_LISTS, convert_coco_stuff, convert_context, convert_sbd
from train.data.download import Archive, unpack

_VOC_HOST = "https://thor.robots.ox.ac.uk/pascal/VOC"
_SBD_HOST = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours"
_COCO_HOST = "http://images.cocodataset.org/zips"
_STUFF_HOST = "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset"
_CONTEXT_URL = "https://codalabuser.blob.core.windows.net/public/trainval_merged.json"


@dataclass(frozen=True)
class Step:
    """An archive and what it becomes.

    Attributes:
        archive: to be fetched.
        disk: GB of the results, rounded up.
        results: paths below the data folder. All of them exist if the step is done.
        make: writes the results below a folder; its arguments are the archive, that folder, and the data folder.
    """

    archive: Archive
    disk: float
    results: tuple[Path, ...]
    make: Callable[[Path, Path, Path], None]

    def is_done(self, data: Path) -> bool:
        """Whether all results are in the data folder."""
        return all((data / result).exists() for result in self.results)


def _unpacking(archive: Archive, disk: float, parts: dict[str, Path]) -> Step:
    """The step that only unpacks parts of an archive: path in the archive -> path below the data folder."""
    return Step(archive, disk, tuple(parts.values()), lambda path, out, data: unpack(path, out, parts))


# Sizes are rounded. Checksums of VOC and SBD are torchvision's, that of PASCAL Context is PyTorch-Encoding's.
STEPS: dict[str, tuple[Step, ...]] = {
    "voc2012": (
        _unpacking(
            Archive(f"{_VOC_HOST}/voc2012/VOCtrainval_11-May-2012.tar", 2.0, "md5:6cd6e144f989b92b3379bac3b3de84fd"),
            2.0,
            {str(path): path for path in (VOC / "JPEGImages", VOC / "SegmentationClass", VOC_LISTS)},
        ),
        Step(
            Archive(f"{_SBD_HOST}/benchmark.tgz", 1.4, "md5:82b4d87ceb2ed10f6038a1cba92111cb"),
            0.1,
            (VOC / "SegmentationClassAug", VOC_LISTS / "aug.txt", VOC_LISTS / "trainaug.txt"),
            lambda path, out, data: convert_sbd(path, out, data / VOC_LISTS),
        ),
    ),
    "coco_stuff164k": (
        _unpacking(Archive(f"{_COCO_HOST}/train2017.zip", 19.3), 19.5, {"train2017": COCO / "images/train2017"}),
        _unpacking(Archive(f"{_COCO_HOST}/val2017.zip", 0.8), 0.9, {"val2017": COCO / "images/val2017"}),
        Step(
            Archive(f"{_STUFF_HOST}/stuffthingmaps_trainval2017.zip", 0.7),
            1.0,
            (COCO / "annotations/train2017", COCO / "annotations/val2017"),
            lambda path, out, data: convert_coco_stuff(path, out),
        ),
    ),
    "pascal_context59": (
        _unpacking(
            Archive(f"{_VOC_HOST}/voc2010/VOCtrainval_03-May-2010.tar", 1.3, "md5:da459979d0c395079b5c75ee67908abb"),
            1.3,
            {str(CONTEXT / "JPEGImages"): CONTEXT / "JPEGImages"},
        ),
        Step(
            Archive(
                _CONTEXT_URL,
                0.6,
                "sha1:169325d9f7e9047537fedca7b04de4dddf10b881",
                mirror=f"https://web.archive.org/web/20251122105902id_/{_CONTEXT_URL}",
            ),
            0.2,
            (CONTEXT / "SegmentationClassContext", CONTEXT / "ImageSets/SegmentationContext"),
            lambda path, out, data: convert_context(path, out),
        ),
    ),
}

PHOTOS = {"voc2012": (10_582, 1_449), "coco_stuff164k": (118_287, 5_000), "pascal_context59": (4_998, 5_105)}
"""Photos of train and val."""
