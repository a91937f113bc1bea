"""Training on a rented GPU: what would be sent, what is refused before it costs anything, and what survives a job's end."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from tests.tiny_data import make_sets
from train import evaluate, experiment, job_plan, jobs, mirror, prepare
from train import train as trainer

TOKEN = "hf_secret"
COMMAND = ["--config", "voc12_inductive", "--decoder", "ldvc", "--output_dir", "runs/voc12/ldvc"]
RENTED = [*COMMAND, "--target", "a100-large", "--yes"]
PROGRAMS = {"train.py": trainer, "experiment.py": experiment, "evaluate.py": evaluate, "prepare.py": prepare}


def parsed(line: str) -> Any:
    """The options of a line of a job, parsed by the program that it starts."""
    words = shlex.split(line)
    place = next(place for place, word in enumerate(words) if word.endswith(".py"))
    return PROGRAMS[Path(words[place]).name].parse(words[place + 1 :])


def refused(status: int) -> HfHubHTTPError:
    """The error of the client when the Hub answers with a status."""
    return HfHubHTTPError(f"{status} for url", response=Mock(status_code=status, headers={}))


def machine(name: str, quantity: str, model: str, a_minute: float) -> SimpleNamespace:
    """A row of the Hub's list of hardware."""
    gpu = SimpleNamespace(type="gpu", quantity=quantity, model=model)
    return SimpleNamespace(name=name, accelerator=gpu, unit_cost_usd=a_minute, unit_label="minute")


def job_info(stage: str, message: str | None = None, **others: Any) -> SimpleNamespace:
    """What the Hub says about a job."""
    url = "https://huggingface.co/jobs/ann/j1"
    return SimpleNamespace(id="j1", url=url, status=SimpleNamespace(stage=stage, message=message), **others)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """A stand-in of the Hub that takes the arguments that the real client takes, and no others."""
    hub = create_autospec(HfApi, instance=True)
    hub.whoami.return_value = {"name": "ann", "auth": {"accessToken": {"displayName": "laptop", "role": "write"}}}
    hub.list_jobs_hardware.return_value = [machine("l4x4", "4", "L4", 0.07), machine("a100-large", "1", "A100", 0.05)]
    hub.list_jobs_hardware.return_value.append(SimpleNamespace(name="cpu-basic", accelerator=None))
    hub.list_jobs.return_value = [job_info("COMPLETED", labels={"name": "voc12-ldvc"})]
    hub.bucket_info.return_value = SimpleNamespace(private=True)
    hub.run_job.return_value = job_info("SCHEDULING")
    hub.fetch_job_logs.return_value = ["step 1\n", "step 2"]
    hub.inspect_job.return_value = job_info("COMPLETED")
    monkeypatch.setattr(jobs, "HfApi", lambda token: hub)
    monkeypatch.setattr(jobs, "get_token", lambda: TOKEN)
    return hub


def test_a_dry_run_shows_everything_and_needs_neither_network_nor_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("HfApi", "get_token"):
        monkeypatch.setattr(jobs, name, Mock(side_effect=AssertionError("a dry run asked the Hub")))
    trainer.main([*COMMAND, "--target", "l4x4", "--set", "power=0.8", "--dry_run"])
    shown = capsys.readouterr().out
    assert "4 x L4, 3.80 USD an hour (list of 2026-11-29)" in shown and "secrets   HF_TOKEN\n" in shown
    assert "volume    hf://buckets/YOUR_ACCOUNT/ldvc-jobs at /bucket, private, read and write" in shown
    timeout, most = re.search(r"timeout   (\d+)h, at most ([\d.]+) USD", shown).groups()
    assert float(most) == pytest.approx(int(timeout) * 3.80)

    names = re.findall(r"^ +([\d,]+)  (\S+)$", shown, flags=re.MULTILINE)
    count, size = re.search(r"upload    (\d+) files, ([\d,]+) bytes", shown).groups()
    assert int(count) == len(names) and {"train/train.py", "ldvc/predictor.py"} <= {name for _, name in names}
    assert sum(int(each.replace(",", "")) for each, _ in names) == int(size.replace(",", ""))

    lines = [line.strip() for line in shown.splitlines() if line.startswith("      ")]
    start, ready, training, evaluation, upload = lines[0], lines[5], *lines[6:9]
    assert re.fullmatch(r"cp -r /bucket/code/\w+ /tmp/ldvc", start)
    assert vars(parsed(ready)) == {"name": "voc2012", "data": "data", "source": "archives/voc2012"}
    kept = "python -m train.mirror runs/voc12/ldvc /bucket/runs/voc12/ldvc -- torchrun --nproc_per_node 4 train/"
    assert training.startswith(kept + "train.py ") and evaluation.startswith(kept + "evaluate.py ")
    options = parsed(training)
    assert (options.config, options.decoder, options.set) == ("voc12_inductive", "ldvc", ["power=0.8"])
    assert (options.train_batch_size, options.resume_from_checkpoint, options.data) == ("4", "latest", "data")
    assert options.push_to_hub and options.hub_model_id == "YOUR_ACCOUNT/ldvc-voc12-ldvc" and not options.target
    options = parsed(evaluation)
    assert (options.checkpoint, options.sets, options.unseen) == (["runs/voc12/ldvc"], ["voc2012"], "voc12")
    assert upload.endswith("runs/voc12/ldvc . --include 'evaluation*'") and options.output == "runs/voc12/ldvc/evaluation"


