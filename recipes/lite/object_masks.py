"""Step 6d of lite: data sets of objects, made from the masks of the labelled photos.

    python -m recipes.lite.object_masks --data data --output runs/objects

A mask (`DATA/clip/masks`) shows the salient object of a photo as IS-Net drew it. This step assumes that the object is what the
photo's label names. It drops masks that are tiny, cover almost the whole photo, are uncertain or are in several parts.

Writes to OUTPUT:
    objects-0, objects-1, ...  photos of the split "train"; no class of a set is a hyponym of another class of that set
    objects-val                photos of the split "unseen-val", in both lists
    object_words.json          class -> other words for it, from WordNet (format: `train.words.read_other_words`)
    unseen.json                the labels of "unseen-val" (format: `ldvc.class_names.load_split`)

A photo has one labelled object. The other classes of its set count as absent. No class of "train" has the name or the synset
of a class of "unseen-val", and no other word of a class of "train" names a class of "unseen-val".
"""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from ldvc.class_names import canonical, plain
from recipes.lite.steps import VOID, options_of, read_table, write_json, write_set
from recipes.lite.wordnet import EVERYDAY_CONCEPTS, Synset, WordNet

TRAIN, UNSEEN = "train", "unseen-val"
AREA = (0.03, 0.9)  # share of the photo
MIN_CONFIDENCE = 0.9
MIN_MAIN_PART = 0.9  # share of the object's pixels that its largest connected part has
MAX_VOID = 0.25  # share of the photo
CLASSES = 250  # of a set: masks have 8 bits
WORDS, LEMMAS, HYPERNYMS = 8, 4, 3  # largest number of other words of a class, of its lemmas, of its hypernyms

