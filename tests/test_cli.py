"""The command line: many photos, and figures. Files are opened by independent readers."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO

from ldvc.__main__ import main, parse
from ldvc.batch import find_photos
from tests.results import random_photo

NAMES = "dog, zebra | horse, background"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photos, one of them broken, one in a folder below."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    for seed, (name, size) in enumerate((("a.jpg", (90, 60)), ("b.png", (64, 80)), ("sub/a.jpg", (70, 70)))):
        Image.fromarray(random_photo(5, 6, seed)).resize(size, Image.Resampling.BICUBIC).save(folder / name)
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:-100])
    (folder / "notes.txt").write_text("no photo")
    return folder


def segment(photos: Path, output: Path, checkpoint: Path, *options: str) -> int:
    arguments = ["segment", str(photos), "--names", NAMES, "--output", str(output), "--model", str(checkpoint)]
    return main([*arguments, "--threshold", "0.1", *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


ALL = ("--coco", "--yolo")


@pytest.fixture(scope="module")
def output(photos: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output")
    assert segment(photos, folder, tiny_checkpoint, *ALL) == 0
    return folder


def test_files_of_a_folder(output: Path) -> None:
    kinds = {"overlay": "png", "mask": "png", "data": "json", "yolo/labels": "txt"}
    expected = {f"{kind}/{name}.{suffix}" for kind, suffix in kinds.items() for name in ("a", "b", "sub/a")}
    assert set(contents(output)) == expected | {"areas.csv", "coco.json", "skipped.txt", "yolo/data.yaml"}
    (line,) = (output / "skipped.txt").read_text().splitlines()
    path, reason = line.split("\t")
    assert path.endswith("broken.jpg") and "damaged" in reason
    assert yaml.safe_load((output / "yolo/data.yaml").read_text())["names"] == {0: "dog", 1: "zebra"}


def test_coco_masks_and_areas_agree(output: Path) -> None:
    reader = COCO(str(output / "coco.json"))
    table = list(csv.DictReader((output / "areas.csv").open()))
    assert [each["name"] for each in reader.loadCats(reader.getCatIds())] == ["dog", "zebra"]
    assert [each["file_name"] for each in reader.imgs.values()] == ["a.jpg", "b.png", "sub/a.jpg"]
    for image in reader.imgs.values():
        mask = np.asarray(Image.open(output / "mask" / Path(image["file_name"]).with_suffix(".png")))
        assert mask.shape == (image["height"], image["width"])
        drawn = np.zeros_like(mask)
        for each in reader.loadAnns(reader.getAnnIds(image["id"])):
            drawn[reader.annToMask(each) == 1] = each["category_id"]
        assert np.array_equal(drawn, mask)
        pixels = {row["class"]: int(row["pixels"]) for row in table if row["photo"] == image["file_name"]}
        assert list(pixels.values()) == [(mask == index).sum() for index in (1, 2, 0)]
    assert len(reader.anns) >= 3, "the masks are not empty"


def test_a_second_run_continues(
    photos: Path, output: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Finished photos are skipped; those that are missing, unfinished or made with other settings are segmented."""
    shutil.copytree(output, tmp_path, dirs_exist_ok=True)
    (tmp_path / "data/b.json").unlink()
    (tmp_path / "mask/sub/a.png").write_bytes(b"half a file")
    before = (tmp_path / "overlay/a.png").stat().st_mtime_ns
    assert segment(photos, tmp_path, tiny_checkpoint, *ALL) == 0
    assert "3 of 4 photos are in" in (said := capsys.readouterr().out) and "1 of them from an earlier run" in said
    assert contents(tmp_path) == contents(output)
    assert (tmp_path / "overlay/a.png").stat().st_mtime_ns == before
    assert segment(photos, tmp_path, tiny_checkpoint, "--decoder", "zegclip") == 0
    assert "earlier run" not in capsys.readouterr().out
    assert json.loads((tmp_path / "data/a.json").read_text())["model"]["decoder"] == "zegclip"


