"""Every rule of the control plane: what follows from a record, a reply and the clock. Pure; no I/O, no clock reads.

Others carry out what is decided here (DESIGN §3). All times are epoch milliseconds.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

from pydantic import SecretStr, StringConstraints

from shared.config import Config
from shared.diagnose import Diagnosis, Kind
from shared.record import HISTORY_TURNS, SPENT_ENTRIES, Lease, LiveEntry, Outcome, PastTurn, Phase, Record, Spent
from shared.sizes import SizeClass
from shared.wishes import Wishes

if TYPE_CHECKING:  # half of the functions make no call and need not load its HTTP client
    from shared.work_api import CurrentState, Heartbeat, Work

ACKED = "acked"
LEASE_MARGIN_MS = 5_000
LONGEST_INTERVAL_MS = 30_000
DUE_SLACK_MS = 500
CLAIM_WINDOW_SECONDS = 30  # how long after our ack a claim can still be our own (DESIGN §5, rule 4)
OWN_EXIT_GRACE_MS = 5_000
WISHES_PATIENCE_MS = 15_000
ROUND_MS = 30_000
MOST_INTERRUPTIONS = 2  # of one turn on Spot capacity; then it goes on demand
MOST_UNSTOPPED = 5
"""Uncounted attempts of a turn that was over and whose item could not be stopped: with their delays a ttl of 300 s."""
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 5, 240
TOO_SOON_MS = 10_000
SECOND_LOOK_MS = 120_000  # well under the janitor's round, well over two runs that happen to overlap
STRAND_AGE_MS = 900_000  # no lease lives so long without a beat
_NO_TURNS: tuple[PastTurn, ...] = ()
LONGEST_ID = 90  # characters: `startedBy` holds the id, the turn and the attempt in 128
SAFE_ID = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_ID}}}")
# An id as requests and messages may name it: DynamoDB answers an empty or very long key with an error
WorkId = Annotated[str, StringConstraints(pattern=rf"^{SAFE_ID.pattern}$")]
_STARTED_BY = re.compile(rf"({SAFE_ID.pattern})/([0-9]{{1,19}})/([0-9]{{1,9}})")

# Exit codes of the runner (sandbox/runner.py) that need no diagnosis
FINISHED, UNSERVED, NOT_STOPPED = 0, 11, 17
HOPELESS_EXITS = {
    12: "the control plane refused its ticket",
    14: "the API refused the session's credential",
    15: "the session is gone",
    16: "its configuration is wrong; check the stack's parameters",
    18: "what its metadata wants in the workspace cannot be had; the sandbox's log says why",
}


# --- claiming (DESIGN §5) -------------------------------------------------------------------------------------


class Offer(StrEnum):
    """What to do with an item that a poll returned."""

    CLAIM = "claim"
    LEAVE = "leave"  # unacked: the server offers it again
    MARK = "mark"  # leave it, but its present turn has lost the lease
    REFUSE = "refuse"  # cannot be served at all: left unacked and reported


def judge_offer(record: Record | None, work: "Work", now: int, *, hand_over_key: bool = False) -> Offer:
    """An offer proves that the item is queued: a turn past `received` has lost its lease (DESIGN §7).

    A session without a `secret` can be served only if the environment key may be handed over (DESIGN §5).
    """
    if not SAFE_ID.fullmatch(work.id):
        return Offer.REFUSE
    if work.data.type == "session" and not (work.data.id and (_secret_of(work) or hand_over_key)):
        return Offer.REFUSE
    if record is None or not record.is_live:
        return Offer.CLAIM
    if record.phase is Phase.RECEIVED:
        return Offer.CLAIM if record.claim_until <= now else Offer.LEAVE
    return Offer.LEAVE if record.lease_gone else Offer.MARK


def _secret_of(work: "Work") -> SecretStr | None:
    return work.secret if work.secret and work.secret.get_secret_value() else None


def open_turn(previous: Record | None, work: "Work", *, now: int, owner: str, until: int, shard: str) -> Record:
    """The record of a polled item, locked for `owner`; a `received` turn goes on, an ended one is succeeded."""
    turn, history = now, _NO_TURNS
    if previous is not None:
        if previous.is_live:
            turn, history = previous.turn, previous.history
        else:
            turn = max(previous.turn + 1, now)
            history = (*previous.history, past_turn(previous))[-HISTORY_TURNS:]
    return Record(
        work_id=work.id,
        environment_id=work.environment_id,
        kind=work.data.type,
        session_id=work.data.id,
        turn=turn,
        phase=Phase.RECEIVED,
        revision=previous.revision if previous else 0,
        secret=_secret_of(work),
        queued_at=None if (queued := server_time(work.started_at)) is None else int(queued * 1000),
        claim_owner=owner,
        claim_until=until,
        shard=shard,
        history=history,
        timeline=previous.timeline if previous and previous.is_live else (),
        spent=previous.spent if previous else (),
        spent_untold=previous.spent_untold if previous else 0,
    ).noted(now, "received")


def past_turn(record: Record) -> PastTurn:
    return PastTurn(**record.model_dump(include=set(PastTurn.model_fields)))


def acked(record: Record, acknowledged_at: str | None, now: int) -> Record:
    return record.noted(now, ACKED, acknowledged_at=acknowledged_at)


def held(record: Record, now: int) -> Record:
    return record.noted(now, "held", phase=Phase.HELD, claim_owner="", claim_until=0, sandbox_wanted_since=now)


def pickup_seconds(record: Record, now: int) -> float | None:
    """How long the item waited in the API's queue, if it said since when: our clock less the API's, so never exact."""
    return None if record.queued_at is None else max(0, now - record.queued_at) / 1000


def first_lease(record: Record, beat: "Heartbeat", sent_at: int, *, longest_ms: int = LONGEST_INTERVAL_MS) -> Lease:
    return Lease(
        work_id=record.work_id,
        turn=record.turn,
        value=beat.last_heartbeat,
        ttl_seconds=beat.ttl_seconds,
        accepted_sent_at=sent_at,
        due_at=sent_at + interval_ms(beat.ttl_seconds, longest_ms),
    )


def recognised_lease(record: Record, value: str, ttl_seconds: int, now: int) -> Lease:
    """The lease of a claim of ours whose reply was lost: dated from our ack, so that its deadline is never late."""
    acked_at = next(moment.at for moment in reversed(record.timeline) if moment.event == ACKED)
    return Lease(
        work_id=record.work_id,
        turn=record.turn,
        value=value,
        ttl_seconds=ttl_seconds,
        accepted_sent_at=acked_at,
        due_at=now,
    )


# --- the lease (DESIGN §5 and §7) -----------------------------------------------------------------------------


def interval_ms(ttl_seconds: int, longest_ms: int = LONGEST_INTERVAL_MS) -> int:
    """Milliseconds between beats: a third of the ttl, at most `longest_ms`."""
    return max(1_000, min(longest_ms, ttl_seconds * 1000 // 3))


def margin_percent(before: Lease, after: Lease) -> float:
    """How much of a lease's time was left, by our clock and count, when the beat that extended it was sent."""
    left = before.deadline(LEASE_MARGIN_MS) - after.accepted_sent_at
    return max(0.0, left / (before.ttl_seconds * 10))


