"""How commands speak: failures and exit codes, tables, JSON, questions, waiting. No AWS, no rules of the fleet."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

POLL_SECONDS = 2.0

_Found = TypeVar("_Found")

# rich leaves colour out where the output is no terminal, and where NO_COLOR is set
out = Console(highlight=False, markup=False, emoji=False)
err = Console(highlight=False, markup=False, emoji=False, stderr=True)


class Code(IntEnum):
    """The exit codes; docs/cli.md and `fleet --help` list them."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    NOT_DONE = 4  # not confirmed, or not possible as things are
    TIMED_OUT = 5  # what was waited for has not come; it may come yet
    INTERRUPTED = 130


class Failure(Exception):
    """Ends the command: one line on stderr that says what is wrong and what to do."""

    def __init__(self, message: str, code: Code = Code.FAILED) -> None:
        super().__init__(message)
        self.code = code


def say(text: str) -> None:
    """A line of the command's result."""
    out.print(text, soft_wrap=True)


def note(text: str) -> None:
    """A line beside the result, on stderr: progress, questions, hints."""
    err.print(text, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def print_json_line(value: Any) -> None:
    """One JSON object on a line of its own, at once: for commands that go on."""
    sys.stdout.write(json.dumps(value, default=str) + "\n")
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """For a terminal; `print_table` also serves pipes. The first column, an id to be copied, is never cut."""
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, min_width=max((len(row[0]) for row in rows), default=0) if number == 0 else None)
    for row in rows:
        made.add_row(*row)
    return made


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned in a terminal; in a pipe the cells are separated by tabs, the first line names them."""
    if out.is_terminal:
        out.print(table(columns, rows))
        return
    for row in (columns, *rows):
        print_row(row)


def print_row(cells: Sequence[str]) -> None:
    """A line of a table in a pipe, at once."""
    sys.stdout.write("\t".join(" ".join(cell.split()) for cell in cells) + "\n")
    sys.stdout.flush()


def span(ms: float) -> str:
    """A length of time, short: `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    seconds = max(0, round(ms / 1000))
    if seconds < 120:
        return f"{seconds} s"
    minutes, hours = seconds // 60, seconds // 3600
    if minutes < 120:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def clock(ms: float) -> str:
    """An epoch time in the operator's own zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ms / 1000))


def confirm(question: str, *, yes: bool) -> None:
    """Asks on the terminal unless `yes`. Raises Failure when refused or when there is nobody to ask."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise Failure(f"{question} Nothing was done: there is no terminal to ask on; add --yes.", Code.NOT_DONE)
    err.print(f"{question} [y/N] ", end="", soft_wrap=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Failure("Nothing was done.", Code.NOT_DONE)


@contextlib.contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """Shows on a terminal that something takes long; yields a function that changes the text."""
    if not err.is_terminal:
        yield lambda _: None
        return
    with err.status(text) as status:
        yield status.update


def wait_for(look: Callable[[], _Found | None], what: str, timeout_seconds: float) -> _Found:
    """Looks until there is an answer. Raises Failure once the time is over, with what to do then."""
    end = time.monotonic() + timeout_seconds
    with working(f"waiting: {what}"):
        while True:
            found = look()
            if found is not None:
                return found
            if time.monotonic() >= end:
                message = f"{what}: not so after {span(timeout_seconds * 1000)}. It goes on; look with `fleet ls`."
                raise Failure(message, Code.TIMED_OUT)
            time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))
