"""The emulator's queue: W§4's table row by row, expiry, reclaim, refusals, list, stats and metadata."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from local.work_api.state import NO_HEARTBEAT, Item, Refusal, WorkQueue, timestamp

START = datetime(2026, 9, 2, 0, 8, 33, tzinfo=UTC)
NEVER_SEEN = "2020-01-01T00:00:00.000000Z"


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> WorkQueue:
    return WorkQueue("env_1", clock)


def item_in(queue: WorkQueue, state: str, work_id: str = "sesn_1") -> Item:
    """A new item brought to `state` by the calls that lead there."""
    item = queue.enqueue(work_id)
    if state != "queued":
        queue.poll()
        queue.ack(work_id)
    if state in ("active", "stopping", "stopped"):
        queue.heartbeat(work_id, NO_HEARTBEAT)
    if state in ("stopping", "stopped"):
        queue.stop(work_id, force=state == "stopped")
    assert item.state == state
    return item


def call(queue: WorkQueue, item: Item, name: str) -> Any:
    match name:
        case "ack":
            return queue.ack(item.id)
        case "claim":
            return queue.heartbeat(item.id, NO_HEARTBEAT)
        case "echo":
            return queue.heartbeat(item.id, timestamp(item.latest_heartbeat_at) or NEVER_SEEN)
        case "stale":
            return queue.heartbeat(item.id, NEVER_SEEN)
        case "omitted":
            return queue.heartbeat(item.id)
        case "graceful":
            return queue.stop(item.id)
        case "force":
            return queue.stop(item.id, force=True)
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("state", "name", "outcome"),
    [
        ("queued", "ack", "starting"),
        ("queued", "claim", 412),
        ("queued", "echo", 412),
        ("queued", "omitted", "active"),
        ("queued", "graceful", "stopped"),
        ("queued", "force", "stopped"),
        ("starting", "ack", 409),
        ("starting", "claim", "active"),
        ("starting", "echo", 412),
        ("starting", "omitted", "active"),
        ("starting", "graceful", "stopping"),
        ("starting", "force", "stopped"),
        ("active", "ack", 409),
        ("active", "claim", 412),
        ("active", "echo", "active"),
        ("active", "stale", 412),
        ("active", "omitted", "active"),
        ("active", "graceful", "stopping"),
        ("active", "force", "stopped"),
        ("stopping", "ack", 409),
        ("stopping", "claim", "stopping"),
        ("stopping", "echo", "stopping"),
        ("stopping", "stale", "stopping"),
        ("stopping", "graceful", "stopping"),
        ("stopping", "force", "stopped"),
        ("stopped", "ack", 409),
        ("stopped", "claim", "stopped"),
        ("stopped", "stale", "stopped"),
        ("stopped", "graceful", "stopped"),
        ("stopped", "force", "stopped"),
    ],
)
def test_each_call_in_each_state_leads_where_the_table_says(
    queue: WorkQueue, state: str, name: str, outcome: str | int
) -> None:
    item = item_in(queue, state)
    if isinstance(outcome, int):
        with pytest.raises(Refusal) as caught:
            call(queue, item, name)
        assert (caught.value.status, caught.value.type) == (outcome, "invalid_request_error")
        assert item.state == state
    else:
        call(queue, item, name)
        assert item.state == outcome


@pytest.mark.parametrize("state", ["starting", "active", "stopping", "stopped"])
def test_only_queued_items_are_polled(queue: WorkQueue, state: str) -> None:
    item_in(queue, state)
    assert queue.poll(reclaim_older_than_ms=0) is None


@pytest.mark.parametrize("state", ["stopping", "stopped"])
def test_a_beat_on_an_ending_item_writes_nothing(queue: WorkQueue, clock: Clock, state: str) -> None:
    item = item_in(queue, state)
    before = item.body()
    clock.advance(1)
    reply = call(queue, item, "echo")
    assert (reply["state"], reply["lease_extended"]) == (state, False)
    assert item.body() == before


def test_a_stop_before_any_claim_shows_an_empty_last_heartbeat(queue: WorkQueue) -> None:
    item = item_in(queue, "starting")
    queue.stop(item.id)
    assert call(queue, item, "claim")["last_heartbeat"] == ""


def test_an_item_shows_its_fourteen_keys_and_its_sessions_id(queue: WorkQueue) -> None:
    body = item_in(queue, "queued").body()
    assert len(body) == 14
    assert body["id"] == body["data"]["id"] == "sesn_1"
    assert body["created_at"] == "2026-09-02T00:08:33.000000Z"
    assert (body["secret"], body["actor"], body["metadata"]) == (None, None, {})


def test_a_lapsed_lease_queues_the_same_id_with_its_heartbeat_cleared(queue: WorkQueue, clock: Clock) -> None:
    item = item_in(queue, "active")
    last = timestamp(item.latest_heartbeat_at)
    clock.advance(300)
    assert queue.get(item.id).state == "active"
    clock.advance(1)
    body = queue.get(item.id).body()
    assert (body["state"], body["latest_heartbeat_at"], body["acknowledged_at"]) == ("queued", None, None)
    assert body["started_at"] == timestamp(clock.now)
    with pytest.raises(Refusal, match="actual was NULL"):
        queue.heartbeat(item.id, last)
    assert queue.poll() is item


@pytest.mark.parametrize("read", ["items", "stats", "list", "poll"])
def test_every_read_settles_a_lapsed_lease(queue: WorkQueue, clock: Clock, read: str) -> None:
    item = item_in(queue, "active")
    clock.advance(301)
    getattr(queue, read)()
    assert item.state == "queued"


def test_an_echo_keeps_the_lease_alive(queue: WorkQueue, clock: Clock) -> None:
    item = item_in(queue, "active")
    for _ in range(3):
        clock.advance(200)
        assert call(queue, item, "echo")["lease_extended"]


def test_starting_and_stopping_never_expire(queue: WorkQueue, clock: Clock) -> None:
    item_in(queue, "starting", "sesn_1")
    item_in(queue, "stopping", "sesn_2")
    clock.advance(1_000_000)
    assert [item.state for item in queue.items()] == ["starting", "stopping"]


@pytest.mark.parametrize(("asked", "granted"), [(None, 300), (1, 10), (120, 120), (9999, 600)])
def test_the_time_to_live_is_clamped(queue: WorkQueue, asked: int | None, granted: int) -> None:
    item = item_in(queue, "starting")
    assert queue.heartbeat(item.id, NO_HEARTBEAT, asked)["ttl_seconds"] == granted


def test_two_beats_in_one_clock_tick_differ(queue: WorkQueue) -> None:
    item = item_in(queue, "active")
    first = timestamp(item.latest_heartbeat_at)
    assert queue.heartbeat(item.id, first)["last_heartbeat"] != first


def test_a_refused_beat_tells_the_current_state(queue: WorkQueue) -> None:
    item = item_in(queue, "active")
    actual = timestamp(item.latest_heartbeat_at)
    with pytest.raises(Refusal) as caught:
        queue.heartbeat(item.id, NEVER_SEEN)
    assert caught.value.message == (f"Heartbeat precondition failed: expected {NEVER_SEEN}, actual was {actual}")
    assert caught.value.details == {
        "error_code": "heartbeat_precondition_failed",
        "error_visibility": "user_facing",
        "current_state": {
            "state": "active",
            "last_heartbeat": actual,
            "lease_updated_at": timestamp(item.started_at),
            "lease_extended": False,
            "ttl_seconds": 300,
        },
    }


def test_a_polled_item_is_offered_again_only_after_the_reclaim_time(queue: WorkQueue, clock: Clock) -> None:
    item = item_in(queue, "queued")
    assert queue.poll() is item
    clock.advance(5)
    assert queue.poll() is None
    assert queue.poll(reclaim_older_than_ms=2000) is item
    clock.advance(5.001)
    assert queue.poll() is item


def test_the_oldest_queued_item_is_polled_first(queue: WorkQueue, clock: Clock) -> None:
    requeued = item_in(queue, "stopped", "sesn_1")
    clock.advance(1)
    waiting = item_in(queue, "queued", "sesn_2")
    clock.advance(1)
    assert queue.message_arrived(requeued.id)
    assert [queue.poll(), queue.poll(), queue.poll()] == [waiting, requeued, None]


@pytest.mark.parametrize("state", ["queued", "starting", "active", "stopping"])
def test_a_message_queues_only_a_stopped_item(queue: WorkQueue, state: str) -> None:
    item = item_in(queue, state)
    assert not queue.message_arrived(item.id)
    assert item.state == state


def test_a_requeued_item_keeps_its_id_and_creation_and_needs_a_new_claim(queue: WorkQueue, clock: Clock) -> None:
    item = item_in(queue, "stopped")
    clock.advance(60)
    queue.message_arrived(item.id)
    body = item.body()
    assert (body["id"], body["created_at"]) == ("sesn_1", timestamp(START))
    assert body["started_at"] == timestamp(clock.now)
    for cleared in ("acknowledged_at", "latest_heartbeat_at", "stop_requested_at", "stopped_at"):
        assert body[cleared] is None


def test_a_forced_stop_keeps_the_first_request(queue: WorkQueue, clock: Clock) -> None:
    item = item_in(queue, "stopping")
    clock.advance(5)
    queue.stop(item.id, force=True)
    assert (item.stop_requested_at, item.stopped_at) == (START, clock.now)


def test_a_taken_lease_refuses_the_old_holder_with_a_foreign_value(queue: WorkQueue) -> None:
    item = item_in(queue, "active")
    ours = timestamp(item.latest_heartbeat_at)
    queue.take_lease(item.id)
    with pytest.raises(Refusal) as caught:
        queue.heartbeat(item.id, ours)
    assert caught.value.details is not None
    current = caught.value.details["current_state"]
    assert current["state"] == "active"
    assert current["last_heartbeat"] not in (None, ours)


def test_a_taken_lease_was_updated_between_the_old_beat_and_the_new_even_in_one_tick(queue: WorkQueue) -> None:
    item = item_in(queue, "active")
    ours = timestamp(item.latest_heartbeat_at)
    queue.take_lease(item.id)
    with pytest.raises(Refusal) as caught:
        queue.heartbeat(item.id, ours)
    assert caught.value.details is not None
    current = caught.value.details["current_state"]
    assert ours is not None
    assert ours < current["lease_updated_at"] < current["last_heartbeat"]


def test_an_unknown_id_is_not_found(queue: WorkQueue) -> None:
    with pytest.raises(Refusal) as caught:
        queue.heartbeat("sesn_none", NO_HEARTBEAT)
    assert (caught.value.status, caught.value.type) == (404, "not_found_error")


def test_stats_count_neither_acked_items_nor_workers_unseen_for_thirty_seconds(queue: WorkQueue, clock: Clock) -> None:
    item_in(queue, "active", "sesn_1")
    queue.poll(worker_id="early")
    clock.advance(31)
    for work_id in ("sesn_2", "sesn_3"):
        queue.enqueue(work_id)
    queue.poll(worker_id="late")
    stats = queue.stats()
    assert (stats["depth"], stats["pending"], stats["workers_polling"]) == (1, 1, 1)
    assert stats["oldest_queued_at"] == timestamp(clock.now)


def test_pages_cover_every_item_once(queue: WorkQueue) -> None:
    for number in range(5):
        queue.enqueue(f"sesn_{number}")
    seen, page = [], None
    while True:
        reply = queue.list(limit=2, page=page)
        seen += [item["id"] for item in reply["data"]]
        page = reply["next_page"]
        if page is None:
            break
    assert seen == [f"sesn_{number}" for number in (4, 3, 2, 1, 0)]


@pytest.mark.parametrize("arguments", [{"limit": 0}, {"limit": 101}, {"page": "junk"}, {"page": "é"}])
def test_a_bad_limit_or_cursor_is_refused(queue: WorkQueue, arguments: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as caught:
        queue.list(**arguments)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "patch", [{"k" * 65: "v"}, {"k": "v" * 513}, {"k": 1}, ["k"], {f"k{n}": "v" for n in range(17)}]
)
def test_a_bad_metadata_patch_is_refused_and_changes_nothing(queue: WorkQueue, patch: Any) -> None:
    item = item_in(queue, "queued")
    queue.update(item.id, {"kept": "1"})
    with pytest.raises(Refusal) as caught:
        queue.update(item.id, patch)
    assert caught.value.status == 400
    assert caught.value.details is not None
    assert caught.value.details["error_code"] == "invalid_metadata"
    assert item.metadata == {"kept": "1"}
