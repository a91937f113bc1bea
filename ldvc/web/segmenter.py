"""Answers to questions, as plain functions of values without widgets, so that tests need no browser."""

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
PHOTO_SIDE = 1600  # photos are shrunk to this long side when they are read
LCSA_OFF = "ldvc_lcsa_off"  # an intervention, not a decoder: the trained LDVC without LCSA at inference
ALL_DECODERS = (*PREDICTOR_DECODERS, LCSA_OFF)
_DECODING = threading.Lock()
_MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class Segmenter:
    """Segments photos with the models of a registry."""

    def __init__(self, registry: ModelRegistry) -> None:
        self.registry = registry
        self._infer = functools.partial(infer, registry)
        self._infer_on_gpu = on_gpu(self._infer, gpu_seconds)
        self._shared: dict[tuple[str, str], Answer] = {}  # answers of `keep`, by fingerprint and model

    def model(self, answer: Answer) -> LoadedModel:
        """The model that gave an answer."""
        return self.registry.get(answer.model)

    def segment(
        self, photo: str | None, names: Any, *, model: str | None = None, company: bool = True, previous: Answer | None = None
    ) -> Answer:
        """Segment a photo by names with the model's main decoder; `results` computes the other decoders.

        If the model gets no GPU from ZeroGPU, lite answers, and the answer has a `notice`.

        Args:
            photo: path of the uploaded file.
            names: names separated by commas, or a list of names; "|" separates synonyms.
            model: key of the model choice; None = the main model.
            company: segment a single name together with `ldvc.predictor.COMPANY`.
            previous: an earlier answer; its encoded photo is reused if model and photo are the same.

        Raises:
            Problem: the question cannot be answered; the sentence tells the visitor what to do.
        """
        key = model or self.registry.default
        loaded = self.registry.get(key)
        if not photo:
            raise Problem("photo", texts.NO_PHOTO)
        parsed_names, classes = read_names(names)
        try:
            fingerprint = hashlib.sha256(Path(photo).read_bytes()).hexdigest()
        except OSError as error:
            raise Problem("photo", texts.NO_PHOTO) from error
        shared = self._shared.get((fingerprint, key))
        is_same = previous is not None and (fingerprint, key) == (previous.fingerprint, previous.model)
        encoded = previous if is_same else shared
        answer = Answer(
            model=key, decoder=loaded.decoder, photo=photo, fingerprint=fingerprint, company=company, kept=shared,
            image=encoded.image if encoded else read_photo(photo), parsed_names=parsed_names,
            names=[name.title for name in classes], none_named=parsed_names != classes,
            pictures=previous.pictures if is_same else {},
            results=dict(shared.results) if shared is not None and shared.parsed_names == parsed_names else {},
        )  # fmt: skip
        try:
            # A GPU is borrowed once per question.
            self.results(answer, *(ALL_DECODERS if loaded.borrows_gpu else (loaded.decoder,)))
        except NoGpu as error:
            answer = self.segment(photo, names, model=LITE, company=company, previous=previous)
            answer.chosen, answer.notice = key, texts.NO_GPU.format(reason=error.reason)
        return answer

    def segment_example(self, photo: str, names: str, *, model: str | None = None, **options: Any) -> Answer:
        """`segment` for a click on an example: lite replaces a model that borrows a GPU, with a notice."""
        key = self.at_once(model)
        answer = self.segment(photo, names, model=key, **options)
        if key != (model or self.registry.default):
            answer.chosen = model or self.registry.default
            answer.notice = texts.EXAMPLE_BY_LITE.format(model=answer.chosen)
        return answer

    def at_once(self, model: str | None) -> str:
        """The key of the model that answers an example: lite if the chosen model borrows a GPU."""
        return LITE if self.registry.present(model).borrows_gpu else model or self.registry.default

    def keep(self, photo: str, names: str, *decoders: str) -> None:
        """Answer a question about an example with the main model and further `decoders`, for all visitors.

        Later answers about this photo share the encoded photo. If the names are the same, they also share the results.
        """
        answer = self.segment(photo, names, model=self.at_once(None))
        answer = answer.kept or answer  # the shared answer, if there is one
        self.results(answer, *decoders)
        self._shared[answer.fingerprint, answer.model] = answer

    def is_kept(self, fingerprint: str, model: str | None) -> bool:
        """Whether `keep` has answered a question about a photo with a model."""
        return (fingerprint, self.at_once(model)) in self._shared

    def results(
        self, answer: Answer, *decoders: str, background: float | str | None = OWN_THRESHOLD,
        thresholds: Mapping[str, float] | None = None, company: bool | None = None,
    ) -> list[Segmentation | None]:  # fmt: skip
        """Segmentations by decoders of `ALL_DECODERS`, in their order; None where the checkpoint has no such decoder.

        Missing results are computed in one call and stored in the answer; the photo is not encoded again.

        Args:
            background: threshold of "none of these" in 0..1; None = not allowed; `OWN_THRESHOLD` = the decoder's threshold.
            thresholds: thresholds of single classes by name, see `Segmentation`; unknown names are ignored.
            company: see `segment`; None = as in the answer. It has an effect for a single name only.

        Raises:
            NoGpu: the model needs a GPU of ZeroGPU and gets none.
        """
        company = (answer.company if company is None else company) and len(answer.names) == 1
        missing = tuple(decoder for decoder in decoders if (decoder, company) not in answer.results)
        if missing:
            compute = self._infer_on_gpu if self.model(answer).borrows_gpu else self._infer
            answer.image, new_results = compute(answer.model, answer.image, answer.parsed_names, missing, company)
            answer.results |= {(decoder, company): result for decoder, result in new_results.items()}
        results = []
        for decoder in decoders:
            result = copy.copy(answer.results.get((decoder, company)))  # a copy, because other events may set other thresholds
            if result is not None:
                result.background = self.threshold(answer, decoder) if background == OWN_THRESHOLD else background
                result.thresholds = {name: thresholds[name] for name in result.names if name in (thresholds or {})}
            results.append(result)
        return results

    def threshold(self, answer: Answer, decoder: str | None = None) -> float:
        """The threshold of a decoder of the checkpoint; None = the decoder that answers."""
        return self.model(answer).predictor(trained(decoder or answer.decoder)).calibration.threshold

    def missing(self, answer: Answer, *decoders: str) -> dict[str, str]:
        """Decoders whose results are None, each with a sentence that says how to get it."""
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
    """Compute the encoded photo and a segmentation for each decoder. All inference of the page happens here.

    The result is None for a decoder that the checkpoint does not have. A decoder whose download failed is left out.
    """
    loaded = registry.get(model)
    state = image if isinstance(image, ImageState) else loaded.main.encode_image(image)
    results: dict[str, Segmentation | None] = {}
    for decoder in decoders:
        predictor = loaded.predictor(trained(decoder))
        options = {"company": COMPANY if company else (), "skip_lcsa": decoder == LCSA_OFF}
        if predictor is not None:
            results[decoder] = predictor.segment([name.text for name in names], image=state, features=True, **options)
        elif loaded.lacks(trained(decoder)):
            results[decoder] = None
    return state, results


