"""The dependencies that are written in two places, and the commands of the documents."""

import ast
import re
import shlex
from itertools import chain
from pathlib import Path

import pytest

from ldvc import __main__ as command_line
from train import benchmark, config, evaluate, experiment, prepare, train

tomllib = pytest.importorskip("tomllib")  # Python 3.11
TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("examples/*.md")), *sorted(ROOT.glob("docs/*.md"))]
PROGRAMS = (train, evaluate, experiment, benchmark, prepare)
PARSERS = {"ldvc": command_line, **{Path(program.__file__).name: program for program in PROGRAMS}}


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


def names_of(*extras: str) -> set[str]:
    """The packages of the project and of some extras, without versions."""
    wanted = [*PROJECT["dependencies"], *chain.from_iterable(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return {re.split(r"[<>=\[]", each)[0] for each in wanted} - {"ldvc"}


def test_the_lock_file_holds_every_package() -> None:
    locked = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert {name.lower().replace("_", "-") for name in names_of("train", "dev")} <= locked


def test_the_licence_of_every_package_is_listed() -> None:
    listed = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    assert not [name for name in names_of(*PROJECT["optional-dependencies"]) if f" {name}: " not in listed]


@pytest.mark.parametrize(("document", "command"), commands())
def test_every_command_of_the_documents_is_parsed_by_its_program(document: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    place = next(index for index, word in enumerate(words) if Path(word).name in PARSERS)
    program, arguments = PARSERS[Path(words[place]).name], words[place + 1 :]
    options = program.parse(arguments)
    if program is train:
        config.load_config(options.config, options.set or [])


def test_every_test_that_is_named_exists() -> None:
    """docs/trust.md names a test for each threat: `test_x.py::test_y`, or `test_y` of any module."""
    tests = {
        path.name: {each.name for each in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(each, ast.FunctionDef)}
        for path in TESTS.glob("test_*.py")
    }
    everywhere = set().union(*tests.values())
    lines = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ") and not line.endswith("| test |")]
    named = [name for row in rows for name in re.findall(r"`(test_\w+(?:\.py)?(?:::\w+)?)`", row[-1])]
    missing = []
    for name in named:
        module, _, test = name.rpartition("::")
        there = name in tests if name.endswith(".py") else test in (tests.get(module, ()) if module else everywhere)
        missing += [] if there else [name]
    assert not missing and len(named) > 80
    assert all("test" in row[-1] for row in rows), "a row without a test"
