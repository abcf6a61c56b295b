"""A stopper's round is bounded; what it leaves the next one does (DESIGN §7)."""

from typing import Any

from shared import lifecycle
from shared.config import Config
from shared.lifecycle import StopWish
from shared.record import Outcome, Phase, Record
from shared.stopping import ROUND_BUDGET_MS, Stopper
from shared.store import MemoryStore
from shared.work_api import Work

STOPS, STEP_MS = 500, 100


class SlowStore(MemoryStore):
    """Each write takes a tenth of a second of the clock."""

    now = 1_800_000_000_000

    def save(self, record: Record) -> Record:
        self.now += STEP_MS
        return super().save(record)


def test_of_500_stops_a_round_does_what_10_seconds_allow_and_the_next_rounds_the_rest() -> None:
    store = SlowStore()
    wish = StopWish("a stop was requested", Outcome.STOPPED, post=False)
    for n in range(STOPS):
        data = {"type": "session", "id": f"sesn_{n}"}
        work = Work.model_validate(
            {"id": f"sesn_{n}", "environment_id": "env_1", "data": data, "state": "queued", "secret": "s"}
        )
        received = store.save(lifecycle.open_turn(None, work, now=store.now, owner="me", until=0, shard="0"))
        store.save(lifecycle.want_stop(lifecycle.held(received, store.now), wish, store.now))
    nothing: Any = None
    stopper = Stopper(Config(table="work"), nothing, nothing, store, nothing, nothing, lambda: store.now)
    rounds = []
    while store.live("0"):
        began = store.now
        assert stopper.round("0") > 0, "each round gets on"
        rounds.append(store.now - began)
    assert max(rounds) <= ROUND_BUDGET_MS + 8 * STEP_MS, "what had begun is finished, nothing more is begun"
    assert len(rounds) > 2
    assert all(
        record and record.phase is Phase.STOPPED for record in map(store.get, (f"sesn_{n}" for n in range(STOPS)))
    )
