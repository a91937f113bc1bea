"""Publishing to Hugging Face Spaces: which files are uploaded, how they are adapted, and what is refused before that."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from unittest.mock import Mock, call, create_autospec

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard

from tools import publish_space as publishing
from tools.publish_space import MAX_FILE_BYTES, NEEDED, ROOT, PublishError, main, make_plan, publish, space_files


def test_dry_run_shows_the_whole_plan(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network and token: every file with its size, variables, hardware, front matter and requirements."""
    monkeypatch.setattr(publishing, "HfApi", lambda: pytest.fail("the Hub was asked"))
    monkeypatch.setattr(publishing, "get_token", lambda: pytest.fail("the token was read"))
    assert main(["--dry_run", "--full", "ann/ldvc-voc12"]) == 0
    settings, listing, adapted = capsys.readouterr().out.split("\n\n", 2)
    expected = ["Space: user/space", "Hardware: zero-a10g", "Variables: LDVC_MODEL=full, LDVC_FULL=ann/ldvc-voc12"]
    assert settings.splitlines() == expected
    *lines, total = listing.splitlines()
    listed = {name: int(size.replace(",", "")) for size, name in (line.split(maxsplit=1) for line in lines)}
    plan = make_plan("user/space", full="ann/ldvc-voc12")
    for name, size in listed.items():
        assert size == plan.size(name) <= 10_000_000
    assert int(total.split()[0].replace(",", "")) == sum(listed.values())
    readme, requirements = (plan.files[name].decode() for name in ("README.md", "requirements.txt"))
    assert readme[: readme.index("---\n", 4)] in adapted and adapted.rstrip().endswith(requirements.rstrip())

    # All of the library, the weights and the examples.
    there = [path for folder in ("ldvc", "assets") for path in (ROOT / folder).rglob("*") if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in there if "__pycache__" not in path.parts}
    assert set(listed) == expected | {"app.py", "README.md", "requirements.txt", "LICENSE"}
    ignored = subprocess.run(["git", "check-ignore", *listed], cwd=ROOT, capture_output=True, text=True).stdout
    assert not ignored


@pytest.mark.parametrize(("hardware", "full"), [("zero-a10g", None), ("cpu-basic", "ann/ldvc-voc12")])
def test_readme_and_requirements_are_adapted(hardware: str, full: str | None) -> None:
    files = make_plan("ann/ldvc", hardware=hardware, full=full).files
    own, sent = RepoCard((ROOT / "README.md").read_text("utf-8")), RepoCard(files["README.md"].decode())
    expected = {**own.data.to_dict(), "suggested_hardware": hardware}
    expected["thumbnail"] = "https://huggingface.co/spaces/ann/ldvc/resolve/main/assets/page.png"
    if full:
        expected |= {key: [*expected[key], full] for key in ("models", "preload_from_hub")}
    assert sent.data.to_dict() == expected and sent.text == own.text

    own_lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    lines = files["requirements.txt"].decode().splitlines()
    pinned = ["torch==2.11.0", "torchvision==0.26.0"]
    if hardware == "cpu-basic":
        assert lines.pop(0) == "--extra-index-url https://download.pytorch.org/whl/cpu"
        pinned = [f"{each}+cpu" for each in pinned]
    assert [line for line in lines if line not in own_lines] == pinned and len(lines) == len(own_lines)


def test_pictures_of_the_readme_are_uploaded() -> None:
    shown = re.findall(r"!\[[^]]*]\(([^)]+)\)|<img[^>]+src=\"([^\"]+)\"", (ROOT / "README.md").read_text("utf-8"))
    local = [path for pair in shown for path in pair if path and not path.startswith("http")]
    assert local and set(local) <= set(space_files())


