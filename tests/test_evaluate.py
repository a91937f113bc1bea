"""The evaluator and the experiment on tiny towers and tiny data."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ldvc.checkpoint import save_checkpoint
from ldvc.config import ModelConfig
from ldvc.data import FolderDataset, load_classes, load_split, normalise
from ldvc.errors import LdvcError
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from ldvc.names import SeenNames
from ldvc.pictures import cut_windows
from tests import forked
from tests.tiny_data import make_benchmarks, make_set, make_sets
from train import evaluate as evaluator
from train import tally
from train.evaluate import chosen_inference, evaluate, measures
from train.tables import _how, class_tables, markdown, quoted_benchmark
from train.tally import tally_set

SLIDING = {"short_side": 60, "window": 32, "stride": 24}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sets(tmp_path_factory.mktemp("evaluate") / "data")


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_config: ModelConfig, tiny_clip: FrozenClip) -> Path:
    metadata = {
        "seen_names": ["grass", "sky", "dog"],
        "calibration": {"scale": 1.0, "bias": 0.0},
        "inference": {"long_side": 80},
    }
    save_checkpoint(LDVC(tiny_config, tiny_clip), tmp_path / "model", metadata=metadata)
    return tmp_path / "model"


def slow_maps(model: LDVC, image: Image.Image, names: list[str], inference: dict[str, int]) -> torch.Tensor:
    """(C, H, W): logits of a photo shown in its own size, upsampled by PyTorch; windows are averaged as sigmoids."""
    canvas, windows, pixels = cut_windows(image, inference=inference, patch=16)
    assert canvas == (image.height, image.width)
    total, count = torch.zeros(len(names), *canvas), torch.zeros(canvas)
    for window, piece in zip(windows, pixels, strict=True):
        with torch.no_grad():
            logits = model(normalise(piece, model.clip.mean, model.clip.std)[None], names).mask_logits
        full = F.interpolate(logits, scale_factor=16, mode="bilinear", align_corners=False)[0]
        full = full[:, : window.height, : window.width]
        if len(windows) == 1:
            return full
        box = (slice(window.top, window.top + window.height), slice(window.left, window.left + window.width))
        total[:, box[0], box[1]] += full.sigmoid()
        count[box] += 1
    return torch.logit(total / count)


@pytest.mark.parametrize("inference", [{"long_side": 84}, SLIDING], ids=["whole", "slide"])
def test_numbers_equal_a_slow_evaluation(
    root: Path, tiny_config: ModelConfig, tiny_clip: FrozenClip, inference: dict[str, int]
) -> None:
    dataset = FolderDataset(root / "pets", "val")
    model = LDVC(tiny_config, tiny_clip).eval()
    names = dataset.names()
    found = tally_set(model, "ldvc", dataset, seen=lambda name: name == "dog", inference=inference, bf16=False)
    offset = torch.tensor([0.1, 0.0])[:, None, None]
    counts = {"joint": torch.zeros(2, 2), "offset": torch.zeros(2, 2), "present": torch.zeros(2, 2)}
    ious = {"joint": [], "present": [], "alone": []}
    for index in range(len(dataset)):
        image, mask = dataset.pair(index)
        mask = torch.from_numpy(mask).long()  # 0 background, 1 dog, 2 cat, 255 void
        joint = slow_maps(model, image, names, inference)
        present = [number for number in (0, 1) if (mask == number + 1).any()]
        given = slow_maps(model, image, [names[number] for number in present], inference)
        choice = {
            "joint": joint.argmax(0),
            "offset": (joint.sigmoid() - offset).argmax(0),
            "present": torch.tensor(present)[given.argmax(0)],
        }
        for way, guess in choice.items():
            for truth in (0, 1):
                for number in (0, 1):
                    counts[way][truth, number] += ((mask == truth + 1) & (guess == number)).sum()
        for place, number in enumerate(present):
            truth, valid = mask == number + 1, mask != 255
            for way, logits in (
                ("joint", joint[number]),
                ("present", given[place]),
                ("alone", slow_maps(model, image, [names[number]], inference)[0]),
            ):
                positive = (logits >= 0) & valid
                ious[way].append(float((positive & truth).sum() / ((positive | truth) & valid).sum()))
    for way, matrix in counts.items():
        assert (getattr(found, way).counts - matrix).abs().sum() <= 4, way  # pixels on an edge may round either way
    for way, values in ious.items():
        assert found.curves[way].mean_iou_at(0.0) == pytest.approx(np.mean(values), abs=2e-3), way


def test_evaluate_tells_seen_from_unseen_and_caches(
    root: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = [FolderDataset(root / name, "val") for name in ("meadow", "pets")]
    cache = str(tmp_path / "cache")
    result = evaluate(str(checkpoint), datasets, cache_dir=cache)
    assert result["arm"] == "ldvc" and result["sets"]["meadow"]["unseen"] == ["aeroplane"]
    pets = result["sets"]["pets"]
    assert pets["unseen"] == ["cat"] and pets["mIoU_U"] == pytest.approx(pets["iou"]["cat"])
    assert len(list(Path(cache).glob("stems-*/*.pt"))) == 6
    monkeypatch.setattr(tally, "cut_windows", None)  # a second evaluation must not touch photos again
    again = evaluate(str(checkpoint), datasets, cache_dir=cache, unseen=frozenset())
    assert again["sets"]["pets"]["pAcc"] == pets["pAcc"] and math.isnan(again["sets"]["pets"]["mIoU_U"])
    table = markdown([result, again])
    assert "### meadow val, 3 photos; unseen: differ" in table and "| ldvc |" in table and "| - |" in table
    dog, cat = pets["classes"]
    counts = np.array(pets["confusion"])
    assert dog["pixels"] == counts[0].sum() and cat["predicted_pixels"] == counts[:, 1].sum()
    assert cat["accuracy"] == pytest.approx(counts[1, 1] / counts[1].sum())
    assert (dog["seen_as"], cat["seen_as"], cat["seen"]) == ("dog", None, False)
    lines = class_tables([result, again]).splitlines()
    assert any(line.startswith(f"| cat | {cat['pixels']} | **unseen** | {cat['iou']:.3f}") for line in lines)


def test_stems_are_kept_for_photos_as_they_are(tmp_path: Path, tiny_clip: FrozenClip) -> None:
    make_sets(tmp_path / "data")
    dataset = FolderDataset(tmp_path / "data" / "pets", "val")

    def folder() -> Path:
        return tally.StemCache.of(tmp_path, dataset, tiny_clip, {"long_side": 84}, torch.float32, "towers").folder

    before = folder()
    dataset.classes = ["nothing", "hound", "kitten"]
    assert folder() == before, "asked for by other words"
    photo = dataset.photo_path(dataset.stems[0])
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photo)
    assert folder() != before


def test_plain_similarity_needs_no_checkpoint(root: Path, tiny_clip_folder: Path) -> None:
    datasets = [FolderDataset(root / "pets", "val")]
    result = evaluate(
        str(tiny_clip_folder), datasets, arm="clip", unseen=load_split("lite_experiment"), joint_only=True
    )
    assert result["sets"]["pets"]["unseen"] == ["cat"] and 0 <= result["sets"]["pets"]["pAcc"] <= 1
    assert math.isnan(result["sets"]["pets"]["present_accuracy"]), "the literature's measures only"
    assert "acc, present names" not in markdown([result])


def test_plain_similarity_is_shown_photos_as_the_checkpoint_beside_it(
    root: Path, checkpoint: Path, tiny_clip_folder: Path, tmp_path: Path
) -> None:
    """It takes its calibration from this evaluation, and the page shows all decoders the same picture."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inference": {"long_side": 96, "enlarge": 1.25}}))
    words = ["--checkpoint", str(checkpoint), "--clip_arm", str(tiny_clip_folder), "--data", str(root), "--sets", "pets"]
    evaluator.main([*words, "--calibrate", "--not_alone", "--output", str(tmp_path / "both")])
    plain, own = json.loads((tmp_path / "both.json").read_text())
    assert (plain["arm"], own["arm"]) == ("clip", "ldvc"), "first what all others are compared with"
    assert plain["inference"] == own["inference"] == {"long_side": 96, "enlarge": 1.25}
    stored = json.loads(path.read_text())
    assert stored["clip_calibration"] == plain["calibration"] and stored["calibration"] == own["calibration"]


