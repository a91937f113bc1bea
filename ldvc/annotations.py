"""Label maps as annotations of data sets: COCO (RLE or polygons) and YOLO segmentation (polygons).

A polygon is one ring of points. If a part of a class has holes, cuts of zero width join its outer ring to the holes. A program
that fills the ring then leaves the holes empty. Rings are simplified: no point of the outline moves by more than about
`TOLERANCE` pixels.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from contourpy import FillType, contour_generator
from matplotlib.path import Path as Outline
from PIL import Image
from pycocotools import mask as rle

TOLERANCE = 0.5  # pixels
COCO_KINDS = ("rle", "polygons")


def polygons(mask: np.ndarray) -> list[np.ndarray]:
    """The outlines of a mask, bool (H, W): one closed ring for each connected part.

    A ring is (n, 2): x, y in pixels; (0, 0) is the upper left corner of the picture. The first point is not repeated.
    """
    left, top, width, height = box_of(mask)
    if not width:
        return []
    crop = np.pad(mask[top : top + height, left : left + width].astype(np.float32), 1)
    parts, offsets = contour_generator(z=crop, fill_type=FillType.OuterOffset).filled(0.5, 2.0)
    shift = np.array([left - 0.5, top - 0.5])  # removes the padding; pixel centres become corners
    rings = []
    for points, ends in zip(parts, offsets, strict=True):
        outer, *holes = (simplified(points[start:end]) for start, end in zip(ends[:-1], ends[1:], strict=True))
        rings.append(joined(outer, holes) + shift)
    return rings


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(x, y, width, height) of the pixels of a mask (H, W); zeros if there are none."""
    left, top, right, bottom = Image.fromarray(mask).getbbox() or (0, 0, 0, 0)
    return left, top, right - left, bottom - top


def simplified(ring: np.ndarray) -> np.ndarray:
    """Simplify a closed ring (n, 2) whose last point repeats the first one; the result has no repeated point."""
    outline = Outline(ring)
    outline.should_simplify, outline.simplify_threshold = True, TOLERANCE
    points = outline.cleaned(simplify=True).vertices[:-1]  # the last one marks the end
    points = points[np.any(points != np.roll(points, 1, axis=0), axis=1)]
    return points if len(points) >= 3 else ring[:-1]


def joined(outer: np.ndarray, holes: Sequence[np.ndarray]) -> np.ndarray:
    """Join an outer ring and holes to one ring (n, 2), by cuts between their closest points."""
    ring = outer
    for hole in sorted(holes, key=lambda each: each[:, 0].min()):
        distances = ((ring[:, None] - hole[None]) ** 2).sum(axis=2)
        on_ring, on_hole = np.unravel_index(distances.argmin(), distances.shape)
        hole_ring = np.concatenate([hole[on_hole:], hole[: on_hole + 1]])
        ring = np.concatenate([ring[: on_ring + 1], hole_ring, ring[on_ring:]])
    return ring


def coco_annotations(labels: np.ndarray, classes: int, kind: str = "rle") -> Iterator[dict[str, Any]]:
    """One annotation for each class with pixels in a photo, without "id" and "image_id"; class i is category i + 1.

    `labels` (H, W) are indices of classes or -1. RLE is exact; polygons are within `TOLERANCE`. Area and box are exact in both.
    """
    for index in np.unique(labels[(labels >= 0) & (labels < classes)]).tolist():
        encoded = rle.encode(np.asfortranarray(labels == index, dtype=np.uint8))
        segmentation: Any = {"size": list(labels.shape), "counts": encoded["counts"].decode("ascii")}
        if kind == "polygons":
            segmentation = [ring.round(2).ravel().tolist() for ring in polygons(labels == index)]
        yield {
            "category_id": index + 1,
            "segmentation": segmentation,
            "area": int(rle.area(encoded)),
            "bbox": rle.toBbox(encoded).tolist(),  # x, y, width, height
            "iscrowd": 0,
        }


def coco(
    photos: Sequence[tuple[dict[str, Any], Sequence[dict[str, Any]]]],
    *,
    names: Sequence[str],
    seen: Sequence[bool],
    info: dict[str, Any],
) -> dict[str, Any]:
    """A COCO file of some photos, each {"file_name", "width", "height"} and its `coco_annotations`.

    `names` are those of the classes. `seen` (was the model trained on masks of the class?) is an extra field of each category.
    """
    images, annotations = [], []
    for number, (image, photo_annotations) in enumerate(photos, start=1):
        images.append({"id": number, **image})
        for annotation in photo_annotations:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **annotation})
    categories = [
        {"id": index, "name": name, "supercategory": "", "seen": trained}
        for index, (name, trained) in enumerate(zip(names, seen, strict=True), start=1)
    ]
    return {"info": info, "licenses": [], "images": images, "annotations": annotations, "categories": categories}


def yolo_labels(labels: np.ndarray, classes: int) -> str:
    """A label file of YOLO segmentation: a line "class x y x y ..." for each part, in shares of the width and the height."""
    size = np.array([labels.shape[1], labels.shape[0]])
    lines = []
    for index in range(classes):
        for ring in polygons(labels == index):
            points = " ".join(f"{value:.6f}" for value in (ring / size).ravel())
            lines.append(f"{index} {points}\n")
    return "".join(lines)


def yolo_data(names: Sequence[str]) -> str:
    """The file data.yaml of a YOLO data set, with the photos in the folder `images` beside `labels`."""
    listed = "".join(f"  {index}: {json.dumps(name, ensure_ascii=False)}\n" for index, name in enumerate(names))
    note = "# Put the photos into the folder images beside the folder labels; a photo and its labels have the same name.\n"
    return f"{note}train: images\nval: images\nnames:\n{listed}"
