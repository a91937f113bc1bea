"""The evaluator on tiny towers and tiny data."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from sklearn.metrics import average_precision_score, confusion_matrix

from ldvc.checkpoint import save_checkpoint
from ldvc.class_names import load_classes, load_split
from ldvc.config import ModelConfig
from ldvc.errors import LdvcError
from ldvc.inference import cut_windows, normalise
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from ldvc.predictor import Predictor
from tests import forked
from tests.tiny_data import make_benchmarks, make_set
from train import evaluate as evaluator
from train.data import FolderDataset
from train.evaluate import chosen_inference, measures, open_predictor
from train.evaluation import Photo, PhotoReader, Photos, Question, evaluate_set
from train.tables import class_tables, describe_inference, markdown, quoted_benchmark


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_config: ModelConfig, tiny_clip: FrozenClip) -> Path:
    metadata = {"seen_names": ["grass", "sky", "dog"], "inference": {"long_side": 80}, "calibration": {"scale": 1.0}}
    return save_checkpoint(LDVC(tiny_config, tiny_clip), tmp_path / "model", metadata=metadata)


def evaluate(root: Path, checkpoint: Path, **options: object) -> dict:
    """Opens a checkpoint and evaluates it on both data sets."""
    datasets = [FolderDataset(root / "data" / name, "val") for name in ("meadow", "pets")]
    return evaluator.evaluate(open_predictor(str(checkpoint)), datasets, **options)


@torch.no_grad()
def slow_maps(model: LDVC, image: Image.Image, names: list[str], threshold: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and the last layer's attention (C, H, W) at the photo's size, upsampled by PyTorch."""
    _, _, (pixels,) = cut_windows(image, inference={"long_side": image.width}, patch=16)
    output = model(normalise(pixels, model.clip)[None], names, return_attention=True)
    odds = output.cross_attention[-1].mean(dim=1).exp()
    attention = odds / (odds.sum(dim=1, keepdim=True) + threshold / (1 - threshold))  # with "none of these"
    maps = torch.cat([output.mask_logits, attention])
    scores, attention = F.interpolate(maps, scale_factor=16, mode="bilinear")[..., : image.height, : image.width]
    return scores.sigmoid(), attention


