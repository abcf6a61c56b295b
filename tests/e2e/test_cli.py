"""`fleet` on a stack of the local AWS: every command as an operator runs it, over HTTP, against the real functions."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from cli import app as fleet
from cli.stack import Fleet
from local.demo import bash
from local.stack import Stack, architecture, running
from shared.record import Phase, Record

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = {
    "LeaseTtlSeconds": "45",
    "BeatIntervalSeconds": "5",
    "MaxIdleSeconds": "1",
    "StopTimeoutSeconds": "5",
    "PollWindowSeconds": "0",
    "EnableExec": "true",
}
BUSY = [bash("sleep 300", "")] * 4  # a sandbox that is stopped posts the result of the tool that it ended
PATIENCE = 60.0  # seconds until what must come counts as never coming

_Found = TypeVar("_Found")


class Operator:
    """What a person at a terminal does, and what users of the API do meanwhile."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._fleet = Fleet(endpoint_url=stack.aws_url)
        self._http = httpx.Client(base_url=f"{stack.api_url}/_control/", timeout=10)

    def run(self, *words: str, code: int = 0) -> str:
        """The output of `fleet WORDS`, which must end with this code; nothing secret may be in it."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            fleet.main(["--endpoint-url", self.stack.aws_url, *words])
        assert (ended.value.code or 0) == code, f"{words}: {err.getvalue()}"
        self._clean(err.getvalue())
        return self._clean(out.getvalue())

    def process(self, *words: str) -> "subprocess.Popen[str]":
        """`fleet WORDS` as a process of its own, its output piped."""
        return subprocess.Popen(
            [sys.executable, "-m", "cli.app", "--endpoint-url", self.stack.aws_url, *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def said(self, *words: str) -> tuple[int, str, str]:
        """Code, stdout and stderr of a process that ends by itself."""
        process = self.process(*words)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, self._clean(out), self._clean(err)

    def json(self, *words: str, code: int = 0) -> Any:
        return json.loads(self.run(*words, "--json", code=code))

    def control(self, path: str, body: Any = None) -> Any:
        return self._http.post(path, json=body).raise_for_status().json()

    def session(self, script: list[dict[str, Any]] = BUSY) -> str:
        return str(self.control("sessions", {"script": script})["sessions"][0]["work_id"])

    def record(self, work_id: str) -> Record | None:
        return self._fleet.store.get(work_id)

    def running(self, work_id: str, attempt: int = 1) -> Record:
        def runs() -> Record | None:
            record = self.record(work_id)
            return record if record and (record.phase, record.attempt) == (Phase.RUNNING, attempt) else None

        return eventually(runs)

    def outcome(self, work_id: str) -> str:
        record = self.record(work_id)
        return str(record.outcome) if record else ""

    def logged(self, group: str, text: str) -> bool:
        events = self.stack.client("logs").filter_log_events(logGroupName=group)["events"]
        return any(text in event["message"] for event in events)

    def api_state(self, work_id: str) -> str:
        items = self._http.get("state").json()["work"]
        return str(next(item["state"] for item in items if item["id"] == work_id))

    def _clean(self, text: str) -> str:
        secrets = [*self._http.get("secrets").json()["secrets"], *self.stack.keys]
        assert not any(secret in text for secret in secrets), "a secret was printed"
        assert "\x1b" not in text, "colour in a pipe"
        assert "Traceback" not in text
        return text


def eventually(look: Callable[[], _Found | None]) -> _Found:
    end = time.monotonic() + PATIENCE
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < end, "it never came"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def operator() -> Iterator[Operator]:
    before = dict(os.environ)
    with running(0.05, lambda _: None, PARAMETERS) as stack:
        yield Operator(stack)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def busy(operator: Operator) -> str:
    """A session that runs for as long as it is let."""
    work_id = operator.session()
    operator.running(work_id)
    return work_id


def test_a_fresh_stack_is_found_healthy_and_what_was_not_looked_at_is_not_called_ok(operator: Operator) -> None:
    told = operator.json("doctor")
    found = {line["what"]: line["status"] for line in told["lines"]}
    for what in ("credentials", "stack", "functions", "key", "key's calls", "claiming", "schedules", "dead letters"):
        assert found[what] == "ok", told
    assert found["Fargate quota"] == "not checked"
    assert told["count"]["failed"] == 0


def test_a_running_session_is_listed_and_shown_with_its_timeline(operator: Operator, busy: str) -> None:
    code, out, _ = operator.said("ls")
    assert code == 0
    header, *lines = [line.split("\t") for line in out.splitlines()]
    assert header[:2] == ["ID", "PHASE"]
    assert [busy, "running"] in [line[:2] for line in lines]
    shown = operator.run("show", busy)
    assert "runs for" in shown
    for moment in ("received", "held", "launching", "running"):
        assert f"s  {moment}\n" in shown


def test_its_log_lines_come_from_functions_and_sandbox_in_the_order_of_time(operator: Operator, busy: str) -> None:

    def told() -> list[dict[str, Any]] | None:
        lines: list[dict[str, Any]] = operator.json("logs", busy)
        return lines if {"poller", "launcher", "sandbox"} <= {line["source"] for line in lines} else None

    lines = eventually(told)
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
    assert all(busy in json.dumps(line["fields"]) for line in lines)


def test_both_sides_agree_on_what_runs(operator: Operator, busy: str) -> None:
    told = operator.json("stats")
    assert told["items"][busy] == "active"
    assert told["live"][busy] == "running"
    assert not [remark for remark in told["remarks"] if "no live record" in remark or "We hold" in remark]


def test_a_sandbox_is_entered_as_far_as_a_local_aws_goes(
    operator: Operator, busy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own ECS was asked to start it with ECS Exec and to open a session; it has no agent that could."""
    assert operator.json("exec", busy)["possible"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "how to get it" in operator.said("exec", busy)[2]
    (tmp_path / "session-manager-plugin").symlink_to("/bin/false")
    code, out, err = operator.said("exec", busy, "--", "ls", "-l")
    assert (code, out) == (4, "")
    assert "ECS does not reach its agent" in err


def test_what_runs_is_charged_until_now_and_what_has_ended_by_its_own_times(operator: Operator, busy: str) -> None:
    quick = operator.session([bash("echo 1", "1")])
    eventually(lambda: operator.outcome(quick) == "completed")
    told = operator.json("cost")
    [ended] = [one for one in told["sessions"] if one["work_id"] == quick]
    assert (ended["sandboxes"], ended["seconds"]) == (1, 60), "a minute at least is charged"
    vcpu, gb = {"arm64": (0.03238, 0.00356), "x86_64": (0.04048, 0.004445)}[architecture()]
    assert ended["usd"] == pytest.approx((vcpu + 2 * gb + 0.005) / 60, abs=1e-6)
    assert [one["sandboxes"] for one in told["sessions"] if one["work_id"] == busy] == [1]
    assert told["total"]["control_plane_usd"] > 0
    assert not [remark for remark in told["remarks"] if "Not known" in remark]
    assert operator.run("cost", "--csv").count(quick) == 1


def test_an_unknown_id_offers_the_nearest(operator: Operator, busy: str) -> None:
    code, out, err = operator.said("show", busy[:-1])
    assert (code, out) == (3, "")
    assert busy in err
    assert operator.said("ls", "--stack", "elsewhere")[0] == 3


def test_without_a_terminal_nothing_harmful_is_done_unasked(operator: Operator, busy: str) -> None:
    for command in ("stop", "retry"):
        code, out, err = operator.said(command, busy)
        assert (code, out) == (4, "")
        assert "--yes" in err
    operator.running(busy)


@pytest.mark.parametrize("words", [["watch"], ["watch", "--json"], ["logs", "-f"]])
def test_what_goes_on_ends_by_ctrl_c_in_silence(operator: Operator, busy: str, words: list[str]) -> None:
    process = operator.process(*words, *([busy] if words[0] == "logs" else []))
    try:
        assert process.stdout
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == ""


def test_a_session_retried_then_stopped_by_force_then_retried_again(operator: Operator) -> None:
    work_id = operator.session()
    operator.running(work_id)
    operator.run("retry", work_id, "--yes")
    operator.running(work_id, attempt=2)
    stopped = operator.json("stop", work_id, "--force", "--wait", "--yes")
    assert (stopped["phase"], stopped["outcome"]) == ("stopped", "stopped")
    assert operator.api_state(work_id) == "stopped"
    assert "over already" in operator.run("stop", work_id, "--yes")
    assert "ANTHROPIC_API_KEY" in operator.said("retry", work_id, "--yes")[2]
    os.environ["ANTHROPIC_API_KEY"] = operator.stack.keys[1]
    try:
        operator.run("retry", work_id, "--yes")
    finally:
        del os.environ["ANTHROPIC_API_KEY"]
    again = operator.running(work_id)
    assert [turn.outcome for turn in again.history] == ["stopped"]
    operator.run("stop", work_id, "--yes", "--wait")


def test_paused_nothing_new_is_claimed_and_drained_nothing_runs(operator: Operator, busy: str) -> None:
    operator.run("pause")
    eventually(lambda: operator.logged("/sandbox-fleet/poller", "paused by hand"))  # no earlier run is left
    waiting = operator.session([bash("echo 1", "1")])
    assert operator.run("drain", "--wait", "--timeout", "1", code=5) == ""
    assert operator.json("drain")["live"] == [busy]
    operator.run("stop", busy, "--yes", "--wait")
    assert operator.json("drain", "--wait")["drained"]
    assert operator.record(waiting) is None
    assert {line["what"]: line["status"] for line in operator.json("doctor")["lines"]}["claiming"] == "warning"
    operator.run("resume")
    eventually(lambda: operator.outcome(waiting) == "completed")


def test_dead_letters_are_looked_at_and_dropped_only_if_told(operator: Operator) -> None:
    sqs, dead = operator.stack.client("sqs"), operator.stack.outputs["DlqUrl"]
    sqs.send_message(QueueUrl=dead, MessageBody="no launch message")
    sqs.send_message(QueueUrl=dead, MessageBody='{"work_id": "sesn_gone", "turn": 1, "attempt": 1}')
    assert "malformed" in operator.run("redrive", "--drop", code=4)
    letters = operator.json("redrive", "--drop", "--yes")
    assert sorted(letter["verdict"] for letter in letters) == ["malformed", "over"]
    assert operator.run("redrive") == "No dead letters.\n"


def test_a_repair_shows_what_it_would_do_and_does_it_when_told(operator: Operator) -> None:
    work_id = operator.session()
    operator.running(work_id)
    machine = operator.stack.outputs["StateMachineArn"]
    states = operator.stack.client("stepfunctions")
    for execution in states.list_executions(stateMachineArn=machine, statusFilter="RUNNING")["executions"]:
        states.stop_execution(executionArn=execution["executionArn"])
    plan = operator.json("repair", "--yes")
    assert plan["steps"] in (["start the lease loop"], []), "the poller may have been first"
    eventually(lambda: states.list_executions(stateMachineArn=machine, statusFilter="RUNNING")["executions"])
    operator.run("stop", work_id, "--yes")
