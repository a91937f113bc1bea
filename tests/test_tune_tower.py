"""Tuning lite's image tower: the split trunk is the stem's function, and a run changes what it says and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from ldvc import Predictor
from ldvc.checkpoint import load_checkpoint
from ldvc.class_names import canonical
from ldvc.modeling.clip import FrozenClip, build_clip
from ldvc.modeling.conv_patch_embed import ConvPatchEmbed
from recipes.lite import tune_tower
from recipes.lite.trunk import FIRST, Trunk
from recipes.lite.tune_tower import Tuning, main, start_decoders
from tests.forked import CONCEPTS
from tests.tiny_data import make_sets
from train.cpu_convolution import FixedDepthwise, fits, fix_depthwise
from train.data import BACKGROUND, Vocabulary, open_sets
from train.options import ConfigError, load_config
from train.progress import DivergedError

DILATED = {"kernel_size": 5, "padding": 4, "dilation": 2, "groups": 6}


@pytest.fixture(scope="module")
def lite() -> FrozenClip:
    return build_clip("lite")


@pytest.fixture
def stem() -> ConvPatchEmbed:
    """A small relative of lite's backbone with statistics that are not those of a fresh network."""
    stem = ConvPatchEmbed(8, patch_size=24, backbone="efficientnet_lite0").eval()
    for norm in stem.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 2)
                nn.init.normal_(norm.bias, std=0.1)
    return stem


