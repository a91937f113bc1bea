"""Small CLIPs with random weights: every test of the method runs in seconds and without a download."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest runs two processes

import pytest
import torch
from open_clip.model import CLIP

from ldvc import Predictor
from ldvc.config import ModelConfig
from ldvc.modeling.clip import FrozenClip, build_clip
from tests.browsing import browser, dog_visitor, page, photo, registry, segmenter, url  # noqa: F401  fixtures of the page
from tests.tiny import TINY_ARCHITECTURE, save_tiny_checkpoint, save_tiny_clip

# The slowest files start first, so that both processes end at about the same time.
SLOW = ("test_page", "test_resume", "test_examples", "test_space_hosting", "test_distributed", "test_visitors", "test_load")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.stem.startswith(SLOW))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.json and shards, as the lite towers are shipped."""
    torch.manual_seed(0)
    model = CLIP(**TINY_ARCHITECTURE)
    with torch.no_grad():  # random towers map everything to one direction; spread their outputs a little
        model.visual.proj.normal_(std=0.2)
        model.text_projection.normal_(std=0.2)
        model.positional_embedding.normal_(std=0.01)
    return save_tiny_clip(model, tmp_path_factory.mktemp("towers") / "clip", TINY_ARCHITECTURE)


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


@pytest.fixture(scope="session")
def tiny_predictor(tiny_checkpoint: Path) -> Predictor:
    """With the decoder "ldvc"; tests that change it make their own."""
    return Predictor.from_pretrained(str(tiny_checkpoint), device="cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_clip_folder: Path) -> Path:
    """Data sets and configuration for trainings of a few steps."""
    from tests.forked import make_workplace  # loads the trainer

    return make_workplace(tmp_path_factory.mktemp("root"), tiny_clip_folder)


@pytest.fixture(scope="module")
def configure(root: Path) -> Callable[..., Any]:
    """Makes the configuration of a run in `root`; see `tests/forked.py`."""
    from tests.forked import config_of

    return partial(config_of, root)


@pytest.fixture
def names() -> list[str]:
    return ["dog", "potted plant", "tv monitor", "grass"]
