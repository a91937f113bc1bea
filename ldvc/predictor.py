"""Photo in once, class names many times.

    from ldvc import Predictor
    predictor = Predictor.from_pretrained("lite")
    predictor.set_image("dog.jpg")
    result = predictor.segment(["dog", "grass", "cat"])
    result.labels, result.scores, result.cross_attention()

A predictor is a model with its checkpoint's settings; it holds no photo but the one of `set_image`. A server with several
visitors keeps one `ImageState` (from `encode_image`) for each of them and passes it to `segment`, which several threads may
call at once.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldvc.calibration import Calibration
from ldvc.checkpoint import load_checkpoint
from ldvc.config import ARMS
from ldvc.errors import InvalidImageError
from ldvc.modeling.attention import Routing
from ldvc.modeling.decoders import DecoderOutput
from ldvc.modeling.model import LDVC, similarity_logits
from ldvc.modeling.towers import ImageFeatures
from ldvc.names import SeenNames, clean_names, synonyms_of
from ldvc.pictures import Source, Window, cut_windows, load_picture
from ldvc.result import Segmentation
from ldvc.windows import DecoderFeatures, WindowOutput

PLAIN_CLIP = "clip"
PREDICTOR_ARMS = (*ARMS, PLAIN_CLIP)
DEFAULT_INFERENCE = {"long_side": 448}
NAME_CACHE_SIZE = 4096  # embeddings of a few kilobytes each
ONE_AND_THE_SAME = 0.99999  # cosine; "dog" and "dogs", as near as words get in lite, have less


@dataclass
class ImageState:
    """What is kept of one photo: small enough to be kept for each visitor, on the CPU so that it can be handed around.

    Attributes:
        picture: uint8 (H, W, 3).
        canvas: (height, width) at which the tower saw it, without padding.
        windows: what the tower saw at once.
        family: predictors of one family share their frozen towers and may share this state.
        stems: the frozen patch embedding of each window, (1, width, h, w).
        features: by arm, the image features of each window (prompts differ between arms); filled when first asked for.
    """

    picture: np.ndarray
    canvas: tuple[int, int]
    windows: list[Window]
    family: str
    stems: list[Tensor]
    features: dict[str, list[ImageFeatures]] = field(default_factory=dict)


class Predictor:
    """A model that answers questions about photos.

    Args:
        model: the whole model; moved to `device` and set to evaluation.
        metadata: of its checkpoint: `seen_names`, `seen_words`, `calibration` ({"scale", "bias", "peak"}, see `Calibration`;
            `clip_calibration` for plain similarity), `inference` ({"long_side"} or {"short_side", "window", "stride"}).
        arm: one of `PREDICTOR_ARMS`; "clip" is the plain similarity of the frozen towers.
        device: where to compute; None = a GPU if there is one.
        family: of the predictor whose frozen towers this one shares (see `sibling`).
        source: where the checkpoint came from, for `sibling` and for people.
    """

    def __init__(
        self,
        model: LDVC,
        metadata: dict[str, Any] | None = None,
        *,
        arm: str | None = None,
        device: str | torch.device | None = None,
        family: str | None = None,
        source: str | None = None,
    ) -> None:
        metadata = metadata or {}
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        self.metadata = metadata
        self.arm = arm or model.config.arm
        self.source = source
        self.inference = dict(metadata.get("inference") or DEFAULT_INFERENCE)
        self.seen_names = SeenNames(metadata.get("seen_names") or (), metadata.get("seen_words") or {})
        self.calibration = Calibration.from_metadata(
            metadata.get("clip_calibration" if self.arm == PLAIN_CLIP else "calibration")
        )
        self.family = family or f"{source or ''}#{id(model.clip)}"
        self._image: ImageState | None = None
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()  # cleaned name as the tokenizer lowers it -> (d,)
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        source: str = "lite",
        *,
        arm: str = "ldvc",
        device: str | torch.device | None = None,
        _sibling: Predictor | None = None,
    ) -> Predictor:
        """Load a checkpoint.

        Args:
            source: "lite" (comes with this project), a folder, or an id on the Hugging Face Hub.
            arm: "ldvc", "ldvc_without_lcsa", "zegclip", or "clip" (plain similarity of the frozen towers).
            device: where to compute; None = a GPU if there is one.

        Raises:
            WeightsNotFoundError, CheckpointError: with a sentence that says what to do.
            ValueError: there is no such arm.
        """
        if arm not in PREDICTOR_ARMS:
            raise ValueError(f"There is no arm {arm!r}; choose one of {', '.join(PREDICTOR_ARMS)}.")
        if arm == PLAIN_CLIP and _sibling is not None:
            model, metadata = _sibling.model, _sibling.metadata
        else:
            model, metadata = load_checkpoint(source, arm=arm, sibling=_sibling and _sibling.model)
        family = _sibling.family if _sibling is not None and model.clip is _sibling.model.clip else None
        return cls(model, metadata, arm=arm, device=device, family=family, source=str(source))

    def sibling(self, arm: str) -> Predictor:
        """Another arm of the same checkpoint. Where both stand on the same frozen towers, these are shared, and so is the
        encoding of photos up to them.

        Raises:
            CheckpointError, WeightsNotFoundError: the checkpoint has no such arm.
        """
        if arm == self.arm:
            return self
        assert self.source is not None, "only a predictor made by from_pretrained knows where its siblings are"
        return type(self).from_pretrained(self.source, arm=arm, device=self.device, _sibling=self)

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256 (hex) of all weights that answer, towers included: of every tensor in order of its name, the name in UTF-8
        and the values as little-endian float32 (integers as they are). The same on every machine and in every file format."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            values = tensor.detach().cpu()
            values = values.float() if values.is_floating_point() else values
            digest.update(name.encode())
            digest.update(values.contiguous().numpy().tobytes())
        return digest.hexdigest()

    # ---- photo ----------------------------------------------------------------------------------------------------

    def set_image(self, image: Source) -> ImageState:
        """Encode a photo and keep it for the following calls of `segment`.

        Args:
            image: PIL image, path, or uint8 array (H, W, 3). Any size and aspect; see `load_picture`.

        Raises:
            InvalidImageError: it is not a picture that can be used.
        """
        self._image = self.encode_image(image)
        return self._image

    @torch.no_grad()
    def encode_image(self, image: Source) -> ImageState:
        """Encode a photo without keeping it: the state belongs to the caller."""
        picture = load_picture(image)
        patch = self.model.clip.patch_size
        canvas, windows, pieces = cut_windows(Image.fromarray(picture), inference=self.inference, patch=patch)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.model.clip.mean, self.model.clip.std))
        stems = []
        for piece in pieces:
            pixels = torch.from_numpy(piece).permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)
            stems.append(self.model.image_tower.stem(((pixels - mean) / std).to(self.device)).cpu())
        state = ImageState(picture=picture, canvas=canvas, windows=windows, family=self.family, stems=stems)
        self._features(state)
        return state

    @torch.no_grad()
    def _features(self, state: ImageState) -> list[ImageFeatures]:
        """Image features of every window with this arm's prompts, on the CPU."""
        if self.arm not in state.features:
            features = []
            for stem in state.stems:
                stem = stem.to(self.device)
                if self.arm == PLAIN_CLIP:
                    found = self.model.image_tower(stem=stem, prompted=False)
                else:
                    found = self.model.encode_image(stem=stem)
                features.append(move(found, "cpu"))
            state.features[self.arm] = features
        return state.features[self.arm]

    # ---- names ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_names(self, names: Sequence[str]) -> Tensor:
        """Class embeddings (C, d) of cleaned names; known names come from the cache."""
        keys = [name.lower() for name in names]  # not casefold: "fuß" and "fuss" have tokens of their own
        with self._lock:
            found = {key: self._embeddings[key] for key in keys if key in self._embeddings}
        missing = {key: name for key, name in zip(keys, names, strict=True) if key not in found}
        if missing:
            if self.arm == PLAIN_CLIP:
                tower = self.model.text_tower
                embeddings = tower(tower.tokenize(list(missing.values())), prompted=False)
            else:
                embeddings = self.model.encode_names(list(missing.values()))
            found |= dict(zip(missing, embeddings, strict=True))
        with self._lock:
            for key in keys:
                self._embeddings[key] = found[key]
                self._embeddings.move_to_end(key)
            while len(self._embeddings) > NAME_CACHE_SIZE:
                self._embeddings.popitem(last=False)
        return torch.stack([found[key] for key in keys])

    # ---- answer ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def segment(
        self,
        names: Sequence[str] | str,
        *,
        background: float | None = None,
        image: ImageState | None = None,
        attention: bool = True,
        features: bool = False,
        skip_lcsa: bool = False,
    ) -> Segmentation:
        """Segment the photo into the named classes.

        Args:
            names: class names; blanks around them, empty ones and repetitions are dropped (`result.names` has the rest).
                "sofa | couch" is one class with two words: each is encoded by itself, the class's score is the higher of
                theirs (patch by patch), its attention the sum of theirs, and it counts as seen if one of them does.
            background: None = the best name everywhere; a number t in 0..1 = pixels whose best name has a score below t are
                -1, "none of these".
            image: a photo's state from `encode_image`; None = the photo of `set_image`.
            attention: keep cross-attention and routing, readable from the result.
            features: keep patch features and class embeddings before and after the decoder.
            skip_lcsa: leave LCSA out of weights that were trained with it: an intervention, not the arm without LCSA.

        Raises:
            InvalidImageError: no photo was set.
            InvalidNamesError: no name is left, or there are too many, or one is too long.
            ValueError: `background` is not in 0..1.
        """
        if background is not None and not 0.0 <= background <= 1.0:
            raise ValueError(f"background is a threshold between 0 and 1, not {background}.")
        state = image or self._image
        if state is None:
            raise InvalidImageError("Set a photo first: predictor.set_image(photo).")
        if state.family != self.family:  # encoded by other towers
            state = self.encode_image(state.picture)
        classes = clean_names(names)
        words = [synonyms_of(name) for name in classes]
        embeddings = self.encode_names([word for group in words for word in group])
        join = Synonyms([len(group) for group in words])
        outputs = []
        for encoded, window in zip(self._features(state), state.windows, strict=True):
            encoded = move(encoded, self.device)
            if self.arm == PLAIN_CLIP:
                clip = self.model.clip
                logits = similarity_logits(encoded.patch_features, embeddings, scale=clip.scale, bias=clip.bias)
                outputs.append(WindowOutput(window, join.best(logits[0].unflatten(-1, encoded.grid).cpu())))
            else:
                decoded = self.model.decode(
                    encoded, embeddings, return_attention=attention, skip_lcsa=skip_lcsa
                )
                outputs.append(
                    WindowOutput(
                        window,
                        join.best(decoded.mask_logits[0].float().cpu()),
                        [join.total(layer[0].float().cpu(), dim=1) for layer in decoded.cross_attention or ()],
                        [routing_to_cpu(layer) for layer in decoded.routing or ()],
                        decoder_features(decoded) if features else None,
                    )
                )
        return Segmentation(
            names=[group[0] for group in words],
            synonyms=words,
            seen=[name in self.seen_names for name in classes],
            arm=self.arm,
            picture=state.picture,
            canvas=state.canvas,
            patch=self.model.clip.patch_size,
            outputs=outputs,
            calibration=self.calibration,
            background=background,
            alike=alike(words, embeddings),
        )


