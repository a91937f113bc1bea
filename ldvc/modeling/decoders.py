"""The decoders: from patch features and class embeddings to mask logits. Three decoders behind one interface.

The mask logits of all decoders are the scores of the last cross-attention before the softmax, averaged over heads, plus a bias
in the recipe clip_start (`MaskScores`). The attention of the last layer is therefore the segmentation. In `ldvc` and
`ldvc_without_lcsa`, patches are queries and class embeddings are keys; in `zegclip` it is the opposite.

Inside a decoder patches and class embeddings are multiplied by sqrt(d): unit vectors then have elements of about 1, and a
residual branch with a small gate is a small change. Only `zegclip` in the recipe published takes unit vectors. Scores are
computed in float32, also under autocast.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from ldvc.config import ModelConfig
from ldvc.modeling.attention import CrossAttention, RoutedSelfAttention, Routing, attention_scores, init_identity

PUBLISHED_DROPOUT = 0.1  # of ZegCLIP's decoder


@dataclass(frozen=True)
class DecoderOutput:
    """The output of a decoder.

    `cross_attention` are the scores of each layer before the softmax; the mean over heads of the last ones is `mask_logits`.
    The displayed attention is a softmax over classes for every decoder (see `Segmentation.cross_attention`), although
    `zegclip` itself applies the softmax over patches.
    """

    mask_logits: Tensor  # (B, C, h, w), one sigmoid per class, float32
    patch_features: Tensor  # (B, N, d), as they enter the last cross-attention, before its norm
    class_embeddings: Tensor  # (B, C, d), as they enter the last cross-attention
    cross_attention: list[Tensor] | None = None  # of (B, heads, C, h, w), float32; None if not requested
    routing: list[Routing] | None = None  # for each layer with LCSA; None if not requested or without LCSA
    patch_features_before: Tensor | None = None  # inputs of the decoder; references, not copies
    class_embeddings_before: Tensor | None = None


def build_decoder(config: ModelConfig, width: int, *, scale: float, bias: float) -> nn.Module:
    """The decoder that `config.decoder` names, of width d; clip_start starts at CLIP's own `scale * cosine + bias`."""
    kind = ZegClipDecoder if config.decoder == "zegclip" else LocalConsensusDecoder
    return kind(config, width, scale=scale, bias=bias)


def _feed_forward(width: int, ratio: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))


class Gate(nn.Module):
    """A learnable factor per channel on a residual branch (LayerScale, Touvron et al., 2021); `init` None = no gate."""

    def __init__(self, width: int, init: float | None) -> None:
        super().__init__()
        self.weight = None if init is None else nn.Parameter(torch.full((width,), float(init)))

    def forward(self, branch: Tensor) -> Tensor:
        return branch if self.weight is None else self.weight * branch


