"""The far sides, simulated: the Work API over the emulator's state machine, DynamoDB, ECS, SQS, Step Functions, Lambda.

Every call of the code under test goes through `Outside.call`, where the process may die or the reply be lost.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml
from botocore.exceptions import ClientError, ReadTimeoutError

from local.work_api.state import DEFAULT_RECLAIM_MS, Item, Refusal, WorkQueue
from shared.record import Breaker, Lease, LiveEntry, Record
from shared.store import Conflict, MemoryStore
from tests.simulation.machine import Died, Future, Machine, Process

T = TypeVar("T")
LOOP = Path(__file__).resolve().parents[2] / "statemachine" / "lease_loop.asl.yaml"
ROUNDS_PER_EXECUTION = 40  # instead of the definition's 850: hand-overs happen in every longer run


class Crashed(Exception):
    """What an invoker is told of a function that died or timed out."""


def client_error(code: str, message: str = "", **members: Any) -> ClientError:
    reply: Any = {"Error": {"Code": code, "Message": message or code}, **members}
    return ClientError(reply, "Operation")


def lost_reply() -> Exception:
    return ReadTimeoutError(endpoint_url="simulated")


@dataclass
class Faults:
    """How often an outside call goes wrong, and until when."""

    rate: float
    until: int
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    wanted: dict[str, int] = field(default_factory=dict)  # what a named sequence makes happen, and how often

    def pick(self, machine: Machine, kinds: list[str]) -> str | None:
        if machine.now >= self.until or machine.rng.random() >= self.rate:
            return None
        return machine.rng.choice(kinds)

    def happens(self, machine: Machine, chance: float, what: str) -> bool:
        """Whether something that is not bound to one call goes wrong now."""
        if self.wanted.get(what):
            self.wanted[what] -= 1
            self.counts[what] += 1
            return True
        if not self.rate or machine.now >= self.until or machine.rng.random() >= chance:
            return False
        self.counts[what] += 1
        return True


@dataclass
class Outside:
    """The one way out of a process."""

    machine: Machine
    faults: Faults
    script: Callable[[str, str], str | None] = lambda who, kind: None  # named sequences decide here
    after: Callable[[str, str], None] = lambda who, kind: None  # and act here: done, but not yet answered
    measure: Callable[[str], None] = lambda kind: None

    def call(
        self,
        kind: str,
        effect: Callable[[], T],
        *,
        lose: Callable[[], Exception] | None = lost_reply,
        refuse: Callable[[], Exception] | None = None,
        twice: bool = False,
    ) -> T:
        """Do `effect` as a network call does it: later, perhaps not at all, perhaps without telling."""
        machine = self.machine
        machine.steps += 1
        who = machine.process().name
        kinds = ["die before", "die after", "slow"]
        kinds += ["lose"] * (lose is not None) + ["refuse"] * (refuse is not None) + ["twice"] * twice
        fault = self.script(who, kind) or self.faults.pick(machine, kinds)
        if fault:
            self.faults.counts[fault] += 1
            machine.note(who, f"{kind}: {fault}")
        machine.sleep(machine.rng.randint(1_000, 9_000) if fault == "slow" else machine.rng.randint(2, 30))
        if fault == "die before":
            machine.die()
        if fault == "refuse" and refuse is not None:
            raise refuse()
        value = effect()
        self.measure(kind)
        if fault == "twice":
            effect()
        self.after(who, kind)
        machine.sleep(machine.rng.randint(2, 30))
        if fault == "die after":
            machine.die()
        if fault == "lose" and lose is not None:
            raise lose()
        return value


# --- the Work API ---------------------------------------------------------------------------------------------


class WatchedQueue(WorkQueue):
    """The emulator's queue, telling who holds what: a lease is one stay in the queue, from `started_at` on."""

    def __init__(self, environment_id: str, now: Callable[[], datetime]) -> None:
        super().__init__(environment_id, now)
        self.acked_by: dict[tuple[str, datetime], str] = {}
        self.held_by: dict[tuple[str, datetime], str] = {}
        self.lapsed: Callable[[Item, str | None], None] = lambda item, holder: None
        self.settle_every = timedelta()  # with thousands of items, not at every call
        self._settled_at = datetime.min.replace(tzinfo=UTC)

    def holder(self, item: Item) -> str | None:
        """Who claimed this stay, else who acked it."""
        key = (item.id, item.started_at)
        return self.held_by.get(key) or self.acked_by.get(key)

    def _settle(self, only: Item | None = None, *, polled: bool = False) -> None:
        if self._now() - self._settled_at >= self.settle_every:
            self._settled_at = self._now()
            super()._settle(polled=polled)

    def _settle_item(self, item: Item) -> None:
        if item.state in ("queued", "stopped"):
            return  # no time changes these
        before, holder = item.started_at, self.held_by.get((item.id, item.started_at))
        super()._settle_item(item)
        if item.started_at != before:
            self.lapsed(item, holder)


