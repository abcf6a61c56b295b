"""The one logger: JSON lines, the service named by POWERTOOLS_SERVICE_NAME. Nothing secret is ever passed to it.

ERROR: a person must act. WARNING: something went wrong, and is repaired or put off by itself. INFO: a transition.
A message is constant, so that a query can count it; what varies is in keys of `KEYS`, which the sandbox's lines share.
"""

import logging
from typing import Any

from aws_lambda_powertools import Logger
from pydantic import BaseModel

KEYS = {
    "work_id": "the work item",
    "session_id": "its session",
    "turn": "which life of the item (DESIGN §1)",
    "attempt": "which sandbox of the turn",
    "phase": "the record's, after what the line tells",
    "task": "ARN of the sandbox's task",
    "links": "pages of the AWS console: task, log, loop",
    "reason": "why, in words",
    "error": "what a call or library said",
    "outcome": "how a turn ended (record.Outcome)",
    "exit_code": "the sandbox's (sandbox/runner.py)",
    "exit_name": "its name",
    "diagnosis": "what kind of end a container had (diagnose.Kind)",
    "what_to_do": "advice on that end",
    "pickup_seconds": "from queued at the vendor's to held",
    "launch_seconds": "from wanting a sandbox to its running",
    "first_result_seconds": "from the turn's start, a little before held, to the first tool result that the API took",
    "state": "the API's, of an item",
    "status": "of an HTTP answer, or told to CloudFormation",
    "unserved": "whether a message was left",
    "stopped": "whether the item is",
    "size": "a size class: asked for, or granted",
    "staging_seconds": "what filling the workspace took",
    "count": "how many",
    "bytes": "of outputs that were put",
    "left_out": "how many outputs were not put",
    "prefix": "where outputs are in their bucket",
    "live": "how many turns are live",
    "drained": "whether none is",
    "part": "of the janitor's round",
    "shard": "of the lease loop",
    "generation": "of the lease loop",
    "message_id": "of a launch message or webhook",
}
_OF_ITEM = {
    "work_id": "work_id",
    "session_id": "session_id",
    "turn": "turn",
    "attempt": "attempt",
    "phase": "phase",
    "task": "task_arn",
}

log = Logger()
logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a call would cost more than it tells


def log_fields(item: BaseModel) -> dict[str, Any]:
    """What each line about an item tells, as far as it is known to this record, lease, launch message or index row."""
    found = {key: getattr(item, name, None) for key, name in _OF_ITEM.items()}
    return {key: value for key, value in found.items() if value is not None}
