"""Test how the page reads damaged and hostile pictures.

    python -m tools.fuzz_pictures --count 2000 --seed 0

Each file must give a picture or a sentence within 5 seconds. Files that fail are kept in the folder --keep, and then the exit
status is 1. Case i of a seed is always the same file.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import faulthandler
import gc
import io
import random
import re
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from ldvc.web.segmenter import read_photo
from ldvc.web.session import Problem

SECONDS = 5.0
SIZE = (96, 64)
HEIC = Path(__file__).resolve().parents[1] / "tests" / "small.heic"  # Pillow writes no HEIC
# (marker, number of bytes after the marker, struct format) of the width and height in each format.
SIZE_FIELDS = (
    (b"IHDR", 0, ">II"),
    (b"GIF89a", 0, "<HH"),
    (b"(\0\0\0", 0, "<II"),  # BMP
    (b"\xff\xc0", 3, ">HH"),  # JPEG
    (b"\xff\xc2", 3, ">HH"),
    (b"ispe", 4, ">II"),  # AVIF and HEIC
    (b"ihdr", 0, ">II"),  # JPEG 2000
    (b"\xff\x51", 4, ">II"),
    (b"ANMF", 10, "<HH"),  # WebP
    (b"VP8X", 8, "<HH"),
)
EXTREMES = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)


def photo(size: tuple[int, int] = SIZE) -> Image.Image:
    """A smooth picture with some noise."""
    width, height = size
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = across, down, 128
    pixels[::7, ::5] ^= 31
    return Image.fromarray(pixels)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.copy().save(file, kind, **options)  # a copy, because Pillow stores encoder settings in the image
    return file.getvalue()


def valid_files() -> dict[str, bytes]:
    """Files of every format and most modes, with profiles, orientations, transparency and animations."""
    image = photo()
    deep = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 200)
    real = Image.fromarray(np.asarray(image)[..., 0].astype(np.float32) / 255)
    turned = Image.Exif()
    turned[0x0112] = 6

    def frames() -> dict:  # options for a second frame
        return {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}

    extras = {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), "exif": turned.tobytes()}
    files = {
        "jpeg": saved(image, "JPEG", **extras),
        "jpeg progressive": saved(image, "JPEG", progressive=True, subsampling=0),
        "jpeg cmyk": saved(image.convert("CMYK"), "JPEG"),
        "jpeg grey": saved(image.convert("L"), "JPEG"),
        "mpo": saved(image, "MPO", **frames()),
        "gif": saved(image.convert("P"), "GIF", transparency=3),
        "gif animation": saved(image, "GIF", **frames()),
        "webp": saved(image, "WEBP", **extras),
        "webp lossless": saved(image.convert("RGBA"), "WEBP", lossless=True),
        "webp animation": saved(image, "WEBP", **frames()),
        "avif": saved(image, "AVIF", **extras),
        "heic": HEIC.read_bytes(),
        "bmp": saved(image, "BMP"),
        "ppm": saved(image, "PPM"),
        "jpeg 2000": saved(image, "JPEG2000"),
        "png animation": saved(image, "PNG", **frames()),
        "png extras": saved(image, "PNG", **extras),
        "png deep": saved(deep, "PNG"),
        "tiff float": saved(real, "TIFF"),
        "tiff deep": saved(deep, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": saved(image, "TIFF", compression="jpeg"),
        "tiff frames": saved(image, "TIFF", compression="tiff_adobe_deflate", **frames()),
        "tiff cmyk": saved(image.convert("CMYK"), "TIFF"),
        "tiff lab": saved(image.convert("LAB"), "TIFF"),
    }
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        files[f"png {mode}"] = saved(image.convert(mode), "PNG")
    return files


def truncated(data: bytearray, chance: random.Random) -> bytes:
    return bytes(data[: chance.randrange(len(data))])


def flipped(data: bytearray, chance: random.Random) -> bytes:
    for _ in range(chance.choice((1, 3, 10, 100))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def absurd_header(data: bytearray, chance: random.Random) -> bytes:
    """Write extreme numbers into the first bytes: sizes, offsets, counts."""
    for _ in range(chance.choice((1, 2, 4))):
        kind = chance.choice(("<H", ">H", "<I", ">I"))
        value = chance.choice(EXTREMES) & (0xFFFF if kind[1] == "H" else 0xFFFFFFFF)
        at = chance.randrange(max(1, min(len(data), 300) - 4))
        data[at : at + struct.calcsize(kind)] = struct.pack(kind, value)
    return with_checksums(bytes(data))


def absurd_size(data: bytearray, chance: random.Random) -> bytes:
    """Replace width and height by other values, from 0 to the largest number of the field."""
    mark, skip, kind = chance.choice([field for field in SIZE_FIELDS if field[0] in data] or [SIZE_FIELDS[0]])
    at = data.find(mark) + len(mark) + skip
    largest = 2 ** (8 * struct.calcsize(kind) // 2) - 1
    sides = (0, 1, SIZE[0], 1000, 6000, 10_000, 30_000, 65_535, 2**31, largest)
    data[at : at + struct.calcsize(kind)] = struct.pack(kind, *(min(chance.choice(sides), largest) for _ in range(2)))
    return with_checksums(bytes(data))


def cut_and_pasted(data: bytearray, chance: random.Random) -> bytes:
    """Remove, repeat or move a piece, or replace it by noise."""
    start = chance.randrange(len(data))
    piece = data[start : start + chance.choice((1, 8, 64, 1000))]
    kind = chance.randrange(4)
    end = start + len(piece)
    if kind == 0:
        del data[start:end]
    elif kind == 1:
        data[start:start] = piece * chance.choice((1, 2, 50))
    elif kind == 2:
        at = chance.randrange(len(data))
        data[at : at + len(piece)] = piece
    else:
        data[start:end] = chance.randbytes(len(piece))
    return bytes(data)


def decorated(data: bytearray, chance: random.Random) -> bytes:
    """Add broken profiles, EXIF data and texts to a valid file: as chunks of a PNG, otherwise by saving a new file."""
    junk = chance.randbytes(chance.choice((0, 4, 200, 20_000)))
    orientation = Image.Exif()
    orientation[0x0112] = chance.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535))
    exif = chance.choice((junk, b"Exif\0\0" + junk, orientation.tobytes(), orientation.tobytes()[: chance.randrange(1, 30)]))
    if data.startswith(b"\x89PNG"):
        text = b"key\0\0" + zlib.compress(bytes(chance.choice((10, 3_000_000))))
        chunks = {b"tEXt": junk, b"zTXt": text, b"eXIf": exif, b"tRNS": junk, b"gAMA": junk}
        chunks[b"iCCP"] = b"p\0\0" + zlib.compress(junk)
        name = chance.choice(list(chunks))
        return bytes(data[:33]) + png_chunk(name, chunks[name]) * chance.choice((1, 3)) + bytes(data[33:])
    kind = chance.choice(("JPEG", "WEBP", "TIFF", "AVIF") if exif == orientation.tobytes() else ("JPEG", "WEBP"))
    return saved(photo((chance.choice((1, 7, 96)), chance.choice((1, 5, 64)))), kind, icc_profile=junk, exif=exif)


def odd_size(data: bytearray, chance: random.Random) -> bytes:
    """A valid file with one pixel, one row or column, or only one value."""
    size = chance.choice(((1, 1), (1, 3000), (3000, 1), (2, 20_000), (20_000, 2)))
    mode = chance.choice(("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "I"))
    kinds = {"CMYK": ("JPEG", "TIFF"), "F": ("TIFF",), "I": ("TIFF", "PNG"), "I;16": ("TIFF", "PNG")}
    image = Image.new(mode, size) if mode in kinds else photo(size).convert(mode)
    if mode == "F":
        image = Image.fromarray(np.full(size[::-1], chance.choice((np.nan, np.inf, -np.inf, 3e38, -1.0)), np.float32))
    return saved(image, chance.choice(kinds.get(mode, ("PNG",))))


MUTATIONS = (truncated, flipped, flipped, absurd_header, absurd_size, cut_and_pasted, decorated, odd_size)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_checksums(data: bytes) -> bytes:
    """Correct the checksum of a PNG's header, so that decoders accept its values; other files stay unchanged."""
    return data[:8] + png_chunk(b"IHDR", data[16:29]) + data[33:] if data.startswith(b"\x89PNG") else data