def test_numbers_equal_a_slow_evaluation(tmp_path: Path, tiny_config: ModelConfig, tiny_clip: FrozenClip) -> None:
    names = ["dog", "cat", "grass", "sky", "other"]
    dataset = FolderDataset(make_set(tmp_path / "zoo", ["background", *names], background=0), "val")
    model = LDVC(tiny_config, tiny_clip).eval()
    shown = [slow_maps(model, dataset.image(index), names)[0] for index in range(len(dataset))]
    threshold = float(torch.stack(shown).amax(dim=1).median())  # half of the pixels are none of the names
    predictor = Predictor(model, {"inference": {"long_side": 84}, "calibration": {"threshold": threshold}})
    seen = [name in ("dog", "sky") for name in names]
    found = evaluate_set(predictor, dataset, Photos(), seen=seen)
    offset = torch.tensor([0.1, 0.0, 0.0, 0.1, 0.0])[:, None, None]
    counts = {way: np.zeros((5, 5)) for way in ("joint", "offset", "present")}
    pixels, right, values = 0, 0, {key: [] for key in ("iou_present", "fragments", "attention_ap 2", "attention_contrast 2")}
    for photo, joint in zip(PhotoReader(dataset), shown, strict=True):
        image, mask = dataset.pair(photo.index)
        mask = torch.from_numpy(mask).long()  # 0 background, 1 dog, ..., 255 void
        present = [number for number in range(5) if (mask == number + 1).any()]
        given, _ = slow_maps(model, image, [names[number] for number in present])
        choice = {"joint": joint.argmax(0), "offset": (joint - offset).argmax(0)}
        choice["present"] = torch.tensor(present)[given.argmax(0)]
        for way, guess in choice.items():
            counts[way] += confusion_matrix((mask - 1).flatten(), guess.flatten(), labels=range(5))
        asked = Question.about(photo, 5).names
        scores, attention = slow_maps(model, image, [names[number] for number in asked], threshold)
        labels = torch.tensor(asked)[scores.argmax(0)].where(scores.amax(0) >= threshold, torch.tensor(-1))
        valid = mask != 255
        pixels, right = pixels + int(valid.sum()), right + int((labels == mask - 1)[valid].sum())
        for place, number in enumerate(present):
            guess, truth = labels == number, mask == number + 1
            values["iou_present"].append(float((guess & truth).sum() / ((guess | truth) & valid).sum()))
            sizes = np.bincount(ndimage.label(guess, np.ones((3, 3)))[0].ravel())[1:]
            values["fragments"].append((sizes >= 64).sum())
            ranked, inside = attention[place][valid].numpy(), truth[valid].numpy()
            values["attention_ap 2"].append(average_precision_score(inside, ranked))
            values["attention_contrast 2"].append(ranked[inside].mean() - ranked[~inside].mean())
    for way, matrix in counts.items():
        assert np.abs(getattr(found, way).counts.numpy() - matrix).sum() <= 4, way  # pixels on an edge may round either way
    assert found.question["right"] == pytest.approx(right / pixels, abs=1e-3) and 0 < right < pixels
    for key, measured in values.items():
        assert found.question[key] == pytest.approx(np.mean(measured), abs=2e-3), key
    assert found.question["fragments_truth"] == 1
    columns = measures(found, seen)
    for suffix, way in (("", "joint"), ("_offset", "offset")):
        iou = getattr(found, way).iou()
        expected = (float(iou[[0, 3]].nanmean()), float(iou[[1, 2, 4]].nanmean()))
        assert (columns[f"mIoU_S{suffix}"], columns[f"mIoU_U{suffix}"]) == pytest.approx(expected)


def test_a_question_has_the_present_names_and_three_others() -> None:
    target = torch.tensor([[4, 4, -1], [-2, 1, 1]])
    first, again, other = (Question.about(Photo(0, stem, np.zeros((2, 3, 3)), target), 12) for stem in "aab")
    assert first.names == again.names != other.names, "the stem is the seed"
    assert first.present == 2 and first.names[:2] == [1, 4] and len(set(first.names)) == 5
    assert first.truth.tolist() == [[1, 1, -1], [-1, 0, 0]] and first.valid.tolist() == [[True, True, False], [True] * 3]
    assert len(Question.about(Photo(0, "a", np.zeros((2, 3, 3)), target.clamp(max=1)), 2).names) == 2, "only one is absent"


def test_seen_and_unseen_classes_are_separated_and_patch_tokens_cached(
    root: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "cache")
    result = evaluate(root, checkpoint, cache_dir=cache)
    assert result["decoder"] == "ldvc" and result["sets"]["meadow"]["unseen"] == ["aeroplane"]
    pets = result["sets"]["pets"]
    assert pets["unseen"] == ["cat"] and pets["mIoU_U"] == pytest.approx(pets["iou"]["cat"])
    assert len(list(Path(cache).glob("patch-tokens-*/*.pt"))) == 6
    monkeypatch.setattr("ldvc.predictor.encode_picture", None)  # a second evaluation must not encode photos again
    again = evaluate(root, checkpoint, cache_dir=cache, unseen=frozenset())
    assert again["sets"]["pets"]["pAcc"] == pets["pAcc"] and math.isnan(again["sets"]["pets"]["mIoU_U"])
    for measure in ("right", "iou_present", "attention_ap", "attention_contrast", "fragments", "present_accuracy"):
        assert again["sets"]["meadow"][measure] == result["sets"]["meadow"][measure], measure
    table = markdown([result, again])
    assert "### meadow val, 3 photos; unseen: differ" in table and "| ldvc |" in table and "| - |" in table
    (dog, cat), counts = pets["classes"], np.array(pets["confusion"])
    assert dog["pixels"] == counts[0].sum() and cat["predicted_pixels"] == counts[:, 1].sum()
    assert cat["accuracy"] == pytest.approx(counts[1, 1] / counts[1].sum())
    assert (dog["seen_as"], cat["seen_as"], cat["seen"]) == ("dog", None, False)
    assert f"\n| cat | {cat['pixels']} | **unseen** | {cat['iou']:.3f}" in class_tables([result, again])


