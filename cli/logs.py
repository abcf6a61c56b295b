"""`fleet logs`: what the functions and the sandbox said of one session, in the order of time."""

import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from cli.stack import FUNCTIONS, Fleet
from cli.terminal import POLL_SECONDS, Code, Failure, clock, note, out, print_json, print_json_line, say
from shared import wiring
from shared.record import Record

_LATE_MS = 30_000  # how late a line may come to CloudWatch and still be shown by -f
# What every line has: where it was written and by which run. The rest is what happened
_COMMON = frozenset(
    (
        *("level", "time", "timestamp", "message", "location", "service", "logger", "cold_start", "xray_trace_id"),
        *("function_name", "function_arn", "function_request_id", "function_memory_size"),
        *("work_id", "session_id", "environment_id"),
    )
)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True)
class Line:
    at: int  # epoch milliseconds
    source: str
    text: str
    event_id: str
    fields: dict[str, Any]


def logs(
    ctx: typer.Context,
    ident: Annotated[str, typer.Argument(metavar="ID", help="A session's or a work item's id.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    since: Annotated[str, typer.Option(help="How far back: 30m, 6h, 2d. Else from the session's first turn.")] = "",
) -> None:
    """Show what functions and sandbox logged of a session.

    Lines of all log groups that name it, merged by their time. With --json an object for each.
    """
    fleet: Fleet = ctx.obj
    record = fleet.find(ident)
    start = wiring.now() - seconds_in(since) * 1000 if since else began(record)
    seen: set[str] = set()
    if not follow:
        found = read(fleet, record, start)
        if fleet.json:
            print_json([as_json(line) for line in found])
            return
        for line in found:
            say(in_words(line))
        if not found:
            note("No line is kept of it: LogRetentionDays may be over, or --since too short.")
        return
    while True:
        for line in read(fleet, record, start):
            if line.event_id in seen:
                continue
            seen.add(line.event_id)
            if fleet.json:
                print_json_line(as_json(line))
            else:
                say(in_words(line))
        out.file.flush()
        start = max(start, wiring.now() - _LATE_MS)
        time.sleep(POLL_SECONDS)


def seconds_in(text: str) -> int:
    """Seconds of `45s`, `30m`, `6h` or `2d`. Raises Failure for anything else."""
    number, unit = text[:-1], text[-1:]
    if not number.isdigit() or unit not in _UNITS:
        raise Failure(f"{text!r} is no length of time: write 45s, 30m, 6h or 2d.", Code.USAGE)
    return int(number) * _UNITS[unit]


def began(record: Record) -> int:
    """When the oldest turn that is known of it began."""
    return min([record.turn, *(turn.turn for turn in record.history)])


def read(fleet: Fleet, record: Record, start: int) -> list[Line]:
    """The lines since then, the oldest first."""
    ids = {known for known in (record.work_id, record.session_id) if known}
    groups = {name.lower(): fleet.resource(f"{name}Logs") for name in (*FUNCTIONS, "Sandbox")}
    pattern = " ".join(f'?"{known}"' for known in sorted(ids)) if len(ids) > 1 else f'"{record.work_id}"'
    client = fleet.client("logs")

    def lines(source: str) -> list[Line]:
        pages = client.get_paginator("filter_log_events").paginate(
            logGroupName=groups[source], startTime=start, filterPattern=pattern
        )
        return [parse(source, event) for page in pages for event in page["events"]]

    with ThreadPoolExecutor(len(groups)) as pool:
        found: Iterable[list[Line]] = pool.map(lines, groups)
        return sorted((line for part in found for line in part), key=lambda line: line.at)


def parse(source: str, event: dict[str, Any]) -> Line:
    """A line of a log as CloudWatch gives it; one that is no JSON object is shown as it is."""
    message = str(event.get("message", "")).strip()
    try:
        fields = json.loads(message)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        fields = {"message": message}
    text = str(fields.get("message", message))
    return Line(int(event["timestamp"]), source, text, str(event.get("eventId") or f"{source}{event}"), fields)


def in_words(line: Line) -> str:
    level = str(line.fields.get("level", ""))
    rest = [f"{name}={_short(value)}" for name, value in line.fields.items() if name not in _COMMON]
    return "  ".join([clock(line.at), f"{line.source:8}", f"{level:7}", line.text, *rest]).rstrip()


def as_json(line: Line) -> dict[str, Any]:
    return {"at": line.at, "source": line.source, "fields": line.fields}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 200 else text[:197] + "..."