def alike(classes: Sequence[Sequence[str]], embeddings: Tensor) -> list[list[str]]:
    """Words of different classes whose embeddings are one and the same: the text tower cannot read in what they differ.

    Lite's, for instance, learned from English nouns, and of Chinese it knows no token.

    Args:
        classes: the words of each.
        embeddings: (words in all, d).

    Returns:
        Groups of words.
    """
    unit = F.normalize(embeddings.float(), dim=-1)
    same = (unit @ unit.T > ONE_AND_THE_SAME).tolist()
    groups: dict[int, list[tuple[str, int]]] = {}  # the first of some words that are alike -> them, and their classes
    named = [(word, index) for index, words in enumerate(classes) for word in words]
    for row, each in zip(same, named, strict=True):
        groups.setdefault(row.index(True), []).append(each)
    return [[word for word, _ in group] for group in groups.values() if len({index for _, index in group}) > 1]


class Synonyms:
    """Joins what was computed word by word into classes; `counts` has the number of words of each class."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.starts = [sum(counts[:i]) for i in range(len(counts))]
        self.ends = [start + count for start, count in zip(self.starts, counts, strict=True)]
        self.trivial = all(count == 1 for count in counts)

    def best(self, logits: Tensor) -> Tensor:
        """(words, ...) -> (classes, ...): a class fits as well as the best of its words."""
        if self.trivial:
            return logits
        return torch.stack([logits[i:j].amax(dim=0) for i, j in zip(self.starts, self.ends, strict=True)])

    def total(self, attention: Tensor, *, dim: int) -> Tensor:
        """Words along `dim` -> classes: shares of attention exclude each other, so those of a class add up."""
        if self.trivial:
            return attention
        parts = [attention.narrow(dim, i, j - i).sum(dim) for i, j in zip(self.starts, self.ends, strict=True)]
        return torch.stack(parts, dim=dim)


def decoder_features(decoded: DecoderOutput) -> DecoderFeatures:
    """Before and after the decoder, for the first picture of the batch, on the CPU."""
    names = ("patch_features_before", "patch_features", "class_embeddings_before", "class_embeddings")
    return DecoderFeatures(*(getattr(decoded, name)[0].float().cpu() for name in names))


def move(features: ImageFeatures, device: str | torch.device) -> ImageFeatures:
    """The same features on another device."""
    return features._replace(
        global_embedding=features.global_embedding.to(device), patch_features=features.patch_features.to(device)
    )


def routing_to_cpu(routing: Routing) -> Routing:
    """The same routing on the CPU."""
    names = ("regions", "affinity", "queries", "keys")
    return replace(routing, **{name: getattr(routing, name).cpu() for name in names})
