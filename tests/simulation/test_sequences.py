"""Named sequences: each plays one order of events that a rule exists for, and was seen to fail without that rule.

Three seeds each: they draw only the delays between the events that a sequence names.
"""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from shared.record import Outcome, Phase
from tests.simulation.fargate import Task
from tests.simulation.script import BUSY, Play, closed_at

Start = Callable[..., Play]
COMPLETED, FAILED, NOT_OURS, STOPPED = Outcome.COMPLETED, Outcome.FAILED, Outcome.NOT_OURS, Outcome.STOPPED


@pytest.fixture(params=range(3))
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Builds the play of a sequence, with settings of its own."""
    plays = []

    def started(**config: Any) -> Play:
        plays.append(Play(request.param, **config))
        return plays[-1]

    yield started
    for play in plays:
        play.fleet.close()


@pytest.fixture
def play(start: Start) -> Play:
    return start()


# --- the end of a turn (DESIGN §7) ------------------------------------------------------------------------------


def test_a_forced_stop_whose_reply_is_lost_does_not_hit_the_turn_queued_before_the_retry(play: Play) -> None:
    """DESIGN §7: a stop names no lease, so an unanswered one is followed by an echo, never by another stop."""
    session = play.running()
    play.fleet.ask_to_stop(session, force=False)

    def queued_again() -> None:
        session.pending = 0
        play.fleet.message(session)

    play.at("api.stop", "stopper", fault="lose", then=queued_again)
    play.settle()
    assert play.outcomes(session) == [STOPPED, COMPLETED]
    assert session.pending == 0
    assert play.calls("stop") == 1


def test_a_message_that_slips_in_between_the_end_of_a_turn_and_its_stop_is_reported(play: Play) -> None:
    """DESIGN §7, W§3: the item is still active, so the message queues nothing and nobody listens any more."""
    session = play.running()
    stop = play.fleet._posts_its_stop

    def slip(work_id: str) -> bool:
        play.fleet.message(session)
        return stop(work_id)

    play.fleet._posts_its_stop = slip  # type: ignore[method-assign]
    play.settle(finish=[session])
    assert play.outcomes(session) == [Outcome.UNSERVED]


def test_an_item_offered_again_while_its_sandbox_drains_waits_and_is_not_stopped(play: Play) -> None:
    """DESIGN §5, §7: it stays unacked until the sandbox is dead; the 412 says that the stop is no longer ours."""
    session = play.running()
    play.fleet.ask_to_stop(session, force=False)

    def again() -> None:
        play.fleet.ask_to_stop(session, force=True)
        session.pending = 0
        play.fleet.message(session)
        play.poll()

    play.at("ecs.stop_task", "stopper", then=again)
    play.until(lambda: play.said("offered again") or play.record(session).lease_gone)
    assert play.task(session).runs, "the sandbox still drains"
    play.settle()
    first, second = play.tasks(session)
    assert first.stopped_at
    assert second.created_at > first.stopped_at
    assert play.outcomes(session) == [STOPPED, COMPLETED]
    assert play.calls("stop") == 0


def test_stopping_without_an_extension_is_a_graceful_stop_that_we_confirm(play: Play) -> None:
    """DESIGN §7, W§4: `stopping` with `lease_extended:false` is no lost lease; nothing but a forced stop ends it."""
    session = play.running()
    play.fleet.ask_to_stop(session, force=False)
    play.settle()
    assert play.outcomes(session) == [STOPPED]
    assert play.task(session).exit_code == 10
    assert play.calls("stop") == 1


# --- launching (DESIGN §6) --------------------------------------------------------------------------------------


def test_a_stop_while_the_launcher_is_inside_run_task_waits_for_the_task_it_starts(play: Play) -> None:
    """DESIGN §4: nothing found by `startedBy` proves no death while RunTask may be on its way."""
    session = play.fleet.new_session()

    def stop() -> None:
        play.fleet.ask_to_stop(session, force=False)
        play.hold(lambda: play.phase(session) is Phase.STOPPING)
        play.machine.sleep(10_000)

    play.at("ecs.run_task", "launcher", do=stop)
    play.poll()
    play.settle()
    (task,) = play.tasks(session)
    assert task.stopped_at
    assert play.outcomes(session) == [STOPPED]
    assert closed_at(play.record(session)) >= task.stopped_at


def test_no_relaunch_before_the_first_attempt_is_dead(play: Play) -> None:
    """DESIGN §4, FIELD_NOTES 14: past its start deadline an attempt is stopped; the next waits for its death."""
    session = play.fleet.new_session()
    session.pending = BUSY
    play.want("event lost")  # RUNNING: it runs, and for all we know it does not
    play.poll()
    play.until(lambda: play.attempt(session) == 2 and play.phase(session) is Phase.RUNNING)
    first, second = play.tasks(session)
    assert first.stopped_at
    assert second.created_at >= first.stopped_at
    play.settle(finish=[session])
    assert play.outcomes(session) == [COMPLETED]


def test_a_fresh_task_that_reads_missing_is_not_taken_for_dead(play: Play) -> None:
    """DESIGN §4: a fresh task may read MISSING; that proves nothing."""
    session = play.fleet.new_session()

    def stop() -> None:
        play.fleet.ask_to_stop(session, force=False)
        play.hold(lambda: play.phase(session) is Phase.STOPPING)

    def unseen() -> None:
        play.want("fresh task MISSING", times=1000)
        play.send("stopper", {"work_ids": [session.work_id]})

    play.at("ecs.run_task", "launcher", do=stop, then=unseen, fault="die after")
    play.poll()
    play.settle()
    (task,) = play.tasks(session)
    assert play.fleet.faults.counts["fresh task MISSING"]
    assert task.stopped_at
    assert closed_at(play.record(session)) >= task.stopped_at


def test_running_before_the_arn_is_stored_fills_it_in(play: Play) -> None:
    """DESIGN §4: events match by `startedBy` and may tell the arn before the launcher does."""
    session = play.fleet.new_session()
    session.pending = BUSY
    play.at("ecs.run_task", "launcher", then=lambda: play.hold(lambda: play.phase(session) is Phase.RUNNING))
    play.poll()
    play.until(lambda: play.phase(session) is Phase.RUNNING, seconds=50)
    assert play.record(session).task_arn == play.task(session).arn
    assert play.said("launched") == 0, "the launcher still waits"
    play.settle(finish=[session])
    assert play.outcomes(session) == [COMPLETED]
    assert len(play.tasks(session)) == 1


def test_late_and_repeated_events_of_attempt_1_change_nothing_in_attempt_2(play: Play) -> None:
    """DESIGN §4: events belong to (work, turn, attempt), so a late or repeated one of the last is dropped."""
    session = play.running()
    first = play.task(session)
    running = {"source": "aws.ecs", "detail": first.described() | {"version": 50}}
    _crash(play, first)
    play.until(lambda: len(play.tasks(session)) == 2 and play.phase(session) is Phase.LAUNCHING)
    play.send("observer", running)
    play.run(0.5)
    assert play.phase(session) is Phase.LAUNCHING
    play.until(lambda: play.phase(session) is Phase.RUNNING)
    play.send("observer", {"source": "aws.ecs", "detail": first.described() | {"version": 60}})
    play.run(60)
    record = play.record(session)
    assert (record.attempt, record.phase, record.task_arn) == (2, Phase.RUNNING, play.task(session).arn)
    play.settle(finish=[session])
    assert len(play.tasks(session)) == 2
    assert play.outcomes(session) == [COMPLETED]


def test_a_launcher_retry_with_a_second_ticket_leaves_the_first_one_good(play: Play) -> None:
    """DESIGN §6: ECS keeps the first request and its ticket; the attempt's set holds both."""
    session = play.fleet.new_session()
    play.at("ecs.run_task", "launcher", fault="lose")
    play.poll()
    play.settle()
    assert play.said("launching again") == 0
    assert len(play.tasks(session)) == 1
    assert play.outcomes(session) == [COMPLETED]
    assert session.served == 1


