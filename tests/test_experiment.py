"""The experiment: what it runs, what it prints, and that every ablation switch changes what its name says."""

from __future__ import annotations

import argparse
import math
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from ldvc.config import DECODERS, ModelConfig
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from train import evaluate as evaluator
from train import experiment, tables
from train import train as trainer
from train.options import load_config


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
        tables.write_json(run.evaluation, [{"sets": {"msrc": numbers | {"mIoU_U": math.nan}}}])
    content = experiment.collect(runs)
    assert content["seeds"] == {"clip": [0], "ldvc": [0, 1], "zegclip": [0]}
    line = content["sets"]["msrc"]["ldvc"]
    assert line["hIoU"]["mean"] == pytest.approx(0.5) and line["hIoU"]["spread"] == pytest.approx(0.2 / math.sqrt(2))
    assert line["mIoU_U"]["mean"] is None
    table = experiment.markdown(content, "about")
    assert "| ldvc | 2 | 0.500 ± 0.141 |" in table and "| clip | 1 | 0.200 |" in table
    with pytest.raises(experiment.ConfigError, match="no_preservation"):
        experiment.read_ablations(["nonsense"])


def run_options(**changes: object) -> argparse.Namespace:
    given = {
        "data": "D",
        "cache_dir": "C",
        "config": "lite_experiment",
        "clip": None,
        "sets": ["msrc"],
        "unseen": "none",
    }
    given |= {"processes": 1, "towers": "lite", "shown": ["--long_side", "448"], "keep_patch_tokens": True}
    return argparse.Namespace(**given | changes)


def test_experiment_trains_what_is_missing_and_evaluates_it(tmp_path: Path) -> None:
    runs = experiment.plan(tmp_path, DECODERS, [0], experiment.read_ablations(["no_lcsa", "topk_1"]), [0])
    for run in runs:
        *training, evaluation = experiment.command(run, run_options())
        assert evaluation[1].endswith("evaluate.py") and evaluation[evaluation.index("--cache_dir") + 1] == "C"
        assert (len(training) == 1) == (run.decoder != "clip")
        for words in training:
            trainer.parse(words[[word.endswith("train.py") for word in words].index(True) + 1 :])  # words that it knows
            assert words[words.index("--decoder") + 1] == run.decoder and str(run.folder) in words
        evaluator.parse(evaluation[2:])
    assert [run.decoder for run in runs] == ["clip", "ldvc", "ldvc_without_lcsa", "zegclip", "ldvc_without_lcsa", "ldvc"]
    assert runs[-2].changes == () and runs[-1].changes == ("topk=1",)
    runs[1].folder.mkdir(parents=True)
    (runs[1].folder / "config.json").write_text("{}")
    (evaluation,) = experiment.command(runs[1], run_options(processes=2, keep_patch_tokens=False))
    assert evaluation[2:5] == ["accelerate.commands.launch", "--num_processes", "2"] and "--cache_dir" not in evaluation


def test_decoders_all_prints_one_table_with_every_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The commands themselves are replaced; the real ones run in test_train.py, test_resume.py and above."""
    started = []

    def pretend(words: list[str], **_: object) -> subprocess.CompletedProcess:
        started.append(words)
        if "--output" in words:
            numbers = dict.fromkeys(experiment.COLUMNS, 0.25) | {"benchmark": "voc"}
            tables.write_json(Path(words[words.index("--output") + 1] + ".json"), [{"sets": {"voc2012": numbers}}])
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(experiment.subprocess, "run", pretend)
    words = ["--config", "voc12_inductive", "--decoders", "all", "--seeds", "0", "--output_dir", str(tmp_path)]
    experiment.main(words)
    assert [Path(words[-1]).name for words in started if "--plain_clip" in words] == ["426"]
    assert ["ViT-B-16-quickgelu:openai" in words for words in started].count(True) == 1
    table = capsys.readouterr().out
    for line in ("clip", *DECODERS):
        assert f"| {line} | 1 | 0.250 |" in table
    assert "| CLIP-RC | quoted: " in table and "| - | 0.928 | 0.844 | 0.884 |" in table
    experiment.main(words)
    assert len(started) == 7, "nothing is done twice"


def pretended(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces trainings and evaluations; returns the list that fills with their commands."""
    started: list[list[str]] = []

    def pretend(words: list[str], **_: object) -> subprocess.CompletedProcess:
        started.append(words)
        if "--output" in words:
            numbers = dict.fromkeys(experiment.COLUMNS, 0.25)
            tables.write_json(Path(words[words.index("--output") + 1] + ".json"), [{"sets": {"msrc": numbers}}])
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(experiment.subprocess, "run", pretend)
    return started


