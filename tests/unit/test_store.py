"""What both twins of the record store promise."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError
from pydantic import ValidationError

from shared import lifecycle
from shared.record import Breaker, Lease, Outcome, Phase, Record
from shared.store import Conflict, DynamoStore, Store, change, change_breaker
from shared.work_api import Work
from tests.unit.conftest import dynamo_table

ROOT = Path(__file__).resolve().parents[2]

SECRET = "c2VjcmV0LW9mLXdvcmstMQ"


def work(work_id: str = "sesn_1") -> Work:
    return Work.model_validate(
        {
            "id": work_id,
            "environment_id": "env_1",
            "data": {"type": "session", "id": work_id},
            "state": "queued",
            "secret": SECRET,
        }
    )


def received(previous: Record | None = None, *, now: int = 1_000_000) -> Record:
    return lifecycle.open_turn(previous, work(), now=now, owner="me", until=now + 60_000, shard="0")


def lease(value: str = "v1", turn: int = 1_000_000) -> Lease:
    return Lease(work_id="sesn_1", turn=turn, value=value, ttl_seconds=300, accepted_sent_at=1, due_at=2)


def test_a_record_comes_back_as_it_was_saved(store: Store) -> None:
    saved = store.save(received())
    assert store.get("sesn_1") == saved
    assert saved.secret is not None
    assert saved.secret.get_secret_value() == SECRET
    assert store.get("sesn_other") is None


def test_of_two_writers_of_one_revision_the_second_conflicts(store: Store) -> None:
    saved = store.save(received())
    store.save(lifecycle.held(saved, 1_000_001))
    with pytest.raises(Conflict):
        store.save(lifecycle.held(saved, 1_000_002))
    with pytest.raises(Conflict):
        store.save(received())


def test_a_change_is_decided_on_the_newest_record(store: Store) -> None:
    saved = store.save(received())
    seen: list[str] = []

    def decide(record: Record) -> Record:
        if not seen:
            store.save(saved.noted(5, "another actor"))  # writes between our read and our write
        seen.append(record.timeline[-1].event)
        return lifecycle.held(record, 6)

    changed = change(store, "sesn_1", decide)
    assert seen == ["received", "another actor"]
    assert changed is not None
    assert [moment.event for moment in changed.timeline] == ["received", "another actor", "held"]


def test_only_live_records_are_in_the_index_and_no_secret_is(store: Store) -> None:
    saved = store.save(received())
    entries = store.live("0")
    assert [(entry.work_id, entry.phase, entry.turn) for entry in entries] == [("sesn_1", "received", 1_000_000)]
    assert SECRET not in json.dumps([entry.model_dump() for entry in entries])
    store.save(lifecycle.closed(saved, 1_000_500, retention_seconds=60, outcome=Outcome.COMPLETED))
    assert store.live("0") == []


def test_the_records_are_the_live_and_the_ended_ones_and_nothing_else(store: Store) -> None:
    ended = store.save(lifecycle.closed(store.save(received()), 1_000_002, retention_seconds=60))
    live = store.save(received().model_copy(update={"work_id": "sesn_2"}))
    store.save_lease(lease(), None)
    store.save_marks({"seen": 1})
    assert sorted(store.records(), key=lambda record: record.work_id) == [ended, live]


def test_the_end_removes_the_secret_and_sets_the_time_to_live(store: Store) -> None:
    saved = store.save(received())
    store.save(lifecycle.closed(saved, 2_000_000, retention_seconds=60, outcome=Outcome.STOPPED))
    ended = store.get("sesn_1")
    assert ended is not None
    assert ended.secret is None
    assert ended.expires_at == 2_060
    assert ended.phase is Phase.STOPPED


def test_a_new_turn_follows_the_ended_one_and_keeps_it_as_history(store: Store) -> None:
    ended = store.save(
        lifecycle.closed(store.save(received()), 1_000_400, retention_seconds=60, outcome=Outcome.COMPLETED)
    )
    second = store.save(received(ended, now=1_000_000))  # the clock of another machine may lag
    assert second.turn == 1_000_001
    assert second.expires_at is None
    stored = store.get("sesn_1")
    assert stored is not None
    assert [(past.turn, past.outcome) for past in stored.history] == [(1_000_000, "completed")]


def test_a_lease_is_written_on_its_turn_and_value_alone(store: Store) -> None:
    store.save_lease(lease("v1"), None)
    store.save_lease(lease("v2"), lease("v1"))
    with pytest.raises(Conflict):
        store.save_lease(lease("v3"), lease("v1"))
    assert store.get_leases(["sesn_1", "none"]) == {"sesn_1": lease("v2")}


def test_a_first_lease_replaces_an_earlier_turn_s_but_never_its_own(store: Store) -> None:
    store.save_lease(lease("v1"), None)
    with pytest.raises(Conflict):
        store.save_lease(lease("again"), None)
    store.save_lease(lease("w1", turn=1_000_001), None)
    assert store.get_leases(["sesn_1"])["sesn_1"].value == "w1"


def test_a_loop_s_generation_is_raised_once(store: Store) -> None:
    assert store.loop_generation("0") == 0
    assert store.raise_loop_generation("0", 0) == 1
    with pytest.raises(Conflict):
        store.raise_loop_generation("0", 0)
    assert store.loop_generation("0") == 1


def test_no_repr_of_a_record_shows_its_secret(store: Store) -> None:
    assert SECRET not in repr(store.save(received()))


def size(value: dict[str, Any]) -> int:
    """Bytes of an attribute value as DynamoDB bills them: text in UTF-8, about half a byte a digit and one more."""
    [(kind, content)] = value.items()
    return len(str(content).encode()) if kind == "S" else len(str(content)) // 2 + 2


def test_a_beat_costs_one_write_unit_at_the_largest_sizes() -> None:
    """DESIGN §4: the lease is an item of its own, under 1 kB, and in no index."""
    written: list[dict[str, Any]] = []
    client: Any = SimpleNamespace(put_item=lambda **request: written.append(request["Item"]))
    longest = lifecycle.LONGEST_ID
    largest = Lease(
        work_id="w" * longest,
        turn=9_999_999_999_999,
        value="2026-11-25T08:00:00.000000000+00:00" * 4,
        ttl_seconds=99_999,
        accepted_sent_at=9_999_999_999_999,
        due_at=9_999_999_999_999,
        over="stopped",
    )
    DynamoStore(client, "work").save_lease(largest, largest)
    [item] = written
    assert sum(len(name) + size(value) for name, value in item.items()) <= 1024
    assert "shard" not in item, "it would be a write to the live index as well"


def test_the_janitor_s_marks_are_written_over_whole(store: Store) -> None:
    assert store.marks() == {}
    store.save_marks({"task arn:a": 1_800_000_000_000, "item w starting None": 2})
    store.save_marks({"task arn:a": 1_800_000_000_000})
    assert store.marks() == {"task arn:a": 1_800_000_000_000}
    store.save_marks({})
    assert store.marks() == {}


def test_of_two_writers_of_the_breaker_the_second_conflicts(store: Store) -> None:
    assert store.breaker() == Breaker()
    saved = store.save_breaker(Breaker(failures=3, opened_at=5, reason="no image", probe="w/1/1", probe_at=5))
    assert store.breaker() == saved
    store.save_breaker(saved.model_copy(update={"failures": 4}))
    with pytest.raises(Conflict):
        store.save_breaker(saved)
    with pytest.raises(Conflict):
        store.save_breaker(Breaker())
    assert store.breaker().failures == 4


def test_the_switch_set_by_the_documented_command_is_never_overwritten() -> None:
    """docs/operations.md: it raises the revision, so a write that had not seen it conflicts."""
    command = (ROOT / "docs" / "operations.md").read_text().split("aws dynamodb update-item", 1)[1].split("\n\n")[0]
    [key, expression, values] = re.findall(r"'([^']+)'", command)
    with dynamo_table() as client:
        store = DynamoStore(client, "work")
        for paused in (True, False):
            seen = store.breaker()
            client.update_item(
                TableName="work",
                Key=json.loads(key),
                UpdateExpression=expression,
                ExpressionAttributeValues=json.loads(values.replace("true", str(paused).lower())),
            )
            assert store.breaker().paused is paused
            with pytest.raises(Conflict):
                store.save_breaker(seen.model_copy(update={"failures": 1}))
            change_breaker(store, lambda breaker: breaker.model_copy(update={"failures": 1}))
            assert store.breaker().paused is paused


# --- writes and reads that threads ask for together (decision 0010) --------------------------------------------


class Scripted:
    """A DynamoDB client whose batches answer with these error codes, and which keeps what was put alone."""

    def __init__(self, codes: list[str] | ClientError) -> None:
        self.codes, self.alone = codes, list[str]()
        self.statements: list[Any] = []

    def batch_execute_statement(self, Statements: list[Any]) -> dict[str, Any]:
        self.statements += Statements
        if isinstance(self.codes, ClientError):
            raise self.codes
        return {"Responses": [{"Error": {"Code": code}} if code else {"TableName": "work"} for code in self.codes]}

    def put_item(self, *, Item: dict[str, Any], **_: Any) -> None:
        self.alone.append(Item["pk"]["S"])


def all_at_once(client: Any, *saves: Callable[[DynamoStore], object]) -> list[Exception | None]:
    """What these saves are answered when their writes go out together."""
    store = DynamoStore(client, "work")
    asked: list[Any] = []
    send, store._writes = store._write_all, SimpleNamespace(ask=asked.append)  # type: ignore[assignment]
    for save in saves:
        save(store)
    return send(asked)


def new(name: str) -> Callable[[DynamoStore], object]:
    return lambda store: store.save(lifecycle.open_turn(None, work(name), now=1, owner="me", until=9, shard="0"))


def beaten(name: str, over: str | None = None) -> Callable[[DynamoStore], object]:
    one = lease().model_copy(update={"work_id": name, "over": over})
    return lambda store: store.save_lease(one, lease().model_copy(update={"work_id": name}))


def claimed(name: str) -> Callable[[DynamoStore], object]:
    return lambda store: store.save_lease(lease().model_copy(update={"work_id": name}), None)


def kinds(answers: list[Exception | None]) -> list[type]:
    return [type(answer) for answer in answers]


def test_of_writes_in_one_call_each_has_its_own_answer() -> None:
    client = Scripted(["", "ConditionalCheckFailed", "DuplicateItem", ""])
    answers = all_at_once(client, new("a"), beaten("b"), new("c"), beaten("d"))
    assert kinds(answers) == [type(None), Conflict, Conflict, type(None)]
    assert client.alone == []
    assert SECRET not in repr([answers, [one["Statement"] for one in client.statements]])


@pytest.mark.parametrize("code", ["ThrottlingError", "TransactionConflict", "ValidationError", "AccessDenied", "New"])
def test_what_a_call_leaves_open_is_put_alone(code: str, caplog: pytest.LogCaptureFixture) -> None:
    client = Scripted(["", code, ""])
    assert kinds(all_at_once(client, new("a"), beaten("b"), new("c"))) == [type(None)] * 3
    assert client.alone == ["b"]
    [line] = caplog.records
    assert (line.levelname, vars(line)["error"], vars(line)["count"]) == ("WARNING", code, 1)


def test_a_lease_that_stands_already_is_put_alone_since_it_may_be_of_an_earlier_turn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = Scripted(["DuplicateItem", "DuplicateItem"])
    assert kinds(all_at_once(client, claimed("a"), new("b"))) == [type(None), Conflict]
    assert client.alone == ["a"]
    assert caplog.records == [], "as usual at a session's second turn"


def test_where_the_call_is_refused_everything_is_put_alone_and_no_value_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Such as by a role of an earlier version, or an API that knows no such call."""
    refusal: Any = {"Code": "ValidationException", "Message": f"no such value: {SECRET}"}
    client = Scripted(ClientError({"Error": refusal}, "BatchExecuteStatement"))
    assert kinds(all_at_once(client, new("a"), beaten("b"))) == [type(None)] * 2
    assert client.alone == ["a", "b"]
    [line] = caplog.records
    assert vars(line)["error"] == "ValidationException"
    assert SECRET not in str(vars(line))


