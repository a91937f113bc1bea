"""Checkpoints: trained weights and the configuration of the model.

A checkpoint is a folder with `config.json` and `model.safetensors` (or shards; see `ldvc.weights`). It stores prompts, adapter
and decoder only. The configuration names the frozen CLIP; a relative path starts at the checkpoint's folder. A folder may
instead hold one checkpoint for each decoder, in folders named after the decoders.

`config.json` is::

    {"model": {... ModelConfig ...},
     "seen_names": [...],                              names whose masks the decoder was trained on
     "seen_words": {name: [...]},                      other words that training used for these names
     "calibration": {"scale": 1.0, "bias": 0.0, "threshold": 0.5},   from mask logits to scores, see ldvc/calibration.py
     "inference": {"long_side": 448}                   or {"short_side": 512, "window": 512, "stride": 426}
     "plain_clip": {"dense": "naclip", ...}            settings of the decoder "clip", see ldvc/config.py
     ...}

A CLIP needs no checkpoint for the decoder "clip": `load_checkpoint` also opens an architecture of open_clip, or "full".
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from ldvc.calibration import Calibration
from ldvc.config import DECODERS, FULL_CLIP_SETTINGS, ModelConfig, PlainClipSettings
from ldvc.errors import CheckpointError, WeightsNotFoundError
from ldvc.inference import require_inference
from ldvc.modeling.clip import LITE_FOLDER, NO_LITE, FrozenClip, build_clip
from ldvc.modeling.clip_weights import FULL_CLIP, WEIGHTS_VARIABLE, default_weights, is_architecture, weights_here
from ldvc.modeling.model import LDVC, PlainClip
from ldvc.weights import hub_reachable, load_tensors, read_json, replaced_files, save_tensors, write_json

CONFIG_FILE = "config.json"
DEFAULT_DECODER = "ldvc"
DEFAULT_METADATA: dict[str, Any] = {
    "seen_names": [],
    "calibration": {"scale": 1.0, "bias": 0.0},
    "inference": {"long_side": 448},
}
HUB_FILES = ["*.safetensors", "*.json", "*.md"]  # no pickles, no code
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


def save_checkpoint(
    model: LDVC,
    folder: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    clip: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the trainable part of a model; returns the folder.

    Args:
        model: only its trainable part is written.
        folder: a checkpoint that it already holds is replaced when all files are written.
        metadata: "seen_names", "seen_words", "calibration", "inference" and any other values for `config.json`.
        clip: name of the CLIP in the configuration, such as "../clip"; None = that of the model's configuration. The path of
            a folder becomes relative to `folder`, so that both can be moved together.
        dtype: type of the stored matrices; None = float32.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written; an existing checkpoint is unchanged.
    """
    folder = Path(folder)
    metadata = dict(metadata or {})
    assert "model" not in metadata, "the model's configuration is written from the model itself"
    config = replace(model.config, clip=_relative_clip(model.config.clip, folder) if clip is None else clip)
    content = {"model": config.to_dict(), **DEFAULT_METADATA, **metadata}
    with replaced_files(folder) as new:
        save_tensors(model.trainable_state_dict(), new, dtype=dtype)
        write_json(new / CONFIG_FILE, content)
    return folder


