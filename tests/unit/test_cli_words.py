"""What `fleet` says of records, queues, logs and checks: pure words, without a stack."""

import json
from typing import Any

import pytest
from botocore.exceptions import ClientError

from cli import doctor, logs, show
from cli.control import judge_letter
from cli.doctor import Line
from cli.stats import Seen, remarks
from cli.terminal import Failure
from shared.config import Missing
from shared.record import Breaker, Lease, Moment, Outcome, Phase, Record

NOW = 10_000_000
SECRET = "c2VjcmV0LW9mLXdvcms"


def record(phase: Phase = Phase.RUNNING, **changes: Any) -> Record:
    base = {"work_id": "sesn_1", "environment_id": "e", "kind": "session", "turn": NOW - 600_000}
    given = {**base, "phase": phase, "timeline": (Moment(at=NOW - 60_000, event="it"),), **changes}
    return Record.model_validate(given)


@pytest.mark.parametrize(
    ("one", "breaker", "task", "state", "to_do"),
    [
        (record(Phase.HELD), Breaker(), None, "waits for a sandbox for 60 s", None),
        (
            record(Phase.HELD),
            Breaker(opened_at=1, reason="no such image"),
            None,
            "no sandbox can be started",
            "Mend the cause",
        ),
        (
            record(Phase.LAUNCHING, put_off="RunTask started nothing: RESOURCE:CAPACITY"),
            Breaker(),
            None,
            "put off|waits for a sandbox: RunTask",
            "Nothing, it is retried",
        ),
        (record(Phase.LAUNCHING), Breaker(), {"lastStatus": "PENDING"}, "is PENDING", None),
        (record(running_since=NOW - 300_000), Breaker(), None, "runs for 5 min", None),
        (
            record(waits_for="a tool's confirmation", waiting_since=NOW - 7_200_000),
            Breaker(),
            None,
            "waits for a tool's confirmation for 2 h 0 min",
            "Answer it",
        ),
        (record(restart_reason="no progress"), Breaker(), None, "being replaced: no progress", None),
        (record(Phase.STOPPING, stop_reason="a stop was requested"), Breaker(), None, "a stop was requested", None),
        (record(Phase.STOPPED, outcome=Outcome.COMPLETED, exit_code=0), Breaker(), None, "the turn is finished", None),
        (
            record(Phase.STOPPED, outcome=Outcome.FAILED, exit_code=12, reason="gave up"),
            Breaker(),
            {"lastStatus": "STOPPED", "stopCode": "EssentialContainerExited", "stoppedReason": "OutOfMemory"},
            "out of memory",
            "fleet logs sesn_1",
        ),
    ],
)
def test_where_a_turn_stands_is_told_in_words(
    one: Record, breaker: Breaker, task: dict[str, Any] | None, state: str, to_do: str | None
) -> None:
    told, do = show.story(one, task, breaker, NOW)
    assert any(part in told for part in state.split("|"))
    assert (do or "").startswith(to_do or "") or (to_do or "") in (do or "")
    assert (do is None) is (to_do is None)


def test_nothing_secret_of_a_record_is_shown() -> None:
    kept: dict[str, Any] = {
        "secret": SECRET,
        "ticket_hashes": ("hash-1",),
        "ticket_nonce_hash": "hash-2",
        "callback_hash": "hash-3",
    }
    shown = json.dumps(show.as_json(record(**kept), None))
    assert SECRET not in shown
    assert "hash-" not in shown


def test_the_lease_of_an_ended_record_is_not_shown() -> None:
    lease = Lease(work_id="sesn_1", turn=1, value="v", ttl_seconds=60, accepted_sent_at=NOW - 10_000, due_at=NOW)
    assert show.row(record(), lease, NOW)[5] == "50 s"
    assert show.row(record(Phase.STOPPED, outcome=Outcome.LOST), lease, NOW)[5] == ""
    assert show.lease_in_words(lease, NOW) == "50 s left, last beat accepted 10 s ago"


def seen(**changes: Any) -> Seen:
    agreed: dict[str, Any] = {
        **{"now": NOW, "depth": 0, "pending": 0, "oldest_queued_at": None, "workers_polling": 1, "items_cut": False},
        **{"items": {"a": "active"}, "live": {"a": Phase.RUNNING}, "max_sessions": 2, "tasks": 1},
        **{"launches_waiting": 0, "dead_letters": 0, "paused": False, "breaker": None},
    }
    return Seen(**{**agreed, **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "Both sides agree."),
        ({"items": {"a": "active", "b": "active"}}, "no live record is ours"),
        ({"items": {}}, "which the API has queued, stopped or not at all"),
        ({"items": None}, "may not list"),
        ({"tasks": 0}, "1 sessions run by our records and 0 sandboxes"),
        ({"tasks": 5}, "no record names"),
        ({"depth": 3}, "the next poll"),
        ({"depth": 3, "max_sessions": 1}, "raise MaxSessions"),
        ({"depth": 3, "paused": True}, "fleet resume"),
        ({"breaker": "no such image"}, "no such image"),
        ({"dead_letters": 2}, "fleet redrive"),
        ({"workers_polling": 0}, "no fault"),
    ],
)
def test_each_disagreement_is_explained(changes: dict[str, Any], told: str) -> None:
    found = remarks(seen(**changes))
    assert len(found) == 1
    assert told in found[0]


@pytest.mark.parametrize(
    ("body", "found", "verdict"),
    [
        ('{"work_id": "sesn_1", "turn": 1, "attempt": 2}', record(Phase.HELD, turn=1, attempt=2), "waits"),
        ('{"work_id": "sesn_1", "turn": 1, "attempt": 2}', record(Phase.RUNNING, turn=1, attempt=2), "over"),
        ('{"work_id": "sesn_1", "turn": 1, "attempt": 1}', record(Phase.HELD, turn=1, attempt=2), "over"),
        ('{"work_id": "sesn_1", "turn": 1, "attempt": 1}', None, "over"),
        ('{"work_id": "sesn_1"}', None, "malformed"),
        ("hello", None, "malformed"),
    ],
)
def test_a_dead_letter_is_sent_again_only_if_its_turn_still_waits(
    body: str, found: Record | None, verdict: str
) -> None:
    assert judge_letter(lambda _: found, body)[0] == verdict


def test_a_log_line_is_told_without_what_every_line_has() -> None:
    message = {"level": "INFO", "message": "held", "work_id": "sesn_1", "turn": 7, "service": "poller"}
    line = logs.parse("poller", {"timestamp": NOW, "message": json.dumps(message), "eventId": "1"})
    assert logs.in_words(line).split()[2:] == ["poller", "INFO", "held", "turn=7"]
    plain = logs.parse("sandbox", {"timestamp": NOW, "message": "Killed\n", "eventId": "2"})
    assert logs.in_words(plain).endswith("Killed")


def test_a_length_of_time_is_read() -> None:
    assert [logs.seconds_in(text) for text in ("45s", "30m", "6h", "2d")] == [45, 1_800, 21_600, 172_800]
    for wrong in ("", "6", "h", "-1h", "1w"):
        with pytest.raises(Failure):
            logs.seconds_in(wrong)


class Reached:
    """What `doctor` asks of a stack: where it is."""

    def __init__(self, *, is_local: bool) -> None:
        self.is_local = is_local


@pytest.mark.parametrize(
    ("error", "is_local", "status"),
    [
        (ClientError({"Error": {"Code": "InvalidAction"}}, "GetServiceQuota"), True, "not checked"),
        (ClientError({"Error": {"Code": "AccessDenied"}}, "GetServiceQuota"), False, "not checked"),
        (ClientError({"Error": {"Code": "InternalError"}}, "GetServiceQuota"), False, "failed"),
        (Missing("the secret has no value"), False, "failed"),
        (Failure("no such thing"), False, "failed"),
    ],
)
def test_a_check_that_cannot_be_made_is_never_called_ok(error: Exception, is_local: bool, status: str) -> None:
    def check(_: Any) -> Any:
        yield Line("ok", "first", "fine")
        raise error

    lines = list(doctor.guarded(Reached(is_local=is_local), "second", check))  # type: ignore[arg-type]
    assert [line.status for line in lines] == ["ok", status]
