"""A deterministic machine: virtual time, and processes that switch only at outside calls. Knows nothing of the fleet.

A process is a set of greenlets: one runs until it sleeps or waits, then the next event of the heap decides.
The same seed gives the same run, step by step.
"""

import heapq
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from greenlet import getcurrent, greenlet

Ended = Callable[[Any, BaseException | None], None]


class Died(BaseException):
    """The process is gone. Not an Exception: no handler of the code under test can catch it."""


class Process:
    """One invocation or container. `alive` turns false once; nothing that it does afterwards has an effect."""

    def __init__(self, name: str) -> None:
        self.name, self.alive = name, True
        self.greenlets: list[greenlet] = []


class Machine:
    """Virtual time in epoch milliseconds, the events to come, and the history of what happened."""

    def __init__(self, seed: int, start: int) -> None:
        self.rng, self.now = random.Random(seed), start
        self.steps = 0
        self.history: list[tuple[int, str, str]] = []
        self._start = start
        self._heap: list[tuple[int, int, Callable[[], object]]] = []
        self._count = 0
        self._hub = getcurrent()
        self._owners: dict[greenlet, Process] = {}

    def note(self, who: str, what: str) -> None:
        """One line of the history."""
        self.history.append((self.now - self._start, who, what))

    def later(self, ms: float, action: Callable[[], object]) -> None:
        """Do this in so many milliseconds."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + int(ms), self._count, action))

    def run(self, until: int, idle: Callable[[], bool] = lambda: False) -> None:
        """Let events happen until that time, or until `idle` says so."""
        while self._heap and self._heap[0][0] <= until and not idle():
            self.now, _, action = heapq.heappop(self._heap)
            action()
        if not idle():
            self.now = max(self.now, until)

    def close(self) -> None:
        """The end of the run: whatever still waits is thrown out."""
        for one, process in list(self._owners.items()):
            process.alive = False
            if one and one is not self._hub:
                one.throw(Died())
        self._owners.clear()

    # --- processes -------------------------------------------------------------------------------------------

    def spawn(
        self, name: str, body: Callable[[], Any], *, ended: Ended | None = None, timeout_ms: int | None = None
    ) -> Process:
        """Start a process now. `ended(result, error)` is told how it ended; past `timeout_ms` it is killed."""
        process = Process(name)

        def run() -> None:
            result: Any = None
            error: BaseException | None = None
            try:
                result = body()
            except Died as died:
                error = died
            except Exception as raised:  # noqa: BLE001  it is handed to whoever invoked the process
                error = raised
            if error is None and not process.alive:
                error = Died()
            process.alive = False
            if ended is not None:
                self.later(0, lambda: ended(result, error))

        self._start_greenlet(process, run)
        if timeout_ms is not None:
            self.later(timeout_ms, lambda: self.kill(process, "timed out"))
        return process

    def process(self) -> Process:
        """The one that runs now."""
        return self._owners[getcurrent()]

    def running(self) -> str:
        """The name of the one that runs now, for the history."""
        process = self._owners.get(getcurrent())
        return process.name if process else "machine"

    def sleep(self, ms: float) -> None:
        """Let others run for so long. Raises Died if the process was killed meanwhile."""
        process, me = self.process(), getcurrent()
        self._check(process)
        self.later(ms, lambda: self._resume(me))
        self._hub.switch()
        self._check(process)

    def kill(self, process: Process, why: str = "killed") -> None:
        """From outside the process: it is gone, wherever it was."""
        if not process.alive:
            return
        process.alive = False
        self.note(process.name, why)
        self._end_greenlets(process)

    def die(self) -> None:
        """From inside the process. Raises Died."""
        process = self.process()
        process.alive = False
        self.note(process.name, "died")
        self._end_greenlets(process)
        raise Died

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Block until the condition holds; looked at whenever `wake` is called for this greenlet."""
        process = self.process()
        while not done():
            self._hub.switch()
            self._check(process)

    def wake(self, waiting: greenlet) -> None:
        """Let a greenlet look at its condition again."""
        self.later(0, lambda: self._resume(waiting))

    def _start_greenlet(self, process: Process, run: Callable[[], None]) -> None:
        one = greenlet(run, parent=self._hub)
        self._owners[one] = process
        process.greenlets.append(one)
        self.later(0, lambda: self._resume(one))

    def _end_greenlets(self, process: Process) -> None:
        """From the hub, where each returns to: what had not started yet never will."""
        for one in process.greenlets:
            self.later(0, partial(self._throw_out, one))

    @staticmethod
    def _throw_out(one: greenlet) -> None:
        if one:
            one.throw(Died())

    def _resume(self, one: greenlet) -> None:
        if not one.dead and self._owners[one].alive:
            one.switch()

    @staticmethod
    def _check(process: Process) -> None:
        if not process.alive:
            raise Died

    def wait(self, futures: "Iterable[Future]") -> None:
        """In place of concurrent.futures.wait."""
        for future in futures:
            future.wait()

    # --- what the code under test takes for threads -----------------------------------------------------------

    def pool(self, max_workers: int) -> "Pool":
        """In place of ThreadPoolExecutor."""
        return Pool(self, max_workers)


class Future:
    """The result of one call in a pool."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._waiting: list[greenlet] = []
        self.done, self._value, self._error = False, None, None

    def settle(self, value: Any, error: Any) -> None:
        self.done, self._value, self._error = True, value, error
        for one in self._waiting:
            self._machine.wake(one)

    def wait(self) -> None:
        self._waiting.append(getcurrent())
        self._machine.wait_for(lambda: self.done)

    def result(self) -> Any:
        """Wait for it. Raises what the call raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._value


class Pool:
    """A ThreadPoolExecutor of greenlets of the calling process, as far as the fleet's code uses one."""

    def __init__(self, machine: Machine, max_workers: int) -> None:
        self._machine, self._free = machine, max_workers
        self._queued: list[Callable[[], None]] = []
        self._futures: list[Future] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._machine.wait(self._futures)

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future:
        future = Future(self._machine)
        self._futures.append(future)

        def run() -> None:
            value, error = None, None
            try:
                value = call(*arguments)
            except Exception as raised:  # noqa: BLE001  the caller's, as in a real pool
                error = raised
            future.settle(value, error)
            self._free += 1
            self._start_queued()

        process = self._machine.process()
        self._queued.append(lambda: self._machine._start_greenlet(process, _until_death(run)))
        self._start_queued()
        return future

    def map(self, call: Callable[..., Any], things: Iterable[Any]) -> Iterator[Any]:
        futures = [self.submit(call, thing) for thing in things]
        return (future.result() for future in futures)

    def _start_queued(self) -> None:
        while self._free and self._queued:
            self._free -= 1
            self._queued.pop(0)()


def _until_death(run: Callable[[], None]) -> Callable[[], None]:
    def body() -> None:
        try:
            run()
        except Died:
            return

    return body
