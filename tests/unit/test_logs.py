"""Every line of the log says what it is about, in the same words everywhere; read from the code itself."""

import ast
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aws_lambda_powertools import Logger
from json_log import JsonLines

from shared.diagnose import Kind
from shared.launching import LaunchMessage
from shared.log import KEYS, log_fields
from shared.record import Lease, LiveEntry, Phase, Record
from tests.unit import cloudformation

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("debug", "info", "warning", "error", "exception", "critical")
ITEM = {"work_id", "session_id", "turn", "attempt", "phase", "task"}
OF_NO_ITEM = {
    "tasks not described; the next round asks again",  # about the stack, a round or a request
    "a part of the sweep failed in a way not known here; the next round repeats it",
    "a part of the sweep failed; the next round repeats it",
    "a part of the sweep is not allowed",
    "a part of the sweep ran out of time; the next round goes on",
    "answered CloudFormation",
    "circuit breaker closed: a sandbox runs",
    "circuit breaker open: nothing is claimed, one launch a minute is tried",
    "circuit breaker open: work waits in the server's queue",
    "launch failed; the message comes back",
    "lease loop started",
    "left to the actor that got there first",
    "malformed launch message: moved to the dead-letter queue",
    "malformed task state ignored",
    "most work items answer 404: check base URL and environment id",
    "no slot is free; work waits in the server's queue",
    "not configured: parts of the sweep are left out",
    "not configured: nothing is polled",
    "not configured: webhooks get a 503",
    "paused by hand: nothing new is claimed",
    "poll failed; the next run tries again",
    "polling failed; the next minute tries again",
    "stuck turns repaired",
    "the image could not be built",
    "writes that a batch left open are put alone",
    "the key may not list work items: strands are not looked for",
    "the lease loop could not be started; the next run tries again",
    "the message comes back later than wanted",
    "webhook not served; its sender tries again, and the schedule polls anyway",
    "webhook refused",
    "webhook woke the poller",
}


@dataclass(frozen=True)
class Call:
    """One call of the logger; `spread` is what it spreads with `**`, as source."""

    where: str
    level: str
    message: str | None
    keys: frozenset[str]
    spread: tuple[str, ...]


def calls() -> list[Call]:
    """Of the control plane."""
    found = []
    for path in [*(ROOT / "shared").glob("*.py"), *(ROOT / "functions").glob("*/app.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=level)):
                    found.append(_call(path, node, level, node.args[0] if node.args else None))
    return found


def said() -> list[Call]:
    """Of the sandbox's runner."""
    found = []
    for path in (ROOT / "sandbox").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id="say")):
                    found.append(_call(path, node, ast.unparse(node.args[0]), node.args[1]))
    return found


def _call(path: Path, node: ast.Call, level: str, message: ast.expr | None) -> Call:
    constant = message.value if isinstance(message, ast.Constant) and isinstance(message.value, str) else None
    keys = frozenset(keyword.arg for keyword in node.keywords if keyword.arg)
    spread = tuple(ast.unparse(keyword.value) for keyword in node.keywords if not keyword.arg)
    return Call(f"{path.name}:{node.lineno}", level, constant, keys, spread)


def test_every_message_is_constant_and_its_keys_are_the_known_ones() -> None:
    found = calls() + said()
    assert len(found) > 60
    assert [call.where for call in found if call.message is None] == [], "a query counts constant messages"
    unknown = {call.where: sorted(call.keys - KEYS.keys()) for call in found if call.keys - KEYS.keys()}
    assert unknown == {}


def test_every_key_is_used() -> None:
    used = set[str]().union(*(call.keys for call in calls() + said()))
    assert KEYS.keys() - used - ITEM == set()


def test_every_line_about_an_item_names_it() -> None:
    """`log_fields` tells all that is known; where only the id is known, the id."""
    found = calls()
    assert {call.level for call in found} <= set(LEVELS)
    naming = [call for call in found if "work_id" in call.keys or call.spread]
    nameless = {call.message for call in found if call not in naming}
    assert nameless - OF_NO_ITEM == set()
    assert OF_NO_ITEM - {call.message for call in found} == set(), "no such line any more"
    assert {one for call in naming for one in call.spread if not one.startswith("log_fields(")} <= {"fields", "named"}
    assert len(naming) > 25


