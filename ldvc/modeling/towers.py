"""The two frozen towers of CLIP with deep prompts: learnable tokens that are replaced at every layer.

Each layer has its own prompts (VPT-deep: Jia et al., "Visual Prompt Tuning", 2022), so the outputs of a layer for its prompts
are unused and prompts only act as keys and values. `run_block` therefore does not compute these outputs. The result is the
same as with inserted tokens, at the cost of M keys instead of M tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from open_clip.model import CLIP
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ldvc.config import RECIPES, Recipe
from ldvc.modeling.attention import attend
from ldvc.modeling.clip import FrozenClip


class ImageFeatures(NamedTuple):
    """Features of pictures in the joint space, not normalised."""

    global_embedding: Tensor  # (B, d)
    patch_features: Tensor  # (B, N, d), row by row
    grid: tuple[int, int]  # (h, w), N = h * w
    patch_attention: Tensor | None = None  # (B, N, N), see `ldvc.modeling.dense`


def run_block(
    block: ResidualAttentionBlock,
    tokens: Tensor,
    *,
    context: Tensor | None = None,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """One frozen open_clip block whose tokens also attend to context tokens: (B, N, width) -> (B, N, width).

    Args:
        block: pre-norm block with `nn.MultiheadAttention`.
        tokens: (B, N, width).
        context: (B or 1, P, width), further keys and values, or None.
        gate: (heads,) or None. None = one softmax over context and tokens, as if the context were inserted into the tokens.
            Otherwise, the context has its own softmax, whose output is multiplied by the gate and added (the zero-initialised
            attention of Zhang et al., "LLaMA-Adapter", 2023); a gate of 0 is the block without context.
        mask: (N, P + N) booleans, True = may attend; without gate only.
    """
    attention = block.attn
    batch, length, width = tokens.shape
    heads = attention.num_heads

    def split(x: Tensor, parts: int) -> tuple[Tensor, ...]:  # (B, N, parts * width) -> parts x (B, heads, N, d_head)
        return x.unflatten(-1, (parts, heads, width // heads)).permute(2, 0, 3, 1, 4).unbind(0)

    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query, key, value = split(F.linear(block.ln_1(tokens), weight, bias), 3)
    if context is not None:
        extra = split(F.linear(block.ln_1(context), weight[width:], None if bias is None else bias[width:]), 2)
        context_key, context_value = (x.expand(batch, -1, -1, -1) for x in extra)  # (B, heads, P, d_head)
        if gate is None:
            key, value = torch.cat([context_key, key], dim=2), torch.cat([context_value, value], dim=2)
    mixed = attend(query, key, value, mask=mask)
    if gate is not None:
        added = attend(query, context_key, context_value)
        mixed = mixed + gate.to(added.dtype)[:, None, None] * added
    mixed = mixed.transpose(1, 2).reshape(batch, length, width)
    tokens = tokens + block.ls_1(attention.out_proj(mixed))
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))


class Tower(nn.Module):
    """A tower of a frozen CLIP, whose parameters are not parameters of this module."""

    def __init__(self, clip: FrozenClip) -> None:
        super().__init__()
        self._clip = (clip,)  # in a tuple, so that it is not registered as a sub-module

    @property
    def clip(self) -> FrozenClip:
        return self._clip[0]


class ImageTower(Tower):
    """CLIP's image tower at any resolution, with M learnable tokens before every layer.

    All `prompts` (M; 0 = none) go through a shared linear projection and dropout, as in ZegCLIP's VPT. Without gates, prompts
    and tokens share one softmax, and random prompts change CLIP's features from the first step. With gates (a learnable one
    per layer and head, see `run_block`), training starts near plain CLIP. A LayerNorm is applied to the prompts or, in the
    recipe published, to the output of the last block before `ln_post`.
    """

    def __init__(
        self, clip: FrozenClip, prompts: int = 10, dropout: float = 0.1, *, recipe: Recipe = RECIPES["clip_start"]
    ) -> None:
        super().__init__(clip)
        visual = clip.visual
        layers, width = len(visual.transformer.resblocks), visual.class_embedding.shape[0]
        self.num_prompts, self.recipe = prompts, recipe
        self._positions: dict[tuple, Tensor] = {}
        if prompts:
            bound = (6.0 / (3 * clip.patch_size**2 + width)) ** 0.5  # Xavier's bound for the patch embedding, as in VPT
            self.prompts = nn.Parameter(torch.empty(layers, prompts, width).uniform_(-bound, bound))
            self.prompt_projection = nn.Linear(width, width)
            nn.init.kaiming_normal_(self.prompt_projection.weight, mode="fan_out")
            if recipe.norm_of_prompts:
                nn.init.zeros_(self.prompt_projection.bias)
            self.prompt_norm = nn.LayerNorm(width, eps=1e-5 if recipe.norm_of_prompts else 1e-6)
            self.prompt_dropout = nn.Dropout(dropout)
            heads = visual.transformer.resblocks[0].attn.num_heads
            self.gate = None if recipe.gate is None else nn.Parameter(torch.full((layers, heads), float(recipe.gate)))

    def statistics(self, *, prompted: bool = True) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation that normalise the input of the patch embedding: the recipe's, or the CLIP's."""
        return (self.recipe.statistics if prompted else None) or (self.clip.mean, self.clip.std)

    @torch.no_grad()
    def embed_patches(self, images: Tensor, *, prompted: bool = True) -> Tensor:
        """Frozen patch embedding (B, width, h, w) of pictures (B, 3, H, W), H and W divisible by the patch size.

        Pictures are normalised with the statistics of the CLIP. If `prompted`, the recipe's replace them.
        """
        height, width = images.shape[-2:]
        patch = self.clip.patch_size
        assert not (height % patch or width % patch), f"{height} x {width} is not whole patches of {patch}"
        before, after = (self.clip.mean, self.clip.std), self.statistics(prompted=prompted)
        if before != after:
            (old_mean, old_std), (mean, std) = (images.new_tensor(each)[..., None, None] for each in (before, after))
            images = (images * old_std + old_mean - mean) / std
        return self.clip.visual.conv1(images)

    def forward(
        self, images: Tensor | None = None, *, patch_tokens: Tensor | None = None, prompted: bool = True
    ) -> ImageFeatures:
        """Features of pictures (B, 3, H, W), or of their patch tokens (B, width, h, w) from `embed_patches`.

        Without prompts it is plain CLIP, which is frozen; only patch tokens can get gradients.
        """
        assert (images is None) != (patch_tokens is None), "give images or their patch tokens"
        if patch_tokens is None:
            patch_tokens = self.embed_patches(images, prompted=prompted)
        prompts = self._projected_prompts(patch_tokens.shape[0]) if prompted and self.num_prompts else None
        recipe = self.recipe if prompted else RECIPES["clip_start"]
        visual = self.clip.visual
        tokens = self.first_tokens(patch_tokens, recipe=recipe)
        for layer, block in enumerate(visual.transformer.resblocks):
            context = None if prompts is None else prompts[layer]
            gate = None if prompts is None or self.gate is None else self.gate[layer]
            tokens = run_block(block, tokens, context=context, gate=gate)
        with torch.autocast(tokens.device.type, enabled=False):
            if prompts is not None and not recipe.norm_of_prompts:
                tokens = self.prompt_norm(tokens)
            embeddings = visual.ln_post(tokens) @ visual.proj  # (B, 1 + N, d)
        return ImageFeatures(embeddings[:, 0], embeddings[:, 1:], tuple(patch_tokens.shape[-2:]))

    def _projected_prompts(self, batch: int) -> Tensor:
        """(layers, B or 1, M, width). Each picture has its own dropout mask; without dropout, all share one copy."""
        prompts = self.prompt_projection(self.prompts)
        if self.recipe.norm_of_prompts:
            prompts = self.prompt_norm(prompts)
        prompts = prompts[:, None]  # (layers, 1, M, width)
        if self.training and self.prompt_dropout.p > 0:
            prompts = self.prompt_dropout(prompts.expand(-1, batch, -1, -1))
        return prompts

    def first_tokens(self, patch_tokens: Tensor, *, antialias: bool = True, recipe: Recipe = RECIPES["clip_start"]) -> Tensor:
        """Input of the first block: patch tokens (B, width, h, w) -> (B, 1 + N, width), the class token first.

        The recipe clip_start is plain CLIP; the published one has its own resampling and number of class tokens.
        """
        visual = self.clip.visual
        tokens = patch_tokens.flatten(2).transpose(1, 2)  # (B, N, width)
        class_token = (recipe.class_tokens * visual.class_embedding).expand(len(tokens), 1, -1)
        position = self._position(tuple(patch_tokens.shape[-2:]), recipe.resampling, antialias)
        # float32 from here on, also under autocast: the residual stream adds up over all layers
        return visual.ln_pre(torch.cat([class_token, tokens.to(class_token.dtype)], dim=1) + position)

    @torch.no_grad()
    def _position(self, grid: tuple[int, int], mode: str, antialias: bool) -> Tensor:
        """(1 + h * w, width): the positional embedding, resampled to a grid (h, w) with the mode "bicubic" or "bilinear".

        Bicubic with `antialias` is open_clip's mode. Without, it is that of NACLIP and SC-CLIP, which add 0.1 patches.
        Bilinear is ZegCLIP's, without antialiasing.
        """
        embedding, native = self.clip.visual.positional_embedding, tuple(self.clip.visual.grid_size)
        if grid == native:
            return embedding
        key = (*grid, mode, antialias, embedding.device, embedding.dtype)
        position = self._positions.get(key)
        if position is None:
            options: dict[str, Any] = {"size": grid, "antialias": antialias and mode == "bicubic"}
            if not antialias:
                options = {"scale_factor": tuple((side + 0.1) / old for side, old in zip(grid, native, strict=True))}
            patches = embedding[1:].unflatten(0, native).permute(2, 0, 1)  # (width, h0, w0)
            patches = F.interpolate(patches[None].float(), mode=mode, **options)[0]
            position = torch.cat([embedding[:1], patches.flatten(1).T.to(embedding.dtype)])
            if len(self._positions) >= 64:  # limits the memory of a server
                self._positions.clear()
            self._positions[key] = position
        return position