class MaskScores(nn.Module):
    """The last cross-attention, of which only the scores are used: S = mean over heads of (W_q x)(W_k y)^T / sqrt(d_h) + bias.

    Values, output projection and feed-forward network of that layer would not affect the masks, so they are not built. The
    temperature is part of W_q. If the decoder starts at CLIP, W_k is the identity and W_q a scaled identity. Then S is the
    logit of CLIP, scale * cosine + bias, for inputs of length sqrt(d).
    """

    def __init__(self, config: ModelConfig, width: int, *, scale: float, bias: float) -> None:
        super().__init__()
        self.heads = heads = config.decoder_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.tensor(float(bias))) if config.parts.score_bias else None
        if config.parts.starts_at_clip:
            init_identity(self.key)
            # with |x| = |y| = sqrt(d), the mean over heads of x_h . y_h / sqrt(d_h) is sqrt(d_h) * cosine
            init_identity(self.query, factor=scale / math.sqrt(width // heads))

    def forward(self, queries: Tensor, keys: Tensor, *, return_scores: bool = False) -> tuple[Tensor, Tensor | None]:
        """Queries (B, N, d) and keys (B, M, d) -> mask logits (B, N, M), and scores (B, heads, N, M) or None."""
        query, key = self.query(queries), self.key(keys)
        scale = (query.shape[-1] // self.heads) ** -0.5 / self.heads
        with torch.autocast(query.device.type, enabled=False):
            # the sum over heads of q_h . k_h is q . k, so the mean needs no heads
            logits = query.float() @ key.float().mT * scale
        scores = None
        if return_scores:
            query, key = (rearrange(x, "b n (heads c) -> b heads n c", heads=self.heads) for x in (query, key))
            scores = attention_scores(query, key)
        if self.bias is None:
            return logits, scores
        return logits + self.bias, None if scores is None else scores + self.bias


class LocalConsensus(nn.Module):
    """V <- V + g * LCSA(LN V): patches attend to patches of related regions. `gate`: first value of g, None = no gate."""

    def __init__(self, config: ModelConfig, width: int, *, gate: float | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        options = {"regions": config.regions, "topk": config.topk, "local_conv": config.local_conv}
        start = config.parts.starts_at_clip
        self.attention = RoutedSelfAttention(width, config.decoder_heads, start_at_identity=start, **options)
        self.gate = Gate(width, gate)

    def forward(self, patches: Tensor, grid: tuple[int, int], **options: bool) -> tuple[Tensor, Routing | None]:
        """Patches (B, N, d) -> patches, and routing or None; arguments as for `RoutedSelfAttention.forward`."""
        branch, routing = self.attention(self.norm(patches), grid, **options)
        return patches + self.gate(branch), routing


class ClassGuidance(nn.Module):
    """V <- V + g * CrossAttn(Q = LN V, K = V = T); V <- V + g * FFN(LN V): patches are guided by the class embeddings."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = CrossAttention(width, config.decoder_heads, start_at_identity=config.parts.starts_at_clip)
        self.cross_gate = Gate(width, config.parts.gate)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = _feed_forward(width, config.ffn_ratio)
        self.ffn_gate = Gate(width, config.parts.gate)

    def forward(self, patches: Tensor, classes: Tensor, *, return_scores: bool = False) -> tuple[Tensor, Tensor | None]:
        """Patches (B, N, d) and classes (B, C, d) -> patches, and scores (B, heads, N, C) or None."""
        branch, scores = self.cross_attention(self.cross_norm(patches), classes, return_scores=return_scores)
        patches = patches + self.cross_gate(branch)
        return patches + self.ffn_gate(self.ffn(self.ffn_norm(patches))), scores


class LocalConsensusDecoder(nn.Module):
    """Decoders `ldvc` and `ldvc_without_lcsa`: patches attend to each other and to the classes, whose embeddings are constant.

    L blocks of LCSA (left out in `ldvc_without_lcsa`), cross-attention to the class embeddings and feed-forward network; the
    last block ends at the scores of its cross-attention, which are the mask logits:

        S = mean over heads of (W_q LN V)(W_k T)^T / sqrt(d_h) + bias

    The paper's text leaves open how masks are read from the decoder; we follow ZegCLIP, whose masks are attention scores, too.
    """

    def __init__(self, config: ModelConfig, width: int, *, scale: float, bias: float) -> None:
        super().__init__()
        layers = config.decoder_layers
        with_lcsa = config.decoder == "ldvc"
        # The LCSA right before the masks matters most, so its gate may start larger than the others.
        last_gate = config.lcsa_gate_init if config.parts.starts_at_clip else None
        gates = [config.parts.gate] * (layers - 1) + [last_gate] if with_lcsa else []
        self.consensus = nn.ModuleList(LocalConsensus(config, width, gate=gate) for gate in gates)
        self.guidance = nn.ModuleList(ClassGuidance(config, width) for _ in range(layers - 1))
        self.mask_norm = nn.LayerNorm(width)
        self.mask_scores = MaskScores(config, width, scale=scale, bias=bias)

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
            return_attention: also return the scores of cross-attention and the routing.
            skip_lcsa: leave LCSA out of a model that was trained with it (`ldvc_without_lcsa` was trained without).
        """
        unit = patch_features.shape[-1] ** 0.5
        patches, classes = patch_features.float() * unit, class_embeddings.float() * unit
        all_scores, routings = [], []
        for layer in range(len(self.guidance) + 1):
            if self.consensus and not skip_lcsa:
                patches, routing = self.consensus[layer](patches, grid, return_routing=return_attention)
                routings.append(routing)
            if layer < len(self.guidance):
                patches, scores = self.guidance[layer](patches, classes, return_scores=return_attention)
                all_scores.append(scores)
        logits, scores = self.mask_scores(self.mask_norm(patches), classes, return_scores=return_attention)
        all_scores.append(scores)
        maps = "b heads (h w) c -> b heads c h w"
        return DecoderOutput(
            mask_logits=rearrange(logits, "b (h w) c -> b c h w", h=grid[0]),
            patch_features=patches / unit,
            class_embeddings=class_embeddings,
            cross_attention=[rearrange(s, maps, h=grid[0]) for s in all_scores] if return_attention else None,
            routing=routings if return_attention and routings else None,
            patch_features_before=patch_features,
            class_embeddings_before=class_embeddings,
        )


class ZegClipBlock(nn.Module):
    """Post-norm cross-attention of classes to patches, then FFN: T <- T + g * (LN(T + branch(T)) - T).

    Without gate (g = 1) that is the published LN(T + branch(T)); with g = 0 it is the identity. The recipe published
    also has the published activation and dropout.
    """

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        at_clip = config.parts.starts_at_clip
        dropout = 0.0 if at_clip else PUBLISHED_DROPOUT
        self.cross_attention = CrossAttention(width, config.decoder_heads, start_at_identity=at_clip, dropout=dropout)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_gate = Gate(width, config.parts.gate)
        self.ffn = _feed_forward(width, config.ffn_ratio)
        if not at_clip:
            self.ffn[1] = nn.Sequential(nn.ReLU(), nn.Dropout(dropout))
        self.dropout = nn.Dropout(dropout)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_gate = Gate(width, config.parts.gate)

    def forward(self, classes: Tensor, patches: Tensor, *, return_scores: bool = False) -> tuple[Tensor, Tensor | None]:
        """Classes (B, C, d) and patches (B, N, d) -> classes, and scores (B, heads, C, N) or None."""
        branch, scores = self.cross_attention(classes, patches, return_scores=return_scores)
        classes = classes + self.cross_gate(self.cross_norm(classes + self.dropout(branch)) - classes)
        classes = classes + self.ffn_gate(self.ffn_norm(classes + self.dropout(self.ffn(classes))) - classes)
        return classes, scores


class ZegClipDecoder(nn.Module):
    """Decoder `zegclip` (Zhou et al., "ZegCLIP", 2023): class embeddings are queries, patches are keys and values.

    Mask logits are the scores of the last layer (`MaskScores`), as in `ldvc`. The published model also has parameters that do
    not affect the masks; tests/test_zegclip_parity.py counts them. The recipe published follows the code of its authors:
    inputs are unit vectors, layers have ReLU and dropout, masks are scores without a bias, and all layers start as copies of
    one layer with PyTorch's initialisation.
    """

    def __init__(self, config: ModelConfig, width: int, *, scale: float, bias: float) -> None:
        super().__init__()
        self.unit = width**0.5 if config.parts.starts_at_clip else 1.0
        self.blocks = nn.ModuleList(ZegClipBlock(config, width) for _ in range(config.decoder_layers - 1))
        self.mask_scores = MaskScores(config, width, scale=scale, bias=bias)
        if self.blocks and not config.parts.starts_at_clip:  # torch's TransformerDecoder copies one layer
            first = self.blocks[0]
            for block in self.blocks[1:]:
                block.load_state_dict(first.state_dict())
            self.mask_scores.query.load_state_dict(first.cross_attention.query.state_dict())
            key_value = first.cross_attention.key_value.state_dict()
            self.mask_scores.key.load_state_dict({name: tensor[:width] for name, tensor in key_value.items()})

    def forward(
        self,
        patch_features: Tensor,
        class_embeddings: Tensor,
        grid: tuple[int, int],
        *,
        return_attention: bool = False,
        skip_lcsa: bool = False,
    ) -> DecoderOutput:
        """Decode; arguments as for `LocalConsensusDecoder`. There is no LCSA to skip here."""
        patches, classes = patch_features.float() * self.unit, class_embeddings.float() * self.unit
        all_scores = []
        for block in self.blocks:
            classes, scores = block(classes, patches, return_scores=return_attention)
            all_scores.append(scores)
        logits, scores = self.mask_scores(classes, patches, return_scores=return_attention)  # (B, C, N)
        all_scores.append(scores)  # (B, heads, C, N)
        return DecoderOutput(
            mask_logits=logits.unflatten(-1, grid),
            patch_features=patch_features,
            class_embeddings=classes / self.unit,
            cross_attention=[scores.unflatten(-1, grid) for scores in all_scores] if return_attention else None,
            patch_features_before=patch_features,
            class_embeddings_before=class_embeddings,
        )
