"""The vendor's webhook (WORK_API.md §12): a doorbell that wakes the poller. `standardwebhooks` does the checks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, SecretStr
from standardwebhooks import Webhook, WebhookVerificationError
from standardwebhooks.webhooks import EmptyWebhookSecretError

from shared.config import Missing
from shared.log import log

RUN_STARTED = "session.status_run_started"


class NotGenuine(Exception):
    """Not the vendor's, or not of the last five minutes. The reply tells no detail."""


class _Data(BaseModel):
    type: str


class _Event(BaseModel):
    """What we read of an event; it names no work item."""

    model_config = ConfigDict(hide_input_in_errors=True)
    data: _Data


@dataclass
class Doorbell:
    key: Callable[[], SecretStr]
    wake_poller: Callable[[], None]

    def ring(self, headers: Mapping[str, str], body: bytes) -> None:
        """Verify, then wake the poller if a session began to run. `headers` are in lower case, `body` is as received.

        A delivery may repeat or be replayed within the tolerance: that only polls once more, so no id is kept.
        Raises NotGenuine; Missing while there is no key; pydantic's ValidationError for a genuine body of no event.
        """
        verify(self.key(), headers, body)
        event = _Event.model_validate_json(body)
        if event.data.type != RUN_STARTED:
            return
        self.wake_poller()
        log.info("webhook woke the poller", message_id=headers["webhook-id"])


def verify(key: SecretStr, headers: Mapping[str, str], body: bytes) -> None:
    """Signature in constant time, timestamp within five minutes either way (W§12). Raises NotGenuine, or Missing."""
    try:
        webhook = Webhook(key.get_secret_value())
    except (ValueError, EmptyWebhookSecretError):
        raise Missing("the webhook's signing key is no key: put it into its secret as the vendor shows it") from None
    try:
        webhook.verify(body, dict(headers), json_parse=False)
    except (WebhookVerificationError, ValueError):  # ValueError: base64, UTF-8 or the list of signatures is malformed
        raise NotGenuine from None
