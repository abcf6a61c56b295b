"""What a session's sandboxes are charged, how a record keeps it, and what `fleet cost` makes of it."""

import csv
import io
import json
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from cli import cost
from cli.terminal import Failure
from shared import lifecycle
from shared.diagnose import diagnose
from shared.record import SPENT_ENTRIES, Phase, Record, Spent
from shared.sandboxes import spent_on
from shared.wishes import Wishes
from shared.work_api import Work

NOW = 1_800_000_000_000
TODAY = datetime(2026, 11, 25, 6, tzinfo=UTC)
PRICES = cost.read_prices(cost.PRICES)
STACK = cost.Stack(PRICES, made=date(2026, 11, 1))
HOUR = Spent(day="2026-11-24", cpu=1024, memory=2048, disk=20, spot=False, seconds=3600)
STOPPED = {
    "cpu": "1024",
    "memory": "2048",
    "ephemeralStorage": {"sizeInGiB": 20},
    "capacityProviderName": "FARGATE",
    "lastStatus": "STOPPED",
    "pullStartedAt": "2026-11-24T08:00:00.000Z",
    "startedAt": "2026-11-24T08:00:30.000Z",
    "stoppedAt": "2026-11-24T08:59:59.200Z",
    "containers": [{"name": "sandbox", "exitCode": 1}],
}


def running(**changes: Any) -> Record:
    return Record(
        work_id="w",
        environment_id="env",
        kind="session",
        session_id="sesn_1",
        turn=NOW,
        phase=Phase.RUNNING,
        running_since=NOW,
    ).model_copy(update=changes)


def ended(record: Record, task: dict[str, Any]) -> Record:
    after = lifecycle.after_container_stopped(
        record, diagnose(task), 1, 5, now=NOW, max_attempts=3, spent=spent_on(task)
    )
    assert after
    return after


# --- what ECS tells of a task ---------------------------------------------------------------------------------


def test_a_task_is_charged_from_its_pull_to_its_end_in_whole_seconds() -> None:
    assert spent_on(STOPPED) == HOUR
    described = STOPPED | {
        name: datetime.fromisoformat(str(STOPPED[name])) for name in ("pullStartedAt", "startedAt", "stoppedAt")
    }
    assert spent_on(described) == HOUR


@pytest.mark.parametrize(
    ("changes", "charged"),
    [
        ({"stoppedAt": "2026-11-24T08:00:05Z"}, {"seconds": 60}),
        ({"capacityProviderName": "FARGATE_SPOT"}, {"spot": True}),
        ({"ephemeralStorage": {"sizeInGiB": 100}}, {"disk": 100}),
        ({"ephemeralStorage": None}, {"disk": 20}),
    ],
)
def test_a_charge_holds_what_decides_its_price(changes: dict[str, Any], charged: dict[str, Any]) -> None:
    assert spent_on(STOPPED | changes) == HOUR.model_copy(update=charged)


@pytest.mark.parametrize(
    "changes",
    [{"pullStartedAt": None, "startedAt": None}, {"stoppedAt": "soon"}, {"cpu": "fast"}, {"memory": None}, {"cpu": -1}],
)
def test_what_ecs_does_not_tell_is_not_guessed(changes: dict[str, Any]) -> None:
    assert spent_on(STOPPED | changes) is None


def test_a_task_that_runs_is_charged_until_now() -> None:
    runs = {name: value for name, value in STOPPED.items() if name != "stoppedAt"}
    until = spent_on(runs, datetime(2026, 11, 24, 8, 10, tzinfo=UTC))
    assert until
    assert until.seconds == 600


# --- what a record keeps --------------------------------------------------------------------------------------


