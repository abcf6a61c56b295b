"""The simulation's command: `python -m tests.simulation --seeds 2000`, or one seed with its history: `--seed 17`."""

import argparse
import os
import signal
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.scenario import Outcome, run

SHOWN = 5  # violating seeds whose first lines are printed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=300, help="how many seeds to play, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="play this one alone and print its history if it goes wrong")
    parser.add_argument("--history", action="store_true", help="print the history even if it goes right")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.seed is not None:
        return alone(options.seed, always=options.history)
    return many(range(options.first, options.first + options.seeds), options.jobs)


def alone(seed: int, *, always: bool) -> int:
    outcome = run(seed, keep_history=always)
    for at, who, what in outcome.history:
        print(f"{at / 1000:10.3f} s  {who:16} {what}")
    return told([outcome])


def many(seeds: Iterable[int], jobs: int) -> int:
    """Progress goes to stderr; Ctrl-C ends it with what was found so far."""
    seeds, outcomes = list(seeds), list[Outcome]()
    with ProcessPoolExecutor(jobs, initializer=_ignore_interrupts) as pool:
        try:
            for outcome in pool.map(run, seeds, chunksize=8):
                outcomes.append(outcome)
                if sys.stderr.isatty() and len(outcomes) % 20 == 0:
                    print(f"\r{len(outcomes)}/{len(seeds)} seeds", end="", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            print("\ninterrupted", file=sys.stderr)
            told(outcomes)
            return 130
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    return told(outcomes)


def told(outcomes: list[Outcome]) -> int:
    wrong = [outcome for outcome in outcomes if outcome.violations]
    for outcome in wrong[:SHOWN]:
        print(f"seed {outcome.seed}: {'; '.join(outcome.violations)}")
        print(f"  replay: make simulate SEED={outcome.seed}")
    if len(wrong) > SHOWN:
        print(f"and {len(wrong) - SHOWN} more: {' '.join(str(one.seed) for one in wrong[SHOWN:])}")
    steps, faults = (sum(getattr(one, name) for one in outcomes) for name in ("steps", "faults"))
    violations = sum(len(one.violations) for one in outcomes)
    print(f"simulation: seeds={len(outcomes)} steps={steps} faults={faults} violations={violations}")
    return 1 if wrong else 0


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