# names: label -> a clearer name. names_of_synsets: a name for each of two synsets that share a label. senses: name -> synset
# or a word with the right sense, where WordNet's is wrong. no_plural, plurals: nouns without plural, nouns in plural.
# hypernyms: words for groups of things, besides those of EVERYDAY_CONCEPTS.
LABELS = json.loads(Path(__file__).with_name("object_labels.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Photo:
    """A row of `masks.csv`: a photo of one labelled object.

    Attributes:
        file: name of the file.
        name: name of the object's class.
        synset: of the class in WordNet; None if WordNet does not have it.
        split: `TRAIN` or `UNSEEN`.
        area: share of the photo that the object covers.
        confidence: of the mask, 0..1.
    """

    file: str
    name: str
    synset: Synset | None
    split: str
    area: float
    confidence: float


@dataclass(eq=False)
class ObjectClass:
    """A class and its photos, the most confident mask first."""

    name: str
    synset: Synset | None
    photos: list[Photo]


def key(name: str) -> str:
    """Equal for spellings of the same word: "Jack-o'-lantern", "jack o'lantern"."""
    return canonical(name).replace("-", "").replace(" ", "")


def read_photos(data: Path, wordnet: WordNet) -> list[Photo]:
    """All photos with a mask.

    A label without a synset gets the synset of the same label elsewhere, or the one that `visible_sense` gives. The labels of
    "unseen-val" keep their names.
    """
    synsets = {row["file"]: row["wnid"] for row in read_table(data / "clip" / "labels.csv")}
    rows = read_table(data / "clip" / "masks.csv")

    def name_of(row: dict[str, str]) -> str:
        label = plain(row["label"])
        if row["split"] == UNSEEN:
            return label
        return LABELS["names_of_synsets"].get(synsets[row["file"]], LABELS["names"].get(label, label))

    elsewhere = {name_of(row): synsets[row["file"]][1:] for row in rows if synsets[row["file"]]}

    def synset_of(row: dict[str, str]) -> Synset | None:
        name = name_of(row)
        sense = LABELS["senses"].get(name)
        if sense is not None:
            return wordnet.synsets.get(sense) or wordnet.visible_sense(sense)
        offset = synsets[row["file"]][1:] or elsewhere.get(name, "")
        return wordnet.synsets.get(offset) or wordnet.visible_sense(name) or wordnet.visible_sense(canonical(name))

    return [
        Photo(row["file"], name_of(row), synset_of(row), row["split"], float(row["area"]), float(row["confidence"]))
        for row in rows
    ]


def read_mask(data: Path, file: str) -> np.ndarray:
    """(h, w) uint8: 0 outside, 1 the object, `VOID` uncertain."""
    with Image.open(data / "clip" / "masks" / f"{Path(file).stem}.png") as mask:
        return np.asarray(mask)


def mask_of(data: Path, photo: Photo, index: int) -> np.ndarray:
    """The mask of a photo, with the index of its class instead of 1."""
    mask = read_mask(data, photo.file)
    return np.where(mask == 1, np.uint8(index), mask)


def flaw(data: Path, photo: Photo) -> str | None:
    """Why a mask is not used; None if it is used."""
    if not AREA[0] <= photo.area <= AREA[1]:
        return "area"
    if photo.confidence < MIN_CONFIDENCE:
        return "confidence"
    mask = read_mask(data, photo.file)
    with Image.open(data / "clip" / "images" / photo.file) as image:
        if ImageOps.exif_transpose(image).size != mask.shape[::-1]:
            return "size differs from the photo's"
    if (mask == VOID).mean() > MAX_VOID:
        return "uncertain"
    parts, _ = ndimage.label(mask == 1)
    sizes = np.bincount(parts.ravel())[1:]
    if not sizes.size or sizes.max() < MIN_MAIN_PART * sizes.sum():
        return "in several parts"
    return None


def classes_of(photos: Iterable[Photo], per_label: int) -> list[ObjectClass]:
    """The photos by class, at most `per_label` of each; spellings of the same word are one class."""
    found: dict[str, ObjectClass] = {}
    for photo in sorted(photos, key=lambda photo: (-photo.confidence, photo.file)):
        each = found.setdefault(key(photo.name), ObjectClass(photo.name, photo.synset, []))
        if len(each.photos) < per_label:
            each.photos.append(photo)
    return sorted(found.values(), key=lambda each: each.name)


def hypernyms_among(classes: Collection[ObjectClass], wordnet: WordNet) -> dict[str, set[str]]:
    """Class -> the other classes whose synset is above its own, or is the same."""
    of_synset: dict[str, list[ObjectClass]] = defaultdict(list)
    for each in classes:
        if each.synset:
            of_synset[each.synset.offset].append(each)
    return {
        each.name: {
            other.name
            for offset in (wordnet.ancestors(each.synset.offset) if each.synset else ())
            for other in of_synset.get(offset, ())
            if other is not each
        }
        for each in classes
    }


def into_sets(classes: Collection[ObjectClass], wordnet: WordNet) -> list[list[ObjectClass]]:
    """Put each class into the first set that has room and contains neither a hypernym nor a hyponym of it."""
    above = hypernyms_among(classes, wordnet)
    sets: list[list[ObjectClass]] = []
    relatives = Counter(name for each in classes for other in above[each.name] for name in (each.name, other))
    for each in sorted(classes, key=lambda each: -relatives[each.name]):  # classes with most relatives first
        for members in sets:
            if len(members) < CLASSES and not any(
                other.name in above[each.name] or each.name in above[other.name] for other in members
            ):
                members.append(each)
                break
        else:
            sets.append([each])
    return [sorted(members, key=lambda each: each.name) for members in sets]


def is_latin(lemma: str, wordnet: WordNet) -> bool:
    """Whether a lemma is the scientific name of a species, such as "Canis dingo"."""
    first, _, rest = lemma.partition(" ")
    return (
        first[:1].isupper()
        and rest == rest.lower()
        and (f"genus {first.lower()}" in wordnet.senses or bool(rest) and rest.split(" ")[-1] not in wordnet.senses)
    )


def own_lemmas(synset: Synset, wordnet: WordNet) -> list[str]:
    """The lemmas of a synset that are not Latin and whose first meaning is this synset."""
    fitting = []
    for lemma in synset.lemmas:
        sense = wordnet.visible_sense(lemma)
        if not is_latin(lemma, wordnet) and sense is not None and sense.offset == synset.offset:
            fitting.append(lemma.lower())
    return fitting


def words_above(synset: Synset, wordnet: WordNet) -> list[str]:
    """Everyday words for the hypernyms of a synset, the nearest first. Rare words such as "placental" are left out."""
    entries = json.loads(EVERYDAY_CONCEPTS.read_text(encoding="utf-8"))
    everyday = {*LABELS["hypernyms"], *(name for entry in entries for name in entry["names"])}
    found: dict[str, None] = {}
    level = list(synset.hypernyms)
    while level:
        for offset in level:
            word = next((lemma for lemma in own_lemmas(wordnet.synsets[offset], wordnet) if lemma in everyday), None)
            if word is not None:
                found[word] = None
        level = list(dict.fromkeys(up for offset in level for up in wordnet.synsets[offset].hypernyms))
    if "vehicle" in found:  # for WordNet a vehicle is a container
        found.pop("container", None)
    return list(found)


def plural_of(name: str, wordnet: WordNet) -> str | None:
    """The plural of a class name; None if it is a plural already or has none."""
    last = name.split(" ")[-1]
    if last.endswith("s") and (last[:-1] in wordnet.senses or last in LABELS["plurals"]):
        return None
    if name in LABELS["no_plural"] or " of " in name or "-of-" in name or "-o'-" in name:
        return None
    plural = wordnet.plural(name)
    return f"{name}s" if plural.endswith(("ae", "ia")) else plural  # cameras, not camerae


def other_words(each: ObjectClass, wordnet: WordNet, reserved: Collection[str]) -> list[str]:
    """Further words for a class, at most `WORDS`.

    Args:
        each: the class.
        wordnet: the nouns.
        reserved: keys (see `key`) of words that mean other classes.
    """

    def free(words: Iterable[str]) -> list[str]:
        distinct = {key(word): word for word in reversed(list(words))}
        return [word for word in reversed(distinct.values()) if key(word) not in {*reserved, key(each.name)}]

    words = [each.name.replace("-", " ")] if "-" in each.name else []
    lemmas = free(own_lemmas(each.synset, wordnet))[:LEMMAS] if each.synset else []
    above = free(words_above(each.synset, wordnet))[:HYPERNYMS] if each.synset else []
    plural = plural_of(each.name, wordnet)
    plurals = free([plural]) if plural else []
    return list(dict.fromkeys([*words, *lemmas, *above, *plurals]))[:WORDS]


def words_of_unseen(photos: Iterable[Photo], wordnet: WordNet) -> set[str]:
    """Keys of all words for classes of "unseen-val": labels, lemmas of their synsets, and plurals."""
    words = set()
    for photo in photos:
        words.add(photo.name)
        if photo.synset:
            words.update(own_lemmas(photo.synset, wordnet))
    return {key(form) for word in words for form in (word, wordnet.plural(plain(word)))}


def main() -> None:
    args = options_of(__doc__, output=Path("runs/objects"), per_label=10)
    wordnet = WordNet()
    photos = read_photos(args.data, wordnet)
    unseen = [photo for photo in photos if photo.split == UNSEEN]
    unseen_keys = {key(photo.name) for photo in unseen}
    unseen_synsets = {photo.synset.offset for photo in unseen if photo.synset}

    def flaw_in_split(photo: Photo) -> str | None:
        same = key(photo.name) in unseen_keys or bool(photo.synset) and photo.synset.offset in unseen_synsets
        return "class of unseen-val" if photo.split == TRAIN and same else flaw(args.data, photo)

    by_split: dict[str, list[ObjectClass]] = {}
    for split in (TRAIN, UNSEEN):
        flaws = {photo: flaw_in_split(photo) for photo in photos if photo.split == split}
        by_split[split] = classes_of((photo for photo, why in flaws.items() if why is None), args.per_label)
        print(f"{split}: {len(flaws)} photos; with photos left: {len(by_split[split])} classes")
        print("  dropped:", ", ".join(f"{why} {count}" for why, count in Counter(filter(None, flaws.values())).most_common()))

    args.output.mkdir(parents=True, exist_ok=True)
    for folder in args.output.glob("objects-*"):
        shutil.rmtree(folder)
    sets = {f"objects-{number}": classes for number, classes in enumerate(into_sets(by_split[TRAIN], wordnet))}
    for name, classes in {**sets, "objects-val": by_split[UNSEEN]}.items():
        photos_of = ((index, photo) for index, each in enumerate(classes, start=1) for photo in each.photos)
        masks = ((photo.file, mask_of(args.data, photo, index)) for index, photo in photos_of)
        lists = [TRAIN, "val"] if name == "objects-val" else [TRAIN]
        write_set(args.output / name, args.data / "clip" / "images", masks, [each.name for each in classes], lists)

    reserved = words_of_unseen(unseen, wordnet) | unseen_keys | {key(photo.name) for photo in photos}
    words = {each.name: other_words(each, wordnet, reserved - {key(each.name)}) for each in by_split[TRAIN]}
    write_json(args.output / "object_words.json", {name: found for name, found in words.items() if found})
    about = "Labels of the photos in objects-val: no class of objects-0, objects-1, ... has one of these names."
    write_json(args.output / "unseen.json", {"about": about, "unseen": sorted({canonical(photo.name) for photo in unseen})})


if __name__ == "__main__":
    main()
