"""Objects of many classes for the decoder of lite: plain folders out of the masks that lie with the labelled photos.

    python -m recipes.lite.object_masks --data data --output runs/objects --evidence runs/evidence.csv

The masks (`DATA/clip/masks`) show the salient object of a photo as IS-Net drew it; that this is what the photo's label
says is a guess. `choose` keeps those of which it is a good one: neither tiny nor all of the photo, sure, in one piece,
hardly doubtful, and, with `--evidence` (see `object_evidence.py`), more like the label than the rest of the photo is.

Writes to OUTPUT:
    objects-0, objects-1, ...  photos of the split "train"; within one of them no class is a kind of another
    objects-val                photos of the split "unseen-val", in both of its lists
    object_words.json          class -> other words for it, from WordNet (format: `train.words.read_other_words`)
    unseen.json                the labels of "unseen-val", as a split (format: `train.data.load_split`)

A photo has one labelled object. The other classes of its set, none of which is a kind of it, count as absent: in a trial of
200 steps that was a little better than to leave them out ("exhaustive": false). No class of "train" has the name or the
synset of a class of "unseen-val", and no class is read under a word of one.
"""

import argparse
import csv
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from ldvc.class_names import canonical, plain
from recipes.lite.wordnet import EVERYDAY_CONCEPTS, Synset, WordNet

BACKGROUND = "none of these"
VOID = 255
TRAIN, UNSEEN = "train", "unseen-val"
AREA = (0.03, 0.9)  # share of the photo
CONFIDENCE = 0.9
MAIN_PART = 0.9  # share of the object that hangs together
MOST_VOID = 0.25  # share of the photo
MOST_PERSON = 0.5  # share of the object, unless it is a person
CLASSES = 250  # of a set: masks have 8 bits
WORDS, LEMMAS, HYPERNYMS = 8, 4, 3  # other words of a class: at most; of its own synset; of those above
PERSON = "00007846"  # WordNet's synset

