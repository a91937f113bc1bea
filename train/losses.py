"""Losses: focal and dice on sigmoid masks (ZegCLIP's, which the paper follows), and distillation of the frozen towers.

The element-wise parts are autograd functions that compute value and gradient in one pass over small slices. On a CPU the mask
loss of a hundred names would otherwise cost as much as the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.data.vocabulary import HELD_OUT, VOID

_ROWS = 32  # masks per slice: a slice and its temporaries stay inside a core's cache


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) from exp and log, which are vectorised on a CPU where `F.softplus` is ten times slower; error < 1e-7."""
    return x.clamp(min=0) + torch.log(1 + torch.exp(-x.abs()))


class _FocalSum(torch.autograd.Function):
    """sum over elements of weight * focal(logits, target), with its gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, weight: Tensor, alpha: float, gamma: float) -> Tensor:
        total = logits.new_zeros(())
        gradient = torch.empty_like(logits)
        for start in range(0, logits.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            sign = 1 - 2 * target[rows].to(logits.dtype)  # -1 where the pixel belongs to the class
            z = logits[rows] * sign
            q = torch.sigmoid(z)  # 1 - p_t
            cross_entropy = _softplus(z)
            balance = weight[rows] * (0.5 + sign * (0.5 - alpha))  # alpha on positives, 1 - alpha on negatives
            # focal = a_t q^gamma CE; d/dz = a_t q^gamma (gamma (1 - q) CE + q), because dq/dz = q (1 - q), dCE/dz = q
            modulated = balance * (q * q if gamma == 2 else q**gamma)
            total += (modulated * cross_entropy).sum()
            gradient[rows] = sign * modulated * (gamma * (1 - q) * cross_entropy + q)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None


class _DivergenceSum(torch.autograd.Function):
    """sum over elements of weight * KL(Bernoulli(sigmoid(reference)) || Bernoulli(sigmoid(logits)))."""

    @staticmethod
    def forward(ctx, logits: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
        p = torch.sigmoid(reference)
        # BCE(logits, p) - entropy(p), with BCE = softplus(x) - p x
        divergence = _softplus(logits) - _softplus(reference) - p * (logits - reference)
        ctx.save_for_backward(weight * (torch.sigmoid(logits) - p))
        return (weight * divergence).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


def focal_sum(logits: Tensor, target: Tensor, weight: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Weighted sum of the sigmoid focal loss (Lin et al., "Focal Loss for Dense Object Detection", 2017, equation 5).

    Args:
        logits: (P, H, W) float32. target: (P, H, W) bool. weight: (P, H, W) float32, without gradient.
        alpha: weight of positives; negatives have 1 - alpha. gamma: exponent of the probability of being wrong.
    """
    return _FocalSum.apply(logits, target, weight, alpha, gamma)


