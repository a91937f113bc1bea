"""Step 7 of lite: write the tuned tower and the three trained decoders into the bundled folder, in half precision.

    python -m recipes.lite.publish --release runs/lite_recipe/release_mean --output assets/lite

Paths of towers are relative to the folder, so that it can be moved. Only the tensors of the tuned tower that differ
from `assets/lite/clip` are stored. The weights are checked against `SHA256SUMS` when they are loaded.
"""

from pathlib import Path

import torch

from ldvc.checkpoint import load_checkpoint, save_checkpoint
from ldvc.config import DECODERS
from ldvc.modeling.clip import build_clip, save_clip_folder
from ldvc.weights import CHECKSUMS, write_checksums
from recipes.lite.steps import options_of


def main() -> None:
    args = options_of(__doc__, release=Path("runs/lite_recipe/release_mean"), output=Path("assets/lite"))
    (args.output / CHECKSUMS).unlink(missing_ok=True)  # the checksums of the weights that are replaced
    tower = build_clip(str(args.release / "clip"))
    save_clip_folder(tower.model, args.output / "clip_tuned", {"base": "../clip"})
    for decoder in DECODERS:
        model, metadata = load_checkpoint(args.release / decoder)
        folder = save_checkpoint(model, args.output / decoder, metadata=metadata, clip="../clip_tuned", dtype=torch.float16)
        load_checkpoint(folder)
    write_checksums(args.output)
    total = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
