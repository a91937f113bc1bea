"""The trainer on tiny towers and tiny data: it learns, follows its configuration, and refuses what cannot be trained."""

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
from torch import Tensor

from ldvc.checkpoint import load_checkpoint
from ldvc.class_names import load_split
from ldvc.errors import CheckpointError
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from tests.forked import CONCEPTS, CONTEXT, Configure
from tests.tiny import close_gates
from tests.tiny_data import make_set
from train.checkpoints import checkpoints_of, run_lock
from train.config import ConfigError, TrainConfig
from train.data import BACKGROUND, VOID, Augmentation, Vocabulary, open_sets
from train.losses import mask_loss
from train.objective import Objective, parameter_groups, set_learning_rate, usable_distillation_names
from train.processes import resolved_precision
from train.progress import DivergedError
from train.train import build_vocabulary, train


def test_the_checkpoint_loads_and_lists_the_seen_names(configure: Configure) -> None:
    config = configure("export", "max_train_steps=2", "decoder=ldvc_without_lcsa")
    folder = train(config)
    model, metadata = load_checkpoint(folder)
    assert model.config.decoder == "ldvc_without_lcsa" and metadata["inference"] == {"long_side": 80}
    assert metadata["seen_names"] == ["grass", "sky", "dog"]  # airplane and cat are held out
    assert metadata["calibration"] == {"scale": 1.0, "bias": 0.0, "threshold": 0.5}
    saved = json.loads((folder / "train.json").read_text())
    assert saved["distill_weight"] == 100.0 and saved["unseen"] == "lite_experiment"
    assert "learnable parameters" in (folder / "log.txt").read_text()


@pytest.mark.parametrize(("what", "broken"), [("loss", 3), ("loss", 4), ("gradient", 3)])
def test_a_run_that_diverges_stops_and_keeps_good_checkpoints(
    configure: Configure, root: Path, monkeypatch: pytest.MonkeyPatch, what: str, broken: int
) -> None:
    """Whether the last line before a checkpoint is printed at its step or before it."""
    forward, calls = Objective.forward, iter(range(1, 100))

    def breaks(self: Objective, *arguments: Tensor) -> dict[str, Tensor]:
        losses = forward(self, *arguments)
        if next(calls) != broken:
            return losses
        # a root has no finite slope at 0
        wrong = losses["loss"] * float("nan") if what == "loss" else losses["loss"] + (0 * losses["loss"]).sqrt()
        return {**losses, "loss": wrong}

    monkeypatch.setattr(Objective, "forward", breaks)
    config = configure(f"{what}{broken}", "checkpointing_steps=1", "checkpoints_total_limit=4", "log_steps=4")
    message = "loss is nan" if what == "loss" else "Weights are NaN or infinite"
    with pytest.raises(DivergedError, match=f"{message} by step {broken}.*[Rr]esume from the last checkpoint"):
        train(config)
    kept = checkpoints_of(root / f"{what}{broken}")
    assert [path.name for path in kept] == [f"checkpoint-{step}" for step in range(1, broken)]
    stored = load_file(kept[-1] / "trainable.safetensors")
    assert all(tensor.isfinite().all() for tensor in stored.values())


