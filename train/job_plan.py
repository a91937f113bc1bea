"""The plan of a job on a rented GPU: machine, costs, files and shell commands (train/jobs.py starts the job)."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import Volume

from ldvc.bundled import ASSETS
from ldvc.errors import LdvcError
from train.config import TrainConfig
from train.data.benchmarks import NAMES
from train.files import project_files, real_files
from train.hub import NOT_UPLOADED

ROOT = Path(__file__).resolve().parents[1]
MOUNT = "/bucket"
IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
CODE = ("ldvc", "train", "recipes/lite", "pyproject.toml", "requirements.lock")
CODE_KINDS = (".py", ".json", ".yaml", ".txt", ".toml", ".lock")
PAGE_AND_RECIPE = re.compile(r"ldvc/web/|recipes/.*\.py$")  # training needs only the word lists of the recipe


class JobError(LdvcError):
    """A job cannot be started, or it failed."""


# ---- machines -----------------------------------------------------------------------------------------------------------

PRICES_READ = "2026-11-29"
TRAINING_HOURS = {"voc2012": (20_000, 3.0), "pascal_context59": (40_000, 8.0), "coco_stuff164k": (80_000, 20.0)}
"""Benchmark -> steps of 16 photos, and their hours on four RTX 3090, as the authors of Cascade-CLIP publish them."""
SPEEDS = {"T4": 0.3, "L4": 0.6, "A10G": 0.8, "L40S": 1.6, "A100": 1.6, "RTX PRO 6000": 2.0, "H200": 3.0}
"""GPU -> speed over an RTX 3090. Assumed from specifications, not measured: an estimate may be wrong by a factor of 1.5."""
WITHOUT_ESTIMATE = 12  # hours until the timeout, if no time can be estimated
_FACTOR = 1.5


class Flavor(NamedTuple):
    """A machine: number and kind of its GPUs, and USD an hour."""

    gpus: int
    gpu: str
    price: float


_TABLE = {
    "T4": {"t4-small": (1, 0.40), "t4-medium": (1, 0.60)},
    "L4": {"l4x1": (1, 0.80), "l4x4": (4, 3.80)},
    "L40S": {"l40sx1": (1, 1.80), "l40sx4": (4, 8.30), "l40sx8": (8, 23.50)},
    "A10G": {"a10g-small": (1, 1.00), "a10g-large": (1, 1.50), "a10g-largex2": (2, 3.00), "a10g-largex4": (4, 5.00)},
    "A100": {"a100-large": (1, 2.50), "a100x4": (4, 10.00), "a100x8": (8, 20.00)},
    "H200": {"h200": (1, 5.00), "h200x2": (2, 10.00), "h200x4": (4, 20.00), "h200x8": (8, 40.00)},
    "RTX PRO 6000": {"rtx-pro-6000": (1, 2.75)} | {f"rtx-pro-6000x{n}": (n, n * 2.75) for n in (2, 4, 8)},
}
FLAVORS = {name: Flavor(n, gpu, price) for gpu, rows in _TABLE.items() for name, (n, price) in rows.items()}
"""The GPU flavors as https://huggingface.co/docs/hub/jobs-pricing listed them on `PRICES_READ`."""


def from_api(hardware: Iterable[Any]) -> dict[str, Flavor]:
    """Flavors as `HfApi.list_jobs_hardware` returns them; machines without a GPU are left out."""
    an_hour = {"second": 3600, "minute": 60, "hour": 1}
    return {
        each.name: Flavor(int(gpu.quantity), gpu.model, each.unit_cost_usd * an_hour[each.unit_label])
        for each in hardware
        if (gpu := each.accelerator) and gpu.type == "gpu"
    }


def hours_of(timeout: str) -> float:
    """The hours of a time such as "90m"."""
    return float(timeout[:-1]) * {"s": 1 / 3600, "m": 1 / 60, "h": 1, "d": 24}[timeout[-1]]


