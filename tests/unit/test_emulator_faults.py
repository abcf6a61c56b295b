"""Which call an injected fault hits: name, item, how often and how likely; carrying it out is tests/contract's."""

from typing import Any

import pytest
from pydantic import ValidationError

from local.work_api.faults import Fault, Faults


def faults(**what: Any) -> Faults:
    made = Faults()
    made.add(Fault.model_validate({"kind": "status"} | what))
    return made


def test_a_fault_hits_the_calls_it_names_as_often_as_it_says() -> None:
    armed = faults(call="ack", times=2)
    assert armed.due("poll", None) is None
    assert [armed.due("ack", "sesn_1") is not None for _ in range(3)] == [True, True, False]
    assert armed.left() == []


def test_any_hits_every_call_and_an_item_narrows_it() -> None:
    armed = faults(work_id="sesn_1", times=None)
    assert armed.due("stop", "sesn_1")
    assert armed.due("heartbeat", "sesn_1")
    assert armed.due("stop", "sesn_2") is None
    assert armed.due("poll", None) is None
    armed.clear()
    assert armed.due("stop", "sesn_1") is None


def test_a_seed_repeats_the_same_draws_and_a_miss_uses_up_nothing() -> None:
    def draws(seed: int) -> list[bool]:
        armed = faults(times=3, probability=0.3, seed=seed)
        return [armed.due("ack", None) is not None for _ in range(60)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(1).count(True) == 3


@pytest.mark.parametrize(
    "what", [{"kind": "unknown"}, {"call": "unknown"}, {"times": 0}, {"probability": 0}, {"status": 200}, {"more": 1}]
)
def test_what_is_no_fault_is_refused(what: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        faults(**what)