class TextTower(Tower):
    """CLIP's text tower, with learnable tokens instead of the template's context at every layer.

    The context precedes the name and attention is causal, so its states do not depend on the name. Prompts that are initialised
    with these states reproduce CLIP's output exactly. (Words after the name depend on it and are not replaced.) For the same
    reason, only the tokens from the name to the end of the longest name are computed.

    `template` is a sentence with one "{}"; or, without prompts, several, whose normalised embeddings are averaged.
    """

    def __init__(self, clip: FrozenClip, template: str | Sequence[str] = "a photo of a {}.", prompts: bool = True) -> None:
        super().__init__(clip)
        template, *others = (template,) if isinstance(template, str) else template
        assert not (prompts and others), "prompts replace the context of one template"
        self.template = template
        self.others = nn.ModuleList(TextTower(clip, each, prompts=False) for each in others)
        context, start_of_text = template.split("{}")[0], 1
        prefix = clip.tokenizer([context])[0]  # start, context, end, padding
        length = start_of_text + len(clip.tokenizer.encode(context))
        assert length < prefix.shape[0], f"template {template!r} fills the whole context of {prefix.shape[0]} tokens"
        self.register_buffer("prefix_tokens", prefix[:length].to(clip.model.logit_scale.device), persistent=False)
        states = prefix_states(clip.text, self.prefix_tokens[None])[:, 0]
        self.register_buffer("prefix_states", states, persistent=False)  # (layers, P, width)
        self.prompts = nn.Parameter(self.prefix_states[:, start_of_text:].clone()) if prompts else None

    def tokenize(self, names: Sequence[str]) -> Tensor:
        """(C, context length) token ids of names within the template, or (C, T, context length) with T templates."""
        assert not isinstance(names, str), "names is a sequence of strings, not one string"
        tokens = self.clip.tokenizer([self.template.replace("{}", name) for name in names]).to(self.prefix_tokens.device)
        return torch.stack([tokens, *(each.tokenize(names) for each in self.others)], dim=1) if self.others else tokens

    def forward(self, tokens: Tensor, *, prompted: bool = True) -> Tensor:
        """Class embeddings (C, d), not normalised, of tokens from `tokenize`. Without prompts: plain CLIP, no gradients."""
        if self.others:
            first, *others = tokens.unbind(dim=1)
            with torch.no_grad():
                embeddings = [encode_after_prefix(self.clip.text, first, self.prefix_states[:, None])]
            embeddings += [tower(part) for tower, part in zip(self.others, others, strict=True)]
            return torch.stack([F.normalize(each, dim=-1) for each in embeddings]).mean(dim=0)
        start = self.prefix_tokens.shape[0]
        assert bool((tokens[:, :start] == self.prefix_tokens).all()), "tokens do not begin with the template's context"
        if prompted and self.prompts is not None:
            states = torch.cat([self.prefix_states[:, :1], self.prompts], dim=1)  # (layers, P, width)
            return encode_after_prefix(self.clip.text, tokens, states[:, None])
        with torch.no_grad():
            return encode_after_prefix(self.clip.text, tokens, self.prefix_states[:, None])


