"""Converts the published masks of the benchmarks to the format that mmsegmentation and our readers expect.

Every conversion reads an archive and writes one file at a time below an output folder. Files of an earlier call are kept.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.mask import decode
from scipy.io import loadmat
from tqdm import tqdm

from train.data.download import DamagedArchiveError, open_archive
from train.files import written

VOC = Path("VOCdevkit/VOC2012")
VOC_LISTS = VOC / "ImageSets/Segmentation"
CONTEXT = Path("VOCdevkit/VOC2010")
COCO = Path("coco_stuff164k")

# Those of COCO-Stuff's ids 1 to 182 that no mask contains: street sign, hat, shoe, eye glasses, plate, mirror, window, desk,
# door, blender, hair brush.
COCO_WITHOUT_MASKS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)

# Ids among the 459 categories of PASCAL Context, in the alphabetical order of the 59 classes; 0 is the background.
CONTEXT_IDS = (
    0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159, 162,
    187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397, 415, 416,
    420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip

_NO_CLASS = -1


def _in_processes(convert: Callable[[Any], None], tasks: Iterable[Any], *, title: str, total: int | None = None) -> None:
    """Calls `convert` with every task, in as many processes as there are cores."""
    with Pool(os.cpu_count(), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:  # Ctrl-C is left to the parent
        for _ in tqdm(pool.imap_unordered(convert, tasks, 16), title, total, unit=" masks", disable=None):
            pass


def _save_mask(mask: np.ndarray, path: Path) -> None:
    with written(path) as temporary:
        Image.fromarray(mask).save(temporary, format="PNG")


def _write_list(path: Path, stems: Iterable[str]) -> None:
    with written(path) as temporary:
        temporary.write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")


def convert_sbd(path: Path, out: Path, voc_lists: Path) -> None:
    """SBD's `.mat` files -> SegmentationClassAug, aug.txt and trainaug.txt of VOC 2012.

    aug.txt holds the photos of SBD's two lists that are in neither of `voc_lists`; trainaug.txt holds VOC's train.txt
    and then aug.txt, 10,582 photos.
    """
    sbd: dict[str, set[str]] = {}

    def tasks() -> Iterator[tuple[bytes, Path]]:
        for member in members:
            name = Path(member.name)
            if name.parent.name == "dataset" and name.name in ("train.txt", "val.txt"):
                sbd[name.stem] = set(member.open().read().decode().split())
            elif name.parent.name == "cls" and name.suffix == ".mat":
                target = out / VOC / "SegmentationClassAug" / f"{name.stem}.png"
                if not target.exists():
                    yield member.open().read(), target

    with open_archive(path) as members:
        _in_processes(_convert_mat, tasks(), title="SegmentationClassAug")
    train, val = ((voc_lists / f"{split}.txt").read_text(encoding="utf-8").split() for split in ("train", "val"))
    added = sorted((sbd["train"] | sbd["val"]) - {*train, *val})
    _write_list(out / VOC_LISTS / "aug.txt", added)
    _write_list(out / VOC_LISTS / "trainaug.txt", [*train, *added])


def _convert_mat(task: tuple[bytes, Path]) -> None:
    content, target = task
    _save_mask(loadmat(io.BytesIO(content))["GTcls"][0]["Segmentation"][0].astype(np.uint8), target)


def convert_coco_stuff(path: Path, out: Path) -> None:
    """Masks of COCO-Stuff in stuffthingmaps_trainval2017.zip -> `_labelTrainIds` masks.

    A published mask holds ids 1 to 182 minus one, and 255 where nothing is labelled. 11 of the ids have no masks; the other
    171 become 0 to 170 in their order. DamagedArchiveError if the archive lacks masks, or a mask holds another number.
    """
    with open_archive(path) as members:
        names = [member.name for member in members if re.fullmatch(r"(train|val)2017/\w+\.png", member.name)]
        for split in ("train2017", "val2017"):
            if not any(name.startswith(split) for name in names):
                raise DamagedArchiveError(f"{path} is not the official archive: it has no masks in {split}.")
        targets = [out / COCO / "annotations" / f"{name[: -len('.png')]}_labelTrainIds.png" for name in names]
        tasks = [(path, name, target) for name, target in zip(names, targets, strict=True) if not target.exists()]
        _in_processes(_convert_coco_mask, tasks, title="_labelTrainIds", total=len(tasks))


def coco_train_ids() -> np.ndarray:
    """(256,) number in a published mask of COCO-Stuff -> index of the class, 255 for unlabelled, -1 for no class."""
    table = np.full(256, _NO_CLASS, dtype=np.int16)
    numbers = [label - 1 for label in range(1, 183) if label not in COCO_WITHOUT_MASKS]
    table[numbers], table[255] = np.arange(len(numbers)), 255
    return table


@cache
def _zip(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _convert_coco_mask(task: tuple[Path, str, Path]) -> None:
    path, name, target = task
    with Image.open(_zip(path).open(name)) as file:
        numbers = np.array(file)
    mask = coco_train_ids()[numbers]
    if (mask == _NO_CLASS).any():
        raise DamagedArchiveError(f"{path} is not the official archive: {name} holds {numbers[mask == _NO_CLASS][0]}.")
    _save_mask(mask.astype(np.uint8), target)


def convert_context(path: Path, out: Path) -> None:
    """Annotations of PASCAL Context in trainval_merged.json -> SegmentationClassContext and the two lists.

    An annotation is a category and an area in COCO's run-length encoding. Of areas that overlap, the last one counts.
    """
    content = json.loads(path.read_bytes(), object_hook=_without_details)
    areas = defaultdict(list)
    for annotation in content["annos_segmentation"]:
        areas[annotation["image_id"]].append((annotation["category_id"], annotation["segmentation"]["counts"]))
    lists: dict[str, list[str]] = {"train": [], "val": []}
    tasks = []
    for image in content["images"]:
        if image["phase"] in lists:
            stem = Path(image["file_name"]).stem
            lists[image["phase"]].append(stem)
            target = out / CONTEXT / "SegmentationClassContext" / f"{stem}.png"
            if not target.exists():
                tasks.append(((image["height"], image["width"]), areas[image["image_id"]], target))
    del content
    _in_processes(_convert_areas, tasks, title="SegmentationClassContext", total=len(tasks))
    for split, stems in lists.items():
        _write_list(out / CONTEXT / "ImageSets" / "SegmentationContext" / f"{split}.txt", sorted(stems))


def _without_details(item: dict[str, Any]) -> dict[str, Any]:
    """Drops annotations of parts, edges and joints from the JSON while it is parsed; they would fill the memory."""
    return {key: value for key, value in item.items() if key not in ("parts", "edges", "boundary_mask", "keypoints")}


def _convert_areas(task: tuple[tuple[int, int], list[tuple[int, str]], Path]) -> None:
    size, areas, target = task
    mask = np.zeros(size, dtype=np.uint8)
    for category, counts in areas:
        mask[decode({"size": size, "counts": counts}) > 0] = CONTEXT_IDS.index(category)
    _save_mask(mask, target)