def test_a_put_that_fails_is_the_answer_of_its_write_alone() -> None:
    client = Scripted(["ThrottlingError", "ThrottlingError"])
    throttled = ClientError({"Error": {"Code": "ProvisionedThroughputExceededException"}}, "PutItem")

    def put_item(*, Item: dict[str, Any], **_: Any) -> None:
        if Item["pk"]["S"] == "a":
            raise throttled

    client.put_item = put_item  # type: ignore[method-assign]
    assert all_at_once(client, new("a"), beaten("b")) == [throttled, None]


def test_a_lease_s_statement_names_every_field_of_it() -> None:
    """A statement changes named attributes, where a put replaces the item: what a lease may lack is removed."""
    client = Scripted(["", ""])
    all_at_once(client, beaten("a"), beaten("b", over="stopped"))
    without, with_over = (one["Statement"] for one in client.statements)
    for name in Lease.model_fields:
        assert f'SET "{name}" = ?' in with_over
    assert 'REMOVE "over"' in without
    assert "REMOVE" not in with_over


def test_a_record_s_statement_names_every_field_of_it_and_is_no_longer_than_dynamodb_takes() -> None:
    client = Scripted(["", ""])
    known = received().model_copy(update={"revision": 1})
    all_at_once(client, lambda store: store.save(known), lambda store: store.save(known))
    text = client.statements[0]["Statement"]
    assert all(f'SET "{name}" = ?' in text or f'REMOVE "{name}"' in text for name in Record.model_fields)
    assert 'REMOVE "outcome"' in text
    assert len(text) < 8192


