"""Reading pictures: any file, PIL image or array becomes an upright RGB array."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ldvc.errors import InvalidImageError

MAX_PIXELS = 100_000_000  # a picture of 100 megapixels takes 300 MB as an array

Source = Image.Image | np.ndarray | str | Path


def load_picture(source: Source, *, max_side: int | None = None) -> np.ndarray:
    """Read any picture as upright 8-bit RGB.

    EXIF orientation is applied, transparent pixels are blended with white, only the first frame of an animation is read, and
    pictures with 16 or 32 bits per channel are stretched from their darkest to their brightest value.

    Args:
        source: a PIL image, a path, or a uint8 array of shape (H, W, 3), (H, W, 4), (H, W, 1) or (H, W).
        max_side: shrink the picture so that no side is longer; None = keep the size.

    Returns:
        uint8 array (H, W, 3), at least 1 x 1.

    Raises:
        InvalidImageError: it is not a picture, or it is damaged, empty or larger than `MAX_PIXELS`.
    """
    if isinstance(source, (str, Path)):
        source = _open(Path(source))
    elif isinstance(source, np.ndarray):
        source = _from_array(source)
    elif not isinstance(source, Image.Image):
        raise InvalidImageError(
            f"Give a PIL image, a path or a uint8 array of shape (H, W, 3), not a {type(source).__name__}."
        )
    width, height = source.size
    if width < 1 or height < 1:
        raise InvalidImageError("The picture is empty; choose one that is at least one pixel wide and high.")
    if width * height > MAX_PIXELS:
        raise InvalidImageError(
            f"The picture has {width} x {height} pixels, more than the {MAX_PIXELS // 1_000_000} million that are "
            "accepted; make it smaller and try again."
        )
    try:
        picture = to_rgb(source)
    except Exception as error:  # Pillow's decoders raise many types on damaged files, even TypeError
        raise InvalidImageError("The picture is damaged or incomplete; save it again and retry.") from error
    if max_side is not None and max(picture.size) > max_side:
        scale = max_side / max(picture.size)
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.asarray(picture)


def _open(path: Path) -> Image.Image:
    if not path.is_file():
        raise InvalidImageError(f"There is no picture at {path}.")
    try:
        return Image.open(path)
    except Image.DecompressionBombError as error:
        raise InvalidImageError("The picture has too many pixels; make it smaller and try again.") from error
    except Exception as error:  # decoders raise many types
        raise InvalidImageError("This file is not a picture that can be read; use JPEG, PNG, WebP or GIF.") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InvalidImageError(
            f"A picture given as an array must be uint8 of shape (H, W, 3), not {array.dtype} of shape {array.shape}."
        )
    if array.size == 0:
        raise InvalidImageError("The picture is empty; choose one that is at least one pixel wide and high.")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB picture, see `load_picture`. Errors of Pillow on damaged files are not caught."""
    if getattr(image, "n_frames", 1) > 1:
        image.seek(0)
    image.load()
    if image.getexif().get(0x0112, 1) != 1:  # 0x0112 = orientation, 1 = upright
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        low, high = float(values.min()), float(values.max())
        if low >= 0 and high <= 255:  # 8-bit values in a wider type
            low, high = 0.0, 255.0
        values = (values - low) * (255.0 / max(high - low, 1e-12))
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