def test_patch_tokens_are_cached_per_photo_and_size(tmp_path: Path, tiny_config: ModelConfig, tiny_clip: FrozenClip) -> None:
    dataset, photos = FolderDataset(make_set(tmp_path / "pets", ["dog", "cat"]), "val"), Photos(str(tmp_path))
    predictor = Predictor(LDVC(tiny_config, tiny_clip), {"inference": {"long_side": 84}, "calibration": {}})
    before = photos.patch_token_folder(dataset, predictor)
    dataset.classes = ["hound", "kitten"]
    assert photos.patch_token_folder(dataset, predictor) == before, "other names of the classes"
    photo = dataset.photo_path(dataset.stems[0])
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photo)
    after = photos.patch_token_folder(dataset, predictor)
    predictor.inference = {"long_side": 96}
    assert len({before, after, photos.patch_token_folder(dataset, predictor)}) == 3


def test_plain_similarity_uses_the_settings_of_the_checkpoint_beside_it(
    root: Path, checkpoint: Path, tiny_clip_folder: Path, tmp_path: Path
) -> None:
    path = checkpoint / "config.json"
    clip_calibration = {"scale": 2.0, "bias": 1.0, "threshold": 0.25}
    inference = {"long_side": 96, "enlarge": 1.25}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inference": inference, "clip_calibration": clip_calibration}))
    words = ["--checkpoint", str(checkpoint), "--plain_clip", str(tiny_clip_folder)]
    words += ["--data", str(root / "data"), "--sets", "pets"]
    evaluator.main([*words, "--joint_only", "--output", str(tmp_path / "both")])
    assert "acc, present names" not in (tmp_path / "both.md").read_text(), "the literature's measures only"
    plain, own = json.loads((tmp_path / "both.json").read_text())
    assert (plain["decoder"], own["decoder"]) == ("clip", "ldvc"), "the reference comes first"
    assert plain["inference"] == own["inference"] == inference
    assert plain["calibration"] == clip_calibration != own["calibration"]
    evaluator.main([*words, "--calibrate", "--output", str(tmp_path / "both")])
    plain, own = json.loads((tmp_path / "both.json").read_text())
    stored = json.loads(path.read_text())
    assert stored["clip_calibration"] == plain["calibration"] != clip_calibration
    assert stored["calibration"] == own["calibration"]


def test_calibration_is_written_and_finds_the_best_threshold(root: Path, checkpoint: Path) -> None:
    def quality(result: dict[str, Any]) -> float:  # each set weighs the same
        return sum(facts["right"] + facts["iou_present"] for facts in result["sets"].values())

    before, fitted = evaluate(root, checkpoint)["sets"]["pets"], evaluate(root, checkpoint, fit=True)
    path = checkpoint / "config.json"
    stored = json.loads(path.read_text())
    assert stored["calibration"] == fitted["calibration"] and stored["calibration"]["scale"] > 0
    after = evaluate(root, checkpoint)
    assert quality(after) == quality(fitted) and after["sets"]["pets"]["pAcc"] == before["pAcc"]
    for threshold in (0.01, 0.2, 0.5, 0.8, 0.99):
        path.write_text(json.dumps(stored | {"calibration": stored["calibration"] | {"threshold": threshold}}))
        assert quality(after) >= quality(evaluate(root, checkpoint)) - 1e-3, threshold


