"""Settings of the decoder "clip": the similarity of frozen towers, without anything learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, ValidationError
from pydantic.dataclasses import dataclass

from ldvc.config import first_mistake

# What most photos show around their things, as listed by the authors of SCLIP (Wang et al., arXiv 2312.01597) for VOC and COCO.
STUFF = (
    *("sky", "wall", "tree", "wood", "grass", "road", "sea", "river", "mountain", "sand", "desk", "bed", "building", "cloud"),
    *("lamp", "door", "window", "wardrobe", "ceiling", "shelf", "curtain", "stairs", "floor", "hill", "rail", "fence", "water"),
)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True))
class PlainClipSettings:
    """`plain_clip` in the metadata of a checkpoint."""

    dense: Literal["plain", "naclip", "sc_clip"] = "plain"
    """Reading of the last block of the image tower, see `ldvc.modeling.dense`."""
    templates: Literal[1, 80] = 1
    """1 = the template of the model, 80 = the mean over OpenAI's ImageNet templates."""
    inference: dict[str, Any] | None = None
    """Sizes, see `ldvc.inference.require_inference`; null = those of the checkpoint."""
    softmax_scale: PositiveFloat | None = None
    """Scores are a softmax over names and stuff words of this number times the cosine; null = scores are sigmoids, with
    `clip_calibration`."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.15
    """Of "none of these", with a softmax."""
    stuff: tuple[str, ...] = field(default=STUFF)
    """Words for "none of these", with a softmax. Those that a visitor asks for are left out."""

    @classmethod
    def from_metadata(cls, content: Mapping[str, Any] | None) -> PlainClipSettings:
        """From the metadata of a checkpoint; absent values take their defaults.

        Raises:
            ValueError: a setting is unknown or not valid.
        """
        try:
            return cls(**(content or {}))
        except ValidationError as error:
            raise ValueError(f"'plain_clip': {first_mistake(error)}") from None


# For a CLIP of published size: https://arxiv.org/abs/2411.15869, and what the training-free methods before it share.
FULL_CLIP_SETTINGS: dict[str, Any] = {
    "dense": "sc_clip",
    "templates": 80,
    "inference": {"short_side": 336, "window": 224, "stride": 112},
    "softmax_scale": 40.0,
}
