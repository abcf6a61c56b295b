"""CloudWatch, simulated: what was measured, and the template's alarms and dashboard over it. Raises nothing itself.

A metric is named by (namespace, name, resource): the stack's namespace is `fleet`, a resource is its logical id.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import quantiles
from typing import Any

from shared.config import Config
from shared.metrics import SERVICE

ROOT = Path(__file__).resolve().parents[2]
Name = tuple[str, str, str]
FLEET = "fleet"  # what cloudformation.PSEUDO calls the stack


_STATISTICS: dict[str, Callable[[list[float]], float]] = {"Sum": sum, "Maximum": max, "Minimum": min}


@dataclass
class Measured:
    """Points by metric: (epoch milliseconds, value)."""

    points: dict[Name, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, at: int, metric: str, value: float, *, namespace: str = FLEET, resource: str = SERVICE) -> None:
        self.points[namespace, metric, resource].append((at, value))

    def periods(self, name: Name, statistic: str, seconds: int, start: int, end: int) -> dict[int, float]:
        """The statistic of each period from `start` to `end` that has data, by the period's beginning."""
        found: dict[int, list[float]] = defaultdict(list)
        for at, value in self.points.get(name, ()):
            if start <= at < end:
                found[start + (at - start) // (seconds * 1000) * seconds * 1000].append(value)
        return {at: of(statistic, values) for at, values in found.items()}


def of(statistic: str, values: list[float]) -> float:
    """Raises KeyError for a statistic that no alarm or widget uses."""
    if statistic.startswith("p"):
        return values[0] if len(values) == 1 else quantiles(values, n=100, method="inclusive")[int(statistic[1:]) - 1]
    return _STATISTICS[statistic](values)


@cache
def template() -> dict[str, Any]:
    from tests.unit import cloudformation  # seconds to import, which most runs need not spend

    return cloudformation.load(ROOT / "template.yaml")


def alarms() -> dict[str, dict[str, Any]]:
    """Properties by logical id."""
    resources = template()["Resources"]
    return {name: one["Properties"] for name, one in resources.items() if one["Type"] == "AWS::CloudWatch::Alarm"}


def watched(alarm: dict[str, Any]) -> Name:
    (dimension,) = alarm["Dimensions"]
    value = dimension["Value"]
    resource = value if isinstance(value, str) else next(iter(value.values()))
    namespace = alarm["Namespace"] if isinstance(alarm["Namespace"], str) else FLEET
    return namespace, alarm["MetricName"], resource.split(".")[0] if isinstance(resource, str) else resource[0]


def state(alarm: dict[str, Any], measured: Measured, config: Config, now: int) -> str:
    """OK, ALARM or INSUFFICIENT_DATA, judged over the last periods before `now`, as CloudWatch does."""
    seconds, count, threshold = alarm["Period"], alarm["EvaluationPeriods"], alarm["Threshold"]
    if isinstance(threshold, dict):
        threshold = getattr(config, re.sub(r"(?<!^)(?=[A-Z])", "_", threshold["Ref"]).lower())
    start = now - seconds * count * 1000
    found = measured.periods(watched(alarm), alarm["Statistic"], seconds, start, now)
    if not found and alarm["TreatMissingData"] == "missing":
        return "INSUFFICIENT_DATA"
    below = alarm["ComparisonOperator"] == "LessThanThreshold"
    bad = [value < threshold if below else value >= threshold for value in found.values()]
    return "ALARM" if len(bad) == count and all(bad) else "OK"


def dashboard() -> list[dict[str, Any]]:
    """The widgets, with every condition true, parameters at their default, and logical ids in place of names."""
    text, local = template()["Resources"]["Dashboard"]["Properties"]["DashboardBody"]["Fn::Sub"]
    parameters = {name: one.get("Default", name) for name, one in template()["Parameters"].items()}
    known = {"AWS::StackName": FLEET, "AWS::Region": "us-east-1"} | parameters

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name in local:
            _, chosen, _ = local[name]["Fn::If"]
            return re.sub(r"\$\{([^}]+)\}", fill, chosen if isinstance(chosen, str) else chosen["Fn::Sub"])
        return str(known.get(name, name.split(".")[0]))

    widgets: list[dict[str, Any]] = json.loads(re.sub(r"\$\{([^}]+)\}", fill, text))["widgets"]
    return widgets


def evaluated(formula: str, values: dict[str, float]) -> float:
    """A widget's formula over the values of its ids; it knows numbers, + * / and SUM([...]). Raises NameError."""
    text = formula.replace("SUM([", "sum([")
    result: float = eval(text, {"__builtins__": {}, "sum": sum}, values)
    return result
