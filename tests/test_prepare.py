"""train/prepare.py: tiny archives in the official structure, from a server on this machine or from a folder."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import numpy as np
import pytest
from huggingface_hub.errors import HTTPError
from huggingface_hub.file_download import http_get

from ldvc.class_names import load_classes
from ldvc.errors import DataError
from tests.tiny_archives import Server, png, serving, tar_of, zip_of
from tests.tiny_data import names_in
from train import prepare
from train.data import convert, download, open_set
from train.data.download import Archive, DamagedArchiveError, fetch, unpack


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # `http_get` would refuse this machine, too
    with serving(monkeypatch) as server:
        yield server


@pytest.fixture(autouse=True)
def large_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The archives of the tests are tiny, but the plan is that of the real ones."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))


def run(name: str, data: Path, *arguments: str) -> None:
    prepare.main([name, "--data", str(data), *arguments])


def refused(name: str, data: Path, *arguments: str) -> str:
    """The sentence of a command that fails."""
    with pytest.raises(SystemExit) as caught:
        run(name, data, *arguments)
    assert str(caught.value).startswith("error: ") and "\n" not in str(caught.value)
    return str(caught.value)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


CONTENT = np.random.default_rng(1).bytes(3_000_000)
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


@pytest.fixture
def archive(server: Server, monkeypatch: pytest.MonkeyPatch) -> Archive:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)  # of 10 MB, which are kept as a whole
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
    server.files["x.tar"] = CONTENT
    return Archive(f"{server.url}/x.tar", 0.003, MD5)


@pytest.mark.parametrize(
    ("begun", "faults", "ranges"),
    [
        (0, [], [None]),
        (0, ["cut"], [None, "bytes=1500000-"]),
        (1000, [], ["bytes=1000-"]),  # an interrupted command
        (3_000_000, [], ["bytes=3000000-"]),  # interrupted before it was renamed
        (3_000_001, [], ["bytes=3000001-", None]),  # longer than the server's file
        (3_000_001, ["", "cut", "whole"], ["bytes=3000001-", None, "bytes=1500000-"]),
    ],
)
def test_a_download_is_resumed(
    server: Server, archive: Archive, tmp_path: Path, begun: int, faults: list[str | int], ranges: list[str | None]
) -> None:
    (tmp_path / "x.tar.part").write_bytes(CONTENT[:begun].ljust(begun, b"x"))
    server.faults["x.tar"] = faults
    assert fetch(archive, tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ranges
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
    assert fetch(archive, tmp_path) == tmp_path / "x.tar" and len(server.requests) == len(ranges), "nothing to do"


def test_a_connection_that_is_reset(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def resetting(url: str, file: IO[bytes], *, resume_size: int, **options: object) -> None:
        begun.append(resume_size)
        if len(begun) < 3:
            file.write(CONTENT[resume_size : resume_size + 1000])
            raise HTTPError("connection reset by peer")
        http_get(url, file, resume_size=resume_size, **options)

    monkeypatch.setattr(download, "http_get", resetting)
    assert fetch(archive, tmp_path).read_bytes() == CONTENT and begun == [0, 1000, 2000]


def test_a_wrong_checksum_leaves_nothing(server: Server, archive: Archive, tmp_path: Path) -> None:
    server.files |= {"x.tar": CONTENT[::-1], "mirror/x.tar": CONTENT}
    with pytest.raises(DataError, match=f"x.tar does not have the checksum {MD5} and was removed; .*--source"):
        fetch(archive, tmp_path)
    assert list(tmp_path.iterdir()) == []
    mirrored = replace(archive, mirror=f"{server.url}/mirror/x.tar")
    assert fetch(mirrored, tmp_path).read_bytes() == CONTENT
    assert fetch(archive, tmp_path / "other", f"{server.url}/mirror/").read_bytes() == CONTENT


def test_what_cannot_be_downloaded(server: Server, archive: Archive, tmp_path: Path) -> None:
    server.faults["x.tar"] = [503]
    with pytest.raises(DataError, match="x.tar cannot be downloaded .the server answers 503.; check the network"):
        fetch(archive, tmp_path)
    with pytest.raises(DataError, match="/elsewhere/x.tar cannot be downloaded .the server answers 404."):
        fetch(archive, tmp_path, f"{server.url}/elsewhere/")
    for source in ("http://127.0.0.1:9", "http://[x"):
        with pytest.raises(DataError, match="x.tar cannot be downloaded .*; check the network"):
            fetch(archive, tmp_path, source)
    server.faults["x.tar"] = ["cut", 503]
    with pytest.raises(DataError, match="the server answers 503"):
        fetch(archive, tmp_path)
    assert (tmp_path / "x.tar.part").read_bytes() == CONTENT[:1_500_000], "the next call continues from here"


@pytest.mark.parametrize("path", ["../evil.jpg", "/evil.jpg", "train2017/../../evil.jpg", "..\\evil.jpg"])
@pytest.mark.parametrize(("name", "archive_of"), [("x.zip", zip_of), ("x.tar", tar_of)])
def test_no_path_leads_out_of_the_folder(tmp_path: Path, path: str, name: str, archive_of: Callable) -> None:
    file, out = tmp_path / name, tmp_path / "in" / "out"
    file.write_bytes(archive_of({"train2017/1.jpg": b"1", path: b"2"}))
    with pytest.raises(DamagedArchiveError, match="leads out of the folder"):
        unpack(file, out, {"train2017": Path("images")})
    assert not list(tmp_path.rglob("evil.jpg"))


def test_links_of_an_archive_are_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo("a/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("a/file"))
    unpack(tmp_path / "x.tar", tmp_path / "out", {"a": Path("b")})
    assert [path.name for path in (tmp_path / "out/b").iterdir()] == ["file"]
    with pytest.raises(DamagedArchiveError, match="it has no c"):
        unpack(tmp_path / "x.tar", tmp_path / "out", {"c": Path("d")})


def test_voc_with_the_masks_of_sbd(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("voc2012", tmp_path)
    printed = capsys.readouterr().out
    assert "VOCtrainval_11-May-2012.tar           2.0 GB    2.0 GB" in printed and "needed: 4.0 GB" in printed
    assert "train has 5 photos with masks of 20 classes" in printed
    kit = tmp_path / "VOCdevkit/VOC2012"
    aug = (kit / "ImageSets/Segmentation/aug.txt").read_text().split()
    assert aug == ["2008_000002", "2008_000007", "2009_000001"], "SBD without VOC's lists"
    train = open_set(tmp_path, "voc2012", "train")
    assert train.stems == ["2007_000032", "2007_000039", *aug]
    assert names_in(train, 0) == ["-", "aeroplane", "-", "person"], "VOC's own mask, not SBD's"
    assert names_in(train, 2) == ["person", "sofa", "-"] and names_in(train, 3) == ["-", "boat", "chair"]
    assert open_set(tmp_path, "voc2012", "val").stems == ["2007_000033", "2011_000003"]
    masks = sorted(path.name for path in (kit / "SegmentationClassAug").iterdir())
    assert masks == [f"{stem}.png" for stem in sorted(["2007_000032", "2007_000033", *aug, "2011_000003"])]
    parts = ["ImageSets", "JPEGImages", "SegmentationClass", "SegmentationClassAug"]
    assert sorted(path.name for path in kit.iterdir()) == parts
    assert [path.name for path in tmp_path.iterdir()] == ["VOCdevkit"], "downloads are removed"


def test_pascal_context(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("pascal_context59", tmp_path)
    train, val = (open_set(tmp_path, "pascal_context59", split) for split in ("train", "val"))
    assert train.stems == ["2008_000002", "2008_000008"] and val.stems == ["2008_000009", "2008_000016"]
    assert names_in(train, 0) == ["-", "keyboard"] and names_in(train, 1) == ["sky", "person", "sky"]
    assert names_in(val, 0) == ["aeroplane", "wood", "-"] and names_in(val, 1) == ["-"]
    assert [path.name for path in tmp_path.iterdir()] == ["VOCdevkit"]
    before, requests = tree(tmp_path), len(server.requests)
    run("pascal_context59", tmp_path)
    assert tree(tmp_path) == before and len(server.requests) == requests, "a second command does nothing"
    assert re.search(r"trainval_merged.json +done", capsys.readouterr().out)


def test_the_numbers_of_coco_stuff() -> None:
    """COCO-Stuff's labels.txt: 1 to 91 are things of COCO, 92 to 182 stuff; masks hold them minus one, 255 is unlabelled."""
    table = convert.coco_train_ids()
    without_masks = {12: "street sign", 26: "hat", 29: "shoe", 30: "eye glasses", 45: "plate", 66: "mirror", 68: "window"}
    without_masks |= {69: "desk", 71: "door", 83: "blender", 91: "hair brush"}
    labels = [number for number in range(1, 183) if number not in without_masks]
    assert [number + 1 for number in np.flatnonzero(table >= 0)] == [*labels, 256] and len(labels) == 171
    assert table[[number - 1 for number in labels]].tolist() == list(range(171)) and table[255] == 255
    names = load_classes("coco_stuff171")
    published = {1: "person", 13: "stop sign", 31: "handbag", 70: "toilet", 90: "toothbrush", 92: "banner", 110: "desk-stuff"}
    published |= {124: "grass", 148: "river", 157: "sky-other", 169: "tree", 171: "wall-brick", 182: "wood"}
    assert {number: names[table[number - 1]] for number in published} == published


