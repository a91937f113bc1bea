"""Publishing to Hugging Face Spaces: which files are uploaded, how they are adapted, and what is refused before that."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from tools import publish_space as publishing
from tools.publish_space import MAX_FILE_BYTES, ROOT, PublishError, main, make_plan, publish, space_files

NOT_UPLOADED = ("tests", "train", "tools", "recipes", "data", "work", "runs", "shared", "pyproject.toml")


def test_dry_run_shows_the_whole_plan(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network and token: every file with its size, variables, hardware, front matter and requirements."""
    monkeypatch.setattr(publishing, "HfApi", lambda: pytest.fail("the Hub was asked"))
    monkeypatch.setattr(publishing, "get_token", lambda: pytest.fail("the token was read"))
    assert main(["--dry_run", "--full", "ann/ldvc-voc12"]) == 0
    settings, listing, adapted = capsys.readouterr().out.split("\n\n", 2)
    assert settings.splitlines() == [
        "Space: user/space", "Hardware: zero-a10g", "Variables: LDVC_MODEL=full, LDVC_FULL=ann/ldvc-voc12"
    ]  # fmt: skip
    *lines, total = listing.splitlines()
    listed = {name: int(size.replace(",", "")) for size, name in (line.split(maxsplit=1) for line in lines)}
    plan = make_plan("user/space", full="ann/ldvc-voc12")
    for name, size in listed.items():
        assert size == plan.size(name) <= 10_000_000
        parts = name.split("/")
        assert parts[0] not in NOT_UPLOADED and not any(part.startswith((".", "__pycache__")) for part in parts), name
    assert int(total.split()[0].replace(",", "")) == sum(listed.values())
    readme, requirements = (plan.files[name].decode() for name in ("README.md", "requirements.txt"))
    front_matter = readme.split("---\n")[1]
    assert f"---\n{front_matter}---\n" in adapted and adapted.rstrip().endswith(requirements.rstrip())

    # All of the library, the weights and the examples.
    there = [path for folder in ("ldvc", "assets") for path in (ROOT / folder).rglob("*") if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in there if "__pycache__" not in path.parts}
    assert set(listed) == expected | {"app.py", "README.md", "requirements.txt", "LICENSE"}
    ignored = subprocess.run(["git", "check-ignore", *listed], cwd=ROOT, capture_output=True, text=True).stdout
    assert not ignored


def test_readme_and_requirements_are_adapted() -> None:
    def sent(**options: Any) -> tuple[dict[str, Any], str, list[str]]:
        plan = make_plan("ann/ldvc", **options)
        card, text = publishing.read_card(plan.files["README.md"].decode())
        return card, text, plan.files["requirements.txt"].decode().splitlines()

    own_card, own_text = publishing.read_card((ROOT / "README.md").read_text("utf-8"))
    own_lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    thumbnail = "https://huggingface.co/spaces/ann/ldvc/resolve/main/assets/page.png"

    card, text, lines = sent()
    assert card == {**own_card, "thumbnail": thumbnail} and text == own_text
    pinned = ["torch==2.11.0", "torchvision==0.26.0"]
    assert [line for line in lines if line not in own_lines] == pinned and len(lines) == len(own_lines)

    card, text, lines = sent(hardware="cpu-basic", full="ann/ldvc-voc12")
    assert card["suggested_hardware"] == "cpu-basic" and text == own_text
    assert card["models"] == [*own_card["models"], "ann/ldvc-voc12"]
    assert card["preload_from_hub"] == [*own_card["preload_from_hub"], "ann/ldvc-voc12"]
    index, *lines = lines
    assert index == "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert [line for line in lines if line not in own_lines] == [f"{each}+cpu" for each in pinned]


def test_pictures_of_the_readme_are_uploaded() -> None:
    shown = re.findall(r"!\[[^]]*]\(([^)]+)\)|<img[^>]+src=\"([^\"]+)\"", (ROOT / "README.md").read_text("utf-8"))
    local = [path for pair in shown for path in pair if path and not path.startswith("http")]
    assert local and set(local) <= set(space_files())


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project in miniature: what the Space needs, as empty as may be, and files that are not uploaded."""
    card = "---\nsdk: gradio\napp_file: app.py\n---\n"
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    goes = dict.fromkeys(publishing.NEEDED, "")
    goes |= {
        "README.md": card,
        "requirements.txt": "torch>=2\ntorchvision>=0.2\n",
        "assets/examples/examples.json": '[{"file": "dog.jpg"}]',
        "assets/examples/dog.jpg": "",
        "assets/lite/clip/model.safetensors.index.json": index,
        "assets/lite/clip/model-1.safetensors": "",
        "assets/lite/clip/model-2.safetensors": "",
        "assets/lite/[odd] name.png": "",
    }
    stays = [
        "ldvc/__pycache__/x.py",
        "ldvc/notes.ipynb",
        "ldvc/.hidden.py",
        "assets/.cache/photo.jpg",
        "assets/photos.zip",
        "assets/ignored/photo.jpg",
        "tests/test_x.py",
        "train/train.py",
        ".ci/run",
        ".env",
        "data/photo.jpg",
    ]
    root = tmp_path / "project"
    for name, text in {**goes, **dict.fromkeys(stays, ""), ".gitignore": "/assets/ignored/\n"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.py").write_text("")
    (root / "ldvc" / "linked.py").symlink_to(tmp_path / "elsewhere" / "secret.py")
    (root / "ldvc" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


STAND_INS = {"assets/lite/[odd] name.png"}


def test_only_what_the_page_needs_is_chosen(project: Path) -> None:
    expected = {*publishing.NEEDED, *STAND_INS, "assets/examples/dog.jpg"}
    expected |= {
        f"assets/lite/clip/model{end}" for end in (".safetensors.index.json", "-1.safetensors", "-2.safetensors")
    }
    assert set(space_files(project)) == expected
    publishing.check_files(space_files(project), project)

    shutil.rmtree(project / ".git")  # a downloaded archive: all but what only git knows stays as it was
    assert set(space_files(project)) == expected | {"assets/ignored/photo.jpg"}


class Recorder(HfApi):
    """The Hub's own client, its requests recorded instead of sent."""

    def __init__(self, there: list[str] | None = None) -> None:
        super().__init__(token="hf_test")
        self.there = there or []
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def record(self, name: str, arguments: tuple, options: dict[str, Any]) -> None:
        """Note a call with the names that the parameters of the client have."""
        given = inspect.signature(getattr(HfApi, name)).bind(self, *arguments, **options).arguments
        self.calls.append((name, {key: value for key, value in given.items() if key != "self"}))

    def create_repo(self, *arguments: Any, **options: Any) -> None:
        self.record("create_repo", arguments, options)

    def request_space_hardware(self, *arguments: Any, **options: Any) -> None:
        self.record("request_space_hardware", arguments, options)

    def add_space_variable(self, *arguments: Any, **options: Any) -> None:
        self.record("add_space_variable", arguments, options)

    def list_repo_files(self, *arguments: Any, **options: Any) -> list[str]:
        return self.there

    def create_commit(self, *arguments: Any, **options: Any) -> None:
        self.record("create_commit", arguments, options)