def test_calibration_is_written_and_helps(root: Path, checkpoint: Path) -> None:
    datasets = [FolderDataset(root / "pets", "val")]
    before = evaluate(str(checkpoint), datasets)["sets"]["pets"]
    fitted = evaluate(str(checkpoint), datasets, calibrate=True)
    stored = json.loads((checkpoint / "config.json").read_text())["calibration"]
    assert stored == fitted["calibration"] and stored["scale"] > 0
    after = evaluate(str(checkpoint), datasets)["sets"]["pets"]
    ways = ("single_iou", "single_iou_present", "single_iou_alone")
    assert sum(after[way] for way in ways) >= sum(before[way] for way in ways) - 1e-9
    assert after["pAcc"] == before["pAcc"]


def test_with_a_peak_the_threshold_follows_each_name(root: Path, tiny_config: ModelConfig, tiny_clip: FrozenClip) -> None:
    """Names alone: with 24 patches the peak is the best patch, and what counts is the logit minus its share of that."""
    dataset, peak = FolderDataset(root / "pets", "val"), 0.4
    model, ious = LDVC(tiny_config, tiny_clip).eval(), []
    shared = {"seen": lambda _: True, "inference": {"long_side": 84}, "bf16": False}
    found, bare = (tally_set(model, "ldvc", dataset, peak=share, **shared) for share in (peak, 0.0))
    for index in range(len(dataset)):
        image, mask = dataset.pair(index)
        for number, name in enumerate(dataset.names(), start=1):
            if not (mask == number).any():
                continue
            canvas, _, pixels = cut_windows(image, inference={"long_side": 84}, patch=16)
            with torch.no_grad():
                logits = model(normalise(pixels[0], tiny_clip.mean, tiny_clip.std)[None], [name]).mask_logits
            full = F.interpolate(logits, scale_factor=16, mode="bilinear", align_corners=False)[0, 0, : canvas[0], : canvas[1]]
            positive, valid = full >= peak * logits.max(), torch.from_numpy(mask != 255)
            truth = torch.from_numpy(mask == number)
            ious.append(float((positive & truth & valid).sum() / ((positive | truth) & valid).sum()))
    assert found.curves["alone"].mean_iou_at(0.0) == pytest.approx(np.mean(ious), abs=0.01)
    assert bare.curves["alone"].mean_iou_at(0.0) != pytest.approx(np.mean(ious), abs=0.01)
    assert torch.equal(found.joint.counts, bare.joint.counts), "the literature's measures know no peak"