@dataclass
class ApiTransport(httpx.BaseTransport):
    """Carries WorkApi's requests to the state machine; `who` is whose calls these are."""

    outside: Outside
    queue: WatchedQueue
    who: str
    keys: set[str]
    secret_of: Callable[[str], str]
    before_stop: Callable[[str, str], None]
    events_of: Callable[[str], list[dict[str, Any]]]
    metadata_of: Callable[[str], dict[str, str]]
    calls: list[tuple[int, str]] = field(default_factory=list)
    away_until: int = 0
    may_update: bool = False
    refused: int = 0  # updates

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        machine = self.outside.machine
        call, work_id = _route(request)
        self.calls.append((machine.now, call))
        if machine.now < self.away_until:
            machine.sleep(50)
            if machine.rng.random() < 0.5:
                raise httpx.ConnectError("the API is away")
            return httpx.Response(503, json={})
        if call == "stop":
            self.before_stop(self.who, work_id)
        return self.outside.call(
            f"api.{call}",
            lambda: self._answer(call, work_id, request),
            lose=lambda: httpx.ReadTimeout("no reply"),
            refuse=lambda: _Answered(self._refusal(call)),
            twice=call in ("ack", "poll"),
        )

    def _refusal(self, call: str) -> httpx.Response:
        statuses = {"ack": [409, 429, 500, 503], "heartbeat": [409, 412, 429, 500, 503]}
        status = self.outside.machine.rng.choice(statuses.get(call, [429, 500, 503]))
        headers = {"retry-after": "3"} if status == 429 else {}
        return httpx.Response(status, json={"type": "error", "error": {"message": "injected"}}, headers=headers)

    def _answer(self, call: str, work_id: str, request: httpx.Request) -> httpx.Response:
        credential = request.headers["authorization"].removeprefix("Bearer ")
        if credential not in self.keys and not (
            call in ("events", "session", "update") and credential == f"SECRET-{work_id}"
        ):
            return httpx.Response(401, json={"error": {"message": "unknown key"}})
        try:
            return httpx.Response(200, json=self._do(call, work_id, request))
        except Refusal as refusal:
            error = {"message": refusal.message, "details": refusal.details}
            return httpx.Response(refusal.status, json={"type": "error", "error": error})

    def _do(self, call: str, work_id: str, request: httpx.Request) -> Any:
        query = request.url.params
        match call:
            case "poll":
                item = self.queue.poll(DEFAULT_RECLAIM_MS, "simulated")
                return item.body(self.secret_of(item.id)) if item else None
            case "ack":
                item = self.queue.ack(work_id)
                self.queue.acked_by[item.id, item.started_at] = self.who
                return item.body()
            case "heartbeat":
                expected, ttl = query["expected_last_heartbeat"], query.get("desired_ttl_seconds")
                claims = self.queue.get(work_id).state == "starting"
                reply = self.queue.heartbeat(work_id, expected, int(ttl) if ttl else None)
                item = self.queue.get(work_id)
                if claims and item.state == "active":
                    self.queue.held_by[item.id, item.started_at] = self.who
                return reply
            case "stop":
                return self.queue.stop(work_id, force=bool(json.loads(request.content or b"{}").get("force"))).body()
            case "update":
                if not self.may_update:
                    self.refused += 1
                    raise Refusal(403, "not within the token's scope")
                return self.queue.update(work_id, json.loads(request.content)["metadata"]).body()
            case "list":
                return self.queue.list(int(query.get("limit", 20)), query.get("page"))
            case "stats":
                return self.queue.stats()
            case "session":
                return {"id": work_id, "metadata": self.metadata_of(work_id)}
            case "events":
                newest = self.events_of(work_id)[::-1]
                return {"data": newest[: int(query["limit"])], "next_page": None}
        raise AssertionError(call)


