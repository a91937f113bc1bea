"""Tiny archives in the structure of the published ones, and a server for them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from pycocotools.mask import encode
from scipy.io import savemat

from tests.tiny_data import SIZE, stripes
from train import prepare


def picture(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options)
    return buffer.getvalue()


def png(numbers: list[int]) -> bytes:
    return picture(stripes(numbers), format="PNG")


def jpg() -> bytes:
    """Noise."""
    return picture(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8), format="JPEG", quality=100)


def mat(numbers: list[int]) -> bytes:
    """A file of SBD: the struct GTcls with Segmentation, Boundaries and CategoriesPresent."""
    mask, buffer = stripes(numbers), io.BytesIO()
    savemat(buffer, {"GTcls": {"Segmentation": mask, "Boundaries": np.zeros(20), "CategoriesPresent": np.unique(mask)}})
    return buffer.getvalue()


def stripe(first: int, last: int) -> str:
    """An upright stripe in COCO's compressed run-length encoding."""
    area = np.zeros(SIZE, dtype=np.uint8, order="F")
    area[:, first:last] = 1
    return encode(area)["counts"].decode()


def tar_of(files: dict[str, bytes], *, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            archive.addfile(item, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{next(iter(files)).split('/')[0]}/"), "")
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def voc_archives() -> dict[str, bytes]:
    """Two photos of VOC's train.txt, two of its val.txt, and three more; SBD has masks of all but one."""
    kit, sbd = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"
    official = {"2007_000032": [0, 1, 255, 15], "2007_000039": [20, 0, 255, 12], "2007_000033": [0, 1, 255, 16]}
    official |= {"2011_000003": [19, 15]}
    added = {"2008_000002": [15, 18, 0], "2008_000007": [0, 4, 9], "2009_000001": [7, 0]}
    voc = {f"{kit}/JPEGImages/{stem}.jpg": jpg() for stem in (*official, *added)}
    voc |= {f"{kit}/SegmentationClass/{stem}.png": png(numbers) for stem, numbers in official.items()}
    voc |= {
        f"{kit}/SegmentationObject/2007_000032.png": png([0, 1]),
        f"{kit}/ImageSets/Segmentation/train.txt": b"2007_000032\n2007_000039\n",
        f"{kit}/ImageSets/Segmentation/val.txt": b"2007_000033\n2011_000003\n",
    }
    benchmark = {f"{sbd}/img/2008_000002.jpg": jpg()}
    benchmark |= {f"{sbd}/cls/{stem}.mat": mat(numbers) for stem, numbers in added.items()}
    benchmark |= {f"{sbd}/cls/{stem}.mat": mat([3]) for stem in ("2007_000032", "2007_000033", "2011_000003")}
    benchmark |= {  # SBD's own split: train.txt holds a photo of VOC's val.txt, and the other way round
        f"{sbd}/train.txt": b"2011_000003\n2008_000007\n2009_000001\n",
        f"{sbd}/val.txt": b"2008_000002\n2007_000032\n2007_000033\n",
    }
    return {"VOCtrainval_11-May-2012.tar": tar_of(voc), "benchmark.tgz": tar_of(benchmark, mode="w:gz")}


def coco_archives() -> dict[str, bytes]:
    """Masks hold the ids of COCO-Stuff's labels.txt minus one."""
    train = {"000000000009": [1, 169], "000000000025": [157, 21, 124], "000000000030": [182, 1]}
    val = {"000000000139": [1, 87, 92]}
    masks = {f"train2017/{stem}.png": png([number - 1 for number in ids] + [255]) for stem, ids in train.items()}
    masks |= {f"val2017/{stem}.png": png([number - 1 for number in ids]) for stem, ids in val.items()}
    return {
        "train2017.zip": zip_of({f"train2017/{stem}.jpg": jpg() for stem in train}),
        "val2017.zip": zip_of({f"val2017/{stem}.jpg": jpg() for stem in val}),
        "stuffthingmaps_trainval2017.zip": zip_of(masks),
    }


def context_archives() -> dict[str, bytes]:
    """A person before the sky, a keyboard at the edge, and a photo without annotations."""
    images, annotations = [], []
    for stem, phase, areas in (
        ("2008_000008", "train", [(360, stripe(0, 72)), (284, stripe(20, 40))]),
        ("2008_000002", "train", [(220, stripe(60, 72))]),
        ("2008_000009", "val", [(2, stripe(0, 30)), (458, stripe(30, 31))]),
        ("2008_000016", "val", []),
    ):
        number = int(stem.replace("_", ""))
        images.append({"image_id": number, "file_name": f"{stem}.jpg", "height": 48, "width": 72, "phase": phase})
        for category, counts in areas:
            area = {"size": list(SIZE), "counts": counts}
            parts = [{"part_id": 255, "segmentation": {"size": list(SIZE), "counts": "0"}}]
            annotations.append({"image_id": number, "category_id": category, "segmentation": area, "parts": parts})
    content = {"images": images, "annos_segmentation": annotations}
    photos = {f"VOCdevkit/VOC2010/JPEGImages/{image['file_name']}": jpg() for image in images}
    return {"VOCtrainval_03-May-2010.tar": tar_of(photos), "trainval_merged.json": json.dumps(content).encode()}


class Server(ThreadingHTTPServer):
    """Serves files over HTTP with Range.

    Attributes:
        files: name -> content.
        faults: name -> what is wrong with the next answers: "cut" breaks off in the middle, "whole" ignores Range, a number is
            the status, "" is no fault.
        requests: (name, Range header) of every request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str | int]] = {}
        self.requests: list[tuple[str, str | None]] = []


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, asked, server = self.path[1:], self.headers.get("Range"), self.server
        server.requests.append((name, asked))
        fault, *server.faults[name] = server.faults.get(name) or [""]
        if isinstance(fault, int) or name not in server.files:
            self.send_error(fault or 404)
            return
        content = server.files[name]
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and fault != "whole" else 0
        body, part = content[start:], f"{start}-{len(content) - 1}"
        self.send_response(416 if start and not body else 206 if start else 200)
        self.send_header("Content-Range", f"bytes {part if body else '*'}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The archives of all sets on a server, with their addresses, checksums and numbers of photos in the plan."""
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.files = voc_archives() | coco_archives() | context_archives()

    def tiny(step: prepare.Step) -> prepare.Step:
        archive = step.archive
        checksum = f"md5:{hashlib.md5(server.files[archive.name]).hexdigest()}" if archive.checksum else None
        url = f"{server.url}/{archive.name}"
        mirror = f"{server.url}/mirror/{archive.name}" if archive.mirror else None
        return replace(step, archive=replace(archive, url=url, checksum=checksum, mirror=mirror))

    for name, photos in {"voc2012": (5, 2), "coco_stuff164k": (3, 1), "pascal_context59": (2, 2)}.items():
        monkeypatch.setitem(prepare.STEPS, name, tuple(map(tiny, prepare.STEPS[name])))
        monkeypatch.setitem(prepare.PHOTOS, name, photos)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