def test_offset_and_bare_scores_have_columns_of_their_own(
    root: Path, tiny_config: ModelConfig, tiny_clip: FrozenClip
) -> None:
    dataset = FolderDataset(root / "pets", "val")
    model = LDVC(tiny_config, tiny_clip).eval()
    found = tally_set(model, "ldvc", dataset, seen=lambda name: name == "dog", offset=0.4, inference={"long_side": 84})
    columns = measures(found, [True, False], {"scale": 1.0, "bias": 0.0})
    for suffix, confusion in (("", found.joint), ("_offset", found.offset)):
        dog, cat = confusion.iou().tolist()
        assert (columns[f"mIoU_S{suffix}"], columns[f"mIoU_U{suffix}"]) == pytest.approx((dog, cat), nan_ok=True)
        assert columns[f"pAcc{suffix}"] == pytest.approx(confusion.pixel_accuracy())
    assert columns["pAcc"] != columns["pAcc_offset"], "0.4 off every dog changes something"


# ---- what is seen -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "classes, split", [("voc20", "voc12"), ("coco_stuff171", "coco_stuff"), ("context59", "context")]
)
def test_on_its_own_benchmark_exactly_the_split_is_unseen(classes: str, split: str) -> None:
    names, unseen = load_classes(classes), load_split(split)
    held_out = SeenNames(unseen)
    learned = SeenNames(name for name in names if name not in held_out)
    left = {name for name in names if name not in learned}
    assert len(left) == len(unseen) and "no such thing" not in learned


