"""Other words for a class: which ones count, which one a step reads, and what the losses make of it."""

import json
import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch

from ldvc import Predictor
from ldvc.checkpoint import load_checkpoint, save_checkpoint
from ldvc.class_names import SeenNames, canonical
from ldvc.config import ModelConfig
from ldvc.errors import DataError
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from tests.forked import Configure
from tests.tiny import close_gates
from tests.tiny_data import make_set
from train import evaluate as evaluator
from train.config import load_config
from train.data import Vocabulary, WordSampler, open_sets
from train.data.vocabulary import read_other_words, rename_classes
from train.objective import Objective, usable_distillation_names
from train.train import train

LISTS = Path(__file__).parents[1] / "recipes" / "lite"
SHIPPED = ["recipes/lite/synonyms.json", "recipes/lite/hyponyms.json"]
OTHERS = {"grass": ["lawn", " Green_Meadow"], "dog": ["puppy", "kitten", "sky"], "airplane": ["jet"], "whale": ["orca"]}


def test_words_that_name_another_class_do_not_count(root: Path) -> None:
    datasets = open_sets(root / "data", ["meadow", "pets"], "train")
    vocabulary = Vocabulary(datasets, frozenset({"cat"}), other_words=OTHERS)
    # "kitten" means the held-out cat, "sky" is learned itself, and nothing shows a whale.
    assert vocabulary.texts == ["grass", "sky", "aeroplane", "dog"]
    assert vocabulary.other_words == [["lawn", "green meadow"], [], ["jet"], ["puppy"]]
    assert vocabulary.words == [*vocabulary.texts, "lawn", "green meadow", "jet", "puppy"]
    assert vocabulary.spellings == ["grass", "sky", "airplane", "aeroplane", "dog"]
    assert usable_distillation_names(["puppy", "whale", "kitten"], vocabulary, frozenset({"cat"})) == ["whale"]
    unnamed = Vocabulary(datasets, frozenset({"dog"}), transductive=True, other_words=OTHERS)
    assert unnamed.names[-1] == "dog" and unnamed.other_words[-1] == [], "of a held-out class only the name is known"


def test_a_step_reads_another_word_now_and_then() -> None:
    others = [["lawn", "meadow"], [], ["jet"]]  # places 3, 4 and 5 behind the three names
    names = torch.tensor([0, 1, 2])
    sampler = WordSampler(others, share=0.4, seed=0)
    read = torch.stack([sampler.sample(step, names) for step in range(500)])
    assert [column.unique().tolist() for column in read.T] == [[0, 3, 4], [1], [2, 5]]
    assert 0.3 < (read[:, 0] != 0).float().mean() < 0.5
    assert 0.4 < (read[:, 0] == 3).sum() / (read[:, 0] != 0).sum() < 0.6
    assert torch.equal(WordSampler(others, share=0.4, seed=0).sample(17, names), read[17])  # whatever was drawn before
    assert torch.equal(sampler.sample(17, names[1:]), read[17, 1:])
    assert any(not torch.equal(WordSampler(others, share=0.4, seed=1).sample(s, names), read[s]) for s in range(20))
    assert WordSampler(others, share=0.0, seed=0).sample(3, names).tolist() == [0, 1, 2]
    assert WordSampler(others, share=1.0, seed=0).sample(3, names).tolist()[1:] == [1, 5]


