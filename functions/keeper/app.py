"""Keeper: the lease loop's Beat (shared/keeping.py)."""

from functools import cache
from typing import Any

from shared import wiring
from shared.config import from_env
from shared.keeping import Keeper, RoundState
from shared.metrics import flushed


@cache
def keeper() -> Keeper:
    config = from_env("environment_id", "key_secret_arn")
    key = wiring.environment_key(config)
    return Keeper(config, wiring.work_api(config, key), key, wiring.store(config), wiring.now)


@flushed
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Takes and returns the loop's state; an error is the loop's to retry."""
    return keeper().round(RoundState.model_validate(event)).model_dump()
