"""What `fleet` says and how it takes its words; what it does to a stack is tests/e2e's."""

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError, NoCredentialsError, NoRegionError
from rich.console import Console
from typer.testing import CliRunner

from cli import app as fleet
from cli.terminal import span, table


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words, those of subgroups as well."""
    import typer

    group = group or typer.main.get_command(fleet.app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())


def test_the_help_fits_one_screen() -> None:
    lines = CliRunner().invoke(fleet.app, ["--help"]).output.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line.startswith("  ") and line.endswith("...")], "a command's line is cut"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_shows_an_example_of_itself(words: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(fleet.app, [*words, "--help"]).output
    assert f"Example:  fleet {' '.join(words)}" in shown
    assert "[default: (dynamic)]" not in shown


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["ls", "--json"], ["--json", "ls"]),
        (["ls", "--stack", "one", "--all"], ["--stack", "one", "ls", "--all"]),
        (["ls", "--region=eu-west-1"], ["--region=eu-west-1", "ls"]),
        (["exec", "sesn_1", "--", "jq", "--json"], ["exec", "sesn_1", "--", "jq", "--json"]),
        (["ls", "--stack"], ["--stack", "ls"]),
    ],
)
def test_options_of_all_commands_are_taken_before_or_after_the_command(given: list[str], taken: list[str]) -> None:
    assert fleet.global_options_first(given) == taken


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NoCredentialsError(), "sign in"),
        (NoRegionError(), "--region"),
        (ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "DescribeStacks"), "does not allow"),
        (ClientError({"Error": {"Code": "ExpiredToken", "Message": "old"}}, "DescribeStacks"), "sign in again"),
        (KeyError("sk-ant-oat01-secret"), "KeyError"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(error: Exception, told: str) -> None:
    line = fleet.explain(error)
    assert told in line
    assert "\n" not in line
    assert "sk-ant" not in line


def test_a_length_of_time_is_short() -> None:
    lengths = [span(ms) for ms in (-5, 1_400, 119_000, 125_000, 7_300_000, 200_000_000)]
    assert lengths == ["0 s", "1 s", "119 s", "2 min", "2 h 1 min", "2 d 7 h"]


def test_an_id_is_never_cut_in_a_narrow_terminal() -> None:
    console = Console(width=60, file=io.StringIO())
    console.print(table(("ID", "WHAT"), [("sesn_" + "a" * 32, "a reason that is long " * 3)]))
    assert isinstance(console.file, io.StringIO)
    assert "sesn_" + "a" * 32 in console.file.getvalue()


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    from cli.terminal import print_json

    print_json({"at": 1})
    assert json.loads(capsys.readouterr().out) == {"at": 1}