def test_records_asked_for_together_are_read_in_one_call_each_once() -> None:
    asked: list[list[str]] = []
    saved = received()

    def batch_get_item(RequestItems: dict[str, Any]) -> dict[str, Any]:
        keys = RequestItems["work"]["Keys"]
        asked.append([key["pk"]["S"] for key in keys])
        if len(keys) == 2:  # DynamoDB may leave some unread
            return {"Responses": {}, "UnprocessedKeys": {"work": {"Keys": keys[:1]}}}
        return {"Responses": {"work": [stored]}}

    stored: dict[str, Any] = {}
    DynamoStore(SimpleNamespace(put_item=lambda **request: stored.update(request["Item"])), "work").save(saved)  # type: ignore[arg-type]
    store = DynamoStore(SimpleNamespace(batch_get_item=batch_get_item), "work")  # type: ignore[arg-type]
    read = store._read_records(["sesn_1", "sesn_other", "sesn_1"])
    assert asked == [["sesn_1", "sesn_other"], ["sesn_1"]]
    assert read == [stored, None, stored]


def test_a_record_that_cannot_be_read_fails_whoever_asked_for_it_alone() -> None:
    stored: dict[str, Any] = {}
    DynamoStore(SimpleNamespace(put_item=lambda **request: stored.update(request["Item"])), "work").save(received())  # type: ignore[arg-type]
    items = [stored, stored | {"pk": {"S": "bad"}, "phase": {"S": "of a later version"}}]
    client: Any = SimpleNamespace(batch_get_item=lambda **_: {"Responses": {"work": items}})
    store = DynamoStore(client, "work")
    answers = dict(zip(["sesn_1", "bad"], store._read_records(["sesn_1", "bad"]), strict=True))
    store._reads = SimpleNamespace(ask=answers.get)  # type: ignore[assignment]
    assert store.get("sesn_1") is not None
    with pytest.raises(ValidationError):
        store.get("bad")
