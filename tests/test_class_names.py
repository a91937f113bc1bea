"""Class names: what people type or paste becomes the names they mean; which names count as seen."""

import subprocess
import sys

import pytest

from ldvc.class_names import (
    MAX_NAMES,
    NONE_WORDS,
    ClassName,
    SeenNames,
    drop_none_words,
    load_classes,
    load_split,
    parse_names,
)
from ldvc.errors import InvalidNamesError


def texts(names: str | list[str]) -> list[str]:
    return [name.text for name in parse_names(names)]


def test_importing_class_names_loads_no_torch() -> None:
    """Nor numpy: `import ldvc` loads the predictor only when somebody asks for it."""
    code = "import sys, ldvc.class_names; print([name for name in ('torch', 'numpy', 'gradio') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_names_are_split_cleaned_and_not_repeated() -> None:
    assert texts(" dog,, Grass ;dog\nGRASS, wine   glass,\t,") == ["dog", "Grass", "wine glass"]
    assert texts(["sky\x00", " ", "Sky", "dogs", "dog"]) == ["sky", "dogs", "dog"]
    assert texts(["<img src=x onerror=alert(1)>", "{0} {}"]) == ["<img src=x onerror=alert(1)>", "{0} {}"]
    assert texts("wine_glass, Dining_Table") == ["wine glass", "Dining Table"]


def test_synonyms_are_words_of_one_class() -> None:
    classes = parse_names("Sofa|couch, dog | Dog |, couch | bench, |")
    assert classes == [ClassName(("Sofa", "couch")), ClassName(("dog",)), ClassName(("bench",))]
    assert (classes[0].title, classes[0].text, classes[0].keys) == ("Sofa", "Sofa | couch", ("sofa", "couch"))
    assert texts([" tv |  tv  monitor", "TV"]) == ["tv | tv monitor"]
    assert texts(["wall", "building, edifice", "door;double door"]) == ["wall", "building | edifice", "door | double door"]


PASTED = [
    # separators
    "dog\tgrass", "dog;grass;", "dog\r\ngrass\r\n", "dog\u2028grass", "dog،grass", "dog、grass。", "dog，grass",
    "dog：、grass。", "dog . grass .", "a dog. a grass.", "dog: , grass!", "dog · grass", "dog। grass",
    # "and", "etc."
    "dog, and grass", "dog, grass, etc.", "dog, grass and so on", "dog, grass, ...", "dog, or grass",
    # quotes, brackets, code
    '["dog", "grass"]', "['dog', 'grass']", '"dog", "grass"', "'dog'\n'grass'",
    '"dog" "grass"', "“dog”, “grass”", "«dog», „grass“",
    '["dog", "grass"', 'dog", "grass"]', "[dog, grass]", "(dog, grass)", "{dog; grass}", "['dog, grass']",
    "classes = ['dog', 'grass']", "CLASSES = (\n    'dog',\n    'grass',\n)", "```\ndog\ngrass\n```",
    # lists
    "- dog\n- grass", "* dog\n* grass", "• dog • grass", "– dog\n– grass", "- [ ] dog\n- [x] grass", "> dog\n> grass",
    "1. dog\n2. grass", "1.dog\n2.grass", "1) dog\n2) grass", "(1) dog (2) grass", "[1] dog\n[2] grass",
    "1、dog\n2、grass", "1. dog 2. grass", "- dog - grass", "(a) dog\n(b) grass", "a. dog\nb. grass", "i) dog\nii) grass",
    "①dog ②grass", "1️⃣ dog 2️⃣ grass", "\uf0b7 dog\n\uf0b7 grass", "Animals:\n- dog\n- grass", "The classes are: dog, grass",
    "\\item dog\n\\item grass", "dog: 0.97, grass: 0.5",
    # Markdown and HTML
    "**dog**, `grass`", "* **dog**\n* *grass*", "[dog](https://a.b/c), grass", "<ul><li>dog</li><li>grass</li></ul>",
    "dog&nbsp;, grass",
    # class files of data sets
    "0: dog\n1: grass", "0 dog\n1 grass", "0 dog, 1 grass", "1 - dog\n2 - grass", "0 | dog\n1 | grass",
    "dog: 0\ngrass: 1", "class 0: dog\nclass 1: grass",
    '{"0": "dog", "1": "grass"}', "{0: 'dog', 1: 'grass'}", '{"dog": 0, "grass": 1}', "names: [dog, grass]",
    "names:\n  0: dog\n  1: grass",
    '{"categories": [{"id": 1, "name": "dog", "supercategory": "animal"}, {"id": 2, "name": "grass"}]}',
    "- name: dog\n- name: grass", "item {\n  id: 1\n  name: 'dog'\n}\nitem {\n  id: 2\n  name: 'grass'\n}",
    # tables
    "id,name\n0,dog\n1,grass", "name\ndog\ngrass", "0,dog,128,0,0\n1,grass,0,128,0", "0\tdog\n1\tgrass",
    '"0","dog"\n"1","grass"',
    "id\tname\tcolor\n0\tdog\tred\n1\tgrass\tblue", "| dog | grass |",
    "| id | name |\n|----|------|\n| 0 | dog |\n| 1 | grass |",
    # letters that look alike or cannot be seen
    "ｄｏｇ，ｇｒａｓｓ", "d\u00adog\u200b, \ufeffgr\u200cass", "dog, grass, \u200d \u200d", "dog, Dog, GRASS, grass",
]  # fmt: skip


@pytest.mark.parametrize("pasted", PASTED)
def test_a_pasted_list_is_a_list(pasted: str) -> None:
    found = [text.lower() for text in texts(pasted)]
    assert found == ["dog", "grass"]
    assert texts(", ".join(found)) == texts(found) == found


