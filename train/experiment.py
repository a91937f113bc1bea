"""The experiment with held-out classes, in one command: every decoder, every seed, one table.

    python train/experiment.py --output_dir runs/lite_experiment --jobs 2
    python train/experiment.py --output_dir runs/lite_experiment --ablations all --ablation_seeds 0
    python train/experiment.py --output_dir runs/lite_experiment --collect
    python train/experiment.py --config voc12_inductive --decoders all --seeds 0 --data /data --output_dir runs/voc12
    python train/experiment.py --config msrc --decoders all --seeds 0 --processes 2 --output_dir runs/msrc

--decoders all is the paper's comparison: ZegCLIP, LDVC, and LDVC trained without LCSA. Published numbers are printed below,
marked as quoted, where the evaluation is one of the published benchmarks. --ablations leaves out or changes one part at a time.

Each run is a call of train/train.py and then of the evaluator. Interrupted runs continue at their last checkpoint, finished
ones are not repeated, and several of these commands may share one output folder: a run that another is working on is skipped.
A run that lies there with other settings is refused. Writes results.json and results.md into the output folder.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

import torch
import yaml

from ldvc.config import DECODERS
from ldvc.errors import LdvcError
from train.options import CONFIG_FOLDER, ConfigError, load_config
from train.tables import quoted_note, quoted_rows, show, write_json

logger = logging.getLogger("experiment")
ROOT = Path(__file__).resolve().parents[1]
CLIP = "clip"
COLUMNS = {
    "pAcc": "pAcc",
    "mIoU_S": "mIoU(S)",
    "mIoU_U": "mIoU(U)",
    "hIoU": "hIoU",
    "mIoU_S_offset": "S, offset 0.1",
    "mIoU_U_offset": "U, offset 0.1",
    "hIoU_offset": "hIoU, offset 0.1",
    "present_accuracy": "acc, present names",
    "attention_ap": "attention AP",
    "attention_contrast": "contrast",
    "fragments": "fragments",
}


@dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Attributes:
        line: line of the table; runs of a line differ in the seed only.
        decoder, seed, changes: what the trainer is told.
        folder: the run's own.
    """

    line: str
    decoder: str
    seed: int
    changes: tuple[str, ...]
    folder: Path

    @property
    def evaluation(self) -> Path:
        """Where the run's numbers lie; its presence means that the run is finished."""
        return self.folder / "evaluation.json"

    @property
    def settings_file(self) -> Path:
        """On what they depend, see `settings_of`."""
        return self.folder / "settings.json"

    @property
    def trained(self) -> bool:
        """The trainer writes the checkpoint's config.json at its very end."""
        return (self.folder / "config.json").is_file()


def plan(
    root: Path,
    decoders: Sequence[str],
    seeds: Sequence[int],
    ablations: dict[str, list[str]],
    ablation_seeds: Sequence[int],
    changes: Sequence[str] = (),
) -> list[Run]:
    """All runs, seed by seed, so that an unfinished experiment already compares all decoders."""
    runs = [Run(CLIP, CLIP, 0, (), root / CLIP)]
    for seed in seeds:
        runs += [Run(name, name, seed, tuple(changes), root / name / f"seed{seed}") for name in decoders]
    for seed in ablation_seeds:
        for name, own in ablations.items():
            decoder = [change.removeprefix("decoder=") for change in own if change.startswith("decoder=")]
            rest = [change for change in own if not change.startswith("decoder=")]
            folder = root / "ablations" / name / f"seed{seed}"
            runs.append(Run(f"ldvc, {name}", decoder[-1] if decoder else "ldvc", seed, (*changes, *rest), folder))
    return runs


def launch(processes: int) -> list[str]:
    """How accelerate starts a script; precision is the configuration's affair, the rest silences questions."""
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
    ]
    if processes > 1 and not torch.accelerator.is_available():
        words.append("--cpu")
    return [*words, "--dynamo_backend", "no", "--mixed_precision", "no"]