class Verdict(StrEnum):
    """Whose lease a 412 speaks of."""

    OURS = "ours"
    LOST = "lost"
    UNKNOWN = "unknown"
    OVER = "over"  # the item is stopped


def judge_echo_refusal(lease: Lease, state: "CurrentState | None") -> Verdict:
    """The 412 rule for an echo: ours only by continuity on the server's clock from the stored value."""
    return _judge_refusal(lease.value, lease.ttl_seconds, state, unclaimed=Verdict.LOST)


def judge_claim_refusal(record: Record, state: "CurrentState | None", desired_ttl_seconds: int) -> Verdict:
    """The 412 rule for a claim. Without our own ack's 200 another's lease is never ours (DESIGN §5, rule 5).

    Without a state it may be nobody's: given up, an item that an unanswered ack of ours took would wait for ever.
    """
    if state is None:
        return Verdict.UNKNOWN
    if record.acknowledged_at is None:
        return Verdict.OVER if state.state == "stopped" else Verdict.LOST
    window = min(desired_ttl_seconds, CLAIM_WINDOW_SECONDS)
    return _judge_refusal(record.acknowledged_at, window, state, unclaimed=Verdict.UNKNOWN)


def _judge_refusal(base: str, window_seconds: int, state: "CurrentState | None", *, unclaimed: Verdict) -> Verdict:
    if state is None:
        return Verdict.UNKNOWN
    if state.state == "stopped":
        return Verdict.OVER
    if state.state == "queued":
        return Verdict.LOST
    if state.state == "starting":
        return unclaimed
    if state.state not in ("active", "stopping"):
        return Verdict.UNKNOWN
    b, w = server_time(base), server_time(state.last_heartbeat)
    if b is None or w is None or not b < w < b + window_seconds:
        return Verdict.LOST
    renewed = server_time(state.lease_updated_at)
    return Verdict.LOST if renewed is not None and b < renewed < w else Verdict.OURS


