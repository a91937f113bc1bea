"""Trains a decoder (and the prompts) on frozen CLIP towers.

    accelerate launch train/train.py --config train/configs/lite_release.yaml --arm ldvc --output_dir runs/release/ldvc
    accelerate launch train/train.py --config lite_experiment --arm zegclip --seed 1 --set preserve_weight=0
    accelerate launch train/train.py --config lite_release --output_dir runs/release/ldvc --resume_from_checkpoint latest

The output folder is the trained checkpoint itself (config.json, model.safetensors) with, beside it, `log.txt`, `train.json`
(the configuration) and `checkpoint-N` folders to resume from.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from ldvc.checkpoint import save_checkpoint
from ldvc.config import ARMS
from ldvc.data import (
    DrawSchedule,
    FolderDataset,
    NameSampler,
    TrainingViews,
    ViewCache,
    Vocabulary,
    build_caches,
    open_sets,
    weights_digest,
)
from ldvc.errors import DataError, LdvcError
from ldvc.modeling.model import LDVC
from train.objective import Objective, parameter_groups, set_learning_rate, usable_concepts
from train.options import ConfigError, TrainConfig, load_config

logger = logging.getLogger("train")
_WEIGHTS = "trainable.safetensors"
_STATE = "step.json"


def read_concepts(path: str) -> list[str]:
    """Concept names, one a line; an empty list when preservation has no file to read is an error for the caller."""
    file = Path(path)
    if not file.is_file():
        raise DataError(
            f"The list of concept names {path} is missing; give one with --set concepts=FILE or set preserve_names=0."
        )
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def view_caches(
    config: TrainConfig, datasets: list[FolderDataset], model: LDVC, accelerator: Accelerator
) -> list[ViewCache]:
    """The stored views of every data set; the main process computes what is missing."""
    clip, device = model.clip, accelerator.device
    side = config.crop // clip.patch_size
    width = clip.visual.class_embedding.shape[0]
    towers = weights_digest(clip.visual)
    caches = [
        ViewCache(
            config.cache_dir,
            dataset,
            augmentation=config.augmentation(),
            views=config.views(dataset.name),
            seed=config.view_seed,
            towers=towers,
            stem_shape=(width, side, side),
            feature_shape=(side * side, clip.embed_dim),
        )
        for dataset in datasets
    ]

    @torch.inference_mode()
    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        with accelerator.autocast():
            stem = model.image_tower.stem(images.to(device))
            return stem.cpu(), model.image_tower(stem=stem, prompted=False).patch_features.cpu()

    with accelerator.main_process_first():
        build_caches(caches, encode, mean=clip.mean, std=clip.std)
    return caches


def register_trainable_only(accelerator: Accelerator, model: LDVC) -> None:
    """Checkpoints hold the trainable tensors; the frozen towers are named in the configuration, not stored."""

    def save(models: list[torch.nn.Module], weights: list[Any], folder: str) -> None:
        weights.clear()  # nothing is left for accelerate to write
        if accelerator.is_main_process:
            save_file(
                {name: tensor.contiguous() for name, tensor in model.trainable_state_dict().items()},
                Path(folder) / _WEIGHTS,
            )

    def load(models: list[torch.nn.Module], folder: str) -> None:
        models.clear()
        model.load_trainable_state_dict(load_file(Path(folder) / _WEIGHTS))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def checkpoints_of(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


def write_checkpoint(accelerator: Accelerator, folder: Path, step: int, limit: int) -> None:
    """Saves all state under another name first, so that a kill never leaves half a checkpoint under its final name."""
    target, partial = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.partial"
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / _STATE).write_text(json.dumps({"step": step}))
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        for old in checkpoints_of(folder)[: -max(1, limit)]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def find_checkpoint(folder: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from: a path, or "latest" (None when there is none yet).

    Raises:
        ConfigError: the given folder is no checkpoint.
    """
    if wanted is None:
        return None
    if wanted == "latest":
        found = checkpoints_of(folder)
        return found[-1] if found else None
    if not (Path(wanted) / _STATE).is_file():
        raise ConfigError(f"{wanted} is no checkpoint to resume from; give a folder checkpoint-N or 'latest'.")
    return Path(wanted)


