"""Every rule of the janitor's round, over a memory store; ECS, SQS, the loop and the API are played here."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import SecretStr

from shared import lifecycle, sweeping
from shared.claiming import Claimer
from shared.config import Config, Missing
from shared.log import log
from shared.metrics import Metric
from shared.observing import Observer
from shared.record import Phase, Record
from shared.store import MemoryStore
from shared.sweeping import Janitor
from shared.work_api import EventPage, Heartbeat, LeaseLost, NotAllowed, Stats, Unanswered, Work, WorkPage

START = 1_800_000_000_000
ROUND = 300_000
CONFIG = Config(table="work")


def at(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat()


def item(work_id: str = "w", state: str = "queued", **members: Any) -> Work:
    return Work(
        id=work_id,
        environment_id="env_1",
        data={"type": "session", "id": work_id},
        state=state,
        **members,
    )


@dataclass
class Api:
    """The list and the stats; remembers what was posted."""

    items: list[Work] = field(default_factory=list)
    posted: list[tuple[str, str]] = field(default_factory=list)
    fault: Exception | None = None
    claimed_by_another: bool = False
    events: dict[str, EventPage | Exception] = field(default_factory=dict)

    def newest_events(self, session_id: str, *, token: SecretStr | None = None) -> EventPage:
        found = self.events.get(session_id, EventPage(data=()))
        if isinstance(found, Exception):
            raise found
        return found

    def list_pages(self) -> Iterator[WorkPage]:
        if self.fault:
            raise self.fault
        yield WorkPage(data=self.items)

    def stats(self) -> Stats:
        if self.fault:
            raise self.fault
        return Stats(depth=3, pending=1, oldest_queued_at=at(START - 60_000), workers_polling=2)

    def heartbeat(self, work_id: str, expected: str) -> Heartbeat:
        self.posted.append(("claim", work_id))
        if self.claimed_by_another:
            raise LeaseLost("claimed by another", status=412)
        return Heartbeat(last_heartbeat="v", lease_extended=True, state="active", ttl_seconds=300)

    def stop(self, work_id: str, *, force: bool) -> None:
        assert force
        self.posted.append(("stop", work_id))


@dataclass
class Ecs:
    """Tasks by arn, and how many were asked for in which way."""

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    fault: Exception | None = None

    def add(self, name: str, status: str = "RUNNING", arn: str | None = None, **members: Any) -> str:
        arn = arn or f"arn:task/{name}"
        self.tasks[arn] = {"taskArn": arn, "startedBy": name, "lastStatus": status, "version": 9, **members}
        return arn

    def meant_to_run(self) -> list[str]:
        if self.fault:
            raise self.fault
        return [arn for arn, task in self.tasks.items() if task["lastStatus"] != "STOPPED"]

    def describe(self, arns: Any) -> dict[str, dict[str, Any]]:
        return {arn: self.tasks[arn] for arn in arns if arn in self.tasks}

    def find(self, name: str) -> list[str]:
        return [arn for arn, task in self.tasks.items() if task["startedBy"] == name]

    def stop(self, arn: str, reason: str) -> None:
        self.stopped.append(arn)


class Room:
    """A janitor, its surroundings, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = START
        self.store, self.api, self.ecs = MemoryStore(), Api(), Ecs()
        self.sent, self.woken, self.loops, self.emitted = list[str](), list[str](), list[str](), dict[Metric, float]()
        self.repair_fault: Exception | None = None
        queue: Any = self
        key: Any = self
        loop: Any = self
        api: Any = self.api
        sandboxes: Any = self.ecs
        observer = Observer(CONFIG, self.store, queue, self.woken.append, self.now)
        claimer = Claimer(CONFIG, api, key, self.store, queue, loop, self.now)
        self.janitor = Janitor(CONFIG, api, self.store, sandboxes, claimer, observer, self.woken.append, self.now)
        monkeypatch.setattr(sweeping, "emit", self.emit)

    def now(self) -> int:
        return self.time

    def send(self, record: Record) -> None:
        self.sent.append(record.work_id)

    def ensure(self, shard: str) -> None:
        self.loops.append(shard)

    def forget(self) -> None:
        pass

    def emit(self, metric: Metric, value: float = 1) -> None:
        self.emitted[metric] = value

    def sweep(self, after: int = 0) -> None:
        self.time += after
        self.janitor.sweep(self.time + 120_000)

    def record(self, phase: Phase, work_id: str = "w", **changes: Any) -> Record:
        """A record whose turn began at START, put as it would stand in that phase."""
        opened = lifecycle.open_turn(
            None,
            item(work_id, secret=SecretStr("s")),
            now=START,
            owner="poller",
            until=START + 60_000,
            shard="0",
        )
        name = lifecycle.started_by(work_id, START, 1)
        task = {"started_by": name, "task_arn": f"arn:task/{name}", "launch_until": START + 600_000}
        changes = ({} if phase in (Phase.RECEIVED, Phase.HELD) else task) | changes
        return self.store.save(opened.noted(START, str(phase), phase=phase, **changes))

    def get(self, work_id: str = "w") -> Record:
        record = self.store.get(work_id)
        assert record
        return record


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    return Room(monkeypatch)


