"""Time and memory of the method in one run: training step, inference and attention, each compared with an alternative.

    python train/benchmark.py
    python train/benchmark.py --sections inference attention --rounds 9 --output runs/benchmark
    python train/benchmark.py --clock cpu --check        (on a machine that runs other programs, too)

Weights are random; they do not change the time. The candidates of a section take turns, round after round, so that a slow
moment of the machine affects all of them. Tables show the median and the best round. Ratios compare medians.

training   a step of each decoder (forward, 100 * focal + dice, backward, AdamW), and its peak memory beyond model and photo,
           measured in a separate process for each decoder
inference  one photo: image tower with prompts, text adapter and decoder; also the dense features of plain CLIP, without names.
           The reference is open_clip's image encoder at the same size. Class embeddings are computed once for a list of
           names, as on the page; their time has a separate row.
attention  an LCSA layer compared with a layer of full self-attention (PyTorch's fused kernel) of the same width and heads,
           projections included. The exponent e of time ~ tokens^e is fitted without the first size, which is mostly overhead.
"""

from __future__ import annotations

import argparse
import gc
import logging
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

import numpy as np
import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldvc.config import DECODERS, ModelConfig
from ldvc.errors import LdvcError
from ldvc.modeling.attention import RoutedSelfAttention
from ldvc.modeling.clip import FrozenClip, build_clip
from ldvc.modeling.dense import dense_features
from ldvc.modeling.model import LDVC
from train.files import write_json
from train.losses import mask_loss
from train.tables import table

SECTIONS = ("training", "inference", "attention")
BARE = "bare open_clip image encoder"
LIMITS = {"inference": 1.25, "attention": 0.6, "exponent": 1.5}
"""Upper limits: LDVC / bare encoder at 32 x 32 patches, LCSA / full attention at 64 x 64 tokens, exponent of LCSA's time."""


def in_turn(candidates: Mapping[str, Callable[[], Any]], rounds: int, clock: str) -> dict[str, list[float]]:
    """Calls the candidates in turn, round after round: name -> seconds of each round. A warm-up round comes first, uncounted.

    `clock`: "wall", or "cpu" (processor time of all threads, which other programs affect less).
    """
    now = time.process_time if clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, function in candidates.items():
            started = now()
            function()
            if number:
                seconds[name].append(now() - started)
    return seconds


def peak_memory(function: Callable[[], Any]) -> int:
    """Peak memory of a function in bytes, beyond what the process uses before the call (Linux and macOS)."""
    gc.collect()
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if sys.platform == "linux":
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    function()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), peak)
    return peak * unit - before


def fit_exponent(tokens: Sequence[int], seconds: Sequence[float]) -> float:
    """The exponent e of seconds ~ tokens^e, by least squares on logarithms."""
    return float(np.polyfit(np.log(tokens), np.log(seconds), 1)[0])


