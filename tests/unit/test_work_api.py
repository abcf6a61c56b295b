"""The Work API client against scripted replies, one rule of WORK_API.md a test; no emulator here."""

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from shared.work_api import (
    NO_HEARTBEAT,
    Busy,
    Gone,
    LeaseLost,
    NotAllowed,
    NotQueued,
    NotSent,
    Refused,
    TryAgain,
    Unanswered,
    WorkApi,
    WorkApiError,
)

KEY = "sk-ant-oat01-the-environment-key"
SECRET = "eyJzZXNzaW9uc190b2tlbiI6InRvcC1zZWNyZXQtdG9rZW4ifQ"
ITEM: dict[str, Any] = {
    "type": "work",
    "id": "sesn_1",
    "environment_id": "env_1",
    "data": {"type": "session", "id": "sesn_1"},
    "state": "queued",
    "created_at": "2026-09-02T00:08:33.477978Z",
    "metadata": {},
    "secret": None,
    "actor": None,
}
BEAT: dict[str, Any] = {
    "type": "work_heartbeat",
    "last_heartbeat": "2026-09-02T00:08:33.47797Z",
    "lease_extended": True,
    "state": "active",
    "ttl_seconds": 300,
}
STATS = {
    "type": "work_queue_stats",
    "depth": 2,
    "pending": 1,
    "oldest_queued_at": None,
    "workers_polling": None,
}
NOW = 1_800_000_000.0

Answer = httpx.Response | Exception


