"""Reading pictures: rotated, transparent, 16-bit, animated, too large, damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldvc.errors import InvalidImageError
from ldvc.image_io import load_picture
from tests.colours import GREEN, RED, halves


def corner(picture: np.ndarray) -> list[int]:
    return picture[0, 0].tolist()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(halves(20, 30, 15))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise to show it upright
    image.save(tmp_path / "turned.png", exif=exif)
    picture = load_picture(tmp_path / "turned.png")
    assert picture.shape == (30, 20, 3)
    assert corner(picture) == RED and picture[-1, 0].tolist() == GREEN


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[:, 2:] = (255, 0, 0, 255)
    picture = load_picture(rgba)
    assert corner(picture) == [255, 255, 255] and picture[0, 3].tolist() == RED
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 255, 0] + [0] * 765)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert corner(load_picture(tmp_path / "palette.png")) == [255, 255, 255]


def test_sixteen_bits_keep_their_contrast(tmp_path: Path) -> None:
    values = np.tile(np.linspace(100, 4000, 32).astype(np.uint16), (8, 1))  # of a camera with 12 bits
    Image.fromarray(values).save(tmp_path / "deep.png")
    picture = load_picture(tmp_path / "deep.png")
    assert picture.shape == (8, 32, 3) and picture.dtype == np.uint8
    assert picture.min() == 0 and picture.max() == 255
    assert (np.diff(picture[0, :, 0].astype(int)) >= 0).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_every_mode_of_pillow(mode: str) -> None:
    picture = load_picture(Image.new("RGB", (5, 3), "white").convert("L" if mode == "LA" else "RGB").convert(mode))
    assert picture.shape == (3, 5, 3) and picture.dtype == np.uint8
    assert (picture >= 250).all()


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    image = Image.open(tmp_path / "moving.gif")
    image.seek(2)
    assert corner(load_picture(image)) == RED
    assert corner(load_picture(str(tmp_path / "moving.gif"))) == RED


def test_pictures_are_shrunk_to_a_limit() -> None:
    assert load_picture(np.zeros((100, 4000, 3), np.uint8), max_side=1000).shape == (25, 1000, 3)
    assert load_picture(np.zeros((1, 4000, 3), np.uint8), max_side=1000).shape == (1, 1000, 3)


def test_unusable_pictures_are_refused_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    Image.fromarray(halves(50, 50, 25)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:80])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "bare.tif").write_bytes(b"II*\0\x08\0\0\0" + bytes(6))  # a TIFF without dimensions: Pillow's TypeError
    bad = [
        tmp_path / "text.jpg", tmp_path / "cut.png", tmp_path / "empty.png", tmp_path / "bare.tif",
        tmp_path / "missing.png", tmp_path, np.zeros((0, 5, 3), np.uint8), np.zeros((5, 5, 3), np.float32),
        np.zeros((5, 5, 2), np.uint8), None, 7,
    ]  # fmt: skip
    for source in bad:
        with pytest.raises(InvalidImageError, match=r"\.$"):
            load_picture(source)
    monkeypatch.setattr("ldvc.image_io.MAX_PIXELS", 2_000_000)
    with pytest.raises(InvalidImageError, match="smaller"):
        load_picture(np.zeros((2000, 1001, 3), np.uint8))
