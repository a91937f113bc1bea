"""The experiment with held-out classes in one command: every decoder, every seed, one table.

    python train/experiment.py --output_dir runs/lite_experiment --jobs 2
    python train/experiment.py --output_dir runs/lite_experiment --ablations all --ablation_seeds 0
    python train/experiment.py --config voc12_inductive --decoders all --seeds 0 --data /data --output_dir runs/voc12
    python train/experiment.py --config msrc --decoders all --seeds 0 --processes 2 --output_dir runs/msrc
    python train/experiment.py --config voc12_inductive --seeds 0 --output_dir runs/voc12 --target l4x4

--decoders all compares ZegCLIP, LDVC, and LDVC without LCSA. If the evaluation is one of the published benchmarks, published
numbers are printed below, marked as quoted. --ablations changes one part of LDVC at a time.

Each run is a training (train/train.py) and an evaluation (train/evaluate.py). Interrupted runs resume at their last
checkpoint. Finished runs are not repeated. Several commands may share an output folder: each skips the runs that another is
working on. A run that was made with other settings is an error. The command writes results.json, results.csv and results.md
into the output folder.
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

import yaml

from ldvc.config import DECODERS
from ldvc.errors import LdvcError
from train import job_plan, jobs
from train.config import CONFIG_FOLDER, ConfigError, TrainConfig, load_config
from train.files import write_json
from train.tables import COLUMNS, quoted_note, quoted_rows, show, table, write_csv

logger = logging.getLogger("experiment")
ROOT = Path(__file__).resolve().parents[1]
CLIP = "clip"
SETTINGS = "settings.json"  # in the folder of a run, see `settings_of`


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    line: str  # row of the table; the runs of a row differ in the seed only
    decoder: str
    seed: int
    changes: tuple[str, ...]
    folder: Path

    @property
    def evaluation(self) -> Path:
        """The file with the results of the run; it exists if the run is finished."""
        return self.folder / "evaluation.json"


def plan(
    root: Path,
    decoders: Sequence[str],
    seeds: Sequence[int],
    ablations: dict[str, list[str]],
    ablation_seeds: Sequence[int],
    changes: Sequence[str] = (),
) -> list[Run]:
    """All runs in their order: seed by seed, so that an unfinished experiment compares all decoders."""
    runs = [Run(CLIP, CLIP, 0, (), root / CLIP)]
    for seed in seeds:
        runs += [Run(name, name, seed, tuple(changes), root / name / f"seed{seed}") for name in decoders]
    for seed in ablation_seeds:
        for name, ablation_changes in ablations.items():
            decoder = next((each.removeprefix("decoder=") for each in ablation_changes if each.startswith("decoder=")), "ldvc")
            other_changes = [each for each in ablation_changes if not each.startswith("decoder=")]
            folder = root / "ablations" / name / f"seed{seed}"
            runs.append(Run(f"ldvc, {name}", decoder, seed, (*changes, *other_changes), folder))
    return runs


def settings_of(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the results of a run depend on."""
    settings = {"config": options.config, "changes": list(run.changes), "clip": options.clip, "processes": options.processes}
    if run.decoder == CLIP:
        settings = {"towers": options.towers, "shown": options.inference_flags}
    return settings | {"sets": options.sets, "unseen": options.unseen}


def require_same(run: Run, options: argparse.Namespace) -> None:
    """Raises ConfigError if a run in the output folder was made with other settings."""
    file, settings = run.folder / SETTINGS, settings_of(run, options)
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else settings
    differences = [f"{key} {stored.get(key)!r}, not {value!r}" for key, value in settings.items() if stored.get(key) != value]
    if differences:
        raise ConfigError(
            f"{run.folder} was made with other settings ({'; '.join(differences)}); give another --output_dir, or remove it."
        )


