"""Hugging Face's ZeroGPU lends a GPU for the time of a call, to functions that ask for it; elsewhere nothing changes.

Imported before anything that imports torch, as the package `spaces` demands.
"""

from __future__ import annotations

from collections.abc import Callable

try:
    import spaces

    on_gpu: Callable = spaces.GPU
except ImportError:

    def on_gpu(function: Callable) -> Callable:
        """Run the function as it is."""
        return function


__all__ = ["on_gpu"]
