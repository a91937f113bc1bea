"""Training views made of several views, so that objects are small and many, as in photos of rooms and streets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import masks_to_boxes

from train.data import SegmentationDataset, Vocabulary

MAX_PASTED = 3  # largest number of objects that are pasted into a view
SHRINK = (0.15, 0.9)  # range of the objects' size relative to the original
FLIPPED = 0.5  # share of the objects that are mirrored
SEAM = 5  # pixels over which the border of a pasted object fades


def mosaics(batch: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Replace a share of each data set's views by mosaics of four of them, if there are four.

    Views of different sets are not mixed, because the sets label different classes.

    `batch`: `images` (B, 3, H, W), `labels` (B, h, w), `set` (B,); H, W, h and w are even.
    """
    images, labels = batch["images"].clone(), batch["labels"].clone()
    small_images, small_labels = F.avg_pool2d(batch["images"], 2), batch["labels"][:, ::2, ::2]
    for number in batch["set"].unique().tolist():
        views = (batch["set"] == number).nonzero()[:, 0].cpu()
        if len(views) < 4:
            continue
        for target in views[torch.rand(len(views)) < share].tolist():
            four = views[torch.randperm(len(views))[:4]]
            for whole, parts in ((images, small_images), (labels, small_labels)):
                rows = [torch.cat(list(pair), dim=-1) for pair in parts[four.to(parts.device)].chunk(2)]
                whole[target] = torch.cat(rows, dim=-2)
    return {"images": images, "labels": labels, "set": batch["set"]}


def objects(datasets: Sequence[SegmentationDataset], vocabulary: Vocabulary) -> Tensor:
    """(names,) bool: the classes that can be cut out and pasted. Data sets with a background label objects, others stuff."""
    with_background = torch.tensor([dataset.background_index is not None for dataset in datasets])
    return vocabulary.annotated[with_background].any(dim=0)


def paste(batch: dict[str, Tensor], share: float, pasteable: Tensor) -> dict[str, Tensor]:
    """Paste shrunk objects of other views into some views (Ghiasi et al., "Simple Copy-Paste", CVPR 2021).

    An object is the region of one class in a view. All classes of the batch are equally likely, so rare ones are seen more
    often. The place is random. The border fades over a few pixels (Dwibedi et al., "Cut, Paste and Learn", ICCV 2017).

    Args:
        batch: as in `mosaics`; H and W are the same multiple of h and w.
        share: probability that objects are pasted into a view, if another view of the batch has one.
        pasteable: (sets, names) bool, the classes that may be pasted into views of each data set.
    """
    images, cells = batch["images"].clone(), batch["labels"].cpu()
    labels = cells.clone()
    scale = images.shape[-1] // cells.shape[-1]
    views_of: dict[int, list[int]] = {}  # class -> views that show it
    for view, shown in enumerate(cells):
        for name in shown.unique().tolist():
            if name >= 0:
                views_of.setdefault(name, []).append(view)
    for target, number in enumerate(batch["set"].tolist()):
        candidates = [name for name in sorted(views_of) if pasteable[number, name] and views_of[name] != [target]]
        if not candidates or torch.rand(()) >= share:
            continue
        for _ in range(1 + _below(MAX_PASTED)):
            name = _one_of(candidates)
            source = _one_of([view for view in views_of[name] if view != target])
            picture, mask = _cut_out(batch["images"][source], cells[source] == name)
            height, width = mask.shape
            y, x = (_below(labels.shape[axis] - side + 1) for axis, side in ((-2, height), (-1, width)))
            labels[target, y : y + height, x : x + width][mask] = name
            alpha = mask[None, None].float().repeat_interleave(scale, -2).repeat_interleave(scale, -1)
            alpha = F.avg_pool2d(alpha, SEAM, stride=1, padding=SEAM // 2)[0].to(images.device)  # (1, H', W')
            place = images[target, :, y * scale : (y + height) * scale, x * scale : (x + width) * scale]
            place.lerp_(picture, alpha)
    return {"images": images, "labels": labels.to(batch["labels"].device), "set": batch["set"]}


def _cut_out(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The box around an object, shrunk and perhaps mirrored: (3, s h', s w') of (3, s h, s w) and (h', w') bool of (h, w)."""
    scale = image.shape[-1] // mask.shape[-1]
    left, top, right, bottom = masks_to_boxes(mask[None])[0].int().tolist()  # inclusive
    picture = image[:, top * scale : (bottom + 1) * scale, left * scale : (right + 1) * scale]
    mask = mask[top : bottom + 1, left : right + 1]
    if torch.rand(()) < FLIPPED:
        picture, mask = picture.flip(-1), mask.flip(-1)
    low, high = SHRINK
    shrink = low * (high / low) ** float(torch.rand(()))
    height, width = (max(1, round(side * shrink)) for side in mask.shape)
    mask = F.interpolate(mask[None, None].float(), size=(height, width), mode="area")[0, 0] >= 0.5
    size = (height * scale, width * scale)
    return F.interpolate(picture[None], size=size, mode="bilinear", antialias=True)[0], mask


def _one_of(choices: Sequence[int]) -> int:
    return choices[_below(len(choices))]


def _below(count: int) -> int:
    return int(torch.randint(count, ()))
