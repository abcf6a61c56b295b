"""The official SDK and our client side by side: the same requests, and what each makes of the same replies."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx
import httpx2
import pytest
from anthropic.lib.environments._worker import _server_lease_state
from pydantic import SecretStr

from shared.work_api import NO_HEARTBEAT, LeaseLost, Unanswered, WorkApi, WorkApiError

KEY, URL, ENV, ID = "sk-ant-oat01-contract", "http://work.test", "env_contract", "sesn_1"
VALUE = "2026-09-02T00:08:33.477978Z"
HEADERS = ("authorization", "anthropic-version", "anthropic-beta", "anthropic-worker-id")

ITEM: dict[str, Any] = {
    "type": "work",
    "id": ID,
    "environment_id": ENV,
    "data": {"type": "session", "id": ID},
    "state": "queued",
    "created_at": VALUE,
    "acknowledged_at": None,
    "started_at": VALUE,
    "latest_heartbeat_at": None,
    "stop_requested_at": None,
    "stopped_at": None,
    "metadata": {},
    "secret": None,
    "actor": None,
}
BEAT = {
    "type": "work_heartbeat",
    "last_heartbeat": VALUE,
    "lease_extended": True,
    "state": "active",
    "ttl_seconds": 60,
}
STATS = {"type": "work_queue_stats", "depth": 1, "pending": 0, "oldest_queued_at": None, "workers_polling": None}
GOOD: dict[str, dict[str, Any]] = {"heartbeat": BEAT, "stats": STATS, "list": {"data": [ITEM], "next_page": None}}


@dataclass(frozen=True)
class Reply:
    """What the far side answers, whichever client asks."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def reply(body: Any, status: int = 200, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, json.dumps(body).encode(), {"content-type": "application/json"} | named)


def failure(status: int, details: Any = None, **headers: str) -> Reply:
    error = {"type": "invalid_request_error", "message": "no"} | ({"details": details} if details else {})
    return reply({"type": "error", "error": error, "request_id": "req_1"}, status, **headers)


class Both:
    """The two clients against one answer; every request and every wait of each is kept."""

    def __init__(self, answer: Reply, monkeypatch: pytest.MonkeyPatch, *, work_id: str = ID) -> None:
        self.requests: dict[str, list[dict[str, Any]]] = {"sdk": [], "ours": []}
        self.waits: dict[str, list[float]] = {"sdk": [], "ours": []}
        monkeypatch.setattr("anthropic._base_client.time.sleep", self.waits["sdk"].append)

        def for_sdk(request: httpx2.Request) -> httpx2.Response:
            self.requests["sdk"].append(_shown(request))
            return httpx2.Response(answer.status, content=answer.body, headers=answer.headers)

        def for_ours(request: httpx.Request) -> httpx.Response:
            self.requests["ours"].append(_shown(request))
            return httpx.Response(answer.status, content=answer.body, headers=answer.headers)

        theirs = anthropic.Anthropic(
            auth_token=KEY, base_url=URL, http_client=httpx2.Client(transport=httpx2.MockTransport(for_sdk))
        ).beta.environments.work
        ours = WorkApi(
            URL,
            ENV,
            lambda: SecretStr(KEY),
            worker_id="worker-1",
            transport=httpx.MockTransport(for_ours),
            sleep=self.waits["ours"].append,
        )
        item: Any = {"work_id": work_id, "environment_id": ENV}
        worker: Any = {"environment_id": ENV, "anthropic_worker_id": "worker-1"}
        self.calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "poll": (lambda: theirs.poll(**worker), ours.poll),
            "poll with options": (
                lambda: theirs.poll(**worker, block_ms=999, reclaim_older_than_ms=2000),
                lambda: ours.poll(block_ms=999, reclaim_older_than_ms=2000),
            ),
            "ack": (lambda: theirs.ack(**item), lambda: ours.ack(work_id)),
            "claim": (
                lambda: theirs.heartbeat(**item, expected_last_heartbeat=NO_HEARTBEAT, desired_ttl_seconds=60),
                lambda: ours.heartbeat(work_id, NO_HEARTBEAT, desired_ttl_seconds=60),
            ),
            "echo": (
                lambda: theirs.heartbeat(**item, expected_last_heartbeat=f"{VALUE} +&%/é"),
                lambda: ours.heartbeat(work_id, f"{VALUE} +&%/é"),
            ),
            "graceful stop": (lambda: theirs.stop(**item, force=False), lambda: ours.stop(work_id, force=False)),
            "forced stop": (lambda: theirs.stop(**item, force=True), lambda: ours.stop(work_id, force=True)),
            "retrieve": (lambda: theirs.retrieve(**item), lambda: ours.retrieve(work_id)),
            "update": (
                lambda: theirs.update(**item, metadata={"a": "1", "b": None}),
                lambda: ours.update(work_id, {"a": "1", "b": None}),
            ),
            "list": (lambda: theirs.list(ENV, limit=7, page="p=/"), lambda: ours.list(limit=7, page="p=/")),
            "stats": (lambda: theirs.stats(ENV), ours.stats),
        }

    def read(self, call: str) -> tuple[str, str]:
        """What each makes of the answer."""
        theirs, ours = self.calls[call]
        return _sdk_reads(theirs), _we_read(ours)


