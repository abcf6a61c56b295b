"""The record store: DynamoDB, its in-memory twin, and the one way to change a record. No rules live here.

Keys: pk = work id; sk = "record" or "lease"; pk = "loop#<shard>" keeps the lease loop's generation,
pk = "janitor" what the janitor saw in its last round.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from boto3.dynamodb.types import TypeDeserializer, TypeSerializer
from botocore.exceptions import ClientError
from pydantic import SecretStr

from shared.log import log
from shared.record import Breaker, Lease, LiveEntry, Record
from shared.together import Together

if TYPE_CHECKING:
    from types_boto3_dynamodb import DynamoDBClient
    from types_boto3_dynamodb.type_defs import BatchStatementRequestTypeDef

LIVE_INDEX = "live-index"
_CHANGE_TRIES = 8
_READ_AT_ONCE, _WRITTEN_AT_ONCE = 100, 25  # the most that BatchGetItem and BatchExecuteStatement take
_RECORD_NAMES, _LEASE_NAMES = (tuple(model.model_fields) for model in (Record, Lease))


class Conflict(Exception):
    """Another actor wrote first: read again and decide anew. A normal answer, never an error to report."""


class _Unsettled(Exception):
    """A batch left open whether this was written."""


class Store(Protocol):
    """What the control plane keeps; both twins pass the same tests."""

    def get(self, work_id: str) -> Record | None:
        """The record, read consistently."""

    def save(self, record: Record) -> Record:
        """Write over the revision that was read; returns it with its new revision. Raises Conflict."""

    def get_leases(self, work_ids: Iterable[str]) -> dict[str, Lease]:
        """The leases of these items, read consistently."""

    def save_lease(self, lease: Lease, replaces: Lease | None) -> None:
        """Conditional on (turn, stored value) alone, never on the phase. Raises Conflict."""

    def live(self, shard: str) -> list[LiveEntry]:
        """The live records, eventually consistent."""

    def records(self) -> Iterator[Record]:
        """Every record, live and ended, in no order: a scan, for people's commands alone."""

    def loop_generation(self, shard: str) -> int: ...

    def raise_loop_generation(self, shard: str, current: int) -> int:
        """`current` + 1. Raises Conflict if someone raised it first."""

    def marks(self) -> dict[str, int]:
        """What the janitor's last round saw, each with the time when it was first seen; read consistently."""

    def save_marks(self, marks: dict[str, int]) -> None:
        """Written over whole. A lost write only means that something is looked at once more."""

    def breaker(self) -> Breaker:
        """The circuit breaker, read consistently."""

    def save_breaker(self, breaker: Breaker) -> Breaker:
        """Write over the revision that was read; returns it with its new revision. Raises Conflict."""


def change(store: Store, work_id: str, decide: Callable[[Record], Record | None]) -> Record | None:
    """Apply a pure decision to the newest record; None if there is no record or nothing to do.

    Raises Conflict after several lost races: the caller's own retry decides.
    """
    for _ in range(_CHANGE_TRIES):
        record = store.get(work_id)
        changed = decide(record) if record else None
        if changed is None:
            return None
        try:
            return store.save(changed)
        except Conflict:
            continue
    raise Conflict(f"record {work_id} kept changing under {_CHANGE_TRIES} tries; the next round decides")


def change_breaker(store: Store, decide: Callable[[Breaker], Breaker | None]) -> Breaker | None:
    """As `change`, of the circuit breaker."""
    for _ in range(_CHANGE_TRIES):
        changed = decide(store.breaker())
        if changed is None:
            return None
        try:
            return store.save_breaker(changed)
        except Conflict:
            continue
    raise Conflict(f"the breaker kept changing under {_CHANGE_TRIES} tries; the next launch decides")


