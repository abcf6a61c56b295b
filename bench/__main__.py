"""Runs every measurement and writes the report: `make bench`."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import beats, cold_start, dispatch, report
from bench.measuring import ChildFailed
from local.stack import StackFailed

RESULTS = Path(__file__).parent / "results"
PARTS: dict[str, Callable[[Callable[[str], None]], dict[str, Any]]] = {
    "cold_start": cold_start.measure,
    "dispatch": dispatch.measure,
    "beats": beats.measure,
}


def line(results: dict[str, Any]) -> str:
    """The one line: every figure with a target; `-` for what was left out."""
    figures = {
        "dispatch_ratio": ("dispatch", "dispatch_ratio"),
        "memory_ratio": ("dispatch", "memory_ratio"),
        "beat_ratio": ("beats", "beat_ratio"),
        "coldstart_ratio": ("cold_start", "coldstart_ratio"),
    }
    told = {name: results.get(part, {}).get(key, "-") for name, (part, key) in figures.items()}
    return "bench: " + " ".join(f"{name}={value}" for name, value in told.items())


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="measure these parts alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {text}", file=sys.stderr, flush=True)

    results: dict[str, Any] = {"machine": report.this_machine(), "date": time.strftime("%Y-%m-%d", time.gmtime())}
    try:
        for name in options.only:
            results[name] = PARTS[name](say)
    except (ChildFailed, StackFailed) as failure:
        print(f"bench failed: {failure}", file=sys.stderr)
        return 1
    report.write(results, options.results)
    say(f"report in {options.results}")
    print(line(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
