"""Step 5 of lite: merge the two towers into one open_clip model and write `assets/lite/clip`.

    python -m recipes.lite.build --work runs/lite_recipe --output assets/lite/clip

The text tower's map to MiniLM's space and the learned map into the joint space are linear, so their product is open_clip's
`text_projection`.
"""

from pathlib import Path

import open_clip
import torch
from torch import nn

from ldvc.modeling.clip import save_clip_folder
from recipes.lite.image_tower import ImageStudent
from recipes.lite.stem_cache import load_teacher
from recipes.lite.steps import options_of
from recipes.lite.text_tower import ARCHITECTURE, TextStudent


@torch.no_grad()
def assemble(text: TextStudent, image: ImageStudent) -> open_clip.CLIP:
    """One open_clip model of both towers, with a `ConvPatchEmbed` as `visual.conv1`."""
    clip = text.clip
    clip.text_projection = nn.Parameter(clip.text_projection @ image.text_map.weight.T)  # (256, 384) @ (384, 256)
    clip.visual, clip.logit_scale, clip.logit_bias = image.visual, image.logit_scale, image.logit_bias
    return clip.eval()


def main() -> None:
    args = options_of(__doc__, output=Path("assets/lite/clip"))
    text, image = TextStudent(), ImageStudent()
    for student, file in ((text, "text.pt"), (image, "image.pt")):
        student.load_state_dict(torch.load(args.work / file, weights_only=True)["student"])
    _, patch_embed = load_teacher()
    image.visual.conv1.backbone.load_state_dict(patch_embed.backbone.state_dict())
    save_clip_folder(assemble(text, image), args.output, ARCHITECTURE)


if __name__ == "__main__":
    main()
