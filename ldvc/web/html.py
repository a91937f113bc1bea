"""Pieces of HTML that several parts of the page share. Every text that a visitor can influence goes through `escape`.

Pictures are data inside the HTML: never a file that another visitor could fetch. A heat map has a few pixels for each patch;
the browser enlarges it over a grey photo, which is sent once for all maps.
"""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from ldvc.visualize import fit_size, grey_version, heat_gradient, heat_table, resize_picture
from ldvc.web import texts

# Palette of heat maps: index 0 is transparent; the other indices are the colour scale.
HEAT_PALETTE = np.concatenate([[[0, 0, 0]], heat_table()[np.linspace(0, 255, 255).round().astype(int)]]).astype(np.uint8)
HEAT_STRENGTH = 0.8  # opacity of the heat over the grey photo, as in `ldvc.visualize.heat_map` and in the style sheet
GREY = {"long_side": 420, "grey": True, "quality": 75}  # arguments of `photo_uri` for the photo under heat maps
MAP_SIDE = 112  # long side of a heat map before the browser enlarges it: four pixels for each patch of lite


# ---- words


def static(name: str) -> str:
    """The text of a file in the folder static."""
    return (Path(__file__).parent / "static" / name).read_text(encoding="utf-8")


def section(title: str, help_text: str = "") -> str:
    """The heading of a part of the page, with an optional help text."""
    paragraph = f"<p>{help_text}</p>" if help_text else ""
    return f'<div class="ldvc-section"><h2>{title}</h2>{paragraph}</div>'


def caption(text: str) -> str:
    """A small heading over one field or picture."""
    return f'<h3 class="ldvc-caption">{text}</h3>'


def details(summary: str, text: str) -> str:
    """A text that opens on a click."""
    return f'<details class="ldvc-details"><summary>{summary}</summary>{text}</details>'


def problem(sentence: str) -> str:
    """An error message beside its field, or ""; screen readers read it at once."""
    return sentence and f'<p class="ldvc-problem" role="alert">{escape(sentence)}</p>'


def notice(sentence: str) -> str:
    """A remark that is not an error, or ""."""
    return sentence and f'<p class="ldvc-notice" role="status">{escape(sentence)}</p>'


def progress(sentence: str, share: float) -> str:
    """A sentence and a progress bar for a long operation."""
    bar = f'<progress value="{share:.3f}" aria-label="{escape(sentence)}"></progress>'
    return f'<p class="ldvc-notice">{escape(sentence)}{bar}</p>'


def empty(sentence: str) -> str:
    """A sentence in the place of a result that does not exist yet, or ""."""
    return sentence and f'<p class="ldvc-empty">{escape(sentence)}</p>'


def percent(share: float) -> str:
    """0.3456 -> "35 %"; a share above 0 and below 0.01 is "<1 %"."""
    return "&lt;1&#8239;%" if 0 < share < 0.01 else f"{share * 100:.0f}&#8239;%"


def number(value: float, digits: int = 2) -> str:
    """0.5 -> "0.50", with a minus sign (U+2212); never "-0.00"."""
    text = f"{value:.{digits}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", "\u2212")


def name_label(name: str, seen: bool, colour: str, *, tag: str = "div") -> str:
    """A name with its colour, and a mark if the model saw no mask of this class."""
    unseen = "" if seen else f'<span class="ldvc-tag ldvc-unseen">{texts.UNSEEN}</span>'
    return (
        f'<{tag} class="ldvc-label"><span class="ldvc-swatch{"" if seen else " ldvc-striped"}" style="--c:{colour}"></span>'
        f'<span class="ldvc-label-name" title="{escape(name)}">{escape(name)}</span>{unseen}</{tag}>'
    )


def bar(share: float, colour: str) -> str:
    """A horizontal bar for a share from 0 to 1."""
    return f'<span class="ldvc-bar"><i style="width:{share * 100:.1f}%;--c:{colour}"></i></span>'


def scale_bar(label: str, low: float = 0.0, high: float = 1.0, *, strength: float = HEAT_STRENGTH) -> str:
    """A colour bar with five ticks; `label` names the quantity and its scale."""
    digits = 2 if high - low >= 0.1 else 3
    ticks = "".join(f"<span>{number(low + (high - low) * step / 4, digits)}</span>" for step in range(5))
    aria_text = f"{label}: dark violet is {number(low, digits)}, pale yellow is {number(high, digits)}"
    return (
        f'<div class="ldvc-scalebar" role="img" aria-label="{escape(aria_text)}"><p>{escape(label)}</p>'
        f'<div class="ldvc-gradient" style="background:{heat_gradient(strength=strength)}"></div>'
        f'<div class="ldvc-ticks">{ticks}</div></div>'
    )


# ---- pictures


def photo_uri(picture: np.ndarray, *, long_side: int, grey: bool = False, quality: int = 80) -> str:
    """A photo, uint8 (H, W, 3), as a JPEG data URI, shrunk to a long side."""
    picture = resize_picture(picture, fit_size(*picture.shape[:2], long_side=long_side))
    if grey:  # with less contrast, as in `heat_map`
        picture = (128 + (grey_version(picture)[..., 0] - 128) * 0.9).round().astype(np.uint8)
    return data_uri(Image.fromarray(picture), "jpeg", quality=quality)


def heat_uri(values: np.ndarray, *, low: float = 0.0, high: float = 1.0, inside: np.ndarray | None = None) -> str:
    """Values (h, w) on the heat scale from `low` to `high`, as a palette PNG of (h, w) pixels in a data URI.

    Args:
        inside: booleans (h, w); the picture is transparent where they are false.
    """
    index = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * 254
    index = index.round().astype(np.uint8) + 1
    if inside is not None:
        index = np.where(inside, index, 0).astype(np.uint8)
    picture = Image.fromarray(index).convert("P")
    picture.putpalette(HEAT_PALETTE.tobytes())
    return data_uri(picture, "png", compress_level=3, **({} if inside is None else {"transparency": 0}))


def packed(values: np.ndarray) -> str:
    """Encode a uint8 array: differences of neighbours modulo 256, zlib, base64. `viewer.js` decodes it."""
    compressor = zlib.compressobj(1, strategy=zlib.Z_FILTERED)
    differences = np.diff(values.astype(np.uint8).ravel(), prepend=np.uint8(0))
    return base64.b64encode(compressor.compress(differences.tobytes()) + compressor.flush()).decode()


def data_uri(picture: Image.Image, kind: str, **options: int) -> str:
    """A picture as a data URI; `options` are those of `Image.save`."""
    buffer = io.BytesIO()
    picture.save(buffer, kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def quoted(words: Sequence[str]) -> str:
    """["dog", "cat", "cow"] -> “dog”, “cat” and “cow”, without HTML escaping."""
    *others, last = [f"“{word}”" for word in words]
    return f"{', '.join(others)} and {last}" if others else last