class DynamoStore:
    """The `work` table."""

    def __init__(self, client: "DynamoDBClient", table: str) -> None:
        self._client = client
        self._table = table
        self._out, self._in = TypeSerializer().serialize, TypeDeserializer().deserialize
        self._reads = Together(self._read_records, _READ_AT_ONCE)
        self._writes = Together(self._write_all, _WRITTEN_AT_ONCE)

    def get(self, work_id: str) -> Record | None:
        item = self._reads.ask(work_id)
        return Record.model_validate(self._plain(item)) if item else None

    def _read_records(self, work_ids: Sequence[str]) -> list[Any]:
        """Of each its item or None; who asked makes a record of it, so that one that cannot be read fails alone."""
        if len(work_ids) == 1:
            reply = self._client.get_item(
                TableName=self._table, Key=self._key(work_ids[0], "record"), ConsistentRead=True
            )
            return [reply.get("Item")]
        items = {item["pk"]["S"]: item for item in self._read(dict.fromkeys(work_ids), "record")}
        return [items.get(work_id) for work_id in work_ids]

    def save(self, record: Record) -> Record:
        written = record.model_copy(update={"revision": record.revision + 1})
        expected = {"revision": record.revision} if record.revision else {}
        self._writes.ask(self._write(_record_item(written), _RECORD_NAMES, expected))
        return written

    def get_leases(self, work_ids: Iterable[str]) -> dict[str, Lease]:
        ids, leases = list(work_ids), {}
        for start in range(0, len(ids), _READ_AT_ONCE):
            for item in self._read(ids[start : start + _READ_AT_ONCE], "lease"):
                lease = Lease.model_validate(self._plain(item))
                leases[lease.work_id] = lease
        return leases

    def _read(self, work_ids: Iterable[str], sk: str) -> list[Any]:
        """At most `_READ_AT_ONCE` items, none asked for twice, read consistently."""
        items, keys = list[Any](), [self._key(work_id, sk) for work_id in work_ids]
        while keys:
            reply = self._client.batch_get_item(RequestItems={self._table: {"Keys": keys, "ConsistentRead": True}})
            items += reply["Responses"].get(self._table, [])
            unread = reply.get("UnprocessedKeys", {}).get(self._table)
            keys = list(unread["Keys"]) if unread else []
        return items

    def save_lease(self, lease: Lease, replaces: Lease | None) -> None:
        item = {"pk": lease.work_id, "sk": "lease", **lease.model_dump(exclude_none=True)}
        expected = {"turn": replaces.turn, "value": replaces.value} if replaces else {}
        self._writes.ask(self._write(item, _LEASE_NAMES, expected, over_older=not replaces))

    def live(self, shard: str) -> list[LiveEntry]:
        pages = self._client.get_paginator("query").paginate(
            TableName=self._table,
            IndexName=LIVE_INDEX,
            KeyConditionExpression="#shard = :shard",  # a reserved word
            ExpressionAttributeNames={"#shard": "shard"},
            ExpressionAttributeValues={":shard": {"S": shard}},
        )
        return [LiveEntry.model_validate(self._plain(item)) for page in pages for item in page["Items"]]

    def records(self) -> Iterator[Record]:
        pages = self._client.get_paginator("scan").paginate(
            TableName=self._table,
            FilterExpression="sk = :record",
            ExpressionAttributeValues={":record": {"S": "record"}},
        )
        return (Record.model_validate(self._plain(item)) for page in pages for item in page["Items"])

    def loop_generation(self, shard: str) -> int:
        reply = self._client.get_item(
            TableName=self._table, Key=self._key(f"loop#{shard}", "loop"), ConsistentRead=True
        )
        return int(self._plain(reply["Item"])["generation"]) if "Item" in reply else 0

    def raise_loop_generation(self, shard: str, current: int) -> int:
        item = {"pk": f"loop#{shard}", "sk": "loop", "generation": current + 1}
        self._put(item, "attribute_not_exists(pk) OR generation = :current", _values(self._out, current=current))
        return current + 1

    def marks(self) -> dict[str, int]:
        reply = self._client.get_item(TableName=self._table, Key=self._key("janitor", "marks"), ConsistentRead=True)
        marks = self._plain(reply["Item"])["seen"] if "Item" in reply else {}
        return {what: int(at) for what, at in marks.items()}

    def save_marks(self, marks: dict[str, int]) -> None:
        item = {"pk": "janitor", "sk": "marks", "seen": marks}
        self._client.put_item(TableName=self._table, Item={name: self._out(value) for name, value in item.items()})

    def breaker(self) -> Breaker:
        reply = self._client.get_item(TableName=self._table, Key=self._key("breaker", "breaker"), ConsistentRead=True)
        return Breaker.model_validate(self._plain(reply["Item"])) if "Item" in reply else Breaker()

    def save_breaker(self, breaker: Breaker) -> Breaker:
        written = breaker.model_copy(update={"revision": breaker.revision + 1})
        item = {"pk": "breaker", "sk": "breaker", **written.model_dump(exclude_none=True)}
        condition = "revision = :revision" if breaker.revision else "attribute_not_exists(pk)"
        self._put(item, condition, _values(self._out, revision=breaker.revision) if breaker.revision else {})
        return written

    def _put(self, item: dict[str, Any], condition: str, extra: dict[str, Any]) -> None:
        self._put_typed({name: self._out(value) for name, value in item.items()}, condition, extra)

    def _put_typed(self, item: dict[str, Any], condition: str, extra: dict[str, Any]) -> None:
        try:
            self._client.put_item(TableName=self._table, Item=item, ConditionExpression=condition, **extra)
        except ClientError as error:
            if error.response["Error"]["Code"] == "ConditionalCheckFailedException":
                raise Conflict(f"{item['pk']['S']} was written by another actor") from None
            raise

    def _write(
        self, item: dict[str, Any], names: Iterable[str], expected: dict[str, Any], *, over_older: bool = False
    ) -> "_Write":
        return _Write(
            {name: self._out(value) for name, value in item.items()},
            [name for name in names if name not in item],
            {name: self._out(value) for name, value in expected.items()},
            over_older,
        )

    def _write_all(self, writes: Sequence["_Write"]) -> list[Exception | None]:
        """Several go in one call, each on its own condition; what that call does not settle is put alone."""
        answers = self._execute(writes) if len(writes) > 1 else [_Unsettled()]
        return [
            self._put_alone(write) if isinstance(answer, _Unsettled) else answer
            for write, answer in zip(writes, answers, strict=True)
        ]

    def _execute(self, writes: Sequence["_Write"]) -> "Sequence[Conflict | _Unsettled | None]":
        """For each write None if it is written, or why not."""
        try:
            reply = self._client.batch_execute_statement(Statements=[write.statement(self._table) for write in writes])
        except ClientError as error:
            self._tell_open(error.response["Error"]["Code"], len(writes))  # its message could quote a value
            return [_Unsettled()] * len(writes)
        codes = [answer.get("Error", {}).get("Code", "") for answer in reply["Responses"]]
        results = [write.result(code) for write, code in zip(writes, codes, strict=True)]
        unusual = [
            code
            for code, result in zip(codes, results, strict=True)
            if isinstance(result, _Unsettled) and code != "DuplicateItem"
        ]
        if unusual:
            self._tell_open(", ".join(sorted(set(unusual))), len(unusual))
        return results

    @staticmethod
    def _tell_open(error: str, count: int) -> None:
        log.warning("writes that a batch left open are put alone", error=error, count=count)

    def _put_alone(self, write: "_Write") -> Exception | None:
        try:
            self._put_typed(write.item, *write.condition())
        except (Conflict, ClientError) as error:
            return error
        return None

    def _plain(self, item: Any) -> dict[str, Any]:
        return {name: self._in(value) for name, value in item.items()}

    @staticmethod
    def _key(pk: str, sk: str) -> dict[str, Any]:
        return {"pk": {"S": pk}, "sk": {"S": sk}}


