"""The convolutional patch embedding of the lite model: a frozen EfficientNet-Lite2 instead of a ViT's `conv1`.

An open_clip `VisionTransformer` computes patch tokens with one strided convolution, `visual.conv1`. Any module that maps
(B, 3, H, W) to (B, width, H / patch, W / patch) can replace it; the rest of the tower is plain open_clip. Early convolutions
improve small ViTs (Xiao et al., "Early Convolutions Help Transformers See Better", 2021); these are pretrained on ImageNet.
"""

import copy

import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

STRIDE = 16  # pixels between the features of the backbone


class ConvPatchEmbed(nn.Module):
    """EfficientNet-Lite2 without its classifier, at output stride 16, then a 1x1 convolution to the ViT's width.

    It concatenates features of the middle of the network (parts, fine positions) and of its end (categories). A batch norm
    without learnable parameters gives both the same scale.

    Objects fill most of an ImageNet photo, so the network is weak on small objects. A patch may therefore be larger than the
    stride. Then the picture is encoded at two scales: unchanged, with features averaged over each patch, and reduced to one
    feature per patch. The result is the mean of both scales.

    `width` is the number of channels of the ViT. Of the timm model `backbone`, only feature blocks are built, without weights.
    """

    def __init__(self, width: int, *, patch_size: int = STRIDE, backbone: str = "tf_efficientnet_lite2") -> None:
        super().__init__()
        assert patch_size >= STRIDE, f"patches of {patch_size} pixels are smaller than the stride of {STRIDE}"
        self.backbone = timm.create_model(backbone, features_only=True, output_stride=STRIDE, out_indices=(3, 4))
        self.patch_size = patch_size
        self.channels = tuple(self.backbone.feature_info.channels())
        self.scale = nn.BatchNorm2d(sum(self.channels), affine=False)
        self.project = nn.Conv2d(sum(self.channels), width, kernel_size=1, bias=False)
        self._folded: dict[torch.device, nn.Module] = {}  # not part of the state
        self.register_load_state_dict_post_hook(lambda module, _: module._folded.clear())

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}"

    def features(self, images: Tensor) -> Tensor:
        """Features of both depths, before normalisation and projection: (B, channels, H / patch, W / patch).

        Pictures are (B, 3, H, W), normalised, with H and W divisible by the patch size.
        """
        if images.device.type == "cpu" and len(images) > 1:  # 1.5 times faster: one picture fits the CPU cache
            return torch.cat([self.features(image) for image in images.split(1)])
        backbone = self._fast_backbone(images.device)
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        return scale_mean([torch.cat(backbone(scaled), dim=1) for scaled in scales(images, grid)], grid)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width, H / patch size, W / patch size)."""
        return self.project(self.scale(self.features(images)))

    def _fast_backbone(self, device: torch.device) -> nn.Module:
        """A copy of the backbone with batch norms folded into convolutions: the same function in 0.6 of the time on a CPU."""
        if self.training:
            return self.backbone
        if device not in self._folded:
            with torch.no_grad():
                folded = fold_batch_norms(copy.deepcopy(self.backbone)).requires_grad_(False)
            self._folded[device] = folded.to(memory_format=torch.channels_last)
        return self._folded[device]


def scales(images: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """Pictures (B, 3, H, W) unchanged and, if that is smaller, reduced to `STRIDE` pixels per patch of `grid` (h, w).

    channels_last: convolutions on a CPU are 2 to 3 times faster.
    """
    size, pictures = (STRIDE * grid[0], STRIDE * grid[1]), [images]
    if images.shape[-2:] != size:
        pictures.append(F.interpolate(images, size=size, mode="bilinear", antialias=True))
    return [each.contiguous(memory_format=torch.channels_last) for each in pictures]


def scale_mean(maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """Features (B, C, ...) of the pictures of `scales` -> their mean (B, C, h, w) on `grid`."""
    resize = {"size": grid, "mode": "bilinear", "antialias": True}
    pooled = [each if each.shape[-2:] == grid else F.interpolate(each, **resize) for each in maps]
    return torch.stack(pooled).mean(dim=0)


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Fold, in place, every batch norm (with activation, as timm builds them) that follows a convolution directly."""
    children = list(module.named_children())
    for (before, convolution), (name, norm) in zip(children[:-1], children[1:], strict=True):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, BatchNormAct2d):
            setattr(module, before, fuse_conv_bn_eval(convolution, norm))
            setattr(module, name, nn.Sequential(norm.drop, norm.act))
    for child in module.children():
        fold_batch_norms(child)
    return module
