"""What the method costs: training step, inference and attention, each beside what it competes with, in one run.

    python train/benchmark.py
    python train/benchmark.py --sections inference attention --rounds 9 --output runs/benchmark
    python train/benchmark.py --clock cpu --check        (on a machine that others use too; exit code 1 if a bar is missed)

Weights are random: they do not change the time. What is compared runs in turn, round after round, so that a slow moment of the
machine hits all alike; tables give the median and the best round, ratios are of the medians.

training   one step of each decoder (forward, 100 * focal + dice, backward, AdamW) and the most memory that it needs beyond what
           model and photo take; each decoder's memory is measured in a process of its own.
inference  one photo: image tower with prompts, text adapter, decoder, against the image encoder of bare open_clip at the same
           size. Class embeddings are computed once for a list of names, as in the page and the evaluator; their cost is a line.
attention  one LCSA layer against one layer of full self-attention (PyTorch's fused kernel) of the same width and heads,
           projections included. The exponent e of time ~ tokens^e is fitted from the second size on: the first is all overhead.
"""

from __future__ import annotations

import argparse
import gc
import logging
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldvc.config import DECODERS, ModelConfig
from ldvc.errors import LdvcError
from ldvc.modeling.attention import RoutedSelfAttention
from ldvc.modeling.clip import build_clip
from ldvc.modeling.model import LDVC
from train.losses import mask_loss
from train.tables import write_json
from train.timing import fit_exponent, in_turn, peak_resident, resident

SECTIONS = ("training", "inference", "attention")
BARE = "bare open_clip image encoder"
BARS = {"inference": 1.25, "attention": 0.6, "exponent": 1.5}
"""Largest allowed: LDVC over the bare encoder at 32 x 32 patches; LCSA over full attention at 64 x 64; LCSA's exponent."""


# ---- what is measured ---------------------------------------------------------------------------------------------------


class FullSelfAttention(nn.Module):
    """Multi-head self-attention of all tokens, with the projections that LCSA has."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value, self.out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, d)."""
        split = (self.heads, tokens.shape[-1] // self.heads)
        key, value = self.key_value(tokens).chunk(2, dim=-1)
        query, key, value = (x.unflatten(-1, split).transpose(1, 2) for x in (self.query(tokens), key, value))
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def build(decoder: str, options: argparse.Namespace, clip: Any = None) -> LDVC:
    """A model with random weights in the published form."""
    config = ModelConfig(
        clip=options.clip,
        pretrained=None,
        decoder=decoder,
        visual_prompts=options.prompts,
        gate_init=None,
        start_at_clip=False,
        branch_init="random",
    )
    return LDVC(config, clip).to(options.device)


def bare_encoder(clip: str, side: int) -> nn.Module:
    """The image encoder as open_clip runs it: photos (B, 3, side, side) -> embeddings (B, d)."""
    if clip in open_clip.list_models():
        return open_clip.create_model(clip, pretrained=None, force_image_size=side).visual.eval()
    visual = build_clip(clip).visual
    if tuple(visual.image_size) != (side, side):
        raise LdvcError(
            f"The towers in {clip} take photos of {visual.image_size[0]} pixels; give that as --image_size."
        )
    return visual.eval()


def class_names(count: int) -> list[str]:
    """Names to segment; which ones does not change the time."""
    return [f"thing number {number}" for number in range(count)]


def training_step(model: LDVC, options: argparse.Namespace) -> Callable[[], None]:
    """One optimiser step on noise, as a function."""
    device, side = options.device, options.image_size
    images = torch.randn(options.batch, 3, side, side, device=device)
    labels = torch.randint(0, options.names, (options.batch, side, side), device=device)
    known = torch.ones(options.batch, options.names, dtype=torch.bool, device=device)
    tokens = model.text_tower.tokenize(class_names(options.names))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=options.mixed_precision == "bf16"):
            logits = model(images, tokens).mask_logits
        loss = mask_loss(logits, labels, known, void_is_negative=True)
        (100 * loss.focal + loss.dice).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def memory_of(decoder: str, options: argparse.Namespace) -> int:
    """Bytes that a training step needs beyond model and photo: two steps, so that AdamW's state is counted."""
    step = training_step(build(decoder, options), options)
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(), step()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    before = resident()
    peak_file = Path("/proc/self/clear_refs")
    if peak_file.exists():
        peak_file.write_text("5")  # Linux: the peak starts anew from what is held now
    step(), step()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return (peaks[0] if peaks else peak_resident()) - before


