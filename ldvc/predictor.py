"""The predictor: encode a photo once, segment it for many lists of class names.

    from ldvc import Predictor
    predictor = Predictor.from_pretrained("lite")
    predictor.set_image("dog.jpg")
    result = predictor.segment(["dog", "grass", "cat"])
    result.labels, result.scores, result.cross_attention()

A predictor is a model with the settings of its checkpoint. It keeps only the photo of `set_image`. A server with several
users keeps one `ImageState` (from `encode_image`) for each of them and passes it to `segment`. Several threads may call
`segment` at the same time.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from numbers import Real
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ldvc.calibration import Calibration, SoftmaxCalibration
from ldvc.checkpoint import DEFAULT_METADATA, load_checkpoint
from ldvc.class_names import ClassName, SeenNames, canonical, drop_none_words, parse_names, plain
from ldvc.config import DECODERS, PlainClipSettings
from ldvc.errors import InvalidImageError
from ldvc.image_io import Source, load_picture
from ldvc.inference import ImageState, encode_picture
from ldvc.modeling.decoders import DecoderOutput
from ldvc.modeling.dense import dense_features
from ldvc.modeling.model import PlainClip, similarity_logits
from ldvc.modeling.towers import ImageFeatures
from ldvc.name_embeddings import TemplateEnsemble
from ldvc.result import DecoderFeatures, Segmentation, WindowOutput

PLAIN_CLIP = "clip"
PREDICTOR_DECODERS = (*DECODERS, PLAIN_CLIP)
DEFAULT_INFERENCE = DEFAULT_METADATA["inference"]
NAME_CACHE_SIZE = 4096  # embeddings of a few kilobytes each
SAME_EMBEDDING = 0.99999  # cosine; it is lower for "dog" and "dogs", the most similar words of the lite model

# In layers before the last, the softmax over one name is 1 everywhere. A single name therefore shares its attention with words
# for stuff that most photos contain.
COMPANY = ("wall", "floor", "grass", "sky", "tree", "water", "road")

Parts = TypeVar("Parts", bound=tuple)  # a named tuple


class Predictor:
    """Segments photos with one decoder of a checkpoint.

    Args:
        model: the whole model. It is moved to `device` and set to evaluation mode.
        metadata: metadata of the checkpoint, see `ldvc.checkpoint`; plain similarity uses `clip_calibration` and `plain_clip`.
        decoder: one of `PREDICTOR_DECODERS`; "clip" is the plain similarity of the frozen towers.
        device: where to compute; None = a GPU if there is one.
        source: where the checkpoint came from; `sibling` loads from there.
    """

    def __init__(
        self,
        model: PlainClip,
        metadata: dict[str, Any] | None = None,
        *,
        decoder: str | None = None,
        device: str | torch.device | None = None,
        source: str | None = None,
    ) -> None:
        self.metadata = metadata = metadata or {}
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        self.decoder, self.source = decoder or model.config.decoder, source
        self.plain_clip = PlainClipSettings.from_metadata(metadata.get("plain_clip"))
        self._is_plain = is_plain = self.decoder == PLAIN_CLIP
        plain_inference = self.plain_clip.inference if is_plain else None
        self.inference = dict(plain_inference or metadata.get("inference") or DEFAULT_INFERENCE)
        self.seen_names = SeenNames(metadata.get("seen_names") or (), metadata.get("seen_words") or {})
        self.calibration = Calibration.from_metadata(metadata.get("clip_calibration" if is_plain else "calibration"))
        if is_plain and self.plain_clip.softmax_scale is not None:
            self.calibration = SoftmaxCalibration(self.plain_clip.softmax_scale, self.plain_clip.threshold)
        statistics = self.model.image_tower.statistics(prompted=not is_plain)
        self.encoder_id = f"{source or ''}#{id(model.clip)}#{statistics}#{sorted(self.inference.items())}"
        self._encode_words = model.encode_names if not is_plain else model.frozen_embeddings
        if is_plain and self.plain_clip.templates > 1:
            self._encode_words = TemplateEnsemble(model.clip)
        self.image: ImageState | None = None  # the photo of `set_image`
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()  # plain name -> (d,)
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        source: str = "lite",
        *,
        decoder: str = "ldvc",
        device: str | torch.device | None = None,
        _sibling: Predictor | None = None,
    ) -> Predictor:
        """Load a checkpoint.

        Args:
            source: "lite" (comes with this project), a folder, or a repository on the Hugging Face Hub; with decoder "clip"
                also "full", which is the CLIP of the paper without a decoder, or another architecture of open_clip.
            decoder: "ldvc", "ldvc_without_lcsa", "zegclip", or "clip" (plain similarity of the frozen towers).
            device: where to compute; None = a GPU if there is one.

        Raises:
            WeightsNotFoundError, CheckpointError: the checkpoint cannot be found or used.
        """
        if decoder not in PREDICTOR_DECODERS:
            raise ValueError(f"There is no decoder {decoder!r}; choose one of {', '.join(PREDICTOR_DECODERS)}.")
        if decoder == PLAIN_CLIP and _sibling is not None:
            model, metadata = _sibling.model, _sibling.metadata
        else:
            model, metadata = load_checkpoint(source, decoder=decoder, sibling=_sibling and _sibling.model)
        return cls(model, metadata, decoder=decoder, device=device, source=str(source))

    def sibling(self, decoder: str) -> Predictor:
        """Another decoder of the same checkpoint; raises CheckpointError or WeightsNotFoundError if there is none.

        If both use the same frozen towers, they share them, and an `ImageState` of one can be passed to the other.
        """
        if decoder == self.decoder:
            return self
        assert self.source is not None, "only predictors of from_pretrained have siblings"
        return type(self).from_pretrained(self.source, decoder=decoder, device=self.device, _sibling=self)

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256 (hex) of all weights, frozen towers included.

        It covers each tensor in the order of the names: the name in UTF-8, then little-endian float32 (integers unchanged).
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            values = tensor.detach().cpu()
            values = values.float() if values.is_floating_point() else values
            digest.update(name.encode())
            digest.update(values.contiguous().numpy().tobytes())
        return digest.hexdigest()

    # ---- photo ----------------------------------------------------------------------------------------------------

    def set_image(self, image: Source) -> ImageState:
        """Encode a photo, see `load_picture`, and keep it for the following calls of `segment`."""
        self.image = self.encode_image(image)
        return self.image

    @torch.no_grad()
    def encode_image(self, image: Source) -> ImageState:
        """Encode a photo and return its state without keeping it, see `set_image`."""
        options = {"inference": self.inference, "encoder_id": self.encoder_id, "prompted": not self._is_plain}
        state = encode_picture(load_picture(image), self.model.image_tower, **options)
        self._features(state)
        return state

    @torch.no_grad()
    def _features(self, state: ImageState) -> list[ImageFeatures]:
        """Image features of every window with this decoder's prompts, on the CPU."""
        if self.decoder not in state.features:
            features = []
            for tokens in (each.to(self.device) for each in state.patch_tokens):
                if self._is_plain:
                    encoded = dense_features(self.model.image_tower, tokens, self.plain_clip.dense, attention=True)
                else:
                    encoded = self.model.encode_image(patch_tokens=tokens)
                features.append(moved(encoded, "cpu"))
            state.features[self.decoder] = features
        return state.features[self.decoder]

    # ---- names ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_names(self, names: Sequence[str]) -> Tensor:
        """Class embeddings (C, d), one for each word. Embeddings are cached by `plain` name, which is what the tower reads."""
        keys = [plain(name) for name in names]
        with self._lock:
            embeddings = {key: self._embeddings[key] for key in keys if key in self._embeddings}
        if missing := [key for key in dict.fromkeys(keys) if key not in embeddings]:
            embeddings |= dict(zip(missing, self._encode_words(missing), strict=True))
        with self._lock:
            for key in keys:
                self._embeddings[key] = embeddings[key]
                self._embeddings.move_to_end(key)
            while len(self._embeddings) > NAME_CACHE_SIZE:
                self._embeddings.popitem(last=False)
        return torch.stack([embeddings[key] for key in keys])

    # ---- segmentation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def segment(
        self,
        names: str | Sequence[str] | Sequence[ClassName],
        *,
        background: float | Literal["default"] | None = "default",
        thresholds: Mapping[str, float] | None = None,
        image: ImageState | None = None,
        company: Sequence[str] = COMPANY,
        attention: bool = True,
        features: bool = False,
        skip_lcsa: bool = False,
    ) -> Segmentation:
        """Segment the photo into the named classes.

        Args:
            names: class names, see `parse_names`. "sofa | couch" is one class with two words: each word is encoded by itself,
                the score of the class is the higher one (patch by patch), its attention is the sum, and the class counts as
                seen if one of the words does. Words such as "background", "other" or "none" are not classes:
                they allow "none of these". A `ClassName` is not parsed again.
            background: threshold in 0..1. Pixels whose best name has a lower score get the label -1, "none of these".
                "default" = the checkpoint's threshold; None = every pixel gets its best name.
            thresholds: {name: threshold} for classes with a threshold other than `background`, by the first word of the class.
            image: a photo's state from `encode_image`; None = the photo of `set_image`.
            company: words that patches may also attend to if there is only one class; may be empty.
            attention: keep cross-attention and routing in the result.
            features: keep patch features and class embeddings before and after the decoder in the result.
            skip_lcsa: leave LCSA out of a model that was trained with it ("ldvc_without_lcsa" was trained without).

        Raises:
            InvalidImageError: no photo was set.
            InvalidNamesError: no name is left, there are too many, or one is too long.
            ValueError: a threshold is not in 0..1, or belongs to no class.
        """
        is_parsed = names and all(isinstance(each, ClassName) for each in names)
        classes, none_named = (list(names), False) if is_parsed else drop_none_words(parse_names(names))
        if background == "default" or (none_named and background is None):
            background = self.calibration.threshold
        if background is not None and not is_threshold(background):
            raise ValueError(f'background is a threshold between 0 and 1, None or "default", not {background!r}.')
        for name, value in (thresholds or {}).items():
            if name not in {each.title for each in classes} or not is_threshold(value):
                raise ValueError(f"thresholds has a number between 0 and 1 for some of the classes, not {name!r}: {value!r}.")
        state = image or self.image
        if state is None:
            raise InvalidImageError("Set a photo first: predictor.set_image(photo).")
        if (key := self.encoder_id) != state.encoder_id:  # encoded by other towers or at another size
            state = state.others.get(key) or state.others.setdefault(key, self.encode_image(state.picture))
        words = [word for each in classes for word in each.words]
        requested = {canonical(word) for word in words}
        is_softmax = isinstance(self.calibration, SoftmaxCalibration)
        stuff = [word for word in self.plain_clip.stuff if canonical(word) not in requested] if is_softmax else []
        company = [word for word in company if canonical(word) not in requested] if len(classes) == 1 and not is_softmax else []
        embeddings = self.encode_names([*words, *company, *stuff])
        outputs, is_plain = [], self._is_plain
        for encoded, window in zip(self._features(state), state.windows, strict=True):
            encoded = moved(encoded, self.device)
            if is_plain:
                scale, bias = (1.0, 0.0) if is_softmax else (self.model.clip.scale, self.model.clip.bias)
                logits = similarity_logits(encoded.patch_features, embeddings, scale=scale, bias=bias)
                decoded = DecoderOutput(logits.unflatten(-1, encoded.grid), encoded.patch_features, embeddings[None])
            else:
                decoded = self.model.decode(encoded, embeddings, return_attention=attention, skip_lcsa=skip_lcsa)
            word_logits = decoded.mask_logits[0, : len(words)].float().cpu().split([len(each.words) for each in classes])
            outputs.append(
                WindowOutput(
                    window,
                    logits=torch.stack([logits.amax(dim=0) for logits in word_logits]),
                    attention_scores=[layer[0].float().cpu() for layer in decoded.cross_attention or ()],
                    routing=[moved(layer, "cpu") for layer in decoded.routing or ()],
                    features=DecoderFeatures.of(decoded, len(words)) if features and not is_plain else None,
                    stuff=decoded.mask_logits[0, len(words) :].float().cpu().amax(dim=0) if stuff else None,
                    patch_attention=encoded.patch_attention[0].cpu() if attention and is_plain else None,
                    patch_features=encoded.patch_features[0].float().cpu() if features and is_plain else None,
                )
            )
        return Segmentation(
            classes=classes,
            seen=[each in self.seen_names for each in classes],
            decoder=self.decoder,
            picture=state.picture,
            input_size=state.input_size,
            patch=self.model.clip.patch_size,
            outputs=outputs,
            calibration=self.calibration,
            background=background,
            thresholds=dict(thresholds or {}),
            indistinguishable_words=indistinguishable_words(classes, embeddings[: len(words)]),
            company=company,
            stuff=stuff,
        )