def test_a_tickets_lost_reply_is_replayed_to_the_same_caller_alone(play: Play) -> None:
    """DESIGN §6: the first use binds the ticket to a nonce, which may repeat it; no other caller may."""
    session = play.fleet.new_session()
    session.pending = BUSY
    play.want("URL reply lost")
    play.poll()
    play.until(lambda: play.phase(session) is Phase.RUNNING)
    play.until(lambda: play.record(session).ticket_nonce_hash)
    given = play.task(session).environment
    stolen = {
        "work_id": session.work_id,
        "turn": int(given["FLEET_TURN"]),
        "attempt": 1,
        "ticket": given["FLEET_TICKET"],
        "nonce": "NONCE-of-a-thief",
    }
    replies: list[Any] = []
    play.machine.spawn("thief", lambda: replies.append(play.fleet._url("/", stolen)))
    play.until(lambda: replies)
    assert replies[0]["statusCode"] == 403
    play.settle(finish=[session])
    assert play.fleet.faults.counts["URL reply lost"] == 1
    assert play.outcomes(session) == [COMPLETED]
    assert len(play.tasks(session)) == 1


def test_a_spot_interruption_that_exits_0_goes_on_in_another_attempt(play: Play) -> None:
    """DESIGN §7: a stop that nobody wanted is no end of the turn, whatever the exit code says."""
    container = play.fleet.fargate.container
    play.fleet.fargate.container = lambda task: 0 if (code := container(task)) == 10 else code
    session = play.running()
    first = play.task(session)
    first.code, first.reason = "SpotInterruption", "Your Spot Task was interrupted."
    play.fleet.fargate.stop(first, "", "")
    play.until(lambda: play.attempt(session) == 2 and play.phase(session) is Phase.RUNNING)
    assert first.exit_code == 0
    play.settle(finish=[session])
    assert play.outcomes(session) == [COMPLETED]
    assert len(play.tasks(session)) == 2


