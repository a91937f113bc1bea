"""Augmentation: one random view of a photo and its mask, from a generator that the caller seeds.

Only the crop is resampled, not the whole enlarged photo. The mask is read at the stride of the loss: one lookup per loss cell,
at the cell's centre.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

# RGB <-> YIQ, in which a hue shift is a rotation of the two colour axes.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = np.linalg.inv(_YIQ)
_TRIES = 11  # a crop and up to ten others


@dataclass(frozen=True)
class Augmentation:
    """Parameters of a random view."""

    crop: int = 512  # side of the square view, pixels
    long_side: int | None = None  # long side of the photo at scale 1
    short_side: int | None = 512  # or its short side, as in ZegCLIP; exactly one of both is given
    scale: tuple[float, float] = (0.5, 2.0)  # range of the random scale
    aspect: float = 1.0  # largest change of the aspect ratio
    flip: float = 0.5  # probability of a mirror image
    photometric: float = 0.5  # probability of each change of brightness, contrast, saturation and hue
    stride: int = 1  # pixels per label cell
    uniform_scale: bool = False
    """The scale is uniform, as in mmsegmentation, which favours large scales; otherwise its logarithm is."""
    hue: float = 18.0
    """Largest change of hue, degrees. mmsegmentation's `hue_delta=18` counts in OpenCV's units of two degrees: 36."""
    largest_class: float = 1.0
    """Largest share of a crop's labelled pixels that one class may have; otherwise another crop is sampled, up to ten times
    (mmsegmentation's `cat_max_ratio`, 0.75 in ZegCLIP's recipe). 1 = no limit."""
    padding: tuple[int, int, int] | None = None
    """What surrounds a photo that is smaller than the crop. None: grey, on all sides. A colour: the photo lies at the top left,
    the colour to its right and below it, as mmsegmentation pads."""


def colour_change(pixels: np.ndarray, probability: float, generator: np.random.Generator, *, hue: float = 18.0) -> np.ndarray:
    """Randomly changes brightness (+-32), contrast and saturation (x 0.5 to 1.5) and hue (in degrees), each with a probability.

    The strengths are those of mmsegmentation's PhotoMetricDistortion, which ZegCLIP trains with; saturation and hue change in
    YIQ rather than HSV, where they are linear. So all four are one affine map of the pixels, (H, W, 3) uint8.
    """
    lots = generator.random(8)
    active, strength = lots[:4] < probability, lots[4:] * 2 - 1  # strength in -1..1
    if not active.any():
        return pixels
    matrix, offset = np.eye(3), np.zeros(3)
    if active[1]:
        matrix = matrix * (1 + 0.5 * strength[1])
    if active[0]:
        offset += 32 * strength[0]
    if active[2]:
        matrix = _RGB @ np.diag([1.0, 1 + 0.5 * strength[2], 1 + 0.5 * strength[2]]) @ _YIQ @ matrix
    if active[3]:
        angle = math.radians(hue * strength[3])
        rotation = np.array([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
        matrix = _RGB @ rotation @ _YIQ @ matrix
    changed = pixels.astype(np.float32) @ matrix.T.astype(np.float32) + offset.astype(np.float32)
    return np.clip(changed + 0.5, 0, 255).astype(np.uint8)


def _labels(
    mask: np.ndarray, left: float, top: float, zooms: tuple[float, float], augmentation: Augmentation, void: int
) -> np.ndarray:
    """(crop / stride, crop / stride): the class at the centre of each cell of a window, void outside the photo."""
    height, width = mask.shape
    centres = (np.arange(augmentation.crop // augmentation.stride) + 0.5) * augmentation.stride
    columns = np.floor(left + centres / zooms[0]).astype(np.int64)
    rows = np.floor(top + centres / zooms[1]).astype(np.int64)
    labels = mask[np.ix_(rows.clip(0, height - 1), columns.clip(0, width - 1))]
    labels[(rows < 0) | (rows >= height), :] = void
    labels[:, (columns < 0) | (columns >= width)] = void
    return labels


def _is_mixed(labels: np.ndarray, largest: float, void: int) -> bool:
    """Whether there are at least two classes, each with less than the share `largest` of the labelled pixels."""
    counts = np.bincount(labels.ravel(), minlength=256)
    counts[void] = 0
    return np.count_nonzero(counts) > 1 and counts.max() < largest * counts.sum()


def random_view(
    image: Image.Image, mask: np.ndarray, augmentation: Augmentation, generator: np.random.Generator, void: int = 255
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop at a random scale, mirrored and recoloured.

    Args:
        image: RGB photo. mask: (H, W) uint8, its class indices. void: the index of what lies outside the photo.

    Returns:
        pixels (crop, crop, 3) uint8 and labels (crop / stride, crop / stride) uint8.
    """
    width, height = image.size
    assert mask.shape == (height, width), f"mask {mask.shape} does not fit the photo {(height, width)}"
    crop = augmentation.crop
    if augmentation.long_side is not None:
        base = augmentation.long_side / max(width, height)
    else:
        base = augmentation.short_side / min(width, height)
    if augmentation.uniform_scale:
        zoom = base * generator.uniform(*augmentation.scale)
    else:
        zoom = base * math.exp(generator.uniform(*map(math.log, augmentation.scale)))
    stretch = math.exp(0.5 * math.log(augmentation.aspect) * generator.uniform(-1, 1))
    zooms = (zoom * stretch, zoom / stretch)
    for _ in range(_TRIES):
        # The window in photo pixels. If it is larger than the photo, the photo lies somewhere inside it.
        left, top = (
            generator.uniform(min(0.0, size - crop / z) if augmentation.padding is None else 0.0, max(0.0, size - crop / z))
            for size, z in zip((width, height), zooms, strict=True)
        )
        labels = _labels(mask, left, top, zooms, augmentation, void)
        if augmentation.largest_class >= 1 or _is_mixed(labels, augmentation.largest_class, void):
            break

    def inside(start: float, size: int, z: float) -> tuple[float, float, int, int]:
        """Start and end of the photo inside the window along one axis: in pixels of the photo, then of the view."""
        edges = max(0.0, start), min(float(size), start + crop / z)
        first, last = (min(crop, max(0, round((edge - start) * z))) for edge in edges)
        return *edges, first, max(first + 1, last)

    (box_left, box_right, x0, x1), (box_top, box_bottom, y0, y1) = map(inside, (left, top), (width, height), zooms)
    box = (box_left, box_top, box_right, box_bottom)
    part = image.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box)
    part = colour_change(np.asarray(part), augmentation.photometric, generator, hue=augmentation.hue)
    view = np.full((crop, crop, 3), augmentation.padding or 127, dtype=np.uint8)
    view[y0:y1, x0:x1] = part[: crop - y0, : crop - x0]

    if generator.random() < augmentation.flip:
        filled = crop if augmentation.padding is None else x1  # the padding remains on the right
        cells = round(filled / augmentation.stride)
        view[:, :filled] = view[:, :filled][:, ::-1].copy()
        labels[:, :cells] = labels[:, :cells][:, ::-1].copy()
    return view, labels
