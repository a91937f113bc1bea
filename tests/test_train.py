"""The trainer on tiny towers and tiny data: it learns, resumes to the bit, and refuses what cannot be trained."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from ldvc.checkpoint import load_checkpoint
from ldvc.class_names import load_split
from ldvc.errors import CheckpointError, DataError
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from tests.forked import CONTEXT
from tests.tiny_data import make_set
from tests.tiny_run import CONCEPTS, close_gates, config_of
from train.checkpoints import checkpoints_of, run_lock
from train.config import ConfigError, TrainConfig
from train.data import BACKGROUND, Vocabulary, open_sets
from train.objective import Objective, set_learning_rate, usable_distillation_names
from train.processes import resolved_precision
from train.progress import DivergedError
from train.train import train


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_checkpoint_loads_and_lists_the_seen_names(root: Path, tiny_clip_folder: Path) -> None:
    config = config_of(root, tiny_clip_folder, "export", "max_train_steps=2", "decoder=ldvc_without_lcsa")
    folder = train(config)
    model, metadata = load_checkpoint(folder)
    assert model.config.decoder == "ldvc_without_lcsa" and metadata["inference"] == {"long_side": 672}
    assert metadata["seen_names"] == ["grass", "sky", "dog"]  # airplane and cat are held out
    assert metadata["calibration"] == {"scale": 1.0, "bias": 0.0, "threshold": 0.5}
    saved = json.loads((folder / "train.json").read_text())
    assert saved["distill_weight"] == 100.0 and saved["unseen"] == "lite_experiment"
    assert "learnable parameters" in (folder / "log.txt").read_text()


@pytest.mark.parametrize(("what", "broken"), [("loss", 3), ("loss", 4), ("gradient", 3)])
def test_a_run_that_diverges_stops_and_keeps_good_checkpoints(
    root: Path, tiny_clip_folder: Path, monkeypatch: pytest.MonkeyPatch, what: str, broken: int
) -> None:
    """Whether the last line before a checkpoint is printed at its step or before it."""
    forward, calls = Objective.forward, iter(range(1, 100))

    def breaks(self: Objective, *arguments: torch.Tensor) -> dict[str, torch.Tensor]:
        losses = forward(self, *arguments)
        if next(calls) != broken:
            return losses
        # a root has no finite slope at 0
        wrong = losses["loss"] * float("nan") if what == "loss" else losses["loss"] + (0 * losses["loss"]).sqrt()
        return {**losses, "loss": wrong}

    monkeypatch.setattr(Objective, "forward", breaks)
    config = config_of(root, tiny_clip_folder, f"{what}{broken}", "checkpointing_steps=1", "log_steps=4")
    message = "loss is nan" if what == "loss" else "Weights are NaN or infinite"
    with pytest.raises(DivergedError, match=f"{message} by step {broken}.*[Rr]esume from the last checkpoint"):
        train(config)
    kept = checkpoints_of(root / f"{what}{broken}")
    assert [path.name for path in kept] == [f"checkpoint-{step}" for step in range(1, broken)]
    stored = load_file(kept[-1] / "trainable.safetensors")
    assert all(tensor.isfinite().all() for tensor in stored.values())


def test_it_learns_and_distils(root: Path, tiny_clip_folder: Path) -> None:
    def last(name: str, *changes: str) -> list[dict[str, float]]:
        seen: list[dict[str, float]] = []
        config = config_of(
            root, tiny_clip_folder, name, "max_train_steps=30", "learning_rate=0.003", "train_batch_size=4", *changes
        )
        train(config, on_step=lambda step, parts: seen.append(parts))
        return seen

    plain = last("plain", "distill_weight=1e-6", "distill_unannotated_weight=0", "full_vocabulary=1")
    kept = last("kept", "full_vocabulary=1")
    means = [sum(step["focal"] + step["dice"] for step in part) / 5 for part in (plain[:5], plain[-5:])]
    assert means[1] < 0.7 * means[0]
    assert kept[-1]["distill"] / 100 < plain[-1]["distill"] / 1e-6


def test_every_micro_batch_counts_once(root: Path, tiny_clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro steps of 2 photos have the gradient of one step of 4, where each photo weighs the same."""
    same = (
        "visual_prompts=0",  # no dropout
        "full_vocabulary=1",
        "distill_per_step=0",
        "distill_unannotated_weight=0",
        "sets={meadow: 1}",  # each photo has as many names ...
        "ignore_as_negative=true",  # ... and as many pixels as any other
        "dice_weight=0",  # which is a mean over masks
        "clip_gradient=0",
        "max_train_steps=1",
    )
    gradients: list[torch.Tensor] = []

    def record(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> float:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return set_learning_rate(optimizer, step, config)

    monkeypatch.setattr("train.train.set_learning_rate", record)
    train(config_of(root, tiny_clip_folder, "large", *same, "train_batch_size=4"))
    train(config_of(root, tiny_clip_folder, "small", *same, "train_batch_size=2", "gradient_accumulation_steps=2"))
    large, small = gradients
    assert large.norm() > 0 and (small - large).norm() < 1e-3 * large.norm()


def test_distilled_pairs_are_those_that_nobody_annotates(
    root: Path, tiny_clip_folder: Path, tiny_clip: FrozenClip
) -> None:
    datasets = open_sets(root / "data", ["meadow", "pets"], "train")
    held_out = load_split("lite_experiment")
    vocabulary = Vocabulary(datasets, held_out)
    listed = usable_distillation_names(CONCEPTS, vocabulary, held_out)
    assert listed == ["zebra", "teapot", "violin", "bridge", "lamp", "river"]  # without learned and held-out names
    config = config_of(
        root, tiny_clip_folder, "unused", "decoder=zegclip", "distill_unannotated_weight=1", "distill_weight=1"
    )
    model = close_gates(LDVC(config.model, tiny_clip)).eval()
    objective = Objective(model, vocabulary, listed, config)
    patch_tokens = torch.randn(2, 64, 4, 4)
    batch = {"patch_tokens": patch_tokens, "labels": torch.zeros(2, 16, 16, dtype=torch.int16), "set": torch.tensor([0, 1])}
    names, chosen = torch.arange(3), torch.tensor([1, 4])
    with torch.no_grad():
        at_start = objective(batch, names, chosen)
        assert at_start["distill"].item() == pytest.approx(0, abs=1e-4)  # closed gates: the decoder equals the towers
        model.decoder.mask_scores.bias += 1.0
        moved = objective(batch, names, chosen)
    frozen = model.frozen_logits(patch_tokens=patch_tokens, names=[*vocabulary.names, "teapot", "lamp"])
    p = frozen.sigmoid()
    divergence = torch.nn.functional.softplus(frozen + 1) - torch.nn.functional.softplus(frozen) - p  # (B, C, h, w)
    unannotated = divergence[1, :2].mean()  # set 1 annotates "dog" only
    assert moved["distill"].item() == pytest.approx((unannotated + divergence[:, 3:].mean()).item(), rel=1e-3)


@pytest.mark.parametrize("able", [False, True])
def test_automatic_precision_follows_the_processor(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert resolved_precision("auto", on_cpu=True) == ("bf16" if able else "no")
    for wanted in ("no", "bf16", "fp16"):
        assert resolved_precision(wanted, on_cpu=True) == wanted


def test_a_run_without_a_class_to_learn_does_not_start(root: Path, tiny_clip_folder: Path) -> None:
    make_set(root / "data" / "farm", ["cow", "sheep", "cat"], photos=2)
    for setting in ("inductive", "transductive"):
        config = config_of(root, tiny_clip_folder, "farm", "sets={farm: 1}", "views_per_photo=0", f"setting={setting}")
        with pytest.raises(ConfigError, match="'lite_experiment' holds out every class of farm"):
            train(config)


def test_a_crop_is_whole_patches(root: Path, tiny_clip_folder: Path) -> None:
    with pytest.raises(ConfigError, match="crop 72 must divide by 16"):
        train(config_of(root, tiny_clip_folder, "crop", "crop=72", "loss_stride=4"))


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_computed(
    root: Path, tiny_clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("max_train_steps=1", "views_per_photo=0")
    folder = train(config_of(root, tiny_clip_folder, "other", *changes))
    monkeypatch.setattr("train.train.Objective", None)  # too late
    for change, message in (("decoder=zegclip", "decoder ldvc -> zegclip"), ("visual_prompts=3", "visual_prompts 2 -> 3")):
        with pytest.raises(ConfigError, match=f"checkpoint-1 is of another model .*{message}"):
            train(config_of(root, tiny_clip_folder, "other", *changes, change), resume="latest")
    elsewhere = config_of(root, tiny_clip_folder, "elsewhere", *changes, "decoder=zegclip")
    with pytest.raises(ConfigError, match="decoder ldvc -> zegclip"):
        train(elsewhere, resume=str(folder / "checkpoint-1"))
    (folder / "checkpoint-1" / "trainable.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="resume from another checkpoint"):
        train(config_of(root, tiny_clip_folder, "other", *changes), resume="latest")


def _hold(folder: Path, event: Any) -> None:
    with run_lock(Accelerator(cpu=True), folder):
        event.set()
        time.sleep(60)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    folder, accelerator = tmp_path / "runs" / "mine", Accelerator(cpu=True)
    held = CONTEXT.Event()
    other = CONTEXT.Process(target=_hold, args=(folder, held))
    other.start()
    try:
        assert held.wait(60)
        with (
            pytest.raises(ConfigError, match=rf"process {other.pid}\) is writing into {folder}"),
            run_lock(accelerator, folder, timeout=0.1),
        ):
            pytest.fail("two runs in one folder")
    finally:
        other.kill()
        other.join()
    with run_lock(accelerator, folder, timeout=0.1):  # a killed run leaves no lock behind
        assert (folder / ".training").read_text() == str(os.getpid())


# ---- the second stage of lite: a run that starts from a checkpoint, and masks that do not show every class


def test_a_mask_that_is_not_exhaustive_gives_no_negatives_for_other_names(
    root: Path, tiny_clip_folder: Path, tmp_path: Path
) -> None:
    """Photos with one label: pixels around the object are negatives of that label, and of no other name."""
    folder = make_set(tmp_path / "labelled", ["background", "dog", "cat"], background=0)
    facts = json.loads((folder / "dataset.json").read_text())
    config = config_of(root, tiny_clip_folder, "labelled", "unseen=none", "dice_weight=0", "distill_unannotated_weight=0")
    focal = {}
    for exhaustive in (True, False):
        (folder / "dataset.json").write_text(json.dumps(facts | {"exhaustive": exhaustive}))
        vocabulary = Vocabulary(open_sets(str(tmp_path), ["labelled"], "train"))
        torch.manual_seed(0)
        objective = Objective(LDVC(config.model).eval(), vocabulary, [], config)
        labels = torch.full((1, 16, 16), BACKGROUND, dtype=torch.int16)
        labels[:, 4:9] = vocabulary.names.index("dog")
        batch = {
            "images": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)),
            "labels": labels,
            "set": torch.tensor([0]),
        }
        for name in ("dog", "cat"):
            indices = torch.tensor([vocabulary.names.index(name)])
            losses = objective(batch, indices, torch.zeros(0, dtype=torch.int64))
            focal[exhaustive, name] = float(losses["focal"].detach())
    assert focal[False, "dog"] == focal[True, "dog"] > 0
    assert focal[True, "cat"] > 0 and focal[False, "cat"] == 0

    (folder / "dataset.json").write_text(json.dumps(facts | {"exhaustive": "no"}))
    with pytest.raises(DataError, match="'exhaustive' must be true or false, not 'no'"):
        open_sets(str(tmp_path), ["labelled"], "train")


def test_a_run_starts_where_another_ended(root: Path, tiny_clip_folder: Path, tiny_clip: FrozenClip) -> None:
    first = train(config_of(root, tiny_clip_folder, "stage1", "max_train_steps=2"))
    still = ["max_train_steps=1", "learning_rate=1e-12", "minimum_learning_rate=0"]
    second = train(config_of(root, tiny_clip_folder, "stage2", f"init_from={first}", *still))
    (one, _), (two, _) = load_checkpoint(first), load_checkpoint(second)
    fresh = LDVC(one.config, clip=tiny_clip).trainable_state_dict()
    moved = 0
    for name, tensor in one.trainable_state_dict().items():
        torch.testing.assert_close(two.trainable_state_dict()[name], tensor, rtol=0, atol=1e-6)
        moved += int(not torch.equal(fresh[name], tensor))
    assert moved > 10  # otherwise a fresh model would have passed as well
