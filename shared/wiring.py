"""Builds what the functions use, once a process: clients and adapters. No rules, no handlers."""

import json
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config as BotoConfig
from pydantic import SecretStr

from shared.config import Config
from shared.launch_queue import LaunchQueue
from shared.loop import LeaseLoop
from shared.store import DynamoStore, Store
from shared.stored_key import StoredKey

if TYPE_CHECKING:
    from types_boto3_lambda import LambdaClient

    # each function loads what it uses alone
    from shared.buckets import Buckets, Post
    from shared.outputs import OutputsPlace
    from shared.sandboxes import Sandboxes
    from shared.staging import StagingPlaces
    from shared.work_api import WorkApi

_STANDARD = BotoConfig(
    retries={"mode": "standard", "max_attempts": 3},
    connect_timeout=3,
    read_timeout=10,
    max_pool_connections=32,
    parameter_validation=False,  # a tenth of a call's time, for what mypy and the tests have looked at
)
ENVIRONMENT_KEY_PREFIX = "sk-"
# The Region's own address of a bucket, which is the one that DNS Firewall is told (template.yaml)
SIGNING = BotoConfig(
    signature_version="s3v4", s3={"addressing_style": "virtual", "us_east_1_regional_endpoint": "regional"}
)
_NO_RETRIES = BotoConfig(retries={"total_max_attempts": 1}, connect_timeout=3, read_timeout=20)


def now() -> int:
    """Epoch milliseconds."""
    return time.time_ns() // 1_000_000


def store(config: Config) -> DynamoStore:
    return DynamoStore(boto3.client("dynamodb", config=_STANDARD), config.table)


def environment_key(config: Config) -> StoredKey:
    client = boto3.client("secretsmanager", config=_STANDARD)
    return StoredKey(
        client, config.key_secret_arn, name="environment key", prefix=ENVIRONMENT_KEY_PREFIX, until="nothing is polled"
    )


def webhook_key(config: Config) -> StoredKey:
    client = boto3.client("secretsmanager", config=_STANDARD)
    return StoredKey(
        client, config.webhook_secret_arn, name="webhook's signing key", prefix="whsec_", until="webhooks get a 503"
    )


def work_api(config: Config, key: Callable[[], SecretStr] | None) -> "WorkApi":
    """Without a key only calls with a session's own token get through; others raise NotAllowed, unsent."""
    from shared.work_api import WorkApi  # noqa: PLC0415  as in lifecycle.py

    return WorkApi(config.base_url, config.environment_id, key or _no_key, worker_id="sandbox-fleet")


def _no_key() -> SecretStr:
    return SecretStr("")


def queue(config: Config) -> LaunchQueue:
    return LaunchQueue(boto3.client("sqs", config=_STANDARD), config.queue_url)


def loop(config: Config, records: Store) -> LeaseLoop:
    return LeaseLoop(boto3.client("stepfunctions", config=_STANDARD), config.state_machine_arn, records)


def sandboxes(config: Config) -> "Sandboxes":
    """Without botocore's retries: they would burn the launch quota (FIELD_NOTES 12)."""
    from shared.sandboxes import Sandboxes  # noqa: PLC0415  as in lifecycle.py

    return Sandboxes(boto3.client("ecs", config=_NO_RETRIES), config)


@cache
def buckets() -> "Buckets":
    """Called only where something is to be signed: a sandbox that starts waits for its ticket."""
    from shared.buckets import Buckets  # noqa: PLC0415  as in lifecycle.py

    return Buckets(boto3.client("s3", config=SIGNING))


def staging_places(config: Config) -> "StagingPlaces":
    from shared.staging import StagingPlaces  # noqa: PLC0415  as in lifecycle.py

    def listed(text: str) -> frozenset[str]:
        return frozenset(filter(None, text.split(",")))

    return StagingPlaces(
        buckets=listed(config.staging_buckets),
        git_hosts=listed(config.staging_git_hosts),
        max_bytes=config.staging_max_mib << 20,
        presign=lambda bucket, key: buckets().presign_get(bucket, key),
    )


def outputs_place(config: Config) -> "OutputsPlace | None":
    """None if outputs are off."""
    if not config.outputs_bucket:
        return None
    from shared.outputs import OutputsPlace  # noqa: PLC0415  as in lifecycle.py

    def presign(key: str, least: int, most: int) -> "Post":
        return buckets().presign_post(config.outputs_bucket, key, least, most)

    return OutputsPlace(
        bucket=config.outputs_bucket,
        prefix=config.outputs_prefix,
        max_files=config.outputs_max_files,
        max_file_bytes=config.outputs_max_file_mib << 20,
        max_total_bytes=config.outputs_max_total_mib << 20,
        presign=presign,
    )


def wake_stopper(config: Config) -> Callable[[str], None]:
    """Invokes the stopper for one item, asynchronously."""

    def wake(work_id: str) -> None:
        _functions().invoke(
            FunctionName=config.stopper_function,
            InvocationType="Event",
            Payload=json.dumps({"work_ids": [work_id]}).encode(),
        )

    return wake


def wake_poller(config: Config) -> Callable[[], None]:
    """Invokes the poller, asynchronously; twice is harmless."""

    def wake() -> None:
        _functions().invoke(FunctionName=config.poller_function, InvocationType="Event", Payload=b"{}")

    return wake


@cache
def _functions() -> "LambdaClient":
    """Built for the first call: most runs of most functions wake nobody."""
    return boto3.client("lambda", config=_STANDARD)