def train(
    config: TrainConfig, *, resume: str | None = None, prepare_only: bool = False, on_step: Callable | None = None
) -> Path:
    """Runs (or continues) one training.

    Args:
        config: everything that the run depends on.
        resume: None, "latest" or a checkpoint folder.
        prepare_only: stop when the stored views are complete.
        on_step: called with (step, parts of the loss) after every optimiser step; for tests and callers in Python.

    Returns:
        The output folder, which then is a checkpoint that `ldvc.checkpoint.load_checkpoint` reads.
    """
    folder = Path(config.output_dir)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_dir=folder,
        step_scheduler_with_optimizer=False,
    )
    main = accelerator.is_main_process
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(config.seed)

    hidden = config.held_out()
    datasets = open_sets(config.data, list(config.sets), "train", every=config.photos_every)
    vocabulary = Vocabulary(datasets, hidden, transductive=config.transductive)
    model = LDVC(config.model_config())
    concepts = usable_concepts(read_concepts(config.concepts), vocabulary, hidden) if config.preserve_names else []
    model.to(accelerator.device)
    caches = view_caches(config, datasets, model, accelerator) if config.views_per_photo else None
    if prepare_only:
        return folder

    objective = Objective(model, vocabulary, concepts, config)
    per_step = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    views = TrainingViews(
        datasets,
        vocabulary,
        DrawSchedule([len(dataset) for dataset in datasets], list(config.sets.values()), config.seed),
        draws=config.max_train_steps * per_step,
        augmentation=config.augmentation(),
        mean=model.clip.mean,
        std=model.clip.std,
        seed=config.seed,
        caches=caches,
    )
    sampler = NameSampler(
        len(vocabulary),
        len(concepts),
        preserve=config.preserve_names,
        full_probability=config.full_vocabulary,
        seed=config.seed,
        unseen=vocabulary.unseen,
        self_training_from=config.self_training_from,
    )
    loader = DataLoader(
        views,
        batch_size=config.train_batch_size,
        shuffle=False,  # the order of draws is random already
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=0.0, fused=True)
    register_trainable_only(accelerator, model)
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    if config.report_to:
        accelerator.init_trackers(folder.name)

    if main:
        (folder / "train.json").write_text(json.dumps(config.to_dict(), indent=2))
        parts = ", ".join(f"{name} {count:,}" for name, count in model.parameter_report().items())
        say(folder, f"{model.config.arm}: learnable parameters: {parts}")
        say(folder, f"{len(vocabulary)} names to learn, {len(concepts)} concepts to preserve, {per_step} photos a step")

    step = 0
    checkpoint = find_checkpoint(folder, resume)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        step = json.loads((checkpoint / _STATE).read_text())["step"]
        if main:
            say(folder, f"resumed from {checkpoint} at step {step}")
    first, started = step, time.monotonic()
    micro = step * config.gradient_accumulation_steps
    batches = accelerator.skip_first_batches(loader, micro) if micro else loader
    sums: dict[str, Tensor] = {}
    since = 0

    objective.train()
    for batch in batches:
        if step >= config.max_train_steps:
            break
        with accelerator.accumulate(objective):
            present = accelerator.reduce(vocabulary.present(batch["labels"]).float(), "sum").cpu() > 0
            torch.manual_seed(dropout_seed(config.seed, micro, accelerator.process_index))
            names, concept_ids = (ids.to(accelerator.device) for ids in sampler.sample(micro, present))
            losses = objective(batch, names, concept_ids)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                if config.clip_gradient:
                    accelerator.clip_grad_norm_(
                        [p for p in model.parameters() if p.requires_grad], config.clip_gradient
                    )
                rate = set_learning_rate(optimizer, step, config)
            optimizer.step()
            optimizer.zero_grad()
        micro += 1
        since += 1
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach()
        if not accelerator.sync_gradients:
            continue
        step += 1
        if on_step is not None:
            on_step(step, {name: float(value.detach()) for name, value in losses.items()})
        if step % config.log_steps == 0 or step == config.max_train_steps:
            means = {name: float(accelerator.reduce(value / since, "mean")) for name, value in sums.items()}
            seconds = (time.monotonic() - started) / (step - first)
            if main:
                parts = " ".join(f"{name} {value:.4f}" for name, value in means.items())
                left = seconds * (config.max_train_steps - step) / 60
                say(
                    folder,
                    f"step {step}/{config.max_train_steps} {parts} lr {rate:.2e} "
                    f"{per_step / seconds:.1f} photos/s {seconds:.2f} s/step {left:.1f} min left",
                )
            if config.report_to:
                accelerator.log({**means, "lr": rate}, step=step)
            sums, since = {}, 0
        if config.checkpointing_steps and step % config.checkpointing_steps == 0 and step < config.max_train_steps:
            write_checkpoint(accelerator, folder, step, config.checkpoints_total_limit)

    write_checkpoint(accelerator, folder, step, config.checkpoints_total_limit)
    if main:
        export(model, folder, vocabulary, config)
        say(folder, f"finished: {folder} is a checkpoint for `ldvc.checkpoint.load_checkpoint` and train/evaluate.py")
    accelerator.end_training()
    return folder


