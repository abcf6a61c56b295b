"""Makes wanted stops true: the sandbox dead first, then the item, then the record (DESIGN §7). Each step may repeat."""

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from botocore.exceptions import BotoCoreError, ClientError

from shared import breaker, lifecycle
from shared.config import Config
from shared.diagnose import Kind, diagnose
from shared.keeping import Keeper
from shared.launch_queue import LaunchQueue
from shared.log import log, log_fields
from shared.metrics import Metric, emit
from shared.observing import report_death
from shared.record import Outcome, Phase, Record
from shared.sandboxes import DESCRIBED_AT_ONCE, Sandboxes, exit_code_of, spent_on
from shared.store import Conflict, Store
from shared.work_api import Gone, WorkApi, WorkApiError

ROUND_BUDGET_MS = 10_000
_AT_ONCE = 8
_AFTER_ECHO_MS = 5_000
_IN_FLIGHT_MS = 15_000  # the echo, the stop and its time-out
_COUNTED = {
    Outcome.LOST: Metric.LEASES_LOST,
    Outcome.LAUNCH_FAILED: Metric.LAUNCHES_FAILED,
    Outcome.UNSERVED: Metric.UNSERVED,
    Outcome.FAILED: Metric.TURNS_FAILED,
    Outcome.TIMED_OUT: Metric.TURNS_TIMED_OUT,
    Outcome.COMPLETED: Metric.TURNS_COMPLETED,
}
# Their session waits for somebody
_FOR_A_PERSON = (Outcome.LAUNCH_FAILED, Outcome.FAILED, Outcome.TIMED_OUT, Outcome.UNSERVED)
_NEWEST = 1 << 31  # a description is the newest word: no event is newer

_Result = TypeVar("_Result")
_Tasks = dict[str, dict[str, Any] | None]
"""What ECS says in this round, by arn; None: it knows no such task. An arn is absent if ECS could not be asked."""


