"""Writes that go out together, on the local AWS: they leave and answer what the same writes do one by one.

moto evaluates no condition of a statement, so only here are the statements themselves tried.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from shared import lifecycle
from shared.record import Lease, Outcome, Record
from shared.store import Conflict, DynamoStore
from shared.work_api import Work
from tests.contract.local_aws import LocalAws
from tests.unit.conftest import create_work_table

Save = Callable[[DynamoStore], object]


@pytest.fixture
def table(aws: LocalAws) -> Iterator[Any]:
    client = aws.client("dynamodb")
    create_work_table(client)
    yield client
    client.delete_table(TableName="work")


def record(name: str, **fields: Any) -> Record:
    work = Work.model_validate(
        {
            "id": name,
            "environment_id": "env_1",
            "data": {"type": "session", "id": name},
            "state": "queued",
            "secret": "c2VjcmV0",
        }
    )
    opened = lifecycle.open_turn(None, work, now=1, owner="me", until=9, shard="0")
    return opened.model_copy(update=fields)


def lease(name: str, value: str, turn: int = 1, **fields: Any) -> Lease:
    return Lease(work_id=name, turn=turn, value=value, ttl_seconds=300, accepted_sent_at=1, due_at=2, **fields)


def given(store: DynamoStore) -> dict[str, Record]:
    """What is there before: a record and a lease of each of these."""
    for name in "abcdef":
        store.save_lease(lease(name, "v1", over="lost" if name == "b" else None), None)
    return {name: store.save(record(name, outcome=Outcome.LOST, reason="of before")) for name in "abcdef"}


def writes(before: dict[str, Record]) -> list[Save]:
    """Of every kind: each is taken or lost, and the last two of one item are lost to each other."""
    ended = before["a"].model_copy(update={"shard": None, "secret": None, "reason": None, "outcome": Outcome.COMPLETED})
    return [
        lambda s: s.save(ended),  # fields go, it leaves the index
        lambda s: s.save(before["b"].model_copy(update={"revision": 7})),  # another wrote first
        lambda s: s.save(record("new")),
        lambda s: s.save(record("c")),  # stands already
        lambda s: s.save(record("gone", revision=3)),  # never stood, or DynamoDB's TTL took it
        lambda s: s.save_lease(lease("b", "v2"), lease("b", "v1")),  # its `over` goes
        lambda s: s.save_lease(lease("c", "v3"), lease("c", "v2")),  # another beat first
        lambda s: s.save_lease(lease("d", "v1"), None),  # claimed already
        lambda s: s.save_lease(lease("e", "v1", turn=2), None),  # of an earlier turn
        lambda s: s.save_lease(lease("other", "v1"), None),
        lambda s: s.save_lease(lease("f", "v2"), lease("f", "v1", turn=2)),  # of another turn
    ]


def outcome(save: Callable[[], object]) -> type:
    try:
        save()
    except Conflict:
        return Conflict
    return type(None)


def everything(table: Any) -> list[Any]:
    return sorted(table.scan(TableName="work")["Items"], key=lambda item: (item["pk"]["S"], item["sk"]["S"]))


def test_together_or_one_by_one_the_same_is_written_answered_and_found_live(aws: LocalAws, table: Any) -> None:
    store = DynamoStore(table, "work")
    saves = writes(given(store))
    answers = [outcome(lambda save=save: save(store)) for save in saves]  # type: ignore[misc]
    written, live = everything(table), store.live("0")
    assert {Conflict, type(None)} == set(answers)

    table.delete_table(TableName="work")
    create_work_table(table)
    store = DynamoStore(table, "work")
    saves = writes(given(store))
    asked: list[Any] = []
    send, alone = store._write_all, list[Any]()
    store._writes = SimpleNamespace(ask=asked.append)  # type: ignore[assignment]
    for save in saves:
        save(store)
    table.meta.events.register("before-call.dynamodb.PutItem", lambda params, **_: alone.append(params))
    together = [type(answer) for answer in send(asked)]
    assert together == answers
    assert everything(table) == written
    assert store.live("0") == live
    assert len(alone) == 2, "leases that stood already, whose turn only a put can compare"


def test_of_two_writes_of_one_item_in_one_call_one_is_lost_and_nothing_is_mixed(table: Any) -> None:
    """DynamoDB refuses a call that names an item twice: then each is put alone."""
    store = DynamoStore(table, "work")
    before = given(store)["a"]
    asked: list[Any] = []
    send = store._write_all
    store._writes = SimpleNamespace(ask=asked.append)  # type: ignore[assignment]
    for reason in ("first", "second"):
        store.save(before.model_copy(update={"reason": reason}))
    assert sorted(str(answer and type(answer).__name__) for answer in send(asked)) == ["Conflict", "None"]
    after = store.get("a")
    assert after is not None
    assert (after.revision, after.reason) in ((2, "first"), (2, "second"))


def test_many_threads_share_calls_and_each_write_is_kept_once(table: Any) -> None:
    calls = list[str]()
    table.meta.events.register("before-call.dynamodb", lambda model, **_: calls.append(model.name))
    store = DynamoStore(table, "work")
    names = [f"sesn_{number}" for number in range(200)]
    with ThreadPoolExecutor(32) as pool:
        saved = list(pool.map(store.save, map(record, names)))
        kept = list(pool.map(store.get, names))
        again = list(pool.map(lambda one: outcome(lambda: store.save(one.model_copy(update={"revision": 0}))), saved))
    assert kept == saved
    assert again == [Conflict] * len(names)
    assert len(calls) < 2 * len(names), "one by one these are three times as many"
