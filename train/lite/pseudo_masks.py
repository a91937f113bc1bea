"""Step 6b of lite: masks for photos of which only names are known, from a label or from captions.

    python -m train.lite.pseudo_masks --data data --work runs/lite_recipe --decoder runs/lite_recipe/release/ldvc

Few photos with masks show horses, many show cows, and a decoder that learned from them calls horses cows. But thousands of
photos of the image tower have a label or captions. Given the name, the decoder of step 6 finds the object, and GrabCut
(Rother et al., 2004; OpenCV's) finds its edges: it starts from where the decoder is sure, for and against. Pixels on which both
agree become the class or background; all others are void. A photo on which they disagree is left out. Masks say nothing
about names that the photo is not known to show (`"exhaustive": false`). Used are names that are classes of coco-mini or
msrc, or kinds of them, at most `PHOTOS` of each.
Writes the data set `WORK/pseudo` (plain folder) for a second, short training. About 0.5 s a photo.
"""

import argparse
import csv
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import cv2
import numpy as np
import timm.data
from PIL import Image

from ldvc import Predictor
from ldvc.data.class_names import canonical
from train.lite.wordnet import EVERYDAY_CONCEPTS, WordNet

SETS = ("coco-mini", "msrc")
BACKGROUND = "none of these"
PHOTOS = 30  # of a class ...
PEOPLE = 150  # ... but of people, who are in most photos and look in many ways
LONG_SIDE = 256  # pixels at which masks are drawn
SURE, LIKELY, UNLIKELY = 0.8, 0.5, 0.12  # scores: seeds of the object, where it may be, below: seeds of its surroundings
INSIDE, OUTSIDE = 0.3, 0.6  # least score of what GrabCut puts into the object, highest of what it leaves out; else void
AGREEMENT = 0.5  # least IoU of GrabCut's object and of where the decoder puts it
LEAST, MOST = 0.01, 0.9  # share of the photo that the object may cover
ROUNDS = 4  # of GrabCut
VOID = 255
# Not objects, or (balls) only seen where players are, whom the decoder of step 6 then takes for the ball.
LEFT_OUT = {
    "building", "grass", "tree", "sky", "mountain", "water", "road", "face", "body", "sign", "background",
    "sports ball",
}  # fmt: skip
OTHER_WORDS = {  # labels that name a class in other words
    "airplanes": "airplane", "car side": "car", "cellphone": "cell phone", "motorbikes": "motorcycle",
    "windsor chair": "chair", "cattle": "cow", "domestic cat": "cat", "wild cat": "cat", "garfield": "", "cup or mug": "cup",
    "sofa": "couch", "tv or monitor": "tv", "computer keyboard": "keyboard", "computer mouse": "mouse",
    "hair dryer": "hair drier", "hotdog": "hot dog", "flower pot": "potted plant", "watercraft": "boat",
    "racket": "tennis racket", "ski": "skis", "soccer ball": "", "basketball": "",
    "volleyball": "", "tennis ball": "", "stove": "oven", "purse": "handbag", "water bottle": "bottle",
    "wine bottle": "bottle", "watch": "", "table": "dining table", "baby bed": "",
}  # fmt: skip
# What people write in captions -> class. (Hypernyms would make a "pitcher" a person.)
CAPTION_WORDS = {
    word: name
    for name, words in {
        "person": "person people man men woman women boy boys girl girls child children kid kids lady guy baby player players",
        "dog": "dog dogs puppy", "horse": "horse horses", "bicycle": "bicycle bicycles bike bikes", "car": "car cars",
        "boat": "boat boats canoe kayak", "motorcycle": "motorcycle motorcycles motorbike", "bus": "bus buses",
        "surfboard": "surfboard", "skateboard": "skateboard", "snowboard": "snowboard", "bench": "bench",
    }.items()
    for word in words.split()
}  # fmt: skip


