"""Step 7 of lite: bring the tuned tower and the three trained decoders into the folder that is shipped.

    python -m recipes.lite.publish --release runs/lite_recipe/tuned --output assets/lite

Half precision, towers named relative to the folder, so that `assets/lite` may lie anywhere. Of the tuned tower only what
differs from `assets/lite/clip` is stored.
"""

import argparse
from pathlib import Path

import torch

from ldvc.checkpoint import load_checkpoint, save_checkpoint
from ldvc.config import DECODERS
from ldvc.modeling.clip import build_clip, save_clip_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", type=Path, default=Path("runs/lite_recipe/tuned"))
    parser.add_argument("--output", type=Path, default=Path("assets/lite"))
    args = parser.parse_args()

    tower = build_clip(str(args.release / "clip"))
    save_clip_folder(tower.model, args.output / "clip_tuned", {"base": "../clip"})
    for decoder in DECODERS:
        model, metadata = load_checkpoint(args.release / decoder)
        folder = save_checkpoint(model, args.output / decoder, metadata=metadata, clip="../clip_tuned", dtype=torch.float16)
        load_checkpoint(folder)
        print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB")
    total = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {total / 1e6:.1f} MB in all")


if __name__ == "__main__":
    main()