NAMES = {  # labels that mean something else to most people, or that are a plural, a part or a misspelling
    "admiral": "admiral butterfly", "african grey": "african grey parrot", "airedale": "airedale terrier",
    "airplanes": "airplane", "ashcan": "trash can", "ballplayer": "baseball player", "band aid": "adhesive bandage",
    "barrow": "wheelbarrow", "beacon": "lighthouse", "binder": "ring binder", "binocular": "binoculars",
    "bluetick": "bluetick coonhound", "bookshelf": "bookcase", "bow": "archery bow", "brass": "memorial tablet",
    "cab": "taxi", "capuchin": "capuchin monkey", "car side": "car", "cardigan": "cardigan welsh corgi",
    "chest": "storage chest", "chow": "chow chow", "clumber": "clumber spaniel", "cock": "rooster",
    "coho": "coho salmon", "computer keyboard": "keyboard", "computer mouse": "mouse", "cougar body": "cougar",
    "cougar face": "cougar", "cream": "face cream", "crocodile head": "crocodile", "cup or mug": "cup",
    "dandie dinmont": "dandie dinmont terrier", "ear": "ear of corn", "english springer": "english springer spaniel",
    "faces": "person", "file": "filing cabinet", "flamingo head": "flamingo", "flower pot": "flowerpot",
    "granny smith": "granny smith apple", "grille": "radiator grille", "hammerhead": "hammerhead shark",
    "hamper": "laundry hamper", "hand blower": "hair dryer", "hat with a wide brim": "wide-brimmed hat",
    "head cabbage": "cabbage", "headphone": "headphones", "hip": "rose hip", "hog": "pig", "hotdog": "hot dog",
    "ice bear": "polar bear", "iron": "clothes iron", "jean": "jeans", "kite": "kite bird", "koala bear": "koala",
    "leonberg": "leonberger", "leopards": "leopard", "lesser panda": "red panda", "loafer": "loafer shoe",
    "loggerhead": "loggerhead turtle", "motorbikes": "motorcycle", "muzzle": "dog muzzle",
    "newfoundland": "newfoundland dog", "organ": "pipe organ", "pajama": "pajamas", "panda": "giant panda",
    "patas": "patas monkey", "pembroke": "pembroke welsh corgi", "pick": "guitar pick", "plane": "carpenter's plane",
    "pot": "flowerpot", "puffer": "puffer fish", "purse": "handbag", "racer": "race car", "ray": "ray fish",
    "redbone": "redbone coonhound", "reel": "fishing reel", "rhino": "rhinoceros", "ringlet": "ringlet butterfly",
    "salt or pepper shaker": "saltshaker", "sax": "saxophone", "scale": "weighing scale", "screen": "computer screen",
    "ski": "skis", "sunglass": "sunglasses", "swab": "mop", "swine": "pig", "thatch": "thatched roof",
    "toilet tissue": "toilet paper", "tv or monitor": "tv", "upright": "upright piano", "vault": "vaulted ceiling",
    "walking stick": "stick insect", "washer": "washing machine", "water lilly": "water lily", "wild cat": "wildcat",
    "wing": "airplane wing",
}  # fmt: skip
NAMES_OF_SYNSETS = {"n02012849": "crane bird", "n07930864": "cup of punch"}  # labels that two synsets share
SENSES = {  # where neither the label's synset nor `visible_sense` of its name is meant: a synset or a word for it
    "bass": "02565573", "buddha": "", "dolphin": "02068974", "hedgehog": "01893825", "lotus": "11717399",
    "nautilus": "01968897", "octopus": "01970164", "sea horse": "01456756", "wildcat": "02124623",
    "schooner": "04147183", "pyramid": "04029125", "leopard": "02128385", "snoopy": "", "cup": "cup", "tie": "necktie",
    "tv": "television", "wide-brimmed hat": "hat",
}  # fmt: skip
STUFF = {"broccoli", "consomme", "guacamole", "hay", "perfume", "toilet paper", "velvet", "wool"}  # have no plural
PLURALS = {"binoculars", "scissors"}  # besides those whose singular is in WordNet
COMMON = {  # kinds of things that people have a word for, besides those of `EVERYDAY_CONCEPTS`
    "animal", "antelope", "ape", "arachnid", "armor", "basin", "beetle", "berry", "big cat", "bird", "bird of prey",
    "boat", "brass instrument", "bug", "bush", "can", "cat", "chameleon", "clothing", "cockatoo", "container", "corgi",
    "crab", "crustacean", "cuckoo", "dinosaur", "dog", "drink", "duck", "egret", "fabric", "filter", "finch", "fish",
    "flower", "fox", "frog", "fruit", "fungus", "furniture", "garment", "gate", "gecko", "goat", "griffon", "gun",
    "hat", "hawk", "headgear", "heater", "heron", "horse", "hound", "house", "household appliance", "insect", "jar",
    "jewelry", "kitchen appliance", "kitchen utensil", "lantern", "lemur", "lizard", "lock", "machine", "marsupial",
    "mastiff", "memorial", "mollusk", "monkey", "motor vehicle", "mushroom", "musical instrument", "newt", "owl",
    "parrot", "percussion instrument", "pillar", "pinscher", "plant", "python", "rattlesnake", "reptile", "retriever",
    "robe", "rodent", "salamander", "salmon", "sandpiper", "sauce", "scarf", "sea turtle", "seabird", "setter", "shark",
    "shed", "sheep", "shellfish", "shepherd dog", "ship", "shop", "sled", "sled dog", "slot machine", "sloth", "snake",
    "spaniel", "spider", "spitz", "sports equipment", "stew", "stork", "stringed instrument", "swan", "swimsuit",
    "telescope", "terrier", "theater", "tool", "toy", "toy dog", "trap", "tree", "turtle", "uniform", "utensil",
    "vegetable", "vehicle", "vest", "viper", "wading bird", "wagon", "warship", "weapon", "whale", "wild dog",
    "wind instrument", "wine", "wolf", "worm",
}  # fmt: skip


@dataclass(frozen=True)
class Photo:
    """A photo of one labelled object, as `masks.csv` describes it.

    Attributes:
        file: its name.
        name: of the object's class.
        synset: of the class in WordNet, None if it is not there.
        split: `TRAIN` or `UNSEEN`.
        area: share of the photo that the object covers.
        confidence: of the mask.
    """

    file: str
    name: str
    synset: Synset | None
    split: str
    area: float
    confidence: float


@dataclass(eq=False)
class ObjectClass:
    """A class with its photos, the best mask first."""

    name: str
    synset: Synset | None
    photos: list[Photo] = field(default_factory=list)

    @property
    def offset(self) -> str:
        return self.synset.offset if self.synset else ""


def key(name: str) -> str:
    """Equal for names that are the same word: "Jack-o'-lantern", "jack o'lantern"."""
    return canonical(name).replace("-", "").replace(" ", "")


