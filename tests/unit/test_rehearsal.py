"""A rehearsed round says what the janitor would do, and does none of it."""

from types import SimpleNamespace
from typing import Any

import pytest

from cli.rehearsal import Plan, rehearse
from shared import lifecycle
from shared.config import Config
from shared.lifecycle import OPERATOR_STOP
from shared.record import Phase, Record
from shared.store import MemoryStore
from shared.work_api import Stats, WorkPage

NOW = 10_000_000
CONFIG = Config(table="work", environment_id="e", force_stop_strands=True)


class Api:
    """A Work API that may be read; any other call fails the test, since it has no such method."""

    def __init__(self, *items: dict[str, Any]) -> None:
        self._page = WorkPage.model_validate({"data": list(items)})

    def stats(self) -> Stats:
        return Stats(depth=0, pending=0)

    def list_pages(self) -> list[WorkPage]:
        return [self._page]


class Sandboxes:
    """An ECS that may be read."""

    def __init__(self, *tasks: dict[str, Any]) -> None:
        self._tasks = {task["taskArn"]: task for task in tasks}

    def describe(self, arns: Any) -> dict[str, Any]:
        return {arn: self._tasks[arn] for arn in arns if arn in self._tasks}

    def meant_to_run(self) -> list[str]:
        return list(self._tasks)

    def find(self, name: str) -> list[str]:
        return [arn for arn, task in self._tasks.items() if task["startedBy"] == name]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def rehearsed(store: MemoryStore, api: Api, sandboxes: Sandboxes, *, loop: bool = True) -> Plan:
    before = list(store.records()), store.marks(), store.breaker()
    parts: Any = CONFIG, store, api, SimpleNamespace(forget=lambda: None), sandboxes
    plan = rehearse(*parts, loop_runs=lambda: loop, now=lambda: NOW)
    assert (list(store.records()), store.marks(), store.breaker()) == before
    return plan


def record(phase: Phase, **changes: Any) -> Record:
    base = {"work_id": "w", "environment_id": "e", "kind": "session", "turn": NOW - 500_000, "shard": "0"}
    return Record.model_validate({**base, "phase": phase, **changes})


def test_a_healthy_stack_needs_nothing(store: MemoryStore) -> None:
    assert rehearsed(store, Api(), Sandboxes()).steps == []


def test_a_lost_launch_message_is_told(store: MemoryStore) -> None:
    store.save(lifecycle.held(record(Phase.RECEIVED), NOW - 400_000))
    plan = rehearsed(store, Api(), Sandboxes(), loop=False)
    assert plan.steps == ["start the lease loop", "send the launch message of w, attempt 1, again"]


def test_a_strand_of_our_own_is_told_with_its_ack(store: MemoryStore) -> None:
    store.save(record(Phase.RECEIVED))
    assert rehearsed(store, Api(), Sandboxes()).steps == ["w: repairing", "ack w"]


def test_a_stop_that_waits_wakes_the_stopper(store: MemoryStore) -> None:
    store.save(lifecycle.want_stop(record(Phase.RUNNING), OPERATOR_STOP, NOW - 100_000))
    assert rehearsed(store, Api(), Sandboxes()).steps == ["wake the stopper for w"]


def test_what_needs_a_second_look_is_acted_on_only_after_an_earlier_round_s_first(store: MemoryStore) -> None:
    orphan = Sandboxes({"taskArn": "arn:task/1", "startedBy": "gone/1/1", "lastStatus": "RUNNING"})
    strand = {
        **{"id": "other", "environment_id": "e", "data": {"type": "session", "id": "other"}, "state": "active"},
        **{"acknowledged_at": "1970-01-01T00:00:01Z"},
    }
    assert rehearsed(store, Api(strand), orphan).steps == []
    store.save_marks({"task arn:task/1": NOW - 300_000, "item other active 1970-01-01T00:00:01Z None": NOW - 300_000})
    plan = rehearsed(store, Api(strand), orphan)
    assert plan.steps == ["stop the sandbox 1: no live record names this task", "force-stop the item other"]
    assert any("stranded" in remark for remark in plan.remarks)
