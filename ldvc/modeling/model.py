"""The whole model: frozen CLIP with prompts, text adapter, decoder."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldvc.config import ModelConfig
from ldvc.errors import CheckpointError
from ldvc.modeling.clip import FrozenClip, build_clip
from ldvc.modeling.decoders import DecoderOutput, build_decoder
from ldvc.modeling.towers import ImageFeatures, ImageTower, TextTower

PARTS = {  # part in `LDVC.parameter_report` -> pattern of parameter names; the first match counts
    "visual prompts": r"image_tower\.",
    "text prompts": r"text_tower\.",
    "text adapter": r"adapter\.",
    "decoder: LCSA": r"decoder\.consensus\.\d+\.attention\.",
    "decoder: cross-attention": r"decoder\.(.+\.cross_attention|mask_scores)\.",
    "decoder: feed-forward": r"decoder\..+\.ffn\.",
    "decoder: norms and gates": r"decoder\.",
}


def similarity_logits(patch_features: Tensor, class_embeddings: Tensor, *, scale: float, bias: float) -> Tensor:
    """Plain CLIP similarity: patches (B, N, d) and names (C, d) -> scale * cosine + bias (B, C, N).

    In float32: a rounded cosine times the scale would be coarse.
    """
    with torch.autocast(device_type=patch_features.device.type, enabled=False):
        patches = F.normalize(patch_features.float(), dim=-1)
        names = F.normalize(class_embeddings.float(), dim=-1)
        return scale * (names @ patches.mT) + bias


class TextAdapter(nn.Module):
    """T_new = Linear_{2d->d}([T * V_g ; T]), ZegCLIP's relationship descriptor (Zhou et al., 2023).

    With `start_at_identity`, the weight of T is the identity and that of T * V_g is zero, so that T_new = T. Otherwise
    PyTorch's initialisation is used, as in ZegCLIP's code.
    """

    def __init__(self, width: int, *, start_at_identity: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, width)
        if start_at_identity:
            with torch.no_grad():
                self.linear.weight.zero_()
                self.linear.weight[:, width:] = torch.eye(width)
                self.linear.bias.zero_()

    def forward(self, class_embeddings: Tensor, global_embedding: Tensor) -> Tensor:
        """T (C, d) and V_g (B, d), normalised -> T_new (B, C, d), in float32: bfloat16 is too coarse for the product."""
        width = class_embeddings.shape[-1]
        with torch.autocast(class_embeddings.device.type, enabled=False):
            product_weight, text_weight = self.linear.weight.split(width, dim=1)  # (d, d) each
            product = class_embeddings.float()[None] * global_embedding.float()[:, None]  # (B, C, d)
            # the part of T is the same for every picture, so it is computed once
            text_part = F.linear(class_embeddings.float(), text_weight, self.linear.bias)  # (C, d)
            return F.linear(product, product_weight) + text_part


class PlainClip(nn.Module):
    """The two towers of a frozen CLIP, with the prompts of a configuration.

    `clip` is a built CLIP, which several models may share; None = build `config.clip`.
    """

    def __init__(self, config: ModelConfig, clip: FrozenClip | None = None) -> None:
        super().__init__()
        self.config = config
        self.clip = build_clip(config.clip, config.pretrained) if clip is None else clip
        prompts, dropout = config.visual_prompts, config.visual_prompt_dropout
        self.image_tower = ImageTower(self.clip, prompts, dropout, recipe=config.parts)
        self.text_tower = TextTower(self.clip, config.templates, config.text_prompts)

    @torch.no_grad()
    def frozen_logits(
        self, images: Tensor | None = None, *, patch_tokens: Tensor | None = None, names: Sequence[str] | Tensor
    ) -> Tensor:
        """Plain CLIP, without prompts, adapter or decoder: cosine * scale + bias of every patch and name, (B, C, h, w) float32.

        It is the decoder "clip". In the recipe clip_start, decoders start at it; training distils it. Pictures as for
        `ImageTower.forward`; `names` are strings, tokens, or class embeddings (C, d) from `frozen_embeddings`.
        """
        features = self.image_tower(images, patch_tokens=patch_tokens, prompted=False)
        if not (isinstance(names, Tensor) and names.is_floating_point()):
            names = self.frozen_embeddings(names)
        logits = similarity_logits(features.patch_features, names, scale=self.clip.scale, bias=self.clip.bias)
        return logits.unflatten(-1, features.grid)

    @torch.no_grad()
    def frozen_embeddings(self, names: Sequence[str] | Tensor) -> Tensor:
        """Class embeddings (C, d) of plain CLIP, without text prompts, not normalised."""
        return self.text_tower(self._tokens(names), prompted=False)

    def _tokens(self, names: Sequence[str] | Tensor) -> Tensor:
        return names if isinstance(names, Tensor) else self.text_tower.tokenize(names)


class LDVC(PlainClip):
    """The whole model, with one of the three decoders; arguments as for `PlainClip`."""

    def __init__(self, config: ModelConfig, clip: FrozenClip | None = None) -> None:
        super().__init__(config, clip)
        width = self.clip.embed_dim
        if width % config.decoder_heads:
            raise CheckpointError(
                f"decoder_heads = {config.decoder_heads} does not divide the CLIP's width of {width}; choose a divisor."
            )
        self.adapter = TextAdapter(width, start_at_identity=config.parts.starts_at_clip) if config.text_adapter else None
        self.decoder = build_decoder(config, width, scale=self.clip.scale, bias=self.clip.bias)

    def encode_image(self, images: Tensor | None = None, *, patch_tokens: Tensor | None = None) -> ImageFeatures:
        """Features of pictures, with visual prompts; arguments as for `ImageTower.forward`."""
        return self.image_tower(images, patch_tokens=patch_tokens)

    def encode_names(self, names: Sequence[str] | Tensor) -> Tensor:
        """Class embeddings (C, d) of names or their tokens (`text_tower.tokenize`), with prompts, not normalised."""
        return self.text_tower(self._tokens(names))

    def decode(self, features: ImageFeatures, class_embeddings: Tensor, **options: bool) -> DecoderOutput:
        """Apply adapter and decoder to features from `encode_image` and embeddings (C, d) from `encode_names`.

        `options` are `return_attention` and `skip_lcsa`, see `LocalConsensusDecoder.forward`.
        """
        classes = F.normalize(class_embeddings.float(), dim=-1)  # (C, d)
        global_embedding = F.normalize(features.global_embedding.float(), dim=-1)  # (B, d)
        patches = F.normalize(features.patch_features.float(), dim=-1)  # (B, N, d)
        adapted = self.adapter(classes, global_embedding) if self.adapter else classes.expand(len(patches), -1, -1)
        return self.decoder(patches, adapted, features.grid, **options)  # adapted: (B, C, d)

    def forward(
        self, images: Tensor | None, names: Sequence[str] | Tensor, *, patch_tokens: Tensor | None = None, **options: bool
    ) -> DecoderOutput:
        """Pictures (B, 3, H, W), or their patch tokens, and C names -> mask logits (B, C, h, w) and more."""
        return self.decode(self.encode_image(images, patch_tokens=patch_tokens), self.encode_names(names), **options)

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Prompts, adapter and decoder by name, without the frozen CLIP."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("clip.")}

    def load_trainable_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `trainable_state_dict`; raises CheckpointError if a tensor is missing, unknown or of another shape."""
        target = self.trainable_state_dict()
        problems = {
            "are missing": sorted(target.keys() - tensors.keys()),
            "are unknown": sorted(tensors.keys() - target.keys()),
            "have another shape": [name for name in target if name in tensors and target[name].shape != tensors[name].shape],
        }
        for problem, names in problems.items():
            if names:
                listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                raise CheckpointError(
                    f"The weights do not fit the configured model: {len(names)} tensors {problem} ({listed}); "
                    "use the config.json that was saved with them."
                )
        self.load_state_dict(dict(tensors), strict=False)

    def parameter_report(self) -> dict[str, int]:
        """Number of learnable parameters of each part, then "total", and "frozen CLIP" for comparison."""
        report = dict.fromkeys(PARTS, 0)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                report[next(part for part, pattern in PARTS.items() if re.match(pattern, name))] += parameter.numel()
        report["total"] = sum(report.values())
        report["frozen CLIP"] = sum(tensor.numel() for tensor in self.clip.parameters())
        return report