def test_the_numbers_of_pascal_context() -> None:
    """PASCAL in Detail lists VOC's 20 classes by these ids, in VOC's order."""
    ids = (2, 23, 25, 31, 34, 45, 59, 65, 72, 98, 397, 113, 207, 258, 284, 308, 347, 368, 416, 427)
    names = ["background", *load_classes("context59")]
    voc = [name.replace("dining table", "table") for name in load_classes("voc20")]
    assert [names[convert.CONTEXT_IDS.index(number)] for number in ids] == voc
    assert len(convert.CONTEXT_IDS) == len(names) and list(convert.CONTEXT_IDS) == sorted(set(convert.CONTEXT_IDS))
    others = {9: "bag", 44: "building", 187: "grass", 220: "keyboard", 360: "sky", 420: "tree", 458: "wood"}
    assert {number: names[convert.CONTEXT_IDS.index(number)] for number in others} == others


def save(server: Server, folder: Path) -> Path:
    """The archives in a folder of the user."""
    folder.mkdir()
    for name, content in server.files.items():
        (folder / name).write_bytes(content)
    return folder


def test_coco_stuff_from_a_folder_of_archives(server: Server, tmp_path: Path) -> None:
    source, data = save(server, tmp_path / "mine"), tmp_path / "data"
    before = tree(source)
    run("coco_stuff164k", data, "--source", str(source))
    assert tree(source) == before and server.requests == []
    train, val = (open_set(data, "coco_stuff164k", split) for split in ("train", "val"))
    assert names_in(train, 0) == ["person", "tree", "-"] and names_in(train, 1) == ["sky-other", "cow", "grass", "-"]
    assert names_in(train, 2) == ["wood", "person", "-"] and names_in(val, 0) == ["person", "scissors", "banner"]
    (source / "benchmark.tgz").write_bytes(b"other")
    assert "benchmark.tgz does not have the checksum" in refused("voc2012", data, "--source", str(source))
    (source / "benchmark.tgz").unlink()
    assert "benchmark.tgz is missing; put" in refused("voc2012", data, "--source", str(source))
    assert len(open_set(data, "voc2012", "val")) == 2, "what came before is kept"
    assert sorted(path.name for path in data.iterdir()) == ["VOCdevkit", "coco_stuff164k"]


