"""The convolutional patch embedding of lite, against timm's own network."""

from __future__ import annotations

import pytest
import timm
import torch

from ldvc.modeling.conv_patch_embed import ConvPatchEmbed
from train.data import weights_digest

BACKBONE = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """With batch norms that do something: a fresh one is nearly the identity."""
    torch.manual_seed(0)
    network = timm.create_model(BACKBONE, features_only=True, output_stride=16, out_indices=(3, 4))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def make_stem(network: torch.nn.Module, **options: object) -> ConvPatchEmbed:
    stem = ConvPatchEmbed(32, backbone=BACKBONE, **options)
    stem.backbone.load_state_dict(network.state_dict())
    return stem.eval()


@torch.no_grad()
def test_patches_of_the_stride_are_the_network_itself(network: torch.nn.Module) -> None:
    images = torch.randn(3, 3, 64, 96)
    expected = torch.cat(network(images), dim=1)
    stem = make_stem(network)
    torch.testing.assert_close(stem.features(images), expected, atol=1e-3, rtol=1e-3)
    assert stem(images).shape == (3, 32, 4, 6)


@torch.no_grad()
def test_larger_patches_have_the_mean_of_their_features(network: torch.nn.Module) -> None:
    """A patch of 24 pixels spans 1.5 features; antialiased, it reads those within one patch of its centre, near ones most."""
    images = torch.randn(2, 3, 48, 72)
    features = torch.cat(network(images), dim=1)  # (2, channels, 3, 5), of pictures that are 3 and 4.5 strides long

    def weights(patches: int, cells: int) -> torch.Tensor:
        step = cells / patches
        centres = (torch.arange(patches) + 0.5) * step
        near = (1 - ((torch.arange(cells) + 0.5) - centres[:, None]).abs() / step).clamp(min=0)
        return near / near.sum(dim=1, keepdim=True)

    expected = torch.einsum("bcij,yi,xj->bcyx", features, weights(2, 3), weights(3, 5))
    stem = make_stem(network, patch_size=24)
    torch.testing.assert_close(stem.features(images), expected, atol=1e-3, rtol=1e-3)
    assert stem(images).shape == (2, 32, 2, 3)


@torch.no_grad()
def test_weights_that_come_later_are_used(network: torch.nn.Module) -> None:
    images, stem = torch.randn(1, 3, 32, 32), make_stem(network)
    before, names = stem.features(images), list(stem.state_dict())
    stem.backbone.load_state_dict({name: value * 0.9 for name, value in network.state_dict().items()})
    stem.load_state_dict(stem.state_dict())
    assert not torch.allclose(stem.features(images), before)
    assert list(stem.state_dict()) == names, "the fast copy is no part of the state"


def test_stored_views_of_other_patches_are_others() -> None:
    torch.manual_seed(0)
    small, large = ConvPatchEmbed(8, backbone=BACKBONE), ConvPatchEmbed(8, patch_size=24, backbone=BACKBONE)
    large.load_state_dict(small.state_dict())
    assert weights_digest(small) != weights_digest(large)
