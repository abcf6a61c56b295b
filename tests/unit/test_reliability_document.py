"""What docs/reliability.md points to exists: its promises stand on tests and code that it names."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "reliability.md").read_text()
POINTERS = set(re.findall(r"`([^`\n]+)`", DOCUMENT))


def test_every_file_it_names_is_there() -> None:
    files = {pointer for pointer in POINTERS if re.fullmatch(r"[\w/]+\.(py|md)", pointer)}
    files |= {f"docs/{link}" for link in re.findall(r"\]\(([^)]+)\)", DOCUMENT)}
    assert files
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []


def test_every_test_check_and_rule_it_names_is_there() -> None:
    code = "\n".join(
        path.read_text() for folder in ("shared", "sandbox", "tests") for path in (ROOT / folder).rglob("*.py")
    )
    names = {name for name in POINTERS if re.fullmatch(r"_?[a-z]\w*_\w+|_[a-z]\w*|_?[A-Z]{2,}(_[A-Z]+)+", name)}
    assert len(names) > 20
    defined = r"(?m)^\s*(?:(?:async )?def {0}\b|{0}(?::[^=\n]+)? = |{0}: )"
    data = {"lease_updated_at"}  # the API's, not ours
    assert [name for name in sorted(names - data) if not re.search(defined.format(name), code)] == []


def test_every_command_it_names_is_the_makefiles() -> None:
    commands = set(re.findall(r"`make ([a-z0-9-]+)", DOCUMENT))
    makefile = (ROOT / "Makefile").read_text()
    assert commands >= {"simulate", "simulate-selftest", "demo"}
    assert [name for name in sorted(commands) if not re.search(rf"(?m)^{name}:", makefile)] == []
