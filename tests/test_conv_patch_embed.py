"""The convolutional patch embedding against timm's network."""

import pytest
import timm
import torch
from torch.nn import functional as F

from ldvc.modeling.conv_patch_embed import ConvPatchEmbed
from train.data import weights_digest

BACKBONE = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """With random batch norms; PyTorch initialises them nearly as the identity."""
    torch.manual_seed(0)
    network = timm.create_model(BACKBONE, features_only=True, output_stride=16, out_indices=(3, 4))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def make_patch_embed(network: torch.nn.Module, **options: object) -> ConvPatchEmbed:
    patch_embed = ConvPatchEmbed(32, backbone=BACKBONE, **options)
    patch_embed.backbone.load_state_dict(network.state_dict())
    return patch_embed.eval()


@torch.no_grad()
def test_features_are_the_networks(network: torch.nn.Module) -> None:
    """A patch of 24 pixels is 1.5 features wide. Its weights fall linearly to zero at a distance of one patch. The other scale
    has one feature per patch."""
    usual, images = make_patch_embed(network), torch.randn(3, 3, 64, 96)
    torch.testing.assert_close(usual.features(images), torch.cat(network(images), dim=1), atol=1e-3, rtol=1e-3)
    assert usual(images).shape == (3, 32, 4, 6)
    images = torch.randn(2, 3, 48, 72)
    features = torch.cat(network(images), dim=1)  # (2, channels, 3, 5), of pictures that are 3 and 4.5 strides long

    def weights(patches: int, cells: int) -> torch.Tensor:
        step = cells / patches
        centres = (torch.arange(patches) + 0.5) * step
        near = (1 - ((torch.arange(cells) + 0.5) - centres[:, None]).abs() / step).clamp(min=0)
        return near / near.sum(dim=1, keepdim=True)

    expected = torch.einsum("bcij,yi,xj->bcyx", features, weights(2, 3), weights(3, 5))
    reduced = F.interpolate(images, size=(32, 48), mode="bilinear", antialias=True)
    expected = (expected + torch.cat(network(reduced), dim=1)) / 2
    patch_embed = make_patch_embed(network, patch_size=24)
    torch.testing.assert_close(patch_embed.features(images), expected, atol=1e-3, rtol=1e-3)
    assert patch_embed(images).shape == (2, 32, 2, 3)


@torch.no_grad()
def test_the_folded_copy_follows_the_weights(network: torch.nn.Module) -> None:
    images, patch_embed = torch.randn(1, 3, 32, 32), make_patch_embed(network)
    before, names = patch_embed.features(images), list(patch_embed.state_dict())
    patch_embed.backbone.load_state_dict({name: value * 0.9 for name, value in network.state_dict().items()})
    patch_embed.load_state_dict(patch_embed.state_dict())
    assert not torch.allclose(patch_embed.features(images), before)
    assert list(patch_embed.state_dict()) == names, "the folded copy is not saved"


def test_the_digest_of_a_cache_depends_on_the_patch_size() -> None:
    torch.manual_seed(0)
    small, large = ConvPatchEmbed(8, backbone=BACKBONE), ConvPatchEmbed(8, patch_size=24, backbone=BACKBONE)
    large.load_state_dict(small.state_dict())
    assert weights_digest(small) != weights_digest(large)
