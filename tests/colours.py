"""Pictures of flat colours and a model whose features and class embeddings are colours."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ldvc import Predictor
from ldvc.modeling.decoders import DecoderOutput
from ldvc.modeling.towers import ImageFeatures

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1)}
RED, GREEN, BLUE = ([255 * channel for channel in COLOURS[name]] for name in ("red", "green", "blue"))


def halves(height: int, width: int, split: int, *, axis: int = 1) -> np.ndarray:
    """Red before `split`, green from there on."""
    picture = np.full((height, width, 3), RED, dtype=np.uint8)
    picture[(slice(None),) * axis + (slice(split, None),)] = GREEN
    return picture


class ColourModel:
    """Stands in for `LDVC` in a `Predictor`. Unknown words are grey."""

    def __init__(self, patch: int = 16) -> None:
        weights = SimpleNamespace(logit_scale=torch.zeros(()))
        numbers = {"patch_size": patch, "mean": (0.0,) * 3, "std": (1.0,) * 3, "scale": 1.0, "bias": 0.0}
        self.clip = SimpleNamespace(model=weights, **numbers)
        self.config = SimpleNamespace(decoder="ldvc")
        self.image_tower = self
        self.photos = 0
        self.encoded_names: list[str] = []

    def to(self, device):
        return self

    def eval(self):
        return self

    def statistics(self, *, prompted):
        return self.clip.mean, self.clip.std

    def embed_patches(self, images, *, prompted):
        assert images.shape[2] % self.clip.patch_size == 0 and images.shape[3] % self.clip.patch_size == 0
        self.photos += 1
        return F.avg_pool2d(images, self.clip.patch_size)

    def encode_image(self, *, patch_tokens):
        features = patch_tokens.flatten(2).transpose(1, 2)
        return ImageFeatures(patch_tokens.mean(dim=(2, 3)), features, tuple(patch_tokens.shape[-2:]))

    def encode_names(self, names):
        self.encoded_names += names
        return torch.tensor([COLOURS.get(name.lower(), (0.5, 0.5, 0.5)) for name in names], dtype=torch.float32)

    frozen_embeddings = encode_names

    def decode(self, features, embeddings, *, return_attention=False, skip_lcsa=False):
        distance = torch.cdist(embeddings, features.patch_features[0])  # (C, N)
        logits = (4 - 8 * distance).unflatten(1, features.grid)[None]
        scores = [logits[:, None]] if return_attention else None  # of one head
        return DecoderOutput(logits, features.patch_features, embeddings[None], cross_attention=scores)


def colour_predictor(**metadata: Any) -> Predictor:
    return Predictor(ColourModel(), metadata, device="cpu")