def server_time(text: str | None) -> float | None:
    """Epoch seconds of an API timestamp, its fraction optional (W§2); None if it cannot be read."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment.timestamp() if moment.tzinfo else None


@dataclass(frozen=True)
class StopWish:
    """Why the sandbox must die, how the turn then ends, and whether the item needs our forced stop."""

    reason: str
    outcome: Outcome
    post: bool
    grace_ms: int = 0


@dataclass(frozen=True)
class BeatResult:
    """`accepted`: the server answered `active` or `stopping` with our value, so a stop may follow at once."""

    lease: Lease
    wish: StopWish | None = None
    accepted: bool = False


STOP_REQUESTED = StopWish("a stop was requested", Outcome.STOPPED, post=True)
ALREADY_STOPPED = StopWish("the item is stopped", Outcome.STOPPED, post=False, grace_ms=OWN_EXIT_GRACE_MS)
LEASE_LOST = StopWish("the lease is lost", Outcome.LOST, post=False)
OPERATOR_STOP = StopWish("stopped by an operator", Outcome.STOPPED, post=True)
ITEM_GONE = StopWish("the work item is gone", Outcome.LOST, post=False)


def due_now(leases: Sequence[Lease], now: int, *, longest_ms: int = LONGEST_INTERVAL_MS) -> set[str]:
    """The work ids to beat: what is due, and if any of it is due by its interval, all that keep theirs.

    So the leases of a shard fall into step, and one round serves all: the loop's cost does not grow with them. A lease
    whose last beat was not accepted keeps its own time, which the API may have named, and brings no other forward:
    else one failure in a round would double the beats of all.
    """

    def in_step(lease: Lease) -> bool:
        return lease.due_at == lease.accepted_sent_at + interval_ms(lease.ttl_seconds, longest_ms)

    due = [lease for lease in leases if lease.due_at <= now + DUE_SLACK_MS]
    if any(map(in_step, due)):
        due += filter(in_step, leases)
    return {lease.work_id for lease in due}


def after_beat(lease: Lease, beat: "Heartbeat", sent_at: int, *, longest_ms: int = LONGEST_INTERVAL_MS) -> BeatResult:
    """What a 200 means; branches on `state` first (DESIGN §7)."""
    if beat.state == "stopped":
        return BeatResult(lease.model_copy(update={"over": "stopped"}), ALREADY_STOPPED)
    ttl_seconds = beat.ttl_seconds if beat.lease_extended else lease.ttl_seconds
    kept = lease.model_copy(
        update={
            "value": beat.last_heartbeat or lease.value,
            "ttl_seconds": ttl_seconds,
            "accepted_sent_at": sent_at,
            "due_at": sent_at + interval_ms(ttl_seconds, longest_ms),
        }
    )
    if beat.state == "stopping" or (beat.state == "active" and not beat.lease_extended):
        return BeatResult(kept, STOP_REQUESTED, accepted=True)
    if beat.state == "queued":
        return lease_lost(lease)
    if not beat.lease_extended:  # a state that we do not know: kept, and tried again within the ttl
        return after_no_answer(lease, sent_at, None)
    return BeatResult(kept, accepted=True)


def after_refused_echo(lease: Lease, state: "CurrentState | None", sent_at: int) -> BeatResult:
    """What a 412 to an echo means."""
    match judge_echo_refusal(lease, state):
        case Verdict.OURS:
            value = state.last_heartbeat if state else None
            return BeatResult(lease.model_copy(update={"value": value or lease.value, "due_at": sent_at}))
        case Verdict.OVER:
            return BeatResult(lease.model_copy(update={"over": "stopped"}), ALREADY_STOPPED)
        case Verdict.LOST:
            return lease_lost(lease)
        case Verdict.UNKNOWN:
            return after_no_answer(lease, sent_at, None)


def after_no_answer(lease: Lease, now: int, wait_seconds: float | None) -> BeatResult:
    """429, 5xx, no reply, 401, 403: try again within the ttl; past the lease deadline the lease is lost."""
    if now >= lease.deadline(LEASE_MARGIN_MS):
        return lease_lost(lease)
    left = lease.deadline(LEASE_MARGIN_MS) - now
    wait = max(1_000, int(wait_seconds * 1000)) if wait_seconds else max(2_000, min(15_000, left // 8))
    due = min(now + wait, lease.deadline(LEASE_MARGIN_MS))
    return BeatResult(lease.model_copy(update={"due_at": due}))


def lease_lost(lease: Lease) -> BeatResult:
    return BeatResult(lease.model_copy(update={"over": "lost"}), LEASE_LOST)


def item_gone(lease: Lease) -> BeatResult:
    return BeatResult(lease.model_copy(update={"over": "gone"}), ITEM_GONE)


# --- the sandbox (DESIGN §6 and §7) ---------------------------------------------------------------------------


def started_by(work_id: str, turn: int, attempt: int) -> str:
    """RunTask's `startedBy` of one attempt; ids are safe for it (judge_offer)."""
    return f"{work_id}/{turn}/{attempt}"


