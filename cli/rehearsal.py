"""A janitor's round that changes nothing: the real Janitor between parts that note what they would do."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from cli.stack import Fleet
from shared import wiring
from shared.claiming import Claimer
from shared.config import Config
from shared.launch_queue import LaunchQueue
from shared.log import log
from shared.loop import LeaseLoop
from shared.observing import Observer
from shared.record import Record
from shared.sandboxes import Sandboxes
from shared.store import Store
from shared.stored_key import StoredKey
from shared.sweeping import Janitor
from shared.work_api import TryAgain, Work, WorkApi

_ROUND_MS = 200_000


@dataclass
class Plan:
    """What the round would do, and what it had to say."""

    steps: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def would(self, step: str) -> None:
        if step not in self.steps:
            self.steps.append(step)


def plan(fleet: Fleet) -> Plan:
    """Play a round on what is there now."""
    parts = fleet.config, fleet.store, fleet.api, fleet.key, wiring.sandboxes(fleet.config)
    return rehearse(*parts, loop_runs=lambda: loop_runs(fleet), now=wiring.now)


def rehearse(
    config: Config,
    real_store: Store,
    real_api: WorkApi,
    key: StoredKey,
    real_sandboxes: Sandboxes,
    *,
    loop_runs: Callable[[], bool],
    now: Callable[[], int],
) -> Plan:
    """As `plan`, of these parts; none of them is changed."""
    made = Plan()
    store: Any = _Store(real_store, made)
    api: Any = _Api(real_api, made)
    queue, loop, sandboxes = _Queue(made), _Loop(loop_runs, made), _Sandboxes(real_sandboxes, made)

    def wake(work_id: str) -> None:
        made.would(f"wake the stopper for {work_id}")

    ear = _Ear(made)
    log.addHandler(ear)
    try:
        claimer = Claimer(config, api, key, store, queue, loop, now, lambda _: None)
        observer = Observer(config, store, queue, wake, now)
        Janitor(config, api, store, sandboxes, claimer, observer, wake, now).sweep(now() + _ROUND_MS)
    finally:
        log.handlers.remove(ear)
    return made


class _Store:
    """Reads are the table's; writes are noted, and read back by this round alone."""

    def __init__(self, real: Store, made: Plan) -> None:
        self._real, self._made, self._written = real, made, dict[str, Record]()

    def get(self, work_id: str) -> Record | None:
        return self._written.get(work_id) or self._real.get(work_id)

    def save(self, record: Record) -> Record:
        before = self.get(record.work_id)
        new = record.timeline[len(before.timeline) if before else 0 :]
        for moment in new:
            self._made.would(f"{record.work_id}: {moment.event}")
        self._written[record.work_id] = record.model_copy(update={"revision": record.revision + 1})
        return self._written[record.work_id]

    def save_breaker(self, breaker: Any) -> Any:
        return breaker

    def save_marks(self, marks: dict[str, int]) -> None:
        """A rehearsal has seen nothing: the real round's second looks are its own."""

    def save_lease(self, *_: Any) -> None:
        """Only after a claim, which is not made here."""

    def __getattr__(self, name: str) -> Any:
        if name not in ("live", "get_leases", "marks", "breaker", "loop_generation"):
            raise AttributeError(name)
        return getattr(self._real, name)


class _Api:
    """Reads are the API's; ack, claim and stop are noted and not made."""

    def __init__(self, real: WorkApi, made: Plan) -> None:
        self._real, self._made = real, made

    def ack(self, work_id: str) -> NoReturn:
        self._not_made(f"ack {work_id}")

    def heartbeat(self, work_id: str, *_: Any, **__: Any) -> NoReturn:
        self._not_made(f"claim {work_id}")

    def stop(self, work_id: str, *, force: bool) -> Work | None:
        self._made.would(f"{'force-stop' if force else 'stop'} the item {work_id}")
        return None

    def _not_made(self, step: str) -> NoReturn:
        self._made.would(step)
        error = TryAgain(f"{step} is only rehearsed")
        error.maybe_done = False
        raise error

    def __getattr__(self, name: str) -> Any:
        if name not in ("list", "list_pages", "stats", "newest_events"):
            raise AttributeError(name)
        return getattr(self._real, name)


class _Queue(LaunchQueue):
    def __init__(self, made: Plan) -> None:
        self._made = made

    def send(self, record: Record, *, at_once: bool = False) -> None:  # noqa: ARG002  the queue's own form
        self._made.would(f"send the launch message of {record.work_id}, attempt {record.attempt}, again")


class _Loop(LeaseLoop):
    def __init__(self, runs: Callable[[], bool], made: Plan) -> None:
        self._is_on, self._made = runs, made

    def ensure(self, shard: str) -> None:  # noqa: ARG002  the loop's own form
        if not self._is_on():
            self._made.would("start the lease loop")


class _Sandboxes(Sandboxes):
    def __init__(self, real: Sandboxes, made: Plan) -> None:
        self._real, self._made = real, made
        self.describe, self.meant_to_run, self.find = real.describe, real.meant_to_run, real.find  # type: ignore[method-assign]

    def run(self, record: Record, ticket: str) -> str:
        raise NotImplementedError

    def stop(self, arn: str, reason: str) -> None:
        self._made.would(f"stop the sandbox {arn.rsplit('/', 1)[-1]}: {reason}")


class _Ear(logging.Handler):
    """The round's warnings and errors, without their fields."""

    def __init__(self, made: Plan) -> None:
        super().__init__(logging.WARNING)
        self._made = made

    def emit(self, record: logging.LogRecord) -> None:
        work_id = getattr(record, "work_id", None)
        if "only rehearsed" not in str(getattr(record, "error", "")):
            remark = f"{record.getMessage()}{f' ({work_id})' if work_id else ''}"
            self._made.remarks.append(remark)


def loop_runs(fleet: Fleet) -> bool:
    """Whether an execution of the lease loop is on."""
    reply = fleet.client("stepfunctions").list_executions(
        stateMachineArn=fleet.output("StateMachineArn"), statusFilter="RUNNING", maxResults=1
    )
    return bool(reply["executions"])
