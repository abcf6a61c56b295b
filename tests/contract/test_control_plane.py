"""The control plane's own parts against the emulator over HTTP; ECS, SQS and the loop are played here."""

import itertools
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from shared import breaker, lifecycle
from shared.claiming import Claimer
from shared.config import Config
from shared.diagnose import LaunchProblem
from shared.keeping import Keeper, RoundReply, RoundState
from shared.launching import Launcher, LaunchMessage, PutOff
from shared.observing import Observer
from shared.record import Breaker, Outcome, Phase, Record
from shared.sandboxes import LaunchFailed
from shared.stopping import Stopper
from shared.store import MemoryStore, change_breaker
from shared.stored_key import StoredKey
from shared.sweeping import Janitor
from shared.ticketing import TicketRefused, TicketRequest, Tickets, TurnEnded
from shared.work_api import NO_HEARTBEAT, EventPage, NotAllowed, Unanswered, WorkApi
from tests.contract.conftest import RunningEmulator

SCRIPT = [{"tool": "bash", "input": {"command": "echo hi"}, "expect": "hi"}]
CONFIG = Config(table="work", lease_ttl_seconds=60, max_attempts=2)


class Key:
    def __init__(self, key: str) -> None:
        self.value = SecretStr(key)

    def __call__(self) -> SecretStr:
        return self.value

    def forget(self) -> None:
        pass


@dataclass
class Queue:
    sent: list[LaunchMessage] = field(default_factory=list)

    def send(self, record: Record) -> None:
        self.sent.append(LaunchMessage(work_id=record.work_id, turn=record.turn, attempt=record.attempt))


class Loop:
    started = 0

    def ensure(self, shard: str) -> None:
        self.started += 1


@dataclass
class FakeEcs:
    """Tasks by startedBy: the same name again is the same task."""

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    tickets: list[str] = field(default_factory=list)
    fail: LaunchFailed | None = None

    def run(self, record: Record, ticket: str) -> str:
        if self.fail:
            raise self.fail
        name = lifecycle.started_by(record.work_id, record.turn, record.attempt)
        self.tickets.append(ticket)
        arn = f"arn:task/{name}"
        self.tasks.setdefault(arn, {"taskArn": arn, "startedBy": name, "lastStatus": "PENDING", "version": 1})
        return arn

    def stop(self, arn: str, reason: str) -> None:
        task = self.tasks[arn]
        task |= {"desiredStatus": "STOPPED", "stoppedReason": reason, "stopCode": "UserInitiated"}

    def describe(self, arns: list[str]) -> dict[str, dict[str, Any]]:
        return {arn: self.tasks[arn] for arn in arns if arn in self.tasks}

    def meant_to_run(self) -> list[str]:
        return [arn for arn, task in self.tasks.items() if task.get("desiredStatus") != "STOPPED"]

    def find(self, name: str) -> list[str]:
        return [arn for arn, task in self.tasks.items() if task["startedBy"] == name]

    def becomes(self, arn: str, status: str, exit_code: int | None = None) -> dict[str, Any]:
        task = self.tasks[arn]
        task |= {"lastStatus": status, "version": task["version"] + 1, "containers": [{"name": "sandbox"}]}
        if exit_code is not None:
            task["containers"][0]["exitCode"] = exit_code
            task.setdefault("stopCode", "EssentialContainerExited")
        return dict(task)


class Plane:
    """All functions over one memory store and a clock that follows the emulator's."""

    def __init__(self, emulator: RunningEmulator) -> None:
        self.emulator = emulator
        self.time = 1_800_000_000_000
        self.store, self.queue, self.ecs, self.loop = MemoryStore(), Queue(), FakeEcs(), Loop()
        self.woken: list[str] = []
        self.callbacks: dict[tuple[str, int, int], SecretStr] = {}
        key = Key(emulator.environment_key)
        plain = httpx.HTTPTransport(verify=False)  # no certificates to load for every test
        self.api = WorkApi(emulator.base_url, emulator.environment_id, key, sleep=lambda _: None, transport=plain)
        parts: Any = {"config": CONFIG, "store": self.store, "now": self.now}
        self.claimer = Claimer(
            api=self.api,
            key=key,  # type: ignore[arg-type]
            queue=self.queue,  # type: ignore[arg-type]
            loop=self.loop,  # type: ignore[arg-type]
            sleep=lambda _: None,
            **parts,
        )
        self.launcher = Launcher(api=self.api, sandboxes=self.ecs, sleep=lambda _: None, **parts)  # type: ignore[arg-type]
        self.keeper = Keeper(api=self.api, key=key, **parts)  # type: ignore[arg-type]
        self.stopper = Stopper(
            api=self.api,
            keeper=self.keeper,
            sandboxes=self.ecs,  # type: ignore[arg-type]
            queue=self.queue,  # type: ignore[arg-type]
            **parts,
        )
        self.observer = Observer(queue=self.queue, wake_stopper=self.woken.append, **parts)  # type: ignore[arg-type]
        self.tickets = Tickets(self.store, self.woken.append, self.now)
        self.janitor = Janitor(
            api=self.api,
            sandboxes=self.ecs,  # type: ignore[arg-type]
            claimer=self.claimer,
            observer=self.observer,
            wake_stopper=self.woken.append,
            **parts,
        )

    def now(self) -> int:
        return self.time

    def pass_seconds(self, seconds: float) -> None:
        self.time += int(seconds * 1000)
        self.emulator.control("POST", "clock", {"advance_seconds": seconds})

    def sweep(self) -> None:
        self.janitor.sweep(self.time + 120_000)

    def keep_for(self, seconds: int) -> None:
        """Time passes and the lease is kept."""
        for _ in range(0, seconds, 20):
            self.pass_seconds(20)
            self.beat()

    def queue_session(self, script: list[dict[str, Any]] = SCRIPT) -> str:
        return str(self.emulator.control("POST", "sessions", {"script": script})["sessions"][0]["work_id"])

    def poll(self, owner: str = "poller-1") -> int:
        return self.claimer.run(owner, self.time + 90_000)

    def beat(self) -> RoundReply:
        return self.keeper.round(RoundState(shard="0", generation=0, round=0, empty_rounds=0))

    def stop(self) -> int:
        return self.stopper.round("0")

    def record(self, work_id: str) -> Record:
        record = self.store.get(work_id)
        assert record is not None
        return record

    def run_to_running(self, script: list[dict[str, Any]] = SCRIPT) -> tuple[str, str]:
        work_id = self.queue_session(script)
        assert self.poll() == 1
        self.launcher.launch(self.queue.sent[-1])
        arn = self.record(work_id).task_arn
        assert arn
        self.observer.observe(self.ecs.becomes(arn, "RUNNING"))
        assert self.record(work_id).phase is Phase.RUNNING
        return work_id, arn

    def api_state(self, work_id: str) -> str:
        state = self.emulator.control("GET", "state")
        return str(next(item["state"] for item in state["work"] if item["id"] == work_id))

    def stops(self) -> list[dict[str, Any]]:
        calls = self.emulator.control("GET", "state")["calls"]
        return [call for call in calls if call["call"] == "stop" and call["credential"] == "environment_key"]


@pytest.fixture
def plane(emulator: RunningEmulator) -> Plane:
    return Plane(emulator)


