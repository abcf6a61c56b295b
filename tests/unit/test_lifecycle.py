"""The pure rules, where a table says more than a run."""

import pytest

from shared import lifecycle
from shared.config import Config
from shared.lifecycle import Offer, Verdict
from shared.record import Lease, Phase, Record
from shared.work_api import CurrentState, Heartbeat, Work

BASE = "2026-11-25T08:00:00.000000Z"


def lease(ttl_seconds: int = 300) -> Lease:
    return Lease(work_id="w", turn=1, value=BASE, ttl_seconds=ttl_seconds, accepted_sent_at=0, due_at=0)


def beat(state: str, *, extended: bool, ttl_seconds: int = 300) -> Heartbeat:
    return Heartbeat(last_heartbeat="next", lease_extended=extended, state=state, ttl_seconds=ttl_seconds)


def test_the_next_beat_is_due_by_the_ttl_that_was_just_granted() -> None:
    result = lifecycle.after_beat(lease(300), beat("active", extended=True, ttl_seconds=15), 1_000)
    assert result.lease.ttl_seconds == 15
    assert result.lease.due_at == 6_000


@pytest.mark.parametrize(("ttl_seconds", "due_at"), [(300, 11_000), (15, 6_000)])
def test_the_beat_interval_is_the_owner_s_or_a_third_of_the_ttl_if_that_is_shorter(
    ttl_seconds: int, due_at: int
) -> None:
    answer = beat("active", extended=True, ttl_seconds=ttl_seconds)
    assert lifecycle.after_beat(lease(300), answer, 1_000, longest_ms=10_000).lease.due_at == due_at


@pytest.mark.parametrize(
    ("state", "extended", "over", "post", "accepted"),
    [
        ("active", True, None, None, True),
        ("active", False, None, True, True),
        ("stopping", False, None, True, True),
        ("stopping", True, None, True, True),
        ("stopped", False, "stopped", False, False),
        ("queued", False, "lost", False, False),
        ("hibernating", False, None, None, False),  # a state that we do not know ends nothing
    ],
)
def test_what_a_200_to_a_beat_means(
    state: str, extended: bool, over: str | None, post: bool | None, accepted: bool
) -> None:
    result = lifecycle.after_beat(lease(), beat(state, extended=extended), 1_000)
    assert result.lease.over == over
    assert (result.wish.post if result.wish else None) == post
    assert result.accepted == accepted


@pytest.mark.parametrize(
    ("state", "value", "renewed", "verdict"),
    [
        ("active", "2026-11-25T08:00:20.5Z", None, Verdict.OURS),
        ("active", "2026-11-25T08:00:20Z", BASE, Verdict.OURS),  # an optional fraction; a stamp not after our base
        ("stopping", "2026-11-25T08:00:20.5Z", None, Verdict.OURS),
        ("active", "2026-11-25T08:00:20.5Z", "2026-11-25T08:00:10Z", Verdict.LOST),  # re-queued in between
        ("active", "2026-11-25T08:05:00.1Z", None, Verdict.LOST),  # a whole ttl later: it lapsed in between
        ("active", BASE, None, Verdict.LOST),
        ("active", None, None, Verdict.LOST),
        ("active", "junk", None, Verdict.LOST),
        ("queued", None, None, Verdict.LOST),
        ("starting", None, None, Verdict.LOST),
        ("stopped", BASE, None, Verdict.OVER),
        ("hibernating", "2026-11-25T08:00:20.5Z", None, Verdict.UNKNOWN),
    ],
)
def test_whose_lease_a_412_to_an_echo_speaks_of(
    state: str, value: str | None, renewed: str | None, verdict: Verdict
) -> None:
    current = CurrentState(state=state, last_heartbeat=value, lease_updated_at=renewed)
    assert lifecycle.judge_echo_refusal(lease(), current) is verdict


