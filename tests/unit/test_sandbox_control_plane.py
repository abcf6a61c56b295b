"""How a sandbox exchanges its ticket and gives the end-of-turn word (sandbox/control_plane.py)."""

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx2
import pytest
from control_plane import (
    EXCHANGE_SECONDS,
    Attempt,
    ControlPlane,
    ControlPlaneUnanswered,
    Grant,
    TicketRefused,
)
from pydantic import SecretStr

T = TypeVar("T")
ATTEMPT = Attempt("work_1", 1_700_000_000_000, 2)
SECRET = {"sessions_token": "sessions-token-value", "auth": {"extra": ["bundled-credential"]}, "id": "sesn_1"}
WORK_SECRET = base64.urlsafe_b64encode(json.dumps(SECRET).encode()).rstrip(b"=").decode()
GRANT = {
    "work_id": "work_1",
    "environment_id": "env_1",
    "session_id": "sesn_1",
    "work_secret": WORK_SECRET,
    "callback_secret": "callback-secret-value",
}


class Tickets:
    """A tickets function that gives its answers in turn, the last for ever; its clock moves by sleeping."""

    def __init__(self, *answers: httpx2.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[str, dict[str, object]]] = []
        self.waits: list[float] = []
        self.clock = 0.0

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append((str(request.url), json.loads(request.content)))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.clock += seconds

    def run(self, call: Callable[[ControlPlane], Awaitable[T]], url: str = "http://tickets.test/") -> T:
        async def inner() -> T:
            async with httpx2.AsyncClient(transport=httpx2.MockTransport(self._answer)) as http:
                return await call(ControlPlane(http, url, ATTEMPT, sleep=self._sleep, now=lambda: self.clock))

        return asyncio.run(inner())

    def exchange(self) -> Grant:
        return self.run(lambda plane: plane.exchange("the-ticket", "the-nonce"))


def granted() -> httpx2.Response:
    return httpx2.Response(200, json=GRANT)


def test_a_ticket_is_exchanged_for_the_sessions_credential() -> None:
    tickets = Tickets(granted())
    grant = tickets.exchange()
    sent = {
        "work_id": "work_1",
        "turn": ATTEMPT.turn,
        "attempt": 2,
        "ticket": "the-ticket",
        "nonce": "the-nonce",
    }
    assert tickets.requests == [("http://tickets.test/", sent)]
    assert (grant.environment_id, grant.session_id) == ("env_1", "sesn_1")
    assert grant.sessions_token() == "sessions-token-value"


@pytest.mark.parametrize(
    "first",
    [httpx2.Response(429), httpx2.Response(502), httpx2.ReadTimeout("slow"), httpx2.ConnectError("no")],
)
def test_a_lost_reply_is_asked_for_again_with_the_same_nonce(first: httpx2.Response | Exception) -> None:
    tickets = Tickets(first, granted())
    assert tickets.exchange().work_id == "work_1"
    assert [body["nonce"] for _, body in tickets.requests] == ["the-nonce", "the-nonce"]


def test_retry_after_is_honoured() -> None:
    tickets = Tickets(httpx2.Response(429, headers={"retry-after": "7"}), granted())
    tickets.exchange()
    assert tickets.waits == [7.0]


@pytest.mark.parametrize("status", [403, 404, 400])
def test_a_refusal_is_final(status: int) -> None:
    tickets = Tickets(httpx2.Response(status))
    with pytest.raises(TicketRefused, match=str(status)):
        tickets.exchange()
    assert len(tickets.requests) == 1


@pytest.mark.parametrize("headers", [{}, {"retry-after": "3600"}])
def test_tries_end_within_the_replay_window(headers: dict[str, str]) -> None:
    tickets = Tickets(httpx2.Response(503, headers=headers))
    with pytest.raises(ControlPlaneUnanswered, match="503"):
        tickets.exchange()
    assert tickets.clock < EXCHANGE_SECONDS < 60
    assert all(later <= 8.0 for later in tickets.waits)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({**GRANT, "work_secret": {"inner": "secret-in-the-wrong-place"}}, "work_secret"),
        ({"callback_secret": "callback-secret-value"}, "session_id"),
        ("secret-as-a-string", "body"),
        ({**GRANT, "work_id": "work_2"}, "work_2"),
    ],
)
def test_an_unusable_grant_is_told_without_its_secrets(body: object, named: str) -> None:
    with pytest.raises(ControlPlaneUnanswered, match=named) as caught:
        Tickets(httpx2.Response(200, json=body)).exchange()
    assert "secret-" not in str(caught.value).replace("work_secret", "").replace("callback_secret", "")
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("url", ["http://tickets.test", "http://tickets.test/", "http://tickets.test/id/"])
def test_the_word_goes_to_the_tickets_url_plus_turn_ended(url: str) -> None:
    tickets = Tickets(httpx2.Response(503), httpx2.Response(202, json={"stopped": True}))
    assert tickets.run(lambda plane: plane.turn_ended("callback", unserved=True), url)
    sent = {
        "work_id": "work_1",
        "turn": ATTEMPT.turn,
        "attempt": 2,
        "callback_secret": "callback",
        "unserved": True,
    }
    assert tickets.requests == [(url.rstrip("/") + "/turn-ended", sent)] * 2


def test_a_word_refused_is_not_repeated() -> None:
    tickets = Tickets(httpx2.Response(403))
    with pytest.raises(TicketRefused):
        tickets.run(lambda plane: plane.turn_ended("callback", unserved=False))
    assert len(tickets.requests) == 1


@pytest.mark.parametrize("body", [b'{"stopped": false}', b"{}", b"[]", b"not json", b""])
def test_only_a_clear_yes_says_that_the_item_is_stopped(body: bytes) -> None:
    tickets = Tickets(httpx2.Response(202, content=body))
    assert tickets.run(lambda plane: plane.turn_ended("callback", unserved=False)) is False


def test_a_grant_shows_no_secret() -> None:
    grant = Grant.model_validate(GRANT)
    for shown in (repr(grant), str(grant), grant.model_dump_json()):
        assert WORK_SECRET not in shown
        assert "callback-secret-value" not in shown


def test_every_credential_bundled_in_the_work_secret_is_known_as_secret_and_the_ids_are_not() -> None:
    assert Grant.model_validate(GRANT).secret_values() == {
        WORK_SECRET,
        "callback-secret-value",
        "sessions-token-value",
        "bundled-credential",
    }


@pytest.mark.parametrize(
    "secret",
    ["", "not base64 at all!", base64.b64encode(b"[1]").decode(), base64.b64encode(b"{}").decode(), "é"],
)
def test_a_work_secret_without_a_token_yields_none(secret: str) -> None:
    grant = Grant.model_validate(GRANT).model_copy(update={"work_secret": SecretStr(secret)})
    assert grant.sessions_token() is None
