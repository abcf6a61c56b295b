"""The official SDK against the emulator: what its poller, worker and heartbeat make of our replies."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic import APIStatusError, AsyncAnthropic, ConflictError, NotFoundError, PermissionDeniedError
from pydantic import SecretStr

from local.work_api.state import NO_HEARTBEAT
from shared.record import Phase, Record
from shared.work_api import NotAllowed, WorkApi
from tests.contract.conftest import RunningEmulator

WAIT_SECONDS = 60.0


def bash(command: str, expect: str) -> dict[str, Any]:
    return {"tool": "bash", "input": {"command": command}, "expect": expect}


def run(emulator: RunningEmulator, body: Callable[[AsyncAnthropic], Awaitable[None]]) -> None:
    async def main() -> None:
        async with AsyncAnthropic(auth_token=emulator.environment_key, base_url=emulator.url, max_retries=0) as client:
            await asyncio.wait_for(body(client), WAIT_SECONDS)

    asyncio.run(main())


def new_session(emulator: RunningEmulator, *script: dict[str, Any]) -> str:
    return str(emulator.control("POST", "sessions", {"script": list(script)})["sessions"][0]["session_id"])


async def drained(emulator: RunningEmulator, client: AsyncAnthropic) -> list[Any]:
    """Every queued item, polled and acked by the SDK's poller."""
    poller = client.beta.environments.work.poller(
        environment_id=emulator.environment_id,
        environment_key=emulator.environment_key,
        block_ms=None,
        drain=True,
        auto_stop=False,
    )
    return [item async for item in poller]


async def serve_one(emulator: RunningEmulator, client: AsyncAnthropic, workdir: Path) -> Any:
    """The one queued item, through a whole turn by the SDK's worker."""
    [item] = await drained(emulator, client)
    await handled(emulator, client, item, workdir)
    return item


async def handled(emulator: RunningEmulator, client: AsyncAnthropic, item: Any, workdir: Path) -> None:
    """What the SDK's worker does with an item that is already acked."""
    worker = client.beta.environments.work.worker(
        environment_key=emulator.environment_key, workdir=workdir, max_idle=0.1
    )
    await worker.handle_item(
        work_id=item.id,
        environment_id=item.environment_id,
        session_id=item.data.id,
        work_secret=item.secret,
    )


def test_the_poller_drains_and_acks_the_queue(emulator: RunningEmulator) -> None:
    made = emulator.control("POST", "sessions", {"count": 3})["sessions"]

    async def body(client: AsyncAnthropic) -> None:
        assert [item.id for item in await drained(emulator, client)] == [each["work_id"] for each in made]
        assert await drained(emulator, client) == []

    run(emulator, body)
    assert [item["state"] for item in emulator.control("GET", "state")["work"]] == ["starting"] * 3


def test_a_worker_serves_a_turn_and_the_same_id_again_for_the_next(emulator: RunningEmulator, tmp_path: Path) -> None:
    session_id = new_session(emulator, bash("echo one > note; cat note", "one"), bash("echo two", "two"))

    async def body(client: AsyncAnthropic) -> None:
        first = await serve_one(emulator, client, tmp_path)
        emulator.control("POST", f"sessions/{session_id}/messages", {"script": [bash("cat note", "one")]})
        second = await serve_one(emulator, client, tmp_path)
        assert first.id == second.id == session_id

    run(emulator, body)
    state = emulator.control("GET", "state")
    [session], [item] = state["sessions"], state["work"]
    assert (session["turns_finished"], session["mismatches"], session["status"]) == (2, [], "idle")
    assert [result["text"] for result in session["results"]] == ["one", "two", "one"]
    assert item["state"] == "stopped"
    stops = [call for call in state["calls"] if call["call"] == "stop"]
    assert [(call["credential"], call["force"]) for call in stops] == [("sessions_token", True)] * 2
    assert {call["credential"] for call in state["calls"] if call["call"] == "poll"} == {"environment_key"}


def test_a_result_without_the_expected_text_is_a_mismatch(emulator: RunningEmulator, tmp_path: Path) -> None:
    new_session(emulator, bash("echo one", "another"))

    async def body(client: AsyncAnthropic) -> None:
        await serve_one(emulator, client, tmp_path)

    run(emulator, body)
    [mismatch] = emulator.control("GET", "state")["sessions"][0]["mismatches"]
    assert (mismatch["expect"], mismatch["text"]) == ("another", "one")


