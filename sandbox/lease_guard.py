"""The HTTP transport between the SDK's worker and the API; how a turn goes and ends lives in runner.py.

The control plane owns the lease (DESIGN §8), so no call about the work item may leave through here: the
worker's heartbeat and stop are answered in the process. Everything else passes.
"""

import re
import socket
from collections.abc import Callable

import httpx2

# The default lease of the API (W§6.2). The SDK takes from it how long a tool result is sent again, so a short
# one would drop results in a brief outage. A stop does not wait for the next beat (runner.EarlyEnd).
LEASE_TTL_SECONDS = 300

_WORK_CALL = re.compile(r"/v1/environments/(?P<environment>[^/]+)/work(?:/(?P<work>[^/]+)(?:/(?P<verb>[^/]+))?)?$")
_SESSION_CALL = re.compile(r"/v1/sessions/(?P<session>[^/]+)(?:/events(?:/stream)?)?$")

# What the SDK tries again (W§11.1).
_PASSING = (408, 409, 429)

# A long tool call leaves the event stream silent, and NAT gateways drop connections idle for 350 s.
_KEEP_ALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 60), ("TCP_KEEPCNT", 5))
    if hasattr(socket, name)
]


class LeaseGuard(httpx2.AsyncBaseTransport):
    """Answers the worker's calls about its work item and passes on all others.

    `stopping` is asked at each beat; true is answered as the API answers a requested stop (W§4).
    `on_refused` is called with the status when the API refuses the session itself for good. The SDK's worker
    logs such a refusal and ends as if all were well: only the transport sees the difference.
    `on_result` is called when the API has taken a tool's result.
    """

    def __init__(
        self,
        *,
        session_id: str,
        stopping: Callable[[], bool],
        on_refused: Callable[[int], None],
        on_result: Callable[[], None] = lambda: None,
        inner: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._session_id = session_id
        self._stopping = stopping
        self._on_refused = on_refused
        self._on_result = on_result
        self._inner = inner or httpx2.AsyncHTTPTransport(socket_options=_KEEP_ALIVE)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if call := _WORK_CALL.search(request.url.path):
            return self._answer(request, call)
        response = await self._inner.handle_async_request(request)
        if self._refuses_session(request, response.status_code):
            self._on_refused(response.status_code)
        elif response.is_success and await self._gives_result(request):
            self._on_result()
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()

    def _answer(self, request: httpx2.Request, call: re.Match[str]) -> httpx2.Response:
        stopping = self._stopping()
        body: dict[str, object]
        if request.method == "POST" and call["verb"] == "heartbeat":
            body = {
                "type": "work_heartbeat",
                "last_heartbeat": "held-by-control-plane",
                "lease_extended": not stopping,
                "state": "stopping" if stopping else "active",
                "ttl_seconds": LEASE_TTL_SECONDS,
            }
        elif request.method == "POST" and call["verb"] == "stop":
            # Sent after a crash or SIGTERM too, where the turn goes on elsewhere (DESIGN §8): not passed on.
            body = {
                "type": "work",
                "id": call["work"],
                "environment_id": call["environment"],
                "data": {"type": "session", "id": self._session_id},
                "state": "stopped",
                "created_at": "1970-01-01T00:00:00Z",
                "metadata": {},
            }
        else:
            message = "the control plane holds this work item; a sandbox may not make this call"
            error = {"type": "permission_error", "message": message}
            return httpx2.Response(403, request=request, json={"type": "error", "error": error})
        return httpx2.Response(200, request=request, json=body)

    async def _gives_result(self, request: httpx2.Request) -> bool:
        posts_events = request.method == "POST" and _SESSION_CALL.search(request.url.path)
        return bool(posts_events) and b'"user.tool_result"' in await request.aread()

    def _refuses_session(self, request: httpx2.Request, status: int) -> bool:
        call = _SESSION_CALL.search(request.url.path)
        if call is None or call["session"] != self._session_id:
            return False
        # Another 4xx to a POST may be about the one event it sent; to a GET it is about the session.
        final = 400 <= status < 500 and status not in _PASSING
        return status in (401, 403) or (final and request.method == "GET")