def _shown(request: Any) -> dict[str, Any]:
    return {
        "method": request.method,
        "path": request.url.raw_path.split(b"?")[0],
        "query": sorted(request.url.params.multi_items()),
        "headers": {name: request.headers.get(name) for name in HEADERS},
        "body": json.loads(request.content) if request.content else None,
    }


def _sdk_reads(call: Callable[[], Any]) -> str:
    try:
        got = call()
    except anthropic.APIStatusError as error:
        return f"error {error.status_code}"
    except (anthropic.APIConnectionError, anthropic.APIResponseValidationError, ValueError):
        return "unreadable"
    if got is None:
        return "nothing"
    return "a string" if isinstance(got, str) else _said(got)


def _we_read(call: Callable[[], Any]) -> str:
    try:
        got = call()
    except Unanswered:
        return "unreadable"
    except WorkApiError as error:
        return f"error {error.status}"
    return "nothing" if got is None else _said(got)


def _said(got: Any) -> str:
    """A reply in words that do not depend on whose model it is."""
    if hasattr(got, "lease_extended"):
        return f"beat {got.last_heartbeat} {got.lease_extended} {got.state} {got.ttl_seconds}"
    if hasattr(got, "depth"):
        return f"stats {got.depth} {got.pending} {got.oldest_queued_at} {got.workers_polling}"
    if hasattr(got, "next_page"):
        return f"page {[item.id for item in got.data]} {got.next_page}"
    return f"item {got.id} {got.state} {getattr(got, 'data', None) and got.data.type}"


CALLS = [
    *("poll", "poll with options", "ack", "claim", "echo", "graceful stop", "forced stop"),
    *("retrieve", "update", "list", "stats"),
]
READS = ["retrieve", "update", "list", "stats"]  # what we repeat on our own
ONE_ATTEMPT = ["poll", "ack", "claim", "echo", "graceful stop", "forced stop"]
every_call = pytest.mark.parametrize("call", CALLS)


def good(call: str, **changes: Any) -> Reply:
    kind = "heartbeat" if call in ("claim", "echo") else call
    return reply(GOOD.get(kind, ITEM) | changes)


@every_call
@pytest.mark.parametrize("work_id", [ID, "work/1?a b%"])
def test_both_send_the_same_request(monkeypatch: pytest.MonkeyPatch, call: str, work_id: str) -> None:
    both = Both(good(call), monkeypatch, work_id=work_id)
    both.read(call)
    [theirs], [ours] = both.requests["sdk"], both.requests["ours"]
    assert theirs == ours


@every_call
def test_both_read_the_same_from_a_good_reply_and_from_one_with_unknown_fields_and_values(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    for changes in ({}, {"new_field": {"a": 1}}, {"state": "pausing", "new_field": [1]}):
        theirs, ours = Both(good(call, **changes), monkeypatch).read(call)
        assert theirs == ours
        assert theirs.split()[0] in ("item", "beat", "page", "stats")


@every_call
@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 412, 429, 500, 502, 503, 529])
def test_both_name_the_same_status(monkeypatch: pytest.MonkeyPatch, call: str, status: int) -> None:
    theirs, ours = Both(failure(status), monkeypatch).read(call)
    assert theirs == ours == f"error {status}"