def test_a_412_without_a_state_is_retried_until_the_lease_deadline() -> None:
    assert lifecycle.after_refused_echo(lease(), None, 294_999).wish is None
    assert lifecycle.after_refused_echo(lease(), None, 295_000).wish == lifecycle.LEASE_LOST


@pytest.mark.parametrize("secret", [None, ""])
@pytest.mark.parametrize(("hand_over_key", "offer"), [(False, Offer.REFUSE), (True, Offer.CLAIM)])
def test_a_session_without_a_secret_is_served_only_if_the_key_may_be_handed_over(
    secret: str | None, offer: Offer, *, hand_over_key: bool
) -> None:
    data = {"type": "session", "id": "sesn_1"}
    item = {"id": "sesn_1", "environment_id": "env_1", "data": data, "state": "queued", "secret": secret}
    work = Work.model_validate(item)
    assert lifecycle.judge_offer(None, work, 0, hand_over_key=hand_over_key) is offer
    assert lifecycle.open_turn(None, work, now=1, owner="me", until=2, shard="0").secret is None


def waiting(**changes: object) -> Record:
    record = Record(work_id="w", environment_id="env_1", kind="session", turn=7, phase=Phase.HELD)
    return record.model_copy(update=changes)


@pytest.mark.parametrize("weight", [0, 30, 100])
def test_the_share_of_spot_is_drawn_from_the_attempt_s_name(weight: int) -> None:
    attempts = [waiting(turn=turn) for turn in range(2_000)]
    drawn = [lifecycle.on_spot(record, weight) for record in attempts]
    assert drawn == [lifecycle.on_spot(record, weight) for record in attempts]
    assert abs(sum(drawn) - weight * 20) < 100


@pytest.mark.parametrize(
    ("changes", "spot"),
    [({}, True), ({"interruptions": 1}, True), ({"interruptions": 2}, False), ({"refusals": 1}, False)],
)
def test_after_two_interruptions_or_a_refusal_a_turn_goes_on_demand(changes: dict[str, int], *, spot: bool) -> None:
    assert lifecycle.on_spot(waiting(**changes), 100) is spot


def test_after_a_refusal_each_subnet_is_tried_alone_from_the_turn_s_own_one_on() -> None:
    tried = [lifecycle.subnets_to_try(waiting(refusals=refusals), ["a", "b", "c"]) for refusals in range(5)]
    assert tried == [["a", "b", "c"], ["b"], ["c"], ["a"], ["a", "b", "c"]]
    assert lifecycle.subnets_to_try(waiting(turn=8, refusals=1), ["a", "b", "c"]) == ["c"]


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({"sandbox_wanted_since": 1_000}, True),
        ({"sandbox_wanted_since": 1_001}, False),
        ({}, True),  # a record of an earlier version: since its turn began
        ({"sandbox_wanted_since": 1_000, "phase": Phase.LAUNCHING}, True),
        ({"sandbox_wanted_since": 1_000, "phase": Phase.LAUNCHING, "task_arn": "arn:task/1"}, False),
        ({"sandbox_wanted_since": 1_000, "phase": Phase.RUNNING}, False),
        ({"sandbox_wanted_since": 1_000, "phase": Phase.STOPPING}, False),
    ],
)
def test_the_launch_deadline_ends_only_what_waits_for_a_task(changes: dict[str, object], *, ends: bool) -> None:
    config = Config(table="work", launch_timeout_seconds=60)
    assert (lifecycle.launch_overdue(waiting(**changes), config, 61_000) is not None) is ends


def test_a_turn_held_back_for_a_missing_image_says_so_when_it_is_given_up() -> None:
    held = lifecycle.held_back(waiting(phase=Phase.LAUNCHING), 1_000, "there is no such image")
    assert (held.phase, held.attempt, held.refused) == (Phase.HELD, 2, 1)
    wish = lifecycle.launch_overdue(held, Config(table="work", launch_timeout_seconds=60), 61_000)
    assert wish
    assert wish.reason == "no sandbox could be started within 60 s: there is no such image"
