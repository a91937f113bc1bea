"""The whole model: its initialisation, its learnable parameters, training steps."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from ldvc.config import DECODERS, ModelConfig
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from tests.tiny import close_gates

Make = Callable[..., LDVC]


@pytest.fixture
def make_model(tiny_config: ModelConfig, tiny_clip: FrozenClip) -> Make:
    """A tiny model with a decoder and changes of its configuration."""

    def make(decoder: str = "ldvc", **changes: object) -> LDVC:
        return LDVC(replace(tiny_config, decoder=decoder, **changes), tiny_clip).eval()

    return make


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
def test_starts_at_plain_clip(decoder: str, make_model: Make, tiny_clip: FrozenClip, names: list[str]) -> None:
    """With closed gates, masks differ from plain CLIP only by the layer norm of the patches, if the decoder has one."""
    images = torch.randn(2, 3, 96, 128)
    model = close_gates(make_model(decoder))
    closed, frozen = model(images, names).mask_logits, model.frozen_logits(images, names=names)
    if decoder == "zegclip":
        torch.testing.assert_close(closed, frozen, atol=1e-4, rtol=0)
    patches = F.normalize(model.encode_image(images).patch_features, dim=-1)
    patches = F.layer_norm(patches * 8, (64,)) / 8 if decoder != "zegclip" else patches
    classes = F.normalize(model.encode_names(names), dim=-1)
    expected = (tiny_clip.scale * classes @ patches.mT + tiny_clip.bias).unflatten(-1, closed.shape[2:])
    torch.testing.assert_close(closed, expected, atol=1e-3, rtol=0)
    start = make_model(decoder)(images, names).mask_logits
    assert torch.corrcoef(torch.stack([start.flatten(), closed.flatten()]))[0, 1] > 0.98


@torch.no_grad()
def test_frozen_logits_are_open_clips(make_model: Make, tiny_clip: FrozenClip, names: list[str]) -> None:
    model, images = make_model(), torch.randn(1, 3, 64, 64)
    clip = tiny_clip.model
    text = clip.encode_text(tiny_clip.tokenizer([f"a photo of a {name}." for name in names]), normalize=True)
    dense = clip.visual.forward_intermediates(images, output_fmt="NLC", normalize_intermediates=True)
    patches = F.normalize(dense["image_intermediates"][-1] @ clip.visual.proj, dim=-1)
    expected = (patches @ text.T * clip.logit_scale.exp() + clip.logit_bias)[0].T.unflatten(-1, (4, 4))
    assert torch.allclose(model.frozen_logits(images, names=names)[0], expected, atol=1e-4)
    for parameter in (model.text_tower.prompts, model.image_tower.prompts):
        parameter.normal_()  # training does not change them
    by_tokens = model.frozen_logits(patch_tokens=model.image_tower.embed_patches(images), names=model.frozen_embeddings(names))
    assert torch.allclose(by_tokens[0], expected, atol=1e-4)


@pytest.mark.parametrize("decoder", DECODERS)
def test_only_prompts_adapter_and_decoder_learn(decoder: str, make_model: Make, names: list[str]) -> None:
    model = make_model(decoder).train()
    assert not model.clip.model.training and model.decoder.training
    model(torch.randn(2, 3, 64, 96), names).mask_logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("clip."):
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            assert name.startswith(("image_tower.", "text_tower.", "adapter.", "decoder.")), name
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert set(model.trainable_state_dict()) == {name for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize(
    "changes",
    [{"visual_prompts": 0}, {"text_prompts": False}, {"text_adapter": False}, {"template": "{}", "text_prompts": False}],
)
def test_every_part_can_be_left_out(changes: dict, make_model: Make, names: list[str]) -> None:
    model, full = make_model(**changes), make_model()
    model(torch.randn(1, 3, 64, 64), names).mask_logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.parameter_report()["total"] < full.parameter_report()["total"]


def test_bfloat16_autocast_trains(make_model: Make, names: list[str]) -> None:
    for decoder in DECODERS:
        model, images = make_model(decoder), torch.randn(2, 3, 80, 112)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(images, names).mask_logits
        logits.square().mean().backward()
        assert logits.dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        reference = model(images, names).mask_logits
        assert torch.corrcoef(torch.stack([logits.flatten(), reference.flatten()]))[0, 1] > 0.99


def test_parameters_of_the_full_voc_model() -> None:
    """ViT-B/16 with the settings for VOC; each count follows from the shapes of the parameters."""
    d, width, layers = 512, 768, 12
    model = LDVC(ModelConfig(pretrained=None))
    report = model.parameter_report()
    projection, ffn = d * d + d, 2 * 4 * d * d + 5 * d
    gates, prompts, norm = 12 * layers, 10, 2 * d
    assert report["visual prompts"] == layers * prompts * width + width * width + width + 2 * width + gates
    assert report["text prompts"] == layers * 4 * d
    assert report["text adapter"] == 2 * d * d + d
    assert report["decoder: LCSA"] == 3 * (4 * projection + 25 * d + d)
    # the last cross-attention has only queries and keys, and a bias of the scores
    assert report["decoder: cross-attention"] == 2 * 4 * projection + 2 * projection + 1
    assert report["decoder: feed-forward"] == 2 * ffn
    assert report["decoder: norms and gates"] == 3 * (norm + d) + 2 * 2 * (norm + d) + norm
    assert report["total"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report["frozen CLIP"] == 149_620_737  # ViT-B/16 with its text tower, as published by open_clip


@torch.no_grad()
def test_decode_normalises_and_adapts_the_names(make_model: Make, names: list[str]) -> None:
    """Against the equation of the adapter. The lengths of embeddings and features do not matter."""
    model = make_model()
    model.adapter.linear.weight.normal_(std=0.1)
    features, classes = model.encode_image(torch.randn(2, 3, 64, 64)), model.encode_names(names)
    output = model.decode(features, classes)
    text, picture = F.normalize(classes, dim=-1), F.normalize(features.global_embedding, dim=-1)
    joined = torch.cat([text * picture[:, None], text.expand(2, -1, -1)], dim=-1)
    torch.testing.assert_close(output.class_embeddings, model.adapter.linear(joined), atol=1e-5, rtol=1e-4)
    longer = features._replace(patch_features=7 * features.patch_features, global_embedding=3 * features.global_embedding)
    torch.testing.assert_close(model.decode(longer, classes * 5).mask_logits, output.mask_logits, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the adapter stays in float32
        assert torch.equal(model.adapter(text, picture), output.class_embeddings)
