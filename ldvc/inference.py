"""From a picture to scores and labels at photo size: the one path of predictor, evaluation and validation figures.

The steps, in their order: resize the picture, cut it into windows, encode them (`encode_picture`), decode
(`Predictor.segment`), then upsample and stitch what has one value per patch (`stitch`, `upsampled_argmax`). Interpolation
is bilinear and is written in element-wise operations, so that a pixel gets the same value whether a part or the whole photo
is upsampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.towers import ImageFeatures, ImageTower

ROUNDING = 1e-4  # a logit that is lower by more stays lower in float32, interpolated
SMALL_LONG_SIDE = 14  # patches; smaller pictures are enlarged to this long side, others to at most twice their size


# ---- picture -> windows -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A rectangle of the input_size that the image tower sees at once; all numbers in input_size pixels."""

    top: int
    left: int
    height: int
    width: int


def require_inference(inference: Any) -> None:
    """Raises ValueError, with the reason, for settings that `model_input_size` and `sliding_windows` cannot use."""
    if not isinstance(inference, dict) or not {"long_side", "short_side"} & set(inference):
        raise ValueError(f"'inference' must name 'long_side' or 'short_side', not {inference!r}")
    if ("window" in inference) != ("stride" in inference):
        raise ValueError("'inference' must name 'window' and 'stride' together")
    for key, value in inference.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"'{key}' of 'inference' must be a positive number, not {value!r}")
    if inference.get("stride", 0) > inference.get("window", 0):
        raise ValueError(
            f"a stride of {inference['stride']} leaves gaps between windows of {inference['window']} pixels; "
            "'stride' of 'inference' must not be larger than 'window'"
        )


def model_input_size(height: int, width: int, *, inference: dict[str, Any], patch: int) -> tuple[int, int]:
    """Size at which a picture is shown to the tower, before padding.

    `inference` holds `long_side` or `short_side` (the whole picture at once), or `short_side`, `window` and `stride`
    (sliding window). Small pictures are enlarged at most twice (`enlarge`, if `inference` holds it), or up to
    `SMALL_LONG_SIDE` patches. No side is shorter than one patch: only then (a strip of few pixels) is the aspect changed.

    Returns:
        (height, width) of the input_size in pixels.
    """
    longest, shortest = max(height, width), min(height, width)
    if "long_side" in inference:
        scale = inference["long_side"] / longest
    else:
        scale = inference["short_side"] / shortest
        longest_allowed = 4 * inference.get("window", inference["short_side"])
        scale = min(scale, longest_allowed / longest)  # a panorama would need windows without end
    scale = min(scale, max(inference.get("enlarge", 2.0), SMALL_LONG_SIDE * patch / longest))
    return max(patch, round(height * scale)), max(patch, round(width * scale))


def sliding_windows(height: int, width: int, *, inference: dict[str, Any]) -> list[Window]:
    """Windows that cover a input_size; one that covers it all when `inference` names no window.

    As in the evaluation protocol of ZegCLIP, the last window of a row or column is moved back inside the input_size.
    """
    if "window" not in inference:
        return [Window(0, 0, height, width)]

    def starts(length: int) -> list[int]:
        window, stride = inference["window"], inference["stride"]
        steps = max(0, -(-(length - window) // stride))
        return [min(step * stride, max(0, length - window)) for step in range(steps + 1)]

    window = inference["window"]
    return [
        Window(top, left, min(window, height), min(window, width)) for top in starts(height) for left in starts(width)
    ]


def cut_windows(
    image: Image.Image, *, inference: dict[str, Any], patch: int
) -> tuple[tuple[int, int], list[Window], np.ndarray]:
    """The picture as the image tower sees it: resized to its input_size, cut into windows, padded to whole patches.

    Args:
        image: RGB.
        inference: see `model_input_size`.
        patch: pixels per patch side.

    Returns:
        The input size (height, width), the W windows (all of one size), and their pixels (W, H, W', 3) uint8. Padding
        repeats the last row and column, so that convolutions see no artificial edge.
    """
    size = model_input_size(image.height, image.width, inference=inference, patch=patch)
    windows = sliding_windows(*size, inference=inference)
    shown = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=3.0))
    padding = ((0, -windows[0].height % patch), (0, -windows[0].width % patch), (0, 0))
    crops = [shown[w.top : w.top + w.height, w.left : w.left + w.width] for w in windows]
    return size, windows, np.stack([np.pad(crop, padding, mode="edge") for crop in crops])


# ---- windows -> features ------------------------------------------------------------------------------------------------


