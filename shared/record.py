"""What we keep of a work item: the record, its lease and its phases. No rules (lifecycle.py), no I/O (store.py).

Every time of ours is epoch milliseconds; times of the API stay the server's own strings.
"""

import base64
import binascii
import json
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from shared.sizes import SizeClass
from shared.wishes import Wishes

HISTORY_TURNS = 5
TIMELINE_EVENTS = 60
SPENT_ENTRIES = 40
LONGEST_TAG = 64  # characters


class Phase(StrEnum):
    """Where a turn is (DESIGN §4)."""

    RECEIVED = "received"
    HELD = "held"
    LAUNCHING = "launching"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Outcome(StrEnum):
    """How a turn ended."""

    COMPLETED = "completed"
    STOPPED = "stopped"  # someone asked for it
    LOST = "lost"  # the lease went to someone else, lapsed, or the item is gone
    LAUNCH_FAILED = "launch_failed"
    FAILED = "failed"  # the sandbox failed as often as MaxAttempts allows, or in a way that no relaunch mends
    TIMED_OUT = "timed_out"
    UNSERVED = "unserved"  # finished, but a message that slipped in at its end was not served
    NOT_OURS = "not_ours"  # another worker claimed it first
    NO_SANDBOX = "no_sandbox"  # an item that is no session (W§10): acked and force-stopped


class Moment(BaseModel):
    """One line of a timeline."""

    model_config = ConfigDict(frozen=True)
    at: int
    event: str


class Outputs(BaseModel):
    """What an attempt's sandbox put into the outputs bucket: its own count, bounded by what it was granted."""

    model_config = ConfigDict(frozen=True)
    attempt: int
    prefix: str  # s3://bucket/..., made from the record
    manifest: str  # key of the list of files
    listing: str  # hash of what was asked for: the first request of an attempt fixes it
    requests: int = 1
    granted_files: int
    granted_bytes: int
    files: int = 0
    bytes: int = 0
    problem: str | None = None


class PastTurn(BaseModel):
    """What stays of an ended turn."""

    model_config = ConfigDict(frozen=True)
    turn: int
    attempt: int
    outcome: Outcome | None
    exit_code: int | None = None
    reason: str | None = None
    outputs: Outputs | None = None
    timeline: tuple[Moment, ...] = ()


_Amount = Annotated[int, Field(ge=0, lt=2**53)]


class Spent(BaseModel):
    """What Fargate charges for one session's sandboxes that began on one UTC day, on one kind of machine."""

    model_config = ConfigDict(frozen=True)
    day: str  # 2026-11-25
    cpu: _Amount  # CPU units: 1024 are one vCPU
    memory: _Amount  # MiB
    disk: _Amount  # GiB
    spot: bool
    tag: str | None = None  # the session's own word (wishes.py)
    sandboxes: _Amount = 1
    seconds: _Amount

    @property
    def kind(self) -> tuple[str, int, int, int, bool, str | None]:
        """What is summed up together."""
        return self.day, self.cpu, self.memory, self.disk, self.spot, self.tag