def test_every_run_is_told_its_seed_its_changes_its_towers_and_what_is_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = pretended(monkeypatch)
    words = ["--decoders", "zegclip", "--seeds", "3", "5", "--ablations", "topk_1", "--ablation_seeds", "4", "--clip", "towers"]
    experiment.main([*words, "--output_dir", str(tmp_path), "--sets", "msrc", "--set", "max_train_steps=7"])
    told = []
    for command in started:
        script = next(place for place, word in enumerate(command) if word.endswith(("train.py", "evaluate.py")))
        if command[script].endswith("train.py"):
            given = trainer.parse(command[script + 1 :])
            told.append((given.decoder, given.seed, given.clip, given.set))
        else:
            given = evaluator.parse(command[script + 1 :])
            assert given.unseen == "lite_experiment" and given.sets == ["msrc"]
            assert given.plain_clip in (None, "towers") and (given.plain_clip is None) == bool(given.checkpoint)
    assert told == [
        ("zegclip", 3, "towers", ["max_train_steps=7"]),
        ("zegclip", 5, "towers", ["max_train_steps=7"]),
        ("ldvc", 4, "towers", ["max_train_steps=7", "topk=1"]),
    ]


def test_a_table_names_the_command_and_holds_no_runs_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    started = pretended(monkeypatch)
    words = ["--decoders", "ldvc", "--seeds", "0", "--sets", "msrc", "--output_dir", str(tmp_path)]
    experiment.main([*words, "--set", "max_train_steps=7"])
    table = capsys.readouterr().out
    assert f"`python train/experiment.py {' '.join(words)} --set max_train_steps=7`" in table and ": 7 steps of 4" in table
    count = len(started)
    with pytest.raises(SystemExit, match=r"other settings \(changes \['max_train_steps=7'\], not \[\]\)"):
        experiment.main(words)
    with pytest.raises(SystemExit, match="towers 'lite', not 'others'"):
        experiment.main([*words, "--clip", "others", "--collect"])
    assert len(started) == count


@pytest.mark.parametrize("config", ["lite_experiment", "lite_release", "lite_tune", "msrc", "voc12_inductive"])
def test_plain_similarity_is_shown_photos_as_the_configuration_says(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = pretended(monkeypatch)
    experiment.main(["--config", config, "--decoders", "--output_dir", str(tmp_path), "--sets", "msrc"])
    given = vars(evaluator.parse(started[0][2:]))
    assert evaluator.chosen_inference({}, given) == load_config(config).inference


@pytest.fixture(scope="module")
def tiny_model(tiny_clip: FrozenClip) -> Callable[..., LDVC]:
    """A model in which every part counts, and what an ablation changes in it."""
    base = {"visual_prompts": 3, "decoder_layers": 3, "decoder_heads": 4, "gate_init": 0.5, "local_conv": False}

    def build(**changes: object) -> LDVC:
        torch.manual_seed(0)
        return LDVC(replace(ModelConfig(clip="tiny", **base), **changes), tiny_clip).eval()

    return build


SWITCHES = {  # ablation -> parameters that vanish, parameters that appear
    "no_visual_prompts": ("image_tower.", None),
    "no_text_prompts": ("text_tower.prompts", None),
    "no_text_adapter": ("adapter.", None),
    "no_lcsa": (r"decoder.consensus", None),
    "local_convolution": (None, r"decoder.consensus.\d.attention.local"),
    "layers_1": (r"decoder.(consensus.[12]|guidance.[01])", None),  # the last block is cross-attention's scores alone
    "layers_2": (r"decoder.(consensus.2|guidance.1)", None),
    "layers_6": (None, r"decoder.(consensus.[345]|guidance.[234])"),
    "regions_4": (None, None),
    "regions_16": (None, None),
    "topk_1": (None, None),
    "topk_8": (None, None),
    "topk_64": (None, None),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_changes_what_it_says(name: str, tiny_model: Callable[..., LDVC], names: list[str]) -> None:
    """Parameters vanish or appear only where the name says; S and k leave them alone and change what LCSA attends to."""
    (changes,) = experiment.read_ablations([name]).values()
    values = yaml.safe_load("{" + ", ".join(change.replace("=", ": ") for change in changes) + "}")
    base, changed = tiny_model(), tiny_model(**values)
    before, after = (set(dict(model.named_parameters())) for model in (base, changed))
    gone, new = SWITCHES[name]
    assert before - after == {key for key in before if gone and re.match(gone, key)}
    assert after - before == {key for key in after if new and re.match(new, key)}
    assert bool(before - after) == (gone is not None) and bool(after - before) == (new is not None)

    for model in (base, changed):  # as after training: adapter, text prompts and convolution start by doing nothing
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    shared = {key: tensor for key, tensor in base.state_dict().items() if key in changed.state_dict()}
    changed.load_state_dict(shared, strict=False)
    images = torch.randn(1, 3, 256, 256)  # 16 x 16 patches
    outputs = [model(images, names, return_attention=True) for model in (base, changed)]
    assert (outputs[0].mask_logits - outputs[1].mask_logits).abs().max() > 1e-4
    if name.startswith(("regions", "topk")):
        routing = outputs[1].routing[0]
        wanted = values.get("regions", 8), values.get("topk", 4)
        assert (routing.layout.count[0], routing.regions.shape[-1]) == wanted


def test_every_ablation_is_a_valid_configuration_and_every_part_has_one() -> None:
    ablations = experiment.read_ablations(["all"])
    assert set(SWITCHES) <= set(ablations)
    for changes in ablations.values():
        load_config("lite_experiment", [change for change in changes if not change.startswith("decoder=")]).model_config()