class FullSelfAttention(nn.Module):
    """Multi-head self-attention of all tokens, with the projections of LCSA."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, d)."""
        split = (self.heads, tokens.shape[-1] // self.heads)
        key, value = self.key_value(tokens).chunk(2, dim=-1)
        query, key, value = (x.unflatten(-1, split).transpose(1, 2) for x in (self.query(tokens), key, value))
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def build(decoder: str, options: argparse.Namespace, clip: FrozenClip | None = None) -> LDVC:
    """A model with random weights and the published initialisation."""
    prompts = {"visual_prompts": options.prompts}
    return LDVC(ModelConfig(clip=options.clip, pretrained=None, decoder=decoder, recipe="published", **prompts), clip)


def bare_encoder(clip: str, side: int) -> nn.Module:
    """The image encoder as open_clip runs it: photos (B, 3, side, side) -> embeddings (B, d)."""
    if clip in open_clip.list_models():
        return open_clip.create_model(clip, pretrained=None, force_image_size=side).visual.eval()
    visual = build_clip(clip).visual
    if tuple(visual.image_size) != (side, side):
        raise LdvcError(f"The towers in {clip} take photos of {visual.image_size[0]} pixels; give that as --image_size.")
    return visual.eval()


def class_names(count: int) -> list[str]:
    """Class names; their words do not change the time."""
    return [f"thing number {number}" for number in range(count)]


def training_step(model: LDVC, options: argparse.Namespace) -> Callable[[], None]:
    """A function that does one optimiser step on a random photo."""
    side, names = options.image_size, options.names
    images, labels = torch.randn(1, 3, side, side), torch.randint(0, names, (1, side, side))
    annotated = torch.ones(1, names, dtype=torch.bool)
    tokens = model.text_tower.tokenize(class_names(names))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()

    def step() -> None:
        loss = mask_loss(model(images, tokens).mask_logits, labels, annotated, void_is_negative=True)
        (100 * loss.focal + loss.dice).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def memory_of(decoder: str, options: argparse.Namespace) -> int:
    """Peak memory of training in bytes, beyond model and photo. Two steps run, so that AdamW's state is included."""
    step = training_step(build(decoder, options), options)
    return peak_memory(lambda: (step(), step()))


def training(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory in bytes of a training step of each decoder."""
    clip = build_clip(options.clip)
    steps = {decoder: training_step(build(decoder, options, clip), options) for decoder in DECODERS}
    seconds = in_turn(steps, options.rounds, options.clock)
    del steps
    results = {}
    for decoder in DECODERS:  # a new process for each, without memory of other decoders
        quiet = {"initializer": logging.disable, "initargs": (logging.WARNING,)}
        with ProcessPoolExecutor(1, mp_context=get_context("forkserver"), **quiet) as process:
            results[decoder] = {"seconds": seconds[decoder], "bytes": process.submit(memory_of, decoder, options).result()}
    return results


@torch.inference_mode()
def inference(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds that each decoder and the bare encoder need for one photo."""
    side, clip = options.image_size, build_clip(options.clip)
    bare, image = bare_encoder(options.clip, side), torch.randn(1, 3, side, side)
    candidates: dict[str, Callable[[], Any]] = {BARE: lambda: bare(image)}
    for decoder in DECODERS:
        model = build(decoder, options, clip).eval()
        embeddings = model.encode_names(class_names(options.names))
        candidates[decoder] = lambda model=model, embeddings=embeddings: model.decode(model.encode_image(image), embeddings)
    tower = model.image_tower
    for reading in ("naclip", "sc_clip"):
        candidates[f"clip, {reading}"] = lambda reading=reading: dense_features(
            tower, tower.embed_patches(image, prompted=False), reading
        )
    candidates[f"({options.names} names, once per list)"] = lambda: model.encode_names(class_names(options.names))
    seconds = in_turn(candidates, options.rounds, options.clock)
    return {name: {"seconds": values} for name, values in seconds.items()}


@torch.inference_mode()
def attention(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an LCSA layer and of full self-attention on growing grids: side -> {"lcsa", "full"}."""
    width, heads = build_clip(options.clip).embed_dim, ModelConfig().decoder_heads
    lcsa, full = RoutedSelfAttention(width, heads).eval(), FullSelfAttention(width, heads).eval()

    def measure(side: int) -> dict[str, list[float]]:
        tokens = torch.randn(1, side * side, width)
        candidates = {"lcsa": lambda: lcsa(tokens, (side, side)), "full": lambda: full(tokens)}
        return in_turn(candidates, options.rounds, options.clock)

    return {side: measure(side) for side in options.grids}


def summarize(content: Mapping[str, Any]) -> tuple[str, dict[str, tuple[float, float]]]:
    """Markdown tables of the results, and the checked limits: sentence -> (measured, allowed)."""
    lines, limits = [content["about"], ""], {}

    def cells(seconds: Sequence[float]) -> list[str]:
        return [f"{1000 * median(seconds):.1f}", f"{1000 * min(seconds):.1f}"]

    if results := content.get("training"):
        reference = median(results["ldvc"]["seconds"])
        rows = [
            [name, *cells(facts["seconds"]), f"{median(facts['seconds']) / reference:.2f}", f"{facts['bytes'] / 1e6:.0f}"]
            for name, facts in results.items()
        ]
        lines += [*table(["training step", "median ms", "best ms", "/ ldvc", "peak memory, MB"], rows), ""]
    if results := content.get("inference"):
        reference = median(results[BARE]["seconds"])
        ratios = {name: median(facts["seconds"]) / reference for name, facts in results.items()}
        rows = [[name, *cells(facts["seconds"]), f"{ratios[name]:.2f}"] for name, facts in results.items()]
        lines += [*table(["inference, one photo", "median ms", "best ms", "/ bare encoder"], rows), ""]
        limits["LDVC inference over the bare image encoder"] = (ratios["ldvc"], LIMITS["inference"])
    if results := content.get("attention"):
        ratios = {side: median(layers["lcsa"]) / median(layers["full"]) for side, layers in results.items()}
        rows = [
            [f"{n} x {n}", *cells(layers["lcsa"]), *cells(layers["full"]), f"{ratios[n]:.2f}"]
            for n, layers in results.items()
        ]
        lines += table(["grid", "LCSA, median ms", "best ms", "full, median ms", "best ms", "LCSA / full"], rows)
        if 64 in ratios:
            limits["LCSA over full self-attention at 64 x 64 tokens"] = (ratios[64], LIMITS["attention"])
        sides = list(results)[1:]
        if len(sides) > 1:
            times = ([median(results[side][layer]) for side in sides] for layer in ("lcsa", "full"))
            lcsa, full = (fit_exponent([side**2 for side in sides], each) for each in times)
            lines += ["", f"Time grows with tokens^{lcsa:.2f} for LCSA and with tokens^{full:.2f} for full self-attention."]
            limits["exponent of LCSA's time in the number of tokens"] = (lcsa, LIMITS["exponent"])
        lines.append("")
    for sentence, (value, allowed) in limits.items():
        lines.append(f"- {sentence}: {value:.2f}, at most {allowed}: {'met' if value <= allowed else 'MISSED'}")
    return "\n".join(lines), limits


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    add("--clip", default="ViT-B-16-quickgelu", help="an open_clip architecture, or a folder with towers")
    add("--image_size", type=int, default=512, help="side of the photo in pixels")
    add("--names", type=int, default=20, help="number of class names")
    add("--prompts", type=int, default=10, help="visual prompts per layer (the paper: 10 for VOC, 100 for COCO)")
    add("--grids", nargs="+", type=int, default=[16, 32, 48, 64, 96], help="tokens per side")
    add("--rounds", type=int, default=5)
    add("--clock", choices=("wall", "cpu"), default="wall")
    add("--check", action="store_true", help="exit code 1 if a limit is exceeded")
    add("--output", help="writes OUTPUT.json and OUTPUT.md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. With --check, the exit code is 1 if a limit is exceeded."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns that weights are random
    torch.manual_seed(0)
    content: dict[str, Any] = {
        "about": f"`python train/benchmark.py {' '.join(arguments)}`: {options.clip}, {options.image_size} pixels, "
        f"{options.names} names, {options.prompts} visual prompts; PyTorch {torch.__version__}, "
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads; {options.clock} clock, "
        f"{options.rounds} rounds."
    }
    measure = {"training": training, "inference": inference, "attention": attention}
    try:
        content |= {section: measure[section](options) for section in SECTIONS if section in options.sections}
    except LdvcError as error:
        sys.exit(f"error: {error}")
    text, limits = summarize(content)
    print(text)
    if options.output:
        write_json(Path(f"{options.output}.json"), content)
        Path(f"{options.output}.md").write_text(text + "\n", encoding="utf-8")
    if options.check and any(value > allowed for value, allowed in limits.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
