"""Files of CLIP weights: where they are on this machine or on the Hub, and how they are read.

From folders, and from Hub repositories of this project, only safetensors and JSON are read. A pickle is read only if its own
path is given, or if it holds the published weights of an architecture: with `weights_only=True`, or as OpenAI's TorchScript.
"""

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor
from tqdm import tqdm

from ldvc.errors import CheckpointError, LdvcError, WeightsNotFoundError
from ldvc.weights import hub_reachable, no_safetensors, read_safetensors, require_finite

FULL_CLIP = "ViT-B-16-quickgelu"  # with OpenAI's weights, the CLIP of the paper
WEIGHTS_VARIABLE = "LDVC_CLIP_WEIGHTS"  # environment: a local file with the weights of the tag "openai"
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")  # stored by OpenAI with the weights
PUBLISHED_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")


def is_architecture(clip: str) -> bool:
    """Whether `clip` is one of open_clip's names."""
    return clip in open_clip.list_models()


def default_weights(clip: str) -> str:
    """Tag of the weights of an architecture: OpenAI's if they exist, otherwise the first in open_clip's list.

    Raises WeightsNotFoundError if open_clip lists none that were trained with the activation of this architecture.
    """
    quick = open_clip.get_model_config(clip).get("quick_gelu", False)
    for tag in sorted(open_clip.list_pretrained_tags_by_model(clip), key=lambda tag: tag != "openai"):
        if open_clip.get_pretrained_cfg(clip, tag).get("quick_gelu", False) == quick:
            return tag
    raise WeightsNotFoundError(
        f"open_clip has no weights of {clip}; take another architecture, or give a local file by {WEIGHTS_VARIABLE}."
    )


def weights_here(clip: str, pretrained: str) -> bool:
    """Whether the weights of an architecture are on this machine."""
    try:
        return _local_weights(clip, pretrained)[0] is not None
    except LdvcError:
        return False


def find_pretrained(clip: str, pretrained: str, *, tqdm_class: type[tqdm] | None = None) -> tuple[Path, Mapping[str, Any]]:
    """The file with the weights of an architecture, and their preprocessing. Missing weights are downloaded.

    Args:
        clip, pretrained: see `build_clip`.
        tqdm_class: progress bar of the download.

    Raises:
        WeightsNotFoundError: the weights cannot be found or downloaded.
        CheckpointError: they were trained with another activation.
    """
    local, tag = _local_weights(clip, pretrained)
    if local is not None:
        return local, tag
    try:
        if not hub_reachable():
            raise ConnectionError("the Hub cannot be reached")
        return _download(tag, tqdm_class), tag
    except Exception as error:  # open_clip and the Hub's client raise many types
        logging.getLogger(__name__).info("download of %s / %s failed: %s", clip, pretrained, error)
        raise WeightsNotFoundError(
            f"The weights {pretrained!r} of {clip} are not on this machine and cannot be downloaded: connect to the "
            "network once, or give the path of a local file of weights as `pretrained`, or use the bundled model 'lite'."
        ) from error


def _download(tag: Mapping[str, Any], tqdm_class: type[tqdm] | None) -> Path:
    """Download what open_clip lists for a tag."""
    repository, _, filename = tag.get("hf_hub", "").rpartition("/")
    if not repository:
        return Path(open_clip.download_pretrained(tag))
    try:
        return Path(hf_hub_download(repository, filename or PUBLISHED_FILES[0], tqdm_class=tqdm_class))
    except EntryNotFoundError as error:
        if filename or isinstance(error, LocalEntryNotFoundError):  # the latter: the Hub did not answer
            raise
        return Path(hf_hub_download(repository, PUBLISHED_FILES[1], tqdm_class=tqdm_class))


def _local_weights(clip: str, pretrained: str) -> tuple[Path | None, Mapping[str, Any]]:
    """The file with the weights on this machine, or None, and the entry of open_clip about them."""
    path = Path(pretrained).expanduser()
    variable = os.environ.get(WEIGHTS_VARIABLE)
    if pretrained == "openai" and variable:
        path = Path(variable).expanduser()
        if not path.is_file():
            raise WeightsNotFoundError(f"There is no file {variable}, which {WEIGHTS_VARIABLE} names; correct it or unset it.")
    if path.is_file():
        return path, {}
    if path.is_dir():
        return weight_file(path), {}
    tag = open_clip.get_pretrained_cfg(clip, pretrained)
    if not tag:
        known_tags = ", ".join(open_clip.list_pretrained_tags_by_model(clip)) or "none"
        raise WeightsNotFoundError(
            f"{pretrained!r} is neither a file nor a folder nor a known set of weights for {clip} (known: {known_tags})."
        )
    if tag.get("quick_gelu", False) != open_clip.get_model_config(clip).get("quick_gelu", False):
        other = clip.removesuffix("-quickgelu") if clip.endswith("-quickgelu") else f"{clip}-quickgelu"
        raise CheckpointError(
            f"The weights {pretrained!r} were trained with another activation than that of {clip}: ask for {other!r}."
        )
    repository, _, filename = tag.get("hf_hub", "").rpartition("/")
    for name in [filename] if filename else PUBLISHED_FILES:
        cached = try_to_load_from_cache(repository, name) if repository else None
        if isinstance(cached, str):
            return Path(cached), tag
    old_cache = Path.home() / ".cache" / "clip" / tag.get("url", "").rpartition("/")[2]
    return (old_cache if old_cache.is_file() else None), tag


def weight_file(folder: Path) -> Path:
    """The only file of weights in a folder, as safetensors."""
    files = sorted(folder.glob("*.safetensors"))
    published = [folder / name for name in PUBLISHED_FILES if folder / name in files]
    if len(files) > 1 and not published:
        raise WeightsNotFoundError(f"{folder} holds several files of weights; give the path of one.")
    if not files:
        raise WeightsNotFoundError(f"{folder} holds no file of weights that can be used: {no_safetensors(folder)}")
    return (published or files)[0]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file in any published format, in float32; raises CheckpointError if it cannot be read."""
    state = read_safetensors(path) if path.suffix == ".safetensors" else _read_archive(path)
    state = {name: tensor.float() for name, tensor in state.items()}
    require_finite(state, path)
    return state


def _read_archive(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`, or of OpenAI's TorchScript."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about TorchScript
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except RuntimeError:  # the archives of OpenAI have no plain tensors
                state = torch.jit.load(str(path), map_location="cpu").state_dict()
        state = state.get("state_dict", state)  # training checkpoints nest the tensors
        state = {name.removeprefix("module."): tensor for name, tensor in state.items() if name not in OPENAI_NUMBERS}
        assert all(isinstance(tensor, Tensor) for tensor in state.values()), "it holds other things than tensors"
        return state
    except Exception as error:  # PyTorch raises many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as CLIP weights ({reason}); give a safetensors file, or fetch it again."
        ) from error
