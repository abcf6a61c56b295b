"""What is counted, where, and that the template's alarms watch exactly that."""

import ast
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from shared import keeping, metrics, observing, stopping
from shared.config import Config
from shared.keeping import Keeper
from shared.lifecycle import StopWish as Wish
from shared.lifecycle import held, open_turn, started_by, want_stop
from shared.metrics import Metric, emit, flush
from shared.observing import Observer
from shared.record import Lease, Outcome, Phase, Record
from shared.stopping import Stopper
from shared.store import MemoryStore
from shared.work_api import Gone, NotAllowed, Work
from tests.unit.test_handlers import CONTEXT, app
from tests.unit.test_logs import said

ROOT = Path(__file__).resolve().parents[2]
NOW = 1_800_000_000_000


class _Loader(yaml.SafeLoader):
    """Reads CloudFormation's short forms as {"Ref": ...} and the like."""


def _short_form(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> dict[str, Any]:
    if isinstance(node, yaml.ScalarNode):
        return {suffix: node.value}
    if isinstance(node, yaml.SequenceNode):
        return {suffix: loader.construct_sequence(node, deep=True)}
    raise TypeError(suffix)


_Loader.add_multi_constructor("!", _short_form)


def template() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load((ROOT / "template.yaml").read_text(), _Loader)
    return loaded


@pytest.fixture(autouse=True)
def nothing_emitted_before(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    flush()
    capsys.readouterr()
    yield
    flush()


def published(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    flush()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if '"_aws"' in line]


def directives(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [found for blob in published(capsys) for found in blob["_aws"]["CloudWatchMetrics"]]


def emitted_in_code() -> dict[str, set[str]]:
    """Which modules of shared/ emit each metric, by the enum's member."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "shared").glob("*.py"):
        if path.name == "metrics.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Metric":
                found.setdefault(node.attr, set()).add(path.stem)
    return found


def test_every_metric_is_emitted_by_code() -> None:
    """FIELD_NOTES 27."""
    assert set(emitted_in_code()) == {metric.name for metric in Metric}


def alarms() -> dict[str, dict[str, Any]]:
    return {n: r["Properties"] for n, r in template()["Resources"].items() if r["Type"] == "AWS::CloudWatch::Alarm"}


def test_every_alarm_watches_a_metric_that_code_emits_under_that_very_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """FIELD_NOTES 27: an alarm on a metric that no code emits never fires; a wrong dimension is as silent."""
    for metric in Metric:
        emit(metric)
    (blob,) = published(capsys)
    (directive,) = blob["_aws"]["CloudWatchMetrics"]
    names = {one["Name"] for one in directive["Metrics"]}
    (keys,) = directive["Dimensions"]
    loaded = template()
    namespace = loaded["Globals"]["Function"]["Environment"]["Variables"]["POWERTOOLS_METRICS_NAMESPACE"]
    ours = {name: alarm for name, alarm in alarms().items() if not str(alarm["Namespace"]).startswith("AWS/")}
    assert len(ours) >= 15
    for name, alarm in ours.items():
        assert alarm["MetricName"] in names, name
        assert alarm["Namespace"] == namespace, name
        assert {d["Name"]: d["Value"] for d in alarm["Dimensions"]} == {key: blob[key] for key in keys}, name


def test_every_alarm_of_a_service_s_metric_names_one_that_it_has_and_a_resource_of_the_stack() -> None:
    loaded = template()["Resources"]
    services = {name: alarm for name, alarm in alarms().items() if str(alarm["Namespace"]).startswith("AWS/")}
    assert len(services) >= 5
    for name, alarm in services.items():
        (dimension,) = alarm["Dimensions"]
        (resource,) = (str(value).split(".")[0] for value in dimension["Value"].values())
        of_service, metrics_of_it, key = SERVICES[alarm["Namespace"]]
        assert loaded[resource]["Type"] == of_service, name
        assert alarm["MetricName"] in metrics_of_it, name
        assert dimension["Name"] == key, name


# https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/aws-services-cloudwatch-metrics.html
SERVICES = {
    "AWS/Lambda": ("AWS::Serverless::Function", {"Errors", "Invocations", "Duration", "Throttles"}, "FunctionName"),
    "AWS/SQS": (
        "AWS::SQS::Queue",
        {"ApproximateNumberOfMessagesVisible", "ApproximateAgeOfOldestMessage"},
        "QueueName",
    ),
    "AWS/States": (
        "AWS::Serverless::StateMachine",
        {"ExecutionsFailed", "ExecutionsStarted"},
        "StateMachineArn",
    ),
}


def test_every_alarm_is_quiet_on_a_stack_without_work_and_tells_the_topic() -> None:
    """A silent schedule is told by having no data, which a new alarm has as well, without a change to tell of."""
    topic = [{"If": ["CreateTopic", {"Ref": "AlarmTopic"}, {"Ref": "AlarmTopicArn"}]}]
    for name, alarm in alarms().items():
        silent = name.endswith("SilentAlarm")
        assert alarm["TreatMissingData"] == ("missing" if silent else "notBreaching"), name
        assert alarm.get("InsufficientDataActions" if silent else "AlarmActions") == topic, name
        assert ("AlarmActions" in alarm, "InsufficientDataActions" in alarm) == (not silent, silent), name
        assert "OKActions" not in alarm, "a deploy would tell of every alarm"


def test_the_metric_of_the_sandbox_s_log_reads_a_line_that_the_runner_writes() -> None:
    """FIELD_NOTES 27."""
    filters = {n: r["Properties"] for n, r in template()["Resources"].items() if r["Type"] == "AWS::Logs::MetricFilter"}
    assert set(filters) == {"FirstToolResult"}
    for one in filters.values():
        (found,) = re.findall(r'^\{ \$\.message = "(.*)" \}$', one["FilterPattern"])
        (metric,) = one["MetricTransformations"]
        (line,) = (call for call in said() if call.message == found)
        assert metric["MetricValue"].removeprefix("$.") in line.keys
        assert metric["MetricNamespace"] == {"Ref": "AWS::StackName"}
        assert "DefaultValue" not in metric, "a zero would cost an idle stack"


def test_the_namespace_is_the_one_that_the_template_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """FIELD_NOTES 27."""
    import importlib.util

    monkeypatch.setenv("POWERTOOLS_METRICS_NAMESPACE", "a-stack")
    monkeypatch.setenv("POWERTOOLS_SERVICE_NAME", "janitor")
    spec = importlib.util.spec_from_file_location("metrics_again", ROOT / "shared" / "metrics.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (module._sink.namespace, module._sink.service) == ("a-stack", metrics.SERVICE)


def test_no_metric_has_an_id_as_its_dimension(capsys: pytest.CaptureFixture[str]) -> None:
    for metric in Metric:
        emit(metric)
    assert [directive["Dimensions"] for directive in directives(capsys)] == [[["service"]]]


def test_every_handler_publishes_at_its_end_even_if_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Config.model_fields:
        monkeypatch.delenv(f"FLEET_{name.upper()}", raising=False)
    for folder in (ROOT / "functions").iterdir():
        if not (folder / "app.py").exists():
            continue
        flushes: list[int] = []
        monkeypatch.setattr(metrics, "flush", lambda seen=flushes: seen.append(1))
        with contextlib.suppress(Exception):  # nothing is configured here; that it flushes is all that counts
            app(folder.name).handler({}, CONTEXT)
        assert flushes, folder.name


def test_threads_lose_no_count(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse_often() -> None:
        for _ in range(500):
            emit(Metric.KEY_REFUSED)

    threads = [threading.Thread(target=refuse_often) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(sum(blob["KeyRefused"]) for blob in published(capsys)) == 4_000


def test_a_zero_is_not_published_so_that_idle_costs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    emit(Metric.QUEUE_DEPTH, 0)
    flush()
    assert capsys.readouterr().out == ""


def test_nothing_emitted_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert published(capsys) == []


# --- where events are counted ----------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Metric]:
    seen: list[Metric] = []
    for module in (keeping, observing, stopping):
        monkeypatch.setattr(module, "emit", lambda metric, value=1: seen.append(metric) if value else None)
    return seen


def running(store: MemoryStore, work_id: str = "w") -> Record:
    work = Work(
        id=work_id,
        environment_id="env_1",
        data={"type": "session", "id": work_id},
        state="queued",
        secret="s",
    )
    record = held(open_turn(None, work, now=NOW, owner="p", until=NOW, shard="0"), NOW)
    changes = {"phase": Phase.RUNNING, "started_by": started_by(work_id, NOW, 1), "running_since": NOW}
    lease = Lease(work_id=work_id, turn=NOW, value="v", ttl_seconds=300, accepted_sent_at=NOW, due_at=NOW)
    store.save_lease(lease, None)
    return store.save(record.model_copy(update=changes))


@pytest.mark.parametrize(
    ("outcome", "metric"),
    [
        (Outcome.LOST, Metric.LEASES_LOST),
        (Outcome.LAUNCH_FAILED, Metric.LAUNCHES_FAILED),
        (Outcome.UNSERVED, Metric.UNSERVED),
        (Outcome.FAILED, Metric.TURNS_FAILED),
        (Outcome.TIMED_OUT, Metric.TURNS_TIMED_OUT),
        (Outcome.COMPLETED, Metric.TURNS_COMPLETED),
        (Outcome.STOPPED, None),
    ],
)
def test_a_turn_s_end_is_counted_once_when_its_record_closes(
    outcome: Outcome, metric: Metric | None, counted: list[Metric]
) -> None:
    store, nothing = MemoryStore(), SimpleNamespace()
    record = running(store)
    stopping_record = want_stop(record, Wish("over", outcome, post=False), NOW).model_copy(update={"dead": True})
    store.save(stopping_record)
    unused: Any = nothing
    stopper = Stopper(Config(table="work"), unused, unused, store, unused, unused, lambda: NOW)
    assert stopper.settle(["w"]) == 1
    assert stopper.settle(["w"]) == 0
    assert counted == ([metric] if metric else [])


def observe(store: MemoryStore, record: Record, status: str, exit_code: int | None, lived_ms: int = 0) -> None:
    queue: Any = SimpleNamespace(send=lambda record: None)
    observer = Observer(Config(table="work"), store, queue, lambda work_id: None, lambda: NOW + lived_ms)
    container = {"name": "sandbox", "exitCode": exit_code}
    named = {"taskArn": "arn", "startedBy": record.started_by, "version": 5}
    observer.observe(named | {"lastStatus": status, "containers": [container]})


@pytest.mark.parametrize(
    ("exit_code", "lived_ms", "short"), [(0, 9_999, True), (11, 0, True), (0, 10_000, False), (137, 1_000, False)]
)
def test_a_sandbox_that_ends_cleanly_within_seconds_is_counted(
    exit_code: int, lived_ms: int, short: bool, counted: list[Metric]
) -> None:
    """FIELD_NOTES 2: a sandbox that exits 0 in seconds left its session stuck."""
    store = MemoryStore()
    record = running(store)
    for _ in range(2):  # an event may come twice
        observe(store, record, "STOPPED", exit_code, lived_ms)
    assert counted.count(Metric.SHORT_SANDBOXES) == (1 if short else 0)


def test_a_sandbox_killed_for_a_stop_within_seconds_is_no_short_one(counted: list[Metric]) -> None:
    store = MemoryStore()
    record = running(store)
    store.save(want_stop(record, Wish("asked", Outcome.STOPPED, post=True), NOW))
    observe(store, record, "STOPPED", 137)
    assert Metric.SHORT_SANDBOXES not in counted


def test_an_earlier_attempt_s_exit_is_not_counted_when_the_next_one_runs(counted: list[Metric]) -> None:
    store = MemoryStore()
    record = running(store)
    store.save(record.model_copy(update={"phase": Phase.LAUNCHING, "running_since": None, "exit_code": 0}))
    observe(store, record, "RUNNING", None, lived_ms=1_000)
    assert counted == [Metric.LAUNCH_LATENCY]


@pytest.mark.parametrize(
    ("error", "items", "metrics_seen"),
    [
        (NotAllowed("no", status=401), 1, [Metric.KEY_REFUSED, Metric.BEATS_FAILED]),
        (Gone("no", status=404), 4, [Metric.BEATS_FAILED, Metric.MOST_ITEMS_GONE]),
        (Gone("no", status=404), 1, [Metric.BEATS_FAILED]),
    ],
)
def test_a_refused_key_and_a_round_of_404_are_counted(
    error: Exception, items: int, metrics_seen: list[Metric], counted: list[Metric]
) -> None:
    store = MemoryStore()
    for n in range(items):
        running(store, f"w{n}")

    def refuse(*_: object, **__: object) -> None:
        raise error

    api: Any = SimpleNamespace(heartbeat=refuse)
    key: Any = SimpleNamespace(forget=lambda: None)
    keeper = Keeper(Config(table="work"), api, key, store, lambda: NOW)
    keeper.round(keeping.RoundState(shard="0", generation=0, round=0, empty_rounds=0))
    assert counted == metrics_seen