def normalise(pixels: np.ndarray | Tensor, clip: FrozenClip) -> Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32, with the mean and deviation that the CLIP was trained with."""
    values = torch.as_tensor(pixels).movedim(-1, -3).float() / 255
    return (values - torch.tensor(clip.mean)[:, None, None]) / torch.tensor(clip.std)[:, None, None]


@dataclass
class ImageState:
    """What is kept of one photo: small enough to be kept for each visitor, on the CPU so that it can be handed around.

    Attributes:
        picture: uint8 (H, W, 3).
        input_size: (height, width) at which the tower saw it, without padding.
        windows: what the tower saw at once.
        encoder_id: predictors of one encoder_id share their frozen towers and may share this state.
        patch_tokens: the frozen patch embedding of each window, (1, width, h, w).
        features: by decoder, the image features of each window (prompts differ between decoders); filled when first asked for.
    """

    picture: np.ndarray
    input_size: tuple[int, int]
    windows: list[Window]
    encoder_id: str
    patch_tokens: list[Tensor]
    features: dict[str, list[ImageFeatures]] = field(default_factory=dict)


def encode_picture(
    picture: np.ndarray, tower: ImageTower, *, inference: dict[str, Any], encoder_id: str
) -> ImageState:
    """Resize a picture, cut it into windows and compute their patch embedding, the part that all decoders share.

    Args:
        picture: uint8 (H, W, 3).
        tower: around the frozen CLIP.
        inference: see `model_input_size`.
        encoder_id: see `ImageState`.
    """
    clip = tower.clip
    device = clip.model.logit_scale.device
    input_size, windows, crops = cut_windows(Image.fromarray(picture), inference=inference, patch=clip.patch_size)
    patch_tokens = []
    for crop in crops:
        pixels = normalise(crop[None], clip).to(device)  # (1, 3, H, W)
        patch_tokens.append(tower.embed_patches(pixels).float().cpu())
    return ImageState(picture=picture, input_size=input_size, windows=windows, encoder_id=encoder_id, patch_tokens=patch_tokens)


# ---- patches -> pixels --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """Linear interpolation along one axis, from the patches of a window to pixels of the photo.

    Attributes:
        lower, upper: (n,) int64, the two patches around each pixel.
        weight: (n,) float32 of the upper one.
        position: (n,) where the pixels lie on the input_size.
    """

    lower: Tensor
    upper: Tensor
    weight: Tensor
    position: Tensor

    @classmethod
    def of(cls, length: int, *, input_size: int, start: int, cells: int, patch: int) -> Axis:
        """In pixels of the model's input, pixel i lies at (i + 0.5) * input_size / length and patch j of the window at
        start + (j + 0.5) * patch. Beyond the first and last patch the nearest value holds.

        Args:
            length: pixels along this axis of the output, which span the input_size.
            input_size: its length in input_size pixels.
            start: first input_size pixel of the window.
            cells: patches of the window along this axis.
            patch: input_size pixels per patch.
        """
        position = (torch.arange(length, dtype=torch.float32) + 0.5) * (input_size / length)
        coordinate = ((position - start) / patch - 0.5).clamp(0, cells - 1)
        lower = coordinate.floor().clamp(max=max(cells - 2, 0))
        upper = (lower + 1).clamp(max=cells - 1)
        return cls(lower.long(), upper.long(), coordinate - lower, position)

    def part(self, pixels: slice) -> Axis:
        """The same for some of the pixels."""
        return Axis(self.lower[pixels], self.upper[pixels], self.weight[pixels], self.position[pixels])


def upsample(maps: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """(C, h, w) -> (C, len(rows), len(columns)), bilinear."""
    down, along = rows.weight[:, None].to(maps.dtype), columns.weight.to(maps.dtype)
    narrow = maps[:, rows.lower] * (1 - down) + maps[:, rows.upper] * down  # (C, H, w)
    return narrow[:, :, columns.lower] * (1 - along) + narrow[:, :, columns.upper] * along


def stitch(
    maps: Sequence[Tensor],
    windows: Sequence[Window],
    size: tuple[int, int],
    *,
    input_size: tuple[int, int],
    patch: int,
    after: Callable[[Tensor], Tensor] | None = None,
    grid: bool = False,
) -> Tensor:
    """Maps on the patches of each window (C, h, w) -> one map of the whole photo (C, height, width).

    Args:
        maps: one for each window.
        windows: where they are on the input_size.
        size: pixels (or patches) of the result.
        input_size: (height, width) of the input_size in its pixels.
        patch: input_size pixels per patch.
        after: applied to each upsampled map, in float64, before overlapping windows are averaged.
        grid: `size` spans whole patches, padding included.
    """
    whole = tuple(-(-side // patch) * patch for side in input_size) if grid else input_size

    def axis(which: int, window: Window, cells: int) -> Axis:
        start = (window.top, window.left)[which]
        return Axis.of(size[which], input_size=whole[which], start=start, cells=cells, patch=patch)

    if len(maps) == 1:
        upsampled = upsample(maps[0], *(axis(which, windows[0], maps[0].shape[1 + which]) for which in (0, 1)))
        return upsampled if after is None else after(upsampled.double())
    total = torch.zeros(maps[0].shape[0], *size, dtype=maps[0].dtype if after is None else torch.float64)
    count = torch.zeros(size)
    for window, values in zip(windows, maps, strict=True):
        rows, columns = (axis(which, window, values.shape[1 + which]) for which in (0, 1))
        # Pixels beyond the input_size (padding, where `grid`) belong to the windows at the border.
        at_rows, at_columns = rows.position.clamp(max=input_size[0] - 0.5), columns.position.clamp(max=input_size[1] - 0.5)
        down = ((at_rows >= window.top) & (at_rows < window.top + window.height)).nonzero().flatten()
        along = ((at_columns >= window.left) & (at_columns < window.left + window.width)).nonzero().flatten()
        if not len(down) or not len(along):  # the result is coarser than the windows
            continue
        box = (slice(int(down[0]), int(down[-1]) + 1), slice(int(along[0]), int(along[-1]) + 1))
        part = upsample(values, rows.part(box[0]), columns.part(box[1]))
        total[:, box[0], box[1]] += part if after is None else after(part.double())
        count[box] += 1
    return total / count


def upsampled_argmax(
    logits: Tensor, size: tuple[int, int], *, input_size: tuple[int, int], window: Window, patch: int
) -> tuple[Tensor, Tensor]:
    """The highest of all upsampled maps at each pixel, and whose it is, without upsampling every map everywhere.

    A pixel's value is a weighted mean of four patches'. Between them a name is nowhere best if another one is higher at all
    four, so that a list of 200 names costs little more than what is in the photo.

    Args:
        logits: (C, h, w), one value per patch.
        size: (height, width) in pixels; they span the input_size.
        input_size, window, patch: as of `Axis.of`, for both axes.

    Returns:
        (height, width) values, and (height, width) indices into C; the first of equal ones.
    """
    padded = F.pad(logits[None], (0, 1, 0, 1), mode="replicate")[0]
    height, width = logits.shape[1:]
    # (4, C, h, w): the corners of the square to the right of and below each patch
    corners = torch.stack([padded[:, y : y + height, x : x + width] for y in (0, 1) for x in (0, 1)])
    dominated = torch.zeros_like(logits, dtype=torch.bool)
    for winner in corners.argmax(dim=1):  # (h, w), of each corner
        rival = corners.gather(1, winner.expand(4, 1, -1, -1))
        dominated |= (corners < rival - ROUNDING).all(dim=0)
    counts, (name, y, x) = (~dominated).sum(dim=0), (~dominated).nonzero(as_tuple=True)
    place = ((~dominated).cumsum(dim=0) - 1)[name, y, x]  # among the names that are left of its square
    names = torch.zeros(int(counts.max()), height, width, dtype=torch.int64)
    names[place, y, x] = name
    values = corners.gather(1, names.expand(4, -1, -1, -1))

    rows, columns = (
        Axis.of(size[which], input_size=input_size[which], start=start, cells=logits.shape[1 + which], patch=patch)
        for which, start in enumerate((window.top, window.left))
    )
    best = torch.empty(size)
    labels = torch.empty(size, dtype=torch.int64)
    first, last = int(rows.lower[0]), int(rows.lower[-1])
    edges = torch.searchsorted(rows.lower, torch.arange(first, last + 2)).tolist()
    for row, start, end in zip(range(first, last + 1), edges[:-1], edges[1:], strict=True):
        down = rows.weight[start:end, None]
        up = 1 - down
        for rank in range(int(counts[row].max())):  # the first name of each square, then the others where there are any
            top_left, top_right, bottom_left, bottom_right = values[:, rank, row]
            left, right = top_left * up + bottom_left * down, top_right * up + bottom_right * down
            contested = (counts[row] > rank)[columns.lower].nonzero().flatten()
            square, along = columns.lower[contested], columns.weight[contested]
            score = left[:, square] * (1 - along) + right[:, square] * along
            if rank == 0:
                best[start:end], labels[start:end] = score, names[rank, row, square]
                continue
            former = best[start:end, contested]
            higher = score > former
            best[start:end, contested] = torch.where(higher, score, former)
            labels[start:end, contested] = torch.where(
                higher, names[rank, row, square], labels[start:end, contested]
            )
    return best, labels
