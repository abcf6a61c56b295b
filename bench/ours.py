"""Our side of a measurement, in a process of its own: the real functions as Lambda has them (as_lambda.py).

`measuring.side("ours", ...)` starts it; the last line printed is the answer, what comes before is the function's log.
"""

import json
import sys
import time
from typing import Any

from bench import as_lambda


def dispatch() -> dict[str, Any]:
    """One poller run until the queue is empty: poll, persist, ack, claim, persist, enqueue."""
    claimer = as_lambda.load("poller").claimer()
    claimer.key()
    began, cpu = time.perf_counter(), time.process_time()
    held = claimer.run("bench", int(time.time() * 1000) + 280_000)
    took, used = time.perf_counter() - began, time.process_time() - cpu
    return {"items": held, "seconds": took, "cpu_ms": used * 1000 / held, "peak_mb": as_lambda.peak_mb()}


def beats(rounds: str, where: str) -> dict[str, Any]:
    """Rounds of the keeper, each with every lease due: read the index and the leases, beat, keep each reply.

    `where`: "stored", as deployed, or "memory", as the SDK's side keeps what it needs.
    """
    keeper = as_lambda.load("keeper").keeper()
    state_of: Any = sys.modules["shared.keeping"].__dict__["RoundState"]
    if where == "memory":
        keeper.store = _in_memory(keeper.store)
    ahead, runs = 0, []
    keeper.now = lambda: int(time.time() * 1000) + ahead
    for number in range(int(rounds)):
        began, cpu = time.perf_counter(), time.process_time()
        reply = keeper.round(state_of(shard="0", generation=0, round=number, empty_rounds=0))
        took, used = time.perf_counter() - began, time.process_time() - cpu
        if reply.to_stop:
            raise RuntimeError(f"{reply.to_stop} leases were lost")
        runs.append({"beats": reply.live, "seconds": took, "cpu_ms": used * 1000 / reply.live})
        ahead += 31_000
    return {"runs": runs, "peak_mb": as_lambda.peak_mb()}


def _in_memory(stored: Any) -> Any:
    """The live records and leases of a store in its twin that keeps them in this process."""
    made: Any = sys.modules["shared.store"].__dict__["MemoryStore"]()
    record: Any = sys.modules["shared.record"].__dict__["Record"]
    entries = stored.live("0")
    for entry in entries:
        made.save(record(environment_id="bench", kind="session", shard="0", **entry.model_dump()))
    for lease in stored.get_leases([entry.work_id for entry in entries]).values():
        made.save_lease(lease, None)
    return made


def main() -> None:
    as_lambda.surround()
    what, *arguments = sys.argv[1:]
    print(json.dumps(dispatch() if what == "dispatch" else beats(*arguments)))
