"""Pictures of flat colours, whose every pixel is known."""

from __future__ import annotations

import numpy as np

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1)}
RED, GREEN, BLUE = ([255 * channel for channel in COLOURS[name]] for name in ("red", "green", "blue"))


def halves(height: int, width: int, split: int, *, axis: int = 1) -> np.ndarray:
    """Red before `split`, green from there on."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[:] = RED
    if axis == 1:
        picture[:, split:] = GREEN
    else:
        picture[split:] = GREEN
    return picture
