"""The lease loop's own rules (statemachine/lease_loop.asl.yaml), on an ASL interpreter with fake functions."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from moto import mock_aws

from tests.unit import moto_asl
from tests.unit.moto_asl import Asl

DEFINITION = Path(__file__).parents[2] / "statemachine" / "lease_loop.asl.yaml"
NAME = "fleet-lease-loop"
SUBSTITUTIONS = {
    "KeeperArn": moto_asl.lambda_arn("keeper"),
    "StopperArn": moto_asl.lambda_arn("stopper"),
    "LoopArn": moto_asl.state_machine_arn(NAME),
}
HISTORY_LIMIT = 25_000
START = {"shard": "0", "generation": 4, "round": 0, "empty_rounds": 0}


class OutOfOrder(Exception):
    """What a failing function raises."""


@dataclass
class Fakes:
    """Keeper and stopper: `live` and `to_stop` by beat (then zero), `failing_beats` by call, counted from 0."""

    live: list[int] = field(default_factory=list)
    to_stop: list[int] = field(default_factory=list)
    failing_beats: set[int] = field(default_factory=set)
    stopper_fails: bool = False
    stopper_is_not_invoked: bool = False
    beats: list[dict[str, Any]] = field(default_factory=list)
    stops: list[dict[str, Any]] = field(default_factory=list)
    calls: int = 0

    def keeper(self, state: dict[str, Any]) -> dict[str, Any]:
        call, self.calls = self.calls, self.calls + 1
        if call in self.failing_beats:
            raise OutOfOrder("keeper")
        turn = len(self.beats)
        self.beats.append(state)
        live = self.live[turn] if turn < len(self.live) else 0
        return {
            "shard": state["shard"],
            "generation": state["generation"],
            "round": state["round"] + 1,
            "empty_rounds": 0 if live else state["empty_rounds"] + 1,
            "live": live,
            "to_stop": self.to_stop[turn] if turn < len(self.to_stop) else 0,
            "wait_until": "2020-01-01T00:00:00Z",
        }

    def stopper(self, event: dict[str, Any]) -> dict[str, int]:
        self.stops.append(event)
        if self.stopper_is_not_invoked:
            raise moto_asl.NotInvoked
        if self.stopper_fails:
            raise OutOfOrder("stopper")
        return {"closed": 1}


@pytest.fixture
def fakes() -> Fakes:
    return Fakes()


@pytest.fixture
def definition() -> dict[str, Any]:
    return moto_asl.load(DEFINITION, SUBSTITUTIONS)


@pytest.fixture
def asl(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asl]:
    with mock_aws(config=moto_asl.MOTO_CONFIG):
        yield moto_asl.install(monkeypatch, {"keeper": fakes.keeper, "stopper": fakes.stopper})


@pytest.fixture
def loop(asl: Asl, definition: dict[str, Any]) -> str:
    return asl.create(NAME, definition)


def limit_of(definition: dict[str, Any]) -> int:
    """The round at which the loop hands over; every Choice that knows it says the same."""
    limits = {
        choice["NumericGreaterThanEquals"]
        for state in definition["States"].values()
        for choice in state.get("Choices", [])
        if choice["Next"] == "HandOver"
    }
    (limit,) = limits
    return int(limit)


def test_beats_until_three_rounds_in_a_row_were_empty(asl: Asl, loop: str, fakes: Fakes) -> None:
    fakes.live = [2, 0, 0, 1]
    assert asl.run(loop, "lease-loop-0-4", START) == "SUCCEEDED"
    assert [beat["round"] for beat in fakes.beats] == list(range(7))
    assert [beat["empty_rounds"] for beat in fakes.beats] == [0, 0, 1, 2, 0, 1, 2]
    assert fakes.stops == []
    assert asl.names(loop) == {"lease-loop-0-4"}


def test_a_beat_is_told_the_loops_state_and_nothing_else(asl: Asl, loop: str, fakes: Fakes) -> None:
    fakes.live = [1]
    asl.run(loop, "lease-loop-0-4", START)
    assert fakes.beats[0] == START
    assert set(fakes.beats[1]) == set(START)


def test_waits_until_the_beat_said(asl: Asl, loop: str, fakes: Fakes) -> None:
    fakes.live = [1]
    asl.run(loop, "lease-loop-0-4", START)
    assert len(asl.waits) == len(fakes.beats) - 1
    assert all(wait <= 0 for wait in asl.waits), "a time that has passed is not waited for"


def test_the_stopper_is_called_in_rounds_with_something_to_stop(asl: Asl, loop: str, fakes: Fakes) -> None:
    fakes.live, fakes.to_stop = [2, 2, 1], [0, 1, 0]
    assert asl.run(loop, "lease-loop-0-4", START) == "SUCCEEDED"
    assert fakes.stops == [{"shard": "0"}]
    assert fakes.beats[2]["round"] == 2, "the stopper's reply does not replace the loop's state"


@pytest.mark.parametrize("fault", ["stopper_fails", "stopper_is_not_invoked"])
def test_a_failing_stopper_does_not_keep_the_beats_from_going_out(
    asl: Asl, loop: str, fakes: Fakes, fault: str
) -> None:
    fakes.live, fakes.to_stop = [1, 1], [1, 1]
    setattr(fakes, fault, True)
    assert asl.run(loop, "lease-loop-0-4", START) == "SUCCEEDED"
    assert [beat["round"] for beat in fakes.beats] == list(range(5))


def test_a_stop_is_started_not_waited_for(asl: Asl, loop: str, fakes: Fakes) -> None:
    """Its result, an error too, is nobody's: a slow Stop once made the beats 30 s late."""
    fakes.live, fakes.to_stop, fakes.stopper_fails = [1], [1], True
    asl.run(loop, "lease-loop-0-4", START)
    assert fakes.stops == [{"shard": "0"}]
    history = asl.events(loop, "lease-loop-0-4")
    assert "TaskFailed" not in history