def dice_per_mask(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """(P,): 1 - (2 |P n T| + 1) / (|P| + |T| + 1) for each mask, on soft predictions (the form ZegCLIP uses).

    Args:
        logits: (P, H, W). target, valid: (P, H, W) bool; pixels that are not valid are left out.
    """
    probability = (torch.sigmoid(logits) * valid).flatten(1)
    truth = (target & valid).flatten(1).to(probability.dtype)
    overlap = (probability * truth).sum(dim=1)
    return 1 - (2 * overlap + 1) / (probability.sum(dim=1) + truth.sum(dim=1) + 1)


@dataclass(frozen=True)
class Processes:
    """How the processes of a run share one loss.

    A loss is a sum over photos divided by a count over photos (of masks, of pixels). Gradients are averaged over processes. So
    each process divides the sum over its own photos by the mean count of all processes, which gives the loss of one process
    with all photos.
    """

    total: Callable[[Tensor], Tensor] = lambda value: value  # scalar -> its sum over all processes, without gradient
    count: int = 1  # number of processes

    def share(self, value: Tensor, *, at_least: int = 1) -> Tensor:
        """The mean over processes of a count. The sum is set to `at_least` if it is smaller."""
        return self.total(value.float()).clamp(min=at_least) / self.count


ONE_PROCESS = Processes()


class MaskLoss(NamedTuple):
    """The two parts of the mask loss, scalars that are not yet weighted; both zero when nothing is annotated."""

    focal: Tensor
    dice: Tensor


def mask_loss(
    mask_logits: Tensor,
    labels: Tensor,
    annotated: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    void_is_negative: bool = False,
    normalise: str = "masks",
    processes: Processes = ONE_PROCESS,
) -> MaskLoss:
    """Focal and dice loss of the (photo, name) pairs that have a label.

    Logits are upsampled to the size of the labels. Focal covers every annotated pair, dice those whose name is in the photo.

    Args:
        mask_logits: (B, C, h, w), patch resolution.
        labels: (B, H, W) integer: index of the C names, VOID, HELD_OUT, or another negative number for "none of them". HELD_OUT
            pixels (of a held-out class, in self-training) are ignored.
        annotated: (B, C) bool: the photo's data set labels this name.
        void_is_negative: void pixels are negatives of every name, as in ZegCLIP; otherwise they are ignored.
        normalise: "masks": each pair's pixel mean, summed, over the number of masks that are present, at least one per process
            (ZegCLIP's code: the more names, the larger the loss); "pairs": the mean over all pixels of all annotated pairs.
        processes: the processes that share the loss.
    """
    photo, name = annotated.nonzero(as_tuple=True)  # (P,), (P,)
    flat = photo * mask_logits.shape[1] + name
    pairs = mask_logits.flatten(0, 1).index_select(0, flat).float()  # (P, h, w)
    size = labels.shape[-2:]
    if pairs.shape[-2:] != size:
        pairs = F.interpolate(pairs[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]  # (P, H, W)
    target = labels[photo] == name[:, None, None]  # (P, H, W)
    valid = (labels != HELD_OUT) & ((labels != VOID) | void_is_negative)  # (B, H, W)
    pixels = valid.flatten(1).sum(dim=1).float()  # (B,)
    present = target.flatten(1).any(dim=1)  # (P,)
    masks = processes.share(present.sum(), at_least=processes.count if normalise == "masks" else 1)
    if normalise == "masks":
        share = 1 / (pixels.clamp(min=1) * masks)  # (B,)
    else:
        share = (1 / processes.share(pixels[photo].sum())).expand_as(pixels)
    weight = valid * share[:, None, None]  # (B, H, W)
    focal = focal_sum(pairs, target, weight[photo], alpha=alpha, gamma=gamma)

    chosen = present.nonzero(as_tuple=True)[0]
    dice = dice_per_mask(pairs.index_select(0, chosen), target[chosen], valid[photo[chosen]]).sum() / masks
    return MaskLoss(focal=focal, dice=dice)


def attention_loss(mask_logits: Tensor, labels: Tensor, annotated: Tensor, *, processes: Processes = ONE_PROCESS) -> Tensor:
    """Cross-entropy of the attention to names, the softmax over names of the mask logits; in nats per pixel.

        -log A_y                          if the label of the pixel is the name y
        -mean_c log A_c - log C           if it is none of the C names: a uniform attention has no loss

    The sigmoid losses do not compare the logits of absent names, so the softmax of a pixel without a name could be peaked. The
    paper has no such loss; we use it for lite. Arguments as in `mask_loss`; the softmax is over the annotated names.
    """
    size = labels.shape[-2:]
    logits = F.interpolate(mask_logits.float(), size=size, mode="bilinear", align_corners=False)
    annotated = annotated & (annotated.sum(dim=1, keepdim=True) > 1)  # the attention to a single name is always 1
    logits = logits.masked_fill(~annotated[:, :, None, None], -1e4)
    attention = logits.log_softmax(dim=1)  # (B, C, H, W)
    names = annotated.sum(dim=1).clamp(min=1)[:, None, None]  # (B, 1, 1)
    named = -attention.gather(1, labels.clamp(min=0)[:, None].long())[:, 0]  # (B, H, W)
    uniform = -(attention * annotated[:, :, None, None]).sum(dim=1) / names - names.log()
    counted = (labels != VOID) & (labels != HELD_OUT) & annotated.any(dim=1)[:, None, None]
    loss = torch.where(labels >= 0, named, uniform) * counted
    return loss.sum() / processes.share(counted.sum())


@torch.no_grad()
def pseudo_labels(mask_logits: Tensor, labels: Tensor, candidates: Tensor) -> Tensor:
    """Self-training of the transductive setting: held-out pixels get the held-out name with the highest logit.

        y(p) = argmax_{c in U} S_c(p)     where labels(p) is HELD_OUT

    with S the mask logits (B, C, h, w) at the size of the labels (B, H, W), and U the held-out names that the photo's
    data set has, `candidates` (B, C). As in ZegCLIP's code, exactly the pixels of held-out classes are relabelled (the
    setting reveals which these are; background and border stay void), and a seen name is never a pseudo-label.
    """
    columns = candidates.any(dim=0).nonzero(as_tuple=True)[0]  # (U,)
    if not len(columns):
        return labels
    # Not -inf, which times an interpolation weight of zero would be NaN.
    logits = mask_logits.index_select(1, columns).float().masked_fill(~candidates[:, columns, None, None], -1e4)
    logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(labels == HELD_OUT, columns[logits.argmax(dim=1)].to(labels.dtype), labels)


def distillation_loss(mask_logits: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    """Distance of the decoder from the frozen towers: BCE(logits, sigmoid(reference)) less its minimum, in nats per patch.

    The minimum, the entropy of the reference, is constant; so the gradient is that of the binary cross-entropy.

    Args:
        mask_logits: (B, C, h, w) of the decoder. reference: logits of the frozen towers (plain similarity), no gradient.
        weight: (B, C) of each (photo, name) pair. The loss is the sum of weight * mean over patches.
    """
    patches = mask_logits.shape[-1] * mask_logits.shape[-2]
    return _DivergenceSum.apply(mask_logits.float(), reference.float(), (weight / patches)[:, :, None, None])
