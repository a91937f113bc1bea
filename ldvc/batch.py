"""Segments many photos and writes files for each, and annotations for all.

    OUT/overlay/NAME.png    the painted photo
    OUT/mask/NAME.png       label map with a palette: 0 is none of these, i the class with "index" i
    OUT/data/NAME.json      names, areas, scores, model, see `ldvc.export.description`; the settings of the run
    OUT/areas.csv           a line for each photo and class
    OUT/skipped.txt         photos that could not be read, with the reason; only if there are any
    OUT/coco.json           on request
    OUT/cutouts/NAME.zip    on request: a PNG for each class, transparent outside of it
    OUT/yolo/data.yaml, OUT/yolo/labels/NAME.txt    on request

NAME is the path of the photo relative to the given folder, without its suffix. Each file is written under a temporary name and
renamed, NAME.json last. A photo whose NAME.json has the same settings is not segmented again, so that the same command
continues an interrupted run.
"""

import csv
import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ldvc import __version__
from ldvc.annotations import coco, coco_annotations, yolo_data, yolo_labels
from ldvc.class_names import ClassName
from ldvc.errors import InvalidImageError
from ldvc.export import Identity, OverlayStyle, as_json, cutouts_zip, description, mask_png, overlay_png
from ldvc.image_io import FORMATS, load_picture
from ldvc.predictor import Predictor

AREA_COLUMNS = ("photo", "class", "seen", "pixels", "area", "score_highest", "score_mean")
NONE_OF_THESE = "none of these"


@dataclass(frozen=True)
class Photo:
    """A photo to segment: its path, its `file_name` in the annotations, and the `name` of its output files without suffix."""

    path: Path
    file_name: str
    name: str


@dataclass(frozen=True)
class Done:
    """The outcome for one photo."""

    photo: Photo
    problem: str | None = None  # why it could not be read
    data: dict[str, Any] | None = None  # content of its JSON file
    annotations: tuple[dict[str, Any], ...] = ()  # for the COCO file; empty if there will be none
    resumed: bool = False  # an earlier run had segmented it


