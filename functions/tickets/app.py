"""Tickets: a Function URL where sandboxes exchange tickets, ask for uploads, say words (shared/ticketing.py)."""

from functools import cache
from typing import Any

from pydantic import SecretStr, ValidationError

from shared import wiring
from shared.config import from_env
from shared.function_url import TooLarge, parse, reply
from shared.metrics import flushed
from shared.outputs import OutputsPut, OutputsRequest
from shared.staging import StagingRequest
from shared.ticketing import TicketRefused, TicketRequest, Tickets, TurnEnded

_LONGEST_BODY = 4096
_LONGEST_LISTING = 320_000  # of up to a thousand files (sandbox/outputs.py)


@cache
def tickets() -> Tickets:
    config = from_env("stopper_function")
    key = wiring.environment_key(config) if config.hand_over_environment_key else None
    place = wiring.outputs_place(config)
    return Tickets(
        wiring.store(config),
        wiring.wake_stopper(config),
        wiring.now,
        key,
        outputs=place,
        staging=wiring.staging_places(config),
    )


@flushed
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """POST / exchanges a ticket, /turn-ended takes the last word, /staging and /outputs sign, /outputs-put hears of it.

    A refusal tells nothing more (DESIGN §6).
    """
    try:
        lists = str(event.get("rawPath")).endswith("/outputs")
        request = parse(event, longest_body=_LONGEST_LISTING if lists else _LONGEST_BODY)
        if request.method != "POST":
            return reply(405, {"error": "POST only"})
        if request.path.endswith("/outputs"):
            grant = tickets().grant_outputs(OutputsRequest.model_validate_json(request.body))
            return reply(200, grant.model_dump())
        if request.path.endswith("/staging"):
            sources = tickets().grant_staging(StagingRequest.model_validate_json(request.body))
            return reply(200, sources.model_dump(exclude_none=True))
        if request.path.endswith("/outputs-put"):
            tickets().note_outputs(OutputsPut.model_validate_json(request.body))
            return reply(202, {})
        if request.path.endswith("/turn-ended"):
            stopped = tickets().turn_ended(TurnEnded.model_validate_json(request.body))
            return reply(202, {"stopped": stopped})
        credential = tickets().redeem(TicketRequest.model_validate_json(request.body))
    except (TooLarge, ValidationError):
        return reply(400, {"error": "malformed request"})
    except TicketRefused:
        return reply(403, {"error": "refused"})
    revealed = {
        name: value.get_secret_value() if isinstance(value, SecretStr) else value
        for name, value in credential
        if value is not None
    }
    return reply(200, revealed)
