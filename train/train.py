"""Trains a decoder (and the prompts) on frozen CLIP towers.

    accelerate launch train/train.py --config lite_release --decoder ldvc --output_dir runs/release/ldvc
    accelerate launch --cpu --num_processes 2 train/train.py --config lite_experiment --decoder zegclip --validation_steps 100
    accelerate launch train/train.py --config lite_release --output_dir runs/release/ldvc --resume_from_checkpoint latest

The output folder is the trained checkpoint itself (config.json, model.safetensors) with, beside it, `train.json` (the
configuration), `log.txt`, `history.jsonl` (the loss curve), `sheets/` (pictures of validation) and `checkpoint-N` folders to
resume from. `accelerate launch --quiet` leaves out the launcher's own stack trace when a run ends with an error.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from ldvc.checkpoint import load_checkpoint
from ldvc.config import DECODERS
from ldvc.errors import DataError, LdvcError
from ldvc.modeling.model import LDVC
from train import hub
from train.checkpoints import (
    changes_since,
    check_fits,
    clean_up,
    export,
    find_checkpoint,
    read_state,
    register_trainable_only,
    sole_run,
    write_checkpoint,
)
from train.data import (
    DrawSchedule,
    NameSampler,
    SegmentationDataset,
    SkippedPhotos,
    TrainingViews,
    ViewCache,
    Vocabulary,
    WordSampler,
    build_caches,
    open_sets,
    weights_digest,
)
from train.objective import Objective, parameter_groups, set_learning_rate, usable_concepts
from train.options import TRACKERS, ConfigError, TrainConfig, load_config
from train.processes import build_accelerator, sentence, share_dropout, shared_loss, start_processes
from train.progress import Progress, check_trackers, require_finite_weights
from train.validation import Validation
from train.words import read_other_words

logger = logging.getLogger("train")


def read_concepts(path: str) -> list[str]:
    """Concept names, one a line; an empty list when preservation has no file to read is an error for the caller."""
    file = Path(path)
    if not file.is_file():
        raise DataError(
            f"The list of concept names {path} is missing; give one with --set concepts=FILE or set preserve_names=0."
        )
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def view_caches(
    config: TrainConfig,
    datasets: list[SegmentationDataset],
    model: LDVC,
    accelerator: Accelerator,
    skipped: SkippedPhotos,
) -> list[ViewCache]:
    """The stored views of every data set; what is missing is computed, each data set by one process."""
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
            token_shape=(width, side, side),
            feature_shape=(side * side, clip.embed_dim),
        )
        for dataset in datasets
    ]

    @torch.inference_mode()
    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        with accelerator.autocast():
            patch_tokens = model.image_tower.embed_patches(images.to(device))
            return patch_tokens.cpu(), model.image_tower(patch_tokens=patch_tokens, prompted=False).patch_features.cpu()

    build_caches(caches, encode, mean=clip.mean, std=clip.std)
    with accelerator.main_process_first():
        for cache in caches:
            skipped.merge(cache.skipped)
    return caches


def train(
    config: TrainConfig, *, resume: str | None = None, prepare_only: bool = False, on_step: Callable | None = None
) -> Path:
    """Runs (or continues) one training.

    Args:
        config: everything that the run depends on.
        resume: None, "latest" or a checkpoint folder.
        prepare_only: stop when the stored views are complete.
        on_step: called with (step, parts of this process's loss) after every optimiser step; for callers in Python.

    Returns:
        The output folder, which then is a checkpoint that `ldvc.checkpoint.load_checkpoint` reads.
    """
    check_trackers(config.report_to)
    accelerator, folder = build_accelerator(config), Path(config.output_dir)
    with sole_run(accelerator, folder):
        _train(config, accelerator, folder, resume, prepare_only, on_step)
    return folder


def _train(
    config: TrainConfig,
    accelerator: Accelerator,
    folder: Path,
    resume: str | None,
    prepare_only: bool,
    on_step: Callable | None,
) -> None:
    main = accelerator.is_main_process
    with accelerator.main_process_first():
        if main:
            clean_up(folder, config.checkpoints_total_limit)
    checkpoint = find_checkpoint(folder, resume)
    state = read_state(checkpoint) if checkpoint else {}
    repository = hub.open_repository(config) if config.push_to_hub and main else ""
    set_seed(config.seed)

    hidden = config.held_out()
    datasets = open_sets(config.data, list(config.sets), "train", every=config.photos_every, layouts=config.layouts)
    skipped = SkippedPhotos(folder / "skipped.txt")
    if main and not checkpoint:
        skipped.forget()  # what an earlier run in this folder found
    vocabulary = Vocabulary(
        datasets,
        hidden,
        transductive=config.transductive,
        hidden_as_background=config.held_out_as_negative,
        other_words=read_other_words(config.other_words) if config.other_words else None,
    )
    if vocabulary.unseen.all():  # also where there are no names at all
        raise ConfigError(
            f"No class with masks is left: the split '{config.unseen}' holds out every class of {', '.join(config.sets)}; "
            "add another data set, name another split, or train with all classes (--set unseen=none)."
        )
    validation = Validation(config, vocabulary, accelerator) if config.validation_steps else None
    model = LDVC(config.model_config())
    if config.crop % model.clip.patch_size:
        raise ConfigError(f"crop {config.crop} must divide by {model.clip.patch_size}, the patch size of the CLIP.")
    if checkpoint:
        check_fits(checkpoint, model, config)
    elif config.init_from:
        start, _ = load_checkpoint(config.init_from, decoder=model.config.decoder, clip=model.clip)
        model.load_trainable_state_dict(start.trainable_state_dict())
    concepts = usable_concepts(read_concepts(config.concepts), vocabulary, hidden) if config.preserve_names else []
    model.to(accelerator.device)
    caches = view_caches(config, datasets, model, accelerator, skipped) if config.views_per_photo else None
    if prepare_only:
        return

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
        skipped=skipped,
    )
    sampler = NameSampler(
        len(vocabulary),
        len(concepts),
        preserve=config.preserve_names,
        full_probability=config.full_vocabulary,
        seed=config.seed,
        unseen=vocabulary.unseen,
        self_training_from=config.self_training_from,
        limit=config.names_per_step,
    )
    words = WordSampler(vocabulary.other_words, share=config.other_words_share, seed=config.seed)
    loader = DataLoader(
        views,
        batch_size=config.train_batch_size,
        shuffle=False,  # the order of draws is random already
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
    )
    objective = Objective(model, vocabulary, concepts, config, processes=shared_loss(accelerator))
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=0.0, fused=True)
    if accelerator.num_processes > 1:
        share_dropout(model, process=accelerator.process_index, count=accelerator.num_processes)
    register_trainable_only(accelerator, model)
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    if checkpoint:
        accelerator.load_state(str(checkpoint))

    changed = changes_since(checkpoint, config) if checkpoint else ""
    if main:
        (folder / "train.json").write_text(json.dumps(config.to_dict(), indent=2))
    progress = Progress(accelerator, config, photos=per_step, state=state)
    parts = ", ".join(f"{name} {count:,}" for name, count in model.parameter_report().items())
    progress.say(f"{model.config.decoder}: learnable parameters: {parts}")
    progress.say("photos: " + ", ".join(f"{dataset.name} {len(dataset):,}" for dataset in datasets))
    progress.say(
        f"{len(vocabulary)} names to learn, {len(concepts)} concepts to preserve; a step takes {per_step} photos: "
        f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)} x {config.train_batch_size} x "
        f"{config.gradient_accumulation_steps} (accumulated); device {accelerator.device.type}, mixed precision "
        f"{accelerator.mixed_precision}"
    )
    if checkpoint:
        progress.say(f"resumed from {checkpoint} at step {progress.step}")
        if state.get("photos", per_step) != per_step:
            changed = ", ".join(filter(None, [f"photos a step {state['photos']} -> {per_step}", changed]))
        if changed:
            progress.say(f"note: not the run that was interrupted: {changed}")

    micro = progress.step * config.gradient_accumulation_steps
    batches = accelerator.skip_first_batches(loader, micro) if micro else loader
    objective.train()
    for batch in batches:
        if progress.step >= config.max_train_steps:
            break
        with accelerator.accumulate(objective):
            present = accelerator.reduce(vocabulary.present(batch["labels"]).float(), "sum").cpu() > 0
            torch.manual_seed(dropout_seed(config.seed, micro))
            names, concept_ids = (ids.to(accelerator.device) for ids in sampler.sample(micro, present))
            read = words.sample(micro, names).to(accelerator.device)
            losses = objective(batch, names, concept_ids, read)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                if config.clip_gradient:
                    accelerator.clip_grad_norm_(
                        [p for p in model.parameters() if p.requires_grad], config.clip_gradient
                    )
                learning_rate = set_learning_rate(optimizer, progress.step, config)
            optimizer.step()
            optimizer.zero_grad()
        micro += 1
        progress.add(losses)
        if not accelerator.sync_gradients:
            continue
        progress.advance(learning_rate)
        if on_step is not None:
            on_step(progress.step, {name: float(value.detach()) for name, value in losses.items()})
        last = progress.step == config.max_train_steps
        with progress.pause():
            if validation and (last or progress.step % config.validation_steps == 0):
                progress.report_validation(*validation(model, progress.step))
            if last or (config.checkpointing_steps and progress.step % config.checkpointing_steps == 0):
                progress.require_finite()
                require_finite_weights((p for p in model.parameters() if p.requires_grad), progress.step)
                write_checkpoint(accelerator, folder, progress.state(), config.checkpoints_total_limit)

    if main:
        export(model, folder, vocabulary, config)
        if skipped:
            progress.say(skipped.summary())
        progress.say(f"finished: {folder} is a checkpoint for `ldvc.checkpoint.load_checkpoint` and train/evaluate.py")
        if config.push_to_hub:
            progress.say(f"uploaded: {hub.push(folder, repository, config)}")
    progress.close()


def dropout_seed(seed: int, micro: int) -> int:
    """Dropout, too, is a function of the step alone: whatever else drew random numbers, a resumed step draws the same."""
    return int(np.random.SeedSequence((seed, 5, micro, 0)).generate_state(1, dtype=np.uint64)[0] >> 1)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; every other field is changed with --set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="lite_release", help="a YAML file, or the name of one in train/configs")
    parser.add_argument("--decoder", choices=DECODERS, help="which decoder")
    parser.add_argument("--clip", help="'lite', a folder, or an open_clip architecture")
    parser.add_argument("--data", help="folder that holds the data sets")
    parser.add_argument("--cache_dir", help="where stored views lie")
    parser.add_argument("--output_dir", help="the run's own folder, which becomes the finished checkpoint")
    parser.add_argument(
        "--resume_from_checkpoint", help="a checkpoint-N folder, or 'latest' (starts anew if there is none)"
    )
    parser.add_argument("--prepare_cache", action="store_true", help="compute the stored views and stop")
    parser.add_argument("--push_to_hub", action="store_true", default=None, help="upload the result; needs HF_TOKEN")
    parser.add_argument("--hub_model_id", metavar="OWNER/NAME", help="where --push_to_hub uploads to")
    parser.add_argument("--report_to", metavar="|".join(TRACKERS), help="a tracker; none without it")
    parser.add_argument("--mixed_precision", metavar="auto|no|bf16|fp16", help="fp16 needs a GPU")
    parser.add_argument("--learning_rate", type=float, help="base; see the multipliers in train/options.py")
    parser.add_argument("--validation_sets", nargs="+", metavar="SET", help="default: the sets of training")
    for name, text in (
        ("seed", "of everything random"),
        ("max_train_steps", "optimiser steps"),
        ("train_batch_size", "photos per process and micro step"),
        ("gradient_accumulation_steps", "micro steps per optimiser step"),
        ("checkpointing_steps", "a checkpoint to resume from every so many steps; 0 = at the end only"),
        ("checkpoints_total_limit", "how many stay; older ones are deleted"),
        ("validation_steps", "evaluate every so many steps, and at the end; 0 = never"),
        ("num_workers", "processes that prepare photos, for each process that trains"),
    ):
        parser.add_argument(f"--{name}", type=int, help=text, metavar="N")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change any other field of train/options.py",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """The command; what a user can set right ends in one sentence."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = vars(parse(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # one line for each file of each checkpoint otherwise
    path, changes = options.pop("config"), options.pop("set")
    resume, prepare_only = options.pop("resume_from_checkpoint"), options.pop("prepare_cache")
    try:
        config = load_config(path, changes, **options)
        check_trackers(config.report_to)
        start_processes(__file__, arguments)
        train(config, resume=resume, prepare_only=prepare_only)
    except LdvcError as error:
        # every process finds the same mistake; one says it
        sys.exit(f"error: {sentence(error)}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    except KeyboardInterrupt:
        sys.exit("interrupted; continue with the same command and --resume_from_checkpoint latest")


if __name__ == "__main__":
    main()
