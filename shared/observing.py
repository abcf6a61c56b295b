"""What ECS says of a sandbox's task goes into its record (DESIGN §4); events may repeat, come late or out of order."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from shared import breaker, lifecycle
from shared.config import Config
from shared.diagnose import Diagnosis, Kind, diagnose
from shared.launch_queue import LaunchQueue
from shared.log import log, log_fields
from shared.metrics import Metric, emit
from shared.record import Phase, Record
from shared.sandboxes import charged_seconds, exit_code_of, spent_on
from shared.store import Store, change

_COUNTED = {  # the others were wanted
    Kind.CRASH: Metric.CRASHES,
    Kind.INTERRUPTED: Metric.INTERRUPTIONS,
    Kind.LAUNCH_CAPACITY: Metric.STARTS_WITHOUT_ROOM,
    Kind.LAUNCH_PERMANENT: Metric.STARTS_REFUSED,
    Kind.UNKNOWN: Metric.UNKNOWN_ENDS,
}
_Number = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _Container(BaseModel):
    exitCode: _Number | None = None


class TaskState(BaseModel):
    """The parts of an event's `detail` that are stored or counted with; their names are ECS's."""

    startedBy: str | None = None
    taskArn: Annotated[str, Field(max_length=2048)]
    lastStatus: str
    version: _Number | None = None
    containers: list[_Container] | None = None


@dataclass
class Observer:
    config: Config
    store: Store
    queue: LaunchQueue
    wake_stopper: Callable[[str], None]  # by work id; the loop's next round does it anyway
    now: Callable[[], int]

    def observe(self, detail: dict[str, Any]) -> None:
        """One `detail` of an "ECS Task State Change" event; tasks that are not ours are ignored."""
        try:
            state = TaskState.model_validate(detail)
        except ValidationError as error:
            # Lambda's retries would not mend it; the turn's deadlines hold without it, and the stopper asks ECS itself
            wrong = ", ".join(".".join(map(str, part["loc"])) for part in error.errors())
            log.error("malformed task state ignored", reason=f"wrong: {wrong}")
            return
        name = lifecycle.parse_started_by(state.startedBy or "")
        if name is None:
            return
        work_id, turn, attempt = name
        arn, status, version = state.taskArn, state.lastStatus, state.version or 0
        diagnosis, exit_code = diagnose(detail), exit_code_of(detail)
        refused = status == "STOPPED" and diagnosis.kind is Kind.LAUNCH_PERMANENT
        before: Record | None = None

        def decide(record: Record) -> Record | None:
            nonlocal before
            before = record.model_copy(update={"task_arn": arn})
            if not lifecycle.is_current(record, turn, attempt) or version <= record.event_version:
                return None
            if status == "RUNNING" or (status == "STOPPED" and exit_code is not None and not refused):
                breaker.ran(self.store, record)
            if status == "RUNNING":
                return lifecycle.after_running(record, arn, version, self.now())
            if status == "STOPPED":
                return lifecycle.after_container_stopped(
                    before,
                    diagnosis,
                    exit_code,
                    version,
                    now=self.now(),
                    max_attempts=self.config.max_attempts,
                    hold=lifecycle.never_ran(record, exit_code)
                    and breaker.keeps(self.store, self.config, record, self.now(), refused=refused),
                    spent=spent_on(detail),
                )
            return None

        changed = change(self.store, work_id, decide)
        if changed is None or before is None:
            return
        if status == "RUNNING":
            took = lifecycle.launch_seconds(changed)
            emit(Metric.LAUNCH_LATENCY, took or 0)
            log.info("sandbox runs", **log_fields(changed), launch_seconds=took)
        else:
            report_death(before, changed, diagnosis, detail)
        if refused:
            breaker.failed(self.store, changed, f"{diagnosis.summary}. {diagnosis.what_to_do}", self.now())
        if status == "STOPPED" and lifecycle.ended_too_soon(changed, self.now()):
            emit(Metric.SHORT_SANDBOXES)
        if changed.phase is Phase.HELD:
            self.queue.send(changed)
        elif changed.phase is Phase.STOPPING and changed.dead:
            self.wake_stopper(work_id)


def report_death(before: Record, after: Record, diagnosis: Diagnosis, task: Mapping[str, Any]) -> None:
    """Log and count the end of the attempt of `before`, and what follows; observer and stopper learn of it."""
    emit(Metric.SANDBOX_SECONDS, charged_seconds(task) or 0)
    if diagnosis.kind in _COUNTED:
        emit(_COUNTED[diagnosis.kind])
    named = log_fields(before) | {"phase": after.phase}
    log.info(
        "container dead",
        **named,
        exit_code=after.exit_code,
        diagnosis=diagnosis.kind,
        reason=diagnosis.summary,
        error=diagnosis.detail,
        what_to_do=diagnosis.what_to_do,
    )
    if after.phase is Phase.HELD:
        emit(Metric.RELAUNCHES)
        log.warning("relaunching", **log_fields(after), reason=diagnosis.summary)