def test_the_sdk_reads_every_reply_of_the_eight_calls(emulator: RunningEmulator) -> None:
    work_id = new_session(emulator)
    env = emulator.environment_id

    async def body(client: AsyncAnthropic) -> None:
        work = client.beta.environments.work
        before = await work.stats(env)
        polled = await work.poll(env, anthropic_worker_id="worker-1")
        after = await work.stats(env)
        assert polled is not None
        assert (polled.id, polled.state, bool(polled.secret)) == (work_id, "queued", True)
        assert (before.depth, before.pending, before.workers_polling) == (1, 0, 0)
        assert (after.depth, after.pending, after.workers_polling) == (0, 1, 1)
        assert (await work.ack(work_id, environment_id=env)).state == "starting"
        beat = await work.heartbeat(
            work_id, environment_id=env, expected_last_heartbeat=NO_HEARTBEAT, desired_ttl_seconds=120
        )
        assert (beat.state, beat.lease_extended, beat.ttl_seconds) == ("active", True, 120)
        listed = [item async for item in work.list(env, limit=1)]
        assert [(item.id, item.secret, item.latest_heartbeat_at) for item in listed] == [
            (work_id, None, beat.last_heartbeat)
        ]
        async with AsyncAnthropic(auth_token=emulator.org_key, base_url=emulator.url, max_retries=0) as manager:
            managed = manager.beta.environments.work
            await managed.update(work_id, environment_id=env, metadata={"owner": "a", "old": "b"})
            kept = await managed.update(work_id, environment_id=env, metadata={"old": None})
            assert kept.metadata == {"owner": "a"}
            assert (await managed.retrieve(work_id, environment_id=env)).metadata == {"owner": "a"}
        assert (await work.stop(work_id, environment_id=env)).state == "stopping"
        stopped = await work.stop(work_id, environment_id=env, force=True)
        assert (stopped.state, stopped.stopped_at is None) == ("stopped", False)
        assert await work.poll(env) is None

    run(emulator, body)


def test_the_sdks_list_follows_the_pages(emulator: RunningEmulator) -> None:
    made = {each["work_id"] for each in emulator.control("POST", "sessions", {"count": 5})["sessions"]}

    async def body(client: AsyncAnthropic) -> None:
        listed = [item.id async for item in client.beta.environments.work.list(emulator.environment_id, limit=2)]
        assert (len(listed), set(listed)) == (5, made)

    run(emulator, body)


def test_the_workers_own_loop_serves_a_session_and_passes_by_a_healthcheck(
    emulator: RunningEmulator, tmp_path: Path
) -> None:
    health = emulator.control("POST", "work", {"type": "healthcheck"})["work_id"]
    session_id = new_session(emulator, bash("echo looped", "looped"))

    def states() -> dict[str, str]:
        return {item["id"]: item["state"] for item in emulator.control("GET", "state")["work"]}

    async def body(client: AsyncAnthropic) -> None:
        worker = client.beta.environments.work.worker(
            environment_id=emulator.environment_id,
            environment_key=emulator.environment_key,
            workdir=tmp_path,
            max_idle=0.1,
        )
        running = asyncio.create_task(worker.run())
        while set((await asyncio.to_thread(states)).values()) != {"stopped"}:
            assert not running.done(), running.exception()
            await asyncio.sleep(0.01)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    run(emulator, body)
    state = emulator.control("GET", "state")
    [session] = state["sessions"]
    assert (session["session_id"], session["turns_finished"], session["mismatches"]) == (session_id, 1, [])
    assert [call["call"] for call in state["calls"] if call["work_id"] == health] == ["poll", "ack", "stop"]


def test_a_worker_confirms_a_graceful_stop_by_force(emulator: RunningEmulator, tmp_path: Path) -> None:
    work_id = new_session(emulator, bash("sleep 50", ""))

    async def body(client: AsyncAnthropic) -> None:
        [item] = await drained(emulator, client)
        emulator.control("POST", f"work/{work_id}/stop", {"force": False})
        await handled(emulator, client, item, tmp_path)

    run(emulator, body)
    state = emulator.control("GET", "state")
    [item] = state["work"]
    assert item["state"] == "stopped"
    assert item["stop_requested_at"] < item["stopped_at"]
    stops = [(call["call"], call["force"]) for call in state["calls"] if "stop" in call["call"]]
    assert stops == [("control_stop", False), ("stop", True)]