def test_gradient_of_a_fixed_depthwise_convolution_is_autograds() -> None:
    plain = nn.Conv2d(6, 6, **DILATED)
    fixed = FixedDepthwise(copy.deepcopy(plain))
    left, right = (torch.randn(2, 6, 9, 7).requires_grad_() for _ in range(2))
    with torch.no_grad():
        right.copy_(left)
    weight = torch.randn(2, 6, 9, 7)
    one, two = plain(left), fixed(right)
    torch.testing.assert_close(two, one)
    (one * weight).sum().backward()
    (two * weight).sum().backward()
    torch.testing.assert_close(right.grad, left.grad)
    assert plain.weight.grad is not None and all(p.grad is None and not p.requires_grad for p in fixed.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fixed(right).dtype == plain(left).dtype == torch.bfloat16


def test_only_depthwise_convolutions_that_keep_the_size_are_fixed() -> None:
    others = [
        nn.Conv2d(6, 6, 3, padding=1),
        nn.Conv2d(6, 6, 3, padding=1, stride=2, groups=6),
        nn.Conv2d(6, 6, 3, groups=6),
    ]
    others += [nn.Conv2d(6, 6, 4, padding=1, groups=6), nn.ReLU()]
    module = nn.Sequential(*others, nn.Sequential(nn.Conv2d(6, 6, **DILATED)))
    assert not any(map(fits, others))
    fix_depthwise(module)
    assert list(module[:-1]) == others and isinstance(module[-1][0], FixedDepthwise)


@pytest.mark.parametrize(("first", "depthwise"), [(FIRST, False), (0, True)])
def test_the_split_trunk_is_the_stem_and_goes_back_into_it(stem: ConvPatchEmbed, first: int, depthwise: bool) -> None:
    stem = stem.double()  # rounding would add up over seven stages
    images = torch.randn(2, 3, 72, 96, dtype=torch.float64)
    trunk = Trunk(stem, first=first, depthwise=depthwise)
    before = copy.deepcopy(stem.backbone.state_dict())
    with torch.no_grad():
        expected = stem.features(images)
        torch.testing.assert_close(trunk.late(trunk.early(images), (72, 96)), expected, atol=1e-4, rtol=1e-4)
        for parameter in trunk.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
        changed = trunk.late(trunk.early(images), (72, 96))
        trunk.write_back(stem)
        assert (changed - expected).abs().max() > 0.01
        torch.testing.assert_close(stem.features(images), changed, atol=1e-3, rtol=1e-3)
    names = {name for name, tensor in stem.backbone.state_dict().items() if not torch.equal(tensor, before[name])}
    assert names and all(name.startswith("blocks") for name in names) and not any("running" in name for name in names)
    assert {int(name.split(".")[1]) for name in names} == set(range(first, 7))


def test_gradients_reach_the_late_stages_only(stem: ConvPatchEmbed) -> None:
    trunk = Trunk(stem)
    trunk.late(trunk.early(torch.randn(1, 3, 72, 72)), (72, 72)).sum().backward()
    learned = {name for name, parameter in trunk.named_parameters() if parameter.grad is not None}
    assert learned and all(name.startswith("stages.") and "conv_dw" not in name for name in learned)
    assert any("conv_pw." in name for name in learned) and any("conv_pwl." in name for name in learned)


def test_with_depthwise_kernels_every_stage_learns(stem: ConvPatchEmbed) -> None:
    trunk = Trunk(stem, first=0, depthwise=True)
    trunk.late(trunk.early(torch.randn(1, 3, 72, 72)), (72, 72)).sum().backward()
    learned = {name for name, parameter in trunk.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in trunk.named_parameters() if name.startswith("stages.")}
    assert any("conv_dw." in name for name in learned)
    with pytest.raises(AssertionError):
        Trunk(stem, first=FIRST + 1)


def test_plain_similarity_is_held_to_the_tower_as_it_was(tmp_path: Path, lite: FrozenClip) -> None:
    """The reference shares the early stages with the tower that learns, and nothing else."""
    make_sets(tmp_path / "data")
    vocabulary = Vocabulary(open_sets(tmp_path / "data", ["meadow"], "train"))
    clip = build_clip("lite")
    decoder, _ = load_checkpoint("lite", decoder="zegclip", clip=clip)
    tuning = Tuning(clip, lite, {"zegclip": decoder}, vocabulary, CONCEPTS, load_config("lite_tune"))
    labels = torch.zeros(1, 12, 12, dtype=torch.int16)
    batch = {"images": torch.randn(1, 3, 72, 72), "labels": labels, "set": torch.tensor([0])}

    def kept() -> float:
        with torch.no_grad():
            return float(tuning(batch, torch.tensor([0, 1]), torch.tensor([0, 2]), torch.tensor([0, 1]))["keep"])

    assert kept() == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        for parameter in tuning.trunk.stages.parameters():
            parameter += 0.1 * parameter.abs().mean() * torch.randn_like(parameter)
    assert kept() > 1e-3


def test_fresh_decoders_begin_at_plain_similarity_and_know_only_the_names_of_the_run(tmp_path: Path) -> None:
    make_sets(tmp_path / "data")
    vocabulary = Vocabulary(open_sets(tmp_path / "data", ["meadow"], "train"))
    clip, config = build_clip("lite"), load_config("lite_tune")
    decoders, metadata = start_decoders("fresh", clip, vocabulary, config)
    images = torch.randn(1, 3, 72, 72)
    for name, decoder in decoders.items():
        assert decoder.config.decoder == name and decoder.clip is clip
        assert metadata[name]["seen_names"] == vocabulary.spellings
        with torch.no_grad():
            said = decoder.eval()(images, ["dog", "grass"]).mask_logits
            plain = decoder.frozen_logits(images, names=["dog", "grass"])
        assert torch.corrcoef(torch.stack([said.flatten(), plain.flatten()]))[0, 1] > 0.9
    _, stored = load_checkpoint("lite", decoder="ldvc", clip=clip)
    config = load_config("lite_tune", ["inference={long_side: 320}"])
    _, metadata = start_decoders("lite", clip, vocabulary, config)
    assert metadata["ldvc"]["seen_names"][: len(stored["seen_names"])] == stored["seen_names"]
    assert set(vocabulary.spellings) <= set(metadata["ldvc"]["seen_names"])
    assert metadata["ldvc"]["inference"] == {"long_side": 320}, "as this run wants it, not as the one before"


def test_held_out_classes_are_hidden_from_the_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names are neither learned nor preserved nor read, and their pixels are none of the seen classes."""
    make_sets(tmp_path / "data")
    (tmp_path / "concepts.txt").write_text("zebra\nkitten\ncat\nairplane\n")

    class Seen(Exception):
        pass

    def look(self: Tuning, *arguments: object, **options: object) -> None:
        raise Seen(*arguments[3:5])  # vocabulary and concepts

    monkeypatch.setattr(Tuning, "__init__", look)
    changes = ["sets={meadow: 0.5, pets: 0.5}", "photos_every={}", f"concepts={tmp_path / 'concepts.txt'}"]
    command = ["--config", "lite_experiment_tune", "--decoders", "fresh", "--data", str(tmp_path / "data")]
    with pytest.raises(Seen) as found:
        main([*command, "--output", str(tmp_path / "out"), "--set", *changes])
    vocabulary, concepts = found.value.args
    assert vocabulary.names == ["grass", "sky", "dog"] and not {"cat", "airplane"} & {*concepts, *vocabulary.words}
    for dataset, table in zip(open_sets(tmp_path / "data", ["meadow", "pets"], "train"), vocabulary.tables, strict=True):
        hidden = [index for index in dataset.class_indices() if canonical(dataset.classes[index]) in ("cat", "airplane")]
        assert hidden and all(table[index] == BACKGROUND for index in hidden)


@pytest.fixture
def common(tmp_path: Path) -> list[str]:
    """A command line of four small steps on photos in `tmp_path`."""
    make_sets(tmp_path / "data")
    (tmp_path / "concepts.txt").write_text("\n".join(CONCEPTS) + "\n")
    data = ["--data", str(tmp_path / "data"), "--set", "sets={meadow: 0.5, pets: 0.5}", "crop=72", "long_side=96"]
    names = [f"concepts={tmp_path / 'concepts.txt'}", "preserve_names=2", "photos_every={}"]
    steps = ["train_batch_size=2", "checkpointing_steps=2", "warmup_steps=1", "max_train_steps=4", "log_steps=1"]
    return [*data, *names, *steps, "mixed_precision=no"]


def test_in_turn_each_step_teaches_one_decoder(
    tmp_path: Path, common: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    found: list[dict[str, float]] = []
    command = [*common, "log_steps=2", "--in_turn", "--keep_weight", "0", "--output", str(tmp_path / "out")]
    with caplog.at_level("INFO", logger="tune_tower"):
        main(command, on_step=lambda step, losses: found.append(losses))
    decoders = [{name.split(":")[0] for name in losses} - {"loss"} for losses in found]
    assert decoders == [{"ldvc"}, {"ldvc_without_lcsa"}, {"zegclip"}, {"ldvc"}]
    for losses in found:
        (own,) = (value for name, value in losses.items() if name.endswith(": loss"))
        assert losses["loss"] == own, "nothing is kept, nothing else is learned"
    (line,) = (record.getMessage() for record in caplog.records if record.getMessage().startswith("step 2/4"))
    assert f"ldvc: loss {found[0]['ldvc: loss']:.3f}" in line, "a mean over the steps that taught it"
    assert f"loss {(found[0]['loss'] + found[1]['loss']) / 2:.3f}," in line


def test_things_are_pasted_before_views_become_mosaics(
    tmp_path: Path, common: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple] = []

    class Enough(Exception):
        pass

    def enough(*arguments: object) -> None:
        calls.append(arguments)
        raise Enough

    monkeypatch.setattr(tune_tower, "paste", lambda batch, *others: calls.append(others) or {**batch, "pasted": True})
    monkeypatch.setattr(tune_tower, "mosaics", enough)
    with pytest.raises(Enough):
        main([*common, "--paste", "0.4", "--mosaics", "0.2", "--output", str(tmp_path / "out")])
    (paste_share, known, _), (batch, mosaic_share, _) = calls
    assert (paste_share, mosaic_share) == (0.4, 0.2) and batch["pasted"]
    assert known.sum(dim=1).tolist() == [1, 2], "meadow's dog, and the pets; meadow's stuff stays where it is"


def steep(loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same loss with a gradient that is no number: a root has no finite slope at 0."""
    return {"loss": loss + (0 * loss).sqrt()}


def test_a_run_tunes_tower_and_decoders_and_goes_on_where_it_stopped(
    tmp_path: Path, lite: FrozenClip, monkeypatch: pytest.MonkeyPatch, common: list[str]
) -> None:

    class Killed(Exception):
        pass

    def stop(step: int, losses: dict[str, float]) -> None:
        if step == 3:
            raise Killed

    kept: list[float] = []
    main([*common, "--output", str(tmp_path / "whole")], on_step=lambda step, losses: kept.append(losses["keep"]))
    assert kept[0] == pytest.approx(0, abs=1e-4) and kept[-1] > 1e-3, (
        "plain similarity starts where it was, then drifts"
    )
    with pytest.raises(Killed):
        main([*common, "--output", str(tmp_path / "parts")], on_step=stop)
    main([*common, "--output", str(tmp_path / "parts")])
    whole, parts = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    assert all(map(torch.equal, whole["parameters"], parts["parameters"]))
    with pytest.raises(ConfigError, match=r"other settings \(learning_rate, tower_rate\)"):
        main([*common, "--output", str(tmp_path / "parts"), "--tower_rate", "0.1", "--set", "learning_rate=1e-4"])

    forward = Tuning.forward
    monkeypatch.setattr(
        Tuning, "forward", lambda *arguments, **options: {"loss": forward(*arguments, **options)["loss"] * float("nan")}
    )
    for often in ("log_steps=1", "checkpointing_steps=0"), ("log_steps=4", "checkpointing_steps=1"):
        with pytest.raises(DivergedError, match="nan by step 1"):  # at a line of the log, or before a checkpoint
            main([*common, "--output", str(tmp_path / "broken"), "--set", *often])
    monkeypatch.setattr(Tuning, "forward", lambda *arguments, **options: steep(forward(*arguments, **options)["loss"]))
    with pytest.raises(DivergedError, match="Weights are no numbers by step 1"):
        main([*common, "--output", str(tmp_path / "broken"), "--set", "checkpointing_steps=1"])
    assert not (tmp_path / "broken" / "state.pt").exists()

    tuned = build_clip(str(tmp_path / "whole" / "clip"))
    before, after = lite.model.state_dict(), tuned.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith("visual.") for name in changed), "text tower and scale stay"
    assert "visual.proj" in changed and any(".blocks.6." in name for name in changed)
    assert not any(".conv_dw." in name or ".conv_stem." in name or "running" in name for name in changed)
    predictor = Predictor.from_pretrained(str(tmp_path / "whole"), decoder="zegclip")
    torch.testing.assert_close(predictor.model.clip.model.state_dict(), after)
