"""Regions of a grid of patches, between which the local-consensus self-attention (LCSA) routes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


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
        """(B, h * w, c) -> (B, R, t, c): tokens region by region, zeros where there is padding."""
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
