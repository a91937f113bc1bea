"""Runs a training command on a rented GPU of Hugging Face Jobs (https://huggingface.co/docs/hub/jobs).

    python train/train.py --config voc12_inductive --output_dir runs/voc12/ldvc --target a100-large --dry_run
    python train/experiment.py --config voc12_inductive --seeds 0 --output_dir runs/voc12 --target l4x4

The private bucket `ldvc-jobs` of the account holds the code, the archives of the benchmarks, your own data sets, and a
copy of everything that a run writes (train/mirror.py). The job installs the packages, prepares the data, trains,
evaluates, and uploads the finished checkpoint. A stopped job leaves its checkpoints in the bucket; the same command
continues from there.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from ldvc.errors import LdvcError
from train.hub import first_line
from train.job_plan import FLAVORS, PRICES_READ, ROOT, JobError, Plan, Work, from_api, make_plan

FLAGS = ("target", "timeout", "seconds_per_step", "yes", "dry_run")
ENDED = ("COMPLETED", "CANCELED", "ERROR", "DELETED")
NEW_TOKEN = "make one of the kind Write at https://huggingface.co/settings/tokens, then run “hf auth login” or set HF_TOKEN"
REASONS = {
    401: f"the token is not valid; {NEW_TOKEN}",
    402: "the account has no credit; add some at https://huggingface.co/settings/billing",
    403: f"the token or the account may not do this; {NEW_TOKEN}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that send a command to a rented GPU."""
    add = parser.add_argument_group("on a rented GPU (Hugging Face Jobs)").add_argument
    add("--target", metavar="FLAVOR", help="run on that machine, such as a100-large; it costs money and asks first")
    add("--timeout", metavar="TIME", help="stop after this time, such as 90m or 12h; the same command continues later")
    add("--seconds_per_step", type=float, metavar="S", help="measured on this flavor, for the estimate of time and cost")
    add("--yes", action="store_true", help="start without asking")
    add("--dry_run", action="store_true", help="show everything that would be sent and stop; needs no network and no token")


def take_options(options: dict[str, Any]) -> argparse.Namespace:
    """Removes the flags of `add_arguments` from a parsed command line and returns them."""
    return argparse.Namespace(**{flag: options.pop(flag) for flag in FLAGS})


def is_wanted(job: argparse.Namespace) -> bool:
    """Whether the flags ask for a rented GPU; JobError if they do not fit together."""
    if not job.target and any(vars(job).values()):
        raise JobError("--timeout, --seconds_per_step, --yes and --dry_run need --target FLAVOR.")
    if job.timeout and not re.fullmatch(r"\d+(\.\d+)?[smhd]", job.timeout):
        raise JobError(f"--timeout is a number with a unit, such as 90m or 12h, not {job.timeout}.")
    return bool(job.target)


def submit(job: argparse.Namespace, work: Work) -> None:
    """Shows what will be rented, asks, starts the job, and prints its log until it ends. Ctrl-C leaves the job running.

    JobError if nothing was started, or the job failed.
    """
    if job.dry_run:
        plan = make_plan(job, work, "YOUR_ACCOUNT", FLAVORS)
        print(plan.describe(prices=f"list of {PRICES_READ}", every_file=True))
        print("Nothing was sent. The account, prices and flavors of today are read when the command runs without --dry_run.")
        return
    token = get_token()
    if not token:
        raise JobError(f"There is no Hugging Face token on this machine; {NEW_TOKEN}.")
    api = HfApi(token=token)
    with one_sentence("Reading the account"):
        account = api.whoami()
        flavors = from_api(api.list_jobs_hardware())
    require_write_access(account)
    plan = make_plan(job, work, account["name"], flavors)
    print(plan.describe(prices="asked just now", every_file=False), flush=True)
    with one_sentence("Reading the list of jobs"):
        for other in islice(api.list_jobs(namespace=plan.account), 100):
            if other.status.stage not in ENDED and (other.labels or {}).get("name") == plan.label:
                raise JobError(f"A job of this output folder is running: hf jobs logs -f {other.id}")
    if not job.yes and not confirmed():
        raise JobError("Nothing was sent. Answer y, or add --yes.")
    with one_sentence("Preparing the job"):  # nothing costs money yet, and every call needs write access
        send_files(api, plan)
        api.create_repo(plan.repository, exist_ok=True)
    with one_sentence("Starting the job"):
        started = api.run_job(**plan.arguments, secrets={"HF_TOKEN": token})
    print(f"Started: {started.url}", flush=True)
    follow(api, started.id, plan)