def test_a_disk_that_is_too_small(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1.6 * 10**9))
    assert f"needs 2.6 GB in {tmp_path}, where 1.6 GB are free; " in refused("pascal_context59", tmp_path)
    assert server.requests == [] and tree(tmp_path) == {}
    source = save(server, tmp_path / "mine")  # nothing to download: 1.5 GB of photos and masks
    run("pascal_context59", tmp_path, "--source", str(source))
    begun = tmp_path / "other" / "pascal_context59.unfinished" / "VOCtrainval_03-May-2010.tar.part"
    begun.parent.mkdir(parents=True)
    with open(begun, "wb") as file:
        file.truncate(1_200_000_000)  # a hole, which takes no room; it is there already
    run("pascal_context59", tmp_path / "other")


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("VOCtrainval_11-May-2012.tar", FULL),
        ("2007_000033.jpg", KeyboardInterrupt()),
        ("SegmentationClass", FULL),
        ("2008_000007.png", FULL),
    ],
)
def test_a_command_that_ends_too_early_continues(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException
) -> None:
    """When a file of this name is finished, in any process."""
    rename = os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise error
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        sentence = f"error: The disk of {tmp_path} is full" if error is FULL else "Stopped; the same command continues"
        with pytest.raises(SystemExit, match=sentence):
            run("voc2012", tmp_path)
    before = tree(tmp_path)
    assert not [file for file in before if file.endswith(".new")]
    run("voc2012", tmp_path)
    after = tree(tmp_path)
    kept = {f"VOCdevkit{file.partition('VOCdevkit')[2]}": before[file] for file in before if file.endswith((".jpg", ".png"))}
    assert kept.items() <= after.items(), "no file is written twice"
    assert [path.name for path in tmp_path.iterdir()] == ["VOCdevkit"]
    assert sorted(file for file, asked in server.requests if asked is None) == ["VOCtrainval_11-May-2012.tar", "benchmark.tgz"]


