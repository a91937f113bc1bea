"""Data sets of a few generated photos: plain folders, and the benchmarks in their official layouts and naming."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from train.data import SegmentationDataset

SIZE = (48, 72)  # of the photos of benchmarks
COLOURS = {
    "grass": (40, 160, 40),
    "sky": (90, 150, 240),
    "dog": (150, 90, 40),
    "cat": (230, 200, 60),
    "aeroplane": (200, 200, 210),
}


def make_set(
    folder: Path, classes: list[str], *, photos: int = 6, background: int | None = None, size: tuple[int, int] = (60, 84)
) -> Path:
    """Photos of two flat areas and a strip of void; the first class (or background) lies on the left."""
    height, width = size
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    generator = np.random.default_rng(len(classes))
    stems = [f"photo{number}" for number in range(photos)]
    for number, stem in enumerate(stems):
        pair = (number % len(classes), (number + 1) % len(classes))
        mask = np.full((height, width), 255, dtype=np.uint8)
        mask[:, : width // 2], mask[:, width // 2 : width - 4] = pair
        pixels = np.zeros((height, width, 3))
        for index in pair:
            pixels[mask == index] = COLOURS.get(classes[index], (120, 20, 120))
        pixels += generator.normal(0, 8, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{stem}.jpg")
        Image.fromarray(mask).save(folder / "masks" / f"{stem}.png")
    description = {"classes": classes, "ignore_index": 255, "background_index": background}
    (folder / "dataset.json").write_text(json.dumps(description))
    (folder / "train.txt").write_text("\n".join(stems) + "\n")
    (folder / "val.txt").write_text("\n".join(stems[:3]) + "\n")
    return folder


def make_sets(root: Path) -> Path:
    """Two data sets side by side: one without and one with a background index."""
    make_set(root / "meadow", ["grass", "sky", "aeroplane", "dog"])
    make_set(root / "pets", ["background", "dog", "cat"], background=0)
    return root


def stripes(numbers: list[int]) -> np.ndarray:
    """Upright stripes, one for each number."""
    row = np.repeat(np.array(numbers, dtype=np.uint8), -(-SIZE[1] // len(numbers)))[: SIZE[1]]
    return np.broadcast_to(row, SIZE).copy()


def write_pair(photo: Path, mask: Path, numbers: list[int]) -> None:
    """A photo of stripes, one for each number of the mask file, each in a colour of its own.

    The mask is a palette picture, as VOC's are, which readers must take for the numbers and not for the colours.
    """
    values = stripes(numbers)
    colours = np.random.default_rng(5).integers(0, 255, (256, 3), dtype=np.uint8)
    for path in (photo, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours[values]).save(photo, quality=95)
    picture = Image.fromarray(values)
    picture.putpalette(colours.tobytes())
    picture.save(mask)


def make_voc(root: Path) -> Path:
    """VOCdevkit/VOC2012: two photos with official masks, two of SBD's, two for validation. Returns .../VOC2012."""
    kit = root / "VOCdevkit" / "VOC2012"
    # number in the file: 0 background, 1 aeroplane, 15 person, 16 potted plant, 18 sofa, 20 tv monitor, 255 border
    for stem, numbers, part in (
        ("2007_000032", [0, 1, 255, 15], "SegmentationClass"),
        ("2007_000039", [20, 0, 255, 12], "SegmentationClass"),
        ("2008_000002", [15, 18, 0], "SegmentationClassAug"),
        ("2008_000007", [0, 4, 9], "SegmentationClassAug"),
        ("2007_000033", [0, 1, 255, 16], "SegmentationClass"),
        ("2007_000042", [19, 15], "SegmentationClass"),
    ):
        write_pair(kit / "JPEGImages" / f"{stem}.jpg", kit / part / f"{stem}.png", numbers)
    lists = kit / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n2007_000039\n")
    (lists / "aug.txt").write_text("2008_000002\n2008_000007\n")
    (lists / "trainaug.txt").write_text("2007_000032\n2008_000002\n2007_000039\n2008_000007\n")
    (lists / "val.txt").write_text("2007_000033\n2007_000042\n")
    return kit


def make_coco_stuff(root: Path) -> Path:
    """coco_stuff164k with mmsegmentation's `_labelTrainIds` masks. Returns the folder."""
    folder = root / "coco_stuff164k"
    # 0 person, 19 cow, 76 scissors, 112 grass, 133 river, 145 sky-other, 157 tree, 170 wood, 255 unlabelled
    for split, stem, numbers in (
        ("train2017", "000000000009", [0, 157, 255]),
        ("train2017", "000000000025", [145, 19, 112]),
        ("train2017", "000000000030", [170, 0]),
        ("val2017", "000000000139", [0, 19, 157, 170]),
        ("val2017", "000000000285", [255, 145, 112]),
    ):
        mask = folder / "annotations" / split / f"{stem}_labelTrainIds.png"
        write_pair(folder / "images" / split / f"{stem}.jpg", mask, numbers)
    return folder


def make_context(root: Path) -> Path:
    """VOCdevkit/VOC2010 with mmsegmentation's SegmentationClassContext. Returns .../VOC2010."""
    kit = root / "VOCdevkit" / "VOC2010"
    lists = kit / "ImageSets" / "SegmentationContext"
    lists.mkdir(parents=True)
    # 0 background, 1 aeroplane, 7 bird, 29 grass, 32 keyboard, 37 person, 47 sky, 59 wood
    for split, photos in (
        ("train", {"2008_000002": [59, 37, 0], "2008_000003": [47, 1, 29], "2008_000008": [29, 37]}),
        ("val", {"2008_000009": [29, 7, 0], "2008_000016": [37, 32, 59]}),
    ):
        (lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in photos))
        for stem, numbers in photos.items():
            mask = kit / "SegmentationClassContext" / f"{stem}.png"
            write_pair(kit / "JPEGImages" / f"{stem}.jpg", mask, numbers)
    return kit


def make_benchmarks(root: Path) -> Path:
    """All three side by side, as mmsegmentation's `data` folder holds them."""
    make_voc(root), make_coco_stuff(root), make_context(root)
    return root


def names_in(dataset: SegmentationDataset, index: int) -> list[str]:
    """The classes of a mask's stripes from left to right, "-" where nothing counts."""
    row = dataset.mask(index)[0]
    values = row[np.insert(np.diff(row.astype(int)) != 0, 0, True)]
    return ["-" if value == dataset.ignore_index else dataset.classes[value] for value in values]
