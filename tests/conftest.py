"""Small CLIPs with random weights: every test of the method runs in seconds and without a download."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest runs two processes

import pytest
import torch
from open_clip.model import CLIP

from ldvc.config import ModelConfig
from ldvc.modeling.clip import FrozenClip, build_clip, save_clip_folder
from tests.browsing import asked, browser, page, registry, segmenter, url  # noqa: F401  fixtures of the page
from tests.tiny import save_tiny_checkpoint

TINY_ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
    "init_logit_scale": 2.3,
    "init_logit_bias": -3.0,
}
NAMES = ["dog", "potted plant", "tv monitor", "grass"]


# The slowest files start first, so that both processes end at about the same time.
SLOW = ("test_page", "test_resume", "test_examples", "test_space_hosting", "test_distributed", "test_visitors", "test_load")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.stem.startswith(SLOW))


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


@pytest.fixture(scope="module")
def configure(root: Path, tiny_clip_folder: Path) -> Callable[..., Any]:
    """Makes the configuration of a run in `root`; see `tests/tiny_run.py`."""
    from tests.tiny_run import config_of

    return partial(config_of, root, tiny_clip_folder)


@pytest.fixture
def names() -> list[str]:
    return list(NAMES)
