"""Hugging Face's ZeroGPU lends a GPU to decorated functions for the time of a call; elsewhere nothing changes.

This module is imported before anything that imports torch, as the package `spaces` demands. ZeroGPU runs the function in a
forked process: what the function changes in place is lost. Arguments and results are packed to bytes here, because every
tensor that multiprocessing passes keeps a file descriptor and a piece of /dev/shm (64 MB in a container) open.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

try:
    import spaces
except ImportError:
    spaces = None

SECONDS = 15  # requested for each call; a visitor without an account has a few minutes a day


def gpu_is_lent() -> bool:
    """Whether this is a Space on ZeroGPU: then models are loaded before the page is served, not when first needed."""
    return spaces is not None and os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def on_gpu(function: Callable) -> Callable:
    """The function, run with a GPU where ZeroGPU lends one. Its arguments and results must be picklable."""
    if not gpu_is_lent():
        return function

    @spaces.GPU(duration=SECONDS)
    def run(packed: bytes) -> bytes:
        return pickle.dumps(function(*pickle.loads(packed)), pickle.HIGHEST_PROTOCOL)

    def lent(*arguments: Any) -> Any:
        return pickle.loads(run(pickle.dumps(arguments, pickle.HIGHEST_PROTOCOL)))

    return lent
