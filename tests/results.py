"""Results of a segmentation from given logits, without a model, and photos of random colours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ldvc.class_names import ClassName
from ldvc.inference import Window
from ldvc.result import Segmentation, WindowOutput

PATCH = 16


def random_photo(height: int = 90, width: int = 130, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3), a random colour in each pixel."""
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def make_result(
    logits: Tensor | Sequence[Tensor],
    size: tuple[int, int],
    *,
    windows: Sequence[Window] | None = None,
    scores: Sequence[list[Tensor]] | None = None,
    synonyms: Sequence[Sequence[str]] | None = None,
    photo_size: tuple[int, int] | None = None,
    **options: Any,
) -> Segmentation:
    """A result with patches of 16 pixels.

    Args:
        logits: (C, h, w), or one such tensor for each window.
        size: (height, width) of the model's input, and of the photo unless `photo_size` is given.
        windows: None = one window.
        scores: attention scores of the layers, for each window.
        synonyms: words of each class; None = "name 0", "name 1", ...
    """
    maps = [logits] if isinstance(logits, Tensor) else logits
    words = synonyms or [[f"name {index}"] for index in range(len(maps[0]))]
    outputs = zip(windows or [Window(0, 0, *size)], maps, scores or [[] for _ in maps], strict=True)
    return Segmentation(
        classes=[ClassName(tuple(each)) for each in words],
        seen=[True] * len(words),
        decoder="ldvc",
        picture=np.zeros((*(photo_size or size), 3), dtype=np.uint8),
        input_size=size,
        patch=PATCH,
        outputs=[WindowOutput(*each) for each in outputs],
        **options,
    )
