"""What sandbox/lease_guard.py answers by itself and what it passes on; whole turns are in tests/contract."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx2
import pytest
from anthropic import AsyncAnthropic, DefaultAsyncHttpxClient, PermissionDeniedError
from lease_guard import LEASE_TTL_SECONDS, LeaseGuard

SESSION = "sesn_1"


class Api:
    """The API behind a guard: notes every request that reaches it and answers all with one status."""

    def __init__(self, status: int = 200, *, stopping: bool = False) -> None:
        self.status = status
        self.reached: list[str] = []
        self.refusals: list[int] = []
        self.results: list[str] = []
        self.guard = LeaseGuard(
            session_id=SESSION,
            stopping=lambda: stopping,
            on_refused=self.refusals.append,
            on_result=lambda: self.results.append("taken"),
            inner=httpx2.MockTransport(self._answer),
        )

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        self.reached.append(f"{request.method} {request.url.path}")
        return httpx2.Response(self.status, json={"id": SESSION})

    @asynccontextmanager
    async def sdk(self) -> AsyncIterator[AsyncAnthropic]:
        http = DefaultAsyncHttpxClient(transport=self.guard)
        async with AsyncAnthropic(auth_token="t", base_url="http://api.test/base", http_client=http) as client:
            yield client

    async def request(self, method: str, path: str) -> int:
        async with httpx2.AsyncClient(transport=self.guard) as http:
            return (await http.request(method, f"http://api.test{path}")).status_code


@pytest.mark.parametrize(("stopping", "state"), [(False, "active"), (True, "stopping")])
def test_a_beat_is_answered_here_and_extends_the_lease_unless_stopping(stopping: bool, state: str) -> None:
    api = Api(stopping=stopping)

    async def beat() -> None:
        async with api.sdk() as client:
            reply = await client.beta.environments.work.heartbeat(
                "work_1", environment_id="env_1", expected_last_heartbeat="NO_HEARTBEAT"
            )
        assert (reply.state, reply.lease_extended) == (state, not stopping)
        assert reply.ttl_seconds == LEASE_TTL_SECONDS
        assert isinstance(reply.last_heartbeat, str)

    asyncio.run(beat())
    assert api.reached == []


def test_the_workers_own_stop_is_answered_here() -> None:
    api = Api()

    async def stop() -> None:
        async with api.sdk() as client:
            reply = await client.beta.environments.work.stop("work_1", environment_id="env_1", force=True)
        assert (reply.id, reply.environment_id, reply.data.id) == ("work_1", "env_1", SESSION)
        assert reply.state == "stopped"

    asyncio.run(stop())
    assert api.reached == []


WORK_CALLS: dict[str, Callable[[AsyncAnthropic], Awaitable[object]]] = {
    "poll": lambda client: client.beta.environments.work.poll("env_1"),
    "ack": lambda client: client.beta.environments.work.ack("work_1", environment_id="env_1"),
    "retrieve": lambda client: client.beta.environments.work.retrieve("work_1", environment_id="env_1"),
    "list": lambda client: client.beta.environments.work.list("env_1")._get_page(),
    "stats": lambda client: client.beta.environments.work.stats("env_1"),
}


@pytest.mark.parametrize("name", WORK_CALLS)
def test_no_other_work_call_leaves_the_process(name: str) -> None:
    api = Api()

    async def call() -> None:
        async with api.sdk() as client:
            with pytest.raises(PermissionDeniedError, match="control plane holds"):
                await WORK_CALLS[name](client)

    asyncio.run(call())
    assert api.reached == []
    assert api.refusals == []


@pytest.mark.parametrize(
    "path",
    [
        f"/v1/sessions/{SESSION}",
        f"/v1/sessions/{SESSION}/events/stream",
        "/v1/skills/skill_1/versions/latest",
        "/v1/memory_stores/memstore_1/memories",
    ],
)
def test_all_else_passes(path: str) -> None:
    api = Api()
    assert asyncio.run(api.request("GET", path)) == 200
    assert api.reached == [f"GET {path}"]


@pytest.mark.parametrize(
    ("method", "path", "status", "reported"),
    [
        ("GET", f"/v1/sessions/{SESSION}", 404, True),
        ("GET", f"/v1/sessions/{SESSION}/events/stream", 403, True),
        ("GET", f"/v1/sessions/{SESSION}/events", 401, True),
        ("GET", f"/v1/sessions/{SESSION}/events/stream", 400, True),  # the SDK ends on any final 4xx here
        ("POST", f"/v1/sessions/{SESSION}/events", 403, True),
        ("POST", f"/v1/sessions/{SESSION}/events", 404, False),  # may be about the event
        ("POST", f"/v1/sessions/{SESSION}/events", 400, False),
        ("GET", f"/v1/sessions/{SESSION}/events/stream", 429, False),  # passing: the SDK tries again
        ("GET", f"/v1/sessions/{SESSION}/events/stream", 503, False),
        ("GET", f"/v1/sessions/{SESSION}", 200, False),
        ("GET", "/v1/skills/skill_1/versions/latest", 404, False),  # a skill missing is not the session's end
        ("GET", "/v1/memory_stores/memstore_1/memories", 403, False),
    ],
)
def test_only_a_final_refusal_of_the_session_itself_is_reported(
    method: str, path: str, status: int, reported: bool
) -> None:
    api = Api(status)
    assert asyncio.run(api.request(method, path)) == status
    assert api.refusals == ([status] if reported else [])


@pytest.mark.parametrize(
    ("status", "path", "kind", "results"),
    [
        (200, f"/v1/sessions/{SESSION}/events", "user.tool_result", 1),
        (400, f"/v1/sessions/{SESSION}/events", "user.tool_result", 0),
        (200, f"/v1/sessions/{SESSION}/events", "user.interrupt", 0),
        (200, "/v1/memory_stores/m_1", "user.tool_result", 0),
    ],
)
def test_a_tool_result_that_the_api_took_is_told(status: int, path: str, kind: str, results: int) -> None:
    api = Api(status)

    async def post() -> None:
        async with httpx2.AsyncClient(transport=api.guard) as http:
            await http.post(f"http://api.test{path}", json={"events": [{"type": kind}]})

    asyncio.run(post())
    assert len(api.results) == results
