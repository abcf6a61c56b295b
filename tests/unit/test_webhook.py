"""The webhook: what wakes the poller and what is refused; the key's secret; the emulator as its sender."""

import asyncio
import base64
import json
import time
from datetime import UTC, datetime
from types import ModuleType
from typing import Any

import boto3
import httpx
import pytest
from botocore.exceptions import ClientError
from moto import mock_aws
from pydantic import SecretStr
from standardwebhooks import Webhook

from local.work_api.server import Emulator
from shared import wiring
from shared.config import Config, Missing
from shared.stored_key import StoredKey
from shared.webhook import Doorbell, NotGenuine, verify
from tests.unit.test_handlers import CONTEXT, app, sample

KEY = f"whsec_{base64.b64encode(b'signing-key-of-the-unit-tests-32').decode()}"


def signed(event: dict[str, Any], *, key: str = KEY, at: float | None = None) -> dict[str, Any]:
    """The event with its body signed for now (or `at`, epoch seconds)."""
    moment = datetime.fromtimestamp(time.time() if at is None else at, tz=UTC)
    body = event["body"]
    text = base64.b64decode(body).decode() if event["isBase64Encoded"] else body
    signature = Webhook(key).sign(event["headers"]["webhook-id"], moment, text)
    sent = {"webhook-timestamp": str(int(moment.timestamp())), "webhook-signature": signature}
    return event | {"headers": event["headers"] | sent}


class Bell:
    """The webhook function over a key; counts how often the poller was woken."""

    def __init__(self, module: ModuleType, key: str | Exception = KEY, fails: Exception | None = None) -> None:
        self.module, self.key, self.fails, self.woken = module, key, fails, 0

    def _read(self) -> SecretStr:
        if isinstance(self.key, Exception):
            raise self.key
        return SecretStr(self.key)

    def _wake(self) -> None:
        if self.fails:
            raise self.fails
        self.woken += 1

    def answer(self, event: dict[str, Any]) -> int:
        self.module.webhook = lambda: Doorbell(self._read, self._wake)  # type: ignore[attr-defined]
        reply = self.module.handler(event, CONTEXT)
        assert json.loads(reply["body"]) in ({}, *({"error": e} for e in ERRORS)), "a refusal says no more"
        return int(reply["statusCode"])


ERRORS = ("POST only", "too large", "refused", "malformed event", "not ready")
THROTTLED = ClientError({"Error": {"Code": "TooManyRequestsException", "Message": "slow down"}}, "Invoke")


@pytest.fixture
def bell() -> Bell:
    return Bell(app("webhook"))


@pytest.fixture
def started() -> dict[str, Any]:
    return sample("webhook_run_started")


def test_a_session_that_began_to_run_wakes_the_poller(bell: Bell, started: dict[str, Any]) -> None:
    assert bell.answer(signed(started)) == 202
    assert bell.woken == 1


def test_a_body_in_base64_is_verified_as_it_was_sent(bell: Bell, started: dict[str, Any]) -> None:
    encoded = {"body": base64.b64encode(started["body"].encode()).decode(), "isBase64Encoded": True}
    assert bell.answer(signed(started | encoded)) == 202
    assert bell.woken == 1


def test_a_replay_only_polls_once_more(bell: Bell, started: dict[str, Any]) -> None:
    event = signed(started)
    assert [bell.answer(event), bell.answer(event)] == [202, 202]
    assert bell.woken == 2


def test_another_type_is_taken_and_ignored(bell: Bell) -> None:
    assert bell.answer(signed(sample("webhook_other_type"))) == 202
    assert bell.woken == 0


def test_one_good_signature_among_several_is_enough(bell: Bell, started: dict[str, Any]) -> None:
    event = signed(started)
    good = event["headers"]["webhook-signature"]
    event["headers"]["webhook-signature"] = f"v1,{base64.b64encode(b'old key').decode()} v1a,x {good}"
    assert bell.answer(event) == 202


def test_the_standard_s_check_vector_is_recomputed() -> None:
    """W§12; 2021, so only its age is wrong."""
    secret, moment = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", datetime.fromtimestamp(1614265330, tz=UTC)
    expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert Webhook(secret).sign("msg_p5jXN8AQM9LWM0D4loKWxJek", moment, '{"test": 2432232314}') == expected


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"webhook-signature": "v1,AAAA"}, id="wrong"),
        pytest.param({"webhook-signature": "v1,%%%"}, id="not base64"),
        pytest.param({"webhook-signature": "v1"}, id="no signature in it"),
        pytest.param({"webhook-signature": "v1,é"}, id="not ASCII"),
        pytest.param({"webhook-signature": ""}, id="empty"),
        pytest.param({"webhook-signature": None}, id="no signature"),
        pytest.param({"webhook-id": None}, id="no id"),
        pytest.param({"webhook-id": "whe_another"}, id="another id"),
        pytest.param({"webhook-timestamp": None}, id="no timestamp"),
        pytest.param({"webhook-timestamp": "9" * 400}, id="overflowing timestamp"),
        pytest.param({"webhook-timestamp": "nan"}, id="no number"),
    ],
)
def test_wrong_headers_are_refused(headers: dict[str, str | None], bell: Bell, started: dict[str, Any]) -> None:
    event = signed(started)
    event["headers"] |= headers
    assert bell.answer(event) == 401
    assert bell.woken == 0


@pytest.mark.parametrize(("seconds", "status"), [(-310, 401), (310, 401), (-280, 202), (280, 202)])
def test_a_timestamp_may_be_five_minutes_off(seconds: int, status: int, bell: Bell, started: dict[str, Any]) -> None:
    assert bell.answer(signed(started, at=time.time() + seconds)) == status