def test_a_record_sums_up_what_is_alike_and_keeps_it_over_its_turns() -> None:
    once = ended(running(), STOPPED)
    twice = ended(running(spent=once.spent), STOPPED)
    assert twice.spent == (HOUR.model_copy(update={"sandboxes": 2, "seconds": 7200}),)
    on_spot = ended(running(spent=twice.spent), STOPPED | {"capacityProviderName": "FARGATE_SPOT"})
    tagged = ended(running(spent=on_spot.spent, wishes=Wishes(tag="research")), STOPPED)
    assert [(entry.spot, entry.tag, entry.sandboxes) for entry in tagged.spent] == [
        (False, None, 2),
        (True, None, 1),
        (False, "research", 1),
    ]
    item = {"id": "w", "environment_id": "env", "data": {"type": "session", "id": "sesn_1"}, "state": "queued"}
    offered = Work.model_validate(item)
    closed = lifecycle.closed(tagged, NOW, retention_seconds=60)
    following = lifecycle.open_turn(closed, offered, now=NOW + 1, owner="me", until=NOW, shard="0")
    assert following.spent == tagged.spent


def test_what_is_not_told_or_has_no_room_is_counted_as_unknown() -> None:
    untold = ended(running(), STOPPED | {"stoppedAt": None})
    assert (untold.spent, untold.spent_untold) == ((), 1)
    never_ran = ended(running(phase=Phase.LAUNCHING, running_since=None), {"lastStatus": "STOPPED"})
    assert never_ran.spent_untold == 0
    full = tuple(HOUR.model_copy(update={"disk": 21 + n, "sandboxes": 2}) for n in range(SPENT_ENTRIES))
    after = ended(running(spent=full), STOPPED)
    assert after.spent == (*full[1:], HOUR)
    assert after.spent_untold == 2


# --- what it costs --------------------------------------------------------------------------------------------


def test_a_sandbox_costs_what_a_hand_calculation_says() -> None:
    # an hour of 1 vCPU, 2 GB, arm64, public address: 0.03238 + 2 * 0.00356 + 0.005
    assert STACK.sandbox(HOUR) == pytest.approx(0.0445)
    # half an hour of 2 vCPU, 4 GB, 50 GiB on Spot, x86, private: (2 * 0.012144 + 4 * 0.0013335 + 30 * 0.000111) / 2
    large = Spent(day="2026-11-24", cpu=2048, memory=4096, disk=50, spot=True, seconds=1800)
    assert replace(STACK, arm=False, public_ip=False).sandbox(large) == pytest.approx(0.016476)


def test_the_control_plane_costs_what_a_hand_calculation_says() -> None:
    # a minute: poll 2e-7 + 0.2 * 0.25 * 1.33334e-5 + 1e-6 + 3 * 1.25e-7 + 5e-7, queue 15 * 4e-7, a fifth of a sweep
    minute = 2.74167e-6 + 6e-6 + (2e-7 + 3.33335e-6 + 1e-6 + 6.25e-7 + 6.25e-7 + 1e-6) / 5
    idle = replace(STACK, secrets=2, alarms=25, dashboards=1).idle_hour()
    assert idle * 730 == pytest.approx(60 * 730 * minute + 2 * 0.40 + 25 * 0.10 + 3.00, rel=1e-4)
    # an hour of one sandbox: 120 rounds and beats, one launch, 15 metrics in two clock hours
    a_round = 2e-7 + 0.3 * 0.25 * 1.33334e-5 + 3 * 25e-6 + 2 * 1.25e-7 + 5e-7
    beat = 0.01 * 0.25 * 1.33334e-5 + 6.25e-7 + 1.25e-7
    launch = 10 * 2e-7 + 3 * 0.25 * 1.33334e-5 + 36 * 6.25e-7 + 20 * 1.25e-7 + 3 * 4e-7 + 10 * 5e-7
    metrics = 15 * 0.30 / 730 * 2
    assert STACK.working(1, 3600) == pytest.approx(120 * (a_round + beat) + launch + metrics, rel=1e-4)


def test_of_a_hundred_sandboxes_at_once_the_loop_is_paid_once() -> None:
    """One loop serves a shard: its rounds cannot exceed the day's."""
    day = 86_400
    more = STACK.working(100, 100 * day) - STACK.working(1, day)
    assert more == pytest.approx(99 * (STACK.unit(cost.A_SANDBOX) + day / 30 * STACK.unit(cost.A_BEAT)), rel=1e-6)


