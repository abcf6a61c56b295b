"""The Work API's client: its eight calls and a session's events, replies as models, errors named for callers; no rules.

Which call to make and what follows from a reply is decided in `lifecycle`.
Facts and section numbers (W§n) are WORK_API.md's.
"""

import math
import random
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from threading import Lock
from typing import Annotated, Any, ClassVar, TypeVar
from urllib.parse import quote, urlencode
from urllib.request import getproxies, proxy_bypass

import httpx
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from shared import __version__

NO_HEARTBEAT = "NO_HEARTBEAT"
"""The expected value that claims an item which was never beaten (W§6.2)."""

_HEADERS = {
    "accept": "application/json",
    "anthropic-version": "2026-10-21",
    "anthropic-beta": "managed-agents-2026-04-01",
    "user-agent": f"sandbox-fleet/{__version__}",
}
_CALL_SECONDS = 10.0
_BRIEF_SECONDS = 3.0  # of what a launch waits for
_READ_TRIES = 3
_LONGEST_WAIT_SECONDS = 10.0
_NOT_IDS = frozenset({"", ".", "..", "poll", "stats"})  # they would address another endpoint (W§1)
_NOT_DONE = frozenset({408, 429, 529})  # refused before any work; a proxy's 502 to 504 leave that open
_TOKEN_LIKE = re.compile(r"sk-ant-[\w-]+|whsec_[\w+/=-]+|[\w-]{50,}")


class _Reply(BaseModel):
    """Keeps unknown fields (W§11.1), but shows only known ones: an unknown one may hold a secret."""

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        return ((name, getattr(self, name)) for name in type(self).model_fields)


class WorkData(_Reply):
    """What the item is for; only `type == "session"` gets a sandbox (W§10)."""

    type: str
    id: str | None = None


class Work(_Reply):
    """A work item (W§2). Times are the server's own strings; `secret` comes only with a poll's reply."""

    id: str = Field(min_length=1)
    environment_id: str
    data: WorkData
    state: str
    created_at: str | None = None
    acknowledged_at: str | None = None
    started_at: str | None = None
    latest_heartbeat_at: str | None = None
    stop_requested_at: str | None = None
    stopped_at: str | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(lambda value: {} if value is None else value)] = {}
    secret: SecretStr | None = None


class Heartbeat(_Reply):
    """An answered beat (W§6.1). Echo `last_heartbeat` byte for byte; it is "" if never claimed."""

    last_heartbeat: Annotated[str, BeforeValidator(lambda value: "" if value is None else value)] = ""
    lease_extended: bool
    state: str
    ttl_seconds: int = 0

    @model_validator(mode="after")
    def _an_extended_lease_can_be_kept(self) -> "Heartbeat":
        if self.lease_extended and (not self.last_heartbeat or self.ttl_seconds < 1):
            raise ValueError("an extended lease without a value to echo or a time to live")
        return self


class CurrentState(_Reply):
    """What the item is at a refused beat (W§6.3); all but `state` may be missing."""

    state: str
    last_heartbeat: str | None = None
    lease_updated_at: str | None = None
    lease_extended: bool | None = None
    ttl_seconds: int | None = None


class Stats(_Reply):
    """The queue's counters; acked items are in neither (W§9)."""

    depth: int
    pending: int
    oldest_queued_at: str | None = None
    workers_polling: int | None = None


class WorkPage(_Reply):
    """One page of the list, in no order to rely on; `next_page` is None on the last (W§9)."""

    data: list[Work]
    next_page: str | None = None


class StopReason(_Reply):
    """Why a session is idle; `event_ids` are the calls that a `requires_action` waits for (W§11.2)."""

    type: str
    event_ids: Annotated[tuple[str, ...], BeforeValidator(lambda value: () if value is None else value)] = ()


class SessionEvent(_Reply):
    """What is kept of an event of a session (W§11.2): never what was said, asked or answered."""

    model_config = ConfigDict(extra="ignore")
    type: str
    id: str | None = None
    processed_at: str | None = None
    stop_reason: StopReason | None = None
    evaluated_permission: str | None = None
    tool_use_id: str | None = None
    custom_tool_use_id: str | None = None


class EventPage(_Reply):
    """One page of a session's events; `next_page` is None on the last."""

    data: tuple[SessionEvent, ...]
    next_page: str | None = None