def cases(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (format and mutation, file)."""
    files = valid_files()
    for index in range(count):
        chance = random.Random(f"{seed} {index}")
        name, mutate = chance.choice(list(files)), chance.choice(MUTATIONS)
        yield f"{name}, {mutate.__name__}", mutate(bytearray(files[name]), chance)


@dataclass
class Summary:
    """The results of all files."""

    outcomes: collections.Counter = field(default_factory=collections.Counter)  # count of each result: "picture" or a sentence
    failures: list[tuple[str, str]] = field(default_factory=list)  # (case, error)
    slowest: tuple[float, str] = (0.0, "")  # (seconds, case)
    memory: tuple[float, float] = (0.0, 0.0)  # resident MB after a tenth of the files, and at the end


def read(path: Path) -> tuple[str, str]:
    """Read a file and return (result, error); the error is "" if the result is valid."""
    try:
        picture = read_photo(str(path))
    except Problem as problem:
        return re.sub(r"has \d+ x \d+ pixels, more than .*", "has W x H pixels, more than ...", str(problem)), ""
    except BaseException as error:
        return repr(error), repr(error)
    fine = picture.dtype == np.uint8 and picture.ndim == 3 and 1 <= max(picture.shape) <= 1600
    return "picture", "" if fine else f"a picture of shape {picture.shape}"


def fuzz(count: int, seed: int, keep: Path) -> Summary:
    """Read `count` damaged files. The folder `keep` holds the current file and the files that failed."""
    summary = Summary()
    keep.mkdir(parents=True, exist_ok=True)
    current, warm = keep / "current", 0.0
    for index, (case, data) in enumerate(cases(count, seed)):
        case = f"case {index}: {case}"
        current.write_bytes(data)  # remains if the process crashes
        start = time.perf_counter()
        outcome, failure = read(current)
        seconds = time.perf_counter() - start
        summary.slowest = max(summary.slowest, (seconds, case))
        summary.outcomes[outcome] += 1
        if failure or seconds > SECONDS:
            summary.failures.append((case, failure or f"{seconds:.1f} s"))
            (keep / f"case-{seed}-{index}").write_bytes(data)
        if index == count // 10:
            warm = resident()
    current.unlink(missing_ok=True)
    summary.memory = warm, resident()
    return summary


def resident(field: str = "VmRSS", process: int | str = "self") -> float:
    """Resident memory of a process in MB: the present value, or the peak ("VmHWM"); 0 without /proc."""
    if sys.platform != "linux":
        return 0.0
    if process == "self":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(rf"{field}:\s*(\d+)", status)[1]) / 1024


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="number of files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "ldvc-fuzz", help="folder of failures")
    options = parser.parse_args()
    faulthandler.enable()
    summary = fuzz(options.count, options.seed, options.keep)
    print(f"{options.count} files, seed {options.seed}")
    for outcome, count in summary.outcomes.most_common():
        print(f"  {count:5}  {outcome}")
    print("slowest: {:.2f} s, {}".format(*summary.slowest))
    print("memory after a tenth of the files and at the end: {:.0f} MB, {:.0f} MB".format(*summary.memory))
    for case, failure in summary.failures:
        print(f"FAILED {case}: {failure}")
    sys.exit(1 if summary.failures else 0)


if __name__ == "__main__":
    main()