def parse_started_by(text: str) -> tuple[str, int, int] | None:
    """(work id, turn, attempt), or None for a task that is not ours."""
    name = _STARTED_BY.fullmatch(text)
    return (name[1], int(name[2]), int(name[3])) if name else None


def may_launch(record: Record, turn: int, attempt: int) -> bool:
    """Whether this attempt is due; a redelivery may go on until the arn is stored."""
    begun = record.phase is Phase.LAUNCHING and record.task_arn is None
    return (record.turn, record.attempt) == (turn, attempt) and (record.phase is Phase.HELD or begun)


def awaits_wishes(record: Record, now: int) -> bool:
    """Whether a launch may wait a little longer for a session's metadata that an API in trouble did not tell."""
    return now < (record.sandbox_wanted_since or record.turn) + WISHES_PATIENCE_MS


def granted_size(wishes: Wishes | None, config: Config) -> SizeClass | None:
    """The class that the session names, if the stack's owner lists it with an image that there is; else None."""
    size = config.size_classes.get(wishes.size) if wishes and wishes.size else None
    return size if size and config.task_definition_of(size) else None


def begin_launch(
    record: Record,
    turn: int,
    attempt: int,
    *,
    ticket_hash: str,
    now: int,
    until: int,
    wishes: Wishes | None = None,
    size: SizeClass | None = None,
) -> Record | None:
    """`launching`, written before RunTask. What the session asks for is fixed by the turn's first reading of it.

    Each try gets its full start time: how long ECS may refuse is the launch deadline's matter (launch_overdue).
    """
    if not may_launch(record, turn, attempt):
        return None
    return record.noted(
        now,
        "launching" if record.phase is Phase.HELD else "launching again",
        phase=Phase.LAUNCHING,
        wishes=record.wishes or wishes,
        size=size,
        started_by=started_by(record.work_id, turn, attempt),
        launch_until=until,
        ticket_hashes=(*record.ticket_hashes, ticket_hash)[-5:],
    )


def put_off(record: Record, why: str, now: int, *, no_room: bool) -> Record | None:
    """ECS started nothing now; the same attempt is tried again. `no_room`: elsewhere there may be some."""
    if record.phase is not Phase.LAUNCHING or record.task_arn is not None:
        return None
    return record.noted(now, f"put off: {why}", put_off=why, refusals=record.refusals + no_room)


