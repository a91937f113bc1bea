"""Folders of weights, and whether the Hub can be reached.

A folder of weights holds `model.safetensors`, or, if that is too large, shards in Hugging Face's format:
`model-00001-of-00003.safetensors` and so on, with `model.safetensors.index.json`, which maps tensors to files. A tensor that is
larger than one shard (a token embedding) is split by rows and stored as `name::0`, `name::1`, ... Pickles are not read.

The parent folder may hold `SHA256SUMS`, as `sha256sum */*.safetensors` prints it; files that it names are checked against it.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
NEW_FOLDER = ".new"  # holds files until all are written
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_SHARD_BYTES = 9_500_000  # code hosts and the Hub require large-file storage from 10 MB on
MAX_JSON_BYTES = 50_000_000
_TYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
_SHARD = re.compile(r"^model-\d{5}-of-\d{5}\.safetensors$")
_PIECE = re.compile(r"^(?P<name>.+)::(?P<index>\d{1,9})$")


@contextmanager
def replaced_files(folder: str | Path) -> Iterator[Path]:
    """A new folder inside `folder`, whose files move into `folder` at the end.

    Until then nothing in `folder` changes: if the disk is full, the old files stay. At the end, old weights (files in the old
    index, and files named like shards) that were not written again are deleted; other files stay.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    folder = Path(folder)
    new = folder / NEW_FOLDER
    try:
        shutil.rmtree(new, ignore_errors=True)  # left by a killed process
        new.mkdir(parents=True)
        try:
            yield new
            # the configuration or index is moved last: until then, the old one describes the folder
            written = sorted((path.name for path in new.iterdir()), key=lambda name: (name.endswith(".json"), name))
            old = {SINGLE_FILE, INDEX_FILE, *(path.name for path in folder.iterdir() if _SHARD.match(path.name))}
            with suppress(CheckpointError):  # there is no index, or it cannot be read
                old |= _read_index(folder / INDEX_FILE).keys()
            for name in written:
                os.replace(new / name, folder / name)
            for name in old.difference(written):
                (folder / name).unlink(missing_ok=True)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"{folder} cannot be written ({reason}); free some space or choose another folder, and try again. The files that "
            "were there are unchanged."
        ) from error


def save_tensors(
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write tensors to a folder, in several files if one would be larger than `max_shard_bytes`; returns the files.

    `dtype` is the type of stored floating-point tensors with two or more dimensions. Vectors (norms, biases, running variances,
    which may exceed the range of half precision) and integers keep their type. Existing weights are replaced at the end.

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
    """Read tensors from `save_tensors`, or from any tool with the Hugging Face format. Floating-point tensors become float32.

    Raises:
        WeightsNotFoundError: a file is missing, or there are only pickles.
        CheckpointError: a file is damaged, does not match `SHA256SUMS`, or holds NaN or infinite numbers.
    """
    folder = Path(folder)
    single, index = (folder / SINGLE_FILE).is_file(), folder / INDEX_FILE
    if not single and not index.is_file():
        raise WeightsNotFoundError(f"There are no weights in {folder}: {no_safetensors(folder)}")
    checksums, stored = _read_checksums(folder), {}
    for name, expected in {SINGLE_FILE: None}.items() if single else _read_index(index).items():
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
    """Join the pieces of split tensors."""
    tensors = {name: tensor for name, tensor in stored.items() if not _PIECE.match(name)}
    split: dict[str, dict[int, Tensor]] = {}
    for match in filter(None, map(_PIECE.match, stored)):
        split.setdefault(match["name"], {})[int(match["index"])] = stored[match[0]]
    for name, parts in split.items():
        if sorted(parts) != list(range(len(parts))) or len({part.shape[1:] for part in parts.values()}) > 1:
            raise CheckpointError(f"Weights are damaged: pieces of {name} in {folder} are missing; fetch the folder again.")
        tensors[name] = torch.cat([parts[i] for i in range(len(parts))])
    return tensors


def read_safetensors(path: Path, *, checksum: str | None = None) -> dict[str, Tensor]:
    """The tensors of one file, as stored; its SHA-256 (hex) is compared with `checksum`, if that is given.

    Raises WeightsNotFoundError if there is no such file, CheckpointError if it is damaged.
    """
    if not path.is_file():
        raise WeightsNotFoundError(f"Weights are incomplete: {path} is missing; copy or download the folder again.")
    try:
        digest = None if checksum is None else hashlib.sha256(path.read_bytes()).hexdigest()
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
    """Raises ValueError for what safetensors accepts but no checkpoint has: duplicate names and rare number types."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(MAX_JSON_BYTES, path.stat().st_size - 8):
            raise ValueError("its header has an impossible length")
        header = _parse(file.read(size))
    header.pop("__metadata__", None)
    if not {entry["dtype"] for entry in header.values()} <= _TYPES:
        raise ValueError("its header has an unknown type of numbers")


def require_finite(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raises CheckpointError if a floating-point tensor holds NaN or infinite numbers."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise CheckpointError(
                f"The weights in {source} cannot be used: {name} holds NaN or infinite numbers; take an earlier checkpoint, or "
                "train again with a lower learning rate."
            )


def no_safetensors(folder: Path) -> str:
    """The reason why a folder without safetensors cannot be loaded: it holds only pickles, or no weights."""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run any code when it is opened; ask for the same weights as {SINGLE_FILE}, "
            "or convert them with safetensors where you trust them."
        )
    return f"neither {SINGLE_FILE} nor {INDEX_FILE} is there; copy or download the whole folder."


def _read_index(path: Path) -> dict[str, set[str]]:
    """Shard -> names of its tensors; raises CheckpointError if the file is no index, or names files outside its folder."""
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
    """The object in a JSON file; raises CheckpointError if it is missing, damaged, or larger than `MAX_JSON_BYTES`."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES // 1_000_000} MB")
        return _parse(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read ({reason}); copy or download the whole folder again.") from error


def _parse(content: bytes) -> dict[str, Any]:
    """Parse a JSON object; raises ValueError if it is none, or if a key occurs twice."""

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
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*/*.safetensors"))}
    lines = [f"{digest}  {path.relative_to(folder).as_posix()}\n" for path, digest in digests.items()]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    return folder / CHECKSUMS


def hub_reachable() -> bool:
    """Whether the Hugging Face Hub can be reached within 3 seconds. (Its client retries for almost a minute.)

    With a proxy this cannot be checked, and the result is True.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    if urllib.request.getproxies():
        return True
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        with socket.create_connection((endpoint.hostname or "huggingface.co", port), timeout=3.0):
            return True
    except OSError:
        return False
