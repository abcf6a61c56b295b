"""A hand on the simulation: faults and events at exact calls, for named sequences. What is not told goes right."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from shared.record import Outcome, Phase, Record
from tests.simulation.fargate import Task
from tests.simulation.fleet import CONFIG, START, Fleet, Session
from tests.simulation.scenario import SETTLE_MS

BUSY = 100_000  # messages: more than a sandbox ever serves
_LONGEST_HOLD_MS = 600_000


@dataclass
class _Moment:
    """A call of this kind by a process of this name: what is done before it, what goes wrong, what is done after."""

    kind: str
    who: str
    fault: str | None
    do: Callable[[], object] | None
    then: Callable[[], object] | None
    times: int


class Play:
    """One fleet without schedules: the sequence says when the poller runs, and what happens at which call."""

    def __init__(self, seed: int = 0, **config: Any) -> None:
        self.fleet = Fleet(seed, config=CONFIG.model_copy(update=config))
        self.machine = self.fleet.machine
        self._moments: list[_Moment] = []
        self._done: list[_Moment] = []
        self.fleet.outside.script, self.fleet.outside.after = self._before, self._after

    # --- what is to happen ---------------------------------------------------------------------------------------

    def at(
        self,
        kind: str,
        who: str,
        *,
        fault: str | None = None,
        do: Callable[[], object] | None = None,
        then: Callable[[], object] | None = None,
        times: int = 1,
    ) -> None:
        """At the next call of this kind by `who`: `do`, the fault, and `then` before the answer. Either may hold."""
        self._moments.append(_Moment(kind, who, fault, do, then, times))

    def hold(self, until: Callable[[], object]) -> None:
        """Inside a call: its process waits, all others go on."""
        end = self.machine.now + _LONGEST_HOLD_MS
        while not until():
            assert self.machine.now < end, "what the call was held for never came"
            self.machine.sleep(50)

    def forget(self) -> None:
        """Nothing that was told happens any more."""
        self._moments.clear()
        self.fleet.faults.wanted.clear()

    def want(self, what: str, times: int = 1) -> None:
        """The next time that this could go wrong (Faults.happens), it does."""
        self.fleet.faults.wanted[what] = times

    def send(self, function: str, event: Any = None) -> None:
        self.fleet.functions.send(function, event or {}, retries=0)

    def poll(self) -> None:
        self.send("poller")

    def _before(self, who: str, kind: str) -> str | None:
        for moment in self._moments:
            if moment.kind == kind and who.startswith(moment.who) and moment.times:
                moment.times -= 1
                if moment.do:
                    moment.do()
                if moment.then:
                    self._done.append(moment)
                return moment.fault
        return None

    def _after(self, who: str, kind: str) -> None:
        for moment in self._done:
            if moment.kind == kind and who.startswith(moment.who) and moment.then:
                self._done.remove(moment)
                moment.then()
                return

    # --- how far it has come ---------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        self.machine.run(self.machine.now + int(seconds * 1000))

    def until(self, condition: Callable[[], object], seconds: float = 900) -> None:
        """Let things happen until then; that it never comes is a failure."""
        self.machine.run(self.machine.now + int(seconds * 1000), lambda: bool(condition()))
        assert condition(), "what the sequence waits for never came"

    def running(self, messages: int = BUSY) -> Session:
        """A new session whose sandbox runs, with so many messages."""
        session = self.fleet.new_session()
        session.pending = messages
        self.poll()
        self.until(lambda: self.phase(session) is Phase.RUNNING and self.record(session).ticket_used_at)
        return session

    def settle(self, finish: Iterable[Session] = ()) -> None:
        """These sessions have nothing more to do; the schedules start; then all must settle and all promises hold."""
        for session in finish:
            session.pending = 0
        fleet = self.fleet
        fleet.schedule("poller", 60_000)
        fleet.schedule("janitor", 300_000)
        while self.machine.now < START + SETTLE_MS and not (fleet.violations or fleet.settled()):
            self.run(1)
        assert fleet.violations == []
        assert fleet.unsettled() == []
        fleet.check_end()
        assert fleet.violations == []

    # --- what is there -----------------------------------------------------------------------------------------------

    def record(self, session: Session) -> Record:
        record = self.fleet.records.get(session.work_id)
        assert record, f"{session.work_id} has no record"
        return record

    def phase(self, session: Session) -> Phase | None:
        record = self.fleet.records.get(session.work_id)
        return record.phase if record else None

    def attempt(self, session: Session) -> int:
        record = self.fleet.records.get(session.work_id)
        return record.attempt if record else 0

    def outcomes(self, session: Session) -> list[Outcome | None]:
        """Of every turn, the oldest first."""
        record = self.record(session)
        return [turn.outcome for turn in record.history] + [record.outcome]

    def tasks(self, session: Session) -> list[Task]:
        """All that were ever created for it, the oldest first."""
        return [t for t in self.fleet.fargate.ever if t.environment["FLEET_WORK_ID"] == session.work_id]

    def task(self, session: Session) -> Task:
        return self.tasks(session)[-1]

    def said(self, text: str) -> int:
        """How many lines of the history hold this."""
        return sum(text in what for _, _, what in self.machine.history)

    def calls(self, kind: str) -> int:
        """How many calls of this kind the fleet has made of the API."""
        return sum(call == kind for _, call in self.fleet.transport.calls)


def closed_at(record: Record) -> int:
    """When its present turn was closed."""
    return next(moment.at for moment in reversed(record.timeline) if moment.event.startswith("stopped:"))
