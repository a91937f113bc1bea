"""Settings in a checkpoint: the configuration of the model, and the settings of the decoder "clip"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from ldvc.errors import CheckpointError

Decoder = Literal["ldvc", "ldvc_without_lcsa", "zegclip"]
DECODERS: tuple[str, ...] = get_args(Decoder)
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
_REMOVED = {"gate_init", "start_at_clip", "branch_init", "normalize_output"}  # fields of earlier versions


class Recipe(NamedTuple):
    """Settings of model and training that a recipe fixes; the defaults are the recipe clip_start.

    D1 to D11 are the numbers of docs/method.md.
    """

    starts_at_clip: bool = True  # projections of the decoder and the text adapter start at CLIP's similarity
    gate: float | None = 0.05  # first value of the gates on residual branches and visual prompts; None = no gates
    class_tokens: int = 1  # D1: how many times the class token is added before the first block
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # D2: mean, std; None = those of the CLIP
    vectors_decay: bool = False  # D4: weight decay also on norms, biases and gates
    score_bias: bool = True  # D5: a learnable bias on the mask logits
    resampling: str = "bicubic"  # D6: interpolation of the positional embedding to another grid
    padding: tuple[int, int, int] | None = None  # D7: colour, see `train.data.Augmentation`
    first_warmup_step: int = 1  # D8: the warm-up factor of step i is (i + first_warmup_step) / warm-up steps
    norm_of_prompts: bool = True  # D10: LayerNorm of the prompts (eps 1e-5); False = of the last block's output (eps 1e-6)


RECIPES = {
    "clip_start": Recipe(),
    "published": Recipe(
        starts_at_clip=False,
        gate=None,
        class_tokens=2,
        statistics=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # of ImageNet
        vectors_decay=True,
        score_bias=False,
        resampling="bilinear",
        padding=(124, 116, 104),  # the mean of ImageNet
        first_warmup_step=0,
        norm_of_prompts=False,
    ),
}


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Everything that is needed to build a model, except its weights."""

    clip: str = "ViT-B-16-quickgelu"
    """An open_clip architecture, a folder with config.json and safetensors (see modeling/clip.py), or "lite"."""
    pretrained: str | None = "openai"
    """open_clip tag, local file or folder with weights; null = random weights. Unused for a folder and "lite"."""
    decoder: Decoder = "ldvc"
    """ldvc, ldvc_without_lcsa or zegclip."""
    template: str | Annotated[tuple[str, ...], Field(min_length=1)] = "a photo of a {}."
    """Sentence around a class name; text prompts replace its words before {}. Without text prompts, several sentences are
    allowed; their normalised embeddings are averaged."""
    visual_prompts: Annotated[int, Field(ge=0, le=1024)] = 10
    """Number M of learnable tokens at every layer of the image tower; 0 = none."""
    visual_prompt_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout on projected visual prompts in training."""
    text_prompts: bool = True
    """Learn the context tokens of the template at every layer of the text tower."""
    text_adapter: bool = True
    """Make class embeddings depend on the picture."""
    decoder_layers: Annotated[int, Field(gt=0, le=24)] = 3
    """Number L of decoder blocks."""
    decoder_heads: Annotated[int, Field(gt=0, le=256)] = 8
    """Attention heads of the decoder; must divide the joint width."""
    ffn_ratio: Annotated[int, Field(gt=0, le=16)] = 4
    """Hidden width of the feed-forward networks, divided by the joint width."""
    regions: Annotated[int, Field(gt=0, le=64)] = 8
    """S: LCSA splits the grid into at most S x S regions."""
    topk: Annotated[int, Field(gt=0, le=4096)] = 4
    """k: number of regions that each region attends to in LCSA."""
    local_conv: bool = True
    """Depthwise convolution on the values of LCSA."""
    recipe: Literal["clip_start", "published"] = "clip_start"
    """clip_start: the model starts at plain CLIP similarity, with small learnable gates on residual branches and visual
    prompts, the text adapter as the identity, and attention projections as (scaled) identity matrices. published: what
    ZegCLIP's code computes, see `RECIPES`. `zegclip` then equals its authors' decoder, with ReLU, dropout and unit vectors."""
    lcsa_gate_init: NonNegativeFloat = 0.4
    """First value of the gate on the LCSA of the last block in the recipe clip_start. LCSA starts as a mean over similar
    patches, which changes CLIP's similarity little, so this gate may start larger than the others."""

    @model_validator(mode="after")
    def _check_template(self) -> ModelConfig:
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f'template must contain "{{}}" exactly once, not {template!r}')
            prefix = template.split("{}")[0]
            if prefix and not prefix[-1].isspace():
                raise ValueError(f"template must have a space before the name, or the name gets other tokens: {template!r}")
            if self.text_prompts and not prefix.strip():
                raise ValueError(f"template must have words before the name for text_prompts, not {template!r}")
        if self.text_prompts and len(self.templates) > 1:
            raise ValueError("text_prompts need one template; give one, or set text_prompts to false")
        return self

    @property
    def templates(self) -> tuple[str, ...]:
        """The sentences around a class name."""
        return (self.template,) if isinstance(self.template, str) else self.template

    @property
    def parts(self) -> Recipe:
        """The settings that the recipe fixes."""
        return RECIPES[self.recipe]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`; absent keys take their defaults. Raises CheckpointError if one is unknown or not valid."""
        if _REMOVED & set(values):
            raise CheckpointError(
                "This checkpoint is of an older version of this project, which built its decoders in another way; "
                "train it again with this version."
            )
        unknown = sorted(set(values) - {each.name for each in fields(cls)})
        if unknown:
            raise CheckpointError(
                f"The checkpoint has the setting '{unknown[0]}', which this version of the project does not know: it is of a "
                "newer version; update the project, or correct the name."
            )
        try:
            return cls(**values)
        except ValidationError as error:
            raise CheckpointError(f"The model configuration is not valid: {first_mistake(error)}.") from None


# Stuff that most photos contain, as listed by the authors of SCLIP (Wang et al., arXiv 2312.01597) for VOC and COCO.
STUFF = (
    *("sky", "wall", "tree", "wood", "grass", "road", "sea", "river", "mountain", "sand", "desk", "bed", "building", "cloud"),
    *("lamp", "door", "window", "wardrobe", "ceiling", "shelf", "curtain", "stairs", "floor", "hill", "rail", "fence", "water"),
)


@dataclass(frozen=True, config=STRICT)
class PlainClipSettings:
    """`plain_clip` in the metadata of a checkpoint: settings of the decoder "clip", similarity of the frozen towers."""

    dense: Literal["plain", "naclip", "sc_clip"] = "plain"
    """How the last block of the image tower is computed, see `ldvc.modeling.dense`."""
    templates: Literal[1, 80] = 1
    """1 = the template of the model, 80 = the mean over OpenAI's ImageNet templates."""
    inference: dict[str, Any] | None = None
    """Input size, see `ldvc.inference.require_inference`; null = that of the checkpoint."""
    softmax_scale: PositiveFloat | None = None
    """Scores are a softmax over names and stuff words of this number times the cosine; null = scores are sigmoids, with
    `clip_calibration`."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.15
    """With a softmax: a pixel whose best score is lower is "none of these"."""
    stuff: tuple[str, ...] = STUFF
    """With a softmax: words for "none of these". Words that are also class names are left out."""

    @classmethod
    def from_metadata(cls, content: Mapping[str, Any] | None) -> PlainClipSettings:
        """From the metadata of a checkpoint; absent values take their defaults. Raises ValueError if one is not valid."""
        try:
            return cls(**(content or {}))
        except ValidationError as error:
            raise ValueError(f"'plain_clip': {first_mistake(error)}") from None


# For a CLIP of published size: settings of SC-CLIP (arXiv 2411.15869) and of the training-free methods before it.
FULL_CLIP_SETTINGS: dict[str, Any] = {
    "dense": "sc_clip",
    "templates": 80,
    "inference": {"short_side": 336, "window": 224, "stride": 112},
    "softmax_scale": 40.0,
}


def first_mistake(error: ValidationError) -> str:
    """The first mistake that pydantic found, in words: field, what is allowed, what was given. Without a full stop."""
    mistake = error.errors(include_url=False)[0]
    # for a field with several types, pydantic appends the type to the path
    path = [str(part) for part in mistake["loc"]]
    field = ".".join(part for part in path if part not in ("int", "str") and not part.startswith(("dict[", "list[", "tuple[")))
    if mistake["type"] == "unexpected_keyword_argument":
        return f"there is no field '{field}'"
    if mistake["type"] == "value_error":
        return str(mistake["ctx"]["error"])
    allowed = mistake["msg"].replace("Input should be", "must be").split(", unable")[0].split(", got")[0]
    return f"{field} {allowed}, not {mistake['input']!r}"