def test_an_image_that_is_missing_all_day_ends_a_turn_with_its_reason_where_nothing_is_held(start: Start) -> None:
    """DESIGN §6: the person is told, and the next message is served. How the breaker holds: test_simulation.py."""
    play = start(breaker_max_hold_seconds=0)
    session = play.fleet.new_session()
    play.fleet.fargate.image_missing_until = play.machine.now + 86_400_000
    play.poll()
    play.until(lambda: play.phase(session) is Phase.STOPPED)
    record = play.record(session)
    assert record.outcome is Outcome.LAUNCH_FAILED
    assert "image" in (record.reason or "")
    assert len(play.tasks(session)) == 1
    assert play.fleet.queue.get(session.work_id).state == "stopped"
    play.fleet.fargate.image_missing_until = 0
    play.fleet.message(session)
    play.settle()
    assert play.outcomes(session) == [Outcome.LAUNCH_FAILED, COMPLETED]
    assert session.pending == 0


# --- the lease loop (DESIGN §7) ---------------------------------------------------------------------------------


def test_the_loop_does_not_end_on_a_stale_index_as_work_arrives(play: Play) -> None:
    """DESIGN §7: it ends only after three empty rounds, for the index is eventually consistent."""
    session = play.running(messages=0)
    play.until(lambda: play.phase(session) is Phase.STOPPED)
    session.pending = BUSY
    play.fleet.message(session)
    # The new turn is claimed while the loop runs; the loop's next look still sees the empty index of before.
    play.at("store.save", "poller", then=lambda: play.want("stale index"))
    play.poll()
    play.until(lambda: play.fleet.faults.counts["stale index"] == 1)
    play.until(lambda: play.phase(session) is Phase.RUNNING)
    play.run(400)
    assert play.fleet.queue.get(session.work_id).state == "active"
    assert len(play.tasks(session)) == 2
    play.settle(finish=[session])
    assert play.outcomes(session) == [COMPLETED, COMPLETED]


def test_a_closed_execution_name_is_followed_by_the_next_generation(play: Play) -> None:
    """DESIGN §7: Step Functions refuses a closed name for 90 days."""
    session = play.running(messages=0)
    play.until(lambda: list(play.fleet.loops.executions.values()) == ["SUCCEEDED"])
    session.pending = BUSY
    play.fleet.message(session)
    play.poll()
    play.run(400)
    assert "RUNNING" in play.fleet.loops.executions.values()
    assert play.fleet.queue.get(session.work_id).state == "active"
    assert len(play.tasks(session)) == 2
    play.settle(finish=[session])
    assert play.outcomes(session) == [COMPLETED, COMPLETED]


