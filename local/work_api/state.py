"""The work queue's state machine at W§15's defaults; no HTTP, no sessions, no clock of its own.

Facts and section numbers (W§n) are WORK_API.md's. Where W says that no source answers, the rule's comment
says "invented".
"""

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

NO_HEARTBEAT = "NO_HEARTBEAT"
DEFAULT_TTL_SECONDS, LEAST_TTL_SECONDS, MOST_TTL_SECONDS = 300, 10, 600  # the bounds are invented (W§6.2)
DEFAULT_RECLAIM_MS = 5000
WORKER_SEEN_SECONDS = 30
DEFAULT_LIMIT, MOST_LIMIT = 20, 100
MOST_KEYS, LONGEST_KEY, LONGEST_VALUE = 16, 64, 512

_MICROSECOND = timedelta(microseconds=1)


class Refusal(Exception):
    """A call that the API refuses: the status, and what the error envelope holds (W§11.1)."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.details = status, message, type, details


def not_found(what: str) -> Refusal:
    """The refusal of an id that does not exist."""
    return Refusal(404, f"{what} was not found.", type="not_found_error")


def timestamp(moment: datetime | None) -> str | None:
    """RFC 3339 in UTC with six fractional digits (W§2)."""
    return None if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass
class Item:
    """A work item. `started_at` is when it was last queued (W§2); `polled_at` when it was last handed out."""

    id: str
    environment_id: str
    data_type: str
    number: int
    created_at: datetime
    started_at: datetime
    state: str = "queued"
    polled_at: datetime | None = None
    acknowledged_at: datetime | None = None
    latest_heartbeat_at: datetime | None = None
    stop_requested_at: datetime | None = None
    stopped_at: datetime | None = None
    ttl_seconds: int = DEFAULT_TTL_SECONDS
    metadata: dict[str, str] = field(default_factory=dict)

    def body(self, secret: str | None = None) -> dict[str, Any]:
        """The item's 14 keys as the API shows them; the secret comes only with a poll's reply (W§2)."""
        return {
            "type": "work",
            "id": self.id,
            "environment_id": self.environment_id,
            "data": {"type": self.data_type, "id": self.id},
            "state": self.state,
            "created_at": timestamp(self.created_at),
            "acknowledged_at": timestamp(self.acknowledged_at),
            "started_at": timestamp(self.started_at),
            "latest_heartbeat_at": timestamp(self.latest_heartbeat_at),
            "stop_requested_at": timestamp(self.stop_requested_at),
            "stopped_at": timestamp(self.stopped_at),
            "metadata": dict(self.metadata),
            "secret": secret,
            "actor": None,
        }


class WorkQueue:
    """One environment's items. Expired leases are settled at every read and call, never in between (W§15)."""

    def __init__(self, environment_id: str, now: Callable[[], datetime]) -> None:
        self.environment_id = environment_id
        self._now = now
        self._items: dict[str, Item] = {}
        self._last_stamp: datetime | None = None
        self._workers: dict[str, datetime] = {}

    def items(self) -> list[Item]:
        """Every item, oldest first."""
        self._settle()
        return list(self._items.values())

    def get(self, work_id: str) -> Item:
        """Raises Refusal 404 for an unknown id."""
        self._settle()
        if work_id not in self._items:
            raise not_found(f"Work item {work_id}")
        return self._items[work_id]

    def enqueue(self, work_id: str, data_type: str = "session") -> Item:
        """A new item whose id is also its data's id (W§2)."""
        now = self._now()
        item = Item(work_id, self.environment_id, data_type, len(self._items), now, now)
        self._items[work_id] = item
        return item

    def message_arrived(self, work_id: str) -> bool:
        """A message to the item's session: a stopped item is queued again, any other left alone (W§3)."""
        item = self.get(work_id)
        if item.state != "stopped":
            return False
        self._queue_again(item)
        return True

    def poll(self, reclaim_older_than_ms: int = DEFAULT_RECLAIM_MS, worker_id: str | None = None) -> Item | None:
        """The oldest queued item that is not handed out, or was so too long ago; it stays queued (W§5.1)."""
        self._settle()
        now = self._now()
        if worker_id:
            self._workers[worker_id] = now
        reclaim = timedelta(milliseconds=reclaim_older_than_ms)
        free = [
            item
            for item in self._items.values()
            if item.state == "queued" and (item.polled_at is None or now - item.polled_at > reclaim)
        ]
        if not free:
            return None
        item = min(free, key=lambda item: (item.started_at, item.number))
        item.polled_at = now
        return item

    def ack(self, work_id: str) -> Item:
        """queued -> starting; Refusal 409 from any other state, also to the same worker (W§5.2)."""
        item = self.get(work_id)
        if item.state != "queued":
            raise Refusal(
                409,
                f"Work item {item.id} must be in QUEUED state to acknowledge. Current state: {item.state}.",
            )
        item.state, item.acknowledged_at = "starting", self._stamp()
        return item

    def heartbeat(
        self, work_id: str, expected: str | None = None, desired_ttl_seconds: int | None = None
    ) -> dict[str, Any]:
        """Claim (`NO_HEARTBEAT`), extend (the last value), or either if omitted (W§4, W§6).

        Raises Refusal 412 if the item does not hold the expected value; not compared once it stops.
        """
        item = self.get(work_id)
        if item.state in ("stopping", "stopped"):
            return self._beat_reply(item, extended=False)
        actual = timestamp(item.latest_heartbeat_at)
        claims = expected == NO_HEARTBEAT and item.state == "starting"
        if not (expected is None or claims or (actual is not None and expected == actual)):
            raise self._precondition_failed(item, expected)
        if item.acknowledged_at is None:  # a beat without an expected value also acks (W§6.2)
            item.acknowledged_at = self._stamp()
        if desired_ttl_seconds is not None:
            item.ttl_seconds = min(max(desired_ttl_seconds, LEAST_TTL_SECONDS), MOST_TTL_SECONDS)
        else:
            item.ttl_seconds = DEFAULT_TTL_SECONDS
        item.state, item.latest_heartbeat_at = "active", self._stamp()
        return self._beat_reply(item, extended=True)

    def stop(self, work_id: str, *, force: bool = False) -> Item:
        """Never refused (W§7.1). Graceful on an item nobody acked stops it at once (invented)."""
        item = self.get(work_id)
        if item.state == "stopped" or (item.state == "stopping" and not force):
            return item
        now = self._now()
        item.stop_requested_at = item.stop_requested_at or now
        if force or item.state == "queued":
            item.state, item.stopped_at = "stopped", now
        else:
            item.state = "stopping"
        return item

    def update(self, work_id: str, patch: Any) -> Item:
        """Strings set, null deletes, other keys stay; Refusal 400 for a bad patch (W§7.2)."""
        item = self.get(work_id)
        if patch is None:
            return item
        if not isinstance(patch, dict):
            raise _bad_metadata("metadata must be an object of strings and nulls")
        merged = dict(item.metadata)
        for key, value in patch.items():
            if value is None:
                merged.pop(key, None)
            elif not isinstance(value, str):
                raise _bad_metadata("a metadata value must be a string or null")
            elif not 1 <= len(key) <= LONGEST_KEY or len(value) > LONGEST_VALUE:
                raise _bad_metadata(f"a key has 1-{LONGEST_KEY} characters, a value up to {LONGEST_VALUE}")
            else:
                merged[key] = value
        if len(merged) > MOST_KEYS:
            raise _bad_metadata(f"an item has at most {MOST_KEYS} metadata keys")
        item.metadata = merged
        return item

    def list(self, limit: int = DEFAULT_LIMIT, page: str | None = None) -> dict[str, Any]:
        """One page, newest first (W§9; the order is invented). Refusal 400 for a bad limit or cursor."""
        if not 1 <= limit <= MOST_LIMIT:
            raise Refusal(400, f"limit must be between 1 and {MOST_LIMIT}.")
        before = _number_in(page) if page is not None else len(self._items)
        rest = [item for item in reversed(self.items()) if item.number < before]
        shown = rest[:limit]
        more = len(rest) > limit
        return {
            "data": [item.body() for item in shown],
            "next_page": _cursor(shown[-1].number) if more else None,
        }

    def stats(self) -> dict[str, Any]:
        """Queued items by whether a poll has handed them out; acked ones are in neither count (W§9)."""
        queued = [item for item in self.items() if item.state == "queued"]
        pending = sum(item.polled_at is not None for item in queued)
        seen_since = self._now() - timedelta(seconds=WORKER_SEEN_SECONDS)
        return {
            "type": "work_queue_stats",
            "depth": len(queued) - pending,
            "pending": pending,
            "oldest_queued_at": timestamp(min((item.started_at for item in queued), default=None)),
            "workers_polling": sum(seen >= seen_since for seen in self._workers.values()),
        }

    def take_lease(self, work_id: str) -> Item:
        """In one step the present lease lapses and a foreign holder acks and claims (W§6.4).

        Raises Refusal 409 for an item that is stopping or stopped: nobody could claim it.
        """
        item = self.get(work_id)
        if item.state in ("stopping", "stopped"):
            raise Refusal(409, f"Work item {work_id} is {item.state}: its lease cannot be taken.")
        self._queue_again(item)
        item.polled_at = self._now()
        self.ack(work_id)
        self.heartbeat(work_id, NO_HEARTBEAT)
        return item

    def _settle(self) -> None:
        now = self._now()
        for item in self._items.values():
            beat = item.latest_heartbeat_at
            if item.state == "active" and beat and now > beat + timedelta(seconds=item.ttl_seconds):
                self._queue_again(item)

    def _queue_again(self, item: Item) -> None:
        item.state, item.started_at, item.ttl_seconds = "queued", self._stamp(), DEFAULT_TTL_SECONDS
        item.polled_at = item.acknowledged_at = item.latest_heartbeat_at = None
        item.stop_requested_at = item.stopped_at = None

    def _stamp(self) -> datetime:
        # Re-queue, ack and beats within one clock tick must still differ and keep their order: a stale value
        # would pass, and the 412's `lease_updated_at` would not lie between the old holder's beat and the new one's.
        now = self._now()
        if self._last_stamp is not None:
            now = max(now, self._last_stamp + _MICROSECOND)
        self._last_stamp = now
        return now

    def _beat_reply(self, item: Item, *, extended: bool) -> dict[str, Any]:
        return {
            "type": "work_heartbeat",
            "last_heartbeat": timestamp(item.latest_heartbeat_at) or "",
            "lease_extended": extended,
            "state": item.state,
            "ttl_seconds": item.ttl_seconds,
        }

    def _precondition_failed(self, item: Item, expected: str | None) -> Refusal:
        actual = timestamp(item.latest_heartbeat_at)
        return Refusal(
            412,
            f"Heartbeat precondition failed: expected {expected}, actual was {actual or 'NULL'}",
            details={
                "error_code": "heartbeat_precondition_failed",
                "error_visibility": "user_facing",
                "current_state": {
                    "state": item.state,
                    "last_heartbeat": actual,
                    "lease_updated_at": None if item.state == "queued" else timestamp(item.started_at),
                    "lease_extended": False,
                    "ttl_seconds": item.ttl_seconds,
                },
            },
        )


def _bad_metadata(why: str) -> Refusal:
    details = {"error_code": "invalid_metadata", "error_visibility": "user_facing"}
    return Refusal(400, f"Invalid metadata: {why}.", details=details)


def _cursor(number: int) -> str:
    return base64.urlsafe_b64encode(f"before:{number}".encode()).decode()


def _number_in(cursor: str) -> int:
    try:
        return int(base64.urlsafe_b64decode(cursor).decode().removeprefix("before:"))
    except (binascii.Error, ValueError):
        raise Refusal(400, "page is not a cursor that this list gave.") from None
