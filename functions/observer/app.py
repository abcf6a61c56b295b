"""Observer: "ECS Task State Change" events into records (shared/observing.py)."""

from functools import cache
from typing import Any

from shared import wiring
from shared.config import from_env
from shared.metrics import flushed
from shared.observing import Observer


@cache
def observer() -> Observer:
    config = from_env("queue_url", "stopper_function")
    return Observer(config, wiring.store(config), wiring.queue(config), wiring.wake_stopper(config), wiring.now)


@flushed
def handler(event: dict[str, Any], context: Any) -> None:
    """Anything but a task's state change is ignored; an error is retried by Lambda."""
    detail = event.get("detail")
    if event.get("source") == "aws.ecs" and isinstance(detail, dict):
        observer().observe(detail)
