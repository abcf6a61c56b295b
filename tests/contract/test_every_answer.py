"""Our client and the control plane under every switch of the emulator, and with every fault at every call."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from local.work_api.server import Server
from local.work_api.switches import Switches, values_of
from shared import lifecycle
from shared.launching import PutOff
from shared.record import Outcome, Phase
from shared.ticketing import TicketRefused
from shared.work_api import NO_HEARTBEAT, TryAgain, WorkApiError
from tests.contract.conftest import RunningEmulator, fresh, running
from tests.contract.test_control_plane import SCRIPT, Plane, last_word
from tests.contract.test_work_api_client import client

# Every switch away from its default. Without a secret nothing can be served: that has a test of its own.
SETTINGS: list[dict[str, str]] = [
    {},
    *({name: value} for name in Switches.model_fields if name != "secret" for value in values_of(name)[1:]),
]
FAULTS: list[dict[str, Any]] = [
    *({"kind": "status", "status": status} for status in (409, 412, 500, 503, 529)),
    {"kind": "status", "status": 429, "retry_after": 1},
    {"kind": "malformed"},
    {"kind": "content_type"},
    {"kind": "lost"},
    {"kind": "away"},
    {"kind": "delay", "seconds": 0.01},
]
ROUNDS = 60


def named(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    return "-".join(str(part) for pair in value.items() for part in pair if part not in ("kind", "status")) or "default"


all_settings = pytest.mark.parametrize("plane", SETTINGS, ids=named, indirect=True)
all_faults = pytest.mark.parametrize("fault", FAULTS, ids=named)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Server, RunningEmulator]]:
    with running() as started:
        yield started


@pytest.fixture
def emulator(server: tuple[Server, RunningEmulator]) -> RunningEmulator:
    """A fresh emulator behind the module's one server: there are hundreds of cases."""
    server[0].serve_instead(fresh())
    return server[1]


@pytest.fixture
def plane(emulator: RunningEmulator, request: pytest.FixtureRequest) -> Plane:
    emulator.control("POST", "switches", getattr(request, "param", {}))
    return Plane(emulator)


def inject(plane: Plane, fault: dict[str, Any], call: str, **more: Any) -> None:
    plane.emulator.control("POST", "faults", fault | {"call": call} | more)


def faults_left(plane: Plane) -> list[Any]:
    return list(plane.emulator.control("GET", "faults")["faults"])


def live_tasks(plane: Plane) -> list[dict[str, Any]]:
    return [task for task in plane.ecs.tasks.values() if task["lastStatus"] != "STOPPED"]


def one_round(plane: Plane) -> None:
    """Everything the stack does in 10 seconds; a sandbox runs for one round unless it is told to stop."""
    with contextlib.suppress(WorkApiError):  # a function that fails is run again by its schedule
        plane.poll()
    back = []
    while plane.queue.sent:
        message = plane.queue.sent.pop()
        try:
            plane.launcher.launch(message)
        except PutOff:  # the message comes back
            back.append(message)
    plane.queue.sent += back
    plane.beat()
    plane.stop()
    assert len(live_tasks(plane)) <= 1
    for task in live_tasks(plane):
        if task.get("desiredStatus") == "STOPPED":
            plane.observer.observe(plane.ecs.becomes(task["taskArn"], "STOPPED", 10))
        elif task["lastStatus"] == "PENDING":
            plane.observer.observe(plane.ecs.becomes(task["taskArn"], "RUNNING"))
        else:
            end_its_turn(plane, task)
    plane.pass_seconds(10)


def end_its_turn(plane: Plane, task: dict[str, Any]) -> None:
    """As a sandbox whose own stop was refused: it repeats its word until its item is stopped, then exits."""
    work_id, _, _ = lifecycle.parse_started_by(task["startedBy"]) or pytest.fail("not ours")
    with contextlib.suppress(TicketRefused):  # another actor ended the turn
        if not plane.tickets.turn_ended(last_word(plane, work_id)):
            return
    plane.observer.observe(plane.ecs.becomes(task["taskArn"], "STOPPED", 0))


def run_until_over(plane: Plane, work_id: str) -> None:
    """Until the turn is closed on both sides: nothing is stranded, whatever happened before."""
    for _ in range(ROUNDS):
        one_round(plane)
        record = plane.store.get(work_id)
        if record is not None and not record.is_live and plane.api_state(work_id) == "stopped":
            assert not live_tasks(plane)
            return
    pytest.fail(f"still {plane.api_state(work_id)} after {ROUNDS} rounds: {plane.store.get(work_id)}")