def test_one_failed_beat_is_retried_within_its_round(asl: Asl, loop: str, fakes: Fakes) -> None:
    fakes.live, fakes.failing_beats = [1], {0}
    assert asl.run(loop, "lease-loop-0-4", START) == "SUCCEEDED"
    assert fakes.beats[0]["round"] == 0
    assert 10 not in asl.waits


def test_a_round_that_fails_for_good_is_counted_and_the_loop_goes_on(
    asl: Asl, loop: str, fakes: Fakes, definition: dict[str, Any]
) -> None:
    tries = 1 + sum(retrier["MaxAttempts"] for retrier in definition["States"]["Beat"]["Retry"])
    fakes.live, fakes.failing_beats = [1], set(range(2 * tries))
    assert asl.run(loop, "lease-loop-0-4", START) == "SUCCEEDED"
    assert fakes.beats[0] == START | {"round": 2}
    assert asl.waits[:2] == [10, 10]


def test_failed_rounds_do_not_count_as_empty(asl: Asl, loop: str, fakes: Fakes) -> None:
    fakes.failing_beats = set(range(1, 40))
    asl.run(loop, "lease-loop-0-4", START)
    assert [beat["empty_rounds"] for beat in fakes.beats] == [0, 1, 2]


def test_hands_over_at_the_limit_to_the_next_generation(
    asl: Asl, loop: str, fakes: Fakes, definition: dict[str, Any]
) -> None:
    """FIELD_NOTES 21."""
    fakes.live = [1, 1, 1]
    last_rounds = START | {"round": limit_of(definition) - 2}
    assert asl.run(loop, "lease-loop-0-4", last_rounds) == "SUCCEEDED"
    assert asl.ended(loop, "lease-loop-0-5") == "SUCCEEDED"
    assert asl.input_of(loop, "lease-loop-0-5") == {"shard": "0", "generation": 5, "round": 0, "empty_rounds": 0}
    assert asl.names(loop) == {"lease-loop-0-4", "lease-loop-0-5"}


