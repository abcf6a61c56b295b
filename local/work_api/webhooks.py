"""The vendor's webhook (W§12): tells one address that a session began to run. One attempt each; no queue, no rules."""

import asyncio
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
from standardwebhooks import Webhook

from local.work_api.state import Refusal, timestamp

_TIMEOUT_SECONDS = 30.0


class Webhooks:
    """Off until `register`. Deliveries run in the background of the event loop that calls `announce`."""

    def __init__(self, now: Callable[[], datetime], new_id: Callable[[str], str]) -> None:
        self._now, self._new_id = now, new_id
        self._url = ""
        self._running: set[asyncio.Task[None]] = set()
        self._signer: Webhook | None = None
        self.deliveries: list[dict[str, Any]] = []

    def register(self, url: Any, key: Any) -> None:
        """`key` is the signing key, `whsec_...`. Raises Refusal 400."""
        if not isinstance(url, str) or not isinstance(key, str) or not key.startswith("whsec_"):
            raise Refusal(400, "url and key must be strings, and the key start with whsec_.")
        self._url, self._signer = url, Webhook(key)

    def announce(self, session_id: str) -> None:
        """`session.status_run_started`, if an address is registered."""
        if self._signer:
            delivery = {"id": self._new_id("whe"), "session_id": session_id, "status": None}
            self.deliveries.append(delivery)
            task = asyncio.create_task(self._deliver(self._signer, delivery))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    def close(self) -> None:
        """Give up what is on its way."""
        for task in self._running:
            task.cancel()

    async def _deliver(self, signer: Webhook, delivery: dict[str, Any]) -> None:
        event_id, sent_at = delivery["id"], datetime.now(UTC)  # the receiver compares it with the real time
        ids = {"id": delivery["session_id"], "organization_id": "org_emulated", "workspace_id": "wrkspc_emulated"}
        data = {"type": "session.status_run_started", **ids}
        created_at = timestamp(self._now())
        body = json.dumps({"type": "event", "id": event_id, "created_at": created_at, "data": data})
        headers = {
            "content-type": "application/json",
            "webhook-id": event_id,
            "webhook-timestamp": str(int(sent_at.timestamp())),
            "webhook-signature": signer.sign(event_id, sent_at, body),
        }
        try:
            async with httpx.AsyncClient(timeout=_TIMEOUT_SECONDS) as client:
                delivery["status"] = (await client.post(self._url, content=body, headers=headers)).status_code
        except httpx.HTTPError as error:
            print(f"webhook {event_id} not delivered: {type(error).__name__}", file=sys.stderr, flush=True)
