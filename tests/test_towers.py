"""The towers against open_clip."""

from copy import deepcopy
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image

from ldvc.config import RECIPES
from ldvc.errors import LdvcError
from ldvc.modeling.clip import NEUTRAL_COSINE, FrozenClip
from ldvc.modeling.towers import ImageTower, TextTower

LONG_NAME = (
    "a very long name indeed that goes on and on until it does not fit into the context of this text tower at all"
)
TEXTS = ["dog", "potted plant", "cat's eye", "Crème brûlée", "", "7", LONG_NAME]


def make_clip(architecture: dict[str, Any], kind: type = CLIP, **vision_or_text: Any) -> FrozenClip:
    architecture = deepcopy(architecture)
    architecture["text_cfg"] |= vision_or_text.pop("text", {})
    architecture["vision_cfg"] |= vision_or_text.pop("vision", {})
    length = architecture["text_cfg"]["context_length"]
    tokenizer = open_clip.SimpleTokenizer(context_length=length)
    return FrozenClip(kind(**architecture, **vision_or_text), tokenizer, mean=(0.5,) * 3, std=(0.5,) * 3)


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
def test_text_prompts_at_initialisation_are_clip(tiny_architecture: dict, variant: str, template: str) -> None:
    clip = make_clip(tiny_architecture, **VARIANTS[variant])
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_unprompted_image_tower_is_clip(tiny_architecture: dict, variant: str) -> None:
    clip = make_clip(tiny_architecture, **VARIANTS[variant])
    images = torch.randn(2, 3, 64, 64)
    reference = clip.model.encode_image(images)
    dense = clip.model.visual.forward_intermediates(images, output_fmt="NLC", normalize_intermediates=True)
    patches = dense["image_intermediates"][-1] @ clip.model.visual.proj
    for tower in (ImageTower(clip, prompts=2), ImageTower(clip, prompts=0)):
        features = tower(images, prompted=False)
        assert features.grid == (4, 4)
        torch.testing.assert_close(features.global_embedding, reference, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.patch_features, patches, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(96, 160), (32, 128), (16, 16), (64, 64)])
def test_image_tower_at_other_resolutions(tiny_architecture: dict, size: tuple[int, int]) -> None:
    """Against open_clip built at that size, with a positional embedding that Pillow resampled."""
    clip = make_clip(tiny_architecture)
    reference = make_clip(tiny_architecture, vision={"image_size": size}).model
    state = clip.model.state_dict()
    embedding = state["visual.positional_embedding"]
    grid = (size[0] // 16, size[1] // 16)
    channels = embedding[1:].reshape(4, 4, 64).permute(2, 0, 1).numpy()
    resized = [np.array(Image.fromarray(c).resize(grid[::-1], Image.Resampling.BICUBIC)) for c in channels]
    resized = torch.from_numpy(np.stack(resized)).flatten(1).T
    state["visual.positional_embedding"] = torch.cat([embedding[:1], resized])
    reference.load_state_dict(state)

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
    features = tower(patch_tokens=patch_tokens)
    torch.testing.assert_close(features.global_embedding, expected[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.patch_features, expected[:, 1:], atol=1e-5, rtol=1e-5)


def test_plain_features_have_a_gradient_only_for_patch_tokens_that_need_one(tiny_clip: FrozenClip) -> None:
    """Fine-tuning a patch embedding needs it; the towers stay frozen."""
    tower = ImageTower(tiny_clip, prompts=3)
    patch_tokens = tower.embed_patches(torch.randn(1, 3, 64, 64))
    assert not tower(patch_tokens=patch_tokens, prompted=False).patch_features.requires_grad
    patch_tokens.requires_grad_()
    tower(patch_tokens=patch_tokens, prompted=False).patch_features.square().sum().backward()
    assert patch_tokens.grad.abs().max() > 0 and all(p.grad is None for p in tower.clip.parameters())


def test_gated_visual_prompts_start_near_clip_and_learn(tiny_clip: FrozenClip) -> None:
    tower = ImageTower(tiny_clip, prompts=3).eval()
    images = torch.randn(1, 3, 64, 64)
    plain = tower(images, prompted=False).patch_features
    features = tower(images).patch_features
    assert not torch.equal(features, plain)
    assert torch.cosine_similarity(features, plain, dim=-1).min() > 0.99
    features.square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"{name} got no gradient"
    assert (tower.prompts.grad.abs().amax(dim=(1, 2)) > 0).all(), "a layer's prompts got no gradient"
    assert (tower.gate.grad.abs().amax(dim=1) > 0).all(), "a layer's gate got no gradient"
    with torch.no_grad():
        tower.gate.zero_()
    torch.testing.assert_close(tower(images).patch_features, plain, atol=1e-6, rtol=1e-5)
    first, second = ImageTower(tiny_clip, prompts=3, dropout=0.5).train()(images.expand(2, -1, -1, -1)).patch_features
    assert not torch.equal(first, second), "in training, pictures of a batch have different dropout masks"


def test_frozen_clip_stays_frozen_and_has_clips_scale_and_bias(tiny_architecture: dict) -> None:
    clip = make_clip(tiny_architecture)
    assert not clip.train().model.training and not any(p.requires_grad for p in clip.parameters())
    assert clip.scale == pytest.approx(np.exp(2.3), rel=1e-5) and clip.bias == pytest.approx(-3.0)
    assert (clip.patch_size, clip.embed_dim) == (16, 64)
    without_bias = make_clip({key: value for key, value in tiny_architecture.items() if key != "init_logit_bias"})
    assert without_bias.bias == pytest.approx(-without_bias.scale * NEUTRAL_COSINE)


def test_unsupported_clips_are_refused(tiny_architecture: dict) -> None:
    for change in ({"vision": {"pool_type": "avg"}}, {"text": {"no_causal_mask": True}}, {"vision": {"qk_norm": True}}):
        with pytest.raises(LdvcError, match="ViT-B-16-quickgelu"):
            make_clip(tiny_architecture, **change)