def test_a_polled_session_is_held_sent_and_the_loop_started(plane: Plane) -> None:
    work_id = plane.queue_session()
    assert plane.poll() == 1
    record = plane.record(work_id)
    assert record.phase is Phase.HELD
    assert plane.api_state(work_id) == "active"
    assert [message.work_id for message in plane.queue.sent] == [work_id]
    assert plane.loop.started
    assert plane.poll() == 0


def test_work_beyond_the_slots_stays_in_the_server_s_queue(plane: Plane) -> None:
    plane.claimer.config = CONFIG.model_copy(update={"max_sessions": 2})
    ids = [plane.queue_session() for _ in range(3)]
    assert plane.poll() == 2
    assert sorted(plane.api_state(work_id) for work_id in ids) == ["active", "active", "queued"]


def test_no_slots_at_all_is_a_pause(plane: Plane) -> None:
    """Nothing new is taken; what is held goes on, its repair included."""
    held = plane.queue_session()
    plane.poll()
    plane.queue.sent.clear()
    plane.claimer.config = CONFIG.model_copy(update={"max_sessions": 0})
    waiting = plane.queue_session()
    plane.time += 10 * 60_000
    plane.poll()
    assert plane.api_state(waiting) == "queued"
    assert [message.work_id for message in plane.queue.sent] == [held]


def test_an_item_that_is_no_session_is_acked_and_stopped_without_a_sandbox(plane: Plane) -> None:
    work_id = plane.emulator.control("POST", "work", {"type": "healthcheck"})["work_id"]
    assert plane.poll() == 0
    assert plane.api_state(work_id) == "stopped"
    assert plane.record(work_id).outcome is Outcome.NO_SANDBOX
    assert not plane.queue.sent