def on_spot(record: Record, spot_weight: int) -> bool:
    """Whether this attempt asks for Spot capacity; `spot_weight` is a percentage of the attempts of no class that says.

    Drawn from the attempt's name, so that a retried launcher asks for the same. A turn that was interrupted twice, or
    for which there was no room once, goes on demand (DESIGN §7).
    """
    if record.interruptions >= MOST_INTERRUPTIONS or record.refusals:
        return False
    if record.size and record.size.spot is not None:
        return record.size.spot
    name = started_by(record.work_id, record.turn, record.attempt)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 100 < spot_weight


def subnets_to_try(record: Record, subnets: list[str]) -> list[str]:
    """All of them; after a refusal one after the other alone, each turn beginning at its own, then all again.

    ECS chooses among those given whatever room they have (FIELD_NOTES 15), so only one given alone is surely tried.
    """
    first = record.turn % len(subnets)
    choices = [subnets, *([subnet] for subnet in subnets[first:] + subnets[:first])]
    return choices[record.refusals % len(choices)]


def growing_delay(tries: int) -> int:
    """Seconds until the next try after so many that failed."""
    return min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS << max(0, min(tries - 1, 10)))


def relaunch_delay(record: Record) -> int:
    """Seconds that the launch message of this attempt waits: only where another at once would fare no better.

    Its predecessors found no room, or no image of their own, which the circuit breaker does not count, nor space
    (breaker.failed); or the API did not stop the item at the turn's end.
    """
    tries = max(record.never_started, record.unstopped, record.refused if has_own_image(record) else 0)
    return growing_delay(tries) if tries else 0


def has_own_image(record: Record) -> bool:
    """Whether its size class has an image of its own, so that its launches say nothing of the others."""
    return record.size is not None and record.size.image is not None


def is_current(record: Record, turn: int, attempt: int) -> bool:
    return record.is_live and (record.turn, record.attempt) == (turn, attempt)


def after_running(record: Record, arn: str, version: int, now: int) -> Record | None:
    """ECS says RUNNING; it may come before the launcher stored the arn."""
    if version <= record.event_version or record.phase not in (Phase.LAUNCHING, Phase.STOPPING):
        return None
    changes = {"task_arn": arn, "event_version": version}
    if record.phase is Phase.STOPPING:
        return record.model_copy(update=changes)
    return record.noted(
        now,
        "running",
        phase=Phase.RUNNING,
        running_since=now,
        served_since=record.served_since or now,
        refused_since=None,
        **changes,
    )


def launch_seconds(record: Record) -> float | None:
    """How long this attempt took from being wanted to running; None if it does not run."""
    if record.running_since is None or record.sandbox_wanted_since is None:
        return None
    return max(0, record.running_since - record.sandbox_wanted_since) / 1000


def never_ran(record: Record, exit_code: int | None) -> bool:
    """Of an attempt that ended: whether no container of it was ever started."""
    return record.phase is Phase.LAUNCHING and exit_code is None


