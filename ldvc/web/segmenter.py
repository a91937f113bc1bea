"""Questions become answers: plain functions of values, without widgets, so that tests need no browser."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import hashlib
import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldvc.class_names import ClassName, drop_none_words, parse_names
from ldvc.errors import InvalidImageError, InvalidNamesError
from ldvc.image_io import check_picture, load_picture
from ldvc.predictor import COMPANY, PREDICTOR_DECODERS, ImageState
from ldvc.result import Segmentation
from ldvc.web import texts
from ldvc.web.gpu import NoGpu, on_gpu
from ldvc.web.models import LITE, MAIN_DECODER, LoadedModel, ModelRegistry
from ldvc.web.session import OWN_THRESHOLD, Answer, Problem

PHOTO_PIXELS = 40_000_000  # see `load_picture`: decoding a photo takes 320 MB at most
PHOTO_SIDE = 1600  # photos are shrunk to this long side when they come in
LCSA_OFF = "ldvc_lcsa_off"  # not a decoder: the trained LDVC with LCSA left out, an intervention
ALL_DECODERS = (*PREDICTOR_DECODERS, LCSA_OFF)
_DECODING = threading.Lock()
_MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class Segmenter:
    """Segments photos with the models of a registry; holds no photo."""

    def __init__(self, registry: ModelRegistry) -> None:
        self.registry = registry
        self._infer = functools.partial(infer, registry)
        self._infer_on_gpu = on_gpu(self._infer, gpu_seconds)
        self._kept: dict[tuple[str, str], Answer] = {}  # by fingerprint and model

    def model(self, answer: Answer) -> LoadedModel:
        """The model that gave an answer."""
        return self.registry.get(answer.model)

    def segment(
        self, photo: str | None, names: Any, *, model: str | None = None, company: bool = True, previous: Answer | None = None
    ) -> Answer:
        """Segment a photo by names with the model's main decoder; others are computed when they are asked for.

        A model that gets no GPU from ZeroGPU is replaced by lite, and the answer has a `notice` about it.

        Args:
            photo: path of the uploaded file.
            names: separated by commas, or a list; synonyms by "|".
            model: key of the model choice; None = the main one.
            company: segment a single name together with `ldvc.predictor.COMPANY`.
            previous: an answer whose encoded photo is used again if model and photo are the same.

        Raises:
            Problem: the visitor can put it right.
        """
        key = model or self.registry.default
        loaded = self.registry.get(key)
        if not photo:
            raise Problem("photo", texts.NO_PHOTO)
        asked, classes = read_names(names)
        try:
            fingerprint = hashlib.sha256(Path(photo).read_bytes()).hexdigest()
        except OSError as error:
            raise Problem("photo", texts.NO_PHOTO) from error
        kept = self._kept.get((fingerprint, key))
        is_same = previous is not None and (fingerprint, key) == (previous.fingerprint, previous.model)
        known = previous if is_same else kept
        answer = Answer(
            model=key, decoder=loaded.decoder, photo=photo, fingerprint=fingerprint, asked=asked, company=company, kept=kept,
            image=known.image if known else read_photo(photo), names=[name.title for name in classes],
            none_named=asked != classes, pictures=previous.pictures if is_same else {},
            results=dict(kept.results) if kept is not None and kept.asked == asked else {},
        )  # fmt: skip
        try:
            # A GPU is borrowed once per question.
            self.results(answer, *(ALL_DECODERS if loaded.borrows_gpu else (loaded.decoder,)))
        except NoGpu as error:
            answer = self.segment(photo, names, model=LITE, company=company, previous=previous)
            answer.chosen, answer.notice = key, texts.NO_GPU.format(reason=error.reason)
        return answer

    def segment_example(self, photo: str, names: str, *, model: str | None = None, **options: Any) -> Answer:
        """`segment` for a click on an example: instead of a model that borrows a GPU lite answers, with a notice."""
        key = self.at_once(model)
        answer = self.segment(photo, names, model=key, **options)
        if key != (model or self.registry.default):
            answer.chosen = model or self.registry.default
            answer.notice = texts.EXAMPLE_BY_LITE.format(model=answer.chosen)
        return answer

    def at_once(self, model: str | None) -> str:
        """The key of a model, or of lite instead of one that borrows a GPU."""
        return LITE if self.registry.present(model).borrows_gpu else model or self.registry.default

    def keep(self, photo: str, names: str, *decoders: str) -> None:
        """Answer a question about a photo of the project with the main model and more `decoders`, for all visitors.

        Later answers about it share the encoded photo; those about the same names also share the results.
        """
        answer = self.segment(photo, names, model=self.at_once(None))
        answer = answer.kept or answer
        self.results(answer, *decoders)
        self._kept[answer.fingerprint, answer.model] = answer

    def is_kept(self, fingerprint: str, model: str | None) -> bool:
        """Whether there is an answer of `keep` about a photo by a model."""
        return (fingerprint, self.at_once(model)) in self._kept

    def results(
        self, answer: Answer, *decoders: str, background: float | str | None = OWN_THRESHOLD,
        thresholds: Mapping[str, float] | None = None, company: bool | None = None,
    ) -> list[Segmentation | None]:  # fmt: skip
        """Segmentations by some decoders of `PREDICTOR_DECODERS`, or `LCSA_OFF`; None where the checkpoint has no such decoder.

        They are computed once, in one call, and kept in the answer; the photo is not encoded again.

        Args:
            background: threshold of "none of these" in 0..1, None = not allowed, `OWN_THRESHOLD` = each decoder's own.
            thresholds: of some classes by name, see `Segmentation`; other names are ignored.
            company: see `segment`; None = as the answer was asked. Matters for a single name only.

        Raises:
            NoGpu: the model computes with a GPU of ZeroGPU and gets none.
        """
        company = (answer.company if company is None else company) and len(answer.names) == 1
        missing = tuple(decoder for decoder in decoders if (decoder, company) not in answer.results)
        if missing:
            compute = self._infer_on_gpu if self.model(answer).borrows_gpu else self._infer
            answer.image, found = compute(answer.model, answer.image, answer.asked, missing, company)
            answer.results |= {(decoder, company): result for decoder, result in found.items()}
        results = []
        for decoder in decoders:
            result = copy.copy(answer.results.get((decoder, company)))  # events with other thresholds get copies of their own
            if result is not None:
                result.background = self.threshold(answer, decoder) if background == OWN_THRESHOLD else background
                result.thresholds = {name: thresholds[name] for name in result.names if name in (thresholds or {})}
            results.append(result)
        return results

    def threshold(self, answer: Answer, decoder: str | None = None) -> float:
        """The own threshold of a decoder of the checkpoint; None = of the one that answers."""
        return self.model(answer).predictor(trained(decoder or answer.decoder)).calibration.threshold

    def missing(self, answer: Answer, *decoders: str) -> dict[str, str]:
        """Of the decoders whose results are None: a sentence each that says how to get them."""
        results = zip(decoders, self.results(answer, *decoders), strict=True)
        return {decoder: self.model(answer).missing(trained(decoder)) for decoder, result in results if result is None}

    def weights_digest(self, answer: Answer) -> str:
        """SHA-256 of the weights that gave an answer; see `Predictor.weights_digest`."""
        return self.model(answer).main.weights_digest


def trained(decoder: str) -> str:
    """The decoder of `PREDICTOR_DECODERS` behind one of `ALL_DECODERS`."""
    return MAIN_DECODER if decoder == LCSA_OFF else decoder


def infer(
    registry: ModelRegistry,
    model: str,
    image: ImageState | np.ndarray,
    names: Sequence[ClassName],
    decoders: Sequence[str],
    company: bool,
) -> tuple[ImageState, dict[str, Segmentation | None]]:
    """The one place where the page's models compute: the encoded photo, and a segmentation for each decoder.

    The result is None for a decoder that the checkpoint does not have. One that could not be fetched is left out.
    """
    loaded = registry.get(model)
    state = image if isinstance(image, ImageState) else loaded.main.encode_image(image)
    found: dict[str, Segmentation | None] = {}
    for decoder in decoders:
        predictor = loaded.predictor(trained(decoder))
        options = {"company": COMPANY if company else (), "skip_lcsa": decoder == LCSA_OFF}
        if predictor is not None:
            found[decoder] = predictor.segment([name.text for name in names], image=state, features=True, **options)
        elif loaded.lacks(trained(decoder)):
            found[decoder] = None
    return state, found


def gpu_seconds(
    model: str, image: ImageState | np.ndarray, names: Sequence[ClassName], decoders: Sequence[str], company: bool
) -> int:
    """How long `infer` may need a GPU that is lent: estimates for ViT-B/16 on the generous side, not measured on ZeroGPU.

    A process starts, moves the weights to the GPU, encodes the photo unless that is done, and then the words; plain CLIP also
    encodes those for “none of these”.
    """
    words = sum(len(each.words) for each in names)
    return math.ceil(12 + 2 * (not isinstance(image, ImageState)) + 0.05 * words)


def check_photo(photo: str) -> None:
    """Read the header of an uploaded file; the same problems as `read_photo`."""
    with _picture_problems(), _DECODING:  # a PNG is in memory as a file meanwhile
        check_picture(photo, max_side=PHOTO_SIDE, max_pixels=PHOTO_PIXELS)


def read_photo(photo: str) -> np.ndarray:
    """(H, W, 3) uint8 pixels of an uploaded file, at most `PHOTO_SIDE` long.

    Photos are decoded one after the other, and the memory goes back to the system: the peak is that of one photo.

    Raises:
        Problem: it is no picture that can be read, or it is too large.
    """
    with _picture_problems(), _DECODING:
        try:
            return load_picture(photo, max_side=PHOTO_SIDE, max_pixels=PHOTO_PIXELS)
        finally:
            return_memory()


def return_memory() -> None:
    """Give memory that was freed back to the system; glibc would keep it for each thread."""
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)


@contextlib.contextmanager
def _picture_problems() -> Iterator[None]:
    try:
        yield
    except InvalidImageError as error:
        raise Problem("photo", str(error)) from error
    except OSError as error:
        raise Problem("photo", texts.NO_PHOTO) from error


def read_names(names: Any) -> tuple[list[ClassName], list[ClassName]]:
    """Parsed names, from one text or a list of texts, and those of them that are classes.

    Raises:
        Problem: no class, or too many names, or one too long, or something else than text.
    """
    if not isinstance(names or "", str | list | tuple):
        raise Problem("names", texts.NO_NAMES.format(value=names))
    try:
        asked = parse_names(names or "")
        return asked, drop_none_words(asked)[0]
    except InvalidNamesError as error:
        raise Problem("names", str(error)) from error


def checked_background(use_background: Any, threshold: Any) -> float | str | None:
    """The threshold that a program asks for: a number, `OWN_THRESHOLD`, or None = "none of these" is not allowed.

    Args:
        use_background: whether "none of these" is allowed; None counts as no.
        threshold: score that a name must reach then; None = the checkpoint's own.

    Raises:
        Problem: `use_background` is not true or false, or the threshold is no number from 0 to 1.
    """
    if use_background not in (None, False, True):  # "no" would count as yes
        raise Problem("run", texts.NO_FLAG.format(value=use_background))
    if not use_background:
        return None
    if threshold is None:
        return OWN_THRESHOLD
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(threshold, bool) and 0 <= (value := float(threshold)) <= 1:
            return value
    raise Problem("run", texts.NO_THRESHOLD.format(value=threshold))
