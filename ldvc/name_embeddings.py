"""Class embeddings of plain CLIP as the mean over OpenAI's 80 ImageNet templates.

They are stored, one small file for each name, in `~/.cache/ldvc/names` (`$XDG_CACHE_HOME/ldvc/names` if that is set), because
encoding a name 80 times takes tenths of a second. If the folder cannot be written or a file is damaged, names are encoded anew.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.towers import encode_after_prefix, prefix_states

TEMPLATES: tuple[str, ...] = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
BATCH = 256  # texts that are encoded at once
MAX_FILES = 20_000  # most names on disk: 80 MB


class TemplateEnsemble:
    """Encodes names in templates, sentences with one "{}". `folder` holds the embeddings; None = in the user's cache.

    Attention in the text tower is causal, so the words of a template before the name are computed once for all names.
    """

    def __init__(self, clip: FrozenClip, templates: Sequence[str] = TEMPLATES, folder: Path | None = None) -> None:
        self.clip, self.templates = clip, tuple(templates)
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.folder = Path(cache, "ldvc", "names") if folder is None else folder

    @cached_property
    def _groups(self) -> list[tuple[list[str], Tensor]]:
        """Templates by the lengths of their beginning and end, and states (layers, T, P, width) of the beginnings."""
        encode = self.clip.tokenizer.encode
        groups: dict[tuple[int, int], list[str]] = {}
        for template in self.templates:
            before, after = template.split("{}")
            groups.setdefault((1 + len(encode(before)), len(encode(after))), []).append(template)
        grouped = []
        for (length, _), templates in groups.items():
            beginnings = self.clip.tokenizer([template.split("{}")[0] for template in templates])[:, :length]
            grouped.append((templates, prefix_states(self.clip.text, beginnings.to(self.clip.model.logit_scale.device))))
        return grouped

    @cached_property
    def _key(self) -> bytes:
        """Digest of the text tower and the templates."""
        digest = hashlib.sha256("\n".join(self.templates).encode())
        for name, tensor in sorted(self.clip.model.state_dict().items()):
            if not name.startswith("visual."):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
        return digest.digest()

    @torch.no_grad()
    def encode(self, names: Sequence[str]) -> Tensor:
        """(C, d): the mean of the normalised embeddings of all templates, normalised."""
        total = torch.zeros(len(names), self.clip.embed_dim, device=self.clip.model.logit_scale.device)
        for templates, states in self._groups:
            step = max(1, BATCH // len(templates))
            for start in range(0, len(names), step):
                batch = names[start : start + step]
                texts = [template.replace("{}", name) for name in batch for template in templates]
                tokens = self.clip.tokenizer(texts).to(total.device)
                embeddings = encode_after_prefix(self.clip.text, tokens, states.repeat(1, len(batch), 1, 1))
                total[start : start + step] += F.normalize(embeddings, dim=-1).unflatten(0, (len(batch), -1)).sum(dim=1)
        return F.normalize(total, dim=-1)

    def __call__(self, names: Sequence[str]) -> Tensor:
        """Embeddings (C, d) as of `encode`, read from disk; missing ones are encoded and stored."""
        stored = {name: self._read(name) for name in names}
        if missing := [name for name, embedding in stored.items() if embedding is None]:
            encoded = self.encode(missing).cpu()
            self._write(dict(zip(missing, encoded.numpy(), strict=True)))
            stored |= dict(zip(missing, encoded, strict=True))
        return torch.stack([stored[name] for name in names]).to(self.clip.model.logit_scale.device)

    def _file(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(self._key + name.encode()).hexdigest()}.npy"

    def _read(self, name: str) -> Tensor | None:
        """The stored embedding (d,), or None."""
        try:
            embedding = np.load(self._file(name), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        is_valid = embedding.shape == (self.clip.embed_dim,) and embedding.dtype == np.float32
        return torch.from_numpy(embedding) if is_valid and abs(np.linalg.norm(embedding) - 1) < 1e-3 else None

    def _write(self, embeddings: dict[str, np.ndarray]) -> None:
        with suppress(OSError):  # without the file, the name is encoded again next time
            self.folder.mkdir(parents=True, exist_ok=True)
            if len(os.listdir(self.folder)) + len(embeddings) > MAX_FILES:
                return
            for name, embedding in embeddings.items():
                path = self._file(name)
                temporary = path.with_suffix(f".{os.getpid()}.new")  # an interrupted write leaves no file with the final name
                with temporary.open("wb") as file:
                    np.save(file, embedding)
                os.replace(temporary, path)
