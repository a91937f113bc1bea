"""Step 6f of lite: masks of grass, water, sky, ... in photos of objects and of people, from the decoder of step 6e.

    python -m recipes.lite.stuff_masks --data data --work runs/lite_recipe

After step 6e, "grass" has the highest logit of all stuff words on a lawn around a dog, but this logit is below the
threshold. So the masks follow from the ranking of the words. The logits of each word outside of things (object masks of
step 6d, the teacher's detections of step 6a) are standardised over all photos. A photo may show a word if its captions
mention it, or, without captions, if the word's 70 % quantile is far above its mean over the photos. A pixel gets such a
word if its logit exceeds all others by `MARGIN`. GrabCut (Rother et al., SIGGRAPH 2004) extends these pixels by their colour.

Other pixels are void, things are background. Writes the data sets `WORK/stuff-captions` and `WORK/stuff-objects`.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

from ldvc import Predictor
from recipes.lite.steps import VOID, options_of, read_table, write_set

# word: (its words in captions, captions that must contain one, standard deviations above the mean if there are no captions)
NEVER = float("inf")
STUFF: dict[str, tuple[str, int, float]] = {
    "grass": ("grass grassy lawn", 1, 1.0),
    "water": ("water lake ocean sea pool river wave waves pond stream surf", 2, 1.2),
    "snow": ("snow snowy", 1, NEVER),
    "sand": ("sand sandy beach", 2, NEVER),
    "road": ("road street", 2, 1.3),
    "pavement": ("sidewalk pavement", 1, NEVER),
    "wall": ("wall", 1, NEVER),
    "tree": ("tree trees forest woods", 1, 1.8),
    "sky": ("sky", 1, 1.3),
    "building": ("building buildings", 2, NEVER),
    "mountain": ("mountain mountains hill", 2, NEVER),
    "rock": ("rock rocks rocky cliff boulder", 2, NEVER),
    "floor": ("floor", 1, NEVER),
}
OTHERS = ("dirt", "fence")  # compared with the others, but not learned
WORDS = (*STUFF, *OTHERS)
MARGIN, SURE_MARGIN = 0.3, 0.7  # standard deviations above the second word; GrabCut does not change sure pixels
BEHIND = 1.2  # standard deviations that the word of a pixel from GrabCut may be below the best word
MIN_AREA = 0.03  # share of the photo
CONFIDENT = 0.45  # smallest confidence of a detection of the teacher; pixels of others are void
QUANTILE = 0.7  # quantile of a word's logits in a photo
MIN_PATCHES = 20  # smallest number of patches outside the object; with fewer, a photo shows no stuff


@dataclass
class Photo:
    """A photo, its things and its void pixels, (H, W) bool; `mentioned` (STUFF,) bool: whether its captions mention a word."""

    file: Path
    thing: np.ndarray
    void: np.ndarray
    mentioned: np.ndarray | None = None


def captioned(args: argparse.Namespace) -> Iterator[Photo]:
    """The photos with captions that mention stuff."""
    for row in read_table(args.data / "clip" / "labels.csv"):
        captions = [set(re.findall("[a-z]+", caption)) for caption in row["captions"].lower().split(" || ")]
        counts = [sum(not caption.isdisjoint(words.split()) for caption in captions) for words, _, _ in STUFF.values()]
        mentioned = np.array(counts) >= [least for _, least, _ in STUFF.values()]
        if not mentioned.any():
            continue
        file = args.data / "clip" / "images" / row["file"]
        with np.load(args.work / "teacher" / f"{file.stem}.npz") as detections, Image.open(file) as picture:
            shape, (h, w) = picture.size[::-1], detections["shape"]
            cells = np.unpackbits(detections["masks"], axis=1, count=h * w).reshape(-1, h, w).astype(np.float32)
            masks = resize(cells, shape) >= 0.5 if len(cells) else np.zeros((0, *shape), dtype=bool)
            confident = detections["confidences"] >= CONFIDENT
        thing = masks[confident].any(axis=0)
        yield Photo(file, thing, masks[~confident].any(axis=0) & ~thing, mentioned)


def of_objects(args: argparse.Namespace) -> Iterator[Photo]:
    """The training photos of step 6d, without those of caltech. Pixels near the object are void."""
    for path in sorted(args.work.glob("objects/objects-[0-9]*/masks/*.png")):
        if path.name.startswith("caltech"):
            continue
        mask = np.asarray(Image.open(path))
        side = max(3, round(0.02 * max(mask.shape)))
        near = ndimage.maximum_filter(mask > 0, size=side)
        thing = (mask > 0) & (mask != VOID)
        yield Photo(args.data / "clip" / "images" / f"{path.stem}.jpg", thing, near & ~thing)


def stored_logits(args: argparse.Namespace, photos: Sequence[Photo]) -> Iterator[np.ndarray]:
    """The logits of `WORDS` for each photo, (C, h, w) float32, from `WORK/stuff` or computed."""
    (args.work / "stuff").mkdir(parents=True, exist_ok=True)
    predictor = None
    for photo in photos:
        stored = args.work / "stuff" / f"{photo.file.stem}.npy"
        if not stored.exists():
            predictor = predictor or Predictor.from_pretrained(str(args.work / "objects_release" / "ldvc"))
            result = predictor.segment(WORDS, image=predictor.encode_image(photo.file), background=None)
            np.save(stored, result.outputs[0].logits.half().numpy())
        yield np.load(stored).astype(np.float32)


def resize(maps: np.ndarray, shape: tuple[int, int], mode: str = "bilinear") -> np.ndarray:
    """(C, h, w) float32 -> (C, *shape)."""
    return F.interpolate(torch.from_numpy(maps)[None], shape, mode=mode)[0].numpy()


def surroundings(photo: Photo, logits: np.ndarray) -> np.ndarray:
    """(C, n): the logits of the patches of which less than a third belongs to the object or is void."""
    share = resize((photo.thing | photo.void)[None].astype(np.float32), logits.shape[1:], mode="area")[0]
    return logits[:, share < 1 / 3]


def leaders(scores: np.ndarray, margin: np.ndarray, shown: np.ndarray, free: np.ndarray) -> np.ndarray:
    """(H, W) uint8: 1 + index of the best word if it is in `shown`, is best by `MARGIN` and covers `MIN_AREA`; else `VOID`.

    `scores` (C, H, W); `margin` (H, W), the highest minus the second; `free` (H, W) bool, neither things nor void.
    """
    best = scores.argmax(axis=0)
    mask = np.full(free.shape, VOID, dtype=np.uint8)
    for index in shown:
        pixels = (best == index) & (margin > MARGIN) & free
        if pixels.mean() >= MIN_AREA:
            mask[pixels] = 1 + index
    return mask


def grown(mask: np.ndarray, number: int, pixels: np.ndarray, sure: np.ndarray, free: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels that GrabCut assigns to a number of the mask. Pixels of other numbers are background."""
    import cv2  # from recipes/lite/requirements.txt

    seeds = mask == number
    state = np.where(seeds, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    state[seeds & sure] = cv2.GC_FGD
    state[~free | (~seeds & (mask != VOID))] = cv2.GC_BGD
    if seeds.all():
        return seeds
    cv2.setRNGSeed(0)
    cv2.grabCut(pixels, state, None, np.zeros((1, 65)), np.zeros((1, 65)), 3, cv2.GC_INIT_WITH_MASK)
    return (state == cv2.GC_FGD) | (state == cv2.GC_PR_FGD)


def compose(photo: Photo, scores: np.ndarray, shown: np.ndarray) -> np.ndarray | None:
    """The mask of a photo, (H, W) uint8: 0 things, 1 + index of `STUFF`, `VOID`; None if it shows no stuff.

    `scores`: (C, h, w) standardised logits. `shown`: indices of `STUFF` that the photo may show.
    """
    scores, free = resize(scores, photo.thing.shape), ~(photo.thing | photo.void)
    second, first = np.partition(scores, -2, axis=0)[-2:]
    mask = leaders(scores, first - second, shown, free)
    with Image.open(photo.file) as picture:
        pixels = np.asarray(picture.convert("RGB"))[..., ::-1].copy()  # BGR
    result = mask.copy()
    for number in np.unique(mask[mask != VOID]):
        added = grown(mask, number, pixels, first - second > SURE_MARGIN, free) & (mask == VOID) & free
        result[added & (first - scores[number - 1] < BEHIND)] = number
    result[photo.thing] = 0
    return result if (mask != VOID).any() else None


def main() -> None:
    args = options_of(__doc__)
    photos = [*captioned(args), *of_objects(args)]
    logits = list(stored_logits(args, photos))

    outside = [surroundings(*pair) for pair in zip(photos, logits, strict=True)]
    sufficient = [values.shape[1] >= MIN_PATCHES for values in outside]
    is_object = [photo.mentioned is None for photo in photos]
    object_logits = [values for values, *enough in zip(outside, sufficient, is_object, strict=True) if all(enough)]
    mean = np.mean([values.mean(axis=1) for values in object_logits], axis=0)  # (C,)
    quantiles = np.array([np.quantile(values, QUANTILE, axis=1) for values in object_logits])  # (photos, C)
    deviation = quantiles.std(axis=0)
    required = [*(deviations for _, _, deviations in STUFF.values()), *(NEVER for _ in OTHERS)]
    least_quantiles = quantiles.mean(axis=0) + deviation * required

    sets: dict[str, list[tuple[str, np.ndarray]]] = {"stuff-captions": [], "stuff-objects": []}
    for photo, values, enough, maps in zip(photos, outside, sufficient, logits, strict=True):
        visible = photo.mentioned
        if visible is None:
            visible = enough and np.quantile(values, QUANTILE, axis=1) > least_quantiles
        scores = (maps - mean[:, None, None]) / deviation[:, None, None]
        if (mask := compose(photo, scores, np.flatnonzero(visible))) is not None:
            sets["stuff-objects" if photo.mentioned is None else "stuff-captions"].append((photo.file.name, mask))
    for name, masks in sets.items():
        write_set(args.work / name, args.data / "clip" / "images", masks, [*STUFF], ["train"], exhaustive=False)


if __name__ == "__main__":
    main()