def class_of_photo(names: list[str], wordnet: WordNet) -> dict[str, str]:
    """ImageNet synset ("n02099601") -> class, by hypernyms and by the list of everyday words."""
    imagenet = timm.data.ImageNetInfo("imagenet-1k")
    titles = [description.split(",")[0] for description in imagenet.label_descriptions()]
    by_title = {
        title: word
        for entry in json.loads(EVERYDAY_CONCEPTS.read_text(encoding="utf-8"))
        if (word := next((word for word in entry["names"] if word in names), None))
        for title in entry["classes"]
    }
    offsets = {sense.offset: name for name in names if (sense := wordnet.visible_sense(name)) is not None}
    found = {}
    for synset, title in zip(imagenet.label_names(), titles, strict=True):
        above = [offsets[offset] for offset in wordnet.ancestors(synset[1:]) if offset in offsets]
        if title in by_title or above:
            found[synset] = by_title.get(title) or above[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--work", type=Path, default=Path("runs/lite_recipe"))
    parser.add_argument("--decoder", default="runs/lite_recipe/release/ldvc", help="checkpoint of step 6, calibrated")
    args = parser.parse_args()

    names, photos = labelled_photos(args.data)
    predictor = Predictor.from_pretrained(args.decoder)
    folder = args.work / "pseudo"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    numbers = {name: number for number, name in enumerate(names, start=1)}
    stems, kept, tried = [], Counter(), Counter()
    for file, shown in photos.items():
        if all(kept[name] >= (PEOPLE if name == "person" else PHOTOS) for name in shown):
            continue
        tried.update(shown)
        image = predictor.encode_image(args.data / "clip" / "images" / file)
        picture = Image.fromarray(image.picture)
        picture.thumbnail((LONG_SIDE, LONG_SIDE))
        pixels = np.asarray(picture)
        scores = predictor.segment(shown, image=image, attention=False).scores_at(pixels.shape[:2])
        objects = [object_mask(pixels, each) for each in scores]
        if any(each is None for each in objects):
            continue
        mask = np.zeros(pixels.shape[:2], dtype=np.uint8)
        for inside, outside in objects:
            mask[~inside & ~outside] = VOID
        for name, (inside, _) in zip(shown, objects, strict=True):
            mask[inside] = numbers[name]
        if len(shown) > 1:  # where two objects claim a pixel
            mask[sum(inside.astype(int) for inside, _ in objects) > 1] = VOID
        kept.update(shown)
        stem = Path(file).stem
        picture = Image.fromarray(image.picture)
        picture.save(folder / "images" / f"{stem}.jpg", quality=92)
        Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST).save(folder / "masks" / f"{stem}.png")
        stems.append(stem)
        if len(stems) % 100 == 0:
            print(f"{len(stems)} photos", flush=True)
    print("; ".join(f"{name}: {kept[name]} of {tried[name]}" for name in names))
    (folder / "train.txt").write_text("\n".join(stems) + "\n")
    facts = {"classes": [BACKGROUND, *names], "ignore_index": VOID, "background_index": 0, "exhaustive": False}
    (folder / "dataset.json").write_text(json.dumps(facts, indent=1))
    print(f"{folder}: {len(stems)} photos")


def labelled_photos(data: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The names that count, and file -> which of them a photo is known to show, in an order that mixes the names."""
    lists = [json.loads((data / name / "dataset.json").read_text())["classes"] for name in SETS]
    names = list(dict.fromkeys(canonical(name) for each in lists for name in each if name not in LEFT_OUT))
    of_synset = class_of_photo(names, WordNet())
    by_name = defaultdict(list)
    captioned = {}
    with open(data / "clip" / "labels.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            label = re.sub(r"_", " ", row["label"].lower())
            label = OTHER_WORDS.get(label, label)
            name = canonical(label) if canonical(label) in names else of_synset.get(row["wnid"])
            if row["captions"]:
                captions = [set(re.findall("[a-z]+", each)) for each in row["captions"].lower().split(" || ")]
                told = Counter(name for words in captions for name in {CAPTION_WORDS.get(word) for word in words})
                if shown := [name for name, count in told.items() if name and count >= 3]:
                    captioned[row["file"]] = shown
            elif name and label:
                by_name[name].append(row["file"])
    rounds = [
        (files[turn], [name]) for turn in range(max(map(len, by_name.values()))) for name, files in by_name.items()
        if turn < len(files)
    ]  # fmt: skip
    return names, captioned | dict(rounds)


def object_mask(pixels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Where an object surely is and surely is not.

    Args:
        pixels: (H, W, 3) uint8.
        scores: (H, W) of its name, 0..1.

    Returns:
        Two (H, W) bool; None if the decoder is not sure of the object or GrabCut sees another one.
    """
    likely = scores >= LIKELY
    seeds = np.full(scores.shape, cv2.GC_PR_BGD, dtype=np.uint8)
    seeds[likely] = cv2.GC_PR_FGD
    seeds[scores < UNLIKELY] = cv2.GC_BGD
    seeds[scores >= max(SURE, np.quantile(scores[likely], 0.7) if likely.any() else 1.0)] = cv2.GC_FGD
    if not LEAST <= likely.mean() <= MOST or not (seeds == cv2.GC_FGD).any() or not (seeds == cv2.GC_BGD).any():
        return None
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)
    cut, _, _ = cv2.grabCut(pixels[..., ::-1].copy(), seeds, None, *models, ROUNDS, cv2.GC_INIT_WITH_MASK)
    inside = (cut == cv2.GC_FGD) | (cut == cv2.GC_PR_FGD)
    if (inside & likely).sum() < AGREEMENT * (inside | likely).sum():
        return None
    return inside & (scores >= INSIDE), ~inside & (scores < OUTSIDE)


if __name__ == "__main__":
    main()