def test_a_second_poller_leaves_an_item_to_the_one_that_is_claiming_it(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FIELD_NOTES 25: runs of the poller may overlap, even on one item between its put and its ack."""
    work_id = plane.queue_session()
    ack, overlapped = plane.api.ack, list[int]()

    def ack_late(work_id: str) -> Any:
        monkeypatch.undo()
        plane.pass_seconds(20)  # offered again: nobody has acked it
        overlapped.append(plane.poll("poller-2"))
        return ack(work_id)

    monkeypatch.setattr(plane.api, "ack", ack_late)
    assert plane.poll("poller-1") == 1
    assert overlapped == [0]
    assert plane.record(work_id).phase is Phase.HELD
    assert [message.work_id for message in plane.queue.sent] == [work_id]


def test_nothing_is_begun_that_the_function_has_no_time_to_finish(plane: Plane) -> None:
    """FIELD_NOTES 22: side effects near the timeout ran twice."""
    held = plane.queue_session()
    plane.poll()
    plane.queue.sent.clear()
    plane.time += 10 * 60_000  # its launch message is due again
    waiting = [plane.queue_session() for _ in range(2)]
    plane.claimer.run("late", plane.time + 29_000)
    assert held not in [message.work_id for message in plane.queue.sent]
    assert sorted(plane.api_state(work_id) for work_id in waiting) == ["active", "queued"], "one poll, no more"
    plane.claimer.run("in time", plane.time + 90_000)
    assert held in [message.work_id for message in plane.queue.sent]


def test_a_session_is_handed_over_without_any_stop(plane: Plane) -> None:
    """FIELD_NOTES 2: the dispatcher stopped the item that it had just handed over."""
    work_id, _ = plane.run_to_running()
    plane.poll()
    plane.beat()
    plane.stop()
    assert plane.stops() == []
    assert plane.api_state(work_id) == "active"


def test_an_item_that_is_no_session_is_left_to_the_worker_that_claimed_it_while_ours_was_down(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed 1583 of the simulation: the repair's 409 spoke of another worker's ack, and we force-stopped its item."""
    work_id = plane.emulator.control("POST", "work", {"type": "healthcheck"})["work_id"]
    ack = plane.api.ack

    def die(_: str) -> Any:
        raise RuntimeError("the poller dies before its ack")

    monkeypatch.setattr(plane.api, "ack", die)
    plane.poll()
    ack(work_id)
    plane.api.heartbeat(work_id, NO_HEARTBEAT)
    monkeypatch.setattr(plane.api, "ack", ack)
    plane.pass_seconds(200)
    plane.poll()
    assert plane.record(work_id).outcome is Outcome.NOT_OURS
    assert plane.api_state(work_id) == "active"
    assert not plane.stops()


def test_an_item_that_is_no_session_is_stopped_though_its_ack_s_reply_was_lost(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_id = plane.emulator.control("POST", "work", {"type": "healthcheck"})["work_id"]
    ack = plane.api.ack

    def lose(work_id: str) -> Any:
        ack(work_id)
        raise Unanswered("reply lost")

    monkeypatch.setattr(plane.api, "ack", lose)
    plane.poll()
    assert plane.record(work_id).outcome is Outcome.NO_SANDBOX
    assert plane.api_state(work_id) == "stopped"


def test_an_item_acked_before_a_crash_is_claimed_by_the_next_run(plane: Plane) -> None:
    """FIELD_NOTES 1: the strand of every public worker."""
    work_id = plane.queue_session()
    work = plane.api.poll()
    assert work is not None
    plane.store.save(lifecycle.open_turn(None, work, now=plane.time, owner="dead", until=plane.time + 1_000, shard="0"))
    plane.api.ack(work_id)  # and the process dies
    assert plane.poll() == 0  # the lock still runs
    plane.pass_seconds(2)
    assert plane.poll() == 1
    assert plane.record(work_id).phase is Phase.HELD
    assert plane.api_state(work_id) == "active"


def test_a_claim_whose_reply_was_lost_is_recognised_by_continuity(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_id = plane.queue_session()
    real = plane.api.heartbeat
    lost: list[Any] = []

    def lose_first(*arguments: Any, **options: Any) -> Any:
        reply = real(*arguments, **options)
        if not lost:
            lost.append(reply)
            raise Unanswered("reply lost")
        return reply

    monkeypatch.setattr(plane.api, "heartbeat", lose_first)
    assert plane.poll() == 1
    stored = plane.store.get_leases([work_id])[work_id].value
    assert real(work_id, stored).lease_extended, "the stored value is the one that the API has"


def test_an_item_claimed_by_a_foreign_worker_first_is_left_to_it(plane: Plane) -> None:
    work_id = plane.queue_session()
    work = plane.api.poll()
    assert work is not None
    record = plane.store.save(
        lifecycle.open_turn(None, work, now=plane.time, owner="me", until=plane.time + 60_000, shard="0")
    )
    plane.api.ack(work_id)
    plane.api.heartbeat(work_id, NO_HEARTBEAT)
    assert not plane.claimer.claim(record, repair=False)
    assert plane.record(work_id).outcome is Outcome.NOT_OURS
    assert plane.api_state(work_id) == "active"
    assert not plane.stops()


def test_a_turn_whose_sandbox_could_not_stop_its_item_has_it_stopped_while_the_sandbox_waits(plane: Plane) -> None:
    """Only then can the sandbox look for a message that slipped in before the stop (docs/decisions/0006)."""
    work_id, arn = plane.run_to_running()
    word = last_word(plane, work_id)
    assert not plane.tickets.turn_ended(word)
    assert plane.woken == [work_id]
    assert plane.stopper.settle([work_id]) == 0
    assert plane.api_state(work_id) == "stopped"
    assert "desiredStatus" not in plane.ecs.tasks[arn]
    assert plane.tickets.turn_ended(word)
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", 0))
    assert plane.stop() == 1
    record = plane.record(work_id)
    assert (record.phase, record.outcome, record.exit_code) == (Phase.STOPPED, Outcome.COMPLETED, 0)
    assert record.secret is None
    assert len(plane.stops()) == 1


@pytest.mark.parametrize("exit_code", [17, 1, 137])
def test_a_sandbox_that_ended_before_its_item_was_stopped_has_a_successor_look(plane: Plane, exit_code: int) -> None:
    """A stop posted now could bury a message that came since its last look."""
    work_id, arn = plane.run_to_running()
    plane.tickets.turn_ended(last_word(plane, work_id))
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", exit_code))
    record = plane.record(work_id)
    assert (record.phase, record.attempt, record.stop_reason) == (Phase.HELD, 2, None)
    assert not plane.stops()


def test_a_turn_that_the_sandbox_stopped_itself_is_completed_without_a_second_stop(plane: Plane) -> None:
    work_id, arn = plane.run_to_running()
    plane.emulator.control("POST", f"work/{work_id}/stop", {"force": True})  # as the runner does
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", 0))
    assert plane.stop() == 1
    assert plane.record(work_id).outcome is Outcome.COMPLETED
    assert not plane.stops()


def test_the_next_turn_of_a_session_is_served_under_the_same_id(plane: Plane) -> None:
    work_id, arn = plane.run_to_running()
    plane.emulator.control("POST", f"work/{work_id}/stop", {"force": True})
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", 0))
    plane.stop()
    first = plane.record(work_id)
    plane.emulator.control("POST", f"sessions/{work_id}/messages", {"script": SCRIPT})
    plane.pass_seconds(1)
    assert plane.poll() == 1
    second = plane.record(work_id)
    assert second.turn > first.turn
    assert [past.outcome for past in second.history] == [Outcome.COMPLETED]


def test_a_graceful_stop_kills_the_sandbox_then_confirms_by_force(plane: Plane) -> None:
    work_id, arn = plane.run_to_running()
    plane.emulator.control("POST", f"work/{work_id}/stop", {"force": False})
    plane.pass_seconds(30)
    assert plane.beat().to_stop
    assert plane.stop() == 0
    assert plane.ecs.tasks[arn]["desiredStatus"] == "STOPPED"
    assert plane.api_state(work_id) == "stopping"
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", 10))
    assert plane.stop() == 1
    assert plane.record(work_id).outcome is Outcome.STOPPED
    assert plane.api_state(work_id) == "stopped"


def test_after_a_lost_lease_the_sandbox_dies_and_no_stop_is_posted(plane: Plane) -> None:
    work_id, arn = plane.run_to_running()
    plane.pass_seconds(25)
    plane.emulator.control("POST", f"work/{work_id}/take_lease")
    plane.beat()
    plane.stop()
    assert plane.ecs.tasks[arn]["desiredStatus"] == "STOPPED"
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", 10))
    assert plane.stop() == 1
    assert plane.record(work_id).outcome is Outcome.LOST
    assert plane.api_state(work_id) == "active"
    assert not plane.stops()


def test_beats_keep_the_lease_past_its_first_ttl(plane: Plane) -> None:
    work_id, _ = plane.run_to_running()
    for _ in range(8):
        plane.pass_seconds(20)
        plane.beat()
    assert plane.api_state(work_id) == "active"
    assert plane.record(work_id).phase is Phase.RUNNING


@pytest.mark.parametrize(("status", "gone"), [(404, True), (500, False), (503, False), (429, False)])
def test_an_item_is_gone_by_a_404_and_by_no_other_refusal(plane: Plane, status: int, gone: bool) -> None:
    """FIELD_NOTES 10: a 404 was retried for ever, so orphans lived on."""
    work_id, arn = plane.run_to_running()
    plane.pass_seconds(25)
    plane.emulator.control("POST", "faults", {"kind": "status", "status": status, "call": "heartbeat"})
    plane.beat()
    plane.stop()
    assert plane.record(work_id).phase is (Phase.STOPPING if gone else Phase.RUNNING)
    assert (plane.ecs.tasks[arn].get("desiredStatus") == "STOPPED") is gone
    assert not plane.stops()


def test_a_running_sandbox_costs_no_question_to_ecs(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """FIELD_NOTES 18: events come first; asking for every task each round was throttled for hours."""
    plane.run_to_running()
    asked: list[object] = []
    for call in ("describe", "find", "meant_to_run"):
        monkeypatch.setattr(plane.ecs, call, asked.append)
    for _ in range(3):
        plane.pass_seconds(20)
        plane.poll()
        plane.beat()
        plane.stop()
    assert asked == []


def test_a_task_that_never_leaves_pending_is_stopped_and_launched_again(plane: Plane) -> None:
    """FIELD_NOTES 14: about one task in a hundred; the lease is kept meanwhile."""
    plane.launcher.config = plane.keeper.config = CONFIG.model_copy(update={"start_timeout_seconds": 60})
    work_id = plane.queue_session()
    plane.poll()
    plane.launcher.launch(plane.queue.sent[-1])
    arn = str(plane.record(work_id).task_arn)
    for _ in range(3):
        assert "desiredStatus" not in plane.ecs.tasks[arn], "before the start deadline"
        plane.pass_seconds(20)
        wanted = plane.beat().to_stop
        plane.stop()
    assert wanted
    assert plane.ecs.tasks[arn]["desiredStatus"] == "STOPPED"
    assert plane.record(work_id).phase is Phase.LAUNCHING, "nothing is launched before it is dead"
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED"))
    assert (plane.record(work_id).phase, plane.record(work_id).attempt) == (Phase.HELD, 2)
    assert plane.queue.sent[-1].attempt == 2
    assert plane.api_state(work_id) == "active"


def test_a_stop_that_was_not_carried_out_is_asked_for_again_until_the_task_is_gone(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FIELD_NOTES 20: a cancel left zombies, or stuck in "cancelling"; a task that is absent is stopped."""
    plane.launcher.config = CONFIG.model_copy(update={"start_timeout_seconds": 60})
    work_id, arn = plane.run_to_running()
    plane.emulator.control("POST", f"work/{work_id}/stop", {"force": False})
    asked: list[str] = []
    monkeypatch.setattr(plane.ecs, "stop", lambda arn, reason: asked.append(arn))
    for _ in range(2):
        plane.pass_seconds(20)
        plane.beat()
        plane.stop()
    assert asked == [arn, arn]
    del plane.ecs.tasks[arn]
    for _ in range(5):
        plane.pass_seconds(20)
        plane.beat()
        plane.stop()
    assert plane.record(work_id).outcome is Outcome.STOPPED
    assert plane.api_state(work_id) == "stopped"


def test_a_crashed_sandbox_is_relaunched_until_max_attempts(plane: Plane) -> None:
    work_id, arn = plane.run_to_running()
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", 137))
    record = plane.record(work_id)
    assert (record.phase, record.attempt) == (Phase.HELD, 2)
    plane.launcher.launch(plane.queue.sent[-1])
    second = plane.record(work_id).task_arn
    assert second
    assert second != arn
    plane.observer.observe(plane.ecs.becomes(second, "RUNNING"))
    plane.observer.observe(plane.ecs.becomes(second, "STOPPED", 137))
    plane.stop()
    assert plane.record(work_id).outcome is Outcome.FAILED
    assert plane.api_state(work_id) == "stopped"


def test_a_late_event_of_an_earlier_attempt_changes_nothing(plane: Plane) -> None:
    """FIELD_NOTES 17: what is terminal stays so."""
    work_id, arn = plane.run_to_running()
    stopped = plane.ecs.becomes(arn, "STOPPED", 137)
    plane.observer.observe(stopped)
    plane.launcher.launch(plane.queue.sent[-1])
    before = plane.record(work_id)
    plane.observer.observe(stopped)
    plane.observer.observe(stopped | {"lastStatus": "RUNNING", "version": 99})
    assert plane.record(work_id) == before


def test_running_may_be_told_before_the_launcher_stored_the_arn(plane: Plane) -> None:
    work_id = plane.queue_session()
    plane.poll()
    real = plane.ecs.run

    def run_and_tell(record: Record, ticket: str) -> str:
        arn = real(record, ticket)
        plane.observer.observe(plane.ecs.becomes(arn, "RUNNING"))
        return arn

    plane.ecs.run = run_and_tell  # type: ignore[method-assign]
    plane.launcher.launch(plane.queue.sent[-1])
    record = plane.record(work_id)
    assert record.phase is Phase.RUNNING
    assert "desiredStatus" not in plane.ecs.tasks[str(record.task_arn)]


def test_a_stop_while_the_launcher_is_inside_run_task_stops_that_task(plane: Plane) -> None:
    work_id = plane.queue_session()
    plane.poll()
    real = plane.ecs.run

    def run_and_stop(record: Record, ticket: str) -> str:
        plane.emulator.control("POST", f"work/{work_id}/stop", {"force": False})
        plane.pass_seconds(30)
        plane.beat()
        return real(record, ticket)

    plane.ecs.run = run_and_stop  # type: ignore[method-assign]
    plane.launcher.launch(plane.queue.sent[-1])
    arn = next(iter(plane.ecs.tasks))
    assert plane.ecs.tasks[arn]["desiredStatus"] == "STOPPED"


def test_a_duplicate_launch_message_starts_no_second_sandbox(plane: Plane) -> None:
    """FIELD_NOTES 22: each phase is written on a condition, so a side effect happens once."""
    plane.run_to_running()
    plane.launcher.launch(plane.queue.sent[-1])
    assert len(plane.ecs.tasks) == 1
    assert len(plane.ecs.tickets) == 1


def test_capacity_puts_a_launch_off_and_permanent_errors_end_the_turn(plane: Plane) -> None:
    work_id = plane.queue_session()
    plane.poll()
    plane.ecs.fail = LaunchFailed(LaunchProblem.CAPACITY, "no capacity")
    with pytest.raises(PutOff):
        plane.launcher.launch(plane.queue.sent[-1])
    plane.ecs.fail = LaunchFailed(LaunchProblem.PERMANENT, "no such task definition")
    plane.launcher.config = CONFIG.model_copy(update={"breaker_max_hold_seconds": 0})
    plane.launcher.launch(plane.queue.sent[-1])
    assert plane.stop() == 0  # an earlier try might have started: death must be proved first
    for _ in range(3):
        plane.pass_seconds(25)
        plane.beat()
    assert plane.stop() == 1
    record = plane.record(work_id)
    assert record.outcome is Outcome.LAUNCH_FAILED
    assert "no such task definition" in str(record.reason)
    assert plane.api_state(work_id) == "stopped"


def _waits_beating(plane: Plane, seconds: int) -> None:
    for _ in range(seconds // 20):
        plane.pass_seconds(20)
        plane.beat()


def test_a_turn_without_room_keeps_its_lease_until_the_launch_deadline_then_says_why(plane: Plane) -> None:
    work_id = plane.queue_session()
    plane.poll()
    plane.ecs.fail = LaunchFailed(LaunchProblem.CAPACITY, "no room here")
    for _ in range(8):  # for longer than the start deadline
        with pytest.raises(PutOff):
            plane.launcher.launch(plane.queue.sent[-1])
        _waits_beating(plane, 200)
        plane.stop()
        assert (plane.record(work_id).phase, plane.api_state(work_id)) == (Phase.LAUNCHING, "active")
    _waits_beating(plane, 200)
    plane.stop()
    assert (plane.record(work_id).phase, plane.api_state(work_id)) == (Phase.STOPPING, "active")
    _waits_beating(plane, 60)  # an earlier try might have started: death must be proved first
    plane.stop()
    record = plane.record(work_id)
    assert (record.outcome, plane.api_state(work_id)) == (Outcome.LAUNCH_FAILED, "stopped")
    assert record.reason == "no sandbox could be started within 1800 s: no room here"


def test_a_held_turn_that_nobody_launches_is_ended_by_the_launch_deadline(plane: Plane) -> None:
    work_id = plane.queue_session()
    plane.poll()
    _waits_beating(plane, 1_800)
    assert plane.stop() == 1
    assert (plane.record(work_id).outcome, plane.api_state(work_id)) == (Outcome.LAUNCH_FAILED, "stopped")


def test_the_breaker_s_closing_does_not_end_what_waited_behind_its_probe(plane: Plane) -> None:
    work_id = plane.queue_session()
    plane.poll()
    change_breaker(plane.store, lambda b: b.model_copy(update={"opened_at": plane.time}))
    _waits_beating(plane, 1_800)
    plane.stop()
    change_breaker(plane.store, breaker.after_running)
    plane.stop()
    assert (plane.record(work_id).phase, plane.api_state(work_id)) == (Phase.HELD, "active")


def test_tasks_that_ecs_cannot_start_for_want_of_room_do_not_count_as_attempts(plane: Plane) -> None:
    """FIELD_NOTES 15: RunTask says 200, then the task stops."""
    work_id = plane.queue_session()
    plane.poll()
    since = plane.record(work_id).sandbox_wanted_since
    for _ in range(CONFIG.max_attempts + 1):
        plane.launcher.launch(plane.queue.sent[-1])
        stopped = plane.ecs.becomes(str(plane.record(work_id).task_arn), "STOPPED")
        stopped |= {"stopCode": "TaskFailedToStart", "stoppedReason": "InsufficientFreeAddressesInSubnet"}
        plane.observer.observe(stopped)
    record = plane.record(work_id)
    assert (record.phase, record.refusals, record.sandbox_wanted_since) == (Phase.HELD, 3, since)
    assert lifecycle.relaunch_delay(record) == 20


def test_an_offer_during_a_turn_means_its_lease_is_gone_and_it_never_posts(plane: Plane) -> None:
    work_id, arn = plane.run_to_running()
    plane.emulator.control("POST", f"work/{work_id}/stop", {"force": True})
    plane.emulator.control("POST", f"sessions/{work_id}/messages", {"script": SCRIPT})
    assert plane.poll() == 0
    assert plane.record(work_id).lease_gone
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", 0))
    assert plane.stop() == 1
    assert not plane.stops()
    plane.pass_seconds(6)
    assert plane.poll() == 1
    assert plane.api_state(work_id) == "active"


def test_a_session_past_its_wall_clock_is_stopped_however_healthy_it_looks(plane: Plane) -> None:
    """FIELD_NOTES 3, 4, 26: accepted beats are no progress; a session that hangs does not keep its sandbox for ever."""
    plane.keeper.config = plane.stopper.config = CONFIG.model_copy(update={"session_timeout_seconds": 60})
    work_id, arn = plane.run_to_running()
    for _ in range(3):
        assert "desiredStatus" not in plane.ecs.tasks[arn], "before the limit"
        plane.pass_seconds(20)
        wanted = plane.beat().to_stop
        plane.stop()
        assert plane.api_state(work_id) == "active"
    assert wanted
    assert plane.ecs.tasks[arn]["desiredStatus"] == "STOPPED"
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", 10))
    assert plane.stop() == 1
    assert plane.record(work_id).outcome is Outcome.TIMED_OUT
    assert plane.api_state(work_id) == "stopped"


@pytest.mark.parametrize("phase", [Phase.HELD, Phase.LAUNCHING, Phase.RUNNING])
def test_the_wall_clock_goes_on_over_the_attempts_of_a_turn(plane: Plane, phase: Phase) -> None:
    """FIELD_NOTES 26: relaunches, above all those that do not count, would else renew it for ever."""
    work_id, arn = plane.run_to_running()
    limited = CONFIG.model_copy(update={"session_timeout_seconds": 30, "start_timeout_seconds": 30})
    plane.stopper.config = limited
    plane.pass_seconds(20)
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", 1))
    if phase is not Phase.HELD:
        plane.launcher.launch(plane.queue.sent[-1])
    if phase is Phase.RUNNING:
        plane.observer.observe(plane.ecs.becomes(plane.record(work_id).task_arn or "", "RUNNING"))
    assert plane.record(work_id).phase is phase
    plane.pass_seconds(15)
    assert any(lifecycle.needs_stopper(entry, limited, plane.time) for entry in plane.store.live("0"))
    plane.stop()
    if phase is not Phase.HELD:
        plane.observer.observe(plane.ecs.becomes(plane.record(work_id).task_arn or "", "STOPPED", 10))
        plane.stop()
    assert plane.record(work_id).outcome is Outcome.TIMED_OUT
    assert plane.api_state(work_id) == "stopped"


def test_interruptions_before_any_sandbox_ran_do_not_keep_a_turn_for_ever(plane: Plane) -> None:
    work_id = plane.queue_session()
    plane.poll()
    record = plane.record(work_id)
    again = record.model_copy(update={"attempt": 9, "interruptions": 8})
    allowed = (CONFIG.session_timeout_seconds + CONFIG.max_attempts * CONFIG.start_timeout_seconds) * 1000
    assert lifecycle.overdue(again, CONFIG, record.turn + allowed - 1) is None
    wish = lifecycle.overdue(again, CONFIG, record.turn + allowed)
    assert wish is not None
    assert wish.outcome is Outcome.TIMED_OUT
    assert lifecycle.overdue(record, CONFIG, record.turn + allowed) is None  # the first launch has its own deadline


def request(plane: Plane, work_id: str, nonce: str = "n1", ticket: str | None = None) -> TicketRequest:
    record = plane.record(work_id)
    return TicketRequest(
        work_id=work_id,
        turn=record.turn,
        attempt=record.attempt,
        ticket=SecretStr(ticket or plane.ecs.tickets[-1]),
        nonce=SecretStr(nonce),
    )


def last_word(plane: Plane, work_id: str, *, unserved: bool = False) -> TurnEnded:
    """The sandbox's word; its ticket is exchanged the first time."""
    record = plane.record(work_id)
    sandbox = (work_id, record.turn, record.attempt)
    if sandbox not in plane.callbacks:
        plane.callbacks[sandbox] = plane.tickets.redeem(request(plane, work_id)).callback_secret
    return TurnEnded(
        work_id=work_id,
        turn=record.turn,
        attempt=record.attempt,
        callback_secret=plane.callbacks[sandbox],
        unserved=unserved,
    )


def test_a_ticket_is_exchanged_once_and_its_lost_reply_may_be_asked_for_again(plane: Plane) -> None:
    work_id, _ = plane.run_to_running()
    first = plane.tickets.redeem(request(plane, work_id))
    assert first.session_id == work_id
    assert plane.tickets.redeem(request(plane, work_id)).work_secret == first.work_secret
    with pytest.raises(TicketRefused):
        plane.tickets.redeem(request(plane, work_id, nonce="another"))
    with pytest.raises(TicketRefused):
        plane.tickets.redeem(request(plane, work_id, ticket="guess"))
    plane.pass_seconds(61)
    with pytest.raises(TicketRefused):
        plane.tickets.redeem(request(plane, work_id))


def test_whichever_reply_to_its_ticket_a_sandbox_has_its_word_is_taken(plane: Plane) -> None:
    """A reply that came late, as the request was sent again, was written after the one that the sandbox took."""
    work_id, _ = plane.run_to_running()
    replies = [plane.tickets.redeem(request(plane, work_id)) for _ in range(3)]
    for reply in replies:
        word = last_word(plane, work_id).model_copy(update={"callback_secret": reply.callback_secret})
        assert plane.tickets.turn_ended(word) is False
    with pytest.raises(TicketRefused):
        plane.tickets.turn_ended(word.model_copy(update={"callback_secret": SecretStr("guess")}))


@pytest.mark.parametrize("allowed", [True, False])
def test_the_environment_key_is_handed_over_only_without_a_secret_and_only_if_allowed(
    plane: Plane, *, allowed: bool
) -> None:
    work_id, _ = plane.run_to_running()
    key = SecretStr("the-environment-key")
    plane.tickets.environment_key = (lambda: key) if allowed else None
    assert plane.tickets.redeem(request(plane, work_id)).environment_key is None, "its own secret is enough"
    record = plane.record(work_id)
    plane.store.save(record.model_copy(update={"secret": None}))
    if not allowed:
        with pytest.raises(TicketRefused):
            plane.tickets.redeem(request(plane, work_id))
        return
    credential = plane.tickets.redeem(request(plane, work_id))
    assert credential.environment_key == key
    assert "the-environment-key" not in repr(credential)


def test_the_last_word_needs_the_callback_secret_and_ends_the_turn(plane: Plane) -> None:
    work_id, arn = plane.run_to_running()
    word = last_word(plane, work_id, unserved=True)
    with pytest.raises(TicketRefused):
        plane.tickets.turn_ended(word.model_copy(update={"callback_secret": SecretStr("guess")}))
    plane.tickets.turn_ended(word)
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", 11))
    assert plane.stop() == 1
    assert plane.record(work_id).outcome is Outcome.UNSERVED


def test_of_two_stoppers_on_one_ended_turn_only_one_posts_the_stop(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Observer and loop may both wake a stopper: a second stop could end the session's next turn (DESIGN §7)."""
    work_id, arn = plane.run_to_running()
    plane.tickets.turn_ended(last_word(plane, work_id))
    real = plane.api.stop
    nested: list[bool] = []

    def stop_while_another_looks(*arguments: Any, **options: Any) -> Any:
        if not nested:
            nested.append(True)
            assert plane.stopper.settle([work_id]) == 0
        return real(*arguments, **options)

    monkeypatch.setattr(plane.api, "stop", stop_while_another_looks)
    plane.stopper.settle([work_id])
    assert len(plane.stops()) == 1
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", 0))
    assert plane.stop() == 1
    assert plane.record(work_id).outcome is Outcome.COMPLETED


def test_a_stop_whose_reply_was_lost_is_repeated_only_after_another_echo(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The item may be a new turn's by then: the echo finds it stopped and nothing more is posted."""
    work_id, arn = plane.run_to_running()
    plane.emulator.control("POST", f"work/{work_id}/stop", {"force": False})
    plane.pass_seconds(30)
    plane.beat()
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", 10))
    real = plane.api.stop

    def lose(*arguments: Any, **options: Any) -> Any:
        real(*arguments, **options)
        raise Unanswered("reply lost")

    monkeypatch.setattr(plane.api, "stop", lose)
    assert plane.stop() == 0
    plane.pass_seconds(1)
    assert plane.stop() == 0  # the one in flight may still be on its way
    plane.pass_seconds(20)
    assert plane.stop() == 1
    assert len(plane.stops()) == 1


def test_an_offered_item_that_another_worker_acks_first_is_left_to_it_even_after_our_crash(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The offer proved that our own ack never took effect, so the 409 speaks of someone else's (W§5.2)."""
    work_id = plane.queue_session()
    work = plane.api.poll()
    assert work is not None
    plane.store.save(lifecycle.open_turn(None, work, now=plane.time, owner="dead", until=plane.time + 1_000, shard="0"))
    plane.pass_seconds(6)  # the lock has run out; the unacked item is offered again
    monkeypatch.setattr(plane.claimer, "repair", lambda *_: False)  # the poll sees it first
    real = plane.api.ack

    def another_acks_first(item: str) -> Any:
        real(item)
        return real(item)

    monkeypatch.setattr(plane.api, "ack", another_acks_first)
    assert plane.poll() == 0
    assert plane.record(work_id).outcome is Outcome.NOT_OURS
    assert plane.api_state(work_id) == "starting"


@pytest.mark.parametrize("beaten", [False, True])
def test_the_lease_of_a_recognised_claim_is_dated_from_the_ack_until_it_is_beaten(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, *, beaten: bool
) -> None:
    """Our lease deadline may be early, never late: the claim that took effect was sent some time after the ack.

    A crash may have left the lease nearly over, so it is beaten at once (seed 1454 of the simulation).
    """
    work_id = plane.queue_session()
    acked_at = plane.time
    real, lost = plane.api.heartbeat, list[Any]()

    def lose_first(item: str, expected: str, **options: Any) -> Any:
        if not lost:
            lost.append(real(item, expected, **options))
            plane.pass_seconds(8)
            raise Unanswered("reply lost")
        if expected != NO_HEARTBEAT and not beaten:
            raise Unanswered("no reply")
        return real(item, expected, **options)

    monkeypatch.setattr(plane.api, "heartbeat", lose_first)
    assert plane.poll() == 1
    lease = plane.store.get_leases([work_id])[work_id]
    assert lease.accepted_sent_at == acked_at + 8_000 * beaten


def test_a_strand_of_another_worker_is_force_stopped_by_the_second_round_if_wanted(plane: Plane) -> None:
    """FIELD_NOTES 1: acked and never beaten, the server never offers it again."""
    plane.janitor.config = CONFIG.model_copy(update={"force_stop_strands": True})
    work_id = plane.queue_session()
    plane.time = time.time_ns() // 1_000_000  # the emulator's timestamps are compared with our clock
    assert plane.api.poll()
    plane.api.ack(work_id)  # and that worker dies
    for _ in range(3):
        plane.pass_seconds(300)
        plane.janitor.sweep(plane.time + 100_000)
    assert plane.api_state(work_id) == "starting"  # too young for two rounds
    for _ in range(2):
        plane.pass_seconds(300)
        plane.janitor.sweep(plane.time + 100_000)
    assert plane.api_state(work_id) == "stopped"


def test_a_session_that_another_worker_serves_is_never_stopped_by_the_janitor(plane: Plane) -> None:
    plane.janitor.config = CONFIG.model_copy(update={"force_stop_strands": True})
    work_id = plane.queue_session()
    plane.time = time.time_ns() // 1_000_000
    assert plane.api.poll()
    plane.api.ack(work_id)
    value = plane.api.heartbeat(work_id, NO_HEARTBEAT).last_heartbeat
    for _ in range(8):
        plane.pass_seconds(250)
        value = plane.api.heartbeat(work_id, value).last_heartbeat
        plane.janitor.sweep(plane.time + 100_000)
    assert plane.api_state(work_id) == "active"
    assert not plane.stops()


def test_a_turn_whose_every_event_was_lost_is_seen_through_by_the_janitor(plane: Plane) -> None:
    work_id = plane.queue_session()
    plane.poll()
    plane.launcher.launch(plane.queue.sent[-1])
    arn = plane.record(work_id).task_arn
    assert arn
    plane.ecs.becomes(arn, "RUNNING")
    plane.janitor.sweep(plane.time + 100_000)
    assert plane.record(work_id).phase is Phase.RUNNING
    plane.ecs.becomes(arn, "STOPPED", 0)
    plane.janitor.sweep(plane.time + 100_000)
    assert plane.woken == [work_id]
    assert plane.stop() == 1
    assert plane.record(work_id).outcome is Outcome.COMPLETED


STALL = CONFIG.model_copy(update={"stall_timeout_seconds": 300, "lease_ttl_seconds": 300})
ASKING = [{**SCRIPT[0], "permission": "ask"}]


def test_a_sandbox_that_hangs_is_stopped_and_the_next_attempt_goes_on(plane: Plane) -> None:
    """FIELD_NOTES 3, 26: the lease is beaten all the while; only the session's events show the silence."""
    work_id, arn = plane.run_to_running()
    plane.janitor.config = STALL
    plane.sweep()
    assert plane.record(work_id).progress_at is not None
    plane.keep_for(400)
    assert plane.record(work_id).restart_reason is None
    plane.sweep()
    assert work_id in plane.woken
    plane.stop()
    assert plane.ecs.tasks[arn]["desiredStatus"] == "STOPPED"
    assert plane.record(work_id).attempt == 1  # not before the container is dead
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", 137))
    record = plane.record(work_id)
    assert (record.phase, record.attempt, record.restart_reason) == (Phase.HELD, 2, None)
    assert "attempt 1 ended (no progress for 6 min); relaunching" in [moment.event for moment in record.timeline]
    plane.launcher.launch(plane.queue.sent[-1])
    assert plane.record(work_id).phase is Phase.LAUNCHING
    assert plane.api_state(work_id) == "active"
    assert not plane.stops()


def test_a_session_that_hangs_in_every_attempt_ends_as_timed_out(plane: Plane) -> None:
    work_id, arn = plane.run_to_running()
    plane.janitor.config = STALL
    for _ in range(CONFIG.max_attempts):
        arn = plane.record(work_id).task_arn or ""
        plane.keep_for(400)
        plane.sweep()
        plane.stop()
        plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", 137))
        if plane.record(work_id).phase is Phase.HELD:
            plane.launcher.launch(plane.queue.sent[-1])
            plane.observer.observe(plane.ecs.becomes(plane.record(work_id).task_arn or "", "RUNNING"))
    plane.stop()
    record = plane.record(work_id)
    assert (record.outcome, record.reason) == (Outcome.TIMED_OUT, "attempt 2 failed: no progress for 6 min")
    assert plane.api_state(work_id) == "stopped"


def test_a_session_that_waits_for_a_confirmation_is_shown_and_not_stopped(plane: Plane) -> None:
    """FIELD_NOTES 4."""
    plane.time = time.time_ns() // 1_000_000  # the emulator's clock: the age of its events is what counts here
    work_id, arn = plane.run_to_running(ASKING)
    plane.janitor.config = STALL
    plane.keep_for(700)
    plane.sweep()
    record = plane.record(work_id)
    assert record.waits_for == "a tool's confirmation"
    assert record.waiting_since is not None
    assert record.restart_reason is None
    plane.stop()
    assert "desiredStatus" not in plane.ecs.tasks[arn]
    session = f"{plane.emulator.base_url}/v1/sessions/{record.session_id}/events"
    headers = {
        "authorization": f"Bearer {plane.emulator.org_key}",
        "anthropic-version": "2026-10-21",
        "anthropic-beta": "managed-agents-2026-04-01",
    }
    call = next(e for e in httpx.get(session, headers=headers).json()["data"] if e["type"] == "agent.tool_use")
    confirmed = {"type": "user.tool_confirmation", "tool_use_id": call["id"], "result": "allow"}
    httpx.post(session, headers=headers, json={"events": [confirmed]}).raise_for_status()
    plane.sweep()
    assert plane.record(work_id).waits_for is None  # now it is the sandbox's, and its time begins
    assert plane.record(work_id).restart_reason is None
    plane.keep_for(400)
    plane.sweep()
    assert plane.record(work_id).restart_reason


def test_progress_is_read_with_the_session_s_own_token_and_with_the_key_once_that_has_ended(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane.emulator.control("POST", "switches", {"credential_lifetime": "hour"})
    work_id, _ = plane.run_to_running()
    answered: list[str] = []
    read = plane.api.newest_events

    def reading(session_id: str, *, token: SecretStr | None = None) -> EventPage:
        page = read(session_id, token=token)
        answered.append("own token" if token else "key")
        return page

    monkeypatch.setattr(plane.api, "newest_events", reading)
    plane.sweep()
    assert answered == ["own token"]
    plane.keep_for(3_700)
    plane.sweep()
    assert answered == ["own token", "key"]
    assert plane.record(work_id).restart_reason == "no progress for 61 min"


def test_a_session_whose_events_may_not_be_read_is_left_alone_and_named_once(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_id, _ = plane.run_to_running()
    before = plane.record(work_id)
    told: list[str] = []
    monkeypatch.setattr("shared.sweeping.log.warning", lambda message, **_: told.append(message))

    def refused(*_: object, **__: object) -> None:
        raise NotAllowed("403")

    monkeypatch.setattr(plane.api, "newest_events", refused)
    plane.janitor.config = STALL
    for _ in range(3):
        plane.keep_for(400)
        plane.sweep()
    assert told.count("a session's progress is not known") == 1
    assert plane.record(work_id) == before


# --- the circuit breaker (DESIGN §6) --------------------------------------------------------------------------

NO_IMAGE = {
    "stopCode": "TaskFailedToStart",
    "stoppedReason": "CannotPullContainerError: pull image manifest: manifest unknown: not found",
}


def keep_leases(plane: Plane, seconds: int) -> None:
    for _ in range(seconds // 20):
        plane.pass_seconds(20)
        plane.beat()


def launch_all(plane: Plane) -> int:
    """Deliver every message that waits; how many tasks it started."""
    before, waiting = len(plane.ecs.tasks), list(plane.queue.sent)
    plane.queue.sent.clear()
    for message in waiting:
        plane.launcher.launch(message)
    return len(plane.ecs.tasks) - before


def image_is_missing(plane: Plane) -> None:
    """Every task that has not started ends so."""
    for arn, task in list(plane.ecs.tasks.items()):
        if task["lastStatus"] == "PENDING":
            plane.observer.observe(plane.ecs.becomes(arn, "STOPPED") | NO_IMAGE)


def opened(plane: Plane, sessions: int = 3) -> list[str]:
    """The breaker opened by sessions that are held since."""
    ids = [plane.queue_session() for _ in range(sessions)]
    assert plane.poll() == sessions
    launch_all(plane)
    image_is_missing(plane)
    assert plane.store.breaker().opened_at == plane.time
    return ids


@pytest.mark.parametrize("where", ["RunTask", "the stopped task"])
def test_an_item_whose_launch_no_retry_cures_is_held_and_three_in_a_row_stop_the_claiming(
    plane: Plane, where: str
) -> None:
    ids = [plane.queue_session() for _ in range(3)]
    plane.poll()
    if where == "RunTask":
        plane.ecs.fail = LaunchFailed(LaunchProblem.PERMANENT, "RunTask failed: AccessDeniedException: not authorized")
    launch_all(plane)
    image_is_missing(plane)
    assert [(plane.record(one).phase, plane.record(one).attempt) for one in ids] == [(Phase.HELD, 2)] * 3
    breaker = plane.store.breaker()
    assert breaker.opened_at == plane.time
    assert "Give the role" in breaker.reason if where == "RunTask" else "Push the image" in breaker.reason
    waiting = plane.queue_session()
    plane.poll()
    assert plane.api_state(waiting) == "queued"


def test_two_failures_and_a_sandbox_that_runs_open_nothing(plane: Plane) -> None:
    for _ in range(2):
        for _ in range(2):
            plane.queue_session()
        plane.poll()
        launch_all(plane)
        image_is_missing(plane)
        assert plane.store.breaker().failures == 2
        plane.run_to_running()
        assert plane.store.breaker().failures == 0
        plane.queue.sent.clear()


def test_while_open_the_oldest_held_item_alone_is_launched_once_a_minute(plane: Plane) -> None:
    ids = opened(plane)
    oldest = min(ids, key=lambda one: (plane.record(one).turn, one))
    assert launch_all(plane) == 0, "the next attempts' messages are held back"
    for _ in range(4):
        keep_leases(plane, 60)
        plane.queue.sent.clear()
        for _ in range(3):  # the webhook may wake the poller as often as it likes
            plane.poll()
        assert [message.work_id for message in plane.queue.sent] == [oldest]
        assert launch_all(plane) == 1
        image_is_missing(plane)
    assert {plane.record(one).phase for one in ids} == {Phase.HELD}
    assert plane.record(oldest).attempt > CONFIG.max_attempts, "such attempts do not count"


def test_a_probe_that_runs_closes_the_breaker_and_the_others_follow(plane: Plane) -> None:
    ids = opened(plane)
    waiting = plane.queue_session()
    launch_all(plane)
    keep_leases(plane, 140)
    plane.poll()
    assert launch_all(plane) == 1
    probe = next(arn for arn, task in plane.ecs.tasks.items() if task["lastStatus"] == "PENDING")
    plane.observer.observe(plane.ecs.becomes(probe, "RUNNING"))
    assert plane.store.breaker().opened_at is None
    plane.poll()
    assert launch_all(plane) == 3
    assert plane.api_state(waiting) == "active"
    assert {plane.record(one).phase for one in ids} == {Phase.RUNNING, Phase.LAUNCHING}


def test_while_open_one_item_is_claimed_for_the_probe_if_none_is_held(plane: Plane) -> None:
    for work_id in opened(plane):
        plane.emulator.control("POST", f"work/{work_id}/stop", {"force": True})
    keep_leases(plane, 20)
    assert plane.stop() == 3
    plane.queue.sent.clear()
    ids = [plane.queue_session() for _ in range(3)]
    for _ in range(3):
        keep_leases(plane, 60)
        plane.poll()
    assert sorted(plane.api_state(one) for one in ids) == ["active", "queued", "queued"]
    assert launch_all(plane) == 1


def test_past_the_longest_hold_a_probe_that_fails_is_given_up_with_its_reason(plane: Plane) -> None:
    plane.observer.config = CONFIG.model_copy(update={"breaker_max_hold_seconds": 600})
    ids = opened(plane, 4)
    for minute in range(1, 15):
        keep_leases(plane, 60)
        plane.poll()
        launch_all(plane)
        image_is_missing(plane)
        plane.stop()
        ended = [plane.record(one) for one in ids if not plane.record(one).is_live]
        assert len(ended) == max(0, min(4, minute - 9)), "none before, then one a minute"
    assert {record.outcome for record in ended} == {Outcome.LAUNCH_FAILED}
    assert all("Push the image" in str(record.reason) for record in ended)


def test_a_start_deadline_passes_no_item_over_while_the_breaker_is_open(plane: Plane) -> None:
    """RunTask's answer may have been lost or put off just before: nothing runs, and nothing could."""
    work_id = plane.queue_session()
    plane.poll()
    plane.ecs.fail = LaunchFailed(LaunchProblem.CAPACITY, "no capacity")
    with pytest.raises(PutOff):
        launch_all(plane)
    plane.store.save_breaker(Breaker(failures=3, opened_at=plane.time))
    keep_leases(plane, CONFIG.start_timeout_seconds + 80)
    plane.stop()
    assert plane.record(work_id).phase is Phase.HELD


def test_while_open_a_launch_that_stalls_counts_no_attempt(plane: Plane) -> None:
    """Hours of probes would use up MaxAttempts by mere stalls (found by the simulation)."""
    opened(plane)
    for _ in range(CONFIG.max_attempts + 1):
        keep_leases(plane, 60)
        plane.queue.sent.clear()
        plane.poll()
        probe = plane.queue.sent[0].work_id
        assert launch_all(plane) == 1
        arn = str(plane.record(probe).task_arn)
        plane.ecs.stop(arn, "not running before the start deadline")
        plane.observer.observe(plane.ecs.becomes(arn, "STOPPED"))
        assert plane.record(probe).phase is Phase.HELD


def test_paused_by_hand_nothing_new_is_claimed_and_what_is_held_goes_on(plane: Plane) -> None:
    held = plane.queue_session()
    plane.poll()
    plane.queue.sent.clear()
    plane.store.save_breaker(Breaker(paused=True, failures=1))
    waiting = plane.queue_session()
    keep_leases(plane, 140)
    plane.poll()
    assert plane.api_state(waiting) == "queued"
    assert [message.work_id for message in plane.queue.sent] == [held]
    assert launch_all(plane) == 1
    arn = str(plane.record(held).task_arn)
    plane.observer.observe(plane.ecs.becomes(arn, "RUNNING"))
    assert plane.store.breaker().paused, "a sandbox that runs ends no pause"
    plane.store.save_breaker(plane.store.breaker().model_copy(update={"paused": False}))
    plane.poll()
    assert plane.api_state(waiting) == "active"


# --- the API and its key ---------------------------------------------------------------------------------------


def test_an_item_offered_again_while_its_sandbox_lives_waits_for_that_sandbox_s_end(plane: Plane) -> None:
    """Its lease lapsed: two sandboxes of one session must never run at once (DESIGN §10, 2)."""
    work_id, arn = plane.run_to_running()
    plane.pass_seconds(CONFIG.lease_ttl_seconds + 10)  # no beat came through
    assert plane.api_state(work_id) in ("queued", "active")  # the emulator requeues it when it is next asked
    assert plane.poll() == 0
    assert plane.api_state(work_id) == "queued"
    assert plane.record(work_id).lease_gone
    plane.beat()
    plane.stop()
    assert plane.ecs.tasks[arn]["desiredStatus"] == "STOPPED"
    plane.pass_seconds(10)
    assert plane.poll() == 0, "the container is not dead yet"
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", 10))
    assert plane.stop() == 1
    assert not plane.stops()
    plane.pass_seconds(10)
    assert plane.poll() == 1
    assert [past.outcome for past in plane.record(work_id).history] == [Outcome.LOST]
    assert launch_all(plane) == 1


def test_an_outage_longer_than_the_ttl_ends_the_sandbox_at_its_deadline_and_posts_nothing(plane: Plane) -> None:
    work_id, arn = plane.run_to_running()
    real, plane.keeper.api = plane.keeper.api, Away()  # type: ignore[assignment]
    for second in range(0, CONFIG.lease_ttl_seconds - 5, 5):
        assert plane.record(work_id).phase is Phase.RUNNING, f"given up after {second} s"
        plane.pass_seconds(5)
        plane.beat()
        plane.stop()
    assert plane.record(work_id).stop_outcome is Outcome.LOST
    assert plane.ecs.tasks[arn]["desiredStatus"] == "STOPPED"
    plane.observer.observe(plane.ecs.becomes(arn, "STOPPED", 10))
    plane.keeper.api = real
    assert plane.stop() == 1
    assert not plane.stops()
    plane.pass_seconds(20)
    assert plane.poll() == 1, "the server offers it again, and it is served anew"
    assert plane.record(work_id).phase is Phase.HELD


class Away:
    """The API during an outage."""

    def heartbeat(self, *_: Any, **__: Any) -> Any:
        raise Unanswered("no route")


class Rotated(httpx.HTTPTransport):
    """In front of the emulator, which has one key for good: only `valid` passes, and as that key."""

    def __init__(self, emulator_key: str) -> None:
        super().__init__(verify=False)
        self.valid = self.emulator_key = emulator_key

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.headers["authorization"] != f"Bearer {self.valid}":
            return httpx.Response(401, json={"type": "error", "error": {"message": "unknown key"}})
        request.headers["authorization"] = f"Bearer {self.emulator_key}"
        return super().handle_request(request)


def test_a_key_rotated_while_sessions_run_costs_neither_a_restart_nor_a_lease(plane: Plane) -> None:
    work_id, arn = plane.run_to_running()
    secret = {"value": plane.emulator.environment_key}
    client: Any = SimpleNamespace(get_secret_value=lambda **_: {"SecretString": secret["value"]})
    now = itertools.repeat(0.0).__next__  # its cache never ages: only a refusal makes it read again
    key = StoredKey(client, "arn", name="environment key", prefix="sk-", until="", now=now)
    way = Rotated(secret["value"])
    api = WorkApi(plane.emulator.base_url, plane.emulator.environment_id, key, sleep=lambda _: None, transport=way)
    plane.keeper.api, plane.keeper.key = api, key
    plane.pass_seconds(20)
    plane.beat()
    way.valid = "sk-ant-oat01-new"
    for _ in range(2):  # the old key is dead before the new one is put
        plane.pass_seconds(10)
        plane.beat()
    secret["value"] = way.valid
    for _ in range(12):
        plane.pass_seconds(10)
        plane.beat()
        plane.stop()
    assert plane.api_state(work_id) == "active"
    record = plane.record(work_id)
    assert (record.phase, record.attempt, record.task_arn) == (Phase.RUNNING, 1, arn)
