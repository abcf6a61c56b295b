"""Launcher: one launch message, one sandbox (shared/launching.py); a batch fails by the message, never whole."""

from functools import cache
from typing import TYPE_CHECKING, Any

import boto3
from pydantic import ValidationError

from shared import wiring
from shared.config import Config, from_env
from shared.launching import Launcher, LaunchMessage, PutOff
from shared.lifecycle import growing_delay
from shared.log import log
from shared.metrics import flushed

if TYPE_CHECKING:
    from types_boto3_sqs import SQSClient


@cache
def config() -> Config:
    return from_env("queue_url", "dead_letters_url", "cluster_arn", "task_definition_arn", "subnets", "security_groups")


@cache
def launcher() -> Launcher:
    key = wiring.environment_key(config()) if config().hand_over_environment_key else None
    api = wiring.work_api(config(), key)
    return Launcher(config(), api, wiring.store(config()), wiring.sandboxes(config()), wiring.now)


@cache
def sqs() -> "SQSClient":
    return boto3.client("sqs")


@flushed
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Malformed messages go to the dead-letter queue at once; those put off come back later and later."""
    failed = []
    records = event.get("Records", [])
    for message in records if isinstance(records, list) else [records]:
        try:
            _launch(message)
        except PutOff:
            _come_back_later(message)
            failed.append(message)
        except Exception:  # noqa: BLE001  one fault holds up no other; unknown errors retry (FIELD_NOTES 5)
            log.exception("launch failed; the message comes back", message_id=_id(message))
            failed.append(message)
    return {"batchItemFailures": [{"itemIdentifier": _id(message)} for message in failed]}


def _id(message: Any) -> str:
    """Of a message without one an empty id, by which Lambda takes the whole batch as failed: nothing is lost."""
    found = message.get("messageId") if isinstance(message, dict) else None
    return found if isinstance(found, str) else ""


def _launch(message: dict[str, Any]) -> None:
    try:
        parsed = LaunchMessage.model_validate_json(message["body"])
    except ValidationError:
        log.error("malformed launch message: moved to the dead-letter queue", message_id=_id(message))
        sqs().send_message(QueueUrl=config().dead_letters_url, MessageBody=message["body"])
    else:
        launcher().launch(parsed)


def _come_back_later(message: dict[str, Any]) -> None:
    try:
        received = int(message["attributes"]["ApproximateReceiveCount"])
        wait = growing_delay(received)
        sqs().change_message_visibility(
            QueueUrl=config().queue_url, ReceiptHandle=message["receiptHandle"], VisibilityTimeout=wait
        )
    except Exception:  # noqa: BLE001  the others of the batch go on; this one comes back when its visibility ends
        log.exception("the message comes back later than wanted", message_id=_id(message))