def test_other_names_for_what_was_learned_count_as_seen() -> None:
    learned = SeenNames(name for name in load_classes("coco_stuff171") if name not in load_split("coco_stuff"))
    voc = {name: learned.source(name) for name in load_classes("voc20")}
    assert [name for name, by in voc.items() if by is None] == ["cow"]
    assert (voc["sofa"], voc["tv monitor"], voc["motorbike"]) == ("couch", "tv", "motorcycle")
    context = {name: learned.source(name) for name in load_classes("context59")}
    assert (context["sky"], context["shelves"], context["sidewalk"]) == ("sky-other", "shelf", "pavement")
    unseen = {name for name, by in context.items() if by is None}
    assert {"cow", "grass", "road", "tree"} <= unseen and not unseen & {"wall", "water", "window", "dog"}


def test_the_way_photos_are_shown() -> None:
    lite = {"inference": {"long_side": 448}}
    assert chosen_inference(lite, {}) == {"long_side": 448}
    assert chosen_inference(lite, {"mode": "slide"}) == {"short_side": 512, "window": 512, "stride": 426}
    assert chosen_inference(lite, {"short_side": 300}) == {"short_side": 300}
    bundled = {"inference": {"long_side": 576, "enlarge": 1.4}}
    assert chosen_inference(bundled, {"mode": "whole"}) == {"long_side": 576, "enlarge": 1.4}
    assert chosen_inference(bundled, {"long_side": 448}) == {"long_side": 448, "enlarge": 1.4}
    assert chosen_inference(bundled, {"enlarge": 2.0}) == {"long_side": 576, "enlarge": 2.0}
    assert chosen_inference(bundled, {"short_side": 300}) == {"short_side": 300}
    assert "at most 1.4 times enlarged" in _how(bundled["inference"])
    paper = {"inference": SLIDING}
    assert chosen_inference(paper, {"mode": "whole"}) == {"short_side": 60}
    assert chosen_inference(paper, {"stride": 8}) == {"short_side": 60, "window": 32, "stride": 8}
    for wrong in (
        {"mode": "whole", "window": 64},
        {"mode": "slide", "long_side": 64},
        {"long_side": 64, "short_side": 64},
        {"mode": "slide", "stride": 600},
    ):
        with pytest.raises(LdvcError):
            chosen_inference(lite, wrong)


# ---- published numbers --------------------------------------------------------------------------------------------------


class Benchmark:
    """As much of a data set as tells a benchmark from others."""

    own_words = True

    def __init__(self, layout: str, photos: int, classes: str, split: str = "val") -> None:
        self.layout, self.photos, self.split, self._names = layout, photos, split, load_classes(classes)

    def __len__(self) -> int:
        return self.photos

    def names(self) -> list[str]:
        return self._names


