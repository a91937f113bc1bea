"""Decodes the photos of a data set and counts what is right; nothing here knows files of results or tables."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldvc.data import FolderDataset, Vocabulary, normalise, weights_digest
from ldvc.metrics import ConfusionMatrix, ThresholdCurve
from ldvc.modeling.model import LDVC, similarity_logits
from ldvc.pictures import canvas_size

OFFSET = 0.1  # gamma of ZegCLIP and its followers
Decode = Callable[[Tensor], Tensor]
"""Indices of names (C,) -> mask logits (C, h, w) of the photo at hand."""


@dataclass
class Stems:
    """What the frozen first stage makes of the photos of a data set: computed once, shared by all checkpoints on these towers.

    Attributes:
        stems: per photo (width, h, w), bfloat16.
        inner: per photo the (height, width) in pixels that the photo itself covers of the padded input.
    """

    stems: list[Tensor] = field(default_factory=list)
    inner: list[tuple[int, int]] = field(default_factory=list)


def resized(image: Image.Image, long_side: int, patch: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The photo as the predictor shows it to the tower: long side limited, padded right and below to whole patches.

    Returns:
        (H, W, 3) uint8 and the (height, width) that is photo. The padding repeats the last row and column.
    """
    height, width = canvas_size(image.height, image.width, inference={"long_side": long_side}, patch=patch)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0))
    padding = ((0, -height % patch), (0, -width % patch), (0, 0))
    return np.pad(pixels, padding, mode="edge"), (height, width)


def interpolation_matrix(size: int, cells: int, inner: float) -> Tensor:
    """(size, cells) weights of linear interpolation: `size` pixels spread over the first `inner` of `cells` cells.

    The same as bilinear upsampling to the padded input (align_corners=False), cutting the padding off and resizing, in
    one step: two small matrix products instead of two passes over every name's full-size map.
    """
    centre = ((torch.arange(size) + 0.5) * inner / size - 0.5).clamp(0, cells - 1)
    low = centre.floor().long().clamp(max=max(cells - 2, 0))
    share = centre - low
    matrix = torch.zeros(size, cells)
    rows = torch.arange(size)
    matrix[rows, low] = 1 - share
    matrix[rows, (low + 1).clamp(max=cells - 1)] += share
    return matrix


def stems_of(
    dataset: FolderDataset, model: LDVC, *, long_side: int, autocast: Callable, cache_dir: str | None, batch: int = 4
) -> Stems:
    """Stems of a data set, from the cache if they are there."""
    clip, device = model.clip, next(model.parameters()).device
    key = json.dumps([dataset.stems, long_side, weights_digest(clip.visual), 2])
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    path = Path(cache_dir) / f"stems-{dataset.name}-{dataset.split}-{digest}.pt" if cache_dir else None
    if path is not None and path.is_file():
        content = torch.load(path, weights_only=True)
        return Stems(stems=content["stems"], inner=[tuple(size) for size in content["inner"]])
    result = Stems()
    photos = [resized(dataset.image(index), long_side, clip.patch_size) for index in range(len(dataset))]
    result.inner = [inner for _, inner in photos]
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, (pixels, _) in enumerate(photos):
        by_size.setdefault(pixels.shape, []).append(index)
    stems: dict[int, Tensor] = {}
    with torch.inference_mode(), autocast():
        for same in by_size.values():
            for start in range(0, len(same), batch):
                part = same[start : start + batch]
                images = normalise(np.stack([photos[index][0] for index in part]), clip.mean, clip.std).to(device)
                for index, stem in zip(part, model.image_tower.stem(images).to(torch.bfloat16).cpu(), strict=True):
                    stems[index] = stem.clone()
    result.stems = [stems[index] for index in range(len(dataset))]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.new")
        torch.save({"stems": result.stems, "inner": result.inner}, temporary)
        os.replace(temporary, path)
    return result