def load_checkpoint(
    source: str | Path, *, decoder: str | None = None, clip: FrozenClip | None = None, sibling: LDVC | None = None
) -> tuple[PlainClip, dict[str, Any]]:
    """Build the model that a checkpoint describes, on the CPU and in evaluation mode.

    Args:
        source: folder, Hub id ("owner/name") or "lite"; with decoder "clip" also an open_clip architecture, or "full", which
            is the CLIP of the paper. The weights are OpenAI's, from the Hub or the file that `LDVC_CLIP_WEIGHTS` names.
        decoder: the decoder to load if a folder holds several; None = "ldvc", or the first one. "clip" (plain similarity, which
            has no weights of its own) loads any decoder; use the model's `frozen_logits`.
        clip: a CLIP to use instead of the one that the checkpoint names.
        sibling: a loaded model, whose CLIP is shared if the checkpoint names the same one.

    Returns:
        The model, and the metadata: everything in config.json except the model's configuration. For a CLIP of open_clip,
        `plain_clip` is completed with `FULL_CLIP_SETTINGS`.

    Raises:
        WeightsNotFoundError: the source does not exist, or the Hub cannot be reached.
        CheckpointError: the source is no checkpoint of this project, or does not hold this decoder.
    """
    if is_plain_clip(str(source)):
        config = _plain_config(str(source))
        if decoder != "clip":
            raise CheckpointError(
                f"{config.clip} alone has no decoder {decoder or DEFAULT_DECODER!r}, only 'clip': train one "
                "(docs/training.md) and give its folder or Hub id, on the page as LDVC_FULL."
            )
        return PlainClip(config, clip).eval(), {**DEFAULT_METADATA, "plain_clip": dict(FULL_CLIP_SETTINGS)}
    root = _source_folder(source)
    folder = _checkpoint_folder(root, decoder)
    config, metadata = read_config(folder)
    if decoder not in (None, "clip", config.decoder):
        raise CheckpointError(f"{folder} holds the decoder {config.decoder!r}, not {decoder!r}; ask for {config.decoder!r}.")
    if clip is None:
        if root != Path(source).expanduser() and str(source) != "lite":
            _require_inside(config, folder, root)
        config = replace(config, clip=_resolve_clip(config.clip, folder))
        same_clip = sibling is not None and (sibling.config.clip, sibling.config.pretrained) == (config.clip, config.pretrained)
        clip = sibling.clip if same_clip else build_clip(config.clip, config.pretrained)
    if is_architecture(config.clip):
        metadata["plain_clip"] = FULL_CLIP_SETTINGS | (metadata.get("plain_clip") or {})
    tensors = load_tensors(folder)
    try:
        model = LDVC(config, clip)
        model.load_trainable_state_dict(tensors)
    except (AssertionError, CheckpointError) as error:  # AssertionError: numbers in config.json do not fit the CLIP
        raise CheckpointError(f"{folder} cannot be used: {error}") from error
    return model.eval(), metadata


def is_plain_clip(source: str) -> bool:
    """Whether a source is a CLIP without decoders: "full" or an architecture of open_clip."""
    return source == "full" or is_architecture(source)


def clip_to_download(source: str) -> tuple[str, str] | None:
    """Architecture and tag of the weights that `load_checkpoint` would download for the CLIP of a source, or None."""
    plain = is_plain_clip(source)
    config = _plain_config(source) if plain else read_config(_checkpoint_folder(_source_folder(source), None))[0]
    if not is_architecture(config.clip) or config.pretrained is None or os.environ.get(WEIGHTS_VARIABLE):
        return None
    return None if weights_here(config.clip, config.pretrained) else (config.clip, config.pretrained)


def _plain_config(source: str) -> ModelConfig:
    architecture = FULL_CLIP if source == "full" else source
    weights = "openai" if os.environ.get(WEIGHTS_VARIABLE) else default_weights(architecture)
    return ModelConfig(clip=architecture, pretrained=weights, visual_prompts=0, text_prompts=False, text_adapter=False)