def memory_in_own_process(decoder: str, arguments: Sequence[str]) -> int:
    """`memory_of` in a fresh process, so that what one decoder has freed does not serve the next."""
    words = [sys.executable, str(Path(__file__).resolve()), *arguments, "--memory_of", decoder]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LdvcError(f"The memory of {decoder} could not be measured: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


# ---- sections -----------------------------------------------------------------------------------------------------------


def training(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Seconds and bytes of a training step of each decoder."""
    clip = build_clip(options.clip).to(options.device)
    steps = {decoder: training_step(build(decoder, options, clip), options) for decoder in DECODERS}
    seconds = in_turn(steps, options.rounds, options.clock, options.device)
    del steps
    return {decoder: {"seconds": seconds[decoder], "bytes": memory_in_own_process(decoder, arguments)} for decoder in DECODERS}


@torch.inference_mode()
def inference(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds for one photo, of each decoder and of the bare encoder."""
    side, clip = options.image_size, build_clip(options.clip).to(options.device)
    bare = bare_encoder(options.clip, side).to(options.device)
    image = torch.randn(1, 3, side, side, device=options.device)
    candidates: dict[str, Callable[[], Any]] = {BARE: lambda: bare(image)}
    for decoder in DECODERS:
        model = build(decoder, options, clip).eval()
        embeddings = model.encode_names(class_names(options.names))
        candidates[decoder] = lambda model=model, embeddings=embeddings: model.decode(model.encode_image(image), embeddings)
    candidates[f"({options.names} names, once per list)"] = lambda: model.encode_names(class_names(options.names))
    seconds = in_turn(candidates, options.rounds, options.clock, options.device)
    return {name: {"seconds": values} for name, values in seconds.items()}


@torch.inference_mode()
def attention(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an LCSA layer and of full self-attention on growing grids: side -> {"lcsa", "full"}."""
    width, heads = options.width, ModelConfig().decoder_heads
    lcsa = RoutedSelfAttention(width, heads).eval().to(options.device)
    full = FullSelfAttention(width, heads).eval().to(options.device)
    result = {}
    for side in options.grids:
        tokens = torch.randn(1, side * side, width, device=options.device)
        candidates = {
            "lcsa": lambda tokens=tokens, side=side: lcsa(tokens, (side, side)),
            "full": lambda tokens=tokens: full(tokens),
        }
        result[side] = in_turn(candidates, options.rounds, options.clock, options.device)
    return result


# ---- what is printed ----------------------------------------------------------------------------------------------------


def summarize(content: Mapping[str, Any]) -> tuple[str, dict[str, tuple[float, float]]]:
    """Markdown tables of `run`'s result, and the bars that it can speak about: sentence -> (measured, allowed)."""
    lines, bars = [content["about"], ""], {}

    def cells(seconds: Sequence[float]) -> str:
        return f"{1000 * median(seconds):.1f} | {1000 * min(seconds):.1f}"

    if found := content.get("training"):
        reference = median(found["ldvc"]["seconds"])
        lines += ["| training step | median ms | best ms | / ldvc | peak memory, MB |", "|---|---|---|---|---|"]
        for decoder, facts in found.items():
            share = median(facts["seconds"]) / reference
            lines.append(f"| {decoder} | {cells(facts['seconds'])} | {share:.2f} | {facts['bytes'] / 1e6:.0f} |")
        lines.append("")
    if found := content.get("inference"):
        reference = median(found[BARE]["seconds"])
        lines += ["| inference, one photo | median ms | best ms | / bare encoder |", "|---|---|---|---|"]
        for name, facts in found.items():
            lines.append(f"| {name} | {cells(facts['seconds'])} | {median(facts['seconds']) / reference:.2f} |")
        lines.append("")
        ratio = median(found["ldvc"]["seconds"]) / reference
        bars["LDVC inference over the bare image encoder"] = (ratio, BARS["inference"])
    if found := content.get("attention"):
        lines += [
            "| grid | LCSA, median ms | best ms | full, median ms | best ms | LCSA / full |",
            "|---|---|---|---|---|---|",
        ]
        for side, both in found.items():
            ratio = median(both["lcsa"]) / median(both["full"])
            lines.append(f"| {side} x {side} | {cells(both['lcsa'])} | {cells(both['full'])} | {ratio:.2f} |")
            if side == 64:
                bars["LCSA over full self-attention at 64 x 64 tokens"] = (ratio, BARS["attention"])
        sides = list(found)[1:]
        if len(sides) > 1:
            own, other = (
                fit_exponent([side**2 for side in sides], [median(found[side][kind]) for side in sides])
                for kind in ("lcsa", "full")
            )
            lines += [
                "",
                f"Time grows with tokens^{own:.2f} for LCSA and with tokens^{other:.2f} for full self-attention.",
            ]
            bars["exponent of LCSA's time in the number of tokens"] = (own, BARS["exponent"])
        lines.append("")
    for sentence, (value, allowed) in bars.items():
        lines.append(f"- {sentence}: {value:.2f}, at most {allowed}: {'met' if value <= allowed else 'MISSED'}")
    return "\n".join(lines), bars


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--clip", default="ViT-B-16-quickgelu", help="an open_clip architecture, or a folder with towers"
    )
    parser.add_argument("--image_size", type=int, default=512, help="side of the photo in pixels")
    parser.add_argument("--names", type=int, default=20, help="class names")
    parser.add_argument(
        "--prompts", type=int, default=10, help="visual prompts per layer (the paper: 10 for VOC, 100 for COCO)"
    )
    parser.add_argument("--batch", type=int, default=1, help="photos of a training step")
    parser.add_argument("--width", type=int, default=512, help="of the attention layers: ViT-B/16's joint width")
    parser.add_argument("--grids", nargs="+", type=int, default=[16, 32, 48, 64, 96], help="tokens per side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no", help="of the training step")
    parser.add_argument("--threads", type=int, help="default: what PyTorch chooses")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a bar is missed")
    parser.add_argument("--output", help="writes OUTPUT.json and OUTPUT.md")
    parser.add_argument("--memory_of", choices=DECODERS, help=argparse.SUPPRESS)  # see memory_in_own_process
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use; take --device cpu")
    if options.device == "cuda" and options.clock == "cpu":
        parser.error("--clock cpu does not see what a GPU does; take --clock wall")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; with --check it ends with code 1 if a bar is missed."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns that weights are random; they are meant to be
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    try:
        if options.memory_of:
            print(memory_of(options.memory_of, options))
            return
        machine = (
            torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
        )
        content: dict[str, Any] = {
            "about": f"`python train/benchmark.py {' '.join(arguments)}`: {options.clip}, {options.image_size} pixels, "
            f"{options.names} names, {options.prompts} visual prompts; PyTorch {torch.__version__}, {options.device} "
            f"({machine}), {torch.get_num_threads()} threads; {options.clock} clock, {options.rounds} rounds."
        }
        for section in SECTIONS:
            if section in options.sections:
                content[section] = {
                    "training": lambda: training(options, arguments),
                    "inference": lambda: inference(options),
                    "attention": lambda: attention(options),
                }[section]()
    except LdvcError as error:
        sys.exit(f"error: {error}")
    text, bars = summarize(content)
    print(text)
    if options.output:
        write_json(Path(f"{options.output}.json"), content)
        Path(f"{options.output}.md").write_text(text + "\n", encoding="utf-8")
    if options.check and any(value > allowed for value, allowed in bars.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
