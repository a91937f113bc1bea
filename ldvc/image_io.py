"""Reading pictures: any file, PIL image or array becomes an upright sRGB array. Memory and time are bounded before decoding."""

import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pi_heif
from PIL import Image, ImageCms

from ldvc.errors import InvalidImageError

MAX_PIXELS = 100_000_000  # a picture of 100 megapixels takes 300 MB as an array
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "HEIF", "TIFF", "BMP", "PPM", "JPEG2000")  # EPS would start Ghostscript
# Peak memory of decoding in bytes per pixel, from `tools/picture_memory.py`. The usual 8 are the picture with
# 4 bytes per pixel, and a copy.
USUAL_BYTES = 8
BYTES_PER_PIXEL = {"WEBP": 16, "AVIF": 13, "HEIF": 12, "JPEG2000": 20}
MAX_SCANNED_PIXELS = 1_000_000_000  # pixels times passes of a progressive JPEG: 25 passes over 40 megapixels
JPEG2000_PIXELS = 5_000_000  # larger ones are decoded at half their resolution, or less: 3 megapixels take a second
PNG_PIXELS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
PNG_COLOURS = {b"tRNS", b"iCCP", b"eXIf"}
STRIP_PIXELS = 1_000_000  # colours are converted in strips, so that no second copy of the picture is made
TRANSPARENT = {"RGBA": "RGB", "LA": "L", "PA": "RGB", "RGBa": "RGB", "La": "L"}  # mode with alpha -> mode without
TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
UPRIGHT = {orientation: Image.Transpose[turn] for orientation, turn in enumerate(TURNS, start=2)}  # by EXIF
JPEGS = ("JPEG", "MPO")
DAMAGED = "The picture is damaged or incomplete; save it again and retry."
EMPTY = "The picture is empty; choose one that is at least one pixel wide and high."
TOO_LARGE = (
    "The picture has {width} x {height} pixels, more than the {limit:.0f} million that are accepted of a {format} picture; "
    "make it smaller, or save it as a JPEG, and try again."
)
TOO_MANY = "The picture has too many pixels; make it smaller and try again."
UNREADABLE = "This file is not a picture that can be read; save it as JPEG, PNG, WebP or HEIC and try again."

Source = Image.Image | np.ndarray | str | Path

pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)


