"""Step 6d of lite: data sets of objects, made from the masks of the labelled photos.

    python -m recipes.lite.object_masks --data data --output runs/objects

A mask (`DATA/clip/masks`) shows the salient object of a photo. This step assumes that the photo's label names this
object. It drops masks that are tiny, cover almost the whole photo, are uncertain or are in several parts.

Writes to OUTPUT:
    objects-0, objects-1, ...  photos of the split "train"; no class of a set is a hyponym of another class of that set
    objects-val                photos of the split "unseen-val", in both lists
    object_words.json          class -> other words for it, from WordNet (format: `train.data.vocabulary.read_other_words`)
    unseen.json                the labels of "unseen-val" (format: `ldvc.class_names.load_split`)

No class of "train" has the name or the synset of a class of "unseen-val", and none of its other words names one.
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from ldvc.class_names import canonical, plain
from recipes.lite.steps import VOID, options_of, read_json, read_table, write_set
from recipes.lite.wordnet import EVERYDAY_CONCEPTS, Synset, WordNet
from train.files import write_json

TRAIN, UNSEEN = "train", "unseen-val"
AREA = (0.03, 0.9)  # share of the photo
MIN_CONFIDENCE = 0.9
MIN_MAIN_PART = 0.9  # share of the object's pixels that its largest connected part has
MAX_VOID = 0.25  # share of the photo
CLASSES = 250  # largest number of classes of a set: masks have 8 bits
WORDS, LEMMAS, HYPERNYMS = 8, 4, 3  # largest number, for a class, of other words, of lemmas among them, of hypernyms

# names: label -> a clearer name. names_of_synsets: a name for each of two synsets that share a label. senses: name -> synset
# or a word with the right sense, where WordNet's is wrong; "" for no sense. no_plural, plurals: nouns without plural, nouns in
# plural. hypernyms: words for groups of things, besides those of EVERYDAY_CONCEPTS.
LABELS = read_json("object_labels")
EVERYDAY_WORDS = {*LABELS["hypernyms"], *(name for entry in EVERYDAY_CONCEPTS for name in entry["names"])}


@dataclass(frozen=True)
class Photo:
    """A photo of one labelled object, a row of `masks.csv`."""

    file: str
    name: str  # name of the object's class
    synset: Synset | None  # synset of the class; None if WordNet does not have it
    split: str  # TRAIN or UNSEEN
    area: float  # share of the photo that the object covers
    confidence: float  # confidence of the mask, 0..1


def key(name: str) -> str:
    """A key that is equal for spellings of the same word: "Jack-o'-lantern", "jack o'lantern"."""
    return canonical(name).replace("-", "").replace(" ", "")


def read_photos(data: Path, wordnet: WordNet) -> list[Photo]:
    """All photos with a mask.

    A label without a synset gets the synset of the same label elsewhere, or the one that `visible_sense` gives. The labels of
    "unseen-val" keep their names.
    """
    synsets = {row["file"]: row["wnid"] for row in read_table(data / "clip" / "labels.csv")}
    rows = read_table(data / "clip" / "masks.csv")
    for row in rows:
        row["wnid"], row["name"] = synsets[row["file"]], plain(row["label"])
        if row["split"] != UNSEEN:
            clearer = LABELS["names"].get(row["name"], row["name"])
            row["name"] = LABELS["names_of_synsets"].get(row["wnid"], clearer)
    elsewhere = {row["name"]: row["wnid"] for row in rows if row["wnid"]}

    def synset_of(row: dict[str, str]) -> Synset | None:
        name = row["name"]
        if (sense := LABELS["senses"].get(name)) is not None:
            return wordnet.synsets.get(sense) or wordnet.visible_sense(sense)
        wnid = row["wnid"] or elsewhere.get(name, "")
        return wordnet.synsets.get(wnid[1:]) or wordnet.visible_sense(name) or wordnet.visible_sense(canonical(name))

    return [
        Photo(row["file"], row["name"], synset_of(row), row["split"], float(row["area"]), float(row["confidence"]))
        for row in rows
    ]


def read_mask(data: Path, photo: Photo) -> np.ndarray:
    """(h, w) uint8: 0 outside, 1 the object, `VOID` uncertain."""
    with Image.open(data / "clip" / "masks" / f"{Path(photo.file).stem}.png") as mask:
        return np.asarray(mask)


def flaw(data: Path, photo: Photo) -> str | None:
    """The reason why a mask is not used; None if it is used."""
    if not AREA[0] <= photo.area <= AREA[1]:
        return "area"
    if photo.confidence < MIN_CONFIDENCE:
        return "confidence"
    mask = read_mask(data, photo)
    with Image.open(data / "clip" / "images" / photo.file) as image:
        if ImageOps.exif_transpose(image).size != mask.shape[::-1]:
            return "size differs from the photo's"
    if (mask == VOID).mean() > MAX_VOID:
        return "uncertain"
    parts, _ = ndimage.label(mask == 1)
    sizes = np.bincount(parts.ravel())[1:]
    return None if sizes.size and sizes.max() >= MIN_MAIN_PART * sizes.sum() else "in several parts"


def by_class(photos: Iterable[Photo], per_label: int) -> dict[str, list[Photo]]:
    """Class -> its photos, the most confident masks first, at most `per_label`; spellings of the same word are one class."""
    classes: dict[str, list[Photo]] = defaultdict(list)
    for photo in sorted(photos, key=lambda photo: (-photo.confidence, photo.file)):
        classes[key(photo.name)].append(photo)
    return {members[0].name: members[:per_label] for members in sorted(classes.values(), key=lambda each: each[0].name)}


def into_sets(synsets: dict[str, Synset | None], wordnet: WordNet) -> list[list[str]]:
    """Put each class into the first set that has room and contains neither a hypernym nor a hyponym of it."""
    relatives: dict[str, list[str]] = defaultdict(list)
    for name, synset in synsets.items():
        ancestors = wordnet.ancestors(synset.offset) if synset else ()
        for other, higher in synsets.items():
            if other != name and higher and higher.offset in ancestors:
                relatives[name].append(other)
                relatives[other].append(name)
    sets: list[list[str]] = []
    for name in sorted(synsets, key=lambda name: -len(relatives[name])):  # classes with most relatives first
        fitting = (each for each in sets if len(each) < CLASSES and not set(relatives[name]).intersection(each))
        members = next(fitting, None)
        if members is None:
            sets.append(members := [])
        members.append(name)
    return [sorted(members) for members in sets]


def is_latin(lemma: str, wordnet: WordNet) -> bool:
    """Whether a lemma is the scientific name of a species, such as "Canis dingo"."""
    first, _, rest = lemma.partition(" ")
    return (
        first[:1].isupper()
        and rest == rest.lower()
        and (f"genus {first.lower()}" in wordnet.senses or bool(rest) and rest.split(" ")[-1] not in wordnet.senses)
    )


def own_lemmas(synset: Synset | None, wordnet: WordNet) -> list[str]:
    """The lemmas of a synset that are not Latin and whose first meaning is this synset."""
    lemmas = synset.lemmas if synset else ()
    return [each.lower() for each in lemmas if not is_latin(each, wordnet) and wordnet.visible_sense(each) == synset]


def words_above(synset: Synset | None, wordnet: WordNet) -> list[str]:
    """Everyday words for the hypernyms of a synset, the nearest first. Rare words such as "placental" are left out."""
    words: list[str] = []
    level = synset.hypernyms if synset else ()
    while level:
        synsets = [wordnet.synsets[offset] for offset in dict.fromkeys(level)]
        lemmas = [own_lemmas(each, wordnet) for each in synsets]
        words += [word for each in lemmas for word in [lemma for lemma in each if lemma in EVERYDAY_WORDS][:1]]
        level = [offset for each in synsets for offset in each.hypernyms]
    # in WordNet, "vehicle" is a hyponym of "container"
    return [word for word in dict.fromkeys(words) if word != "container" or "vehicle" not in words]


def plurals_of(name: str, wordnet: WordNet) -> list[str]:
    """The plural of a class name, as a list; empty if the name is a plural or has none."""
    last = name.split(" ")[-1]
    if last.endswith("s") and (last[:-1] in wordnet.senses or last in LABELS["plurals"]):
        return []
    if name in LABELS["no_plural"] or " of " in name or "-of-" in name or "-o'-" in name:
        return []
    plural = wordnet.plural(name)
    return [f"{name}s" if plural.endswith(("ae", "ia")) else plural]  # cameras, not camerae


def other_words(name: str, synset: Synset | None, wordnet: WordNet, reserved: Collection[str]) -> list[str]:
    """Further words for a class, at most `WORDS`. `reserved`: keys (see `key`) of words that mean classes."""

    def free(words: list[str]) -> list[str]:
        distinct = {key(word): word for word in reversed(words)}
        return [word for word in reversed(distinct.values()) if key(word) not in {*reserved, key(name)}]

    words = [name.replace("-", " ")] if "-" in name else []
    words += free(own_lemmas(synset, wordnet))[:LEMMAS] + free(words_above(synset, wordnet))[:HYPERNYMS]
    return list(dict.fromkeys([*words, *free(plurals_of(name, wordnet))]))[:WORDS]


def main() -> None:
    args = options_of(__doc__, output=Path("runs/objects"), per_label=10)
    wordnet = WordNet()
    photos = read_photos(args.data, wordnet)
    unseen = [photo for photo in photos if photo.split == UNSEEN]
    unseen_keys = {key(photo.name) for photo in unseen}
    unseen_synsets = {photo.synset for photo in unseen if photo.synset}

    classes: dict[str, dict[str, list[Photo]]] = {}
    for split in (TRAIN, UNSEEN):
        flaws: dict[Photo, str | None] = {}
        for photo in (photo for photo in photos if photo.split == split):
            is_unseen = split == TRAIN and (key(photo.name) in unseen_keys or photo.synset in unseen_synsets)
            flaws[photo] = "class of unseen-val" if is_unseen else flaw(args.data, photo)
        classes[split] = by_class((photo for photo, why in flaws.items() if why is None), args.per_label)
        print(f"{split}: {len(flaws)} photos; with photos left: {len(classes[split])} classes")
        print("  dropped:", ", ".join(f"{why} {count}" for why, count in Counter(filter(None, flaws.values())).most_common()))

    args.output.mkdir(parents=True, exist_ok=True)
    for folder in args.output.glob("objects-*"):
        shutil.rmtree(folder)
    synsets = {name: members[0].synset for name, members in classes[TRAIN].items()}
    sets = {f"objects-{number}": (TRAIN, names, [TRAIN]) for number, names in enumerate(into_sets(synsets, wordnet))}
    sets["objects-val"] = (UNSEEN, list(classes[UNSEEN]), [TRAIN, "val"])
    for folder, (split, names, lists) in sets.items():
        masks = (
            (photo.file, np.where(mask == 1, np.uint8(index), mask))
            for index, name in enumerate(names, start=1)
            for photo in classes[split][name]
            for mask in [read_mask(args.data, photo)]
        )
        write_set(args.output / folder, args.data / "clip" / "images", masks, names, lists)

    unseen_words = {word for photo in unseen for word in (photo.name, *own_lemmas(photo.synset, wordnet))}
    reserved = {key(photo.name) for photo in photos}
    reserved |= {key(form) for word in unseen_words for form in (word, wordnet.plural(plain(word)))}
    words = {name: other_words(name, synset, wordnet, reserved) for name, synset in synsets.items()}
    write_json(args.output / "object_words.json", {name: others for name, others in words.items() if others})
    about = "Labels of the photos in objects-val: no class of objects-0, objects-1, ... has one of these names."
    write_json(args.output / "unseen.json", {"about": about, "unseen": sorted({canonical(photo.name) for photo in unseen})})


if __name__ == "__main__":
    main()
