"""The circuit breaker (DESIGN §6): its rules first, pure, then the two words that launches have for it.

It opens when launches fail in a row for a reason that no retry cures. What it keeps is `record.Breaker`.
"""

from collections.abc import Iterable

from shared.config import Config
from shared.diagnose import NO_IMAGE
from shared.lifecycle import has_own_image, started_by
from shared.log import log
from shared.record import Breaker, LiveEntry, Phase, Record
from shared.store import Store, change_breaker

FAILURES_TO_OPEN = 3
PROBE_EVERY_MS = 55_000  # a minute of the poller's schedule, which is not to the second
_WAITING = (Phase.RECEIVED, Phase.HELD, Phase.LAUNCHING)


# --- rules: times are epoch milliseconds ----------------------------------------------------------------------


def after_failure(breaker: Breaker, reason: str, now: int) -> Breaker:
    """One more launch in a row that no retry cures."""
    failures = breaker.failures + 1
    opens = failures >= FAILURES_TO_OPEN and breaker.opened_at is None
    changes = {"opened_at": now, "probe_at": now} if opens else {}
    return breaker.model_copy(update={"failures": failures, "reason": reason, **changes})


def after_running(breaker: Breaker) -> Breaker | None:
    """A sandbox runs: launches work. None if nothing was wrong."""
    if not breaker.failures and breaker.opened_at is None:
        return None
    return Breaker(paused=breaker.paused, revision=breaker.revision)


def switched(breaker: Breaker, *, paused: bool) -> Breaker | None:
    """An operator's pause, which nothing but an operator ends. None if it is so already."""
    return None if breaker.paused is paused else breaker.model_copy(update={"paused": paused})


def slots(breaker: Breaker, entries: Iterable[LiveEntry], free: int) -> int:
    """How many of the free slots may be claimed for: none while paused; while open one, if there is none to probe."""
    if breaker.paused:
        return 0
    if breaker.opened_at is None:
        return free
    return 0 if any(entry.phase in _WAITING for entry in entries) else min(free, 1)


def next_probe(breaker: Breaker, entries: Iterable[LiveEntry], now: int) -> LiveEntry | None:
    """The oldest held item (a turn's number is its start), once a minute while open."""
    if breaker.opened_at is None or now < breaker.probe_at + PROBE_EVERY_MS:
        return None
    held = [entry for entry in entries if entry.phase is Phase.HELD]
    return min(held, key=lambda entry: entry.turn) if held else None


def probing(breaker: Breaker, record: Record, now: int) -> Breaker:
    """Lets this attempt alone be launched."""
    return breaker.model_copy(update={"probe": _name(record), "probe_at": now})


def admits(breaker: Breaker, record: Record) -> bool:
    """Whether a launch may go on: while open the probe's, and one that has begun."""
    return breaker.opened_at is None or record.phase is not Phase.HELD or breaker.probe == _name(record)


def holds(breaker: Breaker, record: Record, now: int, max_hold_seconds: int) -> bool:
    """Whether an item whose launch failed is kept for another try rather than given up.

    The time counts from its own first failure, and from the opening for one that waited behind the probe.
    """
    since = [now if record.refused_since is None else record.refused_since]
    if breaker.opened_at is not None:
        since.append(max(breaker.opened_at, record.turn))
    return now < min(since) + max_hold_seconds * 1000


def suspends(breaker: Breaker, record: Record, now: int, max_hold_seconds: int) -> bool:
    """Whether the launch deadline of this item is suspended: only while open."""
    return breaker.opened_at is not None and holds(breaker, record, now, max_hold_seconds)


def _name(record: Record) -> str:
    return started_by(record.work_id, record.turn, record.attempt)


# --- told by launcher, observer and stopper -------------------------------------------------------------------


def keeps(store: Store, config: Config, record: Record, now: int, *, refused: bool) -> bool:
    """Whether an attempt that never ran is made again uncounted. `refused`: for a reason that no retry cures.

    While open any other counts as little: hours of probes would use up MaxAttempts by mere stalls.
    """
    rule = holds if refused else suspends
    return rule(store.breaker(), record, now, config.breaker_max_hold_seconds)


def failed(store: Store, record: Record, reason: str, now: int) -> None:
    """A launch failed for this reason, which no retry cures. Raises Conflict.

    Not counted if its size class has an image of its own: a session's metadata chose it, and must not stop the others.
    """
    if has_own_image(record):
        return
    after = change_breaker(store, lambda breaker: after_failure(breaker, reason, now))
    if after is not None and after.failures == FAILURES_TO_OPEN:
        log.error("circuit breaker open: nothing is claimed, one launch a minute is tried", reason=reason)


def ran(store: Store, record: Record) -> None:
    """A sandbox reached RUNNING. Raises Conflict.

    One with an image of its own says nothing of the image that is missing for the others.
    """
    before = store.breaker()
    if has_own_image(record) and NO_IMAGE in before.reason:
        return
    if after_running(before) is None or change_breaker(store, after_running) is None:
        return
    if before.opened_at is not None:
        log.info("circuit breaker closed: a sandbox runs", reason=before.reason)