def test_a_worker_that_lost_its_lease_posts_no_stop(emulator: RunningEmulator, tmp_path: Path) -> None:
    work_id = new_session(emulator, bash("sleep 50", ""))

    async def body(client: AsyncAnthropic) -> None:
        [item] = await drained(emulator, client)
        emulator.control("POST", f"work/{work_id}/take_lease")
        await handled(emulator, client, item, tmp_path)

    run(emulator, body)
    state = emulator.control("GET", "state")
    assert state["work"][0]["state"] == "active"
    assert [call["status"] for call in state["calls"] if call["call"] == "heartbeat"] == [412]
    assert not [call for call in state["calls"] if call["call"] == "stop"]
    emulator.control("POST", f"work/{work_id}/finish_foreign")
    assert emulator.control("GET", "state")["work"][0]["state"] == "stopped"


def test_a_lost_lease_is_a_412_with_the_foreign_value(emulator: RunningEmulator) -> None:
    work_id = new_session(emulator)

    async def body(client: AsyncAnthropic) -> None:
        await drained(emulator, client)
        work = client.beta.environments.work
        env = emulator.environment_id
        ours = await work.heartbeat(work_id, environment_id=env, expected_last_heartbeat=NO_HEARTBEAT)
        emulator.control("POST", f"work/{work_id}/take_lease")
        with pytest.raises(APIStatusError) as caught:
            await work.heartbeat(work_id, environment_id=env, expected_last_heartbeat=ours.last_heartbeat)
        assert caught.value.status_code == 412
        assert isinstance(caught.value.body, dict)
        current = caught.value.body["error"]["details"]["current_state"]
        assert current["state"] == "active"
        assert current["last_heartbeat"] != ours.last_heartbeat

    run(emulator, body)


def test_a_lapsed_lease_is_offered_again_under_the_same_id(emulator: RunningEmulator) -> None:
    work_id = new_session(emulator)

    async def body(client: AsyncAnthropic) -> None:
        await drained(emulator, client)
        await client.beta.environments.work.heartbeat(
            work_id, environment_id=emulator.environment_id, expected_last_heartbeat=NO_HEARTBEAT
        )
        assert await drained(emulator, client) == []
        emulator.control("POST", "clock", {"advance_seconds": 301})
        assert [item.id for item in await drained(emulator, client)] == [work_id]

    run(emulator, body)


def test_refusals_reach_the_sdk_as_its_own_errors(emulator: RunningEmulator) -> None:
    work_id = new_session(emulator)

    async def body(client: AsyncAnthropic) -> None:
        work = client.beta.environments.work
        await drained(emulator, client)
        with pytest.raises(ConflictError, match="QUEUED"):
            await work.ack(work_id, environment_id=emulator.environment_id)
        with pytest.raises(PermissionDeniedError):
            await work.retrieve(work_id, environment_id=emulator.environment_id)
        with pytest.raises(PermissionDeniedError):
            await work.poll("env_other")
        with pytest.raises(NotFoundError):
            await work.ack("sesn_none", environment_id=emulator.environment_id)

    run(emulator, body)


def test_a_blocked_poll_wakes_for_new_work(emulator: RunningEmulator) -> None:
    async def body(client: AsyncAnthropic) -> None:
        polled: asyncio.Task[Any] = asyncio.create_task(poll_until_work(emulator, client))
        while not emulator.control("GET", "state")["calls"]:
            await asyncio.sleep(0)
        session_id = await asyncio.to_thread(new_session, emulator)
        assert (await polled).id == session_id

    run(emulator, body)


async def poll_until_work(emulator: RunningEmulator, client: AsyncAnthropic) -> Any:
    while True:
        item = await client.beta.environments.work.poll(emulator.environment_id, block_ms=999)
        if item is not None:
            return item


def test_a_sessions_token_reaches_its_own_session_and_item_only(emulator: RunningEmulator) -> None:
    new_session(emulator)
    other = new_session(emulator)

    async def body(client: AsyncAnthropic) -> None:
        first = (await drained(emulator, client))[0]
        token = next(value for value in emulator.control("GET", "secrets")["secrets"] if value.startswith("sk-ant-si-"))
        async with AsyncAnthropic(auth_token=token, base_url=emulator.url, max_retries=0) as scoped:
            assert (await scoped.beta.sessions.retrieve(first.data.id)).id == first.data.id
            with pytest.raises(PermissionDeniedError):
                await scoped.beta.sessions.retrieve(other)
            with pytest.raises(PermissionDeniedError):
                await scoped.beta.environments.work.stop(other, environment_id=emulator.environment_id)
            with pytest.raises(PermissionDeniedError):
                await scoped.beta.environments.work.poll(emulator.environment_id)

    run(emulator, body)


