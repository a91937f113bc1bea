"""train/data/download.py: transfers that break off, fall silent or are resumed, and archives that must not be unpacked."""

from __future__ import annotations

import hashlib
import socket
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ldvc.errors import DataError
from tests.tiny_archives import Server, serving, tar_of, zip_of
from train.data import download
from train.data.download import Archive, fetch

CONTENT = np.random.default_rng(1).bytes(3_000_000)
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(monkeypatch) as server:
        yield server


@pytest.fixture
def archive(server: Server) -> Archive:
    server.files["x.tar"] = CONTENT
    return Archive(f"{server.url}/x.tar", 0.003, MD5)


@pytest.mark.parametrize(
    ("begun", "tag", "faults", "ranges"),
    [
        (0, None, [], [None]),
        (0, None, ["crawl"], [None]),
        (0, None, ["cut"], [None, "bytes=1500000-"]),
        (0, None, ["cut", "cut"], [None, "bytes=1500000-", "bytes=2250000-"]),
        (0, None, ["cut", "whole"], [None, "bytes=1500000-"]),  # a server without Range
        (1000, None, [], ["bytes=1000-"]),  # an interrupted command
        (1000, None, ["whole"], ["bytes=1000-"]),
        (1000, '"of another version"', [], ["bytes=1000-"]),
        (3_000_000, None, [], ["bytes=3000000-"]),  # interrupted before it was renamed
        (3_000_001, None, [], ["bytes=3000001-", None]),  # longer than the server's file
    ],
)
def test_a_download_is_resumed(
    server: Server,
    archive: Archive,
    tmp_path: Path,
    begun: int,
    tag: str | None,
    faults: list[str | int],
    ranges: list[str | None],
) -> None:
    if begun:
        start = CONTENT[:begun].ljust(begun, b"x") if tag is None else b"x" * begun
        (tmp_path / "x.tar.part").write_bytes(start)
    if tag:
        (tmp_path / "x.tar.part.tag").write_text(tag)
    server.faults["x.tar"] = faults
    assert fetch(archive, tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ranges
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
    assert fetch(archive, tmp_path) == tmp_path / "x.tar" and len(server.requests) == len(ranges), "nothing to do"


def test_a_server_that_falls_silent(
    server: Server, archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 1.0)
    server.faults["x.tar"] = ["stall"]
    assert fetch(archive, tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=1500000-"]


def test_a_wrong_checksum_leaves_nothing(server: Server, archive: Archive, tmp_path: Path) -> None:
    server.files["x.tar"] = CONTENT[::-1]
    with pytest.raises(DataError, match=f"x.tar does not have the checksum {MD5} and was removed; .*--source"):
        fetch(archive, tmp_path)
    assert list(tmp_path.iterdir()) == []
    mirrored = replace(archive, mirror=f"{server.url}/mirror/x.tar")
    server.files["mirror/x.tar"] = CONTENT
    assert fetch(mirrored, tmp_path).read_bytes() == CONTENT


def test_what_cannot_be_downloaded(server: Server, archive: Archive, tmp_path: Path) -> None:
    server.faults["x.tar"] = [503]
    with pytest.raises(DataError, match="x.tar cannot be downloaded .the server answers 503.; check the network"):
        fetch(archive, tmp_path)
    with pytest.raises(DataError, match="/elsewhere/x.tar cannot be downloaded .the server answers 404."):
        fetch(archive, tmp_path, f"{server.url}/elsewhere/")
    with socket.socket() as closed:  # bound, but nothing listens
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(DataError, match="cannot be downloaded .*[Cc]onn.*; check the network"):
            fetch(archive, tmp_path, f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert list(tmp_path.iterdir()) == []
    server.faults["x.tar"] = ["cut", 503]
    with pytest.raises(DataError, match="the server answers 503"):
        fetch(archive, tmp_path)
    assert (tmp_path / "x.tar.part").read_bytes() == CONTENT[:1_500_000], "the next call continues from here"


# ---- unpacking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["../evil.jpg", "/evil.jpg", "train2017/../../evil.jpg", "..\\evil.jpg"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_no_path_leads_out_of_the_folder(tmp_path: Path, path: str, kind: str) -> None:
    file, out = tmp_path / f"x.{kind}", tmp_path / "in" / "out"
    file.write_bytes((zip_of if kind == "zip" else tar_of)({"train2017/1.jpg": b"1", path: b"2"}))
    with pytest.raises(download.DamagedArchiveError, match="leads out of the folder"):
        download.unpack(file, out, {"train2017": Path("images")})
    assert not list(tmp_path.rglob("evil.jpg"))


def test_links_of_an_archive_are_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo("a/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("a/file"))
    download.unpack(tmp_path / "x.tar", tmp_path / "out", {"a": Path("b")})
    assert [path.name for path in (tmp_path / "out/b").iterdir()] == ["file"]
    with pytest.raises(download.DamagedArchiveError, match="it has no c"):
        download.unpack(tmp_path / "x.tar", tmp_path / "out", {"c": Path("d")})
