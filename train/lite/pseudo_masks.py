"""Step 6b of lite: masks for photos of which only the main object's name is known.

    python -m train.lite.pseudo_masks --data ../shared/data --work work/lite --decoder work/lite/release/ldvc

Few photos with masks show horses, many show cows, and a decoder that learned from them calls horses cows. But thousands of
photos of the image tower have a label. Where the decoder of step 6 is sure of the label's name, compared with the rest of the
same photo, pixels become that class; all others are void, so nothing is said about them. Only labels that are a class of
coco-mini or msrc, or a kind of one, are used, at most `PHOTOS` a class.
Writes the data set `WORK/pseudo` (plain folder) for a second, short training. About 0.2 s a photo.
"""

import argparse
import csv
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import timm.data
from PIL import Image

from ldvc import Predictor
from ldvc.data.class_names import canonical
from train.lite.wordnet import EVERYDAY_CONCEPTS, WordNet

SETS = ("coco-mini", "msrc")
PHOTOS = 12  # of a class
SIZE = (112, 112)  # at which masks are drawn: patches are coarser
SURE = 0.6  # score from which a pixel counts as the class
LEAST, MOST = 0.02, 0.9  # share of the photo that may be sure; otherwise the photo is left out
STUFF = {"building", "grass", "tree", "sky", "mountain", "water", "road", "face", "body", "sign", "background"}
OTHER_WORDS = {  # labels that name a class in other words
    "airplanes": "airplane", "car side": "car", "cellphone": "cell phone", "motorbikes": "motorcycle",
    "windsor chair": "chair", "cattle": "cow", "domestic cat": "cat", "wild cat": "cat", "garfield": "", "cup or mug": "cup",
    "sofa": "couch", "tv or monitor": "tv", "computer keyboard": "keyboard", "computer mouse": "mouse",
    "hair dryer": "hair drier", "hotdog": "hot dog", "flower pot": "potted plant", "watercraft": "boat",
    "racket": "tennis racket", "ski": "skis", "soccer ball": "sports ball", "basketball": "sports ball",
    "volleyball": "sports ball", "tennis ball": "sports ball", "stove": "oven", "purse": "handbag", "water bottle": "bottle",
    "wine bottle": "bottle", "watch": "", "table": "dining table", "baby bed": "",
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
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("work/lite"))
    parser.add_argument("--decoder", default="work/lite/release/ldvc", help="checkpoint of step 6, calibrated")
    args = parser.parse_args()

    lists = [json.loads((args.data / name / "dataset.json").read_text())["classes"] for name in SETS]
    names = list(dict.fromkeys(canonical(name) for each in lists for name in each if name not in STUFF | {"person"}))
    of_synset = class_of_photo(names, WordNet())
    photos = defaultdict(list)
    with open(args.data / "clip" / "labels.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            label = re.sub(r"_", " ", row["label"].lower())
            label = OTHER_WORDS.get(label, label)
            name = canonical(label) if canonical(label) in names else of_synset.get(row["wnid"])
            if name and label and not row["captions"]:
                photos[name].append(row["file"])

    predictor = Predictor.from_pretrained(args.decoder)
    folder = args.work / "pseudo"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    stems = []
    for number, name in enumerate(names):
        kept = 0
        for file in photos[name]:
            if kept == PHOTOS:
                break
            image = predictor.encode_image(args.data / "clip" / "images" / file)
            result = predictor.segment([name], image=image, attention=False)
            sure = result.scores_at(SIZE)[0] >= SURE
            if not LEAST <= sure.mean() <= MOST:
                continue
            kept += 1
            stem = Path(file).stem
            picture = Image.fromarray(result.picture)
            picture.save(folder / "images" / f"{stem}.jpg", quality=92)
            mask = Image.fromarray(np.where(sure, number, 255).astype(np.uint8))
            mask.resize(picture.size, Image.Resampling.NEAREST).save(folder / "masks" / f"{stem}.png")
            stems.append(stem)
        print(f"{name}: {kept} of {len(photos[name])} photos", flush=True)
    (folder / "train.txt").write_text("\n".join(stems) + "\n")
    facts = {"classes": names, "ignore_index": 255, "background_index": None}
    (folder / "dataset.json").write_text(json.dumps(facts, indent=1))
    print(f"{folder}: {len(stems)} photos of {len({*names})} classes")


if __name__ == "__main__":
    main()