@pytest.mark.parametrize(
    ("call", "answer", "sdk", "ours"),
    [
        ("poll", reply(None), "nothing", "nothing"),
        # Where the SDK would trip, we see an empty queue (W§5.1).
        ("poll", Reply(204, b""), "a string", "nothing"),
        ("poll", Reply(200, b""), "a string", "nothing"),
        ("poll", Reply(200, b"", {"content-type": "application/json"}), "unreadable", "nothing"),
        ("poll", reply({}), "item None None None", "nothing"),
        # A stop's other answers are "already stopped" (W§7.1): the SDK's callers say so, here the client does.
        ("forced stop", Reply(204, b""), "a string", "nothing"),
        ("forced stop", failure(409), "error 409", "nothing"),
        ("graceful stop", failure(409), "error 409", "nothing"),
        ("ack", failure(409), "error 409", "error 409"),
        ("claim", failure(409), "error 409", "error 409"),
        # A page of a proxy is no item: the SDK hands it on as text.
        ("ack", Reply(200, b"<html>", {"content-type": "text/html"}), "a string", "unreadable"),
        ("claim", Reply(200, b"{", {"content-type": "application/json"}), "unreadable", "unreadable"),
    ],
)
def test_what_each_makes_of_the_odd_replies(
    monkeypatch: pytest.MonkeyPatch, call: str, answer: Reply, sdk: str, ours: str
) -> None:
    assert Both(answer, monkeypatch).read(call) == (sdk, ours)


@pytest.mark.parametrize("path", [("error", "details"), ("error",), ()])
def test_both_find_the_current_state_of_a_412_in_the_same_place(
    monkeypatch: pytest.MonkeyPatch, path: tuple[str, ...]
) -> None:
    current = {"state": "queued", "last_heartbeat": None, "lease_updated_at": None, "ttl_seconds": 120}
    body: dict[str, Any] = {"type": "error", "error": {"type": "x", "message": "no", "details": {}}}
    place = body
    for name in path:
        place = place[name]
    place["current_state"] = current
    theirs, ours = Both(reply(body, 412), monkeypatch).calls["echo"]
    with pytest.raises(anthropic.APIStatusError) as by_sdk:
        theirs()
    with pytest.raises(LeaseLost) as by_us:
        ours()
    found = dict(_server_lease_state(by_sdk.value))
    told = by_us.value.current_state
    assert found == (current if path == ("error", "details") else {})
    assert (told.model_dump(exclude={"lease_extended"}) if told else {}) == found


@pytest.mark.parametrize("call", READS)
@pytest.mark.parametrize("status", [408, 429, 500, 503, 529])
def test_both_repeat_a_read_as_often(monkeypatch: pytest.MonkeyPatch, call: str, status: int) -> None:
    both = Both(failure(status), monkeypatch)
    both.read(call)
    assert len(both.requests["sdk"]) == len(both.requests["ours"]) == 3


@every_call
@pytest.mark.parametrize("answer", [failure(400), failure(403), failure(404), failure(503, x_should_retry="false")])
def test_neither_repeats_what_repeating_will_not_change(
    monkeypatch: pytest.MonkeyPatch, call: str, answer: Reply
) -> None:
    both = Both(answer, monkeypatch)
    both.read(call)
    assert len(both.requests["sdk"]) == len(both.requests["ours"]) == 1


@pytest.mark.parametrize("call", ONE_ATTEMPT)
@pytest.mark.parametrize("status", [409, 429, 503])
def test_we_alone_make_one_attempt_at_what_changes_a_lease(
    monkeypatch: pytest.MonkeyPatch, call: str, status: int
) -> None:
    """DESIGN §7: a repeated stop may end the next turn, a repeated ack or beat hides whose the lease is."""
    both = Both(failure(status), monkeypatch)
    both.read(call)
    assert (len(both.requests["sdk"]), len(both.requests["ours"])) == (3, 1)


@pytest.mark.parametrize("wish", [{"retry_after": "3"}, {"retry_after_ms": "2500"}])
def test_both_wait_as_long_as_the_server_asks(monkeypatch: pytest.MonkeyPatch, wish: dict[str, str]) -> None:
    both = Both(failure(429, **wish), monkeypatch)
    both.read("stats")
    assert both.waits["sdk"] == both.waits["ours"]
    assert set(both.waits["ours"]) == {3.0 if "retry_after" in wish else 2.5}