@dataclass(frozen=True)
class _Write:
    """An item written whole, if it does not exist yet, or if some of its attributes are as `expected`. All typed."""

    item: dict[str, Any]
    absent: list[str]  # attributes that it might have had before
    expected: dict[str, Any]
    over_older: bool = False  # without `expected`: also over an item of an earlier turn

    def condition(self) -> tuple[str, dict[str, Any]]:
        """As PutItem takes it."""
        if not self.expected:
            older = {"ExpressionAttributeValues": {":turn": self.item["turn"]}} if self.over_older else {}
            return "attribute_not_exists(pk)" + (" OR turn < :turn" if older else ""), older
        return " AND ".join(f"#{name} = :{name}" for name in self.expected), {
            "ExpressionAttributeNames": {f"#{name}": name for name in self.expected},
            "ExpressionAttributeValues": {f":{name}": value for name, value in self.expected.items()},
        }

    def statement(self, table: str) -> "BatchStatementRequestTypeDef":
        """As PartiQL: several go in one call, each on its own condition."""
        if not self.expected:
            fields = ", ".join(f"'{name}': ?" for name in self.item)
            return {"Statement": f'INSERT INTO "{table}" VALUE {{{fields}}}', "Parameters": [*self.item.values()]}
        changed = [name for name in self.item if name not in ("pk", "sk")]
        steps = [*(f'SET "{name}" = ?' for name in changed), *(f'REMOVE "{name}"' for name in self.absent)]
        where = " AND ".join(f'"{name}" = ?' for name in ("pk", "sk", *self.expected))
        values = [*(self.item[name] for name in (*changed, "pk", "sk")), *self.expected.values()]
        return {"Statement": f'UPDATE "{table}" {" ".join(steps)} WHERE {where}', "Parameters": values}

    def result(self, code: str) -> "Conflict | _Unsettled | None":
        """Of its statement, by the error code in a batch's reply."""
        if not code:
            return None
        lost = code == "ConditionalCheckFailed" or (code == "DuplicateItem" and not self.over_older)
        return Conflict(f"{self.item['pk']['S']} was written by another actor") if lost else _Unsettled()


