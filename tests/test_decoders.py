"""The decoders against their equations, written with PyTorch's own modules."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldvc.config import DECODERS, ModelConfig
from ldvc.modeling.attention import CrossAttention, RoutedSelfAttention
from ldvc.modeling.decoders import DecoderOutput, MaskScores, build_decoder

WIDTH, HEADS, SCALE, BIAS = 32, 4, 12.0, -4.0


def make_decoder(name: str, **changes: object) -> nn.Module:
    config = replace(ModelConfig(decoder=name, decoder_heads=HEADS, decoder_layers=3), **changes)
    return build_decoder(config, WIDTH, scale=SCALE, bias=BIAS).eval()


def make_inputs() -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Patches and classes of two pictures, and the grid."""
    return F.normalize(torch.randn(2, 35, WIDTH), dim=-1), F.normalize(torch.randn(2, 3, WIDTH), dim=-1), (5, 7)


def trained(decoder: nn.Module, gate: float = 0.3) -> nn.Module:
    """Random changes of all projections, and one value for all gates."""
    for name, parameter in decoder.named_parameters():
        if "gate" in name:
            parameter.data.fill_(gate)
        else:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return decoder


def test_the_last_lcsa_may_start_wider_open_than_the_other_branches() -> None:
    wide, ungated = (make_decoder("ldvc", recipe=recipe, lcsa_gate_init=0.3) for recipe in ("clip_start", "published"))
    gates = {name: gate.unique().tolist() for name, gate in wide.named_parameters() if "gate" in name}
    assert len(gates) == 3 + 2 * 2  # three LCSA; two cross-attentions with feed-forward networks
    for name, values in gates.items():
        assert values == pytest.approx([0.3 if name.startswith("consensus.2") else 0.05]), name
    assert not [name for name, _ in ungated.named_parameters() if "gate" in name]


def torch_attention(module: CrossAttention | RoutedSelfAttention) -> nn.MultiheadAttention:
    reference = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    reference.in_proj_weight.copy_(torch.cat([module.query.weight, module.key_value.weight]))
    reference.in_proj_bias.copy_(torch.cat([module.query.bias, module.key_value.bias]))
    reference.out_proj.load_state_dict(module.out.state_dict())
    return reference


