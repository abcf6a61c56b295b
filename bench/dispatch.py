"""A burst of work: how fast the poller takes it on, against the official SDK's poller at the same emulator.

Ours stores each item before its ack, claims it, stores that and sends it to the launch queue, on the local AWS. The
SDK's poller, draining, acks it, and its first heartbeat claims it; it stores nothing.
"""

from collections.abc import Callable
from typing import Any

from bench import far_sides
from bench.measuring import medians, side

ITEMS = 1000
ROUND_TRIPS_MS = (50, 0)
ROUNDS = 3
_PEER_SECONDS = 12  # one call after the other: its rate does not change over a burst, only its length
_ALL = 300


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """Ours, the SDK and the bare client in turns; each time a fresh emulator, table and queue."""
    results: dict[str, Any] = {}
    with far_sides.aws() as local:
        for round_trip in ROUND_TRIPS_MS:
            runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": [], "bare": []}
            for number in range(ROUNDS):
                for name, each in runs.items():
                    with far_sides.emulator(round_trip) as emulator:
                        emulator.queue(ITEMS)
                        own = local.fresh() if name == "ours" else {}
                        arguments = [_PEER_SECONDS if round_trip else _ALL] if name == "peer" else []
                        before = far_sides.cpu_ms()
                        done = side(name, ["dispatch", *arguments], {**emulator.settings(), **own})
                        done.pop("leases", None)
                        after = far_sides.cpu_ms()
                    for far in after:
                        done[f"{far}_cpu_ms"] = (after[far] - before[far]) / done["items"]
                    done["items_per_s"] = done["items"] / done["seconds"]
                    each.append(done)
                    say(f"dispatch at {round_trip} ms, round {number + 1}: {name} {done['items_per_s']:.1f} items/s")
            results[f"{round_trip}_ms"] = {name: medians(each) for name, each in runs.items()}
    fifty, none = results["50_ms"], results["0_ms"]
    return {
        **results,
        "items": ITEMS,
        "dispatch_ratio": round(fifty["ours"]["items_per_s"] / fifty["peer"]["items_per_s"], 2),
        # where both take the whole burst
        "memory_ratio": round(none["ours"]["peak_mb"] / none["peer"]["peak_mb"], 2),
    }