def test_a_truncated_archive_is_removed(server: Server, tmp_path: Path) -> None:
    name = "stuffthingmaps_trainval2017.zip"
    server.files[name] = server.files[name][:-50]
    sentence = refused("coco_stuff164k", tmp_path)
    assert f"{name} is damaged" in sentence and "It was removed" in sentence
    assert not [file for file in tree(tmp_path) if name in file or "annotations" in file]
    refused("coco_stuff164k", tmp_path)
    assert len(server.requests) == 4, "the photos were kept"


def test_a_damaged_archive_of_the_user_stays(server: Server, tmp_path: Path) -> None:
    source = save(server, tmp_path / "mine")
    content = bytearray(server.files["train2017.zip"])
    content[2000] ^= 255  # inside of a photo
    (source / "train2017.zip").write_bytes(content)
    sentence = refused("coco_stuff164k", tmp_path / "data", "--source", str(source))
    assert "train2017.zip is damaged" in sentence and "Replace it" in sentence
    assert (source / "train2017.zip").read_bytes() == content and tree(tmp_path / "data") == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"train2017/1.png": png([11]), "val2017/1.png": png([0])}, "train2017/1.png holds 11"),
        ({"train2017/1.png": png([0])}, "it has no masks in val2017"),
    ],
)
def test_other_masks(tmp_path: Path, content: dict[str, bytes], words: str) -> None:
    (tmp_path / "x.zip").write_bytes(zip_of(content))
    with pytest.raises(DamagedArchiveError, match=f"x.zip is not the official archive: {words}"):
        convert.convert_coco_stuff(tmp_path / "x.zip", tmp_path / "out")


def test_the_result_is_checked(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("pascal_context59", tmp_path)
    photos = tmp_path / "VOCdevkit/VOC2010/JPEGImages"
    (photos / "2008_000009.jpg").unlink()
    assert f"2008_000009.jpg is missing, the first of 1; remove the folder {photos}" in refused("pascal_context59", tmp_path)
    monkeypatch.setitem(prepare.PHOTOS, "pascal_context59", (4998, 5105))
    assert "has 2 photos for train instead of 4998" in refused("pascal_context59", tmp_path)
