"""The models of the page, their decoders loaded when first needed and shared by all visitors."""

from __future__ import annotations

import logging
import os
import threading

import numpy as np

from ldvc.bundled import ASSETS
from ldvc.errors import CheckpointError, LdvcError, WeightsNotFoundError
from ldvc.predictor import PREDICTOR_DECODERS, Predictor
from ldvc.web import texts
from ldvc.web.gpu import gpu_is_lent
from ldvc.web.session import Problem

log = logging.getLogger(__name__)

MAIN_DECODER = "ldvc"
LITE = "lite"


class LoadedModel:
    """The decoders of one checkpoint.

    Attributes:
        name: the last part of the source: visitors see no folders.
        borrows_gpu: whether it computes with a GPU of ZeroGPU. Lite does not: it is fast on a CPU, and a visitor has only a few
            minutes of GPU a day.
    """

    def __init__(self, source: str = LITE) -> None:
        self.name = source.rstrip("/").rsplit("/", 1)[-1]
        self.borrows_gpu = gpu_is_lent() and source != LITE
        self._lock = threading.Lock()
        device = "cpu" if gpu_is_lent() and not self.borrows_gpu else None
        self.main = Predictor.from_pretrained(source, decoder=MAIN_DECODER, device=device)
        self._predictors: dict[str, Predictor | None] = {MAIN_DECODER: self.main}

    def predictor(self, decoder: str) -> Predictor | None:
        """The predictor with a decoder, or None if the checkpoint has no such decoder."""
        if decoder not in self._predictors:  # without the lock: a forked process may inherit it locked
            with self._lock:
                if decoder not in self._predictors:
                    try:
                        self._predictors[decoder] = self.main.sibling(decoder)
                    except (CheckpointError, WeightsNotFoundError):
                        self._predictors[decoder] = None
        return self._predictors[decoder]

    def decoders(self) -> list[str]:
        """The decoders that the checkpoint has, in the order of `PREDICTOR_DECODERS`."""
        return [decoder for decoder in PREDICTOR_DECODERS if self.predictor(decoder) is not None]


class ModelRegistry:
    """The choice of models on the page.

    Args:
        main: the model that the page opens with, or its source; `FULL` = the full model, with lite as the other choice.
        full: source of a decoder checkpoint for the full CLIP; None: then choosing it says what to do.

    Raises:
        LdvcError: the main model cannot be loaded.
    """

    FULL = "full"

    def __init__(self, main: str | LoadedModel = LITE, full: str | None = None) -> None:
        self._lock = threading.Lock()  # of loading a model; one that is loaded is returned without it
        self._loaded: dict[str, LoadedModel] = {}
        self._full = full
        self.default = self.FULL
        if main != self.FULL:
            first = main if isinstance(main, LoadedModel) else LoadedModel(main)
            self.default = first.name
            self._loaded[first.name] = first
        self.get(self.default)

    @classmethod
    def from_environment(cls) -> ModelRegistry:
        """`LDVC_MODEL` is the main model, `LDVC_FULL` (or the folder assets/full) the full model's checkpoint.

        Raises:
            LdvcError: the main model cannot be loaded.
        """
        beside = ASSETS / "full"
        full = os.environ.get("LDVC_FULL") or (str(beside) if beside.is_dir() else None)
        return cls(os.environ.get("LDVC_MODEL", LITE), full)

    def warm(self) -> None:
        """Load every decoder of the main model and run it once, so that no visitor waits for it.

        On ZeroGPU, all models are loaded: that must happen before the page is served. A model that borrows the GPU is not run,
        and the digest of its weights is computed now, because later they can be read on the GPU only.
        """
        for key in [*self.choices, LITE] if gpu_is_lent() else [self.default]:
            try:
                model = self.get(key)
            except Problem as problem:
                log.warning("%s is not offered: %s", key, problem)
                continue
            decoders = model.decoders()
            if model.borrows_gpu:
                log.info("SHA-256 of the weights of %s: %s", model.name, model.main.weights_digest)
                continue
            image = model.main.encode_image(np.zeros((336, 448, 3), dtype=np.uint8))
            for decoder in decoders:
                model.predictor(decoder).segment(["warm", "up"], image=image)

    @property
    def choices(self) -> list[str]:
        """Keys of the choice."""
        return [self.default, LITE if self.default == self.FULL else self.FULL]

    def get(self, key: str | None) -> LoadedModel:
        """The model of a choice; None is the main one. Lite is there under any choice.

        Raises:
            Problem: it is not here; the sentence says what to do.
        """
        key = key or self.default
        if key in self._loaded:
            return self._loaded[key]
        if key not in (self.FULL, LITE):
            raise Problem("model", texts.NO_SUCH_MODEL.format(names=", ".join(self.choices)))
        source = LITE if key == LITE else self._full
        if source is None:
            raise Problem("model", texts.FULL_MISSING)
        with self._lock:
            if key not in self._loaded:
                try:
                    self._loaded[key] = LoadedModel(source)
                except LdvcError as error:
                    raise Problem("model", f"{texts.FULL_FAILED} {error}") from error
            return self._loaded[key]
