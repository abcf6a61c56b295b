"""Sessions with a scripted agent: history, live streams, and the checks of tool results; no HTTP, no queue.

A script is a list of {"tool", "input", "expect"?, "permission"?}: tool calls in order, the text a result must contain,
and "ask" for a call that waits for a person's confirmation (W§11.2). A denied call is passed over.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypedDict

from local.work_api.state import Refusal, not_found, timestamp

Event = dict[str, Any]


class _StepInput(TypedDict):
    tool: str
    input: dict[str, Any]


class Step(_StepInput, total=False):
    """One tool call of a script."""

    expect: str
    permission: str


def read_script(value: Any) -> list[Step]:
    """Checks a script from outside; raises Refusal 400 that says what is wrong."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise Refusal(400, 'script must be a list of {"tool", "input", "expect"?, "permission"?}.')
    steps: list[Step] = []
    for given in value:
        if not isinstance(given, dict) or not isinstance(given.get("tool"), str):
            raise Refusal(400, 'A script\'s step must be {"tool", "input", "expect"?, "permission"?}.')
        if not isinstance(given.get("input"), dict) or not isinstance(given.get("expect", ""), str):
            raise Refusal(400, "A step's input must be an object and its expect a string.")
        if given.get("permission", "allow") not in ("allow", "ask"):
            raise Refusal(400, "A step's permission must be allow or ask.")
        step = Step(tool=given["tool"], input=given["input"])
        if "expect" in given:
            step["expect"] = given["expect"]
        if "permission" in given:
            step["permission"] = given["permission"]
        steps.append(step)
    return steps


def read_events(value: Any) -> list[Event]:
    """Checks events posted from outside; raises Refusal 400 unless each is an object of a `user.` type."""
    if not isinstance(value, list) or not all(isinstance(event, dict) for event in value):
        raise Refusal(400, "events must be a list of events.")
    if not all(isinstance(event.get("type"), str) and event["type"].startswith("user.") for event in value):
        raise Refusal(400, "An event's type must be one that a user or a runner sends: user....")
    return value


