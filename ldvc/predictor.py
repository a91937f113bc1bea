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
from dataclasses import replace
from functools import cached_property
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ldvc.calibration import Calibration
from ldvc.checkpoint import load_checkpoint
from ldvc.class_names import SeenNames, canonical, clean_names, synonyms_of, without_none_words
from ldvc.config import DECODERS
from ldvc.errors import InvalidImageError
from ldvc.image_io import Source, load_picture
from ldvc.inference import ImageState, encode_picture
from ldvc.modeling.attention import Routing
from ldvc.modeling.decoders import DecoderOutput
from ldvc.modeling.model import LDVC, similarity_logits
from ldvc.modeling.towers import ImageFeatures
from ldvc.result import DecoderFeatures, Segmentation, WindowOutput

PLAIN_CLIP = "clip"
PREDICTOR_DECODERS = (*DECODERS, PLAIN_CLIP)
DEFAULT_INFERENCE = {"long_side": 448}
NAME_CACHE_SIZE = 4096  # embeddings of a few kilobytes each
ONE_AND_THE_SAME = 0.99999  # cosine; "dog" and "dogs", as near as words get in lite, have less

# The softmax over one name is 1 everywhere, so a single name gets company: stuff that most photos show.
COMPANY = ("wall", "floor", "grass", "sky", "tree", "water", "road")