def require_scores(
    output: DecoderOutput, module: MaskScores, inputs: tuple[Tensor, Tensor], recipe: str, *, transposed: bool
) -> None:
    """The last scores are (W_q x)(W_k y)^T / sqrt(d_h) + bias of each head, and the masks are their mean over heads."""
    query, key = (F.linear(x, y.weight, y.bias) for x, y in zip(inputs, (module.query, module.key), strict=True))
    query, key = (each.unflatten(-1, (HEADS, -1)) for each in (query, key))
    scores = torch.einsum("bnhx,bmhx->bhmn" if transposed else "bnhx,bmhx->bhnm", query, key) / (WIDTH // HEADS) ** 0.5
    scores = scores + (0.0 if recipe == "published" else module.bias)
    torch.testing.assert_close(output.cross_attention[-1].flatten(3), scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.mask_logits.flatten(2), scores.mean(dim=1), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["published", "clip_start"])
@pytest.mark.parametrize("name", ["ldvc", "ldvc_without_lcsa"])
def test_local_consensus_reads_as_published(name: str, recipe: str) -> None:
    """V <- V + SA(LN V); V <- V + CA(LN V, T); V <- V + FFN(LN V); masks = mean over heads of the last CA's scores + bias.

    With all regions, LCSA is full self-attention.
    """
    decoder = trained(make_decoder(name, recipe=recipe, topk=64, local_conv=False))
    patches, classes, grid = make_inputs()
    output = decoder(patches, classes, grid, return_attention=True)
    stream, anchors, factor = patches * WIDTH**0.5, classes * WIDTH**0.5, 1.0 if recipe == "published" else 0.3
    assert len(decoder.guidance) == 2 and len(decoder.consensus) == (3 if name == "ldvc" else 0)
    for layer in range(3):
        if name == "ldvc":
            block = decoder.consensus[layer]
            norm = block.norm(stream)
            stream = stream + factor * torch_attention(block.attention)(norm, norm, norm)[0]
        if layer == 2:
            break
        block, scores = decoder.guidance[layer], output.cross_attention[layer]
        cross = torch_attention(block.cross_attention)
        branch, weights = cross(block.cross_norm(stream), anchors, anchors, average_attn_weights=False)
        torch.testing.assert_close(scores.softmax(dim=2).flatten(3).transpose(2, 3), weights, atol=1e-5, rtol=1e-4)
        stream = stream + factor * branch
        stream = stream + factor * block.ffn(block.ffn_norm(stream))
    require_scores(output, decoder.mask_scores, (decoder.mask_norm(stream), anchors), recipe, transposed=True)
    torch.testing.assert_close(output.patch_features, stream / WIDTH**0.5, atol=1e-5, rtol=1e-4)
    assert torch.equal(output.class_embeddings, classes), "class embeddings are anchors"


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["published", "clip_start"])
def test_zegclip_reads_as_published(recipe: str) -> None:
    """T <- LN(T + CA(T, V)); T <- LN(T + FFN(T)); masks = mean over heads of the last layer's scaled scores + bias."""
    decoder = trained(make_decoder("zegclip", recipe=recipe))
    patches, classes, grid = make_inputs()
    output = decoder(patches, classes, grid, return_attention=True)
    unit, factor = (1.0, 1.0) if recipe == "published" else (WIDTH**0.5, 0.3)
    stream, context = classes * unit, patches * unit
    assert len(decoder.blocks) == 2
    for block in decoder.blocks:
        after = block.cross_norm(stream + torch_attention(block.cross_attention)(stream, context, context)[0])
        stream = (1 - factor) * stream + factor * after
        stream = (1 - factor) * stream + factor * block.ffn_norm(stream + block.ffn(stream))
    require_scores(output, decoder.mask_scores, (stream, context), recipe, transposed=False)
    torch.testing.assert_close(output.class_embeddings, stream / unit, atol=1e-5, rtol=1e-4)
    assert torch.equal(output.patch_features, patches), "patch features stay what they are"


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_attention_is_returned_on_request_from_the_same_pass(name: str) -> None:
    """The scores of the last layer are the segmentation, also under autocast."""
    decoder, inputs = trained(make_decoder(name)), make_inputs()
    without = decoder(*inputs)
    assert without.cross_attention is None and without.routing is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = decoder(*inputs, return_attention=True)
    torch.testing.assert_close(half.mask_logits, half.cross_attention[-1].mean(dim=1), atol=1e-4, rtol=1e-4)
    output = decoder(*inputs, return_attention=True)
    assert torch.equal(output.mask_logits, without.mask_logits)
    assert [scores.shape for scores in output.cross_attention] == [(2, HEADS, 3, *inputs[2])] * 3
    assert len(output.routing or ()) == (3 if name == "ldvc" else 0)


@torch.no_grad()
def test_without_lcsa_is_the_same_decoder_with_lcsa_skipped() -> None:
    with_lcsa, without = trained(make_decoder("ldvc")), make_decoder("ldvc_without_lcsa")
    shared = {name: tensor for name, tensor in with_lcsa.state_dict().items() if name in without.state_dict()}
    without.load_state_dict(shared)
    inputs = make_inputs()
    skipped = with_lcsa(*inputs, skip_lcsa=True, return_attention=True)
    torch.testing.assert_close(skipped.mask_logits, without(*inputs).mask_logits)
    assert skipped.routing is None
    assert (skipped.mask_logits - with_lcsa(*inputs).mask_logits).abs().max() > 0.01


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("changes", [{}, {"recipe": "published"}, {"decoder_layers": 1}])
def test_nothing_is_built_that_reaches_no_mask(name: str, changes: dict) -> None:
    decoder = make_decoder(name, **changes)
    decoder(*make_inputs()).mask_logits.square().sum().backward()
    for part, parameter in decoder.named_parameters():
        assert parameter.grad is not None, part
        # a bias of keys moves all scores of a query alike, so the softmax of a branch cancels it
        if "key_value.bias" not in part:
            assert parameter.grad.abs().max() > 0, part
