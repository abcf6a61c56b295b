"""What a sandbox says to the control plane's tickets function, and nothing to the API: a ticket for its
credential at the start, a word at the end of the turn if the control plane must act, the outputs (DESIGN §6, §7)."""

import base64
import binascii
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass

import anyio
import httpx2
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

# A ticket's first use may be repeated, with its nonce, for 60 s (DESIGN §6); later it is refused.
EXCHANGE_SECONDS = 50.0
WORD_SECONDS = 15.0
REQUEST_SECONDS = 10.0

_FIRST_DELAY_SECONDS = 0.5
_LAST_DELAY_SECONDS = 8.0


class TicketRefused(Exception):
    """The ticket is spent, unknown, or not for an attempt that may run: final."""


class ControlPlaneUnanswered(Exception):
    """No usable answer within the time given: another attempt may fare better."""


@dataclass(frozen=True)
class Attempt:
    """Which sandbox this is: one attempt at one turn of one work item (DESIGN §1)."""

    work_id: str
    turn: int
    attempt: int

    def as_fields(self) -> dict[str, str | int]:
        return {"work_id": self.work_id, "turn": self.turn, "attempt": self.attempt}


class Grant(BaseModel):
    """What a ticket is exchanged for: the session's own credential, and a secret for the end-of-turn word.

    `environment_key` comes only for an item without a work secret, if the stack's owner allows it (DESIGN §6).
    """

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    work_id: str
    environment_id: str
    session_id: str
    work_secret: SecretStr | None = None
    environment_key: SecretStr | None = None
    callback_secret: SecretStr
    outputs: bool = False  # whether there is a bucket for what the agent leaves
    staging: bool = False  # whether something is to be put into the workspace first

    def sessions_token(self) -> str | None:
        """The bearer token inside the work secret (W§10), or None if it holds none."""
        payload = self._payload()
        token = payload.get("sessions_token") if isinstance(payload, dict) else None
        return token if isinstance(token, str) and token else None

    def secret_values(self) -> set[str]:
        """What must never be shown: every secret, and whatever credentials the work secret bundles."""
        known = {self.work_id, self.environment_id, self.session_id}
        bundled = {text for text in _strings(self._payload()) if len(text) >= 12 and text not in known}
        given = (self.work_secret, self.environment_key, self.callback_secret)
        return bundled | {secret.get_secret_value() for secret in given if secret}

    def _payload(self) -> object:
        if self.work_secret is None:
            return None
        secret = self.work_secret.get_secret_value()
        try:
            return json.loads(base64.urlsafe_b64decode(secret + "=" * (-len(secret) % 4)))
        except (binascii.Error, ValueError):
            return None


class Archive(BaseModel):
    """What to unpack, and where it can be read for a while."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    name: str
    url: str = Field(repr=False)


class Repository(BaseModel):
    """What to clone."""

    model_config = ConfigDict(frozen=True)

    url: str
    reference: str | None = None


class StagingGrant(BaseModel):
    """What to put into the workspace, or why it may not be."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    archive: Archive | None = None
    git: Repository | None = None
    refused: str | None = None
    max_bytes: int


class Post(BaseModel):
    """A form that puts one file into a bucket, under a key and with a size that it was signed for."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    name: str
    key: str
    url: str
    fields: dict[str, str] = Field(repr=False)


class LeftOut(BaseModel):
    """A file that is not put, and why."""

    model_config = ConfigDict(frozen=True)

    name: str
    why: str


class OutputsGrant(BaseModel):
    """What may be put, what not, and where the list of it goes."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    posts: tuple[Post, ...]
    left_out: tuple[LeftOut, ...]
    manifest: Post

    def secret_values(self) -> set[str]:
        """What must never be shown: who has it can put these files."""
        secret = ("x-amz-signature", "x-amz-security-token")
        return {post.fields[name] for post in (*self.posts, self.manifest) for name in secret if name in post.fields}