def read_config(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's configuration and the metadata of a checkpoint; raises CheckpointError if config.json cannot be used."""
    path = Path(folder) / CONFIG_FILE
    content = read_json(path)
    if not isinstance(content.get("model"), dict):
        raise CheckpointError(f"{path} does not describe a model of this project: it has no 'model'.")
    try:
        config, metadata = ModelConfig.from_dict(content.pop("model")), {**DEFAULT_METADATA, **content}
        for key in ("calibration", "clip_calibration"):
            Calibration.from_metadata(metadata.get(key))
        plain = PlainClipSettings.from_metadata(metadata.get("plain_clip"))
        for inference in (metadata["inference"], metadata["inference"] if plain.inference is None else plain.inference):
            require_inference(inference)
        words = metadata.get("seen_words") or {}
        for names in (metadata["seen_names"] or [], *(words.values() if isinstance(words, dict) else [None])):
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("'seen_names' must be a list of names, and 'seen_words' a list of words for each of them")
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds settings that cannot be used: {error}.") from error
    return config, metadata


def _source_folder(source: str | Path) -> Path:
    """The local folder of a source; a Hub repository is downloaded, or taken from the cache."""
    if str(source) == "lite":
        if not LITE_FOLDER.is_dir():
            raise WeightsNotFoundError(NO_LITE)
        return LITE_FOLDER
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.match(str(source)):
        raise WeightsNotFoundError(f"There is no folder {source}; give a folder, a Hub id (owner/name) or 'lite'.")
    try:
        return Path(snapshot_download(str(source), allow_patterns=HUB_FILES, local_files_only=not hub_reachable()))
    except LocalEntryNotFoundError as error:
        raise WeightsNotFoundError(
            f"{source} is not a folder here, and the Hub cannot be reached for it: connect to the network once, give a "
            "local folder, or use the bundled model 'lite'."
        ) from error
    except Exception as error:  # no such repository, no access, a broken download
        raise WeightsNotFoundError(f"{source} could not be fetched from the Hub ({error}).") from error


def _describes_model(folder: Path) -> bool:
    """Whether a folder holds one checkpoint; a folder of a CLIP has another kind of config.json."""
    try:
        return (folder / CONFIG_FILE).is_file() and "model" in read_json(folder / CONFIG_FILE)
    except CheckpointError:
        return True  # damaged: `read_config` raises the error


def _checkpoint_folder(folder: Path, decoder: str | None) -> Path:
    if decoder not in (None, "clip", *DECODERS):
        raise CheckpointError(f"There is no decoder {decoder!r}; choose one of {', '.join(DECODERS)} or 'clip'.")
    if _describes_model(folder):
        return folder
    available = [name for name in DECODERS if _describes_model(folder / name)]
    if not available:
        raise CheckpointError(f"{folder} holds no checkpoint: neither {CONFIG_FILE} with a model nor folders of decoders.")
    if decoder in (None, "clip"):
        decoder = DEFAULT_DECODER if DEFAULT_DECODER in available else available[0]
    if decoder not in available:
        raise CheckpointError(f"{folder} does not hold the decoder {decoder!r}; it has {', '.join(available)}.")
    return folder / decoder


def _require_inside(config: ModelConfig, folder: Path, root: Path) -> None:
    """Raises CheckpointError if a checkpoint from the Hub names files of this machine."""
    clip = (folder / Path(config.clip).expanduser()).resolve()
    outside = config.clip.startswith((".", "/", "~")) and not clip.is_relative_to(root.resolve())
    if outside or (config.pretrained and Path(config.pretrained).expanduser().exists()):
        raise CheckpointError(
            f"{folder / CONFIG_FILE} names a file outside the repository as CLIP ({config.clip}, {config.pretrained}); "
            "download the repository and give its folder, if you trust it."
        )


def _relative_clip(clip: str, folder: Path) -> str:
    """Inverse of `_resolve_clip`; names stay. Paths are resolved first, because ".." after a symbolic link leads elsewhere."""
    if clip == "lite" or not Path(clip).is_dir():
        return clip
    path = os.path.relpath(Path(clip).resolve(), folder.resolve())
    return path if path.startswith(".") else f"./{path}"  # "clip" alone would be the name of an architecture


def _resolve_clip(clip: str, folder: Path) -> str:
    """The CLIP of a configuration: a relative path starts at the checkpoint's folder; names stay."""
    if not clip.startswith((".", "/", "~")):
        return clip
    path = (folder / Path(clip).expanduser()).resolve()
    if not path.is_dir():
        raise WeightsNotFoundError(f"The CLIP that the checkpoint in {folder} needs is not at {path}.")
    return str(path)
