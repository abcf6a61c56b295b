"""The emulator over HTTP: its routes and what each call does; no rules of the queue or the agent.

`/v1/` is the API as WORK_API.md (W§n) tells it; `/_control/` is ours, for tests: no credentials, loopback only.
There, `switches` shows and sets how open points are answered, `faults` which calls fail and how.
"""

import asyncio
import contextlib
import json
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from local.work_api.access import Access, Caller
from local.work_api.faults import Call, Fault, Faults
from local.work_api.replies import (
    Unanswered,
    body_of,
    check_beta,
    check_loopback,
    envelope,
    failed,
    flag_in,
    integer_in,
    json_reply,
    log_refusal,
    new_id,
    no_route,
    rate_limited,
    refused,
    request_id_header,
    text_of,
    token_of,
)
from local.work_api.sessions import Event, Session, Sessions, read_events, read_script
from local.work_api.state import DEFAULT_LIMIT, DEFAULT_RECLAIM_MS, Refusal, WorkQueue, merged_metadata, timestamp
from local.work_api.switches import Switches, wrong_in
from local.work_api.webhooks import Webhooks

MOST_BLOCK_MS = 999
MOST_EVENTS = 1000
MOST_RECLAIM_MS = 600_000
MOST_CALLS_A_MINUTE = 60  # where calls are limited at all
_PING_SECONDS = 10.0

# What each work call knows in its query and in its body.
_QUERY = {
    "list": {"limit", "page"},
    "poll": {"block_ms", "reclaim_older_than_ms"},
    "heartbeat": {"desired_ttl_seconds", "expected_last_heartbeat"},
}
_BODY = {"stop": {"force"}, "update": {"metadata"}}

Handler = Callable[[Request], Awaitable[Response]]