class _Answered(Exception):
    """Carries a refusal's reply out of Outside.call."""

    def __init__(self, reply: httpx.Response) -> None:
        super().__init__(reply.status_code)
        self.reply = reply


class AnsweringTransport(httpx.BaseTransport):
    """Turns an injected refusal into the reply that it is."""

    def __init__(self, inner: ApiTransport) -> None:
        self.inner = inner

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return self.inner.handle_request(request)
        except _Answered as answered:
            return answered.reply


def _route(request: httpx.Request) -> tuple[str, str]:
    if request.url.path.endswith("/events"):
        return "events", request.url.path.split("/")[-2]
    if "/sessions/" in request.url.path:
        return "session", request.url.path.split("/")[-1]
    parts = request.url.path.split("/work", 1)[1].strip("/").split("/")
    if parts[0] in ("poll", "stats"):
        return parts[0], ""
    alone = "update" if request.method == "POST" else "retrieve"
    return ("list", "") if parts == [""] else (parts[1] if len(parts) > 1 else alone, parts[0])


# --- DynamoDB -------------------------------------------------------------------------------------------------


class OutsideStore:
    """The in-memory twin behind calls. A lost reply to a write may come back as a conflict: botocore retried it."""

    def __init__(self, outside: Outside, inner: MemoryStore, watch: Callable[[Record | None, Record], None]) -> None:
        self._outside, self.inner, self._watch = outside, inner, watch
        self._before: list[LiveEntry] = []

    def get(self, work_id: str) -> Record | None:
        return self._outside.call("store.get", lambda: self.inner.get(work_id))

    def save(self, record: Record) -> Record:
        def saved() -> Record:
            before = self.inner.get(record.work_id)
            after = self.inner.save(record)
            self._watch(before, after)
            return after

        return self._write("store.save", saved)

    def get_leases(self, work_ids: Iterable[str]) -> dict[str, Lease]:
        ids = list(work_ids)
        return self._outside.call("store.get_leases", lambda: self.inner.get_leases(ids))

    def save_lease(self, lease: Lease, replaces: Lease | None) -> None:
        self._write("store.save_lease", lambda: self.inner.save_lease(lease, replaces))

    def live(self, shard: str) -> list[LiveEntry]:
        """Eventually consistent: now and then what the last reader saw."""
        stale = self._before
        self._before = self.inner.live(shard)
        if self._outside.faults.happens(self._outside.machine, 0.05, "stale index"):
            return self._outside.call("store.live", lambda: stale)
        return self._outside.call("store.live", lambda: self.inner.live(shard))

    def loop_generation(self, shard: str) -> int:
        return self._outside.call("store.loop", lambda: self.inner.loop_generation(shard))

    def raise_loop_generation(self, shard: str, current: int) -> int:
        return self._write("store.raise_loop", lambda: self.inner.raise_loop_generation(shard, current))

    def marks(self) -> dict[str, int]:
        return self._outside.call("store.marks", self.inner.marks)

    def save_marks(self, marks: dict[str, int]) -> None:
        self._outside.call("store.save_marks", lambda: self.inner.save_marks(marks))

    def breaker(self) -> Breaker:
        return self._outside.call("store.breaker", self.inner.breaker)

    def save_breaker(self, breaker: Breaker) -> Breaker:
        return self._write("store.save_breaker", lambda: self.inner.save_breaker(breaker))

    def _write(self, kind: str, effect: Callable[[], T]) -> T:
        retried = self._outside.machine.rng.random() < 0.5
        return self._outside.call(
            kind, effect, lose=(lambda: Conflict("written, as it seems")) if retried else lost_reply
        )


