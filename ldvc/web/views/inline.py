"""Pictures inside HTML, as data: small enough to send with every answer, and never a file that another visitor could fetch.

A heat map is sent at a few pixels a patch and enlarged by the browser over a grey photo, which is sent once for all of them:
two dozen maps are drawn in the time that one takes as a full picture.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from ldvc.visualize import fit_size, grey_version, heat_gradient, heat_table, resize_picture
from ldvc.web.html import escape

HEAT = heat_table()
HEAT_STRENGTH = 0.8  # of the heat over the grey photo, as in `ldvc.visualize.heat_map`; the style sheet has it too


def photo_uri(picture: np.ndarray, *, long_side: int, grey: bool = False, quality: int = 80) -> str:
    """A photo, uint8 (H, W, 3), shrunk to a long side, as JPEG data."""
    picture = resize_picture(picture, fit_size(*picture.shape[:2], long_side=long_side))
    if grey:  # paler, as `heat_map` does
        picture = (128 + (grey_version(picture)[..., 0] - 128) * 0.9).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return _uri("jpeg", buffer)


def heat_uri(values: np.ndarray, *, low: float = 0.0, high: float = 1.0, inside: np.ndarray | None = None) -> str:
    """Values (h, w) on the heat scale from `low` to `high` as a palette PNG of that size.

    Args:
        values: float.
        low, high: values of the first and last colour; beyond them the colour stays.
        inside: (h, w) booleans; elsewhere the picture is transparent.
    """
    index = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * 254
    index = index.round().astype(np.uint8) + 1  # 0 is kept for what is transparent
    if inside is not None:
        index = np.where(inside, index, 0).astype(np.uint8)
    picture = Image.fromarray(index).convert("P")
    palette = HEAT[np.linspace(0, 255, 255).round().astype(int)]
    picture.putpalette(np.concatenate([[[0, 0, 0]], palette]).astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3, **({} if inside is None else {"transparency": 0}))
    return _uri("png", buffer)


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def scale_bar(label: str, low: float = 0.0, high: float = 1.0, *, strength: float = HEAT_STRENGTH) -> str:
    """A colour bar with five ticks; `label` says what it measures and on which scale."""
    digits = 2 if high - low >= 0.1 else 3
    ticks = [low + (high - low) * step / 4 for step in range(5)]
    words = "".join(f"<span>{number(tick, digits)}</span>" for tick in ticks)
    spoken = f"{label}: dark violet is {number(low, digits)}, pale yellow is {number(high, digits)}"
    return (
        f'<div class="ldvc-scalebar" role="img" aria-label="{escape(spoken)}"><p>{escape(label)}</p>'
        f'<div class="ldvc-gradient" style="background:{heat_gradient(strength=strength)}"></div>'
        f'<div class="ldvc-ticks">{words}</div></div>'
    )


def number(value: float, digits: int = 2) -> str:
    """0.5 -> "0.50"; with a true minus sign, and never "-0.00"."""
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "\u2212")
