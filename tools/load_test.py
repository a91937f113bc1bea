"""Many visitors at once: python -m tools.load_test

Starts the page as a process, or uses one that is running. Each visitor has a photo of their own (an example with other colours
and an own size) and changes the names again and again. First every question is asked alone; later, with all visitors at once,
an answer must be the same to the bit. An answer that the server is busy is counted, and the question is asked again.

The server's memory grows until its answers reach their bound (LDVC_ANSWERS_GB). The bound is small here, so that the questions
that are asked alone reach it; the memory counts after the first fifth of the others.

Prints the waiting times, the memory of the server and its temporary files. The exit status says whether every answer was right,
nobody waited longer than two minutes, and the memory in the last tenth was within 10 % of that after the warm-up.
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
QUESTIONS = 3  # different ones for each visitor
WARM_UP = 0.2  # of the time or the requests
WINDOW = 0.1  # of them, in which the memory is measured
GROWTH = 1.1  # memory at the end, compared with that after the warm-up


@dataclass
class Outcome:
    """What happened to all visitors together."""

    seconds: list[float] = field(default_factory=list)
    busy: int = 0
    wrong: int = 0
    failures: list[str] = field(default_factory=list)


class Guest:
    """A visitor of a page, with a photo of their own in a folder."""

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
        """Press the button; a digest of the answer. PageError without one, HTTPError if the server is busy or gone."""
        changes = self.visitor.ask(names)
        answer = changes.get("overlay", {}).get("props", {}).get("answer") or changes.get("overlay", {}).get("answer")
        if answer is None:
            problems = [change.get("value") for name, change in changes.items() if name.endswith("-problem")]
            raise PageError(" ".join(filter(None, problems)) or "the page has not painted an answer")
        return hashlib.sha256(json.dumps(answer, sort_keys=True).encode()).hexdigest()

    def is_forgotten(self) -> bool:
        """Whether the server has forgotten the answer, to keep to its bound."""
        return texts.EXPIRED in self.visitor.trigger("download-data", "click")["download-problem"]["value"]


class Load:
    """All visitors, in threads: they ask so many seconds, or so many questions together."""

    def __init__(self, guests: list[Guest], seconds: float, requests: int | None) -> None:
        self.guests, self.seconds, self.requests = guests, seconds, requests
        self.outcome, self.lock = Outcome(), threading.Lock()
        self.start = time.perf_counter()

    def share(self) -> float:
        """How much is done, of 1."""
        if self.requests:
            return len(self.outcome.seconds) / self.requests
        return (time.perf_counter() - self.start) / self.seconds

    def visit(self, guest: Guest) -> None:
        """Ask until the end."""
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
                time.sleep(random.uniform(0.5, 1.5))  # a visitor who tries again
            else:
                with self.lock:
                    self.outcome.seconds.append(time.perf_counter() - begin)
                    self.outcome.wrong += digest != guest.expected[names]


def during(samples: list[tuple[float, float]], start: float, end: float) -> float:
    """The median of the memory between two shares of the run, from (share, memory); of all where there is no sample."""
    found = [memory for share, memory in samples if start <= share < end]
    return statistics.median(found or [memory for _, memory in samples])


def run(address: str, folder: Path, process: int | None, files: Path | None, args: argparse.Namespace) -> bool:
    """Ask alone, then all at once; print what happened, and return whether all was well."""
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
    warm, after = during(samples, WARM_UP, WARM_UP + WINDOW), during(samples, 1 - WINDOW, math.inf)
    peak, outcome = max(used for _, used in samples), load.outcome
    cuts = statistics.quantiles(outcome.seconds, n=20, method="inclusive") if len(outcome.seconds) > 1 else [0.0] * 19
    took = time.perf_counter() - load.start
    print(f"{platform.machine()}, {os.cpu_count()} processors, {args.visitors} visitors, {took:.0f} s")
    print(f"answers {len(outcome.seconds)}, busy {outcome.busy}, wrong {outcome.wrong}, failed {len(outcome.failures)}")
    print(f"seconds for an answer: alone median {statistics.median(alone):.2f}; at once p50 {cuts[9]:.2f}, p95 {cuts[18]:.2f}")
    if process is not None:
        print(f"memory in MB: idle {idle:.0f}, after the warm-up {warm:.0f}, peak {peak:.0f}, at the end {after:.0f}")
        print(f"bound of the answers: {bound} before the questions at once")
    if files is not None:
        found = [path for path in files.rglob("*") if path.is_file()]
        print(f"temporary files: {len(found)}, {sum(path.stat().st_size for path in found) / 1e6:.1f} MB")
    for failure in sorted(set(outcome.failures))[:5]:
        print(f"failed: {failure}")
    distinct = len(set(digests)) == len(digests)
    return distinct and not outcome.wrong and not outcome.failures and bool(outcome.seconds) and after <= GROWTH * warm


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=50, help="at once (default: 50)")
    parser.add_argument("--seconds", type=float, default=600, help="how long they ask (default: 600)")
    parser.add_argument("--requests", type=int, help="how many questions they ask together, instead of a time")
    parser.add_argument("--answers-gb", type=float, default=0.5, help="LDVC_ANSWERS_GB of the page (default: 0.5)")
    parser.add_argument("--address", help="of a page that is running, with a slash at the end; default: start one")
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
