"""Thousands of malformed events into the handlers that take them from outside: none crashes, none loses or tells.

The cases are the same in every run (`derandomize`), so that a failure is the change's own.
"""

import base64
import contextlib
import copy
import io
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import hypothesis
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from shared.config import Config
from shared.launching import Launcher, LaunchMessage, PutOff
from shared.log import log
from shared.observing import Observer
from shared.record import Phase, Record
from shared.store import MemoryStore
from shared.ticketing import Tickets
from shared.webhook import Doorbell
from tests.unit.test_handlers import CONTEXT, PLACE, SECRET, TURN, app, launching, sample
from tests.unit.test_webhook import KEY, signed

CASES = 400  # of each of six kinds
SECRETS = (SECRET, "example-ticket", "example-nonce", "example-callback", KEY, KEY.removeprefix("whsec_"))

thorough = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],  # without shrinking: of events this size it takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)

ODD_TEXTS = [
    "",
    " ",
    "x" * 30_000,
    "[" * 30_000,
    "9" * 5_000,
    "²",
    "\ud800",
    "\x00",
    "é",
    "null",
    "%%%",
    "{}",
    "/1/1",
    "w/²/1",
]
ODD_NUMBERS = [-1, 0, 2**31, 2**63, 10**40, 10**400, float("nan"), float("inf"), 1.5]
texts = st.one_of(st.text(max_size=20), st.sampled_from(ODD_TEXTS))
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from(ODD_NUMBERS))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value but its root."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from places(part, (*path, key))


@st.composite
def one_place_wrong(draw: st.DrawFn, good: Any) -> Any:
    """The value with one place, however deep, gone or replaced; often by another of its type."""
    wrong = copy.deepcopy(good)
    *above, last = draw(st.sampled_from(list(places(good))))
    part = wrong
    for key in above:
        part = part[key]
    alike = {str: texts, int: numbers}.get(type(part[last]), anything)
    how = draw(st.sampled_from(["gone", "alike", "alike", "anything"]))
    if how == "gone":
        del part[last]
    else:
        part[last] = draw(alike if how == "alike" else anything)
    return wrong


def body_of(good: Any) -> st.SearchStrategy[Any]:
    """A body: near the good one, any JSON, any text, or no text at all."""
    near = one_place_wrong(json.loads(good)).map(json.dumps)
    return st.one_of(near, near, anything.map(json.dumps), st.text(), anything)


@st.composite
def requests(draw: st.DrawFn, *good: dict[str, Any]) -> dict[str, Any]:
    """A Function URL's event with its body or any other place wrong, or with an encoding that is not what it says."""
    event: dict[str, Any] = draw(st.sampled_from(good))
    kind = draw(st.sampled_from(["body", "body", "place", "lie", "bytes"]))
    if kind == "place":
        wrong: dict[str, Any] = draw(one_place_wrong(event))
        return wrong
    if kind == "lie":
        return event | {
            "isBase64Encoded": draw(anything),
            "body": draw(st.one_of(body_of(event["body"]), st.just(event["body"]))),
        }
    if kind == "bytes":
        return event | {"isBase64Encoded": True, "body": base64.b64encode(draw(st.binary(max_size=5_000))).decode()}
    return event | {"body": draw(body_of(event["body"]))}


class PickyStore(MemoryStore):
    """Refuses the keys that DynamoDB refuses."""

    def get(self, work_id: str) -> Record | None:
        if not 1 <= len(work_id.encode()) <= 2048:
            raise ClientError({"Error": {"Code": "ValidationException", "Message": "bad key"}}, "GetItem")
        return super().get(work_id)


@contextlib.contextmanager
def nothing_told() -> Iterator[Callable[[Any], None]]:
    """What is passed to the yielded function, and all that is logged meanwhile, holds no secret."""
    logged, replies = io.StringIO(), list[str]()
    usual = log.registered_handler.setStream(logged)  # type: ignore[attr-defined]
    try:
        yield lambda reply: replies.append(json.dumps(reply))
    finally:
        log.registered_handler.setStream(usual)  # type: ignore[attr-defined]
    told = logged.getvalue() + "".join(replies)
    assert not [secret for secret in SECRETS if secret in told]


def test_the_webhook_refuses_what_is_malformed_or_unsigned() -> None:
    module, woken = app("webhook"), list[None]()
    module.webhook = lambda: Doorbell(lambda: SecretStr(KEY), lambda: woken.append(None))  # type: ignore[attr-defined]
    good = sample("webhook_run_started")

    @thorough
    @given(requests(signed(good)))
    def unsigned(event: dict[str, Any]) -> None:
        woken.clear()
        with nothing_told() as told:
            reply = module.handler(event, CONTEXT)
            told(reply)
        assert reply["statusCode"] in (202, 401, 405, 413)
        assert bool(woken) == (reply["statusCode"] == 202)
        if reply["statusCode"] == 202:  # what was wrong is nothing that is signed
            assert event["body"] == good["body"]

    @thorough
    @given(st.one_of(body_of(good["body"]).filter(lambda body: isinstance(body, str)), st.text()))
    def genuine(body: str) -> None:
        woken.clear()
        try:
            event = signed(good | {"body": body})
        except UnicodeEncodeError:
            return  # cannot be signed
        with nothing_told() as told:
            reply = module.handler(event, CONTEXT)
            told(reply)
        assert reply["statusCode"] in (202, 400, 413)

    unsigned()
    genuine()


