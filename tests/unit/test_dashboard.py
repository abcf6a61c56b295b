"""Each widget of the dashboard shows a metric that code emits, or one that a service has of a resource of ours."""

import tomllib
from typing import Any

import pytest

from shared.metrics import SERVICE, Metric
from tests.simulation import cloudwatch
from tests.unit.test_metrics import SERVICES

WIDGETS = cloudwatch.dashboard()
GRAPHS = {widget["properties"]["title"]: widget["properties"] for widget in WIDGETS if widget["type"] == "metric"}
QUESTIONS = ("Is it serving?", "Is anything stuck?", "What does it cost?")


def shown(graph: dict[str, Any]) -> list[list[Any]]:
    """The metrics of a graph, without its formulas."""
    return [metric for metric in graph["metrics"] if isinstance(metric[0], str)]


def test_its_rows_answer_three_questions_in_their_order() -> None:
    titles = [widget["properties"]["markdown"] for widget in WIDGETS if widget["type"] == "text"]
    assert [title.removeprefix("## ").split(" (")[0] for title in titles] == list(QUESTIONS)
    places = [
        (x, y)
        for widget in WIDGETS
        for x in range(widget["x"], widget["x"] + widget["width"])
        for y in range(widget["y"], widget["y"] + widget["height"])
    ]
    assert len(places) == len(set(places)), "no widget covers another"
    assert max(x for x, _ in places) < 24
    assert [widget["y"] for widget in WIDGETS] == sorted(widget["y"] for widget in WIDGETS)


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_every_graph_shows_what_is_emitted(graph: dict[str, Any]) -> None:
    """FIELD_NOTES 27."""
    services = SERVICES | {
        "AWS/DynamoDB": (
            "AWS::DynamoDB::Table",
            {"ConsumedWriteCapacityUnits", "ConsumedReadCapacityUnits"},
            "TableName",
        )
    }
    resources = cloudwatch.template()["Resources"]
    ours = {metric.label for metric in Metric}
    for namespace, name, *dimension, options in shown(graph):
        assert options["stat"] in ("Sum", "Maximum", "Minimum", "p90")
        if namespace == cloudwatch.FLEET:
            if dimension:
                assert name in ours
                assert dimension == ["service", SERVICE]
            else:
                assert name == "FirstToolResultLatency"
            continue
        kind, names, key = services[namespace]
        assert name in names
        assert dimension[0] == key
        assert resources[dimension[1]]["Type"] == kind


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_every_formula_uses_the_ids_of_its_graph(graph: dict[str, Any]) -> None:
    ids = {metric[-1]["id"]: 1.0 for metric in shown(graph) if "id" in metric[-1]}
    for (formula,) in (metric for metric in graph["metrics"] if not isinstance(metric[0], str)):
        assert cloudwatch.evaluated(formula["expression"], ids) > 0


def test_its_prices_are_those_of_the_price_list() -> None:
    prices = tomllib.loads((cloudwatch.ROOT / "shared" / "prices.toml").read_text())
    _, local = cloudwatch.template()["Resources"]["Dashboard"]["Properties"]["DashboardBody"]["Fn::Sub"]
    told = {name: [float(one) for one in value["Fn::If"][1:]] for name, value in local.items() if name != "Stalled"}
    fargate, functions = prices["fargate"], prices["lambda"]
    assert told == {
        "VcpuHour": [fargate["arm64"]["vcpu_hour"], fargate["x86_64"]["vcpu_hour"]],
        "GbHour": [fargate["arm64"]["gb_hour"], fargate["x86_64"]["gb_hour"]],
        "GbSecond": [functions["gb_second_arm64"], functions["gb_second_x86_64"]],
    }
    formulas = [m[0]["expression"] for g in GRAPHS.values() for m in g["metrics"] if not isinstance(m[0], str)]
    assert any(f"+{prices['network']['public_ipv4_hour']})" in formula for formula in formulas)
    assert any(f"*{functions['request']:.7f}" in formula for formula in formulas)


def test_every_metric_is_on_the_dashboard() -> None:
    names = {metric[1] for graph in GRAPHS.values() for metric in shown(graph)}
    assert {metric.label for metric in Metric} - names == set()


def test_every_alarm_is_on_the_dashboard() -> None:
    (widget,) = (widget for widget in WIDGETS if widget["type"] == "alarm")
    assert set(widget["properties"]["alarms"]) == set(cloudwatch.alarms())