def test_push(project: Path) -> None:
    """In this order: the Space, its variables, and then in one commit exactly the files of the plan."""
    api = Recorder(there=["ldvc/old.py", "app.py", "notes.md", "assets/old/a.jpg", ".gitattributes"])
    plan = make_plan("ann/ldvc", root=project, full="ann/ldvc-voc12")
    assert publish(plan, api=api, private=True) == "https://huggingface.co/spaces/ann/ldvc"

    assert [name for name, _ in api.calls] == ["create_repo", "add_space_variable", "add_space_variable", "create_commit"]
    (_, space), *variables, (_, commit) = api.calls
    assert space == {
        "repo_id": "ann/ldvc",
        "repo_type": "space",
        "space_sdk": "gradio",
        "space_hardware": "zero-a10g",
        "private": True,
        "exist_ok": True,
    }
    assert [(each["repo_id"], each["key"], each["value"]) for _, each in variables] == [
        ("ann/ldvc", "LDVC_MODEL", "full"), ("ann/ldvc", "LDVC_FULL", "ann/ldvc-voc12")
    ]  # fmt: skip
    assert (commit["repo_id"], commit["repo_type"]) == ("ann/ldvc", "space")
    added = {each.path_in_repo: each for each in commit["operations"] if isinstance(each, CommitOperationAdd)}
    deleted = {each.path_in_repo for each in commit["operations"] if isinstance(each, CommitOperationDelete)}
    assert set(added) == set(space_files(project)) and deleted == {"ldvc/old.py", "assets/old/a.jpg"}  # nothing else
    for name, operation in added.items():
        with operation.as_file() as file:
            content = file.read()
        if name in ("README.md", "requirements.txt"):
            assert content == plan.files[name]
        else:
            assert content == (project / name).read_bytes()


def test_a_space_that_exists_is_moved_only_if_asked(project: Path) -> None:
    for move in (False, True):
        api = Recorder()
        publish(make_plan("ann/ldvc", root=project, hardware="cpu-upgrade"), api=api, move=move)
        moved = [call["hardware"] for name, call in api.calls if name == "request_space_hardware"]
        assert moved == (["cpu-upgrade"] if move else [])


def spoil_with_a_large_file(project: Path) -> None:
    with (project / "assets" / "lite" / "clip" / "model-1.safetensors").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoil_with_a_large_file, "Larger than 10 MB: assets/lite/clip/model-1.safetensors"),
        (lambda project: (project / "app.py").unlink(), "cannot start without app.py"),
        (lambda project: (project / "assets/lite/clip/model-2.safetensors").unlink(), "without .*model-2.safetensors"),
        (lambda project: (project / "assets/examples/dog.jpg").unlink(), "without assets/examples/dog.jpg"),
        (lambda project: (project / "README.md").write_text("# LDVC\n"), "README.md must begin with"),
        (lambda project: (project / "requirements.txt").write_text("torch>=2\n"), "must name torchvision"),
    ],
)
def test_refusals(project: Path, spoil: Any, sentence: str) -> None:
    spoil(project)
    with pytest.raises(PublishError, match=sentence):
        make_plan("ann/ldvc", root=project)


def test_names_on_the_hub(project: Path) -> None:
    for repo_id, full in (("ldvc", None), ("ann/ldvc", "runs/voc12/ldvc"), ("ann/my space", None)):
        with pytest.raises(PublishError, match="no name on the Hub; give user/name"):
            make_plan(repo_id, root=project, full=full)


def test_no_token_no_name_no_network(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(publishing, "get_token", lambda: None)
    assert main(["--repo_id", "ann/ldvc"]) == 1
    assert "no Hugging Face token" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])
    assert "--repo_id" in capsys.readouterr().err

    class Unreachable(Recorder):
        def create_repo(self, *arguments: Any, **options: Any) -> None:
            raise ConnectionError("Connection refused")

    with pytest.raises(PublishError, match=r"did not accept the Space ann/ldvc on zero-a10g \(Connection refused\)"):
        publish(make_plan("ann/ldvc", root=project), api=Unreachable())
