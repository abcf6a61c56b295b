"""docs/metrics.md and docs/runbook.md say what the code emits and what the alarms watch: all of it, no more."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cli.app import app
from shared.metrics import Metric
from tests.unit import cloudformation
from tests.unit.test_metrics import alarms, emitted_in_code, template

ROOT = Path(__file__).resolve().parents[2]
METRICS = (ROOT / "docs" / "metrics.md").read_text()
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
SECTIONS = {part.split("\n", 1)[0]: part for part in RUNBOOK.split("\n## ")[1:]}
PRICES = tomllib.loads((ROOT / "shared" / "prices.toml").read_text())
METRIC_PRICE, ALARM_PRICE, DASHBOARD_PRICE = (
    PRICES["cloudwatch"][f"{one}_month"] for one in ("metric", "alarm", "dashboard")
)
FREE = 10  # metrics, and alarms, of an account
BUSY = {  # not zero in every hour of a stack that always has work and no trouble
    *(Metric.QUEUE_DEPTH, Metric.QUEUE_PENDING, Metric.OLDEST_QUEUED_AGE, Metric.WORKERS_POLLING),
    *(Metric.LIVE_SESSIONS, Metric.WAITING_SESSIONS, Metric.OLDEST_WAITING_AGE, Metric.OLDEST_PROGRESS_AGE),
    *(Metric.PICKUP_LATENCY, Metric.LAUNCH_LATENCY, Metric.SANDBOX_SECONDS),
    *(Metric.BEATS, Metric.LEASE_MARGIN, Metric.TURNS_COMPLETED),
}


def metric_rows() -> list[str]:
    """Of the table of docs/metrics.md; paste them there when they change."""
    watchers: dict[str, list[str]] = {}
    for name, alarm in alarms().items():
        watchers.setdefault(alarm["MetricName"], []).append(f"[{name}](runbook.md#{name.lower()})")
    where = emitted_in_code()
    return [
        f"| `{m.label}` | {m.unit.value} | {m.meaning} | {', '.join(sorted(where[m.name]))} "
        f"| {', '.join(watchers.get(m.label, []))} |"
        for m in Metric
    ]


def alarm_rows() -> list[str]:
    """As `metric_rows`."""
    signs = {"GreaterThanOrEqualToThreshold": "≥", "LessThanThreshold": "<"}
    rows = []
    for name, alarm in alarms().items():
        threshold = alarm["Threshold"]["Ref"] if isinstance(alarm["Threshold"], dict) else alarm["Threshold"]
        minutes = alarm["Period"] * alarm["EvaluationPeriods"] // 60
        watched = (
            f"`{alarm['MetricName']}` {alarm['Statistic'].lower()} {signs[alarm['ComparisonOperator']]} {threshold}"
        )
        if name.endswith("SilentAlarm"):
            watched = f"`{alarm['MetricName']}` without data"
        rows.append(f"| [{name}](runbook.md#{name.lower()}) | {watched} | {minutes} min |")
    return rows


def cost_rows() -> list[str]:
    """As `metric_rows`: USD a month without and with the free allowance."""

    def row(what: str, count: int, price: float, free: int) -> str:
        return f"| {what} | {count} | ${count * price:.2f} | ${max(0, count - free) * price:.2f} |"

    return [
        row("metrics of an idle stack", 0, METRIC_PRICE, FREE),
        row("metrics of a stack that always has work, without trouble", len(BUSY) + 1, METRIC_PRICE, FREE),
        row("every metric in every hour", len(Metric) + 1, METRIC_PRICE, FREE),
        row("alarms", len(alarms()), ALARM_PRICE, FREE),
        row("the dashboard", 1, DASHBOARD_PRICE, 3),
    ]


def test_the_tables_are_those_of_the_code() -> None:
    for rows in (metric_rows(), alarm_rows(), cost_rows()):
        assert "\n".join(rows) + "\n" in METRICS, "paste these into docs/metrics.md:\n" + "\n".join(rows)


@pytest.mark.parametrize("name", alarms())
def test_every_alarm_leads_to_its_section_of_the_runbook(name: str) -> None:
    told: str = alarms()[name]["AlarmDescription"]["Sub"]
    assert told.endswith(f" Runbook: ${{RunbookUrl}}#{name.lower()}")
    section = SECTIONS[name]
    assert re.findall(r"\*\*(\w+)\.\*\*", section) == ["Symptom", "Meaning", "Command"]
    assert re.findall(r"(?m)^    \S", section.split("**Command.**")[1])


def test_the_runbook_has_no_section_of_an_alarm_that_is_no_more() -> None:
    assert set(SECTIONS) == {"Where to look first", *alarms()}
    assert template()["Parameters"]["RunbookUrl"]["Default"] == "docs/runbook.md"


def test_every_command_of_the_runbook_is_one_that_fleet_has() -> None:
    commands: Any = typer.main.get_command(app)
    used = set(re.findall(r"(?:^    |^       |`)fleet ([a-z]+)(?: ([a-z]+)\b)?", RUNBOOK, re.MULTILINE))
    assert len(used) > 8
    for word, below in used:
        command = commands.commands[word]
        assert not hasattr(command, "commands") or below in command.commands, f"fleet {word} {below}"


def test_every_log_message_and_group_of_the_runbook_is_logged() -> None:
    from tests.unit.test_logs import calls, said

    messages = re.findall(r'\$\.message = "([^"]+)"', RUNBOOK)
    assert len(messages) >= 4
    assert set(messages) <= {call.message for call in calls() + said()}
    outputs = cloudformation.load(ROOT / "template.yaml")["Outputs"]
    assert set(re.findall(r"\$\(output (\w+)\)", RUNBOOK)) <= outputs.keys()
    groups = set(re.findall(r"/sandbox-fleet/(\w+)", RUNBOOK))
    assert groups
    assert all((ROOT / "functions" / group / "app.py").exists() for group in groups)
