"""The text adapter against its equation."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ldvc.modeling.adapter import TextAdapter


def test_starts_as_the_identity() -> None:
    classes, pictures = F.normalize(torch.randn(5, 16), dim=-1), F.normalize(torch.randn(3, 16), dim=-1)
    adapted = TextAdapter(16)(classes, pictures)
    torch.testing.assert_close(adapted, classes.expand(3, 5, 16))


def test_is_a_linear_layer_on_the_concatenation() -> None:
    classes, pictures = F.normalize(torch.randn(5, 16), dim=-1), F.normalize(torch.randn(3, 16), dim=-1)
    adapter = TextAdapter(16, start_at_identity=False)
    adapted = adapter(classes, pictures)
    for b in range(3):
        for c in range(5):
            expected = adapter.linear(torch.cat([classes[c] * pictures[b], classes[c]]))
            torch.testing.assert_close(adapted[b, c], expected, atol=1e-6, rtol=1e-5)


def test_stays_in_float32_under_autocast() -> None:
    classes, pictures = torch.randn(5, 16), torch.randn(3, 16)
    adapter = TextAdapter(16, start_at_identity=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = adapter(classes, pictures)
    torch.testing.assert_close(under_autocast, adapter(classes, pictures))
