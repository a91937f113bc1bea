"""The second stage of lite: a run that starts from a checkpoint, and masks that do not show every class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ldvc.checkpoint import load_checkpoint
from ldvc.errors import DataError
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from tests.test_train import config_of, root  # noqa: F401  a fixture
from tests.tiny_data import make_set
from train.data import BACKGROUND, Vocabulary, open_sets
from train.objective import Objective
from train.train import train


def test_a_mask_that_is_not_exhaustive_gives_no_negatives_for_other_names(
    root: Path,  # noqa: F811
    tiny_clip_folder: Path,
    tmp_path: Path,
) -> None:
    """Photos with one label: pixels around the object are negatives of that label, and of no other name."""
    folder = make_set(tmp_path / "labelled", ["background", "dog", "cat"], background=0)
    facts = json.loads((folder / "dataset.json").read_text())
    config = config_of(root, tiny_clip_folder, "labelled", "unseen=none", "dice_weight=0", "distill_unannotated_weight=0")
    focal = {}
    for exhaustive in (True, False):
        (folder / "dataset.json").write_text(json.dumps(facts | {"exhaustive": exhaustive}))
        vocabulary = Vocabulary(open_sets(str(tmp_path), ["labelled"], "train"))
        torch.manual_seed(0)
        objective = Objective(LDVC(config.model).eval(), vocabulary, [], config)
        labels = torch.full((1, 16, 16), BACKGROUND, dtype=torch.int16)
        labels[:, 4:9] = vocabulary.names.index("dog")
        batch = {
            "images": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)),
            "labels": labels,
            "set": torch.tensor([0]),
        }
        for name in ("dog", "cat"):
            indices = torch.tensor([vocabulary.names.index(name)])
            losses = objective(batch, indices, torch.zeros(0, dtype=torch.int64))
            focal[exhaustive, name] = float(losses["focal"].detach())
    assert focal[False, "dog"] == focal[True, "dog"] > 0
    assert focal[True, "cat"] > 0 and focal[False, "cat"] == 0

    (folder / "dataset.json").write_text(json.dumps(facts | {"exhaustive": "no"}))
    with pytest.raises(DataError, match="'exhaustive' must be true or false, not 'no'"):
        open_sets(str(tmp_path), ["labelled"], "train")


def test_a_run_starts_where_another_ended(root: Path, tiny_clip_folder: Path, tiny_clip: FrozenClip) -> None:  # noqa: F811
    first = train(config_of(root, tiny_clip_folder, "stage1", "max_train_steps=2"))
    still = ["max_train_steps=1", "learning_rate=1e-12", "minimum_learning_rate=0"]
    second = train(config_of(root, tiny_clip_folder, "stage2", f"init_from={first}", *still))
    (one, _), (two, _) = load_checkpoint(first), load_checkpoint(second)
    fresh = LDVC(one.config, clip=tiny_clip).trainable_state_dict()
    moved = 0
    for name, tensor in one.trainable_state_dict().items():
        torch.testing.assert_close(two.trainable_state_dict()[name], tensor, rtol=0, atol=1e-6)
        moved += int(not torch.equal(fresh[name], tensor))
    assert moved > 10  # otherwise a fresh model would have passed as well
