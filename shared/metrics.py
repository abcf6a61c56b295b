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
    """Every metric: name, unit, meaning. The first group is what the janitor's round finds, the others count events.

    docs/metrics.md lists them with what watches them.
    """

    QUEUE_DEPTH = "QueueDepth", MetricUnit.Count, "items in the vendor's queue that no poll has been handed"
    QUEUE_PENDING = "QueuePending", MetricUnit.Count, "items handed to a poll and not acked yet"
    OLDEST_QUEUED_AGE = "OldestQueuedAge", MetricUnit.Seconds, "how long the oldest of both has waited"
    WORKERS_POLLING = (
        "WorkersPolling",
        MetricUnit.Count,
        "workers that polled in 30 s, ours among them, while items wait",
    )
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

    PICKUP_LATENCY = (
        "PickupLatency",
        MetricUnit.Seconds,
        "from queued at the vendor's to held: our clock less the API's",
    )
    LAUNCH_LATENCY = "LaunchLatency", MetricUnit.Seconds, "from wanting a sandbox to its running, refusals included"
    LAUNCHES_PUT_OFF = "LaunchesPutOff", MetricUnit.Count, "tries that started nothing and are made again"
    RELAUNCHES = "Relaunches", MetricUnit.Count, "attempts after a turn's first"
    CRASHES = "Crashes", MetricUnit.Count, "sandboxes that failed"
    INTERRUPTIONS = "Interruptions", MetricUnit.Count, "sandboxes that Spot or a host took away"
    STARTS_WITHOUT_ROOM = "StartsWithoutRoom", MetricUnit.Count, "tasks that ECS took and had no room for"
    STARTS_REFUSED = "StartsRefused", MetricUnit.Count, "launches that no retry cures"
    UNKNOWN_ENDS = "UnknownEnds", MetricUnit.Count, "sandboxes that ended for a reason not known here"
    SHORT_SANDBOXES = "ShortSandboxes", MetricUnit.Count, "sandboxes that ended well within 10 s: did they do anything?"
    SANDBOX_SECONDS = (
        "SandboxSeconds",
        MetricUnit.Seconds,
        "what Fargate charges an ended sandbox for, from its pull on",
    )
    BREAKER_OPEN = "BreakerOpen", MetricUnit.Count, "poller runs while the circuit breaker was open"

    BEATS = "Beats", MetricUnit.Count, "beats that extended their lease"
    BEATS_FAILED = "BeatsFailed", MetricUnit.Count, "beats that did not, unless the item was stopped"
    LEASE_MARGIN = "LeaseMargin", MetricUnit.Percent, "least share of a lease's time that was left at an accepted beat"
    KEY_REFUSED = "KeyRefused", MetricUnit.Count, "calls that the API answered 401 or 403"
    MOST_ITEMS_GONE = "MostItemsGone", MetricUnit.Count, "rounds in which most beats were answered 404"

    TURNS_COMPLETED = "TurnsCompleted", MetricUnit.Count, "turns that ended by themselves"
    LEASES_LOST = "LeasesLost", MetricUnit.Count, "turns that ended because their lease or item was gone"
    LAUNCHES_FAILED = "LaunchesFailed", MetricUnit.Count, "turns that ended because no sandbox could be started"
    TURNS_FAILED = "TurnsFailed", MetricUnit.Count, "turns whose sandbox failed as often as MaxAttempts allows"
    TURNS_TIMED_OUT = "TurnsTimedOut", MetricUnit.Count, "turns that reached their wall clock, or hung once too often"
    UNSERVED = "Unserved", MetricUnit.Count, "turns that ended with a message that nobody served"

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
