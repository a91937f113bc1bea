"""Checkpoints that are damaged, made to do harm, or written while the disk is full: one sentence that names file and remedy."""

import hashlib
import json
import pickle
import resource
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldvc.bundled import ASSETS
from ldvc.checkpoint import load_checkpoint, read_config, save_checkpoint
from ldvc.errors import CheckpointError, LdvcError, WeightsNotFoundError
from ldvc.modeling.clip import build_clip
from ldvc.web.models import ModelRegistry
from ldvc.web.session import Problem
from ldvc.weights import CHECKSUMS, PICKLES, load_tensors, save_tensors, write_checksums
from tests.full_disk import full_disk

ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
TWICE = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
HEADERS: dict[str, tuple[Any, int | None]] = {  # header, and its length if that is a lie
    "huge shape": ({"a": {**ENTRY, "shape": [2**40]}}, None),
    "outside the file": ({"a": {**ENTRY, "data_offsets": [8, 24]}}, None),
    "unknown type": ({"a": {**ENTRY, "dtype": "X9"}}, None),
    "type that no checkpoint has": ({"a": {**ENTRY, "dtype": "C64", "shape": [2]}}, None),
    "type that is a list": ({"a": {**ENTRY, "dtype": ["F32"]}}, None),
    "a name twice": (TWICE, None),
    "deep": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, None),
    "no object": ([1], None),
    "no text": (b"\xff\xfe\xff", None),
    "length of 2^60": ({"a": ENTRY}, 2**60),
    "length of 0": ({"a": ENTRY}, 0),
}


@contextmanager
def refused(kind: type[LdvcError], *parts: str, match: str | None = None) -> Iterator[None]:
    """An error is raised whose message is one line that names all parts and says what to do."""
    with pytest.raises(kind, match=match) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text and len(text) < 800, text
    assert all(part in text for part in parts), text


@contextmanager
def little_memory(kibibytes: int) -> Iterator[None]:
    """The peak of this process's memory grows by less."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < kibibytes


@pytest.mark.parametrize("kind", HEADERS)
def test_hostile_headers(kind: str, tmp_path: Path) -> None:
    header, length = HEADERS[kind]
    text, file = header if isinstance(header, bytes) else json.dumps(header).encode(), tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(16))
    with little_memory(100_000), refused(CheckpointError, str(file), "fetch it again"):
        load_tensors(tmp_path)


def test_truncated_files(tmp_path: Path) -> None:
    (file,) = save_tensors({"a": torch.randn(30, 10)}, tmp_path)
    whole = file.read_bytes()
    for cut in (0, 5, 8, 40, -1):
        file.write_bytes(whole[:cut])
        with refused(CheckpointError, str(file), "fetch it again"):
            load_tensors(tmp_path)


OUTSIDE = ["../up.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors", "x.bin", 3, None]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_files_beside_it_only(name: Any, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for place in (tmp_path / "up.safetensors", folder / "x.bin"):
        save_file({"a": torch.zeros(2)}, place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with refused(CheckpointError, "model.safetensors.index.json", repr(name), "fetch the folder again"):
        load_tensors(folder)
    save_tensors({"b": torch.zeros(2)}, folder)  # replaces the weights, and deletes nothing outside
    assert (tmp_path / "up.safetensors").is_file() and (folder / "x.bin").is_file()


def test_an_index_that_does_not_fit_its_shards(tmp_path: Path) -> None:
    save_tensors({"a": torch.randn(100, 10), "b": torch.randn(100, 10)}, tmp_path, max_shard_bytes=4000)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | {"c": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match="model-00001-of-00002.safetensors does not hold the tensors"):
        load_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"c": "model-00009-of-00009.safetensors"}}))
    with pytest.raises(WeightsNotFoundError, match="model-00009-of-00009.safetensors is missing; copy or download"):
        load_tensors(tmp_path)
    for damaged in ("{broken", "{}", '{"weight_map": 3}'):
        index.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
            load_tensors(tmp_path)
    (tmp_path / "pieces").mkdir()
    save_file({"a::0": torch.zeros(2), "a::2": torch.zeros(2)}, tmp_path / "pieces" / "model.safetensors")
    with pytest.raises(CheckpointError, match="pieces of a in .* are missing"):
        load_tensors(tmp_path / "pieces")


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    weights = torch.zeros(4, 5)
    for value, dtype in product(("nan", "inf", "-inf"), (torch.float32, torch.float16, torch.bfloat16)):
        weights[2, 3] = float(value)
        save_file({"fine": torch.zeros(2), "decoder.bad": weights.to(dtype)}, tmp_path / "model.safetensors")
        with refused(CheckpointError, str(tmp_path), "decoder.bad", "NaN", "earlier checkpoint"):
            load_tensors(tmp_path)


class Harm(str):
    """Its pickle makes a file of this path when it is opened."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path(self),))


