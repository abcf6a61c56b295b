"""Janitor: every five minutes it repairs what any crash left (shared/sweeping.py)."""

from functools import cache
from typing import Any

from shared import wiring
from shared.claiming import Claimer
from shared.config import from_env
from shared.metrics import flushed
from shared.observing import Observer
from shared.sweeping import Janitor

_SAFETY_MS = 90_000  # a read of the API that is tried three times may begin just before


@cache
def janitor() -> Janitor:
    config = from_env(
        "environment_id", "key_secret_arn", "queue_url", "state_machine_arn", "cluster_arn", "stopper_function"
    )
    key, store = wiring.environment_key(config), wiring.store(config)
    api, queue, wake = wiring.work_api(config, key), wiring.queue(config), wiring.wake_stopper(config)
    return Janitor(
        config=config,
        api=api,
        store=store,
        sandboxes=wiring.sandboxes(config),
        claimer=Claimer(config, api, key, store, queue, wiring.loop(config, store), wiring.now),
        observer=Observer(config, store, queue, wake, wiring.now),
        wake_stopper=wake,
        now=wiring.now,
    )


@flushed
def handler(event: dict[str, Any], context: Any) -> None:
    """Any event will do: it is only a doorbell."""
    janitor().sweep(wiring.now() + context.get_remaining_time_in_millis() - _SAFETY_MS)
