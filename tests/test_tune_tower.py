"""Fine-tuning of lite's image tower: the split backbone computes the same function, and a short run works."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from ldvc import Predictor
from ldvc.modeling.clip import build_clip
from ldvc.modeling.conv_patch_embed import ConvPatchEmbed
from recipes.lite.tune_tower import FIRST, Trunk, main
from tests.forked import CONCEPTS
from tests.tiny_data import make_sets


@pytest.fixture
def patch_embed() -> ConvPatchEmbed:
    """A smaller backbone of the same family, with statistics that differ from those of a new network."""
    patch_embed = ConvPatchEmbed(8, patch_size=24, backbone="efficientnet_lite0").eval()
    for norm in patch_embed.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 2)
                nn.init.normal_(norm.bias, std=0.1)
    return patch_embed.double()  # rounding errors would add up over seven stages


def test_the_split_backbone_equals_the_patch_embedding_and_is_written_back(patch_embed: ConvPatchEmbed) -> None:
    images, grid = torch.randn(2, 3, 72, 96, dtype=torch.float64), (3, 4)
    trunk, before = Trunk(patch_embed), copy.deepcopy(patch_embed.backbone.state_dict())
    expected = patch_embed.features(images).detach()
    features = trunk.late(trunk.early(images), grid)
    torch.testing.assert_close(features.detach(), expected, atol=1e-4, rtol=1e-4)
    features.sum().backward()
    learned = {name for name, parameter in trunk.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in trunk.named_parameters() if name.startswith("stages.")}
    with torch.no_grad():
        for parameter in trunk.stages.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        changed = trunk.late(trunk.early(images), grid)
        trunk.write_back(patch_embed)
        assert (changed - expected).abs().max() > 0.01
        torch.testing.assert_close(patch_embed.features(images), changed, atol=1e-3, rtol=1e-3)
    names = {name for name, tensor in patch_embed.backbone.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {int(name.split(".")[1]) for name in names} == set(range(FIRST, 7))
    assert not any("running" in name for name in names)


def test_a_run_tunes_tower_and_decoders(tmp_path: Path) -> None:
    make_sets(tmp_path / "data")
    (tmp_path / "concepts.txt").write_text("\n".join(CONCEPTS) + "\n")
    changes = ["sets={meadow: 0.5, pets: 0.5}", "photos_every={}", "crop=72", "long_side=96", "mixed_precision=no"]
    changes += [f"distillation_names={tmp_path / 'concepts.txt'}", "distill_per_step=2"]
    changes += ["max_train_steps=1", "train_batch_size=4", "warmup_steps=0"]
    main(["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--set", *changes])

    before, after = build_clip("lite").model.state_dict(), build_clip(str(tmp_path / "out" / "clip")).model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith("visual.") for name in changed), "the text tower and the scale of the logits stay"
    stages = {int(name.split(".")[4]) for name in changed if ".blocks." in name}
    assert "visual.proj" in changed and stages == set(range(FIRST, 7))
    predictor = Predictor.from_pretrained(str(tmp_path / "out"), decoder="zegclip")
    torch.testing.assert_close(predictor.model.clip.model.state_dict(), after)
    assert {"grass", "cat"} <= set(predictor.metadata["seen_names"])
