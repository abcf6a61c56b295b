"""Whose calls pass the local AWS's gate."""

import asyncio
from typing import Any

import pytest

from local.aws.gate import guarded

OWN = "AKIA0123456789ABCDEF"


def called(kind: str, path: str, authorization: str = "", query: str = "") -> list[Any]:
    """What a caller gets: the application's name, or the gate's own messages."""
    got: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got.append("served")

    async def send(message: Any) -> None:
        got.append(message.get("status") or message["type"])

    headers = [(b"authorization", authorization.encode())] if authorization else []
    scope = {"type": kind, "path": path, "headers": headers, "query_string": query.encode()}

    async def call() -> None:
        await guarded(app)(scope, None, send)

    asyncio.run(call())
    return got


def signed(key: str) -> str:
    return f"AWS4-HMAC-SHA256 Credential={key}/20261125/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


@pytest.mark.parametrize(
    ("authorization", "query"),
    [
        ("", ""),
        (signed("test"), ""),
        (signed("000000000000"), ""),
        ("", "X-Amz-Credential=test%2F20261125%2Fus-east-1%2Fs3%2Faws4_request"),
        ("", "AWSAccessKeyId=test"),
        ("Bearer test", ""),
    ],
)
def test_a_credential_that_anybody_knows_is_refused(authorization: str, query: str) -> None:
    for path in ("/", "/_ministack/reset", "/bucket/object", "/_localstack/init"):
        assert called("http", path, authorization, query)[0] == 403


def test_a_credential_of_this_run_reaches_the_local_aws() -> None:
    assert called("http", "/", signed(OWN)) == ["served"]
    assert called("http", "/b/o", "", f"X-Amz-Credential={OWN}%2F20261125%2Fus-east-1%2Fs3%2Faws4_request") == [
        "served"
    ]


def test_function_urls_are_for_everybody_as_on_aws() -> None:
    assert called("http", "/_aws/lambda-url/abc/") == ["served"]


def test_a_socket_does_not_pass_and_the_start_does() -> None:
    assert called("websocket", "/") == ["websocket.close"]
    assert called("lifespan", "") == ["served"]
