"""Folders of weights, and whether the Hub can be reached.

A folder of weights holds `model.safetensors`, or, if that is too large, shards in Hugging Face's format:
`model-00001-of-00003.safetensors` and so on, with `model.safetensors.index.json`, which maps tensors to files. A tensor that is
larger than one shard (a token embedding) is split by rows and stored as `name::0`, `name::1`, ...; `load_tensors` concatenates
the pieces. Files that Python's pickle wrote (.bin, .pt, .pth, .ckpt) are not read: opening one can run any code.

The parent folder may hold `SHA256SUMS`, as `sha256sum */*.safetensors` prints it; files that it names are checked against it.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import struct
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldvc.errors import CheckpointError, WeightsNotFoundError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHECKSUMS = "SHA256SUMS"
NEW_FOLDER = ".new"  # of files that are not complete yet
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_SHARD_BYTES = 9_500_000  # code hosts and the Hub want large-file storage from 10 MB on
MAX_JSON_BYTES = 50_000_000
_TYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
_SHARD = re.compile(r"^model-\d{5}-of-\d{5}\.safetensors$")
_PIECE = re.compile(r"^(?P<name>.+)::(?P<index>\d{1,9})$")


@contextmanager
def replaced_files(folder: str | Path) -> Iterator[Path]:
    """A new folder inside `folder`, whose files move into `folder` at the end.

    Before that, nothing in `folder` changes: if the disk is full, the old files stay. Old weights (the files of the old index,
    and what is named like a shard) that are not written again are deleted in the end; any other file stays.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    folder = Path(folder)
    new = folder / NEW_FOLDER
    try:
        shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
        new.mkdir(parents=True)
        try:
            yield new
            # a configuration or index last: before it is there, the old one describes the folder
            written = sorted((path.name for path in new.iterdir()), key=lambda name: (name.endswith(".json"), name))
            shards = {path.name for path in folder.iterdir() if _SHARD.match(path.name)}
            old = {SINGLE_FILE, INDEX_FILE, *_listed_shards(folder), *shards} - set(written)
            for name in written:
                os.replace(new / name, folder / name)
            for name in old:
                (folder / name).unlink(missing_ok=True)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"{folder} cannot be written ({reason}); free some space or choose another folder, and try again. The files that "
            "were there are unchanged."
        ) from error


def _listed_shards(folder: Path) -> set[str]:
    """Names of the shards in an index that lie in its folder; empty without a readable index."""
    try:
        return set(_read_index(folder / INDEX_FILE)) if (folder / INDEX_FILE).is_file() else set()
    except CheckpointError:
        return set()