def commands_of(run: Run, options: argparse.Namespace) -> list[list[str]]:
    """The commands that finish a run: the training, unless it is finished, and the evaluation."""
    start = [sys.executable]
    if options.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes)]
    train = [*start, str(ROOT / "train" / "train.py"), "--config", options.config, "--data", options.data]
    train += ["--decoder", run.decoder, "--seed", str(run.seed), "--cache_dir", options.cache_dir]
    train += ["--output_dir", str(run.folder), "--resume_from_checkpoint", "latest"]
    train += ["--clip", options.clip] if options.clip else []
    train += ["--set", *run.changes] if run.changes else []
    evaluate = [*start, str(ROOT / "train" / "evaluate.py"), "--data", options.data, "--sets", *options.sets]
    evaluate += ["--unseen", options.unseen, "--output", str(run.evaluation.with_suffix(""))]
    evaluate += ["--cache_dir", options.cache_dir] if options.keep_patch_tokens else []
    if run.decoder == CLIP:
        return [[*evaluate, "--plain_clip", options.towers, *options.inference_flags]]
    evaluate += ["--checkpoint", str(run.folder)]
    trained = (run.folder / "config.json").is_file()  # the last file that a training writes
    return [evaluate] if trained else [train, evaluate]


def finish(run: Run, options: argparse.Namespace) -> None:
    """Run the missing commands of a run, unless another process is working on it."""
    if run.evaluation.is_file():
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // (options.jobs * options.processes))
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    with open(run.folder / "lock", "w") as lock, open(run.folder / "output.txt", "a") as output:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s, seed %d: another process is working on it", run.line, run.seed)
            return
        write_json(run.folder / SETTINGS, settings_of(run, options))
        logger.info("%s, seed %d: started; output in %s", run.line, run.seed, output.name)
        for words in commands_of(run, options):
            done = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
            if done.returncode:
                logger.error("%s, seed %d: failed with code %d, see %s", run.line, run.seed, done.returncode, output.name)
                return
        logger.info("%s, seed %d: finished", run.line, run.seed)


def read_results(runs: Sequence[Run]) -> list[tuple[Run, dict[str, Any]]]:
    """The finished runs and their results, as train/evaluate.py writes them."""
    finished = [run for run in runs if run.evaluation.is_file()]
    return [(run, json.loads(run.evaluation.read_text(encoding="utf-8"))[0]) for run in finished]


def summarize(results: Sequence[tuple[Run, dict[str, Any]]]) -> dict[str, Any]:
    """Statistics over seeds.

    Returns:
        "seeds": line -> seeds; "sets": set -> line -> measure -> {"values", "mean", "spread"}; "benchmarks": set -> published
        benchmark or None.
    """
    content: dict[str, Any] = {"seeds": {}, "sets": {}, "benchmarks": {}}
    for run, result in results:
        content["seeds"].setdefault(run.line, []).append(run.seed)
        for name, facts in result["sets"].items():
            content["benchmarks"][name] = facts["benchmark"]
            measures = content["sets"].setdefault(name, {}).setdefault(run.line, {})
            for measure in COLUMNS:
                values = measures.get(measure, {"values": []})["values"]
                values += [] if facts[measure] is None else [facts[measure]]
                average, spread = mean(values) if values else None, stdev(values) if len(values) > 1 else None
                measures[measure] = {"values": values, "mean": average, "spread": spread}
    return content


def markdown(content: dict[str, Any], about: str) -> str:
    """One table per data set: mean ± sample standard deviation over seeds."""
    text = [about, ""]

    def cell(measure: dict[str, Any]) -> str:
        return show(measure["mean"]) + ("" if measure["spread"] is None else f" ± {measure['spread']:.3f}")

    for name, lines in content["sets"].items():
        rows = [[line, str(len(content["seeds"][line])), *map(cell, measures.values())] for line, measures in lines.items()]
        benchmark = content["benchmarks"][name]
        rows += quoted_rows(benchmark, list(COLUMNS))
        text += [f"### {name} val", "", *table(["decoder", "seeds", *COLUMNS.values()], rows), *quoted_note(benchmark), ""]
    return "\n".join(text)