def after_container_stopped(
    record: Record,
    diagnosis: Diagnosis,
    exit_code: int | None,
    version: int,
    *,
    now: int,
    max_attempts: int,
    hold: bool = False,
    spent: Spent | None = None,
) -> Record | None:
    """ECS says STOPPED: finish what was wanted, or relaunch while the lease is held (DESIGN §7, "Sandbox gone").

    `hold`: an attempt that never ran is made again, uncounted (breaker.keeps). `spent`: its charge, if told.
    """
    if record.dead or record.phase not in (Phase.LAUNCHING, Phase.RUNNING, Phase.STOPPING):
        return None
    told = _charged(record, spent).model_copy(update={"event_version": version, "exit_code": exit_code})
    finished = exit_code in (FINISHED, UNSERVED)  # only with its item stopped
    if record.phase is Phase.STOPPING and (finished or not stops_before_death(record)):
        outcome = record.stop_outcome
        if finished and record.stop_reason == ALREADY_STOPPED.reason:
            outcome = Outcome.UNSERVED if exit_code == UNSERVED else Outcome.COMPLETED
        elif not finished and outcome in ENDED_BY_ITSELF:
            outcome = Outcome.UNSERVED  # it left before its item was stopped: nobody looked for a last message
        post = record.post_stop and not stops_before_death(record)
        return told.noted(now, f"container dead: {diagnosis.summary}", dead=True, stop_outcome=outcome, post_stop=post)
    interrupted = diagnosis.kind is Kind.INTERRUPTED
    if finished and not (interrupted and exit_code == FINISHED):  # a SIGTERM of Spot may be answered with 0 as well
        outcome = Outcome.UNSERVED if exit_code == UNSERVED else Outcome.COMPLETED
        return _ended(told, now, StopWish("the turn ended", outcome, post=False))
    if exit_code in HOPELESS_EXITS:
        wish = StopWish(f"the sandbox gave up: {HOPELESS_EXITS[exit_code]}", Outcome.FAILED, post=True)
        return _ended(told, now, wish)
    if hold and never_ran(record, exit_code):
        return held_back(told, now, diagnosis.summary)
    if diagnosis.kind is Kind.LAUNCH_PERMANENT:
        wish = StopWish(f"{diagnosis.summary}. {diagnosis.what_to_do}", Outcome.LAUNCH_FAILED, post=True)
        return _ended(told, now, wish)
    unstopped = exit_code == NOT_STOPPED or record.phase is Phase.STOPPING
    why = "its item could not be stopped" if unstopped else record.restart_reason or diagnosis.summary
    no_room = diagnosis.kind is Kind.LAUNCH_CAPACITY  # bounded by the launch deadline
    not_ours = record.interruptions + record.never_started + record.refused + record.granted
    counted = record.attempt - not_ours - min(record.unstopped + (exit_code == NOT_STOPPED), MOST_UNSTOPPED)
    if not interrupted and not no_room and counted >= max_attempts:
        outcome = Outcome.TIMED_OUT if record.restart_reason else Outcome.FAILED
        wish = StopWish(f"attempt {record.attempt} failed: {why}", outcome, post=True)
        return _ended(told.model_copy(update={"phase": Phase.RUNNING}), now, wish)
    told = told.model_copy(update={"unstopped": record.unstopped + (exit_code == NOT_STOPPED)})
    return _next_attempt(told, now, why, interrupted=interrupted, no_room=no_room)


def _charged(record: Record, spent: Spent | None) -> Record:
    """With the attempt's charge added to those of its kind."""
    if spent is None:
        return record.model_copy(update={"spent_untold": record.spent_untold + (record.running_since is not None)})
    spent = spent.model_copy(update={"tag": record.tag})
    same = [spent, *(entry for entry in record.spent if entry.kind == spent.kind)]
    total = {"sandboxes": sum(entry.sandboxes for entry in same), "seconds": sum(entry.seconds for entry in same)}
    entries = (*(entry for entry in record.spent if entry.kind != spent.kind), spent.model_copy(update=total))
    dropped = sum(entry.sandboxes for entry in entries[:-SPENT_ENTRIES])
    return record.model_copy(update={"spent": entries[-SPENT_ENTRIES:], "spent_untold": record.spent_untold + dropped})


def _ended(record: Record, now: int, wish: StopWish) -> Record:
    stopping = want_stop(record, wish, now)
    return stopping.model_copy(update={"dead": True})


def held_back(record: Record, now: int, why: str) -> Record:
    """`held` again, as another attempt that does not count; nothing of this one runs."""
    refused = {"refused": record.refused + 1, "refused_since": record.refused_since or now, "put_off": why}
    return _next_attempt(record, now, why, interrupted=False, no_room=False).model_copy(update=refused)


def _next_attempt(record: Record, now: int, why: str, *, interrupted: bool, no_room: bool) -> Record:
    return record.noted(
        now,
        f"attempt {record.attempt} ended ({why}); relaunching",
        phase=Phase.HELD,
        attempt=record.attempt + 1,
        interruptions=record.interruptions + interrupted,
        never_started=record.never_started + no_room,
        refusals=record.refusals + no_room,
        put_off=why if no_room else None,
        sandbox_wanted_since=record.sandbox_wanted_since if no_room else now,
        started_by=None,
        task_arn=None,
        links={},
        launch_until=None,
        event_version=0,
        running_since=None,
        progress_at=None,
        waits_for=None,
        waiting_since=None,
        restart_reason=None,
        ticket_hashes=(),
        ticket_nonce_hash=None,
        ticket_used_at=None,
        callback_hash=None,
        callback_hashes_again=(),
        staging_requests=0,
        stop_reason=None,
        stop_outcome=None,
        post_stop=False,
        post_first=False,
        posting_until=None,
        stop_task_from=None,
        stop_task_sent_at=None,
    )


