"""Drawing: overlays, heat maps, and colours that people with any colour vision can tell apart.

All heat maps use one fixed colour scale from 0 to 1, whose lightness grows.
"""

import colorsys
import hashlib
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

# A qualitative palette: strong hues that also differ in lightness.
PALETTE = [
    "#e69f00", "#56b4e9", "#00a878", "#f0e442", "#4477dd", "#e8590c", "#cc79a7", "#8b5cf6", "#b5e853", "#00b8b0",
    "#ff8fab", "#a8703c", "#c9b1ff", "#7f9a2e", "#ff6f61", "#dcc48e", "#20c9ff", "#c2338f",
]  # fmt: skip

# Salt of the hash that chooses colours. With this value, grass and trees are green, sky and water are blue.
HASH_SALT = 397933

# The heat scale, from dark violet over red to pale yellow; linear interpolation between these colours.
HEAT_STOPS = ["#0d0829", "#3b0f62", "#6d1d70", "#a02a64", "#d14545", "#f0722c", "#fca524", "#f7d95c", "#fcfdc9"]

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009),
# severity 1, for linear RGB: vision without M cones and without L cones.
DEUTERANOPIA = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]])
PROTANOPIA = np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]])

NONE_COLOUR = "#8a8a8a"
OPACITY = 0.55  # opacity of classes over the photo
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")
LETTERS = 1 / 52  # size of written names, as share of the photo's long side
PART = 5  # see `place_for`


# ---- colours ----------------------------------------------------------------------------------------------------------


def rgb(colour: str) -> tuple[int, int, int]:
    """"#rrggbb" -> (r, g, b)."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _hex(colour: np.ndarray) -> str:
    return "#{:02x}{:02x}{:02x}".format(*(int(round(value)) for value in colour))


def _linear_to_oklab(linear: np.ndarray) -> np.ndarray:
    """Linear RGB (n, 3) -> Oklab (n, 3), in which distance is close to perceived difference (Ottosson, 2020)."""
    cones = linear @ np.array(
        [[0.4122214708, 0.2119034982, 0.0883024619], [0.5363325363, 0.6806995451, 0.2817188376],
         [0.0514459929, 0.1073969566, 0.6299787005]]
    )  # fmt: skip
    return np.cbrt(np.clip(cones, 0, None)) @ np.array(
        [[0.2104542553, 1.9779984951, 0.0259040371], [0.7936177850, -2.4285922050, 0.7827717662],
         [-0.0040720468, 0.4505937099, -0.8086757660]]
    )  # fmt: skip


def perceived(colours: np.ndarray) -> np.ndarray:
    """sRGB in 0..255 (n, 3) -> (3, n, 3): Oklab for usual, deuteranope and protanope vision."""
    values = np.asarray(colours, dtype=np.float64) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    views = (linear, linear @ DEUTERANOPIA.T, linear @ PROTANOPIA.T)
    return np.stack([_linear_to_oklab(np.clip(view, 0, 1)) for view in views])


# (n, 3): the palette, then 256 colours whose hues differ by the golden angle, at three lightnesses
_EXTRA = [colorsys.hls_to_rgb((0.11 + i * 0.61803398875) % 1, (0.42, 0.62, 0.78)[i % 3], 0.68) for i in range(256)]
_CANDIDATES = np.array([*map(rgb, PALETTE), *(np.array(_EXTRA) * 255)])
_CANDIDATES_SEEN_AS = perceived(_CANDIDATES)
_DISTINCT = 0.09  # distance in Oklab at which two large areas are easy to distinguish


def colours_for(names: Sequence[str]) -> list[str]:
    """One colour "#rrggbb" for each name; up to 200 are all different.

    A hash chooses from the palette, so that a name has the same colour in all pictures. If this colour is too close to that
    of an earlier name (for usual vision or the two common kinds of colour blindness), the name gets the next distinct one.
    """
    chosen: list[int] = []
    nearest = np.full(len(_CANDIDATES), np.inf)  # distance of each candidate to the closest chosen colour
    for name in names:
        digest = hashlib.sha256(f"{HASH_SALT}:{name.casefold()}".encode()).digest()
        start = int.from_bytes(digest[:4], "big") % len(PALETTE)
        order = [*range(start, len(PALETTE)), *range(start), *range(len(PALETTE), len(_CANDIDATES))]
        index = next((i for i in order if nearest[i] >= _DISTINCT), int(nearest.argmax()))
        chosen.append(index)
        distance = np.linalg.norm(_CANDIDATES_SEEN_AS - _CANDIDATES_SEEN_AS[:, index : index + 1], axis=2).min(axis=0)
        nearest = np.minimum(nearest, distance)
        nearest[index] = -1.0
    return [_hex(_CANDIDATES[index]) for index in chosen]


def heat_table() -> np.ndarray:
    """uint8 (256, 3): the colour of values 0..1."""
    channels, positions = zip(*map(rgb, HEAT_STOPS), strict=True), np.linspace(0, len(HEAT_STOPS) - 1, 256)
    return np.stack([np.interp(positions, range(len(HEAT_STOPS)), each) for each in channels], axis=1).round().astype(np.uint8)


_HEAT = heat_table()


# ---- overlays and heat maps -------------------------------------------------------------------------------------------


def fit_size(height: int, width: int, *, long_side: int) -> tuple[int, int]:
    """(height, width) with the same aspect and no side longer than `long_side`; never enlarged."""
    scale = min(1.0, long_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize_picture(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) -> (height, width, 3)."""
    if picture.shape[:2] == tuple(size):
        return picture
    return np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=3.0))