def test_it_learns_and_distils(configure: Configure) -> None:
    def last(name: str, *changes: str) -> list[dict[str, float]]:
        seen: list[dict[str, float]] = []
        shared = ("max_train_steps=30", "learning_rate=0.003", "train_batch_size=4", "full_vocabulary=1")
        train(configure(name, *shared, *changes), on_step=lambda step, parts: seen.append(parts))
        return seen

    plain, kept = last("plain", "distill_weight=1e-6", "distill_unannotated_weight=0"), last("kept")
    means = [sum(step["focal"] + step["dice"] for step in part) / 5 for part in (plain[:5], plain[-5:])]
    assert means[1] < 0.7 * means[0]
    assert kept[-1]["distill"] / 100 < plain[-1]["distill"] / 1e-6


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The gradient of every step of the runs of a test."""
    found: list[Tensor] = []

    def record(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> float:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        found.append(torch.cat([p.grad.flatten() for p in parameters]))
        return set_learning_rate(optimizer, step, config)

    monkeypatch.setattr("train.train.set_learning_rate", record)
    return found


def test_every_micro_batch_counts_once(configure: Configure, gradients: list[Tensor]) -> None:
    """Two micro steps of 2 photos have the gradient of one step of 4, where each photo weighs the same."""
    same = ["visual_prompts=0", "full_vocabulary=1", "distill_per_step=0", "distill_unannotated_weight=0"]  # no dropout
    # each photo has as many names and pixels as any other; dice is a mean over masks
    same += ["sets={meadow: 1}", "ignore_as_negative=true", "dice_weight=0", "max_train_steps=1"]
    train(configure("large", *same, "train_batch_size=4"))
    train(configure("small", *same, "train_batch_size=2", "gradient_accumulation_steps=2"))
    large, small = gradients
    assert large.norm() > 0 and (small - large).norm() < 1e-3 * large.norm()


@torch.no_grad()
def test_pairs_that_nobody_annotates_are_distilled(configure: Configure, root: Path, tiny_clip: FrozenClip) -> None:
    held_out = load_split("lite_experiment")
    vocabulary = Vocabulary(open_sets(root / "data", ["meadow", "pets"], "train"), held_out)
    listed = usable_distillation_names(CONCEPTS, vocabulary, held_out)
    assert listed == ["zebra", "teapot", "violin", "bridge", "lamp", "river"]  # without learned and held-out names
    config = configure("unused", "decoder=zegclip", "distill_unannotated_weight=1", "distill_weight=1")
    model = close_gates(LDVC(config.model, tiny_clip)).eval()  # the decoder equals the towers
    objective = Objective(model, vocabulary, listed, config)
    patch_tokens = torch.randn(2, 64, 4, 4)
    batch = {"patch_tokens": patch_tokens, "labels": torch.zeros(2, 16, 16, dtype=torch.int16), "set": torch.tensor([0, 1])}
    at_start = objective(batch, torch.arange(3), torch.tensor([1, 4]))
    assert at_start["distill"].item() == pytest.approx(0, abs=1e-4)
    model.decoder.mask_scores.bias += 1.0
    moved = objective(batch, torch.arange(3), torch.tensor([1, 4]))
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
    assert resolved_precision("fp16", on_cpu=True) == "fp16"


def test_what_cannot_be_learned_does_not_start(configure: Configure, root: Path) -> None:
    make_set(root / "data" / "farm", ["cow", "sheep", "cat"], photos=2)
    for changes, message in (
        (["sets={farm: 1}"], "'lite_experiment' holds out every class of farm"),
        (["sets={farm: 1}", "setting=transductive"], "'lite_experiment' holds out every class of farm"),
        (["crop=72"], "crop 72 must divide by 16"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(configure("refused", *changes))


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_computed(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(configure("other", "max_train_steps=1"))
    monkeypatch.setattr("train.train.Objective", None)  # too late
    for change, message in (("decoder=zegclip", "decoder ldvc -> zegclip"), ("visual_prompts=3", "visual_prompts 2 -> 3")):
        with pytest.raises(ConfigError, match=f"checkpoint-1 is of another model .*{message}"):
            train(configure("other", change), resume="latest")
    with pytest.raises(ConfigError, match="decoder ldvc -> zegclip"):
        train(configure("elsewhere", "decoder=zegclip"), resume=str(folder / "checkpoint-1"))
    (folder / "checkpoint-1" / "trainable.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="resume from another checkpoint"):
        train(configure("other"), resume="latest")


def _hold(folder: Path, event: Any) -> None:
    with run_lock(Accelerator(cpu=True), folder):
        event.set()
        time.sleep(60)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    folder, accelerator, held = tmp_path / "runs" / "mine", Accelerator(cpu=True), CONTEXT.Event()
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


@torch.no_grad()
def test_a_mask_that_is_not_exhaustive_gives_no_negatives_for_other_names(
    configure: Configure, tiny_clip: FrozenClip, tmp_path: Path
) -> None:
    """Photos with one label: pixels around the object are negatives of that label, and of no other name."""
    folder = make_set(tmp_path / "labelled", ["background", "dog", "cat"], background=0)
    facts = json.loads((folder / "dataset.json").read_text())
    config = configure("labelled", "unseen=none", "dice_weight=0", "distill_unannotated_weight=0")
    model, focal = LDVC(config.model, tiny_clip).eval(), {}
    labels = torch.full((1, 16, 16), BACKGROUND, dtype=torch.int16)
    labels[:, 4:9] = 0  # dog
    batch = {"images": torch.rand(1, 3, 64, 64), "labels": labels, "set": torch.tensor([0])}
    for exhaustive in (True, False):
        (folder / "dataset.json").write_text(json.dumps(facts | {"exhaustive": exhaustive}))
        objective = Objective(model, Vocabulary(open_sets(tmp_path, ["labelled"], "train")), [], config)
        for index, name in enumerate(("dog", "cat")):
            losses = objective(batch, torch.tensor([index]), torch.zeros(0, dtype=torch.int64))
            focal[exhaustive, name] = losses["focal"].item()
    assert focal[False, "dog"] == focal[True, "dog"] > 0
    assert focal[True, "cat"] > 0 and focal[False, "cat"] == 0


def test_a_run_starts_where_another_ended(configure: Configure, tiny_clip: FrozenClip) -> None:
    first = train(configure("stage1", "max_train_steps=2"))
    still = ["max_train_steps=1", "learning_rate=1e-12", "minimum_learning_rate=0"]
    second = train(configure("stage2", f"init_from={first}", *still))
    (one, _), (two, _) = load_checkpoint(first), load_checkpoint(second)
    fresh = LDVC(one.config, clip=tiny_clip).trainable_state_dict()
    moved = 0
    for name, tensor in one.trainable_state_dict().items():
        torch.testing.assert_close(two.trainable_state_dict()[name], tensor, rtol=0, atol=1e-6)
        moved += not torch.equal(fresh[name], tensor)
    assert moved > 10  # otherwise a fresh model would have passed as well


def test_groups_and_schedule(configure: Configure, tiny_clip: FrozenClip) -> None:
    config = configure("unused", "prompt_multiplier=10", "warmup_steps=4", "max_train_steps=10")
    model = LDVC(config.model, tiny_clip)
    groups = parameter_groups(model, config)
    counted = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert counted == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    found = {id(parameter): (group["peak"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    assert config.weight_decay > 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_prompts, is_vector = name.startswith(("image_tower", "text_tower")), parameter.ndim < 2 or "gate" in name
            expected = (0.01 if of_prompts else 0.001, 0.0 if is_vector else config.weight_decay)
            assert found[id(parameter)] == pytest.approx(expected), name


def test_each_step_has_its_learning_rate_and_its_largest_gradient(configure: Configure, gradients: list[Tensor]) -> None:
    changes = ("max_train_steps=4", "warmup_steps=2", "log_steps=1", "clip_gradient=0.001", "power=1")
    folder = train(configure("paced", *changes))
    assert [gradient.norm().item() for gradient in gradients] == pytest.approx([0.001] * 4, rel=1e-3)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    # a line from 0.001 at step 0 to 1e-6 at step 4, of which the first step takes half (one of two steps of warm-up)
    assert [line["lr"] for line in lines] == pytest.approx([0.0005, 0.00075025, 0.0005005, 0.00025075], rel=1e-3)


@torch.no_grad()
def test_the_parts_of_the_loss_have_their_weights(configure: Configure, root: Path, tiny_clip: FrozenClip) -> None:
    vocabulary = Vocabulary(open_sets(root / "data", ["meadow", "pets"], "train"))
    patch_tokens, labels = torch.randn(2, 64, 4, 4), torch.randint(0, 3, (2, 16, 16)).to(torch.int16)
    batch = {"patch_tokens": patch_tokens, "labels": labels, "set": torch.tensor([0, 0])}
    model = LDVC(configure("unused").model, tiny_clip).eval()
    logits = model(None, vocabulary.texts, patch_tokens=patch_tokens).mask_logits
    for changes, (focal, dice), options in (
        ([], (100, 1), {}),
        (["focal_weight=30", "dice_weight=7"], (30, 7), {}),
        (["focal_alpha=0.9"], (100, 1), {"alpha": 0.9}),
        (["focal_gamma=0"], (100, 1), {"gamma": 0}),
    ):
        config = configure("unused", "distill_unannotated_weight=0", *changes)
        none = torch.zeros(0, dtype=torch.int64)
        parts = Objective(model, vocabulary, [], config)(batch, torch.arange(len(vocabulary)), none)
        bare = mask_loss(logits, labels, vocabulary.annotated[batch["set"]], normalise="pairs", **options)
        expected = {"focal": focal * bare.focal, "dice": dice * bare.dice}
        expected["loss"] = sum(expected.values())
        torch.testing.assert_close(parts, expected, rtol=1e-4, atol=1e-5)


def test_views_are_drawn_as_the_configuration_says() -> None:
    values = {"crop": 96, "long_side": None, "short_side": 128, "scale": (0.7, 1.9), "aspect": 1.3, "uniform_scale": False}
    values |= {"photometric": 0.25, "hue": 11.0, "largest_class": 0.6}
    config = TrainConfig(sets={"pets": 1.0}, loss_stride=4, **values)
    assert config.augmentation() == Augmentation(stride=4, **values)


@pytest.mark.parametrize(("flag", "meaning"), [("true", BACKGROUND), ("false", VOID)])
def test_held_out_pixels_are_negatives_or_void(configure: Configure, flag: str, meaning: int, root: Path) -> None:
    config = configure("unused", f"held_out_as_negative={flag}")
    pets = open_sets(root / "data", ["pets"], "train")
    assert build_vocabulary(config, pets).tables[0][:3].tolist() == [BACKGROUND, 0, meaning]
