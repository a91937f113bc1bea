"""The model's configuration, written into every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ldvc.errors import CheckpointError

DECODERS = ("ldvc", "ldvc_without_lcsa", "zegclip")
BRANCH_INITS = ("identity", "random")
COUNTS = {"decoder_layers": 1, "decoder_heads": 1, "ffn_ratio": 1, "regions": 1, "topk": 1, "visual_prompts": 0}  # at least


@dataclass(frozen=True)
class ModelConfig:
    """Everything that is needed to build a model, apart from its weights.

    The defaults start every decoder at plain CLIP similarity. The form that the papers publish is
    `gate_init=None, start_at_clip=False, branch_init="random"`.

    Attributes:
        clip: open_clip architecture, or a folder with config.json and safetensors (see modeling/clip.py), or "lite".
        pretrained: open_clip tag, a local file or a folder with weights; None = random weights. Unused when `clip` is a
            folder or "lite".
        decoder: which decoder, one of `DECODERS`.
        template: sentence around a class name; what stands before "{}" is the context that text prompts replace.
        visual_prompts: number M of learnable tokens at every layer of the image tower; 0 = none.
        visual_prompt_dropout: dropout on projected visual prompts while training.
        text_prompts: learn the context tokens of the template at every layer of the text tower.
        text_adapter: make class embeddings depend on the picture; False = use them as they are.
        decoder_layers: number L of decoder blocks.
        decoder_heads: attention heads of the decoder; must divide the joint width.
        ffn_ratio: hidden width of the feed-forward networks over the joint width.
        regions: S, the grid is split into at most S x S regions (LCSA).
        topk: k, regions that each region attends to (LCSA).
        local_conv: depthwise convolution on the values (LCSA).
        gate_init: first value of the learnable gates on residual branches (and on visual prompts, where
            `start_at_clip`); None = ungated as published.
        lcsa_gate_init: first value of the gate on the LCSA of the last block; None = `gate_init`. LCSA starts as a mean over
            similar patches, which leaves CLIP's similarity nearly what it is, so it may start wider open than the rest.
            Unused where `gate_init` is None.
        start_at_clip: text adapter starts as the identity, mask logits as plain CLIP similarity, and visual prompts are
            gated. Otherwise the adapter starts as ZegCLIP's does, and `zegclip` is its authors' in all: unit vectors go in,
            layers have ReLU and dropout, linear layers start from a normal distribution of deviation 0.02.
        branch_init: "identity": the projections of decoder attention start as (scaled) identity matrices, so that a branch
            starts as a similarity-weighted mean of what it attends to, the same for every name; "random": PyTorch's usual
            initialisation. Unused by `zegclip` where it is its authors'.
    """

    clip: str = "ViT-B-16-quickgelu"
    pretrained: str | None = "openai"
    decoder: str = "ldvc"
    template: str = "a photo of a {}."
    visual_prompts: int = 10
    visual_prompt_dropout: float = 0.1
    text_prompts: bool = True
    text_adapter: bool = True
    decoder_layers: int = 3
    decoder_heads: int = 8
    ffn_ratio: int = 4
    regions: int = 8
    topk: int = 4
    local_conv: bool = True
    gate_init: float | None = 0.05
    lcsa_gate_init: float | None = None
    start_at_clip: bool = True
    branch_init: str = "identity"

    def __post_init__(self) -> None:
        def require(condition: bool, sentence: str) -> None:
            if not condition:
                raise CheckpointError(f"The model configuration is not valid: {sentence}.")

        require(self.decoder in DECODERS, f"decoder must be one of {', '.join(DECODERS)}, not {self.decoder!r}")
        require(
            self.branch_init in BRANCH_INITS,
            f"branch_init must be one of {', '.join(BRANCH_INITS)}, not {self.branch_init!r}",
        )
        require(
            isinstance(self.template, str) and self.template.count("{}") == 1,
            f'template must hold "{{}}" exactly once, not {self.template!r}',
        )
        prefix = self.template.split("{}")[0]
        require(
            prefix == "" or prefix[-1].isspace(),
            f"a space must stand before the name in template {self.template!r}, or the name would change its tokens",
        )
        require(
            not self.text_prompts or prefix.strip() != "",
            "text_prompts need a template with words before the name, such as 'a photo of a {}.'",
        )
        for name, least in COUNTS.items():
            value = getattr(self, name)
            require(type(value) is int and value >= least, f"{name} must be a whole number from {least} on, not {value!r}")
        for name in ("gate_init", "lcsa_gate_init"):
            value = getattr(self, name)
            require(value is None or type(value) in (int, float), f"{name} must be a number or null, not {value!r}")
        for name in ("text_prompts", "text_adapter", "local_conv", "start_at_clip"):
            require(type(getattr(self, name)) is bool, f"{name} must be true or false, not {getattr(self, name)!r}")
        require(isinstance(self.clip, str), f"clip must be a name or a path, not {self.clip!r}")
        require(
            0.0 <= self.visual_prompt_dropout < 1.0,
            f"visual_prompt_dropout must be in [0, 1), not {self.visual_prompt_dropout}",
        )

    @property
    def last_lcsa_gate(self) -> float | None:
        """First value of the gate on the LCSA of the last block; None where no branch is gated."""
        return self.gate_init if self.gate_init is None or self.lcsa_gate_init is None else self.lcsa_gate_init

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`; absent keys take their defaults.

        Raises:
            CheckpointError: a key is unknown or a value not valid.
        """
        if "arm" in values:
            raise CheckpointError(
                "This checkpoint is of an older version of this project, whose decoders read their masks in another way; "
                "train it again with this version."
            )
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise CheckpointError(
                f"The model configuration has unknown keys ({', '.join(unknown)}); "
                "it was probably written by a newer version of this project, so update and try again."
            )
        try:
            return cls(**values)
        except TypeError as error:  # a value of the wrong type, such as a string where a number belongs
            raise CheckpointError(f"The model configuration is not valid: {error}.") from error
