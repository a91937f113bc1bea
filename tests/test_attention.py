"""LCSA and cross-attention against PyTorch's own attention and against a slow loop."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ldvc.modeling import attention
from ldvc.modeling.attention import SHARPNESS, RoutedSelfAttention, attend
from ldvc.modeling.regions import Layout

GRIDS = [(15, 21), (7, 5), (1, 1), (32, 32), (20, 20), (9, 2)]
WIDTH, HEADS = 32, 4


def make_lcsa(**arguments: object) -> RoutedSelfAttention:
    """With weights large enough that attention is far from uniform."""
    module = RoutedSelfAttention(WIDTH, HEADS, **arguments)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def slow_lcsa(
    module: RoutedSelfAttention, tokens: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, list[list[list[int]]]]:
    """LCSA as its definition reads: S x S regions over the padded grid, one region, head and patch after the other.

    Returns:
        (B, N, d), and for each picture and each of the S * S regions the chosen ones (empty regions choose nothing).
    """
    side, (height, width) = module.regions, grid
    rows, columns = -(-height // side), -(-width // side)
    members = [
        [
            y * width + x
            for y in range(r // side * rows, r // side * rows + rows)
            for x in range(r % side * columns, r % side * columns + columns)
            if y < height and x < width  # everything else is padding
        ]
        for r in range(side * side)
    ]
    nonempty = [r for r in range(side * side) if members[r]]
    outputs, all_chosen = [], []
    for picture in tokens:
        query = F.linear(picture, module.query.weight, module.query.bias)
        key = F.linear(picture, module.key_value.weight[:WIDTH], module.key_value.bias[:WIDTH])
        value = F.linear(picture, module.key_value.weight[WIDTH:], module.key_value.bias[WIDTH:])
        mixed = torch.zeros_like(query)
        chosen_of = [[] for _ in members]
        for r in nonempty:
            mean_query = query[members[r]].mean(dim=0)
            affinity = {q: (mean_query @ key[members[q]].mean(dim=0)).item() for q in nonempty}
            chosen_of[r] = sorted(affinity, key=affinity.get, reverse=True)[: module.topk]
            seen = [token for q in chosen_of[r] for token in members[q]]
            for head in range(HEADS):
                part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
                for token in members[r]:
                    scores = key[seen, part] @ query[token, part] / (WIDTH // HEADS) ** 0.5
                    mixed[token, part] = scores.softmax(dim=0) @ value[seen, part]
        if module.local is not None:
            for y in range(height):
                for x in range(width):
                    for dy in range(-2, 3):
                        for dx in range(-2, 3):
                            if 0 <= y + dy < height and 0 <= x + dx < width:
                                weight = module.local.weight[:, 0, dy + 2, dx + 2]
                                near = value[(y + dy) * width + x + dx]
                                mixed[y * width + x] = mixed[y * width + x] + weight * near
                    mixed[y * width + x] = mixed[y * width + x] + module.local.bias
        outputs.append(F.linear(mixed, module.out.weight, module.out.bias))
        all_chosen.append(chosen_of)
    return torch.stack(outputs), all_chosen


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("regions", "topk"), [(8, 4), (3, 2)])
def test_lcsa_is_the_slow_loop(grid: tuple[int, int], regions: int, topk: int) -> None:
    small = grid != (32, 32)  # the loop over a convolution is slow, and small grids show the same
    module = make_lcsa(regions=regions, topk=topk, local_conv=small)
    tokens = torch.randn(2 if small else 1, grid[0] * grid[1], WIDTH)
    output, routing = module(tokens, grid, return_routing=True)
    expected, chosen = slow_lcsa(module, tokens, grid)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    for batch in range(len(tokens)):
        for y in range(0, grid[0], 2):
            for x in range(0, grid[1], 2):
                rows, columns = -(-grid[0] // regions), -(-grid[1] // regions)
                expected_regions = chosen[batch][y // rows * regions + x // columns]
                boxes = {routing.layout.box(r)[:2] for r in routing.chosen(y, x, batch=batch)}
                assert boxes == {(r // regions * rows, r % regions * columns) for r in expected_regions}


@torch.no_grad()
@pytest.mark.parametrize("grid", [(15, 21), (32, 32), (7, 5)])
@pytest.mark.parametrize("gathered", [1, 3_000])
def test_regions_may_be_gathered_a_part_at_a_time(
    grid: tuple[int, int], gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, tokens = make_lcsa(), torch.randn(2, grid[0] * grid[1], WIDTH)
    with torch.enable_grad():  # with gradients, everything is gathered at once
        whole, routing = module(tokens, grid, return_routing=True)
    calls = []
    monkeypatch.setattr(attention, "GATHER_CHUNK", gathered)
    monkeypatch.setattr(module, "_attend", lambda *words, own=module._attend: calls.append(words[0]) or own(*words))
    parts, other = module(tokens, grid, return_routing=True)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)
    assert torch.equal(routing.regions, other.regions) and torch.equal(routing.affinity, other.affinity)
    assert sum(len(query) for query in calls) == 2 * routing.layout.total and len(calls) > 1


def test_lcsa_has_the_gradient_of_the_slow_loop() -> None:
    module, grid = make_lcsa(regions=3, topk=2), (5, 7)
    tokens = torch.randn(1, 35, WIDTH, requires_grad=True)
    inputs = [tokens, *module.parameters()]
    fast = torch.autograd.grad(module(tokens, grid)[0].square().sum(), inputs)
    slow = torch.autograd.grad(slow_lcsa(module, tokens, grid)[0].square().sum(), inputs)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("grid", [*GRIDS, (64, 64), (17, 9), (8, 8), (1, 40)])
@pytest.mark.parametrize("regions", [1, 3, 8])
def test_layout_covers_the_grid_without_empty_regions(grid: tuple[int, int], regions: int) -> None:
    layout = Layout.of(grid, regions)
    assert max(layout.count) <= regions
    valid = layout.valid(torch.device("cpu"))
    assert valid.any(dim=1).all() and valid.sum() == grid[0] * grid[1]
    covered = torch.zeros(grid, dtype=torch.int)
    for region in range(layout.total):
        top, left, bottom, right = layout.box(region)
        covered[top:bottom, left:right] += 1
        assert layout.region_of(top, left) == layout.region_of(bottom - 1, right - 1) == region
        assert valid[region].sum() == (bottom - top) * (right - left)
    assert (covered == 1).all()
    tokens = torch.randn(2, grid[0] * grid[1], 3)
    assert torch.equal(layout.unwindow(layout.window(tokens)), tokens)


def test_known_layouts() -> None:
    assert Layout.of((32, 32), 8) == Layout(grid=(32, 32), size=(4, 4), count=(8, 8))
    assert Layout.of((20, 20), 8) == Layout(grid=(20, 20), size=(3, 3), count=(7, 7))  # an eighth would be empty
    assert Layout.of((7, 5), 8) == Layout(grid=(7, 5), size=(1, 1), count=(7, 5))  # smaller than S x S
    assert Layout.of((1, 1), 8) == Layout(grid=(1, 1), size=(1, 1), count=(1, 1))


@pytest.mark.parametrize("grid", [(15, 21), (20, 20), (7, 5), (1, 1)])
def test_token_attention_is_what_the_forward_pass_used(grid: tuple[int, int]) -> None:
    module = make_lcsa(regions=8, topk=3, local_conv=False)
    tokens = torch.randn(2, grid[0] * grid[1], WIDTH)
    mixed = []
    handle = module.out.register_forward_hook(lambda _, inputs, __: mixed.append(inputs[0]))
    _, routing = module(tokens, grid, return_routing=True)
    handle.remove()
    values = module.key_value(tokens)[..., WIDTH:].unflatten(-1, (HEADS, -1))  # (B, N, heads, d_head)
    for batch, (y, x) in [(0, (0, 0)), (1, (grid[0] - 1, grid[1] - 1)), (1, (grid[0] // 2, 0))]:
        attention = routing.token_attention(y, x, batch=batch)
        assert attention.shape == (HEADS, *grid)
        torch.testing.assert_close(attention.sum(dim=(1, 2)), torch.ones(HEADS))
        allowed = routing.chosen_patches(y, x, batch=batch)
        assert (attention[:, ~allowed] == 0).all() and (attention[:, allowed] > 0).all()
        recomputed = torch.einsum("hn,nhc->hc", attention.flatten(1), values[batch]).flatten()
        torch.testing.assert_close(recomputed, mixed[0][batch, y * grid[1] + x], atol=1e-5, rtol=1e-4)


def test_routing_is_a_recomputation_and_detached() -> None:
    module, grid = make_lcsa(regions=4, topk=3), (10, 9)
    tokens = torch.randn(2, 90, WIDTH, requires_grad=True)
    output, routing = module(tokens, grid, return_routing=True)
    assert torch.equal(output, module(tokens, grid)[0]) and module(tokens, grid)[1] is None
    query, key = module.query(tokens), module.key_value(tokens)[..., :WIDTH]
    for a in range(routing.layout.total):
        for b in range(routing.layout.total):
            boxes = [routing.layout.box(r) for r in (a, b)]
            means = [
                x.unflatten(1, grid)[:, top:bottom, left:right].mean(dim=(1, 2))
                for x, (top, left, bottom, right) in zip((query, key), boxes, strict=True)
            ]
            expected = (means[0] * means[1]).sum(dim=-1) / WIDTH**0.5
            torch.testing.assert_close(routing.affinity[:, a, b], expected, atol=1e-5, rtol=1e-4)
    best = routing.affinity.sort(dim=-1, descending=True).indices[..., :3]
    assert torch.equal(routing.regions, best)
    assert not any(x.requires_grad for x in (routing.affinity, routing.queries, routing.keys))


def test_identity_start_averages_similar_patches() -> None:
    module = RoutedSelfAttention(WIDTH, HEADS, regions=1, topk=1, start_at_identity=True)
    tokens = torch.randn(1, 12, WIDTH)
    heads = tokens.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    expected = F.scaled_dot_product_attention(SHARPNESS * heads, heads, heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(tokens, (3, 4))[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_both_ways_of_attention_agree(masked: bool) -> None:
    query, key, value = (torch.randn(2, 3, n, 8).bfloat16() for n in (5, 7, 7))
    mask = torch.rand(2, 1, 1, 7) > 0.3 if masked else None
    if masked:
        mask[..., 0] = True
    fused = attend(query, key, value, mask=mask)
    plain = attend(query.requires_grad_(), key, value, mask=mask)
    assert plain.dtype == torch.bfloat16
    torch.testing.assert_close(plain.detach().float(), fused.float(), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("grid", [(15, 21), (7, 5), (1, 1)])
def test_lcsa_trains_under_bfloat16(grid: tuple[int, int]) -> None:
    module = RoutedSelfAttention(WIDTH, HEADS, topk=64)  # all regions: rounding must not change what is chosen
    tokens = torch.randn(2, grid[0] * grid[1], WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, routing = module(tokens, grid, return_routing=True)
    output.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    assert routing.token_attention(0, 0).dtype == torch.float32
    torch.testing.assert_close(output.float(), module(tokens, grid)[0], atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("learning", [False, True])
def test_on_a_gpu_learning_keeps_off_cudnns_attention(learning: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients became NaN now and then; see tests/test_gpu.py for the kernel that a GPU uses."""
    allowed = []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *_, **__: allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    before = torch.backends.cuda.cudnn_sdp_enabled()
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16, requires_grad=True)
    with torch.set_grad_enabled(learning):
        attend(tensor, tensor, tensor)
    assert before and allowed == [not learning] and torch.backends.cuda.cudnn_sdp_enabled() == before