class Session(_Reply):
    """What is kept of a session (W§11.2): its metadata, which whoever created it wrote."""

    model_config = ConfigDict(extra="ignore")
    id: str
    metadata: Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)] = Field(
        {}, repr=False
    )


class WorkApiError(Exception):
    """A call that did not succeed. The message says what was tried, what came back and what to do."""

    advice: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        error_code: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(f"{message}. {self.advice}".strip())
        self.message = str(self)
        self.status = status
        self.error_code = error_code
        self.request_id = request_id


class LeaseLost(WorkApiError):
    """412: the item does not hold the expected value; `current_state` is None if not told (W§6.3)."""

    advice = "Compare the current state with the stored lease; post no stop."
    current_state: CurrentState | None = None


class NotQueued(WorkApiError):
    """An ack's 409: someone acked it first, or our own earlier ack's reply was lost (W§5.2)."""

    advice = "Leave the item unless an earlier ack of ours went unanswered."


class NotAllowed(WorkApiError):
    """401, 403 (also for an unknown environment, W§8), or a key that cannot be sent (`status` None)."""

    advice = (
        "Check that the configured key is current, belongs to this environment and may make this call "
        "(retrieve and update need an organisation key)."
    )


class Gone(WorkApiError):
    """404: no such item or environment."""

    advice = "Take the item as over; if every call answers so, check the environment id and base URL."


class Refused(WorkApiError):
    """Any other answer that repeating will not change."""

    advice = "Correct the request or the configured base URL; repeating it will not help."


class TryAgain(WorkApiError):
    """A passing fault. `maybe_done` tells whether the call may have taken effect all the same."""

    maybe_done: bool = True
    wait_seconds: float | None = None
    repeatable: bool = True  # False when the server sent `x-should-retry: false`


class Busy(TryAgain):
    """408, 429 or 5xx, with the server's wish in `wait_seconds` (None: it named none)."""

    advice = "Try again later."


class Unanswered(TryAgain):
    """A timeout, a broken connection or a reply that cannot be read."""

    advice = "Find out whether it took effect before repeating it; check the base URL if this goes on."


class NotSent(Unanswered):
    """No connection was made, so nothing took effect."""

    advice = "Try again later; check the base URL and the network if this goes on."
    maybe_done = False


class _AlreadyStopped(WorkApiError):
    """A stop's 409 (W§7.1)."""


class _Connections:
    """HTTP transports of one connection each, the last used first.

    httpx's own pool looks at all of its connections at every call: 96 threads get a third of these calls through it
    (bench/beats.py). Its client adds cookies, redirects and authentication, of which this API needs none.
    """

    def __init__(self, base_url: str, given: httpx.BaseTransport | None) -> None:
        self._given, self._idle = given, list[httpx.BaseTransport]()
        self._tls: ssl.SSLContext | None = None
        self._loading = Lock()
        url = httpx.URL(base_url)
        named = getproxies()
        proxy = None if proxy_bypass(url.host) else named.get(url.scheme) or named.get("all")
        self._proxy = f"http://{proxy}" if proxy and "://" not in proxy else proxy

    def send(self, request: httpx.Request) -> httpx.Response:
        """The whole reply. Raises httpx.HTTPError."""
        try:
            transport = self._idle.pop()
        except IndexError:
            transport = self._given or self._opened()
        try:
            reply = transport.handle_request(request)
            try:
                reply.read()
            finally:
                reply.close()  # of what cannot be decoded too, else its connection would stay taken
        finally:
            self._idle.append(transport)
        return reply

    def _opened(self) -> httpx.HTTPTransport:
        with self._loading:  # the certificates: 30 ms that a cold start need not wait for, once for all threads
            self._tls = self._tls or httpx.create_ssl_context()
        # Idle connections are dropped early: one that died while a function was frozen would leave a
        # stop or an ack unanswered.
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=5)
        return httpx.HTTPTransport(verify=self._tls, proxy=self._proxy, limits=limits)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


_Model = TypeVar("_Model", bound=BaseModel)
_Result = TypeVar("_Result")
_UNREADABLE = object()