class Record(BaseModel):
    """Our row for a work item. `revision` rises with every write, so that a write never overlooks another."""

    model_config = ConfigDict(frozen=True)
    work_id: str
    environment_id: str
    kind: str
    session_id: str | None = None
    turn: int
    attempt: int = 1
    phase: Phase
    revision: int = 0
    secret: SecretStr | None = None
    # the claim lock: only `claim_owner` acks and claims, until `claim_until`
    claim_owner: str = ""
    claim_until: int = 0
    queued_at: int | None = None  # when the API queued the item, by the API's clock
    acknowledged_at: str | None = None  # from our own ack's 200 only: the base of the 412 rule
    lease_gone: bool = False  # a poll offered the item again: this turn never posts a stop
    # launching: kept over the attempts of a turn
    staging_requests: int = 0  # of this attempt
    wishes: Wishes | None = None  # what the session's metadata asks for; None while it could not be read
    size: SizeClass | None = None  # what it is granted of that; None: the stack's default
    sandbox_wanted_since: int | None = None  # since when the turn wants a sandbox; the launch deadline counts from here
    refusals: int = 0  # how often ECS had no room for it: decides subnets, capacity and delay of the next try
    put_off: str | None = None  # why the last try started nothing
    interruptions: int = 0
    never_started: int = 0  # attempts that ECS took and could not start for want of room
    unstopped: int = 0  # attempts that served the turn to its end and left because the API did not stop the item
    # the sandbox of this attempt
    started_by: str | None = None
    task_arn: str | None = None
    links: dict[str, str] = {}  # pages of the AWS console: task, log, loop (links.py)
    launch_until: int | None = None
    event_version: int = 0
    running_since: int | None = None
    served_since: int | None = None  # when the turn's first sandbox ran: its wall clock, kept over attempts
    # what the session's events say of this attempt (progress.py), as of the janitor's last look
    progress_at: int | None = None
    waits_for: str | None = None  # what only somebody outside the sandbox can give it
    waiting_since: int | None = None
    restart_reason: str | None = None  # the sandbox hangs: to be stopped, so that the next attempt goes on
    granted: int = 0  # attempts that an operator asked for, uncounted
    refused: int = 0  # attempts that never ran, uncounted: the cause is not theirs (breaker.keeps)
    refused_since: int | None = None  # the first of them since a sandbox last ran
    ticket_hashes: tuple[str, ...] = ()
    ticket_nonce_hash: str | None = None
    ticket_used_at: int | None = None
    callback_hash: str | None = None
    callback_hashes_again: tuple[str, ...] = ()  # of replies given once more: the sandbox may hold any of them
    # the end
    stop_reason: str | None = None
    stop_outcome: Outcome | None = None
    post_stop: bool = False  # the item must still be force-stopped by us
    post_first: bool = False  # an operator forced it: while the sandbox still lives
    posting_until: int | None = None  # a stop of ours may be on its way until then: nobody posts another
    stop_task_from: int | None = None  # not before this time: a sandbox that ended its own turn may exit by itself
    stop_task_sent_at: int | None = None
    dead: bool = False  # proof that the container of this attempt is dead
    outcome: Outcome | None = None
    exit_code: int | None = None
    reason: str | None = None
    outputs: Outputs | None = None  # of the newest attempt that put any
    expires_at: int | None = None  # epoch seconds, as DynamoDB's TTL wants it
    shard: str | None = None  # set exactly while live: it makes the index sparse
    timeline: tuple[Moment, ...] = ()
    history: tuple[PastTurn, ...] = ()
    # of all turns, the ended sandboxes alone
    spent: tuple[Spent, ...] = ()
    spent_untold: int = 0  # sandboxes that ran and are not in `spent`: ECS told no times, or there was no more room

    @property
    def is_live(self) -> bool:
        return self.phase is not Phase.STOPPED

    @property
    def tag(self) -> str | None:
        """Whose costs the turn's are, by the session's own word."""
        return self.wishes.tag[:LONGEST_TAG] if self.wishes and self.wishes.tag else None

    def sessions_token(self) -> SecretStr | None:
        """The session's own credential, inside the work secret (W§10); None if it holds none."""
        secret = self.secret.get_secret_value() if self.secret else ""
        try:
            payload = json.loads(base64.urlsafe_b64decode(secret + "=" * (-len(secret) % 4)))
        except (binascii.Error, ValueError):
            return None
        token = payload.get("sessions_token") if isinstance(payload, dict) else None
        return SecretStr(token) if isinstance(token, str) and token else None

    def noted(self, now: int, event: str, **changes: object) -> "Record":
        """A copy with the changes and one more line in the timeline (its middle is cut when too long)."""
        timeline = (*self.timeline, Moment(at=now, event=event))
        if len(timeline) > TIMELINE_EVENTS:
            timeline = (*timeline[: TIMELINE_EVENTS // 2], *timeline[-TIMELINE_EVENTS // 2 :])
        return self.model_copy(update={**changes, "timeline": timeline})


class Lease(BaseModel):
    """The lease fields, an item of their own: one beat costs one write unit (DESIGN §4)."""

    model_config = ConfigDict(frozen=True)
    work_id: str
    turn: int
    value: str  # `last_heartbeat`, byte for byte
    ttl_seconds: int
    accepted_sent_at: int  # when the last accepted beat was sent, our clock
    due_at: int
    over: str | None = None  # why there is nothing left to beat

    def deadline(self, margin_ms: int) -> int:
        """When we must take the lease as lost if nothing more is accepted (DESIGN §7)."""
        return self.accepted_sent_at + self.ttl_seconds * 1000 - margin_ms


class Breaker(BaseModel):
    """The circuit breaker (breaker.py): one for the stack. `paused` is set by hand alone (docs/operations.md)."""

    model_config = ConfigDict(frozen=True)
    failures: int = 0  # launches in a row that failed for a reason that no retry cures
    opened_at: int | None = None  # set while open
    reason: str = ""
    probe: str | None = None  # `startedBy` of the one attempt that may be launched while open
    probe_at: int = 0
    paused: bool = False
    revision: int = 0


class LiveEntry(BaseModel):
    """One row of the live index."""

    model_config = ConfigDict(frozen=True)
    work_id: str
    phase: Phase
    turn: int
    attempt: int
