"""The convolutional patch embedding of lite, against timm's own network."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

from ldvc.data import weights_digest
from ldvc.modeling.stem import ConvStem

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


def make_stem(network: torch.nn.Module, **options: object) -> ConvStem:
    stem = ConvStem(32, backbone=BACKBONE, **options)
    stem.backbone.load_state_dict(network.state_dict())
    return stem.eval()


@torch.no_grad()
def test_one_look_is_the_network_itself(network: torch.nn.Module) -> None:
    images = torch.randn(3, 3, 64, 96)
    expected = torch.cat(network(images), dim=1)
    stem = make_stem(network)
    torch.testing.assert_close(stem.features(images), expected, atol=1e-3, rtol=1e-3)
    assert stem(images).shape == (3, 32, 4, 6)


@torch.no_grad()
def test_more_looks_are_the_mean_over_enlarged_pictures(network: torch.nn.Module) -> None:
    images = torch.randn(2, 3, 48, 64)
    expected = torch.cat(network(images), dim=1)
    for look in (2, 3):
        enlarged = F.interpolate(images, size=(48 * look, 64 * look), mode="bicubic")
        seen = torch.cat(network(enlarged), dim=1)  # (2, channels, 3 * look, 4 * look)
        expected = expected + seen.unflatten(2, (3, look)).unflatten(4, (4, look)).mean(dim=(3, 5))
    stem = make_stem(network, looks=(1, 2, 3))
    torch.testing.assert_close(stem.features(images), expected / 3, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_weights_that_come_later_are_used(network: torch.nn.Module) -> None:
    images, stem = torch.randn(1, 3, 32, 32), make_stem(network)
    before, names = stem.features(images), list(stem.state_dict())
    stem.backbone.load_state_dict({name: value * 0.9 for name, value in network.state_dict().items()})
    stem.load_state_dict(stem.state_dict())
    assert not torch.allclose(stem.features(images), before)
    assert list(stem.state_dict()) == names, "the fast copy is no part of the state"


def test_stored_views_of_other_looks_are_others() -> None:
    torch.manual_seed(0)
    one, two = ConvStem(8, backbone=BACKBONE), ConvStem(8, backbone=BACKBONE, looks=(1, 2))
    two.load_state_dict(one.state_dict())
    assert weights_digest(one) != weights_digest(two)
