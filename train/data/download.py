"""Archives of data sets: resumable download, checksums, unpacking."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.file_download import http_get
from tqdm import tqdm

from ldvc.errors import DataError
from train.files import written
from train.hub import first_line

CHUNK = 1 << 20  # bytes read at once

_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError)


class DamagedArchiveError(DataError):
    """An archive is truncated, damaged, or not the official one."""


@dataclass(frozen=True)
class Archive:
    """A published file."""

    url: str  # its official address
    size: float  # GB, rounded
    checksum: str | None = None  # "md5:..." or "sha1:..."; None = none is published
    mirror: str | None = None  # another address, used if the official one fails

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


class Member(NamedTuple):
    """A regular file of an archive: its path, and a function that opens it."""

    name: str
    open: Callable[[], IO[bytes]]


def is_url(source: str | None) -> bool:
    """Whether a source is the address of a mirror and not a folder."""
    return bool(source) and source.startswith(("http://", "https://"))


def fetch(archive: Archive, folder: Path, source: str | None = None) -> Path:
    """Returns the path of the complete archive with the published checksum; DataError if it is not available.

    Args:
        folder: for downloads. An unfinished download is NAME.part; the next call resumes it.
        source: a folder that holds the archive, where it stays; or the address of a mirror; None = the official address.
    """
    if source and not is_url(source):
        path = Path(source) / archive.name
        if not path.is_file():
            raise DataError(f"{path} is missing; put {archive.name} there, or leave out --source to download it.")
        if not _is_official(path, archive):
            raise DataError(f"{path} does not have the checksum {archive.checksum}; replace it by {archive.url}.")
        return path
    path, part = folder / archive.name, folder / f"{archive.name}.part"
    if path.is_file():  # it gets this name after its checksum is verified
        return path
    folder.mkdir(parents=True, exist_ok=True)
    urls = [f"{source.rstrip('/')}/{archive.name}"] if source else [archive.url, *filter(None, [archive.mirror])]
    for url in urls:
        print(f"downloading {url}", flush=True)
        try:
            _download(url, part)
            if _is_official(part, archive):
                os.replace(part, path)
                return path
            part.unlink()
            reason = f"does not have the checksum {archive.checksum} and was removed"
        except Exception as error:  # no answer, a transfer that fails repeatedly, an invalid address
            if getattr(error, "errno", None):  # an error of the disk
                raise
            status = f"the server answers {error.response.status_code}" if isinstance(error, HfHubHTTPError) else ""
            reason = f"cannot be downloaded ({status or first_line(error)})"
        if url != urls[-1]:
            print(f"{url} {reason}; trying the next address", flush=True)
    raise DataError(
        f"{url} {reason}; check the network and run the command again, "
        f"or give a mirror or a folder that holds {archive.name} with --source."
    )


def _is_official(path: Path, archive: Archive) -> bool:
    """Whether a file has the published checksum, if there is one."""
    if archive.checksum is None:
        return True
    algorithm, _, expected = archive.checksum.partition(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == expected


def _download(url: str, part: Path) -> None:
    """Downloads the missing part of a file. An interrupted transfer is resumed until no more data arrives."""
    headers = {"Accept-Encoding": "identity"}
    with open(part, "ab") as file:
        while True:
            size = file.tell()
            try:
                return http_get(url, file, resume_size=size, headers=headers, displayed_filename=part.stem)
            except HfHubHTTPError as error:
                if error.response.status_code != 416 or not size:
                    raise
                if error.response.headers.get("Content-Range") == f"bytes */{file.tell()}":
                    return  # it is complete
                file.seek(0)
                file.truncate()
            except HTTPError:  # `http_get` resumes after most, but not after a connection that is reset
                if file.tell() <= size:
                    raise


@contextmanager
def open_archive(path: Path) -> Iterator[Iterable[Member]]:
    """Opens a tar, tar.gz or zip file for one pass over its regular files; links and devices are left out.

    DamagedArchiveError, also inside of the `with` block, if it cannot be read or a path leads out of its folder.
    """
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                files = [item for item in archive.infolist() if not item.is_dir()]
                yield [Member(_safe(path, item.filename), partial(archive.open, item)) for item in files]
        else:
            with tarfile.open(path) as archive:
                files = (item for item in archive if item.isfile())
                yield (Member(_safe(path, item.name), partial(archive.extractfile, item)) for item in files)
    except _DAMAGE as error:
        raise DamagedArchiveError(f"{path} is damaged ({error}).") from None


def _safe(path: Path, name: str) -> str:
    name = name.replace("\\", "/")
    if PurePosixPath(name).is_absolute() or ".." in name.split("/"):
        raise DamagedArchiveError(f"{path} is not the official archive: its file {name} leads out of the folder.")
    return str(PurePosixPath(name))


def unpack(path: Path, out: Path, parts: Mapping[str, Path]) -> None:
    """Unpacks `parts`: path of a folder or file in the archive -> path below `out`.

    Files that an earlier call unpacked are kept. DamagedArchiveError if a part is missing.
    """
    with open_archive(path) as members:
        for member in tqdm(members, desc=f"unpacking {path.name}", unit=" files", disable=None):
            for part, destination in parts.items():
                if member.name == part or member.name.startswith(f"{part}/"):
                    target = out / destination / member.name[len(part) + 1 :]
                    if not target.exists():
                        with written(target) as temporary, open(temporary, "wb") as file, member.open() as source:
                            shutil.copyfileobj(source, file, CHUNK)
    for part, destination in parts.items():
        if not (out / destination).exists():
            raise DamagedArchiveError(f"{path} is not the official archive: it has no {part}.")
