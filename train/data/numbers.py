"""Class numbers of a mask file, whatever kind of picture holds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

_SCALED = {"L;2": 85, "L;4": 17}  # grey of 2 or 4 bits: Pillow stretches the numbers to 0..255
_ALPHA = ("LA", "PA", "RGBA")
HOW_TO_SAVE = "save the class numbers as an 8-bit grey or palette PNG"


def read_numbers(path: Path) -> np.ndarray:
    """(H, W) integers of a mask: grey, palette, 1 to 16 bits; colour and transparency only if they say nothing.

    Raises:
        ValueError: the picture does not hold one number for each pixel.
        OSError and others of Pillow: it is missing or damaged.
    """
    with Image.open(path) as file:
        mode, raw_mode = file.mode, _raw_mode(file)
        raw = np.array(file)
    if raw_mode in _SCALED:
        return raw // _SCALED[raw_mode]
    if "16" in raw_mode and not mode.startswith("I"):  # Pillow keeps the high byte, which is 0 for small numbers
        raise ValueError(f"it has 16 bits per channel and several channels; {HOW_TO_SAVE}")
    if mode in _ALPHA:
        raw, alpha = raw[..., :-1], raw[..., -1]
        if (alpha < 255).any():
            raise ValueError(f"some of its pixels are transparent; {HOW_TO_SAVE}, with the number of void in their place")
    if raw.ndim == 3:
        if mode not in ("RGB", *_ALPHA) or (raw != raw[..., :1]).any():
            raise ValueError(f"it is a picture with colours; {HOW_TO_SAVE}")
        raw = raw[..., 0]
    if raw.dtype.kind == "f":
        raise ValueError(f"it holds fractions; {HOW_TO_SAVE}")
    return raw.astype(np.int64) if raw.dtype == bool else raw


def is_usable(path: Path) -> bool:
    """Whether the header of a mask file promises class numbers, not colours."""
    try:
        with Image.open(path) as file:
            return file.mode in ("1", "L", "P") or file.mode.startswith("I")
    except Exception:  # damaged: Pillow raises a dozen kinds
        return False


def _raw_mode(file: Image.Image) -> str:
    """How the file stores a pixel, such as "L;4", if Pillow tells."""
    arguments = file.tile[0][3] if getattr(file, "tile", None) else ""
    if isinstance(arguments, tuple):
        arguments = arguments[0] if arguments else ""
    return arguments if isinstance(arguments, str) else ""
