"""The towers against open_clip, and the convolutional patch embedding against timm."""

from copy import deepcopy
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image
from torch.nn import functional as F

from ldvc.config import RECIPES
from ldvc.errors import LdvcError
from ldvc.modeling.clip import NEUTRAL_COSINE, FrozenClip
from ldvc.modeling.conv_patch_embed import ConvPatchEmbed
from ldvc.modeling.towers import ImageFeatures, ImageTower, TextTower
from tests.tiny import TINY_ARCHITECTURE
from train.data import weights_digest

TEXTS = ["dog", "potted plant", "cat's eye", "Crème brûlée", "", "7", "a name that does not fit into the context " * 5]


def make_clip(kind: type = CLIP, **vision_or_text: Any) -> FrozenClip:
    architecture = deepcopy(TINY_ARCHITECTURE)
    architecture["text_cfg"] |= vision_or_text.pop("text", {})
    architecture["vision_cfg"] |= vision_or_text.pop("vision", {})
    length = architecture["text_cfg"]["context_length"]
    tokenizer = open_clip.SimpleTokenizer(context_length=length)
    return FrozenClip(kind(**(architecture | vision_or_text)), tokenizer, mean=(0.5,) * 3, std=(0.5,) * 3)


VARIANTS = {
    "plain": {},
    "custom text": {"kind": CustomTextCLIP},
    "quick gelu": {"quick_gelu": True},
    "eos pooling, layer scale, biased projection": {
        "kind": CustomTextCLIP,
        "text": {"pool_type": "eos", "eos_id": 49407, "ls_init_value": 0.3, "proj_bias": True},
        "vision": {"ls_init_value": 0.3, "no_ln_pre": True},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("template", ["a photo of a {}.", "there is a {} in the scene", "a {photo} of a {}."])
def test_text_prompts_at_initialisation_are_clip(variant: str, template: str) -> None:
    clip = make_clip(**VARIANTS[variant])
    tower = TextTower(clip, template, prompts=True)
    tokens = tower.tokenize(TEXTS)
    assert torch.equal(tokens, clip.tokenizer([template.replace("{}", text) for text in TEXTS]))
    reference = clip.model.encode_text(tokens)
    torch.testing.assert_close(tower(tokens), reference, atol=1e-5, rtol=0)
    torch.testing.assert_close(tower(tokens, prompted=False), reference, atol=1e-5, rtol=0)
    torch.testing.assert_close(tower(tokens[1:2]), reference[1:2], atol=1e-5, rtol=0)  # alone, without longer names
    assert reference.abs().max() > 0.1  # 1e-5 means something


def test_text_prompts_learn_and_do_not_change_plain_features(tiny_clip: FrozenClip) -> None:
    tower = TextTower(tiny_clip)
    tokens = tower.tokenize(["dog", "grass"])
    before = tower(tokens, prompted=False)
    assert not before.requires_grad
    tower(tokens).square().sum().backward()
    assert tower.prompts.shape == (3, 4, 64)  # layers, "a photo of a", width
    assert (tower.prompts.grad.abs().amax(dim=(1, 2)) > 0).all(), "a layer's prompts got no gradient"
    with torch.no_grad():
        tower.prompts.add_(torch.randn_like(tower.prompts))
    assert (tower(tokens) - before).abs().max() > 1e-3
    assert torch.equal(tower(tokens, prompted=False), before)


def require_features(features: ImageFeatures, global_embedding: torch.Tensor, patches: torch.Tensor) -> None:
    torch.testing.assert_close(features.global_embedding, global_embedding, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.patch_features, patches, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unprompted_image_tower_is_clip(variant: str) -> None:
    clip = make_clip(**VARIANTS[variant])
    images = torch.randn(2, 3, 64, 64)
    dense = clip.model.visual.forward_intermediates(images, output_fmt="NLC", normalize_intermediates=True)
    patches = dense["image_intermediates"][-1] @ clip.model.visual.proj
    for tower in (ImageTower(clip, prompts=2), ImageTower(clip, prompts=0)):
        require_features(tower(images, prompted=False), clip.model.encode_image(images), patches)


@pytest.mark.parametrize("size", [(96, 160), (32, 128), (16, 16), (64, 64)])
def test_image_tower_at_other_resolutions(size: tuple[int, int]) -> None:
    """Against open_clip built at that size, with a positional embedding that Pillow resampled."""
    clip = make_clip()
    reference = make_clip(vision={"image_size": size}).model
    state = clip.model.state_dict()
    embedding, grid = state["visual.positional_embedding"], (size[0] // 16, size[1] // 16)
    channels = embedding[1:].T.unflatten(1, (4, 4)).numpy()
    resized = [np.array(Image.fromarray(c).resize(grid[::-1], Image.Resampling.BICUBIC)) for c in channels]
    resized = torch.from_numpy(np.stack(resized)).flatten(1).T
    reference.load_state_dict(state | {"visual.positional_embedding": torch.cat([embedding[:1], resized])})
    images = torch.randn(2, 3, *size)
    features = ImageTower(clip)(images, prompted=False)
    assert features.grid == grid
    torch.testing.assert_close(features.global_embedding, reference.encode_image(images), atol=1e-5, rtol=1e-5)


def test_published_visual_prompts_are_inserted_tokens(tiny_clip: FrozenClip) -> None:
    """Against open_clip's own blocks on sequences that hold the prompts, replaced at every layer."""
    tower = ImageTower(tiny_clip, prompts=3, dropout=0.1, recipe=RECIPES["published"]).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        prompts = tower.prompt_projection(tower.prompts)  # (layers, M, width)
        visual = tiny_clip.visual
        patch_tokens = visual.conv1(images)
        tokens = patch_tokens.flatten(2).transpose(1, 2)
        tokens = torch.cat([2 * visual.class_embedding.expand(2, 1, -1), tokens], dim=1)
        tokens = visual.ln_pre(tokens + visual.positional_embedding)
        for prompt, block in zip(prompts, visual.transformer.resblocks, strict=True):
            sequence = torch.cat([tokens[:, :1], prompt.expand(2, -1, -1), tokens[:, 1:]], dim=1)
            sequence = block(sequence)
            tokens = torch.cat([sequence[:, :1], sequence[:, 4:]], dim=1)
        expected = visual.ln_post(tower.prompt_norm(tokens)) @ visual.proj
    require_features(tower(patch_tokens=patch_tokens), expected[:, 0], expected[:, 1:])


def test_gated_visual_prompts_start_near_clip_and_learn(tiny_clip: FrozenClip) -> None:
    """Patch tokens get a gradient without prompts, too, which fine-tuning a patch embedding needs."""
    tower = ImageTower(tiny_clip, prompts=3).eval()
    images = torch.randn(1, 3, 64, 64)
    plain = tower(images, prompted=False).patch_features
    assert not plain.requires_grad
    patch_tokens = tower.embed_patches(images).requires_grad_()
    tower(patch_tokens=patch_tokens, prompted=False).patch_features.square().sum().backward()
    assert patch_tokens.grad.abs().max() > 0
    features = tower(images).patch_features
    assert not torch.equal(features, plain)
    assert torch.cosine_similarity(features, plain, dim=-1).min() > 0.99
    features.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in tower.parameters())
    for each in (tower.prompts, tower.gate):
        assert (each.grad.flatten(1).abs().amax(dim=1) > 0).all(), "a layer got no gradient"
    with torch.no_grad():
        tower.gate.zero_()
    torch.testing.assert_close(tower(images).patch_features, plain, atol=1e-6, rtol=1e-5)
    first, second = ImageTower(tiny_clip, prompts=3, dropout=0.5).train()(images.expand(2, -1, -1, -1)).patch_features
    assert not torch.equal(first, second), "in training, pictures of a batch have different dropout masks"


def test_scale_and_bias_are_clips_and_unsupported_clips_are_refused() -> None:
    clip = make_clip()
    assert clip.scale == pytest.approx(np.exp(2.3), rel=1e-5) and clip.bias == pytest.approx(-3.0)
    without_bias = make_clip(init_logit_bias=None)
    assert without_bias.bias == pytest.approx(-without_bias.scale * NEUTRAL_COSINE)
    for change in ({"vision": {"pool_type": "avg"}}, {"text": {"no_causal_mask": True}}, {"vision": {"qk_norm": True}}):
        with pytest.raises(LdvcError, match="ViT-B-16-quickgelu"):
            make_clip(**change)


# ---- patch embedding -----------------------------------------------------------------------------------------------


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


def make_patch_embed(network: torch.nn.Module, **options: int) -> ConvPatchEmbed:
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
