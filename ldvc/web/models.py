"""The models of the page, shared by all visitors. A decoder is loaded when it is first needed."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldvc.bundled import ASSETS
from ldvc.checkpoint import clip_to_download, is_plain_clip
from ldvc.errors import CheckpointError, LdvcError, WeightsNotFoundError
from ldvc.modeling.clip_weights import find_pretrained
from ldvc.predictor import PLAIN_CLIP, PREDICTOR_DECODERS, Predictor
from ldvc.web import texts
from ldvc.web.gpu import gpu_is_lent
from ldvc.web.session import Problem
from ldvc.weights import hub_reachable

log = logging.getLogger(__name__)

MAIN_DECODER = "ldvc"
LITE = "lite"
FULL_BYTES = 599_000_000  # ViT-B/16: 149.6 million float32 numbers; the Hub gives the exact size when the download starts


class LoadedModel:
    """The decoders of one checkpoint, or a CLIP without decoders."""

    def __init__(self, source: str = LITE) -> None:
        self.name = source.rstrip("/").rsplit("/", 1)[-1]  # without folders, because visitors see the name
        # Lite borrows no GPU: it is fast on a CPU, and a visitor has only a few minutes of GPU a day.
        self.borrows_gpu = gpu_is_lent() and source != LITE
        self._lock = threading.Lock()
        device = "cpu" if gpu_is_lent() and not self.borrows_gpu else None
        self.decoder = PLAIN_CLIP if is_plain_clip(source) else MAIN_DECODER  # the one that answers; `main` is its predictor
        self.main = Predictor.from_pretrained(source, decoder=self.decoder, device=device)
        self._predictors: dict[str, Predictor | None] = {self.decoder: self.main}

    @property
    def has_dense_clip(self) -> bool:
        """Whether plain CLIP computes the last block of its image tower densely, see `ldvc.modeling.dense`."""
        return self.main.plain_clip.dense != "plain"

    def predictor(self, decoder: str) -> Predictor | None:
        """The predictor with a decoder; None if the checkpoint has no such decoder or it cannot be downloaded now."""
        if decoder in self._predictors:  # without the lock, which a forked process may inherit locked
            return self._predictors[decoder]
        with self._lock:
            try:
                if decoder not in self._predictors:
                    self._predictors[decoder] = self.main.sibling(decoder)
            except CheckpointError:
                self._predictors[decoder] = None
            except WeightsNotFoundError as error:  # such as a failed download: the next question tries again
                log.warning("%s of %s: %s", decoder, self.name, error)
            return self._predictors.get(decoder)

    def prepare(self) -> None:
        """Encode dense CLIP's words for "none of these". This is slow on a CPU; then the embeddings are cached on disk."""
        if self.has_dense_clip and not self.borrows_gpu:
            self.predictor(PLAIN_CLIP).encode_names(self.main.plain_clip.stuff)

    def warm(self) -> None:
        """Load every decoder and run it once.

        A model that borrows a GPU is not run. The digest of its weights is computed now, before they move to the GPU.
        """
        decoders = self.decoders()
        if self.borrows_gpu:
            log.info("SHA-256 of the weights of %s: %s", self.name, self.main.weights_digest)
            return
        image = self.main.encode_image(np.zeros((336, 448, 3), dtype=np.uint8))
        for decoder in decoders:
            self.predictor(decoder).segment(["warm", "up"], image=image)

    def lacks(self, decoder: str) -> bool:
        """Whether the checkpoint has no such decoder; False if its download failed."""
        return decoder in self._predictors and self._predictors[decoder] is None

    def missing(self, decoder: str) -> str:
        """A sentence for a decoder without a predictor: why it is missing and how to get it."""
        if self.decoder == PLAIN_CLIP:
            return texts.NO_DECODER
        return texts.DECODER_HOW if self.lacks(decoder) else texts.DECODER_FAILED

    def decoders(self) -> list[str]:
        """The decoders that the checkpoint has, in the order of `PREDICTOR_DECODERS`."""
        return [decoder for decoder in PREDICTOR_DECODERS if self.predictor(decoder) is not None]


def is_on_hub(source: str) -> bool:
    """Whether a source is a checkpoint on the Hub, which may be in the cache."""
    return not (is_plain_clip(source) or source == LITE or Path(source).expanduser().is_dir())


