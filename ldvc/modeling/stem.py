"""The convolutional patch embedding of lite: a frozen EfficientNet-Lite2 in the place of a ViT's `conv1`.

An open_clip `VisionTransformer` turns a picture into patch tokens with one strided convolution, `visual.conv1`. Any module
that maps (B, 3, H, W) to (B, width, H / 16, W / 16) can stand there, and the rest of the tower stays plain open_clip. Early
convolutions instead of a linear patch embedding are known to help small ViTs (Xiao et al., "Early Convolutions Help
Transformers See Better", 2021); here they also carry what ImageNet taught them.
"""

import timm
import torch
from torch import Tensor, nn

STRIDE = 16


class ConvStem(nn.Module):
    """EfficientNet-Lite2 without its classifier, at output stride 16, then a 1x1 convolution to the ViT's width.

    Two depths are read: the middle of the network (fine position, parts) and its end (what the thing is). Batch norm fixes
    their scale once (it has no learnable parameters), so that neither depth drowns the other.

    Args:
        width: channels that the ViT expects.
        backbone: a timm model name; only its feature blocks are built and no weights are downloaded.
    """

    def __init__(self, width: int, *, backbone: str = "tf_efficientnet_lite2") -> None:
        super().__init__()
        self.backbone = timm.create_model(
            backbone, pretrained=False, features_only=True, output_stride=STRIDE, out_indices=(3, 4)
        )
        self.channels = tuple(self.backbone.feature_info.channels())
        self.scale = nn.BatchNorm2d(sum(self.channels), affine=False)
        self.project = nn.Conv2d(sum(self.channels), width, kernel_size=1, bias=False)

    def features(self, images: Tensor) -> Tensor:
        """Concatenated features of both depths, before normalisation and projection.

        Args:
            images: (B, 3, H, W), normalised; H and W divisible by 16.

        Returns:
            (B, channels, H / 16, W / 16).
        """
        images = images.contiguous(memory_format=torch.channels_last)  # 2 to 3 times faster for convolutions on a CPU
        return torch.cat(self.backbone(images), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width, H / 16, W / 16)."""
        return self.project(self.scale(self.features(images)))