class Server:
    """Plays scripted answers in order (the last one for ever) and keeps what was asked and slept."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.slept: list[float] = []
        self.keys: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def request(self) -> httpx.Request:
        assert len(self.requests) == 1
        return self.requests[0]

    def api(self, base_url: str = "https://api.test", environment_id: str = "env_1", **options: Any) -> WorkApi:
        def key() -> SecretStr:
            return SecretStr(self.keys.pop(0) if self.keys else KEY)

        return WorkApi(
            base_url,
            environment_id,
            key,
            transport=httpx.MockTransport(self),
            sleep=self.slept.append,
            now=lambda: NOW,
            jitter=lambda: 1.0,
            **options,
        )


def ok(body: Any) -> httpx.Response:
    return httpx.Response(200, json=body)


def failure(
    status: int,
    message: str = "no",
    *,
    type_: str = "invalid_request_error",
    details: Any = None,
    **headers: str,
) -> httpx.Response:
    error: dict[str, Any] = {"type": type_, "message": message}
    if details is not None:
        error["details"] = details
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = {"type": "error", "error": error, "request_id": "req_1"}
    return httpx.Response(status, json=body, headers=named)


CALLS: dict[str, Callable[[WorkApi], Any]] = {
    "poll": lambda api: api.poll(),
    "ack": lambda api: api.ack("sesn_1"),
    "heartbeat": lambda api: api.heartbeat("sesn_1", NO_HEARTBEAT),
    "stop": lambda api: api.stop("sesn_1", force=True),
    "retrieve": lambda api: api.retrieve("sesn_1"),
    "update": lambda api: api.update("sesn_1", {"a": None}),
    "list": lambda api: api.list(),
    "stats": lambda api: api.stats(),
}
ONE_ATTEMPT = ["poll", "ack", "heartbeat", "stop"]
REPEATED = ["retrieve", "update", "list", "stats"]
call_names = pytest.mark.parametrize("name", CALLS)


# --- what is sent -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reply", "method", "path", "body"),
    [
        ("poll", ITEM, "GET", "/poll", b""),
        ("ack", ITEM, "POST", "/sesn_1/ack", b""),
        ("heartbeat", BEAT, "POST", "/sesn_1/heartbeat?expected_last_heartbeat=NO_HEARTBEAT", b""),
        ("stop", ITEM, "POST", "/sesn_1/stop", b'{"force":true}'),
        ("retrieve", ITEM, "GET", "/sesn_1", b""),
        ("update", ITEM, "POST", "/sesn_1", b'{"metadata":{"a":null}}'),
        ("list", {"data": [ITEM], "next_page": None}, "GET", "?limit=100", b""),
        ("stats", STATS, "GET", "/stats", b""),
    ],
)
def test_each_call_has_its_method_path_and_body(name: str, reply: Any, method: str, path: str, body: bytes) -> None:
    server = Server(ok(reply))
    CALLS[name](server.api())
    assert server.request.method == method
    assert str(server.request.url) == f"https://api.test/v1/environments/env_1/work{path}"
    assert server.request.content == body


@call_names
def test_every_call_carries_bearer_version_beta_and_user_agent(name: str) -> None:
    server = Server(failure(404))
    with pytest.raises(Gone):
        CALLS[name](server.api())
    headers = server.request.headers
    assert headers["authorization"] == f"Bearer {KEY}"
    assert headers["anthropic-version"] == "2026-10-21"
    assert headers["anthropic-beta"] == "managed-agents-2026-04-01"
    assert headers["user-agent"].startswith("sandbox-fleet/")
    assert "x-api-key" not in headers


def test_the_worker_id_goes_with_polls_only() -> None:
    server = Server(ok(ITEM))
    api = server.api(worker_id="poller-1")
    api.poll()
    api.ack("sesn_1")
    assert [request.headers.get("anthropic-worker-id") for request in server.requests] == ["poller-1", None]


def test_a_rotated_key_is_used_at_the_next_call() -> None:
    server = Server(ok(None))
    server.keys = ["old", "new\n"]
    api = server.api()
    api.poll()
    api.poll()
    assert [request.headers["authorization"] for request in server.requests] == ["Bearer old", "Bearer new"]


def test_poll_options_are_sent_only_when_given() -> None:
    server = Server(ok(None))
    api = server.api()
    api.poll()
    api.poll(block_ms=999, reclaim_older_than_ms=2000)
    assert [dict(request.url.params) for request in server.requests] == [
        {},
        {"block_ms": "999", "reclaim_older_than_ms": "2000"},
    ]


@pytest.mark.parametrize("block_ms", [0, -1, 1000])
def test_a_block_the_server_would_refuse_is_refused_here(block_ms: int) -> None:
    server = Server(ok(None))
    with pytest.raises(ValueError, match=r"1\.\.999"):
        server.api().poll(block_ms=block_ms)
    assert server.requests == []


@pytest.mark.parametrize("limit", [0, 101])
def test_a_page_size_the_server_may_refuse_is_refused_here(limit: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.100"):
        Server(ok(None)).api().list(limit=limit)


@pytest.mark.parametrize("value", ["2026-09-02T00:08:33Z", "2026-09-02T00:08:33.100000+00:00", "a b+c&d=é%20"])
def test_the_heartbeat_value_travels_byte_for_byte_both_ways(value: str) -> None:
    server = Server(ok(BEAT | {"last_heartbeat": value}))
    beat = server.api().heartbeat("sesn_1", value, desired_ttl_seconds=120)
    assert beat.last_heartbeat == value
    assert dict(server.request.url.params) == {"expected_last_heartbeat": value, "desired_ttl_seconds": "120"}


def test_a_heartbeat_without_an_expected_value_is_never_sent() -> None:
    server = Server(ok(BEAT))
    with pytest.raises(ValueError, match="expected"):
        server.api().heartbeat("sesn_1", "")
    assert server.requests == []


def test_the_timeout_of_a_poll_outlasts_its_block_and_a_beat_has_its_own() -> None:
    server = Server(ok(None), ok(None), ok(BEAT))
    api = server.api()
    api.poll()
    api.poll(block_ms=500)
    api.heartbeat("sesn_1", NO_HEARTBEAT, timeout_seconds=3)
    plain, blocking, beat = (request.extensions["timeout"]["read"] for request in server.requests)
    assert blocking == plain + 0.5
    assert beat == 3


@pytest.mark.parametrize(
    ("base_url", "expected"),
    [
        ("https://api.test", "https://api.test/v1/environments/env_1/work/poll"),
        ("https://api.test/", "https://api.test/v1/environments/env_1/work/poll"),
        (
            "http://127.0.0.1:8080/some/prefix",
            "http://127.0.0.1:8080/some/prefix/v1/environments/env_1/work/poll",
        ),
        (
            "http://127.0.0.1:8080/some/prefix/",
            "http://127.0.0.1:8080/some/prefix/v1/environments/env_1/work/poll",
        ),
    ],
)
def test_any_base_url_serves_with_or_without_slash_and_prefix(base_url: str, expected: str) -> None:
    server = Server(ok(None))
    server.api(base_url).poll()
    assert str(server.request.url) == expected


@pytest.mark.parametrize(
    "base_url",
    [
        "",
        "api.test",
        "ftp://api.test",
        "https://",
        "https://u:p@api.test",
        "https://api.test?key=p",
        "http://api.test:port",
    ],
)
def test_a_base_url_that_cannot_serve_or_could_hold_a_secret_is_refused(base_url: str) -> None:
    with pytest.raises(ValueError, match="base_url must be") as caught:
        Server(ok(None)).api(base_url)
    assert "u:p" not in str(caught.value)


@pytest.mark.parametrize(
    ("work_id", "segment"),
    [("a/b", b"a%2Fb"), ("a?b#c", b"a%3Fb%23c"), ("é ü", b"%C3%A9%20%C3%BC"), ("a%2Fb", b"a%252Fb")],
)
def test_an_opaque_id_stays_one_path_segment(work_id: str, segment: bytes) -> None:
    server = Server(ok(ITEM))
    server.api(environment_id="env/1").ack(work_id)
    assert server.request.url.raw_path == b"/v1/environments/env%2F1/work/" + segment + b"/ack"


@pytest.mark.parametrize("work_id", ["", ".", "..", "poll", "stats"])
def test_an_id_that_would_address_another_endpoint_is_refused(work_id: str) -> None:
    server = Server(ok(ITEM))
    with pytest.raises(ValueError, match="is not the id"):
        server.api().retrieve(work_id)
    assert server.requests == []


# --- what comes back --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        httpx.Response(200, json=None),
        httpx.Response(200, content=b"null\n", headers={"content-type": "text/plain"}),
        httpx.Response(204),
        httpx.Response(200),
        httpx.Response(200, content=b"", headers={"content-type": "application/json"}),
        httpx.Response(200, json={}),
        httpx.Response(200, json={"id": None}),
    ],
)
def test_every_form_of_an_empty_queue_is_none(reply: httpx.Response) -> None:
    assert Server(reply).api().poll() is None


def test_a_polled_item_keeps_unknown_fields_and_states_and_hides_its_secret() -> None:
    odd = ITEM | {"secret": SECRET, "state": "hibernating", "novel": {"token": "x-novel"}, "metadata": None}
    work = Server(ok(odd)).api().poll()
    assert work is not None
    assert (work.state, work.metadata, work.data.id) == ("hibernating", {}, "sesn_1")
    assert work.model_extra is not None
    assert work.model_extra["novel"] == {"token": "x-novel"}
    assert work.secret is not None
    assert work.secret.get_secret_value() == SECRET
    for text in (repr(work), str(work), f"{work!r}", work.model_dump_json()):
        assert SECRET not in text
    assert "x-novel" not in repr(work)


def test_an_item_of_another_type_may_have_no_data_id() -> None:
    work = Server(ok(ITEM | {"data": {"type": "healthcheck"}})).api().poll()
    assert work is not None
    assert (work.data.type, work.data.id) == ("healthcheck", None)


@pytest.mark.parametrize("reply", [httpx.Response(204), httpx.Response(200), ok(None), ok({}), failure(409)])
def test_a_stop_reply_without_an_item_is_none(reply: httpx.Response) -> None:
    assert Server(reply).api().stop("sesn_1", force=False) is None


def test_a_stop_reply_with_an_item_is_that_item() -> None:
    work = Server(ok(ITEM | {"state": "stopped"})).api().stop("sesn_1", force=True)
    assert work is not None
    assert work.state == "stopped"


@pytest.mark.parametrize("value", ["", None])
def test_a_beat_of_an_item_never_claimed_has_an_empty_value(value: str | None) -> None:
    body = BEAT | {"last_heartbeat": value, "lease_extended": False, "state": "stopping"}
    beat = Server(ok(body)).api().heartbeat("sesn_1", NO_HEARTBEAT)
    assert (beat.last_heartbeat, beat.lease_extended, beat.state) == ("", False, "stopping")


UNREADABLE = {
    "html": httpx.Response(200, html="<h1>welcome</h1>"),
    "broken json": httpx.Response(200, content=b'{"id": "se'),
    "not utf-8": httpx.Response(200, content=b'"\xff"', headers={"content-type": "application/json"}),
    "deeply nested": httpx.Response(200, content=b"[" * 200_000),
    "a list": ok([ITEM]),
    "a string": ok("sesn_1"),
    "no id": ok({key: value for key, value in ITEM.items() if key != "id"}),
    "an empty id": ok(ITEM | {"id": ""}),
    "data of the wrong kind": ok(ITEM | {"data": "sesn_1", "secret": SECRET}),
    "an error with status 200": ok({"type": "error", "error": {"message": "no"}}),
}


@pytest.mark.parametrize("shape", UNREADABLE)
@call_names
def test_a_success_that_cannot_be_read_is_unanswered(name: str, shape: str) -> None:
    with pytest.raises(Unanswered, match="cannot be read") as caught:
        CALLS[name](Server(UNREADABLE[shape]).api())
    assert caught.value.status == 200
    assert caught.value.maybe_done
    assert caught.value.__cause__ is None
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", ["ack", "heartbeat", "retrieve", "update", "list", "stats"])
def test_an_empty_success_is_unanswered_where_a_body_is_due(name: str) -> None:
    with pytest.raises(Unanswered):
        CALLS[name](Server(httpx.Response(204)).api())


@pytest.mark.parametrize(
    "flaw", [{"last_heartbeat": ""}, {"last_heartbeat": None}, {"ttl_seconds": 0}, {"state": None}]
)
def test_a_lease_that_could_not_be_kept_is_unanswered(flaw: dict[str, Any]) -> None:
    with pytest.raises(Unanswered):
        Server(ok(BEAT | flaw)).api().heartbeat("sesn_1", NO_HEARTBEAT)


def test_the_list_is_followed_to_its_last_page() -> None:
    pages = [
        {"data": [ITEM], "next_page": "a/b="},
        {"data": [], "next_page": "c"},
        {"data": [ITEM | {"id": "2"}], "next_page": None},
    ]
    server = Server(*map(ok, pages))
    assert [work.id for work in server.api().list_all()] == ["sesn_1", "2"]
    assert [request.url.params.get("page") for request in server.requests] == [None, "a/b=", "c"]


def test_a_list_that_repeats_its_cursor_ends_with_an_error() -> None:
    server = Server(ok({"data": [], "next_page": "a"}))
    with pytest.raises(Refused, match="twice"):
        list(server.api().list_all())
    assert len(server.requests) == 2


def test_stats_may_not_know_the_workers() -> None:
    stats = Server(ok(STATS)).api().stats()
    assert (stats.depth, stats.pending, stats.workers_polling) == (2, 1, None)


# --- refusals ---------------------------------------------------------------------------------------------

CURRENT = {
    "state": "active",
    "last_heartbeat": "2026-09-02T00:08:33.477978Z",
    "lease_updated_at": "2026-09-02T00:00:00.1Z",
    "lease_extended": False,
    "ttl_seconds": 300,
}


def precondition_failed(current_state: Any, **changes: Any) -> httpx.Response:
    details = {"error_code": "heartbeat_precondition_failed", "current_state": current_state}
    return failure(412, "Heartbeat precondition failed: expected X, actual was NULL", details=details, **changes)


def test_a_412_is_a_lost_lease_with_the_current_state() -> None:
    with pytest.raises(
        LeaseLost, match=r"heartbeat of sesn_1 was answered 412: .*actual was NULL \(request req_1\)"
    ) as caught:
        Server(precondition_failed(CURRENT)).api().heartbeat("sesn_1", "X")
    lost = caught.value
    assert (lost.status, lost.error_code, lost.request_id) == (412, "heartbeat_precondition_failed", "req_1")
    assert lost.current_state is not None
    assert lost.current_state.model_dump() == CURRENT


@pytest.mark.parametrize("type_", ["precondition_failed_error", "rate_limit_error", "anything"])
def test_the_error_type_decides_nothing(type_: str) -> None:
    with pytest.raises(LeaseLost):
        Server(precondition_failed(CURRENT, type_=type_)).api().heartbeat("sesn_1", "X")


def test_a_412_of_a_requeued_item_may_lack_all_but_the_state() -> None:
    with pytest.raises(LeaseLost) as caught:
        Server(precondition_failed({"state": "queued", "novel": 1})).api().heartbeat("sesn_1", "X")
    assert caught.value.current_state is not None
    assert caught.value.current_state.state == "queued"
    assert caught.value.current_state.last_heartbeat is None


@pytest.mark.parametrize(
    "reply",
    [
        failure(412),
        failure(412, details={"error_code": "heartbeat_precondition_failed"}),
        failure(412, details="none"),
        precondition_failed(None),
        precondition_failed("active"),
        precondition_failed({"last_heartbeat": "x"}),
        precondition_failed(CURRENT | {"ttl_seconds": "soon"}),
        httpx.Response(412),
        httpx.Response(412, html="<h1>no</h1>"),
        httpx.Response(412, json={"current_state": CURRENT}),
        httpx.Response(412, json={"error": "failed"}),
    ],
)
def test_a_412_without_a_readable_current_state_is_still_a_lost_lease(reply: httpx.Response) -> None:
    with pytest.raises(LeaseLost) as caught:
        Server(reply).api().heartbeat("sesn_1", "X")
    assert caught.value.current_state is None


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("ack", NotQueued),
        ("heartbeat", LeaseLost),
        ("poll", Refused),
        ("retrieve", Refused),
        ("update", Refused),
    ],
)
@pytest.mark.parametrize("type_", ["invalid_request_error", "conflict_error"])
def test_a_409_means_what_its_call_makes_of_it(name: str, error: type[WorkApiError], type_: str) -> None:
    with pytest.raises(error, match="Current state: active") as caught:
        CALLS[name](Server(failure(409, "must be QUEUED. Current state: active.", type_=type_)).api())
    assert type(caught.value) is error
    assert caught.value.status == 409


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (300, Refused),
        (302, Refused),
        (304, Refused),
        (400, Refused),
        (401, NotAllowed),
        (403, NotAllowed),
        (404, Gone),
        (405, Refused),
        (408, Busy),
        (413, Refused),
        (418, Refused),
        (422, Refused),
        (429, Busy),
        (500, Busy),
        (502, Busy),
        (503, Busy),
        (504, Busy),
        (529, Busy),
        (599, Busy),
    ],
)
@call_names
def test_each_status_has_its_named_error_whatever_the_body(name: str, status: int, error: type[WorkApiError]) -> None:
    for body in (
        b"",
        b"<html>Bad Gateway</html>",
        b"\xff\xfe",
        b"[1]",
        b'{"error":{"message":5,"details":[]}}',
    ):
        with pytest.raises(error) as caught:
            CALLS[name](Server(httpx.Response(status, content=body)).api())
        assert type(caught.value) is error
        assert caught.value.status == status
        assert f"was answered {status}" in caught.value.message
        assert "html" not in caught.value.message


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "x-api-key header is required"),
        (401, "Invalid bearer token"),
        (401, "OAuth access token has been revoked."),
        (403, "Token not authorized for this environment"),
        (403, "OAuth token does not meet scope requirement any_of(org)"),
    ],
)
def test_a_refused_credential_says_what_the_server_said_and_what_to_check(status: int, said: str) -> None:
    with pytest.raises(NotAllowed) as caught:
        Server(failure(status, said, type_="authentication_error")).api().poll()
    assert said.rstrip(".") in caught.value.message
    assert "Check that the configured key" in caught.value.message
    assert caught.value.status == status


def test_an_invalid_metadata_patch_shows_its_code() -> None:
    with pytest.raises(Refused) as caught:
        Server(failure(400, details={"error_code": "invalid_metadata"})).api().update("sesn_1", {"k": "v"})
    assert caught.value.error_code == "invalid_metadata"


def test_a_gateway_that_speaks_another_dialect_is_quoted() -> None:
    with pytest.raises(NotAllowed, match="403: Forbidden"):
        Server(httpx.Response(403, json={"message": "Forbidden"})).api().poll()


def test_the_request_id_is_taken_from_the_header_first() -> None:
    with pytest.raises(Gone) as caught:
        Server(failure(404, request_id="req_header")).api().ack("sesn_1")
    assert caught.value.request_id == "req_header"


def test_a_redirect_is_not_followed() -> None:
    server = Server(httpx.Response(307, headers={"location": "https://elsewhere.test/"}))
    with pytest.raises(Refused):
        server.api().poll()
    assert server.request.url.host == "api.test"


@pytest.mark.parametrize("key", ["", "  ", "clé", "a\nb", "a\x00b"])
def test_a_key_that_cannot_be_sent_is_not_sent_and_not_shown(key: str) -> None:
    server = Server(ok(None))
    server.keys = [key]
    with pytest.raises(NotAllowed, match="was not sent") as caught:
        server.api().poll()
    assert server.requests == []
    assert key.strip() == "" or key not in str(caught.value)


# --- waiting and repeating --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": formatdate(NOW + 30, usegmt=True)}, 30.0),
        (
            {"retry-after": formatdate(NOW + 130, usegmt=True), "date": formatdate(NOW + 100, usegmt=True)},
            30.0,
        ),
        ({"retry-after": formatdate(NOW - 30, usegmt=True)}, 0.0),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Mon, 99 Foo 2026"}, None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_the_wait_the_server_asks_for_is_read_in_every_form(
    headers: dict[str, str], seconds: float | None, status: int
) -> None:
    with pytest.raises(Busy) as caught:
        Server(httpx.Response(status, headers=headers)).api().poll()
    assert caught.value.wait_seconds == seconds


TRANSPORT_FAULTS: list[tuple[Exception, bool]] = [
    (httpx.ConnectError("refused"), False),
    (httpx.ConnectTimeout("slow"), False),
    (httpx.PoolTimeout("full"), False),
    (httpx.ReadTimeout("slow"), True),
    (httpx.WriteTimeout("slow"), True),
    (httpx.ReadError("reset"), True),
    (httpx.RemoteProtocolError("Server disconnected"), True),
    (httpx.DecodingError("gzip"), True),
]


@pytest.mark.parametrize(("fault", "maybe_done"), TRANSPORT_FAULTS)
@call_names
def test_a_fault_on_the_way_is_unanswered_and_tells_whether_it_was_sent(
    name: str, fault: Exception, maybe_done: bool
) -> None:
    with pytest.raises(Unanswered, match=type(fault).__name__) as caught:
        CALLS[name](Server(fault).api())
    assert caught.value.maybe_done is maybe_done
    assert isinstance(caught.value, NotSent) is not maybe_done
    assert caught.value.status is None


@pytest.mark.parametrize(
    ("status", "maybe_done"),
    [(408, False), (429, False), (529, False), (500, True), (502, True), (503, True), (504, True)],
)
def test_a_server_fault_may_have_been_carried_out_a_throttle_not(status: int, maybe_done: bool) -> None:
    with pytest.raises(Busy) as caught:
        Server(failure(status)).api().stop("sesn_1", force=True)
    assert caught.value.maybe_done is maybe_done


@pytest.mark.parametrize("answer", [failure(500), failure(429, retry_after="0"), httpx.ReadTimeout("slow")])
@pytest.mark.parametrize("name", ONE_ATTEMPT)
def test_poll_ack_heartbeat_and_stop_are_sent_exactly_once(name: str, answer: Answer) -> None:
    server = Server(answer)
    with pytest.raises(TryAgain):
        CALLS[name](server.api())
    assert len(server.requests) == 1
    assert server.slept == []


@pytest.mark.parametrize("answer", [failure(500), failure(429), failure(408), httpx.ReadTimeout("slow"), ok([])])
@pytest.mark.parametrize("name", REPEATED)
def test_reads_and_update_are_tried_three_times_with_a_growing_wait(name: str, answer: Answer) -> None:
    server = Server(answer)
    with pytest.raises(TryAgain):
        CALLS[name](server.api())
    assert len(server.requests) == 3
    assert len(server.slept) == 2
    assert 0 < server.slept[0] < server.slept[1]


def test_a_repeat_that_succeeds_is_the_answer() -> None:
    server = Server(failure(500), ok(STATS))
    assert server.api().stats().depth == 2


def test_a_repeat_waits_as_long_as_the_server_asks() -> None:
    server = Server(failure(429, retry_after="6"), ok(STATS))
    server.api().stats()
    assert server.slept == [6.0]


@pytest.mark.parametrize("headers", [{"retry_after": "3600"}, {"x_should_retry": "false"}])
def test_no_repeat_when_the_server_asks_for_none_or_for_a_long_wait(headers: dict[str, str]) -> None:
    server = Server(failure(429, **headers))
    with pytest.raises(Busy):
        server.api().stats()
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412])
@pytest.mark.parametrize("name", REPEATED)
def test_what_repeating_cannot_cure_is_not_repeated(name: str, status: int) -> None:
    server = Server(failure(status))
    with pytest.raises(WorkApiError):
        CALLS[name](server.api())
    assert len(server.requests) == 1


# --- secrets ----------------------------------------------------------------------------------------------


def test_no_secret_reaches_an_error_even_if_the_server_echoes_it() -> None:
    server = Server(
        failure(401, f"Invalid bearer token {KEY}, sk-ant-api03-other,\n {SECRET}", details={"error_code": KEY})
    )
    with pytest.raises(NotAllowed) as caught:
        server.api().poll()
    for text in (str(caught.value), repr(caught.value), str(vars(caught.value))):
        assert KEY not in text
        assert "api03" not in text
        assert SECRET not in text
        assert "\\n" not in text


def test_no_secret_reaches_an_error_of_the_transport() -> None:
    with pytest.raises(Unanswered) as caught:
        Server(httpx.LocalProtocolError(f"Illegal header value b'Bearer {KEY}'")).api().poll()
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None


class Wire:
    """An HTTP server on 127.0.0.1 that answers every GET and POST alike; `urls` and `peers` tell who asked for what."""

    def __init__(self, body: bytes, **headers: str) -> None:
        wire, self.urls, self.peers = self, list[str](), set[Any]()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                wire.urls.append(self.path)
                wire.peers.add(self.client_address)
                self.rfile.read(int(self.headers.get("content-length") or 0))
                self.send_response(200)
                for name, value in {"content-length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Wire":
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def api(self, url: str = "") -> WorkApi:
        return WorkApi(url or self.url, "env_1", lambda: SecretStr(KEY))


def test_no_secret_reaches_a_log_or_the_client_repr(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), Wire(json.dumps(ITEM | {"secret": SECRET}).encode()) as wire:
        api = wire.api()
        api.poll()
        api.ack("sesn_1")
        api.close()
    logged = json.dumps([record.getMessage() for record in caplog.records])
    assert "receive_response_body.complete" in logged, "the HTTP library logs at this level"
    assert KEY not in logged + repr(api)
    assert SECRET not in logged


def test_one_thread_s_calls_share_a_connection_and_several_threads_do_not_wait_for_one() -> None:
    with Wire(json.dumps(ITEM).encode()) as wire:
        api = wire.api()
        assert [api.ack("sesn_1").id for _ in range(3)] == ["sesn_1"] * 3
        assert len(wire.peers) == 1
        with ThreadPoolExecutor(4) as pool:
            assert [work.id for work in pool.map(api.ack, ["sesn_1"] * 40)] == ["sesn_1"] * 40
        assert len(wire.peers) <= 4
        api.close()


def test_a_reply_that_cannot_be_decoded_takes_no_connection_away() -> None:
    with Wire(b"no gzip", content_encoding="gzip") as wire:
        api = wire.api()
        for _ in range(2):
            with pytest.raises(Unanswered):
                api.ack("sesn_1")
        assert len(wire.urls) == 2, "the second was sent too"
        api.close()


def test_calls_go_through_the_proxy_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with Wire(json.dumps(ITEM).encode()) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removeprefix("http://"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        through = proxy.api("http://api.test")
        direct = proxy.api()
        assert through.ack("sesn_1").id == direct.ack("sesn_1").id == "sesn_1"
        assert [url.split("/v1")[0] for url in proxy.urls] == ["http://api.test", ""]
        through.close()
        direct.close()


# --- a session's events (W§11.2) --------------------------------------------------------------------------

TOKEN = SecretStr("sk-ant-si-the-session-s-own-token")
EVENTS = {"data": [{"type": "agent.tool_use", "id": "sevt_1", "input": {"command": "cat diary"}}], "next_page": None}


def test_events_are_read_newest_first_with_the_session_s_own_token_and_without_their_contents() -> None:
    server = Server(ok(EVENTS))
    page = server.api().newest_events("sesn_1", token=TOKEN)
    assert server.request.url.path == "/v1/sessions/sesn_1/events"
    assert dict(server.request.url.params) == {"limit": "50", "order": "desc"}
    assert server.request.headers["authorization"] == f"Bearer {TOKEN.get_secret_value()}"
    assert page.data[0].id == "sevt_1"
    assert "diary" not in page.model_dump_json()


def test_events_are_read_with_the_key_where_there_is_no_token_and_tried_again() -> None:
    server = Server(failure(503), ok(EVENTS))
    assert server.api().newest_events("sesn_1").data
    assert [request.headers["authorization"] for request in server.requests] == [f"Bearer {KEY}"] * 2


def test_a_refused_token_is_not_shown() -> None:
    server = Server(failure(403, f"no {TOKEN.get_secret_value()}"))
    with pytest.raises(NotAllowed) as caught:
        server.api().newest_events("sesn_1", token=TOKEN)
    assert TOKEN.get_secret_value() not in str(caught.value)
    assert len(server.requests) == 1


def test_a_session_s_metadata_is_read_once_with_its_own_token_and_nothing_else_of_it_is_kept() -> None:
    session = {"id": "sesn_1", "metadata": {"a": "b"}, "agent": {"system": "diary"}}
    server = Server(ok(session))
    read = server.api().session("sesn_1", token=TOKEN)
    assert server.request.url.path == "/v1/sessions/sesn_1"
    assert server.request.headers["authorization"] == f"Bearer {TOKEN.get_secret_value()}"
    assert read.metadata == {"a": "b"}
    assert "diary" not in read.model_dump_json()


@pytest.mark.parametrize("metadata", [{}, {"metadata": None}])
def test_a_session_may_have_no_metadata(metadata: dict[str, Any]) -> None:
    assert Server(ok({"id": "sesn_1", **metadata})).api().session("sesn_1").metadata == {}


def test_a_session_is_asked_for_once_even_if_the_api_is_busy() -> None:
    server = Server(failure(503), ok({"id": "sesn_1"}))
    with pytest.raises(Busy):
        server.api().session("sesn_1")
    assert len(server.requests) == 1
