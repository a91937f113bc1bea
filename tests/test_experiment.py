"""The experiment: its runs, commands and tables, and that every ablation changes one part of the model."""

from __future__ import annotations

import argparse
import csv
import math
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from ldvc.config import DECODERS, ModelConfig
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from tests import forked
from train import evaluate as evaluator
from train import experiment
from train import train as trainer
from train.config import load_config
from train.files import write_json


def options_of(*words: str) -> argparse.Namespace:
    """The options of a command line, completed by its configuration."""
    options = experiment.parse(words)
    experiment.complete(options, load_config(options.config, options.set))
    return options


def split(command: Sequence[str]) -> tuple[ModuleType, list[str]]:
    """The module of the script that a command starts, and the arguments of the script."""
    (place,) = (place for place, word in enumerate(command) if word.endswith(".py"))
    return {module.__file__: module for module in (trainer, evaluator)}[command[place]], list(command[place + 1 :])


def arguments_of(command: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command, parsed by the script that it starts."""
    module, arguments = split(command)
    return module.parse(arguments)


def test_runs_are_planned_summarised_and_shown(tmp_path: Path) -> None:
    ablations = experiment.read_ablations(["no_distillation"])
    runs = experiment.plan(tmp_path, ["ldvc", "zegclip"], [0, 1], ablations, [0], ["max_train_steps=2"])
    lines = [("clip", 0), ("ldvc", 0), ("zegclip", 0), ("ldvc", 1), ("zegclip", 1), ("ldvc, no_distillation", 0)]
    assert [(run.line, run.seed) for run in runs] == lines
    assert runs[-1].changes[0] == "max_train_steps=2" and "distill_weight=0" in runs[-1].changes
    for run, value in zip(runs[:4], (0.2, 0.4, 0.3, 0.6), strict=True):
        facts = dict.fromkeys(experiment.COLUMNS, value) | {"mIoU_U": math.nan, "benchmark": "voc"}
        write_json(run.evaluation, [{"sets": {"voc2012": facts}}])
    content = experiment.summarize(experiment.read_results(runs))
    assert content["seeds"] == {"clip": [0], "ldvc": [0, 1], "zegclip": [0]}
    line = content["sets"]["voc2012"]["ldvc"]
    assert line["hIoU"]["mean"] == pytest.approx(0.5) and line["hIoU"]["spread"] == pytest.approx(0.2 / math.sqrt(2))
    assert line["mIoU_U"]["mean"] is None
    text = experiment.markdown(content, "about")
    assert "| ldvc | 2 | 0.500 ± 0.141 |" in text and "| clip | 1 | 0.200 |" in text
    assert "| CLIP-RC | quoted: " in text and "| - | - | - | - | - | 0.928 | 0.844 | 0.884 |" in text
    with pytest.raises(experiment.ConfigError, match="no_distillation"):
        experiment.read_ablations(["nonsense"])


def test_commands_pass_on_seed_changes_towers_and_unseen_classes(tmp_path: Path) -> None:
    options = options_of("--clip", "towers", "--sets", "msrc", "--cache_dir", "C", "--set", "max_train_steps=7")
    runs = experiment.plan(tmp_path, DECODERS, [3], experiment.read_ablations(["no_lcsa", "topk_1"]), [4], options.set)
    found = []
    for run in runs:
        *training, evaluation = map(arguments_of, experiment.commands_of(run, options))
        assert evaluation.unseen == "lite_experiment" and evaluation.sets == ["msrc"] and evaluation.cache_dir == "C"
        assert evaluation.checkpoint == [str(run.folder)] * len(training)
        assert evaluation.plain_clip == (None if training else "towers")
        for given in training:
            assert given.output_dir == str(run.folder) and given.clip == "towers"
            found.append((given.decoder, int(given.seed), given.set))
    steps = ["max_train_steps=7"]
    assert found[:3] == [(decoder, 3, steps) for decoder in DECODERS]
    assert found[3:] == [("ldvc_without_lcsa", 4, steps), ("ldvc", 4, [*steps, "topk=1"])]
    runs[1].folder.mkdir(parents=True)
    (runs[1].folder / "config.json").write_text("{}")
    (evaluation,) = experiment.commands_of(runs[1], options_of("--processes", "2"))
    assert evaluation[evaluation.index("--nproc_per_node") + 1] == "2", "a finished training is not repeated"


@pytest.mark.parametrize("config", ["lite_experiment", "lite_release", "lite_tune", "msrc", "voc12_inductive"])
def test_plain_similarity_uses_the_inference_settings_of_the_configuration(config: str, tmp_path: Path) -> None:
    options = options_of("--config", config, "--sets", "msrc")
    ((evaluation,),) = (experiment.commands_of(run, options) for run in experiment.plan(tmp_path, [], [0], {}, []))
    given = arguments_of(evaluation)
    assert evaluator.chosen_inference({}, vars(given)) == load_config(config).inference
    assert given.plain_clip == ("ViT-B-16-quickgelu:openai" if config == "voc12_inductive" else "lite")


def test_a_whole_experiment(
    tmp_path: Path, tiny_clip_folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One training of two steps and two evaluations; then nothing is repeated, and other settings are refused."""
    started: list[ModuleType] = []

    def run(command: Sequence[str], **_: object) -> subprocess.CompletedProcess:
        """In a forked process, which saves the time of the imports."""
        module, arguments = split(command)
        started.append(module)
        return subprocess.CompletedProcess(command, *forked.run(module.main, arguments))

    monkeypatch.setattr(experiment.subprocess, "run", run)
    root = forked.make_workplace(tmp_path, tiny_clip_folder)
    words = ["--config", str(root / "tiny.yaml"), "--decoders", "zegclip", "--seeds", "0", "--sets", "pets"]
    words += ["--output_dir", str(root / "out"), "--cache_dir", str(root / "cache"), "--set", "max_train_steps=2"]
    experiment.main(words)
    text = capsys.readouterr().out
    assert text.startswith(f"`python train/experiment.py {' '.join(words)}`") and ": 2 steps of 2 photos" in text
    assert "| clip | 1 |" in text and "| zegclip | 1 |" in text
    with open(root / "out" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["decoder"], row["set"]) for row in rows] == [("clip", "pets"), ("zegclip", "pets")]
    assert all("train/evaluate.py" in row["command"] and 0 <= float(row["pAcc"]) <= 1 for row in rows)
    experiment.main(words)
    assert started == [evaluator, trainer, evaluator], "nothing is repeated"
    with pytest.raises(SystemExit, match=r"other settings \(changes \['max_train_steps=2'\], not \['max_train_steps=3'\]\)"):
        experiment.main([*words[:-1], "max_train_steps=3"])


