"""The decoders: from patch features and class embeddings to mask logits. Three arms behind one interface.

Inside a decoder both are multiplied by sqrt(d), so that unit vectors have elements of about 1 and a residual branch with a
small gate is a small change; only `zegclip` in its published form takes them as they are. Logits are computed in float32, also
under autocast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldvc.config import ModelConfig
from ldvc.modeling.attention import (
    CrossAttention,
    RoutedSelfAttention,
    Routing,
    attention_scores,
    init_identity,
    init_normal,
)

PUBLISHED_DROPOUT = 0.1  # of ZegCLIP's decoder


@dataclass(frozen=True)
class DecoderOutput:
    """What a decoder returns.

    Attributes:
        mask_logits: (B, C, h, w), one sigmoid per name, float32.
        patch_features: (B, N, d), as they leave the decoder.
        class_embeddings: (B, C, d), as they leave the decoder: anchors of the logits.
        cross_attention: for each layer (B, heads, C, h, w), softmax over the C names, or None if not asked for. The arms
            can be compared on this scale: `zegclip` itself takes its softmax over patches, and here is the softmax over
            names of the same scores.
        routing: for each layer with LCSA, or None if not asked for or without LCSA.
        patch_features_before, class_embeddings_before: the same two as they came in, so that one sees which of them a
            decoder moves. References, not copies.
    """

    mask_logits: Tensor
    patch_features: Tensor
    class_embeddings: Tensor
    cross_attention: list[Tensor] | None = None
    routing: list[Routing] | None = None
    patch_features_before: Tensor | None = None
    class_embeddings_before: Tensor | None = None


def build_decoder(config: ModelConfig, width: int, *, scale: float, bias: float) -> nn.Module:
    """The decoder of an arm.

    Args:
        config: `config.arm` chooses.
        width: d.
        scale, bias: of CLIP's own sigmoid logits, where `config.start_at_clip` starts.
    """
    if config.arm == "zegclip":
        return ZegClipDecoder(config, width, scale=scale, bias=bias)
    return LocalConsensusDecoder(config, width, scale=scale, bias=bias)


def _feed_forward(width: int, ratio: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))


class Gate(nn.Module):
    """A learnable factor per channel on a residual branch (the LayerScale of Touvron et al., 2021).

    Args:
        width: channels.
        init: first value, or None for no gate at all.
    """

    def __init__(self, width: int, init: float | None) -> None:
        super().__init__()
        self.weight = None if init is None else nn.Parameter(torch.full((width,), float(init)))

    def forward(self, branch: Tensor) -> Tensor:
        return branch if self.weight is None else self.weight * branch


class LocalConsensusBlock(nn.Module):
    """V <- V + LCSA(LN V); V <- V + CrossAttn(Q = LN V, K = V = T); V <- V + FFN(LN V), each branch gated."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.self_attention = None
        if config.arm == "ldvc":
            self.self_norm = nn.LayerNorm(width)
            self.self_attention = RoutedSelfAttention(
                width,
                config.decoder_heads,
                regions=config.regions,
                topk=config.topk,
                local_conv=config.local_conv,
                init=config.branch_init,
            )
            self.self_gate = Gate(width, config.first_lcsa_gate)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = CrossAttention(width, config.decoder_heads, init=config.branch_init)
        self.cross_gate = Gate(width, config.gate_init)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = _feed_forward(width, config.ffn_ratio)
        self.ffn_gate = Gate(width, config.gate_init)

    def forward(
        self,
        patches: Tensor,
        classes: Tensor,
        grid: tuple[int, int],
        *,
        return_attention: bool = False,
        skip_lcsa: bool = False,
    ) -> tuple[Tensor, Tensor | None, Routing | None]:
        """Patches (B, N, d) and classes (B, C, d) -> patches, scores (B, heads, N, C) or None, routing or None."""
        routing = None
        if self.self_attention is not None and not skip_lcsa:
            branch, routing = self.self_attention(self.self_norm(patches), grid, return_routing=return_attention)
            patches = patches + self.self_gate(branch)
        branch, scores = self.cross_attention(self.cross_norm(patches), classes, return_scores=return_attention)
        patches = patches + self.cross_gate(branch)
        patches = patches + self.ffn_gate(self.ffn(self.ffn_norm(patches)))
        return patches, scores, routing


class LocalConsensusDecoder(nn.Module):
    """Arms `ldvc` and `ldvc_without_lcsa`: patches learn from each other and from the names; the names stay fixed.

    Mask logits are V_out . T^T * scale + bias, V_out of unit length where `normalize_output`. Scale (as its logarithm)
    and bias are learnable; the paper leaves them open, and we start from CLIP's own.
    """

    def __init__(self, config: ModelConfig, width: int, *, scale: float, bias: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LocalConsensusBlock(config, width) for _ in range(config.decoder_layers))
        self.normalize_output = config.normalize_output
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(
        self,
        patch_features: Tensor,
        class_embeddings: Tensor,
        grid: tuple[int, int],
        *,
        return_attention: bool = False,
        skip_lcsa: bool = False,
    ) -> DecoderOutput:
        """Decode.

        Args:
            patch_features: (B, N, d), L2-normalised.
            class_embeddings: (B, C, d), from the text adapter.
            grid: (h, w), N = h * w.
            return_attention: also return cross-attention and routing; they cost nothing when not asked for.
            skip_lcsa: leave LCSA out. An intervention in a model that was trained with it, not the arm
                `ldvc_without_lcsa`, which was trained without.
        """
        unit = patch_features.shape[-1] ** 0.5
        patches, classes = patch_features.float() * unit, class_embeddings.float() * unit
        attentions, routings = [], []
        for block in self.blocks:
            patches, scores, routing = block(
                patches, classes, grid, return_attention=return_attention, skip_lcsa=skip_lcsa
            )
            if scores is not None:
                weights = scores.softmax(dim=-1)  # (B, heads, N, C)
                attentions.append(rearrange(weights, "b heads (h w) c -> b heads c h w", h=grid[0]))
            if routing is not None:
                routings.append(routing)
        with torch.autocast(patches.device.type, enabled=False):
            patches = F.normalize(patches.float(), dim=-1) if self.normalize_output else patches.float() / unit
            similarity = class_embeddings.float() @ patches.transpose(1, 2)  # (B, C, N)
            logits = similarity * self.log_scale.exp() + self.bias
        return DecoderOutput(
            mask_logits=logits.unflatten(-1, grid),
            patch_features=patches,
            class_embeddings=class_embeddings,
            cross_attention=attentions if return_attention else None,
            routing=routings or None,
            patch_features_before=patch_features,
            class_embeddings_before=class_embeddings,
        )


