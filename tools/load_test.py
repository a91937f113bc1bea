"""Test the page with many visitors at once: python -m tools.load_test

Starts the page as a process, or uses a running page. Each visitor has a different photo (an example with changed colours and
size) and changes the names repeatedly. First every question is asked alone. Then all visitors ask at once, and each answer must
be the same to the bit. If the server is busy, this is counted and the question is asked again.

The server's memory grows until its answers reach their limit (LDVC_ANSWERS_GB). The limit is small here, so that the questions
that are asked alone reach it. The memory is compared after a warm-up, the first fifth of the questions at once.

Prints the waiting times, the memory of the server and its temporary files. The exit status is 0 if every answer was right,
nobody waited longer than two minutes, and the memory in the last tenth was at most 10 % above that after the warm-up.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from PIL import Image

from ldvc.web import texts
from tools.fuzz_pictures import resident
from tools.remote import ROOT, PageError, Visitor, serve

EXAMPLES = sorted((ROOT / "assets" / "examples").glob("*.jpg"))
NAMES = ("dog, grass, fence", "building, sky, car, person", "cup, table", "tree, water", "wall, floor, chair, window")
QUESTIONS = 3  # different questions of each visitor
WARM_UP = 0.2  # share of the time or of the requests
WINDOW = 0.1  # share of the time or of the requests in which the memory is measured
GROWTH = 1.1  # maximum ratio of the memory at the end and after the warm-up


@dataclass
class Outcome:
    """The results of all visitors together."""

    seconds: list[float] = field(default_factory=list)
    busy: int = 0
    wrong: int = 0
    failures: list[str] = field(default_factory=list)


class Guest:
    """A visitor of a page with a photo that no other visitor has."""

    def __init__(self, address: str, number: int, folder: Path) -> None:
        self.visitor = Visitor(address)
        photo = Image.open(EXAMPLES[number % len(EXAMPLES)]).convert("HSV").resize((640 + 4 * number, 480))
        hue, *others = photo.split()
        photo = Image.merge("HSV", (hue.point(lambda value: (value + 5 * number) % 256), *others)).convert("RGB")
        path = folder / f"photo-{number}.jpg"
        photo.save(path, quality=90)
        self.visitor.set("photo", self.visitor.upload(path))
        self.names = [NAMES[(number + each) % len(NAMES)] for each in range(QUESTIONS)]
        self.expected: dict[str, str] = {}

    def ask(self, names: str) -> str:
        """Press the button and return a digest of the answer. PageError: no answer. HTTPError: the server is busy or gone."""
        changes = self.visitor.ask(names)
        answer = changes.get("overlay", {}).get("props", {}).get("answer") or changes.get("overlay", {}).get("answer")
        if answer is None:
            problems = [change.get("value") for name, change in changes.items() if name.endswith("-problem")]
            raise PageError(" ".join(filter(None, problems)) or "the page has not painted an answer")
        return hashlib.sha256(json.dumps(answer, sort_keys=True).encode()).hexdigest()

    def is_forgotten(self) -> bool:
        """Whether the server has removed the answer because of the memory limit."""
        return texts.EXPIRED in self.visitor.trigger("download-data", "click")["download-problem"]["value"]


class Load:
    """All visitors, in threads. They ask for `seconds`, or until they have asked `requests` questions together."""

    def __init__(self, guests: list[Guest], seconds: float, requests: int | None) -> None:
        self.guests, self.seconds, self.requests = guests, seconds, requests
        self.outcome, self.lock = Outcome(), threading.Lock()
        self.start = time.perf_counter()

    def share(self) -> float:
        """The share of the run that is done, from 0 to 1."""
        if self.requests:
            return len(self.outcome.seconds) / self.requests
        return (time.perf_counter() - self.start) / self.seconds

    def visit(self, guest: Guest) -> None:
        """Ask questions until the run ends."""
        for names in itertools.cycle(guest.names):
            if self.share() >= 1:
                return
            begin = time.perf_counter()
            try:
                digest = guest.ask(names)
            except (PageError, httpx.HTTPError) as error:
                with self.lock:
                    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 503:
                        self.outcome.busy += 1
                    else:
                        self.outcome.failures.append(f"{type(error).__name__}: {error}")
                time.sleep(random.uniform(0.5, 1.5))  # the visitor tries again later
            else:
                with self.lock:
                    self.outcome.seconds.append(time.perf_counter() - begin)
                    self.outcome.wrong += digest != guest.expected[names]


def median_between(samples: list[tuple[float, float]], start: float, end: float) -> float:
    """Median memory between two shares of the run, from samples (share, memory); of all samples if none is in between."""
    selected = [memory for share, memory in samples if start <= share < end]
    return statistics.median(selected or [memory for _, memory in samples])


def run(address: str, folder: Path, process: int | None, files: Path | None, args: argparse.Namespace) -> bool:
    """Ask every question alone, then all at once. Print the results and return whether the test passed."""
    guests = [Guest(address, number, folder) for number in range(args.visitors)]

    def memory() -> float:
        return resident(process=process) if process else 0.0

    alone, idle = [], memory()
    for guest in guests:
        for names in guest.names:
            begin = time.perf_counter()
            guest.expected[names] = guest.ask(names)
            alone.append(time.perf_counter() - begin)
    bound = "reached" if guests[0].is_forgotten() else "not reached"
    digests = [digest for guest in guests for digest in guest.expected.values()]
    load = Load(guests, args.seconds, args.requests)
    threads = [threading.Thread(target=load.visit, args=(guest,), daemon=True) for guest in guests]
    for thread in threads:
        thread.start()
    samples = [(0.0, idle)]
    while any(thread.is_alive() for thread in threads):
        samples.append((load.share(), memory()))
        time.sleep(0.5)
    warm = median_between(samples, WARM_UP, WARM_UP + WINDOW)
    after = median_between(samples, 1 - WINDOW, math.inf)
    peak, outcome = max(used for _, used in samples), load.outcome
    quantiles = statistics.quantiles(outcome.seconds, n=20, method="inclusive") if len(outcome.seconds) > 1 else [0.0] * 19
    p50, p95 = quantiles[9], quantiles[18]
    duration = time.perf_counter() - load.start
    print(f"{platform.machine()}, {os.cpu_count()} processors, {args.visitors} visitors, {duration:.0f} s")
    print(f"answers {len(outcome.seconds)}, busy {outcome.busy}, wrong {outcome.wrong}, failed {len(outcome.failures)}")
    print(f"seconds for an answer: alone median {statistics.median(alone):.2f}; at once p50 {p50:.2f}, p95 {p95:.2f}")
    if process is not None:
        print(f"memory in MB: idle {idle:.0f}, after the warm-up {warm:.0f}, peak {peak:.0f}, at the end {after:.0f}")
        print(f"bound of the answers: {bound} before the questions at once")
    if files is not None:
        paths = [path for path in files.rglob("*") if path.is_file()]
        print(f"temporary files: {len(paths)}, {sum(path.stat().st_size for path in paths) / 1e6:.1f} MB")
    for failure in sorted(set(outcome.failures))[:5]:
        print(f"failed: {failure}")
    distinct = len(set(digests)) == len(digests)
    return distinct and not outcome.wrong and not outcome.failures and bool(outcome.seconds) and after <= GROWTH * warm


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=50, help="number of visitors at once (default: 50)")
    parser.add_argument("--seconds", type=float, default=600, help="duration of the questions at once (default: 600)")
    parser.add_argument("--requests", type=int, help="number of questions at once, instead of a duration")
    parser.add_argument("--answers-gb", type=float, default=0.5, help="LDVC_ANSWERS_GB of the page (default: 0.5)")
    parser.add_argument("--address", help="address of a running page, with a slash at the end; default: start a page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if args.address:
            passed = run(args.address, folder, None, None, args)
        else:
            print(f"LDVC_ANSWERS_GB={args.answers_gb}")
            with serve(folder, environment={**os.environ, "LDVC_ANSWERS_GB": str(args.answers_gb)}) as served:
                served.wait_for_examples()
                passed = run(served.address, folder, served.process.pid, folder / "gradio", args)
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