def require_write_access(account: dict[str, Any]) -> None:
    """Raises JobError if the token may not write or not start jobs; called before anything costs money."""
    token = (account.get("auth") or {}).get("accessToken") or {}
    scopes = (token.get("fineGrained") or {}).get("scoped") or []
    allowed = {permission for scope in scopes for permission in scope.get("permissions", [])}
    lacking = sorted({"job.write", "repo.write"} - allowed) if token.get("role") == "fineGrained" else []
    if token.get("role") == "read" or lacking:
        reason = f"lacks {' and '.join(lacking)}" if lacking else "may only read"
        raise JobError(f"The token {token.get('displayName', '')} {reason}; {NEW_TOKEN}.")


def confirmed() -> bool:
    """Asks whether to start."""
    try:
        return input("Start it? [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


def send_files(api: HfApi, plan: Plan) -> None:
    """Uploads the code and your own data sets into the bucket; JobError if it exists and is public."""
    api.create_bucket(plan.bucket, private=True, exist_ok=True)
    if not api.bucket_info(plan.bucket).private:
        raise JobError(f"The bucket {plan.bucket} is public; make it private at https://huggingface.co/buckets/{plan.bucket}.")
    api.batch_bucket_files(plan.bucket, add=[(ROOT / name, f"{plan.code}/{name}") for name in plan.files])
    for name, folder in plan.own_sets.items():
        api.sync_bucket(str(folder), f"hf://buckets/{plan.bucket}/data/{name}", delete=True, quiet=True)


def follow(api: HfApi, job_id: str, plan: Plan) -> None:
    """Prints the log of a job until it ends; JobError if it did not complete."""
    advice = f"see its log with “hf jobs logs -f {job_id}”, stop it with “hf jobs cancel {job_id}”"
    try:
        for line in api.fetch_job_logs(job_id=job_id, namespace=plan.account, follow=True):
            print(line.rstrip("\n"), flush=True)
        status = api.inspect_job(job_id=job_id, namespace=plan.account).status
    except KeyboardInterrupt:
        print(f"\nThe job runs on: {advice}.")
        return
    except (OSError, HTTPError) as error:
        raise JobError(f"The log broke off ({first_line(error)}), but the job runs on: {advice}.") from None
    stage, message = status.stage, status.message or "no reason was given"
    if stage == "COMPLETED":
        print(f"Finished: https://huggingface.co/{plan.repository}")
    elif stage in ENDED:
        raise JobError(
            f"The job ended as {stage} ({message}). The same command continues at its last checkpoint; “hf jobs logs {job_id}” "
            "shows the log again."
        )
    else:
        print(f"The log ended, but the job runs on: {advice}.")


@contextmanager
def one_sentence(task: str) -> Iterator[None]:
    """Turns errors of the Hub and of the network into a `JobError`."""
    try:
        yield
    except HfHubHTTPError as error:
        reason = REASONS.get(getattr(error.response, "status_code", None)) or first_line(error)
        raise JobError(f"{task} failed: {reason}.") from None
    except (OSError, HTTPError) as error:
        reason = f"Hugging Face cannot be reached ({first_line(error)})"
        raise JobError(f"{task} failed: {reason}; check the network and run the same command again.") from None


if __name__ == "__main__":  # inside the job: python -m train.jobs voc2012 archives/voc2012
    from train.data.download import fetch
    from train.prepare import STEPS

    try:
        for step in STEPS[sys.argv[1]]:
            fetch(step.archive, Path(sys.argv[2]))
    except LdvcError as failure:
        sys.exit(f"error: {failure}")
