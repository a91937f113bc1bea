"""The EfficientNet of lite's patch embedding, split where learning begins: what comes before is computed without gradients.

Batch norms are folded into the convolutions (as `ConvPatchEmbed` does to be fast), so what learns is a stage's
convolutions with their biases; on a CPU depthwise kernels may stay as ImageNet left them, see `train/cpu_convolution.py`.
`Trunk.write_back` undoes the folding.
"""

from __future__ import annotations

import copy

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from ldvc.modeling.conv_patch_embed import ConvPatchEmbed, fold_batch_norms, patch_means
from train.cpu_convolution import FixedDepthwise, fix_depthwise

FIRST = 4  # of seven stages; from here on the grid is coarse, and learning is bearable on a CPU
READ = (4, 6)  # stages that `ConvPatchEmbed` hands on


class Trunk(nn.Module):
    """A copy of a stem's backbone whose late stages learn.

    Args:
        stem: its weights are copied, not changed.
        first: the first of the seven stages that learns. At 0 only the very first convolution stays.
        depthwise: whether depthwise kernels that keep the size learn, too.
    """

    def __init__(self, stem: ConvPatchEmbed, *, first: int = FIRST, depthwise: bool = False) -> None:
        super().__init__()
        assert 0 <= first <= READ[0], f"stages {READ} are handed on, so learning begins at one of 0 to {READ[0]}"
        folded = fold_batch_norms(copy.deepcopy(stem.backbone)).requires_grad_(False).eval()
        self.patch_size, self.first = stem.patch_size, first
        self.head = nn.Sequential(folded.conv_stem, folded.bn1, *folded.blocks[:first])
        self.stages = folded.blocks[first:].requires_grad_(True)
        if not depthwise:
            fix_depthwise(self.stages)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def early(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> what the stages that do not learn make of them, (n, C, h, w) each.

        On a CPU picture by picture, since what one needs stays in the cache of a core.
        """
        at_once = 1 if images.device.type == "cpu" else len(images)
        return [self.head(picture) for picture in images.contiguous(memory_format=torch.channels_last).split(at_once)]

    def late(self, seen: list[Tensor], size: tuple[int, int]) -> Tensor:
        """What `early` gave for pictures of `size` (H, W) -> (B, channels, h, w) as `ConvPatchEmbed.features`."""
        return patch_means(torch.cat([self._late(picture) for picture in seen]), size, self.patch_size)

    def _late(self, x: Tensor) -> Tensor:
        read = []
        for number, stage in enumerate(self.stages, start=self.first):
            x = stage(x)
            if number in READ:
                read.append(x)
        return torch.cat(read, dim=1)

    @torch.no_grad()
    def write_back(self, stem: ConvPatchEmbed) -> None:
        """Give a stem of the same kind the learned stages: the same function with its batch norms."""
        for folded, plain in zip(self.stages, stem.backbone.blocks[self.first :], strict=True):
            unfold_batch_norms(folded, plain)
        stem._folded.clear()


def unfold_batch_norms(folded: nn.Module, plain: nn.Module) -> None:
    """Inverse of `fold_batch_norms`, into the module that was folded.

    With s = gamma / sqrt(variance + eps) a folded convolution is W' = s W, b' = beta - s mean; gamma and the statistics stay
    as they are, so W = W' / s and beta = b' + s mean.
    """
    others = dict(folded.named_children())
    children = list(plain.named_children())
    for (name, convolution), (_, norm) in zip(children[:-1], children[1:], strict=True):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, BatchNormAct2d):
            own = others[name].convolution if isinstance(others[name], FixedDepthwise) else others[name]
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            convolution.weight.copy_(own.weight / scale[:, None, None, None])
            norm.bias.copy_(own.bias + scale * norm.running_mean)
    for name, child in children:
        if not isinstance(child, (nn.Conv2d, BatchNormAct2d)):
            unfold_batch_norms(others[name], child)
