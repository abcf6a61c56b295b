"""Runs every measurement and writes the report: `make bench`."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import beats, cold_start, cost, dispatch, pickup, report, simulated
from bench.measuring import ROOT, ChildFailed
from local.stack import StackFailed, build

RESULTS = Path(__file__).parent / "results"
README, MARKS = ROOT / "README.md", ("<!-- bench -->", "<!-- /bench -->")
PARTS: dict[str, Callable[[Callable[[str], None]], dict[str, Any]]] = {
    "cold_start": cold_start.measure,
    "dispatch": dispatch.measure,
    "beats": beats.measure,
    "simulated": simulated.measure,
    "pickup": pickup.measure,
}


def line(results: dict[str, Any]) -> str:
    """The one line: every figure with a target; `-` for what was left out."""
    figures = {
        "dispatch_ratio": ("dispatch", "dispatch_ratio"),
        "memory_ratio": ("dispatch", "memory_ratio"),
        "beat_ratio": ("beats", "beat_ratio"),
        "coldstart_ratio": ("cold_start", "coldstart_ratio"),
        "idle_usd": ("cost", "idle_usd"),
        "loop_usd_100": ("cost", "loop_usd_100"),
        "loop_usd_10000": ("cost", "loop_usd_10000"),
        "pickup_p50_ms": ("pickup", "pickup_p50_ms"),
    }
    told = {name: results.get(part, {}).get(key, "-") for name, (part, key) in figures.items()}
    return "bench: " + " ".join(f"{name}={value}" for name, value in told.items())


def _into_readme(table: str) -> None:
    """Between its two marks."""
    text = README.read_text()
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    README.write_text(f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="measure these parts alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder to write to")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md as well")
    options = parser.parse_args()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {text}", file=sys.stderr, flush=True)

    results: dict[str, Any] = {"machine": report.this_machine(), "date": time.strftime("%Y-%m-%d", time.gmtime())}
    failed, status = "", 0
    try:
        with tempfile.TemporaryDirectory(prefix="sandbox-fleet-") as folder:
            build(Path(folder), say)  # what is measured is what would be deployed
        for name in options.only:
            results[name] = PARTS[name](say)
    except (ChildFailed, StackFailed, TimeoutError) as failure:
        failed, status = f"bench failed: {failure}", 1
    except KeyboardInterrupt:
        failed, status = "bench interrupted: --only measures the parts that are left", 130
    if any(name in results for name in options.only):  # what is measured is not lost
        results["cost"] = cost.measure(results)
        report.write(results, options.results)
        say(f"report in {options.results}")
    if failed:
        print(failed, file=sys.stderr)
        return status
    if options.readme:
        _into_readme(report.readme_table(results))
    print(line(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