def test_cutouts_and_overlays_without_names(photos: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    photo, folder = tmp_path / "a.png", tmp_path / "out"
    Image.open(photos / "b.png").resize((320, 240)).save(photo)
    assert segment(photo, folder, tiny_checkpoint) == 0
    usual = contents(folder)
    assert segment(photo, folder, tiny_checkpoint, "--cutouts", "--no-overlay-names") == 0
    found = contents(folder)
    assert set(found) == {*usual, "cutouts/a.zip"}, "tests/test_downloads.py opens the cut-outs"
    assert found["mask/a.png"] == usual["mask/a.png"] and found["overlay/a.png"] != usual["overlay/a.png"]


def test_two_processes_give_the_files_of_one(photos: Path, output: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert segment(photos, tmp_path, tiny_checkpoint, *ALL, "--jobs", "2") == 0
    assert contents(tmp_path) == contents(output)


@pytest.mark.parametrize("files", [1, 5, 11])
def test_a_run_that_is_stopped_continues(
    photos: Path, output: Path, tiny_checkpoint: Path, tmp_path: Path, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped when a file is written, but not yet renamed."""
    renames = [os.replace] * files

    def rename(*paths: Path) -> None:
        if not renames:
            raise KeyboardInterrupt
        renames.pop()(*paths)

    monkeypatch.setattr(os, "replace", rename)
    assert segment(photos, tmp_path, tiny_checkpoint, *ALL) == 130
    assert sum(not name.endswith(".part") for name in contents(tmp_path)) == files
    monkeypatch.undo()
    assert segment(photos, tmp_path, tiny_checkpoint, *ALL) == 0
    assert contents(tmp_path) == contents(output)


def test_what_cannot_be_done_is_a_sentence(
    photos: Path, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    missing, model = tmp_path / "missing.jpg", ("--model", str(tiny_checkpoint))
    for photo, checkpoint, message in (
        (tmp_path, tiny_checkpoint, "There are no photos in"),
        (missing, tiny_checkpoint, "No photo was segmented: 1 could not be read"),
        (missing, tmp_path / "nowhere", "nowhere; give a folder, a Hub id (owner/name) or 'lite'.\n"),
    ):
        assert segment(photo, tmp_path / "out", checkpoint) == 1 and message in capsys.readouterr().err
    assert "There is no picture at" in (tmp_path / "out" / "skipped.txt").read_text()
    for photo, names, options, message in (
        ("a.jpg", NAMES, ("--layer", "3"), "have 2 layers and 2 heads"),
        ("broken.jpg", NAMES, (), "damaged"),
        ("a.jpg", " , ", (), "Type at least one class name"),
    ):
        assert main(["attention", str(photos / photo), "--names", names, *model, "--output", "x.pdf", *options]) == 1
        assert message in capsys.readouterr().err


def test_photos_of_folders(tmp_path: Path) -> None:
    """Photos of one name get files of different names; hidden files and results of a run are no photos."""
    for name in ("b/x.jpg", "b/X.png", "a/x.jpg", "a/.x.jpg", "a/out/overlay/y.png", "a/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = find_photos([tmp_path / "b", tmp_path / "a", tmp_path / "notes.txt"], tmp_path / "a" / "out")
    assert [each.name for each in found] == ["X", "x_2", "x_3", "notes"]
    assert [each.file_name for each in found] == ["X.png", "x.jpg", "x.jpg", "notes.txt"]


@pytest.mark.parametrize(("command", "kind"), [("attention", "svg"), ("compare", "png"), ("space", "pdf")])
def test_figures(command: str, kind: str, photos: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path, arrays = tmp_path / f"figure.{kind}", tmp_path / "arrays.npz"
    arguments = [command, str(photos / "a.jpg"), "--names", NAMES, "--model", str(tiny_checkpoint), "--output", str(path)]
    assert main([*arguments, "--width", "5", "--npz", str(arrays)]) == 0
    assert path.read_bytes().startswith({"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG"}[kind])
    assert np.load(arrays)["names"].tolist() == ["dog", "zebra"]
    assert kind != "png" or Image.open(path).width == 5 * 300


def test_options_are_checked() -> None:
    command = ["segment", "x.jpg", "--names", "voc20", "--output", "out"]
    assert parse([*command, "--threshold", "none"]).threshold is None
    for wrong in (["--threshold", "2"], ["--threshold", "high"], ["--jobs", "0"], ["--decoder", "best"]):
        with pytest.raises(SystemExit):
            parse([*command, *wrong])
    with pytest.raises(SystemExit):
        parse(["compare", "x.jpg", "--names", "dog", "--output", "figure.docx"])
