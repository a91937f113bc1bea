"""Checkpoints to resume from. If a run is killed at any moment, its last complete checkpoint remains.

    output_dir/checkpoint-40/   trainable.safetensors   prompts, adapter and decoder; the frozen CLIP is named in train.json
                                optimizer.bin, random_states_*.pkl, ...   written by accelerate
                                step.json               written last and deleted first: without it a folder is incomplete
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
from ldvc.errors import CheckpointError
from ldvc.modeling.model import LDVC
from train.config import ConfigError, TrainConfig
from train.data import Vocabulary

WEIGHTS = "trainable.safetensors"
STATE = "step.json"
CONFIG = "train.json"
LOCK = ".training"
_STEP = re.compile(r"checkpoint-(\d+)")


@contextmanager
def run_lock(accelerator: Accelerator, folder: Path, *, timeout: float = 10.0) -> Iterator[None]:
    """Makes the output folder and locks it for this run; every process of the run calls it.

    The operating system releases the lock when the main process ends. Its children (readers of photos) do not inherit it.
    `timeout`: seconds to wait for a run that is ending. ConfigError if the folder is in use or cannot be made.
    """
    problem = [""]  # broadcast, so that every process ends with the same message
    with ExitStack() as stack:
        if accelerator.is_main_process:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                owner = _lock(stack.enter_context(open(folder / LOCK, "a+", encoding="utf-8")), timeout)
                if owner is not None:
                    problem = [f"Another run (process {owner}) is writing into {folder}: give another --output_dir."]
            except OSError as error:
                problem = [f"The output folder {folder} cannot be written: {error.strerror}."]
        broadcast_object_list(problem)
        if problem[0]:
            raise ConfigError(problem[0])
        yield


def _lock(file: Any, timeout: float) -> str | None:
    """Locks a file and writes this process's id into it. Returns None, or the id of the process that holds the lock."""
    end = time.monotonic() + timeout
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                file.seek(0)
                return file.read().strip()
            time.sleep(0.2)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return None