class Predictor:
    """A model that answers questions about photos.

    Args:
        model: the whole model; moved to `device` and set to evaluation.
        metadata: of its checkpoint: `seen_names`, `seen_words`, `calibration` ({"scale", "bias", "threshold"}, see
            `Calibration`; `clip_calibration` for plain similarity), `inference` ({"long_side"} or {"short_side", "window",
            "stride"}).
        decoder: one of `PREDICTOR_DECODERS`; "clip" is the plain similarity of the frozen towers.
        device: where to compute; None = a GPU if there is one.
        encoder_id: of the predictor whose frozen towers this one shares (see `sibling`).
        source: where the checkpoint came from, for `sibling` and for people.
    """

    def __init__(
        self,
        model: LDVC,
        metadata: dict[str, Any] | None = None,
        *,
        decoder: str | None = None,
        device: str | torch.device | None = None,
        encoder_id: str | None = None,
        source: str | None = None,
    ) -> None:
        metadata = metadata or {}
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        self.metadata = metadata
        self.decoder = decoder or model.config.decoder
        self.source = source
        self.inference = dict(metadata.get("inference") or DEFAULT_INFERENCE)
        self.seen_names = SeenNames(metadata.get("seen_names") or (), metadata.get("seen_words") or {})
        self.calibration = Calibration.from_metadata(
            metadata.get("clip_calibration" if self.decoder == PLAIN_CLIP else "calibration")
        )
        self.encoder_id = encoder_id or f"{source or ''}#{id(model.clip)}"
        self._image: ImageState | None = None
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()  # cleaned name as the tokenizer lowers it -> (d,)
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
            source: "lite" (comes with this project), a folder, or an id on the Hugging Face Hub.
            decoder: "ldvc", "ldvc_without_lcsa", "zegclip", or "clip" (plain similarity of the frozen towers).
            device: where to compute; None = a GPU if there is one.

        Raises:
            WeightsNotFoundError, CheckpointError: with a sentence that says what to do.
            ValueError: there is no such decoder.
        """
        if decoder not in PREDICTOR_DECODERS:
            raise ValueError(f"There is no decoder {decoder!r}; choose one of {', '.join(PREDICTOR_DECODERS)}.")
        if decoder == PLAIN_CLIP and _sibling is not None:
            model, metadata = _sibling.model, _sibling.metadata
        else:
            model, metadata = load_checkpoint(source, decoder=decoder, sibling=_sibling and _sibling.model)
        encoder_id = _sibling.encoder_id if _sibling is not None and model.clip is _sibling.model.clip else None
        return cls(model, metadata, decoder=decoder, device=device, encoder_id=encoder_id, source=str(source))

    def sibling(self, decoder: str) -> Predictor:
        """Another decoder of the same checkpoint. Where both stand on the same frozen towers, these are shared, and so is the
        encoding of photos up to them.

        Raises:
            CheckpointError, WeightsNotFoundError: the checkpoint has no such decoder.
        """
        if decoder == self.decoder:
            return self
        assert self.source is not None, "only a predictor made by from_pretrained knows where its siblings are"
        return type(self).from_pretrained(self.source, decoder=decoder, device=self.device, _sibling=self)

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
        state = encode_picture(
            load_picture(image),
            self.model.image_tower,
            inference=self.inference,
            encoder_id=self.encoder_id,
        )
        self._features(state)
        return state

    @torch.no_grad()
    def _features(self, state: ImageState) -> list[ImageFeatures]:
        """Image features of every window with this decoder's prompts, on the CPU."""
        if self.decoder not in state.features:
            features = []
            for patch_tokens in state.patch_tokens:
                patch_tokens = patch_tokens.to(self.device)
                if self.decoder == PLAIN_CLIP:
                    found = self.model.image_tower(patch_tokens=patch_tokens, prompted=False)
                else:
                    found = self.model.encode_image(patch_tokens=patch_tokens)
                features.append(move(found, "cpu"))
            state.features[self.decoder] = features
        return state.features[self.decoder]

    # ---- names ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_names(self, names: Sequence[str]) -> Tensor:
        """Class embeddings (C, d) of cleaned names; known names come from the cache."""
        keys = [name.lower() for name in names]  # not casefold: "fuß" and "fuss" have tokens of their own
        with self._lock:
            found = {key: self._embeddings[key] for key in keys if key in self._embeddings}
        missing = {key: name for key, name in zip(keys, names, strict=True) if key not in found}
        if missing:
            if self.decoder == PLAIN_CLIP:
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

    def segment(
        self,
        names: Sequence[str] | str,
        *,
        background: float | Literal["default"] | None = "default",
        image: ImageState | None = None,
        company: Sequence[str] = COMPANY,
        attention: bool = True,
        features: bool = False,
        skip_lcsa: bool = False,
    ) -> Segmentation:
        """Segment the photo into the named classes.

        Args:
            names: class names; blanks around them, empty ones and repetitions are dropped (`result.names` has the rest).
                "sofa | couch" is one class with two words: each is encoded by itself, the class's score is the higher of
                theirs (patch by patch), its attention the sum of theirs, and it counts as seen if one of them does.
                "background", "other", "none" and the like are no classes: they say that pixels may be none of the others.
            background: a threshold in 0..1: pixels whose best name has a lower score are -1, "none of these". "default" = the
                checkpoint's own; None = the best name everywhere.
            image: a photo's state from `encode_image`; None = the photo of `set_image`.
            company: words that patches may attend to where `names` is a single class; empty = none.
            attention: keep cross-attention and routing, readable from the result.
            features: keep patch features and class embeddings before and after the decoder.
            skip_lcsa: leave LCSA out of weights that were trained with it: an intervention, not the decoder without LCSA.

        Raises:
            InvalidImageError: no photo was set.
            InvalidNamesError: no name is left, or there are too many, or one is too long.
            ValueError: `background` is not in 0..1.
        """
        classes, none_named = without_none_words(clean_names(names))
        if background == "default" or (none_named and background is None):
            background = self.calibration.threshold
        return self.segment_words(
            [synonyms_of(name) for name in classes],
            background=background,
            image=image,
            company=company,
            attention=attention,
            features=features,
            skip_lcsa=skip_lcsa,
        )

    @torch.no_grad()
    def segment_words(
        self,
        words: Sequence[Sequence[str]],
        *,
        background: float | None,
        image: ImageState | None = None,
        company: Sequence[str] = COMPANY,
        attention: bool = True,
        features: bool = False,
        skip_lcsa: bool = False,
    ) -> Segmentation:
        """`segment` for classes whose names are already clean; `words` has the words of each class."""
        is_number = isinstance(background, Real) and not isinstance(background, bool)
        if background is not None and not (is_number and 0.0 <= background <= 1.0):
            raise ValueError(f'background is a threshold between 0 and 1, None or "default", not {background!r}.')
        state = image or self._image
        if state is None:
            raise InvalidImageError("Set a photo first: predictor.set_image(photo).")
        if state.encoder_id != self.encoder_id:  # encoded by other towers
            state = self.encode_image(state.picture)
        words = [list(group) for group in words]
        flat = [word for group in words for word in group]
        asked = {canonical(word) for word in flat}
        company = [word for word in company if canonical(word) not in asked] if len(words) == 1 else []
        embeddings = self.encode_names([*flat, *company])
        join = Synonyms([len(group) for group in words])
        outputs = []
        for encoded, window in zip(self._features(state), state.windows, strict=True):
            encoded = move(encoded, self.device)
            if self.decoder == PLAIN_CLIP:
                clip = self.model.clip
                logits = similarity_logits(encoded.patch_features, embeddings, scale=clip.scale, bias=clip.bias)
                decoded = DecoderOutput(logits.unflatten(-1, encoded.grid), encoded.patch_features, embeddings[None])
            else:
                decoded = self.model.decode(
                    encoded, embeddings, return_attention=attention, skip_lcsa=skip_lcsa
                )
            outputs.append(
                WindowOutput(
                    window,
                    join.best(decoded.mask_logits[0, : len(flat)].float().cpu()),
                    [layer[0].float().cpu() for layer in decoded.cross_attention or ()],
                    [routing_to_cpu(layer) for layer in decoded.routing or ()],
                    decoder_features(decoded, len(flat)) if features and self.decoder != PLAIN_CLIP else None,
                )
            )
        return Segmentation(
            names=[group[0] for group in words],
            synonyms=words,
            seen=[any(word in self.seen_names for word in group) for group in words],
            decoder=self.decoder,
            picture=state.picture,
            input_size=state.input_size,
            patch=self.model.clip.patch_size,
            outputs=outputs,
            calibration=self.calibration,
            background=background,
            indistinguishable_words=indistinguishable_words(words, embeddings[: len(flat)]),
            company=company,
        )