def read_ablations(wanted: Sequence[str]) -> dict[str, list[str]]:
    """Ablations of train/configs/lite_ablations.yaml: name -> changes of the configuration; ConfigError for an unknown name."""
    ablations = yaml.safe_load((CONFIG_FOLDER / "lite_ablations.yaml").read_text(encoding="utf-8"))
    if unknown := [name for name in wanted if name not in (*ablations, "all")]:
        raise ConfigError(f"There is no ablation '{unknown[0]}'. Known ones: {', '.join(ablations)}, or all.")
    return ablations if "all" in wanted else {name: ablations[name] for name in wanted}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="lite_experiment")
    add("--output_dir", default="runs/lite_experiment")
    add("--decoders", nargs="*", default=["all"], choices=[*DECODERS, "all"], help="default: all three")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--ablations", nargs="+", default=[], help="names of lite_ablations.yaml, or all")
    add("--ablation_seeds", nargs="+", type=int, default=[0])
    add("--sets", nargs="+", help="data sets to evaluate on; default: the configuration's validation sets")
    add("--processes", type=int, default=1, help="number of processes of each training and evaluation")
    add("--data", help="folder that holds the data sets; default: the configuration's")
    add("--cache_dir", default="runs/cache")
    add("--clip", help="towers of CLIP; default: the configuration's")
    add("--jobs", type=int, default=1, help="number of runs at the same time; they share the cores")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="changes of the configuration for every run")
    jobs.add_arguments(parser)
    return parser.parse_args(arguments)


def complete(options: argparse.Namespace, config: TrainConfig) -> None:
    """Sets the options that follow from the configuration."""
    model = config.model
    options.unseen = config.unseen or "none"
    options.sets = options.sets or config.validation_sets or list(config.sets)
    options.data = options.data or config.data
    options.towers = options.clip or (f"{model.clip}:{model.pretrained}" if model.pretrained else model.clip)
    options.inference_flags = [word for key, value in config.inference.items() for word in (f"--{key}", str(value))]
    options.keep_patch_tokens = bool(config.views_per_photo)
    options.decoders = list(DECODERS) if "all" in options.decoders else options.decoders


def main(arguments: list[str] | None = None) -> None:
    """Runs the command. The exit code is 1 if runs are missing."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    job = jobs.take_options(vars(options))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        config = load_config(options.config, options.set)
        complete(options, config)
        root = Path(options.output_dir)
        ablations = read_ablations(options.ablations)
        runs = plan(root, options.decoders, options.seeds, ablations, options.ablation_seeds, options.set)
        if jobs.is_wanted(job):
            return jobs.submit(job, job_plan.experiment(config, vars(options), vars(parse([])), len(runs) - 1))
        for run in runs:
            require_same(run, options)
    except LdvcError as error:
        sys.exit(f"error: {error}")
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda run: finish(run, options), runs))
    results = read_results(runs)
    content = summarize(results)
    photos = config.train_batch_size * config.gradient_accumulation_steps * options.processes
    about = (
        f"`{shlex.join(['python', 'train/experiment.py', *arguments])}` (configuration `{options.config}`): "
        f"{config.max_train_steps} steps of {photos} photos; "
        f"held out: split `{options.unseen}`. Mean ± sample standard deviation over seeds. "
        f'"offset": 0.1 subtracted from the scores of seen classes.'
    )
    text = markdown(content, about)
    write_json(root / "results.json", content)
    write_csv(root / "results.csv", [result for _, result in results])
    (root / "results.md").write_text(text, encoding="utf-8")
    print(text)
    missing = [run for run in runs if not run.evaluation.is_file()]
    if missing:
        missing_names = ", ".join(f"{run.line} seed {run.seed}" for run in missing)
        sys.exit(f"{len(missing)} of {len(runs)} runs are not finished: {missing_names}")


if __name__ == "__main__":
    main()
