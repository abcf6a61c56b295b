"""What a session's events say of its progress, and what follows for its record (FIELD_NOTES 3, 4, 26)."""

from datetime import UTC, datetime
from typing import Any

import pytest

from shared.progress import ACTION, CONFIRMATION, CUSTOM_TOOL, Progress, after_look, read_progress, silent_ms
from shared.record import Phase, Record
from shared.work_api import EventPage

NOW = 1_800_000_000_000
STALL = 3_600_000


def event(kind: str, seconds: float, **members: Any) -> dict[str, Any]:
    """An event so many seconds before or after NOW."""
    at = datetime.fromtimestamp(NOW / 1000 + seconds, UTC).isoformat().replace("+00:00", "Z")
    return {"type": kind, "id": f"{kind}@{seconds}", "processed_at": at, **members}


def requires(seconds: float, *calls: str) -> dict[str, Any]:
    return event("session.status_idle", seconds, stop_reason={"type": "requires_action", "event_ids": calls})


def page(*oldest_first: dict[str, Any], next_page: str | None = None) -> EventPage:
    return EventPage.model_validate({"data": oldest_first[::-1], "next_page": next_page})


RUN = event("agent.tool_use", -50, evaluated_permission="allow", id="run")
UNSAID = event("agent.tool_use", -50, id="unsaid")
ASK = event("agent.tool_use", -50, evaluated_permission="ask", id="ask")
CUSTOM = event("agent.custom_tool_use", -50, id="custom")
MCP = event("agent.mcp_tool_use", -50, evaluated_permission="ask", id="mcp")
CONFIRMED = event("user.tool_confirmation", -10, tool_use_id="ask", result="allow")
RAN = event("user.tool_result", -9, tool_use_id="run")
GIVEN = event("user.custom_tool_result", -9, custom_tool_use_id="custom")
END = event("session.status_idle", -40, stop_reason={"type": "end_turn"})


@pytest.mark.parametrize(
    ("events", "waits_for", "idle"),
    [
        ([event("session.status_running", -50)], None, False),
        ([event("session.status_rescheduled", -50)], None, False),
        ([END], None, True),
        ([event("session.status_terminated", -50)], None, True),
        ([END, event("session.status_running", -5)], None, False),
        ([event("agent.message", -50)], None, False),  # so much happened that no status is on the page
        ([RUN, requires(-40, "run")], None, False),  # how every call waits for its sandbox (W§11.2)
        ([UNSAID, requires(-40, "unsaid")], None, False),
        ([ASK, requires(-40, "ask")], CONFIRMATION, False),
        ([MCP, requires(-40, "mcp")], CONFIRMATION, False),
        ([CUSTOM, requires(-40, "custom")], CUSTOM_TOOL, False),
        ([requires(-40, "older than the page")], ACTION, False),
        ([ASK, requires(-40, "ask"), CONFIRMED], None, False),  # now it is the sandbox's to run
        ([ASK, RUN, requires(-40, "ask", "run")], None, False),  # one of them the sandbox could answer
        ([ASK, RUN, requires(-40, "ask", "run"), RAN], CONFIRMATION, False),
        ([CUSTOM, requires(-40, "custom"), GIVEN], None, False),
        ([ASK, requires(-40, "ask"), event("user.message", -3)], CONFIRMATION, False),
    ],
)
def test_whether_a_session_waits_for_a_person(events: list[dict[str, Any]], waits_for: str | None, idle: bool) -> None:
    found = read_progress(page(*events))
    assert found is not None
    assert (found.waits_for, found.idle) == (waits_for, idle)
    assert found.since == (NOW - 40_000 if waits_for else None)


@pytest.mark.parametrize(
    ("last", "seconds"),
    [
        (event("user.tool_result", -7), -7),
        (event("user.tool_confirmation", -7), -7),
        (event("span.model_request_end", -7), -7),
        (event("user.message", -7), -20),  # a user may talk to a sandbox that hangs
        (event("user.interrupt", -7), -20),
        ({"type": "agent.message", "processed_at": None}, -20),
        ({"type": "agent.message", "processed_at": "soon"}, -20),
    ],
)
def test_the_last_sign_of_progress(last: dict[str, Any], seconds: int) -> None:
    found = read_progress(page(event("session.status_running", -20), last))
    assert found is not None
    assert found.at == NOW + seconds * 1000