class WorkApi:
    """The eight calls (W§1) for one environment, and its sessions' events.

    Build one, share it among any number of threads: each call has a connection of its own, kept for the next.
    `key` is asked at every call, so a rotated key takes effect at once. poll, ack, heartbeat and stop make
    exactly one attempt (DESIGN §7), `session` as well; the other reads and update try `_READ_TRIES` times on TryAgain.
    Every call raises WorkApiError; an argument that no server would take raises ValueError.
    """

    def __init__(
        self,
        base_url: str,
        environment_id: str,
        key: Callable[[], SecretStr],
        *,
        worker_id: str | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        base = f"{_checked_base_url(base_url)}/v1"
        self._root, self._sessions = f"{base}/environments/{_segment(environment_id)}/work", f"{base}/sessions"
        if worker_id is not None and not _fits_header(worker_id):
            raise ValueError("worker_id must be printable ASCII: it is sent as a header")
        self._key, self._worker_id, self._sleep = key, worker_id, sleep
        self._now, self._jitter = now, jitter
        self._http = _Connections(base_url, transport)

    def __repr__(self) -> str:
        return f"WorkApi({self._root!r})"

    def close(self) -> None:
        """Close the pooled connections."""
        self._http.close()

    def poll(self, *, block_ms: int | None = None, reclaim_older_than_ms: int | None = None) -> Work | None:
        """Take the next queued item, or None (W§5.1). `block_ms` is 1..999; None returns at once."""
        if block_ms is not None and not 1 <= block_ms <= 999:
            raise ValueError(f"block_ms must be 1..999, or None not to wait; got {block_ms}")
        reply = self._send(
            "GET",
            "/poll",
            "poll",
            params={"block_ms": block_ms, "reclaim_older_than_ms": reclaim_older_than_ms},
            headers={} if self._worker_id is None else {"Anthropic-Worker-ID": self._worker_id},
            timeout_seconds=(block_ms or 0) / 1000 + _CALL_SECONDS,
        )
        return self._item_or_none(reply, "poll")

    def ack(self, work_id: str) -> Work:
        """Take a polled item off the queue; NotQueued on a 409, also on a repeat (W§5.2)."""
        what = f"ack of {work_id}"
        reply = self._send("POST", f"/{_segment(work_id)}/ack", what, on_conflict=NotQueued)
        return self._read(Work, reply, what)

    def heartbeat(
        self,
        work_id: str,
        expected: str,
        *,
        desired_ttl_seconds: int | None = None,
        timeout_seconds: float = _CALL_SECONDS,
    ) -> Heartbeat:
        """Claim (`expected=NO_HEARTBEAT`) or extend (`expected`: the last value received) the lease (W§6).

        LeaseLost on a 412, and on a 409, which some services answer to a claim of a queued item (W§4).
        """
        if not expected:  # without it the server would claim or extend unconditionally (W§6.2)
            raise ValueError("expected must be the last heartbeat value or NO_HEARTBEAT")
        what = f"heartbeat of {work_id}"
        reply = self._send(
            "POST",
            f"/{_segment(work_id)}/heartbeat",
            what,
            params={"expected_last_heartbeat": expected, "desired_ttl_seconds": desired_ttl_seconds},
            timeout_seconds=timeout_seconds,
            on_conflict=LeaseLost,
        )
        return self._read(Heartbeat, reply, what)

    def stop(self, work_id: str, *, force: bool) -> Work | None:
        """Ask for (graceful) or make (forced) the item's end; None if the reply carries no item (W§7.1).

        It names no lease: a late or repeated one ends the session's next turn (DESIGN §7).
        """
        what = f"{'forced' if force else 'graceful'} stop of {work_id}"
        try:
            reply = self._send(
                "POST", f"/{_segment(work_id)}/stop", what, json={"force": force}, on_conflict=_AlreadyStopped
            )
        except _AlreadyStopped:
            return None
        return self._item_or_none(reply, what)

    def retrieve(self, work_id: str) -> Work:
        """Read one item; needs an organisation key (W§8)."""
        what, path = f"retrieve of {work_id}", f"/{_segment(work_id)}"
        return self._retrying(lambda: self._read(Work, self._send("GET", path, what), what))

    def update(
        self,
        work_id: str,
        metadata: Mapping[str, str | None],
        *,
        token: SecretStr | None = None,
    ) -> Work:
        """Set metadata keys, delete those given as None, keep the rest (W§7.2); needs an organisation key.

        With `token`, its session's own, one brief attempt.
        """
        what, path, body = f"update of {work_id}", f"/{_segment(work_id)}", {"metadata": dict(metadata)}
        seconds = _CALL_SECONDS if token is None else _BRIEF_SECONDS

        def update() -> Work:
            reply = self._send("POST", path, what, json=body, credential=token, timeout_seconds=seconds)
            return self._read(Work, reply, what)

        return self._retrying(update) if token is None else update()

    def list(self, *, limit: int = 100, page: str | None = None) -> WorkPage:
        """Read one page of at most `limit` (1..100) items; `page` is a previous page's `next_page` (W§9)."""
        if not 1 <= limit <= 100:
            raise ValueError(f"limit must be 1..100; got {limit}")
        params = {"limit": limit, "page": page}
        return self._retrying(lambda: self._read(WorkPage, self._send("GET", "", "list", params=params), "list"))

    def list_all(self) -> Iterator[Work]:
        """Every item, page after page; raises as `list_pages`."""
        for page in self.list_pages():
            yield from page.data

    def list_pages(self) -> Iterator[WorkPage]:
        """Every page, each read when it is asked for; Refused if the server repeats a page's cursor."""
        page, seen = None, set[str]()
        while True:
            reply = self.list(page=page)
            yield reply
            page = reply.next_page
            if not page:
                return
            if page in seen:
                raise Refused("list answered the same next_page twice")
            seen.add(page)

    def stats(self) -> Stats:
        """Read the queue's counters (W§9)."""
        return self._retrying(lambda: self._read(Stats, self._send("GET", "/stats", "stats"), "stats"))

    def newest_events(self, session_id: str, *, token: SecretStr | None = None) -> EventPage:
        """The session's last events, at most 50; with its own token, else with the key (W§8).

        `order` is the official SDK's. A server that does not know it may answer the oldest: progress.py tells.
        """
        what, url = f"events of {session_id}", f"{self._sessions}/{_segment(session_id)}/events"

        def read() -> EventPage:
            params: dict[str, str | int | None] = {"limit": 50, "order": "desc"}
            return self._read(EventPage, self._send("GET", url, what, params=params, credential=token), what)

        return self._retrying(read)

    def session(self, session_id: str, *, token: SecretStr | None = None) -> Session:
        """Read a session, once and briefly; with its own token, else with the key (W§8)."""
        what, url = f"session {session_id}", f"{self._sessions}/{_segment(session_id)}"
        return self._read(Session, self._send("GET", url, what, credential=token, timeout_seconds=_BRIEF_SECONDS), what)

    def interrupt(self, session_id: str) -> None:
        """Queue the work of a stuck session again (W§3); one attempt, with an organisation key."""
        what, url = f"interrupt of {session_id}", f"{self._sessions}/{_segment(session_id)}/events"
        self._send("POST", url, what, json={"events": [{"type": "user.interrupt"}]})

    def _send(
        self,
        method: str,
        path: str,
        what: str,
        *,
        credential: SecretStr | None = None,
        params: Mapping[str, str | int | None] | None = None,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_seconds: float = _CALL_SECONDS,
        on_conflict: type[WorkApiError] = Refused,
    ) -> httpx.Response:
        """One HTTP attempt; returns a 2xx reply. The timeout bounds each wait: to connect, for bytes.

        `path` is below the environment's work, or a URL of its own; `credential` replaces the environment key.
        """
        key = (credential or self._key()).get_secret_value().strip()
        if not _fits_header(key):
            raise NotAllowed(f"{what} was not sent: the key is empty or not printable ASCII")
        try:
            url = path if path.startswith(self._sessions) else self._root + path
            query = urlencode({name: value for name, value in (params or {}).items() if value is not None})
            request = httpx.Request(
                method,
                f"{url}?{query}" if query else url,
                json=json,
                headers={**_HEADERS, "Authorization": f"Bearer {key}", **(headers or {})},
                extensions={"timeout": httpx.Timeout(timeout_seconds).as_dict()},
            )
            reply = self._http.send(request)
        # The cause is not chained: its text could quote a header.
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise NotSent(f"{what} was not sent: {_reason(error, key)}") from None
        except httpx.HTTPError as error:
            raise Unanswered(f"{what} got no answer: {_reason(error, key)}") from None
        if not reply.is_success:
            raise self._error(reply, what, key, on_conflict)
        return reply

    def _error(self, reply: httpx.Response, what: str, key: str, on_conflict: type[WorkApiError]) -> WorkApiError:
        """The named error of a reply: by status and `details` only, never by `error.type` (W§11.1)."""
        status, body = reply.status_code, _object(_json(reply))
        error = _object(body.get("error"))
        details = _object(error.get("details"))
        said = _safe(error.get("message") or body.get("message") or body.get("error"), key)
        code = _safe(details.get("error_code"), key)
        request_id = _safe(reply.headers.get("request-id") or body.get("request_id"), key)
        message = f"{what} was answered {status}"
        message += f": {said.rstrip('.')}" if said else ""
        message += f" (request {request_id})" if request_id else ""
        named = _kind(status, on_conflict)(message, status=status, error_code=code, request_id=request_id)
        if isinstance(named, LeaseLost):
            named.current_state = _current_state(details)
        elif isinstance(named, Busy):
            named.wait_seconds = _wait_seconds(reply.headers, self._now)
            named.repeatable = reply.headers.get("x-should-retry", "").lower() != "false"
            named.maybe_done = status not in _NOT_DONE
        return named

    def _retrying(self, call: Callable[[], _Result]) -> _Result:
        """Repeat what is harmless to repeat, unless the server asks not to or for a longer wait than ours."""
        for tries in range(1, _READ_TRIES):
            try:
                return call()
            except TryAgain as error:
                wait = max(0.5 * 2**tries * (0.5 + self._jitter() / 2), error.wait_seconds or 0)
                if not error.repeatable or wait > _LONGEST_WAIT_SECONDS:
                    raise
            self._sleep(wait)
        return call()

    def _item_or_none(self, reply: httpx.Response, what: str) -> Work | None:
        """None for every form of "no item": 204, an empty body, `null`, `{}` (W§5.1, W§7.1)."""
        body = _json(reply) if reply.content.strip() else None
        nothing = body is None or (isinstance(body, dict) and not any(body.values()))
        return None if nothing else self._read(Work, reply, what)

    def _read(self, model: type[_Model], reply: httpx.Response, what: str) -> _Model:
        try:
            return model.model_validate(_json(reply))
        except ValidationError as error:
            wrong = sorted({".".join(map(str, field["loc"])) for field in error.errors()} - {""})
            raise Unanswered(
                f"{what} was answered {reply.status_code}, but the reply cannot be read"
                f" (wrong or missing: {', '.join(wrong[:5])[:200] or 'the whole body'})",
                status=reply.status_code,
                request_id=reply.headers.get("request-id"),
            ) from None


def _kind(status: int, on_conflict: type[WorkApiError]) -> type[WorkApiError]:
    if status in (408, 429) or status >= 500:
        return Busy
    kinds: dict[int, type[WorkApiError]] = {
        401: NotAllowed,
        403: NotAllowed,
        404: Gone,
        409: on_conflict,
        412: LeaseLost,
    }
    return kinds.get(status, Refused)


def _json(reply: httpx.Response) -> Any:
    try:
        return reply.json()
    except (ValueError, RecursionError):
        return _UNREADABLE


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _current_state(details: Mapping[str, Any]) -> CurrentState | None:
    try:
        return CurrentState.model_validate(details.get("current_state"))
    except ValidationError:
        return None


def _wait_seconds(headers: httpx.Headers, now: Callable[[], float]) -> float | None:
    """Seconds from `retry-after-ms` or `retry-after`: a number, or a date on the server's own clock."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    until = _epoch_seconds(headers.get("retry-after"))
    if until is None:
        return None
    sent = _epoch_seconds(headers.get("date"))
    return max(0.0, until - (now() if sent is None else sent))


def _epoch_seconds(http_date: str | None) -> float | None:
    try:
        return parsedate_to_datetime(http_date).timestamp() if http_date else None
    except (ValueError, OverflowError):
        return None


def _safe(text: Any, key: str) -> str | None:
    """A server's words on one short line, with the key and whatever looks like a token taken out."""
    if not isinstance(text, str):
        return None
    return _TOKEN_LIKE.sub("[hidden]", " ".join(text.replace(key, "[hidden]").split()))[:300]


def _reason(error: Exception, key: str) -> str:
    return f"{type(error).__name__} {_safe(str(error), key) or ''}".rstrip(" .")


def _fits_header(value: str) -> bool:
    return bool(value) and value.isascii() and value.isprintable()


def _segment(opaque_id: str) -> str:
    """One path segment, whatever the id holds (W§2)."""
    if opaque_id in _NOT_IDS:
        raise ValueError(f"{opaque_id!r} is not the id of a work item or an environment")
    return quote(opaque_id, safe="")


def _checked_base_url(base_url: str) -> str:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    # A URL with a user or a query could hold a secret, and httpx logs URLs.
    if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
        raise ValueError("base_url must be http(s)://host[:port][/path], without user, query or fragment")
    return str(url).rstrip("/")