# --- records ---------------------------------------------------------------------------------------------------


def test_a_held_turn_whose_message_was_lost_is_sent_again(room: Room) -> None:
    """FIELD_NOTES 1: whatever a crash left in `received` or `held` goes on."""
    room.record(Phase.HELD)
    room.sweep()
    assert room.sent == []  # its message may be on its way
    room.sweep(after=ROUND)
    assert room.sent == ["w"]


def test_a_received_turn_is_left_to_the_owner_of_its_lock_then_repaired(room: Room) -> None:
    """FIELD_NOTES 1."""
    room.record(Phase.RECEIVED, acknowledged_at=at(START))
    room.sweep()
    assert room.get().phase is Phase.RECEIVED
    assert ("claim", "w") not in room.api.posted
    room.api.heartbeat = lambda *_, **__: Heartbeat(  # type: ignore[method-assign]
        last_heartbeat="v", lease_extended=True, state="active", ttl_seconds=300
    )
    room.sweep(after=ROUND)
    assert room.get().phase is Phase.HELD


def test_the_loop_is_started_while_anything_is_live(room: Room) -> None:
    room.sweep()
    assert room.loops == []
    room.record(Phase.RUNNING)
    room.sweep()
    assert room.loops == ["0"]


@pytest.mark.parametrize(
    ("phase", "age", "woken"),
    [
        (Phase.STOPPING, 0, True),
        (Phase.LAUNCHING, 599_000, False),
        (Phase.LAUNCHING, 600_000, True),
        (Phase.RUNNING, 14_399_000, False),
        (Phase.RUNNING, 14_400_000, True),
        (Phase.HELD, 1_799_000, False),
        (Phase.HELD, 1_800_000, True),
    ],
)
def test_the_stopper_is_woken_for_what_it_may_have_to_end(room: Room, phase: Phase, age: int, woken: bool) -> None:
    room.record(phase)
    room.ecs.add(lifecycle.started_by("w", START, 1))
    room.sweep(after=age)
    assert room.woken == (["w"] if woken else [])


def test_a_stop_that_no_event_told_ends_the_turn_in_the_same_round(room: Room) -> None:
    """FIELD_NOTES 17: a finished task is seen by its arn, and never run again."""
    record = room.record(Phase.RUNNING, running_since=START)
    room.ecs.add(str(record.started_by), "STOPPED", containers=[{"name": "sandbox", "exitCode": 0}])
    room.sweep()
    assert (room.get().phase, room.get().dead) == (Phase.STOPPING, True)
    assert room.woken == ["w"]


def test_a_start_that_no_event_told_makes_the_record_running(room: Room) -> None:
    record = room.record(Phase.LAUNCHING, task_arn=None)
    arn = room.ecs.add(str(record.started_by))
    room.sweep()
    assert (room.get().phase, room.get().task_arn) == (Phase.RUNNING, arn)


def test_a_missing_task_is_marked_and_acted_on_only_when_a_later_round_misses_it_again(room: Room) -> None:
    """FIELD_NOTES 9: mark, wait a round, look again, then act."""
    room.record(Phase.RUNNING, running_since=START)
    room.sweep(after=700_000)
    room.sweep(after=1_000)  # a run that overlaps is not a later round
    assert room.get().phase is Phase.RUNNING
    room.sweep(after=ROUND)
    assert (room.get().phase, room.get().attempt) == (Phase.HELD, 2)
    assert room.sent == ["w"]