@pytest.mark.parametrize("not_invoked", [False, True])
def test_hands_over_as_well_when_the_last_round_stops_something(
    asl: Asl, loop: str, fakes: Fakes, definition: dict[str, Any], *, not_invoked: bool
) -> None:
    fakes.live, fakes.to_stop, fakes.stopper_is_not_invoked = [1], [1], not_invoked
    assert asl.run(loop, "lease-loop-0-4", START | {"round": limit_of(definition) - 1}) == "SUCCEEDED"
    assert asl.ended(loop, "lease-loop-0-5") == "SUCCEEDED"


def test_hands_over_as_well_when_the_last_round_fails(
    asl: Asl, loop: str, fakes: Fakes, definition: dict[str, Any]
) -> None:
    tries = 1 + sum(retrier["MaxAttempts"] for retrier in definition["States"]["Beat"]["Retry"])
    fakes.failing_beats = set(range(tries))
    assert asl.run(loop, "lease-loop-0-4", START | {"round": limit_of(definition) - 1}) == "SUCCEEDED"
    assert asl.ended(loop, "lease-loop-0-5") == "SUCCEEDED"


def test_a_successor_that_exists_already_is_not_an_error(
    asl: Asl, loop: str, fakes: Fakes, definition: dict[str, Any]
) -> None:
    asl.run(loop, "lease-loop-0-5", START | {"generation": 5})
    before = len(fakes.beats)
    assert asl.run(loop, "lease-loop-0-4", START | {"round": limit_of(definition) - 1}) == "SUCCEEDED"
    assert len(fakes.beats) == before + 1
    assert asl.names(loop) == {"lease-loop-0-4", "lease-loop-0-5"}


def test_no_state_can_end_the_loop_by_an_error(definition: dict[str, Any]) -> None:
    for name, state in definition["States"].items():
        assert state["Type"] != "Fail"
        if state["Type"] == "Task":
            assert state["Catch"][-1]["ErrorEquals"] == ["States.ALL"], name
        if state["Type"] == "Choice":
            assert "Default" in state, name


def most_events(definition: dict[str, Any]) -> int:
    """Events of the worst round: both tasks use up their retries, and every state on the way is passed."""

    def task(name: str) -> int:
        tries = 1 + sum(int(retrier["MaxAttempts"]) for retrier in definition["States"][name]["Retry"])
        return 2 + 3 * tries  # entered, exited; scheduled, started and ended a try

    choice = wait = 2
    passed = task("Beat") + choice + task("Stop") + choice + wait
    failed = task("Beat") + 2 + choice + wait
    return max(passed, failed)


def test_the_history_stays_under_its_limit_when_every_round_goes_wrong(definition: dict[str, Any]) -> None:
    """FIELD_NOTES 21: a loop of twelve hours ended at 25,000 events."""
    hand_over = 40  # its tries, Done, the execution's own two
    assert limit_of(definition) * most_events(definition) + hand_over < HISTORY_LIMIT


def test_the_counted_events_are_those_of_a_real_history(
    asl: Asl, loop: str, fakes: Fakes, definition: dict[str, Any]
) -> None:
    rounds = 3
    fakes.live, fakes.to_stop, fakes.stopper_is_not_invoked = [1] * rounds, [1] * rounds, True
    fakes.failing_beats = {0, 1, 3, 4, 6, 7}  # each round succeeds at its third try
    asl.run(loop, "lease-loop-0-4", START)
    empty = 3 * (2 + 3 + 2 + 2) - 2  # Beat at its first try, Choice, Wait; none after the last
    done_and_executions_own = 4
    expected = rounds * most_events(definition) + empty + done_and_executions_own
    assert len(asl.events(loop, "lease-loop-0-4")) == expected