def test_a_beats_reply_is_stored_though_the_observer_wrote_the_record_meanwhile(play: Play) -> None:
    """DESIGN §4: lease writes are conditional on the stored value, never on the phase."""
    session = play.running()

    def crossing() -> None:
        _crash(play, play.task(session))
        play.hold(lambda: play.attempt(session) == 2)

    play.at("api.heartbeat", "keeper", then=crossing)
    play.until(lambda: play.attempt(session) == 2)
    play.run(5)
    lease = play.fleet.records.get_leases([session.work_id])[session.work_id]
    assert lease.value == play.fleet.queue.get(session.work_id).body()["latest_heartbeat_at"]
    play.settle(finish=[session])
    assert play.said("a beat's reply dropped") == 0
    assert play.outcomes(session) == [COMPLETED]


def test_404_for_everything_kills_no_sandbox_before_its_lease_deadline(play: Play) -> None:
    """DESIGN §7, W§8: without the beta header every route looks like 404; most items gone at once is our own fault."""
    sessions = [play.fleet.new_session() for _ in range(6)]
    for session in sessions:
        session.pending = BUSY
    play.poll()
    play.until(lambda: all(play.phase(s) is Phase.RUNNING for s in sessions))
    right = play.fleet.transport._refusal
    play.fleet.transport._refusal = lambda call: httpx.Response(404, json={})  # type: ignore[method-assign]
    play.at("api.heartbeat", "keeper", fault="refuse", times=BUSY)
    play.run(150)
    assert play.said("most work items answer 404")
    play.fleet.transport._refusal = right  # type: ignore[method-assign]
    play.forget()
    play.run(300)
    assert all(play.phase(s) is Phase.RUNNING and len(play.tasks(s)) == 1 for s in sessions)
    play.settle(finish=sessions)
    assert {outcome for s in sessions for outcome in play.outcomes(s)} == {COMPLETED}


# --- claiming (DESIGN §5) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["the first to poll", "the second to poll"])
@pytest.mark.parametrize("call", ["store.save", "api.ack", "api.heartbeat"])
def test_two_pollers_on_one_item_make_one_turn(play: Play, call: str, first: str) -> None:
    """DESIGN §5, W§5.1: an item is offered again after 5 s; lock and conditional write keep the second off it."""
    session = play.fleet.new_session()
    moment: dict[str, Any] = {"do" if first == "the second to poll" else "then": lambda: _second_poller(play)}
    play.at(call, "poller", **moment)
    play.poll()
    play.settle()
    assert play.outcomes(session) == [COMPLETED]
    assert len(play.tasks(session)) == 1
    assert play.said("held {") == 1


@pytest.mark.parametrize("claims", [False, True], ids=["acked", "claimed"])
def test_a_foreign_worker_between_put_and_ack_keeps_the_item(play: Play, *, claims: bool) -> None:
    """DESIGN §5, W§5.2: a 409 to the ack of an offered item means that it is another's: hands off."""
    session = play.fleet.new_session()
    queue = play.fleet.queue
    values = []

    def claim() -> None:
        values.append(queue.heartbeat(session.work_id, "NO_HEARTBEAT")["last_heartbeat"])

    def foreign() -> None:
        play.machine.sleep(6_000)
        item = queue.poll()
        assert item
        queue.ack(item.id)
        queue.acked_by[item.id, item.started_at] = "foreign"
        if claims:
            claim()

    play.at("api.ack", "poller", do=foreign)
    play.poll()
    play.run(30)
    assert play.outcomes(session) == [NOT_OURS]
    assert play.tasks(session) == []
    if not claims:
        claim()
    queue.heartbeat(session.work_id, values[0])
    session.foreign = True
    queue.stop(session.work_id, force=True)
    play.settle()
    assert play.calls("stop") == 0


