"""A Function URL's events (payload format 2.0) as requests, and its replies. Nothing in an event is trusted."""

import base64
import json
from dataclasses import dataclass
from typing import Any


class TooLarge(Exception):
    """The body is longer than the function reads."""


@dataclass(frozen=True)
class Request:
    """`path` without a slash at its end; `headers` named in lower case; a body that cannot be decoded is empty."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def parse(event: dict[str, Any], *, longest_body: int) -> Request:
    """Raises TooLarge for a body of more than `longest_body` bytes."""
    http = _mapping(_mapping(event.get("requestContext")).get("http"))
    headers = _mapping(event.get("headers"))
    body = _body(event)
    if len(body) > longest_body:
        raise TooLarge
    return Request(
        method=str(http.get("method")),
        path=str(event.get("rawPath", "/")).rstrip("/"),
        headers={name.lower(): value for name, value in headers.items() if isinstance(value, str)},
        body=body,
    )


def reply(status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "statusCode": status,
        "headers": {"content-type": "application/json", "cache-control": "no-store"},
        "body": json.dumps(body),
    }


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _body(event: dict[str, Any]) -> bytes:
    text = event.get("body")
    if not isinstance(text, str):
        return b""
    try:
        return base64.b64decode(text, validate=True) if event.get("isBase64Encoded") else text.encode()
    except ValueError:  # not base64, or half a surrogate pair
        return b""
