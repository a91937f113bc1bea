"""Trainings of a few steps on tiny towers and tiny data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tests.tiny_data import make_sets
from train.config import TrainConfig, load_config

Configure = Callable[..., TrainConfig]
"""The fixture `configure`: (name of a run, *changes) -> its configuration."""
CONCEPTS = ["zebra", "teapot", "dog", "aeroplane", "kitten", "violin", "bridge", "lamp", "river"]


def make_root(folder: Path) -> Path:
    """Data sets and configuration of such runs, in a folder."""
    make_sets(folder / "data")
    (folder / "concepts.txt").write_text("\n".join(CONCEPTS) + "\n")
    (folder / "tiny.yaml").write_text("base: lite.yaml\nsets: {meadow: 0.5, pets: 0.5}\n")
    shutil.copy(Path(__file__).parents[1] / "train" / "configs" / "lite.yaml", folder / "lite.yaml")
    return folder


def close_gates(model: nn.Module) -> nn.Module:
    """Sets every gate to 0, so that the decoder `zegclip` computes CLIP's own logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.zero_()
    return model


def config_of(root: Path, clip: Path, name: str, *changes: str) -> TrainConfig:
    """The configuration of a run in `root`/`name` on the towers in `clip`."""
    small = ["visual_prompts=2", "decoder_layers=2", "decoder_heads=4", "regions=2", "topk=2"]
    small += ["crop=64", "loss_stride=4", "long_side=80", f"distillation_names={root / 'concepts.txt'}", "distill_per_step=4"]
    small += [f"cache_dir={root / 'cache'}", "views_per_photo={meadow: 2, pets: 1}", "max_train_steps=6"]
    small += ["train_batch_size=2", "log_steps=2", "checkpointing_steps=3", "checkpoints_total_limit=5"]
    small += ["warmup_steps=1", "learning_rate=0.001", "unseen=lite_experiment", "mixed_precision=no"]
    return load_config(
        root / "tiny.yaml", [*small, *changes], clip=str(clip), data=str(root / "data"), output_dir=str(root / name)
    )
