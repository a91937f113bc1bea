"""The dependencies that are written in two places, and the commands of the documents."""

import re
import shlex
from pathlib import Path

import pytest

from ldvc import __main__ as command_line
from train import benchmark, config, evaluate, experiment, prepare, train

tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("examples/*.md")), *sorted(ROOT.glob("docs/*.md"))]
PARSERS = {
    "train.py": train,
    "evaluate.py": evaluate,
    "experiment.py": experiment,
    "benchmark.py": benchmark,
    "prepare.py": prepare,
    "ldvc": command_line,
}


def commands() -> list[tuple[str, str]]:
    """(document, command) of every line of a shell block that calls a program of `train/` or `python -m ldvc`."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if re.search(r"\btrain/(train|evaluate|experiment|benchmark|prepare)\.py|-m ldvc\b", line):
                    found.append((document.name, line))
    return found


def test_the_spaces_file_lists_the_packages_of_the_project() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == PROJECT["dependencies"]


def test_the_lock_file_holds_every_package() -> None:
    locked = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "requirements.lock").read_text().splitlines()}
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"], *PROJECT["optional-dependencies"]["dev"]]
    names = {re.split(r"[<>=\[]", each)[0].lower().replace("_", "-") for each in wanted} - {"ldvc"}
    assert names <= locked, names - locked


def test_the_licence_of_every_package_is_listed() -> None:
    listed = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    wanted = [*PROJECT["dependencies"], *(each for extra in PROJECT["optional-dependencies"].values() for each in extra)]
    names = {re.split(r"[<>=\[]", each)[0] for each in wanted} - {"ldvc"}
    assert not [name for name in names if f" {name}: " not in listed]


@pytest.mark.parametrize(("document", "command"), commands())
def test_every_command_of_the_documents_is_parsed_by_its_program(document: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    place = next(index for index, word in enumerate(words) if Path(word).name in PARSERS)
    program, arguments = PARSERS[Path(words[place]).name], words[place + 1 :]
    options = program.parse(arguments)
    if program is train:
        config.load_config(options.config, options.set or [])
