"""A very small model with random weights, saved as a checkpoint folder with all decoders.

It has all parts and loads fast. Tests use it if the quality of the segmentation does not matter.
"""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP

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


def save_tiny_checkpoint(folder: Path, *, decoders: tuple[str, ...] = DECODERS, metadata: dict | None = None) -> Path:
    """Write `folder`/clip and one checkpoint per decoder; returns the folder."""
    torch.manual_seed(0)
    clip_config = {"architecture": ARCHITECTURE, "patch_embed": None, "mean": [0.5] * 3, "std": [0.5] * 3}
    save_clip_folder(CLIP(**ARCHITECTURE), folder / "clip", clip_config)
    clip = build_clip(str(folder / "clip"))
    for decoder in decoders:
        sizes = {"visual_prompts": 2, "decoder_layers": 2, "decoder_heads": 2, "regions": 3, "topk": 2}
        model = LDVC(ModelConfig(clip="../clip", pretrained=None, decoder=decoder, **sizes), clip)
        save_checkpoint(model, folder / decoder, metadata={"seen_names": ["dog", "grass", "person"], **(metadata or {})})
    return folder


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
