"""The EfficientNet of lite's patch embedding, split into frozen early stages and late stages that learn.

Batch norms are folded into the convolutions, as `ConvPatchEmbed` does for speed. So the convolutions and their biases learn.
`Trunk.write_back` undoes the folding.
"""

from __future__ import annotations

import copy

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from ldvc.modeling.conv_patch_embed import ConvPatchEmbed, fold_batch_norms, scale_mean, scales

FIRST = 2  # the first of the seven stages that learns
READ = (4, 6)  # stages whose outputs `ConvPatchEmbed` concatenates


class Trunk(nn.Module):
    """A copy of a patch embedding's backbone whose late stages learn."""

    def __init__(self, patch_embed: ConvPatchEmbed) -> None:
        super().__init__()
        folded = fold_batch_norms(copy.deepcopy(patch_embed.backbone)).requires_grad_(False).eval()
        self.patch_size = patch_embed.patch_size
        self.frozen = nn.Sequential(folded.conv_stem, folded.bn1, *folded.blocks[:FIRST])
        self.stages = folded.blocks[FIRST:].requires_grad_(True)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def early(self, images: Tensor) -> list[list[Tensor]]:
        """Apply the frozen stages at each scale: pictures (B, 3, H, W) -> for each scale, tensors (n, C, h, w) of B in all.

        On a CPU the photos go through one by one, because the activations of one photo fit into the cache of a core.
        """
        photos = 1 if images.device.type == "cpu" else len(images)
        return [[self.frozen(part) for part in scaled.split(photos)] for scaled in scales(images, self.grid(images))]

    def late(self, early: list[list[Tensor]], grid: tuple[int, int]) -> Tensor:
        """Outputs of `early` -> (B, channels, h, w) on `grid` (h, w), as `ConvPatchEmbed.features`."""
        return scale_mean([torch.cat([self._late(part) for part in parts]) for parts in early], grid)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(h, w) patches of pictures (B, 3, H, W)."""
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    def _late(self, x: Tensor) -> Tensor:
        outputs = []
        for number, stage in enumerate(self.stages, start=FIRST):
            x = stage(x)
            if number in READ:
                outputs.append(x)
        return torch.cat(outputs, dim=1)

    @torch.no_grad()
    def write_back(self, patch_embed: ConvPatchEmbed) -> None:
        """Give a patch embedding of the same architecture the learned stages, with batch norms unfolded."""
        for folded, plain in zip(self.stages, patch_embed.backbone.blocks[FIRST:], strict=True):
            unfold_batch_norms(folded, plain)
        patch_embed.load_state_dict(patch_embed.state_dict())  # drops its folded copies


def unfold_batch_norms(folded: nn.Module, plain: nn.Module) -> None:
    """Inverse of `fold_batch_norms`, in place.

    With s = gamma / sqrt(variance + eps), a folded convolution has W' = s W and b' = beta - s mean. Gamma and the statistics
    stay, so W = W' / s and beta = b' + s mean.

    Args:
        folded: the module whose convolutions contain the batch norms.
        plain: the module that was folded; its convolutions and the biases of its batch norms are overwritten.
    """
    children, folded_children = list(plain.named_children()), dict(folded.named_children())
    for (name, convolution), (_, norm) in zip(children[:-1], children[1:], strict=True):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, BatchNormAct2d):
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            convolution.weight.copy_(folded_children[name].weight / scale[:, None, None, None])
            norm.bias.copy_(folded_children[name].bias + scale * norm.running_mean)
    for name, child in children:
        if not isinstance(child, (nn.Conv2d, BatchNormAct2d)):
            unfold_batch_norms(folded_children[name], child)
