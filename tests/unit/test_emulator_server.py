"""The emulator's own edges, in process: what it refuses from outside, who may control it, what it logs."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from local.work_api.replies import BETA
from local.work_api.server import Emulator
from local.work_api.sessions import Sessions, read_script
from local.work_api.state import Refusal

ENVIRONMENT_KEY, ORG_KEY = "sk-ant-oat01-unit", "sk-ant-api03-unit"
HERE, ELSEWHERE = "127.0.0.1", "192.0.2.7"


def requests(*wanted: tuple[str, str, Any], peer: str = HERE, key: str = ENVIRONMENT_KEY) -> list[httpx.Response]:
    """Sends each (method, path, body) to a fresh emulator; `{session}` in a path is the id of its one session."""

    async def main() -> list[httpx.Response]:
        app = Emulator("env_unit", ENVIRONMENT_KEY, ORG_KEY).app
        headers = {"authorization": f"Bearer {key}", "anthropic-beta": BETA}
        async with (
            _client(app, HERE, {}) as control,
            _client(app, peer, headers) as client,
        ):
            made = await control.post("/_control/sessions", json={"script": [{"tool": "bash", "input": {}}]})
            session = made.json()["sessions"][0]["session_id"]
            return [
                await client.request(method, path.replace("{session}", session), json=body)
                for method, path, body in wanted
            ]

    return asyncio.run(main())


def _client(app: Any, peer: str, headers: dict[str, str]) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, client=(peer, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://emulator", headers=headers)


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"type": 1},
        {"type": "session.status_idle", "stop_reason": {"type": "end_turn"}},
        {"type": "user.tool_result", "tool_use_id": "sevt_none", "content": []},
        {"type": "user.tool_result", "tool_use_id": ["sevt_none"], "content": []},
        "user.message",
    ],
)
def test_an_event_that_no_runner_sends_is_refused_and_leaves_the_history_alone(event: Any) -> None:
    events = "/v1/sessions/{session}/events"
    before, refused, after = requests(
        ("GET", events, None), ("POST", events, {"events": [event]}), ("GET", events, None)
    )
    assert refused.status_code == 400
    assert before.json() == after.json()


def test_an_organisation_key_may_not_send_a_tool_result() -> None:
    body = {"events": [{"type": "user.tool_result", "tool_use_id": "sevt_none", "content": []}]}
    [refused] = requests(("POST", "/v1/sessions/{session}/events", body), key=ORG_KEY)
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")


@pytest.mark.parametrize("path", ["secrets", "state"])
def test_control_answers_this_machine_only(path: str) -> None:
    [near] = requests(("GET", f"/_control/{path}", None))
    [far] = requests(("GET", f"/_control/{path}", None), peer=ELSEWHERE)
    assert (near.status_code, far.status_code) == (200, 403)


def test_what_others_do_stands_in_order_among_the_calls() -> None:
    work = "/_control/work/{session}"
    *_, state = requests(
        ("POST", f"{work}/take_lease", None),
        ("POST", "/v1/environments/env_unit/work/{session}/stop", {"force": True}),
        ("POST", f"{work}/finish_foreign", None),
        ("GET", "/_control/state", None),
    )
    calls = [(call["call"], call["credential"], call["force"]) for call in state.json()["calls"]]
    assert calls == [
        ("take_lease", "control", None),
        ("stop", "environment_key", True),
        ("finish_foreign", "control", True),
    ]


def test_a_refusal_is_one_line_on_stderr_without_the_credential(capsys: pytest.CaptureFixture[str]) -> None:
    requests(("POST", "/v1/environments/env_unit/work/a%0Ab/ack?note=hidden", None))
    requests(("GET", "/v1/environments/env_unit/work", None), key="sk-ant-junk")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "refused POST /v1/environments/env_unit/work/a%0Ab/ack: 404 not_found_error: Work item a b was not found.",
        "refused GET /v1/environments/env_unit/work: 401 authentication_error: Invalid bearer token",
    ]


@pytest.mark.parametrize("query", ["block_ms=0", "block_ms=1000", "block_ms=", "reclaim_older_than_ms=-1"])
def test_a_poll_parameter_out_of_range_is_refused(query: str) -> None:
    [reply] = requests(("GET", f"/v1/environments/env_unit/work/poll?{query}", None))
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


def test_events_come_in_the_order_that_is_asked_for() -> None:
    path = "/v1/sessions/{session}/events"
    oldest, newest, wrong = requests(
        ("GET", path, None), ("GET", f"{path}?order=desc", None), ("GET", f"{path}?order=up", None)
    )
    assert oldest.json()["data"][0]["type"] == "user.message"
    assert newest.json()["data"] == oldest.json()["data"][::-1]
    assert wrong.status_code == 400


def test_a_call_that_a_person_denies_is_passed_over() -> None:
    sessions = Sessions("env_unit", lambda: datetime.now(UTC), lambda prefix: f"{prefix}_{next(count)}")
    count = iter(range(100))
    session = sessions.create()
    session.message("go", read_script([{"tool": "bash", "input": {}, "permission": "ask"}]))
    call = next(event for event in session.events if event["type"] == "agent.tool_use")
    assert call["evaluated_permission"] == "ask"
    session.post({"type": "user.tool_confirmation", "tool_use_id": call["id"], "result": "deny"})
    assert session.turns_finished == 1
    with pytest.raises(Refusal):
        read_script([{"tool": "bash", "input": {}, "permission": "perhaps"}])
