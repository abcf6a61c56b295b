"""The functions' handlers over the sample events of events/; their rules are tested elsewhere."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from shared import lifecycle
from shared.buckets import Post
from shared.config import Config, Missing
from shared.launching import LaunchMessage, PutOff
from shared.metrics import Metric
from shared.observing import Observer
from shared.outputs import OutputsPlace
from shared.record import Phase, Record
from shared.staging import StagingPlaces
from shared.store import MemoryStore
from shared.ticketing import Tickets
from shared.wishes import Wishes
from shared.work_api import NotAllowed, Refused, Work

ROOT = Path(__file__).resolve().parents[2]
TURN = 1_795_500_000_000
CONTEXT = SimpleNamespace(aws_request_id="request-1", get_remaining_time_in_millis=lambda: 100_000)
SECRET = "secret-of-the-example"
PLACE = OutputsPlace("bucket", "fleet", 3, 100, 200, lambda key, least, most: Post(url="u", fields={"key": key}))
SOURCES = StagingPlaces(frozenset({"listed"}), frozenset(), 100, lambda bucket, key: f"https://{bucket}/{key}")


def app(function: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{function}_app", ROOT / "functions" / function / "app.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sample(name: str) -> dict[str, Any]:
    event: dict[str, Any] = json.loads((ROOT / "events" / f"{name}.json").read_text())
    return event


def launching(store: MemoryStore) -> MemoryStore:
    """The example session of the sample events, being launched."""
    work = Work.model_validate(
        {
            "id": "sesn_01EXAMPLE",
            "environment_id": "env_1",
            "data": {"type": "session", "id": "sesn_01EXAMPLE"},
            "state": "queued",
            "secret": SECRET,
        }
    )
    received = store.save(lifecycle.open_turn(None, work, now=TURN, owner="me", until=TURN, shard="0"))
    held = store.save(lifecycle.held(received, TURN))
    begun = lifecycle.begin_launch(
        held, TURN, 1, ticket_hash=lifecycle.hash_secret("example-ticket"), now=TURN, until=TURN
    )
    assert begun
    store.save(begun)
    return store


@pytest.fixture
def records() -> MemoryStore:
    return launching(MemoryStore())


def phase(records: MemoryStore) -> Phase:
    record = records.get("sesn_01EXAMPLE")
    assert record
    return record.phase


def test_every_function_has_a_sample_event_and_a_handler() -> None:
    for folder in (ROOT / "functions").iterdir():
        if (folder / "app.py").exists():
            assert list((ROOT / "events").glob(f"{folder.name}_*.json")), folder.name
            assert callable(app(folder.name).handler)


@pytest.mark.parametrize(
    "function", ["poller", "keeper", "stopper", "observer", "tickets", "launcher", "janitor", "webhook"]
)
def test_missing_configuration_is_named(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Config.model_fields:
        monkeypatch.delenv(f"FLEET_{name.upper()}", raising=False)
    build: Callable[[], object] = getattr(app(function), "claimer" if function == "poller" else function)
    with pytest.raises(Missing, match=r"FLEET_TABLE.* not set: .*deploy the stack again"):
        build()


class _Failing:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self, **_: object) -> int:
        raise self.error


@pytest.mark.parametrize("error", [NotAllowed("the key is refused", status=401), Refused("poll refused", status=400)])
def test_a_refused_poll_is_one_line_and_no_crash(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poller = app("poller")
    monkeypatch.setattr(poller, "claimer", lambda: _Failing(error))
    assert poller.handler(sample("poller_schedule"), CONTEXT) == {"held": 0}


def test_a_poller_without_a_key_logs_one_line_and_rings_no_alarm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poller, said = app("poller"), list[str]()
    monkeypatch.setattr(poller, "claimer", lambda: _Failing(Missing("put the environment key into its secret")))
    for level in ("warning", "error"):
        monkeypatch.setattr(poller.log, level, lambda message, **_: said.append(message))
    assert poller.handler(sample("poller_schedule"), CONTEXT) == {"held": 0}
    assert said == ["not configured: nothing is polled"]
    assert Metric.KEY_REFUSED.value[0] not in capsys.readouterr().out


class _Launcher:
    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.launched = error, list[LaunchMessage]()

    def launch(self, message: LaunchMessage) -> None:
        if self.error:
            raise self.error
        self.launched.append(message)


def test_a_malformed_message_goes_to_the_dead_letters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """FIELD_NOTES 6: one malformed body poisoned its batch."""
    launcher, served, sent = app("launcher"), _Launcher(), list[dict[str, Any]]()
    monkeypatch.setattr(launcher, "launcher", lambda: served)
    monkeypatch.setattr(launcher, "config", lambda: Config(table="work", dead_letters_url="dead"))
    monkeypatch.setattr(launcher, "sqs", lambda: SimpleNamespace(send_message=lambda **sending: sent.append(sending)))
    event = sample("launcher_malformed")
    assert launcher.handler(event, CONTEXT) == {"batchItemFailures": []}
    assert sent == [{"QueueUrl": "dead", "MessageBody": message["body"]} for message in event["Records"][:2]]
    assert served.launched == [LaunchMessage(work_id="sesn_01EXAMPLE", turn=TURN, attempt=1)]


def test_a_malformed_message_that_cannot_be_moved_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = app("launcher")
    monkeypatch.setattr(launcher, "launcher", _Launcher)
    monkeypatch.setattr(launcher, "config", lambda: Config(table="work", dead_letters_url="dead"))
    monkeypatch.setattr(launcher, "sqs", SimpleNamespace)  # every call fails
    reply = launcher.handler(sample("launcher_malformed"), CONTEXT)
    assert [failed["itemIdentifier"] for failed in reply["batchItemFailures"]] == ["message-1", "message-2"]


def test_an_unknown_error_brings_the_message_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """FIELD_NOTES 5: a catch-all dropped messages."""
    launcher = app("launcher")
    monkeypatch.setattr(launcher, "launcher", lambda: _Launcher(RuntimeError("surprise")))
    assert len(launcher.handler(sample("launcher_message"), CONTEXT)["batchItemFailures"]) == 1


@pytest.mark.parametrize(("received", "wait"), [("1", 5), ("3", 20), ("50", 240)])
def test_a_launch_that_is_put_off_comes_back_later_and_later(
    received: str, wait: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FIELD_NOTES 12: our own pacing."""
    launcher, asked = app("launcher"), list[dict[str, Any]]()
    monkeypatch.setattr(launcher, "launcher", lambda: _Launcher(PutOff("no capacity")))
    monkeypatch.setattr(launcher, "config", lambda: Config(table="work", queue_url="queue"))
    sqs = SimpleNamespace(change_message_visibility=lambda **arguments: asked.append(arguments))
    monkeypatch.setattr(launcher, "sqs", lambda: sqs)
    event = sample("launcher_message")
    event["Records"][0]["attributes"]["ApproximateReceiveCount"] = received
    assert len(launcher.handler(event, CONTEXT)["batchItemFailures"]) == 1
    assert asked == [{"QueueUrl": "queue", "ReceiptHandle": "handle-1", "VisibilityTimeout": wait}]


