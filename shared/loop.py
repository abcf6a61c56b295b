"""Keeps the lease loop of a shard running: start by name and generation (DESIGN §7). The loop itself is ASL."""

import json
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from shared.log import log
from shared.store import Conflict, Store

if TYPE_CHECKING:
    from types_boto3_stepfunctions import SFNClient


class LeaseLoop:
    """Starts the loop if it does not run; doing so twice, or beside another starter, is harmless."""

    def __init__(self, client: "SFNClient", state_machine_arn: str, store: Store) -> None:
        self._client, self._arn, self._store = client, state_machine_arn, store

    def ensure(self, shard: str) -> None:
        """Whoever makes a record live calls this."""
        generation = self._store.loop_generation(shard)
        if self._runs(shard, generation) or self._start(shard, generation):
            return
        # A successor that the loop itself started carries the next number (lease_loop.asl.yaml).
        try:
            generation = self._store.raise_loop_generation(shard, generation)
        except Conflict:
            return  # someone else is starting it
        if not self._runs(shard, generation) and not self._start(shard, generation):
            log.warning("the lease loop could not be started; the next run tries again", shard=shard)

    def _start(self, shard: str, generation: int) -> bool:
        state = {"shard": shard, "generation": generation, "round": 0, "empty_rounds": 0}
        try:
            self._client.start_execution(
                stateMachineArn=self._arn, name=_name(shard, generation), input=json.dumps(state)
            )
        except ClientError as error:
            if error.response["Error"]["Code"] != "ExecutionAlreadyExists":
                raise
            return self._runs(shard, generation)
        log.info("lease loop started", shard=shard, generation=generation)
        return True

    def _runs(self, shard: str, generation: int) -> bool:
        arn = f"{self._arn.replace(':stateMachine:', ':execution:')}:{_name(shard, generation)}"
        try:
            return self._client.describe_execution(executionArn=arn)["status"] == "RUNNING"
        except ClientError as error:
            if error.response["Error"]["Code"] != "ExecutionDoesNotExist":
                raise
            return False


def _name(shard: str, generation: int) -> str:
    return f"lease-loop-{shard}-{generation}"
