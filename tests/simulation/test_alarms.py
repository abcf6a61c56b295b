"""Each alarm's condition is brought about, and its metric seen to cross; without trouble none of them rings."""

from collections.abc import Callable
from typing import Any

import pytest

from shared.record import Outcome
from tests.simulation import cloudwatch
from tests.simulation.fargate import Task
from tests.simulation.fleet import START, Fleet
from tests.simulation.script import Play

MINUTE_MS = 60_000
ALARMS = cloudwatch.alarms()
Trouble = Callable[[Play], None]
TROUBLES: dict[str, tuple[Trouble, dict[str, Any]]] = {}


def trouble(alarm: str, **config: Any) -> Callable[[Trouble], Trouble]:
    """What raises this alarm, on a fleet with these settings."""

    def keep(bring_about: Trouble) -> Trouble:
        TROUBLES[alarm] = bring_about, config
        return bring_about

    return keep


def states(fleet: Fleet, alarm: str) -> set[str]:
    """All that the alarm was in, looked at every minute from its first data on."""
    points = fleet.measured.points.get(cloudwatch.watched(ALARMS[alarm]), [])
    if not points:
        return set()
    times = range(points[0][0] + MINUTE_MS, fleet.machine.now + 10 * MINUTE_MS, MINUTE_MS)
    return {cloudwatch.state(ALARMS[alarm], fleet.measured, fleet.config, now) for now in times}


@pytest.mark.parametrize("alarm", ALARMS)
def test_its_condition_raises_the_alarm(alarm: str) -> None:
    """FIELD_NOTES 27."""
    bring_about, config = TROUBLES[alarm]
    play = Play(0, **config)
    try:
        bring_about(play)
        rings = "INSUFFICIENT_DATA" if alarm.endswith("SilentAlarm") else "ALARM"
        assert rings in states(play.fleet, alarm)
    finally:
        play.fleet.close()


def test_a_stack_without_work_publishes_nothing_and_rings_nothing() -> None:
    fleet = Fleet(0)
    try:
        fleet.schedule("poller", MINUTE_MS)
        fleet.schedule("janitor", 5 * MINUTE_MS)
        fleet.machine.run(START + 120 * MINUTE_MS)
        assert {
            name for name, points in fleet.measured.points.items() if points and name[0] == cloudwatch.FLEET
        } == set()
        assert fleet.measured.points["AWS/Lambda", "Invocations", "PollerFunction"]
        fleet.machine.now -= 10 * MINUTE_MS  # `states` looks as far ahead
        assert set[str]().union(*(states(fleet, alarm) for alarm in ALARMS)) == {"OK"}
    finally:
        fleet.close()


@pytest.mark.parametrize("seed", range(3))
def test_work_without_trouble_rings_nothing(seed: int) -> None:
    fleet = Fleet(seed)
    try:
        fleet.schedule("poller", MINUTE_MS)
        fleet.schedule("janitor", 5 * MINUTE_MS)
        for n in range(30):
            fleet.machine.later(n * 2 * MINUTE_MS, fleet.new_session)
        fleet.machine.run(START + 100 * MINUTE_MS)
        assert fleet.settled()
        fleet.machine.now -= 10 * MINUTE_MS
        rung = {alarm: found for alarm in ALARMS if (found := states(fleet, alarm)) - {"OK"}}
        assert rung == {}
        measured = {name for (namespace, name, _), points in fleet.measured.points.items() if points}
        usual = {"PickupLatency", "LaunchLatency", "Beats", "LeaseMargin", "SandboxSeconds", "TurnsCompleted"}
        assert usual <= measured
    finally:
        fleet.close()


# --- the troubles ----------------------------------------------------------------------------------------------


@trouble("KeyRefusedAlarm")
def the_key_is_revoked(play: Play) -> None:
    play.fleet.keys.clear()
    play.fleet.schedule("poller", MINUTE_MS)
    play.run(300)


@trouble("MostItemsGoneAlarm")
def the_environment_is_another(play: Play) -> None:
    for _ in range(4):
        play.running()
    play.fleet.queue._items.clear()
    play.run(120)


@trouble("BeatsFailedAlarm")
def the_api_is_away(play: Play) -> None:
    play.running()
    play.fleet.api_goes_away(280)
    play.run(300)


@trouble("LeaseMarginLowAlarm")
def a_beat_comes_late(play: Play) -> None:
    play.running()
    play.run(60)
    play.fleet.api_goes_away(250)
    play.run(400)


@trouble("QueueNotServedAlarm", max_sessions=0)
def nobody_polls(play: Play) -> None:
    play.fleet.new_session()
    play.fleet.schedule("janitor", 5 * MINUTE_MS)
    play.run(3_000)


@trouble("SessionsNotLaunchedAlarm", launch_timeout_seconds=7_200)
def there_is_no_room(play: Play) -> None:
    play.fleet.fargate.full_until = START + 7_200_000
    play.fleet.new_session()
    play.poll()
    play.fleet.schedule("janitor", 5 * MINUTE_MS)
    play.run(3_000)


@trouble("BreakerOpenAlarm")
def the_image_is_gone(play: Play) -> None:
    play.fleet.fargate.image_goes_missing(3_600_000)
    for _ in range(4):
        play.fleet.new_session()
    play.fleet.schedule("poller", MINUTE_MS)
    play.run(600)