@torch.no_grad()
def prefix_states(text: CLIP | TextTransformer, prefix_tokens: Tensor) -> Tensor:
    """Inputs (layers, T, P, width) of the layers of the text tower at the first P positions of T texts: (T, P) tokens.

    Attention is causal, so they do not depend on later tokens.
    """
    length = prefix_tokens.shape[1]
    states = text.token_embedding(prefix_tokens) + text.positional_embedding[:length]
    mask = torch.ones(length, length, dtype=torch.bool, device=states.device).tril()
    inputs = []
    for block in text.transformer.resblocks:
        inputs.append(states)
        states = run_block(block, states, mask=mask)
    return torch.stack(inputs)


def encode_after_prefix(text: CLIP | TextTransformer, tokens: Tensor, prefix: Tensor) -> Tensor:
    """Embeddings (C, d), not normalised, of texts (C, context length) whose first P positions have given states.

    `prefix` (layers, C or 1, P, width) are the inputs of every layer at these positions. Only later tokens are computed.
    """
    start = prefix.shape[2]
    end = _pooled_position(text, tokens)  # (C,)
    stop = int(end.max()) + 1
    states = text.token_embedding(tokens[:, start:stop]) + text.positional_embedding[start:stop]  # (C, T, width)
    # a token of the name attends to the whole prefix, earlier tokens of the name and itself
    mask = torch.ones(stop - start, stop, dtype=torch.bool, device=tokens.device).tril(diagonal=start)
    for block, context in zip(text.transformer.resblocks, prefix, strict=True):
        states = run_block(block, states, context=context, mask=mask)
    pooled = states[torch.arange(len(states), device=states.device), end - start]  # (C, width)
    with torch.autocast(states.device.type, enabled=False):
        pooled, projection = text.ln_final(pooled), text.text_projection
        if isinstance(projection, nn.Linear):
            return projection(pooled)
        return pooled if projection is None else pooled @ projection


def _pooled_position(text: CLIP | TextTransformer, tokens: Tensor) -> Tensor:
    """(C,): the position whose last state is the embedding, as in open_clip."""
    prefix = "text_" if isinstance(text, CLIP) else ""
    pool_type, eos_id = getattr(text, f"{prefix}pool_type"), getattr(text, f"{prefix}eos_id")
    if pool_type == "argmax":
        return tokens.argmax(dim=-1)
    if pool_type == "eos":
        return (tokens == eos_id).int().argmax(dim=-1)
    assert pool_type == "last", f"pooling {pool_type!r} of the text tower is not supported"
    return torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
