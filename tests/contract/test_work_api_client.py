"""Our Work API client against the emulator over HTTP: the claim chain and the refusals of WORK_API.md."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from shared.work_api import (
    NO_HEARTBEAT,
    Gone,
    LeaseLost,
    NotAllowed,
    NotQueued,
    NotSent,
    Refused,
    Unanswered,
    Work,
    WorkApi,
)


def client(emulator: Any, key: str | None = None, **changes: Any) -> WorkApi:
    key = emulator.environment_key if key is None else key
    where = {"base_url": emulator.base_url, "environment_id": emulator.environment_id} | changes
    plain = httpx.HTTPTransport(verify=False)  # no certificates to load for every test
    return WorkApi(
        where["base_url"], where["environment_id"], lambda: SecretStr(key), worker_id="contract", transport=plain
    )


@pytest.fixture
def api(emulator: Any) -> Iterator[WorkApi]:
    """A client with the environment key."""
    made = client(emulator)
    yield made
    made.close()


@pytest.fixture
def org_api(emulator: Any) -> Iterator[WorkApi]:
    """A client with the organisation key."""
    made = client(emulator, emulator.org_key)
    yield made
    made.close()


def queue_session(emulator: Any) -> str:
    """A new session, so one queued item; returns the session's id."""
    return str(emulator.control("POST", "/sessions", {})["id"])


def take(api: WorkApi) -> Work:
    """Poll and ack the next item, which must be there."""
    work = api.poll()
    assert work is not None
    return api.ack(work.id)


def test_an_empty_queue_polls_none_with_and_without_waiting(api: WorkApi) -> None:
    assert api.poll() is None
    assert api.poll(block_ms=1) is None


def test_a_session_is_polled_acked_claimed_extended_and_stopped(emulator: Any, api: WorkApi) -> None:
    session_id = queue_session(emulator)

    polled = api.poll(block_ms=1, reclaim_older_than_ms=5000)
    assert polled is not None
    assert (polled.state, polled.data.type, polled.data.id) == ("queued", "session", session_id)
    assert polled.secret is not None
    assert polled.secret.get_secret_value() not in repr(polled)
    assert api.poll() is None  # handed out

    acked = api.ack(polled.id)
    assert (acked.state, acked.secret) == ("starting", None)
    assert acked.acknowledged_at is not None

    claimed = api.heartbeat(polled.id, NO_HEARTBEAT, desired_ttl_seconds=30)
    assert (claimed.state, claimed.lease_extended, claimed.ttl_seconds) == ("active", True, 30)
    extended = api.heartbeat(polled.id, claimed.last_heartbeat)
    assert extended.lease_extended
    assert extended.last_heartbeat != claimed.last_heartbeat

    stopping = api.stop(polled.id, force=False)
    assert stopping is not None
    assert stopping.state == "stopping"
    drained = api.heartbeat(polled.id, extended.last_heartbeat)
    assert (drained.state, drained.lease_extended) == ("stopping", False)

    stopped = api.stop(polled.id, force=True)
    assert stopped is not None
    assert stopped.state == "stopped"
    assert api.heartbeat(polled.id, drained.last_heartbeat).state == "stopped"


def test_a_second_ack_is_not_queued(emulator: Any, api: WorkApi) -> None:
    queue_session(emulator)
    work = take(api)
    with pytest.raises(NotQueued, match="starting"):
        api.ack(work.id)


def test_a_stale_value_is_a_lost_lease_that_tells_the_current_one(emulator: Any, api: WorkApi) -> None:
    queue_session(emulator)
    work = take(api)
    first = api.heartbeat(work.id, NO_HEARTBEAT)
    second = api.heartbeat(work.id, first.last_heartbeat)
    for stale in (first.last_heartbeat, NO_HEARTBEAT):
        with pytest.raises(LeaseLost) as caught:
            api.heartbeat(work.id, stale)
        assert caught.value.error_code == "heartbeat_precondition_failed"
        assert caught.value.current_state is not None
        assert caught.value.current_state.state == "active"
        assert caught.value.current_state.last_heartbeat == second.last_heartbeat


def test_an_echo_before_any_claim_is_a_lost_lease_without_a_value(emulator: Any, api: WorkApi) -> None:
    queue_session(emulator)
    work = take(api)
    with pytest.raises(LeaseLost) as caught:
        api.heartbeat(work.id, "2026-09-02T00:08:33.477978Z")
    assert caught.value.current_state is not None
    assert (caught.value.current_state.state, caught.value.current_state.last_heartbeat) == ("starting", None)


def test_update_sets_keeps_and_deletes_keys(emulator: Any, api: WorkApi, org_api: WorkApi) -> None:
    queue_session(emulator)
    work = take(api)
    assert org_api.update(work.id, {"a": "1", "b": "2"}).metadata == {"a": "1", "b": "2"}
    assert org_api.update(work.id, {"a": None}).metadata == {"b": "2"}
    assert org_api.retrieve(work.id).metadata == {"b": "2"}
    with pytest.raises(Refused) as caught:
        org_api.update(work.id, {"k" * 1000: "v"})
    assert caught.value.error_code == "invalid_metadata"


def test_the_list_pages_through_every_item_once(emulator: Any, api: WorkApi) -> None:
    sessions = {queue_session(emulator) for _ in range(3)}
    first = api.list(limit=2)
    assert len(first.data) == 2
    second = api.list(limit=2, page=first.next_page)
    assert second.next_page is None
    assert {work.data.id for work in (*first.data, *second.data)} == sessions
    assert sorted(work.data.id or "" for work in api.list_all()) == sorted(sessions)


def test_stats_count_queued_and_polled_items_and_workers(emulator: Any, api: WorkApi) -> None:
    queue_session(emulator)
    queue_session(emulator)
    api.poll()
    stats = api.stats()
    assert (stats.depth, stats.pending, stats.workers_polling) == (1, 1, 1)
    assert stats.oldest_queued_at is not None


def test_an_unknown_item_is_gone(api: WorkApi) -> None:
    with pytest.raises(Gone):
        api.ack("sesn_unknown")
    with pytest.raises(Gone):
        api.heartbeat("sesn/unknown?", NO_HEARTBEAT)


@pytest.mark.parametrize(("key", "status"), [("sk-ant-oat01-wrong", 401), ("junk", 401)])
def test_a_wrong_key_is_not_allowed_and_not_shown(emulator: Any, key: str, status: int) -> None:
    with pytest.raises(NotAllowed) as caught:
        client(emulator, key).poll()
    assert caught.value.status == status
    assert key not in str(caught.value)


def test_an_unknown_environment_is_not_allowed(emulator: Any) -> None:
    with pytest.raises(NotAllowed) as caught:
        client(emulator, environment_id="env_unknown").poll()
    assert caught.value.status == 403


def test_the_environment_key_may_not_retrieve_or_update(emulator: Any, api: WorkApi) -> None:
    queue_session(emulator)
    work = take(api)
    with pytest.raises(NotAllowed, match="organisation key"):
        api.retrieve(work.id)
    with pytest.raises(NotAllowed, match="organisation key"):
        api.update(work.id, {"a": "1"})


def test_a_base_url_that_is_no_work_api_is_told_apart(emulator: Any) -> None:
    with pytest.raises((Gone, Refused, Unanswered)):
        client(emulator, base_url=f"{emulator.base_url}/elsewhere").poll()
    with pytest.raises(NotSent, match="base URL"):
        client(emulator, base_url="http://127.0.0.1:9").poll()