def test_options_change_the_inference_settings_of_the_checkpoint() -> None:
    lite, bundled = {"long_side": 448}, {"long_side": 576, "enlarge": 1.4}
    sliding = {"short_side": 60, "window": 32, "stride": 24}
    for own, given, expected in (
        (lite, {}, lite),
        (lite, {"mode": "slide"}, {"short_side": 512, "window": 512, "stride": 426}),
        (bundled, {"mode": "whole"}, bundled),
        (bundled, {"long_side": 448}, {"long_side": 448, "enlarge": 1.4}),
        (bundled, {"enlarge": 2.0}, {"long_side": 576, "enlarge": 2.0}),
        (bundled, {"short_side": 300}, {"short_side": 300}),
        (sliding, {"mode": "whole"}, {"short_side": 60}),
        (sliding, {"stride": 8}, {"short_side": 60, "window": 32, "stride": 8}),
    ):
        assert chosen_inference({"inference": own}, given) == expected
    assert "at most 1.4 times enlarged" in describe_inference(bundled)
    for wrong, words in (
        ({"mode": "whole", "window": 64}, "--window and --stride belong to --mode slide"),
        ({"mode": "slide", "long_side": 64}, "Give --long_side alone"),
        ({"long_side": 64, "short_side": 64}, "Give --long_side alone"),
        ({"mode": "slide", "stride": 600}, "leaves gaps between windows"),
        ({"enlarge": 0.0}, "'enlarge' .* must be a positive number"),
    ):
        with pytest.raises(LdvcError, match=words):
            chosen_inference({"inference": lite}, wrong)


def test_published_numbers_are_shown_for_their_benchmark_only() -> None:
    unseen, coco = sorted(load_split("voc12")), sorted(load_split("coco_stuff"))
    for layout, photos, classes, own_words, held_out, expected in (
        ("voc", 1449, "voc20", True, unseen, "voc"),
        ("coco_stuff", 5000, "coco_stuff171", True, coco, "coco_stuff"),
        ("voc", 1449, "voc20", True, unseen[:4], None),
        ("voc", 145, "voc20", True, unseen, None),
        ("folder", 1449, "voc20", True, unseen, None),
        ("voc", 1449, "voc20", False, unseen, None),
    ):
        dataset = MagicMock(layout=layout, own_words=own_words, split="val", __len__=lambda _, photos=photos: photos)
        dataset.names.return_value = load_classes(classes)
        assert quoted_benchmark(dataset, held_out) == expected


