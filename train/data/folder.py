"""Photos with masks in a plain folder, for a user's own data."""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from ldvc.class_names import plain
from ldvc.errors import DataError
from ldvc.pasted_names import words_of
from train.data.reader import IGNORE, PICTURES, SegmentationDataset


class FolderDataset(SegmentationDataset):
    """One split of a plain folder: "train", "val" or the name of another list file; every n-th photo of the list.

    Photos have any of the suffixes .jpg, .jpeg, .png and .webp, masks .png, in small or capital letters. Photos are read as the
    page reads uploads: upright, transparency over white. A class whose index is `ignore_index` ("unlabelled") is void.
    """

    layout = "folder"
    title = "A data set in a plain folder"
    tree = """  dataset.json         {"classes": ["sky", "tree"], "ignore_index": 255, "background_index": null}
                       and "exhaustive": false where masks leave out classes that photos show
  train.txt, val.txt   a photo's name without suffix on each line
  images/NAME.jpg
  masks/NAME.png       8-bit class indices"""
    as_uploaded = True

    def __init__(self, folder: str | Path, split: str = "train", *, every: int = 1, name: str | None = None) -> None:
        self.folder, self.split = Path(folder), split
        self.name = name or self.folder.name
        description = self.folder / "dataset.json"
        self._require(self.folder)
        try:
            self._describe(json.loads(self._text(description)))
        except ValueError as error:
            raise self._missing(description, f"cannot be used ({error})") from None
        self._require(self.folder / f"{split}.txt", self.folder / "images", self.folder / "masks")
        self._duplicates: dict[str, tuple[Path, Path]] = {}  # stem -> two files of that stem in one folder
        self._keep(self._read_list(self.folder / f"{split}.txt"), every)
        for stem in self.stems:
            if stem in self._duplicates:
                first, other = self._duplicates[stem]
                raise DataError(f"{first} and {other.name} have one name apart from the suffix; rename or remove one of them.")

    def _describe(self, facts: Any) -> None:
        """Sets classes and numbers from the content of dataset.json; ValueError if it cannot be used."""
        classes = facts.get("classes") if isinstance(facts, dict) else None
        if not (isinstance(classes, list) and classes and all(isinstance(name, str) and name for name in classes)):
            raise ValueError("'classes' must be a list of names")
        for name in classes:
            if [plain(word) for word in words_of(name)] != [plain(name)]:
                raise ValueError(f"the class {name!r} must be one name without commas, semicolons, bars, quotes or list marks")
        if repeated := [name for name, count in Counter(map(plain, classes)).items() if count > 1]:
            raise ValueError(f"'classes' names '{repeated[0]}' more than once; each class needs a name of its own")
        if len(classes) > 255:
            raise ValueError(f"{len(classes)} classes do not fit 8-bit masks")
        for key, end in (("ignore_index", 256), ("background_index", len(classes))):
            value = facts.get(key)
            if value is not None and (type(value) is not int or not 0 <= value < end):
                raise ValueError(f"'{key}' must be a number from 0 to {end - 1}, not {value!r}")
        self.classes, self.background_index = classes, facts.get("background_index")
        self.ignore_index = IGNORE if facts.get("ignore_index") is None else facts["ignore_index"]
        self.exhaustive = facts.get("exhaustive", True)
        if not isinstance(self.exhaustive, bool):
            raise ValueError(f"'exhaustive' must be true or false, not {self.exhaustive!r}")
        self._set_numbers(ignored=[self.ignore_index])

    @cached_property
    def _photos(self) -> dict[str, Path]:
        return self._by_stem("images", PICTURES)

    @cached_property
    def _masks(self) -> dict[str, Path]:
        return self._by_stem("masks", (".png",))

    def _by_stem(self, folder: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
        """Stem -> file."""
        files: dict[str, Path] = {}
        for file in sorted((self.folder / folder).iterdir()):
            if file.suffix.lower() in suffixes:
                if file.stem in files:
                    self._duplicates.setdefault(file.stem, (files[file.stem], file))
                files[file.stem] = file
        return files

    def photo_path(self, stem: str) -> Path:
        return self._photos.get(stem, self.folder / "images" / f"{stem}.jpg")

    def mask_path(self, stem: str) -> Path:
        return self._masks.get(stem, self.folder / "masks" / f"{stem}.png")