# --- Lambda and SQS -------------------------------------------------------------------------------------------


@dataclass
class Context:
    """What a handler is told of its invocation."""

    machine: Machine
    aws_request_id: str
    ends_at: int

    def get_remaining_time_in_millis(self) -> int:
        return self.ends_at - self.machine.now


@dataclass
class Lambda:
    """Invokes the real handlers, each invocation a process of its own."""

    machine: Machine
    handlers: dict[str, Callable[[Any, Any], Any]] = field(default_factory=dict)
    timeouts: dict[str, int] = field(default_factory=dict)
    count: int = 0
    running: set[Process] = field(default_factory=set)
    measure: Callable[[str, str, float], None] = lambda function, metric, value: None

    def start(self, function: str, event: Any, ended: Callable[[Any, Exception | None], None]) -> None:
        self.count += 1
        name, timeout_ms = f"{function}-{self.count}", self.timeouts[function]
        context = Context(self.machine, name, self.machine.now + timeout_ms)
        event = json.loads(json.dumps(event))
        began = self.machine.now
        self.measure(function, "Invocations", 1)

        def over(result: Any, error: BaseException | None) -> None:
            self.running.discard(process)
            self.measure(function, "Duration", self.machine.now - began)
            self.measure(function, "Errors", error is not None)
            if error is not None:
                self.machine.note(name, f"failed: {type(error).__name__} {error}")
            ended(result, Crashed("Runtime.ExitError") if isinstance(error, Died) else error)  # type: ignore[arg-type]

        process = self.machine.spawn(
            name, lambda: self.handlers[function](event, context), ended=over, timeout_ms=timeout_ms
        )
        self.running.add(process)

    def send(self, function: str, event: Any, retries: int = 2) -> None:
        """Asynchronously, retried after one and two minutes."""

        def ended(_: Any, error: Exception | None) -> None:
            if error is not None and retries:
                self.machine.later(60_000 * (3 - retries), lambda: self.send(function, event, retries - 1))

        self.start(function, event, ended)

    def call(self, function: str, event: Any) -> Any:
        """Synchronously, from a process. Raises what the function raised, or Crashed."""
        future = Future(self.machine)
        self.start(function, event, future.settle)
        return future.result()