def test_an_experiment_is_one_job_that_uploads_every_decoder(capsys: pytest.CaptureFixture) -> None:
    words = ["--config", "voc12_inductive", "--seeds", "3", "4", "--output_dir", "runs/voc12", "--target", "a100x8"]
    experiment.main([*words, "--set", "hub_model_id=ann/ldvc-voc12", "--dry_run"])
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if "python train/experiment.py" in line)
    options = parsed(line)
    assert options.processes == 8 and options.seeds == [3, 4] and options.output_dir == "runs/voc12"
    assert options.set == ["hub_model_id=ann/ldvc-voc12", "train_batch_size=2"]
    assert "(120,000 steps; Cascade-CLIP publishes" in shown
    for decoder in ("ldvc", "ldvc_without_lcsa", "zegclip"):
        assert f"hf upload ann/ldvc-voc12 runs/voc12/{decoder}/seed3 {decoder} --exclude 'checkpoint-*/**'" in shown
    assert "hf upload ann/ldvc-voc12 runs/voc12 . --include 'results.*'" in shown


def test_estimates_rest_on_published_or_measured_times() -> None:
    for name, steps, measured, sentence, hours in (
        ("coco_stuff164k", 80_000, None, "16.7 to 37.5 hours of training, 83.33 to 187.50 USD .*publishes 20 hours", "78h"),
        ("msrc", 7200, 0.5, r"1\.0 hours of training, 5\.00 USD \(7,200 steps of 0\.5 measured seconds\)", "5h"),
        ("msrc", 7200, None, "none: .*--seconds_per_step", "12h"),
    ):
        text, timeout = job_plan.estimate(job_plan.FLAVORS["a10g-largex4"], [name], steps, 16, measured)
        assert re.match(sentence, text) and timeout == hours
    assert [job_plan.hours_of(each) for each in ("1800s", "90m", "2h", "1.5d")] == [0.5, 1.5, 2, 36]


def test_only_what_training_needs_is_uploaded(tmp_path: Path) -> None:
    goes = ["ldvc/predictor.py", "ldvc/splits/voc12.json", "train/configs/mine.yaml", "recipes/lite/concepts.txt"]
    goes += ["pyproject.toml", "requirements.lock"]
    stays = ["data/a.py", "runs/x/train.json", "assets/lite/clip/a.json", "tests/test_x.py", ".env", "train/.token.txt"]
    stays += ["ldvc/web/page.py", "train/notes.ipynb", "recipes/lite/build.py", "train/__pycache__/x.py", "README.md"]
    for name in [*goes, *stays, "train/private.txt", "../secret.py"]:
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text("")
    root = tmp_path / "project"
    (root / "train" / "linked.py").symlink_to(tmp_path / "secret.py")
    assert job_plan.staged_files(root=root) == sorted([*goes, "train/private.txt"]), "a downloaded archive"
    (root / ".gitignore").write_text("private.txt\n")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    assert job_plan.staged_files(root=root) == sorted(goes)
    named = [root / "assets" / "lite" / "clip", root / "runs" / "x"]
    assert job_plan.staged_files(named, root) == sorted([*goes, "assets/lite/clip/a.json", "runs/x/train.json"])


def test_the_code_that_is_uploaded_imports_nothing_else_of_the_project() -> None:
    files = set(job_plan.staged_files())
    for name in files:
        if name.endswith(".py"):
            for node in ast.walk(ast.parse((job_plan.ROOT / name).read_text(encoding="utf-8"))):
                module = getattr(node, "module", None) or ""
                if module.split(".")[0] in ("ldvc", "train", "recipes", "tools"):
                    path = module.replace(".", "/")
                    assert {f"{path}.py", f"{path}/__init__.py"} & files, f"{name} imports {module}"


