"""The model's configuration, written into every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from ldvc.errors import CheckpointError

Decoder = Literal["ldvc", "ldvc_without_lcsa", "zegclip"]
DECODERS: tuple[str, ...] = get_args(Decoder)
GATE = 0.05  # first value of a gate on a residual branch, and on visual prompts
_REMOVED = {"gate_init", "start_at_clip", "branch_init", "normalize_output"}  # fields of earlier versions


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True))
class ModelConfig:
    """Everything that is needed to build a model, apart from its weights."""

    clip: str = "ViT-B-16-quickgelu"
    """An open_clip architecture, a folder with config.json and safetensors (see modeling/clip.py), or "lite"."""
    pretrained: str | None = "openai"
    """open_clip tag, local file or folder with weights; null = random weights. Unused for a folder and "lite"."""
    decoder: Decoder = "ldvc"
    """ldvc, ldvc_without_lcsa or zegclip."""
    template: str = "a photo of a {}."
    """Sentence around a class name. The words before {} are the context that text prompts replace."""
    visual_prompts: NonNegativeInt = 10
    """Number M of learnable tokens at every layer of the image tower; 0 = none."""
    visual_prompt_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout on projected visual prompts in training."""
    text_prompts: bool = True
    """Learn the context tokens of the template at every layer of the text tower."""
    text_adapter: bool = True
    """Make class embeddings depend on the picture."""
    decoder_layers: PositiveInt = 3
    """Number L of decoder blocks."""
    decoder_heads: PositiveInt = 8
    """Attention heads of the decoder; must divide the joint width."""
    ffn_ratio: PositiveInt = 4
    """Hidden width of the feed-forward networks over the joint width."""
    regions: PositiveInt = 8
    """S: LCSA splits the grid into at most S x S regions."""
    topk: PositiveInt = 4
    """k: number of regions that each region attends to in LCSA."""
    local_conv: bool = True
    """Depthwise convolution on the values of LCSA."""
    recipe: Literal["clip_start", "published"] = "clip_start"
    """How the parts start. clip_start: at plain CLIP similarity, with small learnable gates on residual branches and visual
    prompts, the text adapter as the identity, and attention projections as (scaled) identity matrices. published: no gates, and
    ZegCLIP's or PyTorch's initialisation; `zegclip` then equals its authors' decoder, with ReLU, dropout and unit vectors."""
    lcsa_gate_init: NonNegativeFloat = 0.4
    """First value of the gate on the LCSA of the last block in the recipe clip_start. LCSA starts as a mean over similar
    patches, which changes CLIP's similarity little, so this gate may start wider open than the others."""

    @model_validator(mode="after")
    def _check_template(self) -> ModelConfig:
        if self.template.count("{}") != 1:
            raise ValueError(f'template must contain "{{}}" exactly once, not {self.template!r}')
        prefix = self.template.split("{}")[0]
        if prefix and not prefix[-1].isspace():
            raise ValueError(f"template must have a space before the name, or the name gets other tokens: {self.template!r}")
        if self.text_prompts and not prefix.strip():
            raise ValueError(f"template must have words before the name for text_prompts, not {self.template!r}")
        return self

    @property
    def starts_at_clip(self) -> bool:
        """Whether the recipe is clip_start."""
        return self.recipe == "clip_start"

    @property
    def gate(self) -> float | None:
        """First value of the gates; None without gates."""
        return GATE if self.starts_at_clip else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`; absent keys take their defaults.

        Raises:
            CheckpointError: a key is unknown or a value not valid.
        """
        if _REMOVED & set(values):
            raise CheckpointError(
                "This checkpoint is of an older version of this project, which built its decoders in another way; "
                "train it again with this version."
            )
        try:
            return cls(**values)
        except ValidationError as error:
            raise CheckpointError(f"The model configuration is not valid: {first_mistake(error)}.") from None


def first_mistake(error: ValidationError) -> str:
    """The first mistake that pydantic found, in words: field, what is allowed, what was given. Without a full stop."""
    mistake = error.errors(include_url=False)[0]
    # for a field of several types, pydantic adds the type to the place
    field = ".".join(str(part) for part in mistake["loc"] if part != "int" and not str(part).startswith(("dict[", "list[")))
    if mistake["type"] == "unexpected_keyword_argument":
        return f"there is no field '{field}'"
    if mistake["type"] == "value_error":
        return str(mistake["ctx"]["error"])
    allowed = mistake["msg"].replace("Input should be", "must be").split(", unable")[0].split(", got")[0]
    return f"{field} {allowed}, not {mistake['input']!r}"
