"""Every row of the field notes, which list what broke others at this job, is held by a test that names it."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROWS = range(1, 28)  # the notes' own numbers; the notes are not part of the repository


def rows_by_test() -> dict[str, set[int]]:
    """The rows that each test's docstring names, as "FIELD_NOTES 3, 4"."""
    found: dict[str, set[int]] = {}
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for numbers in re.findall(r"FIELD_NOTES (\d+(?:, \d+)*)", ast.get_docstring(node) or ""):
                    found.setdefault(f"{path.stem}::{node.name}", set()).update(map(int, numbers.split(", ")))
    return found


def test_every_row_is_held_by_a_test_that_names_it() -> None:
    held = set[int]().union(*rows_by_test().values())
    assert sorted(set(ROWS) - held) == [], "rows without a test"
    assert sorted(held - set(ROWS)) == [], "rows that the notes do not have"
