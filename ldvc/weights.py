"""Folders of weights, and whether the Hub can be reached.

A folder of weights holds `model.safetensors`, or, if that is too large, shards in Hugging Face's format:
`model-00001-of-00003.safetensors` and so on, with `model.safetensors.index.json`, which maps tensors to files. A tensor that is
larger than one shard (a token embedding) is split by rows and stored as `name::0`, `name::1`, ...; `load_tensors` concatenates
the pieces.
"""

import json
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldvc.errors import CheckpointError, WeightsNotFoundError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 9_500_000  # code hosts and the Hub want large-file storage from 10 MB on
_PIECE = re.compile(r"^(?P<name>.+)::(?P<index>\d+)$")


def save_tensors(
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write tensors to a folder, in several files if one would be too large; existing weights are replaced.

    Args:
        tensors: by name.
        folder: created if it does not exist.
        dtype: of stored floating-point tensors with two or more dimensions. Vectors (norms, biases, running variances,
            which may exceed the range of half precision) and integers keep their type.
        max_shard_bytes: largest size of the tensors in one file.

    Returns:
        The files with tensors.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("model*.safetensors"), folder / INDEX_FILE]:
        old.unlink(missing_ok=True)

    pieces: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        assert _PIECE.match(name) is None, f"tensor name {name!r} looks like a piece of a split tensor"
        tensor = tensor.detach().cpu()
        if dtype is not None and tensor.is_floating_point() and tensor.ndim >= 2:
            tensor = tensor.to(dtype)
        if tensor.nbytes > max_shard_bytes:
            row_bytes = tensor.nbytes // tensor.shape[0]
            rows = max(1, max_shard_bytes // row_bytes)
            pieces |= {f"{name}::{i}": piece for i, piece in enumerate(tensor.split(rows))}
        else:
            pieces[name] = tensor
    # clone: safetensors refuses tensors that share memory, as pieces of one tensor do
    pieces = {name: piece.clone(memory_format=torch.contiguous_format) for name, piece in pieces.items()}

    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, piece in pieces.items():
        if shards[-1] and filled + piece.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = piece
        filled += piece.nbytes

    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE_FILE, metadata={"format": "pt"})
        return [folder / SINGLE_FILE]
    files, weight_map = [], {}
    for i, shard in enumerate(shards, start=1):
        path = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        files.append(path)
        weight_map |= dict.fromkeys(shard, path.name)
    total_size = sum(piece.nbytes for piece in pieces.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def load_tensors(folder: str | Path, *, dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
    """Read tensors that `save_tensors`, or any tool with the Hugging Face format, wrote.

    Args:
        folder: with model.safetensors, or shards and their index.
        dtype: floating-point tensors are converted to it; None = as stored.

    Raises:
        WeightsNotFoundError: a file is missing.
        CheckpointError: a file is damaged.
    """
    folder = Path(folder)
    if (folder / SINGLE_FILE).is_file():
        files = [folder / SINGLE_FILE]
    elif (folder / INDEX_FILE).is_file():
        try:
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            files = [folder / name for name in sorted(set(index["weight_map"].values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            path = folder / INDEX_FILE
            raise CheckpointError(f"Weights are damaged: {path} is no index of shards; fetch it again.") from error
    else:
        raise WeightsNotFoundError(
            f"There are no weights in {folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there."
        )

    stored: dict[str, Tensor] = {}
    for path in files:
        if not path.is_file():
            raise WeightsNotFoundError(f"Weights are incomplete: {path} is missing; copy or download the folder again.")
        try:
            stored |= load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"Weights are damaged: {path} cannot be read ({error}); fetch it again.") from error

    tensors: dict[str, Tensor] = {}
    split: dict[str, dict[int, Tensor]] = {}
    for name, tensor in stored.items():
        match = _PIECE.match(name)
        if match:
            split.setdefault(match["name"], {})[int(match["index"])] = tensor
        else:
            tensors[name] = tensor
    for name, parts in split.items():
        tensors[name] = torch.cat([parts[i] for i in sorted(parts)])
    if dtype is None:
        return tensors
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def hub_reachable(*, timeout: float = 3.0) -> bool:
    """Whether the Hugging Face Hub can be reached.

    Without network, the Hub's client retries for almost a minute; this check reports the problem sooner. With a proxy it
    cannot be checked, and the result is True.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    if urllib.request.getproxies():
        return True
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        with socket.create_connection((endpoint.hostname or "huggingface.co", port), timeout=timeout):
            return True
    except OSError:
        return False
