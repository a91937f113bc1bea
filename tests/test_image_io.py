"""Reading pictures: rotated, transparent, 16-bit, animated, too large, damaged."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from ldvc.errors import InvalidImageError
from ldvc.image_io import check_picture, load_picture
from tests.colours import GREEN, RED, halves
from tests.results import random_photo
from tools.fuzz_pictures import png_chunk


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def corner(picture: np.ndarray) -> list[int]:
    return picture[0, 0].tolist()


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[:, 2:] = (255, 0, 0, 255)
    picture = load_picture(rgba)
    assert corner(picture) == [255, 255, 255] and picture[0, 3].tolist() == RED
    Image.new("P", (4, 4), 0).save(tmp_path / "palette.png", transparency=0)
    assert corner(load_picture(tmp_path / "palette.png")) == [255, 255, 255]


def swapped_profile() -> bytes:
    """A colour profile whose red is sRGB's green, and the other way round."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = data.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    return swapped.replace("sRGB".encode("utf-16-be"), "Mine".encode("utf-16-be"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_colour_profiles_are_converted_to_srgb(kind: str, tmp_path: Path) -> None:
    image, srgb = Image.new("RGB", (32, 32), "red"), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = {}
    for name, profile in {"none": None, "srgb": srgb, "swapped": swapped_profile(), "broken": srgb[:300], "junk": b"?"}.items():
        image.save(tmp_path / name, kind, icc_profile=profile, **({"lossless": True} if kind == "WEBP" else {}))
        pixels[name] = corner(load_picture(tmp_path / name))
    assert pixels["none"] == pixels["srgb"] == pixels["broken"] == pixels["junk"]
    assert np.abs(np.subtract(pixels["none"], RED)).max() <= 2 and np.abs(np.subtract(pixels["swapped"], GREEN)).max() <= 2


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "LA", "CMYK", "1", "I;16"])
def test_profiles_of_other_modes_do_no_harm(mode: str, tmp_path: Path) -> None:
    """A profile for RGB converts palettes and keeps transparency; where it does not fit, it is left out."""
    image = Image.new("L" if mode == "I;16" else "RGB", (8, 8), "white").convert(mode)
    image.save(tmp_path / "file", "JPEG" if mode == "CMYK" else "PNG", icc_profile=swapped_profile())
    assert (load_picture(tmp_path / "file") >= 250).all()
    red = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    red.putpixel((0, 0), (0, 0, 0, 0))
    red.save(tmp_path / "red.png", icc_profile=swapped_profile())
    assert corner(load_picture(tmp_path / "red.png")) == [255, 255, 255]
    assert np.abs(load_picture(tmp_path / "red.png")[1, 1].astype(int) - GREEN).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_every_orientation_in_every_format(kind: str, orientation: int, tmp_path: Path) -> None:
    image = Image.fromarray(random_photo(3, 5)).resize((50, 30), 0)
    image.save(tmp_path / "file", kind, exif=turned(orientation))
    with Image.open(tmp_path / "file") as file:
        expected = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    assert expected.shape[:2] == ((30, 50) if orientation < 5 else (50, 30))
    np.testing.assert_array_equal(load_picture(tmp_path / "file"), expected)
    assert load_picture(tmp_path / "file", max_side=25).shape[:2] == ((15, 25) if orientation < 5 else (25, 15))


