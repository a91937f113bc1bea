"""Views of photos for training: newly augmented, or stored with their patch tokens and frozen features.

The first stage of lite's image tower is a frozen convolutional network that costs more than the rest of a training
step. So its output is computed once for N views of each photo, for all runs, decoders and seeds. Unreadable photos are
skipped and listed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ldvc.errors import DataError
from train.data.reader import SegmentationDataset
from train.data.transforms import Augmentation, random_view
from train.files import write_json

logger = logging.getLogger(__name__)
PROGRESS = "progress.json"  # file in the folder of a cache

Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Normalised images (B, 3, H, W) -> patch tokens (B, width, h, w) and frozen patch features (B, h * w, d)."""


class SkippedPhotos:
    """A list of photos that cannot be read, each once.

    With a file, all processes and loader workers of a run, and later resumed runs, share one list: a line per photo, with tabs
    between data set, file stem and reason. Without a file, the list belongs to this process only.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self._photos: dict[tuple[str, str], str] = {}

    def add(self, dataset: SegmentationDataset, index: int, error: DataError) -> None:
        """Adds photo `index` of a data set."""
        self.merge({(dataset.name, dataset.stems[index]): " ".join(str(error).split())})

    def forget(self) -> None:
        """Empties the list."""
        self._photos.clear()
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def merge(self, photos: Mapping[tuple[str, str], str]) -> None:
        """Adds photos, in the form that `found` returns; those in the list are skipped."""
        for (name, stem), reason in photos.items():
            if (name, stem) in self._photos or (name, stem) in self.found():
                continue
            self._photos[name, stem] = reason
            logger.warning("skipped: %s", reason)
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with open(self.file, "a", encoding="utf-8") as file:
                    file.write(f"{name}\t{stem}\t{reason}\n")  # one short write, which other processes cannot interrupt

    def found(self) -> dict[tuple[str, str], str]:
        """(Data set, stem) -> reason, from every process that shares the file."""
        if self.file is None or not self.file.is_file():
            return dict(self._photos)
        lines = [line.split("\t", 2) for line in self.file.read_text(encoding="utf-8").splitlines()]
        return {(line[0], line[1]): line[2] for line in lines if len(line) == 3} | self._photos

    def summary(self) -> str:
        """One line for the end of a run; empty when nothing was skipped."""
        if not (found := self.found()):
            return ""
        parts = ", ".join(f"{count} of {name}" for name, count in sorted(Counter(name for name, _ in found).items()))
        where = f"listed in {self.file}" if self.file else f"the first: {next(iter(found.values()))}"
        return f"skipped photos that cannot be used: {parts}; {where}"


def normalise(pixels: np.ndarray | Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32 normalised for the CLIP tower."""
    x = torch.as_tensor(pixels).movedim(-1, -3).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def readable_view(
    dataset: SegmentationDataset, photo: int, augmentation: Augmentation, seed: Sequence[int], skipped: SkippedPhotos
) -> tuple[np.ndarray, np.ndarray]:
    """A random view of a photo or, if it cannot be read, of the next readable one in the list; a function of `seed`.

    Returns `random_view`'s pixels and labels; DataError if no photo of the data set can be used.
    """
    for step in range(len(dataset)):
        index = (photo + step) % len(dataset)
        try:
            pair, generator = dataset.pair(index), np.random.default_rng(seed)
            return random_view(*pair, augmentation, generator, void=dataset.ignore_index)
        except DataError as error:
            skipped.add(dataset, index, error)
    raise DataError(f"None of the {len(dataset)} photos of {dataset.name} can be used. {skipped.summary()}")