def test_a_task_that_is_found_again_loses_its_mark(room: Room) -> None:
    """FIELD_NOTES 9."""
    record = room.record(Phase.RUNNING, running_since=START)
    room.sweep(after=700_000)
    arn = room.ecs.add(str(record.started_by))
    room.sweep(after=ROUND)
    del room.ecs.tasks[arn]
    room.sweep(after=ROUND)
    assert room.get().phase is Phase.RUNNING


def test_a_fresh_task_that_reads_missing_proves_nothing(room: Room) -> None:
    """FIELD_NOTES 9, 16: neither dead nor launched twice before two rounds past the launch deadline."""
    room.record(Phase.RUNNING, running_since=START)
    for _ in range(2):
        room.sweep(after=ROUND)
    room.sweep(after=59_000)
    assert room.get().phase is Phase.RUNNING


def test_a_missing_arn_is_no_death_while_the_name_is_known(room: Room) -> None:
    """FIELD_NOTES 16: look by `startedBy` as well."""
    record = room.record(Phase.RUNNING, running_since=START)
    room.ecs.add(str(record.started_by), arn="arn:task/another")
    for _ in range(4):
        room.sweep(after=ROUND)
    assert room.get().phase is Phase.RUNNING


# --- progress --------------------------------------------------------------------------------------------------


def page(status: str, ms: int, **members: Any) -> EventPage:
    return EventPage.model_validate({"data": [{"type": status, "processed_at": at(ms), **members}]})


def test_the_longest_silence_and_the_waits_for_people_are_gauges(room: Room) -> None:
    """FIELD_NOTES 3, 4: neither an idle session nor one that waits for a person counts as silent."""
    waits = {"stop_reason": {"type": "requires_action", "event_ids": ["sevt_1"]}}
    room.api.events = {
        "works": page("session.status_running", START + 200_000),
        "silent": page("session.status_running", START + 100_000),
        "waits": page("session.status_idle", START, **waits),
        "idle": page("session.status_idle", START, stop_reason={"type": "end_turn"}),
    }
    for work_id in room.api.events:
        record = room.record(Phase.RUNNING, work_id, running_since=START)
        room.ecs.add(str(record.started_by))
    room.sweep(after=ROUND)
    assert room.emitted[Metric.OLDEST_PROGRESS_AGE] == 200
    assert room.emitted[Metric.WAITING_FOR_ACTION] == 1


def test_a_session_whose_events_fail_keeps_no_other_from_being_watched(room: Room) -> None:
    room.api.events = {"a": Unanswered("no"), "b": page("session.status_running", START)}
    for work_id in room.api.events:
        record = room.record(Phase.RUNNING, work_id, running_since=START)
        room.ecs.add(str(record.started_by))
    room.sweep(after=3_600_000)
    assert room.emitted[Metric.SWEEPS_FAILED] == 1
    assert room.get("b").restart_reason == "no progress for 60 min"
    assert room.get("a").restart_reason is None
    assert room.woken == ["b"]


def test_the_stopper_of_a_hung_sandbox_is_woken_until_it_has_acted(room: Room) -> None:
    record = room.record(Phase.RUNNING, running_since=START)
    room.ecs.add(str(record.started_by))
    room.api.events = {"w": page("session.status_running", START)}
    room.sweep(after=3_600_000)
    room.sweep(after=ROUND)
    assert room.woken == ["w", "w"]


# --- tasks -----------------------------------------------------------------------------------------------------


def test_a_task_without_a_record_is_stopped_by_the_second_round_that_sees_it(room: Room) -> None:
    """FIELD_NOTES 9, 10: orphans do not live on, and what was only slow to register is not killed."""
    arn = room.ecs.add("w/1/1")
    room.sweep()
    room.sweep(after=1_000)
    assert room.ecs.stopped == []
    assert room.emitted[Metric.ORPHAN_TASKS] == 1
    room.sweep(after=ROUND)
    assert room.ecs.stopped == [arn]


