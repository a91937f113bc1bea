"""The configuration of a training run: read from YAML, changed on the command line.

A field of `ldvc.config.ModelConfig` may be given wherever a field of `TrainConfig` may, e.g. `--set topk=8`.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from ldvc.class_names import load_split
from ldvc.config import DECODERS, ModelConfig, first_mistake
from ldvc.errors import LdvcError
from ldvc.inference import require_inference
from train.data import Augmentation

CONFIG_FOLDER = Path(__file__).parent / "configs"
LITE_NAMES = str(Path(__file__).resolve().parents[1] / "recipes" / "lite" / "concepts.txt")
Share = Annotated[float, Field(ge=0, le=1)]


class ConfigError(LdvcError):
    """A training configuration cannot be used."""


def make_writable(folder: str | Path, option: str) -> None:
    """Makes a folder. If it cannot be written, ConfigError names the option to change, before anything is computed."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"The folder {folder} cannot be written: {error.strerror}; give another {option}.") from None


@dataclass(
    frozen=True,
    config=ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True, use_attribute_docstrings=True),
)
class TrainConfig:
    """All settings of a run. The defaults are ZegCLIP's recipe; methods that it does not use (name sampling, distillation,
    stored views) are off."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model that the run trains."""
    data: str = "data"
    """Folder that holds the data sets."""
    sets: dict[str, NonNegativeFloat] = field(default_factory=dict)
    """Data set -> probability that a sample comes from it, up to a common factor."""
    unseen: str | None = None
    """Split of held-out classes (`ldvc/splits`) or a file; null = every class is seen."""
    setting: Literal["inductive", "transductive", "fully_supervised"] = "inductive"
    """What training may use of the held-out classes. inductive: nothing; their pixels are void. transductive: their names, with
    self-training from `self_training_start` on. fully_supervised: names and masks (the upper bound)."""
    self_training_start: Share = 0.5
    """Share of max_train_steps before self-training starts. ZegCLIP starts it as a second run after half of the steps."""

    crop: PositiveInt = 512
    """This field and the next eight: see `train.data.Augmentation`."""
    long_side: PositiveInt | None = None
    short_side: PositiveInt | None = 512
    scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    aspect: PositiveFloat = 1.0
    uniform_scale: bool = True
    photometric: Share = 0.5
    hue: NonNegativeFloat = 36.0
    largest_class: Share = 0.75
    loss_stride: PositiveInt = 1
    """Pixels per cell of the mask loss; 1 = full resolution."""
    views_per_photo: NonNegativeInt | dict[str, PositiveInt] = 0
    """Stored views of each photo, one number or data set -> number; 0 = a new augmentation at every step."""
    photos_every: dict[str, PositiveInt] = field(default_factory=dict)
    """Data set -> use every n-th photo only (frames of a video are similar)."""
    cache_dir: str = "runs/cache"
    """Folder of the stored views."""

    focal_weight: NonNegativeFloat = 100.0
    """This field to focal_normalise: see `train.losses.mask_loss`."""
    dice_weight: NonNegativeFloat = 1.0
    focal_alpha: Share = 0.25
    focal_gamma: NonNegativeFloat = 2.0
    focal_normalise: Literal["masks", "pairs"] = "masks"
    attention_weight: NonNegativeFloat = 0.0
    """Weight of `train.losses.attention_loss`; 0 = the paper's losses alone."""
    ignore_as_negative: bool = True
    """Void pixels, including those of held-out classes, are negatives of every name (as in ZegCLIP) and not ignored."""
    held_out_as_negative: bool = False
    """Of the void pixels, only those of held-out classes are negatives (inductive setting)."""
    full_vocabulary: Share = 1.0
    """Probability that a step uses all names; 1 = as in the paper."""
    names_per_step: NonNegativeInt = 0
    """Largest number of names in a step, besides those that its photos show; 0 = no limit."""
    other_words: list[str] | str | None = None
    """JSON file or files: name -> other words for it ("grass": ["lawn", "meadow"]), which replace the name in some steps."""
    distillation_names: str = LITE_NAMES
    """Text file of names, one per line, for which the decoder is distilled from the frozen towers."""
    distill_per_step: NonNegativeInt = 0
    """Number of distillation names in each step."""
    distill_weight: NonNegativeFloat = 0.0
    """Weight of the distillation loss of the distillation names."""
    distill_unannotated_weight: NonNegativeFloat = 0.0
    """Weight of the distillation loss of learned names that the photo's data set does not annotate."""
    init_from: str | None = None
    """Checkpoint folder of the same model whose trained tensors are the start; null = a fresh model."""

    learning_rate: PositiveFloat = 2e-5
    """Base learning rate; see prompt_multiplier and head_multiplier."""
    prompt_multiplier: NonNegativeFloat = 10.0
    """Learning rate of the prompts / base learning rate."""
    head_multiplier: NonNegativeFloat = 10.0
    """Learning rate of adapter and decoder / base learning rate."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay of matrices; norms, biases and gates have none, except in the recipe "published"."""
    warmup_steps: NonNegativeInt = 1500
    power: NonNegativeFloat = 0.9
    """Exponent of the polynomial schedule."""
    minimum_learning_rate: NonNegativeFloat = 1e-6
    clip_gradient: NonNegativeFloat = 0.0
    """Largest norm of the gradient; 0 = no limit."""
    max_train_steps: PositiveInt = 20_000
    """Number of optimiser steps."""
    train_batch_size: PositiveInt = 16
    """Photos per process and micro step."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro steps per optimiser step."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "no"
    """auto, no, bf16 or fp16; auto = bf16 where the hardware supports it. fp16 needs a GPU."""
    seed: NonNegativeInt = 0
    """Seed of everything random."""
    num_workers: NonNegativeInt = 0
    """Processes that prepare photos, for each process that trains."""

    output_dir: str = "runs/default"
    """The run's own folder, which becomes the finished checkpoint."""
    checkpointing_steps: NonNegativeInt = 500
    """Steps between two checkpoints to resume from; 0 = only one at the end."""
    checkpoints_total_limit: PositiveInt = 2
    """Number of checkpoints to keep; older ones are deleted."""
    log_steps: PositiveInt = 20
    """Steps between two lines of the log."""
    report_to: Literal["tensorboard", "wandb"] | None = None
    """Tracker: tensorboard or wandb; by default none."""
    push_to_hub: bool = False
    """Upload the finished checkpoint; needs HF_TOKEN and hub_model_id."""
    hub_model_id: str | None = None
    """Repository for push_to_hub: OWNER/NAME."""
    validation_steps: NonNegativeInt = 0
    """Steps between two evaluations, besides the one at the end; 0 = no evaluation."""
    validation_sets: list[str] = field(default_factory=list)
    """Data sets to evaluate on; default: those of training."""
    validation_every: PositiveInt = 1
    """Evaluate on every n-th photo only."""
    half_precision_checkpoint: bool = False
    """The finished checkpoint stores float16."""
    inference: dict[str, int | float] = field(default_factory=lambda: {"short_side": 512, "window": 512, "stride": 426})
    """Input size and windows that the finished checkpoint stores, see `ldvc.inference.model_input_size`."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        require_inference(self.inference)
        split_missing = self.transductive and self.unseen in (None, "none")
        one_side = (self.long_side is None) != (self.short_side is None)
        views_missing = isinstance(self.views_per_photo, dict) and not set(self.sets) <= set(self.views_per_photo)
        fractions = any(not isinstance(value, int) for name, value in self.inference.items() if name != "enlarge")
        for wrong, sentence in (
            (not self.sets, "The configuration names no data sets; add for example 'sets: {msrc: 1.0}'"),
            (not sum(self.sets.values()), "One of the weights of 'sets' must be more than 0"),
            (self.scale[0] > self.scale[1], f"scale must be smallest and largest, not {list(self.scale)}"),
            (self.crop % self.loss_stride, f"crop {self.crop} must divide by loss_stride {self.loss_stride}"),
            (not one_side, "Give exactly one of long_side and short_side; set the other to null"),
            (views_missing, "views_per_photo needs a number for each data set, or one number for all"),
            (split_missing, "The transductive setting needs held-out classes; name a split, for example 'unseen: voc12'"),
            (fractions, f"The sides, window and stride of inference must be whole numbers of pixels, not {self.inference}"),
            (self.push_to_hub and not self.hub_model_id, "push_to_hub needs a repository: add --hub_model_id owner/name"),
        ):
            if wrong:
                raise ValueError(sentence)
        return self

    def held_out(self) -> frozenset[str]:
        """Canonical names of the classes whose masks training must not see."""
        return frozenset() if self.setting == "fully_supervised" else load_split(self.unseen)

    @property
    def transductive(self) -> bool:
        """Whether the names of the held-out classes are known."""
        return self.setting == "transductive"

    @property
    def self_training_from(self) -> int:
        """The first micro step with pseudo-labels."""
        return round(self.self_training_start * self.max_train_steps) * self.gradient_accumulation_steps

    def views(self, name: str) -> int:
        """Stored views of each photo of a data set; 0 = none are stored."""
        return self.views_per_photo.get(name, 0) if isinstance(self.views_per_photo, dict) else self.views_per_photo

    def augmentation(self) -> Augmentation:
        """The parameters of random views."""
        shared = {each.name for each in fields(Augmentation)} & {each.name for each in fields(self)}
        values = {name: getattr(self, name) for name in shared}
        return Augmentation(**values, stride=self.loss_stride, padding=self.model.parts.padding)


# ---- files and the command line -----------------------------------------------------------------------------------------

_MODEL_FIELDS = frozenset(each.name for each in fields(ModelConfig))
_TRAIN_FIELDS = frozenset(each.name for each in fields(TrainConfig))


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 3e-4 is a number, and only true and false are booleans, so that "no" is text."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|[-+]?\.inf$|\.nan$", re.I)
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in (_BOOL, _FLOAT)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"true|false$", re.I), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, _NUMBER, list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """The value of a YAML text; see `_Loader`."""
    return yaml.load(text, _Loader)


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if key == "model":
            if not isinstance(value, Mapping):
                raise ConfigError(f"'model' must be a mapping of fields of the model, not {value!r}.")
            _merge(values, value)
        elif key in _TRAIN_FIELDS:
            values[key] = value
        elif key in _MODEL_FIELDS:
            values.setdefault("model", {})[key] = value
        else:
            raise ConfigError(f"'{key}' is no field of the training or model configuration.")


def _read_file(path: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The fields of a configuration, and decoder -> fields that differ for this decoder (the key `per_decoder`)."""
    path = Path(path)
    if not path.is_file():
        path = CONFIG_FOLDER / path.name if path.suffix else CONFIG_FOLDER / f"{path.name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in CONFIG_FOLDER.glob("*.yaml")))
        raise ConfigError(f"There is no configuration {path}. Known ones: {names}; or give a path.")
    try:
        values = read_yaml(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    base = values.pop("base", None)
    merged, per_decoder = _read_file(path.parent / base) if base else ({}, {})
    for decoder, own_fields in values.pop("per_decoder", {}).items():
        if decoder not in DECODERS or not isinstance(own_fields, Mapping) or "decoder" in own_fields:
            names = ", ".join(DECODERS)
            raise ConfigError(f"per_decoder of {path} must map a decoder ({names}) to fields, not {decoder} to {own_fields}.")
        per_decoder[decoder] = {**per_decoder.get(decoder, {}), **own_fields}
    _merge(merged, values)
    return merged, per_decoder


def load_config(path: str | Path, changes: Sequence[str] = (), **overrides: Any) -> TrainConfig:
    """Reads a configuration; ConfigError for an unknown file or field, or a value that is not allowed.

    Args:
        path: a YAML file, or the name of one in `train/configs`. Its key `base` names a file to start from; `per_decoder`
            holds, for each decoder, fields that differ from the others.
        changes: "key=value" with a YAML value, e.g. "topk=8" or "sets={msrc: 1}". overrides: further fields, or None.
    """
    values, per_decoder = _read_file(path)
    changed: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"'{change}' is no change of the form key=value.")
        try:
            _merge(changed, {key.strip().removeprefix("model."): read_yaml(text)})
        except yaml.YAMLError:
            raise ConfigError(f"'{text}' in '{change}' is not valid YAML; put quotation marks around text.") from None
    _merge(changed, {key: value for key, value in overrides.items() if value is not None})
    decoder = (values.get("model", {}) | changed.get("model", {})).get("decoder", ModelConfig.decoder)
    _merge(values, per_decoder.get(decoder, {}))
    _merge(values, changed)
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        raise ConfigError(f"{first_mistake(error)}.") from None
