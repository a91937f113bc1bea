"""Photos with masks under one interface, whatever their layout on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import ClassVar

import numpy as np
from PIL import Image

from ldvc.errors import DataError
from ldvc.image_io import to_rgb

logger = logging.getLogger(__name__)

IGNORE = 255
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
HOW_TO_SAVE = "save the class numbers as an 8-bit grey or palette PNG"
_BAD = -1
_ORIENTATION = 0x0112  # EXIF tag; the values 5 to 8 swap width and height
_FIRST_FILE = re.compile(r"^(.+?\.(?:jpe?g|png|webp))(?:\s*[,;]\s*|\s+)\S.*$", re.IGNORECASE)  # first of two files in a line
_SCALED = {"L;2": 85, "L;4": 17}  # grey of 2 or 4 bits: Pillow stretches the numbers to 0..255
_ALPHA = ("LA", "PA", "RGBA")


class SegmentationDataset(ABC):
    """One split of a data set. Each layout on disk is a subclass, which defines where files are and what their numbers mean."""

    layout: ClassVar[str]  # key in train/published.yaml
    title: ClassVar[str]  # name for people
    tree: ClassVar[str]  # the expected files
    as_uploaded: ClassVar[bool] = False  # whether photos are read as the page reads uploads: any format, upright

    name: str  # in configurations and tables
    folder: Path
    split: str  # "train" or "val"
    classes: list[str]  # by mask index (includes the background's name, if there is one)
    background_index: int | None = None  # mask index of "none of the classes"
    ignore_index: int = IGNORE  # mask index of void
    exhaustive: bool = True  # False = a photo may show classes that its mask does not
    shown: frozenset[int] | None = None  # classes that a mask shows, if all masks were read (`train.data.inspection`)
    own_words: bool = True  # whether the class names are the data set's own
    stems: list[str]  # file stems, in the order of the official list

    @abstractmethod
    def photo_path(self, stem: str) -> Path:
        """The expected path of the photo of a stem."""

    @abstractmethod
    def mask_path(self, stem: str) -> Path:
        """The expected path of the mask of a stem."""

    def __len__(self) -> int:
        return len(self.stems)

    @property
    def file_name(self) -> str:
        """The name as a part of file names: a set may be named by a path, such as "group/mine" or "mine/"."""
        return file_name(self.name)

    def image(self, index: int) -> Image.Image:
        """The photo as RGB; DataError if it is missing or broken."""
        path = self.photo_path(self.stems[index])
        try:
            with Image.open(path) as file:
                return to_rgb(file) if self.as_uploaded else file.convert("RGB")
        except Exception as error:  # missing, truncated, damaged: Pillow raises a dozen kinds
            raise DataError(f"The photo {path} cannot be read: {_reason(error)}") from None

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8 indices of `classes`, or `ignore_index`; DataError if it is unreadable or holds another number."""
        path = self.mask_path(self.stems[index])
        try:
            raw = read_numbers(path)
        except Exception as error:  # as above
            raise DataError(f"The mask {path} cannot be read: {_reason(error)}.") from None
        inside = (raw >= 0) & (raw < len(self._table))
        mask = np.where(inside, self._table[np.where(inside, raw, 0)], _BAD)
        if (mask == _BAD).any():
            raise DataError(
                f"The mask {path} holds the index {raw[mask == _BAD][0]}, but {self.name} has {len(self.classes)} classes."
            )
        return mask.astype(np.uint8)

    def pair(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Photo and mask; DataError if one of them is missing or broken, or if they differ in size."""
        image, mask = self.image(index), self.mask(index)
        if image.size != mask.shape[::-1]:
            self.require_size(index, mask.shape)
        return image, mask

    def require_size(self, index: int, shape: tuple[int, ...]) -> None:
        """Raises DataError if a photo cannot be read or does not have the size of its mask, `shape` (height, width)."""
        photo = self.photo_path(self.stems[index])
        try:
            with Image.open(photo) as file:
                turn = _orientation(file) if self.as_uploaded else 1
                width, height = file.size if turn < 5 else file.size[::-1]
        except Exception as error:  # as above
            raise DataError(f"The photo {photo} cannot be read: {_reason(error)}.") from None
        if (height, width) != shape:
            note = f": its EXIF orientation {turn} turned the photo, not the mask; save both without EXIF orientation"
            explanation = note if turn >= 5 and (width, height) == shape else ""
            sizes = f"has {width} x {height} pixels, but its mask has {shape[1]} x {shape[0]}"
            raise DataError(f"The photo {photo} {sizes}{explanation}.")

    def fingerprint(self, *, masks: bool = True) -> str:
        """SHA-256 (hex) of all stems, file sizes and modification times, for the names of caches.

        `masks`: whether the masks and their classes are included.
        """
        digest = hashlib.sha256()
        if masks:
            digest.update(json.dumps([self.classes, self.background_index, self.ignore_index]).encode())
        for stem in self.stems:
            for path_of in (self.photo_path, self.mask_path)[: 1 + masks]:
                try:
                    stat = path_of(stem).stat()
                    facts = f"{stat.st_size} {stat.st_mtime_ns}"
                except OSError:
                    facts = "missing"
                digest.update(f"{stem} {facts}\n".encode())
        return digest.hexdigest()

    def class_indices(self) -> list[int]:
        """Mask indices of the real classes, background and void left out."""
        return [index for index in range(len(self.classes)) if index not in (self.background_index, self.ignore_index)]

    def names(self) -> list[str]:
        """Names of the real classes, as the data set spells them."""
        return [self.classes[index] for index in self.class_indices()]

    def _set_numbers(self, *, first: int = 0, ignored: Iterable[int] = (IGNORE,)) -> None:
        """Sets the meaning of the numbers in mask files: the first class has `first`, the others follow."""
        self._table = np.full(256, _BAD, dtype=np.int16)
        self._table[first : first + len(self.classes)] = np.arange(len(self.classes))
        self._table[list(ignored)] = self.ignore_index

    def _missing(self, path: Path, reason: str = "is missing") -> DataError:
        return DataError(f"{path} {reason}. {self.title} is expected as\n{self.tree}")

    def _require(self, *paths: Path) -> None:
        """Raises DataError for the first of some files or folders that does not exist."""
        for path in paths:
            if not path.exists():
                raise self._missing(path)

    def _text(self, file: Path) -> str:
        """The content of a text file without byte order mark."""
        self._require(file)
        try:
            return file.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise self._missing(file, f"cannot be read ({error})") from None

    def _read_list(self, *files: Path) -> list[str]:
        """File stems from list files.

        A line is a stem or a path, with or without suffix, alone or before a second column (as in DeepLab's train_aug.txt). A
        line that names an existing photo is one name. Empty lines and lines that begin with # are skipped.
        """
        lines = [line.strip() for file in files for line in self._text(file).splitlines()]
        stems = [stem for line in lines if line and (stem := self._stem_of(line))]
        if not stems:
            raise self._missing(files[0], "lists no photos")
        if repeated := len(stems) - len(set(stems)):
            logger.warning("%s names %d photos more than once; each line counts", files[0], repeated)
        return stems

    def _stem_of(self, line: str) -> str:
        """The stem in a line of a list; "" for a comment."""
        pair = _FIRST_FILE.match(line)
        first = re.split(r"[\s,;]+", line)[0]
        for candidate in (line, *([pair[1]] if pair else []), first):
            stem = _stem(candidate.strip("\"'"))
            if stem and self.photo_path(stem).is_file():
                return stem
        if line.startswith("#"):
            return ""
        return _stem(first if "/" in line or "\\" in line else line)

    def _keep(self, stems: Sequence[str], every: int) -> None:
        """Keeps every n-th stem. Raises DataError if no photo or no mask is at its expected path: then the layout is wrong."""
        self.stems = list(stems[::every])
        for path_of in (self.photo_path, self.mask_path):
            if not any(path_of(stem).is_file() for stem in self.stems):
                raise self._missing(path_of(self.stems[0]))


def file_name(name: str) -> str:
    """A data set's name as a part of file names: "group/mine" -> "group-mine"."""
    return "-".join(part for part in PurePath(name).parts if part != "/")


def _stem(path: str) -> str:
    name = path.replace("\\", "/").rsplit("/", 1)[-1]
    return name.rsplit(".", 1)[0] if name.lower().endswith(PICTURES) else name


def _orientation(file: Image.Image) -> int:
    """Orientation in the EXIF block of a photo; 1 without a block that can be read."""
    try:
        turn = file.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged block
        return 1
    return turn if turn in range(1, 9) else 1


def _reason(error: Exception) -> str:
    return "there is no such file" if isinstance(error, FileNotFoundError) else str(error).rstrip(".")


# ---- mask files ---------------------------------------------------------------------------------------------------------


def read_numbers(path: Path) -> np.ndarray:
    """(H, W) integers of a mask: grey or palette, 1 to 16 bits; also several equal channels with full opacity.

    ValueError if the picture does not hold one number for each pixel; OSError and others of Pillow if it is damaged.
    """
    with Image.open(path) as file:
        mode, raw_mode = file.mode, _raw_mode(file)
        raw = np.array(file)
    if raw_mode in _SCALED:
        return raw // _SCALED[raw_mode]
    if "16" in raw_mode and not mode.startswith("I"):  # Pillow keeps the high byte, which is 0 for small numbers
        raise ValueError(f"it has 16 bits per channel and several channels; {HOW_TO_SAVE}")
    if mode in _ALPHA:
        raw, alpha = raw[..., :-1], raw[..., -1]
        if (alpha < 255).any():
            raise ValueError(f"some of its pixels are transparent; {HOW_TO_SAVE}, with the number of void in their place")
    if raw.ndim == 3:
        if mode not in ("RGB", *_ALPHA) or (raw != raw[..., :1]).any():
            raise ValueError(f"it is a picture with colours; {HOW_TO_SAVE}")
        raw = raw[..., 0]
    if raw.dtype.kind == "f":
        raise ValueError(f"it holds fractions; {HOW_TO_SAVE}")
    return raw.astype(np.int64) if raw.dtype == bool else raw


def is_usable(path: Path) -> bool:
    """Whether a mask file holds class numbers and not colours, according to its header."""
    try:
        with Image.open(path) as file:
            return file.mode in ("1", "L", "P") or file.mode.startswith("I")
    except Exception:  # damaged: Pillow raises a dozen kinds
        return False


def _raw_mode(file: Image.Image) -> str:
    """How the file stores a pixel, such as "L;4"; "" if Pillow does not report it."""
    arguments = file.tile[0].args if file.tile else ""
    mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return mode if isinstance(mode, str) else ""