def _values(out: Callable[[Any], Any], **values: Any) -> dict[str, Any]:
    return {"ExpressionAttributeValues": {f":{name}": out(value) for name, value in values.items()}}


def _record_item(record: Record) -> dict[str, Any]:
    item = {"pk": record.work_id, "sk": "record", **_storable(record.model_dump(exclude_none=True))}
    if record.secret is not None:  # the only place where a work secret is revealed: to be stored, encrypted
        item["secret"] = record.secret.get_secret_value()
    return item


def _storable(value: Any) -> Any:
    """Tuples as lists, enums as their words: what DynamoDB's serializer takes."""
    if isinstance(value, dict):
        return {name: _storable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(part) for part in value]
    return str(value) if isinstance(value, str) and not isinstance(value, SecretStr) else value


class MemoryStore:
    """The same promises in memory, for tests and the simulation."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self._leases: dict[str, Lease] = {}
        self._generations: dict[str, int] = {}
        self._marks: dict[str, int] = {}
        self._breaker = Breaker()
        self._lock = threading.Lock()

    def get(self, work_id: str) -> Record | None:
        return self._records.get(work_id)

    def save(self, record: Record) -> Record:
        with self._lock:
            stored = self._records.get(record.work_id)
            if (stored.revision if stored else 0) != record.revision:
                raise Conflict(f"{record.work_id} was written by another actor")
            written = record.model_copy(update={"revision": record.revision + 1})
            self._records[record.work_id] = written
            return written

    def get_leases(self, work_ids: Iterable[str]) -> dict[str, Lease]:
        return {work_id: self._leases[work_id] for work_id in work_ids if work_id in self._leases}

    def save_lease(self, lease: Lease, replaces: Lease | None) -> None:
        with self._lock:
            stored = self._leases.get(lease.work_id)
            if replaces is None:
                clash = stored is not None and stored.turn >= lease.turn
            else:
                clash = stored is None or (stored.turn, stored.value) != (replaces.turn, replaces.value)
            if clash:
                raise Conflict(f"the lease of {lease.work_id} was written by another actor")
            self._leases[lease.work_id] = lease

    def live(self, shard: str) -> list[LiveEntry]:
        return [
            LiveEntry(work_id=r.work_id, phase=r.phase, turn=r.turn, attempt=r.attempt)
            for r in sorted(self._records.values(), key=lambda r: r.work_id)
            if r.shard == shard
        ]

    def records(self) -> Iterator[Record]:
        return iter(list(self._records.values()))

    def loop_generation(self, shard: str) -> int:
        return self._generations.get(shard, 0)

    def raise_loop_generation(self, shard: str, current: int) -> int:
        with self._lock:
            if self._generations.get(shard, 0) != current:
                raise Conflict(f"the generation of loop {shard} was raised by another actor")
            self._generations[shard] = current + 1
            return current + 1

    def marks(self) -> dict[str, int]:
        return dict(self._marks)

    def save_marks(self, marks: dict[str, int]) -> None:
        self._marks = dict(marks)

    def breaker(self) -> Breaker:
        return self._breaker

    def save_breaker(self, breaker: Breaker) -> Breaker:
        with self._lock:
            if self._breaker.revision != breaker.revision:
                raise Conflict("the breaker was written by another actor")
            self._breaker = breaker.model_copy(update={"revision": breaker.revision + 1})
            return self._breaker