def test_the_turn_counter_goes_on_after_the_record_has_expired(play: Play) -> None:
    """DESIGN §1: turns are numbered by time, so that none repeats; RunTask's token would return the old task."""
    session = play.running(messages=1)
    play.until(lambda: play.phase(session) is Phase.STOPPED)
    before = play.record(session).turn
    play.until(lambda: "RUNNING" not in play.fleet.loops.executions.values())
    del play.fleet.records._records[session.work_id]
    play.fleet.message(session)
    play.settle()
    assert play.record(session).turn > before
    assert play.outcomes(session) == [COMPLETED], "the second turn was served at once, not after a failed one"
    assert len(play.tasks(session)) == 2
    assert session.served == 2


def test_an_item_without_a_secret_is_left_in_the_queue_and_reported(play: Play) -> None:
    """DESIGN §5, W§10: nothing could be done for it, so it is not acked; with a secret it is served."""
    secret_of = play.fleet.transport.secret_of
    play.fleet.transport.secret_of = lambda work_id: None  # type: ignore[assignment,return-value]
    session = play.fleet.new_session()
    for _ in range(3):
        play.poll()
        play.run(20)
    assert play.said("no usable secret") == 3
    assert play.fleet.queue.get(session.work_id).state == "queued"
    assert play.phase(session) is None
    play.fleet.transport.secret_of = secret_of
    play.settle()
    assert play.outcomes(session) == [COMPLETED]
    assert session.served == 1


# --- what the simulation has found: each was a bug --------------------------------------------------------------


def test_a_message_before_the_control_planes_stop_is_seen_by_the_sandbox(play: Play) -> None:
    """docs/decisions/0006 (seed 120 of the first simulation): the stop is posted while the sandbox can still look."""
    session = play.running()
    play.want("sandbox's stop refused")
    play.at("api.stop", "stopper", do=lambda: play.fleet.message(session))
    play.settle(finish=[session])
    assert play.outcomes(session) == [Outcome.UNSERVED]


def test_an_outage_at_the_end_of_a_turn_has_it_ended_again(play: Play) -> None:
    """docs/decisions/0006: an item that could not be stopped gets another attempt, which finds what slipped in."""
    session = play.running()
    play.want("sandbox's stop refused")
    play.at("api.heartbeat", "stopper", do=lambda: play.fleet.api_goes_away(25))
    session.pending = 0
    play.until(lambda: play.task(session).exit_code == 17)
    play.fleet.message(session)
    play.settle()
    assert play.outcomes(session) == [COMPLETED]
    assert [task.exit_code for task in play.tasks(session)] == [17, 0]
    assert session.served == 1


def test_an_outage_at_the_end_of_a_turn_uses_up_no_attempt(play: Play) -> None:
    """The alarms' simulated day: a turn that was served ended failed, its item could not be stopped for minutes."""
    session = play.running()
    play.fleet.api_goes_away(240)
    session.pending = 0
    play.settle()
    assert play.outcomes(session) == [COMPLETED]
    assert len(play.tasks(session)) > play.fleet.config.max_attempts


def test_a_409_to_the_ack_of_an_item_that_is_no_session_stops_nothing(play: Play) -> None:
    """Commit bac5ed3: another worker held the healthcheck item that our 409 spoke of."""
    queue = play.fleet.queue
    queue.enqueue("work_check", "healthcheck")
    refuse = play.fleet.transport._refusal
    play.fleet.transport._refusal = lambda call: httpx.Response(409, json={})  # type: ignore[method-assign]

    def foreign() -> None:
        item = queue.ack("work_check")
        queue.acked_by[item.id, item.started_at] = "foreign"

    play.at("api.ack", "poller", do=foreign, fault="refuse")
    play.poll()
    play.run(30)
    play.fleet.transport._refusal = refuse  # type: ignore[method-assign]
    assert play.calls("stop") == 0
    queue.stop("work_check", force=True)
    play.settle()


