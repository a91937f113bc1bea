"""Views made of several views, so that things are small and many, as in photos of rooms and streets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import masks_to_boxes

from train.data import SegmentationDataset, Vocabulary

SMALL = 2  # how much smaller a view is within a mosaic
PASTED = 3  # things, at most, that are pasted into a view
SHRINK = (0.15, 0.9)  # how large they then are, over how large they were
FLIPPED = 0.5  # share of them that is mirrored
SEAM = 5  # pixels over which the border of a thing fades


def mosaics(batch: dict[str, Tensor], share: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Replaces a share of the views by mosaics of four views of the same data set, since sets differ in what they label.

    Args:
        batch: `images` (B, 3, H, W), `labels` (B, h, w), `set` (B,); H, W, h and w are even.
        share: of each set's views; a set with fewer than four in the batch gets none.
    """
    images, labels = batch["images"].clone(), batch["labels"].clone()
    small_images = F.avg_pool2d(batch["images"], SMALL)
    small_labels = batch["labels"][:, ::SMALL, ::SMALL]
    for number in batch["set"].unique().tolist():
        here = (batch["set"] == number).nonzero()[:, 0].cpu()
        if len(here) < SMALL**2:
            continue
        for target in here[torch.rand(len(here), generator=generator) < share].tolist():
            four = here[torch.randperm(len(here), generator=generator)[: SMALL**2]]
            for whole, parts in ((images, small_images), (labels, small_labels)):
                rows = [torch.cat(list(pair), dim=-1) for pair in parts[four.to(parts.device)].chunk(SMALL)]
                whole[target] = torch.cat(rows, dim=-2)
    return {"images": images, "labels": labels, "set": batch["set"]}


def things(datasets: Sequence[SegmentationDataset], vocabulary: Vocabulary) -> Tensor:
    """(names,) bool: what can be cut out and put elsewhere. A data set with a background labels such things, others stuff."""
    of_things = torch.tensor([dataset.background_index is not None for dataset in datasets])
    return vocabulary.known[of_things].any(dim=0)


def paste(batch: dict[str, Tensor], share: float, known: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Pastes things of other views, smaller, into a share of the views (Ghiasi et al., "Simple Copy-Paste", 2021).

    A thing is what a view shows of one class. All classes of the batch are equally likely, so rare ones are seen more often. It
    goes where chance puts it, whole, and hides what was there. Its border fades over a few pixels, so that the seam says little
    (Dwibedi et al., "Cut, Paste and Learn", 2017).

    Args:
        batch: as in `mosaics`; H and W are the same multiple of h and w.
        share: of the views for whose data set another view of the batch has something.
        known: (sets, names) bool, what may be pasted into views of a data set: things that it labels.
    """
    images, cells = batch["images"].clone(), batch["labels"].cpu()
    labels = cells.clone()
    scale = images.shape[-1] // cells.shape[-1]
    shown: dict[int, list[int]] = {}  # name -> views
    for view, shows in enumerate(cells):
        for name in shows.unique().tolist():
            if name >= 0:
                shown.setdefault(name, []).append(view)
    for target, number in enumerate(batch["set"].tolist()):
        able = [name for name in sorted(shown) if known[number, name] and shown[name] != [target]]
        if not able or torch.rand((), generator=generator) >= share:
            continue
        for _ in range(1 + _below(PASTED, generator)):
            name = _one_of(able, generator)
            source = _one_of([view for view in shown[name] if view != target], generator)
            picture, thing = _cut_out(batch["images"][source], cells[source] == name, generator)
            height, width = thing.shape
            y, x = (_below(labels.shape[axis] - side + 1, generator) for axis, side in ((-2, height), (-1, width)))
            labels[target, y : y + height, x : x + width][thing] = name
            alpha = thing[None, None].float().repeat_interleave(scale, -2).repeat_interleave(scale, -1)
            alpha = F.avg_pool2d(alpha, SEAM, stride=1, padding=SEAM // 2)[0].to(images.device)  # (1, H', W')
            place = images[target, :, y * scale : (y + height) * scale, x * scale : (x + width) * scale]
            place.lerp_(picture, alpha)
    return {"images": images, "labels": labels.to(batch["labels"].device), "set": batch["set"]}


def _cut_out(image: Tensor, thing: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The box around a thing, shrunk and maybe mirrored: (3, s h', s w') of (3, H, W) and (h', w') bool of (h, w)."""
    scale = image.shape[-1] // thing.shape[-1]
    left, top, last_column, last_row = masks_to_boxes(thing[None])[0].int().tolist()
    right, bottom = last_column + 1, last_row + 1
    picture, thing = image[:, top * scale : bottom * scale, left * scale : right * scale], thing[top:bottom, left:right]
    if torch.rand((), generator=generator) < FLIPPED:
        picture, thing = picture.flip(-1), thing.flip(-1)
    low, high = SHRINK
    shrink = low * (high / low) ** float(torch.rand((), generator=generator))
    height, width = (max(1, round(side * shrink)) for side in thing.shape)
    thing = F.interpolate(thing[None, None].float(), size=(height, width), mode="area")[0, 0] >= 0.5
    size = (height * scale, width * scale)
    return F.interpolate(picture[None], size=size, mode="bilinear", antialias=True)[0], thing


def _one_of(choices: Sequence[int], generator: torch.Generator) -> int:
    return choices[_below(len(choices), generator)]


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