# --- the end (DESIGN §7) --------------------------------------------------------------------------------------

ENDED_BY_ITSELF = (Outcome.COMPLETED, Outcome.UNSERVED)
"""Outcomes whose stop is posted while the sandbox lives; else another attempt is made (docs/decisions/0006)."""


def stops_before_death(record: Record) -> bool:
    """Whether the item is to be stopped now, so that the sandbox can still look for a message that slipped in."""
    return record.post_stop and not record.dead and record.stop_outcome in ENDED_BY_ITSELF


def start_is_overdue(record: Record, now: int) -> bool:
    """Whether the attempt should run by now, and does not."""
    return record.phase is Phase.LAUNCHING and now >= (record.launch_until or now)


def wants_a_look(record: Record, now: int) -> bool:
    """Whether what ECS says of the attempt's task decides what to do next; an item to be stopped first comes first."""
    match record.phase:
        case Phase.LAUNCHING:
            return start_is_overdue(record, now)
        case Phase.RUNNING:
            return record.restart_reason is not None
        case Phase.STOPPING:
            return not record.dead and not stops_before_death(record) and now >= (record.stop_task_from or 0)
    return False


def want_stop(record: Record, wish: StopWish, now: int) -> Record:
    """`stopping`. A first reason stays; a lease that is lost or an item already stopped withdraws the post."""
    if record.phase is Phase.STOPPING:
        if wish.post or not record.post_stop:
            return record
        return record.noted(now, f"no stop will be posted: {wish.reason}", post_stop=False)
    never_ran = record.phase in (Phase.RECEIVED, Phase.HELD)
    return record.noted(
        now,
        f"stopping: {wish.reason}",
        phase=Phase.STOPPING,
        stop_reason=wish.reason,
        stop_outcome=wish.outcome,
        post_stop=wish.post and not record.lease_gone,
        stop_task_from=now + wish.grace_ms,
        dead=never_ran,
    )


def posts_now(record: Record) -> bool:
    """Whether the item is to be stopped before the sandbox is dead: a finished turn's, and one that was forced."""
    return stops_before_death(record) or (record.post_stop and record.post_first and not record.dead)


def operator_stop(record: Record, now: int, *, force: bool) -> Record | None:
    """An operator's stop; None if it changes nothing. `force`: the item first, so that the session ends at once.

    Not while the item is being claimed: a poller may just hold its ack, and the item would be stranded. It overrides
    the end of a turn that may yet need another attempt (stops_before_death), and no other reason.
    """
    if not record.is_live or record.phase is Phase.RECEIVED:
        return None
    after = want_stop(record, OPERATOR_STOP, now)
    if stops_before_death(record):
        wish = OPERATOR_STOP
        after = record.noted(now, f"stopping: {wish.reason}", stop_reason=wish.reason, stop_outcome=wish.outcome)
    if force and after.post_stop and not after.post_first:
        after = after.noted(now, "forced: the item is stopped first", post_first=True)
    return None if after is record else after


def operator_retry(record: Record, now: int) -> Record | None:
    """An operator's wish for another try, uncounted; None where there is nothing to try again.

    A sandbox that runs is stopped and succeeded, as one that hangs. A launch that waits gets its whole deadline anew.
    """
    if record.phase is Phase.RUNNING and record.task_arn and not record.restart_reason:
        reason = "restarted by an operator"
        return record.noted(now, reason, restart_reason=reason, granted=record.granted + 1)
    if waits_for_launch(record):
        return record.noted(now, "another try asked for by an operator", sandbox_wanted_since=now)
    return None


def waits_for_launch(record: Record) -> bool:
    """A turn that wants a sandbox and has no task yet."""
    return record.phase is Phase.HELD or (record.phase is Phase.LAUNCHING and record.task_arn is None)


def give_up_launch(record: Record, wish: StopWish, now: int) -> Record:
    """A retry may follow a task that did start: its death is proved by the stopper, from now on."""
    return want_stop(record, wish, now).model_copy(update={"launch_until": now})


