"""`fleet cost`: what sessions and control plane cost, from the records and from list prices (shared/prices.toml)."""

import csv
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.logs import seconds_in
from cli.stack import Fleet
from cli.terminal import Code, Failure, note, print_json, print_table, say, working
from shared import wiring
from shared.record import Record, Spent
from shared.sandboxes import spent_on

PRICES = Path(__file__).resolve().parents[1] / "shared" / "prices.toml"
MOST_SHOWN = 10  # sessions, in words
_MONTH_HOURS = 730
_DAY_SECONDS = 86_400
_LAMBDA_GB = 0.25  # template.yaml, Globals
_METRICS_WITH_WORK = 15  # docs/metrics.md
_LEFT_OUT = (
    "Left out: image storage and builds, data transfer, the sandboxes' logs, encryption keys, taxes, discounts, free "
    "tiers, and what the model costs."
)


def cost(
    ctx: typer.Context,
    since: Annotated[str, typer.Option(help="How far back: 7d, 30d. Whole UTC days.")] = "30d",
    as_csv: Annotated[bool, typer.Option("--csv", help="A row for each session, day, machine and tag.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw sandboxes and cost by day into this PNG.")] = None,
    prices: Annotated[Path, typer.Option(help="A price file of your own.", show_default=False)] = PRICES,
) -> None:
    """Add up what sessions and control plane cost.

    Sandboxes: what ECS said of each, times list prices. The control plane is an estimate from counts. USD.
    """
    fleet: Fleet = ctx.obj
    if as_csv and fleet.json:
        raise Failure("--json and --csv exclude each other.", Code.USAGE)
    listed = read_prices(prices)
    now = datetime.now(UTC)
    first = (now - timedelta(seconds=seconds_in(since))).date()
    with working("reading the records"):
        records = list(fleet.records())
        running = still_running(fleet, records, now)
    stack = Stack.of(fleet, listed)
    told = account(stack, records, running, first, now)
    if plot is not None:
        draw(told, plot)
        note(f"Drawn: {plot}")
    if as_csv:
        _print_csv(told)
    elif fleet.json:
        print_json(as_json(told))
    else:
        _print(told)


def read_prices(path: Path) -> dict[str, Any]:
    """The price file. Raises Failure if it is none."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Failure(f"The prices in {path} cannot be read: {error}.") from None
    known = tomllib.loads(PRICES.read_text(encoding="utf-8"))
    if lacks := sorted(_names(known) - _names(found)):
        raise Failure(f"The price file {path} lacks {', '.join(lacks)}: begin with a copy of {PRICES.name}.")
    return found


def _names(table: Mapping[str, Any], before: str = "") -> set[str]:
    nested = [_names(value, f"{before}{name}.") for name, value in table.items() if isinstance(value, dict)]
    return {f"{before}{name}" for name, value in table.items() if not isinstance(value, dict)}.union(*nested)


def still_running(fleet: Fleet, records: Iterable[Record], now: datetime) -> dict[str, Spent]:
    """By work id, what the sandboxes that have not ended are charged for until now."""
    by_arn = {record.task_arn: record for record in records if record.is_live and record.task_arn and not record.dead}
    tasks = wiring.sandboxes(fleet.config).describe(by_arn)
    found = {}
    for arn, task in tasks.items():
        record, spent = by_arn[arn], spent_on(task, now)
        if spent is not None:
            found[record.work_id] = spent.model_copy(update={"tag": record.tag})
    return found


# --- the calculation: no calls below this line ----------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """What one unit of the control plane's work takes. Counted in the code; the seconds are taken to be typical."""

    runs: float = 0  # of functions
    run_seconds: float = 0
    transitions: float = 0
    write_units: float = 0
    read_units: float = 0
    messages: float = 0  # requests to SQS
    schedules: float = 0
    log_kb: float = 0


