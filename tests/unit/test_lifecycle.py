"""The pure rules, where a table says more than a run."""

import pytest

from shared import lifecycle
from shared.lifecycle import Offer, Verdict
from shared.record import Lease
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
