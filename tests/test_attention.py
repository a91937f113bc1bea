"""LCSA and cross-attention against PyTorch's own attention."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ldvc.modeling import attention
from ldvc.modeling.attention import SHARPNESS, RoutedSelfAttention, attend

GRIDS = [(15, 21), (7, 5), (1, 1), (32, 32), (20, 20), (9, 2)]
WIDTH, HEADS = 32, 4


def make_lcsa(**arguments: object) -> RoutedSelfAttention:
    """With weights large enough that attention is far from uniform."""
    module = RoutedSelfAttention(WIDTH, HEADS, **arguments)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def heads_of(tokens: Tensor) -> Tensor:
    """(B, N, d) -> (B, heads, N, d_head)."""
    return tokens.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def reference_lcsa(
    module: RoutedSelfAttention, tokens: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, list[dict[int, list[int]]], list[Tensor]]:
    """LCSA by its definition: full attention with a mask that follows from S x S regions over the padded grid.

    Returns:
        (B, N, d); for each picture the chosen regions of each region that has patches, numbered in S x S; and the affinities.
    """
    side, (height, width) = module.regions, grid
    rows, columns = -(-height // side), -(-width // side)
    region = torch.tensor([y // rows * side + x // columns for y in range(height) for x in range(width)])  # (N,)
    present = region.unique().tolist()
    query, (key, value) = module.query(tokens), module.key_value(tokens).chunk(2, dim=-1)
    masks, chosen, affinities = [], [], []
    for picture in range(len(tokens)):
        means = [torch.stack([x[picture, region == r].mean(dim=0) for r in present]) for x in (query, key)]
        affinities.append(means[0] @ means[1].T / WIDTH**0.5)
        best = affinities[-1].argsort(dim=1, descending=True)[:, : module.topk].tolist()
        chosen.append({r: [present[q] for q in regions] for r, regions in zip(present, best, strict=True)})
        allowed = torch.zeros(side * side, side * side, dtype=torch.bool)
        for r, regions in chosen[-1].items():
            allowed[r, regions] = True
        masks.append(allowed[region][:, region])
    mixed = F.scaled_dot_product_attention(*map(heads_of, (query, key, value)), attn_mask=torch.stack(masks)[:, None])
    mixed = mixed.transpose(1, 2).flatten(2)
    if module.local is not None:
        near = F.conv2d(value.mT.unflatten(2, grid), module.local.weight, module.local.bias, padding=2, groups=WIDTH)
        mixed = mixed + near.flatten(2).mT
    return module.out(mixed), chosen, affinities


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("regions", "topk"), [(8, 4), (3, 2)])
def test_lcsa_is_its_definition(grid: tuple[int, int], regions: int, topk: int) -> None:
    module, tokens = make_lcsa(regions=regions, topk=topk), torch.randn(2, grid[0] * grid[1], WIDTH)
    output, routing = module(tokens, grid, return_routing=True)
    expected, chosen, affinities = reference_lcsa(module, tokens, grid)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(routing.affinity, torch.stack(affinities), atol=1e-4, rtol=1e-4)
    rows, columns = -(-grid[0] // regions), -(-grid[1] // regions)
    for batch, y, x in product(range(2), range(0, grid[0], 2), range(0, grid[1], 2)):
        corners = [routing.layout.box(r)[:2] for r in routing.chosen(y, x, batch=batch)]
        expected_regions = chosen[batch][y // rows * regions + x // columns]
        assert corners == [(r // regions * rows, r % regions * columns) for r in expected_regions]


@torch.no_grad()
@pytest.mark.parametrize("grid", [(15, 21), (32, 32)])
@pytest.mark.parametrize("gathered", [1, 3_000])
def test_regions_may_be_gathered_a_part_at_a_time(grid: tuple, gathered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, tokens, calls = make_lcsa(), torch.randn(2, grid[0] * grid[1], WIDTH), []
    with torch.enable_grad():  # with gradients, everything is gathered at once
        whole, routing = module(tokens, grid, return_routing=True)
    monkeypatch.setattr(attention, "GATHER_CHUNK", gathered)
    monkeypatch.setattr(attention, "attend", lambda *each, **mask: calls.append(each[0]) or attend(*each, **mask))
    parts, _ = module(tokens, grid)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)
    assert sum(len(query) for query in calls) == 2 * routing.layout.total and len(calls) > 1


def test_lcsa_has_the_gradient_of_its_definition() -> None:
    module, grid = make_lcsa(regions=3, topk=2), (5, 7)
    tokens = torch.randn(1, 35, WIDTH, requires_grad=True)
    inputs = [tokens, *module.parameters()]
    output, routing = module(tokens, grid, return_routing=True)
    assert torch.equal(output, module(tokens, grid)[0]) and module(tokens, grid)[1] is None
    assert not any(x.requires_grad for x in (routing.affinity, routing.queries, routing.keys))
    fast = torch.autograd.grad(output.square().sum(), inputs)
    slow = torch.autograd.grad(reference_lcsa(module, tokens, grid)[0].square().sum(), inputs)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("grid", [(15, 21), (20, 20), (7, 5), (1, 1)])
def test_token_attention_is_what_the_forward_pass_used(grid: tuple[int, int]) -> None:
    module, tokens, mixed = make_lcsa(topk=3, local_conv=False), torch.randn(2, grid[0] * grid[1], WIDTH), []
    module.out.register_forward_hook(lambda _, inputs, __: mixed.append(inputs[0]))
    _, routing = module(tokens, grid, return_routing=True)
    values = module.key_value(tokens)[..., WIDTH:].unflatten(-1, (HEADS, -1))  # (B, N, heads, d_head)
    for batch, (y, x) in [(0, (0, 0)), (1, (grid[0] - 1, grid[1] - 1)), (1, (grid[0] // 2, 0))]:
        attention = routing.token_attention(y, x, batch=batch)
        assert attention.shape == (HEADS, *grid)
        torch.testing.assert_close(attention.sum(dim=(1, 2)), torch.ones(HEADS))
        expected = torch.zeros(grid, dtype=torch.bool)
        for top, left, bottom, right in map(routing.layout.box, routing.chosen(y, x, batch=batch)):
            expected[top:bottom, left:right] = True
        assert torch.equal(attention > 0, expected.expand_as(attention))
        recomputed = torch.einsum("hn,nhc->hc", attention.flatten(1), values[batch]).flatten()
        torch.testing.assert_close(recomputed, mixed[0][batch, y * grid[1] + x], atol=1e-5, rtol=1e-4)


def test_identity_start_averages_similar_patches() -> None:
    module = RoutedSelfAttention(WIDTH, HEADS, regions=1, topk=1, start_at_identity=True)
    tokens = torch.randn(1, 12, WIDTH)
    heads = heads_of(tokens)
    expected = F.scaled_dot_product_attention(SHARPNESS * heads, heads, heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(tokens, (3, 4))[0], expected, atol=1e-5, rtol=1e-4)


def test_both_ways_of_attention_agree() -> None:
    query, key, value = (torch.randn(2, 3, n, 8).bfloat16() for n in (5, 7, 7))
    for mask in (None, torch.arange(7).expand(2, 1, 1, 7) % 3 < 2):
        fused = attend(query.detach(), key, value, mask=mask)
        plain = attend(query.requires_grad_(), key, value, mask=mask)
        torch.testing.assert_close(plain.detach(), fused, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("learning", [False, True])
def test_on_a_gpu_learning_keeps_off_cudnns_attention(learning: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients became NaN now and then; see tests/test_gpu.py for the kernel that a GPU uses."""
    allowed, enabled = [], torch.backends.cuda.cudnn_sdp_enabled
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: allowed.append(enabled()))
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16, requires_grad=True)
    with torch.set_grad_enabled(learning):
        attend(tensor, tensor, tensor)
    assert allowed == [not learning] and enabled()