def find_photos(sources: Sequence[Path], output: Path) -> list[Photo]:
    """The photos in files and folders, in this order; photos of a folder and its subfolders are sorted by path.

    In a folder, a file is a photo if it has the suffix of one. Hidden files and files under `output` are left out.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    photos, used_names = [], set()
    for source in sources:
        paths = [source]
        if source.is_dir():
            inside = (path for path in sorted(source.rglob("*")) if path.suffix.lower() in suffixes and path.is_file())
            visible = (path for path in inside if not path.name.startswith("."))
            paths = [path for path in visible if output.resolve() not in path.resolve().parents]
        for path in paths:
            relative = path.relative_to(source) if source.is_dir() else Path(path.name)
            stem = relative.with_suffix("").as_posix()
            # photos may have the same name, or names that differ only in case, which some file systems ignore
            names = (stem, *(f"{stem}_{number}" for number in range(2, len(used_names) + 2)))
            name = next(name for name in names if name.casefold() not in used_names)
            used_names.add(name.casefold())
            photos.append(Photo(path, relative.as_posix(), name))
    return photos


@dataclass(frozen=True)
class Batch:
    """Settings of a run."""

    output: Path  # folder of all files
    names: tuple[ClassName, ...]
    model: str  # model and decoder: see `Predictor.from_pretrained`
    decoder: str
    background: float | str | None  # threshold, see `Predictor.segment`
    coco: str | None  # one of `ldvc.annotations.COCO_KINDS`; None = no COCO file
    yolo: bool  # write labels of YOLO segmentation
    cutouts: bool  # write the cut-outs of each class
    overlay_names: bool  # write names on the overlays

    @cached_property
    def predictor(self) -> Predictor:
        """The predictor, which each process loads once."""
        return Predictor.from_pretrained(self.model, decoder=self.decoder)

    def process(self, photo: Photo) -> Done:
        """Segment a photo unless an earlier run did, and write its files."""
        settings = {
            "names": [each.text for each in self.names],
            "decoder": self.decoder,
            "threshold": self.background,
            "overlay_names": self.overlay_names,
            "weights_sha256": self.predictor.weights_digest,
            "software": __version__,
        }
        try:
            content = photo.path.read_bytes() if photo.path.is_file() else b""
            settings = {"photo_sha256": hashlib.sha256(content).hexdigest(), **settings}
            earlier = self._read_earlier(photo, settings)
            picture = load_picture(photo.path) if self.cutouts or not earlier else None
        except (InvalidImageError, OSError) as error:
            return Done(photo, str(error))
        data, labels = earlier or self._segment(photo, picture, settings)
        if self.yolo:
            write(self._path("yolo/labels", photo, "txt"), yolo_labels(labels, len(self.names)).encode())
        if self.cutouts:
            titles = [each.title for each in self.names]
            write(self._path("cutouts", photo, "zip"), cutouts_zip(picture, labels, titles))
        annotations = coco_annotations(labels, len(self.names), self.coco) if self.coco else ()
        return Done(photo, data=data, annotations=tuple(annotations), resumed=earlier is not None)

    def _segment(self, photo: Photo, picture: np.ndarray, settings: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        """The content of the JSON file and the label map."""
        predictor = self.predictor
        image = predictor.encode_image(picture)
        result = predictor.segment(self.names, image=image, background=self.background, attention=False)
        identity = Identity(Path(self.model).name, predictor.weights_digest)
        data = {**description(result, identity, photo.file_name), "settings": settings}
        write(self._path("overlay", photo, "png"), overlay_png(result, OverlayStyle(names=self.overlay_names)))
        write(self._path("mask", photo, "png"), mask_png(result))
        write(self._path("data", photo, "json"), as_json(data))
        return data, result.labels

    def _read_earlier(self, photo: Photo, settings: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray] | None:
        """The JSON content and label map that an earlier run with the same settings wrote for the same photo, or None."""
        try:
            data = json.loads(self._path("data", photo, "json").read_text(encoding="utf-8"))
            is_same = data["settings"] == settings and data["photo"] == photo.file_name
            if not (is_same and self._path("overlay", photo, "png").is_file()):
                return None
            with Image.open(self._path("mask", photo, "png")) as mask:
                return data, np.asarray(mask).astype(np.int64) - 1
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _path(self, kind: str, photo: Photo, suffix: str) -> Path:
        return self.output / kind / f"{photo.name}.{suffix}"


def write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it, so that no partial file is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def run(batch: Batch, photos: Sequence[Photo], *, jobs: int) -> list[Done]:
    """Process all photos, with a progress bar, and write the files that cover all of them.

    With several `jobs`, each process computes with one thread; they share a GPU if there is one.

    Raises:
        CheckpointError, WeightsNotFoundError: the model cannot be loaded.
        BrokenProcessPool: the system ended a process, mostly because memory ran out.
    """
    progress = partial(tqdm, total=len(photos), unit="photo")
    if jobs == 1 or len(photos) < 2:
        outcomes = list(progress(map(batch.process, photos)))
    else:
        context = multiprocessing.get_context("spawn")  # a fork of a process with a GPU or threads fails
        with ProcessPoolExecutor(min(jobs, len(photos)), context, initializer=_start_process, initargs=(batch,)) as pool:
            try:
                outcomes = list(progress(pool.map(_process, photos)))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finished = [each for each in outcomes if each.problem is None]
    write(batch.output / "areas.csv", areas_csv(finished))
    if batch.coco and finished:
        write(batch.output / "coco.json", coco_of(finished))
    if batch.yolo:
        write(batch.output / "yolo" / "data.yaml", yolo_data([each.title for each in batch.names]).encode())
    skipped = "".join(f"{each.photo.path}\t{each.problem}\n" for each in outcomes if each.problem is not None)
    (batch.output / "skipped.txt").unlink(missing_ok=True)
    if skipped:
        write(batch.output / "skipped.txt", skipped.encode())
    return outcomes


def areas_csv(finished: Sequence[Done]) -> bytes:
    """CSV with a line for each class of a photo, then one for "none of these"; areas are shares of the photo."""
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(AREA_COLUMNS)
    for each in finished:
        rest = {"name": NONE_OF_THESE, "seen": "", "score": {"highest": "", "mean": ""}, **each.data["none_of_these"]}
        for row in (*each.data["classes"], rest):
            line = (row["name"], row["seen"], row["pixels"], row["area"], row["score"]["highest"], row["score"]["mean"])
            table.writerow((each.photo.file_name, *line))
    return text.getvalue().encode()


def coco_of(finished: Sequence[Done]) -> bytes:
    """The COCO file of all photos."""
    photos = [({"file_name": each.photo.file_name, **each.data["size"]}, each.annotations) for each in finished]
    classes, info = finished[0].data["classes"], finished[0].data["model"]
    names, seen = [row["name"] for row in classes], [row["seen"] for row in classes]
    return json.dumps(coco(photos, names=names, seen=seen, info=info), ensure_ascii=False).encode()


_batches: list[Batch] = []  # the batch of a worker process of `run`


def _start_process(batch: Batch) -> None:
    torch.set_num_threads(1)
    _batches.append(batch)


def _process(photo: Photo) -> Done:
    return _batches[0].process(photo)
