"""ZeroGPU of Hugging Face lends a GPU to decorated functions for the time of a call; elsewhere nothing changes.

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

import gradio as gr  # after `spaces`, which refuses to be imported by Gradio


class NoGpu(gr.Error):
    """ZeroGPU lends no GPU now, with its `reason`: the visitor's time for today is used up, or every GPU is busy."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason} The model “lite” needs no GPU.", title="No GPU", print_exception=False)
        self.reason = reason


def gpu_is_lent() -> bool:
    """Whether this is a Space on ZeroGPU: then models are loaded before the page is served, not when first needed."""
    return spaces is not None and os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def on_gpu(function: Callable, seconds: Callable[..., float]) -> Callable:
    """The function, run with a GPU where ZeroGPU lends one.

    Args:
        function: its arguments and results must be picklable.
        seconds: how long the GPU is asked for, a function of the same arguments. So much must be left of the visitor's time of
            the day; what is not used is not charged.

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
        except gr.Error as error:  # a sentence for the visitor; also if `function` failed, or took too long
            raise NoGpu(f"{error.title}: {str(error.message).strip().rstrip('.')}.") from error
        except RuntimeError as error:  # of the service, not of `function`
            raise NoGpu("ZeroGPU does not answer.") from error
        return pickle.loads(packed)

    return lent
