"""After step 6c of lite, for who tunes more than once: the weighted mean of all weights of two tunings.

    python -m recipes.lite.average --first assets/lite --second runs/lite_tune_gpu --share 0.75 --output runs/lite_average

What a long tuning wins on the kinds of photos that it learns from it pays with words and photos that it does not. Where it
started from the other weights, the straight line between both keeps more of either than its ends (WiSE-FT: Wortsman et al.,
"Robust fine-tuning of zero-shot models", CVPR 2022). It costs nothing at inference.

Both folders, and the one written, hold a checkpoint for each decoder, all on one tower.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldvc.checkpoint import load_checkpoint, save_checkpoint
from ldvc.config import DECODERS
from ldvc.modeling.clip import LITE_FOLDER, save_clip_folder


def between(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 - share) * first + share * second, name by name; what is no floating-point number is the second's."""
    assert first.keys() == second.keys(), "only models of the same parts can be averaged"
    return {
        name: torch.lerp(first[name], tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in second.items()
    }


def average(first: Path, second: Path, share: float, output: Path) -> None:
    """Writes tower (what differs from the bundled one) and decoders; their metadata are those of `second`."""
    for decoder in DECODERS:
        one, _ = load_checkpoint(first, decoder=decoder)
        other, metadata = load_checkpoint(second, decoder=decoder)
        assert one.config.decoder == other.config.decoder == decoder
        tower = between(one.clip.model.state_dict(), other.clip.model.state_dict(), share)
        other.load_trainable_state_dict(between(one.trainable_state_dict(), other.trainable_state_dict(), share))
        save_checkpoint(other, output / decoder, metadata=metadata, clip="../clip")
    other.clip.model.load_state_dict(tower)
    base = os.path.relpath(LITE_FOLDER / "clip", output / "clip")
    save_clip_folder(other.clip.model, output / "clip", {"base": base})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=Path, default=Path("assets/lite"))
    parser.add_argument("--second", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.75, help="of the second, 0 to 1; default: 0.75")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if not 0 <= options.share <= 1:
        parser.error(f"--share is a share from 0 to 1, not {options.share}")
    average(options.first, options.second, options.share, options.output)
    print(f"{options.output} holds the mean: {1 - options.share:g} of {options.first}, {options.share:g} of {options.second}")


if __name__ == "__main__":
    main()
