"""Class names in: cleaned, counted, and compared with what a checkpoint saw."""

from __future__ import annotations

import pytest

from ldvc.class_names import NONE_WORDS, SeenNames, clean_names, synonyms_of, without_none_words
from ldvc.errors import InvalidNamesError


def test_names_are_cleaned() -> None:
    assert clean_names(" dog,, Grass ;dog\nGRASS, wine   glass,\t,") == ["dog", "Grass", "wine glass"]
    assert clean_names(["sky\x00", " ", "Sky", "straße", "STRASSE"]) == ["sky", "straße"]
    assert clean_names(["<img src=x onerror=alert(1)>", "{0} {}"]) == ["<img src=x onerror=alert(1)>", "{0} {}"]
    assert clean_names("dog\uff0ccat\uff1bcow, \u200d dog, \u200d \u200d") == ["dog", "cat", "cow"]  # joiners shape words only


def test_synonyms_are_cleaned() -> None:
    assert clean_names("sofa|couch, dog | Dog |, couch | bench, |") == ["sofa | couch", "dog", "bench"]
    assert clean_names([" tv |  tv  monitor", "TV"]) == ["tv | tv monitor"]
    assert synonyms_of("sofa | couch") == ["sofa", "couch"] and synonyms_of("dog") == ["dog"]
    with pytest.raises(InvalidNamesError, match="201 names"):
        clean_names(" | ".join(f"word {i}" for i in range(201)))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("", "at least one"),
        (" , ;", "at least one"),
        ("\u200d \u200d", "at least one"),
        ("x" * 81, "commas"),
        ([f"name {i}" for i in range(201)], "at most"),
    ],
)
def test_bad_names_are_refused_with_a_sentence(names: str | list[str], says: str) -> None:
    with pytest.raises(InvalidNamesError, match=says):
        clean_names(names)
    with pytest.raises(InvalidNamesError):
        clean_names(["dog", None])


@pytest.mark.parametrize("word", sorted(NONE_WORDS))
def test_a_word_for_none_of_the_others_is_no_class(word: str) -> None:
    for spelled in (word, word.title(), word.upper().replace(" ", "_"), f" {word} "):
        classes = clean_names(["dog", spelled, "wine glass"])
        assert without_none_words(classes) == (["dog", "wine glass"], True)
        with pytest.raises(InvalidNamesError, match=f"(?i)“{word.replace(' ', '.')}” means none of the other names; type"):
            without_none_words(clean_names([spelled]))


def test_none_words_among_synonyms() -> None:
    names = clean_names("dog | other, rest | nothing, background, sofa | couch")
    assert without_none_words(names) == (["dog", "sofa | couch"], True)
    with pytest.raises(InvalidNamesError, match="“other | Background” means none"):
        without_none_words(clean_names("other | Background, none"))


def test_names_that_only_hold_a_none_word_stay() -> None:
    names = ["background singer", "rest area", "other dog", "nothings"]
    assert without_none_words(names) == (names, False)


def test_seen_names() -> None:
    seen = SeenNames(["dog", "person", "potted plant", "bus", "wine glass", "Curtains", "strawberry"])
    for name in ("Dog", "dogs", "people", "potted plants", "potted_plant", "buses", "wine glasses", "curtain"):
        assert name in seen, name
    assert "strawberries" in seen
    for name in ("dodge", "hot dog", "plant", "glass", "do", "cat", "wine", "cat | plant"):
        assert name not in seen, name
    assert "hound | dogs" in seen


def test_seen_names_know_other_spellings_of_what_was_learned() -> None:
    seen = SeenNames(["couch", "wall-brick", "tv", "glass"])
    found = {name: seen.source(name) for name in ("Sofa", "sofas", "settee | sofa", "wall", "tv monitor", "bench")}
    assert found == {
        "Sofa": "couch",
        "sofas": "couch",
        "settee | sofa": "couch",
        "wall": "wall-brick",
        "tv monitor": "tv",
        "bench": None,
    }
    assert seen.source("sofa | glass") == "couch", "the order is that of the words"


@pytest.mark.parametrize(
    "pasted",
    [
        '["dog", "grass"]', '"dog", "grass"', "['dog', 'grass']", "dog . grass .", "(dog, grass)", "{dog; grass}",
        "- dog\n- grass", "* dog\n* grass", "1. dog\n2. grass", "1) dog\n2) grass", "• dog • grass", "dog\tgrass",
        "a dog, the grass", "Dog.\nGrass.".lower(), "«dog», „grass“", "dog، grass", "dog：、grass。", "dog: , grass!",
    ],
)  # fmt: skip
def test_a_pasted_list_is_a_list(pasted: str) -> None:
    assert clean_names(pasted) == ["dog", "grass"]


@pytest.mark.parametrize(
    "typed", ['"dog"', "[dog]", "(dog)", "dog.", "dog:", "'dog'", "“dog”", "- dog", "1. dog", "the dog", "dog )"]
)
def test_marks_are_no_part_of_a_name(typed: str) -> None:
    assert clean_names(typed) == clean_names([typed]) == ["dog"]


@pytest.mark.parametrize(
    "name", ["orange (fruit)", "jack-o'-lantern", "St. Bernard", "t-shirt", "3d printer", "7 up", "vitamin a", "u.s. flag"]
)
def test_marks_inside_a_name_stay(name: str) -> None:
    assert clean_names(name) == [name]


def test_marks_alone_are_no_name() -> None:
    with pytest.raises(InvalidNamesError, match="at least one"):
        clean_names('"", [], . , ( )')


def test_hyphens_part_kinds_in_coco_stuff_alone() -> None:
    learned = SeenNames(["wall-brick", "fire-hydrant", "T-shirt", "ice-cream"])
    assert "wall" in learned and "T-shirts" in learned and "fire-hydrant" in learned
    assert not [word for word in ("fire", "t", "ice", "cream") if word in learned]
