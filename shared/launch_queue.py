"""The SQS queue between claim and launch: who sends to it need not load what claims."""

import json
from typing import TYPE_CHECKING

from shared import lifecycle
from shared.record import Record

if TYPE_CHECKING:
    from types_boto3_sqs import SQSClient


class LaunchQueue:
    """A duplicate message is harmless, the launcher's condition drops it."""

    def __init__(self, client: "SQSClient", url: str) -> None:
        self._client, self._url = client, url

    def send(self, record: Record, *, at_once: bool = False) -> None:
        body = {"work_id": record.work_id, "turn": record.turn, "attempt": record.attempt}
        delay = 0 if at_once else lifecycle.relaunch_delay(record)
        self._client.send_message(QueueUrl=self._url, MessageBody=json.dumps(body), DelaySeconds=delay)
