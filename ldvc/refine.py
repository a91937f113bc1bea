"""Edge-aware enlarging of score maps: the guided filter, with the photo as guide.

Score maps have one value for each patch of 16 pixels, so their edges are blurred. He, Sun and Tang ("Guided Image
Filtering", 2010) fit, in each small square, the map as a linear function of the photo's colours; its edges then follow
the photo's. As in their "Fast Guided Filter" (2015), the fit is made at low resolution and applied at high resolution.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def box_mean(maps: Tensor, radius: int) -> Tensor:
    """Mean over squares of side 2 * radius + 1 that are cut at the border: (C, H, W) -> (C, H, W)."""
    side, options = 2 * radius + 1, {"stride": 1, "count_include_pad": False}
    maps = F.avg_pool2d(maps, (side, 1), padding=(radius, 0), **options)  # a square's mean is a mean of columns' means
    return F.avg_pool2d(maps, (1, side), padding=(0, radius), **options)


def symmetric_inverse(matrix: Tensor) -> Tensor:
    """Inverse of symmetric 3 x 3 matrices that lie in the first two axes: (3, 3, ...) -> (3, 3, ...), by cofactors.

    A hundred times faster than a batched solver for the hundred thousand small matrices of a photo.
    """
    (a, b, c), (_, d, e), (_, _, f) = matrix
    cofactors = [[d * f - e * e, c * e - b * f, b * e - c * d], [a * f - c * c, b * c - a * e], [a * d - b * b]]
    determinant = a * cofactors[0][0] + b * cofactors[0][1] + c * cofactors[0][2]
    (aa, ab, ac), (bb, bc), (cc,) = cofactors
    rows = [torch.stack(row) for row in ((aa, ab, ac), (ab, bb, bc), (ac, bc, cc))]
    return torch.stack(rows) / determinant


def guided_upsample(
    maps: Tensor, *, guide: Tensor, guide_full: Tensor, radius: int = 16, epsilon: float = 1e-3
) -> Tensor:
    """Enlarge maps so that their edges follow a photo.

    Args:
        maps: (C, h, w) values, for instance logits enlarged bilinearly to the guide's size.
        guide: (3, h, w) the photo at that size, values in 0..1.
        guide_full: (3, H, W) the photo at the size wanted.
        radius: half side of the squares in pixels of `guide`; about one patch.
        epsilon: variance of colour below which a square counts as flat.

    Returns:
        (C, H, W) float32.
    """
    assert maps.shape[-2:] == guide.shape[-2:], "maps and guide must have one size"
    channels, (height, width) = maps.shape[0], maps.shape[-2:]
    mean_guide = box_mean(guide, radius)  # (3, h, w)
    mean_maps = box_mean(maps, radius)  # (C, h, w)
    products = box_mean((guide[:, None] * guide[None]).reshape(9, height, width), radius).unflatten(0, (3, 3))
    covariance = products - mean_guide[:, None] * mean_guide[None]  # (3, 3, h, w)
    covariance = covariance + epsilon * torch.eye(3, device=maps.device)[:, :, None, None]
    cross = box_mean((maps[:, None] * guide[None]).reshape(channels * 3, height, width), radius)
    cross = cross.unflatten(0, (channels, 3)) - mean_maps[:, None] * mean_guide[None]  # (C, 3, h, w)
    slope = torch.einsum("ijhw,cjhw->cihw", symmetric_inverse(covariance), cross)
    offset = mean_maps - (slope * mean_guide[None]).sum(dim=1)
    coefficients = torch.cat([slope.flatten(0, 1), offset])  # (C*3 + C, h, w)
    coefficients = F.interpolate(
        box_mean(coefficients, radius)[None], size=guide_full.shape[-2:], mode="bilinear", align_corners=False
    )[0]
    slope, offset = coefficients[: channels * 3], coefficients[channels * 3 :]
    return (slope.reshape(channels, 3, *guide_full.shape[-2:]) * guide_full[None]).sum(dim=1) + offset