class ZegClipBlock(nn.Module):
    """Post-norm cross-attention of names to patches, then FFN: T <- T + g * (LN(T + branch(T)) - T).

    Without gate (g = 1) that is the published LN(T + branch(T)); with g = 0 it is the identity. Where nothing starts at CLIP,
    activation and dropout are the published ones, too.
    """

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        dropout = 0.0 if config.start_at_clip else PUBLISHED_DROPOUT
        self.cross_attention = CrossAttention(width, config.decoder_heads, init=config.branch_init, dropout=dropout)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_gate = Gate(width, config.gate_init)
        self.ffn = _feed_forward(width, config.ffn_ratio)
        if not config.start_at_clip:
            self.ffn[1] = nn.Sequential(nn.ReLU(), nn.Dropout(dropout))
        self.dropout = nn.Dropout(dropout)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_gate = Gate(width, config.gate_init)

    def forward(self, classes: Tensor, patches: Tensor, *, return_scores: bool = False) -> tuple[Tensor, Tensor | None]:
        """Classes (B, C, d) and patches (B, N, d) -> classes, and scores (B, heads, C, N) or None."""
        branch, scores = self.cross_attention(classes, patches, return_scores=return_scores)
        classes = classes + self.cross_gate(self.cross_norm(classes + self.dropout(branch)) - classes)
        classes = classes + self.ffn_gate(self.ffn_norm(classes + self.dropout(self.ffn(classes))) - classes)
        return classes, scores


class ZegClipDecoder(nn.Module):
    """Arm `zegclip` (Zhou et al., "ZegCLIP", 2023): names are queries, patches keys and values.

    Masks are the mean over heads of the last layer's scores before the softmax. What the last layer would do with values and
    feed-forward network reaches no mask, so those parts are not built (2.6M of the published model's parameters, beside the
    3.15M of self-attentions that it holds and never calls; tests/test_zegclip_parity.py counts them).
    The scores get a learnable scale and bias; where `start_at_clip`, query and key start as identities and scale and bias so
    that logits are CLIP's own. Otherwise this is the published form, as its authors' code has it: unit vectors go in as they
    are, layers have ReLU and dropout, linear layers start small, and masks are the bare scores.
    """

    def __init__(self, config: ModelConfig, width: int, *, scale: float, bias: float) -> None:
        super().__init__()
        self.heads, self.unit = config.decoder_heads, width**0.5 if config.start_at_clip else 1.0
        assert width % self.heads == 0, f"{self.heads} heads do not divide a width of {width}"
        self.blocks = nn.ModuleList(ZegClipBlock(config, width) for _ in range(config.decoder_layers - 1))
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        if config.start_at_clip:
            init_identity(self.query)
            init_identity(self.key)
            # mean over heads of q_h . k_h / sqrt(d_head), with |q| = |k| = sqrt(d), is sqrt(d_head) * cosine
            scale = scale / math.sqrt(width // self.heads)
        else:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    init_normal(module)
            scale, bias = 1.0, 0.0
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(
        self,
        patch_features: Tensor,
        class_embeddings: Tensor,
        grid: tuple[int, int],
        *,
        return_attention: bool = False,
        skip_lcsa: bool = False,
    ) -> DecoderOutput:
        """Decode; arguments as of `LocalConsensusDecoder`. There is no LCSA to skip here."""
        patches, classes = patch_features.float() * self.unit, class_embeddings.float() * self.unit
        all_scores = []
        for block in self.blocks:
            classes, scores = block(classes, patches, return_scores=return_attention)
            all_scores.append(scores)
        query, key = self.query(classes), self.key(patches)  # (B, C, d), (B, N, d)
        head_width = query.shape[-1] // self.heads
        with torch.autocast(query.device.type, enabled=False):
            # the sum of q_h . k_h over heads is q . k, so the mean needs no heads
            mean_score = query.float() @ key.float().transpose(1, 2) / (self.heads * head_width**0.5)  # (B, C, N)
            logits = mean_score * self.log_scale.exp() + self.bias

        over_names = None
        if return_attention:
            split = "b n (heads c) -> b heads n c"
            last = attention_scores(rearrange(query, split, heads=self.heads), rearrange(key, split, heads=self.heads))
            all_scores.append(last)  # (B, heads, C, N)
            over_names = [scores.softmax(dim=2).unflatten(-1, grid) for scores in all_scores]
        return DecoderOutput(
            mask_logits=logits.unflatten(-1, grid),
            patch_features=patch_features,
            class_embeddings=classes / self.unit,
            cross_attention=over_names,
            patch_features_before=patch_features,
            class_embeddings_before=class_embeddings,
        )