class Emulator:
    """One self-hosted environment: its queue, sessions and keys, and the application that serves them.

    All of it lives in the event loop that serves `app`; reach it from outside over HTTP only.
    """

    def __init__(
        self, environment_id: str, environment_key: str, org_key: str, switches: Switches | None = None
    ) -> None:
        self._ahead = timedelta()
        self._access = Access(environment_id, environment_key, org_key, self._now)
        self._queue = WorkQueue(environment_id, self._now)
        self._set_switches(switches or Switches())
        self._faults = Faults()
        self._recent: deque[datetime] = deque()
        self._sessions = Sessions(environment_id, self._now, new_id)
        self._webhooks = Webhooks(self._now, new_id)
        self._calls: list[dict[str, Any]] = []
        self._woken = asyncio.Event()
        self._closing = False
        self.cut: Callable[[Any], None] | None = None  # the server's, which has the connections
        self.app = Starlette(
            routes=self._routes(),
            exception_handlers={Refusal: refused, HTTPException: no_route, Exception: failed},
        )

    def close(self) -> None:
        """End every open stream and blocked poll, so that the server can end."""
        self._closing = True
        self._wake()
        self._webhooks.close()
        for session in self._sessions.all():
            session.close_streams()

    def _routes(self) -> list[Route]:
        work, session = "/v1/environments/{environment_id}/work", "/v1/sessions/{session_id}"
        # The literals come before {work_id} (W§1).
        return [
            Route(work, self._work("list", self._list), methods=["GET"]),
            Route(f"{work}/poll", self._work("poll", self._poll), methods=["GET"]),
            Route(f"{work}/stats", self._work("stats", self._stats), methods=["GET"]),
            Route(f"{work}/{{work_id}}", self._work("retrieve", self._retrieve), methods=["GET"]),
            Route(f"{work}/{{work_id}}", self._work("update", self._update), methods=["POST"]),
            Route(f"{work}/{{work_id}}/ack", self._work("ack", self._ack), methods=["POST"]),
            Route(f"{work}/{{work_id}}/heartbeat", self._work("heartbeat", self._heartbeat), methods=["POST"]),
            Route(f"{work}/{{work_id}}/stop", self._work("stop", self._stop), methods=["POST"]),
            Route(session, self._exposed(self._session), methods=["GET"]),
            Route(f"{session}/events", self._exposed(self._events), methods=["GET"]),
            Route(f"{session}/events", self._exposed(self._post_events), methods=["POST"]),
            Route(f"{session}/events/stream", self._exposed(self._stream), methods=["GET"]),
            Route("/v1/skills/{rest:path}", self._exposed(self._no_skill), methods=["GET"]),
            self._control("sessions", self._new_sessions),
            self._control("sessions/{session_id}/messages", self._new_message),
            self._control("work", self._new_work),
            self._control("work/{work_id}/stop", self._control_stop),
            self._control("work/{work_id}/take_lease", self._take_lease),
            self._control("work/{work_id}/finish_foreign", self._finish_foreign),
            self._control("keys", self._new_key),
            self._control("clock", self._clock),
            self._control("webhook", self._register_webhook),
            self._control("state", self._state, "GET"),
            self._control("secrets", self._secrets, "GET"),
            self._control("switches", self._change_switches),
            self._control("switches", self._show_switches, "GET"),
            self._control("faults", self._new_fault),
            self._control("faults", self._show_faults, "GET"),
            self._control("faults", self._end_faults, "DELETE"),
        ]

    # The work endpoints

    def _work(self, call: Call, answer: Callable[[Request], Awaitable[dict[str, Any] | None]]) -> Handler:
        """Wraps a work call: beta header, credential, and a line in the record of calls, refused ones too."""

        async def handle(request: Request) -> Response:
            work_id = request.path_params.get("work_id")
            record = {"at": timestamp(self._now()), "call": call, "work_id": work_id, "credential": "none"}
            record |= {"status": 500, "force": None, "fault": None}
            self._calls.append(record)

            async def act() -> Response:
                try:
                    return await self._answered(call, answer, request, record)
                except Refusal as refusal:
                    record["status"] = refusal.status
                    if refusal.type == "not_found_error" and self._queue.switches.unknown_work == "bare":
                        log_refusal(request, refusal)
                        return JSONResponse({"detail": "Not Found"}, 404)
                    raise

            try:
                check_beta(request)
                caller = self._access.caller(token_of(request))
                record["credential"] = caller.credential
                self._access.check_work(caller, call, request.path_params["environment_id"], work_id)
                if call == "stop":
                    record["force"] = flag_in(await body_of(request), "force")
            except Refusal as refusal:
                record["status"] = refusal.status
                raise
            fault = self._faults.due(call, work_id)
            if fault is None:
                return await act()
            record["fault"] = fault.kind
            if fault.kind not in ("lost", "delay"):  # nothing is done
                record["status"] = fault.status if fault.kind == "status" else None
            return await self._failed_by(fault, act)

        return handle

    async def _answered(
        self,
        call: Call,
        answer: Callable[[Request], Awaitable[dict[str, Any] | None]],
        request: Request,
        record: dict[str, Any],
    ) -> Response:
        """A work call that is done: its limits, its reply, and what the record of calls says of it."""
        self._check_rate()
        await self._check_fields(call, request)
        work_id, stop_reply = request.path_params.get("work_id"), self._queue.switches.stop_reply
        if call == "stop" and stop_reply == "409" and self._queue.get(str(work_id)).state == "stopped":
            raise Refusal(409, f"Work item {work_id} is already stopped.")
        reply = await answer(request)
        if call == "poll" and reply:
            record["work_id"] = reply["id"]
        if call == "stop" and stop_reply == "204":
            record["status"] = 204
            return Response(status_code=204, headers=request_id_header())
        record["status"] = 200
        return json_reply(reply)

    def _check_rate(self) -> None:
        """Raises Refusal 429 with its retry-after (W§11.1)."""
        if self._queue.switches.rate_limit == "none":
            return
        now, recent = self._now(), self._recent
        while recent and recent[0] <= now - timedelta(minutes=1):
            recent.popleft()
        if len(recent) >= MOST_CALLS_A_MINUTE:
            wait = math.ceil((recent[0] + timedelta(minutes=1) - now).total_seconds())
            raise rate_limited(max(1, wait))
        recent.append(now)

    async def _check_fields(self, call: str, request: Request) -> None:
        if self._queue.switches.unknown_fields == "ignored":
            return
        unknown = set(request.query_params) - _QUERY.get(call, set()) - {"beta"}  # older SDKs add `beta` (W§1)
        if call in _BODY:
            unknown |= set(await body_of(request)) - _BODY[call]
        if unknown:
            raise Refusal(400, f"Unknown fields: {', '.join(sorted(unknown))}.")

    def _exposed(self, handler: Handler) -> Handler:
        """Wraps a session call: faults may hit it too."""

        async def handle(request: Request) -> Response:
            fault = self._faults.due("session", None)
            return await handler(request) if fault is None else await self._failed_by(fault, lambda: handler(request))

        return handle

    async def _failed_by(self, fault: Fault, act: Callable[[], Awaitable[Response]]) -> Response:
        """The reply to a call that a fault hits; `act` is run only where the fault lets the action happen."""
        match fault.kind:
            case "delay":
                await asyncio.sleep(fault.seconds)
                return await act()
            case "lost":
                with contextlib.suppress(Refusal):
                    await act()
                return Unanswered(self.cut)
            case "away":
                return Unanswered(self.cut)
            case "malformed":
                return Response('{"type": "wo', media_type="application/json", headers=request_id_header())
            case "content_type":
                return Response("<html>Service page</html>", media_type="text/html")
            case "status":
                kind = {429: "rate_limit_error", 529: "overloaded_error"}.get(fault.status)
                kind = kind or ("api_error" if fault.status >= 500 else "invalid_request_error")
                return envelope(Refusal(fault.status, "Injected fault.", type=kind, retry_after=fault.retry_after))

    async def _poll(self, request: Request) -> dict[str, Any] | None:
        switches = self._queue.switches
        clamps = switches.long_block == "clamp"
        block_ms = integer_in(request, "block_ms", None, 1, None if clamps else MOST_BLOCK_MS)
        block_ms = None if block_ms is None else min(block_ms, MOST_BLOCK_MS)
        try:
            reclaim = integer_in(request, "reclaim_older_than_ms", DEFAULT_RECLAIM_MS, 0)
        except Refusal:
            if switches.reclaim_range == "400":
                raise
            reclaim = DEFAULT_RECLAIM_MS
        if switches.reclaim_range == "default":  # as one clone of the API has it (W§5.1)
            reclaim = min(reclaim or DEFAULT_RECLAIM_MS, MOST_RECLAIM_MS)
        worker = request.headers.get("anthropic-worker-id")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (block_ms or 0) / 1000
        while True:
            woken = self._woken
            item = self._queue.poll(DEFAULT_RECLAIM_MS if reclaim is None else reclaim, worker)
            if item is not None:
                return item.body(self._access.issue_secret(item.id, item.data_id))
            left = deadline - loop.time()
            if left <= 0 or self._closing:
                return None
            try:
                await asyncio.wait_for(woken.wait(), left)
            except TimeoutError:
                continue  # one last look: a lease may have lapsed meanwhile

    async def _ack(self, request: Request) -> dict[str, Any]:
        return self._queue.ack(request.path_params["work_id"]).body()

    async def _heartbeat(self, request: Request) -> dict[str, Any]:
        ttl = integer_in(request, "desired_ttl_seconds", None, 1)
        expected = request.query_params.get("expected_last_heartbeat")
        return self._queue.heartbeat(request.path_params["work_id"], expected, ttl)

    async def _stop(self, request: Request) -> dict[str, Any]:
        force = flag_in(await body_of(request), "force")
        return self._queue.stop(request.path_params["work_id"], force=force).body()

    async def _retrieve(self, request: Request) -> dict[str, Any]:
        return self._queue.get(request.path_params["work_id"]).body()

    async def _update(self, request: Request) -> dict[str, Any]:
        patch = (await body_of(request)).get("metadata")
        return self._queue.update(request.path_params["work_id"], patch).body()

    async def _list(self, request: Request) -> dict[str, Any]:
        limit = integer_in(request, "limit", DEFAULT_LIMIT)
        return self._queue.list(DEFAULT_LIMIT if limit is None else limit, request.query_params.get("page"))

    async def _stats(self, request: Request) -> dict[str, Any]:  # noqa: ARG002 - it has no parameters
        return self._queue.stats()

    # The session endpoints

    def _reach_session(self, request: Request) -> tuple[Session, Caller]:
        check_beta(request)
        caller = self._access.caller(token_of(request))
        session_id = request.path_params["session_id"]
        self._access.check_session(caller, session_id)
        return self._sessions.get(session_id), caller

    async def _session(self, request: Request) -> Response:
        session, _ = self._reach_session(request)
        return json_reply(session.body())

    async def _events(self, request: Request) -> Response:
        session, _ = self._reach_session(request)
        limit = integer_in(request, "limit", MOST_EVENTS, 1, MOST_EVENTS)
        return json_reply(
            session.page(
                limit or MOST_EVENTS, request.query_params.get("page"), request.query_params.get("order", "asc")
            )
        )

    async def _post_events(self, request: Request) -> Response:
        session, caller = self._reach_session(request)
        events = read_events((await body_of(request)).get("events"))
        for event in events:
            self._access.check_event(caller, event)
        kept: list[Event] = []
        for event in events:
            if event.get("type") == "user.message":
                self._message(session, text_of(event), None)
                continue
            kept.append(session.post(event))
            if event.get("type") == "user.interrupt":  # W§3: a stuck session's work is queued again
                self._queue_again(session)
        return json_reply({"data": kept})

    async def _stream(self, request: Request) -> Response:
        session, _ = self._reach_session(request)
        queue = session.subscribe()

        async def frames() -> AsyncIterator[str]:
            try:
                yield ": open\n\n"
                while not self._closing:
                    try:
                        event = await asyncio.wait_for(queue.get(), _PING_SECONDS)
                    except TimeoutError:
                        yield "event: ping\ndata: {}\n\n"
                        continue
                    if event is None:
                        return
                    # Without an `event:` line the SDK drops a frame (W§11.3).
                    yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
            finally:
                session.unsubscribe(queue)

        return StreamingResponse(frames(), media_type="text/event-stream", headers=request_id_header())

    async def _no_skill(self, request: Request) -> Response:
        self._access.caller(token_of(request))
        raise Refusal(404, "The emulator has no skills.", type="not_found_error")

    # The control routes

    def _control(self, path: str, answer: Handler, method: str = "POST") -> Route:
        async def handle(request: Request) -> Response:
            check_loopback(request)
            return await answer(request)

        return Route(f"/_control/{path}", handle, methods=[method])

    def _foreign(self, call: str, work_id: str, *, force: bool | None = None) -> None:
        """What somebody else did, in its place among the recorded calls."""
        record = {"at": timestamp(self._now()), "call": call, "work_id": work_id, "credential": "control"}
        self._calls.append(record | {"status": 200, "force": force})

    async def _new_sessions(self, request: Request) -> Response:
        body = await body_of(request)
        script, count = read_script(body.get("script")), body.get("count", 1)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise Refusal(400, "count must be a positive integer.")
        metadata, made = merged_metadata({}, body.get("metadata", {})), []
        for _ in range(count):
            session = self._sessions.create(metadata)
            session.message(str(body.get("text", "Begin.")), script)
            work_id = session.id if self._queue.switches.work_id == "session" else new_id("work")
            self._webhooks.announce(session.id)
            made.append({"session_id": session.id, "work_id": self._queue.enqueue(work_id, data_id=session.id).id})
        self._wake()
        return json_reply({"id": made[0]["session_id"], "sessions": made})

    async def _new_message(self, request: Request) -> Response:
        body = await body_of(request)
        session = self._sessions.get(request.path_params["session_id"])
        self._message(session, str(body.get("text", "Go on.")), body.get("script"))
        return json_reply({"session_id": session.id, "work_id": self._queue.of_session(session.id).id})

    async def _new_work(self, request: Request) -> Response:
        kind = (await body_of(request)).get("type", "healthcheck")
        if not isinstance(kind, str) or kind == "session":
            raise Refusal(400, "type must be a string, and not session: POST /_control/sessions makes those.")
        item = self._queue.enqueue(new_id("work"), kind)
        self._wake()
        return json_reply({"work_id": item.id})

    async def _control_stop(self, request: Request) -> Response:
        force = flag_in(await body_of(request), "force")
        item = self._queue.stop(request.path_params["work_id"], force=force)
        self._foreign("control_stop", item.id, force=force)
        return json_reply(item.body())

    async def _take_lease(self, request: Request) -> Response:
        item = self._queue.take_lease(request.path_params["work_id"])
        self._foreign("take_lease", item.id)
        return json_reply(item.body())

    async def _finish_foreign(self, request: Request) -> Response:
        item = self._queue.stop(request.path_params["work_id"], force=True)
        self._foreign("finish_foreign", item.id, force=True)
        return json_reply(item.body())

    async def _new_key(self, request: Request) -> Response:
        """One more environment key; the first stays good, as until it is revoked."""
        key = (await body_of(request)).get("key")
        if not isinstance(key, str) or not key:
            raise Refusal(400, "key must be a string that is not empty.")
        self._access.more_keys.append(key)
        return json_reply({"keys": 1 + len(self._access.more_keys)})

    async def _clock(self, request: Request) -> Response:
        seconds = (await body_of(request)).get("advance_seconds")
        if not isinstance(seconds, int | float) or isinstance(seconds, bool) or seconds < 0:
            raise Refusal(400, "advance_seconds must be a number that is not negative.")
        self._ahead += timedelta(seconds=seconds)
        self._wake()
        return json_reply({"now": timestamp(self._now())})

    async def _register_webhook(self, request: Request) -> Response:
        body = await body_of(request)
        self._webhooks.register(body.get("url"), body.get("key"))
        return json_reply({})

    async def _state(self, request: Request) -> Response:  # noqa: ARG002 - it has no parameters
        sessions = [
            {
                "session_id": session.id,
                "status": session.status,
                "turns_finished": session.turns_finished,
                "mismatches": session.mismatches,
                "results": session.results,
            }
            for session in self._sessions.all()
        ]
        work = [{key: value for key, value in item.body().items() if key != "secret"} for item in self._queue.items()]
        state = {"sessions": sessions, "work": work, "calls": self._calls, "webhooks": self._webhooks.deliveries}
        return json_reply(state)

    async def _secrets(self, request: Request) -> Response:  # noqa: ARG002 - it has no parameters
        return json_reply({"secrets": self._access.issued})

    async def _change_switches(self, request: Request) -> Response:
        try:
            self._set_switches(self._queue.switches.changed(await body_of(request)))
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        return await self._show_switches(request)

    async def _show_switches(self, request: Request) -> Response:  # noqa: ARG002 - it has no parameters
        return json_reply(self._queue.switches.model_dump())

    async def _new_fault(self, request: Request) -> Response:
        try:
            self._faults.add(Fault.model_validate(await body_of(request)))
        except ValidationError as error:
            raise Refusal(400, f"bad fault: {wrong_in(error)}") from None
        return await self._show_faults(request)

    async def _show_faults(self, request: Request) -> Response:  # noqa: ARG002 - it has no parameters
        return json_reply({"faults": [fault.model_dump() for fault in self._faults.left()]})

    async def _end_faults(self, request: Request) -> Response:
        self._faults.clear()
        return await self._show_faults(request)

    # What several of them share

    def _now(self) -> datetime:
        return datetime.now(UTC) + self._ahead

    def _set_switches(self, switches: Switches) -> None:
        self._queue.switches = self._access.switches = switches

    def _message(self, session: Session, text: str, script: Any) -> None:
        session.message(text, read_script(script))
        self._queue_again(session)

    def _queue_again(self, session: Session) -> None:
        if self._queue.message_arrived(self._queue.of_session(session.id).id):
            self._wake()
            self._webhooks.announce(session.id)

    def _wake(self) -> None:
        # Each waiter holds the event of its own look, so none misses a wake between look and wait.
        self._woken.set()
        self._woken = asyncio.Event()


class Server(uvicorn.Server):
    """uvicorn that lets go of open streams when it is told to end, instead of waiting for their clients."""

    def __init__(self, emulator: Emulator, host: str, port: int) -> None:
        config = uvicorn.Config(
            self._app,
            interface="asgi3",
            host=host,
            port=port,
            log_level="error",
            access_log=False,
            timeout_graceful_shutdown=2,
        )
        super().__init__(config)
        self.serve_instead(emulator)

    def serve_instead(self, emulator: Emulator) -> None:
        """From the next request on: a fresh emulator without a fresh server."""
        self._emulator = emulator
        emulator.cut = self._cut

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._emulator.app(scope, receive, send)

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """None: uvicorn's own way ends the process by the signal instead of an exit; see `__main__`."""
        return contextlib.nullcontext()

    def _cut(self, peer: Any) -> None:
        for connection in list(self.server_state.connections):
            if getattr(connection, "client", None) == peer:
                connection.transport.abort()

    async def shutdown(self, sockets: Any = None) -> None:
        """Called by uvicorn once it is to end."""
        self._emulator.close()
        await super().shutdown(sockets)

    @property
    def url(self) -> str:
        """Where a started server listens."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{host}:{port}"
