"""`fleet key`: rotates the environment key, checked before it is put. It is on no command line and in no output."""

import getpass
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from pydantic import SecretStr

from cli.stack import Fleet
from cli.terminal import Code, Failure, clock, note, print_json, say, working
from shared import wiring
from shared.config import Missing
from shared.stored_key import CACHE_SECONDS
from shared.work_api import NotAllowed, WorkApiError

CALL_SECONDS = 15.0
"""Longer than any call that a function sent with the old key just before it read the new one."""


def rotate(
    ctx: typer.Context,
    file: Annotated[
        Path | None, typer.Option(help="A file that holds the new key; else it is asked for, or read from a pipe.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until no function uses the old key.")] = True,
) -> None:
    """Put a new environment key, checked first; says when the old one may be revoked.

    Sessions go on meanwhile. Make the new key at the vendor's before, and revoke the old one after.
    """
    fleet: Fleet = ctx.obj
    key = read_key(file)
    if key.get_secret_value() == _present(fleet):
        raise Failure("This is the key that the stack uses already; nothing was changed.", Code.NOT_DONE)
    _check(fleet, key)
    put = fleet.client("secretsmanager").put_secret_value
    put(SecretId=fleet.config.key_secret_arn, SecretString=key.get_secret_value())
    done_at = time.time() + CACHE_SECONDS + CALL_SECONDS
    note(
        f"The new key works and is put. Every function uses it by {clock(done_at * 1000)}; keep the old one until then."
    )
    if wait:
        _wait_until(done_at)
    holders = _holders(fleet)
    if fleet.json:
        print_json({"revocable_from": round(done_at * 1000), "old_key_in_sandboxes_of": holders})
        return
    if holders:
        say(f"Revoke the old key once these sessions have ended: their sandboxes may hold it: {', '.join(holders)}")
    else:
        say("The old key may be revoked now." if wait else f"The old key may be revoked from {clock(done_at * 1000)}.")


def read_key(file: Path | None) -> SecretStr:
    """Raises Failure if there is none, or if it cannot be one; never quotes it."""
    try:
        if file is not None:
            text = file.read_text()
        elif sys.stdin.isatty():
            text = getpass.getpass("New environment key (not shown): ")
        else:
            text = sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"The key could not be read from {file}: {type(error).__name__}.", Code.USAGE) from None
    text = text.strip()
    if not text.startswith(wiring.ENVIRONMENT_KEY_PREFIX) or not text.isascii() or any(map(str.isspace, text)):
        raise Failure(
            f"That is no environment key: one starts with {wiring.ENVIRONMENT_KEY_PREFIX!r} and is one word. "
            "Nothing was changed.",
            Code.USAGE,
        )
    return SecretStr(text)


def _present(fleet: Fleet) -> str | None:
    try:
        return fleet.key().get_secret_value()
    except Missing:  # the first key of a new stack
        return None


def _check(fleet: Fleet, key: SecretStr) -> None:
    """Raises Failure unless the API lets this key serve this environment."""
    environment = fleet.config.environment_id
    try:
        wiring.work_api(fleet.config, lambda: key).stats()
    except NotAllowed as refused:
        raise Failure(
            f"The API refuses this key for environment {environment} ({refused.status}). Nothing was changed: "
            "make a key for that environment, or wait a moment if it is new."
        ) from None
    except WorkApiError as error:
        raise Failure(f"The key could not be checked, so nothing was changed: {error}") from None


def _wait_until(end: float) -> None:
    with working("waiting until no function uses the old key") as update:
        while (left := end - time.time()) > 0:
            update(f"waiting until no function uses the old key: {left:.0f} s")
            time.sleep(min(1.0, left))


def _holders(fleet: Fleet) -> list[str]:
    """The live items whose sandbox may have been given the old key, for want of a secret of its own (W§10)."""
    if not fleet.config.hand_over_environment_key:
        return []
    return [record.work_id for record in fleet.live_records() if record.secret is None]
