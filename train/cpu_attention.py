"""Faster attention for training open_clip's own modules on a CPU (the towers of lite; see train/lite).

PyTorch's fused `scaled_dot_product_attention` saves memory, but on a CPU its backward pass in bfloat16 is about ten times
slower than the three plain operations it stands for (measured with torch 2.14 for the shapes of lite: 424 against 27 ms for
401 x 401 tokens, 201 against 18 ms for LCSA's windows). Memory is no concern at these sizes. The project's own modules choose
by themselves (`ldvc.modeling.attention.attend`) and need none of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(d) + mask) V, with the signature of `scaled_dot_product_attention`, without dropout.

    Args:
        query: (..., N, d). key: (..., M, d). value: (..., M, e).
        attn_mask: broadcastable to (..., N, M); booleans (True = may attend) or numbers that are added to the scores.

    Returns:
        (..., N, e).
    """
    assert dropout_p == 0.0 and not is_causal, "only what the towers and decoders use"
    # A key that is a view of several heads would otherwise be copied element by element after the transposition.
    transposed_key = key.contiguous().transpose(-2, -1)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ transposed_key
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(dim=-1) @ value


@contextmanager
def fast_attention() -> Iterator[None]:
    """While open, every module that calls `F.scaled_dot_product_attention` gets the plain form for tensors on a CPU."""
    fused = F.scaled_dot_product_attention

    def choose(query: Tensor, *arguments: Tensor | float | None, **options: Tensor | float | None) -> Tensor:
        return (plain_attention if query.device.type == "cpu" else fused)(query, *arguments, **options)

    F.scaled_dot_product_attention = choose
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused
