"""What an operator's stop, retry and pause may change, and what they must leave alone."""

import json
from typing import Any

import pytest

from shared import lifecycle
from shared.diagnose import diagnose
from shared.launch_queue import LaunchQueue
from shared.lifecycle import LEASE_LOST, StopWish
from shared.operating import Operator
from shared.record import Outcome, Phase, Record
from shared.store import MemoryStore

NOW = 2_000_000
TURN_ENDED = StopWish("the turn ended", Outcome.COMPLETED, post=True)


def record(phase: Phase = Phase.RUNNING, **changes: Any) -> Record:
    arn = "arn:task/1" if phase in (Phase.RUNNING, Phase.STOPPING) else None
    base = {"work_id": "w", "environment_id": "e", "kind": "session", "turn": 1_000_000, "shard": "0"}
    return Record(**{**base, "phase": phase, "task_arn": arn, **changes})


class Sent:
    """A queue's client that keeps what it was sent."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def send_message(self, **message: Any) -> None:
        self.messages.append(message)


@pytest.fixture
def sent() -> Sent:
    return Sent()


@pytest.fixture
def woken() -> list[str]:
    return []


@pytest.fixture
def operator(sent: Sent, woken: list[str]) -> Operator:
    return Operator(MemoryStore(), LaunchQueue(sent, "url"), woken.append, lambda: NOW)  # type: ignore[arg-type]


@pytest.mark.parametrize("phase", [Phase.HELD, Phase.LAUNCHING, Phase.RUNNING])
def test_a_stop_is_a_wish_that_the_stopper_is_woken_for(operator: Operator, woken: list[str], phase: Phase) -> None:
    operator.store.save(record(phase))
    operator.stop("w")
    stored = operator.store.get("w")
    assert stored
    assert (stored.phase, stored.stop_outcome, stored.post_stop) == (Phase.STOPPING, Outcome.STOPPED, True)
    assert not lifecycle.posts_now(stored)
    assert stored.dead is (phase is Phase.HELD)
    assert woken == ["w"]


@pytest.mark.parametrize("phase", [Phase.RECEIVED, Phase.STOPPED])
def test_an_item_that_is_being_claimed_or_is_over_is_not_stopped(
    operator: Operator, woken: list[str], phase: Phase
) -> None:
    saved = operator.store.save(record(phase))
    assert operator.stop("w", force=True) is None
    assert operator.store.get("w") == saved
    assert woken == []


def test_a_forced_stop_ends_the_item_before_the_sandbox_is_dead() -> None:
    forced = lifecycle.operator_stop(record(), NOW, force=True)
    assert forced
    assert lifecycle.posts_now(forced)
    assert not lifecycle.posts_now(forced.model_copy(update={"dead": True}))
    graceful = lifecycle.operator_stop(record(), NOW, force=False)
    assert graceful
    after = lifecycle.operator_stop(graceful, NOW, force=True)
    assert after
    assert lifecycle.posts_now(after)
    assert lifecycle.operator_stop(after, NOW, force=True) is None


def test_a_stop_adds_no_post_to_a_turn_whose_lease_is_lost() -> None:
    lost = lifecycle.want_stop(record(), LEASE_LOST, NOW)
    assert lifecycle.operator_stop(lost, NOW, force=True) is None


def test_a_stopped_session_gets_no_further_attempt_though_its_turn_just_ended() -> None:
    """A finished turn whose item was not stopped goes on in another sandbox (docs/decisions/0006), else."""
    ending = lifecycle.want_stop(record(), TURN_ENDED, NOW)
    died = diagnose({"stopCode": "EssentialContainerExited", "containers": [{"name": "sandbox", "exitCode": 17}]})

    def after(one: Record) -> Record:
        dead = lifecycle.after_container_stopped(one, died, 17, 5, now=NOW, max_attempts=3)
        assert dead
        return dead

    assert after(ending).phase is Phase.HELD
    stopped = lifecycle.operator_stop(ending, NOW, force=False)
    assert stopped
    assert (after(stopped).phase, after(stopped).dead) == (Phase.STOPPING, True)
    assert after(stopped).stop_outcome is Outcome.STOPPED


def test_a_sandbox_that_left_before_its_item_was_stopped_may_have_left_a_message() -> None:
    posted = lifecycle.want_stop(record(), TURN_ENDED, NOW).model_copy(update={"post_stop": False})
    died = diagnose({"stopCode": "EssentialContainerExited", "containers": [{"name": "sandbox", "exitCode": 17}]})
    dead = lifecycle.after_container_stopped(posted, died, 17, 5, now=NOW, max_attempts=3)
    assert dead
    assert dead.stop_outcome is Outcome.UNSERVED


def test_a_retry_of_a_running_session_is_another_attempt_that_does_not_count(
    operator: Operator, woken: list[str]
) -> None:
    operator.store.save(record(attempt=3))
    operator.retry("w")
    asked = operator.store.get("w")
    assert asked
    assert asked.restart_reason
    assert woken == ["w"]
    assert operator.retry("w") is None  # once
    killed = diagnose({"stopCode": "UserInitiated", "containers": [{"name": "sandbox", "exitCode": 10}]})
    after = lifecycle.after_container_stopped(asked, killed, 10, 5, now=NOW, max_attempts=3)
    assert after
    assert (after.phase, after.attempt) == (Phase.HELD, 4)
    counted = lifecycle.after_container_stopped(
        after.model_copy(update={"phase": Phase.RUNNING}), killed, 10, 6, now=NOW, max_attempts=3
    )
    assert counted
    assert counted.stop_outcome is Outcome.FAILED


def test_a_retry_of_a_launch_that_waits_sends_its_message_at_once_with_the_whole_deadline(
    operator: Operator, sent: Sent
) -> None:
    operator.store.save(record(Phase.HELD, never_started=4, sandbox_wanted_since=1))
    operator.retry("w")
    asked = operator.store.get("w")
    assert asked
    assert asked.sandbox_wanted_since == NOW
    assert [json.loads(message["MessageBody"])["attempt"] for message in sent.messages] == [1]
    assert sent.messages[0]["DelaySeconds"] == 0


@pytest.mark.parametrize("phase", [Phase.RECEIVED, Phase.STOPPING, Phase.STOPPED])
def test_there_is_nothing_to_retry_in_a_turn_that_is_claimed_stopped_or_over(operator: Operator, phase: Phase) -> None:
    operator.store.save(record(phase))
    assert operator.retry("w") is None


def test_a_pause_is_kept_until_it_is_ended_by_hand(operator: Operator) -> None:
    assert operator.pause(paused=True)
    assert not operator.pause(paused=True)
    assert operator.store.breaker().paused
    assert operator.pause(paused=False)
    assert not operator.store.breaker().paused