CHOSEN = {
    **dict.fromkeys(NEEDED, ""),
    "README.md": "---\nsdk: gradio\napp_file: app.py\n---\n",
    "requirements.txt": "torch>=2\ntorchvision>=0.2\n",
    "assets/examples/examples.json": '[{"file": "dog.jpg"}]',
    "assets/examples/dog.jpg": "",
    "assets/lite/clip/model.safetensors.index.json": json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}),
    "assets/lite/clip/1.safetensors": "",
    "assets/lite/clip/2.safetensors": "",
    "assets/lite/[odd] name.png": "",
}
NOT_CHOSEN = (
    "ldvc/__pycache__/x.py", "ldvc/notes.ipynb", "ldvc/.hidden.py", "assets/.cache/photo.jpg", "assets/photos.zip",
    "assets/ignored/photo.jpg", "tests/test_x.py", "train/train.py", ".ci/run", ".env", "data/photo.jpg",
)  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project in miniature: what the Space needs, as empty as may be, and files that are not uploaded."""
    root = tmp_path / "project"
    for name, text in {**CHOSEN, **dict.fromkeys(NOT_CHOSEN, ""), ".gitignore": "/assets/ignored/\n"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.py").write_text("")
    (root / "ldvc" / "linked.py").symlink_to(tmp_path / "elsewhere" / "secret.py")
    (root / "ldvc" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


def test_only_what_the_page_needs_is_chosen(project: Path) -> None:
    assert set(space_files(project)) == set(CHOSEN)
    publishing.check_files(space_files(project), project)

    shutil.rmtree(project / ".git")  # a downloaded archive: all but what only git knows stays as it was
    assert set(space_files(project)) == {*CHOSEN, "assets/ignored/photo.jpg"}


@pytest.fixture
def api() -> Mock:
    """A client of the Hub that records calls, with the signatures of the real one."""
    api = create_autospec(HfApi, instance=True)
    api.list_repo_files.return_value = ["ldvc/old.py", "app.py", "notes.md", "assets/old/a.jpg", ".gitattributes"]
    return api


def test_push(project: Path, api: Mock) -> None:
    """In this order: the Space, its variables, and then in one commit exactly the files of the plan."""
    plan = make_plan("ann/ldvc", root=project, full="ann/ldvc-voc12")
    assert publish(plan, api=api, private=True) == "https://huggingface.co/spaces/ann/ldvc"

    changing = [name for name, *_ in api.method_calls if name != "list_repo_files"]
    assert changing == ["create_repo", "add_space_variable", "add_space_variable", "create_commit"]
    api.create_repo.assert_called_once_with(
        "ann/ldvc", repo_type="space", space_sdk="gradio", space_hardware="zero-a10g", private=True, exist_ok=True
    )
    variables = [call("ann/ldvc", "LDVC_MODEL", "full"), call("ann/ldvc", "LDVC_FULL", "ann/ldvc-voc12")]
    api.add_space_variable.assert_has_calls(variables)
    commit = api.create_commit.call_args.kwargs
    assert (commit["repo_id"], commit["repo_type"]) == ("ann/ldvc", "space")
    added = {each.path_in_repo: each for each in commit["operations"] if isinstance(each, CommitOperationAdd)}
    deleted = {each.path_in_repo for each in commit["operations"] if isinstance(each, CommitOperationDelete)}
    assert set(added) == set(CHOSEN) and deleted == {"ldvc/old.py", "assets/old/a.jpg"}  # nothing else
    for name, operation in added.items():
        with operation.as_file() as file:
            adapted = name in ("README.md", "requirements.txt")
            assert file.read() == (plan.files[name] if adapted else (project / name).read_bytes())


@pytest.mark.parametrize("move", [False, True])
def test_a_space_that_exists_is_moved_only_if_asked(project: Path, api: Mock, move: bool) -> None:
    publish(make_plan("ann/ldvc", root=project, hardware="cpu-upgrade"), api=api, move=move)
    assert api.request_space_hardware.call_args_list == [call("ann/ldvc", "cpu-upgrade")] * move


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("assets/lite/clip/1.safetensors", " " * (MAX_FILE_BYTES + 1), "Larger than 10 MB: assets/lite/clip/1.safetensors"),
        ("app.py", None, "cannot start without app.py"),
        ("assets/lite/clip/2.safetensors", None, "without assets/lite/clip/2.safetensors"),
        ("assets/examples/dog.jpg", None, "without assets/examples/dog.jpg"),
        ("README.md", "# LDVC\n", "README.md must begin with"),
        ("requirements.txt", "torch>=2\n", "must name torchvision"),
    ],
)
def test_refusals(project: Path, name: str, content: str | None, sentence: str) -> None:
    (project / name).unlink() if content is None else (project / name).write_text(content)
    with pytest.raises(PublishError, match=sentence):
        make_plan("ann/ldvc", root=project)


def test_no_token_no_name_no_network(
    project: Path, api: Mock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(publishing, "get_token", lambda: None)
    assert main(["--repo_id", "ann/ldvc"]) == 1
    assert "no Hugging Face token" in capsys.readouterr().err
    for repo_id, full in (("ldvc", None), ("ann/ldvc", "runs/voc12/ldvc"), ("ann/my space", None)):
        with pytest.raises(PublishError, match="no name on the Hub; give user/name"):
            make_plan(repo_id, full=full)
    with pytest.raises(SystemExit):
        main([])
    assert "--repo_id" in capsys.readouterr().err
    api.create_repo.side_effect = ConnectionError("Connection refused")
    with pytest.raises(PublishError, match=r"did not accept the Space ann/ldvc on zero-a10g \(Connection refused\)"):
        publish(make_plan("ann/ldvc", root=project), api=api)