@dataclass
class Stopper:
    config: Config
    api: WorkApi
    keeper: Keeper
    store: Store
    sandboxes: Sandboxes
    queue: LaunchQueue
    now: Callable[[], int]

    def round(self, shard: str) -> int:
        """Work at most 10 s on what is due; the next round goes on. Returns how many turns were closed."""
        phases = (Phase.STOPPING, Phase.HELD, Phase.LAUNCHING, Phase.RUNNING)
        return self.settle([e.work_id for e in self.store.live(shard) if e.phase in phases])

    def settle(self, work_ids: list[str]) -> int:
        """As `round`, for these items. ECS is asked of a hundred tasks at once: 500 drains must not be throttled.

        Two pools, so that an API that does not answer keeps no sandbox from being stopped, nor ECS an item.
        """
        until = self.now() + ROUND_BUDGET_MS

        def settle(record: Record, tasks: _Tasks) -> bool:
            return self.now() < until and bool(self._safely(record.work_id, lambda: self._settle(record, tasks)))

        def read(work_id: str) -> Record | None:
            return self._safely(work_id, lambda: self._read(work_id)) if self.now() < until else None

        with ThreadPoolExecutor(_AT_ONCE) as pool, ThreadPoolExecutor(_AT_ONCE) as looking:
            records = [record for record in pool.map(read, work_ids) if record]
            now = self.now()
            to_look_at = {r.task_arn: r for r in records if r.task_arn and lifecycle.wants_a_look(r, now)}
            settled = [pool.submit(settle, r, {}) for r in records if r.task_arn not in to_look_at]
            arns, tasks = list(to_look_at), _Tasks()
            batches = [arns[start : start + DESCRIBED_AT_ONCE] for start in range(0, len(arns), DESCRIBED_AT_ONCE)]
            for described in looking.map(self._describe, batches):
                tasks |= described
            settled += [looking.submit(settle, record, tasks) for record in to_look_at.values()]
            return sum(one.result() for one in settled)

    def _safely(self, work_id: str, step: Callable[[], _Result]) -> _Result | None:
        """One item's fault holds up no other; the next round repeats it."""
        try:
            return step()
        except Conflict as conflict:
            log.info("left to the next round", work_id=work_id, reason=str(conflict))
        except WorkApiError as error:
            log.warning("stopping failed; the next round repeats it", work_id=work_id, error=error.message)
        except Exception:  # noqa: BLE001  one fault holds up no other; unknown errors retry (FIELD_NOTES 5)
            log.exception("stopping failed in a way not known here; the next round repeats it", work_id=work_id)
        return None

    def _read(self, work_id: str) -> Record | None:
        record, now = self.store.get(work_id), self.now()
        if record and (wish := lifecycle.overdue(record, self.config, now)):
            record = self.store.save(lifecycle.want_stop(record, wish, now))
            log.warning("stop wanted", **log_fields(record), reason=wish.reason)
        return record

    def _describe(self, arns: Sequence[str]) -> _Tasks:
        """What ECS says of these; nothing if it fails. One arn that it refuses must not spoil the others' answer."""
        try:
            found = self.sandboxes.describe(arns)
        except (BotoCoreError, ClientError) as error:
            if len(arns) > 1 and _is_malformed(error):
                middle = len(arns) // 2
                return self._describe(arns[:middle]) | self._describe(arns[middle:])
            log.warning("tasks not described; the next round asks again", count=len(arns), error=str(error))
            return {}
        return {arn: found.get(arn) for arn in arns}

    def _settle(self, record: Record, tasks: _Tasks) -> bool:
        now = self.now()
        if lifecycle.start_is_overdue(record, now) and self._stop_stalled_launch(record, tasks):
            return False
        if record.phase is Phase.RUNNING and record.restart_reason and record.task_arn:
            self._look_or_stop(record, record.task_arn, record.restart_reason, tasks)
            return False
        if wish := lifecycle.launch_overdue(record, self.config, now):
            if breaker.keeps(self.store, self.config, record, now, refused=False):
                # Counts anew, so that the breaker's closing does not end at once all that waited behind its probe
                self.store.save(record.model_copy(update={"sandbox_wanted_since": now}))
                return False
            record = self.store.save(lifecycle.give_up_launch(record, wish, now))
            log.error("launch failed for good", **log_fields(record), reason=wish.reason)
        if record.phase is not Phase.STOPPING:
            return False
        if lifecycle.posts_now(record):
            record = self._post(record) or self.store.get(record.work_id) or record
            if record.phase is not Phase.STOPPING:  # its container died meanwhile, and the next attempt goes on
                return False
        if not record.dead:
            after = self._kill(record, tasks)
            if after is None or not after.dead:
                return False
            record = after
        return self._finish(record)

    def _stop_stalled_launch(self, record: Record, tasks: _Tasks) -> bool:
        """PENDING for too long (FIELD_NOTES 14): stopped, and relaunched once it is dead. False: nothing done."""
        arn = record.task_arn or self._found(record)
        if arn is not None:
            self._look_or_stop(record, arn, "not running before the start deadline", tasks)
            return True
        now = self.now()
        dead = lifecycle.may_be_taken_as_dead(record, now)
        if not dead or not breaker.keeps(self.store, self.config, record, now, refused=False):
            return False  # its message comes back, until the launch deadline
        held_back = self.store.save(lifecycle.held_back(record, now, "no task was started"))
        log.warning("relaunching", **log_fields(held_back), reason="no task was started")
        emit(Metric.RELAUNCHES)
        return True

    def _kill(self, record: Record, tasks: _Tasks) -> Record | None:
        """StopTask, then proof of death: STOPPED, or nothing found two rounds past `launch_until`."""
        if self.now() < (record.stop_task_from or 0):
            return None
        arn = record.task_arn or self._found(record)
        if arn is not None:
            return self._look_or_stop(record, arn, record.stop_reason or "stopped", tasks)
        if not lifecycle.may_be_taken_as_dead(record, self.now()):
            return None
        dead = self.store.save(record.noted(self.now(), "no task found: dead", dead=True))
        log.info("container dead", **log_fields(dead), reason="no task is found under its name")
        return dead

    def _look_or_stop(self, record: Record, arn: str, why: str, tasks: _Tasks) -> Record | None:
        if arn != record.task_arn:
            tasks = self._describe([arn])  # just found: its arn was never stored, which is rare
        if arn not in tasks:
            return None
        task = tasks[arn]
        if task is None:
            if not lifecycle.may_be_taken_as_dead(record, self.now()) or self._found(record):
                return None  # a fresh task may read MISSING
            task = {"lastStatus": "STOPPED", "stoppedReason": "the task is no longer known to ECS"}
        if task.get("lastStatus") != "STOPPED":
            if record.stop_task_sent_at is None or task.get("desiredStatus") != "STOPPED":
                self.sandboxes.stop(arn, why)
                noted = record.noted(self.now(), "StopTask sent", stop_task_sent_at=self.now(), task_arn=arn)
                noted = self.store.save(noted)
                log.info("StopTask sent", **log_fields(noted), reason=why)
                return noted
            return None
        diagnosis, exit_code = diagnose(task), exit_code_of(task)
        refused = diagnosis.kind is Kind.LAUNCH_PERMANENT
        if exit_code is not None and not refused:
            breaker.ran(self.store, record)
        after = lifecycle.after_container_stopped(
            record,
            diagnosis,
            exit_code,
            _NEWEST,
            now=self.now(),
            max_attempts=self.config.max_attempts,
            hold=lifecycle.never_ran(record, exit_code)
            and breaker.keeps(self.store, self.config, record, self.now(), refused=refused),
            spent=spent_on(task),
        )
        saved = self.store.save(after) if after else None
        if saved:
            report_death(record, saved, diagnosis, task)
        if saved and refused:
            breaker.failed(self.store, saved, f"{diagnosis.summary}. {diagnosis.what_to_do}", self.now())
        if saved and saved.phase is Phase.HELD:
            self.queue.send(saved)
        return saved

    def _found(self, record: Record) -> str | None:
        found = self.sandboxes.find(record.started_by) if record.started_by else []
        return found[0] if found else None

    def _finish(self, record: Record) -> bool:
        """The container is dead: post the stop if it is still ours to post, then close the turn."""
        if record.post_stop:
            after = self._post(record)
            if after is None:
                return False
            record = after
        closed = self.store.save(lifecycle.closed(record, self.now(), retention_seconds=self.config.retention_seconds))
        if closed.outcome in _COUNTED:
            emit(_COUNTED[closed.outcome])
        fields = log_fields(closed) | {"outcome": closed.outcome, "exit_code": closed.exit_code}
        if closed.outcome in _FOR_A_PERSON:
            log.error("turn ended", **fields, reason=closed.reason)
        else:
            log.info("turn ended", **fields, reason=closed.reason)
        return True

    def _post(self, record: Record) -> Record | None:
        """The newest record once nothing is left to post; None: the next round goes on.

        A stop names no lease, so it follows an echo of ours within 5 s, is sent once, and by one stopper alone: the
        record says that it is on its way before it is. The same mark spaces the tries while the API does not answer.
        """
        lease = self.store.get_leases([record.work_id]).get(record.work_id)
        if lease is None or lease.over or lease.turn != record.turn:
            return self._nothing_to_post(record)
        echoed_at = self.now()
        if echoed_at < (record.posting_until or 0):
            return None
        result = self.keeper.beat(lease)
        if result is None:  # 404: nothing to stop
            return self._nothing_to_post(record)
        self.store.save_lease(result.lease, lease)
        if result.lease.over:
            return self._nothing_to_post(record)
        if not result.accepted:
            self.store.save(record.model_copy(update={"posting_until": result.lease.due_at}))
            return None
        posting = self.store.save(record.noted(self.now(), "posting the stop", posting_until=echoed_at + _IN_FLIGHT_MS))
        if self.now() > echoed_at + _AFTER_ECHO_MS:
            return None
        with contextlib.suppress(Gone):
            self.api.stop(record.work_id, force=True)
        stopped = self.store.save(posting.noted(self.now(), "the item is stopped", post_stop=False))
        log.info("item stopped", **log_fields(stopped), reason=stopped.stop_reason)
        return stopped

    def _nothing_to_post(self, record: Record) -> Record:
        return self.store.save(record.model_copy(update={"post_stop": False}))


def _is_malformed(error: Exception) -> bool:
    """Whether ECS refuses the request itself; it tells a throttle by the same code (FIELD_NOTES 13)."""
    told = error.response["Error"] if isinstance(error, ClientError) else {}
    return told.get("Code") == "InvalidParameterException" and "rate exceeded" not in told.get("Message", "").lower()