def test_marks_survive_the_janitor_that_made_them(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """FIELD_NOTES 9: the mark is stored."""
    arn = room.ecs.add("w/1/1")
    room.sweep()
    next_janitor = Room(monkeypatch)
    next_janitor.janitor.store = room.store
    next_janitor.janitor.sandboxes = room.janitor.sandboxes
    next_janitor.sweep(after=ROUND)
    assert room.ecs.stopped == [arn]


def test_a_record_that_appears_meanwhile_saves_its_task(room: Room) -> None:
    """FIELD_NOTES 9: a registration that lagged."""
    room.ecs.add(lifecycle.started_by("w", START, 1))
    room.sweep()
    room.record(Phase.RUNNING)
    room.sweep(after=ROUND)
    assert room.ecs.stopped == []


@pytest.mark.parametrize(
    ("phase", "name", "arn", "swept"),
    [
        (Phase.RUNNING, f"w/{START}/1", f"arn:task/w/{START}/1", False),
        (Phase.STOPPING, f"w/{START}/1", f"arn:task/w/{START}/1", False),  # the stopper's to stop
        (Phase.RUNNING, f"w/{START}/2", "arn:other", True),
        (Phase.RUNNING, f"w/{START - 1}/1", "arn:other", True),
        (Phase.RUNNING, f"w/{START}/1", "arn:twin", True),
        (Phase.STOPPED, f"w/{START}/1", f"arn:task/w/{START}/1", True),
        (Phase.RUNNING, "an operator's own", "arn:other", False),
        (Phase.RUNNING, "", "arn:other", False),
    ],
)
def test_a_task_is_swept_unless_the_record_s_current_attempt_names_it(
    room: Room, phase: Phase, name: str, arn: str, swept: bool
) -> None:
    """FIELD_NOTES 16: RunTask's ghosts and twins."""
    room.record(phase)
    room.ecs.add(f"w/{START}/1")
    room.ecs.add(name, arn=arn)
    for _ in range(2):
        room.sweep(after=ROUND)
    assert (arn in room.ecs.stopped) is swept


def test_a_sandbox_is_started_without_ecs_exec(room: Room) -> None:
    from shared.sandboxes import Sandboxes

    asked: list[dict[str, Any]] = []

    class Client:
        def run_task(self, **request: Any) -> dict[str, Any]:
            asked.append(request)
            return {"tasks": [{"taskArn": "arn:task/1"}], "failures": []}

    client: Any = Client()
    config = CONFIG.model_copy(update={"subnets": "subnet-a", "security_groups": "sg-a"})
    Sandboxes(client, config).run(room.record(Phase.LAUNCHING), "ticket")
    assert not asked[0].get("enableExecuteCommand")


def test_a_hundred_tasks_are_described_at_once() -> None:
    """FIELD_NOTES 18."""
    from shared.sandboxes import Sandboxes

    asked: list[int] = []

    class Client:
        def describe_tasks(self, cluster: str, tasks: list[str]) -> dict[str, Any]:
            asked.append(len(tasks))
            return {"tasks": [{"taskArn": arn} for arn in tasks]}

    client: Any = Client()
    assert len(Sandboxes(client, CONFIG).describe(str(n) for n in range(250))) == 250
    assert asked == [100, 100, 50]
    Sandboxes(client, CONFIG).describe([])
    assert len(asked) == 3  # ECS refuses an empty list


# --- the API's items -------------------------------------------------------------------------------------------

OLD, RECENT = at(START - 900_000), at(START - 899_000)


@pytest.mark.parametrize(
    ("state", "acknowledged_at", "latest_heartbeat_at", "stranded"),
    [
        ("starting", OLD, None, True),
        ("starting", RECENT, None, False),
        ("active", OLD, OLD, True),
        ("active", OLD, RECENT, False),
        ("stopping", OLD, OLD, True),
        ("queued", OLD, None, False),
        ("stopped", OLD, OLD, False),
        ("starting", None, None, False),
        ("starting", "yesterday", None, False),
        ("hibernating", OLD, None, False),
    ],
)
def test_what_counts_as_stranded(
    state: str, acknowledged_at: str | None, latest_heartbeat_at: str | None, stranded: bool
) -> None:
    """FIELD_NOTES 1: acked, never beaten, never offered again."""
    work = item(state=state, acknowledged_at=acknowledged_at, latest_heartbeat_at=latest_heartbeat_at)
    assert lifecycle.is_stranded(work, None, START) is stranded


def test_an_item_with_a_live_record_is_not_stranded(room: Room) -> None:
    work = item(state="starting", acknowledged_at=OLD)
    assert not lifecycle.is_stranded(work, room.record(Phase.RUNNING), START)
    assert lifecycle.is_stranded(work, room.record(Phase.STOPPED, "x"), START)


def test_a_strand_is_reported_by_the_second_round_and_not_stopped(room: Room) -> None:
    """FIELD_NOTES 1, 9."""
    room.api.items = [item(state="starting", acknowledged_at=OLD)]
    room.sweep()
    assert room.emitted[Metric.STRANDED] == 0
    for _ in range(2):
        room.sweep(after=ROUND)
        assert room.emitted[Metric.STRANDED] == 1
    assert room.api.posted == []


def force_stopping(room: Room) -> None:
    room.janitor.config = CONFIG.model_copy(update={"force_stop_strands": True})


def test_a_strand_is_force_stopped_only_where_the_owner_wants_it_and_only_in_the_second_round(room: Room) -> None:
    force_stopping(room)
    room.api.items = [item(state="active", acknowledged_at=OLD, latest_heartbeat_at=OLD)]
    room.sweep()
    room.sweep(after=1_000)
    assert room.api.posted == []
    room.sweep(after=ROUND)
    assert room.api.posted == [("stop", "w")]


@pytest.mark.parametrize(
    "moved",
    [
        item(state="stopping", acknowledged_at=OLD, latest_heartbeat_at=OLD),
        item(state="active", acknowledged_at=RECENT, latest_heartbeat_at=OLD),
        item(state="active", acknowledged_at=OLD, latest_heartbeat_at=RECENT),
    ],
)
def test_an_item_that_moved_between_the_rounds_is_not_stopped(room: Room, moved: Work) -> None:
    """FIELD_NOTES 2, 9: the stop names no lease; it would end somebody's turn."""
    force_stopping(room)
    room.api.items = [item(state="active", acknowledged_at=OLD, latest_heartbeat_at=OLD)]
    room.sweep()
    room.api.items = [moved]
    room.sweep(after=ROUND)
    assert room.api.posted == []


def test_a_starting_strand_is_claimed_before_it_is_stopped(room: Room) -> None:
    force_stopping(room)
    room.api.items = [item(state="starting", acknowledged_at=OLD)]
    room.sweep()
    room.sweep(after=ROUND)
    assert room.api.posted == [("claim", "w"), ("stop", "w")]


def test_a_starting_strand_that_another_worker_has_claimed_is_left_to_it(room: Room) -> None:
    """FIELD_NOTES 2."""
    force_stopping(room)
    room.api.claimed_by_another = True
    room.api.items = [item(state="starting", acknowledged_at=OLD)]
    room.sweep()
    room.sweep(after=ROUND)
    assert room.api.posted == [("claim", "w")]


def test_no_stop_rests_on_a_page_that_is_old_and_few_are_posted_a_round(room: Room) -> None:
    force_stopping(room)
    room.api.items = [item(f"w{n}", "active", acknowledged_at=OLD, latest_heartbeat_at=OLD) for n in range(9)]
    room.sweep()
    real = room.api.stop

    def slow(work_id: str, *, force: bool) -> None:
        room.time += 3_000
        real(work_id, force=force)

    room.sweep(after=ROUND)
    assert len(room.api.posted) == sweeping.STOPS_A_ROUND
    room.api.posted.clear()
    room.api.stop = slow  # type: ignore[method-assign]
    room.sweep(after=ROUND)
    assert len(room.api.posted) == 2


def test_a_stack_without_a_key_logs_one_line_a_sweep_and_rings_no_alarm(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for level in ("warning", "error", "exception"):
        monkeypatch.setattr(log, level, lambda message, **_: said.append(message))
    room.api.fault = Missing("put the environment key into its secret")
    for _ in range(2):
        room.sweep(after=ROUND)
    assert said == ["not configured: parts of the sweep are left out"] * 2
    assert room.emitted.keys().isdisjoint({Metric.SWEEPS_FAILED, Metric.KEY_REFUSED})


def test_a_key_that_may_not_list_is_no_fault_of_the_sweep(room: Room) -> None:
    """The sources differ on it (W§14, 6): an alarm that always rings is none."""

    def refuse() -> Iterator[WorkPage]:
        raise NotAllowed("no scope", status=403)

    room.api.list_pages = refuse  # type: ignore[method-assign]
    room.sweep()
    assert room.emitted.keys().isdisjoint({Metric.SWEEPS_FAILED, Metric.KEY_REFUSED, Metric.STRANDED})


# --- the round -------------------------------------------------------------------------------------------------


def test_gauges(room: Room) -> None:
    room.record(Phase.RUNNING, "a", running_since=START)
    room.record(Phase.HELD, "b")
    room.record(Phase.HELD, "c", turn=START - ROUND, attempt=2)  # it had its first sandbox
    room.sweep(after=60_000)
    expected = {
        Metric.QUEUE_DEPTH: 3,
        Metric.QUEUE_PENDING: 1,
        Metric.WORKERS_POLLING: 2,
        Metric.OLDEST_QUEUED_AGE: 120,
        Metric.LIVE_SESSIONS: 3,
        Metric.WAITING_SESSIONS: 2,
        Metric.OLDEST_WAITING_AGE: 60,
    }
    assert {metric: room.emitted[metric] for metric in expected} == pytest.approx(expected)


def test_a_round_without_work_publishes_nothing(room: Room) -> None:
    """Our own poller is always among the workers: counted while idle, it would cost an idle stack a metric."""
    room.api.stats = lambda: Stats(depth=0, pending=0, oldest_queued_at=None, workers_polling=1)  # type: ignore[method-assign]
    room.sweep()
    assert not any(room.emitted.values())


def test_a_part_that_fails_keeps_no_other_from_running(room: Room) -> None:
    room.ecs.fault = RuntimeError("throttled")
    room.api.fault = Unanswered("no answer")
    room.record(Phase.HELD)
    room.sweep(after=ROUND)
    assert room.sent == ["w"]
    assert room.loops == ["0"]
    assert room.emitted[Metric.LIVE_SESSIONS] == 1
    assert Metric.SWEEPS_FAILED in room.emitted


def test_an_item_that_fails_keeps_no_other_from_its_turn(room: Room) -> None:
    for name in ("a/1/1", "b/1/1"):
        room.ecs.add(name)
    room.sweep()
    stopped: list[str] = []

    def stop(arn: str, reason: str) -> None:
        stopped.append(arn)
        raise RuntimeError("throttled")

    room.ecs.stop = stop  # type: ignore[method-assign]
    room.sweep(after=ROUND)
    assert stopped == ["arn:task/a/1/1", "arn:task/b/1/1"]
    assert Metric.SWEEPS_FAILED in room.emitted


def test_a_part_that_failed_keeps_its_marks(room: Room) -> None:
    arn = room.ecs.add("w/1/1")
    room.sweep()
    room.ecs.fault = RuntimeError("throttled")
    room.sweep(after=ROUND)
    room.ecs.fault = None
    room.sweep(after=1_000)
    assert room.ecs.stopped == [arn]


def test_nothing_is_begun_after_the_deadline_and_marks_are_stored_all_the_same(room: Room) -> None:
    room.ecs.add("a/1/1")
    room.ecs.add("b/1/1")
    room.sweep()
    room.time += ROUND
    real = room.ecs.stop

    def slow(arn: str, reason: str) -> None:
        room.time += 120_000
        real(arn, reason)

    room.ecs.stop = slow  # type: ignore[method-assign]
    room.emitted.clear()
    room.sweep()
    assert room.ecs.stopped == ["arn:task/a/1/1"]
    assert Metric.QUEUE_DEPTH not in room.emitted
    assert "task arn:task/b/1/1" in room.store.marks()


def test_marks_stay_few(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "MOST_MARKS", 3)
    for n in range(5):
        room.ecs.add(f"w{n}/1/1")
    room.sweep()
    assert len(room.store.marks()) == 3
