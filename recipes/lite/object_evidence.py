"""What the shipped lite weights say of the labelled objects: the file that `object_masks.py --evidence` reads.

    python -m recipes.lite.object_evidence --data data --output runs/evidence.csv --shard 0 1

For each photo whose mask has no flaw: how well the label fits inside and outside the object (mean score of plain
similarity, `inside` and `outside`), and how much of the object LDVC takes for a person (`person`, a share). Rows are
appended, and a photo that has one is not looked at again. Several shards need a file each; join them afterwards, with
one header.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ldvc import Predictor
from recipes.lite.object_masks import Photo, flaw_of_mask, read_mask, read_photos, read_table
from recipes.lite.wordnet import WordNet

PERSON = "person"
STUFF = ("wall", "floor", "grass", "sky", "water", "tree", "road")  # what is likely around an object
LONG_SIDE = 448  # pixels
FIELDS = ("file", "inside", "outside", "person")


def evidence_of(photo: Photo, data: Path, clip: Predictor, ldvc: Predictor) -> dict[str, str]:
    """One row of the file."""
    with Image.open(data / "clip" / "images" / photo.file) as image:
        shown = ImageOps.exif_transpose(image).convert("RGB")
    shown.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.BICUBIC)
    mask = np.asarray(Image.fromarray(read_mask(data, photo.file)).resize(shown.size, Image.Resampling.NEAREST))
    names = list(dict.fromkeys([photo.name, PERSON, *STUFF]))
    state = clip.encode_image(shown)
    scores = clip.segment(names, image=state, attention=False).scores_at(shown.size[::-1], 0)
    labels = ldvc.segment(names, image=state, attention=False).labels
    return {
        "file": photo.file,
        "inside": f"{scores[mask == 1].mean():.4f}",
        "outside": f"{scores[mask == 0].mean() if (mask == 0).any() else 0.0:.4f}",
        "person": f"{(labels[mask == 1] == names.index(PERSON)).mean():.4f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, default=Path("runs/evidence.csv"))
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th from I on")
    parser.add_argument("--most", type=int, metavar="PHOTOS", help="stop after so many")
    args = parser.parse_args()
    photos = read_photos(args.data, WordNet())[args.shard[0] :: args.shard[1]]
    done = {row["file"] for row in read_table(args.output)} if args.output.exists() else set()
    todo = [photo for photo in photos if photo.file not in done and flaw_of_mask(args.data, photo) is None]
    clip = Predictor.from_pretrained("lite", decoder="clip")
    ldvc = clip.sibling("ldvc")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if file.tell() == 0:
            writer.writeheader()
        for count, photo in enumerate(todo[: args.most], start=1):
            writer.writerow(evidence_of(photo, args.data, clip, ldvc))
            file.flush()
            if count % 100 == 0:
                print(f"{count} of {len(todo)} photos", flush=True)


if __name__ == "__main__":
    main()
