"""Attention of the decoders: cross-attention and the local-consensus self-attention (LCSA).

LCSA is the routed attention of BiFormer (Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", 2023):
each region of patches chooses other regions by the affinity of mean queries and keys; its patches then attend only to the
patches of the chosen regions. One thing differs on purpose: BiFormer's code scales the scores of patches by 1 / sqrt(d), we
scale them by 1 / sqrt(d_head), as multi-head attention does. The affinity of regions is scaled by 1 / sqrt(d) in both.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SHARPNESS = 3.0  # factor of LCSA's scores at initialisation, measured; with 1, it averages patches of different objects
TRAIN_SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # on a GPU
GATHER_CHUNK = 2_000_000  # elements of keys and values that are gathered at once on a CPU without gradients: 8 MB


def attend(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention with PyTorch's fused kernels, except in two cases.

    In training with bfloat16 on a CPU, plain matrix products take a tenth of the time on LCSA's small windows and less than
    half on whole grids (torch 2.14, EPYC). In training on an H100 or H200, cuDNN's kernel is excluded: LCSA's gradients became
    NaN within some dozens of steps (torch 2.11).

    Args:
        query: (B, heads, N, d_head).
        key, value: (B, heads, M, d_head).
        mask: booleans that broadcast to (B, heads, N, M), True = may attend; no row may be all False.

    Returns:
        (B, heads, N, d_head).
    """
    slow_kernel = query.dtype == torch.bfloat16 and query.device.type == "cpu" and torch.is_grad_enabled()
    if not (slow_kernel and (query.requires_grad or key.requires_grad or value.requires_grad)):
        with sdpa_kernel(TRAIN_SDPA_BACKENDS) if query.is_cuda and torch.is_grad_enabled() else nullcontext():
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with torch.autocast("cpu", enabled=False):  # autocast would compute the softmax in float32
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # (B, heads, N, M)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(dim=-1) @ value


