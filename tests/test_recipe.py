"""A step follows the configuration: groups, rates, losses, views."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from tests.tiny_run import config_of
from train.config import TrainConfig, load_config
from train.data import Augmentation, Vocabulary, open_sets
from train.losses import mask_loss
from train.objective import Objective, learning_rate, parameter_groups, set_learning_rate
from train.train import train


def test_groups_and_schedule(root: Path, tiny_clip_folder: Path, tiny_clip: FrozenClip) -> None:
    config = config_of(root, tiny_clip_folder, "unused", "prompt_multiplier=10", "warmup_steps=4", "max_train_steps=10")
    model = LDVC(config.model, tiny_clip)
    groups = parameter_groups(model, config)
    counted = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert counted == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    found = {id(parameter): (group["peak"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    assert config.weight_decay > 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_prompts, is_vector = name.startswith(("image_tower", "text_tower")), parameter.ndim < 2 or "gate" in name
            expected = (0.01 if of_prompts else 0.001, 0.0 if is_vector else config.weight_decay)
            assert found[id(parameter)] == pytest.approx(expected), name


def test_each_step_has_its_learning_rate_and_its_largest_gradient(
    root: Path, tiny_clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []

    def record(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> float:
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())
        return set_learning_rate(optimizer, step, config)

    monkeypatch.setattr("train.train.set_learning_rate", record)
    changes = ("max_train_steps=4", "warmup_steps=2", "log_steps=1", "clip_gradient=0.001", "power=1")
    folder = train(config_of(root, tiny_clip_folder, "paced", *changes))
    assert norms == pytest.approx([0.001] * 4, rel=1e-3)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    # a line from 0.001 at step 0 to 1e-6 at step 4, of which the first step takes half (one of two steps of warm-up)
    assert [line["lr"] for line in lines] == pytest.approx([0.0005, 0.00075025, 0.0005005, 0.00025075], rel=1e-3)


def test_the_parts_of_the_loss_have_their_weights(root: Path, tiny_clip_folder: Path, tiny_clip: FrozenClip) -> None:
    datasets = open_sets(root / "data", ["meadow", "pets"], "train")
    vocabulary = Vocabulary(datasets)
    batch = {
        "patch_tokens": torch.randn(2, 64, 4, 4),
        "labels": torch.randint(0, 3, (2, 16, 16)).to(torch.int16),
        "set": torch.tensor([0, 0]),
    }
    names, nothing = torch.arange(len(vocabulary)), torch.zeros(0, dtype=torch.int64)
    parts = []
    for changes in ((), ("focal_weight=30", "dice_weight=7"), ("focal_alpha=0.9",), ("focal_gamma=0",)):
        config = config_of(root, tiny_clip_folder, "unused", "distill_per_step=0", "distill_unannotated_weight=0", *changes)
        torch.manual_seed(0)
        model = LDVC(config.model, tiny_clip).eval()
        with torch.no_grad():
            parts.append(Objective(model, vocabulary, [], config)(batch, names, nothing))
            annotated = vocabulary.annotated[batch["set"]]
            image = model.encode_image(patch_tokens=batch["patch_tokens"])
            logits = model.decode(image, model.encode_names(vocabulary.texts)).mask_logits
        options = {"void_is_negative": config.ignore_as_negative, "normalise": config.focal_normalise}
        bare = mask_loss(
            logits, batch["labels"], annotated, alpha=config.focal_alpha, gamma=config.focal_gamma, **options
        )
        assert parts[-1]["focal"].item() == pytest.approx(config.focal_weight * bare.focal.item(), rel=1e-4)
        assert parts[-1]["dice"].item() == pytest.approx(config.dice_weight * bare.dice.item(), rel=1e-4)
        assert parts[-1]["loss"].item() == pytest.approx((parts[-1]["focal"] + parts[-1]["dice"]).item(), rel=1e-5)
    assert len({round(part["focal"].item(), 4) for part in parts}) == 4


def test_views_are_drawn_as_the_configuration_says() -> None:
    values = {"crop": 96, "long_side": None, "short_side": 128, "scale": (0.7, 1.9), "aspect": 1.3, "uniform_scale": False}
    values |= {"photometric": 0.25, "hue": 11.0, "largest_class": 0.6}
    config = TrainConfig(sets={"pets": 1.0}, loss_stride=4, **values)
    assert config.augmentation() == Augmentation(stride=4, **values)


@pytest.mark.parametrize("flag", [True, False])
def test_held_out_pixels_are_what_the_configuration_says(
    flag: bool, root: Path, tiny_clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Called(Exception):
        pass

    def look(*_: object, held_out_as_background: bool, **__: object) -> None:
        raise Called(held_out_as_background)

    monkeypatch.setattr("train.train.Vocabulary", look)
    with pytest.raises(Called, match=str(flag)):
        train(config_of(root, tiny_clip_folder, f"held{flag}", f"held_out_as_negative={str(flag).lower()}"))


def test_the_schedule_is_the_published_one() -> None:
    """ZegCLIP's on VOC, prompts and head (10 x 2e-5); numbers worked out from mmcv's PolyLrUpdaterHook by hand."""
    config = load_config("voc12_inductive")
    rates = {step: learning_rate(2e-4, step, config) for step in (0, 750, 1500, 10_000, 19_999)}
    assert rates[0] == pytest.approx(2e-10)
    assert rates[750] == pytest.approx(0.5 * (1e-6 + 1.99e-4 * 0.9625**0.9), rel=1e-5)
    assert rates[1500] == pytest.approx(1e-6 + 1.99e-4 * 0.925**0.9)
    assert rates[10_000] == pytest.approx(1e-6 + 1.99e-4 * 0.5359, rel=1e-3)
    assert rates[19_999] == pytest.approx(1.03e-6, rel=1e-2)
    assert learning_rate(1e-7, 19_999, config) == pytest.approx(1e-7)
