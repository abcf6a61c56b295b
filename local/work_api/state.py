"""The work queue's state machine; no HTTP, no sessions, no clock of its own.

Facts and section numbers (W§n) are WORK_API.md's. Where W says that no source answers, `Switches` decides; where it
has no switch, the rule's comment says "invented".
"""

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from local.work_api.switches import Switches

NO_HEARTBEAT = "NO_HEARTBEAT"
DEFAULT_TTL_SECONDS = 300
STARTUP_SECONDS, ABANDONED_SECONDS = 30, 60  # as one clone of the API has them (W§4, W§6.4)
DEFAULT_RECLAIM_MS = 5000
WORKER_SEEN_SECONDS = 30
DEFAULT_LIMIT, MOST_LIMIT = 20, 100
MOST_KEYS, LONGEST_KEY, LONGEST_VALUE = 16, 64, 512

_MICROSECOND = timedelta(microseconds=1)


class Refusal(Exception):
    """A call that the API refuses: the status, what the error envelope holds, seconds to wait (W§11.1)."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        details: dict[str, Any] | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.details = status, message, type, details
        self.retry_after = retry_after


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
    data_id: str | None
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
    message_waits: bool = False
    lapsed: "Lapsed | None" = None

    def body(self, secret: str | None = None) -> dict[str, Any]:
        """The item's 14 keys as the API shows them; the secret comes only with a poll's reply (W§2)."""
        return {
            "type": "work",
            "id": self.id,
            "environment_id": self.environment_id,
            "data": {"type": self.data_type} | ({} if self.data_id is None else {"id": self.data_id}),
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


@dataclass(frozen=True)
class Lapsed:
    """What an item held before its lease lapsed, for a late echo that revives it."""

    started_at: datetime
    acknowledged_at: datetime | None
    latest_heartbeat_at: datetime
    ttl_seconds: int


class WorkQueue:
    """One environment's items. What time has changed is settled at calls, never in between (W§15)."""

    def __init__(self, environment_id: str, now: Callable[[], datetime], switches: Switches | None = None) -> None:
        self.environment_id = environment_id
        self.switches = switches or Switches()
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
        if work_id not in self._items:
            raise not_found(f"Work item {work_id}")
        self._settle(self._items[work_id])
        return self._items[work_id]

    def of_session(self, session_id: str) -> Item:
        """The one item of a session. Raises Refusal 404."""
        for item in self.items():
            if item.data_type == "session" and item.data_id == session_id:
                return item
        raise not_found(f"The work item of {session_id}")

    def enqueue(self, work_id: str, data_type: str = "session", data_id: str | None = None) -> Item:
        """A new item; its data's id is its own unless another is given (W§2)."""
        now = self._now()
        about: str | None = data_id or work_id
        if data_type != "session" and self.switches.healthcheck_data == "no_id":
            about = None
        item = Item(work_id, self.environment_id, data_type, about, len(self._items), now, now)
        self._items[work_id] = item
        return item

    def message_arrived(self, work_id: str) -> bool:
        """A message to the item's session: a stopped item is queued again, a live one left alone (W§3)."""
        item = self.get(work_id)
        item.message_waits = item.state == "stopping" and self.switches.message_stopping == "queues_after"
        queues = item.state == "stopping" and self.switches.message_stopping == "queues"
        if item.state != "stopped" and not queues:
            return False
        self._queue_again(item)
        return True

    def poll(self, reclaim_older_than_ms: int = DEFAULT_RECLAIM_MS, worker_id: str | None = None) -> Item | None:
        """The oldest queued item that is not handed out, or was so too long ago; it stays queued (W§5.1)."""
        self._settle(polled=True)
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
        if item.state in ("starting", "active") and self.switches.ack_repeat == "200":
            return item
        if item.state != "queued" or self._unpolled(item):
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
        self._settle_item(item)  # whatever `expiry` says: what an echo finds is `late_echo`'s
        self._revive(item, expected)
        if item.state == "stopped" and expected == NO_HEARTBEAT and self.switches.claim_stopped == "412":
            raise self._precondition_failed(item, expected)
        if item.state in ("stopping", "stopped"):
            return self._beat_reply(item, extended=False)
        actual = timestamp(item.latest_heartbeat_at)
        claims = expected == NO_HEARTBEAT and item.state == "starting"
        if item.state == "queued" and expected == NO_HEARTBEAT:
            if self.switches.claim_queued == "409":
                raise Refusal(409, f"Work item {item.id} must be acknowledged before it is claimed.")
            claims = self.switches.claim_queued == "claim"
        if self._unpolled(item):
            raise self._precondition_failed(item, expected)
        if not (expected is None or claims or (actual is not None and expected == actual)):
            raise self._precondition_failed(item, expected)
        if item.acknowledged_at is None:  # a beat without an expected value also acks (W§6.2)
            item.acknowledged_at = self._stamp()
        if desired_ttl_seconds is not None:
            least, most = map(int, self.switches.ttl_bounds.split("-"))
            item.ttl_seconds = min(max(desired_ttl_seconds, least), most)
        else:
            item.ttl_seconds = DEFAULT_TTL_SECONDS
        item.state, item.latest_heartbeat_at = "active", self._stamp()
        return self._beat_reply(item, extended=True)

    def stop(self, work_id: str, *, force: bool = False) -> Item:
        """Never refused (W§7.1)."""
        item = self.get(work_id)
        at_once = (item.state == "queued" and self.switches.graceful_queued == "stopped") or (
            item.state == "stopping" and self.switches.graceful_again == "stopped"
        )
        if item.state == "stopped" or (item.state == "stopping" and not (force or at_once)):
            return item
        now = self._now()
        item.stop_requested_at = item.stop_requested_at or now
        if force or at_once:
            item.state, item.stopped_at = "stopped", now
        else:
            item.state = "stopping"
        return item

    def update(self, work_id: str, patch: Any) -> Item:
        """Strings set, null deletes, other keys stay; Refusal 400 for a bad patch (W§7.2)."""
        item = self.get(work_id)
        if patch is None and self.switches.empty_patch == "unchanged":
            return item
        item.metadata = merged_metadata(item.metadata, patch)
        return item

    def list(self, limit: int = DEFAULT_LIMIT, page: str | None = None) -> dict[str, Any]:
        """One page (W§9). Refusal 400 for a bad limit or cursor."""
        if self.switches.list_limit == "cap":
            limit = min(max(limit, 1), MOST_LIMIT)
        if not 1 <= limit <= MOST_LIMIT:
            raise Refusal(400, f"limit must be between 1 and {MOST_LIMIT}.")
        last = None if page is None else _number_in(page)
        if page is not None and last is None and self.switches.list_cursor == "400":
            raise Refusal(400, "page is not a cursor that this list gave.")
        items = [item for item in self.items() if item.state != "stopped" or self.switches.list_stopped == "shown"]
        if self.switches.list_order == "newest":
            rest = [item for item in reversed(items) if last is None or item.number < last]
        else:
            rest = [item for item in items if last is None or item.number > last]
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

    def _settle(self, only: Item | None = None, *, polled: bool = False) -> None:
        """All of them, or only the one that is asked for: with thousands a look at all at each call would take long."""
        for item in (only,) if only else self._items.values():
            if item.state == "stopped" and item.message_waits:
                self._queue_again(item)
            if polled or self.switches.expiry == "read":
                self._settle_item(item)

    def _settle_item(self, item: Item) -> None:
        """What the passing of time makes of an item that nobody beats (W§6.4)."""
        if item.state in ("queued", "stopped"):
            return
        now, beat, acked = self._now(), item.latest_heartbeat_at, item.acknowledged_at
        ttl = timedelta(seconds=item.ttl_seconds)
        if item.state == "active" and beat and now > beat + ttl:
            lapsed = Lapsed(item.started_at, acked, beat, item.ttl_seconds)
            self._queue_again(item)
            item.lapsed = lapsed
        elif item.state == "starting" and self.switches.startup_lease == "on":
            if acked and now > acked + timedelta(seconds=STARTUP_SECONDS):
                self._queue_again(item)
        elif item.state == "stopping" and self.switches.abandoned_stopping == "stopped":
            since = beat or item.stop_requested_at
            if since and now > since + ttl + timedelta(seconds=ABANDONED_SECONDS):
                item.state, item.stopped_at = "stopped", now

    def _revive(self, item: Item, expected: str | None) -> None:
        """A late echo of the lapsed value, before anyone polled the item again, finds its lease as it was."""
        lapsed = item.lapsed
        if self.switches.late_echo == "refused" or lapsed is None or item.state != "queued" or item.polled_at:
            return
        if expected == timestamp(lapsed.latest_heartbeat_at):
            item.state, item.lapsed, item.ttl_seconds = "active", None, lapsed.ttl_seconds
            item.started_at, item.acknowledged_at = lapsed.started_at, lapsed.acknowledged_at
            item.latest_heartbeat_at = lapsed.latest_heartbeat_at

    def _unpolled(self, item: Item) -> bool:
        """Whether a call is to be refused because no poll has handed the item out (W§16)."""
        return self.switches.unpolled == "refused" and item.state == "queued" and item.polled_at is None

    def _queue_again(self, item: Item) -> None:
        item.state, item.started_at, item.ttl_seconds = "queued", self._stamp(), DEFAULT_TTL_SECONDS
        item.polled_at = item.acknowledged_at = item.latest_heartbeat_at = None
        item.stop_requested_at = item.stopped_at = item.lapsed = None
        item.message_waits = False
        if self.switches.requeue_created_at == "new":
            item.created_at = item.started_at
        if self.switches.requeue_metadata == "cleared":
            item.metadata = {}

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


def merged_metadata(known: dict[str, str], patch: Any) -> dict[str, str]:
    """An item's or a session's metadata with a patch applied (W§7.2). Raises Refusal 400."""
    if not isinstance(patch, dict):
        raise _bad_metadata("metadata must be an object of strings and nulls")
    merged = dict(known)
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
        raise _bad_metadata(f"there are at most {MOST_KEYS} metadata keys")
    return merged


def _bad_metadata(why: str) -> Refusal:
    details = {"error_code": "invalid_metadata", "error_visibility": "user_facing"}
    return Refusal(400, f"Invalid metadata: {why}.", details=details)


def _cursor(number: int) -> str:
    return base64.urlsafe_b64encode(f"after:{number}".encode()).decode()


def _number_in(cursor: str) -> int | None:
    try:
        return int(base64.urlsafe_b64decode(cursor).decode().removeprefix("after:"))
    except (binascii.Error, ValueError):
        return None