def run_until_closed(plane: Plane, work_id: str) -> Outcome | None:
    """Beats and stops alone, until our record of the turn is closed."""
    for _ in range(ROUNDS):
        plane.beat()
        plane.stop()
        for task in live_tasks(plane):
            if task.get("desiredStatus") == "STOPPED":
                plane.observer.observe(plane.ecs.becomes(task["taskArn"], "STOPPED", 10))
        plane.pass_seconds(5)
        if not plane.record(work_id).is_live:
            return plane.record(work_id).outcome
    pytest.fail(f"never closed: {plane.record(work_id)}")


# --- switches -------------------------------------------------------------------------------------------------


@all_settings
def test_a_session_is_served_to_completion_and_so_is_its_next_turn(plane: Plane) -> None:
    work_id = plane.queue_session()
    run_until_over(plane, work_id)
    first = plane.record(work_id)
    assert (first.outcome, len(plane.ecs.tasks), len(plane.stops())) == (Outcome.COMPLETED, 1, 1)
    plane.emulator.control("POST", f"sessions/{first.session_id}/messages", {"script": SCRIPT})
    run_until_over(plane, work_id)
    second = plane.record(work_id)
    assert (second.outcome, len(plane.ecs.tasks), len(plane.stops())) == (Outcome.COMPLETED, 2, 2)
    assert second.turn > first.turn


@all_settings
def test_a_graceful_stop_ends_the_sandbox_and_the_item(plane: Plane) -> None:
    work_id, arn = plane.run_to_running()
    plane.emulator.control("POST", f"work/{work_id}/stop", {"force": False})
    plane.pass_seconds(30)
    assert run_until_closed(plane, work_id) is Outcome.STOPPED
    assert plane.ecs.tasks[arn]["lastStatus"] == "STOPPED"
    assert plane.api_state(work_id) == "stopped"
    assert len(plane.stops()) == 1


@all_settings
def test_a_forced_stop_ends_the_sandbox_and_nothing_is_posted(plane: Plane) -> None:
    work_id, arn = plane.run_to_running()
    plane.emulator.control("POST", f"work/{work_id}/stop", {"force": True})
    plane.pass_seconds(30)
    assert run_until_closed(plane, work_id) is Outcome.STOPPED
    assert plane.ecs.tasks[arn]["lastStatus"] == "STOPPED"
    assert plane.api_state(work_id) == "stopped"
    assert not plane.stops()


@all_settings
def test_a_lost_lease_ends_the_sandbox_and_nothing_is_posted(plane: Plane) -> None:
    work_id, arn = plane.run_to_running()
    plane.pass_seconds(25)
    plane.emulator.control("POST", f"work/{work_id}/take_lease")
    assert run_until_closed(plane, work_id) is Outcome.LOST
    assert plane.ecs.tasks[arn]["lastStatus"] == "STOPPED"
    assert not plane.stops()


@all_settings
def test_a_lapsed_lease_posts_nothing_and_the_session_is_served_again(plane: Plane) -> None:
    work_id, _ = plane.run_to_running()
    plane.pass_seconds(700)  # nobody beat: past every ttl
    assert run_until_closed(plane, work_id) is Outcome.LOST
    assert not plane.stops()
    run_until_over(plane, work_id)
    assert plane.record(work_id).outcome is Outcome.COMPLETED


@all_settings
@pytest.mark.parametrize("seconds_later", [2, 60])
def test_an_item_acked_before_a_crash_is_served_all_the_same(plane: Plane, seconds_later: int) -> None:
    """FIELD_NOTES 1: the strand of every public worker."""
    work_id = plane.queue_session()
    work = plane.api.poll()
    assert work is not None
    plane.store.save(lifecycle.open_turn(None, work, now=plane.time, owner="dead", until=plane.time + 1_000, shard="0"))
    plane.api.ack(work_id)  # and the process dies
    plane.pass_seconds(seconds_later)
    run_until_over(plane, work_id)
    assert plane.record(work_id).outcome is Outcome.COMPLETED


