"""docs/trust.md names a test for each threat and fault."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "trust.md"


def test_every_test_that_is_named_exists() -> None:
    """`test_x.py::test_y` names its module; a name without one may be in any."""
    tests = {
        path.name: {each.name for each in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(each, ast.FunctionDef)}
        for path in TESTS.glob("test_*.py")
    }
    everywhere = set().union(*tests.values())
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ") and not line.endswith("| test |")]
    named = [name for row in rows for name in re.findall(r"`(test_\w+(?:\.py)?(?:::\w+)?)`", row[-1])]
    missing = []
    for name in named:
        module, _, test = name.rpartition("::")
        there = name in tests if name.endswith(".py") else test in (tests.get(module, ()) if module else everywhere)
        missing += [] if there else [name]
    assert not missing and len(named) > 80
    assert all("test" in row[-1] for row in rows), "a row without a test"
