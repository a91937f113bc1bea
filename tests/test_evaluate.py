"""The evaluator and the experiment on tiny towers and tiny data."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ldvc.checkpoint import save_checkpoint
from ldvc.config import ModelConfig
from ldvc.data import FolderDataset, load_split, normalise
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from tests.tiny_data import make_sets
from train import evaluate as evaluator
from train import experiment, tally
from train.evaluate import evaluate, markdown
from train.tally import interpolation_matrix, resized, tally_set


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


@pytest.mark.parametrize("height, width", [(37, 80), (80, 37), (64, 64), (5, 80)])
def test_interpolation_equals_upsampling_and_cutting(height: int, width: int) -> None:
    cells = (-(-height // 16), -(-width // 16))
    logits = torch.randn(3, *cells)
    rows, columns = (interpolation_matrix(side, n, side / 16) for side, n in zip((height, width), cells, strict=True))
    padded = F.interpolate(logits[None], size=(cells[0] * 16, cells[1] * 16), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(rows @ (logits @ columns.T), padded[:, :height, :width], atol=1e-5, rtol=1e-4)


def test_resized_photos_are_whole_patches() -> None:
    pixels, inner = resized(Image.new("RGB", (120, 90), (200, 0, 0)), 80, 16)
    assert pixels.shape == (64, 80, 3) and inner == (60, 80)
    assert (pixels[:60] == (200, 0, 0)).all() and (pixels[60:] == (200, 0, 0)).all()


def test_numbers_equal_a_slow_evaluation(root: Path, tiny_config: ModelConfig, tiny_clip: FrozenClip) -> None:
    dataset = FolderDataset(root / "pets", "val")
    model = LDVC(tiny_config, tiny_clip).eval()
    names = dataset.names()
    found = tally_set(model, "ldvc", dataset, seen=lambda name: name == "dog", long_side=84, bf16=False)
    offset = torch.tensor([0.1, 0.0])[:, None, None]
    counts = {"joint": torch.zeros(2, 2), "offset": torch.zeros(2, 2), "present": torch.zeros(2, 2)}
    ious = {"joint": [], "present": [], "alone": []}
    for index in range(len(dataset)):
        pixels, (height, width) = resized(dataset.image(index), 84, 16)
        images = normalise(pixels, tiny_clip.mean, tiny_clip.std)[None]
        mask = torch.from_numpy(dataset.mask(index)).long()  # 0 background, 1 dog, 2 cat, 255 void

        def full(
            given: list[str], images: torch.Tensor = images, size: tuple[int, int] = (height, width)
        ) -> torch.Tensor:
            with torch.no_grad():
                logits = model(images, given).mask_logits
            # the stem is kept in bfloat16, which moves logits a little; the photo has its own size already
            return F.interpolate(logits, scale_factor=16, mode="bilinear", align_corners=False)[
                0, :, : size[0], : size[1]
            ]

        joint = full(names)
        present = [number for number in (0, 1) if (mask == number + 1).any()]
        given = full([names[number] for number in present])
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
                ("alone", full([names[number]])[0]),
            ):
                positive = (logits > 0) & valid
                ious[way].append(float((positive & truth).sum() / ((positive | truth) & valid).sum()))
    total = sum(int(matrix.sum()) for matrix in counts.values()) / 3
    for way, matrix in counts.items():
        assert (getattr(found, way).counts - matrix).abs().sum() <= 0.02 * total, way
    for way, values in ious.items():
        assert found.curves[way].mean_iou_at(0.0) == pytest.approx(np.mean(values), abs=0.02), way


def test_evaluate_tells_seen_from_unseen_and_caches(
    root: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = [FolderDataset(root / name, "val") for name in ("meadow", "pets")]
    cache = str(tmp_path / "cache")
    result = evaluate(str(checkpoint), datasets, cache_dir=cache)
    assert result["arm"] == "ldvc" and result["sets"]["meadow"]["unseen"] == ["aeroplane"]
    pets = result["sets"]["pets"]
    assert pets["unseen"] == ["cat"] and pets["mIoU_U"] == pytest.approx(pets["iou"]["cat"])
    assert len(list(Path(cache).glob("stems-*.pt"))) == 2
    monkeypatch.setattr(tally, "resized", None)  # a second evaluation must not touch photos again
    again = evaluate(str(checkpoint), datasets, cache_dir=cache, unseen=frozenset())
    assert again["sets"]["pets"]["pAcc"] == pets["pAcc"] and math.isnan(again["sets"]["pets"]["mIoU_U"])
    table = markdown([result, again])
    assert "### meadow val, 3 photos; unseen: aeroplane" in table and "| ldvc |" in table and "| - |" in table


def test_plain_similarity_needs_no_checkpoint(root: Path, tiny_clip_folder: Path) -> None:
    datasets = [FolderDataset(root / "pets", "val")]
    result = evaluate(str(tiny_clip_folder), datasets, arm="clip", unseen=load_split("lite_experiment"))
    assert result["sets"]["pets"]["unseen"] == ["cat"] and 0 <= result["sets"]["pets"]["pAcc"] <= 1


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


def test_command_line_writes_both_files(
    root: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [
        "--checkpoint",
        str(checkpoint),
        "--data",
        str(root),
        "--sets",
        "pets",
        "--cache_dir",
        str(tmp_path / "cache"),
    ]
    evaluator.main([*words, "--output", str(tmp_path / "out" / "table"), "--not_alone"])
    (result,) = json.loads((tmp_path / "out" / "table.json").read_text())
    assert result["sets"]["pets"]["single_iou_alone"] is None  # no NaN in JSON
    assert (tmp_path / "out" / "table.md").read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nowhere"):
        evaluator.main(["--checkpoint", str(checkpoint), "--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="--checkpoint"):
        evaluator.main(["--data", str(root), "--sets", "pets"])


def test_experiment_plans_and_collects(tmp_path: Path) -> None:
    ablations = experiment.read_ablations(["no_preservation"])
    runs = experiment.plan(tmp_path, ["ldvc", "zegclip"], [0, 1], ablations, [0], ["max_train_steps=2"])
    assert [(run.line, run.seed) for run in runs] == [
        ("clip", 0),
        ("ldvc", 0),
        ("zegclip", 0),
        ("ldvc", 1),
        ("zegclip", 1),
        ("ldvc, no_preservation", 0),
    ]
    assert runs[-1].changes[0] == "max_train_steps=2" and "preserve_weight=0" in runs[-1].changes
    for run, value in zip(runs[:3] + runs[3:4], (0.2, 0.4, 0.3, 0.6), strict=True):
        numbers = dict.fromkeys(experiment.COLUMNS, value)
        evaluator.write_json(run.evaluation, [{"sets": {"msrc": numbers | {"mIoU_U": math.nan}}}])
    content = experiment.collect(runs)
    assert content["seeds"] == {"clip": [0], "ldvc": [0, 1], "zegclip": [0]}
    line = content["sets"]["msrc"]["ldvc"]
    assert line["hIoU"]["mean"] == pytest.approx(0.5) and line["hIoU"]["spread"] == pytest.approx(0.2 / math.sqrt(2))
    assert line["mIoU_U"]["mean"] is None
    table = experiment.markdown(content, "about")
    assert "| ldvc | 2 | 0.500 ± 0.141 |" in table and "| clip | 1 | 0.200 |" in table
    with pytest.raises(experiment.ConfigError, match="no_preservation"):
        experiment.read_ablations(["nonsense"])


def test_every_ablation_is_a_valid_configuration() -> None:
    from train.options import load_config

    for changes in experiment.read_ablations(["all"]).values():
        load_config("lite_experiment", changes).model_config()