@all_settings
def test_an_item_that_is_no_session_is_acked_and_stopped(plane: Plane) -> None:
    work_id = plane.emulator.control("POST", "work", {"type": "healthcheck"})["work_id"]
    plane.poll()
    assert plane.record(work_id).outcome is Outcome.NO_SANDBOX
    assert plane.api_state(work_id) == "stopped"


def test_an_item_without_a_secret_is_left_to_the_server(emulator: RunningEmulator) -> None:
    emulator.control("POST", "switches", {"secret": "null"})
    plane = Plane(emulator)
    work_id = plane.queue_session()
    assert plane.poll() == 0
    assert (plane.api_state(work_id), plane.store.get(work_id), plane.queue.sent) == ("queued", None, [])


@all_settings
def test_our_client_reads_the_replies_of_all_eight_calls(plane: Plane) -> None:
    work_id = plane.queue_session()
    api, org_api = plane.api, client(plane.emulator, plane.emulator.org_key)
    polled = api.poll(block_ms=1, reclaim_older_than_ms=5000)
    assert polled is not None
    assert (polled.id, polled.state) == (work_id, "queued")
    assert api.ack(work_id).state == "starting"
    claimed = api.heartbeat(work_id, NO_HEARTBEAT, desired_ttl_seconds=60)
    assert (claimed.state, claimed.lease_extended, claimed.ttl_seconds) == ("active", True, 60)
    echoed = api.heartbeat(work_id, claimed.last_heartbeat, desired_ttl_seconds=60)
    assert echoed.last_heartbeat != claimed.last_heartbeat
    assert [item.id for item in api.list_all()] == [work_id]
    assert (api.stats().depth, api.stats().pending) == (0, 0)
    assert org_api.update(work_id, {"a": "1"}).metadata == org_api.retrieve(work_id).metadata == {"a": "1"}
    asked = api.stop(work_id, force=False)
    assert asked is None or asked.state == "stopping"
    assert not api.heartbeat(work_id, echoed.last_heartbeat).lease_extended
    for _ in range(2):
        ended = api.stop(work_id, force=True)
        assert ended is None or ended.state == "stopped"


# --- faults ---------------------------------------------------------------------------------------------------


@all_faults
@pytest.mark.parametrize("call", ["poll", "ack", "heartbeat", "stop"])
def test_a_session_completes_with_one_fault_at_any_call(plane: Plane, call: str, fault: dict[str, Any]) -> None:
    inject(plane, fault, call)
    work_id = plane.queue_session()
    run_until_over(plane, work_id)
    assert not faults_left(plane)
    assert plane.record(work_id).outcome is Outcome.COMPLETED


@all_faults
def test_a_session_completes_with_the_ack_s_reply_lost_and_a_fault_at_the_claim(
    plane: Plane, fault: dict[str, Any]
) -> None:
    inject(plane, {"kind": "lost"}, "ack")
    inject(plane, fault, "heartbeat")
    work_id = plane.queue_session()
    run_until_over(plane, work_id)
    assert not faults_left(plane)
    assert plane.record(work_id).outcome is Outcome.COMPLETED


@all_faults
@pytest.mark.parametrize("call", ["heartbeat", "stop"])
def test_a_turn_that_runs_completes_with_one_fault_at_its_end(plane: Plane, call: str, fault: dict[str, Any]) -> None:
    work_id, arn = plane.run_to_running()
    plane.queue.sent.clear()
    end_its_turn(plane, plane.ecs.tasks[arn])
    inject(plane, fault, call)
    run_until_over(plane, work_id)
    assert not faults_left(plane)
    assert plane.record(work_id).outcome is Outcome.COMPLETED


@all_faults
@pytest.mark.parametrize("call", ["heartbeat", "stop"])
def test_a_graceful_stop_is_confirmed_with_one_fault_at_any_call(
    plane: Plane, call: str, fault: dict[str, Any]
) -> None:
    work_id, _ = plane.run_to_running()
    plane.emulator.control("POST", f"work/{work_id}/stop", {"force": False})
    inject(plane, fault, call)
    plane.pass_seconds(30)
    assert run_until_closed(plane, work_id) is Outcome.STOPPED
    assert not faults_left(plane)
    if not (call == "stop" and fault.get("status") == 409):  # that claims that the item is stopped (W§7.1)
        assert plane.api_state(work_id) == "stopped"


