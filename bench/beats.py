"""Keeping leases: a round of the keeper with every lease due, against the official SDK's heartbeats, 50 at once.

A round of ours reads the live index and the leases, beats, and stores each reply, on the local AWS; the SDK's side only
beats and keeps the values in memory. Lateness over half an hour is simulated (simulated.py).
"""

import statistics
from collections.abc import Callable
from typing import Any

from bench import far_sides
from bench.measuring import side

ROUND_TRIP_MS = 50
ROUNDS = {500: 4, 5000: 2}  # the first of each opens the connections


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """For each number of leases: ours, the SDK and the bare client, each with an emulator of its own."""
    results: dict[str, Any] = {}
    with far_sides.aws() as local:
        for leases, rounds in ROUNDS.items():
            results[str(leases)] = found = {}
            for name in ("ours", "peer", "bare"):
                found[name] = _one(name, leases, rounds, local)
                say(f"beats of {leases} leases: {name} {found[name]['beats_per_s']:.0f}/s")
    few = results["500"]
    return {
        **results,
        "beat_ratio": round(few["ours"]["beats_per_s"] / few["peer"]["beats_per_s"], 2),
        "cpu_ratio": round(few["ours"]["cpu_ms"] / few["peer"]["cpu_ms"], 2),
    }


def _one(name: str, count: int, rounds: int, local: far_sides.Aws) -> dict[str, float]:
    with far_sides.emulator(0) as emulator:
        emulator.queue(count)
        leases = side("bare", ["dispatch"], emulator.settings())["leases"]
        emulator.delay(ROUND_TRIP_MS)
        own = local.fresh() if name == "ours" else {}
        if own:
            local.live(own["FLEET_TABLE"], leases)
        before = far_sides.cpu_ms()
        arguments = [] if name == "bare" else [rounds]
        done = side(name, ["beats", *arguments], {**emulator.settings(), **own}, leases)
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
