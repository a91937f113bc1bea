"""Checkpoints to resume from. A kill at any moment leaves the last complete one in its place.

    output_dir/checkpoint-40/   trainable.safetensors   prompts, adapter and decoder; the frozen CLIP is named in train.json
                                optimizer.bin, random_states_*.pkl, ...   what accelerate adds
                                step.json               written last: its presence says that the folder is complete

A folder is written under a hidden name and renamed when it is complete; old ones are renamed before they are deleted.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ldvc.calibration import Calibration
from ldvc.checkpoint import save_checkpoint
from ldvc.config import ModelConfig
from ldvc.errors import CheckpointError
from ldvc.modeling.model import LDVC
from train.data import Vocabulary
from train.options import ConfigError, TrainConfig

WEIGHTS = "trainable.safetensors"
STATE = "step.json"
LOCK = ".training"
_STEP = re.compile(r"checkpoint-(\d+)")
_WRITING, _OLD = ".partial", ".old"


@contextmanager
def sole_run(accelerator: Accelerator, folder: Path, *, patience: float = 10.0) -> Iterator[None]:
    """Makes the output folder and keeps other runs out of it; every process of the run calls it.

    The lock dies with the main process, however that ends, and its children (readers of photos) do not inherit it.

    Args:
        folder: the run's output folder.
        patience: seconds to wait for a run that is just ending.

    Raises:
        ConfigError: the folder cannot be made, or another run is at work in it.
    """
    problem = [""]  # every process learns of it and ends with the same sentence
    with ExitStack() as stack:
        if accelerator.is_main_process:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                owner = _lock(stack.enter_context(open(folder / LOCK, "a+", encoding="utf-8")), patience)
                if owner is not None:
                    problem = [f"Another run (process {owner}) is writing into {folder}: give another --output_dir."]
            except OSError as error:
                problem = [f"The output folder {folder} cannot be written: {error.strerror}."]
        broadcast_object_list(problem)
        if problem[0]:
            raise ConfigError(problem[0])
        yield


def _lock(file: Any, patience: float) -> str | None:
    """Takes a lock file and notes this process in it; None, or the note of the process that keeps it."""
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                file.seek(0)
                return file.read().strip()
            time.sleep(0.2)
        else:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            return None


def register_trainable_only(accelerator: Accelerator, model: LDVC) -> None:
    """Checkpoints hold the trainable tensors; the frozen towers are named in the configuration, not stored."""

    def save(models: list[torch.nn.Module], weights: list[Any], folder: str) -> None:
        if not weights:
            return
        weights.clear()  # nothing is left for accelerate to write
        if accelerator.is_main_process:
            tensors = {name: tensor.contiguous() for name, tensor in model.trainable_state_dict().items()}
            save_file(tensors, Path(folder) / WEIGHTS)

    def load(models: list[torch.nn.Module], folder: str) -> None:
        if (Path(folder) / WEIGHTS).is_file():
            models.clear()
            model.load_trainable_state_dict(load_file(Path(folder) / WEIGHTS))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def checkpoints_of(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE).is_file()]


def write_checkpoint(accelerator: Accelerator, folder: Path, state: dict[str, Any], limit: int) -> None:
    """Saves everything that a run needs to go on.

    Args:
        accelerator: knows model, optimiser and random numbers.
        folder: the run's output folder.
        state: "step" and whatever else the trainer wants back, for JSON.
        limit: how many checkpoints stay; older ones are deleted once this one is complete.
    """
    target = folder / f"checkpoint-{state['step']}"
    partial = folder / f".{target.name}{_WRITING}"
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _reach_disk(partial)
        (partial / STATE).write_text(json.dumps(state))
        _reach_disk(partial)
        finish_writing(folder, partial)
        prune(folder, limit)
    accelerator.wait_for_everyone()


def finish_writing(folder: Path, partial: Path) -> None:
    """Gives a complete checkpoint its final name, in the place of one of the same step, if there is one."""
    target = folder / partial.name.removeprefix(".").removesuffix(_WRITING)
    if target.exists():
        _delete(target)
    os.replace(partial, target)


def prune(folder: Path, limit: int) -> None:
    """Deletes all checkpoints but the newest ones."""
    for old in checkpoints_of(folder)[:-limit]:
        _delete(old)


def clean_up(folder: Path, limit: int) -> None:
    """After a kill: a checkpoint that is complete but for its name gets it, unfinished ones and remains are deleted."""
    for partial in folder.glob(f".checkpoint-*{_WRITING}"):
        if (partial / STATE).is_file():
            finish_writing(folder, partial)
        else:
            shutil.rmtree(partial)
    for remains in folder.glob(f".checkpoint-*{_OLD}"):
        shutil.rmtree(remains)
    prune(folder, limit)


def _delete(checkpoint: Path) -> None:
    hidden = checkpoint.with_name(f".{checkpoint.name}{_OLD}")
    if hidden.exists():
        shutil.rmtree(hidden)
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)


def _reach_disk(folder: Path) -> None:
    """Flushes files and folder, so that not even a power cut finds the last file without the others."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def find_checkpoint(folder: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from: a path, or "latest" (None when there is none yet).

    Raises:
        ConfigError: the given folder is no checkpoint, or the output folder holds checkpoints that would be overtaken.
    """
    there = checkpoints_of(folder)
    if wanted == "latest":
        return there[-1] if there else None
    if wanted is None:
        if there:
            raise ConfigError(
                f"{folder} holds checkpoints of an earlier run; add --resume_from_checkpoint latest to continue it, or give "
                "another --output_dir."
            )
        return None
    path = Path(wanted)
    if not (path / STATE).is_file():
        raise ConfigError(f"{wanted} is no checkpoint to resume from; give a folder checkpoint-N or 'latest'.")
    if there and path.resolve() != there[-1].resolve():
        raise ConfigError(
            f"{folder} holds {there[-1].name}, which is not the checkpoint to resume from; delete it, or give another "
            "--output_dir."
        )
    return path


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `write_checkpoint` was given.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        state = json.loads((checkpoint / STATE).read_text())
        return {**state, "step": int(state["step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint / STATE} cannot be read ({error}); resume from another checkpoint."
        ) from None


def changes_since(checkpoint: Path, config: TrainConfig) -> str:
    """What a resumed run does differently from the run that wrote the checkpoint; "" when nothing.

    Args:
        checkpoint: beside its folder lies the configuration of its run, `train.json`.
        config: of the run that resumes.
    """
    path = checkpoint.resolve().parent / "train.json"
    if not path.is_file():
        return ""
    before, now = json.loads(path.read_text()), json.loads(json.dumps(config.to_dict()))
    model = ModelConfig.from_dict(before.pop("model", {}))
    before |= asdict(model)
    now |= asdict(config.model_config())
    changed = [key for key in now if key in before and before[key] != now[key] and key != "output_dir"]
    return ", ".join(f"{key} {before[key]} -> {now[key]}" for key in changed)


def check_fits(checkpoint: Path, model: LDVC, config: TrainConfig) -> None:
    """A checkpoint is of this model; asked before anything that takes long.

    Raises:
        ConfigError: it is of another decoder or size.
    """
    path = checkpoint / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); resume from another checkpoint.") from None
    if stored != {name: tuple(tensor.shape) for name, tensor in model.trainable_state_dict().items()}:
        changed = changes_since(checkpoint, config)
        raise ConfigError(
            f"{checkpoint} is of another model{f' ({changed})' if changed else ''}: resume with the configuration that it "
            "was begun with, or begin anew in another --output_dir."
        )


def export(model: LDVC, folder: Path, vocabulary: Vocabulary, config: TrainConfig) -> None:
    """Writes the finished checkpoint."""
    dtype = torch.float16 if config.half_precision_checkpoint else None
    save_checkpoint(model, folder, metadata=metadata_of(vocabulary, config), dtype=dtype)


def metadata_of(vocabulary: Vocabulary, config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint's config.json says beside the model, see `ldvc.checkpoint`."""
    return {
        "seen_names": vocabulary.spellings,
        "seen_words": vocabulary.seen_words,
        "calibration": asdict(Calibration()),
        "inference": config.inference,
        "training": {
            "steps": config.max_train_steps,
            "seed": config.seed,
            "sets": config.sets,
            "unseen": config.unseen,
            "setting": config.setting,
        },
    }
