"""The decoders against their equations, written with PyTorch's own modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldvc.config import ARMS, ModelConfig
from ldvc.modeling.attention import CrossAttention, RoutedSelfAttention
from ldvc.modeling.decoders import ZegClipDecoder, build_decoder

WIDTH, HEADS, SCALE, BIAS = 32, 4, 12.0, -4.0
PUBLISHED = {"gate_init": None, "start_at_clip": False, "branch_init": "random", "normalize_output": False}


def make_config(arm: str, **changes: object) -> ModelConfig:
    return replace(ModelConfig(arm=arm, decoder_heads=HEADS, decoder_layers=3), **changes)


def make_decoder(arm: str, **changes: object) -> nn.Module:
    return build_decoder(make_config(arm, **changes), WIDTH, scale=SCALE, bias=BIAS).eval()


def make_inputs(grid: tuple[int, int] = (5, 7), classes: int = 3) -> tuple[Tensor, Tensor, tuple[int, int]]:
    patches = F.normalize(torch.randn(2, grid[0] * grid[1], WIDTH), dim=-1)
    return patches, F.normalize(torch.randn(2, classes, WIDTH), dim=-1), grid


def clip_logits(patches: Tensor, classes: Tensor, grid: tuple[int, int]) -> Tensor:
    return (torch.einsum("bcd,bnd->bcn", classes, patches) * SCALE + BIAS).unflatten(-1, grid)


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@torch.no_grad()
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_starts_at_clip(arm: str) -> None:
    inputs = make_inputs()
    closed = make_decoder(arm, gate_init=0.0)(*inputs)
    torch.testing.assert_close(closed.mask_logits, clip_logits(*inputs), atol=1e-4, rtol=0)
    for init in ("identity", "random"):
        assert correlation(make_decoder(arm, branch_init=init)(*inputs).mask_logits, clip_logits(*inputs)) > 0.99


@torch.no_grad()
def test_lcsa_may_start_wider_open_than_the_other_branches() -> None:
    wide = make_decoder("ldvc", lcsa_gate_init=0.3)
    gates = {name: gate.unique().tolist() for name, gate in wide.named_parameters() if "gate" in name}
    assert len(gates) == 9
    for name, values in gates.items():
        assert values == pytest.approx([0.3 if "self_gate" in name else 0.05]), name
    inputs = make_inputs()
    assert correlation(wide(*inputs).mask_logits, clip_logits(*inputs)) > 0.97
    ungated = make_decoder("ldvc", gate_init=None, lcsa_gate_init=0.3)
    assert not [name for name, _ in ungated.named_parameters() if "gate" in name]


@torch.no_grad()
@pytest.mark.parametrize("arm", ARMS)
def test_attention_is_returned_on_request_from_the_same_pass(arm: str) -> None:
    decoder, (patches, classes, grid) = make_decoder(arm), make_inputs()
    silent = decoder(patches, classes, grid)
    assert silent.cross_attention is None and silent.routing is None
    told = decoder(patches, classes, grid, return_attention=True)
    assert torch.equal(told.mask_logits, silent.mask_logits)
    assert len(told.cross_attention) == 3
    for attention in told.cross_attention:
        assert attention.shape == (2, HEADS, 3, *grid)
        torch.testing.assert_close(attention.sum(dim=2), torch.ones(2, HEADS, *grid))
    assert (told.routing is not None) == (arm == "ldvc")
    if arm == "ldvc":
        assert len(told.routing) == 3
        torch.testing.assert_close(told.routing[-1].token_attention(4, 6, batch=1).sum(dim=(1, 2)), torch.ones(HEADS))


@torch.no_grad()
def test_without_lcsa_is_the_same_decoder_with_lcsa_skipped() -> None:
    with_lcsa, without = make_decoder("ldvc", gate_init=0.5), make_decoder("ldvc_without_lcsa", gate_init=0.5)
    shared = {name: tensor for name, tensor in with_lcsa.state_dict().items() if name in without.state_dict()}
    without.load_state_dict(shared)
    inputs = make_inputs()
    skipped = with_lcsa(*inputs, skip_lcsa=True, return_attention=True)
    torch.testing.assert_close(skipped.mask_logits, without(*inputs).mask_logits)
    assert skipped.routing is None
    assert (skipped.mask_logits - with_lcsa(*inputs).mask_logits).abs().max() > 0.01
    assert len(with_lcsa.state_dict()) > len(without.state_dict())


def torch_attention(module: CrossAttention | RoutedSelfAttention) -> nn.MultiheadAttention:
    reference = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    reference.in_proj_weight.copy_(torch.cat([module.query.weight, module.key_value.weight]))
    reference.in_proj_bias.copy_(torch.cat([module.query.bias, module.key_value.bias]))
    reference.out_proj.load_state_dict(module.out.state_dict())
    return reference


@torch.no_grad()
@pytest.mark.parametrize("gate", [None, 0.3])
@pytest.mark.parametrize("normalize", [False, True])
def test_local_consensus_block_reads_as_published(gate: float | None, normalize: bool) -> None:
    """V <- V + SA(LN V); V <- V + CA(LN V, T); V <- V + FFN(LN V); with all regions, SA is full self-attention."""
    changes = PUBLISHED | {"gate_init": gate, "normalize_output": normalize, "topk": 64, "local_conv": False}
    decoder = make_decoder("ldvc", **changes)
    patches, classes, grid = make_inputs()
    output = decoder(patches, classes, grid, return_attention=True)
    stream, anchors, factor = patches * WIDTH**0.5, classes * WIDTH**0.5, 1.0 if gate is None else gate
    for block, attention in zip(decoder.blocks, output.cross_attention, strict=True):
        norm = block.self_norm(stream)
        stream = stream + factor * torch_attention(block.self_attention)(norm, norm, norm)[0]
        cross = torch_attention(block.cross_attention)
        branch, weights = cross(block.cross_norm(stream), anchors, anchors, average_attn_weights=False)
        torch.testing.assert_close(attention.flatten(3).transpose(2, 3), weights, atol=1e-5, rtol=1e-4)
        stream = stream + factor * branch
        stream = stream + factor * block.ffn(block.ffn_norm(stream))
    stream = F.normalize(stream, dim=-1) if normalize else stream / WIDTH**0.5
    torch.testing.assert_close(output.patch_features, stream, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.mask_logits, clip_logits(stream, classes, grid), atol=1e-4, rtol=1e-4)
    assert torch.equal(output.class_embeddings, classes), "class embeddings are anchors"


@torch.no_grad()
@pytest.mark.parametrize("gate", [None, 0.3])
@pytest.mark.parametrize("start_at_clip", [False, True])
def test_zegclip_reads_as_published(gate: float | None, start_at_clip: bool) -> None:
    """T <- LN(T + CA(T, V)); T <- LN(T + FFN(T)); masks = mean over heads of the last layer's scaled scores."""
    decoder = make_decoder("zegclip", **(PUBLISHED | {"gate_init": gate, "start_at_clip": start_at_clip}))
    patches, classes, grid = make_inputs()
    output = decoder(patches, classes, grid)
    unit, factor = WIDTH**0.5 if start_at_clip else 1.0, 1.0 if gate is None else gate
    stream, context = classes * unit, patches * unit
    for block in decoder.blocks:
        after = block.cross_norm(stream + torch_attention(block.cross_attention)(stream, context, context)[0])
        stream = (1 - factor) * stream + factor * after
        stream = (1 - factor) * stream + factor * block.ffn_norm(stream + block.ffn(stream))
    query = decoder.query(stream).unflatten(-1, (HEADS, -1))
    key = decoder.key(context).unflatten(-1, (HEADS, -1))
    scores = torch.einsum("bchx,bnhx->bhcn", query, key) / (WIDTH // HEADS) ** 0.5
    expected = scores.mean(dim=1) * decoder.log_scale.exp() + decoder.bias
    torch.testing.assert_close(output.mask_logits.flatten(2), expected, atol=1e-4, rtol=1e-4)
    if not start_at_clip:
        torch.testing.assert_close(expected, scores.mean(dim=1))


def test_zegclip_builds_nothing_that_it_does_not_use() -> None:
    decoder = make_decoder("zegclip")
    decoder(*make_inputs()).mask_logits.square().sum().backward()
    assert isinstance(decoder, ZegClipDecoder) and len(decoder.blocks) == 2
    assert all(parameter.grad is not None for parameter in decoder.parameters())


@pytest.mark.parametrize("arm", ARMS)
def test_every_parameter_learns_also_under_bfloat16(arm: str) -> None:
    decoder, inputs = make_decoder(arm), make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = decoder(*inputs)
    assert output.mask_logits.dtype == torch.float32
    output.mask_logits.square().mean().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert correlation(output.mask_logits, decoder(*inputs).mask_logits) > 0.999


@torch.no_grad()
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("grid", [(1, 1), (7, 5), (20, 13)])
def test_any_grid_and_one_name(arm: str, grid: tuple[int, int]) -> None:
    output = make_decoder(arm)(*make_inputs(grid, classes=1), return_attention=True)
    assert output.mask_logits.shape == (2, 1, *grid) and output.mask_logits.isfinite().all()
    assert (output.cross_attention[-1] == 1).all(), "a softmax over one name is constant"


@torch.no_grad()
def test_pictures_of_a_batch_do_not_mix() -> None:
    patches, classes, grid = make_inputs((9, 11))
    for arm in ARMS:
        decoder = make_decoder(arm)
        together = decoder(patches, classes, grid).mask_logits
        alone = decoder(patches[1:], classes[1:], grid).mask_logits
        torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=1e-4)
