"""Many sessions at once on the simulation, without faults: `make load`. No lease may lapse, all must settle.

A minute here is one of the simulated clock. The API's budget a minute: two beats a slot (every 30 s), a poll, an ack
and a claim a turn, a look at the session and an update a launch, the janitor's pages, and a few others.
"""

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta

from local.work_api.state import MOST_LIMIT, Item
from shared.config import SHARD
from tests.simulation.fleet import CONFIG, START, Fleet

MINUTE_MS = 60_000
LONGEST_MS = 12 * 60 * MINUTE_MS
BEATS_A_SLOT = 2
CALLS_A_CLAIM, CALLS_A_LAUNCH = 3, 2
OTHER_CALLS = 20


@dataclass(frozen=True)
class Load:
    """What a run came to; `live_max` is the most live records at the end of a minute."""

    sessions: int
    live_max: int
    calls_max: int
    lapses: int
    violations: tuple[str, ...]

    def line(self) -> str:
        return (
            f"load: sessions={self.sessions} live_max={self.live_max} api_calls_per_minute_max={self.calls_max} "
            f"lapses={self.lapses} violations={len(self.violations)}"
        )


def run(sessions: int, max_sessions: int, *, progress: bool = False) -> Load:
    """Queue all at once, then let the schedules work until everything has settled."""
    fleet = Fleet(0, config=CONFIG.model_copy(update={"max_sessions": max_sessions}))
    fleet.queue.settle_every = timedelta(seconds=1)
    lapses = Counter[str | None]()
    judge = fleet.queue.lapsed

    def lapsed(item: Item, holder: str | None) -> None:
        lapses[holder] += 1
        judge(item, holder)

    fleet.queue.lapsed = lapsed
    fleet.schedule("poller", MINUTE_MS)
    fleet.schedule("janitor", 5 * MINUTE_MS)
    for _ in range(sessions):
        fleet.new_session()
    live_max, calls_max, launched, now, began = 0, 0, 0, START, time.monotonic()
    try:
        while not fleet.violations and not fleet.settled() and now < START + LONGEST_MS:
            now += MINUTE_MS
            fleet.machine.run(now, lambda: bool(fleet.violations))
            live_max = max(live_max, len(fleet.records.live(SHARD)))
            calls = Counter(call for _, call in fleet.transport.calls)
            fleet.transport.calls.clear()
            calls_max = max(calls_max, calls.total())
            launches, launched = len(fleet.fargate.tasks) - launched, len(fleet.fargate.tasks)
            allowed = BEATS_A_SLOT * max_sessions + sessions // MOST_LIMIT + OTHER_CALLS
            allowed += CALLS_A_CLAIM * calls["ack"] + CALLS_A_LAUNCH * launches
            if calls.total() > allowed:
                fleet.violations.append(f"{calls.total()} API calls in a minute, allowed are {allowed}: {dict(calls)}")
            if progress:
                ended = sum(1 for item in fleet.queue.items() if item.state == "stopped")
                told = f"minute {(now - START) // MINUTE_MS}: {ended} ended, {dict(calls)}, allowed {allowed}"
                print(f"[{time.monotonic() - began:5.1f} s] {told}", file=sys.stderr, flush=True)
    finally:
        fleet.close()
    if not fleet.violations:
        fleet.violations += [f"not settled: {open_}" for open_ in fleet.unsettled()]
    if not fleet.violations:
        fleet.check_end()
    return Load(sessions, live_max, calls_max, lapses["fleet"], tuple(fleet.violations))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.load", description=__doc__)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--max-sessions", type=int, default=1_000)
    options = parser.parse_args()
    load = run(options.sessions, options.max_sessions, progress=True)
    for violation in load.violations[:5]:
        print(violation)
    print(load.line())
    return 1 if load.violations or load.lapses else 0


if __name__ == "__main__":
    sys.exit(main())