def is_threshold(value: Any) -> bool:
    """Whether a value is a number in 0..1."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0.0 <= value <= 1.0


def indistinguishable_words(classes: Sequence[ClassName], embeddings: Tensor) -> list[list[str]]:
    """Groups of words of different classes that have the same embedding, so that the model cannot tell them apart.

    Embeddings are (E, d), one for each word, class by class. For instance, the lite model has no tokens for Chinese.
    """
    unit = F.normalize(embeddings.float(), dim=-1)
    with torch.autocast(unit.device.type, enabled=False):  # bfloat16 rounds 0.998 to 1
        similarity = unit @ unit.T
    is_same = (similarity > SAME_EMBEDDING).fill_diagonal_(True).tolist()  # a zero vector has similarity 0 to itself
    groups: dict[int, list[tuple[str, int]]] = {}  # index of the first of equal words -> all of them, each with its class
    words_and_classes = [(word, index) for index, each in enumerate(classes) for word in each.words]
    for row, entry in zip(is_same, words_and_classes, strict=True):
        groups.setdefault(row.index(True), []).append(entry)
    return [[word for word, _ in group] for group in groups.values() if len({index for _, index in group}) > 1]


def moved(parts: Parts, device: str | torch.device) -> Parts:
    """A named tuple with its tensors on a device."""
    return type(parts)(*(each.to(device) if isinstance(each, Tensor) else each for each in parts))
