"""Who may call what (W§8): tokens, the secrets handed out at polls, and the refusals; no HTTP, no clock of its own."""

import base64
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from local.work_api.state import Refusal
from local.work_api.switches import Switches

# The credentials that each call accepts (W§8).
WORK_CALLS = {
    "poll": {"environment_key"},
    "ack": {"environment_key"},
    "list": {"environment_key"},
    "stats": {"environment_key", "org_key"},
    "retrieve": {"org_key"},
    "update": {"org_key"},
    "heartbeat": {"environment_key", "sessions_token"},
    "stop": {"environment_key", "org_key", "sessions_token"},
}

TOKEN_LIFETIME = timedelta(hours=1)  # where a sessions token has one


@dataclass(frozen=True)
class Caller:
    """Whose token it is; a sessions token's has one item and one session."""

    credential: str
    work_id: str | None = None
    session_id: str | None = None


@dataclass
class Access:
    """The keys of one environment and every sessions token given out."""

    environment_id: str
    environment_key: str = field(repr=False)
    org_key: str = field(repr=False)
    now: Callable[[], datetime]
    switches: Switches = field(default_factory=Switches)
    issued: list[str] = field(default_factory=list, repr=False)
    more_keys: list[str] = field(
        default_factory=list, repr=False
    )  # of the same environment, as before a rotation's end
    _tokens: dict[str, tuple[Caller, datetime]] = field(default_factory=dict, repr=False)

    def issue_secret(self, work_id: str, session_id: str | None) -> str | None:
        """A poll's `secret`: base64url JSON without padding, or none (W§10)."""
        if self.switches.secret == "null":  # noqa: S105 - a switch's value
            return None
        token = f"sk-ant-si-{secrets.token_urlsafe(32)}"
        ingress = f"sk-ant-ii-{secrets.token_urlsafe(32)}"
        payload = {
            "sessions_token": token,
            "session_ingress_token": ingress,
            "auth": [{"type": "session_ingress", "token": ingress}],
        }
        secret = base64.urlsafe_b64encode(json.dumps(payload).encode()).rstrip(b"=").decode()
        self._tokens[token] = Caller("sessions_token", work_id, session_id), self.now()
        self.issued += [secret, token, ingress]
        return secret

    def caller(self, token: str | None) -> Caller:
        """Told by the token, whichever header it came in. Raises Refusal 401."""
        if not token:
            raise Refusal(401, "x-api-key header is required", type="authentication_error")
        if any(secrets.compare_digest(token.encode(), key.encode()) for key in (self.environment_key, *self.more_keys)):
            return Caller("environment_key")
        if secrets.compare_digest(token.encode(), self.org_key.encode()):
            return Caller("org_key")
        if token in self._tokens:
            caller, issued_at = self._tokens[token]
            if self.switches.credential_lifetime == "unlimited" or self.now() <= issued_at + TOKEN_LIFETIME:
                return caller
        raise Refusal(401, "Invalid bearer token", type="authentication_error")

    def check_work(self, caller: Caller, call: str, environment_id: str, work_id: str | None) -> None:
        """Raises Refusal 403, or 404 to the organisation key for an unknown environment."""
        if environment_id != self.environment_id:
            if caller.credential == "org_key":
                message = f"Environment {environment_id} was not found."
                raise Refusal(404, message, type="not_found_error")
            raise _forbidden("Token not authorized for this environment")
        opened = call == "update" and self.switches.update == "anybody"
        if caller.credential not in WORK_CALLS[call] and not opened:
            if caller.credential == "org_key":
                if call == "list" and self.switches.list_org_key == "200":
                    return
                if call in ("poll", "ack", "heartbeat") and self.switches.org_key == "401":
                    raise Refusal(401, "Authentication failed", type="authentication_error")
                raise _forbidden("This call needs the environment key")
            raise _forbidden("OAuth token does not meet scope requirement any_of(org:read, org:write)")
        if caller.credential == "sessions_token" and caller.work_id != work_id:
            raise _forbidden("Token not authorized for this work item")

    def check_session(self, caller: Caller, session_id: str) -> None:
        """Raises Refusal 403 for a sessions token of another session."""
        if caller.credential == "sessions_token" and caller.session_id != session_id:
            raise _forbidden("Token not authorized for this session")

    def check_event(self, caller: Caller, event: Any) -> None:
        """Raises Refusal 403 for a tool result under the organisation key, or a refused sessions token (W§11.2)."""
        refused = {"org_key"} if self.switches.credential_events == "accepted" else {"org_key", "sessions_token"}
        if caller.credential in refused and event.get("type") == "user.tool_result":
            raise _forbidden("user.tool_result may only be sent with environment credentials")


def _forbidden(message: str) -> Refusal:
    return Refusal(403, message, type="permission_error")
