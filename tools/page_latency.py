"""Measure how long visitors wait: python -m tools.page_latency

Starts the page as a process, sends the events of its widgets over HTTP, and prints the median times and their limits. The exit
status is 0 if all limits are met. The photo has 1024 x 768 pixels, and a question has six names. If Chromium and playwright are
installed, the opacity, which the browser changes without the server, is timed, too. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image

from ldvc.class_names import load_classes
from tools.remote import ROOT, PageError, Visitor, serve

PHOTO = ROOT / "assets" / "examples" / "dog.jpg"
SIZE = (1024, 768)
NAMES = ("dog", "grass", "cat", "fence", "bush", "sky")
KINDS = ("red", "small", "old", "wooden", "tall", "round", "wild", "young", "dark", "wet")  # combined with NAMES to new names
OPACITY_SCRIPT = """async (value) => {
    const slider = document.querySelector('#overlay .opacity'), canvas = document.querySelector('#overlay canvas');
    const before = canvas.toDataURL(), start = performance.now();
    slider.value = value;
    slider.dispatchEvent(new Event('input', {bubbles: true}));
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    const seconds = (performance.now() - start) / 1000;
    return canvas.toDataURL() === before ? null : seconds;
}"""


class Bench:
    """One visitor with a stopwatch."""

    def __init__(self, address: str, folder: Path, runs: int) -> None:
        self.visitor, self.folder, self.runs = Visitor(address), folder, runs

    def timed(self, elem_id: str, event: str, *, shows: str) -> float:
        """Seconds until the answer to an event changes the component with the elem_id `shows`."""
        start = time.perf_counter()
        changes = self.visitor.trigger(elem_id, event)
        seconds = time.perf_counter() - start
        if shows not in changes:
            raise PageError(f"{event!r} of #{elem_id} did not change #{shows}.")
        return seconds

    def first_overlay(self) -> Iterator[float]:
        """Click on Segment with a photo that is not encoded yet. The upload before the click is not timed."""
        self.visitor.set("names", ", ".join(NAMES))
        picture, path = Image.open(PHOTO).convert("RGB").resize(SIZE), self.folder / "photo.jpg"
        for run in range(self.runs):
            picture.putpixel((run, 0), (255, 0, 0))  # a new photo for the page
            picture.save(path, quality=92)
            self.visitor.set("photo", self.visitor.upload(path))
            yield self.timed("run", "click", shows="overlay")

    def new_names(self) -> Iterator[float]:
        """Click on Segment with the same photo and six new names."""
        for kind in itertools.islice(itertools.permutations(KINDS, 2), self.runs):
            self.visitor.set("names", ", ".join(" ".join((*kind, name)) for name in NAMES))
            yield self.timed("run", "click", shows="overlay")

    def many_names(self) -> Iterator[float]:
        """Click on Segment with the same photo and the 80 names of COCO, in another order each time."""
        names = load_classes("coco80")
        for run in range(self.runs):
            self.visitor.set("names", ", ".join(names[run:] + names[:run]))
            yield self.timed("run", "click", shows="overlay")

    def layer(self) -> Iterator[float]:
        """Another decoder layer in the Attention tab."""
        self.visitor.trigger("tab-attention", "select")
        for run in range(self.runs):
            self.visitor.set("attention-layer", run % 2)
            yield self.timed("attention-layer", "input", shows="attention-grid")

    def click(self) -> Iterator[float]:
        """A click on the photo in the Routing tab."""
        self.visitor.trigger("tab-routing", "select")
        for run in range(self.runs):
            self.visitor.set("routing-view", [2 + run % 16, 3 + run])
            yield self.timed("routing-view", "input", shows="routing-view")


def opacity(browser: str, address: str, runs: int) -> Iterator[float]:
    """Move the opacity in Chromium (path `browser`); seconds until the frame with the new picture."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--headless", "--no-sandbox", "--disable-gpu"])
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{address}?{urlencode({'example': PHOTO.stem, 'names': ', '.join(NAMES)})}")
        page.locator("#legend li").first.wait_for()
        for run in range(runs):
            seconds = page.evaluate(OPACITY_SCRIPT, 20 + 3 * run)
            if seconds is None:
                raise PageError("moving the opacity did not change the picture")
            yield seconds
        chromium.close()


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="runs of each action (default: 20)")
    args = parser.parse_args()
    passed = True
    with tempfile.TemporaryDirectory() as scratch, serve(Path(scratch)) as served:
        served.wait_for_examples()
        bench = Bench(served.address, Path(scratch), args.runs)
        actions = [
            ("first overlay, photo not yet encoded", bench.first_overlay, 0.45),
            ("new names, same photo", bench.new_names, 0.12),
            ("80 names, same photo", bench.many_names, 0.25),
            ("layer, Attention tab", bench.layer, 0.2),
            ("click on a patch, Routing tab", bench.click, 0.2),
        ]
        browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if browser and find_spec("playwright"):
            actions.append(("opacity (in the browser)", lambda: opacity(browser, served.address, args.runs), 0.2))
        else:
            print("The opacity is not timed: there is no Chromium with playwright here.")
        print(f"First page {served.seconds:.1f} s after the start. Medians of {args.runs}, in seconds:\n")
        print(f"{'':38}{'median':>8}{'slowest':>9}{'limit':>7}")
        for title, action, limit in actions:
            try:
                seconds = list(action())
            except PageError as error:
                print(f"{title:38}FAILED: {error}")
                passed = False
                continue
            median = statistics.median(seconds)
            passed &= median <= limit
            verdict = "ok" if median <= limit else "TOO SLOW"
            print(f"{title:38}{median:8.3f}{max(seconds):9.3f}{limit:7.2f}  {verdict}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