@torch.no_grad()
def test_losses_are_those_of_the_word_that_is_read(
    configure: Configure, root: Path, tiny_clip: FrozenClip, tmp_path: Path
) -> None:
    """Reading "lawn" for "grass" costs what it costs where the data set itself calls the class "lawn"."""
    make_set(tmp_path / "lawns", ["lawn", "sky", "aeroplane", "dog"])
    changes = ("unseen=none", "decoder=zegclip", "distill_unannotated_weight=1")
    config = configure("words", *changes)
    model = close_gates(LDVC(config.model, tiny_clip)).eval()  # the logits of zegclip are then CLIP's own
    meadow = Vocabulary(open_sets(root / "data", ["meadow"], "train"), other_words=OTHERS)
    lawns = Vocabulary(open_sets(tmp_path, ["lawns"], "train"))
    one, other = (Objective(model, vocabulary, ["teapot"], config) for vocabulary in (meadow, lawns))
    labels = torch.randint(-1, 4, (1, 16, 16)).short()
    batch = {"patch_tokens": torch.randn(1, 64, 4, 4), "labels": labels, "set": torch.tensor([0])}
    names, distilled = torch.arange(4), torch.tensor([0])
    words = torch.tensor([meadow.words.index("lawn"), 1, 2, 3])
    read, plain, expected = one(batch, names, distilled, words), one(batch, names, distilled), other(batch, names, distilled)
    torch.testing.assert_close([read["focal"], read["dice"]], [expected["focal"], expected["dice"]])
    assert read["focal"].item() != pytest.approx(plain["focal"].item(), rel=1e-4)

    unannotated = {**batch, "labels": torch.full((1, 16, 16), -1, dtype=torch.int16)}
    one.annotated = torch.zeros_like(one.annotated)  # a set that annotates none of the names: all are distilled
    assert one(unannotated, names, distilled, words)["distill"].item() == pytest.approx(0, abs=1e-4)


@torch.no_grad()
def test_a_word_of_several_names_is_no_negative(configure: Configure, tiny_clip: FrozenClip, tmp_path: Path) -> None:
    """"animal", read for the dog, must not be learned as absent from a photo of a cat."""
    make_set(tmp_path / "pets", ["dog", "cat", "sky", "grass"])
    config = configure("words", "unseen=none")
    model = LDVC(config.model, tiny_clip).eval()
    words = {"dog": ["hound", "animal"], "cat": ["animal"]}
    vocabulary = Vocabulary(open_sets(tmp_path, ["pets"], "train"), other_words=words)
    objective = Objective(model, vocabulary, [], config)
    hound, animal = (vocabulary.words.index(word) for word in ("hound", "animal"))
    assert vocabulary.shared.tolist() == [word == "animal" for word in vocabulary.words]

    def focal(dog: int, labels: int, *, annotated: bool = True) -> float:
        objective.annotated = torch.tensor([[annotated, True, True, True]])
        target = torch.full((1, 16, 16), labels).short()
        batch = {"patch_tokens": torch.ones(1, 64, 4, 4), "labels": target, "set": torch.tensor([0])}
        return objective(batch, torch.arange(4), torch.arange(0), torch.tensor([dog, 1, 2, 3]))["focal"].item()

    cat, dog = 1, 0
    assert focal(animal, cat) == pytest.approx(focal(animal, cat, annotated=False), rel=1e-6)
    assert focal(hound, cat) != pytest.approx(focal(hound, cat, annotated=False), rel=1e-3)
    assert focal(animal, dog) != pytest.approx(focal(animal, dog, annotated=False), rel=1e-3)


def test_the_checkpoint_of_a_run_with_other_words_lists_them(configure: Configure, tmp_path: Path) -> None:
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"grass": ["lawn"], "cat": ["tomcat"]}))
    folder = train(configure("words_run", f"other_words={file}"))
    _, metadata = load_checkpoint(folder)
    assert metadata["seen_names"][0] == "grass" and metadata["seen_words"] == {"grass": ["lawn"]}  # cats are held out
    seen = SeenNames(metadata["seen_names"], metadata["seen_words"])
    assert seen.source("lawn") == seen.source("lawns") == "grass" and "tomcat" not in seen
    assert Predictor.from_pretrained(folder).seen_names.source("lawn | pitch") == "grass"