def launch_overdue(record: Record, config: Config, now: int) -> StopWish | None:
    """The launch deadline: a turn that no task serves, and that ECS has put off or nobody launched for too long."""
    since = record.sandbox_wanted_since or record.turn
    if not waits_for_launch(record) or now < since + config.launch_timeout_seconds * 1000:
        return None
    why = f": {record.put_off}" if record.put_off else ""
    reason = f"no sandbox could be started within {config.launch_timeout_seconds} s{why}"
    return StopWish(reason, Outcome.LAUNCH_FAILED, post=True)


def overdue(record: Record, config: Config, now: int) -> StopWish | None:
    """The turn's wall clock: it runs on over its attempts, from the first sandbox that ran.

    Relaunches that never ran get what their starts may take on top; interruptions alone would repeat them for ever.
    """
    if record.phase not in (Phase.HELD, Phase.LAUNCHING, Phase.RUNNING):
        return None
    limit = (record.size and record.size.wall) or config.session_timeout_seconds
    began = record.served_since or record.running_since  # the latter in records of earlier versions
    if began is None:
        if record.attempt == 1 or record.refused:
            return None  # the start deadline's, the circuit breaker's
        began, limit = record.turn, limit + config.max_attempts * config.start_timeout_seconds
    if now < began + limit * 1000:
        return None
    return StopWish("the turn's wall-clock limit is reached", Outcome.TIMED_OUT, post=True)


def needs_stopper(entry: LiveEntry, config: Config, now: int) -> bool:
    """The turn's number is its start in epoch ms, so deadlines need no read of the record here."""
    match entry.phase:
        case Phase.STOPPING:
            return True
        case Phase.HELD:
            return now - entry.turn >= min(config.launch_timeout_seconds, config.shortest_wall_seconds) * 1000
        case Phase.LAUNCHING:
            return now - entry.turn >= min(config.start_timeout_seconds, config.launch_timeout_seconds) * 1000
        case Phase.RUNNING:
            return now - entry.turn >= config.shortest_wall_seconds * 1000
    return False


def ended_too_soon(record: Record, now: int) -> bool:
    """A sandbox that says "finished" within seconds may have done nothing (FIELD_NOTES 2)."""
    clean = record.exit_code in (FINISHED, UNSERVED) and record.running_since is not None
    return clean and now - (record.running_since or now) < TOO_SOON_MS


def may_be_taken_as_dead(record: Record, now: int) -> bool:
    """Nothing found by arn and by `startedBy` proves death only two rounds past `launch_until` (DESIGN §4)."""
    return now >= (record.launch_until or record.turn) + 2 * ROUND_MS


def closed(record: Record, now: int, *, retention_seconds: int, outcome: Outcome | None = None) -> Record:
    """`stopped`: the secret goes, the TTL is set, the record leaves the live index."""
    ended = outcome or record.stop_outcome or Outcome.STOPPED
    return record.noted(
        now,
        f"stopped: {ended}",
        phase=Phase.STOPPED,
        outcome=ended,
        reason=record.stop_reason,
        secret=None,
        shard=None,
        claim_owner="",
        claim_until=0,
        ticket_hashes=(),
        ticket_nonce_hash=None,
        callback_hash=None,
        callback_hashes_again=(),
        expires_at=now // 1000 + retention_seconds,
    )


# --- sweeping (DESIGN §10) ------------------------------------------------------------------------------------


def is_orphan(record: Record | None, turn: int, attempt: int, arn: str) -> bool:
    """Whether a task that is meant to run serves no live record: a past attempt's, or a twin of the current one's."""
    if record is None or not is_current(record, turn, attempt):
        return True
    return record.task_arn is not None and record.task_arn != arn


def is_stranded(work: "Work", record: Record | None, now: int) -> bool:
    """Unfinished at the API, unattended for longer than any lease lives, and no live record of ours (W§6.4)."""
    if work.state not in ("starting", "active", "stopping") or (record is not None and record.is_live):
        return False
    told = (work.acknowledged_at, work.latest_heartbeat_at, work.stop_requested_at)
    moments = [moment for text in told if (moment := server_time(text)) is not None]
    return bool(moments) and now - max(moments) * 1000 >= STRAND_AGE_MS


def hash_secret(secret: str) -> str:
    """What is stored of a ticket, nonce or callback secret: 256 random bits need no salt."""
    return hashlib.sha256(secret.encode()).hexdigest()
