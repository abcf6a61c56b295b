"""What one launch asks of ECS, and how fast; ECS is played here."""

from types import SimpleNamespace
from typing import Any

import pytest

from shared import lifecycle
from shared.config import Config
from shared.diagnose import LaunchProblem
from shared.launching import Launcher, LaunchMessage, PutOff
from shared.record import Phase, Record
from shared.sandboxes import LaunchFailed, Sandboxes
from shared.store import MemoryStore

CONFIG = Config(table="work", subnets="subnet-a,subnet-b", security_groups="sg-1", spot_weight=100)
NO_SESSIONS: Any = None  # these records name none
HELD = Record(work_id="w", environment_id="env_1", kind="session", turn=6, phase=Phase.HELD, shard="0")
MESSAGE = LaunchMessage(work_id="w", turn=6, attempt=1)


class Ecs:
    """Takes what it is asked, or fails with the reasons given, one a call."""

    def __init__(self, *reasons: str) -> None:
        self.reasons, self.asked = list(reasons), list[dict[str, Any]]()

    def run_task(self, **request: Any) -> dict[str, Any]:
        self.asked.append(request)
        if self.reasons:
            return {"tasks": [], "failures": [{"reason": self.reasons.pop(0)}]}
        return {"tasks": [{"taskArn": "arn:task/1"}], "failures": []}

    def tried(self) -> list[tuple[str, list[str]]]:
        """Capacity and subnets of each call."""
        return [
            (
                request["capacityProviderStrategy"][0]["capacityProvider"],
                request["networkConfiguration"]["awsvpcConfiguration"]["subnets"],
            )
            for request in self.asked
        ]


def launcher(ecs: Any, store: MemoryStore) -> Launcher:
    return Launcher(CONFIG, NO_SESSIONS, store, Sandboxes(ecs, CONFIG), lambda: 10, lambda: "ticket", lambda _: None)


@pytest.mark.parametrize(
    "reason",
    ["Capacity is unavailable at this time.", "InsufficientFreeAddressesInSubnet", "You've reached the limit on vCPUs"],
)
def test_without_room_the_next_try_is_on_demand_and_elsewhere_under_the_same_name(reason: str) -> None:
    """FIELD_NOTES 15 and 16."""
    ecs, store = Ecs(reason, reason), MemoryStore()
    store.save(HELD)
    parts = launcher(ecs, store)
    for _ in range(2):
        with pytest.raises(PutOff):
            parts.launch(MESSAGE)
    parts.launch(MESSAGE)
    both = ["subnet-a", "subnet-b"]
    assert ecs.tried() == [("FARGATE_SPOT", both), ("FARGATE", ["subnet-a"]), ("FARGATE", ["subnet-b"])]
    assert len({request["clientToken"] for request in ecs.asked}) == 1
    assert not any("launchType" in request for request in ecs.asked)


def test_a_throttle_changes_nothing_but_the_time() -> None:
    ecs, store = Ecs("Rate exceeded"), MemoryStore()
    store.save(HELD)
    parts = launcher(ecs, store)
    with pytest.raises(PutOff):
        parts.launch(MESSAGE)
    parts.launch(MESSAGE)
    assert ecs.tried() == [("FARGATE_SPOT", ["subnet-a", "subnet-b"])] * 2


def test_a_try_that_follows_a_refusal_has_its_whole_start_time() -> None:
    begun = lifecycle.begin_launch(HELD, 6, 1, ticket_hash="h", now=0, until=600)
    assert begun
    again = lifecycle.begin_launch(begun, 6, 1, ticket_hash="h", now=500, until=1_100)
    assert again
    assert again.launch_until == 1_100


def test_launches_keep_to_ten_a_second_and_wait_before_the_record_is_written() -> None:
    """FIELD_NOTES 12: own pacing."""
    clock, at = SimpleNamespace(ms=0), list[int]()

    def sleep(seconds: float) -> None:
        clock.ms += round(seconds * 1000)

    class Stamped:
        def run(self, record: Record, ticket: str) -> str:
            assert record.timeline[-1].at == clock.ms
            at.append(clock.ms)
            clock.ms += 30
            raise LaunchFailed(LaunchProblem.THROTTLED, "Rate exceeded")

    store, sandboxes = MemoryStore(), Stamped()
    store.save(HELD)
    parts = Launcher(CONFIG, NO_SESSIONS, store, sandboxes, lambda: clock.ms, lambda: "ticket", sleep)  # type: ignore[arg-type]
    for _ in range(4):
        with pytest.raises(PutOff):
            parts.launch(MESSAGE)
    clock.ms = 10_000
    with pytest.raises(PutOff):
        parts.launch(MESSAGE)
    assert at == [0, 100, 200, 300, 10_000]


@pytest.mark.parametrize(("session_id", "tagged"), [("sesn_1", "sesn_1"), ("sesn 1 %", None), (None, None)])
def test_a_task_carries_its_environment_session_and_item_for_cost_allocation(
    session_id: str | None, tagged: str | None
) -> None:
    """RunTask would refuse the whole task for a tag that it cannot hold: such an id is left out."""
    ecs: Any = Ecs()
    record = HELD.model_copy(update={"session_id": session_id})
    Sandboxes(ecs, CONFIG).run(record, "ticket")
    [request] = ecs.asked
    named = {"environment-id": record.environment_id, "session-id": tagged, "work-id": record.work_id}
    assert {tag["key"]: tag["value"] for tag in request["tags"]} == {
        f"sandbox-fleet:{name}": value for name, value in named.items() if value
    }
