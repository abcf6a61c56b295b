"""What the stack counts: the names of its metrics and the way they reach CloudWatch (EMF, a line of the log).

Each costs $0.30 a month while it is emitted, so there are few, with one dimension in common; no id is ever a dimension.
"""

import functools
import os
from collections.abc import Callable
from enum import Enum
from threading import Lock
from typing import Any, TypeVar

from aws_lambda_powertools import Metrics
from aws_lambda_powertools.metrics import MetricUnit

SERVICE = "control-plane"  # one for all functions: a metric that two of them emit stays one metric

_Reply = TypeVar("_Reply")


class Metric(Enum):
    """Every metric: name, unit, meaning. The janitor emits the first group once a round; others count events."""

    QUEUE_DEPTH = "QueueDepth", MetricUnit.Count, "items that wait in the vendor's queue"
    OLDEST_QUEUED_AGE = "OldestQueuedAge", MetricUnit.Seconds, "how long the oldest of them has waited"
    LIVE_SESSIONS = "LiveSessions", MetricUnit.Count, "turns that we serve"
    WAITING_SESSIONS = "WaitingSessions", MetricUnit.Count, "those whose sandbox does not run yet"
    OLDEST_WAITING_AGE = "OldestWaitingAge", MetricUnit.Seconds, "age of the oldest turn that waits for a first sandbox"
    OLDEST_PROGRESS_AGE = (
        "OldestProgressAge",
        MetricUnit.Seconds,
        "longest silence of a session whose sandbox is to act",
    )
    WAITING_FOR_ACTION = "WaitingForAction", MetricUnit.Count, "sessions that wait for a person or a custom tool"
    STRANDED = "Stranded", MetricUnit.Count, "unfinished items without a beat for long and without a live record"
    ORPHAN_TASKS = "OrphanTasks", MetricUnit.Count, "sandboxes that no live record names"
    SWEEPS_FAILED = "SweepsFailed", MetricUnit.Count, "parts of a janitor's round that failed or ran out of time"
    LEASES_LOST = "LeasesLost", MetricUnit.Count, "turns that ended because their lease or item was gone"
    LAUNCHES_FAILED = "LaunchesFailed", MetricUnit.Count, "turns that ended because no sandbox could be started"
    UNSERVED = "Unserved", MetricUnit.Count, "turns that ended with a message that nobody served"
    SHORT_SANDBOXES = "ShortSandboxes", MetricUnit.Count, "sandboxes that ended well within 10 s: did they do anything?"
    BREAKER_OPEN = "BreakerOpen", MetricUnit.Count, "poller runs while the circuit breaker was open"
    KEY_REFUSED = "KeyRefused", MetricUnit.Count, "calls that the API answered 401 or 403"
    MOST_ITEMS_GONE = "MostItemsGone", MetricUnit.Count, "rounds in which most beats were answered 404"

    def __init__(self, label: str, unit: MetricUnit, meaning: str) -> None:
        self.label, self.unit, self.meaning = label, unit, meaning


# template.yaml sets the namespace to the stack's name; tests and the simulation have none.
_sink = Metrics(service=SERVICE, namespace=os.environ.get("POWERTOOLS_METRICS_NAMESPACE", "sandbox-fleet"))
_lock = Lock()  # Powertools' set is not made for the threads of claimer, keeper and stopper


def emit(metric: Metric, value: float = 1) -> None:
    """Add a value; it is published when the handler ends. Safe to call from threads.

    A zero is not published: a metric without data costs nothing, so an idle stack pays for none.
    """
    if not value:
        return
    with _lock:
        _sink.add_metric(metric.label, metric.unit, value)


def flush() -> None:
    """Publish what was emitted since the last time; nothing if there is nothing."""
    with _lock:
        if _sink.provider.metric_set:
            _sink.flush_metrics()


def flushed(handler: Callable[[dict[str, Any], Any], _Reply]) -> Callable[[dict[str, Any], Any], _Reply]:
    """For every function's handler: publishes at its end, also when it raises."""

    @functools.wraps(handler)
    def flushing(event: dict[str, Any], context: Any) -> _Reply:
        try:
            return handler(event, context)
        finally:
            flush()

    return flushing
