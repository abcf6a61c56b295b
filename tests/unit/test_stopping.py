"""A stopper's round is bounded, in time and in calls; what it leaves the next one does (DESIGN §7)."""

from typing import Any

import pytest
from botocore.exceptions import ClientError

from shared import lifecycle
from shared.config import Config
from shared.lifecycle import StopWish
from shared.record import Outcome, Phase, Record
from shared.sandboxes import Sandboxes
from shared.stopping import ROUND_BUDGET_MS, Stopper
from shared.store import MemoryStore
from shared.work_api import Work

STOPS, STEP_MS = 500, 100


class SlowStore(MemoryStore):
    """Each write takes a tenth of a second of the clock."""

    now = 1_800_000_000_000

    def save(self, record: Record) -> Record:
        self.now += STEP_MS
        return super().save(record)


class Ecs:
    """Tasks that drain until they are said to be dead; counts what it is asked."""

    def __init__(self) -> None:
        self.described: list[int] = []
        self.stopped: list[str] = []
        self.malformed = ""
        self.throttled_for = 0
        self.last_status = "RUNNING"

    def describe_tasks(self, *, cluster: str, tasks: list[str]) -> dict[str, Any]:
        self.described.append(len(tasks))
        if self.throttled_for:
            self.throttled_for -= 1
            raise error("InvalidParameterException", "Rate exceeded")
        if self.malformed in tasks:
            raise error("InvalidParameterException", "Invalid identifier: Unexpected number of separators")
        container = {"name": "sandbox", "exitCode": 10}
        shown = {"desiredStatus": "STOPPED", "lastStatus": self.last_status, "containers": [container]}
        return {"tasks": [{"taskArn": arn, **shown} for arn in tasks], "failures": []}

    def stop_task(self, *, cluster: str, task: str, reason: str) -> None:
        self.stopped.append(task)


def error(code: str, message: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": message}}, "DescribeTasks")


def draining(store: MemoryStore, count: int, now: int) -> None:
    """So many turns that are to be stopped, nothing to be posted, each with a task."""
    wish = StopWish("the lease is lost", Outcome.LOST, post=False)
    for n in range(count):
        work = Work.model_validate(
            {"id": f"sesn_{n:03}", "environment_id": "env_1", "data": {"type": "session", "id": f"sesn_{n:03}"}}
            | {"state": "queued", "secret": "s"}
        )
        received = store.save(lifecycle.open_turn(None, work, now=now, owner="me", until=0, shard="0"))
        runs = lifecycle.held(received, now).model_copy(update={"phase": Phase.RUNNING, "task_arn": f"arn:{n}"})
        store.save(lifecycle.want_stop(runs, wish, now))


def stopper_of(store: MemoryStore, ecs: Any) -> Stopper:
    nothing: Any = None
    config = Config(table="work")
    return Stopper(config, nothing, nothing, store, Sandboxes(ecs, config), nothing, lambda: SlowStore.now)


@pytest.mark.parametrize(("draining_now", "calls"), [(1, 1), (100, 1), (250, 3)])
def test_a_round_asks_ecs_of_a_hundred_tasks_at_once(draining_now: int, calls: int) -> None:
    """FIELD_NOTES 18: asked of 500 drains one by one, ECS would throttle what else needs it."""
    store, ecs = MemoryStore(), Ecs()
    draining(store, draining_now, SlowStore.now)
    stopper = stopper_of(store, ecs)
    assert stopper.round("0") == 0
    assert (len(ecs.described), len(ecs.stopped)) == (calls, draining_now), "they still drain"
    ecs.last_status = "STOPPED"
    assert stopper.round("0") == draining_now
    assert len(ecs.described) == 2 * calls


def test_a_task_that_ecs_refuses_to_describe_holds_up_no_other() -> None:
    """The whole request is refused for one malformed arn; none is taken for dead by it."""
    store, ecs = MemoryStore(), Ecs()
    draining(store, 100, SlowStore.now)
    ecs.malformed, ecs.last_status = "arn:42", "STOPPED"
    assert stopper_of(store, ecs).round("0") == 99
    assert [entry.work_id for entry in store.live("0")] == ["sesn_042"]


def test_a_throttled_batch_is_asked_for_again_by_the_next_round_alone() -> None:
    """FIELD_NOTES 13: told by the code of a wrong request; halving it would ask ever more."""
    store, ecs = MemoryStore(), Ecs()
    draining(store, 150, SlowStore.now)
    ecs.throttled_for, ecs.last_status = 1, "STOPPED"
    stopper = stopper_of(store, ecs)
    assert stopper.round("0") in (50, 100), "the other batch was answered"
    assert len(ecs.described) == 2
    stopper.round("0")
    assert store.live("0") == []


def test_of_500_stops_a_round_does_what_10_seconds_allow_and_the_next_rounds_the_rest() -> None:
    store = SlowStore()
    wish = StopWish("a stop was requested", Outcome.STOPPED, post=False)
    for n in range(STOPS):
        data = {"type": "session", "id": f"sesn_{n}"}
        work = Work.model_validate(
            {"id": f"sesn_{n}", "environment_id": "env_1", "data": data, "state": "queued", "secret": "s"}
        )
        received = store.save(lifecycle.open_turn(None, work, now=store.now, owner="me", until=0, shard="0"))
        store.save(lifecycle.want_stop(lifecycle.held(received, store.now), wish, store.now))
    nothing: Any = None
    stopper = Stopper(Config(table="work"), nothing, nothing, store, nothing, nothing, lambda: store.now)
    rounds = []
    while store.live("0"):
        began = store.now
        assert stopper.round("0") > 0, "each round gets on"
        rounds.append(store.now - began)
    assert max(rounds) <= ROUND_BUDGET_MS + 8 * STEP_MS, "what had begun is finished, nothing more is begun"
    assert len(rounds) > 2
    assert all(
        record and record.phase is Phase.STOPPED for record in map(store.get, (f"sesn_{n}" for n in range(STOPS)))
    )
