"""Depthwise convolutions that pass gradients on quickly on a CPU (for training the late stages of lite's EfficientNet).

PyTorch's backward pass of a dilated depthwise convolution in bfloat16 takes some eighty times its forward pass on a CPU
(measured with torch 2.14: 523 against 6 ms for four of them with 5 x 5 kernels on 4 x 1248 x 20 x 20). Where the kernel
itself does not learn, only the gradient of the input is needed, and that is the convolution of the output's gradient with
the mirrored kernel: another fast forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kernel: Tensor, bias: Tensor | None, padding: tuple, dilation: tuple) -> Tensor:
        ctx.save_for_backward(kernel)
        ctx.geometry = {"padding": padding, "dilation": dilation, "groups": len(kernel)}
        return F.conv2d(x, kernel, bias, **ctx.geometry)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (kernel,) = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        return F.conv2d(gradient, kernel.flip(2, 3), **ctx.geometry), None, None, None, None


class FixedDepthwise(nn.Module):
    """A depthwise convolution that keeps the size and does not learn; the same function as the one it is made of.

    Args:
        convolution: stride 1, odd kernel, padding that keeps the size; its parameters stop learning.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        assert fits(convolution), f"{convolution} is no depthwise convolution that keeps the size"
        self.convolution = convolution.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        own = self.convolution
        if not (torch.is_grad_enabled() and x.requires_grad):
            return own(x)
        if torch.is_autocast_enabled(x.device.type):  # autocast does not look inside functions of one's own
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if own.bias is None else own.bias.to(x.dtype)
        return _InputGradient.apply(x, own.weight.to(x.dtype), bias, own.padding, own.dilation)


def fits(module: nn.Module) -> bool:
    """Whether a module is a depthwise convolution that keeps the size of its input."""
    if not isinstance(module, nn.Conv2d) or not 1 < module.groups == module.in_channels == module.out_channels:
        return False
    keeps = tuple(d * (k - 1) // 2 for k, d in zip(module.kernel_size, module.dilation, strict=True))
    odd = all(k % 2 for k in module.kernel_size)
    return odd and module.stride == (1, 1) and module.padding == keeps


def fix_depthwise(module: nn.Module) -> None:
    """Replace, in place, every such convolution among the descendants of a module by a `FixedDepthwise`."""
    for name, child in list(module.named_children()):
        if fits(child):
            setattr(module, name, FixedDepthwise(child))
        else:
            fix_depthwise(child)
