"""Poller: the schedule wakes it; it claims what the queue holds (shared/claiming.py)."""

from functools import cache
from typing import Any

from shared import wiring
from shared.claiming import Claimer
from shared.config import Missing, from_env
from shared.log import log
from shared.metrics import flushed
from shared.work_api import WorkApiError

_SAFETY_MS = 5_000


@cache
def claimer() -> Claimer:
    config = from_env("environment_id", "key_secret_arn", "queue_url", "state_machine_arn")
    key, store = wiring.environment_key(config), wiring.store(config)
    return Claimer(
        config=config,
        api=wiring.work_api(config, key),
        key=key,
        store=store,
        queue=wiring.queue(config),
        loop=wiring.loop(config, store),
        now=wiring.now,
    )


@flushed
def handler(event: dict[str, Any], context: Any) -> dict[str, int]:
    """Any event will do: it is only a doorbell."""
    try:
        until = wiring.now() + context.get_remaining_time_in_millis() - _SAFETY_MS
        return {"held": claimer().run(owner=context.aws_request_id, until=until)}
    except Missing as missing:
        log.error("not configured: nothing is polled", reason=str(missing))
    except WorkApiError as error:
        log.error("polling failed; the next minute tries again", error=error.message)
    return {"held": 0}
