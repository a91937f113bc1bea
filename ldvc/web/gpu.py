"""Run functions on a GPU of Hugging Face ZeroGPU, which lends it for the time of a call. Elsewhere nothing changes.

Import this module before any module that imports torch, as the package `spaces` requires. ZeroGPU runs the function in a
forked process, so its changes in place are lost. Arguments and results are pickled here, because every tensor that
multiprocessing passes keeps a file descriptor and a part of /dev/shm (64 MB in a container) open.
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

import gradio as gr  # after `spaces`, which must be imported first


class NoGpu(gr.Error):
    """ZeroGPU lends no GPU now. `reason`: the visitor's time for today is used up, or every GPU is busy."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason} The model “lite” needs no GPU.", title="No GPU", print_exception=False)
        self.reason = reason


def gpu_is_lent() -> bool:
    """Whether this is a Space on ZeroGPU. There, all models are loaded before the page is served."""
    return spaces is not None and os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def on_gpu(function: Callable, seconds: Callable[..., float]) -> Callable:
    """Wrap a function so that it runs on a GPU of ZeroGPU; elsewhere return it unchanged.

    Args:
        function: a function with picklable arguments and results.
        seconds: a function of the same arguments that returns the requested GPU time. The visitor must have this much time
            left today; unused time is not charged.

    Returns:
        A function that raises `NoGpu` if there is no GPU or the time was too short.
    """
    if not gpu_is_lent():
        return function

    @spaces.GPU(duration=lambda packed, duration: duration)
    def run(packed: bytes, duration: float) -> bytes:
        return pickle.dumps(function(*pickle.loads(packed)), pickle.HIGHEST_PROTOCOL)

    def lent(*arguments: Any) -> Any:
        try:
            packed = run(pickle.dumps(arguments, pickle.HIGHEST_PROTOCOL), seconds(*arguments))
        except gr.Error as error:  # its sentence is for the visitor; also raised if `function` failed or took too long
            raise NoGpu(f"{error.title}: {str(error.message).strip().rstrip('.')}.") from error
        except RuntimeError as error:  # an error of the service, not of `function`
            raise NoGpu("ZeroGPU does not answer.") from error
        return pickle.loads(packed)

    return lent
