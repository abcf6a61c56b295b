"""Webhook: a Function URL that the vendor calls when a session began to run (shared/webhook.py)."""

from functools import cache
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from pydantic import ValidationError

from shared import wiring
from shared.config import Missing, from_env
from shared.function_url import TooLarge, parse, reply
from shared.log import log
from shared.metrics import flushed
from shared.webhook import Doorbell, NotGenuine

_LONGEST_BODY = 20_480  # bytes; Standard Webhooks asks senders to stay below 20 kB, and this payload has no content


@cache
def webhook() -> Doorbell:
    config = from_env("webhook_secret_arn", "poller_function")
    return Doorbell(wiring.webhook_key(config), wiring.wake_poller(config))


@flushed
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Any 2xx tells the sender that it is done (W§12). 503 has it try again: the fault is ours, and may pass."""
    try:
        request = parse(event, longest_body=_LONGEST_BODY)
        if request.method != "POST":
            return reply(405, {"error": "POST only"})
        webhook().ring(request.headers, request.body)
    except TooLarge:
        return reply(413, {"error": "too large"})
    except NotGenuine:
        reason = "its signature, time or headers are wrong; is the signing key the endpoint's own?"
        log.warning("webhook refused", reason=reason)
        return reply(401, {"error": "refused"})
    except ValidationError:
        log.warning("webhook refused", reason="signed, but not an event as we know them")
        return reply(400, {"error": "malformed event"})
    except Missing as missing:
        log.error("not configured: webhooks get a 503", reason=str(missing))
        return reply(503, {"error": "not ready"})
    except (BotoCoreError, ClientError) as error:
        log.warning("webhook not served; its sender tries again, and the schedule polls anyway", error=str(error))
        return reply(503, {"error": "not ready"})
    return reply(202, {})