def test_the_observer_takes_a_task_s_states_and_ignores_all_else(
    records: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer, woken = app("observer"), list[str]()
    queue: Any = SimpleNamespace(send=lambda record: None)
    parts = Observer(Config(table="work"), records, queue, woken.append, lambda: TURN)
    monkeypatch.setattr(observer, "observer", lambda: parts)
    for nothing in (
        {},
        {"source": "aws.ec2", "detail": {}},
        {"source": "aws.ecs", "detail": {"lastStatus": "STOPPED"}},
    ):
        observer.handler(nothing, CONTEXT)
    assert phase(records) is Phase.LAUNCHING
    observer.handler(sample("observer_running"), CONTEXT)
    assert phase(records) is Phase.RUNNING
    observer.handler(sample("observer_stopped"), CONTEXT)
    assert phase(records) is Phase.STOPPING
    assert woken == ["sesn_01EXAMPLE"]


@pytest.fixture
def tickets(records: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = app("tickets")
    parts = Tickets(records, lambda work_id: None, lambda: TURN, None, lambda: "example-callback", PLACE, SOURCES)
    monkeypatch.setattr(module, "tickets", lambda: parts)
    return module


def test_a_ticket_gives_its_session_s_credential_and_the_last_word_ends_the_turn(
    tickets: ModuleType, records: MemoryStore
) -> None:
    reply = tickets.handler(sample("tickets_redeem"), CONTEXT)
    assert reply["statusCode"] == 200
    assert json.loads(reply["body"])["work_secret"] == SECRET
    assert reply["headers"]["cache-control"] == "no-store"
    assert tickets.handler(sample("tickets_turn_ended"), CONTEXT)["statusCode"] == 202
    assert phase(records) is Phase.STOPPING


def test_uploads_are_signed_and_heard_of(tickets: ModuleType, records: MemoryStore) -> None:
    assert json.loads(tickets.handler(sample("tickets_redeem"), CONTEXT)["body"])["outputs"] is True
    reply = tickets.handler(sample("tickets_outputs"), CONTEXT)
    [post] = json.loads(reply["body"])["posts"]
    key = f"fleet/sesn_01EXAMPLE/{TURN}/1/files/report/summary.txt"
    assert (post["name"], post["key"], post["fields"]["key"]) == ("report/summary.txt", key, key)
    assert tickets.handler(sample("tickets_outputs_put"), CONTEXT)["statusCode"] == 202
    record = records.get("sesn_01EXAMPLE")
    assert record
    assert record.outputs
    assert (record.outputs.files, record.outputs.bytes, record.outputs.problem) == (1, 12, None)


def test_the_sources_of_a_workspace_are_told(tickets: ModuleType, records: MemoryStore) -> None:
    record = records.get("sesn_01EXAMPLE")
    assert record
    records.save(record.model_copy(update={"wishes": Wishes(archive="s3://listed/a.zip")}))
    assert json.loads(tickets.handler(sample("tickets_redeem"), CONTEXT)["body"])["staging"] is True
    reply = tickets.handler(sample("tickets_staging"), CONTEXT)
    assert json.loads(reply["body"]) == {"archive": {"name": "a.zip", "url": "https://listed/a.zip"}, "max_bytes": 100}


@pytest.mark.parametrize("path", ["/outputs", "/outputs-put", "/staging"])
@pytest.mark.parametrize(("body", "status"), [("[" * 400_000, 400), ("{}", 400), (None, 400)])
def test_a_bad_word_on_outputs_is_refused(tickets: ModuleType, path: str, body: str | None, status: int) -> None:
    assert tickets.handler(sample("tickets_outputs") | {"rawPath": path, "body": body}, CONTEXT)["statusCode"] == status
    guessed = {"body": sample("tickets_outputs")["body"].replace("example-callback", "guess")}
    assert tickets.handler(sample("tickets_outputs") | guessed, CONTEXT)["statusCode"] == 403


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (
            {
                "body": json.dumps(
                    {"work_id": "sesn_01EXAMPLE", "turn": TURN, "attempt": 1, "ticket": "x", "nonce": "n"}
                )
            },
            403,
        ),
        ({"body": "not json"}, 400),
        ({"body": None}, 400),
        ({"body": "%%%", "isBase64Encoded": True}, 400),
        ({"body": "[" * 100_000}, 400),
        ({"requestContext": {"http": {"method": "GET"}}}, 405),
        ({"requestContext": None}, 405),
        ({"rawPath": "/turn-ended"}, 400),
    ],
)
def test_a_bad_request_is_refused_without_detail(
    change: dict[str, Any], status: int, tickets: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    reply = tickets.handler(sample("tickets_redeem") | change, CONTEXT)
    assert reply["statusCode"] == status
    printed = capsys.readouterr()
    for secret in (SECRET, "example-ticket"):
        assert secret not in reply["body"] + printed.out + printed.err


def test_types_that_hold_secrets_hide_them(records: MemoryStore) -> None:
    record = records.get("sesn_01EXAMPLE")
    assert isinstance(record, Record)
    assert isinstance(record.secret, SecretStr)
    assert SECRET not in f"{record!r} {record}"


def test_the_janitor_ends_well_before_its_function_s_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    janitor, until = app("janitor"), list[int]()
    monkeypatch.setattr(janitor, "janitor", lambda: SimpleNamespace(sweep=until.append))
    monkeypatch.setattr(janitor.wiring, "now", lambda: TURN)
    context = SimpleNamespace(get_remaining_time_in_millis=lambda: 300_000)
    assert janitor.handler(sample("janitor_schedule"), context) is None
    assert until == [TURN + 210_000]
