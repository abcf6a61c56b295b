"""What the control plane costs at list prices (shared/prices.toml): an idle month, a session-hour of the lease loop.

Counts are the code's (cli/cost.py; tests/unit/test_counts.py holds them to it); the CPU time of a beat is measured
(beats.py). `python -m bench.cost` works it out from the last results.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bench.measuring import ROOT
from cli.cost import A_BEAT, A_ROUND, PRICES, Stack, Unit, read_prices
from shared.keeping import BEATS_AT_ONCE

SESSIONS = (1, 10, 100, 1_000, 10_000)
SHARD_SESSIONS = 500  # MaxSessions' most: more sessions are so many stacks or shards
BEAT_SECONDS, ROUND_TRIP_SECONDS = 30, 0.05
MONTH_HOURS, MB_OF_ONE_VCPU = 730, 1769  # Lambda gives CPU in proportion to memory
TRANSITIONS_OF_A_LOOP_EACH = 3  # Wait, Task, Choice
_WORKER_VCPU, _WORKER_GB = 0.25, 0.5  # the smallest Fargate task, for the SDK's worker
_UNMEASURED_CPU_MS = {"ours": 4.0, "peer": 4.0}


class _Template(yaml.SafeLoader):
    """Ignores what CloudFormation's tags mean."""


_Template.add_multi_constructor("!", lambda *_: None)


def measure(results: Mapping[str, Any]) -> dict[str, Any]:
    """All of it, in USD; with the CPU times of `results`, if they hold any."""
    template = yaml.load((ROOT / "template.yaml").read_text(), _Template)  # noqa: S506  a SafeLoader
    kinds = [resource["Type"] for resource in template["Resources"].values()]
    prices = read_prices(PRICES)
    few = results.get("beats", {}).get("500", {})
    cpu_ms = {side: few.get(side, {}).get("cpu_ms", unmeasured) for side, unmeasured in _UNMEASURED_CPU_MS.items()}
    memory = template["Resources"]["KeeperFunction"]["Properties"]["MemorySize"]
    plain = Stack(prices, secrets=2)  # with the webhook's
    watched = kinds.count("AWS::CloudWatch::Alarm") * prices["cloudwatch"]["alarm_month"]
    watched += kinds.count("AWS::CloudWatch::Dashboard") * prices["cloudwatch"]["dashboard_month"]
    loops = {str(n): _session_hours(plain, n, memory, cpu_ms) for n in SESSIONS}
    return {
        "as_of": prices["as_of"],
        "region": prices["region"],
        "cpu_ms": cpu_ms,
        "keeper_mb": memory,
        "idle_usd": round(plain.idle_hour() * MONTH_HOURS + _secret_reads(prices), 2),
        "observability_usd": round(watched, 2),
        "session_hours": loops,
        "loop_usd_100": loops["100"]["ours"],
        "loop_usd_10000": loops["10000"]["ours"],
    }


def _secret_reads(prices: Mapping[str, Any]) -> float:
    """A month's, idle: poller and janitor each read the key anew every five minutes (shared/stored_key.py)."""
    return float(2 * 12 * MONTH_HOURS * prices["secrets_manager"]["call"])


def _session_hours(stack: Stack, sessions: int, memory_mb: int, cpu_ms: Mapping[str, float]) -> dict[str, Any]:
    prices, rounds = stack.prices, 3600 / BEAT_SECONDS
    shards = math.ceil(sessions / SHARD_SESSIONS)
    leases = sessions / shards
    seconds = keeper_seconds(leases, memory_mb, cpu_ms["ours"])
    a_round = stack.unit(Unit(1, 0, A_ROUND.transitions, leases * A_BEAT.write_units, log_kb=A_ROUND.log_kb))
    a_round += stack.unit(Unit(read_units=A_ROUND.read_units + leases * A_BEAT.read_units))
    a_round += seconds * memory_mb / 1024 * prices["lambda"]["gb_second_arm64"]
    a_round += prices["secrets_manager"]["call"] * BEAT_SECONDS / 300
    each = rounds * TRANSITIONS_OF_A_LOOP_EACH * prices["step_functions"]["transition"]
    workers = math.ceil(sessions / BEAT_SECONDS * cpu_ms["peer"] / 1000 / _WORKER_VCPU)
    rate = prices["fargate"]["arm64"]
    worker = _WORKER_VCPU * rate["vcpu_hour"] + _WORKER_GB * rate["gb_hour"] + prices["network"]["public_ipv4_hour"]
    return {
        "ours": float(f"{rounds * a_round * shards / sessions:.3g}"),
        "loop_each": float(f"{each:.3g}"),
        "worker": float(f"{workers * worker / sessions:.3g}"),
        "keeper_s": round(seconds, 2),
    }


def keeper_seconds(leases: float, memory_mb: int, cpu_ms: float) -> float:
    """How long a round takes on Lambda: its calls wait BEATS_AT_ONCE at a time, or its share of a CPU is the limit."""
    vcpu = min(1.0, memory_mb / MB_OF_ONE_VCPU)  # one interpreter uses no second one
    return 2 * ROUND_TRIP_SECONDS + max(leases / BEATS_AT_ONCE * 2 * ROUND_TRIP_SECONDS, leases * cpu_ms / 1000 / vcpu)


def main() -> None:
    file = Path(__file__).parent / "results/results.json"
    print(json.dumps(measure(json.loads(file.read_text()) if file.exists() else {}), indent=1))


if __name__ == "__main__":
    main()