def register_trainable_only(accelerator: Accelerator, model: LDVC) -> None:
    """Makes accelerate's checkpoints hold the trainable tensors alone; the configuration names the frozen towers."""

    def save(models: list[torch.nn.Module], weights: list[Any], folder: str) -> None:
        if not weights:
            return
        weights.clear()  # so that accelerate writes none
        if accelerator.is_main_process:
            tensors = {name: tensor.contiguous() for name, tensor in model.trainable_state_dict().items()}
            save_file(tensors, Path(folder) / WEIGHTS)

    def load(models: list[torch.nn.Module], folder: str) -> None:
        if (Path(folder) / WEIGHTS).is_file():
            models.clear()
            model.load_trainable_state_dict(load_file(Path(folder) / WEIGHTS))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def checkpoints_of(folder: Path, *, complete: bool = True) -> list[Path]:
    """Complete (or incomplete) checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE).is_file() == complete]


def write_checkpoint(accelerator: Accelerator, folder: Path, state: dict[str, Any], limit: int) -> None:
    """Saves everything that a run needs to continue. `state`: the plain values that `read_state` returns.

    Then all but the newest `limit` checkpoints are deleted. CheckpointError if the disk is full; earlier checkpoints stay.
    """
    target = folder / f"checkpoint-{state['step']}"
    try:
        accelerator.save_state(str(target))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (target / f"{STATE}.new").write_text(json.dumps(state))
            fsync_folder(target)
            os.replace(target / f"{STATE}.new", target / STATE)
            fsync_folder(target)
    except (OSError, RuntimeError, SafetensorError) as error:  # libraries raise their own errors for a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        earlier = checkpoints_of(folder)
        kept = f"{earlier[-1].name} is complete" if earlier else "there is no earlier one"
        raise CheckpointError(
            f"{target} cannot be written ({reason}); {kept}. Free some space and continue with --resume_from_checkpoint latest."
        ) from error
    if accelerator.is_main_process:
        clean_up(folder, limit)
    accelerator.wait_for_everyone()


def load_state(accelerator: Accelerator, checkpoint: Path) -> None:
    """Loads what `write_checkpoint` saved; CheckpointError if a file is damaged or missing."""
    try:
        accelerator.load_state(str(checkpoint))
    except Exception as error:  # unpickling raises any type
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{checkpoint} cannot be read ({reason}); resume from another checkpoint.") from error


def clean_up(folder: Path, limit: int) -> None:
    """Deletes all but the newest `limit` checkpoints, and incomplete ones that a killed run left."""
    for old in [*checkpoints_of(folder)[:-limit], *checkpoints_of(folder, complete=False)]:
        (old / STATE).unlink(missing_ok=True)
        shutil.rmtree(old)


def fsync_folder(folder: Path) -> None:
    """Writes files and folder to the disk, so that a power failure cannot keep the last file and lose an earlier one."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def find_checkpoint(folder: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from: a path, or "latest" (None if there is none yet).

    ConfigError if the given folder is no checkpoint, or the output folder holds other checkpoints.
    """
    existing = checkpoints_of(folder)
    if wanted == "latest":
        return existing[-1] if existing else None
    if wanted is None and existing:
        advice = "add --resume_from_checkpoint latest to continue it, or give another --output_dir"
        raise ConfigError(f"{folder} holds checkpoints of an earlier run; {advice}.")
    if wanted is None:
        return None
    path = Path(wanted)
    if not (path / STATE).is_file():
        raise ConfigError(f"{wanted} is no checkpoint to resume from; give a folder checkpoint-N or 'latest'.")
    if existing and path.resolve() != existing[-1].resolve():
        wrong = f"{existing[-1].name}, which is not the checkpoint to resume from"
        raise ConfigError(f"{folder} holds {wrong}; delete it, or give another --output_dir.")
    return path


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state that was given to `write_checkpoint`; CheckpointError if the file is damaged."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        return {**state, "step": int(state["step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / STATE} cannot be read ({error}); resume from another checkpoint.") from None


def changes_since(checkpoint: Path, config: TrainConfig) -> str:
    """Fields of the configuration that differ from `train.json` beside the checkpoint; "" if none does."""
    try:
        stored = dict(json.loads((checkpoint.resolve().parent / CONFIG).read_text()))
    except (OSError, ValueError, TypeError):  # missing or damaged: nothing to compare with
        return ""
    current = json.loads(json.dumps(asdict(config)))
    stored |= stored.pop("model", {})
    current |= current.pop("model")
    changed = [key for key in current if key in stored and stored[key] != current[key] and key != "output_dir"]
    return ", ".join(f"{key} {stored[key]} -> {current[key]}" for key in changed)


def check_fits(checkpoint: Path, model: LDVC, config: TrainConfig) -> None:
    """Raises ConfigError if a checkpoint has another decoder or size, CheckpointError if it cannot be read."""
    path = checkpoint / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); resume from another checkpoint.") from None
    if stored != {name: tuple(tensor.shape) for name, tensor in model.trainable_state_dict().items()}:
        changed = changes_since(checkpoint, config)
        problem = f"{checkpoint} is of another model{f' ({changed})' if changed else ''}"
        raise ConfigError(f"{problem}: resume with the configuration of its run, or start a new run in another --output_dir.")


def metadata_of(vocabulary: Vocabulary, config: TrainConfig) -> dict[str, Any]:
    """Metadata of a checkpoint's config.json, see `ldvc.checkpoint`."""
    return {
        "seen_names": vocabulary.spellings,
        "seen_words": vocabulary.seen_words,
        "calibration": asdict(Calibration()),
        "inference": config.inference,
        "training": {"steps": config.max_train_steps}
        | {name: getattr(config, name) for name in ("seed", "sets", "unseen", "setting")},
    }
