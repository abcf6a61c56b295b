"""One seed's run: what users, other workers and misfortune do is drawn from the seed, then everything must settle."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from shared.config import SHARD
from tests.simulation.fleet import START, Fleet

FAULTS_MS = 900_000
SETTLE_MS = 6 * 3_600_000  # the longest repair: a hung sandbox's wall clock, then its relaunches


@dataclass(frozen=True)
class Outcome:
    """What a seed came to."""

    seed: int
    steps: int
    faults: int
    violations: tuple[str, ...]
    history: tuple[tuple[int, str, str], ...]


def run(seed: int, *, keep_history: bool = False) -> Outcome:
    """Play a seed to its end."""
    fleet = Fleet(seed, faults_until_ms=FAULTS_MS)
    _plan(fleet)
    try:
        fleet.machine.run(START + FAULTS_MS, lambda: bool(fleet.violations))
        fleet.machine.run(START + SETTLE_MS, lambda: bool(fleet.violations) or fleet.settled())
    finally:
        fleet.close()
    if not fleet.violations:
        fleet.violations += [f"not settled: {open_}" for open_ in fleet.unsettled()]
    if not fleet.violations:
        fleet.check_end()
    history = tuple(fleet.machine.history) if fleet.violations or keep_history else ()
    faults = sum(fleet.faults.counts.values())
    return Outcome(seed, fleet.machine.steps, faults, tuple(fleet.violations), history)


def _plan(fleet: Fleet) -> None:
    machine, rng = fleet.machine, fleet.machine.rng
    fleet.faults.rate = rng.choice([0, 0.01, 0.02, 0.04, 0.08])

    def at(action: Callable[[], object], latest: int = FAULTS_MS) -> None:
        machine.later(rng.randint(0, latest - 1), action)

    if rng.random() < 0.3:
        fleet.slips = 0.3
        machine.later(FAULTS_MS, lambda: setattr(fleet, "slips", 0.0))
    if fleet.seed % 10 == 9:
        machine.later(FAULTS_MS // 3, lambda: fleet.loops.start_twin(SHARD))
    fleet.schedule("poller", 60_000)
    fleet.schedule("janitor", 300_000)
    for _ in range(rng.choice([1, 1, 2, 3, 5])):
        session = fleet.new_session() if rng.random() < 0.5 else None

        def begin(known: object = session) -> None:
            one = fleet.new_session() if known is None else known
            for _ in range(rng.choice([0, 0, 1, 2])):
                machine.later(rng.randint(1_000, 400_000), lambda: fleet.message(one))  # type: ignore[arg-type]
            if rng.random() < 0.25:
                force = rng.random() < 0.5
                machine.later(rng.randint(1_000, 400_000), lambda: fleet.ask_to_stop(one, force=force))  # type: ignore[arg-type]

        at(begin, FAULTS_MS // 2)
    if rng.random() < 0.15:
        at(lambda: fleet.queue.enqueue("work_check", "healthcheck"))
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 8)):
            at(lambda: machine.spawn("foreign", fleet.foreign_worker))
    if rng.random() < 0.2:
        at(fleet.rotate_key)
    if rng.random() < 0.25:
        seconds = rng.choice([20, 120, 400])
        at(lambda: fleet.api_goes_away(seconds))
    if rng.random() < 0.2:
        at(lambda: setattr(fleet.fargate, "full_until", machine.now + rng.randint(30_000, 600_000)))
    if rng.random() < 0.1:
        longest = rng.choice([600_000, 3 * 3_600_000])
        whose = rng.choice(["definition", "definition", "definition-2"])
        at(lambda: fleet.fargate.image_goes_missing(rng.randint(30_000, longest), whose))
    if rng.random() < 0.1:
        at(lambda: setattr(fleet.fargate, "reclaiming_spot_until", machine.now + rng.randint(30_000, 600_000)))
    if rng.random() < 0.1:
        at(lambda: fleet.fargate.subnets_full_until.update({"subnet-1": machine.now + rng.randint(30_000, 3_600_000)}))
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 3)):
            order = rng.choice(["stop", "force", "retry", "retry"])
            at(partial(fleet.operate, order))
    if rng.random() < 0.1:
        at(lambda: fleet.pause(paused=True))
        machine.later(FAULTS_MS, lambda: fleet.pause(paused=False))
