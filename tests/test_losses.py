"""Losses against numbers computed by hand and against plain formulas."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.data.vocabulary import BACKGROUND, HELD_OUT, VOID
from train.losses import Processes, attention_loss, distillation_loss, focal_sum, mask_loss


def plain_focal(logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    probability = logits.sigmoid()
    p_t = torch.where(target, probability, 1 - probability)
    alpha_t = torch.where(target, alpha, 1 - alpha)
    return -alpha_t * (1 - p_t) ** gamma * p_t.log()


def assert_equal_with_gradients(value: Tensor, expected: Tensor, logits: Tensor) -> None:
    gradient, expected_gradient = (torch.autograd.grad(3 * each, logits)[0] for each in (value, expected))
    torch.testing.assert_close((value, gradient), (expected, expected_gradient))


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.9, 1.5), (0.25, 0.0)])
def test_focal_and_its_gradient_equal_the_formula(alpha: float, gamma: float) -> None:
    logits = (torch.randn(70, 5, 6, dtype=torch.float64) * 4).requires_grad_()  # more rows than one slice
    target, weight = torch.rand(70, 5, 6) < 0.3, torch.rand(70, 5, 6, dtype=torch.float64)
    expected = (plain_focal(logits, target, alpha, gamma) * weight).sum()
    assert_equal_with_gradients(focal_sum(logits, target, weight, alpha=alpha, gamma=gamma), expected, logits)


def test_focal_of_extreme_logits_is_finite() -> None:
    logits = torch.tensor([[[200.0, -200.0]]], requires_grad=True)
    value = focal_sum(logits, torch.tensor([[[False, True]]]), torch.ones(1, 1, 2))
    value.backward()
    assert value.item() == pytest.approx(200.0) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("normalise", ["masks", "pairs"])
def test_mask_loss_upsamples_and_ignores_what_does_not_count(normalise: str) -> None:
    labels = torch.randint(-3, 3, (2, 8, 8))
    annotated = torch.tensor([[True, True, True, False], [True, False, True, True]])
    labels[1][labels[1] == 1] = VOID
    logits = torch.randn(2, 4, 4, 4, requires_grad=True)
    loss = mask_loss(logits, labels, annotated, alpha=0.4, gamma=1.5, normalise=normalise)
    large = F.interpolate(logits, size=(8, 8), mode="bilinear", align_corners=False)
    focal, dice, pixels = [], [], []
    for photo, name in annotated.nonzero().tolist():
        valid = (labels[photo] != VOID) & (labels[photo] != HELD_OUT)
        guess, truth = large[photo, name].sigmoid()[valid], (labels[photo] == name)[valid].float()
        focal.append(plain_focal(large[photo, name], labels[photo] == name, 0.4, 1.5)[valid].sum())
        pixels.append(int(valid.sum()))
        if truth.any():
            dice.append(1 - (2 * (guess * truth).sum() + 1) / (guess.sum() + truth.sum() + 1))
    means = torch.stack(focal) / torch.tensor(pixels)
    expected = means.sum() / len(dice) if normalise == "masks" else sum(focal) / sum(pixels)
    torch.testing.assert_close((loss.focal, loss.dice), (expected, sum(dice) / len(dice)))
    (loss.focal + loss.dice).backward()
    assert (logits.grad[~annotated] == 0).all() and (logits.grad[annotated] != 0).any()


def test_the_loss_without_annotated_names_is_zero() -> None:
    for annotated in (torch.zeros(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)):  # and all pixels void
        logits = torch.randn(1, 2, 2, 2, requires_grad=True)
        loss = mask_loss(logits, torch.full((1, 4, 4), VOID), annotated)
        (loss.focal + loss.dice).backward()
        assert loss.focal.item() == loss.dice.item() == 0 and (logits.grad == 0).all()


def test_distillation_is_cross_entropy_less_entropy() -> None:
    reference, weight = torch.randn(2, 3, 4, 4), torch.rand(2, 3)
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    target = reference.sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(reference, target, reduction="none")
    expected = ((cross - entropy).mean(dim=(2, 3)) * weight).sum()
    assert_equal_with_gradients(distillation_loss(logits, reference, weight), expected, logits)
    assert distillation_loss(reference, reference, weight).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("normalise", ["masks", "pairs"])
@pytest.mark.parametrize("share", [1, 3])
def test_processes_that_share_photos_have_the_loss_of_one(normalise: str, share: int) -> None:
    """Photos with many masks on one process, with few or none on the other; gradients are averaged as DDP does."""
    labels = torch.randint(-2, 4, (4, 8, 8))
    labels[share:] = BACKGROUND  # the second process has no mask at all
    annotated = torch.rand(4, 4) < 0.7
    annotated[:, 0] = True
    logits = torch.randn(4, 4, 8, 8, requires_grad=True)
    rows = [slice(0, share), slice(share, 4)]
    options = {"normalise": normalise, "void_is_negative": True}

    # What each process would put into a sum over processes, recorded in the order of its calls.
    summands: list[list[Tensor]] = [[], []]
    for part, given in zip(rows, summands, strict=True):
        alone = Processes(total=lambda value, given=given: given.append(value) or value, count=2)
        mask_loss(logits[part], labels[part], annotated[part], processes=alone, **options)
    sums = [sum(values) for values in zip(*summands, strict=True)]  # both have as many sums, or a real run would hang
    parts = []
    for part in rows:
        answers = iter(sums)
        joined = Processes(total=lambda value, answers=answers: next(answers), count=2)
        loss = mask_loss(logits[part], labels[part], annotated[part], processes=joined, **options)
        parts.append((loss.focal + loss.dice) / 2)
    whole = mask_loss(logits, labels, annotated, **options)
    assert_equal_with_gradients(sum(parts), whole.focal + whole.dice, logits)


def slow_attention_loss(logits: Tensor, labels: Tensor, annotated: Tensor) -> float:
    """Pixel by pixel, for logits that need no upsampling."""
    losses = []
    for photo, y, x in product(*map(range, labels.shape)):
        chosen, label = annotated[photo].nonzero()[:, 0].tolist(), int(labels[photo, y, x])
        if len(chosen) > 1 and label not in (VOID, HELD_OUT):
            attention = logits[photo, chosen, y, x].double().softmax(dim=0).log()
            uniform = float(attention.mean()) + math.log(len(chosen))
            losses.append(-float(attention[chosen.index(label)]) if label >= 0 else -uniform)
    return sum(losses) / len(losses)


def test_attention_loss_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, 6, generator=generator) * 3
    annotated = torch.tensor([[1, 1, 1, 0, 1], [0, 0, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()  # the second: one name alone
    labels = torch.tensor([[0, 2, 4, BACKGROUND, VOID, HELD_OUT], [2, 2, BACKGROUND, 2, 2, VOID], [0, 1, BACKGROUND] * 2])
    labels = labels[:, None].expand(-1, 4, -1)
    expected = slow_attention_loss(logits, labels, annotated)
    assert attention_loss(logits, labels, annotated).item() == pytest.approx(expected, rel=1e-5)
    logits.requires_grad_(True)
    attention_loss(logits, labels, annotated).backward()
    assert logits.grad.isfinite().all() and not logits.grad[~annotated].any() and not logits.grad[1].any()
