"""WordNet's nouns, their plurals, and concepts: names for groups of ImageNet's 1,000 classes.

Reads the files of Debian's package `wordnet-base` (format: `man 5 wndb`). ImageNet's class ids are offsets of WordNet 3.0
synsets ("n02084071" is synset 02084071, dog). So a classifier's probabilities can be summed over all classes below a synset:
"dog" is 118 of the 1,000 classes. Hypernyms miss many everyday words; `everyday_concepts.json` lists their classes by hand.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import timm.data

from recipes.lite.steps import read_json

WORDNET_DIR = Path("/usr/share/wordnet")
EVERYDAY_CONCEPTS = read_json("everyday_concepts")  # entries: "names" of a concept, "classes" of ImageNet that show it
MAX_LEAVES = 700  # synsets above more classes of ImageNet ("whole", "entity") are no concepts

# Lexicographer files (man 5 lexnames) of nouns that a photo can show: tops, animal, artifact, body, food, object, plant,
# substance. Persons come last: WordNet's first "whale" is a large person.
VISIBLE_LEXNAMES = frozenset({3, 5, 6, 8, 13, 17, 20, 27})
PERSON_LEXNAME = 18
PREFERRED_SENSES = {"plant": "00017222", "person": "00007846"}  # not the factory, not the body


@dataclass(frozen=True)
class Synset:
    offset: str  # eight digits, as in the file
    lexname: int
    lemmas: tuple[str, ...]  # spaces instead of underscores
    hypernyms: tuple[str, ...] = field(repr=False)
    gloss: str = field(repr=False)  # the definition alone, without example sentences


class WordNet:
    """The nouns of WordNet, from a folder with `data.noun`, `index.noun` and `noun.exc`.

    `synsets`: offset -> synset. `senses`: lemma -> offsets, the most frequent sense first.
    """

    def __init__(self, folder: Path = WORDNET_DIR) -> None:
        if not (folder / "data.noun").is_file():
            raise FileNotFoundError(f"No WordNet in {folder}. Install it with: apt-get install wordnet-base")

        def lines(name: str) -> list[str]:
            return [line for line in (folder / name).read_text().splitlines() if not line.startswith("  ")]  # the licence

        self.synsets = {synset.offset: synset for synset in map(_parse_synset, lines("data.noun"))}
        self.senses: dict[str, list[str]] = {}
        for line in lines("index.noun"):
            lemma, _, count, n_pointers, *rest = line.split()
            self.senses[lemma.replace("_", " ")] = rest[int(n_pointers) + 2 :][: int(count)]
        self._irregular_plurals: dict[str, str] = {}
        for line in lines("noun.exc"):
            plural, singular, *_ = line.replace("_", " ").split()
            self._irregular_plurals.setdefault(singular, plural)

    def ancestors(self, offset: str) -> set[str]:
        """The synset itself and all synsets above it."""
        ancestors, todo = set(), [offset]
        while todo:
            current = todo.pop()
            if current not in ancestors:
                ancestors.add(current)
                todo.extend(self.synsets[current].hypernyms)
        return ancestors

    def visible_sense(self, name: str) -> Synset | None:
        """The sense that a photo most likely shows: the most frequent visible one, else the most frequent one."""
        name = name.lower()
        if name in PREFERRED_SENSES:
            return self.synsets[PREFERRED_SENSES[name]]
        synsets = [self.synsets[offset] for offset in self.senses.get(name, [])]
        common = [synset for synset in synsets if name in synset.lemmas] or synsets  # not Stephen Crane
        visible = [synset for synset in common if synset.lexname in VISIBLE_LEXNAMES]
        people = [synset for synset in common if synset.lexname == PERSON_LEXNAME]
        return next(iter(visible + people + common), None)

    def plural(self, name: str) -> str:
        """English plural of a noun or of the last word of a noun phrase."""
        *first, last = name.split(" ")
        return " ".join([*first, self._irregular_plurals.get(last) or _regular_plural(last)])

    @cached_property
    def common_nouns(self) -> list[str]:
        """All lemmas in lower case without digits, that is, without proper names and numbers."""
        names = {lemma for synset in self.synsets.values() for lemma in synset.lemmas}
        return sorted(name for name in names if name == name.lower() and re.sub("[ '-]", "", name).isalpha())


def _parse_synset(line: str) -> Synset:
    data, gloss = line.split(" | ", 1)
    offset, lexname, _, n_words, *rest = data.split()
    n = int(n_words, 16)
    pointers = rest[2 * n + 1 :]  # four fields each: kind, offset, part of speech, and an unused one
    hypernyms = [
        above for kind, above, part in zip(pointers[::4], pointers[1::4], pointers[2::4], strict=False)
        if kind in ("@", "@i") and part == "n"
    ]  # fmt: skip
    lemmas = tuple(word.replace("_", " ") for word in rest[: 2 * n : 2])
    return Synset(offset, int(lexname), lemmas, tuple(hypernyms), gloss.split('; "')[0].strip())


def _regular_plural(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return word[:-1] + "ies"
    return word + "s"


def imagenet_classes() -> tuple[list[str], list[str]]:
    """The ids of ImageNet's 1,000 classes, such as "n02084071", and the first name of each, in the order of classifiers."""
    imagenet = timm.data.ImageNetInfo("imagenet-1k")
    return imagenet.label_names(), [description.split(",")[0] for description in imagenet.label_descriptions()]


@dataclass(frozen=True)
class Concept:
    """A name for a set of ImageNet classes."""

    name: str
    offset: str  # offset of the synset; empty if only the everyday list has the name
    leaves: tuple[int, ...]  # ImageNet class indices
    everyday: bool = False  # the everyday list has the name


def imagenet_concepts(wordnet: WordNet, class_ids: list[str]) -> list[Concept]:
    """Every synset above ImageNet classes, one concept for each distinct name."""
    leaves: dict[str, list[int]] = defaultdict(list)
    for index, class_id in enumerate(class_ids):
        for offset in wordnet.ancestors(class_id[1:]):
            leaves[offset].append(index)
    concepts: dict[str, Concept] = {}
    for offset, indices in sorted(leaves.items()):
        if len(indices) <= MAX_LEAVES:
            name = concept_name(wordnet, wordnet.synsets[offset])
            concepts.setdefault(name, Concept(name, offset, tuple(indices)))
    return list(concepts.values())


def with_everyday(concepts: list[Concept], class_titles: list[str]) -> list[Concept]:
    """Merge the concepts with those of `everyday_concepts.json`; a name in both gets the classes of both."""
    joined = {concept.name: concept for concept in concepts}
    for entry in EVERYDAY_CONCEPTS:
        leaves = {class_titles.index(title) for title in entry["classes"]}
        for name in entry["names"]:
            earlier = joined.get(name, Concept(name, "", ()))
            joined[name] = Concept(name, earlier.offset, tuple(sorted(leaves | set(earlier.leaves))), everyday=True)
    return list(joined.values())


def concept_name(wordnet: WordNet, synset: Synset) -> str:
    """A lemma whose visible sense is this synset, else the first lemma and a hypernym ("crane wading bird")."""
    for lemma in synset.lemmas:
        if wordnet.visible_sense(lemma) == synset:
            return lemma.lower()
    hypernym = wordnet.synsets[synset.hypernyms[0]].lemmas[0] if synset.hypernyms else ""
    return f"{synset.lemmas[0]} {hypernym}".strip().lower()