def weights_digest(module: nn.Module) -> str:
    """A short hash of a module's structure and tensors, for the name of a cache of its outputs."""
    digest = hashlib.sha256(repr(module).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class ViewCache:
    """N stored views of each photo of one data set, in memory-mapped files that all processes share.

    View v of photo i has index i * views + v. The cache is a folder in `folder`, named by data set and settings, with
    `patch_tokens.bf16`, `features.bf16`, `labels.u8`, `progress.json`, and `skipped.txt` if photos could not be read.

    `towers`: see `weights_digest`. `token_shape`: (width, h, w). `feature_shape`: (h * w, d).
    """

    def __init__(
        self,
        folder: str | Path,
        dataset: SegmentationDataset,
        *,
        augmentation: Augmentation,
        views: int,
        seed: int,
        towers: str,
        token_shape: tuple[int, int, int],
        feature_shape: tuple[int, int],
    ) -> None:
        self.dataset, self.augmentation, self.views, self.seed = dataset, augmentation, views, seed
        sampling = asdict(augmentation)
        if augmentation.padding is None:
            del sampling["padding"]  # so that older caches keep their name
        key = {"photos": dataset.fingerprint(), "augmentation": sampling, "towers": towers}
        key |= {"seed": seed, "views": views, "format": 2}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = Path(folder) / f"{dataset.file_name}-{dataset.split}-{digest}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.skipped = SkippedPhotos(self.folder / "skipped.txt")
        side = augmentation.crop // augmentation.stride
        self.patch_tokens = self._map("patch_tokens.bf16", token_shape, torch.bfloat16)
        self.features = self._map("features.bf16", feature_shape, torch.bfloat16)
        self.labels = self._map("labels.u8", (side, side), torch.uint8)

    def __len__(self) -> int:
        return len(self.dataset) * self.views

    def _map(self, file: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count, path = len(self) * int(np.prod(shape)), self.folder / file
        size = count * dtype.itemsize
        try:  # allocates all of it now: on a full disk, a write into mapped memory would kill the process
            with open(path, "ab") as handle:
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(handle.fileno(), 0, size)
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); free space or give another --cache_dir"
            raise DataError(f"{path} of {size / 1e6:,.0f} MB {reason}.") from None
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(len(self), *shape)

    @property
    def done(self) -> int:
        """Number of stored views."""
        path = self.folder / PROGRESS
        return json.loads(path.read_text())["done"] if path.is_file() else 0

    def build(
        self, encode: Encoder, *, mean: Sequence[float], std: Sequence[float], batch: int = 8, wait: bool = True
    ) -> bool:
        """Computes the missing views and returns whether the cache is complete; an interrupted build continues.

        If another process is building this cache, `wait` for it or return.
        """
        if self.done >= len(self):
            return True
        with open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return False
            first, started = self.done, time.monotonic()
            for start in range(first, len(self), batch):
                stop = min(start + batch, len(self))
                pixels, labels = zip(*(self._view(index) for index in range(start, stop)), strict=True)
                tokens, features = encode(normalise(np.stack(pixels), mean, std))
                self.patch_tokens[start:stop], self.features[start:stop] = tokens.bfloat16(), features.bfloat16()
                self.labels[start:stop] = torch.from_numpy(np.stack(labels))
                if (start - first) // batch % 16 == 0 or stop == len(self):
                    write_json(self.folder / PROGRESS, {"done": stop})
                    rate = (stop - first) / (time.monotonic() - started)
                    text = "views of %s: %d / %d, %.1f views/s, %.0f s left"
                    logger.info(text, self.dataset.name, stop, len(self), rate, (len(self) - stop) / rate)
        return True

    def _view(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        photo, view = divmod(index, self.views)
        return readable_view(self.dataset, photo, self.augmentation, (self.seed, photo, view), self.skipped)


def build_caches(caches: Sequence[ViewCache], encode: Encoder, *, mean: Sequence[float], std: Sequence[float]) -> None:
    """Completes several caches. Processes that start together begin with different data sets."""
    for cache in [cache for cache in caches if not cache.build(encode, mean=mean, std=std, wait=False)]:
        cache.build(encode, mean=mean, std=std)
