"""The models of the page, their decoders loaded when first needed and shared by all visitors."""

from __future__ import annotations

import os
import threading

import numpy as np

from ldvc.bundled import ASSETS
from ldvc.errors import CheckpointError, LdvcError, WeightsNotFoundError
from ldvc.predictor import PREDICTOR_DECODERS, Predictor
from ldvc.web import texts
from ldvc.web.gpu import gpu_is_lent
from ldvc.web.session import Problem

MAIN_DECODER = "ldvc"


class LoadedModel:
    """The decoders of one checkpoint."""

    def __init__(self, source: str = "lite") -> None:
        self.name = source.rstrip("/").rsplit("/", 1)[-1]  # the last part of a path: visitors see no folders
        self._lock = threading.Lock()
        self.main = Predictor.from_pretrained(source, decoder=MAIN_DECODER)
        self._predictors: dict[str, Predictor | None] = {MAIN_DECODER: self.main}

    def predictor(self, decoder: str) -> Predictor | None:
        """The predictor with a decoder, or None if the checkpoint has no such decoder."""
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
        main: the model that the page opens with, or its source.
        full: source of a decoder checkpoint for the full CLIP; None: then choosing it says what to do.
    """

    FULL = "full"

    def __init__(self, main: str | LoadedModel = "lite", full: str | None = None) -> None:
        first = main if isinstance(main, LoadedModel) else LoadedModel(main)
        self.default = first.name
        self._lock = threading.Lock()  # of loading the full model; a model that is loaded is returned without it
        self._loaded = {first.name: first}
        self._full = full

    @classmethod
    def from_environment(cls) -> ModelRegistry:
        """`LDVC_MODEL` is the main checkpoint, `LDVC_FULL` (or the folder assets/full) the full model's.

        Raises:
            LdvcError: the main checkpoint cannot be loaded.
        """
        beside = ASSETS / "full"
        full = os.environ.get("LDVC_FULL") or (str(beside) if beside.is_dir() else None)
        return cls(os.environ.get("LDVC_MODEL", "lite"), full)

    def warm(self) -> None:
        """Load every decoder of the main checkpoint and run it once, so that no visitor waits for it.

        On ZeroGPU it only loads: that must happen before the page is served, when there is no GPU yet.
        """
        model = self.get(None)
        decoders = model.decoders()
        if not gpu_is_lent():
            image = model.main.encode_image(np.zeros((336, 448, 3), dtype=np.uint8))
            for decoder in decoders:
                model.predictor(decoder).segment(["warm", "up"], image=image)

    @property
    def choices(self) -> list[str]:
        """Keys of the choice."""
        return [self.default, *([self.FULL] if self.default != self.FULL else [])]

    def get(self, key: str | None) -> LoadedModel:
        """The model of a choice; None is the main one.

        Raises:
            Problem: it is not here; the sentence says what to do.
        """
        key = key or self.default
        if key in self._loaded:
            return self._loaded[key]
        if key != self.FULL:
            raise Problem("model", texts.NO_SUCH_MODEL.format(names=", ".join(self.choices)))
        if self._full is None:
            raise Problem("model", texts.FULL_MISSING)
        with self._lock:
            if key not in self._loaded:
                try:
                    self._loaded[key] = LoadedModel(self._full)
                except LdvcError as error:
                    raise Problem("model", f"{texts.FULL_FAILED} {error}") from error
            return self._loaded[key]