SWITCHES = {  # ablation -> parameters that disappear, parameters that appear
    "no_visual_prompts": ("image_tower.", None),
    "no_text_prompts": ("text_tower.prompts", None),
    "no_text_adapter": ("adapter.", None),
    "no_lcsa": (r"decoder.consensus", None),
    "local_convolution": (None, r"decoder.consensus.\d.attention.local"),
    "layers_1": (r"decoder.(consensus.[12]|guidance.[01])", None),  # the last block has no guidance
    "layers_2": (r"decoder.(consensus.2|guidance.1)", None),
    "layers_6": (None, r"decoder.(consensus.[345]|guidance.[234])"),
    "regions_4": (None, None),
    "regions_16": (None, None),
    "topk_1": (None, None),
    "topk_8": (None, None),
    "topk_64": (None, None),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_an_ablation_changes_one_part_of_the_model(name: str, tiny_config: ModelConfig, tiny_clip: FrozenClip) -> None:
    """The parameters of that part disappear or appear. S and k have no parameters; they change the regions of LCSA."""
    (changes,) = experiment.read_ablations([name]).values()
    values = yaml.safe_load("{" + ", ".join(change.replace("=", ": ") for change in changes) + "}")
    base = replace(tiny_config, decoder_layers=3, local_conv=False)
    models = [LDVC(replace(base, **change), tiny_clip).eval() for change in ({}, values)]
    before, after = (set(dict(model.named_parameters())) for model in models)
    gone, new = SWITCHES[name]
    assert before - after == {key for key in before if gone and re.match(gone, key)}
    assert after - before == {key for key in after if new and re.match(new, key)}
    assert bool(before - after) == (gone is not None) and bool(after - before) == (new is not None)
    if not gone and not new:
        with torch.no_grad():
            output = models[1](torch.randn(1, 3, 256, 256), ["dog"], return_attention=True)  # 16 x 16 patches
        wanted = values.get("regions", 8), values.get("topk", 4)
        assert (output.routing[0].layout.count[0], output.routing[0].regions.shape[-1]) == wanted


def test_every_ablation_is_a_valid_configuration() -> None:
    ablations = experiment.read_ablations(["all"])
    assert set(SWITCHES) <= set(ablations)
    for changes in ablations.values():
        load_config("lite_experiment", [change for change in changes if not change.startswith("decoder=")])
