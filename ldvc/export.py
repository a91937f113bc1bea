"""Files of a segmentation: overlay, masks and their description, annotations. All are pure functions of a result."""

import io
import json
import re
import unicodedata
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ldvc import __version__
from ldvc.annotations import coco, coco_annotations, yolo_data, yolo_labels
from ldvc.result import Segmentation
from ldvc.visualize import NONE_COLOUR, OPACITY, colours_for, fit_size, overlay, rgb

SCORES_SIDE = 384
KINDS = {
    "overlay": "overlay.png",
    "mask": "mask.png",
    "masks": "masks.zip",
    "cutouts": "cutouts.zip",
    "data": "segmentation.json",
    "coco": "coco.json",
    "yolo": "yolo.zip",
}


@dataclass(frozen=True)
class OverlayStyle:
    """How the overlay is painted."""

    opacity: float = OPACITY  # opacity of the colours, 0..1
    outline: bool = True  # draw lines between areas
    alone: str | None = None  # the one class that is painted; None = all
    names: bool = True  # write names on the areas


@dataclass(frozen=True)
class Identity:
    """The model of a result: name of the checkpoint, and the SHA-256 of its weights (`Predictor.weights_digest`)."""

    checkpoint: str
    weights: str


def safe_name(text: str, *, default: str = "class") -> str:
    """Reduce a text to at most 40 letters, digits, "-" and "_" of any script, valid in a file name on every system."""
    text = unicodedata.normalize("NFKC", text)
    return re.sub(r"[^\w-]+", "_", text).strip("_-")[:40].rstrip("_-") or default


def photo_stem(photo: str) -> str:
    """A photo's file name without suffix, as the start of other file names."""
    return safe_name(re.sub(r"\.[^.]*$", "", photo), default="photo")


def make_file(
    kind: str, result: Segmentation, *, style: OverlayStyle, identity: Identity, photo: str = "photo"
) -> tuple[str, bytes]:
    """Name and content of a file of a kind in `KINDS`. `photo` is the photo's file name."""
    stem, classes = photo_stem(photo), len(result.names)
    makers = {
        "overlay": lambda: overlay_png(result, style),
        "mask": lambda: mask_png(result),
        "masks": lambda: masks_zip(result, identity, photo),
        "cutouts": lambda: cutouts_zip(result.picture, result.labels, result.names, alone=style.alone),
        "data": lambda: as_json(description(result, identity, photo)),
        "coco": lambda: coco_json(result, identity, photo),
        "yolo": lambda: _zip({f"labels/{stem}.txt": yolo_labels(result.labels, classes), "data.yaml": yolo_data(result.names)}),
    }
    return f"{stem}-{KINDS[kind]}", makers[kind]()


def overlay_png(result: Segmentation, style: OverlayStyle) -> bytes:
    """The painted photo at its own size."""
    options = {
        "striped": [not seen for seen in result.seen],
        "opacity": style.opacity,
        "outline": style.outline,
        "only": result.names.index(style.alone) if style.alone in result.names else None,
        "names": result.names if style.names else None,
    }
    return _png(Image.fromarray(overlay(result.picture, result.labels, colours_for(result.names), **options)))


def mask_png(result: Segmentation) -> bytes:
    """Label map as a palette picture: 0 is none of these, i is the class with "index" i; colours as on the page."""
    mask = Image.fromarray((result.labels + 1).astype(np.uint8)).convert("P")
    mask.putpalette([value for colour in (NONE_COLOUR, *colours_for(result.names)) for value in rgb(colour)])
    return _png(mask)


def masks_zip(result: Segmentation, identity: Identity, photo: str) -> bytes:
    """One black-and-white mask (0 or 255) per class, numbered by index, and classes.json."""
    files, labels, digits = {}, result.labels, len(str(len(result.names)))
    none = [] if result.background is None else [(0, "none of these")]
    for index, name in [*none, *enumerate(result.names, start=1)]:
        mask = Image.fromarray(np.where(labels + 1 == index, 255, 0).astype(np.uint8))
        files[f"{index:0{digits}d}_{safe_name(name)}.png"] = _png(mask)
    return _zip({**files, "classes.json": as_json(description(result, identity, photo))})


def cutouts_zip(picture: np.ndarray, labels: np.ndarray, names: Sequence[str], *, alone: str | None = None) -> bytes:
    """A PNG of the photo's size for each class in it, or for `alone`: the photo inside the class, transparent elsewhere.

    `picture` is uint8 (H, W, 3); `labels`, int (H, W), are indices into `names`.
    """
    files, digits = {}, len(str(len(names)))
    for index in [names.index(alone)] if alone in names else np.unique(labels[labels >= 0]):
        mask = labels == index
        cutout = Image.fromarray(np.dstack([picture * mask[..., None], mask * np.uint8(255)]))
        files[f"{index + 1:0{digits}d}_{safe_name(names[index])}.png"] = _png(cutout)
    return _zip(files)


def coco_json(result: Segmentation, identity: Identity, photo: str) -> bytes:
    """A COCO file of one photo with the masks as RLE."""
    image = {"file_name": photo, "width": result.size[1], "height": result.size[0]}
    photos = [(image, list(coco_annotations(result.labels, len(result.names))))]
    return as_json(coco(photos, names=result.names, seen=result.seen, info=model_info(result, identity)))


def model_info(result: Segmentation, identity: Identity) -> dict[str, str]:
    """The model that made a result."""
    return {
        "checkpoint": identity.checkpoint,
        "decoder": result.decoder,
        "weights_sha256": identity.weights,
        "software": f"ldvc {__version__}",
    }


def description(result: Segmentation, identity: Identity, photo: str) -> dict[str, Any]:
    """The meaning of the masks, and the model that made them.

    "index" is the value in the mask. "area" is a share of the photo. "score" is the highest score in the photo, and the mean
    over the area of the class (null without area). Areas and pixels are counted at the size of the photo. Scores come from
    maps whose long side is at most `SCORES_SIDE`, because 171 maps of full size take seconds.
    """
    labels = result.labels
    small = fit_size(*result.size, long_side=SCORES_SIDE)
    small_labels = labels if small == result.size else result.labels_at(small)
    shares = result.area_shares(labels)
    classes = []
    for index, (name, colour) in enumerate(zip(result.names, colours_for(result.names), strict=True)):
        pixels = int((labels == index).sum())
        scores, inside = result.scores_at(small, index), small_labels == index
        if pixels and not inside.any():  # the area is too thin for the small map
            scores, inside = result.scores_at(result.size, index), labels == index
        mean = round(float(scores[inside].mean()), 4) if pixels else None
        classes.append(
            {
                "index": index + 1,
                "name": name,
                "synonyms": result.synonyms[index][1:],
                "seen": result.seen[index],
                "colour": colour,
                "threshold": result.threshold_of(name),
                "area": round(shares[index], 6),
                "pixels": pixels,
                "score": {"highest": round(float(scores.max()), 4), "mean": mean},
            }
        )
    none = labels < 0
    return {
        "photo": photo,
        "size": {"width": result.size[1], "height": result.size[0]},
        "classes": classes,
        "threshold": result.background,
        "none_of_these": {"index": 0, "area": round(float(none.mean()), 6), "pixels": int(none.sum())},
        "model": model_info(result, identity),
    }


def as_json(content: dict[str, Any]) -> bytes:
    """Indented JSON in UTF-8, names in their own script."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _zip(files: dict[str, bytes | str]) -> bytes:
    """A ZIP of files by name; PNGs are not compressed again."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content, zipfile.ZIP_STORED if name.endswith(".png") else None)
    return buffer.getvalue()


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