def estimate(flavor: Flavor, sets: Sequence[str], steps: int, photos: int, seconds_per_step: float | None) -> tuple[str, str]:
    """Estimates the time of trainings: one sentence with hours, costs and their basis, and a timeout that is long enough.

    `steps`: of all trainings together. `photos`: of one step. `seconds_per_step`: measured on this flavor, or None.
    """
    basis = f"{steps:,} steps"
    if seconds_per_step:
        low = high = steps * seconds_per_step / 3600
        basis += f" of {seconds_per_step:g} measured seconds"
    elif len(sets) == 1 and sets[0] in TRAINING_HOURS and flavor.gpu in SPEEDS:
        reference, hours = TRAINING_HOURS[sets[0]]
        middle = 4 * hours * steps / reference * photos / 16 / flavor.gpus / SPEEDS[flavor.gpu]
        low, high = middle / _FACTOR, middle * _FACTOR
        basis += f"; Cascade-CLIP publishes {hours:g} hours on four RTX 3090 for {reference:,}, and one {flavor.gpu} is assumed"
        basis += f" to be {SPEEDS[flavor.gpu]:g} times as fast"
    else:
        return f"none: no time is published for {basis} on {', '.join(sets)}; give --seconds_per_step", f"{WITHOUT_ESTIMATE}h"
    span, cost = f"{low:.1f}", f"{low * flavor.price:.2f}"
    if low < high:
        span, cost = f"{span} to {high:.1f}", f"{cost} to {high * flavor.price:.2f}"
    text = f"{span} hours of training, {cost} USD ({basis}); installation, data and evaluation come on top"
    return text, f"{math.ceil(2 * high) + 3}h"


# ---- commands -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The work of a command, for a job."""

    config: TrainConfig
    trainings: int  # number of trainings with this configuration
    data: str
    output: str  # `data` and `output` are folders on this machine
    sets: Sequence[str]  # data sets of training and evaluation
    named: Sequence[str]  # values that may name files of this machine
    lines: Callable[[int, str, str], list[str]]  # (GPUs, output folder, repository) -> shell commands