def grey_version(picture: np.ndarray) -> np.ndarray:
    """float32 (H, W, 1) luminance in 0..255."""
    return (picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]


def outlines(labels: np.ndarray) -> np.ndarray:
    """bool (H, W): pixels whose right or lower neighbour has another label, and these neighbours."""
    down, right = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    below, beside = np.pad(down, ((1, 1), (0, 0))), np.pad(right, ((0, 0), (1, 1)))
    return below[1:] | below[:-1] | beside[:, 1:] | beside[:, :-1]


def overlay(
    picture: np.ndarray,
    labels: np.ndarray,
    colours: Sequence[str],
    *,
    striped: Sequence[bool] | None = None,
    opacity: float = OPACITY,
    outline: bool = True,
    only: int | None = None,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Paint a label map over a photo: uint8 (H, W, 3).

    Args:
        picture: uint8 (H, W, 3).
        labels: int (H, W), index into `colours`, "#rrggbb"; -1 = none of these, drawn grey and dark.
        striped: for each class, whether it is drawn with diagonal stripes (unseen classes).
        opacity: opacity of the colours, 0..1; 0 leaves the photo as it is.
        outline: draw a white line between areas.
        only: index of the only class to draw; all others are drawn like none of these.
        names: names of the classes, to write on their areas; see `write_names`.
    """
    assert picture.shape[:2] == labels.shape, "picture and labels must have one size"
    if only is not None:
        labels = np.where(labels == only, only, -1)
    table = np.array([rgb(colour) for colour in (NONE_COLOUR, *colours)], dtype=np.float32)  # -1 is row 0
    grey = grey_version(picture)
    # Remove up to half of the photo's colour, because mixed with a class's colour it makes hues that are not in the legend.
    muted = 0.5 * min(1.0, opacity / OPACITY)
    base = (1 - muted) * picture.astype(np.float32) + muted * grey
    paint = table[labels + 1]
    strength = np.full(labels.shape, opacity, dtype=np.float32)
    if striped is not None and any(striped):
        height, width = labels.shape
        period = max(8, round(max(height, width) / 60))
        diagonal = (np.arange(height)[:, None] + np.arange(width)[None]) % period < period * 0.4
        is_striped = np.array([False, *striped])[labels + 1]
        strength = np.where(is_striped & diagonal, opacity * 0.6, strength)
    mixed = base * (1 - strength[..., None]) + paint * strength[..., None]
    none = labels < 0
    mixed[none] = 0.5 * grey[none] + 40
    if outline:
        edge = outlines(labels)
        mixed[edge] = 0.25 * mixed[edge] + 0.75 * 255
    painted = mixed.clip(0, 255).astype(np.uint8)
    return painted if names is None else write_names(painted, labels, names)


def write_names(painted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Write the name of each class on a picture, uint8 (H, W, 3), where its area has the most room, if there is enough.

    A name with characters that the font lacks is written as the class's number in the mask, which counts from 1.
    """
    size = max(10, round(max(labels.shape) * LETTERS))
    letters, font = FT2Font(str(FONT)).get_charmap(), ImageFont.truetype(FONT, size)
    picture = Image.fromarray(painted)
    draw = ImageDraw.Draw(picture)
    for index in np.unique(labels[labels >= 0]):
        name = names[index] if all(ord(letter) in letters for letter in names[index]) else str(index + 1)
        place = place_for((1.3 * size, font.getlength(name) + 0.6 * size), labels == index)
        if place is not None:
            line = max(1, round(size / 8))
            draw.text(place[::-1], name, "white", font, "mm", stroke_width=line, stroke_fill="#14161c")
    return np.asarray(picture)


def place_for(box: tuple[float, float], mask: np.ndarray) -> tuple[float, float] | None:
    """Centre (y, x) of the largest box inside a mask with the aspect of `box` (height, width); None if `box` does not fit.

    It is found by erosion on a grid whose cells are the box divided by `PART` in height and width.
    """
    rows, columns = (
        ((np.arange(int(side * PART / length)) + 0.5) * length / PART).astype(int)
        for side, length in zip(mask.shape, box, strict=True)
    )
    smaller, depth = mask[np.ix_(rows, columns)], 0
    while smaller.any():
        cells, depth = smaller, depth + 1
        padded = np.pad(cells, 1)
        high = padded[:-2] & padded[1:-1] & padded[2:]
        smaller = high[:, :-2] & high[:, 1:-1] & high[:, 2:]
    if 2 * depth <= PART:
        return None
    centres = np.argwhere(cells)
    y, x = centres[((centres - centres.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    return float(rows[y]), float(columns[x])


def heat_map(values: np.ndarray, picture: np.ndarray | None = None, *, strength: float = 0.8) -> np.ndarray:
    """Draw values (H, W) on the fixed scale from 0 to 1, over a pale grey version of the photo: uint8 (H, W, 3).

    `strength` is the share of the heat colour over a photo.
    """
    heat = _HEAT[(values.clip(0, 1) * 255).round().astype(np.uint8)]
    if picture is None:
        return heat
    assert picture.shape[:2] == values.shape, "picture and values must have one size"
    grey = 128 + (grey_version(picture) - 128) * 0.9
    return (heat * strength + grey * (1 - strength)).clip(0, 255).astype(np.uint8)


def heat_gradient(*, strength: float = 0.8) -> str:
    """The scale as a CSS gradient, mixed with grey as `heat_map` mixes it with a photo."""
    colours = np.array([rgb(stop) for stop in HEAT_STOPS]) * strength + 128 * (1 - strength)
    return f"linear-gradient(to right, {', '.join(map(_hex, colours))})"