@pytest.fixture
def told() -> cost.Account:
    tagged = HOUR.model_copy(update={"tag": "research", "seconds": 7200, "sandboxes": 2})
    old = HOUR.model_copy(update={"day": "2026-11-01"})
    moments = [{"at": NOW, "event": "running"}] * 6
    dear = Record.model_validate(running(spent=(tagged, old)).model_dump() | {"work_id": "dear", "timeline": moments})
    live = running(work_id="live", spent_untold=3)
    return cost.account(STACK, [live, dear], {"live": HOUR}, date(2026, 11, 23), TODAY)


def test_costs_are_summed_by_day_tag_and_session_since_the_day_asked_for(told: cost.Account) -> None:
    shown = cost.as_json(told)
    assert [(day["day"], day["sandboxes"], day["sandbox_usd"]) for day in shown["days"]] == [
        ("2026-11-23", 0, 0),
        ("2026-11-24", 3, 0.1335),
        ("2026-11-25", 0, 0),
    ]
    assert [(tag["tag"], tag["sandbox_usd"]) for tag in shown["tags"]] == [("research", 0.089), (None, 0.0445)]
    assert [(one["work_id"], one["seconds"]) for one in shown["sessions"]] == [("dear", 7200), ("live", 3600)]
    assert shown["total"]["sandbox_usd"] == 0.1335
    idle = [day["control_plane_usd"] for day in shown["days"] if not day["sandboxes"]]
    assert idle[1] == pytest.approx(idle[0] / 4, abs=1e-6), "a quarter of today is over"
    assert shown["total"]["usd"] == pytest.approx(sum(day["usd"] for day in shown["days"]), abs=1e-5)


def test_what_is_not_known_is_said(told: cost.Account) -> None:
    remarks = " ".join(told.remarks)
    assert "Not known: 3 sandboxes, whose times" in remarks
    assert "Not known: 2 sandboxes or more, which ran before" in remarks, (
        "six ran, three are accounted for, one is live"
    )
    assert "still run, counted until now: 1." in remarks
    assert "RetentionDays" not in remarks
    late = cost.account(replace(STACK, made=date(2026, 1, 1)), [], {}, date(2026, 2, 1), TODAY)
    assert "ended before 2026-10-26; RetentionDays is over" in " ".join(late.remarks)
    assert "Not known" not in " ".join(cost.account(STACK, [], {}, date(2026, 11, 23), TODAY).remarks)


def test_csv_has_a_row_for_each_charge_and_each_day_of_the_control_plane(
    told: cost.Account, capsys: pytest.CaptureFixture[str]
) -> None:
    cost._print_csv(told)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["day"], row["what"], row["seconds"]) for row in rows] == [
        ("2026-11-24", "live", "3600"),
        ("2026-11-24", "dear", "7200"),
        *((day, "control plane (estimate)", "") for day in told.days),
    ]
    assert sum(float(row["usd"]) for row in rows) == pytest.approx(told.total.usd, abs=1e-5)


def test_in_words_the_total_comes_last_and_json_can_be_read(
    told: cost.Account, capsys: pytest.CaptureFixture[str]
) -> None:
    cost._print(told)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("all days\t3\t3.00\t0.1335\t")
    assert "research\t2\t2.00\t0.0890" in lines
    assert json.loads(json.dumps(cost.as_json(told)))


def test_a_plot_is_a_png(told: cost.Account, tmp_path: Path) -> None:
    cost.draw(told, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(Failure, match="cannot be written"):
        cost.draw(told, tmp_path / "none" / "cost.png")


def test_a_price_file_that_lacks_a_price_is_refused_by_its_name(tmp_path: Path) -> None:
    other = tmp_path / "prices.toml"
    other.write_text(cost.PRICES.read_text().replace("public_ipv4_hour", "public_ipv6_hour"))
    with pytest.raises(Failure, match=r"lacks network\.public_ipv4_hour"):
        cost.read_prices(other)
    with pytest.raises(Failure, match="cannot be read"):
        cost.read_prices(tmp_path / "none.toml")
