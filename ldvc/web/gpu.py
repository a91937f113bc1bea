"""Hugging Face's ZeroGPU lends a GPU for the time of a call, to functions that ask for it; elsewhere nothing changes.

Imported before anything that imports torch, as the package `spaces` demands. It runs the function in a forked process, so
that what the function changes in place stays there, and hands arguments and results over as multiprocessing does: every
tensor would keep a file descriptor and a piece of /dev/shm (64 MB in a container) open for as long as a visitor is
remembered. So they are packed to plain bytes here.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable
from typing import Any

try:
    import spaces
except ImportError:
    spaces = None

# What a visitor without an account may use in a day is a few minutes, and a call must ask for its time in advance.
SECONDS = 15


def gpu_is_lent() -> bool:
    """Whether this is a Space on ZeroGPU: then models are loaded before the page is served, not when first needed."""
    return spaces is not None and os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def on_gpu(function: Callable) -> Callable:
    """Run the function with a GPU where one is lent, as it is elsewhere.

    Args:
        function: of values that can be pickled, as its result can.
    """
    if not gpu_is_lent():
        return function

    @spaces.GPU(duration=SECONDS)
    def run(packed: bytes) -> bytes:
        arguments, options = pickle.loads(packed)
        return pickle.dumps(function(*arguments, **options), pickle.HIGHEST_PROTOCOL)

    @functools.wraps(function)
    def lent(*arguments: Any, **options: Any) -> Any:
        return pickle.loads(run(pickle.dumps((arguments, options), pickle.HIGHEST_PROTOCOL)))

    return lent
