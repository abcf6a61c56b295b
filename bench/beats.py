"""Keeping leases: a round of the keeper with every lease due, against the official SDK's heartbeats, 50 at once.

The SDK's side beats and keeps the values in its memory. So does ours in one measurement (`unstored`); in the other
(`ours`) it does what it does when deployed: it reads the live index and the leases, and stores each reply, on the local
AWS, which works on the same CPUs. Lateness over half an hour is simulated (simulated.py).
"""

import statistics
from collections.abc import Callable
from typing import Any

from bench import far_sides
from bench.measuring import side

ROUND_TRIP_MS = 50
ROUNDS = {500: 6, 5000: 2}  # the first of each opens the connections
SIDES = {"unstored": ("ours", "memory"), "ours": ("ours", "stored"), "peer": ("peer",), "bare": ("bare",)}


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """For each number of leases: ours both ways, the SDK and the bare client, each with an emulator of its own."""
    results: dict[str, Any] = {}
    with far_sides.aws() as local:
        for leases, rounds in ROUNDS.items():
            results[str(leases)] = found = {}
            for name in SIDES:
                found[name] = _one(name, leases, rounds, local)
                say(f"beats of {leases} leases: {name} {found[name]['beats_per_s']:.0f}/s")
    few = results["500"]
    return {
        **results,
        "beat_ratio": round(few["unstored"]["beats_per_s"] / few["peer"]["beats_per_s"], 2),
        "stored_ratio": round(few["ours"]["beats_per_s"] / few["peer"]["beats_per_s"], 2),
        "cpu_ratio": round(few["ours"]["cpu_ms"] / few["peer"]["cpu_ms"], 2),
    }


def _one(name: str, count: int, rounds: int, local: far_sides.Aws) -> dict[str, float]:
    with far_sides.emulator(0) as emulator:
        emulator.queue(count)
        leases = side("bare", ["dispatch"], emulator.settings())["leases"]
        emulator.delay(ROUND_TRIP_MS)
        side_name, *where = SIDES[name]
        own = local.fresh() if where else {}
        if own:
            local.live(own["FLEET_TABLE"], leases)
        before = far_sides.cpu_ms()
        arguments = [] if name == "bare" else [rounds, *where]
        done = side(side_name, ["beats", *arguments], {**emulator.settings(), **own}, leases)
        after = far_sides.cpu_ms()
    runs = done["runs"]
    beaten = sum(run["beats"] for run in runs)
    return {
        "seconds": round(statistics.median(run["seconds"] for run in runs), 2),
        "beats_per_s": round(statistics.median(run["beats"] / run["seconds"] for run in runs), 1),
        "cpu_ms": round(statistics.median(run["cpu_ms"] for run in runs), 2),
        "peak_mb": round(done["peak_mb"], 1),
        **{f"{far}_cpu_ms": round((after[far] - before[far]) / beaten, 2) for far in after},
    }
