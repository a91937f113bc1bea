"""The decoder `zegclip` against the published description of ZegCLIP (Zhou et al., CVPR 2023), number by number.

tests/test_decoders.py compares its layers, in the recipe published, with PyTorch's own parts.

Published: ViT-B/16 at 512 pixels, 10 visual prompts per layer for VOC, 3 decoder layers of 8 heads and width 512; 13.8M
learnable parameters, of which 3.15M are never used; 100 * focal + dice. What is expected is derived here from shapes alone.
"""

from copy import deepcopy
from dataclasses import replace
from math import log

import pytest
import torch

from ldvc.config import ModelConfig
from ldvc.modeling.clip import build_clip
from ldvc.modeling.decoders import ZegClipDecoder
from ldvc.modeling.model import LDVC
from train.config import load_config
from train.data import BACKGROUND, VOID
from train.losses import mask_loss

TOWER, JOINT, LAYERS, HEADS, PROMPTS, VIT_LAYERS = 768, 512, 3, 8, 10, 12
PUBLISHED = {"recipe": "published", "text_prompts": False}


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with bias."""
    return inputs * outputs + outputs


# Part by part, as the paper and its appendix describe them; a norm has twice its width.
VISUAL_PROMPTS = VIT_LAYERS * PROMPTS * TOWER + linear(TOWER, TOWER) + 2 * TOWER
RELATIONSHIP_DESCRIPTOR = linear(2 * JOINT, JOINT)
ATTENTION = 4 * linear(JOINT, JOINT)  # query, key, value, output
FEED_FORWARD = linear(JOINT, 4 * JOINT) + linear(4 * JOINT, JOINT)
# A layer is made from PyTorch's TransformerDecoderLayer: self-attention and its norm are there and never called.
NEVER_CALLED = LAYERS * (ATTENTION + 2 * JOINT)
LAYER = ATTENTION + FEED_FORWARD + 4 * JOINT
# Of the last layer only the scores become masks; values, output, feed-forward network and norms are computed for nothing.
REACHES_NO_MASK = 2 * linear(JOINT, JOINT) + FEED_FORWARD + 4 * JOINT


@pytest.fixture(scope="module")
def model() -> LDVC:
    torch.manual_seed(0)
    config = replace(load_config("voc12_inductive", decoder="zegclip").model, pretrained=None)
    return LDVC(config, build_clip("ViT-B-16-quickgelu")).eval()


def test_the_decoder_has_every_parameter_that_reaches_a_mask_and_no_other(model: LDVC) -> None:
    def learnable(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)

    assert learnable(model.image_tower) == VISUAL_PROMPTS == 684_288
    assert learnable(model.text_tower) == 0, "ZegCLIP learns no text prompts"
    assert learnable(model.adapter) == RELATIONSHIP_DESCRIPTOR == 524_800
    assert learnable(model.decoder) == LAYERS * LAYER - REACHES_NO_MASK
    published = VISUAL_PROMPTS + RELATIONSHIP_DESCRIPTOR + LAYERS * LAYER + NEVER_CALLED
    assert (published, NEVER_CALLED) == (13_821_184, 3_154_944), "13.8M and 3.15M, as the paper counts them"
    assert learnable(model) == published - NEVER_CALLED - REACHES_NO_MASK == 8_039_168
    assert model.parameter_report()["total"] == 8_039_168
    assert learnable(model.clip) == 0
    assert isinstance(model.decoder, ZegClipDecoder) and len(model.decoder.blocks) + 1 == LAYERS
    assert model.decoder.mask_scores.heads == HEADS and model.decoder.mask_scores.bias is None, "bare scores"
    assert isinstance(model.decoder.blocks[0].ffn[1][0], torch.nn.ReLU) and model.image_tower.gate is None


@torch.no_grad()
def test_a_layer_drops_attention_activations_and_branches_while_training(model: LDVC) -> None:
    """A tenth of each, and every one by itself."""
    block, classes, patches = model.decoder.blocks[0], torch.randn(1, 3, JOINT), torch.randn(1, 7, JOINT)
    assert block.cross_attention.dropout.p == block.dropout.p == block.ffn[1][1].p == 0.1
    quiet, _ = block(classes, patches)
    torch.testing.assert_close(block(classes, patches)[0], quiet)
    block, calls = deepcopy(block).train(), []
    block.dropout.register_forward_hook(lambda module, inputs, output: calls.append(inputs))
    dropouts = (block.cross_attention.dropout, block.ffn[1][1], block.dropout)
    for part in dropouts:
        for each in dropouts:
            each.p = 0.5 * (each is part)
        assert not torch.allclose(block(classes, patches)[0], quiet, atol=1e-3), part
    assert len(calls) == 2 * 3, "the branch of attention and that of the feed-forward network"


def test_linear_layers_start_as_in_the_authors_code(model: LDVC) -> None:
    """PyTorch's initialisation: the `init_weights` of its head is never called. Its three layers are copies of one."""
    parts = [part for whole in (model.decoder, model.adapter) for part in whole.modules() if isinstance(part, torch.nn.Linear)]
    assert len(parts) == 2 * 5 + 2 + 1
    deviations = {JOINT: 0.0255, 2 * JOINT: 0.0180, 4 * JOINT: 0.0128}
    for part in parts:
        assert part.weight.std().item() == pytest.approx(deviations[part.in_features], rel=0.02)
        assert 0.9 < part.bias.abs().max().item() * part.in_features**0.5 <= 1, "uniform up to 1 / sqrt(inputs)"
    first, second = (block.state_dict() for block in model.decoder.blocks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    last, cross = model.decoder.mask_scores, model.decoder.blocks[0].cross_attention
    assert torch.equal(last.query.weight, cross.query.weight) and torch.equal(last.query.bias, cross.query.bias)
    for name in ("weight", "bias"):
        assert torch.equal(getattr(last.key, name), getattr(cross.key_value, name)[:JOINT]), "keys come before values"


def test_loss_of_fixed_tensors_by_hand() -> None:
    """Four patches, two seen names, of which one is in the photo; the last pixel is void: a negative, as in ZegCLIP's code.

    One decoder layer with identity projections, width 4 and 2 heads: the mask logit is the mean over heads of
    a_h . v_h / sqrt(2), that is a . v / sqrt(8). The patches are chosen so that sigmoids are 3/4, 1/4 and 1/2.
    """
    config = ModelConfig(decoder="zegclip", decoder_heads=2, decoder_layers=1, **PUBLISHED)
    decoder = ZegClipDecoder(config, 4, scale=9.0, bias=9.0)
    with torch.no_grad():
        for projection in (decoder.mask_scores.query, decoder.mask_scores.key):
            projection.weight.copy_(torch.eye(4))
            projection.bias.zero_()
    t = log(3) * 8**0.5  # sigmoid(t / sqrt(8)) = 3/4
    patches = torch.tensor([[[t, -t, 0, 0], [-t, -t, 0, 0], [0, 0, 0, 0], [t, -t, 0, 0]]])
    names = torch.tensor([[[1.0, 0, 0, 0], [0, 1.0, 0, 0]]])
    logits = decoder(patches, names, (2, 2)).mask_logits
    torch.testing.assert_close(logits.sigmoid(), torch.tensor([[[[0.75, 0.25], [0.5, 0.75]], [[0.25, 0.25], [0.5, 0.25]]]]))
    labels = torch.tensor([[[0, 0], [BACKGROUND, VOID]]])
    found = mask_loss(logits, labels, torch.ones(1, 2, dtype=torch.bool), void_is_negative=True, normalise="masks")

    # alpha_t (1 - p_t)^2 * -log p_t, alpha = 0.25 for positives and 0.75 for negatives, mean over pixels, sum over names
    in_photo = (
        0.25 * 0.25**2 * -log(0.75)  # positive, sigmoid 3/4
        + 0.25 * 0.75**2 * -log(0.25)  # positive, sigmoid 1/4
        + 0.75 * 0.50**2 * -log(0.50)  # negative, sigmoid 1/2
        + 0.75 * 0.75**2 * -log(0.25)  # void, a negative with sigmoid 3/4
    ) / 4
    not_in_photo = (3 * 0.75 * 0.25**2 * -log(0.75) + 0.75 * 0.50**2 * -log(0.50)) / 4
    focal = (in_photo + not_in_photo) / 1  # one mask is there
    dice = 1 - (2 * (0.75 + 0.25) + 1) / ((0.75 + 0.25 + 0.5 + 0.75) + 2 + 1)
    assert found.focal.item() == pytest.approx(focal, rel=1e-5) and focal == pytest.approx(0.271168, abs=1e-6)
    assert found.dice.item() == pytest.approx(dice, rel=1e-5) and dice == pytest.approx(3 / 7, rel=1e-9)
    config = load_config("voc12_inductive")
    assert (config.focal_weight, config.dice_weight, config.focal_alpha, config.focal_gamma) == (100, 1, 0.25, 2)
    assert config.ignore_as_negative and config.focal_normalise == "masks"
    assert config.focal_weight * found.focal.item() + found.dice.item() == pytest.approx(27.5453, abs=1e-3)