def test_a_job_is_sent_after_everything_was_checked(api: Mock, capsys: pytest.CaptureFixture) -> None:
    trainer.main([*RENTED, "--timeout", "90m"])
    shown = capsys.readouterr().out
    assert "1 x A100, 3.00 USD an hour (asked just now)" in shown and "90m, at most 4.50 USD" in shown
    assert shown.endswith("step 1\nstep 2\nFinished: https://huggingface.co/ann/ldvc-voc12-ldvc\n")
    order = [call[0] for call in api.method_calls]
    for before in ("whoami", "create_bucket", "bucket_info", "batch_bucket_files", "create_repo"):
        assert order.index(before) < order.index("run_job")
    api.create_bucket.assert_called_once_with("ann/ldvc-jobs", private=True, exist_ok=True)
    (sent,) = (call.kwargs for call in api.run_job.mock_calls)
    assert sent.pop("secrets") == {"HF_TOKEN": TOKEN} and TOKEN not in f"{sent}{shown}"
    assert (sent["flavor"], sent["timeout"], sent["namespace"]) == ("a100-large", "90m", "ann")
    (volume,) = sent["volumes"]
    assert (volume.type, volume.source, volume.mount_path, volume.read_only) == ("bucket", "ann/ldvc-jobs", "/bucket", False)
    shell, flag, script = sent["command"]
    assert (shell, flag) == ("bash", "-c") and script.count(" && ") == 8 and "\n" not in script
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0, "no line of bash"
    uploaded = dict((place, path) for path, place in api.batch_bucket_files.mock_calls[0].kwargs["add"])
    code = re.match(r"cp -r /bucket/(code/\w+) ", script)[1]
    assert uploaded[f"{code}/train/train.py"] == Path(trainer.__file__).resolve()


def test_own_photos_are_uploaded(api: Mock, tmp_path: Path) -> None:
    make_sets(tmp_path)
    words = ["--config", "msrc", "--data", str(tmp_path), "--set", "sets={pets: 1}", "unseen=none", "--output_dir", "runs/mine"]
    trainer.main([*words, "--target", "a100-large", "--yes"])
    folder, place = api.sync_bucket.mock_calls[0].args
    assert (folder, place) == (str(tmp_path / "pets"), "hf://buckets/ann/ldvc-jobs/data/pets")
    lines = api.run_job.mock_calls[0].kwargs["command"][2].split(" && ")
    assert "cp -r /bucket/data/pets data/" in lines and not any("prepare.py" in line for line in lines)
    names = [name for _, name in api.batch_bucket_files.mock_calls[0].kwargs["add"]]
    assert any(name.endswith("assets/lite/clip/config.json") for name in names), "lite's towers are in no package"


def scoped(*permissions: str) -> dict[str, Any]:
    """The account of a fine-grained token."""
    token = {"role": "fineGrained", "displayName": "laptop", "fineGrained": {"scoped": [{"permissions": [*permissions]}]}}
    return {"name": "ann", "auth": {"accessToken": token}}


@pytest.mark.parametrize(
    ("spoil", "words", "sentence"),
    [
        ({"whoami.side_effect": ConnectionError("no route to host")}, [], r"cannot be reached \(no route to host\); check"),
        ({"whoami.side_effect": refused(401)}, [], "Reading the account failed: the token is not valid; make one"),
        ({"whoami.return_value": {"name": "ann", "auth": {"accessToken": {"role": "read"}}}}, [], "may only read; make one"),
        ({"whoami.return_value": scoped("repo.write")}, [], "token laptop lacks job.write; make one of the kind Write at"),
        ({}, ["--target", "b200"], r"no flavor b200. Known ones: l4x4 \(4.20 USD an hour\), a100-large \(3.00 USD an hour\)\."),
        ({}, ["--set", "train_batch_size=6", "--target", "l4x4"], "train_batch_size 6 cannot be divided among 4 GPUs"),
        ({}, ["--clip", "/tmp"], "cannot have the CLIP /tmp of this machine"),
        ({}, ["--set", "init_from=/tmp"], "files of the project's folder .* only; copy /tmp there"),
        ({}, ["--set", "sets={mine: 1}"], "The data set mine is neither a benchmark .* nor a folder data/mine"),
        ({}, ["--report_to", "wandb"], "no key of wandb"),
        ({}, ["--hub_model_id", "mine"], "hub_model_id is OWNER/NAME, not mine"),
        ({}, ["--resume_from_checkpoint", "runs/a/checkpoint-2"], "leave out --resume_from_checkpoint"),
        ({}, ["--timeout", "long"], "such as 90m or 12h, not long"),
        ({"list_jobs.return_value": [job_info("RUNNING", labels={"name": "voc12-ldvc"})]}, [], "running: hf jobs logs -f j1"),
        ({"create_bucket.side_effect": refused(403)}, [], "the token or the account may not do this; make one"),
        ({"bucket_info.return_value": SimpleNamespace(private=False)}, [], "bucket ann/ldvc-jobs is public; make it private"),
        ({"create_repo.side_effect": refused(403)}, [], "the token or the account may not do this"),
    ],
)
def test_refused_before_anything_is_paid_for(
    api: Mock, spoil: dict[str, Any], words: list[str], sentence: str, capsys: pytest.CaptureFixture
) -> None:
    api.configure_mock(**spoil)
    with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
        trainer.main([*RENTED, *words])
    api.run_job.assert_not_called()
    assert TOKEN not in capsys.readouterr().out


