"""Trains a decoder (and the prompts) on frozen CLIP towers.

    python train/train.py --config lite_release --decoder ldvc --output_dir runs/release/ldvc
    python train/train.py --config lite_release --output_dir runs/release/ldvc --resume_from_checkpoint latest
    torchrun --nproc_per_node 2 train/train.py --config lite_experiment --decoder zegclip --validation_steps 100
    python train/train.py --config voc12_inductive --decoder ldvc --output_dir runs/voc12/ldvc --target a100-large

Several processes, on a CPU or on GPUs, are started by torchrun (or by accelerate launch with GPUs). After an error message,
torchrun prints a report of its own. The output folder is the trained checkpoint (config.json, model.safetensors). It also
contains `train.json` (the configuration), `log.txt`, `history.jsonl` (the loss curve), `figures/` (pictures of validation) and
`checkpoint-N` folders to resume from.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from ldvc.checkpoint import load_checkpoint, save_checkpoint
from ldvc.config import ModelConfig
from ldvc.errors import DataError, LdvcError
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from train import checkpoints, data, hub, job_plan, jobs
from train.config import ConfigError, TrainConfig, load_config, make_writable
from train.data.vocabulary import read_other_words
from train.files import write_json
from train.losses import Processes
from train.objective import Objective, parameter_groups, set_learning_rate, usable_distillation_names
from train.processes import build_accelerator, message_of
from train.progress import Progress, check_tracker, require_finite_weights
from train.validation import Validation

VIEW_SEED = 0  # all runs share the stored views
FLAGS = ("decoder", "clip", "data", "cache_dir", "output_dir", "report_to", "mixed_precision", "learning_rate", "seed")
FLAGS += ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "num_workers", "checkpointing_steps")
FLAGS += ("checkpoints_total_limit", "validation_steps", "validation_sets", "hub_model_id", "push_to_hub")


def train(config: TrainConfig, *, resume: str | None = None, on_step: Callable | None = None) -> Path:
    """Runs (or continues) one training and returns the output folder, which then is a checkpoint.

    Args:
        resume: None, "latest" or a checkpoint folder.
        on_step: called with (step, parts of this process's loss) after every optimiser step; for callers in Python.
    """
    check_tracker(config.report_to)
    accelerator, folder = build_accelerator(config), Path(config.output_dir)
    with checkpoints.run_lock(accelerator, folder):
        _train(config, accelerator, folder, resume, on_step)
    return folder


def _train(
    config: TrainConfig, accelerator: Accelerator, folder: Path, resume: str | None, on_step: Callable | None
) -> None:
    main = accelerator.is_main_process
    with accelerator.main_process_first():
        if main:
            checkpoints.clean_up(folder, config.checkpoints_total_limit)
    checkpoint = checkpoints.find_checkpoint(folder, resume)
    state = checkpoints.read_state(checkpoint) if checkpoint else {}
    if config.views_per_photo:
        make_writable(config.cache_dir, "--cache_dir")
    repository = hub.open_repository(config) if config.push_to_hub and main else ""
    set_seed(config.seed)

    # ---- data and model
    datasets = data.open_sets(config.data, list(config.sets), "train", every=config.photos_every)
    skipped = data.SkippedPhotos(folder / "skipped.txt")
    if main and not checkpoint:
        skipped.forget()  # the list of an earlier run in this folder
    notes = data.inspect_masks(datasets)
    vocabulary = build_vocabulary(config, datasets)
    validation = Validation(config, vocabulary, accelerator) if config.validation_steps else None
    model = build_model(config, checkpoint).to(accelerator.device)
    distillation_names = read_distillation_names(config, vocabulary) if config.distill_per_step else []
    caches = stored_views(config, datasets, model, accelerator, skipped) if config.views_per_photo else None

    photos_per_step = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    views = training_views(config, datasets, vocabulary, model.clip, photos_per_step, caches=caches, skipped=skipped)
    workers = {"num_workers": config.num_workers, "persistent_workers": config.num_workers > 0}
    loader = DataLoader(views, batch_size=config.train_batch_size, shuffle=False, **workers)  # the schedule is random
    name_sampler = build_name_sampler(config, vocabulary, distillation_names)
    word_sampler = data.WordSampler(vocabulary.other_words, seed=config.seed)

    # ---- losses, optimiser, state of an interrupted run
    processes = Processes(total=lambda value: accelerator.reduce(value, "sum"), count=accelerator.num_processes)
    objective = Objective(model, vocabulary, distillation_names, config, processes=processes)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=0.0, fused=True)
    checkpoints.register_trainable_only(accelerator, model)
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    if checkpoint:
        checkpoints.load_state(accelerator, checkpoint)
    changes = checkpoints.changes_since(checkpoint, config) if checkpoint else ""  # before train.json is replaced
    if main:
        write_json(folder / checkpoints.CONFIG, asdict(config))
    progress = Progress(accelerator, config, photos_per_step=photos_per_step, state=state)
    parts = ", ".join(f"{name} {count:,}" for name, count in model.parameter_report().items())
    progress.log(f"{model.config.decoder}: learnable parameters: {parts}")
    progress.log("photos: " + ", ".join(f"{dataset.name} {len(dataset):,}" for dataset in datasets))
    for note in notes:
        progress.log(f"warning: {note}")
    progress.log(
        f"{len(vocabulary)} names to learn, {len(distillation_names)} names for distillation; a step has {photos_per_step} "
        f"photos: {accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)} x {config.train_batch_size} x "
        f"{config.gradient_accumulation_steps} (accumulated); device {accelerator.device.type}, mixed precision "
        f"{accelerator.mixed_precision}"
    )
    if checkpoint:
        progress.log_resumed(checkpoint, changes)

    # ---- the loop
    step = progress.step * config.gradient_accumulation_steps  # micro steps so far
    batches = accelerator.skip_first_batches(loader, step) if step else loader
    objective.train()
    for batch in batches:
        with accelerator.accumulate(objective):
            present = accelerator.reduce(vocabulary.present(batch["labels"]).float(), "sum").cpu() > 0
            names, distilled = (ids.to(accelerator.device) for ids in name_sampler.sample(step, present))
            words = word_sampler.sample(step, names).to(accelerator.device)
            torch.manual_seed(data.dropout_seed(config.seed, step))
            losses = objective(batch, names, distilled, words)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                if config.clip_gradient:
                    accelerator.clip_grad_norm_(trainable(model), config.clip_gradient)
                learning_rate = set_learning_rate(optimizer, progress.step, config)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        progress.add(losses)
        if not accelerator.sync_gradients:
            continue
        progress.advance(learning_rate)
        if on_step is not None:
            on_step(progress.step, {name: float(value.detach()) for name, value in losses.items()})
        last = progress.step == config.max_train_steps
        with progress.pause():
            if validation and (last or progress.step % config.validation_steps == 0):
                progress.log_validation(*validation(model, progress.step))
            if last or (config.checkpointing_steps and progress.step % config.checkpointing_steps == 0):
                progress.require_finite()
                require_finite_weights(trainable(model), progress.step)
                checkpoints.write_checkpoint(accelerator, folder, progress.state(), config.checkpoints_total_limit)

    if main:
        dtype = torch.float16 if config.half_precision_checkpoint else None
        save_checkpoint(model, folder, metadata=checkpoints.metadata_of(vocabulary, config), dtype=dtype)
        if summary := skipped.summary():
            progress.log(summary)
        progress.log(f"finished: {folder} is a checkpoint for `ldvc.checkpoint.load_checkpoint` and train/evaluate.py")
        if config.push_to_hub:
            progress.log(f"uploaded: {hub.push(folder, repository, config)}")
    progress.close()


# ---- the parts of a run -------------------------------------------------------------------------------------------------


def build_vocabulary(config: TrainConfig, datasets: Sequence[data.SegmentationDataset]) -> data.Vocabulary:
    """The names to learn; ConfigError if every class is held out."""
    words = read_other_words(config.other_words) if config.other_words else None
    options = {"transductive": config.transductive, "held_out_as_background": config.held_out_as_negative}
    vocabulary = data.Vocabulary(datasets, config.held_out(), other_words=words, **options)
    if vocabulary.unseen.all() or not vocabulary.spellings:  # also if there are no names at all, or no mask shows one
        raise ConfigError(
            f"No class with masks is left: the split '{config.unseen}' holds out every class of {', '.join(config.sets)}; "
            "add another data set, name another split, or train with all classes (--set unseen=none)."
        )
    return vocabulary


def build_model(config: TrainConfig, checkpoint: Path | None) -> LDVC:
    """The model at the start; a resumed run loads its weights later. ConfigError if crop or checkpoint do not fit it."""
    model = LDVC(config.model)
    if config.crop % model.clip.patch_size:
        raise ConfigError(f"crop {config.crop} must divide by {model.clip.patch_size}, the patch size of the CLIP.")
    if checkpoint:
        checkpoints.check_fits(checkpoint, model, config)
    elif config.init_from:
        start, _ = load_checkpoint(config.init_from, decoder=model.config.decoder, clip=model.clip)
        model.load_trainable_state_dict(start.trainable_state_dict())
    return model


def read_distillation_names(config: TrainConfig, vocabulary: data.Vocabulary) -> list[str]:
    """The names for distillation, from a file with one name per line; DataError if the file is missing."""
    file = Path(config.distillation_names)
    if not file.is_file():
        raise DataError(
            f"The list of names {file} is missing; give one with --set distillation_names=FILE or set distill_per_step=0."
        )
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return usable_distillation_names(list(filter(None, lines)), vocabulary, config.held_out())


def stored_views(
    config: TrainConfig,
    datasets: Sequence[data.SegmentationDataset],
    model: LDVC,
    accelerator: Accelerator,
    skipped: data.SkippedPhotos,
) -> list[data.ViewCache]:
    """The stored views of every data set; missing ones are computed, each data set by one process."""
    clip, side = model.clip, config.crop // model.clip.patch_size
    shared = {
        "augmentation": config.augmentation(),
        "seed": VIEW_SEED,
        "towers": data.weights_digest(clip.visual),
        "token_shape": (clip.visual.class_embedding.shape[0], side, side),
        "feature_shape": (side * side, clip.embed_dim),
    }
    caches = [data.ViewCache(config.cache_dir, dataset, views=config.views(dataset.name), **shared) for dataset in datasets]

    @torch.inference_mode()
    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        with accelerator.autocast():
            patch_tokens = model.image_tower.embed_patches(images.to(accelerator.device))
            return patch_tokens.cpu(), model.image_tower(patch_tokens=patch_tokens, prompted=False).patch_features.cpu()

    data.build_caches(caches, encode, mean=clip.mean, std=clip.std)
    with accelerator.main_process_first():
        for cache in caches:
            skipped.merge(cache.skipped.found())
    return caches


def training_views(
    config: TrainConfig,
    datasets: Sequence[data.SegmentationDataset],
    vocabulary: data.Vocabulary,
    clip: FrozenClip,
    photos_per_step: int,
    **stored: Any,
) -> data.TrainingViews:
    """The views of all steps of a run. `caches` and `skipped`: see `TrainingViews`."""
    schedule = data.SampleSchedule(list(map(len, datasets)), list(config.sets.values()), config.seed)
    options = {"samples": config.max_train_steps * photos_per_step, "augmentation": config.augmentation(), "seed": config.seed}
    return data.TrainingViews(datasets, vocabulary, schedule, mean=clip.mean, std=clip.std, **options, **stored)


def build_name_sampler(config: TrainConfig, vocabulary: data.Vocabulary, distillation_names: Sequence[str]) -> data.NameSampler:
    """The sampler of the names of each step."""
    options = {"distilled": config.distill_per_step, "full_probability": config.full_vocabulary, "seed": config.seed}
    options |= {"unseen": vocabulary.unseen, "self_training_from": config.self_training_from, "limit": config.names_per_step}
    return data.NameSampler(len(vocabulary), len(distillation_names), **options)


def trainable(model: LDVC) -> list[torch.nn.Parameter]:
    """The trainable parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line. The configuration checks the values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="lite_release", help="a YAML file, or the name of one in train/configs")
    parser.add_argument("--resume_from_checkpoint", help="a checkpoint-N folder, or 'latest' (a new run if there is none)")
    fields = TrainConfig.__pydantic_fields__ | ModelConfig.__pydantic_fields__
    for name in FLAGS:
        kind = {"push_to_hub": {"action": "store_true", "default": None}, "validation_sets": {"nargs": "+"}}.get(name, {})
        metavar = {} if "action" in kind else {"metavar": name.rpartition("_")[2].upper()}
        parser.add_argument(f"--{name}", help=fields[name].description, **kind, **metavar)
    help_of_set = "change any other field of train/config.py or ldvc/config.py"
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=help_of_set)
    jobs.add_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; a mistake of the user ends it with one sentence."""
    options = vars(parse(arguments))
    job, command = jobs.take_options(options), dict(options)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # otherwise it logs every file of every checkpoint
    path, changes = options.pop("config"), options.pop("set")
    if launch_precision := os.environ.get("ACCELERATE_MIXED_PRECISION"):  # --set and --mixed_precision override it
        logging.info("mixed precision of accelerate launch: %s", launch_precision)
        changes = [f"mixed_precision={launch_precision}", *changes]
    resume = options.pop("resume_from_checkpoint")
    try:
        config = load_config(path, changes, **options)
        if jobs.is_wanted(job):
            jobs.submit(job, job_plan.training(config, command, vars(parse([]))))
        else:
            train(config, resume=resume)
    except LdvcError as error:
        # every process raises the same error; one prints it
        sys.exit(f"error: {message_of(error)}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        sys.exit(
            f"error: {error.filename or 'a file'} cannot be written ({error.strerror}); free some space and continue with the "
            "same command and --resume_from_checkpoint latest"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted; continue with the same command and --resume_from_checkpoint latest")


if __name__ == "__main__":
    main()