A_POLL = Unit(runs=1, run_seconds=0.2, schedules=1, read_units=3, log_kb=1)  # every minute, plus PollWindowSeconds
A_SWEEP = Unit(runs=1, run_seconds=1, schedules=1, read_units=5, write_units=1, log_kb=2)  # every five minutes
A_LISTENING_MINUTE = Unit(messages=15)  # Lambda on the launch queue: up to 5 long polls of 20 s at once
A_ROUND = Unit(runs=1, run_seconds=0.3, transitions=3, read_units=2, log_kb=1)
A_BEAT = Unit(run_seconds=0.01, write_units=1, read_units=1)
# Poll, webhook, launcher, two ECS events, three calls of tickets, two of the stopper; about 12 writes of a 3 kB record
A_SANDBOX = Unit(runs=10, run_seconds=3, write_units=36, read_units=20, messages=3, log_kb=10)


@dataclass(frozen=True)
class Stack:
    """What of a stack decides its cost. `made` is its first day."""

    prices: dict[str, Any]
    arm: bool = True
    public_ip: bool = True
    nat: bool = False
    secrets: int = 1
    alarms: int = 0
    dashboards: int = 0
    beat_seconds: int = 30
    poll_window_seconds: int = 0
    retention_days: int = 30
    made: date = date.min

    @classmethod
    def of(cls, fleet: Fleet, prices: dict[str, Any]) -> "Stack":
        given = {part["ParameterKey"]: part["ParameterValue"] for part in fleet.description.get("Parameters", ())}
        kinds = [part["ResourceType"] for part in fleet.resources.values()]
        config = fleet.config
        return cls(
            prices,
            arm=given.get("Architecture", "arm64") == "arm64",
            public_ip=config.assign_public_ip == "ENABLED",
            nat="AWS::EC2::NatGateway" in kinds,
            secrets=kinds.count("AWS::SecretsManager::Secret"),
            alarms=kinds.count("AWS::CloudWatch::Alarm"),
            dashboards=kinds.count("AWS::CloudWatch::Dashboard"),
            beat_seconds=min(config.beat_interval_seconds, config.lease_ttl_seconds // 3) or 1,
            poll_window_seconds=config.poll_window_seconds,
            retention_days=config.retention_days,
            made=fleet.description["CreationTime"].date(),
        )

    @property
    def machine(self) -> str:
        return "arm64" if self.arm else "x86_64"

    def sandbox(self, spent: Spent) -> float:
        """USD of some sandboxes: vCPU, memory, disk beyond what is free, public address."""
        rate = self.prices["fargate_spot" if spent.spot else "fargate"][self.machine]
        disk, network = self.prices["fargate_disk"], self.prices["network"]
        an_hour: float = spent.cpu / 1024 * rate["vcpu_hour"] + spent.memory / 1024 * rate["gb_hour"]
        an_hour += max(0, spent.disk - disk["free_gb"]) * disk["gb_hour"]
        an_hour += self.public_ip * network["public_ipv4_hour"]
        return an_hour * spent.seconds / 3600

    def unit(self, one: Unit) -> float:
        """USD of one unit of the control plane's work."""
        p = self.prices
        usd: float = one.runs * p["lambda"]["request"]
        usd += one.run_seconds * _LAMBDA_GB * p["lambda"][f"gb_second_{self.machine}"]
        usd += one.transitions * p["step_functions"]["transition"]
        usd += one.write_units * p["dynamodb"]["write_unit"] + one.read_units * p["dynamodb"]["read_unit"]
        usd += one.messages * p["sqs"]["request"] + one.schedules * p["scheduler"]["invocation"]
        usd += one.log_kb * 1e-6 * p["cloudwatch"]["log_gb"]
        return usd

    def idle_hour(self) -> float:
        """USD an hour of a control plane that serves nobody."""
        p = self.prices
        window = Unit(run_seconds=self.poll_window_seconds)
        a_minute = self.unit(A_POLL) + self.unit(window) + self.unit(A_LISTENING_MINUTE) + self.unit(A_SWEEP) / 5
        a_month: float = self.secrets * p["secrets_manager"]["secret_month"]
        a_month += self.alarms * p["cloudwatch"]["alarm_month"]
        a_month += self.dashboards * p["cloudwatch"]["dashboard_month"]
        return 60 * a_minute + a_month / _MONTH_HOURS + self.nat * float(p["network"]["nat_gateway_hour"])

    def working(self, sandboxes: int, seconds: float) -> float:
        """USD that a day's sandboxes add. Their overlap is not known: the loop is charged as if there were none."""
        busy = min(seconds, _DAY_SECONDS)
        metrics = _METRICS_WITH_WORK * self.prices["cloudwatch"]["metric_month"] / _MONTH_HOURS
        return float(
            sandboxes * self.unit(A_SANDBOX)
            + seconds / self.beat_seconds * self.unit(A_BEAT)
            + busy / self.beat_seconds * self.unit(A_ROUND)
            + metrics * min(busy / 3600 + sandboxes, 24)
        )


@dataclass
class Sum:
    """Of some sandboxes, in USD and seconds; `control_plane` is an estimate."""

    sandboxes: int = 0
    seconds: int = 0
    sandbox_usd: float = 0.0
    control_plane_usd: float = 0.0

    @property
    def usd(self) -> float:
        return self.sandbox_usd + self.control_plane_usd

    def add(self, spent: Spent, usd: float) -> None:
        self.sandboxes += spent.sandboxes
        self.seconds += spent.seconds
        self.sandbox_usd += usd


@dataclass(frozen=True)
class Line:
    """What one session's sandboxes of one day, machine and tag cost."""

    record: Record
    spent: Spent
    usd: float


@dataclass
class Account:
    """Everything that was added up."""

    stack: Stack
    first: date
    until: datetime
    lines: list[Line] = field(default_factory=list)
    days: dict[str, Sum] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @cached_property
    def tags(self) -> dict[str, Sum]:
        return self._by(lambda line: line.spent.tag or "")

    @cached_property
    def sessions(self) -> dict[str, Sum]:
        """By work id, the dearest first."""
        return self._by(lambda line: line.record.work_id)

    @cached_property
    def total(self) -> Sum:
        return Sum(*(sum(column) for column in zip(*(astuple(day) for day in self.days.values()), strict=True)))

    def _by(self, key: Any) -> dict[str, Sum]:
        found: dict[str, Sum] = defaultdict(Sum)
        for line in self.lines:
            found[key(line)].add(line.spent, line.usd)
        return dict(sorted(found.items(), key=lambda item: -item[1].usd))


def account(
    stack: Stack, records: Sequence[Record], running: Mapping[str, Spent], first: date, now: datetime
) -> Account:
    """The sandboxes that began on `first` or later, and the control plane of those days."""
    told = Account(stack, max(first, stack.made), now)
    for record in records:
        for spent in (*record.spent, *([running[record.work_id]] if record.work_id in running else [])):
            if date.fromisoformat(spent.day) >= first:
                told.lines.append(Line(record, spent, stack.sandbox(spent)))
    today = now.date()
    days = {told.first + timedelta(days=n) for n in range((today - told.first).days + 1)}
    days |= {date.fromisoformat(line.spent.day) for line in told.lines}
    told.days = {str(day): Sum() for day in sorted(days)}
    for line in told.lines:
        told.days[line.spent.day].add(line.spent, line.usd)
    for day, one in told.days.items():
        hours = 24.0 if day != str(today) else (now - now.replace(hour=0, minute=0, second=0)).total_seconds() / 3600
        one.control_plane_usd = hours * stack.idle_hour() + stack.working(one.sandboxes, one.seconds)
    told.remarks = _remarks(told, records, running, first)
    return told


def _remarks(told: Account, records: Sequence[Record], running: Mapping[str, Spent], first: date) -> list[str]:
    found = [
        "The control plane's cost is an estimate from counts, at most; days count whole, from the stack's first on."
    ]
    if untold := sum(record.spent_untold for record in records):
        found.append(
            f"Not known: {untold} sandboxes, whose times ECS did not tell or which are older than a record holds."
        )
    if before := sum(_older(record, record.work_id in running) for record in records):
        found.append(
            f"Not known: {before} sandboxes or more, which ran before this version kept what they are charged."
        )
    kept_from = told.until.date() - timedelta(days=told.stack.retention_days)
    if max(first, told.stack.made) < kept_from:
        found.append(f"Not known: sessions whose last turn ended before {kept_from}; RetentionDays is over for them.")
    if any(line.spent.spot for line in told.lines):
        found.append("Spot's price moves: it is counted at the lowest, 70 % off.")
    if running:
        found.append(f"Sandboxes that still run, counted until now: {len(running)}.")
    prices = told.stack.prices
    return [
        *found,
        f"List prices of {prices['region']}, {prices['as_of']}; a sandbox counts on the day it began.",
        _LEFT_OUT,
    ]


def _older(record: Record, runs: bool) -> int:
    """Sandboxes that the timelines show and nothing else accounts for."""
    timelines = [record.timeline, *(turn.timeline for turn in record.history)]
    ran = sum(moment.event == "running" for timeline in timelines for moment in timeline)
    known = sum(entry.sandboxes for entry in record.spent) + record.spent_untold + runs
    return max(0, ran - known - (record.is_live and not record.dead and not runs))


# --- showing it -----------------------------------------------------------------------------------------------


def as_json(told: Account) -> dict[str, Any]:
    sessions = {line.record.work_id: line.record.session_id for line in told.lines}
    return {
        "since": str(told.first),
        "until": told.until.isoformat(timespec="seconds"),
        "currency": "USD",
        "prices": {"region": told.stack.prices["region"], "as_of": told.stack.prices["as_of"]},
        "total": _rounded(told.total),
        "days": [{"day": day} | _rounded(one) for day, one in told.days.items()],
        "tags": [{"tag": tag or None} | _rounded(one) for tag, one in told.tags.items()],
        "sessions": [
            {"work_id": work_id, "session_id": sessions[work_id]} | _rounded(one)
            for work_id, one in told.sessions.items()
        ],
        "remarks": told.remarks,
    }


def _rounded(one: Sum) -> dict[str, float]:
    return {name: round(value, 6) for name, value in (asdict(one) | {"usd": one.usd}).items()}


def _print_csv(told: Account) -> None:
    rows = csv.writer(sys.stdout, lineterminator="\n")
    names = ["cpu", "memory", "disk", "spot", "tag", "sandboxes", "seconds"]
    rows.writerow(["day", "what", *names, "usd"])
    for line in told.lines:
        values = line.spent.model_dump()
        rows.writerow([line.spent.day, line.record.work_id, *(values[name] for name in names), f"{line.usd:.6f}"])
    for day, one in told.days.items():
        rows.writerow([day, "control plane (estimate)", *[""] * len(names), f"{one.control_plane_usd:.6f}"])


def _print(told: Account) -> None:
    columns = ("SANDBOXES", "HOURS", "SANDBOX USD", "CONTROL PLANE USD", "USD")
    rows = [(day, *_cells(one)) for day, one in told.days.items() if one.sandboxes]
    rows += [("all days", *_cells(told.total))]
    print_table(("DAY", *columns), rows)
    for title, sums in (("TAG", told.tags), ("SESSION", told.sessions)):
        if not told.lines or (title == "TAG" and not any(sums)):
            continue
        say("")
        shown = list(sums.items())[:MOST_SHOWN]
        print_table((title, *columns[:3]), [(name or "none", *_cells(one)[:3]) for name, one in shown])
        if len(sums) > MOST_SHOWN:
            say(f"and {len(sums) - MOST_SHOWN} more: --json or --csv has all")
    say("")
    for remark in told.remarks:
        say(f"- {remark}")


def _cells(one: Sum) -> tuple[str, ...]:
    amounts = (one.sandbox_usd, one.control_plane_usd, one.usd)
    return (str(one.sandboxes), f"{one.seconds / 3600:.2f}", *(f"{usd:.4f}" for usd in amounts))


def draw(told: Account, path: Path) -> None:
    """Sandboxes and USD by day, as a PNG. Raises Failure without matplotlib, or where the file cannot be written."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  slow to load, and only this needs it
    except ImportError:
        raise Failure("A plot needs matplotlib: pip install -e '.[cli]'.") from None
    days, sums = list(told.days), list(told.days.values())
    figure = Figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.bar(days, [one.sandboxes for one in sums], color="tab:gray")
    above.set_ylabel("sandboxes begun")
    sandboxes = [one.sandbox_usd for one in sums]
    below.bar(days, sandboxes, label="sandboxes")
    below.bar(days, [one.control_plane_usd for one in sums], bottom=sandboxes, label="control plane (estimate)")
    below.set_ylabel("USD")
    below.set_xlabel("UTC day")
    below.legend()
    below.set_xticks(days[:: len(days) // 8 + 1])
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise Failure(f"The plot cannot be written: {error}.") from None