@pytest.mark.filterwarnings("ignore")  # of Pillow about damaged EXIF data
def test_damaged_exif_data_do_not_matter(tmp_path: Path) -> None:
    for exif in (b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        for kind in ("JPEG", "WEBP"):
            Image.new("RGB", (8, 8), "red").save(tmp_path / "file", kind, exif=exif)
            assert load_picture(tmp_path / "file").shape == (8, 8, 3)


@pytest.mark.parametrize("name", [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"gAMA", b"pHYs", b"prVt"])
@pytest.mark.parametrize("content", ["large", "junk", "checksum"])
def test_chunks_beside_the_pixels_do_not_matter(name: bytes, content: str, tmp_path: Path) -> None:
    image, file = halves(20, 30, 15), io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    data = file.getvalue()
    text = b"key\0\0" + (b"\0\0\0" if name == b"iTXt" else b"") + zlib.compress(bytes(3_000_000))
    chunk = png_chunk(name, {"large": text, "junk": b"\xff" * 7, "checksum": b"key\0text"}[content])
    if content == "checksum":
        chunk = chunk[:-1] + bytes([chunk[-1] ^ 1])
    for at in (33, len(data) - 12):  # before and after the pixels
        (tmp_path / "file.png").write_bytes(data[:at] + chunk * 70 + data[at:])
        check_picture(tmp_path / "file.png")
        np.testing.assert_array_equal(load_picture(tmp_path / "file.png"), image)


def test_heic(tmp_path: Path) -> None:
    picture = load_picture(Path(__file__).parent / "small.heic")
    assert picture.shape == (64, 96, 3) and picture[0, -1, 0] > 200 > 50 > picture[0, 0, 0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 127, 255]), ([-1.0, 0.0, 1.0], [0, 127, 255]), ([np.nan, 0.0, 1.0], [0, 0, 255]),
        ([np.inf, 0.0, 1.0], [255, 0, 255]), ([-np.inf, 0.0, 1.0], [0, 0, 255]), ([-3e38, 0.0, 3e38], [0, 127, 255]),
        ([0.0, 128.0, 255.0], [0, 128, 255]),  # 8-bit values
        ([0.25], [63]), ([1.0], [255]), ([0.0], [0]), ([-5.0], [0]), ([1e9], [255]), ([np.nan], [0]),
    ],
)  # fmt: skip
def test_float_pictures_are_stretched_over_their_finite_values(values: list[float], expected: list[int]) -> None:
    picture = load_picture(Image.fromarray(np.full((40, len(values)), values, np.float32)))
    assert np.abs(picture[0, :, 0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_single_outliers_do_not_decide_about_the_contrast(kind: type) -> None:
    values = np.tile(np.linspace(100, 4000, 100), (100, 1)).astype(kind)
    values[0, 0] = 65535
    picture = load_picture(Image.fromarray(values))[1:, :, 0].astype(int)
    assert picture.min() == 0 and picture.max() == 255 and abs(picture[:, 50].mean() - 128) < 4
    assert corner(load_picture(Image.fromarray(np.full((9, 9), 32768, kind)))) == [127, 127, 127], "one value is grey"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_every_mode_of_pillow(mode: str) -> None:
    picture = load_picture(Image.new("RGB", (5, 3), "white").convert("L" if mode == "LA" else "RGB").convert(mode))
    assert picture.shape == (3, 5, 3) and picture.dtype == np.uint8 and (picture >= 250).all()


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    image = Image.open(tmp_path / "moving.gif")
    image.seek(2)
    assert corner(load_picture(image)) == corner(load_picture(str(tmp_path / "moving.gif"))) == RED


def test_large_jpegs_are_reduced_by_their_decoder(tmp_path: Path) -> None:
    image = Image.fromarray(halves(2000, 3000, 1500))
    progressive = {"progressive": True, "subsampling": 0}
    for name, options in {"plain": {}, "progressive": progressive, "turned": {"exif": turned(6)}}.items():
        image.save(tmp_path / name, "JPEG", **options)
        with pytest.raises(InvalidImageError, match="3000 x 2000 pixels, more than the . million that are accepted of a JPEG"):
            load_picture(tmp_path / name, max_pixels=3_000_000)
        check_picture(tmp_path / name, max_side=400, max_pixels=5_900_000)
        picture = load_picture(tmp_path / name, max_side=400, max_pixels=5_900_000)
        assert max(picture.shape) == 400 and np.abs(corner(picture)[0] - 255) < 3
    image.save(tmp_path / "large.jp2")
    assert load_picture(tmp_path / "large.jp2", max_side=400).shape == (267, 400, 3)
    for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF"):
        image.save(tmp_path / "other", kind)
        with pytest.raises(InvalidImageError, match=f"of a {kind} picture; make it smaller, or save it as a JPEG"):
            check_picture(tmp_path / "other", max_side=400, max_pixels=2_000_000)


def test_a_jpeg_of_very_many_passes_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(halves(1000, 1000, 500)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    (tmp_path / "whole.jpg").write_bytes(data)
    assert load_picture(tmp_path / "whole.jpg").shape == (1000, 1000, 3)
    last = data.rindex(b"\xff\xda")
    (tmp_path / "bomb.jpg").write_bytes(data[:last] + data[last:-2] * 1000 + data[-2:])
    with pytest.raises(InvalidImageError, match="too many passes"):
        check_picture(tmp_path / "bomb.jpg", max_side=400)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_size_is_checked_in_the_header(tmp_path: Path) -> None:
    for size in ((9900, 9900), (60000, 60000), (2**31 - 1, 2**31 - 1), (0, 5), (5, 0)):
        header = struct.pack(">IIBBBBB", *size, 8, 6, 0, 0, 0)
        chunks = {b"IHDR": header, b"IDAT": zlib.compress(bytes(1000)), b"IEND": b""}
        data = b"".join(png_chunk(name, content) for name, content in chunks.items())
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
        with pytest.raises(InvalidImageError, match=r"\.$"):
            check_picture(tmp_path / "bomb.png", max_side=1600, max_pixels=40_000_000)


def test_files_that_start_a_program_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(InvalidImageError, match="not a picture"):
        load_picture(tmp_path / "page.png")


def test_unusable_pictures_are_refused_with_a_sentence(tmp_path: Path) -> None:
    Image.fromarray(halves(50, 50, 25)).save(tmp_path / "whole.png")
    bare = b"II*\0\x08\0\0\0" + bytes(6)  # a TIFF without dimensions: Pillow's TypeError
    for content in (b"not a picture", (tmp_path / "whole.png").read_bytes()[:80], b"", bare):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(InvalidImageError, match=r"\.$"):
            load_picture(tmp_path / "file")
    arrays = [np.zeros((0, 5, 3), np.uint8), np.zeros((5, 5, 3), np.float32), np.zeros((5, 5, 2), np.uint8)]
    for source in (tmp_path / "missing.png", tmp_path, *arrays, None, 7):
        with pytest.raises(InvalidImageError, match=r"\.$"):
            load_picture(source)
    assert load_picture(np.zeros((1, 4000, 3), np.uint8), max_side=1000).shape == (1, 1000, 3)
    with pytest.raises(InvalidImageError, match="2000 pixels, more than the 2 million.*smaller"):
        load_picture(np.zeros((2000, 1001, 3), np.uint8), max_pixels=2_000_000)
