"""Class lists, splits, the three settings, and the shipped configurations against the published numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ldvc.checkpoint import load_checkpoint
from ldvc.class_names import canonical_set, load_classes, load_split
from ldvc.errors import DataError
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from tests.tiny_data import make_benchmarks, make_voc
from train.config import CONFIG_FOLDER, ConfigError, TrainConfig, load_config
from train.data import HELD_OUT, VOID, Vocabulary, open_set, open_sets
from train.evaluate import evaluate, open_predictor
from train.losses import pseudo_labels
from train.objective import Objective
from train.train import build_vocabulary, train

# ZegCLIP's recipe, written a second time.
PUBLISHED = {
    "learning_rate": 2e-5, "prompt_multiplier": 10, "head_multiplier": 10, "weight_decay": 0.01,
    "warmup_steps": 1500, "power": 0.9, "minimum_learning_rate": 1e-6, "train_batch_size": 16,
    "gradient_accumulation_steps": 1, "loss_stride": 1, "views_per_photo": 0, "focal_weight": 100, "dice_weight": 1,
    "scale": (0.5, 2.0), "focal_alpha": 0.25, "focal_gamma": 2, "ignore_as_negative": True, "distill_per_step": 0,
    "distill_unannotated_weight": 0, "photometric": 0.5, "self_training_start": 0.5,
}  # fmt: skip
ZEGCLIP_SIZES = {
    "crop": 512, "short_side": 512, "long_side": None,
    "inference": {"short_side": 512, "window": 512, "stride": 426},
}  # fmt: skip
OTSEG_SIZES = {  # of OTSeg's configuration for PASCAL Context
    "crop": 480, "short_side": None, "long_side": 520,
    "inference": {"short_side": 520, "window": 480, "stride": 80},
}  # fmt: skip
MODEL = {
    "clip": "ViT-B-16-quickgelu", "pretrained": "openai", "visual_prompt_dropout": 0.1, "text_prompts": True,
    "text_adapter": True, "decoder_layers": 3, "decoder_heads": 8, "ffn_ratio": 4, "regions": 8, "topk": 4,
    "local_conv": True, "recipe": "published",
}  # fmt: skip
BENCHMARKS = {  # steps, visual prompts, held-out classes, sizes
    "voc12": ("voc2012", 20_000, 10, 5, ZEGCLIP_SIZES),
    "coco_stuff": ("coco_stuff164k", 80_000, 100, 15, ZEGCLIP_SIZES),
    "context": ("pascal_context59", 40_000, 10, 10, OTSEG_SIZES),
}
SETTINGS = ("inductive", "transductive", "fully_supervised")

# Numbers of the unseen classes in ZegCLIP's configurations (VOC, COCO-Stuff), and of ZS3Net's in mmsegmentation's Context.
UNSEEN = {
    "voc12": ("voc20", [15, 16, 17, 18, 19]),
    "coco_stuff": ("coco_stuff171", [19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160]),
    "context": ("context59", [0, 6, 7, 14, 19, 24, 31, 33, 48, 54]),
}


CLASSES = {  # list -> some places, among them the last
    "voc20": {0: "aeroplane", 10: "dining table", 14: "person", 15: "potted plant", 19: "tv monitor"},
    "coco80": {0: "person", 11: "stop sign", 60: "dining table", 79: "toothbrush"},
    "coco_stuff171": {0: "person", 80: "banner", 112: "grass", 137: "road", 145: "sky-other", 170: "wood"},
    # the converter numbers the 59 in the order of their ids among 459, which are alphabetical
    "context59": {0: "aeroplane", 1: "bag", 5: "bicycle", 39: "potted plant", 46: "sky", 58: "wood"},
}


@pytest.mark.parametrize("name", CLASSES)
def test_class_lists_have_the_official_order(name: str) -> None:
    classes = load_classes(name)
    assert len(classes) == len(set(classes)) == max(CLASSES[name]) + 1
    assert {place: classes[place] for place in CLASSES[name]} == CLASSES[name]
    with pytest.raises(DataError, match="voc20"):
        load_classes("voc21")


@pytest.mark.parametrize("split", UNSEEN)
def test_splits_hold_out_the_published_classes(split: str) -> None:
    classes, numbers = load_classes(UNSEEN[split][0]), UNSEEN[split][1]
    assert load_split(split) == canonical_set(classes[number] for number in numbers)
    assert len(load_split(split)) == len(numbers)
    assert load_split(None) == load_split("none") == frozenset()


def test_a_split_of_ones_own_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"unseen": ["aeroplane", "Zebra"]}')
    assert load_split(str(file)) == {"airplane", "zebra"}
    for content in ('{"seen": []}', '{"unseen": "cow"}', '{"unseen": [', '["cow"]'):
        file.write_text(content)
        with pytest.raises(DataError, match="mine.json cannot be used"):
            load_split(str(file))
    with pytest.raises(DataError, match="Known splits: coco_stuff, context"):
        load_split(str(tmp_path))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_benchmarks(tmp_path_factory.mktemp("settings"))


def test_vocabularies_of_the_settings(root: Path) -> None:
    voc = open_set(root, "voc2012", "train")
    numbers = [voc.classes.index(name) for name in ("potted plant", "sofa", "person")]
    inductive = Vocabulary([voc], load_split("voc12"))
    assert len(inductive) == 15 and not inductive.unseen.any()
    assert inductive.tables[0][numbers].tolist() == [VOID, VOID, 14]
    transductive = Vocabulary([voc], load_split("voc12"), transductive=True)
    assert transductive.names[:15] == inductive.names and transductive.unseen.tolist() == [False] * 15 + [True] * 5
    assert transductive.texts[15:] == ["potted plant", "sheep", "sofa", "train", "tv monitor"]
    assert transductive.tables[0][numbers].tolist() == [HELD_OUT, HELD_OUT, 14] and transductive.annotated.all()
    assert transductive.spellings == inductive.spellings, "seen are those with masks only"
    everything = Vocabulary([voc])
    assert len(everything) == 20 and (everything.tables[0][:20] == range(20)).all()


def test_texts_are_the_words_of_the_data_set(root: Path) -> None:
    voc, stuff = (open_set(root, name, "train") for name in ("voc2012", "coco_stuff164k"))
    alone, both = Vocabulary([voc]), Vocabulary([stuff, voc])
    assert alone.texts == voc.names() and "couch" in alone.names  # for comparisons; the text tower reads "sofa"
    place = both.names.index("couch")
    assert both.texts[place] == "couch" and both.annotated[:, place].all() and {"sofa", "couch"} <= set(both.spellings)


def test_pseudo_labels_against_a_loop_over_pixels() -> None:
    logits = torch.randn(2, 5, 3, 4) * 2
    labels = torch.randint(-3, 3, (2, 6, 8), dtype=torch.int16)
    candidates = torch.tensor([[False, False, False, True, True], [False, False, False, False, True]])
    large = F.interpolate(logits, size=(6, 8), mode="bilinear", align_corners=False)
    expected = labels.clone()
    for photo, y, x in (labels == HELD_OUT).nonzero().tolist():
        scores = {name: float(large[photo, name, y, x]) for name in range(5) if candidates[photo, name]}
        expected[photo, y, x] = max(scores, key=scores.get)
    assert not torch.equal(expected, labels) and torch.equal(pseudo_labels(logits, labels, candidates), expected)
    assert torch.equal(pseudo_labels(logits, labels, torch.zeros(2, 5, dtype=torch.bool)), labels)


def tiny(root: Path, clip: Path, config: str, name: str, *changes: str) -> TrainConfig:
    """A shipped benchmark configuration, made small."""
    small = ["pretrained=null", "visual_prompts=2", "decoder_layers=1", "decoder_heads=4", "regions=2", "topk=2"]
    small += ["crop=32", "short_side=48", "long_side=null", "max_train_steps=2", "train_batch_size=2", "num_workers=0"]
    small += ["warmup_steps=1", "learning_rate=1e-4", "checkpointing_steps=0", "inference={long_side: 64}"]
    return load_config(config, [*small, *changes], clip=str(clip), data=str(root), output_dir=str(root / "runs" / name))


@torch.no_grad()
def test_self_training_learns_the_models_own_labels(root: Path, tiny_clip_folder: Path, tiny_clip: FrozenClip) -> None:
    def objective(name: str) -> Objective:
        config = tiny(root, tiny_clip_folder, name, "x")
        vocabulary = build_vocabulary(config, open_sets(root, list(config.sets), "train"))
        torch.manual_seed(1)
        return Objective(LDVC(config.model, tiny_clip).eval(), vocabulary, [], config)

    transductive, inductive = objective("voc12_transductive"), objective("voc12_inductive")
    images, labels = torch.randn(2, 3, 32, 32), torch.full((2, 32, 32), VOID, dtype=torch.int16)
    labels[:, :10], labels[:, 10:20] = 14, HELD_OUT
    batch = {"images": images, "labels": labels, "set": torch.tensor([0, 0])}
    void = batch | {"labels": labels.masked_fill(labels == HELD_OUT, VOID)}
    seen, everything, none = torch.arange(15), torch.arange(20), torch.zeros(0, dtype=torch.int64)
    # before half-way the names are not learned, and held-out pixels are void
    before = transductive(batch, seen, none)
    assert torch.equal(before["loss"], inductive(void, seen, none)["loss"])
    # afterwards: the same loss as with the labels that the model gives
    logits = transductive.model(images, transductive.tokens[everything]).mask_logits
    own = F.interpolate(logits[:, 15:], size=(32, 32), mode="bilinear").argmax(dim=1).to(torch.int16) + 15
    after = transductive(batch, everything, none)
    given = transductive(batch | {"labels": torch.where(labels == HELD_OUT, own, labels)}, everything, none)
    assert torch.equal(after["loss"], given["loss"]) and not torch.equal(after["loss"], before["loss"])


def test_transductive_training_starts_as_the_inductive_and_resumes_as_itself(root: Path, tiny_clip_folder: Path) -> None:
    def run(name: str, **how: str) -> dict[int, dict[str, float]]:
        losses: dict[int, dict[str, float]] = {}
        # a batch takes every photo of the set, so that each has unseen pixels
        changes = ("max_train_steps=4", "train_batch_size=4", "checkpointing_steps=3")
        train(tiny(root, tiny_clip_folder, name, f"{name}_4", *changes), on_step=losses.setdefault, **how)
        return losses

    inductive, transductive = run("voc12_inductive"), run("voc12_transductive")
    assert [transductive[step] == inductive[step] for step in (1, 2, 3, 4)] == [True, True, False, False]
    shutil.rmtree(root / "runs" / "voc12_transductive_4" / "checkpoint-4")
    assert run("voc12_transductive", resume="latest") == {4: transductive[4]}


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_each_benchmark_is_trained_and_evaluated_in_each_setting(
    root: Path, tiny_clip_folder: Path, benchmark: str, setting: str
) -> None:
    steps, (name, _, _, unseen, _) = [], BENCHMARKS[benchmark]
    settings = tiny(root, tiny_clip_folder, f"{benchmark}_{setting}", f"{benchmark}_{setting}")
    folder = train(settings, on_step=lambda step, parts: steps.append(parts["loss"]))
    assert len(steps) == 2 and all(0 < loss < float("inf") for loss in steps)
    assert not (folder / "skipped.txt").exists()
    val = open_set(root, name, "val")
    found = evaluate(open_predictor(str(folder)), [val], unseen=load_split(settings.unseen), joint_only=True)["sets"][name]
    assert found["photos"] == 2 and len(found["unseen"]) == unseen and len(found["iou"]) == len(val.names())
    assert 0 <= found["pAcc"] <= 1 and 0 <= found["mIoU_U"] <= 1
    seen = len(val.names()) - (0 if setting == "fully_supervised" else unseen)  # no more than it had masks of
    assert len(canonical_set(load_checkpoint(folder)[1]["seen_names"])) == seen


def test_training_skips_and_lists_broken_photos(
    root: Path, tiny_clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    kit = make_voc(tmp_path)
    broken = kit / "JPEGImages" / "2008_000002.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    (kit / "SegmentationClass" / "2007_000042.png").unlink()  # of validation
    changes = ("max_train_steps=1", "train_batch_size=4", "validation_steps=1")
    folder = train(tiny(tmp_path, tiny_clip_folder, "voc12_inductive", "broken", *changes))
    assert len(list((folder / "figures").glob("*.png"))) == 1
    (line,) = (folder / "skipped.txt").read_text().splitlines()
    assert line.startswith("voc2012\t2008_000002\tThe photo ") and "Truncated" in line
    assert "1 of voc2012; listed in" in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_benchmark_configurations_are_the_published_ones(benchmark: str, setting: str) -> None:
    name, steps, prompts, unseen, sizes = BENCHMARKS[benchmark]
    config = load_config(f"{benchmark}_{setting}")
    expected = PUBLISHED | sizes | {"sets": {name: 1.0}, "max_train_steps": steps, "setting": setting}
    expected |= {"output_dir": f"runs/{benchmark}_{setting}", "self_training_from": steps // 2}
    assert {key: getattr(config, key) for key in expected} == expected
    model = MODEL | {"visual_prompts": prompts}
    assert {key: getattr(config.model, key) for key in model} == model
    assert len(config.held_out()) == (0 if setting == "fully_supervised" else unseen)
    assert len(load_split(config.unseen)) == unseen and config.augmentation().flip == 0.5


def test_the_defaults_of_the_trainer_are_the_published_ones_too() -> None:
    config, shipped = TrainConfig(sets={"voc2012": 1.0}), load_config("voc12_inductive")
    expected = PUBLISHED | ZEGCLIP_SIZES
    assert {key: getattr(config, key) for key in expected} == expected and config.setting == "inductive"
    for key in ("uniform_scale", "hue", "largest_class", "full_vocabulary", "max_train_steps", "aspect"):
        assert getattr(config, key) == getattr(shipped, key), key


def test_every_shipped_configuration_loads() -> None:
    for name in {path.stem for path in CONFIG_FOLDER.glob("*.yaml")} - {"lite_ablations"}:  # a table of changes
        config = load_config(name)
        config.augmentation(), config.held_out()


WRONG = {
    "max_train_steps=many": "max_train_steps must be a valid integer, not 'many'",
    "learning_rate=.nan": "learning_rate must be a finite number",
    "mixed_precision=half": "mixed_precision must be 'auto', 'no', 'bf16' or 'fp16', not 'half'",
    "sets={}": "no data sets",
    "sets={voc2012: a}": "sets.voc2012 must be a valid number",
    "sets={voc2012: 0}": "One of the weights of 'sets'",
    "views_per_photo={msrc: 2}": "views_per_photo needs a number for each data set",
    "scale=[2, 1]": "scale must be smallest and largest",
    "crop=481; loss_stride=6": "crop 481 must divide by loss_stride 6",
    "long_side=512": "exactly one of long_side and short_side",
    "setting=transductive; unseen=null": "unseen: voc12",
    "push_to_hub=true": "--hub_model_id",
    "inference={short_side: 512, window: 512.5, stride: 426}": "must be whole numbers of pixels",
    "inference={enlarge: 1.4}": "must name 'long_side' or 'short_side'",
    "inference={short_side: 512, window: 512}": "'window' and 'stride' together",
    "inference={short_side: 512, window: 400, stride: 426}": "a stride of 426 leaves gaps between windows of 400",
    "topk=0": "model.topk must be greater than 0",
    "model=3": "mapping of fields",
    "no_such_field=1": "no_such_field",
    "sets={": "not valid YAML",
    "nonsense": "key=value",
}


@pytest.mark.parametrize("changes", WRONG)
def test_a_wrong_setting_is_one_sentence(changes: str) -> None:
    with pytest.raises(ConfigError, match=WRONG[changes]) as error:
        load_config("voc12_inductive", changes.split("; "))
    assert "\n" not in str(error.value)


def test_numbers_as_people_write_them() -> None:
    changes = ["max_train_steps=2e4", "learning_rate=3e-4", "weight_decay=0", "lcsa_gate_init=5e-2", "mixed_precision=no"]
    config = load_config("msrc", [*changes, "inference={long_side: 448, enlarge: 1e1}", "output_dir=2026"])
    assert (config.max_train_steps, config.learning_rate, config.weight_decay) == (20_000, 3e-4, 0)
    assert config.model.lcsa_gate_init == 0.05 and config.inference == {"long_side": 448, "enlarge": 10}
    assert config.output_dir == "2026" and config.mixed_precision == "no"
