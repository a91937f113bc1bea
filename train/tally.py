"""Decodes the photos of a data set and counts what is right; nothing here knows files of results or tables."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldvc.calibration import Calibration
from ldvc.data import BACKGROUND, VOID, normalise, weights_digest
from ldvc.data.class_names import plain
from ldvc.errors import DataError
from ldvc.metrics import ConfusionMatrix, ThresholdCurve
from ldvc.modeling.model import LDVC, similarity_logits
from ldvc.pictures import Window, cut_windows, sliding_windows
from ldvc.windows import stitch

logger = logging.getLogger("evaluate")

OFFSET = 0.1  # gamma of ZegCLIP and its followers
DEFAULT_INFERENCE = {"long_side": 448}
UNLIMITED = 1e9  # the protocol's short side holds for small photos too; the page enlarges them at most twice
_STEM_BATCH = 4  # windows
Decode = Callable[[Tensor], Tensor]
"""Indices of names (C,) -> mask logits (W, C, h, w) of the windows of the photo at hand."""


# ---- photos in ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photo:
    """One photo, ready for the tower.

    Attributes:
        index: in the data set.
        target: (H, W) int64: number of the name, VOID or BACKGROUND.
        canvas: (height, width) in pixels at which the tower sees it, without padding.
        windows: W of them, all of one size.
        pixels: (W, H', W', 3) uint8, or None where `stems` are known.
        stems: (W, width, h, w), what the frozen first stage makes of the pixels, or None.
    """

    index: int
    target: Tensor
    canvas: tuple[int, int]
    windows: list[Window]
    pixels: np.ndarray | None = None
    stems: Tensor | None = None


@dataclass(frozen=True)
class StemCache:
    """Stems of photos in files of their own, shared by all checkpoints on the same frozen towers.

    It pays where the first stage is a network of its own, as in lite; a plain patch embedding is faster than the disk.

    Attributes:
        folder: of the data set, the inference settings and the towers' weights.
    """

    folder: Path

    @classmethod
    def of(
        cls, root: str, dataset: Any, clip: Any, inference: Mapping[str, Any], dtype: torch.dtype, digest: str
    ) -> StemCache:
        """The cache below `root` for these photos at this size and these towers (`digest` of their weights)."""
        key = json.dumps([dataset.fingerprint(masks=False), sorted(inference.items()), clip.patch_size, digest, str(dtype)])
        folder = Path(root) / f"stems-{dataset.name}-{dataset.split}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    def read(self, index: int) -> tuple[tuple[int, int], Tensor] | None:
        """Canvas and stems of a photo, or None."""
        path = self.folder / f"{index:06d}.pt"
        if not path.is_file():
            return None
        content = torch.load(path, weights_only=True)
        return tuple(content["canvas"]), content["stems"]

    def write(self, photo: Photo, stems: Tensor) -> None:
        """Stores a photo's stems; a kill in the middle leaves nothing."""
        temporary = self.folder / f"{photo.index:06d}.{os.getpid()}.new"
        torch.save({"canvas": list(photo.canvas), "stems": stems.cpu().clone()}, temporary)
        os.replace(temporary, self.folder / f"{photo.index:06d}.pt")


class PhotoReader(Dataset):
    """Photos of a data set as the predictor would show them to the tower; a broken one is a sentence instead.

    Args:
        dataset: photos and masks.
        indices: which of them.
        inference: see `ldvc.pictures.canvas_size`.
        patch: pixels per patch side.
        cache: where stems may lie already.
    """

    def __init__(
        self, dataset: Any, indices: Sequence[int], inference: Mapping[str, Any], patch: int, cache: StemCache | None
    ) -> None:
        self.dataset, self.indices, self.inference = dataset, indices, dict(inference)
        self.patch, self.cache = patch, cache
        self.table = torch.full((256,), VOID, dtype=torch.int64)
        for number, index in enumerate(dataset.class_indices()):
            self.table[index] = number
        if dataset.background_index is not None:
            self.table[dataset.background_index] = BACKGROUND
        self.table[dataset.ignore_index] = VOID

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Photo | str:
        index = self.indices[place]
        try:
            stored = self.cache.read(index) if self.cache else None
            if stored is not None:
                canvas, stems = stored
                target = self.table[torch.from_numpy(self.dataset.mask(index)).int()]
                return Photo(index, target, canvas, sliding_windows(*canvas, inference=self.inference), stems=stems)
            image, mask = self.dataset.pair(index)
        except DataError as error:
            return str(error)
        canvas, windows, pixels = cut_windows(image, inference=self.inference, patch=self.patch)
        return Photo(index, self.table[torch.from_numpy(mask).int()], canvas, windows, pixels=pixels)


