"""The readers: official layouts, plain folders, and the errors for wrong ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldvc.errors import DataError
from ldvc.image_io import load_picture
from tests.tiny_data import make_benchmarks, make_coco_stuff, make_context, make_set, make_sets, make_voc, names_in
from train.data import VOID, Vocabulary, open_set, open_sets


def test_voc_takes_the_official_mask_and_any_list_of_additional_photos(tmp_path: Path) -> None:
    kit = make_voc(tmp_path)
    lists = kit / "ImageSets" / "Segmentation"
    shutil.copy(kit / "SegmentationClass" / "2007_000039.png", kit / "SegmentationClassAug" / "2007_000032.png")
    official = open_set(tmp_path, "voc2012", "train")
    assert names_in(official, 0) == ["-", "aeroplane", "-", "person"] and official.background_index is None
    image, mask = official.pair(0)
    assert image.mode == "RGB" and mask.shape == (48, 72) and mask.dtype == np.uint8
    (lists / "trainaug.txt").unlink()
    assert open_set(tmp_path, "voc2012", "train").stems == ["2007_000032", "2007_000039", "2008_000002", "2008_000007"]
    (lists / "train_aug.txt").write_text(
        "/JPEGImages/2008_000007.jpg /SegmentationClassAug/2008_000007.png\n"
        "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n"
    )
    assert open_set(tmp_path, "voc2012", "train").stems == ["2008_000007", "2007_000032"]
    for file in ("train_aug.txt", "aug.txt"):
        (lists / file).unlink()
    shutil.rmtree(kit / "SegmentationClassAug")
    alone = open_set(tmp_path, "voc2012", "train")
    assert alone.stems == ["2007_000032", "2007_000039"] and names_in(alone, 1) == ["tv monitor", "-", "dog"]


MAKERS = {
    "voc": make_voc,
    "coco_stuff": make_coco_stuff,
    "pascal_context": make_context,
    "folder": lambda folder: make_set(folder / "x", ["sky", "grass"]),
}


@pytest.mark.parametrize("layout", MAKERS)
def test_a_set_under_a_name_of_its_own_is_recognised(tmp_path: Path, layout: str) -> None:
    MAKERS[layout](tmp_path).rename(tmp_path / "mine")
    dataset, (half,) = open_set(tmp_path, "mine", "train"), open_sets(tmp_path, ["mine"], "train", every={"mine": 2})
    assert dataset.layout == layout and half.name == "mine" and half.stems == dataset.stems[::2]


def test_the_data_folder_may_be_the_kit_itself(tmp_path: Path) -> None:
    kit = make_voc(tmp_path)
    assert open_set(kit, "voc2012", "val").folder.samefile(kit)
    assert open_set(kit.parent, "voc2012", "val").folder.samefile(kit)
    assert open_set(make_coco_stuff(tmp_path), "coco_stuff164k", "val").stems[0] == "000000000139"


@pytest.mark.parametrize(
    ("name", "missing", "tree"),
    [
        ("voc2012", "VOCdevkit/VOC2012", "SegmentationClassAug/2008_000002.png"),
        ("voc2012", "VOCdevkit/VOC2012/JPEGImages", "SegmentationClassAug/2008_000002.png"),
        ("voc2012", "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", "ImageSets/Segmentation/val.txt"),
        ("coco_stuff164k", "coco_stuff164k/images/val2017", "annotations/train2017/000000000009_labelTrainIds.png"),
        ("coco_stuff164k", "coco_stuff164k/annotations/val2017", "converters/coco_stuff164k.py"),
        ("pascal_context59", "VOCdevkit/VOC2010/SegmentationClassContext", "ImageSets/SegmentationContext/train.txt"),
        ("pascal_context59", "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt", "converters/pascal_context.py"),
    ],
)
def test_the_first_missing_part_is_named_with_the_expected_tree(tmp_path: Path, name: str, missing: str, tree: str) -> None:
    make_benchmarks(tmp_path)
    path = tmp_path / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError) as caught:
        open_set(tmp_path, name, "val")
    sentence, _, rest = str(caught.value).partition(" is missing. ")
    assert sentence == str(path) and tree in rest and " is expected as\n" in rest


def test_files_that_lie_elsewhere_are_a_wrong_layout(tmp_path: Path) -> None:
    folder, val = make_coco_stuff(tmp_path), make_voc(tmp_path) / "ImageSets" / "Segmentation" / "val.txt"
    for path in (folder / "annotations" / "val2017").iterdir():  # masks that were never converted
        path.rename(path.with_name(path.name.replace("_labelTrainIds", "")))
    with pytest.raises(DataError, match="000000000139_labelTrainIds.png is missing"):
        open_set(tmp_path, "coco_stuff164k", "val")
    for path in (folder / "images" / "val2017").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="holds no photos"):
        open_set(tmp_path, "coco_stuff164k", "val")
    for listed, words in (("\n", "lists no photos"), ("2011_1\n", r"2011_1.jpg is missing[^$]*/2007_000032.jpg")):
        val.write_text(listed)
        with pytest.raises(DataError, match=words):
            open_set(tmp_path, "voc2012", "val")


def test_the_error_for_an_unknown_set_lists_the_data_folder(tmp_path: Path) -> None:
    make_sets(tmp_path)
    with pytest.raises(DataError, match="holds meadow, pets") as caught:
        open_set(tmp_path, "medow", "train")
    assert "voc2012" in str(caught.value) and "dataset.json" in str(caught.value)
    with pytest.raises(DataError, match="--data"):
        open_sets(tmp_path / "nowhere", ["pets"], "train")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2]", "'classes' must be a list of names"),
        ('{"classes": []}', "'classes' must be a list of names"),
        ('{"classes": ["sky", 3]}', "'classes' must be a list of names"),
        ('{"classes": ["sky", "wall;brick"]}', "wall;brick"),
        ('{"classes": ["door, double door"]}', "one name without commas"),
        ('{"classes": ["cup | mug"]}', "one name without commas"),
        ('{"classes": ["sky"], "background_index": 4}', "'background_index' must be a number from 0 to 0, not 4"),
        ('{"classes": ["sky"], "ignore_index": 999}', "'ignore_index' must be a number from 0 to 255, not 999"),
        (json.dumps({"classes": [f"c{number}" for number in range(300)]}), "300 classes do not fit"),
        ('{"classes": ["sky"], "exhaustive": "no"}', "'exhaustive' must be true or false, not 'no'"),
        ("\xff\xfe", "cannot be"),
    ],
)
def test_a_bad_description_is_explained(tmp_path: Path, content: str, words: str) -> None:
    folder = make_set(tmp_path / "mine", ["sky", "grass"])
    (folder / "dataset.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=words) as caught:
        open_set(tmp_path, "mine", "train")
    assert "dataset.json" in str(caught.value) and "masks/NAME.png" in str(caught.value)


def test_a_folder_is_read_as_the_page_reads_uploads(tmp_path: Path) -> None:
    folder, exif = make_set(tmp_path / "mine", ["sky", "grass"], size=(40, 60)), Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    turned = np.zeros((60, 40, 3), dtype=np.uint8)
    turned[:10] = 255  # the sensor's top row; upright it is the right column
    Image.fromarray(turned).save(folder / "images" / "turned.jpg", exif=exif)
    deep = np.linspace(0, 4000, 2400).reshape(40, 60).astype(np.uint16)
    Image.fromarray(deep).save(folder / "images" / "deep.png")
    Image.new("RGBA", (60, 40), (0, 0, 200, 128)).save(folder / "images" / "glass.png")
    stems = ["turned", "deep", "glass"]
    for name in stems:
        Image.fromarray(np.zeros((40, 60), dtype=np.uint8)).save(folder / "masks" / f"{name}.png")
    (folder / "train.txt").write_text("\n".join(stems))
    dataset = open_set(tmp_path, "mine", "train")
    shown = [np.asarray(dataset.pair(index)[0]) for index in range(3)]
    for stem, pixels in zip(stems, shown, strict=True):
        np.testing.assert_array_equal(pixels, load_picture(dataset.photo_path(stem)))
    assert shown[0][:, -8:].mean() > 240 and shown[0][:, :40].mean() < 15


def test_a_class_that_is_void_is_no_name(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "mine", ["unlabelled", "sky", "grass"])
    (folder / "dataset.json").write_text('{"classes": ["unlabelled", "sky", "grass"], "ignore_index": 0}')
    dataset = open_set(tmp_path, "mine", "train")
    assert dataset.names() == ["sky", "grass"] and dataset.class_indices() == [1, 2]
    vocabulary = Vocabulary([dataset])
    assert vocabulary.names == ["sky", "grass"] and vocabulary.tables[0][:3].tolist() == [VOID, 0, 1]