def test_published_numbers_stand_only_beside_their_benchmark(root: Path, checkpoint: Path) -> None:
    voc, unseen = Benchmark("voc", 1449, "voc20"), ["potted plant", "sheep", "sofa", "train", "tv monitor"]
    assert quoted_benchmark(voc, unseen) == "voc"
    assert quoted_benchmark(voc, unseen[:4]) is None, "another split"
    assert quoted_benchmark(Benchmark("voc", 145, "voc20"), unseen) is None, "a part of the photos"
    assert quoted_benchmark(Benchmark("folder", 1449, "voc20"), unseen) is None
    voc.own_words = False
    assert quoted_benchmark(voc, unseen) is None, "asked for by other words"
    coco = Benchmark("coco_stuff", 5000, "coco_stuff171")
    assert quoted_benchmark(coco, sorted(load_split("coco_stuff"))) == "coco_stuff"

    result = evaluate(str(checkpoint), [FolderDataset(root / "pets", "val")], joint_only=True)
    assert "quoted" not in markdown([result])
    result["sets"]["pets"]["benchmark"] = "voc"
    table = markdown([result])
    (line,) = [line for line in table.splitlines() if line.startswith("| ZegCLIP |")]
    assert "quoted: Zhou" in line and "| - | 0.919 | 0.778 | 0.843 | - |" in line and "not run here" in table


# ---- command line -------------------------------------------------------------------------------------------------------


def test_command_line_in_one_and_two_processes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """Five photos on two processes, one of them broken: everything is counted once and the rest is said."""
    folder = make_set(tmp_path / "data" / "meadow", ["grass", "sky", "aeroplane", "dog"], photos=5)
    (folder / "val.txt").write_text("\n".join(f"photo{number}" for number in range(5)))
    (folder / "images" / "photo3.jpg").write_bytes(b"no photo")
    words = ["--checkpoint", str(checkpoint), "--data", str(tmp_path / "data"), "--sets", "meadow"]
    words += ["--not_alone", "--mode", "slide", "--short_side", "60", "--window", "32", "--stride", "24", "--output"]
    evaluator.main([*words, str(tmp_path / "out" / "one")])
    assert forked.run(evaluator.main, [*words, str(tmp_path / "out" / "two")], processes=2) == [0, 0]
    one, two = (json.loads((tmp_path / "out" / f"{name}.json").read_text())[0] for name in ("one", "two"))
    assert one["sets"]["meadow"].pop("seconds") and two["sets"]["meadow"].pop("seconds")
    result = one["sets"]["meadow"]
    (sentence,) = result["broken"]
    assert "photo3" in sentence and result["photos"] == 4 and result["single_iou_alone"] is None  # no NaN in JSON
    assert sum(map(sum, result["confusion"])) == 4 * 60 * 80, "every labelled pixel of the four photos, once"
    for name, value in result.items():
        other = two["sets"]["meadow"][name]
        assert (other == pytest.approx(value, abs=1e-9)) if isinstance(value, float) else other == value, name
    table = (tmp_path / "out" / "one.md").read_text()
    assert table.startswith(capsys.readouterr().out.rstrip("\n")) and "class by class" in table
    assert "short side 60, windows of 32 every 24 pixels" in table and f"- {sentence}" in table
    assert Image.open(tmp_path / "out" / "one-ldvc-meadow.png").width > 4 * 24


