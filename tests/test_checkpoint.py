"""Checkpoints and weights: round trips, and errors that say what to do."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldvc import Predictor
from ldvc.checkpoint import load_checkpoint, read_config, save_checkpoint
from ldvc.config import DECODERS, ModelConfig
from ldvc.errors import CheckpointError, LdvcError, WeightsNotFoundError
from ldvc.modeling.clip import FrozenClip, build_clip, save_clip_folder
from ldvc.modeling.model import LDVC
from ldvc.weights import load_tensors, save_tensors
from tests.tiny import name_tiny_clip, save_tiny_checkpoint

METADATA = {"seen_names": ["dog", "grass"], "calibration": {"scale": 2.0, "bias": -1.0}, "note": "été"}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hub is not asked, and nothing was downloaded before."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_tensors_survive_shards_and_splitting(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """With half precision on disk, vectors and integers stay exact."""
    tensors = {
        "embedding": torch.randn(1000, 16),
        "matrix": torch.randn(8, 8),
        "running_var": torch.tensor([1e-7, 1e7]),
        "count": torch.tensor(70000),
        "transposed": torch.randn(6, 5).T,
    }
    (tmp_path / "model-00001-of-00009.safetensors").write_bytes(b"left from an earlier, bigger model")
    files = save_tensors(tensors, tmp_path, dtype=dtype, max_shard_bytes=20_000)
    assert len(files) > 1 and sorted(tmp_path.glob("*.safetensors")) == files
    assert all(path.stat().st_size < 22_000 for path in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {"embedding::0", "embedding::1", "matrix"} <= set(index["weight_map"])
    loaded = load_tensors(tmp_path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        stored = tensor.half().float() if dtype and tensor.ndim == 2 else tensor
        assert torch.equal(loaded[name], stored), name


@pytest.mark.parametrize("decoder", DECODERS)
def test_round_trip(decoder: str, tiny_config: ModelConfig, tiny_clip: FrozenClip, names: list[str], tmp_path: Path) -> None:
    model = LDVC(replace(tiny_config, decoder=decoder), tiny_clip).eval()
    with torch.no_grad():
        for parameter in filter(lambda each: each.requires_grad, model.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.02)
    save_checkpoint(model, tmp_path / "run", metadata=METADATA)
    loaded, metadata = load_checkpoint(tmp_path / "run", decoder=decoder)
    assert loaded.config == model.config and not loaded.training
    assert metadata == {**METADATA, "inference": {"long_side": 448}}
    images = torch.randn(1, 3, 64, 80)
    torch.testing.assert_close(loaded(images, names).mask_logits, model(images, names).mask_logits)
    names_on_disk = load_file(tmp_path / "run" / "model.safetensors")
    assert not any(name.startswith("clip.") for name in names_on_disk), "the frozen CLIP is not stored again"
    assert load_checkpoint(tmp_path / "run", clip=tiny_clip)[0].clip is tiny_clip


def test_folder_of_decoders_with_a_relative_clip(tmp_path: Path) -> None:
    """The layout of assets/lite, which can be moved as a whole."""
    moved = save_tiny_checkpoint(tmp_path, decoders=("ldvc", "zegclip")).rename(tmp_path.with_name("moved"))
    model, metadata = load_checkpoint(moved)
    assert model.config.decoder == "ldvc" and model.config.clip == str(moved / "clip")
    assert read_config(moved / "ldvc")[0].clip == "../clip"
    with pytest.raises(ValueError, match="There is no decoder 'sam'; choose"):
        Predictor.from_pretrained(str(moved), decoder="sam")
    again = save_checkpoint(model, tmp_path / "elsewhere" / "deep", metadata=metadata)  # the path is found from there, too
    assert read_config(again)[0].clip == os.path.relpath(moved / "clip", again) and load_checkpoint(again)
    assert load_checkpoint(moved, decoder="zegclip")[0].config.decoder == "zegclip"
    assert load_checkpoint(str(moved), decoder="clip")[0].config.decoder == "ldvc"
    for decoder in ("ldvc_without_lcsa", "unheard of"):
        with pytest.raises(CheckpointError, match=decoder):
            load_checkpoint(moved, decoder=decoder)
    with pytest.raises(CheckpointError, match="ask for 'ldvc'"):
        load_checkpoint(moved / "ldvc", decoder="zegclip")
    shutil.rmtree(moved / "clip")
    with pytest.raises(WeightsNotFoundError, match="clip"):
        load_checkpoint(moved)


def test_a_clip_that_stands_on_another_holds_what_differs(tiny_clip_folder: Path, tmp_path: Path) -> None:
    base, other = shutil.copytree(tiny_clip_folder, tmp_path / "a" / "clip"), tmp_path / "a" / "other"
    model = build_clip(str(base)).model
    with torch.no_grad():
        model.visual.proj += 1
        model.visual.ln_post.bias += 1
        model.visual.conv1.weight *= 1 + 1e-6  # below half precision
    (file,) = save_clip_folder(model, other, {"base": "../clip"})
    assert set(load_file(file)) == {"visual.proj", "visual.ln_post.bias"}
    moved = (tmp_path / "a").rename(tmp_path / "b")
    loaded = build_clip(str(moved / "other")).model.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, atol=2e-3, rtol=2e-3)  # half precision
    shutil.rmtree(moved / "clip")
    with pytest.raises(WeightsNotFoundError, match="needs the one at .*clip, which is missing; copy both"):
        build_clip(str(moved / "other"))


def test_what_is_not_a_checkpoint_is_named(tiny_clip_folder: Path, tmp_path: Path, offline: None) -> None:
    for folder in (tmp_path, tiny_clip_folder):  # the latter has a config.json, but of a CLIP
        with pytest.raises(CheckpointError, match="no checkpoint"):
            load_checkpoint(folder)
    with pytest.raises(WeightsNotFoundError, match="no weights"):
        load_tensors(tmp_path)
    with pytest.raises(WeightsNotFoundError, match="no folder"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(WeightsNotFoundError, match="use the bundled model 'lite'"):
        load_checkpoint("somebody/ldvc-voc")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"inference": settings}, "long_side") for settings in (None, {"enlarge": 1.4})),
        ({"inference": {"short_side": 512, "window": 512}}, "together"),
        ({"inference": {"short_side": 512, "window": 500, "stride": 501}}, "stride of 501 leaves gaps between windows of 500"),
        *(({"inference": {"long_side": size}}, "positive number up to 8192") for size in ("big", True, 0, 10**9, math.nan)),
        ({"inference": {"long_side": 448, "tiles": 3}}, "no setting 'tiles'"),
        *(({"seen_names": names}, "'seen_names' must be a list of names") for names in ("dog", ["dog", 3])),
        ({"seen_words": {"dog": "puppy"}}, "'seen_words' a list of words"),
        ({"calibration": {"scale": math.nan}}, "in the calibration, scale must be a finite number, not nan"),
        ({"clip_calibration": {"bias": "big"}}, "bias must be a valid number, not 'big'"),
        ({"calibration": {"threshold": 1.5}}, r"threshold must be less than or equal to 1, not 1\.5"),
        *(({key: [1]}, "settings that cannot be used") for key in ("calibration", "clip_calibration", "plain_clip")),
        ({"plain_clip": {"dense": "sclip"}}, "'plain_clip': dense must be"),
        ({"plain_clip": {"inference": {"window": 3}}}, "long_side"),
        ({"plain_clip": {"colour": 1}}, "there is no field 'colour'"),
        ({"model": {"decoder": "best"}}, "decoder must be 'ldvc'"),
        *(({"model": {"template": text}}, "template must") for text in ("a photo", "a photo-of-{}", "{} in a photo")),
        *(({"model": {"topk": value}}, "topk must be") for value in (0, 2.5, "x")),
        ({"model": {"surprise": 1}}, "the setting 'surprise'"),
        ({"model": {"start_at_clip": True}}, r"^This checkpoint is of an older version of this project[^.]*\.$"),
    ],
)
def test_settings_that_cannot_be_used_are_named_at_once(settings: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": {}, **settings}))
    for read in (read_config, load_checkpoint):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path)


@pytest.fixture
def tiny_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return name_tiny_clip(tmp_path, monkeypatch)


class Archive(torch.nn.Module):
    """Can be saved as TorchScript, whatever modules and parameters are added."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + 1


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("form", ["training checkpoint", "safetensors", "folder", "torchscript"])
def test_weights_from_a_local_file(form: str, tiny_name: str, tmp_path: Path) -> None:
    saved = open_clip.create_model(tiny_name)
    path, state = tmp_path / "weights.pt", saved.state_dict()
    if form == "training checkpoint":
        half = {f"module.{name}": tensor.half() for name, tensor in state.items()}
        torch.save({"epoch": 3, "state_dict": half}, path)
    elif form == "torchscript":
        archive = Archive()
        for name, module in saved.named_children():
            archive.add_module(name, module)
        for name, parameter in saved.named_parameters(recurse=False):
            archive.register_parameter(name, parameter)
        for name in ("input_resolution", "context_length", "vocab_size"):  # as OpenAI stores them
            archive.register_buffer(name, torch.tensor(7))
        torch.jit.trace(archive.eval(), torch.randn(1, 3, 64, 64)).save(str(path))
    else:
        folder = tmp_path / "weights"
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
        path = folder if form == "folder" else folder / "open_clip_model.safetensors"
    clip = build_clip(tiny_name, str(path))
    tolerance = 1e-3 if form == "training checkpoint" else 0
    for name, tensor in clip.model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], atol=tolerance, rtol=tolerance)
    assert clip.mean == open_clip.OPENAI_DATASET_MEAN and not clip.model.training
    if form == "folder":
        preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.5] * 3}
        config = {"model_cfg": open_clip.get_model_config(tiny_name), "preprocess_cfg": preprocess}
        (path / "open_clip_config.json").write_text(json.dumps(config))
        described = build_clip(str(path))
        assert described.mean == (0.1, 0.2, 0.3) and torch.equal(described.model.visual.proj, state["visual.proj"])


def test_weights_of_another_architecture_are_named(tiny_name: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"something": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="do not fit"):
        build_clip(tiny_name, str(path))
    path.write_text("hello")
    with pytest.raises(CheckpointError, match="cannot be read"):
        build_clip(tiny_name, str(path))


@pytest.mark.parametrize(
    ("clip", "pretrained", "words"),
    [
        ("ViT-Z-99", None, "ViT-B-16-quickgelu"),
        ("ViT-B-16-quickgelu", "nonsense", "known: "),
        ("RN50", None, "ViTs|image tower"),
        ("ViT-B-16", "openai", "'ViT-B-16-quickgelu'"),  # of another activation, before they are fetched
        ("ViT-B-16-quickgelu", "openai", "connect to the network .* local file .* 'lite'"),
    ],
)
def test_clips_that_are_not_there_are_named(clip: str, pretrained: str | None, words: str, offline: None) -> None:
    with pytest.raises(LdvcError, match=words):
        build_clip(clip, pretrained)