def _as_it_is(item: Photo | str) -> Photo | str:
    return item


# ---- one photo ------------------------------------------------------------------------------------------------------------


def stems_of(model: LDVC, pixels: np.ndarray, dtype: torch.dtype) -> Tensor:
    """(W, H', W', 3) uint8 -> (W, width, h, w) on the model's device."""
    device = next(model.parameters()).device
    images = normalise(pixels, model.clip.mean, model.clip.std)  # (W, 3, H', W')
    return torch.cat([model.image_tower.stem(part.to(device)).to(dtype) for part in images.split(_STEM_BATCH)])


def decoder_of(model: LDVC, arm: str, names: Sequence[str]) -> Callable[[Tensor], Decode]:
    """A function of a photo's stems (W, width, h, w) that gives its `Decode`; class embeddings are computed once.

    Args:
        arm: "clip" is plain similarity; anything else is the model's own decoder.
    """
    tokens = model.text_tower.tokenize(list(names))
    if arm == "clip":
        embeddings = model.text_tower(tokens, prompted=False)

        def start(stems: Tensor) -> Decode:
            features = model.image_tower(stem=stems, prompted=False)

            def decode(which: Tensor) -> Tensor:
                logits = similarity_logits(
                    features.patch_features, embeddings[which], scale=model.clip.scale, bias=model.clip.bias
                )
                return logits.unflatten(-1, features.grid)

            return decode

        return start
    embeddings = model.encode_names(tokens)

    def start(stems: Tensor) -> Decode:
        features = model.encode_image(stem=stems)
        return lambda which: model.decode(features, embeddings[which]).mask_logits.float()

    return start


@dataclass
class Tally:
    """Counts over photos of one data set.

    Attributes:
        joint, offset, present: confusion matrices of the three ways to ask, see `train.evaluate`.
        curves: IoU of single masks, one curve for each way to ask.
        photos: indices of the photos that were decoded. blank: of those without a labelled pixel.
        broken: one sentence for each photo that could not be read.
    """

    joint: ConfusionMatrix
    offset: ConfusionMatrix
    present: ConfusionMatrix
    curves: dict[str, ThresholdCurve] = field(
        default_factory=lambda: {way: ThresholdCurve() for way in ("joint", "present", "alone")}
    )
    photos: list[int] = field(default_factory=list)
    blank: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, classes: int) -> Tally:
        """No photos yet."""
        return cls(*(ConfusionMatrix(classes) for _ in range(3)))

    def merge(self, other: Tally) -> None:
        """Adds what was counted on other photos."""
        for way in ("joint", "offset", "present"):
            getattr(self, way).merge(getattr(other, way))
        for way, curve in self.curves.items():
            curve.merge(other.curves[way])
        self.photos += other.photos
        self.blank += other.blank
        self.broken += other.broken


def gather(tally: Tally) -> Tally:
    """What all processes counted; each must call it. Without several processes the tally comes back as it is.

    Photos are dealt out by `tally_set` without padding, so that none is counted twice; the assertion says so.
    """
    found = gather_object([tally])
    total = Tally.empty(len(tally.joint.counts))
    for part in found:
        total.merge(part)
    seen = total.photos + total.blank
    assert len(seen) == len(set(seen)), "a photo was counted twice"
    return total


