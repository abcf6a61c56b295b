"""How requests are read and replies are shaped (W§8, W§11.1); no rules, no state."""

import ipaddress
import json
import sys
import uuid
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from local.work_api.sessions import Event
from local.work_api.state import Refusal

BETA = "managed-agents-2026-04-01"


class Unanswered(Response):
    """Not a reply: the connection is closed instead of one."""

    def __init__(self, cut: Callable[[Any], None] | None) -> None:
        super().__init__()
        if cut is None:
            raise RuntimeError("without a server there is no connection to close")
        self._cut = cut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - nothing is sent
        self._cut(scope["client"])
        while (await receive())["type"] != "http.disconnect":
            pass


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def request_id_header() -> dict[str, str]:
    return {"request-id": new_id("req")}


def json_reply(body: Any) -> Response:
    return JSONResponse(body, headers=request_id_header())


def envelope(refusal: Refusal) -> Response:
    headers = request_id_header()
    if refusal.retry_after is not None:
        headers["retry-after"] = str(refusal.retry_after)
    error: dict[str, Any] = {"type": refusal.type, "message": refusal.message}
    if refusal.details is not None:
        error["details"] = refusal.details
    body = {"type": "error", "error": error, "request_id": headers["request-id"]}
    return JSONResponse(body, refusal.status, headers)


def rate_limited(seconds: int) -> Refusal:
    return Refusal(429, "Too many calls a minute.", type="rate_limit_error", retry_after=seconds)


def log_refusal(request: Request, refusal: Refusal) -> None:
    """One line on stderr: the path still percent-encoded and without its query, no header, no body."""
    path = request.scope["raw_path"].decode("ascii", "replace")
    message = " ".join(refusal.message.split())
    print(f"refused {request.method} {path}: {refusal.status} {refusal.type}: {message}", file=sys.stderr, flush=True)


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)  # noqa: S101 - registered for it alone
    log_refusal(request, error)
    return envelope(error)


async def no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it alone
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    refusal = Refusal(error.status_code, str(error.detail), type=kind)
    log_refusal(request, refusal)
    return envelope(refusal)


async def failed(request: Request, error: Exception) -> Response:  # noqa: ARG001 - Starlette's signature
    return envelope(Refusal(500, "Internal server error", type="api_error"))


def check_beta(request: Request) -> None:
    values = ",".join(request.headers.getlist("anthropic-beta"))
    if BETA not in {value.strip() for value in values.split(",")}:
        raise Refusal(404, "Not found", type="not_found_error")  # W§8: beta routes look absent without it


def check_loopback(request: Request) -> None:
    if request.client is None or not ipaddress.ip_address(request.client.host).is_loopback:
        raise Refusal(403, "The control routes answer this machine only.", type="permission_error")


def token_of(request: Request) -> str | None:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key")


async def body_of(request: Request) -> dict[str, Any]:
    """The body's object; zero bytes are an empty one, whatever their content type says (W§1)."""
    raw = await request.body()
    if not raw:
        return {}
    try:
        body = json.loads(raw)
    except ValueError:
        raise Refusal(400, "The request body is not valid JSON.") from None
    if not isinstance(body, dict):
        raise Refusal(400, "The request body must be a JSON object.")
    return body


def integer_in(
    request: Request, name: str, default: int | None, least: int | None = None, most: int | None = None
) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = int(text)
    except ValueError:
        raise Refusal(400, f"{name} must be an integer.") from None
    if (least is not None and value < least) or (most is not None and value > most):
        raise Refusal(400, f"{name} is out of range.")
    return value


def flag_in(body: dict[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise Refusal(400, f"{name} must be a boolean.")
    return value


def text_of(event: Event) -> str:
    content = event.get("content")
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else []
    return "\n".join(str(block.get("text", "")) for block in blocks if isinstance(block, dict))
