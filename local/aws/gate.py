"""Who may call a local AWS beside which an agent's own code runs; what an authenticated caller may do is ministack's.

ministack takes calls without a credential, with the key `test` or with an account's number for the root user's. Here
only what has no credential on AWS either passes without one: function URLs.
"""

import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

ROOT_KEY, ROOT_SECRET = "LOCAL_AWS_ROOT_KEY_ID", "LOCAL_AWS_ROOT_SECRET"
"""The variables that name the root user's credential and turn the gate on."""

_FUNCTION_URLS = "/_aws/lambda-url/"
_SIGNED = re.compile(r"Credential=([^/,\s]+)/")
_ANYBODY = re.compile(r"|test|\d{12}")

Message = MutableMapping[str, Any]
App = Callable[[Message, Any, Any], Awaitable[None]]


def guarded(app: App) -> App:
    """The application behind the gate; WebSockets, which carry no signature here, do not pass."""

    async def gate(scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and _may_pass(scope)):
            await app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = json.dumps({"__type": "AccessDeniedException", "message": "This local AWS needs its own key."}).encode()
        headers = [(b"content-type", b"application/x-amz-json-1.1"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return gate


def _may_pass(scope: Message) -> bool:
    if str(scope["path"]).startswith(_FUNCTION_URLS):
        return True
    return not _ANYBODY.fullmatch(access_key(scope["headers"], scope["query_string"]))


def access_key(headers: Iterable[tuple[bytes, bytes]], query: bytes) -> str:
    """The id of the key that a request says it is signed with; empty if it says none."""
    for name, value in headers:
        if name.lower() == b"authorization" and (signed := _SIGNED.search(value.decode("latin-1"))):
            return signed[1]
    named = parse_qs(query.decode("latin-1"))
    for parameter in ("X-Amz-Credential", "AWSAccessKeyId"):
        if parameter in named:
            return named[parameter][0].split("/", 1)[0]
    return ""
