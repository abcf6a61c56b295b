"""Random histories of the emulator's queue against W§4's table: no call or passing of time ever leaves it."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from local.work_api.state import NO_HEARTBEAT, Item, Refusal, WorkQueue

TTL, RECLAIM = 300, 5
NEVER_SEEN = "2020-01-01T00:00:00.000000Z"


@dataclass
class Expected:
    """One item as W§4 has it; times are seconds since the start."""

    state: str = "queued"
    queued_at: float = 0
    polled_at: float | None = None
    value: str | None = None
    beaten_at: float = 0

    def queue_again(self, now: float) -> None:
        self.state, self.queued_at, self.polled_at, self.value = "queued", now, None, None


def outcome(call: Any) -> tuple[int, Any]:
    try:
        return 200, call()
    except Refusal as refusal:
        return refusal.status, refusal


class Histories(RuleBasedStateMachine):
    items = Bundle("items")

    @initialize()
    def start(self) -> None:
        self.seconds = 0.0
        start = datetime(2026, 9, 2, tzinfo=UTC)
        self.queue = WorkQueue("env_1", lambda: start + timedelta(seconds=self.seconds))
        self.model: dict[str, Expected] = {}
        self.values: set[str] = set()

    def expect_status(self, work_id: str, status: int, call: Any) -> Any:
        got, reply = outcome(call)
        assert got == status, f"{self.model[work_id]} was answered {got}"
        return reply

    @rule(target=items)
    def session_created(self) -> str:
        return self.new_item()

    def new_item(self) -> str:
        work_id = f"sesn_{len(self.model)}"
        self.queue.enqueue(work_id)
        self.model[work_id] = Expected(queued_at=self.seconds)
        return work_id

    @rule(target=items)
    def session_taken(self) -> str:
        """A new item, acked and claimed: by single steps alone a history seldom gets that far."""
        work_id = self.new_item()
        self.try_ack(work_id)
        self.beat(work_id, NO_HEARTBEAT, accepted=True)
        return work_id

    @rule(seconds=st.sampled_from([0.5, 4, 6, 150, 301]))
    def time_passes(self, seconds: float) -> None:
        self.seconds += seconds
        for expected in self.model.values():
            if expected.state == "active" and self.seconds > expected.beaten_at + TTL:
                expected.queue_again(self.seconds)

    @rule()
    def poll(self) -> None:
        """An unacked item is offered again only after the reclaim time; an acked one never, beaten or not."""
        free = {
            work_id: expected
            for work_id, expected in self.model.items()
            if expected.state == "queued"
            and (expected.polled_at is None or self.seconds - expected.polled_at > RECLAIM)
        }
        offered = self.queue.poll()
        if not free:
            assert offered is None
            return
        assert offered is not None
        assert offered.id in free
        assert free[offered.id].queued_at == min(expected.queued_at for expected in free.values())
        assert offered.state == "queued"
        free[offered.id].polled_at = self.seconds

    @rule(work_id=items)
    def ack(self, work_id: str) -> None:
        self.try_ack(work_id)

    def try_ack(self, work_id: str) -> None:
        expected = self.model[work_id]
        allowed = expected.state == "queued"
        self.expect_status(work_id, 200 if allowed else 409, lambda: self.queue.ack(work_id))
        if allowed:
            expected.state = "starting"

    @rule(work_id=items)
    def claim(self, work_id: str) -> None:
        self.beat(work_id, NO_HEARTBEAT, accepted=self.model[work_id].state == "starting")

    @rule(work_id=items)
    def echo(self, work_id: str) -> None:
        expected = self.model[work_id]
        self.beat(work_id, expected.value or NEVER_SEEN, accepted=expected.state == "active")

    @rule(work_id=items, data=st.data())
    def echo_of_an_older_value(self, work_id: str, data: st.DataObject) -> None:
        old = data.draw(st.sampled_from(sorted(self.values | {NEVER_SEEN})))
        self.beat(work_id, old, accepted=self.model[work_id].state == "active" and old == self.model[work_id].value)

    def beat(self, work_id: str, value: str, *, accepted: bool) -> None:
        expected = self.model[work_id]
        ending = expected.state in ("stopping", "stopped")
        status = 200 if accepted or ending else 412
        reply = self.expect_status(work_id, status, lambda: self.queue.heartbeat(work_id, value))
        if status == 412:
            current = reply.details["current_state"]
            assert (current["state"], current["last_heartbeat"]) == (expected.state, expected.value)
            return
        assert (reply["state"], reply["lease_extended"]) == (expected.state if ending else "active", not ending)
        if ending:
            assert reply["last_heartbeat"] == (expected.value or "")
            return
        assert reply["last_heartbeat"] not in self.values, "every accepted beat changes the value"
        self.values.add(reply["last_heartbeat"])
        expected.state, expected.value, expected.beaten_at = "active", reply["last_heartbeat"], self.seconds

    @rule(work_id=items, force=st.booleans())
    def stop(self, work_id: str, force: bool) -> None:
        expected = self.model[work_id]
        item = self.expect_status(work_id, 200, lambda: self.queue.stop(work_id, force=force))
        if force or expected.state == "queued":
            expected.state = "stopped"
        elif expected.state in ("starting", "active"):
            expected.state = "stopping"
        assert item.state == expected.state

    @rule(work_id=items)
    def message(self, work_id: str) -> None:
        expected = self.model[work_id]
        queued = self.queue.message_arrived(work_id)
        assert queued == (expected.state == "stopped")
        if queued:
            expected.queue_again(self.seconds)

    @invariant()
    def the_queue_is_what_the_table_says(self) -> None:
        if not hasattr(self, "queue"):
            return
        shown = {item.id: item for item in self.queue.items()}
        assert list(shown) == list(self.model), "ids are reused across turns, never minted anew"
        for work_id, expected in self.model.items():
            item = shown[work_id]
            assert (item.state, item.body()["latest_heartbeat_at"]) == (expected.state, expected.value)
            self.timestamps_fit(item)

    def timestamps_fit(self, item: Item) -> None:
        assert (item.stopped_at is not None) == (item.state == "stopped")
        assert (item.stop_requested_at is not None) == (item.state in ("stopping", "stopped"))
        if item.state == "queued":
            assert item.acknowledged_at is None
        if item.state in ("starting", "active"):
            assert item.acknowledged_at is not None
        if item.latest_heartbeat_at is not None and item.acknowledged_at is not None:
            assert item.started_at <= item.acknowledged_at < item.latest_heartbeat_at


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)