@pytest.mark.parametrize("suffix", PICKLES)
def test_pickles_are_refused_and_not_opened(suffix: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint / "ldvc", tmp_path / "ldvc"))
    (folder / "model.safetensors").unlink()
    harm = folder / f"pytorch_model{suffix}"
    harm.write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    shutil.copytree(tiny_checkpoint / "clip", tmp_path / "clip")
    with refused(WeightsNotFoundError, str(folder), harm.name, "is a pickle, which can run any code", "safetensors"):
        load_checkpoint(folder)
    with refused(WeightsNotFoundError, harm.name, "is a pickle"):  # of a folder of CLIP weights
        build_clip("ViT-B-32-quickgelu", str(folder))
    with refused(CheckpointError, str(harm), "safetensors"):  # its own path: opened without running its code
        build_clip("ViT-B-32-quickgelu", str(harm))
    assert not (tmp_path / "harmed").exists()
    pickle.loads(harm.read_bytes())  # so it would have done harm
    assert (tmp_path / "harmed").exists()


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def change_json(file: Path, changes: dict[str, Any]) -> None:
    """Set values by their path: {"architecture.embed_dim": 3}."""
    content = json.loads(file.read_text())
    for path, value in changes.items():
        *parents, last = path.split(".")
        reduce(dict.__getitem__, parents, content)[last] = value
    file.write_text(json.dumps(content))


def test_only_safetensors_and_json_come_from_the_hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("ldvc.checkpoint.snapshot_download", lambda _, **options: asked.update(options) or str(checkpoint))
    monkeypatch.setattr("ldvc.checkpoint.hub_reachable", lambda: True)
    load_checkpoint("ann/ldvc")
    assert asked["allow_patterns"] == ["*.safetensors", "*.json", "*.md"]
    file, outside, weights = checkpoint / "ldvc" / "config.json", tmp_path / "clip", tmp_path / "weights.pt"
    shutil.copytree(checkpoint / "clip", outside)
    torch.save({}, weights)
    for clip, pretrained in (("../../clip", None), (str(outside), None), ("ViT-B-32", str(weights))):
        change_json(file, {"model.clip": clip, "model.pretrained": pretrained})
        with refused(CheckpointError, str(file), "outside the repository", "give its folder"):
            load_checkpoint("ann/ldvc")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("mixture", 3, "'mixture', .* newer version; update the project"),
        ("decoder_layers", 10**9, "decoder_layers must be less than"),
        ("visual_prompts", 10**9, "visual_prompts must be less than"),
        ("ffn_ratio", 10**6, "ffn_ratio must be less than"),
        ("decoder_heads", 7, "7 (heads do|does) not divide"),
        ("visual_prompts", 5, "do not fit the .* model.* have another shape"),
        ("decoder", "zegclip", "do not fit the .* model.* are missing"),
        ("text_adapter", False, "do not fit the .* model.* are unknown"),
    ],
)
def test_configurations_of_another_model(key: str, value: Any, words: str, checkpoint: Path) -> None:
    change_json(checkpoint / "ldvc" / "config.json", {f"model.{key}": value})
    with refused(CheckpointError, match=words):
        load_checkpoint(checkpoint / "ldvc")


def test_configurations_that_are_no_json(tmp_path: Path) -> None:
    digits = '{"model": {"topk": ' + "9" * 5000 + "}}"
    for content in ("{broken", "null", "[]", "[" * 100_000, '{"model": {}, "model": {}}', digits, "\ufeff{}"):
        (tmp_path / "config.json").write_text(content)
        for read in (read_config, load_checkpoint):
            with refused(CheckpointError, str(tmp_path / "config.json"), "copy or download"):
                read(tmp_path)


