"""Very small CLIPs with random weights, and a checkpoint folder with all decoders, which has all parts and loads fast."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from torch import nn

from ldvc.checkpoint import save_checkpoint
from ldvc.config import DECODERS, ModelConfig
from ldvc.modeling.clip import build_clip, save_clip_folder
from ldvc.modeling.model import LDVC

ARCHITECTURE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    "init_logit_bias": -2.0,
}
TINY_ARCHITECTURE = {  # of the fixture tiny_clip
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
    "init_logit_scale": 2.3,
    "init_logit_bias": -3.0,
}


def save_tiny_clip(model: CLIP, folder: Path, architecture: dict) -> Path:
    """Write a CLIP as a folder, as the lite towers are shipped; returns the folder."""
    save_clip_folder(model, folder, {"architecture": architecture, "patch_embed": None, "mean": [0.5] * 3, "std": [0.5] * 3})
    return folder


def save_tiny_checkpoint(folder: Path, *, decoders: tuple[str, ...] = DECODERS, metadata: dict | None = None) -> Path:
    """Write `folder`/clip and one checkpoint per decoder; returns the folder."""
    torch.manual_seed(0)
    clip = build_clip(str(save_tiny_clip(CLIP(**ARCHITECTURE), folder / "clip", ARCHITECTURE)))
    sizes = {"visual_prompts": 2, "decoder_layers": 2, "decoder_heads": 2, "regions": 3, "topk": 2}
    for decoder in decoders:
        model = LDVC(ModelConfig(clip="../clip", pretrained=None, decoder=decoder, **sizes), clip)
        save_checkpoint(model, folder / decoder, metadata={"seen_names": ["dog", "grass", "person"], **(metadata or {})})
    return folder


def close_gates(model: nn.Module) -> nn.Module:
    """Sets every gate to 0, so that the decoder `zegclip` computes CLIP's own logits."""
    for name, parameter in model.named_parameters():
        if "gate" in name:
            parameter.data.zero_()
    return model


def name_tiny_clip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Register the tiny CLIP with open_clip, in place of the full one; returns its name as an architecture.

    `LDVC_CLIP_WEIGHTS` names a file of its weights.
    """
    name = "ViT-tiny-in-place-of-full"
    architecture = {key: value for key, value in ARCHITECTURE.items() if not key.startswith("init")}
    (folder / f"{name}.json").write_text(json.dumps(architecture))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    torch.save(CLIP(**architecture).state_dict(), folder / "weights.pt")
    monkeypatch.setenv("LDVC_CLIP_WEIGHTS", str(folder / "weights.pt"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr("ldvc.checkpoint.FULL_CLIP", name)
    return name
