"""The configuration of a training run: one dataclass, read from YAML, changed on the command line.

A field of `ldvc.config.ModelConfig` may stand wherever a field of `TrainConfig` may, e.g. `--set gate_init=null`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from ldvc.class_names import load_split
from ldvc.config import DECODERS, ModelConfig
from ldvc.errors import LdvcError
from ldvc.inference import require_inference
from train.data import Augmentation

CONFIG_FOLDER = Path(__file__).parent / "configs"
SETTINGS = ("inductive", "transductive", "fully_supervised")
TRACKERS = ("tensorboard", "wandb")
PRECISIONS = ("auto", "no", "bf16", "fp16")
LITE_CONCEPTS = str(Path(__file__).resolve().parents[1] / "recipes" / "lite" / "concepts.txt")


class ConfigError(LdvcError):
    """A training configuration cannot be used."""


def check_types(config: Any) -> None:
    """Every field of a dataclass holds what its annotation says; an integer also serves as a float.

    Raises:
        ConfigError: one does not.
    """
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    words |= {list: "a list", tuple: "a list", dict: "a mapping"}
    for name, annotation in get_type_hints(type(config)).items():
        value = getattr(config, name)
        options = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
        kinds = tuple(get_origin(option) or option for option in options)
        if float in kinds:
            kinds += (int,)
        if tuple in kinds:
            kinds += (list,)  # YAML has no tuples
        fits = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
        if fits and isinstance(value, float):
            fits = math.isfinite(value)
        inner = get_args(options[0])[-1:] if isinstance(value, list | tuple | dict) else ()
        parts = value.values() if isinstance(value, dict) else value if inner else ()
        if fits and inner and inner[0] is not Any:
            wanted = (int, float) if inner[0] is float else inner[0]
            fits = all(isinstance(part, wanted) and not isinstance(part, bool) for part in parts)
        if not fits:
            expected = " or ".join(dict.fromkeys(words[get_origin(option) or option] for option in options))
            of = f" of {words[inner[0]].removeprefix('a ')}s" if inner and inner[0] in words else ""
            raise ConfigError(f"{name} must be {expected}{of}, not {value!r}.")


_AT_LEAST_ONE = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpoints_total_limit")
_AT_LEAST_ONE += ("log_steps", "crop", "loss_stride", "validation_every", "sheet_photos")
_NOT_NEGATIVE = ("checkpointing_steps", "validation_steps", "num_workers", "warmup_steps", "seed", "view_seed")
_NOT_NEGATIVE += ("weight_decay", "clip_gradient", "preserve_names", "preserve_weight", "preserve_unknown_weight")
_NOT_NEGATIVE += ("rare_photos", "names_per_step")
_NOT_NEGATIVE += (
    "focal_weight",
    "dice_weight",
    "attention_weight",
    "minimum_learning_rate",
    "power",
    "prompt_multiplier",
    "head_multiplier",
)


def check_ranges(config: TrainConfig) -> None:
    """Numbers are where they make sense.

    Raises:
        ConfigError: one is not.
    """
    for names, least in ((_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0)):
        for name in names:
            if getattr(config, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(config, name)}.")
    if config.learning_rate <= 0:
        raise ConfigError(f"learning_rate must be more than 0, not {config.learning_rate}.")
    if len(config.scale) != 2 or not 0 < config.scale[0] <= config.scale[1]:
        raise ConfigError(f"scale is two numbers, smallest and largest, more than 0; not {config.scale}.")
    if not 0 <= config.full_vocabulary <= 1:
        raise ConfigError(f"full_vocabulary is a probability from 0 to 1, not {config.full_vocabulary}.")
    if not 0 <= config.other_words_share <= 1:
        raise ConfigError(f"other_words_share is a probability from 0 to 1, not {config.other_words_share}.")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on. The defaults are ZegCLIP's recipe; what it leaves out (vocabulary sampling,
    preservation, cached views) is off.

    Attributes:
        model: fields of ModelConfig that differ from its defaults.
        data: folder that holds the data sets. sets: data set -> probability that a draw comes from it; layouts: data set ->
            layout, where it shall not be found out (see `train.data.open_set`).
        unseen: split of held-out classes (`ldvc/splits`), or null: all are seen.
        setting: what training may know of those classes. inductive: nothing, their pixels are void and their names unknown;
            transductive: their names, with self-training from `self_training_start` on; fully_supervised: everything (the
            upper bound; the split then only says which classes an evaluation calls unseen).
        self_training_start: share of max_train_steps. ZegCLIP starts a second run, with its own warm-up, from the checkpoint
            of half-way; here it is one run with one schedule.
        self_training_threshold: see `train.losses.pseudo_labels`; 0 = ZegCLIP's, every held-out pixel gets a label.
        crop, long_side, short_side, scale, aspect, uniform_scale, photometric, hue, largest_class: see `Augmentation`.
        loss_stride: pixels per cell of the mask loss; 1 = full resolution.
        views_per_photo: stored views of each photo, one number or data set -> number; 0 = augment afresh for every step.
        photos_every: data set -> take every n-th photo only (frames of a video repeat each other).
        cache_dir: where stored views lie. view_seed: of the stored views, shared by all runs.
        focal_weight, dice_weight, focal_alpha, focal_gamma, focal_normalise: see `train.losses.mask_loss`.
        attention_weight: of `train.losses.attention_loss`; 0 = the paper's losses alone.
        ignore_as_negative: void pixels, those of held-out classes among them, are negatives of every name (ZegCLIP) rather
            than counting nowhere.
        held_out_as_negative: of the void pixels, only those of held-out classes are (inductive setting).
        full_vocabulary: probability that a step learns with all names; 1 = the paper's way.
        names_per_step: names that a step learns with at most, beside those that its photos show; 0 = no limit.
        other_words: JSON file or files (a path may be relative to the folder `train`), name -> further words that mean it
            ("grass": ["lawn", "meadow"]); null = none. A step reads one of them for a name with probability other_words_share.
        preserve_names: random concept names that join each step to keep the frozen towers' opinion.
        preserve_weight: of those. preserve_unknown_weight: of names that the photo's data set does not label.
        rare_photos: a name that fewer photos of a data set show than this is learned where it is shown and preserved (see
            above) on that set's other photos, instead of being a negative there; 0 = off.
        init_from: checkpoint folder of the same model whose trained tensors are the start; null = a fresh model.
        concepts: text file of concept names, one a line.
        learning_rate: base; prompt_multiplier and head_multiplier multiply it for prompts and for adapter and decoder.
        weight_decay: on weights; never on norms, biases, gates and prompts' scales.
        warmup_steps, power, minimum_learning_rate: of the polynomial schedule. clip_gradient: largest norm, 0 = off.
        max_train_steps: optimiser steps. train_batch_size: photos per process and micro step.
        mixed_precision: no, bf16, fp16, or auto: bf16 where the device has instructions for it.
        gradient_accumulation_steps, seed, num_workers, output_dir, checkpointing_steps,
        checkpoints_total_limit, log_steps, report_to: as in other trainers built on accelerate; 0 checkpointing_steps
        = at the end only.
        push_to_hub: upload the finished checkpoint to `hub_model_id` ("owner/name"; the owner may be left out).
        validation_steps: evaluate every so many steps, and at the end; 0 = never.
        validation_sets: data sets to evaluate on; empty = those of training. validation_split: list file of each set.
        validation_every: take every n-th photo of them. sheet_photos: photos on the picture sheet of an evaluation.
        half_precision_checkpoint: the finished checkpoint stores float16.
        inference: how the finished checkpoint wants to be used, see `ldvc.inference.model_input_size`.
    """

    model: dict[str, Any] = field(default_factory=dict)
    data: str = "data"
    sets: dict[str, float] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    unseen: str | None = None
    setting: str = "inductive"
    self_training_start: float = 0.5
    self_training_threshold: float = 0.0
    crop: int = 512
    long_side: int | None = None
    short_side: int | None = 512
    scale: tuple[float, float] = (0.5, 2.0)
    aspect: float = 1.0
    uniform_scale: bool = True
    photometric: float = 0.5
    hue: float = 36.0
    largest_class: float = 0.75
    loss_stride: int = 1
    views_per_photo: int | dict[str, int] = 0
    photos_every: dict[str, int] = field(default_factory=dict)
    cache_dir: str = "runs/cache"
    view_seed: int = 0
    focal_weight: float = 100.0
    dice_weight: float = 1.0
    attention_weight: float = 0.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    focal_normalise: str = "masks"
    ignore_as_negative: bool = True
    held_out_as_negative: bool = False
    full_vocabulary: float = 1.0
    names_per_step: int = 0
    other_words: list[str] | str | None = None
    other_words_share: float = 0.4
    preserve_names: int = 0
    preserve_weight: float = 0.0
    preserve_unknown_weight: float = 0.0
    rare_photos: int = 0
    init_from: str | None = None
    concepts: str = LITE_CONCEPTS
    learning_rate: float = 2e-5
    prompt_multiplier: float = 10.0
    head_multiplier: float = 10.0
    weight_decay: float = 0.01
    warmup_steps: int = 1500
    power: float = 0.9
    minimum_learning_rate: float = 1e-6
    clip_gradient: float = 0.0
    max_train_steps: int = 20_000
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    mixed_precision: str = "no"
    seed: int = 0
    num_workers: int = 0
    output_dir: str = "runs/default"
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    log_steps: int = 20
    report_to: str | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    validation_steps: int = 0
    validation_sets: list[str] = field(default_factory=list)
    validation_split: str = "val"
    validation_every: int = 1
    sheet_photos: int = 6
    half_precision_checkpoint: bool = False
    inference: dict[str, float] = field(default_factory=lambda: {"short_side": 512, "window": 512, "stride": 426})

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self)
        if not self.sets:
            raise ConfigError("The configuration names no data sets; add for example 'sets: {msrc: 1.0}'.")
        if min(self.sets.values()) < 0 or sum(self.sets.values()) <= 0:
            raise ConfigError("The weights of 'sets' must not be negative, and one must be more than 0.")
        if self.mixed_precision not in PRECISIONS:
            raise ConfigError(f"mixed_precision is auto, no, bf16 or fp16, not '{self.mixed_precision}'.")
        if self.report_to not in (None, *TRACKERS):
            raise ConfigError(f"report_to is {', '.join(TRACKERS[:-1])} or {TRACKERS[-1]}, not '{self.report_to}'.")
        if self.push_to_hub and not self.hub_model_id:
            raise ConfigError("push_to_hub needs a place to go: add --hub_model_id owner/name.")
        if self.setting not in SETTINGS:
            raise ConfigError(f"setting is {', '.join(SETTINGS)}, not '{self.setting}'.")
        if self.setting == "transductive" and self.unseen in (None, "none"):
            raise ConfigError(
                "The transductive setting needs held-out classes; name a split, for example 'unseen: voc12'."
            )
        for name in ("self_training_start", "self_training_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share between 0 and 1, not {getattr(self, name)}.")
        try:
            require_inference(self.inference)
        except ValueError as error:
            raise ConfigError(f"{error}.") from None
        for name, value in self.inference.items():
            if name != "enlarge" and not isinstance(value, int):
                raise ConfigError(f"{name} of inference must be a whole number of pixels, not {value}.")
        if self.focal_normalise not in ("masks", "pairs"):
            raise ConfigError(f"focal_normalise is masks or pairs, not '{self.focal_normalise}'.")
        if self.crop % self.loss_stride:
            raise ConfigError(f"crop {self.crop} must divide by loss_stride {self.loss_stride}.")
        if isinstance(self.views_per_photo, dict) and min(self.views(name) for name in self.sets) < 1:
            raise ConfigError("views_per_photo needs a number of at least 1 for each data set, or 0 for all of them.")
        if (self.long_side is None) == (self.short_side is None):
            raise ConfigError("Give exactly one of long_side and short_side; set the other to null.")

    def model_config(self) -> ModelConfig:
        """The model that this run trains."""
        return ModelConfig.from_dict(self.model)

    def held_out(self) -> frozenset[str]:
        """Canonical names of the classes whose masks training must not see."""
        return frozenset() if self.setting == "fully_supervised" else load_split(self.unseen)

    @property
    def transductive(self) -> bool:
        """Whether the held-out names are known."""
        return self.setting == "transductive"

    @property
    def self_training_from(self) -> int:
        """The first micro step with pseudo-labels."""
        return round(self.self_training_start * self.max_train_steps) * self.gradient_accumulation_steps

    def views(self, name: str) -> int:
        """Stored views of each photo of a data set; 0 = none are stored."""
        return self.views_per_photo.get(name, 0) if isinstance(self.views_per_photo, dict) else self.views_per_photo

    def augmentation(self) -> Augmentation:
        """How views are drawn."""
        return Augmentation(
            crop=self.crop,
            long_side=self.long_side,
            short_side=self.short_side,
            scale=(float(self.scale[0]), float(self.scale[1])),
            aspect=self.aspect,
            uniform_scale=self.uniform_scale,
            photometric=self.photometric,
            hue=self.hue,
            largest_class=self.largest_class,
            stride=self.loss_stride,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


_MODEL_FIELDS = frozenset(field.name for field in fields(ModelConfig))
_TRAIN_FIELDS = frozenset(field.name for field in fields(TrainConfig))
_TEXT = frozenset(
    field.name for field in fields(TrainConfig) if "str" in field.type.split(" | ")
)  # a folder "2026" is one


_MODEL_TEXT = frozenset(field.name for field in fields(ModelConfig) if "str" in field.type.split(" | "))


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


def _read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Fields, and decoder -> those that differ for it (the key `per_decoder`)."""
    path = Path(path)
    if not path.is_file():
        path = CONFIG_FOLDER / path.name if path.suffix else CONFIG_FOLDER / f"{path.name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CONFIG_FOLDER.glob("*.yaml")))
        raise ConfigError(f"There is no configuration {path}. Known ones: {known}; or give a path.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    base = values.pop("base", None)
    merged, per_decoder = _read_yaml(path.parent / base) if base else ({}, {})
    for decoder, own in values.pop("per_decoder", {}).items():
        if decoder not in DECODERS or not isinstance(own, Mapping) or "decoder" in own:
            known = ", ".join(DECODERS)
            raise ConfigError(f"per_decoder of {path} must give a decoder ({known}) fields that differ, not {decoder}: {own}.")
        per_decoder = {**per_decoder, decoder: {**per_decoder.get(decoder, {}), **own}}
    _merge(merged, values)
    return merged, per_decoder


def _number_if_text(value: Any) -> Any:
    """YAML 1.1 reads 3e-4 and 2e4 as text; people write them, so numbers in that form are numbers here, at every depth."""
    if isinstance(value, dict):
        return {key: each if key in _MODEL_TEXT else _number_if_text(each) for key, each in value.items()}
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() else number
    return value


def load_config(path: str | Path, changes: Sequence[str] = (), **overrides: Any) -> TrainConfig:
    """Reads a configuration.

    Args:
        path: a YAML file, or the name of one in `train/configs`. Its key `base` names a file to start from; `per_decoder`
            holds, for each decoder, fields that differ from the others.
        changes: "key=value" with a YAML value, e.g. "preserve_weight=0", "gate_init=null", "sets={msrc: 1}".
        overrides: further fields; None leaves the file's value.

    Raises:
        ConfigError: unknown file or field, or a value that cannot be.
    """
    values, per_decoder = _read_yaml(path)
    given: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"'{change}' is no change of the form key=value.")
        try:
            _merge(given, {key.strip().removeprefix("model."): yaml.safe_load(text)})
        except yaml.YAMLError:
            raise ConfigError(f"'{text}' in '{change}' is not valid YAML; put quotation marks around text.") from None
    _merge(given, {key: value for key, value in overrides.items() if value is not None})
    decoder = (values.get("model", {}) | given.get("model", {})).get("decoder", ModelConfig.decoder)
    _merge(values, per_decoder.get(decoder, {}))
    _merge(values, given)
    if values.get("mixed_precision") is False:  # YAML 1.1 reads a bare "no" as false
        values["mixed_precision"] = "no"
    for key, value in values.items():
        values[key] = str(value) if key in _TEXT and not isinstance(value, list | None) else _number_if_text(value)
    try:
        return TrainConfig(**values)
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from None