VISION, TEXT = "architecture.vision_cfg", "architecture.text_cfg"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{VISION}.layers": 10**9}, "1000000000 layers"),
        ({f"{VISION}.width": 2**20, f"{VISION}.head_width": 2**10}, "do not fit the architecture"),
        ({f"{TEXT}.vocab_size": 10**10}, "do not fit the architecture"),
        ({f"{TEXT}.context_length": 10**5}, "do not fit the architecture"),
        ({"architecture": [1]}, "needs 'vision_cfg' and 'text_cfg'"),
        ({"architecture.embed_dim": "wide"}, "not one of open_clip"),
        ({f"{TEXT}.tokenizer_kwargs": {"bpe_path": "/x"}}, "bpe_path"),
        ({"patch_embed": {"backbone": "hf-hub:ann/model"}}, "no patch embedding of timm"),
        ({"patch_embed": {"backbone": "local-dir:/tmp"}}, "no patch embedding of timm"),
        ({"mean": [0.5]}, "three numbers each"),
        ({"std": [0.5, 0.0, 0.5]}, "three numbers each"),
        ({"mean": ["a", "b", "c"]}, "three numbers each"),
    ],
)
def test_configurations_of_a_clip(changes: dict[str, Any], words: str, checkpoint: Path) -> None:
    change_json(checkpoint / "clip" / "config.json", changes)
    with little_memory(200_000), refused(LdvcError, match=words):
        build_clip(str(checkpoint / "clip"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shards", [1, 4])
def test_weights_stay_when_the_disk_is_full(shards: int, tmp_path: Path) -> None:
    old = {name: torch.randn(100, 10) for name in "abcd"}
    save_tensors(old, tmp_path, max_shard_bytes=16_000 // shards)
    (tmp_path / "model_ema.safetensors").write_bytes(b"of the user")
    files = contents(tmp_path)
    with full_disk(9000), refused(CheckpointError, str(tmp_path), "free some space", "unchanged"):
        save_tensors({"small": torch.zeros(2), "large": torch.randn(400, 10)}, tmp_path, max_shard_bytes=10_000)
    assert contents(tmp_path) == files
    save_tensors({"new": torch.ones(2)}, tmp_path)
    assert set(contents(tmp_path)) == {"model.safetensors", "model_ema.safetensors"}
    assert load_tensors(tmp_path)["new"].tolist() == [1, 1]


def test_a_checkpoint_stays_when_the_disk_is_full(checkpoint: Path) -> None:
    model, metadata = load_checkpoint(checkpoint / "ldvc")
    files = contents(checkpoint / "ldvc")
    weights = len(files["model.safetensors"])
    metadata["seen_names"] = ["x" * 100] * (weights // 50)  # a configuration that is larger than the weights
    for size in (1000, weights + 1000):
        with full_disk(size), pytest.raises(CheckpointError, match="cannot be written"):
            save_checkpoint(model, checkpoint / "ldvc", metadata=metadata)
        assert contents(checkpoint / "ldvc") == files


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"/proc/ldvc cannot be written .*choose another folder"):
        save_tensors({"a": torch.zeros(2)}, "/proc/ldvc")
    (tmp_path / ".new").mkdir()
    (tmp_path / ".new" / "model-00007-of-00009.safetensors").write_bytes(b"half")
    save_tensors({"a": torch.zeros(2)}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_corrupt_shard_is_named_with_its_checksum(checkpoint: Path) -> None:
    sums = write_checksums(checkpoint)
    load_checkpoint(checkpoint)
    file = checkpoint / "ldvc" / "model.safetensors"
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    assert f"{right}  ldvc/model.safetensors" in sums.read_text().splitlines()
    whole = file.read_bytes()
    for broken in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-100], b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(broken)
        found = hashlib.sha256(broken).hexdigest()
        with refused(CheckpointError, str(file), right, found, "fetch it again"):
            load_checkpoint(checkpoint)


def test_checksums_of_the_bundled_weights_agree() -> None:
    """After new weights: `cd assets/lite && sha256sum */*.safetensors > SHA256SUMS`."""
    lite = ASSETS / "lite"
    files = sorted(lite.glob("*/*.safetensors"))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(lite).as_posix()}" for path in files]
    assert (lite / CHECKSUMS).read_text().splitlines() == lines and all(map(load_file, files))


def test_a_visitor_chooses_no_path_and_no_repository(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = ModelRegistry(str(tiny_checkpoint))
    for source in ("LoadedModel", "Download"):
        monkeypatch.setattr(f"ldvc.web.models.{source}", lambda *_: pytest.fail("a visitor's text was used as a source"))
    paths = ("/etc", "../lite", "lite/../ldvc", "~", ".", "full/../../x")
    for key in (*paths, "ann/ldvc", "ViT-B-16", "https://example.org/x", "LITE"):
        for ask in (registry.get, registry.download):
            with pytest.raises(Problem, match="no such model; choose one of"):
                ask(key)