def gpu_seconds(
    model: str, image: ImageState | np.ndarray, names: Sequence[ClassName], decoders: Sequence[str], company: bool
) -> int:
    """Upper estimate of the seconds that `infer` needs a GPU, for ViT-B/16; not measured on ZeroGPU.

    A process starts, moves the weights to the GPU, encodes the photo if necessary, and then the words. Plain CLIP also
    encodes its words for “none of these”.
    """
    words = sum(len(name.words) for name in names)
    return math.ceil(12 + 2 * (not isinstance(image, ImageState)) + 0.05 * words)


def check_photo(photo: str) -> None:
    """Read the header of an uploaded file. Raises the problems of `read_photo`."""
    with _picture_problems(), _DECODING:  # one at a time, because a PNG file is read into memory
        check_picture(photo, max_side=PHOTO_SIDE, max_pixels=PHOTO_PIXELS)


def read_photo(photo: str) -> np.ndarray:
    """Read the pixels of an uploaded file, uint8 (H, W, 3), with a long side of at most `PHOTO_SIDE`.

    Photos are decoded one after the other, and their memory is returned to the system: the peak is that of one photo.

    Raises:
        Problem: the file is not a readable picture, or it is too large.
    """
    with _picture_problems(), _DECODING:
        try:
            return load_picture(photo, max_side=PHOTO_SIDE, max_pixels=PHOTO_PIXELS)
        finally:
            return_memory()


def return_memory() -> None:
    """Return freed memory to the system; glibc would keep it for each thread."""
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
    """Parse names from a text or a list of texts; return all of them, and those that are classes.

    Raises:
        Problem: there is no class, there are too many names, a name is too long, or a value is not a text.
    """
    if not isinstance(names or "", str | list | tuple):
        raise Problem("names", texts.NO_NAMES.format(value=names))
    try:
        parsed = parse_names(names or "")
        return parsed, drop_none_words(parsed)[0]
    except InvalidNamesError as error:
        raise Problem("names", str(error)) from error


def checked_background(use_background: Any, threshold: Any) -> float | str | None:
    """The requested threshold: a number, `OWN_THRESHOLD`, or None = "none of these" is not allowed.

    Args:
        use_background: whether "none of these" is allowed; None counts as False.
        threshold: score below which a pixel is none of these; None = the threshold of the checkpoint.

    Raises:
        Problem: `use_background` is not a boolean, or the threshold is not a number from 0 to 1.
    """
    if use_background not in (None, False, True):  # the text "no" would count as True
        raise Problem("run", texts.NO_FLAG.format(value=use_background))
    if not use_background:
        return None
    if threshold is None:
        return OWN_THRESHOLD
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(threshold, bool) and 0 <= (value := float(threshold)) <= 1:
            return value
    raise Problem("run", texts.NO_THRESHOLD.format(value=threshold))
