"""Claims work without stranding it: poll, put, ack, claim, hold, send (DESIGN §5). The rules are lifecycle's."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event, Lock

from shared import breaker, lifecycle
from shared.config import SHARD, Config
from shared.launch_queue import LaunchQueue
from shared.lifecycle import Offer, Verdict
from shared.log import log, log_fields
from shared.loop import LeaseLoop
from shared.metrics import Metric, emit
from shared.record import Breaker, Lease, LiveEntry, Outcome, Phase, Record
from shared.store import Conflict, Store, change
from shared.stored_key import StoredKey
from shared.work_api import (
    NO_HEARTBEAT,
    Gone,
    LeaseLost,
    NotAllowed,
    NotQueued,
    TryAgain,
    Work,
    WorkApi,
    WorkApiError,
)

LONGEST_BLOCK_MS = 999
AT_ONCE = 16  # a burst's polls end with its slots, below the 1,200 reads of a minute (W§11.1); a 429 ends it too
_CLAIM_TRIES = 3
_LOOP_SEEN_MS = 2_000
_RESEND_AFTER_MS = 120_000
_TAKES_MS = 30_000  # what is begun later could outlive the run


@dataclass
class Claimer:
    """One poller run's parts."""

    config: Config
    api: WorkApi
    key: StoredKey
    store: Store
    queue: LaunchQueue
    loop: LeaseLoop
    now: Callable[[], int]  # epoch milliseconds
    sleep: Callable[[float], None] = time.sleep
    _loop_seen_at: int = field(default=0, init=False)

    def run(self, owner: str, until: int) -> int:
        """Repair, then poll for `PollWindowSeconds` (0: until the queue is empty); returns how many are now held.

        `until` is the function's own deadline: the claim locks end with it, and polling stops early enough before.
        """
        self.key()  # an absent key is reported before anything is done
        entries = self.store.live(SHARD)
        if entries:
            self._ensure_loop()
        repaired = self.repair_stuck(entries, owner, until)
        gate = self.store.breaker()
        self._probe(gate, entries)
        if gate.paused:
            log.info("paused by hand: nothing new is claimed", live=len(entries), drained=not entries)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            slots = _Slots(breaker.slots(gate, entries, max(0, self.config.max_sessions - len(entries))))
            window_ms = self.config.poll_window_seconds * 1000
            last = min(self.now() + window_ms, until - _TAKES_MS) if window_ms else until - _TAKES_MS
            return repaired + self._poll_until(pool, slots, owner, last, until)

    def _probe(self, gate: Breaker, entries: list[LiveEntry]) -> None:
        """While the circuit breaker is open, the one launch a minute that shows whether its cause is mended."""
        if gate.opened_at is not None:
            emit(Metric.BREAKER_OPEN)
            log.warning("circuit breaker open: work waits in the server's queue", reason=gate.reason)
        entry = breaker.next_probe(gate, entries, self.now())
        record = self.store.get(entry.work_id) if entry else None
        if record is None or record.phase is not Phase.HELD:
            return
        try:
            self.store.save_breaker(breaker.probing(gate, record, self.now()))
        except Conflict:
            return  # another run probes, or it was closed meanwhile
        self.queue.send(record)
        log.info("probing whether launches work again", **log_fields(record))

    def _poll_until(self, pool: ThreadPoolExecutor, slots: "_Slots", owner: str, last: int, until: int) -> int:
        """One long poll at a time while idle; from the first item to the first empty answer many at once."""
        claimed = 0
        window = self.config.poll_window_seconds
        while True:
            if not slots.take():
                log.info("no slot is free; work waits in the server's queue", count=self.config.max_sessions)
                return claimed
            work = self._poll(LONGEST_BLOCK_MS if window else None)
            if work is not None:
                empty = Event()
                first = pool.submit(self._serve, work, slots, owner, until)
                others = [pool.submit(self._drain, slots, empty, owner, last, until) for _ in range(AT_ONCE - 1)]
                claimed += first.result() + sum(other.result() for other in others)
            else:
                slots.give_back()
            if self.now() >= last or (not window and (work is None or empty.is_set())):
                return claimed

    def _drain(self, slots: "_Slots", empty: Event, owner: str, last: int, until: int) -> int:
        """Poll and claim, beside others, until the queue is empty; returns how many are now held."""
        held = 0
        while not empty.is_set() and self.now() < last and slots.take():
            work = self._poll(None)
            if work is None:
                empty.set()
                slots.give_back()
            else:
                held += self._serve(work, slots, owner, until)
        return held

    def _poll(self, block_ms: int | None) -> Work | None:
        """None: the queue is empty, or the API busy."""
        try:
            return self.api.poll(block_ms=block_ms)
        except NotAllowed:
            self.key.forget()
            emit(Metric.KEY_REFUSED)
            raise
        except TryAgain as error:
            log.warning("poll failed; the next run tries again", error=error.message)
            self.sleep(min(error.wait_seconds or 1.0, 5.0))
            return None

    def _serve(self, work: Work, slots: "_Slots", owner: str, until: int) -> bool:
        """Whether the item is now held; if not, its slot is free again."""
        held = self._safely(work.id, lambda: self._take(work, owner, until))
        if not held:
            slots.give_back()
        return held

    def _safely(self, work_id: str, step: Callable[[], bool]) -> bool:
        """One item's fault holds up no other; what it left is repaired by the next run."""
        try:
            return step()
        except Conflict as conflict:
            log.info("left to the actor that got there first", work_id=work_id, reason=str(conflict))
        except WorkApiError as error:
            log.warning("claiming an item failed; the next run repairs it", work_id=work_id, error=error.message)
        except Exception:  # noqa: BLE001  one fault holds up no other; unknown errors retry (FIELD_NOTES 5)
            log.exception("claiming an item failed in a way not known here; the next run repairs it", work_id=work_id)
        return False

    def _take(self, work: Work, owner: str, until: int) -> bool:
        record = self.store.get(work.id)
        hand_over = self.config.hand_over_environment_key
        match lifecycle.judge_offer(record, work, self.now(), hand_over_key=hand_over):
            case Offer.REFUSE:
                reason = f"no usable secret or id; its type is {work.data.type}"
                log.error("item left unacked", work_id=work.id, session_id=work.data.id, reason=reason)
                return False
            case Offer.LEAVE:
                return False
            case Offer.MARK:
                marked = change(
                    self.store,
                    work.id,
                    lambda r: (
                        None
                        if r.lease_gone
                        else r.noted(self.now(), "offered again: the lease is gone", lease_gone=True, post_stop=False)
                    ),
                )
                if marked is not None:
                    log.warning("offered again while live: its lease is gone", **log_fields(marked))
                return False
            case Offer.CLAIM:
                fresh = lifecycle.open_turn(record, work, now=self.now(), owner=owner, until=until, shard=SHARD)
                saved = self.store.save(fresh)
                log.info("received", **log_fields(saved))
                self._ensure_loop()
                return self.claim(saved, repair=False)
        return False

    def _ensure_loop(self) -> None:
        """After a record was made live. A burst looks but once: a loop that runs goes on for three empty rounds."""
        if self.now() - self._loop_seen_at > _LOOP_SEEN_MS:
            self.loop.ensure(SHARD)
            self._loop_seen_at = self.now()

    def repair_stuck(self, entries: list[LiveEntry], owner: str, until: int) -> int:
        """Repair every entry in `received` or `held` that time allows; returns how many go on. Poller and janitor.

        While the circuit breaker is open, a held item waits for its probe.
        """
        is_open = self.store.breaker().opened_at is not None
        phases = (Phase.RECEIVED,) if is_open else (Phase.RECEIVED, Phase.HELD)
        stuck = [e.work_id for e in entries if e.phase in phases]
        last = until - _TAKES_MS

        def repair(work_id: str) -> bool:
            return self.now() < last and self._safely(work_id, lambda: self.repair(work_id, owner, until))

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return sum(pool.map(repair, stuck))

    def repair(self, work_id: str, owner: str, until: int) -> bool:
        """Go on with what a crash left in `received` or `held`."""
        now = self.now()
        record = self.store.get(work_id)
        if record is None:
            return False
        wait = _RESEND_AFTER_MS + lifecycle.relaunch_delay(record) * 1000
        if record.phase is Phase.HELD and now - record.timeline[-1].at > wait:
            self.queue.send(record)
            log.warning("launch message sent again", **log_fields(record))
            return True
        if record.phase is not Phase.RECEIVED or record.claim_until > now:
            return False
        locked = self.store.save(record.noted(now, "repairing", claim_owner=owner, claim_until=until))
        log.warning("claiming what a run left behind", **log_fields(locked))
        return self.claim(locked, repair=True)

    def claim(self, record: Record, *, repair: bool) -> bool:
        """Ack, claim, hold and send an item whose claim lock is ours.

        `repair`: no offer has just proved the item queued, so a 409 may speak of our own ack before a crash.
        """
        if record.acknowledged_at is None:
            try:
                reply = self.api.ack(record.work_id)
                record = self.store.save(lifecycle.acked(record, reply.acknowledged_at, self.now()))
            except NotQueued:
                if not repair:
                    return self._close(record, Outcome.NOT_OURS)
            except Gone:
                return self._close(record, Outcome.LOST)
            except TryAgain as error:
                if not error.maybe_done:
                    return False  # still queued: it is offered again
        return self._claim_lease(record) if record.kind == "session" else self._stop_without_sandbox(record)

    def _stop_without_sandbox(self, record: Record) -> bool:
        """An item that is no session (W§10). Without our own ack's 200 it may be another's, so it is claimed first."""
        if record.acknowledged_at is None:
            try:
                claimed = self.api.heartbeat(record.work_id, NO_HEARTBEAT).state == "active"
            except LeaseLost:
                claimed = False
            if not claimed:
                return self._close(record, Outcome.NOT_OURS)
        self.api.stop(record.work_id, force=True)
        reason = f"its type is {record.kind}"
        log.info("item that needs no sandbox acked and stopped", **log_fields(record), reason=reason)
        return self._close(record, Outcome.NO_SANDBOX)

    def _claim_lease(self, record: Record) -> bool:
        ttl = self.config.lease_ttl_seconds
        for attempt in range(_CLAIM_TRIES):
            sent_at = self.now()
            try:
                beat = self.api.heartbeat(record.work_id, NO_HEARTBEAT, desired_ttl_seconds=ttl)
            except LeaseLost as lost:
                state = lost.current_state
                match lifecycle.judge_claim_refusal(record, state, ttl):
                    case Verdict.OURS if state and state.last_heartbeat:
                        granted = state.ttl_seconds or ttl
                        lease = lifecycle.recognised_lease(record, state.last_heartbeat, granted, self.now())
                        return self._hold(record, self._extended(lease))
                    case Verdict.LOST:
                        return self._close(record, Outcome.NOT_OURS)
                    case Verdict.OVER:
                        return self._close(record, Outcome.STOPPED)
            except Gone:
                return self._close(record, Outcome.LOST)
            except TryAgain as error:
                log.warning("claim not answered; trying again", **log_fields(record), error=error.message)
                self.sleep(min(error.wait_seconds or 2.0**attempt / 2, 5.0))
            else:
                if beat.state == "active" and beat.lease_extended:
                    longest_ms = self.config.beat_interval_seconds * 1000
                    return self._hold(record, lifecycle.first_lease(record, beat, sent_at, longest_ms=longest_ms))
                if beat.state == "stopping" and record.acknowledged_at:
                    self.api.stop(record.work_id, force=True)  # stopped before anyone claimed it (W§7.1)
                return self._close(record, Outcome.STOPPED)
        return False

    def _extended(self, lease: Lease) -> Lease:
        """A lease that a crash left may be nearly over, so it is beaten at once; a failure changes nothing."""
        sent_at, longest_ms = self.now(), self.config.beat_interval_seconds * 1000
        try:
            beat = self.api.heartbeat(lease.work_id, lease.value, desired_ttl_seconds=self.config.lease_ttl_seconds)
        except WorkApiError as error:
            log.warning("beat not answered", **log_fields(lease), error=error.message)
            return lease
        result = lifecycle.after_beat(lease, beat, sent_at, longest_ms=longest_ms)
        return result.lease if result.accepted and result.wish is None else lease  # a wish is the keeper's to see

    def _hold(self, record: Record, lease: Lease) -> bool:
        try:
            self.store.save_lease(lease, None)
        except Conflict:
            stored = self.store.get_leases([record.work_id]).get(record.work_id)
            if stored is None or stored.turn != record.turn:
                raise
            self.store.save_lease(lease, stored)
        held = self.store.save(lifecycle.held(record, self.now()))
        self.queue.send(held)
        waited = lifecycle.pickup_seconds(held, self.now())
        emit(Metric.PICKUP_LATENCY, waited or 0)
        log.info("held", **log_fields(held), pickup_seconds=waited)
        return True

    def _close(self, record: Record, outcome: Outcome) -> bool:
        closed = self.store.save(
            lifecycle.closed(record, self.now(), retention_seconds=self.config.retention_seconds, outcome=outcome)
        )
        log.info("turn closed without a sandbox", **log_fields(closed), outcome=outcome)
        return False


class _Slots:
    """How many more sessions this run may take on; looked up before polling, so that no claimed item waits."""

    def __init__(self, free: int) -> None:
        self._free, self._lock = free, Lock()

    def take(self) -> bool:
        """One of them, if there is any."""
        with self._lock:
            if not self._free:
                return False
            self._free -= 1
            return True

    def give_back(self) -> None:
        with self._lock:
            self._free += 1
