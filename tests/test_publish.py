"""Publishing to Hugging Face Spaces: which files are uploaded, and what is refused before that."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from tools import publish_space as publishing
from tools.publish_space import MAX_FILE_BYTES, ROOT, PublishError, main, publish, space_files

NOT_UPLOADED = ("tests", "train", "tools", "recipes", "data", "work", "runs", "shared", "pyproject.toml")


def test_dry_run_lists_every_file_with_its_size(capsys: pytest.CaptureFixture) -> None:
    assert main(["--dry_run"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    listed = {name: int(size.replace(",", "")) for size, name in (line.split(maxsplit=1) for line in lines)}

    for name, size in listed.items():
        assert size == (ROOT / name).stat().st_size
        assert size <= 10_000_000, f"{name} is too large"
        parts = name.split("/")
        assert parts[0] not in NOT_UPLOADED and not any(part.startswith((".", "__pycache__")) for part in parts), name
    assert int(total.split()[0].replace(",", "")) == sum(listed.values())

    # All of the library, the weights and the examples.
    there = [path for folder in ("ldvc", "assets") for path in (ROOT / folder).rglob("*") if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in there if "__pycache__" not in path.parts}
    assert set(listed) == expected | {"app.py", "README.md", "requirements.txt", "LICENSE"}
    ignored = subprocess.run(["git", "check-ignore", *listed], cwd=ROOT, capture_output=True, text=True).stdout
    assert not ignored


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
    """The Hub's own client, its last step recorded instead of sent."""

    def __init__(self, there: list[str] | None = None) -> None:
        super().__init__(token="hf_test")
        self.there, self.created, self.commits = there or [], [], []

    def create_repo(self, *arguments: Any, **options: Any) -> None:
        self.created.append((arguments, options))

    def _validate_yaml(self, content: str, **options: Any) -> None:
        self.validated = content  # the Hub is asked about the README before anything is pushed

    def list_repo_files(self, *arguments: Any, **options: Any) -> list[str]:
        return self.there

    def create_commit(self, **options: Any) -> None:
        self.commits.append(options)


def test_push(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the Hub's real client: exactly the files of the list are uploaded."""
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False)
    api = Recorder(there=["ldvc/old.py", "app.py", "notes.md", "assets/old/a.jpg", ".gitattributes"])
    assert publish("ann/ldvc", root=project, api=api, private=True) == "https://huggingface.co/spaces/ann/ldvc"

    ((arguments, options),) = api.created
    assert arguments == ("ann/ldvc",)
    assert (options["repo_type"], options["space_sdk"], options["exist_ok"]) == ("space", "gradio", True)
    assert options["private"] is True
    assert api.validated == (project / "README.md").read_text()
    (commit,) = api.commits
    assert (commit["repo_id"], commit["repo_type"]) == ("ann/ldvc", "space")
    operations = {type(each).__name__: set() for each in commit["operations"]}
    for each in commit["operations"]:
        operations[type(each).__name__].add(each.path_in_repo)
    assert operations["CommitOperationAdd"] == set(space_files(project))
    assert operations["CommitOperationDelete"] == {"ldvc/old.py", "assets/old/a.jpg"}  # nothing else


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
    ],
)
def test_refusals(project: Path, spoil: Any, sentence: str) -> None:
    spoil(project)
    api = Recorder()
    with pytest.raises(PublishError, match=sentence):
        publish("ann/ldvc", root=project, api=api)
    assert not api.created and not api.commits


def test_no_token_no_name_no_network(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(publishing, "get_token", lambda: None)
    assert main(["--repo_id", "ann/ldvc"]) == 1
    assert "no Hugging Face token" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])
    assert "--repo_id" in capsys.readouterr().err

    class Unreachable(Recorder):
        def create_repo(self, *arguments: Any, **options: Any) -> None:
            raise ConnectionError("Connection refused")

    with pytest.raises(PublishError, match=r"did not accept the Space ann/ldvc \(Connection refused\)"):
        publish("ann/ldvc", api=Unreachable())
