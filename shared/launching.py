"""Starts one sandbox for a held turn (DESIGN §6). Idempotent by the record's phase and RunTask's token."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from shared import breaker, lifecycle
from shared.config import Config
from shared.diagnose import LaunchProblem, advice
from shared.lifecycle import StopWish, WorkId
from shared.links import links
from shared.log import log, log_fields
from shared.metrics import Metric, emit
from shared.record import Outcome, Phase, Record
from shared.sandboxes import LaunchFailed, Sandboxes
from shared.store import Conflict, Store, change
from shared.wishes import LONGEST_VALUE, PREFIX, Wishes, unknown_keys, wishes_in
from shared.work_api import TryAgain, WorkApi, WorkApiError


class LaunchMessage(BaseModel):
    """What a message of the launch queue says; all else about the turn is in its record."""

    model_config = ConfigDict(frozen=True)
    work_id: WorkId
    turn: int
    attempt: int


FORBIDDEN = 403
LAUNCHES_A_SECOND = 10  # of one launcher: RunTask's sustained 20/s is shared by the two that the template allows
_LONGEST_REASON = 300
_NO_ROOM = (LaunchProblem.CAPACITY, LaunchProblem.QUOTA)  # Spot and on-demand capacity have a quota each


class PutOff(Exception):
    """ECS cannot start it now: the message must come back."""


@dataclass
class Launcher:
    config: Config
    api: WorkApi
    store: Store
    sandboxes: Sandboxes
    now: Callable[[], int]
    new_ticket: Callable[[], str] = lambda: secrets.token_urlsafe(32)
    sleep: Callable[[float], None] = time.sleep
    _next_launch_at: int = field(default=0, init=False)
    _may_tell: bool = field(default=True, init=False)

    def launch(self, message: LaunchMessage) -> None:
        """Launch, or drop a message whose moment is over. Raises PutOff; other errors are retried as well."""
        wishes = self._wishes(message)
        size = lifecycle.granted_size(wishes, self.config)
        if wishes and wishes.size and size is None:
            log.warning("no such size class: it gets the default", **log_fields(message), size=wishes.size)
        ticket = self.new_ticket()
        now = self._paced()
        gate = self.store.breaker()
        record = change(
            self.store,
            message.work_id,
            lambda r: (
                lifecycle.begin_launch(
                    r,
                    message.turn,
                    message.attempt,
                    ticket_hash=lifecycle.hash_secret(ticket),
                    now=now,
                    until=now + self.config.start_timeout_seconds * 1000,
                    wishes=wishes,
                    size=size,
                )
                if breaker.admits(gate, r)
                else None
            ),
        )
        if record is None:
            log.info("launch message dropped: not due, or held back by the circuit breaker", **log_fields(message))
            return
        try:
            arn = self.sandboxes.run(record, ticket)
        except LaunchFailed as failure:
            why = str(failure)[:_LONGEST_REASON]
            if failure.problem is not LaunchProblem.PERMANENT:
                self._note_refusal(message, why, no_room=failure.problem in _NO_ROOM)
                raise self._put_off(record, why) from None
            self._failed(record, message, f"{why}. {advice(str(failure))}")
            return
        self._store_arn(message, arn)

    def _wishes(self, message: LaunchMessage) -> Wishes | None:
        """What the session's metadata asks for, read once a turn; None: not known, the defaults hold. Raises PutOff.

        With the session's own token; with the environment key only where that may reach a sandbox anyway (DESIGN §6).
        """
        record = self.store.get(message.work_id)
        if record is None or not lifecycle.may_launch(record, message.turn, message.attempt):
            return None
        if record.wishes is not None or record.session_id is None:
            return record.wishes
        try:
            metadata = self.api.session(record.session_id, token=record.sessions_token()).metadata
        except TryAgain as error:
            if lifecycle.awaits_wishes(record, self.now()):
                raise self._put_off(record, error.message) from None
            problem = error.message
        except Exception as error:  # noqa: BLE001  what a session may ask for fails no launch
            problem = str(error)
        else:
            if ignored := unknown_keys(metadata):
                unknown = f"unknown keys: {', '.join(ignored)}"
                log.warning("the session's metadata asks for what nobody knows", **log_fields(record), reason=unknown)
            return wishes_in(metadata)
        log.warning("the session's metadata is not known: it gets the defaults", **log_fields(record), error=problem)
        return None

    def _failed(self, record: Record, message: LaunchMessage, why: str) -> None:
        """Held back for the breaker's probe, or given up. A poller sends the next message."""
        now = self.now()
        breaker.failed(self.store, record, why, now)
        emit(Metric.STARTS_REFUSED)
        if not breaker.keeps(self.store, self.config, record, now, refused=True):
            self._give_up(message, why)
            return
        # An earlier try may have started a task: the stopper proves what became of it
        if len(record.ticket_hashes) > 1:
            raise self._put_off(record, why)
        try:
            held_back = self.store.save(lifecycle.held_back(record, now, why))
        except Conflict:
            raise self._put_off(record, why) from None
        log.error("launch failed; held back until the cause is mended", **log_fields(held_back), reason=why)
        emit(Metric.RELAUNCHES)

    @staticmethod
    def _put_off(record: Record, why: str) -> PutOff:
        log.warning("launch put off", **log_fields(record), reason=why)
        emit(Metric.LAUNCHES_PUT_OFF)
        return PutOff(f"{record.work_id}: {why}")

    def _paced(self) -> int:
        """The time now, once RunTask may be called; before the record is written, so that its times stay true."""
        wait = min(self._next_launch_at - self.now(), 1000 // LAUNCHES_A_SECOND)
        if wait > 0:
            self.sleep(wait / 1000)
        now = self.now()
        self._next_launch_at = now + 1000 // LAUNCHES_A_SECOND
        return now

    def _note_refusal(self, message: LaunchMessage, why: str, *, no_room: bool) -> None:
        def note(record: Record) -> Record | None:
            if not lifecycle.is_current(record, message.turn, message.attempt):
                return None
            return lifecycle.put_off(record, why, self.now(), no_room=no_room)

        change(self.store, message.work_id, note)

    def _give_up(self, message: LaunchMessage, why: str) -> None:
        now = self.now()
        wish = StopWish(f"the sandbox cannot be launched: {why}", Outcome.LAUNCH_FAILED, post=True)

        def stop(record: Record) -> Record | None:
            if not lifecycle.is_current(record, message.turn, message.attempt):
                return None
            return lifecycle.give_up_launch(record, wish, now)

        stopping = change(self.store, message.work_id, stop)
        log.error("launch failed for good", **log_fields(stopping or message), reason=why)

    def _store_arn(self, message: LaunchMessage, arn: str) -> None:
        where = links(arn, self.config.sandbox_log_group, self.config.state_machine_arn)

        def fill_in(record: Record) -> Record | None:
            if not lifecycle.is_current(record, message.turn, message.attempt):
                return None
            if record.task_arn is None:
                return record.noted(self.now(), "task started", task_arn=arn, links=where)
            missing = record.task_arn == arn and record.links != where  # its event came first
            return record.model_copy(update={"links": where}) if missing else None

        stored = change(self.store, message.work_id, fill_in) or self.store.get(message.work_id)
        current = stored and lifecycle.is_current(stored, message.turn, message.attempt)
        if not stored or not current or stored.task_arn != arn or stored.phase is Phase.STOPPING:
            self.sandboxes.stop(arn, "the turn was over before its sandbox had started")
            log.info("stopped our own task: the turn was over", **log_fields(message), task=arn)
            return
        log.info("launched", **log_fields(stored), size=stored.size and stored.size.name, links=stored.links)
        self._tell(stored)

    def _tell(self, record: Record) -> None:
        """The links into the work item's metadata, where the API lets us; it may be asked once a process (W§8)."""
        token = record.sessions_token()
        if not self._may_tell or token is None or not record.links:
            return
        told = {PREFIX + name: page for name, page in record.links.items() if len(page) <= LONGEST_VALUE}
        try:
            self.api.update(record.work_id, told, token=token)
        except WorkApiError as error:
            self._may_tell = error.status != FORBIDDEN
            log.info("the work item's metadata does not get the links", **log_fields(record), error=error.message)