def tally_set(
    model: LDVC,
    arm: str,
    dataset: Any,
    *,
    seen: Callable[[str], bool],
    inference: Mapping[str, Any] | None = None,
    offset: float = OFFSET,
    bf16: bool = True,
    cache_dir: str | None = None,
    peak: float = 0.0,
    joint_only: bool = False,
    alone: bool = True,
    process: int = 0,
    processes: int = 1,
    num_workers: int = 0,
) -> Tally:
    """Decodes every photo of a data set, or one process's share of them, and counts.

    Args:
        model: its decoder, or only its towers when `arm` is "clip". Stays in evaluation mode.
        seen: whether a name has been learned; decides which scores the offset lowers.
        inference: {"long_side"}, {"short_side"} or {"short_side", "window", "stride"}; see `ldvc.pictures.canvas_size`.
        offset: subtracted from the scores of seen classes in one of the confusion matrices.
        bf16: autocast.
        cache_dir: where stems are kept; None computes them anew.
        peak: of the calibration (`ldvc.calibration`); `present` and the curves are counted with it, as the page shows them
            but for the scale, which is fitted afterwards. The other confusion matrices are the literature's, of bare logits.
        joint_only: only the literature's measures: decode each photo once, with all names.
        alone: also decode each present name by itself.
        process, processes: take photos process, process + processes, ...; `gather` adds the shares up.
        num_workers: processes that read photos ahead.
    """
    model.eval()
    device = next(model.parameters()).device
    inference = dict(inference or DEFAULT_INFERENCE)
    if "short_side" in inference:
        inference.setdefault("enlarge", UNLIMITED)
    dtype = torch.bfloat16 if bf16 else torch.float32
    names = dataset.names()
    lowered = offset * torch.tensor([float(seen(name)) for name in names], device=device)
    cache = None
    if cache_dir:
        digest = weights_digest(model.clip.visual)
        cache = StemCache.of(cache_dir, dataset, model.clip, inference, dtype, digest)
    reader = PhotoReader(dataset, range(process, len(dataset), processes), inference, model.clip.patch_size, cache)
    tally = Tally.empty(len(names))

    with torch.inference_mode(), torch.autocast(device_type=device.type, dtype=torch.bfloat16, enabled=bf16):
        start = decoder_of(model, arm, [plain(name) for name in names])  # the words that training would use
        for photo in DataLoader(reader, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is):
            if isinstance(photo, str):
                logger.warning("skipped: %s", photo)
                tally.broken.append(photo)
                continue
            stems = photo.stems
            if stems is None:
                stems = stems_of(model, photo.pixels, dtype)
                if cache is not None:
                    cache.write(photo, stems)
            if not bool((photo.target >= 0).any()):
                tally.blank.append(photo.index)
                continue
            decode = start(stems.to(device))
            _count_photo(
                tally,
                decode,
                photo,
                model.clip.patch_size,
                lowered,
                Calibration(peak=peak),
                single=not joint_only,
                alone=alone and not joint_only,
            )
            tally.photos.append(photo.index)
    return tally


def _count_photo(
    tally: Tally,
    decode: Decode,
    photo: Photo,
    patch: int,
    lowered: Tensor,
    shown: Calibration,
    *,
    single: bool,
    alone: bool,
) -> None:
    device = lowered.device
    target = photo.target.to(device)
    labelled, valid = target >= 0, target != VOID

    def full_size(logits: Sequence[Tensor]) -> Tensor:
        """(C, h, w) of each window -> (C, H, W). Overlapping windows average sigmoids, whose logit is what comes back."""
        with torch.autocast(device_type=device.type, enabled=False):
            whole = partial(stitch, windows=photo.windows, size=tuple(target.shape), canvas=photo.canvas, patch=patch)
            if len(logits) == 1:
                return whole(logits)
            return torch.logit(whole(logits, after=torch.sigmoid))

    everything = list(decode(torch.arange(len(lowered), device=device)).float())
    joint = full_size(everything)
    # Only labelled pixels are scored, with the names in the last axis: argmax is then several times faster on a CPU.
    pixels, truth = joint[:, labelled].T.contiguous(), target[labelled]  # (pixels, C), (pixels,)
    tally.joint.update(truth, pixels.argmax(dim=1))
    tally.offset.update(truth, (pixels.sigmoid() - lowered).argmax(dim=1))
    if not single:
        return
    present = torch.unique(truth)
    given = list(decode(present).float())
    compared = full_size(shown.compared(given))  # (P, H, W)
    tally.present.update(truth, present[compared[:, labelled].argmax(dim=0)])
    masks = target == present[:, None, None]
    tally.curves["joint"].update(full_size(shown.scored([each[present] for each in everything])), masks, valid)
    tally.curves["present"].update(full_size(shown.scored(given)), masks, valid)
    if alone:
        one_by_one = list(torch.cat([decode(name[None]) for name in present], dim=1).float())
        tally.curves["alone"].update(full_size(shown.scored(one_by_one)), masks, valid)
