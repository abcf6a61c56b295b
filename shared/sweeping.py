"""The janitor's round: repairs what any crash left and publishes gauges (DESIGN §4, §5, §10). Rules are lifecycle's.

What cannot be proved by one look is marked, and acted on only when a later round sees it again (FIELD_NOTES 9). The
marks are one item of the table: a round that dies loses at most what it saw itself, and that is looked at once more.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from shared import lifecycle, progress
from shared.claiming import Claimer
from shared.config import SHARD, Config, Missing
from shared.log import log, log_fields
from shared.metrics import Metric, emit
from shared.observing import Observer
from shared.record import LiveEntry, Phase, Record
from shared.sandboxes import Sandboxes
from shared.store import Conflict, Store
from shared.work_api import NO_HEARTBEAT, Gone, LeaseLost, NotAllowed, Refused, Work, WorkApi, WorkApiError

MOST_MARKS = 1_000  # the item that keeps them must stay well under 400 kB
STOPS_A_ROUND = 5
_FRESH_MS = 5_000  # how old the page may be that a forced stop rests on
_WAITING = (Phase.RECEIVED, Phase.HELD, Phase.LAUNCHING)
_WITH_TASK = (Phase.LAUNCHING, Phase.RUNNING, Phase.STOPPING)

_Item = TypeVar("_Item")


class OutOfTime(Exception):
    """The function's deadline is near: what is left is the next round's."""


class Marks:
    """What earlier rounds saw, and what this one sees; a mark that is not seen again goes."""

    def __init__(self, before: dict[str, int]) -> None:
        self._before, self._seen = before, dict[str, int]()

    def seen_before(self, what: str, now: int) -> bool:
        """Mark it; whether an earlier round, long enough ago, has marked it as well."""
        first = self._before.get(what, now)
        self._seen[what] = first
        return now - first >= lifecycle.SECOND_LOOK_MS

    def keep(self, kind: str) -> None:
        """A part that could not look at everything has not seen that its marks are gone."""
        self._seen = {what: at for what, at in self._before.items() if what.startswith(kind)} | self._seen

    def is_new(self, what: str) -> bool:
        """Mark it; whether the round before did not."""
        self._seen[what] = self._before.get(what, 0)
        return what not in self._before

    def to_store(self) -> dict[str, int]:
        return dict(list(self._seen.items())[:MOST_MARKS])


@dataclass
class Janitor:
    """Each part stands alone: one that fails keeps no other from running, and all end before `until`."""

    config: Config
    api: WorkApi
    store: Store
    sandboxes: Sandboxes
    claimer: Claimer
    observer: Observer
    wake_stopper: Callable[[str], None]
    now: Callable[[], int]
    _missing: set[str] = field(default_factory=set, init=False)

    def sweep(self, until: int) -> None:
        """One round; `until` (epoch ms) is when it must have ended. Harmless beside any other actor and itself."""
        self._missing.clear()
        marks = Marks(self.store.marks())
        entries = self.store.live(SHARD)
        self._part("counts", lambda: self._count_sessions(entries), until)
        self._part("loop", lambda: self._ensure_loop(entries), until)
        self._part("stopper", lambda: self._wake_stopper(entries, until), until)
        if not self._part("records", lambda: self._match_records(entries, marks, until), until):
            marks.keep("record ")
        if not self._part("tasks", lambda: self._stop_orphans(marks, until), until):
            marks.keep("task ")
        self._part("repair", lambda: self._repair(entries, until), until)
        self._part("stats", self._publish_stats, until)
        if not self._part("items", lambda: self._find_strands(marks, until), until):
            marks.keep("item ")
        if not self._part("progress", lambda: self._watch_progress(entries, marks, until), until):
            marks.keep("unread ")
        self.store.save_marks(marks.to_store())

    def _part(self, name: str, part: Callable[[], None], until: int) -> bool:
        """Whether it did all it had to."""
        try:
            if self.now() >= until:
                raise OutOfTime  # noqa: TRY301  handled as when it runs out inside
            part()
        except Missing as missing:
            if str(missing) not in self._missing:  # the parts that need a key all lack the same one
                log.error("not configured: parts of the sweep are left out", reason=str(missing))
                self._missing.add(str(missing))
            return False
        except NotAllowed as error:
            self.claimer.key.forget()
            emit(Metric.KEY_REFUSED)
            log.error("a part of the sweep is not allowed", part=name, error=error.message)
            return False
        except OutOfTime:
            log.warning("a part of the sweep ran out of time; the next round goes on", part=name)
        except WorkApiError as error:
            log.warning("a part of the sweep failed; the next round repeats it", part=name, error=error.message)
        except Exception:  # noqa: BLE001  one fault holds up no other part (FIELD_NOTES 5)
            log.exception("a part of the sweep failed in a way not known here; the next round repeats it", part=name)
        else:
            return True
        emit(Metric.SWEEPS_FAILED)
        return False

    def _each(self, items: Iterable[_Item], step: Callable[[_Item], None], until: int) -> None:
        """As `_part` for single items: the last fault is raised after all had their turn. Raises OutOfTime."""
        fault: Exception | None = None
        for item in items:
            if self.now() >= until:
                raise OutOfTime
            try:
                step(item)
            except Conflict as conflict:
                log.info("left to the actor that got there first", reason=str(conflict))
            except Exception as error:  # noqa: BLE001  raised below
                fault = error
        if fault is not None:
            raise fault

    # --- records ----------------------------------------------------------------------------------------------

    def _ensure_loop(self, entries: list[LiveEntry]) -> None:
        if entries:
            self.claimer.loop.ensure(SHARD)

    def _repair(self, entries: list[LiveEntry], until: int) -> None:
        repaired = self.claimer.repair_stuck(entries, "janitor", until)
        if repaired:
            log.warning("stuck turns repaired", count=repaired)

    def _wake_stopper(self, entries: list[LiveEntry], until: int) -> None:
        """The loop does this as well, unless its Beat fails."""
        now = self.now()
        due = [entry.work_id for entry in entries if lifecycle.needs_stopper(entry, self.config, now)]
        self._each(due, self.wake_stopper, until)

    def _match_records(self, entries: list[LiveEntry], marks: Marks, until: int) -> None:
        """What ECS says of each record's task, for events that never came."""
        by_arn: dict[str, Record] = {}

        def read(entry: LiveEntry) -> None:
            record = self.store.get(entry.work_id)
            if record and record.phase in _WITH_TASK and record.task_arn and not record.dead:
                by_arn[record.task_arn] = record

        self._each([entry for entry in entries if entry.phase in _WITH_TASK], read, until)
        tasks = self.sandboxes.describe(by_arn)

        def match(arn: str) -> None:
            record, task = by_arn[arn], tasks.get(arn)
            if task is None:
                self._doubt(record, arn, marks)
            elif task.get("lastStatus") == "STOPPED" or record.phase is Phase.LAUNCHING:
                self.observer.observe(task)

        self._each(by_arn, match, until)

    def _doubt(self, record: Record, arn: str, marks: Marks) -> None:
        """ECS does not know the task: proof of death only long after the launch, twice, and by name as well."""
        now = self.now()
        if not lifecycle.may_be_taken_as_dead(record, now):
            return  # a fresh task may read MISSING
        if not marks.seen_before(f"record {record.started_by}", now):
            return
        if record.started_by is None or self.sandboxes.find(record.started_by):
            return
        log.warning("a sandbox is gone without a word", **log_fields(record))
        gone = {"lastStatus": "STOPPED", "stoppedReason": "the task is no longer known to ECS"}
        named = {"taskArn": arn, "startedBy": record.started_by, "version": record.event_version + 1}
        self.observer.observe(gone | named)

    # --- progress ---------------------------------------------------------------------------------------------

    def _watch_progress(self, entries: list[LiveEntry], marks: Marks, until: int) -> None:
        """A heartbeat is not progress (FIELD_NOTES 3, 4, 26): the session's own events say whether a sandbox hangs."""
        oldest, waiting = 0, 0

        def look(entry: LiveEntry) -> None:
            nonlocal oldest, waiting
            record = self.store.get(entry.work_id)
            if record is None or record.phase is not Phase.RUNNING:
                return
            if record.restart_reason:  # its stopper may have died
                self.wake_stopper(record.work_id)
            found = self._progress_of(record, marks)
            if found is None:
                return
            now = self.now()
            oldest = max(oldest, progress.silent_ms(record, found, now))
            waiting += found.waits_for is not None
            after = progress.after_look(record, found, now, self.config.stall_timeout_seconds * 1000)
            if after is None:
                return
            saved = self.store.save(after)
            if saved.restart_reason:
                log.warning("a sandbox hangs", **log_fields(saved), reason=saved.restart_reason)
                self.wake_stopper(saved.work_id)

        try:
            self._each([entry for entry in entries if entry.phase is Phase.RUNNING], look, until)
        finally:
            emit(Metric.OLDEST_PROGRESS_AGE, oldest / 1000)
            emit(Metric.WAITING_FOR_ACTION, waiting)

    def _progress_of(self, record: Record, marks: Marks) -> progress.Progress | None:
        """None: not known. The session's token may have run out (W§16); the key may read any session (W§8)."""
        if record.session_id is None:
            return None
        token = record.sessions_token()
        try:
            try:
                page = self.api.newest_events(record.session_id, token=token)
            except NotAllowed:
                if token is None:
                    raise
                page = self.api.newest_events(record.session_id)
            found = progress.read_progress(page)
            problem = "its events do not tell"
        except (NotAllowed, Gone, Refused) as error:
            found, problem = None, error.message
        if found is None and marks.is_new(f"unread {record.started_by}"):
            log.warning("a session's progress is not known", **log_fields(record), reason=problem)
        return found

    # --- tasks ------------------------------------------------------------------------------------------------

    def _stop_orphans(self, marks: Marks, until: int) -> None:
        """Tasks are listed before their records are read: `launching` is written before RunTask."""
        orphans = 0

        def judge(task: dict[str, Any]) -> None:
            nonlocal orphans
            arn, name = str(task["taskArn"]), lifecycle.parse_started_by(str(task.get("startedBy") or ""))
            if name is None:
                return  # someone's own task in our cluster
            work_id, turn, attempt = name
            record = self.store.get(work_id)
            if not lifecycle.is_orphan(record, turn, attempt, arn):
                if record and record.phase is Phase.LAUNCHING:
                    self.observer.observe(task)  # its RUNNING event may be lost, its arn not stored
                return
            orphans += 1
            if marks.seen_before(f"task {arn}", self.now()):
                log.warning(
                    "stopping a sandbox that no live record names",
                    work_id=work_id,
                    turn=turn,
                    attempt=attempt,
                    task=arn,
                )
                self.sandboxes.stop(arn, "no live record names this task")

        self._each(self.sandboxes.describe(self.sandboxes.meant_to_run()).values(), judge, until)
        emit(Metric.ORPHAN_TASKS, orphans)

    # --- the API's items --------------------------------------------------------------------------------------

    def _find_strands(self, marks: Marks, until: int) -> None:
        """Items that nobody serves and no poll will offer again (W§6.4): reported once seen in two rounds."""
        stranded, stops = 0, 0

        def judge(work: Work) -> None:
            nonlocal stranded, stops
            if not lifecycle.is_stranded(work, self.store.get(work.id), self.now()):
                return
            mark = f"item {work.id} {work.state} {work.acknowledged_at} {work.latest_heartbeat_at}"
            if not marks.seen_before(mark, self.now()):
                return
            stranded += 1
            log.error(
                "item stranded",
                work_id=work.id,
                session_id=work.data.id,
                state=work.state,
                reason=f"acknowledged at {work.acknowledged_at}, last beat at {work.latest_heartbeat_at}",
                what_to_do="nobody serves it and no poll offers it: force-stop it, then interrupt its session",
            )
            fresh = self.now() - read_at <= _FRESH_MS
            if self.config.force_stop_strands and stops < STOPS_A_ROUND and fresh:
                stops += 1
                self._force_stop(work)

        try:
            for page in self.api.list_pages():
                read_at = self.now()
                self._each((work for work in page.data if work.state not in ("queued", "stopped")), judge, until)
                if self.now() >= until:
                    raise OutOfTime
        except NotAllowed as error:
            # Sources differ on whether the environment key may list (W§14, 6); beats say whether it is a good key.
            log.warning("the key may not list work items: strands are not looked for", error=error.message)
            return
        emit(Metric.STRANDED, stranded)

    def _force_stop(self, work: Work) -> None:
        """One attempt. A `starting` item is claimed first: whoever beat it meanwhile is then seen, and left alone."""
        try:
            if work.state == "starting":
                beat = self.api.heartbeat(work.id, NO_HEARTBEAT)
                if beat.state not in ("active", "stopping"):
                    return
            self.api.stop(work.id, force=True)
        except (Gone, LeaseLost):
            log.info("a stranded item has moved on by itself", work_id=work.id, session_id=work.data.id)
            return
        advice = "interrupt its session to queue it again"
        log.warning("stranded item force-stopped", work_id=work.id, session_id=work.data.id, what_to_do=advice)

    # --- gauges -----------------------------------------------------------------------------------------------

    def _count_sessions(self, entries: list[LiveEntry]) -> None:
        waiting = [entry for entry in entries if entry.phase in _WAITING]
        first = [self.now() - entry.turn for entry in waiting if entry.attempt == 1]  # a turn's number is its start
        emit(Metric.LIVE_SESSIONS, len(entries))
        emit(Metric.WAITING_SESSIONS, len(waiting))
        emit(Metric.OLDEST_WAITING_AGE, max([0, *first]) / 1000)

    def _publish_stats(self) -> None:
        stats = self.api.stats()
        queued = lifecycle.server_time(stats.oldest_queued_at)
        emit(Metric.QUEUE_DEPTH, stats.depth)
        emit(Metric.QUEUE_PENDING, stats.pending)
        if stats.depth or stats.pending:  # our own poller alone would keep it from zero in an idle stack
            emit(Metric.WORKERS_POLLING, stats.workers_polling or 0)
        emit(Metric.OLDEST_QUEUED_AGE, max(0.0, self.now() / 1000 - queued) if queued else 0)