def test_command_line_in_one_and_two_processes(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = make_set(tmp_path / "data" / "meadow", ["grass", "sky", "aeroplane", "dog"], photos=5)
    (folder / "val.txt").write_text("\n".join(f"photo{number}" for number in range(5)))
    (folder / "images" / "photo3.jpg").write_bytes(b"no photo")
    words = ["--checkpoint", str(checkpoint), "--data", str(tmp_path / "data"), "--sets", "meadow"]
    words += ["--mode", "slide", "--short_side", "60", "--window", "32", "--stride", "24"]
    words += ["--calibrate", "--layers", "--output"]
    evaluator.main([*words, str(tmp_path / "out" / "one")])
    assert forked.run(evaluator.main, [*words, str(tmp_path / "out" / "two")], processes=2) == [0, 0]
    one, two = (json.loads((tmp_path / "out" / f"{name}.json").read_text())[0] for name in ("one", "two"))
    assert one["sets"]["meadow"].pop("seconds") and two["sets"]["meadow"].pop("seconds")
    result = one["sets"]["meadow"]
    (sentence,) = result["broken"]
    assert "photo3" in sentence and result["photos"] == 4
    assert sum(map(sum, result["confusion"])) == 4 * 60 * 80, "every labelled pixel of the four photos, once"
    for name, value in result.items():
        other = two["sets"]["meadow"][name]
        exact = not isinstance(value, float) and not name.endswith("by_layer")
        assert other == (value if exact else pytest.approx(value, abs=1e-9)), name
    assert one["calibration"] == pytest.approx(two["calibration"]) and one["calibration"]["scale"] != 1
    table = (tmp_path / "out" / "one.md").read_text()
    assert table.startswith(capsys.readouterr().out.rstrip("\n")) and "class by class" in table
    assert "AP, layer 1 | AP, layer 2 | contrast, layer 1" in table and "Fragments in the truth: 1.000." in table
    assert "short side 60, windows of 32 every 24 pixels" in table and f"- {sentence}" in table
    assert Image.open(tmp_path / "out" / "one-ldvc-meadow.png").width > 100
    assert one["command"] == shlex.join(["python", "train/evaluate.py", *words, str(tmp_path / "out" / "one")])
    assert one["command"] in (tmp_path / "out" / "one.csv").read_text()


def test_trained_on_coco_stuff_tested_on_voc_and_context(
    tmp_path: Path, tiny_config: ModelConfig, tiny_clip: FrozenClip, capsys: pytest.CaptureFixture
) -> None:
    make_benchmarks(tmp_path / "data")
    seen = [name for name in load_classes("coco_stuff171") if name not in load_split("coco_stuff")]
    metadata = {"seen_names": seen, "inference": {"short_side": 48, "window": 48, "stride": 40}}
    models = [LDVC(replace(tiny_config, decoder=decoder), tiny_clip) for decoder in ("ldvc", "zegclip")]
    folders = [str(save_checkpoint(model, tmp_path / model.config.decoder, metadata=metadata)) for model in models]
    words = ["--checkpoint", *folders, "--data", str(tmp_path / "data"), "--sets", "voc2012", "pascal_context59"]
    evaluator.main([*words, "--joint_only", "--output", str(tmp_path / "cross")])
    table, results = capsys.readouterr().out, json.loads((tmp_path / "cross.json").read_text())
    assert "### voc2012 val, 2 photos; unseen: cow" in table and table.count("| zegclip |") == 2
    assert "quoted" not in table, "two photos are no benchmark"
    voc, context = (results[0]["sets"][name] for name in ("voc2012", "pascal_context59"))
    rows = {row["name"]: row for row in voc["classes"]}
    assert rows["tv monitor"]["seen_as"] == "tv" and rows["cow"]["seen_as"] is None
    assert rows["person"]["pixels"] == 48 * 36 and rows["cat"]["iou"] is None, "no cat in the truth"
    assert voc["mIoU_S"] is not None and voc["mIoU_U"] is None, "no cow in the truth"
    grass = next(row for row in context["classes"] if row["name"] == "grass")
    assert not grass["seen"] and context["mIoU_U"] == pytest.approx(grass["iou"])
    figures = {path.name for path in tmp_path.glob("cross-2-*.png")}
    assert figures == {"cross-2-zegclip-voc2012.png", "cross-2-zegclip-pascal_context59.png"}


def test_errors_of_the_user_are_sentences(root: Path, checkpoint: Path, tmp_path: Path) -> None:
    data, chosen = tmp_path / "data", ["--checkpoint", str(checkpoint)]
    pets = ["--data", str(root / "data"), "--sets", "pets"]
    broken, blank = (make_set(data / name, ["grass", "sky"], photos=1) for name in ("broken", "blank"))
    (broken / "masks" / "photo0.png").write_bytes(b"")
    Image.new("L", (84, 60), 255).save(blank / "masks" / "photo0.png")
    for words, message in (
        ([*chosen, "--data", str(tmp_path / "nowhere")], "nowhere"),
        (pets, "--checkpoint"),
        ([*pets, "--checkpoint", "lite", "--calibrate"], "lite is no local checkpoint folder"),
        ([*pets, *chosen, "--mode", "slide", "--stride", "999"], "gaps"),
        ([*chosen, "--data", str(data), "--sets", "broken"], "Not one photo of broken can be read"),
        ([*chosen, "--data", str(data), "--sets", "broken", "--calibrate"], "nothing to calibrate on"),
        ([*chosen, "--data", str(data), "--sets", "blank"], "Not one mask of blank val labels a pixel"),
        ([*pets, *chosen, "--output", str(blank / "dataset.json" / "result")], "cannot be written: .* give another --output"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluator.main(words)
