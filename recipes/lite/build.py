"""Step 5 of lite: merge the two towers into one open_clip model and write `assets/lite/clip`.

    python -m recipes.lite.build --work runs/lite_recipe --output assets/lite/clip

The text tower's map to MiniLM's space and the learned map into the joint space are linear, so their product is open_clip's
`text_projection`. The command loads the saved folder and checks that its embeddings equal those of the parts.
"""

import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F

from ldvc.modeling.clip import build_clip, save_clip_folder
from ldvc.modeling.conv_patch_embed import ConvPatchEmbed
from recipes.lite.image_tower import ImageStudent
from recipes.lite.stem_cache import load_teacher
from recipes.lite.steps import options_of
from recipes.lite.text_tower import ARCHITECTURE, TextStudent


def assemble(work: Path) -> open_clip.CLIP:
    """One open_clip model of the towers in `text.pt` and `image.pt`, with a `ConvPatchEmbed` as `visual.conv1`."""
    config = json.loads(ARCHITECTURE.read_text())
    clip = open_clip.CLIP(**config["architecture"])
    _, stem = load_teacher()
    image = ImageStudent(sum(stem.channels))
    image.load_state_dict(torch.load(work / "image.pt", weights_only=True)["student"])
    text = TextStudent()
    text.load_state_dict(torch.load(work / "text.pt", weights_only=True)["student"])

    vision = config["architecture"]["vision_cfg"]
    patch_embed = ConvPatchEmbed(vision["width"], patch_size=vision["patch_size"], **config["patch_embed"])
    patch_embed.backbone.load_state_dict(stem.backbone.state_dict())
    patch_embed.scale.load_state_dict(image.visual.conv1[0].state_dict())
    patch_embed.project.load_state_dict(image.visual.conv1[1].state_dict())
    image_state = {k: v for k, v in image.visual.state_dict().items() if not k.startswith("conv1")}
    clip.visual.load_state_dict(image_state, strict=False)
    clip.visual.conv1 = patch_embed
    own = ("text_projection", "logit_scale", "logit_bias")
    clip.load_state_dict({k: v for k, v in text.clip.state_dict().items() if k not in own}, strict=False)
    with torch.no_grad():
        clip.text_projection.copy_(text.clip.text_projection @ image.text_map.weight.T)  # (256, 384) @ (384, 256)
        clip.logit_scale.copy_(image.logit_scale)
        clip.logit_bias.copy_(image.logit_bias)
    return clip.eval()


def main() -> None:
    args = options_of(__doc__, output=Path("assets/lite/clip"))
    clip = assemble(args.work)
    save_clip_folder(clip, args.output, json.loads(ARCHITECTURE.read_text()))
    loaded = build_clip(str(args.output), None)
    tokens = loaded.tokenizer([f"a photo of a {n}." for n in ("dog", "potted plant", "giraffe")])
    pixels = torch.randn(2, 3, 480, 480, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for ours, theirs in (
            (clip.encode_text(tokens), loaded.model.encode_text(tokens)),
            (clip.encode_image(pixels), loaded.model.encode_image(pixels)),
        ):
            cosine = F.cosine_similarity(ours, theirs).min().item()
            if cosine < 0.999:
                raise SystemExit(f"The saved towers do not reproduce the parts: cosine {cosine:.5f}.")


if __name__ == "__main__":
    main()
