"""LDVC: language-driven visual consensus for zero-shot semantic segmentation.

    from ldvc import Predictor
    predictor = Predictor.from_pretrained("lite")

`Predictor` is imported at its first use, so that training code need not load it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldvc.predictor import Predictor

__all__ = ["Predictor"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Predictor":
        from ldvc.predictor import Predictor

        return Predictor
    raise AttributeError(f"module 'ldvc' has no attribute {name!r}")
