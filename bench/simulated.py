"""Half an hour of many leases in virtual time, 1 % of the API's calls failing; and what the loop does at scale.

The real keeper, its store's twin and the real definition of the loop, on tests/simulation; the API is the emulator's.
"""

import random
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from typing import Any

from shared.config import SHARD
from shared.record import Lease, Phase, Record
from tests.simulation.fleet import CONFIG, ENVIRONMENT, START, Fleet

MINUTES = 30
FAILING = 0.01
LEASES = 500  # a full shard: more sessions are so many stacks, which share nothing
TTL_SECONDS, INTERVAL_MS = 300, 30_000


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """The lateness of beats, and rounds, transitions, calls and writes of the loop, all of one shard."""
    began = time.monotonic()
    rng, writes = random.Random(1), Counter[str]()
    fleet = Fleet(
        1,
        config=CONFIG.model_copy(update={"max_sessions": LEASES, "session_timeout_seconds": 86_400}),
        script=lambda _, kind: (
            rng.choice(["lose", "refuse"]) if kind == "api.heartbeat" and rng.random() < FAILING else None
        ),
    )
    fleet.queue.settle_every = timedelta(seconds=1)
    fleet.outside.after = lambda _, kind: writes.update([kind])
    accepted = _watch(fleet)
    try:
        for number in range(LEASES):
            _put_live(fleet, f"sesn_{number}", rng.randrange(INTERVAL_MS))
        fleet.loops._start(f"lease-loop-{SHARD}-0", {"shard": SHARD, "generation": 0, "round": 0, "empty_rounds": 0})
        fleet.machine.run(START + MINUTES * 60_000)
        lost = LEASES - sum(item.state == "active" for item in fleet.queue.items())
        calls = Counter((at - START) // 60_000 for at, _ in fleet.transport.calls)
    finally:
        fleet.close()
    gaps = [after - before for times in accepted.values() for before, after in pairwise(times)]
    rounds = writes["store.get_leases"]
    late = max(0, max(gaps) - INTERVAL_MS) / 1000
    say(
        f"simulated {MINUTES} minutes of {LEASES} leases in {time.monotonic() - began:.0f} s: {late:.1f} s late at most"
    )
    return {
        "leases": LEASES,
        "minutes": MINUTES,
        "failing": FAILING,
        "latest_s": round(late, 1),
        "allowed_s": TTL_SECONDS / 3,
        "lost": lost,
        "beats": len(gaps),
        "rounds": rounds,
        "calls_per_minute_max": max(calls.values()),
        "writes_a_beat": round(writes["store.save_lease"] / len(gaps), 3),
    }


def _watch(fleet: Fleet) -> dict[str, list[int]]:
    """When the API accepted each item's beats."""
    accepted: dict[str, list[int]] = {}
    beat = fleet.queue.heartbeat

    def watched(work_id: str, expected: str | None = None, desired_ttl_seconds: int | None = None) -> dict[str, Any]:
        reply = beat(work_id, expected, desired_ttl_seconds)
        accepted.setdefault(work_id, []).append(fleet.machine.now)
        return reply

    fleet.queue.heartbeat = watched  # type: ignore[method-assign]
    return accepted


def _put_live(fleet: Fleet, work_id: str, due_in_ms: int) -> None:
    """A running turn whose lease is due so soon."""
    fleet.queue.enqueue(work_id)
    fleet.queue.poll()
    fleet.queue.ack(work_id)
    beat = fleet.queue.heartbeat(work_id, "NO_HEARTBEAT", TTL_SECONDS)
    item = fleet.queue.get(work_id)
    fleet.queue.held_by[item.id, item.started_at] = "fleet"
    record = Record(
        work_id=work_id,
        environment_id=ENVIRONMENT,
        kind="session",
        session_id=work_id,
        turn=START,
        phase=Phase.RUNNING,
        shard=SHARD,
    )
    fleet.records.save(record)
    sent = START + due_in_ms - INTERVAL_MS
    fleet.records.save_lease(
        Lease(
            work_id=work_id,
            turn=START,
            value=beat["last_heartbeat"],
            ttl_seconds=TTL_SECONDS,
            accepted_sent_at=sent,
            due_at=START + due_in_ms,
        ),
        None,
    )