def save_tensors(
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write tensors to a folder, in several files if one would be too large; existing weights are replaced in the end.

    Args:
        tensors: by name.
        folder: created if it does not exist.
        dtype: of stored floating-point tensors with two or more dimensions. Vectors (norms, biases, running variances,
            which may exceed the range of half precision) and integers keep their type.
        max_shard_bytes: largest size of the tensors in one file.

    Returns:
        The files with tensors.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written; the old weights stay.
    """
    pieces: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        assert _PIECE.match(name) is None, f"tensor name {name!r} looks like a piece of a split tensor"
        tensor = tensor.detach().cpu()
        if dtype is not None and tensor.is_floating_point() and tensor.ndim >= 2:
            tensor = tensor.to(dtype)
        if tensor.nbytes > max_shard_bytes:
            rows = max(1, max_shard_bytes * tensor.shape[0] // tensor.nbytes)
            pieces |= {f"{name}::{i}": piece for i, piece in enumerate(tensor.split(rows))}
        else:
            pieces[name] = tensor
    # clone: safetensors refuses tensors that share memory, as pieces of one tensor do
    pieces = {name: piece.clone(memory_format=torch.contiguous_format) for name, piece in pieces.items()}

    split = split_torch_state_dict_into_shards(pieces, max_shard_size=max_shard_bytes)
    with replaced_files(folder) as new:
        for name, stored in split.filename_to_tensors.items():
            save_file({piece: pieces[piece] for piece in stored}, new / name, metadata={"format": "pt"})
            with safe_open(new / name, framework="pt") as file:
                assert set(file.keys()) == set(stored), f"{name} lacks tensors"
        if split.is_sharded:
            write_json(new / INDEX_FILE, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    return [Path(folder) / name for name in split.filename_to_tensors]


def load_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Read tensors that `save_tensors`, or any tool with the Hugging Face format, wrote. Those of floats are float32.

    Args:
        folder: with model.safetensors, or shards and their index.

    Raises:
        WeightsNotFoundError: a file is missing, or there are only pickles.
        CheckpointError: a file is damaged, is not the one of `SHA256SUMS`, or holds NaN or infinite numbers.
    """
    folder = Path(folder)
    if (folder / SINGLE_FILE).is_file():
        shards: dict[str, set[str] | None] = {SINGLE_FILE: None}
    elif (folder / INDEX_FILE).is_file():
        shards = dict(_read_index(folder / INDEX_FILE))
    else:
        raise WeightsNotFoundError(f"There are no weights in {folder}: {no_safetensors(folder)}")

    checksums = _read_checksums(folder)
    stored: dict[str, Tensor] = {}
    for name, expected in shards.items():
        tensors = read_safetensors(folder / name, checksum=checksums.get(name))
        if expected is not None and set(tensors) != expected:
            raise CheckpointError(
                f"Weights are damaged: {folder / name} does not hold the tensors that {INDEX_FILE} lists for it; "
                "fetch the folder again."
            )
        stored |= tensors

    tensors = _joined(stored, folder)
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    require_finite(tensors, folder)
    return tensors


def _joined(stored: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Tensors with the pieces of split ones put together."""
    tensors: dict[str, Tensor] = {}
    split: dict[str, dict[int, Tensor]] = {}
    for name, tensor in stored.items():
        match = _PIECE.match(name)
        if match:
            split.setdefault(match["name"], {})[int(match["index"])] = tensor
        else:
            tensors[name] = tensor
    for name, parts in split.items():
        if sorted(parts) != list(range(len(parts))) or len({part.shape[1:] for part in parts.values()}) > 1:
            raise CheckpointError(f"Weights are damaged: pieces of {name} in {folder} are missing; fetch the folder again.")
        tensors[name] = torch.cat([parts[i] for i in range(len(parts))])
    return tensors


def read_safetensors(path: Path, *, checksum: str | None = None) -> dict[str, Tensor]:
    """The tensors of one file, as stored.

    Args:
        path: of the file.
        checksum: its SHA-256 (hex); None = not checked.

    Raises:
        WeightsNotFoundError: there is no such file.
        CheckpointError: it is damaged.
    """
    if not path.is_file():
        raise WeightsNotFoundError(f"Weights are incomplete: {path} is missing; copy or download the folder again.")
    try:
        digest = None if checksum is None else _digest(path)
        if digest == checksum:
            _check_header(path)
            return load_file(path)
    except Exception as error:  # SafetensorError, OSError, and what PyTorch raises for impossible shapes
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"Weights are damaged: {path} cannot be read ({reason}); fetch it again.") from error
    raise CheckpointError(
        f"Weights are damaged: {path} has the SHA-256 {digest}, not {checksum} as in {CHECKSUMS}; fetch it again."
    )


def _check_header(path: Path) -> None:
    """Checks what safetensors accepts although no checkpoint has it: names that occur twice and rare number types.

    safetensors itself refuses offsets that overlap or lie outside the file, and sizes that do not fit them.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= size <= min(MAX_JSON_BYTES, path.stat().st_size - 8):
            raise ValueError("its header has an impossible length")
        header = _parse(file.read(size))
    header.pop("__metadata__", None)
    if not {entry["dtype"] for entry in header.values()} <= _TYPES:
        raise ValueError("its header has an unknown type of numbers")


def require_finite(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Checks that no floating-point tensor holds NaN or infinite numbers.

    Raises:
        CheckpointError: one does.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise CheckpointError(
                f"The weights in {source} cannot be used: {name} holds NaN or infinite numbers; take an earlier checkpoint, or "
                "train again with a lower learning rate."
            )


def no_safetensors(folder: Path) -> str:
    """Why a folder without safetensors cannot be loaded: there are only pickles, or nothing."""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run any code when it is opened; ask for the same weights as {SINGLE_FILE}, "
            "or convert them with safetensors where you trust them."
        )
    return f"neither {SINGLE_FILE} nor {INDEX_FILE} is there; copy or download the whole folder."


def _read_index(path: Path) -> dict[str, set[str]]:
    """Shard -> names of its tensors.

    Raises:
        CheckpointError: the file is no index, or names files outside its folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"Weights are damaged: {path} is no index of shards; fetch it again.")
    shards: dict[str, set[str]] = {}
    for tensor, name in sorted(weight_map.items()):
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {name!r}, which is no safetensors file beside it; fetch the folder again.")
        shards.setdefault(name, set()).add(tensor)
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, which is an object.

    Raises:
        CheckpointError: it is missing, damaged, or larger than `MAX_JSON_BYTES`.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES // 1_000_000} MB")
        return _parse(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read ({reason}); copy or download the whole folder again.") from error


def _parse(content: bytes) -> dict[str, Any]:
    """A JSON object; no object in it has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a name occurs twice in it")
        return values

    value = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(value, dict):
        raise ValueError("it holds no object")
    return value


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_checksums(folder: Path) -> dict[str, str]:
    """File of a folder -> SHA-256, from `SHA256SUMS` in the parent folder; empty without one."""
    path = folder.resolve().parent / CHECKSUMS
    if not path.is_file():
        return {}
    lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    places = {line[1].strip().lstrip("*"): line[0] for line in lines if len(line) == 2}
    prefix = f"{folder.resolve().name}/"
    return {name.removeprefix(prefix): digest for name, digest in places.items() if name.startswith(prefix)}


def write_checksums(folder: Path) -> Path:
    """Write `SHA256SUMS` of the weights in the folders inside a folder, as `sha256sum */*.safetensors` prints it."""
    files = sorted(folder.glob("*/*.safetensors"))
    lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    return folder / CHECKSUMS


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