@dataclass
class Session:
    """A session's history, who listens, and how far its agent is; create it with `Sessions.create`."""

    id: str
    environment_id: str
    now: Callable[[], datetime]
    new_id: Callable[[str], str]
    metadata: dict[str, str] = field(default_factory=dict)
    status: str = "idle"
    events: list[Event] = field(default_factory=list)
    turns_finished: int = 0
    mismatches: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    _created_at: str = field(init=False)
    _subscribers: set[asyncio.Queue[Event | None]] = field(default_factory=set)
    _waiting: deque[list[Step]] = field(default_factory=deque)
    _steps: deque[Step] | None = None
    _asked: tuple[str, Step] | None = None
    _answered: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._created_at = timestamp(self.now()) or ""

    def body(self) -> dict[str, Any]:
        """The session as its retrieve shows it: what a runner reads (W§11.2)."""
        return {
            "type": "session",
            "id": self.id,
            "environment_id": self.environment_id,
            "status": self.status,
            "created_at": self._created_at,
            "updated_at": timestamp(self.now()),
            "archived_at": None,
            "title": None,
            "metadata": dict(self.metadata),
            "vault_ids": [],
            "resources": [],
            "agent": {
                "type": "agent",
                "id": "agent_emulated",
                "name": "scripted",
                "version": 1,
                "skills": [],
                "tools": [],
                "mcp_servers": [],
            },
        }

    def page(self, limit: int, page: str | None, order: str = "asc") -> dict[str, Any]:
        """History, oldest first, or newest first with "desc"; the cursor is the number of events already seen."""
        if order not in ("asc", "desc"):
            raise Refusal(400, "order must be asc or desc.")
        if limit < 1:
            raise Refusal(400, "limit must be at least 1.")
        if page is not None and not (page.isascii() and page.isdecimal()):
            raise Refusal(400, "page is not a cursor that this list gave.")
        start = int(page or 0)
        end = start + limit
        return {
            "data": (self.events if order == "asc" else self.events[::-1])[start:end],
            "next_page": str(end) if end < len(self.events) else None,
        }

    def subscribe(self) -> asyncio.Queue[Event | None]:
        """Events from now on; None ends the stream."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._subscribers.add(queue)
        return queue

    def unsubscribe(self, queue: asyncio.Queue[Event | None]) -> None:
        """Stop feeding a queue; harmless if it is unknown."""
        self._subscribers.discard(queue)

    def close_streams(self) -> None:
        """End every live stream."""
        for queue in self._subscribers:
            queue.put_nowait(None)

    def message(self, text: str, script: list[Step]) -> None:
        """A user's message; its script starts now, or after the present one."""
        self._emit({"type": "user.message", "content": [{"type": "text", "text": text}]})
        self._waiting.append(script)
        self._start_next()

    def post(self, event: Event) -> Event:
        """An event from outside that is no message. Raises Refusal 400 for a malformed tool result."""
        if event.get("type") == "user.tool_confirmation" and event.get("result") == "deny":
            kept = self._emit(event)
            if self._asked and event.get("tool_use_id") == self._asked[0]:
                self._asked = None
                self._set_status("running")
                self._ask_next()
            return kept
        if event.get("type") != "user.tool_result":
            return self._emit(event)
        used, content = event.get("tool_use_id"), event.get("content") or []
        if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
            raise Refusal(400, "content must be a list of blocks.")
        texts = [str(block.get("text", "")) for block in content if block.get("type") == "text"]
        if not all(texts):
            raise Refusal(400, "text content blocks must be non-empty.")  # W§11.2
        asked = self._asked[0] if self._asked else None
        if not isinstance(used, str) or (used != asked and used not in self._answered):
            raise Refusal(400, f"tool_use_id {used} is no tool call of this session that awaits a result.")
        kept = self._emit(event)
        if used == asked:  # a result sent twice changes nothing
            self._check("\n".join(texts), is_error=bool(event.get("is_error")))
        return kept

    def _check(self, text: str, *, is_error: bool) -> None:
        assert self._asked is not None  # noqa: S101 - the only caller compared it
        used, step = self._asked
        self._asked = None
        self._answered.add(used)
        self.results.append({"tool_use_id": used, "is_error": is_error, "text": text, "at": timestamp(self.now())})
        expect = step.get("expect", "")
        if is_error or expect not in text:
            self.mismatches.append(
                {
                    "tool_use_id": used,
                    "input": step["input"],
                    "expect": expect,
                    "text": text,
                    "is_error": is_error,
                }
            )
        self._set_status("running")
        self._ask_next()

    def _start_next(self) -> None:
        if self._steps is None and self._waiting:
            self._steps = deque(self._waiting.popleft())
            self._set_status("running")
            self._ask_next()

    def _ask_next(self) -> None:
        if self._steps:
            step = self._steps.popleft()
            call = self._emit(
                {
                    "type": "agent.tool_use",
                    "name": step["tool"],
                    "input": step["input"],
                    "evaluated_permission": step.get("permission", "allow"),
                }
            )
            self._asked = (call["id"], step)
            self._set_status("idle", {"type": "requires_action", "event_ids": [call["id"]]})
            return
        self._steps = None
        self.turns_finished += 1
        self._set_status("idle", {"type": "end_turn"})
        self._start_next()

    def _set_status(self, status: str, stop_reason: dict[str, Any] | None = None) -> None:
        self.status = status
        event: Event = {"type": f"session.status_{status}"}
        self._emit(event | ({"stop_reason": stop_reason} if stop_reason else {}))

    def _emit(self, event: Event) -> Event:
        kept = {**event, "id": self.new_id("sevt"), "processed_at": timestamp(self.now())}
        self.events.append(kept)
        for queue in self._subscribers:
            queue.put_nowait(kept)
        return kept


class Sessions:
    """Every session of one environment."""

    def __init__(self, environment_id: str, now: Callable[[], datetime], new_id: Callable[[str], str]) -> None:
        self._environment_id, self._now, self._new_id = environment_id, now, new_id
        self._sessions: dict[str, Session] = {}

    def create(self, metadata: dict[str, str] | None = None) -> Session:
        """A new idle session without messages."""
        session = Session(self._new_id("sesn"), self._environment_id, self._now, self._new_id, metadata or {})
        self._sessions[session.id] = session
        return session

    def get(self, session_id: str) -> Session:
        """Raises Refusal 404 for an unknown id."""
        if session_id not in self._sessions:
            raise not_found(f"Session {session_id}")
        return self._sessions[session_id]

    def all(self) -> list[Session]:
        """Every session, oldest first."""
        return list(self._sessions.values())
