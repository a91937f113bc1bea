"""Step 6h of lite: the mean of the decoders before and after step 6g (WiSE-FT, Wortsman et al., CVPR 2022).

    python -m recipes.lite.average --before runs/lite_recipe/objects_release --after runs/lite_recipe/stuff_release \\
        --output runs/lite_recipe/release_mean

Without the mean, the decoders label plain walls and studio backgrounds as "sky", and miss some objects.
"""

from pathlib import Path

from ldvc.checkpoint import load_checkpoint, save_checkpoint
from ldvc.config import DECODERS
from recipes.lite.steps import options_of

SHARE = 0.5  # share of the weights after step 6g in the mean


def main() -> None:
    runs = Path("runs/lite_recipe")
    folders = {"before": "objects_release", "after": "stuff_release", "output": "release_mean"}
    args = options_of(__doc__, **{option: runs / folder for option, folder in folders.items()})
    for decoder in DECODERS:
        before, before_metadata = load_checkpoint(args.before / decoder)
        model, metadata = load_checkpoint(args.after / decoder)
        weights = before.trainable_state_dict()
        mean = {key: weights[key].lerp(value, SHARE) for key, value in model.trainable_state_dict().items()}
        model.load_trainable_state_dict(mean)
        seen = {
            "seen_names": list(dict.fromkeys([*before_metadata["seen_names"], *metadata["seen_names"]])),
            "seen_words": {**before_metadata["seen_words"], **metadata["seen_words"]},
        }
        print(save_checkpoint(model, args.output / decoder, metadata={**before_metadata, **metadata, **seen}))


if __name__ == "__main__":
    main()