def test_no_token_no_target_no_consent_no_credit(api: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(words: list[str], sentence: str) -> None:
        with pytest.raises(SystemExit, match=sentence):
            trainer.main(words)

    monkeypatch.setattr("builtins.input", lambda question: "")
    refusal(RENTED[:-1], "Nothing was sent")
    refusal([*COMMAND, "--yes"], "need --target FLAVOR")
    api.run_job.assert_not_called()
    api.batch_bucket_files.assert_not_called()
    api.whoami.return_value = scoped("repo.write", "job.write")  # enough
    api.run_job.side_effect = refused(402)
    refusal(RENTED, "Starting the job failed: the account has no credit; add some at https")
    monkeypatch.setattr(jobs, "get_token", lambda: None)
    refusal(RENTED, "no Hugging Face token on this machine; make one of the kind Write at https")


def test_ctrl_c_leaves_the_job_running(api: Mock, capsys: pytest.CaptureFixture) -> None:
    api.fetch_job_logs.side_effect = KeyboardInterrupt
    trainer.main(RENTED)
    assert "runs on: see its log with “hf jobs logs -f j1”, stop it with “hf jobs cancel j1”" in capsys.readouterr().out
    api.cancel_job.assert_not_called()
    api.fetch_job_logs.side_effect = ConnectionError("reset")
    with pytest.raises(SystemExit, match=r"The log broke off \(reset\), but the job runs on"):
        trainer.main(RENTED)


def test_after_a_timeout_the_same_command_continues(api: Mock) -> None:
    api.inspect_job.return_value = job_info("ERROR", "Job timeout")
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"ended as ERROR \(Job timeout\). The same command continues at its last check"):
            trainer.main(RENTED)
    first, second = (call.kwargs for call in api.run_job.mock_calls)
    assert first["command"] == second["command"] and "--resume_from_checkpoint latest" in first["command"][2]
    assert [volume.to_dict() for volume in first["volumes"]] == [volume.to_dict() for volume in second["volumes"]]


WRITES = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
step = folder / f"checkpoint-{sys.argv[2]}"
step.mkdir(parents=True)
(step / "weights.bin").write_bytes(b"1" * 1000)
(step / "step.json").write_text("{}")
(folder / "half.part").write_text("")
(folder / "log.txt").write_text("a line\\n" * int(sys.argv[2]))
for old in folder.glob("old*"):
    old.unlink()
sys.exit(int(sys.argv[3]))
"""


def test_the_copy_follows_a_command_and_restores_it_on_a_new_disk(tmp_path: Path) -> None:
    kept = tmp_path / "bucket" / "run"
    kept.mkdir(parents=True)
    (kept / "old.txt").write_text("")
    first = tmp_path / "first" / "run"
    command = [sys.executable, "-c", WRITES]
    assert mirror.run(first, kept, [*command, str(first), "2", "3"]) == 3, "the command's exit status"
    names = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()}
    assert names == {"checkpoint-2/weights.bin", "checkpoint-2/step.json", "log.txt"}

    second = tmp_path / "second" / "run"
    assert mirror.run(second, kept, [*command, str(second), "4", "0"]) == 0
    assert (second / "checkpoint-2" / "step.json").is_file(), "the new disk starts with the copy"
    assert (kept / "log.txt").read_text() == "a line\n" * 4
    assert {path.name for path in kept.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_files_are_copied_once_in_the_order_in_which_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, order, copied = ["weights", "optimizer", "a_step"], [], {}
    for second, name in enumerate(names):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (second, second))
    monkeypatch.setattr(mirror.shutil, "copyfile", lambda path, place: order.append(path.name))
    for _ in range(2):
        mirror.copy_changes(tmp_path, tmp_path / "target", copied)
    assert order == names


def test_a_copy_that_fails_ends_the_command_with_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    source = tmp_path / "run"
    assert mirror.run(source, tmp_path / "file" / "run", [sys.executable, "-c", WRITES, str(source), "1", "0"]) == 1
    assert "was not copied" in capsys.readouterr().err
