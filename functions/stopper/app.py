"""Stopper: the lease loop's Stop, and the end of single items at once (shared/stopping.py)."""

from functools import cache
from typing import Any

from shared import wiring
from shared.config import SHARD, from_env
from shared.keeping import Keeper
from shared.metrics import flushed
from shared.stopping import Stopper


@cache
def stopper() -> Stopper:
    config = from_env("environment_id", "key_secret_arn", "queue_url", "cluster_arn")
    key, store = wiring.environment_key(config), wiring.store(config)
    api = wiring.work_api(config, key)
    keeper = Keeper(config, api, key, store, wiring.now)
    return Stopper(config, api, keeper, store, wiring.sandboxes(config), wiring.queue(config), wiring.now)


@flushed
def handler(event: dict[str, Any], context: Any) -> dict[str, int]:
    """`{"shard": ...}` from the loop, `{"work_ids": [...]}` from observer and tickets."""
    if "work_ids" in event:
        return {"closed": stopper().settle([str(work_id) for work_id in event["work_ids"]])}
    return {"closed": stopper().round(str(event.get("shard", SHARD)))}
