"""Small CLIPs with random weights: every test of the method runs in seconds and without a download."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CLIP

from ldvc.config import ModelConfig
from ldvc.modeling.clip import FrozenClip, build_clip, save_clip_folder
from tests.browsing import browser, url  # noqa: F401  fixtures of the page
from tests.tiny import save_tiny_checkpoint

TINY_ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
    "init_logit_scale": 2.3,
    "init_logit_bias": -3.0,
}
NAMES = ["dog", "potted plant", "tv monitor", "grass"]


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_architecture() -> dict[str, Any]:
    return deepcopy(TINY_ARCHITECTURE)


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.json and shards, as the lite towers are shipped."""
    folder = tmp_path_factory.mktemp("towers") / "clip"
    torch.manual_seed(0)
    model = CLIP(**deepcopy(TINY_ARCHITECTURE))
    with torch.no_grad():  # random towers map everything to one direction; spread their outputs a little
        model.visual.proj.normal_(std=0.2)
        model.text_projection.normal_(std=0.2)
        model.positional_embedding.normal_(std=0.01)
    config = {"architecture": TINY_ARCHITECTURE, "patch_embed": None, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    save_clip_folder(model, folder, config)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tiny_clip_folder: Path) -> FrozenClip:
    """Frozen, so that tests can share it: 4 x 4 patches of 16 pixels, width 64."""
    return build_clip(str(tiny_clip_folder))


@pytest.fixture
def tiny_config(tiny_clip_folder: Path) -> ModelConfig:
    return ModelConfig(clip=str(tiny_clip_folder), visual_prompts=3, decoder_layers=2, decoder_heads=4)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All decoders with random weights; see `tests/tiny.py`."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets and configuration for trainings of a few steps."""
    from tests.tiny_run import make_root  # loads the trainer

    return make_root(tmp_path_factory.mktemp("root"))


@pytest.fixture
def names() -> list[str]:
    return list(NAMES)