def test_a_server_that_answers_oldest_first_is_understood_if_it_tells_all() -> None:
    events = [event("session.status_running", -5), event("agent.message", -5.5)]
    whole = EventPage.model_validate({"data": [*events[::-1], END | {"processed_at": events[0]["processed_at"]}]})
    found = read_progress(whole)
    assert found is not None
    assert found.idle
    first = EventPage.model_validate({"data": events[::-1], "next_page": "more"})
    assert read_progress(first) is None


def test_no_events_tell_nothing() -> None:
    assert read_progress(page()) is None


def record(**changes: Any) -> Record:
    given = {"running_since": NOW - 2 * STALL, "started_by": "w/1/1", **changes}
    return Record(work_id="w", environment_id="e", kind="session", turn=1, phase=Phase.RUNNING).model_copy(update=given)


def test_a_sandbox_silent_for_as_long_as_it_may_be_is_hung() -> None:
    assert record().restart_reason is None
    early = after_look(record(), Progress(NOW - STALL + 1), NOW, STALL)
    assert early is not None
    assert early.restart_reason is None
    hung = after_look(record(), Progress(NOW - STALL), NOW, STALL)
    assert hung is not None
    assert hung.restart_reason == "no progress for 60 min"
    assert hung.timeline[-1].event == "the sandbox hangs: no progress for 60 min"
    assert after_look(hung, Progress(NOW - STALL), NOW, STALL) is None  # said once


@pytest.mark.parametrize("excuse", [{"idle": True}, {"waits_for": CONFIRMATION, "since": NOW - STALL}])
def test_neither_an_idle_session_nor_one_that_waits_for_a_person_is_hung(excuse: dict[str, Any]) -> None:
    found = Progress(NOW - STALL, **excuse)
    assert silent_ms(record(), found, NOW) == 0
    after = after_look(record(), found, NOW, STALL)
    assert after is not None
    assert after.restart_reason is None


def test_a_relaunched_sandbox_has_the_whole_time_again() -> None:
    fresh = record(running_since=NOW - 1_000)
    assert silent_ms(fresh, Progress(NOW - STALL), NOW) == 1_000
    after = after_look(fresh, Progress(NOW - STALL), NOW, STALL)
    assert after is not None
    assert after.restart_reason is None


def test_without_a_limit_nothing_is_hung() -> None:
    after = after_look(record(), Progress(NOW - STALL), NOW, 0)
    assert after is not None
    assert after.restart_reason is None


def test_a_wait_is_told_when_it_begins_and_when_it_ends() -> None:
    waits = Progress(NOW - 2_000, waits_for=CONFIRMATION, since=NOW - 1_000)
    began = after_look(record(progress_at=NOW - 2_000), waits, NOW, STALL)
    assert began is not None
    assert (began.waits_for, began.waiting_since) == (CONFIRMATION, NOW - 1_000)
    assert after_look(began, waits, NOW + 300_000, STALL) is None
    ended = after_look(began, Progress(NOW), NOW, STALL)
    assert ended is not None
    assert (ended.waits_for, ended.waiting_since) == (None, None)
    told = [moment.event for moment in ended.timeline]
    assert told == [f"waits for {CONFIRMATION}", f"waits no longer for {CONFIRMATION}"]


def test_progress_is_written_only_when_it_moved_by_more_than_a_round() -> None:
    assert after_look(record(progress_at=NOW - 300_000), Progress(NOW), NOW, STALL) is None
    after = after_look(record(progress_at=NOW - 300_001), Progress(NOW), NOW, STALL)
    assert after is not None
    assert after.progress_at == NOW
    assert after.timeline == ()


@pytest.mark.parametrize("phase", [Phase.HELD, Phase.LAUNCHING, Phase.STOPPING, Phase.STOPPED])
def test_only_a_running_sandbox_is_judged(phase: Phase) -> None:
    assert after_look(record(phase=phase), Progress(NOW - STALL), NOW, STALL) is None
