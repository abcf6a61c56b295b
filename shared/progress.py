"""What a session's newest events say of its progress, and what follows for its record. Pure; no I/O, no clock reads.

A heartbeat is not progress (FIELD_NOTES 3, 4, 26). All times are epoch milliseconds.
"""

from dataclasses import dataclass

from shared import lifecycle
from shared.record import Phase, Record
from shared.work_api import EventPage, SessionEvent

ROUND_MS = 300_000  # the janitor's; what moved by less is not written
CONFIRMATION, CUSTOM_TOOL, ACTION = "a tool's confirmation", "a custom tool's result", "an action"
# A user may send these to a session whose sandbox hangs; one that works follows with events of its own.
_NO_PROGRESS = frozenset({"user.message", "user.interrupt"})
_STATUSES = frozenset({"session.status_idle", "session.status_running", "session.status_rescheduled"})
_OVER = frozenset({"session.status_terminated", "session.deleted"})


@dataclass(frozen=True)
class Progress:
    """`at`: the last sign of progress. `waits_for`: what only somebody outside the sandbox can give, `since` when.

    `idle`: there is nothing to do, or the session is over.
    """

    at: int
    idle: bool = False
    waits_for: str | None = None
    since: int | None = None


def read_progress(page: EventPage) -> Progress | None:
    """None if these events do not tell, as when a server answers its oldest.

    Without a status among them the session is taken to be at work. Idle with `requires_action` is how every tool call
    waits for its sandbox (W§11.2): whether it waits for a person is told by the calls that it names. One that is not
    among these events is taken for a person's: nothing is stopped.
    """
    newest_first = _newest_first(page)
    signs = [at for e in newest_first if e.type not in _NO_PROGRESS and (at := _time(e)) is not None]
    if not signs:
        return None
    at = max(signs)
    status = next((e for e in newest_first if e.type in _STATUSES | _OVER), None)
    if status is None or status.type in ("session.status_running", "session.status_rescheduled"):
        return Progress(at)
    reason = status.stop_reason
    if status.type in _OVER or reason is None or reason.type != "requires_action":
        return Progress(at, idle=True)
    waits_for = _wait_for_people(newest_first, reason.event_ids)
    return Progress(at, waits_for=waits_for, since=_time(status) or at) if waits_for else Progress(at)


def _newest_first(page: EventPage) -> tuple[SessionEvent, ...]:
    """Empty if it is the oldest page of several."""
    times = [at for event in page.data if (at := _time(event)) is not None]
    if not times or times[0] >= times[-1]:
        return page.data
    return () if page.next_page else page.data[::-1]


def _wait_for_people(events: tuple[SessionEvent, ...], blocking: tuple[str, ...]) -> str | None:
    """None as soon as one call is the sandbox's to answer, or all are answered."""
    calls = {event.id: event for event in events}
    answered = {event.tool_use_id or event.custom_tool_use_id for event in events if event.type.endswith("_result")}
    confirmed = {event.tool_use_id for event in events if event.type == "user.tool_confirmation"}
    waits: str | None = None
    for event_id in blocking:
        call = calls.get(event_id)
        if event_id in answered:
            continue
        if call is None:
            waits = waits or ACTION
        elif call.type == "agent.custom_tool_use":
            waits = CUSTOM_TOOL
        elif call.evaluated_permission == "ask" and event_id not in confirmed:
            waits = CONFIRMATION
        else:
            return None
    return waits


def _time(event: SessionEvent) -> int | None:
    at = lifecycle.server_time(event.processed_at)
    return None if at is None else int(at * 1000)


def silent_ms(record: Record, progress: Progress, now: int) -> int:
    """How long this attempt has owed a sign of progress; 0 while it owes none."""
    if progress.idle or progress.waits_for:
        return 0
    return max(0, now - max(progress.at, record.running_since or now))


def after_look(record: Record, progress: Progress, now: int, stall_ms: int) -> Record | None:
    """The record as it should be now, or None if it may stay; `stall_ms` 0 stops nothing.

    A hung sandbox gets `restart_reason`: the stopper stops it, and its death brings the next attempt.
    """
    if record.phase is not Phase.RUNNING or record.restart_reason:
        return None
    after = record
    if progress.waits_for != record.waits_for:
        told = f"waits for {progress.waits_for}" if progress.waits_for else f"waits no longer for {record.waits_for}"
        after = after.noted(now, told, waits_for=progress.waits_for, waiting_since=progress.since)
    silent = silent_ms(record, progress, now)
    if stall_ms and silent >= stall_ms:
        reason = f"no progress for {silent // 60_000} min"
        after = after.noted(now, f"the sandbox hangs: {reason}", restart_reason=reason)
    moved = record.progress_at is None or progress.at - record.progress_at > ROUND_MS
    if after is record and not moved:
        return None
    return after.model_copy(update={"progress_at": progress.at})