def test_tickets_refuse_what_is_malformed() -> None:
    module = app("tickets")
    last_word = sample("tickets_turn_ended")

    @thorough
    @given(requests(sample("tickets_redeem"), last_word, sample("tickets_outputs"), sample("tickets_staging")))
    def refused(event: dict[str, Any]) -> None:
        parts = Tickets(
            launching(PickyStore()),
            lambda work_id: None,
            lambda: TURN,
            new_secret=lambda: "example-callback",
            outputs=PLACE,
        )
        module.tickets = lambda: parts  # type: ignore[attr-defined]
        with nothing_told() as told:
            reply = module.handler(event, CONTEXT)
            if reply["statusCode"] != 200:
                told(reply)
        assert reply["statusCode"] in (200, 202, 400, 403, 405)
        if reply["statusCode"] == 200:
            assert json.loads(reply["body"])["work_id"] == "sesn_01EXAMPLE"

    refused()


class _Sqs:
    """Takes messages; refuses what SQS refuses."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def change_message_visibility(self, **arguments: Any) -> None:
        if not isinstance(arguments["ReceiptHandle"], str) or not arguments["ReceiptHandle"]:
            raise ClientError(
                {"Error": {"Code": "ReceiptHandleIsInvalid", "Message": "bad"}}, "ChangeMessageVisibility"
            )

    def send_message(self, **arguments: Any) -> None:
        if not isinstance(arguments["MessageBody"], str) or not arguments["MessageBody"]:
            raise ClientError({"Error": {"Code": "InvalidParameterValue", "Message": "bad"}}, "SendMessage")
        self.sent.append(arguments["MessageBody"])


class _Served(Launcher):
    """Notes what it is asked to launch; puts off every second attempt."""

    def launch(self, message: LaunchMessage) -> None:
        super().launch(message)
        if message.attempt % 2 == 0:
            raise PutOff("no capacity")


def test_no_launch_message_is_lost() -> None:
    """Each record is launched or dropped as valid, reported as failed, or sent on to the dead letters."""
    module, sqs = app("launcher"), _Sqs()
    module.sqs = lambda: sqs  # type: ignore[attr-defined]
    given_config = {"table": "work", "queue_url": "queue", "dead_letters_url": "dead"}
    module.config = lambda: Config.model_validate(given_config)  # type: ignore[attr-defined]
    message = sample("launcher_message")["Records"][0]
    second = message | {"messageId": "message-2", "body": json.dumps(json.loads(message["body"]) | {"attempt": 2})}
    runs: Any = SimpleNamespace(run=lambda record, ticket: "arn:task")

    def valid(record: Any) -> bool:
        try:
            LaunchMessage.model_validate_json(record["body"])
        except Exception:  # noqa: BLE001  any fault makes it malformed
            return False
        return True

    wrong = st.one_of(
        anything,
        one_place_wrong(message),
        one_place_wrong(second),
        body_of(message["body"]).map(lambda body: message | {"body": body}),
    )

    no_api: Any = None  # the records name no session

    @thorough
    @given(st.lists(st.one_of(wrong, st.just(message), st.just(second)), max_size=3))
    def kept(records: list[Any]) -> None:
        sqs.sent.clear()
        store = launching(PickyStore())
        parts = _Served(Config(table="work"), no_api, store, runs, lambda: TURN, lambda: "example-ticket")
        module.launcher = lambda: parts  # type: ignore[attr-defined]
        with nothing_told() as told:
            reply = module.handler({"Records": records}, CONTEXT)
            told(reply)
        failed = [one["itemIdentifier"] for one in reply["batchItemFailures"]]
        assert all(isinstance(one, str) for one in failed)
        if "" in failed:
            return  # Lambda takes the whole batch as failed
        for record in records:
            assert valid(record) or record["messageId"] in failed or record["body"] in sqs.sent

    @thorough
    @given(st.one_of(anything.map(lambda records: {"Records": records}), st.just({})))
    def whole(event: dict[str, Any]) -> None:
        reply = module.handler(event, CONTEXT)
        assert not event.get("Records") or reply["batchItemFailures"]

    kept()
    whole()


def test_the_observer_ignores_what_is_malformed() -> None:
    module = app("observer")
    stopped, running = sample("observer_stopped"), sample("observer_running")
    queue: Any = SimpleNamespace(send=lambda record: None)

    @thorough
    @given(
        st.one_of(
            one_place_wrong(stopped),
            one_place_wrong(running),
            st.one_of(anything, one_place_wrong(stopped["detail"])).map(lambda detail: stopped | {"detail": detail}),
            texts.map(lambda name: stopped | {"detail": stopped["detail"] | {"startedBy": name}}),
        )
    )
    def ignored(event: dict[str, Any]) -> None:
        store = launching(PickyStore())
        parts = Observer(Config(table="work"), store, queue, lambda work_id: None, lambda: TURN)
        module.observer = lambda: parts  # type: ignore[attr-defined]
        with nothing_told() as told:
            told(module.handler(event, CONTEXT))
        record = store.get("sesn_01EXAMPLE")
        assert record
        assert record.phase in (Phase.LAUNCHING, Phase.RUNNING, Phase.HELD, Phase.STOPPING)
        assert len(record.model_dump_json()) < 10_000, "nothing huge gets into the record"

    ignored()