def test_work_routes_look_absent_without_the_beta_header(emulator: RunningEmulator) -> None:
    url = f"{emulator.url}/v1/environments/{emulator.environment_id}/work/poll"
    headers = {"authorization": f"Bearer {emulator.environment_key}"}
    reply = httpx.get(url, headers=headers)
    assert reply.status_code == 404
    assert reply.headers["request-id"] == reply.json()["request_id"]
    with_beta = httpx.get(url, headers=headers | {"anthropic-beta": "managed-agents-2026-04-01"})
    assert (with_beta.status_code, with_beta.text) == (200, "null")


@pytest.fixture
def kept_open() -> Iterator[contextlib.ExitStack]:
    """What is entered here outlives the emulator, if a test asks for it before the emulator."""
    with contextlib.ExitStack() as stack:
        yield stack


def test_an_open_stream_does_not_hold_up_the_end(kept_open: contextlib.ExitStack, emulator: RunningEmulator) -> None:
    """The fixture's end asserts that the server ended."""
    session_id = new_session(emulator)
    url = f"{emulator.url}/v1/sessions/{session_id}/events/stream"
    headers = {
        "authorization": f"Bearer {emulator.environment_key}",
        "anthropic-beta": "managed-agents-2026-04-01",
    }
    client = kept_open.enter_context(httpx.Client(timeout=WAIT_SECONDS))
    reply = kept_open.enter_context(client.stream("GET", url, headers=headers))
    assert next(reply.iter_lines()) == ": open"


def test_the_sdk_s_own_order_gives_what_the_progress_watch_reads(emulator: RunningEmulator) -> None:
    """`order` is no part of WORK_API.md: the official SDK is its source."""
    session_id = new_session(emulator, bash("echo hi", "hi"))

    async def body(client: AsyncAnthropic) -> None:
        newest = await client.beta.sessions.events.list(session_id, order="desc", limit=50)
        key = SecretStr(emulator.environment_key)
        api = WorkApi(emulator.url, emulator.environment_id, lambda: key)
        ours = api.newest_events(session_id)
        assert [event.id for event in ours.data] == [event.id for event in newest.data]
        assert ours.data[0].stop_reason is not None
        assert ours.data[0].stop_reason.event_ids == (ours.data[1].id,)

    run(emulator, body)


def test_a_session_s_metadata_is_the_same_to_the_sdk_and_to_the_launcher(emulator: RunningEmulator) -> None:
    given = {"sandbox-fleet.size": "large", "team": "blue"}
    session_id = str(emulator.control("POST", "sessions", {"metadata": given})["id"])

    async def body(client: AsyncAnthropic) -> None:
        [item] = await drained(emulator, client)
        assert (await client.beta.sessions.retrieve(session_id)).metadata == given
        record = Record(work_id="w", environment_id="e", kind="session", turn=1, phase=Phase.HELD, secret=item.secret)
        with contextlib.closing(WorkApi(emulator.url, emulator.environment_id, lambda: SecretStr(""))) as api:
            assert api.session(session_id, token=record.sessions_token()).metadata == given
            with pytest.raises(NotAllowed, match="was not sent"):
                api.session(session_id)

    run(emulator, body)


def test_the_launcher_s_word_on_an_item_is_refused_unless_the_api_lets_its_session_s_token_say_it(
    emulator: RunningEmulator,
) -> None:
    """W§8: no credential of the stack may update; should that change, the links arrive."""
    new_session(emulator)

    async def body(client: AsyncAnthropic) -> None:
        [item] = await drained(emulator, client)
        record = Record(work_id="w", environment_id="e", kind="session", turn=1, phase=Phase.HELD, secret=item.secret)
        with contextlib.closing(WorkApi(emulator.url, emulator.environment_id, lambda: SecretStr(""))) as api:
            with pytest.raises(NotAllowed) as refused:
                api.update(item.id, {"sandbox-fleet.task": "page"}, token=record.sessions_token())
            assert refused.value.status == 403
            emulator.control("POST", "switches", {"update": "anybody"})
            told = api.update(item.id, {"sandbox-fleet.task": "page"}, token=record.sessions_token())
            assert told.metadata == {"sandbox-fleet.task": "page"}

    run(emulator, body)