@dataclass
class LaunchMessages:
    """The launch queue and its event source: at least once, a batch at a time, two launchers at most."""

    machine: Machine
    outside: Outside
    functions: Lambda
    visibility_ms: int = 360_000
    messages: dict[str, dict[str, Any]] = field(default_factory=dict)
    dead: list[str] = field(default_factory=list)
    measure: Callable[[int], None] = lambda letters: None
    busy: int = 0
    count: int = 0

    def send_message(self, QueueUrl: str, MessageBody: str, DelaySeconds: int = 0) -> None:
        def put() -> None:
            if QueueUrl == "dead":
                self.dead.append(MessageBody)
                self.measure(len(self.dead))
                return
            self.count += 1
            visible_from = self.machine.now + DelaySeconds * 1000
            self.messages[f"m{self.count}"] = {"body": MessageBody, "from": visible_from, "received": 0}
            self.machine.later(DelaySeconds * 1000 + self.machine.rng.randint(5, 400), self._deliver)

        self.outside.call("sqs.send", put, twice=True)

    def change_message_visibility(self, QueueUrl: str, ReceiptHandle: str, VisibilityTimeout: int) -> None:
        def change() -> None:
            if ReceiptHandle in self.messages:
                self.messages[ReceiptHandle]["from"] = self.machine.now + VisibilityTimeout * 1000
                self.messages[ReceiptHandle]["changed"] = True

        self.outside.call("sqs.change_visibility", change)

    def _deliver(self) -> None:
        visible = [i for i, message in self.messages.items() if message["from"] <= self.machine.now]
        if not visible or self.busy >= 2:
            return
        self.busy += 1
        batch, records = visible[:10], []
        for i in batch:
            message = self.messages[i]
            message["received"] += 1
            message["from"], message["changed"] = self.machine.now + self.visibility_ms, False
            attributes = {"ApproximateReceiveCount": str(message["received"])}
            records.append({"messageId": i, "receiptHandle": i, "body": message["body"], "attributes": attributes})

        def ended(result: Any, error: Exception | None) -> None:
            self.busy -= 1
            failed = {one["itemIdentifier"] for one in result["batchItemFailures"]} if error is None else set(batch)
            for i in batch:
                message = self.messages[i]
                twice = self.outside.faults.happens(self.machine, 0.02, "message twice")
                if i not in failed and not twice:
                    del self.messages[i]
                elif twice or (error is None and not message["changed"]):
                    message["from"] = self.machine.now  # a reported failure is visible at once
                if i in self.messages:
                    self.machine.later(max(1, message["from"] - self.machine.now), self._deliver)
            self._deliver()

        self.functions.start("launcher", {"Records": records}, ended)


# --- Step Functions: the real definition, interpreted in virtual time -----------------------------------------


class AslError(Exception):
    """A failed state, by its error's name."""


@dataclass
class Loops:
    """Executions of the lease loop."""

    machine: Machine
    outside: Outside
    functions: Lambda
    executions: dict[str, str] = field(default_factory=dict)  # name: status
    definition: dict[str, Any] = field(default_factory=dict)
    waits: list[int] = field(default_factory=list)
    measure: Callable[[bool], None] = lambda failed: None

    def __post_init__(self) -> None:
        text = LOOP.read_text().replace(": 850", f": {ROUNDS_PER_EXECUTION}")
        for name, value in {"KeeperArn": "keeper", "StopperArn": "stopper", "LoopArn": "loop"}.items():
            text = text.replace("${" + name + "}", value)
        self.definition = yaml.safe_load(text)

    def start_execution(self, stateMachineArn: str, name: str, input: str) -> None:
        self.outside.call("sfn.start", lambda: self._start(name, json.loads(input)))

    def describe_execution(self, executionArn: str) -> dict[str, str]:
        def described() -> dict[str, str]:
            status = self.executions.get(executionArn.rsplit(":", 1)[-1])
            if status is None:
                raise client_error("ExecutionDoesNotExist")
            return {"status": status}

        return self.outside.call("sfn.describe", described)

    def start_twin(self, shard: str) -> None:
        """A second loop beside whatever runs, as two starters that raced each other may leave it."""
        self._start("twin", {"shard": shard, "generation": 1_000_000, "round": 0, "empty_rounds": 0})

    def _start(self, name: str, state: dict[str, Any]) -> None:
        if self.executions.get(name) == "RUNNING":
            return  # same name and input: idempotent
        if name in self.executions:
            raise client_error("ExecutionAlreadyExists")
        self.executions[name] = "RUNNING"

        def ended(_: Any, error: BaseException | None) -> None:
            self.executions[name] = "FAILED" if error else "SUCCEEDED"
            self.measure(error is not None)
            self.machine.note(name, f"loop ended: {self.executions[name]} {error or ''}")

        self.machine.spawn(name, lambda: self._interpret(state), ended=ended)

    def _interpret(self, data: Any) -> None:
        at = self.definition["StartAt"]
        while True:
            state = self.definition["States"][at]
            match state["Type"]:
                case "Succeed":
                    return
                case "Task":
                    data, at = self._task(state, data)
                case "Choice":
                    chosen = (choice["Next"] for choice in state["Choices"] if _holds(choice, data))
                    at = next(chosen, state["Default"])
                case "Wait":
                    until = _epoch_ms(data["wait_until"]) if "TimestampPath" in state else None
                    pause = until - self.machine.now if until is not None else state["Seconds"] * 1000
                    self.machine.sleep(max(0, pause))
                    at = state["Next"]
                case "Pass":
                    data, at = _filled(state["Parameters"], data), state["Next"]
                case other:
                    raise AslError(f"unknown state type {other}")

    def _task(self, state: dict[str, Any], data: Any) -> tuple[Any, str]:
        tries: dict[int, int] = defaultdict(int)
        while True:
            try:
                result = self._do(state["Resource"], _filled(state["Parameters"], data))
            except AslError as error:
                retry = next((i for i, r in enumerate(state.get("Retry", ())) if _matches(r, error)), None)
                if retry is not None and tries[retry] < state["Retry"][retry]["MaxAttempts"]:
                    rule = state["Retry"][retry]
                    self.machine.sleep(rule["IntervalSeconds"] * 1000 * rule["BackoffRate"] ** tries[retry])
                    tries[retry] += 1
                    continue
                catch = next((c for c in state.get("Catch", ()) if _matches(c, error)), None)
                if catch is None:
                    raise
                return _placed(catch.get("ResultPath", "$"), data, {"Error": str(error)}), catch["Next"]
            return _placed(state.get("ResultPath", "$"), data, result), state["Next"]

    def _do(self, resource: str, parameters: dict[str, Any]) -> Any:
        if resource == "arn:aws:states:::lambda:invoke":
            assert parameters["InvocationType"] == "Event"
            self.functions.send(parameters["FunctionName"], parameters["Payload"])
            return {"StatusCode": 202}
        if resource == "arn:aws:states:::states:startExecution":
            try:
                self._start(parameters["Name"], parameters["Input"])
            except ClientError:
                raise AslError("StepFunctions.ExecutionAlreadyExistsException") from None
            return {}
        try:
            return self.functions.call(resource, parameters)
        except Exception as error:  # noqa: BLE001  any error of a function is its state's
            raise AslError(type(error).__name__) from None