def decoder_of(model: LDVC, arm: str, names: Sequence[str]) -> Callable[[Tensor], Decode]:
    """A function of a photo's stem (width, h, w) that gives its `Decode`; class embeddings are computed once.

    Args:
        arm: "clip" is plain similarity; anything else is the model's own decoder.
    """
    tokens = model.text_tower.tokenize(list(names))
    if arm == "clip":
        embeddings = model.text_tower(tokens, prompted=False)

        def start(stem: Tensor) -> Decode:
            features = model.image_tower(stem=stem[None], prompted=False)

            def decode(which: Tensor) -> Tensor:
                logits = similarity_logits(
                    features.patch_features, embeddings[which], scale=model.clip.scale, bias=model.clip.bias
                )
                return logits[0].unflatten(-1, features.grid)

            return decode

        return start
    embeddings = model.encode_names(tokens)

    def start(stem: Tensor) -> Decode:
        features = model.encode_image(stem=stem[None])
        return lambda which: model.decode(features, embeddings[which]).mask_logits[0].float()

    return start


@dataclass
class Tally:
    """Counts over the photos of one data set."""

    joint: ConfusionMatrix
    offset: ConfusionMatrix
    present: ConfusionMatrix
    curves: dict[str, ThresholdCurve] = field(
        default_factory=lambda: {way: ThresholdCurve() for way in ("joint", "present", "alone")}
    )


@torch.inference_mode()
def tally_set(
    model: LDVC,
    arm: str,
    dataset: FolderDataset,
    *,
    seen: Callable[[str], bool],
    long_side: int = 448,
    bf16: bool = True,
    cache_dir: str | None = None,
    alone: bool = True,
) -> Tally:
    """Decodes every photo of a data set and counts.

    Args:
        model: its decoder, or only its towers when `arm` is "clip".
        seen: whether a name has been learned; decides which scores the offset lowers.
        long_side: of the photo as the model sees it, pixels.
        bf16: autocast.
        cache_dir: where stems are kept; None computes them anew.
        alone: also decode each present name by itself.
    """
    model.eval()
    device = next(model.parameters()).device

    def autocast() -> torch.autocast:
        return torch.autocast(device_type=device.type, dtype=torch.bfloat16, enabled=bf16)

    names = dataset.names()
    table = torch.from_numpy(Vocabulary([dataset]).tables[0])
    assert len(Vocabulary([dataset])) == len(names), f"{dataset.name} has two classes with the same name"
    lowered = OFFSET * torch.tensor([float(seen(name)) for name in names])[:, None, None]
    tally = Tally(ConfusionMatrix(len(names)), ConfusionMatrix(len(names)), ConfusionMatrix(len(names)))
    stems = stems_of(dataset, model, long_side=long_side, autocast=autocast, cache_dir=cache_dir)
    with autocast():
        start = decoder_of(model, arm, names)
        for index in range(len(dataset)):
            target = table[torch.from_numpy(dataset.mask(index)).int()].long()  # (H, W): name, VOID or BACKGROUND
            present = torch.unique(target[target >= 0])
            if not len(present):
                continue
            decode = start(stems.stems[index].to(device))
            _count_photo(tally, decode, target, present, stems.inner[index], model.clip.patch_size, lowered, alone)
    return tally


def _count_photo(
    tally: Tally,
    decode: Decode,
    target: Tensor,
    present: Tensor,
    inner: tuple[int, int],
    patch: int,
    lowered: Tensor,
    alone: bool,
) -> None:
    height, width = target.shape
    everything = decode(torch.arange(lowered.shape[0]))
    with torch.autocast(device_type="cpu", enabled=False):
        rows = interpolation_matrix(height, everything.shape[-2], inner[0] / patch)
        columns = interpolation_matrix(width, everything.shape[-1], inner[1] / patch)

    def full_size(logits: Tensor) -> Tensor:  # (C, h, w) -> (C, H, W)
        with torch.autocast(device_type="cpu", enabled=False):
            return rows @ (logits.float().cpu() @ columns.T)

    joint = full_size(everything)
    labelled = target >= 0
    # Only labelled pixels are scored, with the names in the last axis: argmax is then several times faster on a CPU.
    pixels = joint[:, labelled].T.contiguous()  # (pixels, C)
    tally.joint.update(target[labelled], pixels.argmax(dim=1))
    tally.offset.update(target[labelled], (pixels.sigmoid() - lowered.flatten()).argmax(dim=1))

    given = full_size(decode(present))  # (P, H, W)
    tally.present.update(target[labelled], present[given[:, labelled].argmax(dim=0)])

    truth = target == present[:, None, None]
    valid = target != -1
    tally.curves["joint"].update(joint[present], truth, valid)
    tally.curves["present"].update(given, truth, valid)
    if alone:
        single = torch.cat([decode(name[None]) for name in present])
        tally.curves["alone"].update(full_size(single), truth, valid)