def test_an_outage_is_met_with_ever_fewer_calls(play: Play) -> None:
    """Commit bac5ed3: keeper and stopper asked every two seconds for as long as the API was away."""
    beaten, stopping = play.running(), play.running()
    play.fleet.ask_to_stop(stopping, force=False)
    play.until(lambda: play.task(stopping).stopped_at)
    play.fleet.api_goes_away(200)
    before = len(play.fleet.transport.calls)
    play.run(200)
    assert len(play.fleet.transport.calls) - before <= 40, "two items, 200 s"
    play.settle(finish=[beaten])
    assert play.outcomes(beaten) == [COMPLETED]
    assert play.outcomes(stopping) == [STOPPED]


def test_a_finished_turn_whose_running_event_was_lost_is_not_relaunched(play: Play) -> None:
    """Commit bac5ed3: STOPPED came while the record still said `launching`."""
    session = play.fleet.new_session()
    play.want("event lost")
    play.poll()
    play.settle()
    assert play.outcomes(session) == [COMPLETED]
    assert len(play.tasks(session)) == 1


def test_a_claim_refused_without_a_state_after_an_unanswered_ack_is_not_given_up(play: Play) -> None:
    """Seed 6924 of commit bac5ed3: the turn was closed as another's, and its item stayed acked and never beaten."""
    session = play.fleet.new_session()
    refuse = play.fleet.transport._refusal
    play.fleet.transport._refusal = lambda call: httpx.Response(412, json={})  # type: ignore[method-assign]
    play.at("api.ack", "poller", fault="lose")
    play.at("api.heartbeat", "poller", fault="refuse")
    play.poll()
    play.run(5)
    play.fleet.transport._refusal = refuse  # type: ignore[method-assign]
    play.settle()
    assert play.outcomes(session) == [COMPLETED]
    assert session.served == 1


def _crash(play: Play, task: Task) -> None:
    play.fleet.fargate.crash(task, "EssentialContainerExited", "Essential container in task exited")


def _second_poller(play: Play) -> None:
    """While a call of the first waits: long enough for the item to be offered again, and to be claimed."""
    play.machine.sleep(6_000)
    play.poll()
    play.machine.sleep(6_000)


# --- an operator's commands (shared/operating.py) ---------------------------------------------------------------


@pytest.mark.parametrize("order", ["stop", "force"])
def test_an_operator_s_stop_ends_a_busy_session_once_and_with_its_own_lease(play: Play, order: str) -> None:
    """Forced, the item goes first; either way a stop follows an echo (DESIGN §7), which `settle` checks."""
    session = play.running()
    dead_at_stop: list[bool] = []
    play.at("api.stop", "stopper", do=lambda: dead_at_stop.append(not play.task(session).runs))
    play.fleet.operate(order, session)
    play.settle()
    assert play.outcomes(session) == [STOPPED]
    assert dead_at_stop == [order == "stop"]
    assert play.calls("stop") == 1


def test_an_operator_who_dies_after_the_wish_is_obeyed_all_the_same(play: Play) -> None:
    session = play.running()
    play.at("store.save", "operator", fault="die after")
    play.fleet.operate("stop", session)
    play.settle()
    assert play.outcomes(session) == [STOPPED]


def test_a_stop_while_the_launcher_is_inside_runtask_waits_for_the_task_and_ends_it(play: Play) -> None:
    session = play.fleet.new_session()
    play.at("ecs.run_task", "launcher", do=lambda: play.fleet.operate("force", session))
    play.poll()
    play.settle()
    assert play.outcomes(session) == [STOPPED]


def test_a_session_retried_by_an_operator_goes_on_in_another_sandbox_beyond_the_most_attempts(start: Start) -> None:
    play = start(max_attempts=1)
    session = play.running()
    play.fleet.operate("retry", session)
    play.until(lambda: play.attempt(session) == 2 and play.phase(session) is Phase.RUNNING)
    play.settle(finish=[session])
    assert play.outcomes(session) == [COMPLETED]


def test_while_paused_nothing_new_is_claimed_and_what_runs_goes_on(play: Play) -> None:
    session = play.running(messages=2)
    play.fleet.pause(paused=True)
    play.run(1)
    waiting = play.fleet.new_session()
    play.poll()
    play.until(lambda: play.phase(session) is Phase.STOPPED)
    assert play.phase(waiting) is None
    play.fleet.pause(paused=False)
    play.settle()
    assert play.outcomes(waiting) == [COMPLETED]
