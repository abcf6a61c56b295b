"""Image: CloudFormation's custom resource that builds the sandbox image (shared/image.py) and answers in every case."""

import json
import time
from functools import cache
from typing import Any

import boto3
import httpx
from botocore.config import Config as BotoConfig

from shared.image import BuildFailed, ImageBuilder, ImageRequest
from shared.log import log
from shared.metrics import flushed

_LONGEST_REASON = 1000  # the whole answer may have 4096 bytes
_ANSWER_WAITS = (0.0, 1.0, 3.0, 9.0)


class Unanswered(Exception):
    """CloudFormation did not take the answer; Lambda repeats the event, which is harmless."""


@cache
def builder() -> ImageBuilder:
    config = BotoConfig(retries={"mode": "standard", "max_attempts": 5}, connect_timeout=3, read_timeout=20)
    return ImageBuilder(
        boto3.client("lambda", config=config),
        boto3.client("codebuild", config=config),
        boto3.client("ecr", config=config),
    )


@flushed
def handler(event: dict[str, Any], context: Any) -> None:
    """Answers whatever happens: an unanswered request would hold the stack. Raises Unanswered."""
    answer: dict[str, Any] = {"Status": "SUCCESS"}
    try:
        if event["RequestType"] != "Delete":  # the repository, deleted with the stack, takes its images along
            request = ImageRequest.model_validate(event["ResourceProperties"])
            image = builder().ensure(request, event["RequestId"], lambda: context.get_remaining_time_in_millis() / 1000)
            answer["Data"] = {"ImageUri": image}
    except BuildFailed as failure:
        answer = {"Status": "FAILED", "Reason": str(failure)[:_LONGEST_REASON]}
    except Exception as error:  # noqa: BLE001  told to CloudFormation, which shows it to who deploys
        log.exception("the image could not be built")
        answer = {"Status": "FAILED", "Reason": f"{type(error).__name__}: {error}"[:_LONGEST_REASON]}
    _send(event, answer)


def _send(event: dict[str, Any], answer: dict[str, Any]) -> None:
    """Puts the answer to the request's address, which whoever knows it may write to: it is never logged."""
    body = answer | {
        # One and the same for ever: a changed one would make CloudFormation delete the former
        "PhysicalResourceId": event.get("PhysicalResourceId") or event["LogicalResourceId"],
        **{name: event[name] for name in ("StackId", "RequestId", "LogicalResourceId")},
    }
    said = ""
    for wait in _ANSWER_WAITS:
        time.sleep(wait)
        try:
            reply = httpx.put(event["ResponseURL"], content=json.dumps(body), headers={"content-type": ""}, timeout=10)
        except httpx.HTTPError as error:
            said = type(error).__name__
            continue
        if reply.is_success:
            log.info("answered CloudFormation", status=answer["Status"], reason=answer.get("Reason"))
            return
        said = f"status {reply.status_code}"
    raise Unanswered(f"CloudFormation's address did not take the answer: {said}")
