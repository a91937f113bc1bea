"""Photos with masks in a plain folder.

<folder>/dataset.json   classes, ignore_index, background_index (or null)
<folder>/train.txt      one file stem a line; val.txt likewise
<folder>/images/*.jpg   masks/*.png (8-bit class index)
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ldvc.errors import DataError

_TREE = "images/NAME.jpg, masks/NAME.png, dataset.json, train.txt, val.txt"


class FolderDataset:
    """One split of a plain folder.

    Attributes:
        name: the folder's name.
        classes: names by mask index, as the data set spells them (with the background's name, where there is one).
        background_index: mask index of "none of the classes", or None.
        ignore_index: mask index of void.
        stems: file stems of the split, in the order of the list file.

    Args:
        folder: the data set's folder.
        split: "train" or "val", or the name of another list file in the folder.
        every: take every n-th photo of the list only (frames of a video repeat each other).

    Raises:
        DataError: the folder does not look as described above; the sentence names the first missing file.
    """

    def __init__(self, folder: str | Path, split: str = "train", *, every: int = 1) -> None:
        self.folder = Path(folder)
        self.name = self.folder.name
        self.split = split
        description = self._read("dataset.json")
        try:
            facts = json.loads(description)
            self.classes: list[str] = list(facts["classes"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.folder / 'dataset.json'} is not readable ({error}); it needs a list 'classes'."
            ) from None
        self.ignore_index: int = facts.get("ignore_index", 255)
        self.background_index: int | None = facts.get("background_index")
        self.stems = [line.strip() for line in self._read(f"{split}.txt").splitlines() if line.strip()][::every]
        if not self.stems:
            raise DataError(f"{self.folder / (split + '.txt')} lists no photos.")

    def _read(self, file: str) -> str:
        path = self.folder / file
        if not path.is_file():
            raise DataError(f"{path} is missing. A data set is a folder with {_TREE}.")
        return path.read_text(encoding="utf-8")

    def __len__(self) -> int:
        return len(self.stems)

    def image(self, index: int) -> Image.Image:
        """The photo as RGB.

        Raises:
            DataError: it is missing or broken.
        """
        path = self.folder / "images" / f"{self.stems[index]}.jpg"
        try:
            return Image.open(path).convert("RGB")
        except OSError as error:
            raise DataError(f"The photo {path} cannot be read: {error}") from None

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8 class indices.

        Raises:
            DataError: it is missing, broken, or holds an index that is no class.
        """
        path = self.folder / "masks" / f"{self.stems[index]}.png"
        try:
            mask = np.array(Image.open(path))
        except OSError as error:
            raise DataError(f"The mask {path} cannot be read: {error}") from None
        if mask.ndim != 2 or mask.dtype != np.uint8:
            raise DataError(f"The mask {path} is not an 8-bit picture of class indices.")
        wrong = mask[(mask >= len(self.classes)) & (mask != self.ignore_index)]
        if wrong.size:
            raise DataError(
                f"The mask {path} holds the index {wrong[0]}, but {self.name} has {len(self.classes)} classes."
            )
        return mask

    def class_indices(self) -> list[int]:
        """Mask indices of the real classes, background left out."""
        return [index for index in range(len(self.classes)) if index != self.background_index]

    def names(self) -> list[str]:
        """Names of the real classes, as the data set spells them."""
        return [self.classes[index] for index in self.class_indices()]


def open_sets(
    root: str | Path, names: list[str], split: str, *, every: Mapping[str, int] | None = None
) -> list[FolderDataset]:
    """Opens several data sets that lie side by side; `every` thins some of them, see `FolderDataset`.

    Raises:
        DataError: the root or one of the sets is missing.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(
            f"The data folder {root} does not exist. Give the folder that holds {', '.join(names)} with --data."
        )
    return [FolderDataset(root / name, split, every=(every or {}).get(name, 1)) for name in names]