@all_faults
def test_no_stop_is_posted_after_a_lost_lease_whatever_the_beats_are_answered(
    plane: Plane, fault: dict[str, Any]
) -> None:
    work_id, _ = plane.run_to_running()
    plane.pass_seconds(25)
    plane.emulator.control("POST", f"work/{work_id}/take_lease")
    inject(plane, fault, "heartbeat")
    assert run_until_closed(plane, work_id) is Outcome.LOST
    assert not faults_left(plane)
    assert not plane.stops()


def test_an_absence_within_the_ttl_costs_nothing(plane: Plane) -> None:
    work_id, arn = plane.run_to_running()
    inject(plane, {"kind": "away", "times": None}, "any")
    for _ in range(4):
        plane.poll()
        plane.beat()
        plane.stop()
        plane.pass_seconds(10)
    plane.emulator.control("DELETE", "faults")
    plane.beat()
    assert (plane.record(work_id).phase, plane.api_state(work_id)) == (Phase.RUNNING, "active")
    assert "desiredStatus" not in plane.ecs.tasks[arn]


def test_an_absence_past_the_ttl_ends_the_turn_and_the_session_is_served_again(plane: Plane) -> None:
    work_id, arn = plane.run_to_running()
    inject(plane, {"kind": "away", "times": None}, "any")
    assert run_until_closed(plane, work_id) is Outcome.LOST
    assert plane.ecs.tasks[arn]["lastStatus"] == "STOPPED"
    plane.emulator.control("DELETE", "faults")
    assert not plane.stops()
    plane.pass_seconds(60)
    run_until_over(plane, work_id)
    assert plane.record(work_id).outcome is Outcome.COMPLETED


@pytest.mark.parametrize("seed", range(4))
def test_sessions_complete_while_faults_come_at_random(plane: Plane, seed: int) -> None:
    for kind in ({"kind": "lost"}, {"kind": "status", "status": 503}, {"kind": "malformed"}):
        inject(plane, kind, "any", times=8, probability=0.15, seed=seed)
    work_id = plane.queue_session()
    run_until_over(plane, work_id)
    assert plane.record(work_id).outcome is Outcome.COMPLETED


READS_AND_UPDATE = ["retrieve", "list", "update", "stats"]
PASSING = [fault for fault in FAULTS if fault.get("status") not in (409, 412)]


@pytest.mark.parametrize("fault", PASSING, ids=named)
@pytest.mark.parametrize("call", READS_AND_UPDATE)
def test_our_client_repeats_a_read_or_an_update_past_a_passing_fault(
    plane: Plane, call: str, fault: dict[str, Any]
) -> None:
    work_id = plane.queue_session()
    waits: list[float] = []
    api = client(plane.emulator, plane.emulator.org_key if call in ("retrieve", "update") else None)
    api._sleep = waits.append
    inject(plane, fault, call)
    does: dict[str, Any] = {
        "retrieve": lambda: api.retrieve(work_id),
        "list": api.list,
        "update": lambda: api.update(work_id, {"a": "1"}),
        "stats": api.stats,
    }
    assert does[call]()
    assert not faults_left(plane)
    assert len(waits) == (fault["kind"] != "delay")


@all_faults
@pytest.mark.parametrize("call", ["poll", "ack", "heartbeat", "stop"])
def test_our_client_makes_one_attempt_and_names_what_happened(plane: Plane, call: str, fault: dict[str, Any]) -> None:
    work_id, api = plane.queue_session(), plane.api
    inject(plane, fault, call)
    does: dict[str, Any] = {
        "poll": api.poll,
        "ack": lambda: api.ack(work_id),
        "heartbeat": lambda: api.heartbeat(work_id, "2020-01-01T00:00:00.000000Z"),
        "stop": lambda: api.stop(work_id, force=True),
    }
    error: WorkApiError | None = None
    try:
        does[call]()
    except WorkApiError as caught:
        error = caught
    calls = [each for each in plane.emulator.control("GET", "state")["calls"] if each["call"] == call]
    assert [each["fault"] for each in calls] == [fault["kind"]]
    if fault["kind"] in ("lost", "away", "malformed", "content_type"):
        assert isinstance(error, TryAgain)
        assert error.maybe_done
    elif fault["kind"] == "status" and (call, fault["status"]) != ("stop", 409):  # a stop's 409 is an answer (W§7.1)
        assert error is not None
        assert error.status == fault["status"]
        done = getattr(error, "maybe_done", None)
        assert done == {409: None, 412: None, 429: False, 529: False}.get(fault["status"], True)