@trouble("LaunchesFailedAlarm", launch_timeout_seconds=120)
def there_is_no_room_until_the_deadline(play: Play) -> None:
    play.fleet.fargate.full_until = START + 3_600_000
    play.fleet.new_session()
    play.poll()
    play.run(900)


@trouble("StalledAlarm")
def a_sandbox_hangs(play: Play) -> None:
    play.running()
    play.want("sandbox hangs")
    play.fleet.schedule("janitor", 5 * MINUTE_MS)
    play.run(1_500)


@trouble("TurnsFailedAlarm", max_attempts=1)
def a_sandbox_crashes(play: Play) -> None:
    play.running()
    play.want("sandbox crashes")
    play.run(300)


@trouble("TurnsTimedOutAlarm", session_timeout_seconds=300)
def a_turn_takes_too_long(play: Play) -> None:
    play.running()
    play.run(600)


@trouble("LeasesLostAlarm")
def a_lease_lapses(play: Play) -> None:
    play.running()
    play.fleet.api_goes_away(400)
    play.run(600)


@trouble("UnservedAlarm")
def a_message_slips_in(play: Play) -> None:
    session = play.running(messages=1)
    stop = play.fleet._posts_its_stop

    def slip(work_id: str) -> bool:
        play.fleet.message(session)
        return stop(work_id)

    play.fleet._posts_its_stop = slip  # type: ignore[method-assign]
    play.run(600)
    assert play.outcomes(session) == [Outcome.UNSERVED]


@trouble("ShortSandboxesAlarm")
def a_sandbox_does_nothing(play: Play) -> None:
    def look_and_leave(task: Task) -> int:
        play.machine.sleep(4_000)
        return 0

    play.fleet.fargate.container = look_and_leave
    play.fleet.new_session()
    play.poll()
    play.run(300)


@trouble("StrandedAlarm")
def another_worker_dies_after_its_ack(play: Play) -> None:
    play.fleet.queue.enqueue("sesn_other")
    item = play.fleet.queue.poll()
    assert item
    play.fleet.queue.ack(item.id)
    play.fleet.schedule("janitor", 5 * MINUTE_MS)
    play.run(2_400)


@trouble("OrphanTasksAlarm")
def tasks_without_a_record_do_not_stop(play: Play) -> None:
    fargate = play.fleet.fargate
    fargate.tasks["arn:task/x"] = Task("arn:task/x", "sesn_x/1/1", {}, START, status="RUNNING")
    fargate.tasks["arn:task/x"].request = {"capacityProviderStrategy": [{"capacityProvider": "FARGATE"}]}
    fargate.stop = lambda *_: None  # type: ignore[method-assign]
    play.fleet.schedule("janitor", 5 * MINUTE_MS)
    play.run(1_800)


@trouble("SweepsFailedAlarm")
def the_janitor_reaches_no_api(play: Play) -> None:
    play.fleet.api_goes_away(1_800)
    play.fleet.schedule("janitor", 5 * MINUTE_MS)
    play.run(1_800)


@trouble("DeadLettersAlarm")
def somebody_else_writes_to_the_queue(play: Play) -> None:
    play.send("launcher", {"Records": [{"messageId": "m", "receiptHandle": "m", "body": "nonsense"}]})
    play.run(60)


@trouble("LoopFailedAlarm")
def the_loop_meets_an_unknown_state(play: Play) -> None:
    play.fleet.loops.definition["States"]["Wait"] = {"Type": "Unknown"}
    play.fleet.new_session()
    play.poll()
    play.run(60)


def fails(play: Play, function: str, first_call: str) -> None:
    """Its first call goes unanswered each time, which it does not catch."""
    play.at(first_call, function, fault="lose", times=100)


@trouble("PollerErrorsAlarm")
def the_poller_reads_no_table(play: Play) -> None:
    fails(play, "poller", "store.live")
    play.fleet.schedule("poller", MINUTE_MS)
    play.run(600)


@trouble("KeeperErrorsAlarm")
def the_keeper_reads_no_table(play: Play) -> None:
    play.running()
    fails(play, "keeper", "store.live")
    play.run(600)


@trouble("StopperErrorsAlarm")
def the_stopper_reads_no_table(play: Play) -> None:
    session = play.running()
    fails(play, "stopper", "store.live")
    play.fleet.ask_to_stop(session, force=False)
    play.run(600)


@trouble("JanitorErrorsAlarm")
def the_janitor_reads_no_table(play: Play) -> None:
    fails(play, "janitor", "store.marks")
    play.fleet.schedule("janitor", 5 * MINUTE_MS)
    play.run(1_500)


def runs_no_more(play: Play, function: str, every: int) -> None:
    for _ in range(3):
        play.send(function)
        play.run(every)
    play.run(10 * every)


@trouble("PollerSilentAlarm")
def the_poller_s_schedule_is_gone(play: Play) -> None:
    runs_no_more(play, "poller", 60)


@trouble("JanitorSilentAlarm")
def the_janitor_s_schedule_is_gone(play: Play) -> None:
    runs_no_more(play, "janitor", 300)


def test_every_trouble_is_of_an_alarm() -> None:
    assert TROUBLES.keys() == ALARMS.keys()
