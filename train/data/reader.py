"""Photos with masks under one interface, whatever their layout on disk."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from ldvc.errors import DataError
from ldvc.image_io import to_rgb

IGNORE = 255
_BAD = -1


class SegmentationDataset(ABC):
    """One split of a data set. Each layout on disk is a subclass, which defines where files are and what their numbers mean.

    Attributes:
        name: of the data set in configurations and tables.
        folder: of the data set. split: "train" or "val".
        classes: names by mask index (with the background's name, where there is one).
        background_index: mask index of "none of the classes", or None.
        ignore_index: mask index of void.
        exhaustive: False = a photo may show classes that its mask does not (for example, where each photo has one label).
        own_words: whether the class names are the data set's own.
        stems: file stems of the split, in the order of the official list.
        layout, title, tree: (of the class) key in a configuration; name for people; the expected files.
    """

    layout: ClassVar[str]
    title: ClassVar[str]
    tree: ClassVar[str]
    as_uploaded: ClassVar[bool] = False  # whether photos are read as the page reads uploads: any format, upright

    name: str
    folder: Path
    split: str
    classes: list[str]
    background_index: int | None = None
    ignore_index: int = IGNORE
    exhaustive: bool = True
    own_words: bool = True
    stems: list[str]

    @abstractmethod
    def photo_path(self, stem: str) -> Path:
        """The expected path of the photo of a stem."""

    @abstractmethod
    def mask_path(self, stem: str) -> Path:
        """The expected path of the mask of a stem."""

    def __len__(self) -> int:
        return len(self.stems)

    def image(self, index: int) -> Image.Image:
        """The photo as RGB.

        Raises:
            DataError: it is missing or broken.
        """
        path = self.photo_path(self.stems[index])
        try:
            with Image.open(path) as file:
                return to_rgb(file) if self.as_uploaded else file.convert("RGB")
        except Exception as error:  # missing, truncated, damaged: Pillow raises a dozen kinds
            raise DataError(f"The photo {path} cannot be read: {_reason(error)}") from None

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8 indices of `classes`, or `ignore_index`.

        Raises:
            DataError: it is missing, broken, or holds a number that is no class.
        """
        path = self.mask_path(self.stems[index])
        try:
            with Image.open(path) as file:
                mode, raw = file.mode, np.array(file)
        except Exception as error:  # as above
            raise DataError(f"The mask {path} cannot be read: {_reason(error)}") from None
        if mode not in ("L", "P"):
            raise DataError(f"The mask {path} is not an 8-bit picture of class indices but of Pillow's mode {mode}.")
        mask = self._table[raw]
        if (mask == _BAD).any():
            raise DataError(
                f"The mask {path} holds the index {raw[mask == _BAD][0]}, but {self.name} has {len(self.classes)} classes."
            )
        return mask.astype(np.uint8)

    def pair(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Photo and mask.

        Raises:
            DataError: one of them is missing or broken, or they differ in size.
        """
        image, mask = self.image(index), self.mask(index)
        if mask.shape != (image.height, image.width):
            raise DataError(
                f"The photo {self.photo_path(self.stems[index])} has {image.width} x {image.height} pixels, "
                f"but its mask has {mask.shape[1]} x {mask.shape[0]}."
            )
        return image, mask

    def fingerprint(self, *, masks: bool = True) -> str:
        """SHA-256 (hex) of all stems, file sizes and modification times, by which a cache of computed values is named.

        Args:
            masks: include the masks and their classes.
        """
        digest = hashlib.sha256()
        if masks:
            digest.update(json.dumps([self.classes, self.background_index, self.ignore_index]).encode())
        for stem in self.stems:
            for path in (self.photo_path(stem), *([self.mask_path(stem)] if masks else [])):
                try:
                    stat = path.stat()
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

    def _numbers_mean(self, *, first: int = 0, ignored: Iterable[int] = (IGNORE,)) -> None:
        """Sets which number in a mask file is which class: the first class has `first`, the others follow."""
        self._table = np.full(256, _BAD, dtype=np.int16)
        self._table[first : first + len(self.classes)] = np.arange(len(self.classes))
        self._table[list(ignored)] = self.ignore_index

    def _missing(self, path: Path, why: str = "is missing") -> DataError:
        return DataError(f"{path} {why}. {self.title} is expected as\n{self.tree}")

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
        """File stems from list files. A line is a stem, or paths of photo and mask (as in DeepLab's train_aug.txt)."""
        lines = [line.strip() for file in files for line in self._text(file).splitlines()]
        stems = [_stem(line.split()[0] if "/" in line else line) for line in lines if line]
        if not stems:
            raise self._missing(files[0], "lists no photos")
        return stems

    def _keep(self, stems: Sequence[str], every: int) -> None:
        """Keeps every n-th stem. Raises DataError if no photo or no mask is at its expected path: then the layout is wrong."""
        self.stems = list(stems[::every])
        for path_of in (self.photo_path, self.mask_path):
            if not any(path_of(stem).is_file() for stem in self.stems):
                raise self._missing(path_of(self.stems[0]))


def _stem(path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    return name.rsplit(".", 1)[0] if name.lower().endswith((".jpg", ".jpeg", ".png")) else name


def _reason(error: Exception) -> str:
    return "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
