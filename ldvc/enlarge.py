"""From patches to pixels: maps with one value per patch, enlarged by linear interpolation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ldvc.pictures import Window

TILE = 4  # patches along the side of a piece of a label map


def resampling_matrix(length: int, *, canvas: int, start: int, cells: int, patch: int) -> tuple[Tensor, Tensor]:
    """Linear interpolation from patches to `length` pixels that span the canvas.

    Pixel i lies at (i + 0.5) * canvas / length on the canvas, patch j of the window at start + (j + 0.5) * patch. Beyond
    the first and last patch the nearest value holds. Both axes being independent, an image is enlarged by two of these.

    Args:
        length: pixels along this axis of the output.
        canvas: its length in canvas pixels.
        start: first canvas pixel of the window.
        cells: patches of the window along this axis.
        patch: canvas pixels per patch.

    Returns:
        matrix (length, cells) whose rows sum to 1, and positions (length,) on the canvas.
    """
    position = (torch.arange(length, dtype=torch.float32) + 0.5) * (canvas / length)
    coordinate = ((position - start) / patch - 0.5).clamp(0, cells - 1)
    lower = coordinate.floor().clamp(max=max(cells - 2, 0))
    weight = coordinate - lower
    matrix = torch.zeros(length, cells)
    rows = torch.arange(length)
    matrix[rows, lower.long()] = 1 - weight
    if cells > 1:
        matrix[rows, lower.long() + 1] = weight
    return matrix, position


def best_of(
    logits: Tensor, size: tuple[int, int], *, canvas: tuple[int, int], window: Window, patch: int
) -> tuple[Tensor, Tensor]:
    """The highest of all enlarged maps at each pixel, and whose it is, without drawing every map everywhere.

    A pixel's value is a weighted mean of four patches'. A name whose highest of the four is below another's lowest is
    nowhere best between them, so that a list of 200 names costs little more than what is in the photo.

    Args:
        logits: (C, h, w), one value per patch.
        size: (height, width) in pixels; they span the canvas.
        canvas, window, patch: as of `resampling_matrix`, for both axes.

    Returns:
        (height, width) values, and (height, width) indices into C.
    """
    corners = F.pad(logits[None], (0, 1, 0, 1), mode="replicate")
    highest, lowest = F.max_pool2d(corners, 2, stride=1)[0], -F.max_pool2d(-corners, 2, stride=1)[0]
    contends = highest >= lowest.amax(dim=0)  # (C, h, w): in the square to the right of and below each patch

    def pieces(axis: int) -> list[tuple[slice, slice, Tensor]]:
        """Along one axis, `TILE` patches at a time: pixels, patches, and the matrix from these to those."""
        cells, start = logits.shape[1 + axis], (window.top, window.left)[axis]
        matrix, _ = resampling_matrix(size[axis], canvas=canvas[axis], start=start, cells=cells, patch=patch)
        square = (matrix > 0).int().argmax(dim=1)  # the first of the two patches around each pixel
        found = []
        for first in range(0, cells, TILE):
            inside = ((square >= first) & (square < first + TILE)).nonzero().flatten()
            if len(inside):
                pixels, patches = slice(int(inside[0]), int(inside[-1]) + 1), slice(first, first + TILE + 1)
                found.append((pixels, patches, matrix[pixels, patches]))
        return found

    best = torch.empty(size)
    labels = torch.empty(size, dtype=torch.int64)
    columns = pieces(1)
    for pixels_down, patches_down, down in pieces(0):
        for pixels_along, patches_along, along in columns:
            squares = contends[:, patches_down, patches_along][:, :TILE, :TILE]
            names = squares.flatten(1).any(dim=1).nonzero().flatten()
            maps = down @ logits[names, patches_down, patches_along] @ along.T
            best[pixels_down, pixels_along], index = maps.max(dim=0)
            labels[pixels_down, pixels_along] = names[index]
    return best, labels
