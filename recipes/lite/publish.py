"""Step 7 of lite: write the tuned tower and the three trained decoders into the bundled folder, in half precision.

    python -m recipes.lite.publish --release runs/lite_recipe/objects_release --output assets/lite

Paths of towers are relative to the folder, so that it can be moved. Of the tuned tower only the tensors that differ from
`assets/lite/clip` are stored.
"""

import argparse
from pathlib import Path

import torch

from ldvc.checkpoint import load_checkpoint, save_checkpoint
from ldvc.config import DECODERS
from ldvc.modeling.clip import build_clip, save_clip_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", type=Path, default=Path("runs/lite_recipe/objects_release"))
    parser.add_argument("--output", type=Path, default=Path("assets/lite"))
    args = parser.parse_args()

    tower = build_clip(str(args.release / "clip"))
    save_clip_folder(tower.model, args.output / "clip_tuned", {"base": "../clip"})
    for decoder in DECODERS:
        model, metadata = load_checkpoint(args.release / decoder)
        folder = save_checkpoint(model, args.output / decoder, metadata=metadata, clip="../clip_tuned", dtype=torch.float16)
        load_checkpoint(folder)
    total = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
