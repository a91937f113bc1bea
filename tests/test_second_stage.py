"""What the second stage of lite needs: a run that starts where another ended, and rare names that are no negatives."""

from __future__ import annotations

import json
from dataclasses import replace
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


@pytest.fixture(scope="module")
def vocabulary(root: Path) -> Vocabulary:  # noqa: F811
    return Vocabulary(open_sets(str(root / "data"), ["meadow", "pets"], "train"))


def test_rare_names_are_counted_in_photos(vocabulary: Vocabulary) -> None:
    # Six photos show classes n % 4 and (n + 1) % 4 of meadow; n % 3 and (n + 1) % 3 of pets, where class 0 is background.
    assert vocabulary.names == ["grass", "sky", "airplane", "dog", "cat"]
    shown = torch.tensor([[3, 4, 3, 2, 0], [0, 0, 0, 4, 4]])
    labelled = torch.tensor([[True, True, True, True, False], [False, False, False, True, True]])
    for photos in range(6):
        assert torch.equal(vocabulary.doubtful(photos), labelled & (shown < photos)), photos


def test_a_rare_name_is_learned_where_it_is_and_preserved_elsewhere(
    root: Path,  # noqa: F811
    tiny_clip_folder: Path,
    vocabulary: Vocabulary,
) -> None:
    config = config_of(root, tiny_clip_folder, "rare", "rare_photos=3", "unseen=none", "preserve_unknown_weight=1")
    torch.manual_seed(0)
    model = LDVC(config.model_config()).eval()
    often = Objective(model, vocabulary, [], replace(config, rare_photos=0))
    rarely = Objective(model, vocabulary, [], config)
    nothing = torch.zeros(0, dtype=torch.int64)
    names = torch.arange(len(vocabulary))
    grass, dog = (vocabulary.names.index(name) for name in ("grass", "dog"))

    def losses(objective: Objective, label: int) -> dict[str, float]:
        batch = {
            "images": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)),
            "labels": torch.full((1, 16, 16), label, dtype=torch.int16),
            "set": torch.tensor([0]),
        }
        return {name: float(value.detach()) for name, value in objective(batch, names, nothing).items()}

    # "dog" is rare in meadow. On a photo of grass it is no negative any more, on a photo of a dog nothing changes.
    assert losses(rarely, grass)["focal"] != pytest.approx(losses(often, grass)["focal"], rel=1e-4)
    assert losses(rarely, dog) == losses(often, dog)


def test_what_a_mask_that_is_not_exhaustive_leaves_out_is_no_negative(
    root: Path,  # noqa: F811
    tiny_clip_folder: Path,
    tmp_path: Path,
) -> None:
    """Photos with one label: pixels around the object are negatives of that label, and say nothing of other names."""
    folder = make_set(tmp_path / "labelled", ["background", "dog", "cat"], background=0)
    facts = json.loads((folder / "dataset.json").read_text())
    config = config_of(root, tiny_clip_folder, "labelled", "unseen=none", "dice_weight=0", "preserve_unknown_weight=0")
    focal = {}
    for exhaustive in (True, False):
        (folder / "dataset.json").write_text(json.dumps(facts | {"exhaustive": exhaustive}))
        vocabulary = Vocabulary(open_sets(str(tmp_path), ["labelled"], "train"))
        torch.manual_seed(0)
        objective = Objective(LDVC(config.model_config()).eval(), vocabulary, [], config)
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
