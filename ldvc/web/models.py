"""The checkpoints of the page, their decoders loaded when first needed and shared by all visitors."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ldvc.errors import CheckpointError, LdvcError, WeightsNotFoundError
from ldvc.predictor import PREDICTOR_DECODERS, Predictor
from ldvc.web import texts
from ldvc.web.gpu import gpu_is_lent
from ldvc.web.session import Problem

MAIN_DECODER = "ldvc"


class Models:
    """The decoders of one checkpoint."""

    def __init__(self, source: str = "lite", *, load: Callable[..., Predictor] = Predictor.from_pretrained) -> None:
        self.source = source
        self.name = source.rstrip("/").rsplit("/", 1)[-1]  # of a path, its last part: visitors need not know folders
        self._lock = threading.Lock()
        self.main = load(source, decoder=MAIN_DECODER)
        self._others: dict[str, Predictor | None] = {MAIN_DECODER: self.main}

    def other(self, decoder: str) -> Predictor | None:
        """A decoder of the checkpoint, or None if the checkpoint has no such decoder."""
        with self._lock:
            if decoder not in self._others:
                try:
                    self._others[decoder] = self.main.sibling(decoder)
                except (CheckpointError, WeightsNotFoundError):
                    self._others[decoder] = None
            return self._others[decoder]

    def decoders(self) -> list[str]:
        """The decoders that there are, in the order of `PREDICTOR_DECODERS`."""
        return [decoder for decoder in PREDICTOR_DECODERS if self.other(decoder) is not None]


class Catalogue:
    """The model choice of the page.

    Args:
        main: source of the checkpoint that the page opens with.
        full: source of a decoder checkpoint for the full CLIP, or None: then choosing it says what to do.
    """

    FULL = "full"

    def __init__(self, main: str | Models = "lite", full: str | None = None) -> None:
        first = main if isinstance(main, Models) else Models(main)
        self.default = first.name
        self._lock = threading.Lock()  # of loading the full model; who asks for what is there does not wait for it
        self._loaded: dict[str, Models] = {first.name: first}
        self._full = full

    @classmethod
    def from_environment(cls) -> Catalogue:
        """`LDVC_MODEL` is the main checkpoint, `LDVC_FULL` (or the folder assets/full) the full model's.

        Raises:
            LdvcError: the main checkpoint cannot be loaded.
        """
        beside = Path(__file__).resolve().parents[2] / "assets" / "full"
        full = os.environ.get("LDVC_FULL") or (str(beside) if beside.is_dir() else None)
        return cls(os.environ.get("LDVC_MODEL", "lite"), full)

    def warm(self) -> None:
        """Load every decoder of the page's own checkpoint and answer once, so that no visitor waits for it.

        On ZeroGPU only the loading: it has to happen before the page is served, and there is no GPU yet.
        """
        models = self.get(None)
        decoders = models.decoders()
        if not gpu_is_lent():
            state = models.main.encode_image(np.zeros((336, 448, 3), dtype=np.uint8))
            for decoder in decoders:
                models.other(decoder).segment(["warm", "up"], image=state)

    @property
    def choices(self) -> list[str]:
        """Keys of the choice."""
        return [self.default, *([self.FULL] if self.default != self.FULL else [])]

    def get(self, key: str | None) -> Models:
        """The models of a choice.

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
                    self._loaded[key] = Models(self._full)
                except LdvcError as error:
                    raise Problem("model", f"{texts.FULL_FAILED} {error}") from error
            return self._loaded[key]