def dropout_seed(seed: int, micro: int, process: int) -> int:
    """Dropout, too, is a function of the step alone: whatever else drew random numbers, a resumed step draws the same."""
    return int(np.random.SeedSequence((seed, 5, micro, process)).generate_state(1, dtype=np.uint64)[0] >> 1)


def export(model: LDVC, folder: Path, vocabulary: Vocabulary, config: TrainConfig) -> None:
    """Writes the finished checkpoint; a CLIP folder is named relative to it, so that both may move together."""
    clip = model.config.clip
    if Path(clip).is_dir():
        clip = os.path.relpath(clip, folder)
        clip = clip if clip.startswith(".") else f"./{clip}"  # "clip" alone would be the name of an architecture
    metadata = {
        "seen_names": vocabulary.spellings,
        "calibration": {"scale": 1.0, "bias": 0.0},
        "inference": config.inference,
        "training": {
            "steps": config.max_train_steps,
            "seed": config.seed,
            "sets": config.sets,
            "unseen": config.unseen,
            "setting": config.setting,
        },
    }
    dtype = torch.float16 if config.half_precision_checkpoint else None
    save_checkpoint(model, folder, metadata=metadata, clip=clip, dtype=dtype)


def say(folder: Path, line: str) -> None:
    """One line to the screen and to log.txt."""
    print(line, flush=True)
    with open(folder / "log.txt", "a", encoding="utf-8") as file:
        file.write(line + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; every other field is changed with --set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="lite_release", help="a YAML file, or the name of one in train/configs")
    parser.add_argument("--arm", choices=ARMS, help="which decoder")
    parser.add_argument("--clip", help="'lite', a folder, or an open_clip architecture")
    parser.add_argument("--data", help="folder that holds the data sets")
    parser.add_argument("--cache_dir", help="where stored views lie")
    parser.add_argument("--output_dir")
    parser.add_argument(
        "--resume_from_checkpoint", help="a checkpoint-N folder, or 'latest' (starts anew if there is none)"
    )
    parser.add_argument("--prepare_cache", action="store_true", help="compute the stored views and stop")
    for name, kind in (
        ("seed", int),
        ("max_train_steps", int),
        ("train_batch_size", int),
        ("gradient_accumulation_steps", int),
        ("learning_rate", float),
        ("checkpointing_steps", int),
        ("checkpoints_total_limit", int),
        ("mixed_precision", str),
        ("report_to", str),
    ):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change any other field"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = vars(parse(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # one line for each file of each checkpoint otherwise
    path, changes = options.pop("config"), options.pop("set")
    resume, prepare_only = options.pop("resume_from_checkpoint"), options.pop("prepare_cache")
    try:
        train(load_config(path, changes, **options), resume=resume, prepare_only=prepare_only)
    except LdvcError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