def _matches(rule: dict[str, Any], error: AslError) -> bool:
    return str(error) in rule["ErrorEquals"] or "States.ALL" in rule["ErrorEquals"]


def _placed(path: str | None, data: Any, result: Any) -> Any:
    if path is None:
        return data
    return result if path == "$" else {**data, path.removeprefix("$."): result}


def _holds(choice: dict[str, Any], data: Any) -> bool:
    value = data[choice["Variable"].removeprefix("$.")]
    if "NumericGreaterThan" in choice:
        return bool(value > choice["NumericGreaterThan"])
    return bool(value >= choice["NumericGreaterThanEquals"])


def _filled(template: Any, data: Any) -> Any:
    if not isinstance(template, dict):
        return template
    return {
        name.removesuffix(".$"): _value(value, data) if name.endswith(".$") else _filled(value, data)
        for name, value in template.items()
    }


def _value(expression: str, data: Any) -> Any:
    if expression.startswith("$."):
        return data[expression[2:]]
    if added := re.fullmatch(r"States\.MathAdd\((\$\.\w+), (\d+)\)", expression):
        return data[added[1][2:]] + int(added[2])
    if formatted := re.fullmatch(r"States\.Format\('([^']*)', (.+)\)", expression):
        parts = re.findall(r"States\.MathAdd\([^)]*\)|\$\.\w+", formatted[2])
        return formatted[1].format(*(_value(part, data) for part in parts))
    raise AslError(f"cannot evaluate {expression}")


def _epoch_ms(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp() * 1000)


def server_clock(machine: Machine, skew_ms: int) -> Callable[[], datetime]:
    """The API's own clock, a little off ours."""
    return lambda: datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=machine.now + skew_ms)
