"""Colours of decoded pictures: every mode of Pillow becomes upright 8-bit sRGB."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms

STRIP_PIXELS = 1_000_000  # colours are converted in strips, so that no second copy of the picture is made
TRANSPARENT = {"RGBA": "RGB", "LA": "L", "PA": "RGB", "RGBa": "RGB", "La": "L"}  # modes, and those without alpha
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation


def to_rgb(image: Image.Image, max_side: int | None = None) -> Image.Image:
    """An upright sRGB picture, see `load_picture`. Errors of Pillow on damaged files are not caught."""
    if image.tell() and image.format != "HEIF":  # HEIF opens its main picture, which need not be the first
        image.seek(0)
    image.load()
    turn = _turn(image)
    if image.mode != "RGB" or {"icc_profile", "transparency"} & image.info.keys():
        convert = _stretching(image) if image.mode.startswith(("I", "F")) else _converting(image)
        rgb = Image.new("RGB", image.size)
        for top, strip in _strips(image):
            rgb.paste(convert(strip), (0, top))
        image = rgb
    if max_side is not None and max(image.size) > max_side:
        scale = max_side / max(image.size)
        size = tuple(max(1, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return image if turn is None else image.transpose(turn)


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes a picture upright; None also if its EXIF data are damaged."""
    try:
        return UPRIGHT.get(image.getexif().get(0x0112))
    except Exception:  # Pillow's parsers raise many types
        return None


def _stretching(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """A function that converts strips of a picture with more than 8 bits per channel to RGB."""
    step = math.ceil(math.sqrt(image.width * image.height / STRIP_PIXELS))
    sample = np.concatenate([np.asarray(strip)[::step, ::step].ravel() for _, strip in _strips(image)]).astype(np.float64)
    low, high = _bounds(sample[np.isfinite(sample)], whole=image.mode.startswith("I"))

    def convert(strip: Image.Image) -> Image.Image:
        values = np.nan_to_num(np.asarray(strip, dtype=np.float64), nan=low, posinf=high, neginf=low)
        values = (np.clip(values, low, high) - low) * (255.0 / (high - low))
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")

    return convert


def _bounds(values: np.ndarray, whole: bool) -> tuple[float, float]:
    """Which values become black and white: all but half a percent at either end lie between them.

    8-bit values in a wider type stay as they are.
    """
    if not values.size:
        return 0.0, 1.0
    least, most = float(values.min()), float(values.max())
    if least >= 0 and most <= 255 and (whole or most > 1) and (values == np.round(values)).all():
        return 0.0, 255.0
    low, high = (float(each) for each in np.percentile(values, [0.5, 99.5]))
    if low < high:
        return low, high
    if least < most:
        return least, most
    return 0.0, next((scale for scale in (1.0, 255.0, 65535.0) if most <= scale), most)  # a picture of one value


def _converting(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """A function that converts strips of an 8-bit picture to sRGB and blends transparent pixels with white."""
    mode = TRANSPARENT.get(image.mode, "RGB" if image.mode == "P" else image.mode)
    profile = _to_srgb(image.info.get("icc_profile"), mode)
    transparent = image.mode in TRANSPARENT or "transparency" in image.info

    def convert(strip: Image.Image) -> Image.Image:
        if transparent:
            strip = strip.convert({"RGBa": "RGBA", "La": "LA"}.get(strip.mode, strip.mode)).convert("RGBA")
        opaque = strip.convert(mode)
        opaque = opaque.convert("RGB") if profile is None else profile.apply(opaque)
        if not transparent:
            return opaque
        opaque.putalpha(strip.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", strip.size, "white"), opaque).convert("RGB")

    return convert


def _to_srgb(profile: Any, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion of a colour profile's values to sRGB; None if they are sRGB already or the profile is damaged."""
    try:
        if mode == "LAB":
            source = ImageCms.createProfile("LAB")
        else:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" in ImageCms.getProfileDescription(source).lower():
                return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:  # no profile, or one that does not fit; the library raises several types
        return None
