"""Measure the peak memory of the largest photos that the page accepts, alone and eight at once (Linux).

    python -m tools.picture_memory

It first measures reading in this process, then whole questions to a server with the bundled model.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from ldvc.web.segmenter import read_photo
from ldvc.web.session import Problem
from tools.fuzz_pictures import photo, resident
from tools.remote import ROOT, Visitor, serve

EXAMPLE = ROOT / "assets" / "examples" / "dog.jpg"


def peak(work: Callable[[], object], process: int | str = "self") -> tuple[float, float]:
    """Memory of a call in MB: (peak, remainder after the call), both relative to the resident memory before."""
    before = resident(process=process)
    Path(f"/proc/{process}/clear_refs").write_text("5")  # resets the peak
    work()
    highest = resident("VmHWM", process)
    return highest - before, resident(process=process) - before


def call_at_once(work: Callable[[Path], object], paths: Sequence[Path]) -> None:
    """Call a function for several files at the same time, and wait for all calls."""
    with ThreadPoolExecutor(len(paths)) as threads:
        list(threads.map(work, paths))


def large_files(folder: Path) -> dict[str, Callable[[], Path]]:
    """Functions that write the largest accepted pictures and one refused picture, by description."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    side = 6300  # 39.7 megapixels

    def base(mode: str) -> Image.Image:
        return photo((side, side)).convert(mode)

    def deep(factor: float, kind: type) -> Image.Image:
        return Image.fromarray((np.asarray(base("L")) * factor).astype(kind))

    turned = Image.Exif()
    turned[0x0112] = 6
    quick, zipped = {"compress_level": 1}, {"compression": "tiff_adobe_deflate"}
    plans: list[tuple[str, Callable[[], Image.Image], str, dict]] = [
        ("PNG RGB turned, profile", lambda: base("RGB"), "PNG", {**quick, "icc_profile": profile, "exif": turned}),
        ("PNG RGBA", lambda: base("RGBA"), "PNG", quick),
        ("PNG palette, transparent", lambda: base("P"), "PNG", {**quick, "transparency": 3}),
        ("PNG 16 bits", lambda: deep(200, np.uint16), "PNG", quick),
        ("JPEG", lambda: base("RGB"), "JPEG", {}),
        ("JPEG 100 megapixels", lambda: photo((10_000, 10_000)), "JPEG", {}),
        ("JPEG progressive 4:4:4", lambda: base("RGB"), "JPEG", {"progressive": True, "subsampling": 0}),
        ("JPEG CMYK", lambda: base("CMYK"), "JPEG", {}),
        ("TIFF float", lambda: deep(1 / 255, np.float32), "TIFF", zipped),
        ("TIFF RGBA", lambda: base("RGBA"), "TIFF", zipped),
        ("GIF", lambda: base("P"), "GIF", {}),
        ("BMP, 12 megapixels", lambda: photo((4000, 3000)), "BMP", {}),
        ("WebP, 20 megapixels", lambda: photo((4470, 4470)), "WEBP", {"method": 0}),
        ("AVIF, 24 megapixels", lambda: photo((4900, 4900)), "AVIF", {"speed": 10}),
        ("JPEG 2000, 12 megapixels", lambda: photo((4000, 3000)), "JPEG2000", {}),
        ("PNG RGBA 98 megapixels", lambda: Image.new("RGBA", (9900, 9900)), "PNG", quick),
    ]

    def write(description: str, make: Callable[[], Image.Image], kind: str, options: dict) -> Path:
        path = folder / description.replace(" ", "-")
        make().save(path, kind, **options)
        return path

    return {plan[0]: functools.partial(write, *plan) for plan in plans}


def read_or_refuse(path: Path) -> str:
    """Read a picture; return its size, or the sentence with which it is refused."""
    try:
        height, width, _ = read_photo(str(path)).shape
        return f"{width} x {height}"
    except Problem as problem:
        return str(problem)


def main() -> None:
    """Run the command."""
    with tempfile.TemporaryDirectory() as folder:
        files = {description: write() for description, write in large_files(Path(folder)).items()}
        sizes = {description: read_or_refuse(path) for description, path in files.items()}  # also loads the codecs
        print(f"idle {resident():.0f} MB; peak above it and what remains, in MB:")
        for description, path in files.items():
            start = time.perf_counter()
            highest, remaining = peak(functools.partial(read_or_refuse, path))
            seconds = time.perf_counter() - start
            print(f"  {description:26} {highest:4.0f} {remaining:5.1f}  {seconds:4.1f} s  {sizes[description]}", flush=True)
        first = list(files.values())[:8]
        highest, remaining = peak(lambda: call_at_once(read_or_refuse, first))
        print(f"  the first eight at once    {highest:4.0f} {remaining:5.1f}")
        with serve(Path(folder)) as server:
            server.wait_for_examples()
            process = server.process.pid

            def ask(path: Path) -> None:
                visitor = Visitor(server.address)
                visitor.set("photo", visitor.upload(path))
                visitor.trigger("photo", "change")
                visitor.ask("dog, grass, sky")
                visitor.close()

            for _ in range(3):
                call_at_once(ask, [EXAMPLE] * 8)  # allocates the memory of the model
            idle = resident(process=process)
            print(f"server, idle after 24 questions: {idle:.0f} MB; peak above it and what remains, in MB:")
            for description, path in list(files.items())[:8]:
                highest, remaining = peak(functools.partial(ask, path), process)
                print(f"  {description:26} {highest:4.0f} {remaining:5.1f}", flush=True)
            highest, remaining = peak(lambda: call_at_once(ask, first), process)
            print(f"  all eight at once          {highest:4.0f} {remaining:5.1f}")


if __name__ == "__main__":
    main()
