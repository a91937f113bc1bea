"""Data sets of a few generated photos, in the layout of a plain folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {
    "grass": (40, 160, 40),
    "sky": (90, 150, 240),
    "dog": (150, 90, 40),
    "cat": (230, 200, 60),
    "aeroplane": (200, 200, 210),
}


def make_set(
    folder: Path,
    classes: list[str],
    *,
    photos: int = 6,
    background: int | None = None,
    size: tuple[int, int] = (60, 84),
) -> Path:
    """Photos of two flat areas and a strip of void; the first class (or background) lies on the left."""
    height, width = size
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    generator = np.random.default_rng(len(classes))
    stems = []
    for number in range(photos):
        stem = f"photo{number}"
        pair = (number % len(classes), (number + 1) % len(classes))
        mask = np.full((height, width), 255, dtype=np.uint8)
        mask[:, : width // 2], mask[:, width // 2 : width - 4] = pair
        pixels = np.zeros((height, width, 3))
        for index in pair:
            pixels[mask == index] = COLOURS.get(classes[index], (120, 20, 120))
        pixels += generator.normal(0, 8, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{stem}.jpg")
        Image.fromarray(mask).save(folder / "masks" / f"{stem}.png")
        stems.append(stem)
    description = {"classes": classes, "ignore_index": 255, "background_index": background}
    (folder / "dataset.json").write_text(json.dumps(description))
    (folder / "train.txt").write_text("\n".join(stems) + "\n")
    (folder / "val.txt").write_text("\n".join(stems[:3]) + "\n")
    return folder


def make_sets(root: Path) -> Path:
    """Two data sets side by side: one without and one with a background index."""
    make_set(root / "meadow", ["grass", "sky", "aeroplane", "dog"])
    make_set(root / "pets", ["background", "dog", "cat"], background=0)
    return root