def read_table(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def read_photos(data: Path, wordnet: WordNet) -> list[Photo]:
    """All photos with a mask. A label without a synset (Caltech's have none) gets that of the same label elsewhere,
    else the one that `visible_sense` gives. The labels of "unseen-val" keep their names."""
    synsets = {row["file"]: row["wnid"] for row in read_table(data / "clip" / "labels.csv")}
    rows = read_table(data / "clip" / "masks.csv")

    def name_of(row: dict[str, str]) -> str:
        label = plain(row["label"])
        return label if row["split"] == UNSEEN else NAMES_OF_SYNSETS.get(synsets[row["file"]], NAMES.get(label, label))

    elsewhere = {name_of(row): synsets[row["file"]][1:] for row in rows if synsets[row["file"]]}

    def synset_of(row: dict[str, str]) -> Synset | None:
        name = name_of(row)
        sense = SENSES.get(name)
        if sense is not None:
            return wordnet.synsets.get(sense) or wordnet.visible_sense(sense)
        offset = synsets[row["file"]][1:] or elsewhere.get(name, "")
        return wordnet.synsets.get(offset) or wordnet.visible_sense(name) or wordnet.visible_sense(canonical(name))

    return [
        Photo(row["file"], name_of(row), synset_of(row), row["split"], float(row["area"]), float(row["confidence"]))
        for row in rows
    ]


def read_mask(data: Path, file: str) -> np.ndarray:
    """(h, w) uint8: 0 outside, 1 the object, `VOID` doubtful."""
    with Image.open(data / "clip" / "masks" / f"{Path(file).stem}.png") as mask:
        return np.asarray(mask)


def flaw_of_mask(data: Path, photo: Photo) -> str | None:
    """Why its mask is none to learn from; None if it is one."""
    if not AREA[0] <= photo.area <= AREA[1]:
        return "area"
    if photo.confidence < CONFIDENCE:
        return "confidence"
    mask = read_mask(data, photo.file)
    with Image.open(data / "clip" / "images" / photo.file) as image:
        if ImageOps.exif_transpose(image).size != mask.shape[::-1]:
            return "size is not the photo's"
    if (mask == VOID).mean() > MOST_VOID:
        return "doubtful"
    parts, _ = ndimage.label(mask == 1)
    sizes = np.bincount(parts.ravel())[1:]
    if not sizes.size or sizes.max() < MAIN_PART * sizes.sum():
        return "in several parts"
    return None


def flaw_of_evidence(photo: Photo, evidence: Mapping[str, dict[str, str]], wordnet: WordNet) -> str | None:
    """Why the object is hardly what the label says; None if it may be, or if nothing is known of it."""
    row = evidence.get(photo.file)
    if row is None:
        return None
    if not float(row["inside"]) > float(row["outside"]):
        return "the label fits outside better"
    is_person = photo.synset is not None and PERSON in wordnet.ancestors(photo.synset.offset)
    return "a person" if float(row["person"]) > MOST_PERSON and not is_person else None


def choose(
    data: Path, photos: Iterable[Photo], evidence: Mapping[str, dict[str, str]], wordnet: WordNet
) -> tuple[list[Photo], Counter[str]]:
    """The photos to use, and how many were dropped for which reason (the first that holds)."""
    kept, dropped = [], Counter[str]()
    for photo in photos:
        flaw = flaw_of_mask(data, photo) or flaw_of_evidence(photo, evidence, wordnet)
        if flaw is None:
            kept.append(photo)
        else:
            dropped[flaw] += 1
    return kept, dropped


def classes_of(photos: Iterable[Photo], per_label: int) -> list[ObjectClass]:
    """The photos by class, at most `per_label` of each; names that are the same word are one class."""
    found: dict[str, ObjectClass] = {}
    for photo in sorted(photos, key=lambda photo: (-photo.confidence, photo.file)):
        each = found.setdefault(key(photo.name), ObjectClass(photo.name, photo.synset))
        if len(each.photos) < per_label:
            each.photos.append(photo)
    return sorted(found.values(), key=lambda each: each.name)


def kinds_of_others(classes: Collection[ObjectClass], wordnet: WordNet) -> dict[str, set[str]]:
    """Class -> classes of which it is a kind (whose synset is above its own, or is the same)."""
    of_synset: dict[str, list[ObjectClass]] = defaultdict(list)
    for each in classes:
        if each.synset:
            of_synset[each.offset].append(each)
    return {
        each.name: {
            other.name
            for offset in (wordnet.ancestors(each.offset) if each.synset else ())
            for other in of_synset.get(offset, ())
            if other is not each
        }
        for each in classes
    }


def into_sets(classes: Collection[ObjectClass], wordnet: WordNet) -> list[list[ObjectClass]]:
    """Each class into the first set that has room and holds no class that is a kind of it or the other way round."""
    above = kinds_of_others(classes, wordnet)
    sets: list[list[ObjectClass]] = []
    relatives = Counter(name for each in classes for other in above[each.name] for name in (each.name, other))
    for each in sorted(classes, key=lambda each: -relatives[each.name]):  # whose choice is smallest
        for members in sets:
            if len(members) < CLASSES and not any(
                other.name in above[each.name] or each.name in above[other.name] for other in members
            ):
                members.append(each)
                break
        else:
            sets.append([each])
    return [sorted(members, key=lambda each: each.name) for members in sets]


def write_set(folder: Path, data: Path, classes: list[ObjectClass], lists: Iterable[str]) -> None:
    """A plain folder with links to the photos."""
    if folder.exists():
        shutil.rmtree(folder)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    stems = []
    for index, each in enumerate(classes, start=1):
        for photo in each.photos:
            stem = Path(photo.file).stem
            (folder / "images" / photo.file).symlink_to((data / "clip" / "images" / photo.file).resolve())
            mask = read_mask(data, photo.file)
            Image.fromarray(np.where(mask == 1, np.uint8(index), mask)).save(folder / "masks" / f"{stem}.png")
            stems.append(stem)
    facts = {
        "classes": [BACKGROUND, *(each.name for each in classes)],
        "ignore_index": VOID,
        "background_index": 0,
    }
    (folder / "dataset.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    for name in lists:
        (folder / f"{name}.txt").write_text("\n".join(sorted(stems)) + "\n", encoding="utf-8")
    print(f"{folder}: {len(classes)} classes, {len(stems)} photos")


def said_words() -> set[str]:
    """Words that people say for kinds of things: of WordNet's, many are in no photo's caption ("placental")."""
    entries = json.loads(EVERYDAY_CONCEPTS.read_text(encoding="utf-8"))
    return COMMON | {name for entry in entries for name in entry["names"]}


def is_latin(lemma: str, wordnet: WordNet) -> bool:
    """Whether it is the name of a species, such as "Canis dingo"."""
    first, _, rest = lemma.partition(" ")
    return (
        first[:1].isupper()
        and rest == rest.lower()
        and (f"genus {first.lower()}" in wordnet.senses or bool(rest) and rest.split(" ")[-1] not in wordnet.senses)
    )


def own_lemmas(synset: Synset, wordnet: WordNet) -> list[str]:
    """Its lemmas that people would take for it: no Latin, and no word that means something else first."""
    fitting = []
    for lemma in synset.lemmas:
        sense = wordnet.visible_sense(lemma)
        if not is_latin(lemma, wordnet) and sense is not None and sense.offset == synset.offset:
            fitting.append(lemma.lower())
    return fitting


def words_above(synset: Synset, wordnet: WordNet) -> list[str]:
    """What people call the kinds of thing that it is, the nearest first."""
    said = said_words()
    found: dict[str, None] = {}
    level = list(synset.hypernyms)
    while level:
        for offset in level:
            word = next((lemma for lemma in own_lemmas(wordnet.synsets[offset], wordnet) if lemma in said), None)
            if word is not None:
                found[word] = None
        level = list(dict.fromkeys(up for offset in level for up in wordnet.synsets[offset].hypernyms))
    if "vehicle" in found:  # which WordNet takes for a container
        found.pop("container", None)
    return list(found)


def plural_of(name: str, wordnet: WordNet) -> str | None:
    """None if it is a plural, or no noun that has one."""
    last = name.split(" ")[-1]
    if last.endswith("s") and (last[:-1] in wordnet.senses or last in PLURALS):
        return None
    if name in STUFF or " of " in name or "-of-" in name or "-o'-" in name:
        return None
    plural = wordnet.plural(name)
    return f"{name}s" if plural.endswith(("ae", "ia")) else plural  # people say cameras


def other_words(each: ObjectClass, wordnet: WordNet, taken: Collection[str]) -> list[str]:
    """Further words for a class, `WORDS` at most.

    Args:
        each: the class.
        wordnet: the nouns.
        taken: keys (see `key`) of words that mean other classes.
    """

    def free(words: Iterable[str]) -> list[str]:
        distinct = {key(word): word for word in reversed(list(words))}
        return [word for word in reversed(distinct.values()) if key(word) not in {*taken, key(each.name)}]

    words = [each.name.replace("-", " ")] if "-" in each.name else []
    lemmas = free(own_lemmas(each.synset, wordnet))[:LEMMAS] if each.synset else []
    above = free(words_above(each.synset, wordnet))[:HYPERNYMS] if each.synset else []
    plural = plural_of(each.name, wordnet)
    plurals = free([plural]) if plural else []
    return list(dict.fromkeys([*words, *lemmas, *above, *plurals]))[:WORDS]


def words_of_unseen(photos: Iterable[Photo], wordnet: WordNet) -> set[str]:
    """Keys of all words that mean a class of "unseen-val": its label, the lemmas of its synset, and their plurals."""
    words = set()
    for photo in photos:
        words.add(photo.name)
        if photo.synset:
            words.update(own_lemmas(photo.synset, wordnet))
    return {key(form) for word in words for form in (word, wordnet.plural(plain(word)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, default=Path("runs/objects"))
    parser.add_argument("--per_label", type=int, default=6, metavar="N", help="photos of a class, the surest first")
    parser.add_argument("--evidence", type=Path, metavar="FILE", help="CSV of object_evidence.py; not needed")
    args = parser.parse_args()
    wordnet = WordNet()
    photos = read_photos(args.data, wordnet)
    unseen = [photo for photo in photos if photo.split == UNSEEN]
    unseen_keys = {key(photo.name) for photo in unseen}
    unseen_synsets = {photo.synset.offset for photo in unseen if photo.synset}
    evidence = {}
    if args.evidence and args.evidence.exists():
        evidence = {row["file"]: row for row in read_table(args.evidence)}
    print(f"evidence of {len(evidence)} photos")

    by_split: dict[str, list[ObjectClass]] = {}
    for split in (TRAIN, UNSEEN):
        of_split = [photo for photo in photos if photo.split == split]
        distinct = [
            photo
            for photo in of_split
            if split == UNSEEN
            or key(photo.name) not in unseen_keys
            and not (photo.synset and photo.synset.offset in unseen_synsets)
        ]
        same = {photo.name for photo in of_split} - {photo.name for photo in distinct}
        kept, dropped = choose(args.data, distinct, evidence, wordnet)
        by_split[split] = classes = classes_of(kept, args.per_label)
        dropped["class of unseen-val"] = len(of_split) - len(distinct)
        dropped["more than per_label"] = len(kept) - sum(len(each.photos) for each in classes)
        names = len({key(photo.name) for photo in of_split})
        print(f"{split}: {len(of_split)} photos of {names} classes; with photos left: {len(classes)}")
        print("  dropped:", ", ".join(f"{reason} {count}" for reason, count in dropped.most_common()))
        if same:
            print("  classes of unseen-val:", ", ".join(sorted(same)))

    args.output.mkdir(parents=True, exist_ok=True)
    for folder in args.output.glob("objects-*"):
        shutil.rmtree(folder)
    for number, classes in enumerate(into_sets(by_split[TRAIN], wordnet)):
        write_set(args.output / f"objects-{number}", args.data, classes, [TRAIN])
    write_set(args.output / "objects-val", args.data, by_split[UNSEEN], [TRAIN, "val"])
    kinds = kinds_of_others(by_split[UNSEEN], wordnet)
    print("  kinds of each other:", "; ".join(f"{name}: {', '.join(sorted(of))}" for name, of in kinds.items() if of))

    forbidden = words_of_unseen(unseen, wordnet) | unseen_keys | {key(photo.name) for photo in photos}
    words = {each.name: other_words(each, wordnet, forbidden - {key(each.name)}) for each in by_split[TRAIN]}
    words = {name: found for name, found in words.items() if found}
    split_file = {
        "about": "Labels of the photos in objects-val: no class of objects-0, objects-1, ... has one of these names.",
        "unseen": sorted({canonical(photo.name) for photo in unseen}),
    }
    for name, content in (("object_words.json", words), ("unseen.json", split_file)):
        (args.output / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{sum(map(len, words.values()))} other words for {len(words)} classes; unseen: {len(split_file['unseen'])}")


if __name__ == "__main__":
    main()
