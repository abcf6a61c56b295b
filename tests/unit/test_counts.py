"""What the cost model counts with (cli/cost.py, bench/cost.py), against what the code does: no machine changes it."""

import random
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr

from bench.cost import measure
from cli.cost import A_BEAT, A_ROUND
from local.work_api.state import WorkQueue
from shared import lifecycle
from shared.claiming import Claimer
from shared.config import Config
from shared.keeping import Keeper, RoundState
from shared.record import Lease
from shared.store import MemoryStore
from shared.work_api import Heartbeat, Work
from tests.simulation.outside import _holds

LOOP = Path(__file__).resolve().parents[2] / "statemachine" / "lease_loop.asl.yaml"
CONFIG = Config(table="work", environment_id="env_1")
START = 1_795_500_000_000


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> int:
        return self.now


class Counting:
    """Passes every call on, and counts it."""

    def __init__(self, inner: Any, counts: Counter[str], name: str) -> None:
        self._inner, self._counts, self._name = inner, counts, name

    def __getattr__(self, method: str) -> Any:
        found = getattr(self._inner, method)

        def counted(*arguments: Any, **named: Any) -> Any:
            self._counts[f"{self._name}.{method}"] += 1
            return found(*arguments, **named)

        return counted


class Api:
    """The emulator's queue, as the client shows it."""

    def __init__(self, clock: Clock) -> None:
        self.queue = WorkQueue("env_1", lambda: datetime.fromtimestamp(clock.now / 1000, UTC))

    def poll(self, **_: Any) -> Work | None:
        item = self.queue.poll()
        return Work.model_validate(item.body("secret")) if item else None

    def ack(self, work_id: str) -> Work:
        return Work.model_validate(self.queue.ack(work_id).body())

    def heartbeat(self, work_id: str, expected: str, desired_ttl_seconds: int | None = None) -> Heartbeat:
        return Heartbeat.model_validate(self.queue.heartbeat(work_id, expected, desired_ttl_seconds))


class Elsewhere:
    """The launch queue and the lease loop, where a call is all that counts."""

    def send(self, record: Any) -> None: ...

    def ensure(self, shard: str) -> None: ...


def claim(items: int, clock: Clock, store: MemoryStore, api: Api) -> Counter[str]:
    counts = Counter[str]()
    for number in range(items):
        api.queue.enqueue(f"sesn_{number}")
    key: Any = lambda: SecretStr("sk-x")  # noqa: E731
    parts: list[Any] = [Counting(api, counts, "api"), key, Counting(store, counts, "store")]
    parts += [Counting(Elsewhere(), counts, name) for name in ("queue", "loop")]
    make: Any = Claimer
    claimer = make(CONFIG.model_copy(update={"max_sessions": items + 1}), *parts, clock)
    assert claimer.run("me", START + 100_000) == items
    return counts


def test_calls_an_item() -> None:
    clock = Clock()
    few, many = (claim(items, clock, MemoryStore(), Api(clock)) for items in (1, 21))
    an_item = {name: (many[name] - few[name]) / 20 for name in many}
    polls = an_item.pop("api.poll")
    assert 1 <= polls < 2  # beside the items', each poller's last one
    assert an_item.pop("loop.ensure") < 1  # sixteen begin at once
    assert {name: count for name, count in an_item.items() if count} == {
        "api.ack": 1,
        "api.heartbeat": 1,
        "store.get": 1,
        "store.save": 3,
        "store.save_lease": 1,
        "queue.send": 1,
    }


def test_writes_and_calls_a_beat() -> None:
    clock, counts, store = Clock(), Counter[str](), MemoryStore()
    api = Api(clock)
    claim(10, clock, store, api)
    clock.now += 30_000
    parts: list[Any] = [Counting(api, counts, "api"), None, Counting(store, counts, "store")]
    make: Any = Keeper
    reply = make(CONFIG, *parts, clock).round(RoundState(shard="0", generation=0, round=0, empty_rounds=0))
    assert reply.live == 10
    assert counts["api.heartbeat"] == 10
    writes = counts["store.save_lease"] + counts["store.save"]
    assert writes == 10 * A_BEAT.write_units
    assert counts["store.live"] == counts["store.get_leases"] == 1


def test_transitions_a_quiet_round() -> None:
    states = yaml.safe_load(LOOP.read_text())["States"]
    quiet, at, transitions = {"to_stop": 0, "empty_rounds": 0, "round": 5, "live": 3}, "Beat", 0
    while transitions == 0 or at != "Beat":
        state = states[at]
        chosen = (choice["Next"] for choice in state.get("Choices", ()) if _holds(choice, quiet))
        at = next(chosen, state.get("Default") or state.get("Next"))
        transitions += 1
    assert transitions == A_ROUND.transitions


def lease(number: int, due_in_ms: int) -> Lease:
    due = START + due_in_ms
    return Lease(
        work_id=f"sesn_{number}",
        turn=1,
        value="v",
        ttl_seconds=300,
        accepted_sent_at=due - 30_000,
        due_at=due,
    )


def test_leases_fall_into_step_so_that_one_round_serves_all() -> None:
    leases = {f"sesn_{number}": lease(number, number * 600) for number in range(50)}
    now, rounds = START, 0
    while now < START + 3_600_000:
        due = lifecycle.due_now(list(leases.values()), now)
        assert due
        for work_id in due:
            leases[work_id] = leases[work_id].model_copy(update={"accepted_sent_at": now, "due_at": now + 30_000})
        rounds += 1
        now = min(one.due_at for one in leases.values())
    assert rounds <= 3_600 / 30 + 3


def test_no_lease_is_beaten_early_when_none_is_due() -> None:
    assert lifecycle.due_now([lease(1, 5_000), lease(2, 9_000)], START) == set()


def test_an_unanswered_beat_keeps_the_time_that_the_api_named() -> None:
    refused = lease(1, 8_000).model_copy(update={"accepted_sent_at": START - 40_000})
    assert lifecycle.due_now([refused, lease(2, 0)], START) == {"sesn_2"}


def test_an_unanswered_beat_brings_no_other_forward() -> None:
    refused = lease(1, 0).model_copy(update={"accepted_sent_at": START - 45_000})
    assert lifecycle.due_now([refused, lease(2, 9_000)], START) == {"sesn_1"}


def test_failing_beats_cost_their_own_repetition_and_no_more() -> None:
    rng = random.Random(1)
    leases = {f"sesn_{number}": lease(number, number * 60) for number in range(500)}
    now, beats, failed = START, 0, 0
    while now < START + 3_600_000:
        for work_id in lifecycle.due_now(list(leases.values()), now):
            beats += 1
            if rng.random() < 0.01:
                failed += 1
                leases[work_id] = lifecycle.after_no_answer(leases[work_id], now + 10_000, None).lease
            else:
                leases[work_id] = leases[work_id].model_copy(update={"accepted_sent_at": now, "due_at": now + 30_000})
        now = max(now + 1_000, min(one.due_at for one in leases.values()))
    assert failed > 500
    assert beats <= 500 * 120 + 2 * failed + 500


def test_the_cost_targets_hold_at_list_prices() -> None:
    costs = measure({})  # with the CPU time of a beat as it was when the targets were set
    assert costs["idle_usd"] <= 1.50
    assert costs["loop_usd_100"] <= 2e-4
    assert costs["loop_usd_10000"] <= 1.2e-4