def init_identity(linear: nn.Linear, *, factor: float = 1.0) -> None:
    """Make each output of a linear layer a copy of its input times a factor: weight = factor * [I; I; ...], bias = 0."""
    rows, width = linear.weight.shape
    with torch.no_grad():
        linear.weight.copy_(factor * torch.eye(width).repeat(rows // width, 1))
        linear.bias.zero_()


class MultiHeadAttention(nn.Module):
    """The projections of multi-head attention. Keys and values share a layer, so that they are adjacent in memory.

    With `start_at_identity`, the projections start as identity matrices (queries times `sharpness`), so that the branch starts
    as a similarity-weighted mean of what it attends to; otherwise with PyTorch's initialisation.
    """

    def __init__(self, width: int, heads: int, *, start_at_identity: bool, sharpness: float = 1.0) -> None:
        super().__init__()
        assert width % heads == 0, f"{heads} heads do not divide a width of {width}"
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        if start_at_identity:
            init_identity(self.query, factor=sharpness)
            init_identity(self.key_value)
            init_identity(self.out)


class CrossAttention(MultiHeadAttention):
    """Attention of one set of tokens to another; `dropout` applies to the attention weights in training."""

    def __init__(self, width: int, heads: int, *, start_at_identity: bool = False, dropout: float = 0.0) -> None:
        super().__init__(width, heads, start_at_identity=start_at_identity)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, context: Tensor, *, return_scores: bool = False) -> tuple[Tensor, Tensor | None]:
        """Queries (B, N, d) attend to a context (B, C, d), keys and values.

        Returns (B, N, d), and the scores before the softmax (B, heads, N, C), float32, scaled by 1 / sqrt(d_head), or None.
        """
        query = rearrange(self.query(queries), "b n (heads c) -> b heads n c", heads=self.heads)
        by_head = "b n (two heads c) -> two b heads n c"
        key, value = rearrange(self.key_value(context), by_head, two=2, heads=self.heads)  # (B, heads, C, d_head) each
        if self.training and self.dropout.p:
            mixed = self.dropout(attention_scores(query, key).softmax(dim=-1)).to(value.dtype) @ value
        else:
            mixed = attend(query, key, value)
        output = self.out(rearrange(mixed, "b heads n c -> b n (heads c)"))
        return output, attention_scores(query, key) if return_scores else None


def attention_scores(query: Tensor, key: Tensor) -> Tensor:
    """(B, heads, N, d_head) x (B, heads, M, d_head) -> (B, heads, N, M), scaled, in float32 also under autocast."""
    with torch.autocast(query.device.type, enabled=False):
        return query.float() @ key.float().transpose(-2, -1) * query.shape[-1] ** -0.5


@dataclass(frozen=True)
class Layout:
    """How a grid of patches is divided into regions.

    There are at most S regions per side, each with ceil(h / S) x ceil(w / S) patches. Regions without patches do not exist: a
    grid of 20 x 20 with S = 8 has 7 x 7 regions of 3 x 3 patches. A grid smaller than S x S has regions of one patch. The last
    region of a row or column may contain padding, which is masked in means, routing and attention.
    """

    grid: tuple[int, int]  # (h, w) patches
    size: tuple[int, int]  # (rows, columns) of patches in a region
    count: tuple[int, int]  # (rows, columns) of regions

    @classmethod
    def of(cls, grid: tuple[int, int], regions: int) -> Layout:
        """The layout of a grid (h, w) with S = `regions`."""
        size = tuple(-(-side // regions) for side in grid)
        count = tuple(-(-side // length) for side, length in zip(grid, size, strict=True))
        return cls(grid=grid, size=size, count=count)

    @property
    def total(self) -> int:
        """R, the number of regions."""
        return self.count[0] * self.count[1]

    @property
    def padding(self) -> tuple[int, int]:
        """Rows below and columns to the right of the grid that complete the last regions."""
        return tuple(n * size - side for n, size, side in zip(self.count, self.size, self.grid, strict=True))

    def window(self, tokens: Tensor) -> Tensor:
        """(B, h * w, c) -> (B, R, t, c): tokens region by region; padding is zero."""
        tokens = tokens.unflatten(1, self.grid)
        if any(self.padding):
            tokens = F.pad(tokens, (0, 0, 0, self.padding[1], 0, self.padding[0]))
        regions = "b (rows y) (columns x) c -> b (rows columns) (y x) c"
        return rearrange(tokens, regions, rows=self.count[0], columns=self.count[1])

    def unwindow(self, windows: Tensor) -> Tensor:
        """(B, R, t, c) -> (B, h * w, c): inverse of `window`."""
        (rows, columns), (y, x), (height, width) = self.count, self.size, self.grid
        grid = "b (rows columns) (y x) c -> b (rows y) (columns x) c"
        return rearrange(windows, grid, rows=rows, columns=columns, y=y, x=x)[:, :height, :width].flatten(1, 2)

    def valid(self, device: torch.device) -> Tensor:
        """(R, t) booleans: which places of a region are patches and not padding."""
        ones = torch.ones(1, self.grid[0] * self.grid[1], 1, device=device)
        return self.window(ones)[0, :, :, 0] > 0

    def region_of(self, y: int, x: int) -> int:
        """Index of the region that holds patch (y, x)."""
        height, width = self.grid
        assert 0 <= y < height and 0 <= x < width, f"patch ({y}, {x}) is outside the grid of {height} x {width}"
        return (y // self.size[0]) * self.count[1] + x // self.size[1]

    def box(self, region: int) -> tuple[int, int, int, int]:
        """Patches of a region as (top, left, bottom, right), the last two exclusive and without padding."""
        row, column = divmod(region, self.count[1])
        top, left = row * self.size[0], column * self.size[1]
        return top, left, min(top + self.size[0], self.grid[0]), min(left + self.size[1], self.grid[1])


class Routing(NamedTuple):
    """The routing of LCSA in one forward pass, detached."""

    layout: Layout  # of the grid; R = layout.total regions, numbered row by row
    regions: Tensor  # (B, R, k'), the regions that each region chose, best first; k' = min(k, R)
    affinity: Tensor  # (B, R, R), mean query of the row's region x mean key of the column's, / sqrt(d)
    queries: Tensor  # (B, heads, N, d_head) of all patches
    keys: Tensor

    def chosen(self, y: int, x: int, *, batch: int = 0) -> list[int]:
        """The regions that patch (y, x) attends to, best first."""
        return self.regions[batch, self.layout.region_of(y, x)].tolist()

    def token_attention(self, y: int, x: int, *, batch: int = 0) -> Tensor:
        """Attention of patch (y, x) to every patch: (heads, h, w), sums to 1 per head, 0 outside the chosen regions."""
        grid = self.layout.grid
        allowed = torch.zeros(grid, dtype=torch.bool, device=self.keys.device)
        for region in self.chosen(y, x, batch=batch):
            top, left, bottom, right = self.layout.box(region)
            allowed[top:bottom, left:right] = True
        query = self.queries[batch, :, y * grid[1] + x, None]  # (heads, 1, d_head)
        scores = attention_scores(query[None], self.keys[batch, None])[0, :, 0]  # (heads, N)
        return scores.masked_fill(~allowed.flatten(), float("-inf")).softmax(dim=-1).unflatten(-1, grid)


class RoutedSelfAttention(MultiHeadAttention):
    """LCSA: each region attends to its k most related regions, plus a local convolution of the values.

    Region queries and keys are detached means over the region's patches: routing has no gradient, as in BiFormer.
    With k = R and no convolution this is full self-attention.

    Args:
        width, heads: see `MultiHeadAttention`.
        start_at_identity: start as a mean over the most similar patches, with a convolution of zeros.
        regions: S; see `Layout`.
        topk: k; clamped to the number of regions.
        local_conv: add a depthwise 5 x 5 convolution of the values (BiFormer's local term); padding is zero.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        regions: int = 8,
        topk: int = 4,
        local_conv: bool = True,
        start_at_identity: bool = False,
    ) -> None:
        super().__init__(width, heads, start_at_identity=start_at_identity, sharpness=SHARPNESS)
        self.regions, self.topk = regions, topk
        self.local = nn.Conv2d(width, width, kernel_size=5, padding=2, groups=width) if local_conv else None
        if self.local is not None and start_at_identity:
            nn.init.zeros_(self.local.weight)
            nn.init.zeros_(self.local.bias)

    def forward(self, tokens: Tensor, grid: tuple[int, int], *, return_routing: bool = False) -> tuple[Tensor, Routing | None]:
        """Tokens (B, N, d) of a grid (h, w), row by row -> (B, N, d), and a `Routing` or None."""
        batch, length, width = tokens.shape
        assert length == grid[0] * grid[1], f"{length} tokens do not fill a grid of {grid[0]} x {grid[1]}"
        layout = Layout.of(grid, self.regions)
        query, key_value = self.query(tokens), self.key_value(tokens)  # (B, N, d), (B, N, 2d)
        query_windows, key_value_windows = layout.window(query), layout.window(key_value)  # (B, R, t, d), (B, R, t, 2d)
        valid = layout.valid(tokens.device) if any(layout.padding) else None  # (R, t)
        affinity, chosen = self._route(query_windows, key_value_windows[..., :width], valid)

        total, places = layout.total, query_windows.shape[2]
        offset = torch.arange(batch, device=tokens.device)[:, None, None] * total
        rows = (chosen + offset).flatten(0, 1)  # (B * R, k'), into the regions of all pictures
        step = batch * total
        if tokens.device.type == "cpu" and not torch.is_grad_enabled():  # in parts that fit the CPU cache
            step = max(1, GATHER_CHUNK // (rows.shape[1] * places * 2 * width))
        query_parts, row_parts = query_windows.flatten(0, 1).split(step), rows.split(step)  # of (B * R, t, d), (B * R, k')
        masks = [None] * len(row_parts)
        if valid is not None:
            masks = valid[chosen].reshape(batch * total, 1, 1, -1).split(step)  # parts of (B * R, 1, 1, k' * t)
        key_value_windows = key_value_windows.reshape(batch * total, places * 2 * width)
        mixed = [self._attend(*part, key_value_windows) for part in zip(query_parts, row_parts, masks, strict=True)]
        mixed = mixed[0] if len(mixed) == 1 else torch.cat(mixed)  # (B * R, t, d)
        mixed = layout.unwindow(mixed.unflatten(0, (batch, total)))  # (B, N, d)
        if self.local is not None:
            value_map = rearrange(key_value[..., width:], "b (h w) c -> b c h w", h=grid[0])
            mixed = mixed + rearrange(self.local(value_map), "b c h w -> b (h w) c")

        routing = None
        if return_routing:
            projected = (query.detach(), key_value[..., :width].detach())
            heads = (rearrange(each, "b n (heads c) -> b heads n c", heads=self.heads) for each in projected)
            routing = Routing(layout, chosen, affinity, *heads)
        return self.out(mixed), routing

    def _attend(self, query: Tensor, rows: Tensor, mask: Tensor | None, key_value: Tensor) -> Tensor:
        """Patches (r, t, d) of r regions attend to the patches of their chosen regions, `rows` (r, k') -> (r, t, d).

        `key_value` (B * R, t * 2d) holds all regions; `mask` (r, 1, 1, k' * t) is False where there is padding.
        """
        gathered = key_value.index_select(0, rows.flatten()).unflatten(0, rows.shape)  # (r, k', t * 2d)
        parts = "r k (t two heads c) -> two r heads (k t) c"
        key, value = rearrange(gathered, parts, t=query.shape[1], two=2, heads=self.heads)  # (r, heads, k' * t, d_head)
        query = rearrange(query, "r t (heads c) -> r heads t c", heads=self.heads)
        return rearrange(attend(query, key, value, mask=mask), "r heads t c -> r t (heads c)")

    @torch.no_grad()
    def _route(self, query: Tensor, key: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Affinity (B, R, R) and chosen regions (B, R, k') from windows (B, R, t, d); padding is left out of means."""
        with torch.autocast(query.device.type, enabled=False):
            windows = (query.float(), key.float())
            if valid is None:
                query_mean, key_mean = (each.mean(dim=2) for each in windows)  # (B, R, d)
            else:  # padding is zero and adds nothing; every region has patches
                query_mean, key_mean = (each.sum(dim=2) / valid.sum(dim=1)[:, None] for each in windows)
            affinity = query_mean @ key_mean.transpose(1, 2) * query.shape[-1] ** -0.5  # (B, R, R)
        chosen = affinity.topk(min(self.topk, affinity.shape[-1]), dim=-1).indices
        return affinity, chosen
