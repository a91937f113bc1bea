"""Prepares a benchmark of the paper in one command, from the published archives to the files that training reads.

    python train/prepare.py voc2012 --data data
    python train/prepare.py coco_stuff164k --data data --source /archives
    python train/prepare.py pascal_context59 --data data --source https://mirror.example/archives

Prints the sizes, downloads the archives, checks their checksums, unpacks them, converts the masks, and checks the result. The
layout is that of mmsegmentation. An interrupted command continues where it stopped, and finished work is not repeated. A
downloaded archive is removed after its use; archives in a folder of yours stay there.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from ldvc.errors import DataError, LdvcError
from train.data import open_set
from train.data.benchmarks import NAMES
from train.data.convert import COCO, CONTEXT, VOC, VOC_LISTS, convert_coco_stuff, convert_context, convert_sbd
from train.data.download import Archive, DamagedArchiveError, fetch, is_url, unpack

GB = 10**9

# Sizes are rounded. Checksums of VOC and SBD are torchvision's, that of PASCAL Context is PyTorch-Encoding's.
_VOC_HOST = "https://thor.robots.ox.ac.uk/pascal/VOC"
_SBD_HOST = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours"
_STUFF_HOST = "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset"
_CONTEXT_URL = "https://codalabuser.blob.core.windows.net/public/trainval_merged.json"
_CONTEXT_MIRROR = f"https://web.archive.org/web/20251122105902id_/{_CONTEXT_URL}"
VOC2012 = Archive(f"{_VOC_HOST}/voc2012/VOCtrainval_11-May-2012.tar", 2.0, "md5:6cd6e144f989b92b3379bac3b3de84fd")
VOC2010 = Archive(f"{_VOC_HOST}/voc2010/VOCtrainval_03-May-2010.tar", 1.3, "md5:da459979d0c395079b5c75ee67908abb")
SBD = Archive(f"{_SBD_HOST}/benchmark.tgz", 1.4, "md5:82b4d87ceb2ed10f6038a1cba92111cb")
COCO_TRAIN = Archive("http://images.cocodataset.org/zips/train2017.zip", 19.3)
COCO_VAL = Archive("http://images.cocodataset.org/zips/val2017.zip", 0.8)
COCO_STUFF = Archive(f"{_STUFF_HOST}/stuffthingmaps_trainval2017.zip", 0.7)
CONTEXT_JSON = Archive(_CONTEXT_URL, 0.6, "sha1:169325d9f7e9047537fedca7b04de4dddf10b881", mirror=_CONTEXT_MIRROR)


@dataclass(frozen=True)
class Step:
    """An archive and the files that are made from it."""

    archive: Archive
    disk: float  # GB of the results, rounded up
    results: tuple[Path, ...]  # paths below the data folder; all of them exist if the step is done
    make: Callable[[Path, Path, Path], None]  # (archive, folder for the results, data folder)

    def is_done(self, data: Path) -> bool:
        """Whether all results are in the data folder."""
        return all((data / result).exists() for result in self.results)


def _unpacking(archive: Archive, disk: float, parts: dict[str, Path]) -> Step:
    """The step that only unpacks parts of an archive: path in the archive -> path below the data folder."""
    return Step(archive, disk, tuple(parts.values()), lambda path, out, data: unpack(path, out, parts))


STEPS: dict[str, tuple[Step, ...]] = {
    "voc2012": (
        _unpacking(VOC2012, 2.0, {str(path): path for path in (VOC / "JPEGImages", VOC / "SegmentationClass", VOC_LISTS)}),
        Step(
            SBD,
            0.1,
            (VOC / "SegmentationClassAug", VOC_LISTS / "aug.txt", VOC_LISTS / "trainaug.txt"),
            lambda path, out, data: convert_sbd(path, out, data / VOC_LISTS),
        ),
    ),
    "coco_stuff164k": (
        _unpacking(COCO_TRAIN, 19.5, {"train2017": COCO / "images/train2017"}),
        _unpacking(COCO_VAL, 0.9, {"val2017": COCO / "images/val2017"}),
        Step(
            COCO_STUFF,
            1.0,
            (COCO / "annotations/train2017", COCO / "annotations/val2017"),
            lambda path, out, data: convert_coco_stuff(path, out),
        ),
    ),
    "pascal_context59": (
        _unpacking(VOC2010, 1.3, {str(CONTEXT / "JPEGImages"): CONTEXT / "JPEGImages"}),
        Step(
            CONTEXT_JSON,
            0.2,
            (CONTEXT / "SegmentationClassContext", CONTEXT / "ImageSets/SegmentationContext"),
            lambda path, out, data: convert_context(path, out),
        ),
    ),
}

PHOTOS = {"voc2012": (10_582, 1_449), "coco_stuff164k": (118_287, 5_000), "pascal_context59": (4_998, 5_105)}
"""Number of photos of train and val."""


def show_sizes(name: str, data: Path, work: Path, source: str | None) -> None:
    """Prints what will be downloaded and written; DataError if the disk is too small."""
    print(f"{NAMES[name].title}\n{'':34}{'download':>10}{'on disk':>10}")
    written = largest = 0.0
    for step in STEPS[name]:
        size = "done"
        if not step.is_done(data):
            download = step.archive.size if source is None or is_url(source) else 0.0  # removed after its step
            size, largest, written = f"{download:.1f} GB", max(largest, written + step.disk + download), written + step.disk
        print(f"{step.archive.name:34}{size:>10}{step.disk:>7.1f} GB")
    needed = largest - sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) / GB
    free = shutil.disk_usage(data).free / GB
    print(f"needed: {max(needed, 0):.1f} GB, free: {free:.1f} GB", flush=True)
    if needed > free:
        raise DataError(
            f"{name} needs {needed:.1f} GB in {data}, where {free:.1f} GB are free; free some space, "
            "or take a folder on another disk with --data."
        )


def run_step(step: Step, data: Path, work: Path, source: str | None) -> None:
    """Fetches an archive into the folder `work` and makes the missing results.

    DataError if the archive is missing or damaged; a damaged download is removed.
    """
    unfinished = work / f"{step.archive.name}.results"
    if not step.is_done(data):
        path = fetch(step.archive, work, source)
        print(f"{path.name} -> {', '.join(map(str, step.results))}", flush=True)
        try:
            step.make(path, unfinished, data)
        except DamagedArchiveError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if path.parent != work:
                raise DataError(f"{error} Replace it.") from None
            path.unlink()
            raise DataError(f"{error} It was removed; run the command again, or take another --source.") from None
        for result in step.results:
            if not (data / result).exists():
                (data / result).parent.mkdir(parents=True, exist_ok=True)
                os.replace(unfinished / result, data / result)
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in (step.archive.name, f"{step.archive.name}.part"):
        (work / name).unlink(missing_ok=True)


def check(name: str, data: Path) -> None:
    """Opens both splits, checks that every file exists and reads every 500th photo and mask; DataError if one is wrong."""
    for split, expected in zip(("train", "val"), PHOTOS[name], strict=True):
        dataset = open_set(data, name, split)
        if len(dataset) != expected:
            raise DataError(
                f"{dataset.folder} has {len(dataset)} photos for {split} instead of {expected}; "
                "remove the folder and run the command again."
            )
        files = [path for stem in dataset.stems for path in (dataset.photo_path(stem), dataset.mask_path(stem))]
        if missing := [path for path in files if not path.is_file()]:
            raise DataError(
                f"{missing[0]} is missing, the first of {len(missing)}; "
                f"remove the folder {missing[0].parent} and run the command again."
            )
        for index in range(0, len(dataset), 500):
            dataset.pair(index)
        print(f"{dataset.folder}: {split} has {len(dataset)} photos with masks of {len(dataset.names())} classes", flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=STEPS, help="the benchmark")
    parser.add_argument("--data", default="data", help="folder of the data sets (default: %(default)s)")
    parser.add_argument("--source", help="address of a mirror, or a folder, that holds the archives under their names")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    options = parse(arguments)
    data = Path(options.data)
    work = data / f"{options.name}.unfinished"
    try:
        data.mkdir(parents=True, exist_ok=True)
        show_sizes(options.name, data, work, options.source)
        try:
            for step in STEPS[options.name]:
                run_step(step, data, work, options.source)
        finally:
            if work.is_dir() and not any(work.iterdir()):
                work.rmdir()
        check(options.name, data)
    except (LdvcError, OSError) as error:
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(f"error: {error}")
        sys.exit(f"error: The disk of {data} is full; free some space and run the command again, which continues from here.")
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command continues from here.")


if __name__ == "__main__":
    main()
