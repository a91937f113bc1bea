"""WordNet's nouns, their plurals, and concepts: names for groups of ImageNet's 1,000 classes.

Reads the files of Debian's package `wordnet-base` (format: `man 5 wndb`). ImageNet's class ids are offsets of WordNet 3.0
synsets ("n02084071" is synset 02084071, dog). So a classifier's probabilities can be summed over all classes below a synset:
"dog" is 118 of the 1,000 classes. Hypernyms miss many everyday words; `everyday_concepts.json` lists their classes by hand.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

WORDNET_DIR = Path("/usr/share/wordnet")
EVERYDAY_CONCEPTS = Path(__file__).with_name("everyday_concepts.json")

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
    """The nouns of WordNet.

    Attributes:
        synsets: offset -> synset.
        senses: lemma -> offsets, the most frequent sense first.

    Args:
        folder: contains `data.noun`, `index.noun` and `noun.exc`.

    Raises:
        FileNotFoundError: the files are missing.
    """

    def __init__(self, folder: Path = WORDNET_DIR) -> None:
        if not (folder / "data.noun").is_file():
            raise FileNotFoundError(f"No WordNet in {folder}. Install it with: apt-get install wordnet-base")
        self.synsets = dict(map(self._parse_synset, self._lines(folder / "data.noun")))
        self.senses: dict[str, list[str]] = {}
        for line in self._lines(folder / "index.noun"):
            lemma, _, count, n_pointers, *rest = line.split()
            self.senses[lemma.replace("_", " ")] = rest[int(n_pointers) + 2 :][: int(count)]
        self._irregular_plurals: dict[str, str] = {}
        for line in (folder / "noun.exc").read_text().splitlines():
            plural, singular, *_ = line.replace("_", " ").split()
            self._irregular_plurals.setdefault(singular, plural)

    @staticmethod
    def _lines(path: Path) -> list[str]:
        return [line for line in path.read_text().splitlines() if not line.startswith("  ")]  # the licence is indented

    @staticmethod
    def _parse_synset(line: str) -> tuple[str, Synset]:
        data, gloss = line.split(" | ", 1)
        offset, lexname, _, n_words, *rest = data.split()
        n = int(n_words, 16)
        lemmas = tuple(word.replace("_", " ") for word in rest[: 2 * n : 2])
        pointers = rest[2 * n + 1 :]
        hypernyms = tuple(
            pointers[i + 1]
            for i in range(0, len(pointers) - 3, 4)
            if pointers[i] in ("@", "@i") and pointers[i + 2] == "n"
        )
        definition = gloss.split('; "')[0].strip()
        return offset, Synset(offset, int(lexname), lemmas, hypernyms, definition)

    def ancestors(self, offset: str) -> set[str]:
        """The synset itself and all synsets above it."""
        found, todo = set(), [offset]
        while todo:
            current = todo.pop()
            if current not in found:
                found.add(current)
                todo.extend(self.synsets[current].hypernyms)
        return found

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
        return sorted(
            n for n in names if n == n.lower() and n.replace(" ", "").replace("-", "").replace("'", "").isalpha()
        )


def _regular_plural(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return word[:-1] + "ies"
    return word + "s"


@dataclass(frozen=True)
class Concept:
    """A name for a set of ImageNet classes."""

    name: str
    offset: str  # of the synset; empty if only the everyday list has the name
    leaves: tuple[int, ...]  # ImageNet class indices
    everyday: bool = False  # the everyday list has the name


def imagenet_concepts(wordnet: WordNet, class_ids: list[str], *, max_leaves: int = 700) -> list[Concept]:
    """Every synset above ImageNet classes, one concept for each distinct name.

    Args:
        wordnet: the nouns.
        class_ids: ImageNet ids in the classifier's order, such as "n02084071".
        max_leaves: synsets above more classes ("whole", "entity") are left out.
    """
    leaves: dict[str, list[int]] = defaultdict(list)
    for index, class_id in enumerate(class_ids):
        for offset in wordnet.ancestors(class_id[1:]):
            leaves[offset].append(index)
    concepts: dict[str, Concept] = {}
    for offset, indices in sorted(leaves.items()):
        if len(indices) > max_leaves:
            continue
        name = concept_name(wordnet, wordnet.synsets[offset])
        concepts.setdefault(name, Concept(name, offset, tuple(indices)))
    return list(concepts.values())


def with_everyday(concepts: list[Concept], class_titles: list[str]) -> list[Concept]:
    """Merge the concepts with those of `everyday_concepts.json`; a name in both gets the classes of both.

    Args:
        concepts: of `imagenet_concepts`.
        class_titles: the first name of each ImageNet class, in the classifier's order.

    Raises:
        ValueError: ImageNet does not have a class of the file.
    """
    joined = {concept.name: concept for concept in concepts}
    for entry in json.loads(EVERYDAY_CONCEPTS.read_text(encoding="utf-8")):
        leaves = {class_titles.index(title) for title in entry["classes"]}
        for name in entry["names"]:
            earlier = joined.get(name, Concept(name, "", ()))
            joined[name] = Concept(name, earlier.offset, tuple(sorted(leaves | set(earlier.leaves))), everyday=True)
    return list(joined.values())


def concept_name(wordnet: WordNet, synset: Synset) -> str:
    """A lemma whose visible sense is this synset, else the first lemma and a hypernym ("crane wading bird")."""
    for lemma in synset.lemmas:
        sense = wordnet.visible_sense(lemma)
        if sense is not None and sense.offset == synset.offset:
            return lemma.lower()
    hypernym = wordnet.synsets[synset.hypernyms[0]].lemmas[0] if synset.hypernyms else ""
    return f"{synset.lemmas[0]} {hypernym}".strip().lower()