@pytest.mark.parametrize(
    "change",
    [
        {"body": '{"data": {"type": "session.status_run_started"}}'},
        {"body": "%%%", "isBase64Encoded": True},
        {"body": None},
        {"headers": None},
    ],
)
def test_a_body_that_was_not_signed_is_refused(change: dict[str, Any], bell: Bell, started: dict[str, Any]) -> None:
    assert bell.answer(signed(started) | change) == 401
    assert bell.woken == 0


def test_another_key_s_signature_is_refused(bell: Bell, started: dict[str, Any]) -> None:
    other = f"whsec_{base64.b64encode(b'another-key').decode()}"
    assert bell.answer(signed(started, key=other)) == 401


@pytest.mark.parametrize("body", ["not json", "[]", "{}", '{"data": {"type": 1}}', "[" * 10_000])
def test_a_signed_body_of_no_event_is_malformed(body: str, bell: Bell, started: dict[str, Any]) -> None:
    assert bell.answer(signed(started | {"body": body})) == 400
    assert bell.woken == 0


@pytest.mark.parametrize(("length", "status"), [(20_480, 202), (20_481, 413)])
def test_a_long_body_is_not_read(length: int, status: int, bell: Bell, started: dict[str, Any]) -> None:
    assert bell.answer(signed(started | {"body": started["body"].ljust(length)})) == status


def test_only_a_post_is_answered(bell: Bell, started: dict[str, Any]) -> None:
    assert bell.answer(signed(started) | {"requestContext": {"http": {"method": "GET"}}}) == 405


@pytest.mark.parametrize("key", [Missing("no key yet"), "whsec_", "whsec_x", "whsec_é", THROTTLED])
def test_without_a_usable_key_the_sender_is_told_to_try_again(key: str | Exception, started: dict[str, Any]) -> None:
    bell = Bell(app("webhook"), key)
    assert bell.answer(signed(started)) == 503
    assert bell.woken == 0


def test_a_poller_that_cannot_be_woken_has_the_sender_try_again(started: dict[str, Any]) -> None:
    assert Bell(app("webhook"), fails=THROTTLED).answer(signed(started)) == 503


def test_nothing_secret_is_logged_or_shown(
    bell: Bell, started: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    event = signed(started)
    for attempt in (event, event | {"body": "{}"}, signed(started | {"body": "{}"})):
        bell.answer(attempt)
    printed = capsys.readouterr()
    for secret in (KEY, KEY.removeprefix("whsec_"), event["headers"]["webhook-signature"]):
        assert secret not in printed.out + printed.err
    with pytest.raises(NotGenuine) as refused:
        verify(SecretStr(KEY), {}, b"")
    assert refused.value.__context__ is None or KEY not in str(refused.value.__context__)


def test_the_woken_poller_is_the_stack_s_and_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Client:
        def invoke(self, **arguments: Any) -> None:
            asked.append(arguments)

    monkeypatch.setattr(boto3, "client", lambda service, **_: Client())
    wiring.wake_poller(Config(table="work", poller_function="the-poller"))()
    assert asked == [{"FunctionName": "the-poller", "InvocationType": "Event", "Payload": b"{}"}]


# --- the key's secret ----------------------------------------------------------------------------------------


def test_a_stored_key_is_read_once_a_minute_and_its_absence_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    now = 0.0
    with mock_aws():
        client = boto3.client("secretsmanager", region_name="us-east-1")
        arn = client.create_secret(Name="webhook")["ARN"]
        key = StoredKey(client, arn, name="signing key", prefix="whsec_", until="nothing", now=lambda: now)
        with pytest.raises(Missing, match=r"put the signing key into the secret arn:.*until then nothing"):
            key()
        client.put_secret_value(SecretId=arn, SecretString="sk-another-kind")
        with pytest.raises(Missing, match="holds no key"):
            key()
        client.put_secret_value(SecretId=arn, SecretString=f"{KEY}\n")
        assert key().get_secret_value() == KEY
        assert KEY not in f"{key()!r} {key()}"
        client.put_secret_value(SecretId=arn, SecretString="whsec_rotated")
        now = 60.0
        assert key().get_secret_value() == KEY
        now = 61.0
        assert key().get_secret_value() == "whsec_rotated"


# --- the emulator as the sender ------------------------------------------------------------------------------


def test_what_the_emulator_sends_when_a_session_is_queued_is_genuine(
    bell: Bell, started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[int] = []

    def receive(request: httpx.Request) -> httpx.Response:
        event = started | {"headers": dict(request.headers), "body": request.content.decode()}
        received.append(bell.answer(event))
        return httpx.Response(received[-1])

    plain = httpx.AsyncClient
    transport = httpx.MockTransport(receive)
    monkeypatch.setattr("local.work_api.webhooks.httpx.AsyncClient", lambda **_: plain(transport=transport))

    async def main() -> list[dict[str, Any]]:
        asgi = httpx.ASGITransport(app=Emulator("env_unit", "sk-ant-oat01-unit", "sk-ant-api03-unit").app)
        async with plain(transport=asgi, base_url="http://emulator/_control/") as control:
            await control.post("sessions", json={})
            registered = await control.post("webhook", json={"url": "https://bell.example/", "key": KEY})
            assert registered.status_code == 200
            await control.post("sessions", json={"count": 2})
            refused = await control.post("webhook", json={"url": "https://bell.example/"})
            assert refused.status_code == 400
            sent: list[dict[str, Any]] = []
            for _ in range(100):
                await asyncio.sleep(0)  # the deliveries' turn
                sent = (await control.get("state")).json()["webhooks"]
            return sent

    assert [delivery["status"] for delivery in asyncio.run(main())] == [202, 202]
    assert bell.woken == 2