def load_picture(source: Source, *, max_side: int | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read any picture as upright 8-bit sRGB: uint8 (H, W, 3), at least 1 x 1.

    EXIF orientation is applied, colour profiles are converted to sRGB, transparent pixels are blended with white, only the
    first frame of an animation is read, and pictures with 16 or 32 bits per channel are stretched between robust bounds.

    Args:
        source: a PIL image, a path, or a uint8 array of shape (H, W, 3), (H, W, 4), (H, W, 1) or (H, W).
        max_side: shrink the picture so that no side is longer; None = keep the size.
        max_pixels: see `check_picture`.

    Raises:
        InvalidImageError: it is not a picture, or it is damaged, empty or too large.
    """
    try:
        # No variable holds the decoded picture, so that it is freed as soon as its colours are converted.
        return np.asarray(to_rgb(_as_image(source, max_pixels, reduce=max_side is not None), max_side))
    except InvalidImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged files, even TypeError
        raise InvalidImageError(DAMAGED) from error


def check_picture(path: str | Path, *, max_side: int | None = None, max_pixels: int = MAX_PIXELS) -> None:
    """Read only the header of a picture; raises InvalidImageError if it is no picture, empty or too large.

    With `max_side`, the decoders of JPEG and JPEG 2000 reduce larger pictures. `max_pixels` is the limit for formats that
    need 8 bytes per pixel while they are decoded; see `BYTES_PER_PIXEL` for others.
    """
    _open(Path(path), max_pixels, reduce=max_side is not None).close()


def _as_image(source: Source, max_pixels: int, reduce: bool) -> Image.Image:
    if isinstance(source, (str, Path)):
        return _open(Path(source), max_pixels, reduce)
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    if not isinstance(source, Image.Image):
        kind = type(source).__name__
        raise InvalidImageError(f"Give a PIL image, a path or a uint8 array of shape (H, W, 3), not a {kind}.")
    _check_size(source, source.width * source.height * USUAL_BYTES, max_pixels)
    return source


def _open(path: Path, max_pixels: int, reduce: bool) -> Image.Image:
    if not path.is_file():
        raise InvalidImageError(f"There is no picture at {path}.")
    try:
        image = _open_png(path) or Image.open(path, formats=FORMATS)
        buffer = _buffer_bytes(image)
    except InvalidImageError:
        raise
    except Exception as error:  # decoders raise many types
        bomb = isinstance(error, Image.DecompressionBombError)
        raise InvalidImageError(TOO_MANY if bomb else UNREADABLE) from error
    decoded = image.width * image.height * BYTES_PER_PIXEL.get(image.format, USUAL_BYTES)
    scale = 1  # the decoder divides each side by it
    if reduce and image.format == "JPEG2000":
        while scale < 32 and image.width * image.height > JPEG2000_PIXELS * scale**2:
            scale *= 2
        image.reduce = scale.bit_length() - 1
    elif reduce and image.format in JPEGS:
        while scale < 8 and buffer + decoded / scale**2 > max_pixels * USUAL_BYTES:
            scale *= 2
    _check_size(image, buffer + decoded / scale**2, max_pixels)
    if image.format in JPEGS and scale > 1:
        image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))
    return image


def _open_png(path: Path) -> Image.Image | None:
    """Open a PNG without the chunks that its pixels do not need, whose content Pillow may refuse; None for other files."""
    with path.open("rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return None
    data, error = memoryview(path.read_bytes()), None
    for chunk_names in (PNG_PIXELS | PNG_COLOURS, PNG_PIXELS):
        parts, position = [data[:8]], 8
        while position < len(data):
            end = position + 12 + int.from_bytes(data[position : position + 4], "big")
            name = bytes(data[position + 4 : position + 8])
            if name in chunk_names:
                parts.append(data[position:end])
            if name == b"IDAT":
                chunk_names = chunk_names - {b"tRNS", b"iCCP"}  # not valid after IDAT
            position = end
        try:
            return Image.open(io.BytesIO(b"".join(parts)), formats=["PNG"])
        except Image.DecompressionBombError:
            raise
        except Exception as caught:  # a profile that is too large, a wrong checksum
            error = caught
    raise error


def _buffer_bytes(image: Image.Image) -> float:
    """Memory that the decoder needs besides the picture: coefficients of a JPEG in several passes, strips of a TIFF."""
    pixels = image.width * image.height
    if image.format in JPEGS:
        scan = image.fp.read()
        scans = 1 + scan[: scan.find(b"\xff\xd9") % (len(scan) + 1)].count(b"\xff\xda")
        if scans * pixels > MAX_SCANNED_PIXELS and scans > 4:  # decoding would take many seconds; 4 = one scan for each channel
            raise InvalidImageError("The picture is stored in too many passes; save it again as a usual JPEG and retry.")
        if scans == 1:
            return 0
        samplings = [across * down for _, across, down, _ in image.layer]
        return 2 * pixels * sum(samplings) / max(samplings)
    if image.format == "TIFF":
        tags = image.tag_v2
        part = tags.get(322, image.width) * tags.get(323, min(tags.get(278, image.height), image.height))
        return max(0, part * sum(tags.get(258, (1,))) / 8 - 4 * pixels)
    return 0


def _check_size(image: Image.Image, cost: float, max_pixels: int) -> None:
    if image.width < 1 or image.height < 1:
        raise InvalidImageError(EMPTY)
    if cost > max_pixels * USUAL_BYTES:
        limit = max_pixels * USUAL_BYTES / cost * image.width * image.height / 1_000_000
        raise InvalidImageError(
            TOO_LARGE.format(width=image.width, height=image.height, limit=limit, format=image.format or "decoded")
        )


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise InvalidImageError(
            f"A picture given as an array must be uint8 of shape (H, W, 3), not {array.dtype} of shape {array.shape}."
        )
    if array.size == 0:
        raise InvalidImageError(EMPTY)
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


# ---- colours: every mode of Pillow becomes upright 8-bit sRGB -----------------------------------------------------------


def to_rgb(image: Image.Image, max_side: int | None = None) -> Image.Image:
    """An upright sRGB picture, see `load_picture`. Errors of Pillow on damaged files are not caught."""
    if image.tell() and image.format != "HEIF":  # HEIF opens its main picture, which need not be the first
        image.seek(0)
    image.load()
    turn = _turn(image)
    if image.mode != "RGB" or {"icc_profile", "transparency"} & image.info.keys():
        convert = _stretcher(image) if image.mode.startswith(("I", "F")) else _converter(image)
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
    """The transposition that makes a picture upright; None if it is upright or its EXIF data are damaged."""
    try:
        return UPRIGHT.get(image.getexif().get(0x0112))
    except Exception:  # Pillow's parsers raise many types
        return None


def _stretcher(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """A function that converts strips of a picture with more than 8 bits per channel to RGB."""
    step = math.ceil(math.sqrt(image.width * image.height / STRIP_PIXELS))
    sample = np.concatenate([np.asarray(strip)[::step, ::step].ravel() for _, strip in _strips(image)]).astype(np.float64)
    low, high = _bounds(sample[np.isfinite(sample)], integers=image.mode.startswith("I"))

    def convert(strip: Image.Image) -> Image.Image:
        values = np.nan_to_num(np.asarray(strip, dtype=np.float64), nan=low, posinf=high, neginf=low)
        values = (np.clip(values, low, high) - low) * (255.0 / (high - low))
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")

    return convert


def _bounds(values: np.ndarray, integers: bool) -> tuple[float, float]:
    """The values that become black and white: the percentiles 0.5 and 99.5, but 0 and 255 for 8-bit values in a wider type."""
    if not values.size:
        return 0.0, 1.0
    least, most = float(values.min()), float(values.max())
    if least >= 0 and most <= 255 and (integers or most > 1) and (values == np.round(values)).all():
        return 0.0, 255.0
    low, high = (float(each) for each in np.percentile(values, [0.5, 99.5]))
    if low < high:
        return low, high
    return (least, most) if least < most else (0.0, next((scale for scale in (1.0, 255.0, 65535.0) if most <= scale), most))


def _converter(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
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
