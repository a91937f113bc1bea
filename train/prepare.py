"""A benchmark of the paper, from its published archives to the files that training reads, in one command.

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
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from ldvc.errors import DataError, LdvcError
from train.data import LAYOUTS, open_set
from train.data.archives import PHOTOS, STEPS, Step
from train.data.download import DamagedArchiveError, fetch, is_url
from train.data.layouts import NAMES

GB = 10**9


def show_sizes(name: str, data: Path, work: Path, source: str | None) -> None:
    """Prints what will be downloaded and written.

    Raises:
        DataError: the disk is too small.
    """
    local = source is not None and not is_url(source)
    print(f"{LAYOUTS[NAMES[name]].title}\n{'':34}{'download':>10}{'on disk':>10}")
    made = most = 0.0
    for step in STEPS[name]:
        download = 0.0 if local else step.archive.size
        if not step.is_done(data):  # the archive is removed after its step
            most = max(most, made + step.disk + download)
            made += step.disk
        size = "done" if step.is_done(data) else f"{download:.1f} GB"
        print(f"{step.archive.name:34}{size:>10}{step.disk:>7.1f} GB")
    needed = most - sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) / GB
    free = shutil.disk_usage(data).free / GB
    print(f"needed: {max(needed, 0):.1f} GB, free: {free:.1f} GB", flush=True)
    if needed > free:
        raise DataError(
            f"{name} needs {needed:.1f} GB in {data}, where {free:.1f} GB are free; free some space, "
            "or take a folder on another disk with --data."
        )


def run_step(step: Step, data: Path, work: Path, source: str | None) -> None:
    """Fetches an archive and makes what is missing of its results.

    Args:
        work: folder for downloads and unfinished results, on the disk of the data folder.

    Raises:
        DataError: the archive is missing or damaged; a damaged download is removed.
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
    for name in (step.archive.name, f"{step.archive.name}.part", f"{step.archive.name}.part.tag"):
        (work / name).unlink(missing_ok=True)


def check(name: str, data: Path) -> None:
    """Opens both splits with the reader, looks for every file and reads every 500th photo and mask.

    Raises:
        DataError: the layout, the number of photos, or a file is wrong.
    """
    for split, expected in zip(("train", "val"), PHOTOS[name], strict=True):
        dataset = open_set(data, name, split)
        if len(dataset) != expected:
            raise DataError(
                f"{dataset.folder} has {len(dataset)} photos for {split} instead of {expected}; "
                "remove the folder and run the command again."
            )
        files = [path for stem in dataset.stems for path in (dataset.photo_path(stem), dataset.mask_path(stem))]
        missing = [path for path in files if not path.is_file()]
        if missing:
            raise DataError(
                f"{missing[0]} is missing, the first of {len(missing)}; "
                f"remove the folder {missing[0].parent} and run the command again."
            )
        for index in range(0, len(dataset), 500):
            dataset.pair(index)
        print(f"{dataset.folder}: {split} has {len(dataset)} photos with masks of {len(dataset.names())} classes", flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=STEPS, help="the benchmark")
    parser.add_argument("--data", default="data", help="folder of the data sets (default: %(default)s)")
    parser.add_argument("--source", help="address of a mirror, or a folder, that holds the archives under their names")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
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
    except LdvcError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(f"error: {error}")
        sys.exit(f"error: The disk of {data} is full; free some space and run the command again, which continues from here.")
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command continues from here.")


if __name__ == "__main__":
    main()
