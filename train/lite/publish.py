"""Step 7 of lite: bring the three trained decoders into the folder that is shipped.

    python -m train.lite.publish --release runs/lite_recipe/release --output assets/lite

Half precision, towers named relative to the folder, so that `assets/lite` may lie anywhere.
"""

import argparse
from pathlib import Path

import torch

from ldvc.checkpoint import load_checkpoint, save_checkpoint
from ldvc.config import ARMS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", type=Path, default=Path("runs/lite_recipe/release"))
    parser.add_argument("--output", type=Path, default=Path("assets/lite"))
    args = parser.parse_args()

    for arm in ARMS:
        model, metadata = load_checkpoint(args.release / arm)
        folder = save_checkpoint(model, args.output / arm, metadata=metadata, clip="../clip", dtype=torch.float16)
        load_checkpoint(folder)
        print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB")
    total = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {total / 1e6:.1f} MB in all")


if __name__ == "__main__":
    main()
