"""The simulation in `make test`: some hundred seeds, and the regression seeds that once found a bug."""

from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.simulation.scenario import run

SEEDS = 240


def test_nothing_is_lost_and_nothing_doubled_whatever_fails() -> None:
    """FIELD_NOTES 1: a crash at every step loses nothing; DESIGN §10 holds at every step."""
    with ProcessPoolExecutor() as pool:
        outcomes = list(pool.map(run, range(SEEDS), chunksize=8))
    assert {outcome.seed: outcome.violations for outcome in outcomes if outcome.violations} == {}
    assert sum(outcome.faults for outcome in outcomes) > SEEDS, "the faults were injected"


@pytest.mark.parametrize("seed", [3, 155])
def test_a_seed_is_replayed_step_by_step(seed: int) -> None:
    assert run(seed, keep_history=True) == run(seed, keep_history=True)
