"""Launcher: one launch message, one sandbox (shared/launching.py); a batch fails by the message, never whole."""

from functools import cache
from typing import TYPE_CHECKING, Any

import boto3
from pydantic import ValidationError

from shared import wiring
from shared.config import Config, from_env
from shared.launching import Launcher, LaunchMessage, PutOff
from shared.log import log
from shared.metrics import flushed

if TYPE_CHECKING:
    from types_boto3_sqs import SQSClient

_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 5, 240


@cache
def config() -> Config:
    return from_env("queue_url", "dead_letters_url", "cluster_arn", "task_definition_arn", "subnets", "security_groups")


@cache
def launcher() -> Launcher:
    return Launcher(config(), wiring.store(config()), wiring.sandboxes(config()), wiring.now)


@cache
def sqs() -> "SQSClient":
    return boto3.client("sqs")


@flushed
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Malformed messages go to the dead-letter queue at once; those put off come back later and later."""
    failed = []
    for message in event.get("Records", []):
        try:
            _launch(message)
        except PutOff as reason:
            log.warning("launch put off", reason=str(reason))
            _come_back_later(message)
            failed.append(message)
        except Exception:  # noqa: BLE001  one fault holds up no other; unknown errors retry (FIELD_NOTES 5)
            log.exception("launch failed; the message comes back", id=message.get("messageId"))
            failed.append(message)
    return {"batchItemFailures": [{"itemIdentifier": message["messageId"]} for message in failed]}


def _launch(message: dict[str, Any]) -> None:
    try:
        parsed = LaunchMessage.model_validate_json(message["body"])
    except ValidationError:
        log.error("malformed launch message: moved to the dead-letter queue", id=message.get("messageId"))
        sqs().send_message(QueueUrl=config().dead_letters_url, MessageBody=message["body"])
    else:
        launcher().launch(parsed)


def _come_back_later(message: dict[str, Any]) -> None:
    received = int(message.get("attributes", {}).get("ApproximateReceiveCount", 1))
    wait = min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2 ** min(received - 1, 10))
    sqs().change_message_visibility(
        QueueUrl=config().queue_url, ReceiptHandle=message["receiptHandle"], VisibilityTimeout=wait
    )