def settings_of(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers of a run depend on, beside the data."""
    wanted = {"config": options.config, "changes": list(run.changes), "clip": options.clip, "processes": options.processes}
    if run.decoder == CLIP:
        wanted = {"towers": options.towers, "shown": options.shown}
    return wanted | {"sets": options.sets, "unseen": options.unseen}


def require_same(run: Run, options: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: the run was begun with other settings, so that its numbers are no part of this experiment.
    """
    if not run.settings_file.is_file():
        return
    found, wanted = json.loads(run.settings_file.read_text(encoding="utf-8")), settings_of(run, options)
    others = [f"{key} {found.get(key)!r}, not {value!r}" for key, value in wanted.items() if found.get(key) != value]
    if others:
        raise ConfigError(
            f"{run.folder} was made with other settings ({'; '.join(others)}); give another --output_dir, or remove it."
        )


def command(run: Run, options: argparse.Namespace) -> list[list[str]]:
    """The commands that finish a run."""
    shared, commands = ["--data", options.data], []
    if run.decoder != CLIP and not run.trained:
        train = [*launch(options.processes), str(ROOT / "train" / "train.py"), "--config", options.config]
        train += ["--decoder", run.decoder, "--seed", str(run.seed), *shared, "--cache_dir", options.cache_dir]
        train += ["--output_dir", str(run.folder), "--resume_from_checkpoint", "latest"]
        if options.clip:
            train += ["--clip", options.clip]
        if run.changes:
            train += ["--set", *run.changes]
        commands.append(train)
    start = launch(options.processes) if options.processes > 1 else [sys.executable]
    evaluate = [*start, str(ROOT / "train" / "evaluate.py"), *shared, "--sets", *options.sets]
    evaluate += ["--unseen", options.unseen, "--output", str(run.evaluation.with_suffix(""))]
    if options.keep_patch_tokens:
        evaluate += ["--cache_dir", options.cache_dir]
    if run.decoder == CLIP:
        evaluate += ["--plain_clip", options.towers, *options.shown]
    else:
        evaluate += ["--checkpoint", str(run.folder)]
    commands.append(evaluate)
    return commands


def finish(run: Run, options: argparse.Namespace) -> None:
    """Does what is missing of a run, unless another process is at it."""
    if run.evaluation.is_file():
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // (options.jobs * options.processes))
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ  # a number that was set stays
    with open(run.folder / "lock", "w") as lock, open(run.folder / "output.txt", "a") as output:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s, seed %d: another process is at it", run.line, run.seed)
            return
        write_json(run.settings_file, settings_of(run, options))
        logger.info("%s, seed %d: started; output in %s", run.line, run.seed, output.name)
        for words in command(run, options):
            code = subprocess.run(
                words, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
            ).returncode
            if code:
                logger.error("%s, seed %d: failed with code %d, see %s", run.line, run.seed, code, output.name)
                return
        logger.info("%s, seed %d: finished", run.line, run.seed)


def collect(runs: Sequence[Run]) -> dict[str, Any]:
    """Numbers of the finished runs: set -> line -> measure -> {"values", "mean", "spread"}, and the seeds of each line."""
    lines: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for run in runs:
        if run.evaluation.is_file():
            (result,) = json.loads(run.evaluation.read_text(encoding="utf-8"))
            lines.setdefault(run.line, []).append((run.seed, result["sets"]))
    content: dict[str, Any] = {
        "seeds": {line: [seed for seed, _ in found] for line, found in lines.items()},
        "sets": {},
        "benchmarks": {},
    }
    for line, found in lines.items():
        for name, numbers in found[0][1].items():
            table = content["sets"].setdefault(name, {})
            content["benchmarks"][name] = numbers.get("benchmark")
            table[line] = {}
            for measure in COLUMNS:
                values = [sets[name][measure] for _, sets in found if sets[name][measure] is not None]
                table[line][measure] = {
                    "values": values,
                    "mean": mean(values) if values else None,
                    "spread": stdev(values) if len(values) > 1 else None,
                }
    return content


def markdown(content: dict[str, Any], about: str) -> str:
    """One table per data set: mean, and after +- the sample standard deviation over seeds."""
    text = [about, ""]
    header = "| decoder | seeds | " + " | ".join(COLUMNS.values()) + " |"
    for name, table in content["sets"].items():
        text += [f"### {name} val", "", header, "|---|---|" + "---|" * len(COLUMNS)]
        for line, numbers in table.items():
            cells = []
            for measure in COLUMNS:
                value = numbers[measure]
                spread = "" if value["spread"] is None else f" ± {value['spread']:.3f}"
                cells.append(show(value["mean"]) + spread)
            text.append(f"| {line} | {len(content['seeds'][line])} | " + " | ".join(cells) + " |")
        benchmark = content["benchmarks"].get(name)
        text += [*quoted_rows(benchmark, list(COLUMNS), before=2), *quoted_note(benchmark), ""]
    return "\n".join(text)


def read_ablations(wanted: Sequence[str]) -> dict[str, list[str]]:
    """Named changes from train/configs/lite_ablations.yaml.

    Raises:
        ConfigError: an unknown name.
    """
    known = yaml.safe_load((CONFIG_FOLDER / "lite_ablations.yaml").read_text(encoding="utf-8"))
    if "all" in wanted:
        return known
    for name in wanted:
        if name not in known:
            raise ConfigError(f"There is no ablation '{name}'. Known ones: {', '.join(known)}, or all.")
    return {name: known[name] for name in wanted}


def main(arguments: list[str] | None = None) -> None:
    """The command; ends with code 1 while runs are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="lite_experiment")
    parser.add_argument("--output_dir", default="runs/lite_experiment")
    parser.add_argument("--decoders", nargs="*", default=["all"], choices=[*DECODERS, "all"], help="default: all three")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ablations", nargs="+", default=[], help="names of lite_ablations.yaml, or all")
    parser.add_argument("--ablation_seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--sets", nargs="+", help="data sets to evaluate on; default: the configuration's validation sets"
    )
    parser.add_argument("--processes", type=int, default=1, help="of each training and evaluation")
    parser.add_argument("--data", help="folder that holds the data sets; default: the configuration's")
    parser.add_argument("--cache_dir", default="runs/cache")
    parser.add_argument("--clip", help="towers, if not those of the configuration")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out among them")
    parser.add_argument("--collect", action="store_true", help="run nothing, only write the table of what is finished")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="changes for every run"
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        config = load_config(options.config, options.set)
        options.unseen = config.unseen or "none"
        options.sets = options.sets or config.validation_sets or list(config.sets)
        options.data = options.data or config.data
        model = config.model_config()
        options.towers = options.clip or (f"{model.clip}:{model.pretrained}" if model.pretrained else model.clip)
        options.shown = [word for key, value in config.inference.items() for word in (f"--{key}", str(value))]
        options.keep_patch_tokens = bool(config.views_per_photo)
        options.decoders = list(DECODERS) if "all" in options.decoders else options.decoders
        root = Path(options.output_dir)
        ablations = read_ablations(options.ablations)
        runs = plan(root, options.decoders, options.seeds, ablations, options.ablation_seeds, options.set)
        for run in runs:
            require_same(run, options)
    except LdvcError as error:
        sys.exit(f"error: {error}")
    if not options.collect:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda run: finish(run, options), runs))
    content = collect(runs)
    photos = config.train_batch_size * config.gradient_accumulation_steps * options.processes
    about = (
        f"`{shlex.join(['python', 'train/experiment.py', *arguments])}` (configuration `{options.config}`): "
        f"{config.max_train_steps} steps of {photos} photos; "
        f"held out: split `{options.unseen}`. Mean ± sample standard deviation over seeds. "
        f'"offset": 0.1 subtracted from the scores of seen classes.'
    )
    table = markdown(content, about)
    write_json(root / "results.json", content)
    (root / "results.md").write_text(table, encoding="utf-8")
    print(table)
    missing = [run for run in runs if not run.evaluation.is_file()]
    if missing:
        listed = ", ".join(f"{run.line} seed {run.seed}" for run in missing)
        sys.exit(f"{len(missing)} of {len(runs)} runs are not finished: {listed}")


if __name__ == "__main__":
    main()
