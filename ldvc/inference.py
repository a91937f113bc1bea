"""Inference: resize a picture, cut it into windows, encode them, and upsample and stitch the decoder's maps.

Predictor, evaluation and validation figures all use these functions. The steps in their order: `encode_picture` resizes,
cuts and encodes; `Predictor.segment` runs the decoder; `stitch` and `upsampled_argmax` upsample maps with one value per patch
to the size of the photo. Interpolation is bilinear. It uses element-wise operations only, so that a pixel has the same value
whether a part of the photo or all of it is upsampled.

A position in the *model's input* is given in input pixels: those of the resized picture, before it is cut into windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.towers import ImageFeatures, ImageTower

CHUNK = 1_000_000  # pixels, of all classes together, that are upsampled at once
ROUNDING = 1e-4  # a logit that is lower by more than this is still lower after interpolation in float32
LARGEST = {"long_side": 8192, "short_side": 8192, "window": 8192, "stride": 8192, "enlarge": 64}  # settings, and their limits
SMALL_LONG_SIDE = 14  # patches; smaller pictures are enlarged to this long side


# ---- picture -> windows -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A rectangle of the model's input that the image tower encodes at once, in input pixels."""

    top: int
    left: int
    height: int
    width: int


def require_inference(inference: Any) -> None:
    """Check the settings of `model_input_size` and `sliding_windows`; raises ValueError with the reason."""
    if not isinstance(inference, dict) or not {"long_side", "short_side"} & set(inference):
        raise ValueError(f"'inference' must name 'long_side' or 'short_side', not {inference!r}")
    if ("window" in inference) != ("stride" in inference):
        raise ValueError("'inference' must name 'window' and 'stride' together")
    for key, value in inference.items():
        if key not in LARGEST:
            raise ValueError(f"'inference' has no setting {key!r}, only {', '.join(LARGEST)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LARGEST[key]:
            raise ValueError(f"'{key}' of 'inference' must be a positive number up to {LARGEST[key]}, not {value!r}")
    if inference.get("stride", 0) > inference.get("window", 0):
        raise ValueError(
            f"a stride of {inference['stride']} leaves gaps between windows of {inference['window']} pixels; "
            "'stride' of 'inference' must not be larger than 'window'"
        )


def model_input_size(height: int, width: int, *, inference: dict[str, Any], patch: int) -> tuple[int, int]:
    """(height, width) of the model's input for a picture, in pixels before padding.

    `inference` holds `long_side` or `short_side` (the whole picture at once), or `short_side`, `window` and `stride`
    (sliding window). A picture is enlarged at most by the factor `enlarge` of `inference` (2 if absent), or to a long side of
    `SMALL_LONG_SIDE` patches if that is more. No side is shorter than a patch, which may change the aspect of thin strips.
    """
    longest, short_side = max(height, width), inference.get("short_side")
    if "long_side" in inference:
        scale = inference["long_side"] / longest
    else:  # at most four windows long, which limits the number of windows of a panorama
        scale = min(short_side / min(height, width), 4 * inference.get("window", short_side) / longest)
    scale = min(scale, max(inference.get("enlarge", 2.0), SMALL_LONG_SIDE * patch / longest))
    return max(patch, round(height * scale)), max(patch, round(width * scale))


def sliding_windows(height: int, width: int, *, inference: dict[str, Any]) -> list[Window]:
    """Windows that cover a model's input; a single one if `inference` has no `window`.

    The last window of a row or column is moved back inside the input, as in the evaluation protocol of ZegCLIP.
    """
    if "window" not in inference:
        return [Window(0, 0, height, width)]

    window, stride = inference["window"], inference["stride"]

    def starts(length: int) -> list[int]:
        last = max(0, length - window)
        return [min(step * stride, last) for step in range(-(-last // stride) + 1)]

    size = min(window, height), min(window, width)
    return [Window(top, left, *size) for top in starts(height) for left in starts(width)]


def cut_windows(
    image: Image.Image, *, inference: dict[str, Any], patch: int
) -> tuple[tuple[int, int], list[Window], np.ndarray]:
    """Resize an RGB picture to the model's input, cut it into windows and pad these to whole patches.

    Padding repeats the last row and column, so that convolutions see no artificial edge.

    Returns:
        (height, width) of the model's input, n windows of equal size, and their pixels (n, h, w, 3) uint8.
    """
    size = model_input_size(image.height, image.width, inference=inference, patch=patch)
    windows = sliding_windows(*size, inference=inference)
    resized = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=3.0))
    padding = ((0, -windows[0].height % patch), (0, -windows[0].width % patch), (0, 0))
    crops = [resized[w.top : w.top + w.height, w.left : w.left + w.width] for w in windows]
    return size, windows, np.stack([np.pad(crop, padding, mode="edge") for crop in crops])


# ---- windows -> features ------------------------------------------------------------------------------------------------


def normalise(pixels: np.ndarray | Tensor, clip: FrozenClip) -> Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32, normalised with the mean and deviation of the CLIP."""
    values = torch.as_tensor(pixels).movedim(-1, -3).float() / 255
    return (values - torch.tensor(clip.mean)[:, None, None]) / torch.tensor(clip.std)[:, None, None]


@dataclass
class ImageState:
    """The encoding of one photo. It is small and on the CPU, so that a server can keep one for each user.

    Predictors with the same `encoder_id` may share this state: they have the same frozen towers, input size, mean and
    deviation. `features` (by decoder) and `others` (by `encoder_id`) are computed at first use.
    """

    picture: np.ndarray  # uint8 (H, W, 3)
    input_size: tuple[int, int]  # (height, width) of the model's input, without padding
    windows: list[Window]
    encoder_id: str
    patch_tokens: list[Tensor]  # for each window, the frozen patch embedding (1, width, h, w)
    features: dict[str, list[ImageFeatures]] = field(default_factory=dict)  # for each window; prompts differ by decoder
    others: dict[str, ImageState] = field(default_factory=dict)  # the same photo, encoded by other towers or at other sizes


def encode_picture(
    picture: np.ndarray, tower: ImageTower, *, inference: dict[str, Any], encoder_id: str, prompted: bool = True
) -> ImageState:
    """Resize a picture, uint8 (H, W, 3), cut it into windows and compute the patch embedding, which all decoders share.

    `inference`: see `model_input_size`; `encoder_id`: see `ImageState`; `prompted`: see `ImageTower.embed_patches`.
    """
    clip, patch_tokens = tower.clip, []
    input_size, windows, crops = cut_windows(Image.fromarray(picture), inference=inference, patch=clip.patch_size)
    for crop in crops:
        pixels = normalise(crop[None], clip).to(clip.model.logit_scale.device)  # (1, 3, H, W)
        patch_tokens.append(tower.embed_patches(pixels, prompted=prompted).float().cpu())
    return ImageState(picture, input_size, windows, encoder_id, patch_tokens)


# ---- patches -> pixels --------------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """Linear interpolation along one axis, from the patches of a window to n pixels of the photo; tensors are (n,)."""

    lower: Tensor  # int64, the patch before each pixel
    upper: Tensor  # int64, the patch after it
    weight: Tensor  # float32, weight of the patch after
    position: Tensor  # positions of the pixels, in input pixels

    def part(self, pixels: slice) -> Axis:
        """The interpolation for a slice of the pixels."""
        return Axis(*(each[pixels] for each in self))


def axes(
    size: tuple[int, int], window: Window, cells: Sequence[int], *, input_size: tuple[int, int], patch: int
) -> tuple[Axis, Axis]:
    """Rows and columns for `upsample`.

    In input pixels, the centre of output pixel i is (i + 0.5) * input_size / size, and that of patch j of the window is
    start + (j + 0.5) * patch. Pixels beyond the first or last patch have its value.

    Args:
        size: (height, width) of the output in pixels; they span the model's input.
        window, cells: the window in the model's input, and its size (h, w) in patches.
        input_size, patch: (height, width) of the model's input, and of a patch, in input pixels.
    """
    pair = []
    for length, side, start, count in zip(size, input_size, (window.top, window.left), cells, strict=True):
        position = (torch.arange(length, dtype=torch.float32) + 0.5) * (side / length)
        coordinate = ((position - start) / patch - 0.5).clamp(0, count - 1)
        lower = coordinate.floor().clamp(max=max(count - 2, 0))
        pair.append(Axis(lower.long(), (lower + 1).clamp(max=count - 1).long(), coordinate - lower, position))
    return pair[0], pair[1]


def upsample(maps: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """(C, h, w) -> (C, len(rows), len(columns)), bilinear."""
    row_weight, column_weight = rows.weight[:, None].to(maps.dtype), columns.weight.to(maps.dtype)
    narrow = maps[:, rows.lower] * (1 - row_weight) + maps[:, rows.upper] * row_weight  # (C, H, w)
    return narrow[:, :, columns.lower] * (1 - column_weight) + narrow[:, :, columns.upper] * column_weight


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
    """Upsample the maps of all windows and average them where windows overlap.

    Args:
        maps: (C, h, w) for each window, one value per patch.
        windows: the window of each map, in the model's input.
        size: (height, width) of the result in pixels (or patches).
        input_size, patch: see `axes`.
        after: function that is applied to each upsampled map, in float64, before averaging.
        grid: `size` spans complete patches, padding included.

    Returns:
        (C, height, width).
    """
    span = tuple(-(-side // patch) * patch for side in input_size) if grid else input_size

    if len(maps) == 1:
        upsampled = upsample(maps[0], *axes(size, windows[0], maps[0].shape[1:], input_size=span, patch=patch))
        return upsampled if after is None else after(upsampled.double())
    total = torch.zeros(maps[0].shape[0], *size, dtype=maps[0].dtype if after is None else torch.float64)
    count = torch.zeros(size)
    for window, values in zip(windows, maps, strict=True):
        rows, columns = axes(size, window, values.shape[1:], input_size=span, patch=patch)
        # With `grid`, pixels in the padding belong to the windows at the border.
        at_rows, at_columns = rows.position.clamp(max=input_size[0] - 0.5), columns.position.clamp(max=input_size[1] - 0.5)
        inside_rows = ((at_rows >= window.top) & (at_rows < window.top + window.height)).nonzero().flatten()
        inside_columns = ((at_columns >= window.left) & (at_columns < window.left + window.width)).nonzero().flatten()
        if not len(inside_rows) or not len(inside_columns):  # no pixel of a coarse result is in this window
            continue
        box = (slice(int(inside_rows[0]), int(inside_rows[-1]) + 1), slice(int(inside_columns[0]), int(inside_columns[-1]) + 1))
        part = upsample(values, rows.part(box[0]), columns.part(box[1]))
        total[:, box[0], box[1]] += part if after is None else after(part.double())
        count[box] += 1
    return total / count


class Squares(NamedTuple):
    """The n pixels of an axis, grouped by the patch before them."""

    weights: Tensor  # (patches, m), weights of the next patch; m = most pixels of a patch; shorter rows end with 0
    places: Tensor  # (n,), indices of the pixels in the flattened weights


def _by_square(axis: Axis, patches: int) -> Squares:
    pixels = torch.bincount(axis.lower, minlength=patches)
    rank = torch.arange(len(axis.lower)) - (pixels.cumsum(dim=0) - pixels)[axis.lower]
    weights = torch.zeros(patches, int(pixels.max()))
    weights[axis.lower, rank] = axis.weight
    return Squares(weights, axis.lower * weights.shape[1] + rank)


def upsampled_argmax(
    logits: Tensor, size: tuple[int, int], *, input_size: tuple[int, int], window: Window, patch: int
) -> tuple[Tensor, Tensor]:
    """Maximum and argmax over classes of the upsampled maps, without upsampling all of them.

    The value of a pixel is a weighted mean of four patches. A class cannot be the best between four patches if another class
    is higher at all of them. Only the remaining classes are upsampled, so 200 names take little more time than the names that
    are in the photo.

    Args:
        logits: (C, h, w), one value per patch.
        size: (height, width) in pixels; they span the model's input.
        input_size, window, patch: see `axes`.

    Returns:
        (height, width) maxima, and (height, width) class indices; of equal classes the first.
    """
    height, width = logits.shape[1:]
    padded = F.pad(logits[None], (0, 1, 0, 1), mode="replicate")[0]
    # the corners of the square to the right of and below each patch: (4, C, h, w), and the best class of each, (4, h, w)
    shifts = [(..., slice(y, y + height), slice(x, x + width)) for y in (0, 1) for x in (0, 1)]
    corners, winners = (torch.stack([each[shift] for shift in shifts]) for each in (padded, padded.argmax(dim=0)))
    is_candidate = torch.ones_like(logits, dtype=torch.bool)
    for winner in winners:
        rival = corners.gather(1, winner.expand(4, 1, -1, -1))
        is_candidate &= ~((corners - rival).amax(dim=0) < -ROUNDING)
    counts = is_candidate.sum(dim=0)
    y, x, names = is_candidate.permute(1, 2, 0).nonzero(as_tuple=True)  # (n,), square by square
    values, names = corners[:, names, y, x, None], names.int()  # (4, n, 1), (n,)

    rows, columns = axes(size, window, logits.shape[1:], input_size=input_size, patch=patch)
    row_squares, column_squares = _by_square(rows, height), _by_square(columns, width)
    best, labels = torch.empty(size), torch.empty(size, dtype=torch.int64)
    step = max(1, CHUNK // (width * row_squares.weights[0].numel() * column_squares.weights[0].numel()))
    edges = torch.searchsorted(rows.lower, torch.arange(0, height + step, step)).tolist()
    for top, start, end in zip(range(0, height, step), edges[:-1], edges[1:], strict=True):  # rows of squares, pixels
        candidates = counts[top : top + step].flatten()
        first = int(counts[:top].sum()) + candidates.cumsum(dim=0) - candidates
        for rank in range(int(candidates.max())):  # the first class of each square, then the others
            square = (candidates > rank).nonzero().flatten()
            chosen = first[square] + rank
            lower, right = row_squares.weights[top + square // width], column_squares.weights[square % width, None]
            top_left, top_right, bottom_left, bottom_right = values[:, chosen]  # (squares, 1) each
            at_left = top_left * (1 - lower) + bottom_left * lower
            at_right = top_right * (1 - lower) + bottom_right * lower
            score = at_left[..., None] * (1 - right) + at_right[..., None] * right  # (squares, rows, columns)
            name = names[chosen, None, None].expand_as(score)
            if rank == 0:
                part = [score, name.clone()]
                continue
            higher = score > part[0][square]
            for former, new in zip(part, (score, name), strict=True):
                former[square] = torch.where(higher, new, former[square])
        for output, squares in zip((best, labels), part, strict=True):
            pixels = rearrange(squares, "(h w) y x -> (h y) (w x)", w=width)
            places = row_squares.places[start:end] - top * row_squares.weights.shape[1]
            output[start:end] = pixels.index_select(0, places).index_select(1, column_squares.places)
    return best, labels