def training(config: TrainConfig, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Work:
    """The work of train/train.py; `options` are its parsed flags, `defaults` the defaults of these flags."""
    if options["resume_from_checkpoint"] not in (None, "latest"):
        raise JobError("A job resumes its own latest checkpoint; leave out --resume_from_checkpoint.")
    sets = config.validation_sets or list(config.sets)

    def lines(gpus: int, output: str, repository: str) -> list[str]:
        changes = {"data": "data", "output_dir": output, "resume_from_checkpoint": "latest"}
        changes |= {"push_to_hub": True, "hub_model_id": repository}
        changes |= {"train_batch_size": _photos_of_one_gpu(config, gpus)} if gpus > 1 else {}
        evaluate = ["--checkpoint", output, "--data", "data", "--sets", *sets, "--unseen", config.unseen or "none"]
        evaluate += ["--output", f"{output}/evaluation"]
        start = f"{_mirrored(output)} " + (f"torchrun --nproc_per_node {gpus}" if gpus > 1 else "python")
        return [
            f"{start} train/train.py {_words(options, defaults, changes)}",
            f"{start} train/evaluate.py {shlex.join(evaluate)}",
            shlex.join(["hf", "upload", repository, output, ".", "--include", "evaluation*"]),
        ]

    sets_in_all = list(dict.fromkeys([*config.sets, *sets]))
    return Work(config, 1, config.data, config.output_dir, sets_in_all, [options["config"]], lines)


def experiment(config: TrainConfig, options: Mapping[str, Any], defaults: Mapping[str, Any], trainings: int) -> Work:
    """The work of train/experiment.py. For each decoder, the checkpoint of the first seed is uploaded."""
    flags = {key: value for key, value in options.items() if key in defaults}

    def lines(gpus: int, output: str, repository: str) -> list[str]:
        batch = [f"train_batch_size={_photos_of_one_gpu(config, gpus)}"] if gpus > 1 else []
        changes = {"data": "data", "output_dir": output, "processes": gpus, "set": [*flags["set"], *batch]}
        exclude = [word for pattern in NOT_UPLOADED for word in ("--exclude", pattern)]
        uploads = [[f"{output}/{each}/seed{flags['seeds'][0]}", each, *exclude] for each in flags["decoders"]]
        uploads.append([output, ".", "--include", "results.*"])
        commands = [f"{_mirrored(output)} python train/experiment.py {_words(flags, defaults, changes)}"]
        return commands + [shlex.join(["hf", "upload", repository, *words]) for words in uploads]

    sets_in_all = list(dict.fromkeys([*config.sets, *flags["sets"]]))
    named = [flags["config"], *filter(None, [flags["clip"]])]
    return Work(config, trainings, flags["data"], flags["output_dir"], sets_in_all, named, lines)


def _words(options: Mapping[str, Any], defaults: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """A command line without the flags that have their default; paths start at the project's folder."""
    words = []
    for key, value in {**options, **changes}.items():
        if value != defaults[key]:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{key}", *(str(each).replace(f"{ROOT}/", "") for each in values)]
    return shlex.join(words)


def _photos_of_one_gpu(config: TrainConfig, gpus: int) -> int:
    if config.train_batch_size % gpus:
        raise JobError(f"train_batch_size {config.train_batch_size} cannot be divided among {gpus} GPUs; change one of them.")
    return config.train_batch_size // gpus


def _mirrored(folder: str) -> str:
    return f"python -m train.mirror {shlex.join([folder, f'{MOUNT}/{folder}'])} --"


@dataclass(frozen=True)
class Plan:
    """A job, before anything is sent."""

    flavor: str
    machine: Flavor
    timeout: str  # such as "12h"
    expected: str  # one sentence about hours and costs
    lines: list[str]  # shell commands
    account: str  # who pays
    repository: str  # "OWNER/NAME" of the result
    label: str  # the same for all jobs with this output folder
    files: list[str]  # files of the code, relative to the project's folder
    code: str  # folder of the bucket for these files
    own_sets: dict[str, Path]  # data set -> folder that is uploaded

    @property
    def bucket(self) -> str:
        return f"{self.account}/ldvc-jobs"

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `HfApi.run_job`, without the secrets."""
        return {
            "image": IMAGE,
            "command": ["bash", "-c", " && ".join(self.lines)],
            "env": ENVIRONMENT,
            "flavor": self.flavor,
            "timeout": self.timeout,
            "labels": {"name": self.label},
            "volumes": [Volume(type="bucket", source=self.bucket, mount_path=MOUNT, read_only=False)],
            "namespace": self.account,
        }

    def describe(self, *, prices: str, every_file: bool) -> str:
        """A description of everything that is sent. `prices`: where the prices come from."""
        sizes = {name: (ROOT / name).stat().st_size for name in self.files}
        machine, largest_cost = self.machine, hours_of(self.timeout) * self.machine.price
        rows = [
            "Hugging Face Jobs",
            f"flavor    {self.flavor}: {machine.gpus} x {machine.gpu}, {machine.price:.2f} USD an hour ({prices})",
            f"estimate  {self.expected}",
            f"timeout   {self.timeout}, at most {largest_cost:.2f} USD; after a timeout the same command continues",
            f"image     {IMAGE}",
            f"env       {' '.join(f'{key}={value}' for key, value in ENVIRONMENT.items())}",
            "secrets   HF_TOKEN",
            f"volume    hf://buckets/{self.bucket} at {MOUNT}, private, read and write",
            f"result    https://huggingface.co/{self.repository} (public, unless it exists and is private)",
            'command   bash -c with these lines, joined by " && ":',
            *(f"    {line}" for line in self.lines),
            f"upload    {len(sizes)} files, {sum(sizes.values()):,} bytes, to hf://buckets/{self.bucket}/{self.code}",
        ]
        rows += [f"{size:>12,}  {name}" for name, size in sizes.items()] if every_file else []
        rows += [f"upload    {path} to hf://buckets/{self.bucket}/data/{name}" for name, path in self.own_sets.items()]
        return "\n  ".join(rows)


def make_plan(job: argparse.Namespace, work: Work, account: str, flavors: Mapping[str, Flavor]) -> Plan:
    """Plans a job from the flags of `train.jobs`. `account`: who pays. `flavors`: the machines that can be rented.

    JobError for an unknown flavor, a batch that cannot be divided, or a file that a job cannot have.
    """
    if job.target not in flavors:
        available = ", ".join(f"{name} ({flavor.price:.2f} USD an hour)" for name, flavor in flavors.items())
        raise JobError(f"There is no flavor {job.target}. Known ones: {available}.")
    config, machine = work.config, flavors[job.target]
    if not (ROOT / "pyproject.toml").is_file():
        raise JobError("A job needs a clone of the project; an installed package does not hold all files.")
    if config.report_to == "wandb":
        raise JobError("A job has no key of wandb; take --report_to tensorboard.")
    output = os.path.relpath(work.output)
    if output.startswith("."):  # outside this folder
        output = f"runs/{Path(work.output).resolve().name}"
    label = re.sub(r"[^A-Za-z0-9]+", "-", output.removeprefix("runs/")).strip("-").lower()
    repository = config.hub_model_id or f"{account}/ldvc-{label}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise JobError(f"hub_model_id is OWNER/NAME, not {repository}.")
    photos = config.train_batch_size * config.gradient_accumulation_steps
    steps = config.max_train_steps * work.trainings
    expected, timeout = estimate(machine, list(config.sets), steps, photos, job.seconds_per_step)
    files = staged_files(_named_files(work))
    content = b"".join(f"{name}\0".encode() + (ROOT / name).read_bytes() for name in files)
    code = f"code/{hashlib.sha256(content).hexdigest()[:12]}"
    own_sets = {name: Path(work.data) / name for name in work.sets if name not in NAMES}
    for name, folder in own_sets.items():
        if not folder.is_dir():
            raise JobError(f"The data set {name} is neither a benchmark ({', '.join(NAMES)}) nor a folder {folder}.")
    lines = [
        f"cp -r {MOUNT}/{code} /tmp/ldvc",
        "cd /tmp/ldvc",
        "uv pip install --system --quiet -c requirements.lock -r pyproject.toml --extra train",
        "mkdir -p data",
        *(shlex.join(["cp", "-r", f"{MOUNT}/data/{name}", "data/"]) for name in own_sets),
    ]
    for name in (name for name in work.sets if name in NAMES):
        archives = f"archives/{name}"
        lines.append(f"{_mirrored(archives)} python -m train.jobs {name} {archives}")
        lines.append(f"python train/prepare.py {name} --data data --source {archives}")
    lines += work.lines(machine.gpus, output, repository)
    timeout = job.timeout or timeout
    return Plan(job.target, machine, timeout, expected, lines, account, repository, label, files, code, own_sets)


def staged_files(named: Iterable[Path] = (), root: Path = ROOT) -> list[str]:
    """The files that a job gets, as sorted paths below `root`: the code without the page, and the `named` files and folders."""
    names = {name for name in project_files(root, *CODE) if name.endswith(CODE_KINDS) and not PAGE_AND_RECIPE.match(name)}
    names |= real_files(root, (path.relative_to(root).as_posix() for place in named for path in (place, *place.rglob("*"))))
    return sorted(name for name in names if not re.search(r"(^|/)(\.|__pycache__|checkpoint-)", name))


def _named_files(work: Work) -> list[Path]:
    """Files and folders that the command names; JobError if one is a CLIP or outside of the project's folder."""
    config = work.config
    words = [config.other_words] if isinstance(config.other_words, str) else config.other_words or []
    values = [*work.named, config.unseen, config.init_from, config.distillation_names, *words]
    clips = [config.model.clip, config.model.pretrained or ""]
    if any(value and Path(value).exists() for value in clips):
        raise JobError(f"A job cannot have the CLIP {clips[0]} of this machine; take lite or an open_clip architecture.")
    files = [ASSETS / "lite" / "clip"] if "lite" in (config.model.clip, *work.named) else []
    for value in filter(None, values):
        path = Path(value) if Path(value).exists() else ROOT / value
        if path.exists():
            if not path.resolve().is_relative_to(ROOT):
                raise JobError(f"A job gets files of the project's folder {ROOT} only; copy {value} there.")
            files.append(path.resolve())
    return files