def test_lists_of_other_words(tmp_path: Path) -> None:
    content = read_other_words(SHIPPED)
    assert content == read_other_words([str(LISTS.parents[1] / path) for path in SHIPPED])
    assert load_config("lite_release").other_words == load_config("lite_tune").other_words == SHIPPED
    words = list(chain.from_iterable(content.values()))
    assert len(set(words)) == len(words) > 200, "a word for two classes would be taught both ways"
    assert not set(words) & set(content) and all(canonical(name) == name for name in content)
    synonyms = read_other_words(load_config("lite_experiment").other_words)
    assert "puppy" in synonyms["dog"] and "poodle" not in synonyms["dog"] and "poodle" in content["dog"]
    assert content["dog"] == synonyms["dog"] + read_other_words(SHIPPED[1])["dog"]
    file = tmp_path / "wrong.json"
    with pytest.raises(DataError, match="wrong.json cannot be used"):
        read_other_words(str(file))
    for wrong in ('["lawn"]', '{"grass": "lawn"}', "{", '{"grass": [3]}'):
        file.write_text(wrong)
        with pytest.raises(DataError, match="it should hold"):
            read_other_words(str(file))


def test_words_that_measure_are_words_that_were_not_learned() -> None:
    """The published figure for words that no decoder read: none of them may count as seen by the shipped checkpoints."""
    config = json.loads((LISTS.parents[1] / "assets" / "lite" / "ldvc" / "config.json").read_text())
    seen = SeenNames(config["seen_names"], config["seen_words"])
    words = json.loads((LISTS / "unlearned_words.json").read_text())
    assert len(words) == 23 and not [word for word in words.values() if word in seen]
    assert all(name in seen for name in words)


def test_classes_asked_for_by_other_words(root: Path, tiny_config: ModelConfig, tiny_clip: FrozenClip, tmp_path: Path) -> None:
    """--rename evaluates as if the data set had called its classes so."""
    metadata = {"seen_names": ["grass", "sky", "dog"], "inference": {"long_side": 80}}
    checkpoint = save_checkpoint(LDVC(tiny_config, tiny_clip), tmp_path / "model", metadata=metadata)
    words = tmp_path / "words.json"
    words.write_text(json.dumps({"grass": "lawn", "cat": "tabby"}))
    facts = (shutil.copytree(root / "data" / "meadow", tmp_path / "lawns") / "dataset.json").read_text()
    (tmp_path / "lawns" / "dataset.json").write_text(facts.replace('"grass"', '"lawn"'))
    same = ["--checkpoint", str(checkpoint), "--joint_only"]

    def results(data: Path, *rest: str) -> dict:
        evaluator.main([*same, "--data", str(data), "--output", str(tmp_path / "table"), "--sets", *rest])
        return json.loads((tmp_path / "table.json").read_text())[0]["sets"]

    renamed = results(root / "data", "meadow", "pets", "--rename", str(words))
    meadow, plain, expected = renamed["meadow"], results(root / "data", "meadow"), results(tmp_path, "lawns")
    assert [row["name"] for row in meadow["classes"]] == ["lawn", "sky", "aeroplane", "dog"]
    assert meadow["confusion"] == expected["lawns"]["confusion"] != plain["meadow"]["confusion"]
    assert meadow["unseen"] == ["lawn", "aeroplane"] and renamed["pets"]["unseen"] == ["tabby"]

    datasets = open_sets(root / "data", ["meadow", "pets"], "val")
    words.write_text('{"cat": "tabby"}')
    rename_classes(datasets, str(words))
    assert [dataset.own_words for dataset in datasets] == [True, False]

    for content, message in (
        ('{"whale": "orca"}', "No data set has the class whale"),
        ('{"grass": "sky"}', "meadow has two classes called sky"),
        ('["lawn"]', "no list of words by class"),
        ("{", "cannot be used"),
    ):
        words.write_text(content)
        with pytest.raises(SystemExit, match=message):
            evaluator.main([*same, "--data", str(root / "data"), "--sets", "meadow", "--rename", str(words)])
