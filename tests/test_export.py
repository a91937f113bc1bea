"""Annotations and arrays, read by independent readers: pycocotools, a YOLO parser with a rasteriser, numpy."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.path import Path as Outline
from PIL import Image
from pycocotools.coco import COCO
from scipy.ndimage import gaussian_filter

from ldvc.annotations import box_of, coco, coco_annotations, polygons, yolo_data, yolo_labels
from ldvc.arrays import arrays, npz
from ldvc.export import Identity, OverlayStyle, make_file
from ldvc.predictor import Predictor
from ldvc.result import Segmentation
from ldvc.visualize import fit_size
from tests.results import random_photo

NAMES = ["dog", "空: zebra", "sofa"]
SIZE = (90, 130)


@pytest.fixture(scope="module")
def results(tiny_predictor: Predictor) -> dict[str, Segmentation]:
    image = tiny_predictor.encode_image(Image.fromarray(random_photo(5, 7)).resize(SIZE[::-1], Image.Resampling.BICUBIC))
    predictors = [tiny_predictor.sibling(decoder) for decoder in ("ldvc", "zegclip", "clip")]
    return {each.decoder: each.segment("dog, 空: zebra, sofa | couch", image=image) for each in predictors}


@pytest.fixture(scope="module")
def result(results: dict[str, Segmentation]) -> Segmentation:
    found = results["ldvc"]
    found.background = float(np.median(found.scores.max(axis=0)))
    return found


def blobs(size: tuple[int, int], smoothness: float) -> np.ndarray:
    """A label map with parts, holes, and pixels of no class."""
    random = np.random.default_rng(0)
    fields = np.stack([gaussian_filter(random.normal(size=size), smoothness) for _ in range(4)])
    return fields.argmax(axis=0) - 1


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / (first | second).sum()


def filled(rings: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """bool (H, W): pixels whose centre is inside one of the rings."""
    centres = np.indices(size)[::-1].reshape(2, -1).T + 0.5
    return np.any([Outline(ring).contains_points(centres) for ring in rings], axis=0).reshape(size)


def read_yolo(text: str, size: tuple[int, int]) -> dict[int, list[np.ndarray]]:
    """The rings of each class in pixels."""
    rings: dict[int, list[np.ndarray]] = {}
    for line in text.splitlines():
        index, *values = line.split()
        points = np.array(values, dtype=float).reshape(-1, 2)
        assert len(points) >= 3 and points.min() >= 0 and points.max() <= 1
        rings.setdefault(int(index), []).append(points * size[::-1])
    return rings


def read_coco(content: bytes, folder: Path) -> COCO:
    (folder / "coco.json").write_bytes(content)
    return COCO(str(folder / "coco.json"))


@pytest.mark.parametrize("smoothness", [2.0, 8.0])
def test_yolo_polygons_cover_the_masks(smoothness: float) -> None:
    labels = blobs((90, 130), smoothness)
    rings = read_yolo(yolo_labels(labels, 4), labels.shape)
    assert set(rings) == {0, 1, 2}, "a class without pixels has no line"
    assert all(iou(filled(found, labels.shape), labels == index) > 0.97 for index, found in rings.items())
    names = ["yes", "a: b", 'say "no"', "- x #y"]
    assert list(yaml.safe_load(yolo_data(names))["names"].values()) == names


def test_a_polygon_leaves_holes_out() -> None:
    mask = np.zeros((40, 50), dtype=bool)
    mask[2:38, 2:48] = True
    mask[6:12, 6:20] = mask[20:30, 10:14] = mask[20:30, 30:44] = False
    mask[22:28, 34:40] = True  # a part inside a hole
    rings = polygons(mask)
    assert len(rings) == 2
    assert iou(filled(rings, mask.shape), mask) > 0.99
    whole = polygons(np.ones((6, 8), dtype=bool))[0]
    assert whole.min(axis=0).tolist() == [0, 0] and whole.max(axis=0).tolist() == [8, 6]
    assert polygons(np.zeros((6, 8), dtype=bool)) == []
    (single,) = polygons(np.pad(np.ones((1, 1), dtype=bool), 3))
    assert single.mean(axis=0).tolist() == [3.5, 3.5]


@pytest.mark.parametrize(("kind", "least"), [("rle", 1.0), ("polygons", 0.98)])
def test_coco_masks(kind: str, least: float, tmp_path: Path) -> None:
    maps = [blobs((90, 130), 4.0), blobs((64, 64), 2.0)]
    images = [{"file_name": "a.jpg", "width": labels.shape[1], "height": labels.shape[0]} for labels in maps]
    photos = [(image, list(coco_annotations(labels, 3, kind))) for image, labels in zip(images, maps, strict=True)]
    content = json.dumps(coco(photos, names=NAMES, seen=[True, False, True], info={}))
    reader = read_coco(content.encode(), tmp_path)
    assert [each["name"] for each in reader.loadCats(reader.getCatIds())] == NAMES
    assert sorted(reader.anns) == [1, 2, 3, 4, 5, 6]
    for number, labels in enumerate(maps, start=1):
        for each in reader.loadAnns(reader.getAnnIds(number)):
            mask = labels == each["category_id"] - 1
            assert iou(reader.annToMask(each) == 1, mask) >= least
            assert each["area"] == mask.sum() and tuple(each["bbox"]) == box_of(mask)


def test_annotations_of_one_photo(result: Segmentation, tmp_path: Path) -> None:
    options = {"style": OverlayStyle(), "identity": Identity("tiny", "0" * 64), "photo": "my photo.jpg"}
    name, content = make_file("coco", result, **options)
    reader = read_coco(content, tmp_path)
    assert name == "my_photo-coco.json" and reader.dataset["info"]["decoder"] == "ldvc"
    assert reader.loadImgs(1)[0] == {"id": 1, "file_name": "my photo.jpg", "width": SIZE[1], "height": SIZE[0]}
    drawn = np.full(SIZE, -1)
    for each in reader.anns.values():
        drawn[reader.annToMask(each) == 1] = each["category_id"] - 1
    assert np.array_equal(drawn, result.labels) and len(reader.anns) > 1
    name, content = make_file("yolo", result, **options)
    archive = zipfile.ZipFile(io.BytesIO(content))
    assert name == "my_photo-yolo.zip" and archive.namelist() == ["labels/my_photo.txt", "data.yaml"]
    assert yaml.safe_load(archive.read("data.yaml")) == {
        "train": "images",
        "val": "images",
        "names": dict(enumerate(NAMES)),
    }
    for index, rings in read_yolo(archive.read("labels/my_photo.txt").decode(), SIZE).items():
        assert iou(filled(rings, SIZE), result.labels == index) > 0.97


def test_arrays(results: dict[str, Segmentation], result: Segmentation) -> None:
    found = np.load(io.BytesIO(npz({**results, "ldvc_without_lcsa": None})), allow_pickle=False)
    assert found["names"].tolist() == NAMES and found["words"].tolist() == [*NAMES, "couch"]
    assert found["class_of_word"].tolist() == [0, 1, 2, 2] and found["seen"].tolist() == [True, False, False]
    assert found["size"].tolist() == list(SIZE) and found["grid"].tolist() == list(result.grid)
    labels = found["ldvc/labels"]
    assert np.array_equal(labels, result.labels) and found["ldvc/threshold"] == np.float32(result.background)
    assert found["ldvc/scores"].shape == (3, *fit_size(*SIZE, long_side=1024))
    assert np.allclose(found["ldvc/scores"], result.scores, atol=1e-3)
    for index, (x, y, width, height) in enumerate(found["ldvc/boxes"]):
        rows, columns = np.nonzero(labels == index)
        corners = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1] if len(rows) else [0] * 4
        assert [y, x, y + height, x + width] == corners
    for decoder in ("ldvc", "zegclip"):
        attention = found[f"{decoder}/attention"]
        assert attention.shape == (2, 2, 3, *result.grid)
        assert np.allclose(attention.sum(axis=2) + found[f"{decoder}/none_attention"], 1, atol=1e-5)
        assert np.array_equal(attention[1, 0], results[decoder].cross_attention(1, 0))
        assert np.array_equal(found[f"{decoder}/attention_mean"][0], results[decoder].cross_attention(0))
    assert not {"clip/attention", "zegclip/routing_regions", "clip/routing_regions"} & set(found)


def test_arrays_of_company(tiny_predictor: Predictor) -> None:
    found = arrays({"ldvc": tiny_predictor.segment("dog", image=tiny_predictor.encode_image(random_photo()))})
    classes, company, none = (found[f"ldvc/{key}"] for key in ("attention", "company_attention", "none_attention"))
    assert "grass" in found["company"] and company.max() > 0
    assert np.allclose(classes[:, :, 0] + company + none, 1, atol=1e-5)


def test_arrays_of_routing_agree_with_the_routing_of_a_patch(result: Segmentation) -> None:
    found = arrays({"ldvc": result})
    boxes = found["ldvc/routing_boxes"][0]
    row, column = 2, 3
    top, left, low, right = boxes.T
    (own,) = np.flatnonzero((top <= row) & (row < low) & (left <= column) & (column < right))
    for layer in (0, 1):
        expected = result.routing(row, column, layer)
        assert found["ldvc/routing_regions"][0, layer, own].tolist() == expected.regions.tolist()
        assert np.array_equal(found["ldvc/routing_affinity"][0, layer, own], expected.all_affinities)
        assert all(tuple(boxes[region]) == box for region, box in expected.boxes.items())
    assert found["ldvc/windows"].tolist() == [[0, 0, *(side / result.patch for side in result.input_size)]]