def test_marks_are_no_part_of_a_name() -> None:
    quoted = ['"dog"', "'dog'", "“dog”", "[dog]", "(dog)", "dog )", "*dog*", "_dog_"]
    for typed in (*quoted, "dog.", "dog:", "dog,", "- dog", "1. dog", "the dog"):
        assert texts(typed) == texts([typed]) == ["dog"], typed


NAMES = [
    "orange (fruit)", "jack-o'-lantern", "bird's nest", "St. Bernard", "U.S. flag", "flag of the U.S.", "No. 5", "T-shirt",
    "dog/cat", "24/7 shop", "16:9 screen", "3d printer", "7 up", "2 door car", "7", "vitamin a", "salt & pepper",
    "black and white cat", "AT&T logo", "C++", "straße", "🐕‍🦺", "狗", "می‌خواهم",
]  # fmt: skip


def test_marks_inside_a_name_stay() -> None:
    for name in NAMES:
        assert texts(name) == texts([name]) == [name]
        assert texts([name, "zebra"]) == texts(f"{name}, zebra") == [name, "zebra"]


def test_and_before_the_last_name_separates() -> None:
    assert texts("dog, cat and grass") == texts("dog, cat & grass") == texts("dog, cat, and grass") == ["dog", "cat", "grass"]
    assert texts('dog, "black and white cat"') == ["dog", "black and white cat"], "quotes keep a name together"
    assert texts("2 door, 4 door") == ["2 door", "4 door"], "these numbers do not count classes"


def test_bad_names_are_refused_with_a_sentence() -> None:
    many = [f"name {i}" for i in range(MAX_NAMES + 1)]
    cases = {
        "at least one": ("", " , ;", "\u200d \u200d", '"", [], . , ( )', []),
        "Separate names with commas": ("[" * 100_000, "x" * 81),
        "at most 200": (many, " | ".join(many)),
        "must be text, not NoneType": (["dog", None],),
    }
    for message, texts_or_lists in cases.items():
        for names in texts_or_lists:
            with pytest.raises(InvalidNamesError, match=message):
                parse_names(names)


def test_words_for_none_of_the_others_are_no_classes() -> None:
    for word in NONE_WORDS:
        for spelled in (word, word.title(), word.upper().replace(" ", "_"), f" {word} "):
            classes = parse_names(["dog", spelled, "wine glass"])
            assert [each.means_none for each in classes] == [False, True, False]
            assert drop_none_words(classes) == (parse_names("dog, wine glass"), True)
            with pytest.raises(InvalidNamesError, match=f"(?i)“{word}” means none of the other names; type"):
                drop_none_words(parse_names(spelled))
    classes = parse_names("dog | other, rest | nothing, background, sofa | couch")
    assert drop_none_words(classes) == (parse_names("dog, sofa | couch"), True)
    longer = parse_names(["background singer", "rest area", "other dog", "nothings"])
    assert drop_none_words(longer) == (longer, False)


def test_other_forms_and_spellings_of_learned_names_are_seen() -> None:
    learned = ["dog", "person", "potted plant", "bus", "Curtains", "strawberry", "couch", "tv", "glass"]
    seen = SeenNames(learned, {"grass": ["lawn"]})
    expected = {
        "Dog": "dog", "dogs": "dog", "people": "person", "potted_plants": "potted plant", "buses": "bus", "lawns": "grass",
        "curtain": "Curtains", "strawberries": "strawberry", "Sofa": "couch", "settee | sofas": "couch", "tv monitor": "tv",
        "hound | dogs": "dog", "sofa | glass": "couch",
        "dodge": None, "hot dog": None, "plant": None, "do": None, "cat | plant": None,
    }  # fmt: skip
    assert {name: seen.source(name) for name in expected} == expected
    for name, source in expected.items():
        (asked,) = parse_names(name)
        assert seen.source(asked) == source and (asked in seen) == (source is not None)


def test_hyphens_separate_kinds_in_coco_stuff_only() -> None:
    seen = SeenNames(["wall-brick", "fire-hydrant", "T-shirt", "ice-cream"])
    assert seen.source("wall") == "wall-brick" and "T-shirts" in seen and "fire hydrant" in seen
    assert not [word for word in ("fire", "t", "ice", "cream") if word in seen]


def test_on_its_own_benchmark_exactly_the_split_is_unseen() -> None:
    for classes, split in (("voc20", "voc12"), ("coco_stuff171", "coco_stuff"), ("context59", "context")):
        names, unseen = load_classes(classes), load_split(split)
        held_out = SeenNames(unseen)
        learned = SeenNames(name for name in names if name not in held_out)
        assert len({name for name in names if name not in learned}) == len(unseen)


def test_synonyms_of_learned_names_count_as_seen() -> None:
    learned = SeenNames(name for name in load_classes("coco_stuff171") if name not in load_split("coco_stuff"))
    voc = {name: learned.source(name) for name in load_classes("voc20")}
    assert [name for name, by in voc.items() if by is None] == ["cow"]
    assert (voc["sofa"], voc["tv monitor"], voc["motorbike"]) == ("couch", "tv", "motorcycle")
    context = {name: learned.source(name) for name in load_classes("context59")}
    assert (context["sky"], context["shelves"], context["sidewalk"]) == ("sky-other", "shelf", "pavement")
    unseen = {name for name, by in context.items() if by is None}
    assert {"cow", "grass", "road", "tree"} <= unseen and not unseen & {"wall", "water", "window", "dog"}