def indistinguishable_words(classes: Sequence[Sequence[str]], embeddings: Tensor) -> list[list[str]]:
    """Words of different classes whose embeddings are one and the same: the text tower cannot read in what they differ.

    Lite's, for instance, learned from English nouns, and of Chinese it knows no token.

    Args:
        classes: the words of each.
        embeddings: (words in all, d).

    Returns:
        Groups of words.
    """
    unit = F.normalize(embeddings.float(), dim=-1)
    with torch.autocast(unit.device.type, enabled=False):  # bfloat16 rounds 0.998 to 1
        similarity = unit @ unit.T
    same = (similarity > ONE_AND_THE_SAME).fill_diagonal_(True).tolist()  # rounding or a zero vector would differ
    groups: dict[int, list[tuple[str, int]]] = {}  # the first of some words that are alike -> them, and their classes
    named = [(word, index) for index, words in enumerate(classes) for word in words]
    for row, each in zip(same, named, strict=True):
        groups.setdefault(row.index(True), []).append(each)
    return [[word for word, _ in group] for group in groups.values() if len({index for _, index in group}) > 1]


class Synonyms:
    """Joins the logits of words into those of classes; `counts` has the number of words of each class."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.starts = [sum(counts[:i]) for i in range(len(counts))]
        self.ends = [start + count for start, count in zip(self.starts, counts, strict=True)]
        self.trivial = all(count == 1 for count in counts)

    def best(self, logits: Tensor) -> Tensor:
        """(words, ...) -> (classes, ...): a class fits as well as the best of its words."""
        if self.trivial:
            return logits
        return torch.stack([logits[i:j].amax(dim=0) for i, j in zip(self.starts, self.ends, strict=True)])


def decoder_features(decoded: DecoderOutput, words: int) -> DecoderFeatures:
    """Before and after the decoder, for the first picture of the batch and its first `words` embeddings, on the CPU."""
    patches = (decoded.patch_features_before, decoded.patch_features)
    classes = (decoded.class_embeddings_before[:, :words], decoded.class_embeddings[:, :words])
    return DecoderFeatures(*(values[0].float().cpu() for values in (*patches, *classes)))


def move(features: ImageFeatures, device: str | torch.device) -> ImageFeatures:
    """The same features on another device."""
    return features._replace(
        global_embedding=features.global_embedding.to(device), patch_features=features.patch_features.to(device)
    )


def routing_to_cpu(routing: Routing) -> Routing:
    """The same routing on the CPU."""
    names = ("regions", "affinity", "queries", "keys")
    return replace(routing, **{name: getattr(routing, name).cpu() for name in names})