def test_what_a_record_knows_is_on_its_lines() -> None:
    record = Record(
        work_id="w", environment_id="e", kind="session", session_id="s", turn=7, phase=Phase.RUNNING, task_arn="arn"
    )
    told = {"work_id": "w", "session_id": "s", "turn": 7, "attempt": 1, "phase": "running", "task": "arn"}
    assert log_fields(record) == told
    assert set(told) == ITEM
    assert log_fields(LiveEntry(work_id="w", phase=Phase.HELD, turn=7, attempt=2)).keys() == ITEM - {
        "session_id",
        "task",
    }
    assert log_fields(LaunchMessage(work_id="w", turn=7, attempt=1)) == {"work_id": "w", "turn": 7, "attempt": 1}
    lease = Lease(work_id="w", turn=7, value="v", ttl_seconds=30, accepted_sent_at=0, due_at=0)
    assert log_fields(lease) == {"work_id": "w", "turn": 7}


def test_a_secret_is_never_a_field() -> None:
    fields = set(Record.model_fields) & {"secret", "ticket_hashes", "ticket_nonce_hash", "callback_hash"}
    assert len(fields) == 4
    record = Record(work_id="w", environment_id="e", kind="session", turn=7, phase=Phase.RECEIVED, secret="hush")
    assert "hush" not in json.dumps(log_fields(record), default=repr)


@pytest.fixture
def line_of_the_control_plane(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    Logger(service="poller").info("held", work_id="w")
    out = capsys.readouterr()
    line: dict[str, object] = json.loads((out.out or out.err).splitlines()[-1])
    return line


def test_a_sandbox_s_line_has_the_form_of_the_control_plane_s(line_of_the_control_plane: dict[str, object]) -> None:
    formatter = JsonLines()
    formatter.add_fields({"work_id": "w"})
    record = logging.LogRecord("runner", logging.INFO, "runner.py", 1, "worker starts", None, None)
    line = json.loads(formatter.format(record))
    common = {"level", "message", "timestamp", "service", "work_id"}
    assert common <= line.keys()
    assert common <= line_of_the_control_plane.keys()
    assert line["service"] == "sandbox"


# --- the saved queries -----------------------------------------------------------------------------------------

QUERIES = {
    name: one["Properties"]
    for name, one in cloudformation.load(ROOT / "template.yaml")["Resources"].items()
    if one["Type"] == "AWS::Logs::QueryDefinition"
}
WORDS = {"fields", "filter", "stats", "sort", "limit", "by", "as", "and", "or", "not", "in", "asc", "desc"}
FUNCTIONS = {"count", "max", "latest"}
GIVEN = {"service", "level", "message"}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_every_saved_query_asks_for_what_code_logs(query: dict[str, Any]) -> None:
    text = query["QueryString"]
    quoted = re.findall(r'"([^"]*)"', text)
    bare = re.sub(r'"[^"]*"', "", text)
    named_here = set(re.findall(r" as (\w+)", bare))
    names = set(re.findall(r"@?[A-Za-z_]+", bare)) - WORDS - FUNCTIONS - named_here
    assert names - {"@timestamp", "@logStream"} - KEYS.keys() - GIVEN == set()
    known = {call.message for call in calls() + said()} | set(Kind) | {"WARNING", "ERROR", "ID"}
    assert [one for one in quoted if one not in known] == []


def test_a_session_s_story_is_read_from_every_log_that_tells_of_sessions() -> None:
    groups = {one["Ref"] for one in QUERIES["SessionStoryQuery"]["LogGroupNames"]}
    functions = {path.parent.name for path in (ROOT / "functions").glob("*/app.py")} - {"image", "webhook"}
    assert groups == {f"{name.capitalize()}Logs" for name in functions} | {"SandboxLogs"}
    assert len(QUERIES) == 3
