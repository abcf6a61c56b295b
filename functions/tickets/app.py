"""Tickets: a Function URL where sandboxes exchange tickets and say their last word (shared/ticketing.py)."""

import base64
import binascii
import json
from functools import cache
from typing import Any

from pydantic import SecretStr, ValidationError

from shared import wiring
from shared.config import from_env
from shared.metrics import flushed
from shared.ticketing import TicketRefused, TicketRequest, Tickets, TurnEnded

_LONGEST_BODY = 4096


@cache
def tickets() -> Tickets:
    config = from_env("stopper_function")
    key = wiring.environment_key(config) if config.hand_over_environment_key else None
    return Tickets(wiring.store(config), wiring.wake_stopper(config), wiring.now, key)


@flushed
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """POST / exchanges a ticket, POST /turn-ended takes the last word. A refusal tells nothing more (DESIGN §6)."""
    method = ((event.get("requestContext") or {}).get("http") or {}).get("method")
    path = str(event.get("rawPath", "/")).rstrip("/").rsplit("/", 1)[-1]
    body = _body(event)
    if method != "POST":
        return _reply(405, {"error": "POST only"})
    try:
        if path == "turn-ended":
            stopped = tickets().turn_ended(TurnEnded.model_validate_json(body))
            return _reply(202, {"stopped": stopped})
        credential = tickets().redeem(TicketRequest.model_validate_json(body))
    except ValidationError:
        return _reply(400, {"error": "malformed request"})
    except TicketRefused:
        return _reply(403, {"error": "refused"})
    revealed = {
        name: value.get_secret_value() if isinstance(value, SecretStr) else value
        for name, value in credential
        if value is not None
    }
    return _reply(200, revealed)


def _body(event: dict[str, Any]) -> bytes:
    text = str(event.get("body") or "")[:_LONGEST_BODY]
    try:
        return base64.b64decode(text, validate=True) if event.get("isBase64Encoded") else text.encode()
    except binascii.Error:
        return b""


def _reply(status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "statusCode": status,
        "headers": {"content-type": "application/json", "cache-control": "no-store"},
        "body": json.dumps(body),
    }