@dataclass(frozen=True)
class ControlPlane:
    """A client of the tickets function. `sleep` and `now` (monotonic, seconds) are passed in for tests."""

    http: httpx2.AsyncClient
    url: str
    attempt: Attempt
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep
    now: Callable[[], float] = time.monotonic

    async def exchange(self, ticket: str, nonce: str) -> Grant:
        """Exchange the ticket. A lost reply is asked for again with the same nonce.

        Raises TicketRefused, ControlPlaneUnanswered.
        """
        body = {**self.attempt.as_fields(), "ticket": ticket, "nonce": nonce}
        response = await self._post("", body, within=EXCHANGE_SECONDS)
        if response.status_code != 200:
            raise TicketRefused(
                f"the tickets function answered HTTP {response.status_code}: the ticket is spent, "
                "or this attempt is no longer the current one"
            )
        try:
            grant = Grant.model_validate_json(response.content)
        except ValidationError as error:
            wrong = sorted({".".join(map(str, part["loc"])) or "body" for part in error.errors(include_input=False)})
            raise ControlPlaneUnanswered(
                f"the tickets function answered 200 without a usable {', '.join(wrong)}"
            ) from None
        if grant.work_id != self.attempt.work_id:
            raise ControlPlaneUnanswered(f"the tickets function granted work item {grant.work_id}, which is not ours")
        return grant

    async def turn_ended(self, callback_secret: str, *, unserved: bool) -> bool:
        """Say that the turn is over and the item not known to be stopped, or that a message is left unserved.

        Returns whether the control plane has stopped the item. Raises TicketRefused, ControlPlaneUnanswered.
        """
        body = {**self.attempt.as_fields(), "callback_secret": callback_secret, "unserved": unserved}
        response = await self._post("/turn-ended", body, within=WORD_SECONDS)
        if not response.is_success:
            raise TicketRefused(f"the tickets function answered HTTP {response.status_code} to the last word")
        try:
            return bool(response.json()["stopped"])
        except (ValueError, TypeError, KeyError):
            return False

    async def ask_staging(self, callback_secret: str) -> StagingGrant:
        """Ask what to put into the workspace. Raises TicketRefused, ControlPlaneUnanswered."""
        body = {**self.attempt.as_fields(), "callback_secret": callback_secret}
        response = await self._post("/staging", body, within=WORD_SECONDS)
        if response.status_code != 200:
            raise TicketRefused(f"the tickets function answered HTTP {response.status_code} on what is to be staged")
        try:
            return StagingGrant.model_validate_json(response.content)
        except ValidationError:
            raise ControlPlaneUnanswered("the tickets function answered 200 without usable sources") from None

    async def ask_outputs(self, callback_secret: str, files: Mapping[str, int], *, ended: bool) -> OutputsGrant:
        """Ask where to put these files (names, bytes). Raises TicketRefused, ControlPlaneUnanswered."""
        body = {
            **self.attempt.as_fields(),
            "callback_secret": callback_secret,
            "ended": ended,
            "files": [{"name": name, "size": size} for name, size in files.items()],
        }
        response = await self._post("/outputs", body, within=WORD_SECONDS)
        if response.status_code != 200:
            raise TicketRefused(f"the tickets function answered HTTP {response.status_code} to the list of outputs")
        try:
            return OutputsGrant.model_validate_json(response.content)
        except ValidationError:
            raise ControlPlaneUnanswered("the tickets function answered 200 without usable uploads") from None

    async def tell_outputs(self, callback_secret: str, *, files: int, size: int, problem: str | None) -> None:
        """Say what was put (number, bytes). Raises TicketRefused, ControlPlaneUnanswered."""
        shown = problem and "".join(one if " " <= one <= "~" else "?" for one in problem)[:200]
        body = {
            **self.attempt.as_fields(),
            "callback_secret": callback_secret,
            "files": files,
            "bytes": size,
            "problem": shown,
        }
        response = await self._post("/outputs-put", body, within=WORD_SECONDS)
        if not response.is_success:
            raise TicketRefused(f"the tickets function answered HTTP {response.status_code} to the word on outputs")

    async def _post(self, path: str, body: Mapping[str, object], *, within: float) -> httpx2.Response:
        """The first answer that is not "try again", within so many seconds."""
        url = f"{self.url.rstrip('/')}{path}" if path else self.url
        deadline = self.now() + within
        for delay in _delays():
            wait = delay
            try:
                timeout = min(REQUEST_SECONDS, max(deadline - self.now(), 0.1))
                response = await self.http.post(url, json=body, timeout=timeout)
            except httpx2.HTTPError as error:
                problem = type(error).__name__
            else:
                if response.status_code != 429 and response.status_code < 500:
                    return response
                problem = f"HTTP {response.status_code}"
                wait = max(delay, _retry_after(response))
            if self.now() + wait >= deadline:
                raise ControlPlaneUnanswered(f"no answer from the tickets function in {within:g} s (last: {problem})")
            await self.sleep(wait)
        raise AssertionError("the delays never end")


def _delays() -> Iterator[float]:
    """Seconds between tries: doubling, with jitter."""
    delay = _FIRST_DELAY_SECONDS
    while True:
        yield random.uniform(delay / 2, delay)
        delay = min(delay * 2, _LAST_DELAY_SECONDS)


def _retry_after(response: httpx2.Response) -> float:
    """The wait that `retry-after` asks for, in seconds; 0 if there is none or it is a date."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else 0.0


def _strings(node: object) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from _strings(value)