def test_trained_on_coco_stuff_tested_on_voc_and_context(
    tmp_path: Path, tiny_config: ModelConfig, tiny_clip: FrozenClip, capsys: pytest.CaptureFixture
) -> None:
    """Cross-dataset: official layouts, one table each, and what counts as seen follows from COCO-Stuff's names."""
    make_benchmarks(tmp_path / "data")
    seen = [name for name in load_classes("coco_stuff171") if name not in load_split("coco_stuff")]
    for arm in ("ldvc", "zegclip"):
        model = LDVC(replace(tiny_config, arm=arm), tiny_clip)
        metadata = {"seen_names": seen, "inference": {"short_side": 48, "window": 48, "stride": 40}}
        save_checkpoint(model, tmp_path / arm, metadata=metadata)
    words = ["--checkpoint", str(tmp_path / "ldvc"), str(tmp_path / "zegclip"), "--data", str(tmp_path / "data")]
    words += ["--sets", "voc2012", "pascal_context59", "coco_stuff164k", "--joint_only"]
    evaluator.main([*words, "--output", str(tmp_path / "cross")])
    table, results = capsys.readouterr().out, json.loads((tmp_path / "cross.json").read_text())
    assert "### voc2012 val, 2 photos; unseen: cow" in table and table.count("| zegclip |") == 3
    assert "quoted" not in table, "two photos are no benchmark"
    voc, context, coco = (results[0]["sets"][name] for name in ("voc2012", "pascal_context59", "coco_stuff164k"))
    assert set(coco["unseen"]) == load_split("coco_stuff")
    rows = {row["name"]: row for row in voc["classes"]}
    assert rows["tv monitor"]["seen_as"] == "tv" and rows["cow"]["seen_as"] is None
    assert rows["person"]["pixels"] == 48 * 36 and rows["cat"]["iou"] is None, "no cat in the truth"
    assert voc["mIoU_S"] is not None and voc["mIoU_U"] is None, "no cow in the truth"
    grass = next(row for row in context["classes"] if row["name"] == "grass")
    assert not grass["seen"] and context["mIoU_U"] == pytest.approx(grass["iou"])
    assert {path.name for path in tmp_path.glob("cross-2-*.png")} == {
        f"cross-2-zegclip-{name}.png" for name in words[6:9]
    }


def test_mistakes_on_the_command_line_are_sentences(root: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nowhere"):
        evaluator.main(["--checkpoint", str(checkpoint), "--data", str(tmp_path / "nowhere")])
    pets = ["--data", str(root), "--sets", "pets"]
    with pytest.raises(SystemExit, match="--checkpoint"):
        evaluator.main(pets)
    with pytest.raises(SystemExit, match="--joint_only"):
        evaluator.main([*pets, "--checkpoint", str(checkpoint), "--calibrate", "--joint_only"])
    with pytest.raises(SystemExit, match="lite is no local checkpoint folder"):  # before anything is computed
        evaluator.main([*pets, "--checkpoint", "lite", "--calibrate"])
    with pytest.raises(SystemExit, match="gaps"):
        evaluator.main([*pets, "--checkpoint", str(checkpoint), "--mode", "slide", "--stride", "999"])
    folder = make_set(tmp_path / "data" / "broken", ["grass", "sky"], photos=3)
    for photo in range(1, 3):
        (folder / "masks" / f"photo{photo}.png").write_bytes(b"")
    (folder / "masks" / "photo0.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="Not one photo of broken can be read"):
        evaluator.main(["--checkpoint", str(checkpoint), "--data", str(folder.parent), "--sets", "broken"])
    blank = make_set(tmp_path / "data" / "blank", ["grass", "sky"], photos=1)
    Image.new("L", (84, 60), 255).save(blank / "masks" / "photo0.png")
    with pytest.raises(SystemExit, match="Not one mask of blank val labels a pixel"):
        evaluator.main(["--checkpoint", str(checkpoint), "--data", str(blank.parent), "--sets", "blank"])
    with pytest.raises(SystemExit, match="'mmseg' is no layout of data sets; known ones: voc"):
        evaluator.main([*pets, "--checkpoint", str(checkpoint), "--layouts", "pets=mmseg"])
    with pytest.raises(SystemExit, match="Results cannot be written to"):
        evaluator.main([*pets, "--checkpoint", str(checkpoint), "--output", str(folder / "dataset.json" / "result")])


def test_wrong_values_on_the_command_line_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--peak", "1.5"], ["--layouts", "msrc"], ["--layouts", "voc=voc"], ["--stride", "0"], ["--enlarge", "0"]):
        with pytest.raises(SystemExit) as error:
            evaluator.parse(words)
        assert error.value.code == 2 and words[0] in capsys.readouterr().err