class Download:
    """The download of a checkpoint and the weights of its CLIP from the Hub, in a thread.

    The Hub's client ends a download that stalls: it tries again after 10 seconds without a byte, five times.
    """

    def __init__(self, source: str) -> None:
        self.done = self.total = 0  # bytes of the CLIP weights; 0 until the Hub answers
        self.error: LdvcError | None = None  # the reason of a failure
        self._thread = threading.Thread(target=self._run, args=(source,), daemon=True)
        self._thread.start()

    def _run(self, source: str) -> None:
        download = self

        class Counter(tqdm):
            """Counts bytes and prints nothing."""

            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **{**options, "disable": True})
                download.done, download.total = options.get("initial") or 0, options.get("total") or 0

            def update(self, n: float | None = 1) -> None:
                download.done += int(n or 0)

        try:
            if (clip := clip_to_download(source)) is not None:
                find_pretrained(*clip, tqdm_class=Counter)
        except LdvcError as error:
            self.error = error

    @property
    def sentence(self) -> str:
        """A sentence about the progress."""
        return texts.FULL_DOWNLOADING.format(done=self.done // 10**6, total=(self.total or FULL_BYTES) // 10**6)

    @property
    def share(self) -> float:
        """The downloaded share, from 0 to 1."""
        return min(1.0, self.done / (self.total or FULL_BYTES))

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` for the end of the download; return whether it ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()


class ModelRegistry:
    """The choice of models on the page.

    Args:
        main: the model that the page opens with, or its source. `FULL`: the full model, with lite as the other choice.
        full: source of a decoder checkpoint for the full CLIP; None = the CLIP without decoders.

    Raises:
        LdvcError: the main model cannot be loaded.
    """

    FULL = "full"

    def __init__(self, main: str | LoadedModel = LITE, full: str | None = None) -> None:
        self._lock = threading.Lock()  # held while a model is loaded
        self._loaded: dict[str, LoadedModel] = {}
        self._full = full or self.FULL
        self._download: Download | None = None
        self.default = self.FULL
        if main == self.FULL:
            self._load(self.FULL)
        else:
            first = main if isinstance(main, LoadedModel) else LoadedModel(main)
            self.default, self._loaded = first.name, {first.name: first}

    @classmethod
    def from_environment(cls) -> ModelRegistry:
        """`LDVC_MODEL` is the main model, `LDVC_FULL` (or the folder assets/full) the full model's checkpoint."""
        bundled = str(ASSETS / "full") if (ASSETS / "full").is_dir() else None
        return cls(os.environ.get("LDVC_MODEL", LITE), os.environ.get("LDVC_FULL") or bundled)

    def warm(self) -> None:
        """Load every decoder of the main model and run it once, so that no visitor waits for it.

        On ZeroGPU, all models are loaded: that must happen before the page is served.
        """
        for key in [*self.choices, LITE] if gpu_is_lent() else [self.default]:
            try:
                self._load(key).warm()
            except Problem as problem:
                log.warning("%s is not offered: %s", key, problem)

    @property
    def choices(self) -> list[str]:
        """Keys of the models that a visitor can choose."""
        return [self.default, LITE if self.default == self.FULL else self.FULL]

    def get(self, key: str | None) -> LoadedModel:
        """Return the model with a key; None is the main model. Lite is always available.

        Raises:
            Problem: the model is not available yet; the sentence says what to do. Missing weights are being downloaded.
        """
        key = key or self.default
        if (download := self.download(key)) is not None:
            raise Problem("model", f"{download.sentence} {texts.FULL_WAIT}")
        return self._load(key)

    def is_loaded(self, key: str) -> bool:
        """Whether `get` returns the model at once."""
        return key in self._loaded

    def present(self, key: str | None) -> LoadedModel:
        """The model with a key if it is loaded, otherwise the main model."""
        return self._loaded.get(key or self.default, self._loaded[self.default])

    def download(self, key: str) -> Download | None:
        """The download that a model needs before it can be loaded; None if it needs none. It starts now if it has not started.

        Raises:
            Problem: there is no such model, or the download is not possible, or it failed. The next call tries again.
        """
        if key in self._loaded:
            return None
        source = self._source(key)
        if not is_on_hub(source) and self._missing_clip(key) is None:
            return None
        with self._lock:
            if self._download is None:
                if not hub_reachable():
                    if is_on_hub(source):  # it may be in the cache
                        return None
                    raise Problem("model", texts.FULL_OFFLINE)
                self._download = Download(source)
                return self._download
            if not self._download.wait(0):
                return self._download
            if error := self._download.error:
                self._download = None  # the next call tries again
                raise Problem("model", f"{texts.FULL_FAILED} {error}") from error
            return None

    def needs_download(self) -> bool:
        """Whether the full model has no decoders and its weights are not on this machine."""
        return self.FULL not in self._loaded and is_plain_clip(self._full) and self._missing_clip(self.FULL) is not None

    def _missing_clip(self, key: str) -> tuple[str, str] | None:
        source = self._source(key)
        try:
            return clip_to_download(source)
        except LdvcError as error:
            raise Problem("model", f"{texts.FULL_FAILED} {error}") from error

    def _source(self, key: str) -> str:
        if key not in (self.FULL, LITE):
            raise Problem("model", texts.NO_SUCH_MODEL.format(names=", ".join(self.choices)))
        return LITE if key == LITE else self._full

    def _load(self, key: str) -> LoadedModel:
        """Load a model; unlike `get`, wait for missing weights."""
        if key in self._loaded:
            return self._loaded[key]
        source = self._source(key)
        with self._lock:
            if key not in self._loaded:
                try:
                    self._loaded[key] = LoadedModel(source)
                except LdvcError as error:
                    self._download = None
                    raise Problem("model", f"{texts.FULL_FAILED} {error}") from error
            return self._loaded[key]
