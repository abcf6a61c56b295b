"""Each switch of the emulator in each of its positions, over HTTP in process: what a client then sees."""

import asyncio
import base64
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from local.work_api.replies import BETA
from local.work_api.server import Emulator
from local.work_api.switches import Switches, values_of

ENVIRONMENT_KEY, ORG_KEY = "sk-ant-oat01-unit", "sk-ant-api03-unit"
WORK = "/v1/environments/env_unit/work"


class Probe:
    """An emulator with one session, reached in process."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        transport = httpx.ASGITransport(app=Emulator("env_unit", ENVIRONMENT_KEY, ORG_KEY).app, client=("127.0.0.1", 1))
        self._http = httpx.AsyncClient(transport=transport, base_url="http://emulator")

    def call(
        self, method: str, path: str, body: Any = None, key: str = ENVIRONMENT_KEY, **query: Any
    ) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}", "anthropic-beta": BETA}
        return self._runner.run(self._http.request(method, path, json=body, headers=headers, params=query))

    def control(self, path: str, body: Any = None) -> Any:
        return self.call("POST", f"/_control/{path}", body or {}).raise_for_status().json()

    def start(self, switches: dict[str, str]) -> "Probe":
        self.control("switches", switches)
        made = self.control("sessions", {"script": [{"tool": "bash", "input": {}}]})["sessions"][0]
        self.session_id, self.id = made["session_id"], made["work_id"]
        return self

    def poll(self, **query: Any) -> httpx.Response:
        return self.call("GET", f"{WORK}/poll", **query)

    def ack(self) -> httpx.Response:
        return self.call("POST", f"{WORK}/{self.id}/ack")

    def beat(self, expected: str = "NO_HEARTBEAT", **query: Any) -> httpx.Response:
        return self.call("POST", f"{WORK}/{self.id}/heartbeat", expected_last_heartbeat=expected, **query)

    def stop(self, *, force: bool) -> httpx.Response:
        return self.call("POST", f"{WORK}/{self.id}/stop", {"force": force})

    def take(self) -> str:
        """Poll, ack and claim; the value to echo."""
        self.poll()
        self.ack()
        return str(self.beat().json()["last_heartbeat"])

    def item(self) -> dict[str, Any]:
        items = self.call("GET", "/_control/state").json()["work"]
        return next(item for item in items if item["id"] == self.id)

    def pass_seconds(self, seconds: float) -> None:
        self.control("clock", {"advance_seconds": seconds})

    def message(self) -> None:
        self.control(f"sessions/{self.session_id}/messages")

    def token(self) -> str:
        secret = self.poll().json()["secret"]
        return str(json.loads(base64.urlsafe_b64decode(secret + "=="))["sessions_token"])


def _requeued(probe: Probe) -> dict[str, Any]:
    probe.take()
    probe.call("POST", f"{WORK}/{probe.id}", {"metadata": {"a": "1"}}, key=ORG_KEY)
    probe.stop(force=True)
    probe.pass_seconds(5)
    probe.message()
    return probe.item()


def _created_at_is_kept(probe: Probe) -> bool:
    before = probe.item()["created_at"]
    return bool(_requeued(probe)["created_at"] == before)


def _healthcheck_has_an_id(probe: Probe) -> bool:
    probe.poll()
    probe.control("work", {"type": "healthcheck"})
    return "id" in probe.poll().json()["data"]


def _acked_and_left(probe: Probe) -> str:
    probe.poll()
    probe.ack()
    probe.pass_seconds(31)
    return str(probe.item()["state"])


def _lapsed(probe: Probe) -> str:
    probe.take()
    probe.pass_seconds(301)
    return str(probe.item()["state"])


def _late_echo(probe: Probe) -> int:
    value = probe.take()
    probe.pass_seconds(301)
    return probe.beat(value).status_code


def _granted(probe: Probe) -> int:
    probe.poll()
    probe.ack()
    return int(probe.beat(desired_ttl_seconds=9999).json()["ttl_seconds"])


def _claim_of_queued(probe: Probe) -> int:
    probe.poll()
    return probe.beat().status_code


def _claim_of_stopped(probe: Probe) -> int:
    probe.take()
    probe.stop(force=True)
    return probe.beat().status_code


def _graceful_again(probe: Probe) -> str:
    probe.take()
    probe.stop(force=False)
    return str(probe.stop(force=False).json()["state"])


def _abandoned(probe: Probe) -> str:
    probe.take()
    probe.stop(force=False)
    probe.pass_seconds(361)
    return str(probe.item()["state"])


def _message_while_stopping(probe: Probe) -> tuple[str, str]:
    probe.take()
    probe.stop(force=False)
    probe.message()
    before = probe.item()["state"]
    probe.stop(force=True)
    return before, probe.item()["state"]


def _first_listed_is_newest(probe: Probe) -> bool:
    newest = probe.control("sessions")["sessions"][0]["work_id"]
    return bool(probe.call("GET", WORK).json()["data"][0]["id"] == newest)


def _stopped_are_listed(probe: Probe) -> bool:
    probe.stop(force=True)
    return bool(probe.call("GET", WORK).json()["data"])


def _tool_result_by_token(probe: Probe) -> int:
    token, events = probe.token(), f"/v1/sessions/{probe.session_id}/events"
    history = probe.call("GET", events).json()["data"]
    asked = next(event["id"] for event in history if event["type"] == "agent.tool_use")
    result = {"type": "user.tool_result", "tool_use_id": asked, "content": [{"type": "text", "text": "hi"}]}
    return probe.call("POST", events, {"events": [result]}, key=token).status_code


def _old_token(probe: Probe) -> int:
    token = probe.token()
    probe.pass_seconds(3601)
    return probe.call("GET", f"/v1/sessions/{probe.session_id}", key=token).status_code


def _two_stops(probe: Probe) -> tuple[int, int]:
    return probe.stop(force=True).status_code, probe.stop(force=True).status_code


def _many_calls(probe: Probe) -> tuple[int, bool]:
    reply = [probe.call("GET", f"{WORK}/stats") for _ in range(61)][-1]
    return reply.status_code, "retry-after" in reply.headers


# What to do, and what each position of the switch makes of it.
CASES: dict[str, tuple[Callable[[Probe], Any], dict[str, Any]]] = {
    "work_id": (lambda p: p.poll().json()["id"] == p.session_id, {"session": True, "own": False}),
    "healthcheck_data": (_healthcheck_has_an_id, {"id": True, "no_id": False}),
    "unpolled": (lambda p: p.ack().status_code, {"accepted": 200, "refused": 409}),
    "ack_repeat": (lambda p: [p.poll(), p.ack(), p.ack()][-1].status_code, {"409": 409, "200": 200}),
    "startup_lease": (_acked_and_left, {"off": "starting", "on": "queued"}),
    "expiry": (_lapsed, {"read": "queued", "poll": "active"}),
    "late_echo": (_late_echo, {"refused": 412, "revives": 200}),
    "ttl_bounds": (_granted, {"10-600": 600, "1-300": 300}),
    "claim_queued": (_claim_of_queued, {"412": 412, "409": 409, "claim": 200}),
    "claim_stopped": (_claim_of_stopped, {"200": 200, "412": 412}),
    "graceful_queued": (lambda p: p.stop(force=False).json()["state"], {"stopped": "stopped", "stopping": "stopping"}),
    "graceful_again": (_graceful_again, {"unchanged": "stopping", "stopped": "stopped"}),
    "abandoned_stopping": (_abandoned, {"stays": "stopping", "stopped": "stopped"}),
    "message_stopping": (
        _message_while_stopping,
        {
            "ignored": ("stopping", "stopped"),
            "queues": ("queued", "stopped"),
            "queues_after": ("stopping", "queued"),
        },
    ),
    "requeue_created_at": (_created_at_is_kept, {"kept": True, "new": False}),
    "requeue_metadata": (lambda p: _requeued(p)["metadata"], {"kept": {"a": "1"}, "cleared": {}}),
    "empty_patch": (
        lambda p: p.call("POST", f"{WORK}/{p.id}", {}, key=ORG_KEY).status_code,
        {"unchanged": 200, "400": 400},
    ),
    "list_order": (_first_listed_is_newest, {"newest": True, "oldest": False}),
    "list_limit": (lambda p: p.call("GET", WORK, limit=101).status_code, {"400": 400, "cap": 200}),
    "list_cursor": (lambda p: p.call("GET", WORK, page="junk").status_code, {"400": 400, "ignored": 200}),
    "list_stopped": (_stopped_are_listed, {"shown": True, "hidden": False}),
    "list_org_key": (lambda p: p.call("GET", WORK, key=ORG_KEY).status_code, {"403": 403, "200": 200}),
    "org_key": (lambda p: p.call("GET", f"{WORK}/poll", key=ORG_KEY).status_code, {"403": 403, "401": 401}),
    "secret": (lambda p: p.poll().json()["secret"] is None, {"given": False, "null": True}),
    "update": (
        lambda p: p.call("POST", f"{WORK}/{p.id}", {"metadata": {"a": "1"}}).status_code,
        {"org_key": 403, "anybody": 200},
    ),
    "credential_events": (_tool_result_by_token, {"accepted": 200, "refused": 403}),
    "credential_lifetime": (_old_token, {"unlimited": 200, "hour": 401}),
    "stop_reply": (_two_stops, {"item": (200, 200), "204": (204, 204), "409": (200, 409)}),
    "long_block": (lambda p: p.poll(block_ms=1000).status_code, {"400": 400, "clamp": 200}),
    "reclaim_range": (lambda p: p.poll(reclaim_older_than_ms="x").status_code, {"400": 400, "default": 200}),
    "unknown_fields": (lambda p: p.poll(whatever=1).status_code, {"ignored": 200, "400": 400}),
    "unknown_work": (
        lambda p: sorted(p.call("POST", f"{WORK}/sesn_none/ack").json()),
        {"envelope": ["error", "request_id", "type"], "bare": ["detail"]},
    ),
    "rate_limit": (_many_calls, {"none": (200, False), "60": (429, True)}),
}


@pytest.fixture
def probe() -> Iterator[Probe]:
    with asyncio.Runner() as runner:
        yield Probe(runner)


def test_every_value_of_every_switch_has_a_case() -> None:
    positions = {name: set(values_of(name)) for name in Switches.model_fields}
    assert {name: set(expected) for name, (_, expected) in CASES.items()} == positions


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, case in CASES.items() for value in case[1]])
def test_a_switch_decides_what_a_client_sees(probe: Probe, name: str, value: str) -> None:
    act, expected = CASES[name]
    assert act(probe.start({name: value})) == expected[value]


def test_an_unset_switch_is_at_its_first_value() -> None:
    assert Switches().model_dump() == {name: values_of(name)[0] for name in Switches.model_fields}


def test_a_revived_lease_is_gone_once_the_item_was_polled_again(probe: Probe) -> None:
    probe.start({"late_echo": "revives"})
    value = probe.take()
    probe.pass_seconds(301)
    assert probe.poll().json()["id"] == probe.id
    assert probe.beat(value).status_code == 412


@pytest.mark.parametrize("changes", [{"no_such": "x"}, {"expiry": "never"}, {"expiry": 1}, ["expiry"]])
def test_an_unknown_switch_or_value_is_refused_and_changes_nothing(probe: Probe, changes: Any) -> None:
    assert probe.call("POST", "/_control/switches", changes).status_code == 400
    assert probe.call("GET", "/_control/switches").json() == Switches().model_dump()


def test_the_command_line_lists_every_switch_and_refuses_an_unknown_one() -> None:
    def emulator(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "local.work_api", "--environment-id", "env_unit", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    shown = emulator("--help").stdout
    assert [name for name in Switches.model_fields if f"  {name}={'|'.join(values_of(name))}: " not in shown] == []
    refused = emulator("--switch", "expiry=never")
    assert (refused.returncode, "expiry" in refused.stderr) == (2, True)
