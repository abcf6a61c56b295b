"""The whole fleet in one process: the real shared/ and handlers between simulated far sides, users and sandboxes."""

import base64
import importlib.util
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

from botocore.exceptions import BotoCoreError

import shared.claiming
import shared.keeping
import shared.metrics
import shared.stopping
import shared.wiring
from local.work_api.state import Item, Refusal
from shared import lifecycle, sizes
from shared.buckets import Post
from shared.claiming import Claimer
from shared.config import SHARD, Config
from shared.diagnose import NO_IMAGE
from shared.keeping import Keeper
from shared.launch_queue import LaunchQueue
from shared.launching import Launcher
from shared.log import log
from shared.loop import LeaseLoop
from shared.observing import Observer
from shared.operating import Operator
from shared.outputs import OutputsPlace
from shared.record import Outcome, Phase, Record
from shared.sandboxes import Sandboxes
from shared.staging import StagingPlaces
from shared.stopping import Stopper
from shared.store import Conflict, MemoryStore
from shared.stored_key import StoredKey
from shared.sweeping import Janitor
from shared.ticketing import Tickets
from shared.wishes import PREFIX
from shared.work_api import WorkApi
from tests.simulation.cloudwatch import Measured
from tests.simulation.fargate import Fargate, Task
from tests.simulation.machine import Machine
from tests.simulation.outside import (
    AnsweringTransport,
    ApiTransport,
    Faults,
    Lambda,
    LaunchMessages,
    Loops,
    Outside,
    OutsideStore,
    WatchedQueue,
    server_clock,
)

START = 1_800_000_000_000
ENVIRONMENT = "env_simulated"
FUNCTIONS = Path(__file__).resolve().parents[2] / "functions"
EXCUSED = {  # ways for a turn to end that tell a person of messages left unserved
    Outcome.STOPPED,
    Outcome.LAUNCH_FAILED,
    Outcome.FAILED,
    Outcome.TIMED_OUT,
    Outcome.UNSERVED,
}
CONFIG = Config(
    table="work",
    environment_id=ENVIRONMENT,
    base_url="http://simulated",
    queue_url="launches",
    dead_letters_url="dead",
    cluster_arn="cluster",
    task_definition_arn="definition",
    task_definition_2_arn="definition-2",
    size_classes=sizes.parse("small:cpu=256:memory=512:spot=yes:wall=1800,web:cpu=512:memory=1024:spot=no:image=2"),
    subnets="subnet-1,subnet-2",
    security_groups="sg-1",
    state_machine_arn="arn:aws:states:x:1:stateMachine:loop",
    key_secret_arn="secret",
    stopper_function="stopper",
    max_sessions=20,
    lease_ttl_seconds=300,
    max_attempts=3,
    start_timeout_seconds=180,
    launch_timeout_seconds=1_200,
    spot_weight=60,
    session_timeout_seconds=3_600,
    stall_timeout_seconds=600,
    stop_timeout_seconds=30,
)


SECRET_START = base64.urlsafe_b64encode(b'{"sessions_token').decode()[:16]
A_MOMENT_MS = 180_000  # a beat, two runs of the poller to restart a dead loop, and the stopper's rounds
MOST_REFUSALS = 3  # that a launcher asks for, replies that were lost included
HUNG_FOR_MS = 2_000_000  # a stall's time-out and three rounds, two of which go wrong: long before the wall clock


class Violation(Exception):
    """A promise of DESIGN §10 is broken."""


@dataclass
class Session:
    """What users want of one session."""

    work_id: str
    pending: int = 0
    served: int = 0
    foreign: bool = False  # another worker or a user's stop touched it: its messages may end there
    events: list[dict[str, Any]] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class Fleet:
    """One run. `rate` is the chance that an outside call goes wrong, until `faults_until_ms` after the start."""

    seed: int
    rate: float = 0.0
    faults_until_ms: int = 0
    config: Config = CONFIG
    script: Callable[[str, str], str | None] = lambda who, kind: None
    violations: list[str] = field(default_factory=list)
    slips: float = 0.0  # chance of a message just as a turn ends

    def __post_init__(self) -> None:
        self.machine = Machine(self.seed, START)
        rng = self.machine.rng
        self.faults = Faults(self.rate, START + self.faults_until_ms)
        self.outside = Outside(self.machine, self.faults, self.script)
        self.sessions: dict[str, Session] = {}
        self.wanted = itertools.cycle(["", "small", "web", "huge"])  # size classes, by session
        self.keys = {"sk-ant-oat01-KEY-1"}
        self.secret_value = "sk-ant-oat01-KEY-1"
        self.api_was_away: list[tuple[int, int]] = []
        self._build_api(rng.randint(-20_000, 20_000))
        self.records = MemoryStore()
        self.store = OutsideStore(self.outside, self.records, self._check_record)
        self.functions = Lambda(self.machine)
        self.messages = LaunchMessages(self.machine, self.outside, self.functions)
        self.loops = Loops(self.machine, self.outside, self.functions)
        self.measured = Measured()
        self._measure()
        self.fargate = Fargate(
            self.machine,
            self.outside,
            self.functions,
            self._sandbox,
            self.config.stop_timeout_seconds * 1000,
            self._check_task,
            self._check_reaped,
            self._check_launches,
        )
        self._replaced = ExitStack()
        self._build_functions()
        self.ran_at = 0  # when a sandbox that tells of the others last reached RUNNING
        self.ran: Counter[str] = Counter()  # sandboxes that reached it, by work id
        self.launches: list[int] = []  # when tasks were created
        self.reported: set[str] = set()  # items that the janitor called stranded
        _listen(self, self._replaced)

    # --- the far side's users ----------------------------------------------------------------------------------

    def new_session(self) -> Session:
        work_id = f"sesn_{len(self.sessions) + 1}"
        session = self.sessions[work_id] = Session(work_id)
        session.metadata = {PREFIX + "git": f"https://example.com/{work_id}", PREFIX + "size": next(self.wanted)}
        self.queue.enqueue(work_id)
        session.pending += 1
        self._say(session)
        self.machine.note("user", f"new session {work_id}")
        return session

    def message(self, session: Session) -> None:
        session.pending += 1
        self._say(session)
        queued = self.queue.message_arrived(session.work_id)
        self.machine.note("user", f"message to {session.work_id}{': queued again' if queued else ''}")

    def ask_to_stop(self, session: Session, *, force: bool) -> None:
        self.queue.stop(session.work_id, force=force)
        session.foreign = True
        self.machine.note("user", f"{'forced' if force else 'graceful'} stop of {session.work_id}")

    def operate(self, order: str, session: Session | None = None) -> None:
        """One of `fleet`'s commands for a session: any, if none is named."""
        known = [session] if session else list(self.sessions.values())
        if not known:
            return
        session = self.machine.rng.choice(known)
        if order != "retry":
            session.foreign = True

        def command() -> None:
            if order == "retry":
                self.operator.retry(work_id)
            else:
                self.operator.stop(work_id, force=order == "force")

        work_id = session.work_id
        self.machine.note("operator", f"{order} {work_id}")
        self.machine.spawn("operator", command)

    def pause(self, *, paused: bool) -> None:
        """By hand, repeated until it is so."""

        def command() -> None:
            while self.records.breaker().paused is not paused:
                try:
                    self.operator.pause(paused=paused)
                except (Conflict, BotoCoreError):
                    self.machine.sleep(1_000)

        self.machine.note("operator", "pause" if paused else "resume")
        self.machine.spawn("operator", command)

    def foreign_worker(self) -> None:
        """Another worker of the same environment: polls once, serves what it got, keeps its lease."""
        item = self.queue.poll()
        if item is None:
            return
        self.machine.sleep(self.machine.rng.randint(5, 3_000))
        try:
            self.queue.ack(item.id)
        except Refusal:
            return
        stay = (item.id, item.started_at)
        self.queue.acked_by[stay] = "foreign"
        self.machine.note("foreign", f"acked {item.id}")
        self.machine.sleep(self.machine.rng.randint(5, 3_000))
        try:
            value = self.queue.heartbeat(item.id, "NO_HEARTBEAT")["last_heartbeat"]
        except Refusal:
            return
        if self.queue.get(item.id).state != "active":
            return
        self.queue.held_by[stay] = "foreign"
        session = self.sessions.get(item.id)
        if session:
            session.foreign = True
        for _ in range(self.machine.rng.randint(1, 6)):
            self.machine.sleep(30_000)
            try:
                value = self.queue.heartbeat(item.id, value)["last_heartbeat"]
            except Refusal:
                return
        if session:
            session.pending = 0
        self.queue.stop(item.id, force=True)
        self.machine.note("foreign", f"finished {item.id}")

    def rotate_key(self) -> None:
        """The new key is put first; the old one ends a while later."""
        new = f"sk-ant-oat01-KEY-{len(self.keys) + 1}"
        self.keys.add(new)
        old, self.secret_value = self.secret_value, new
        self.machine.later(self.machine.rng.choice([0, 60_000, 300_000]), lambda: self.keys.discard(old))
        self.machine.note("owner", "key rotated")

    def api_goes_away(self, seconds: int) -> None:
        self.transport.away_until = self.machine.now + seconds * 1000
        self.api_was_away.append((self.machine.now, self.transport.away_until))
        self.machine.note("api", f"away for {seconds} s")

    # --- the sandbox: the protocol of sandbox/runner.py ----------------------------------------------------------

    def _sandbox(self, task: Task) -> int:
        machine, rng = self.machine, self.machine.rng
        work_id, attempt = task.environment["FLEET_WORK_ID"], task.environment
        turn = {"work_id": work_id, "turn": int(attempt["FLEET_TURN"]), "attempt": int(attempt["FLEET_ATTEMPT"])}
        machine.sleep(rng.randint(500, 5_000))
        grant = self._exchange(task, turn)
        if isinstance(grant, int):
            return grant
        if grant["staging"] and (refused := self._ask_staging(turn, grant)):
            return refused
        session = self.sessions[work_id]
        quiet_since, answered = machine.now, False
        while session.pending or machine.now - quiet_since < 10_000:
            if task.told_to_stop:
                machine.sleep(rng.randint(0, 20_000))
                self._put_outputs(turn, grant, ended=False)
                return 10
            if self.faults.happens(machine, 0.002, "sandbox crashes"):
                return 1
            if self.fargate.reclaims(task):
                task.code, task.reason = "SpotInterruption", "Your Spot Task was interrupted."
                task.told_to_stop, task.desired = True, "STOPPED"
                continue
            if session.pending and self.faults.happens(machine, 0.001, "sandbox hangs"):
                self._ask_tool(session, "allow")
                machine.later(HUNG_FOR_MS, lambda: self._check_hung(task))
                machine.sleep(10_000_000)
            machine.sleep(1_000)
            if session.pending and self.faults.happens(machine, 0.002, "a person is slow to confirm"):
                self._wait_for_a_person(task, session)
            if session.pending and rng.random() < 0.05:
                self._ask_tool(session, "allow")
                self._tell(session, "user.tool_result", "session.status_running")
                if not answered:  # the runner's line, which a metric filter reads
                    since_begin = (machine.now - int(attempt["FLEET_TURN"])) / 1000
                    self.measured.add(machine.now, "FirstToolResultLatency", since_begin, resource="")
                answered = True
                session.pending -= 1
                session.served += 1
                quiet_since = machine.now
                if not session.pending:
                    self._tell(session, "session.status_idle", stop_reason={"type": "end_turn"})
        if rng.random() < self.slips:  # the moment that matters: a message around the stop
            machine.later(rng.randint(0, 900), lambda: self.message(session))
            machine.sleep(rng.randint(0, 500))
        if self._posts_its_stop(work_id):
            machine.note(task.arn, "stopped its item")
        else:
            until = machine.now + 20_000
            while (stopped := self._tell_end(turn, grant, unserved=False)) is False and machine.now < until:
                machine.sleep(2_000)
            if not stopped:
                return 17
        machine.sleep(rng.randint(20, 500))
        code = 11 if session.pending else 0
        if code:
            self._tell_end(turn, grant, unserved=True)
        self._put_outputs(turn, grant, ended=True)
        return code

    def _ask_staging(self, turn: dict[str, Any], grant: dict[str, Any]) -> int | None:
        """The workspace's sources (sandbox/staging.py); the exit code if they are not told."""
        until = self.machine.now + 15_000
        while self.machine.now < until:
            reply = self._url("/staging", turn | {"callback_secret": grant["callback_secret"]})
            if reply["statusCode"] == 200:
                source = json.loads(reply["body"])["git"]["url"]
                if source != self.sessions[turn["work_id"]].metadata[PREFIX + "git"]:
                    self.violations.append(f"{turn['work_id']} is to start from {source}")
                return None
            if reply["statusCode"] < 500:
                return 12
            self.machine.sleep(1_000)
        return 13

    def _put_outputs(self, turn: dict[str, Any], grant: dict[str, Any], *, ended: bool) -> None:
        """What the agent left, if anything: asked for, put, told (sandbox/outputs.py)."""
        if not self.faults.happens(self.machine, 0.2, "the agent leaves outputs"):
            return
        said = turn | {"callback_secret": grant["callback_secret"]}
        reply = self._url("/outputs", said | {"ended": ended, "files": [{"name": "a", "size": 1}]})
        if reply["statusCode"] != 200:
            return
        key = json.loads(reply["body"])["posts"][0]["key"]
        if not key.startswith(f"fleet/{turn['work_id']}/{turn['turn']}/{turn['attempt']}/"):
            self.violations.append(f"a sandbox of {turn['work_id']} may put {key}")
        self.machine.sleep(self.machine.rng.randint(0, 60_000))
        self._url("/outputs-put", said | {"files": 1, "bytes": 1})

    def _wait_for_a_person(self, task: Task, session: Session) -> None:
        """Longer than any stall may last; a sandbox that waits for one is not to be taken for hung."""
        call = self._ask_tool(session, "ask")
        until = self.machine.now + self.machine.rng.randint(60_000, 1_500_000)
        while self.machine.now < until and not task.told_to_stop:
            self.machine.sleep(1_000)
        if task.told_to_stop and "no progress" in (task.reason or ""):
            self.violations.append(f"{task.arn} was stopped as hung while it waited for a person")
        self._tell(session, "user.tool_confirmation", "session.status_running", tool_use_id=call)

    def _ask_tool(self, session: Session, permission: str) -> str:
        """A tool's call; the session then waits for whoever is to answer it (W§11.2)."""
        call = f"sevt_{len(session.events)}"
        self._tell(session, "agent.tool_use", id=call, evaluated_permission=permission)
        waits = {"type": "requires_action", "event_ids": [call]}
        self._tell(session, "session.status_idle", stop_reason=waits)
        return call

    def _say(self, session: Session) -> None:
        """A message: a session that waits for an answer to a call goes on waiting."""
        statuses = [event for event in session.events if event["type"].startswith("session.status_")]
        waits = bool(statuses) and statuses[-1].get("stop_reason", {}).get("type") == "requires_action"
        self._tell(session, "user.message", *([] if waits else ["session.status_running"]))

    def _tell(self, session: Session, *types: str, **members: Any) -> None:
        """Events of a session, at the server's time."""
        at = self.queue._now().isoformat()
        told = [{"type": one, "id": f"sevt_{len(session.events)}", "processed_at": at, **members} for one in types]
        session.events += told

    def _events_of(self, session_id: str) -> list[dict[str, Any]]:
        return self.sessions[session_id].events

    def _exchange(self, task: Task, turn: dict[str, Any]) -> dict[str, Any] | int:
        until = self.machine.now + 50_000
        body = turn | {"ticket": task.environment["FLEET_TICKET"], "nonce": f"NONCE-{task.arn}"}
        while True:
            reply = self._url("/", body)
            if reply["statusCode"] == 200:
                granted: dict[str, Any] = json.loads(reply["body"])
                if granted["work_secret"] != self._secret_of(turn["work_id"]):
                    self.violations.append(f"{task.arn} got another session's credential")
                return granted
            if reply["statusCode"] < 500:
                return 12
            if task.told_to_stop:
                return 10
            if self.machine.now > until:
                return 13
            self.machine.sleep(self.machine.rng.randint(500, 8_000))

    def _tell_end(self, turn: dict[str, Any], grant: dict[str, Any], *, unserved: bool) -> bool | None:
        """Whether the item is stopped; None if the word was not taken."""
        until = self.machine.now + 15_000
        body = turn | {"callback_secret": grant["callback_secret"], "unserved": unserved}
        while self.machine.now < until:
            reply = self._url("/turn-ended", body)
            if reply["statusCode"] < 500:
                return bool(json.loads(reply["body"])["stopped"]) if reply["statusCode"] == 202 else None
            self.machine.sleep(1_000)
        return None

    def _url(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        event = {"requestContext": {"http": {"method": "POST"}}, "rawPath": path, "body": json.dumps(body)}
        failed = {"statusCode": 502, "body": ""}
        lost = self.faults.happens(self.machine, 0.03, "URL reply lost")
        try:
            reply: dict[str, Any] = self.functions.call("tickets", event)
        except Exception:  # noqa: BLE001  a Function URL answers 502 for whatever its function raised
            return failed
        return failed if lost else reply

    def _posts_its_stop(self, work_id: str) -> bool:
        """Once, with the session's own token."""
        item = self.queue.get(work_id)
        if self.machine.now < self.transport.away_until:
            return False
        self.machine.note("sandbox", f"posts the stop of {work_id} ({item.state})")
        self._check_own_stop(item)
        if self.faults.happens(self.machine, 0.05, "sandbox's stop refused"):
            return False
        self.queue.stop(work_id, force=True)
        return not self.faults.happens(self.machine, 0.05, "sandbox's stop unanswered")

    # --- a run -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of every process that still waits, and of what was put in place of the functions' own parts."""
        self.machine.close()
        self._replaced.close()

    def schedule(self, function: str, every_ms: int) -> None:
        """A function's schedule, for ever; now and then missed or doubled."""

        def fire() -> None:
            self.machine.later(every_ms, fire)
            if self.faults.happens(self.machine, 0.05, f"{function} missed"):
                return
            self.functions.send(function, {}, retries=0)
            if self.faults.happens(self.machine, 0.1, f"{function} doubled"):
                self.machine.later(self.machine.rng.randint(0, 2_000), lambda: self.functions.send(function, {}))

        self.machine.later(self.machine.rng.randint(0, every_ms), fire)

    def settled(self) -> bool:
        """Nothing is left to do: what the promise "no work lost" comes to."""
        now = self.machine.now
        return (
            all(self._over(item) for item in self.queue._items.values())
            and not self.records.live(SHARD)
            and not any(task.runs for task in self.fargate.tasks.values())
            and "RUNNING" not in self.loops.executions.values()
            and not self.messages.messages
            and not any(now < until for _, until in self.api_was_away)
            and not self.functions.running
        )

    def _over(self, item: Item) -> bool:
        """A stop that was asked for while nobody held the item is the one strand that is only reported (W§6.4)."""
        return item.state == "stopped" or (item.state == "stopping" and item.id in self.reported)

    def unsettled(self) -> list[str]:
        """What is still open, for people."""
        found = [f"{i.id}: the API has it as {i.state}" for i in self.queue.items() if not self._over(i)]
        found += [f"{e.work_id}: our record is {e.phase}" for e in self.records.live(SHARD)]
        found += [f"{t.arn} ({t.started_by}) runs" for t in self.fargate.tasks.values() if t.runs]
        found += [f"loop {name} runs" for name, status in self.loops.executions.items() if status == "RUNNING"]
        return found + [f"message {m['body']} waits" for m in self.messages.messages.values()]

    def check_end(self) -> None:
        """After everything settled: nobody waits without being told."""
        if self.records.breaker().opened_at is not None and self.ran_at > (self.records.breaker().opened_at or 0):
            self.violations.append("the circuit breaker is open though a sandbox ran")
        for session in self.sessions.values():
            record = self.records.get(session.work_id)
            if record is None:
                if not session.foreign:
                    self.violations.append(f"{session.work_id} was never served")
                continue
            if session.pending and not session.foreign and record.outcome not in EXCUSED:
                self.violations.append(
                    f"{session.work_id}: {session.pending} messages left unserved and unreported ({record.outcome})"
                )
            if record.secret is not None:
                self.violations.append(f"{session.work_id}: the secret outlived its turn")
            charged = sum(entry.sandboxes for entry in record.spent) + record.spent_untold
            if charged > self.ran[session.work_id]:
                self.violations.append(f"{session.work_id}: {charged} sandboxes charged, some twice")
        if self.transport.refused > MOST_REFUSALS:
            self.violations.append("the API was asked again and again for what it had refused")
        if self.messages.dead:
            self.violations.append(f"dead letters: {self.messages.dead}")

    # --- what must hold at every step (DESIGN §10) -----------------------------------------------------------------

    def _check_launches(self, task: Task) -> None:
        """The circuit breaker: once an image is missing for a while, about one launch a minute tries it (DESIGN §6)."""
        now, fargate = self.machine.now, self.fargate
        self._check_size(task)
        if fargate.image_missing != "definition":
            if self.records.breaker().opened_at is not None:
                self.violations.append("the image of a size class opened the circuit breaker")
            return
        self.launches = [at for at in self.launches if at > now - 600_000] + [now]
        missing_for = now - fargate.image_missing_from
        if now < fargate.image_missing_until and missing_for > 1_500_000 and len(self.launches) > 12:
            self.violations.append(f"{len(self.launches)} launches in ten minutes of an image that is missing")

    def _check_given_up(self, before: Record | None, after: Record) -> None:
        """No session is given up for an image before the longest hold is over."""
        if after.stop_outcome is not Outcome.LAUNCH_FAILED or (before and before.phase is Phase.STOPPING):
            return
        held_for = self.machine.now - max(self.fargate.image_missing_from, after.turn)
        missing = "no such image" in (after.stop_reason or "")
        if missing and held_for < self.config.breaker_max_hold_seconds * 1000:
            self.violations.append(f"{after.work_id} was given up after {held_for // 1000} s without an image")

    def _check_size(self, task: Task) -> None:
        """A task is of the class that its record names: the one that its session asked for, if it is listed."""
        record = self.records.get(task.environment["FLEET_WORK_ID"])
        size = record.size if record else None
        asked = (task.request["overrides"].get("cpu"), task.definition)
        if asked != (str(size.cpu) if size else None, self.config.task_definition_of(size)):
            self.violations.append(f"{task.arn} is not of the size that its record names: {asked}")
        if size and size.name != self.sessions[task.environment["FLEET_WORK_ID"]].metadata[PREFIX + "size"]:
            self.violations.append(f"{task.arn} is of the size {size.name}, which its session did not ask for")

    def _check_task(self, task: Task) -> None:
        if not task.runs:
            return
        if task.definition == "definition" or NO_IMAGE not in self.records.breaker().reason:
            self.ran_at = self.machine.now
        work_id = task.environment["FLEET_WORK_ID"]
        self.ran[work_id] += 1
        others = [
            other.arn
            for other in self.fargate.tasks.values()
            if other is not task and other.runs and other.environment["FLEET_WORK_ID"] == work_id
        ]
        if others:
            self.violations.append(f"two sandboxes of {work_id} run at once: {task.arn} and {others}")
        interrupted = [
            other
            for other in self.fargate.tasks.values()
            if other.code == "SpotInterruption" and _turn_of(other) == _turn_of(task)
        ]
        if task.provider == "FARGATE_SPOT" and len(interrupted) >= 2:
            self.violations.append(f"{task.arn} ({task.started_by}) is on Spot after {len(interrupted)} interruptions")
        self.machine.later(420_000, lambda: self._check_orphan(task))

    def _check_orphan(self, task: Task) -> None:
        """None outlives its record by more than a janitor round."""
        if not task.runs:
            return
        record = self.records.get(task.environment["FLEET_WORK_ID"])
        if record is None or not record.is_live or record.started_by != task.started_by:
            self.violations.append(f"{task.arn} ({task.started_by}) outlived its record")
        self.machine.later(420_000, lambda: self._check_orphan(task))

    def _check_hung(self, task: Task) -> None:
        """FIELD_NOTES 26: a sandbox that hangs is not kept until the wall clock."""
        if task.runs:
            self.violations.append(f"{task.arn} ({task.started_by}) hangs for {HUNG_FOR_MS // 1000} s and runs on")

    def _check_stop(self, who: str, work_id: str) -> None:
        item = self.queue.get(work_id)
        holder = self.queue.holder(item)
        if item.state != "stopped" and holder != who:
            self.violations.append(f"a stop was posted for {work_id}, {item.state}, held by {holder or 'nobody'}")

    def _check_own_stop(self, item: Item) -> None:
        """A sandbox knows no lease. Should it have lost it a moment ago, its stop may end another's turn; not later."""
        lost_for_ms = (self.queue._now() - item.started_at).total_seconds() * 1000  # at least so long
        holder = self.queue.holder(item)
        if item.state != "stopped" and holder != "fleet" and lost_for_ms > A_MOMENT_MS:
            self.violations.append(
                f"a sandbox stopped {item.id}, {item.state}, held by {holder or 'nobody'}, {lost_for_ms:.0f} ms after "
                f"it was queued again"
            )

    def _lapsed(self, item: Item, holder: str | None) -> None:
        self.machine.note("api", f"the lease of {item.id} lapsed (held by {holder})")
        if holder != "fleet":
            return
        since = self.machine.now - item.ttl_seconds * 1000 - 60_000
        away = any(start < self.machine.now and until > since for start, until in self.api_was_away)
        record = self.records.get(item.id)
        live = [t for t in self.fargate.tasks.values() if t.runs and t.environment["FLEET_WORK_ID"] == item.id]
        if live and record and record.phase is not Phase.STOPPING and not away:
            self.violations.append(f"the lease of {item.id} lapsed while {live[0].arn} ran and the API answered")

    def _check_record(self, before: Record | None, after: Record) -> None:
        """What a write to a record must not say (DESIGN §4, §7)."""
        if before and before.is_live:
            self._check_death(before, after)
        self._check_loss(before, after)
        self._check_wishes(before, after)
        # The launch deadline ends only what ECS put off, or the breaker held to the last; not what nobody tried.
        unasked = after.stop_outcome is Outcome.LAUNCH_FAILED and before and before.phase is Phase.HELD
        opened_at = self.records.breaker().opened_at
        held_to_the_last = (
            opened_at is not None and self.machine.now - opened_at >= self.config.breaker_max_hold_seconds * 1000
        )
        if unasked and after.put_off is None and not held_to_the_last:
            self.violations.append(f"{after.work_id} was given up though ECS had refused nothing")

    def _check_wishes(self, before: Record | None, after: Record) -> None:
        """What a session asks for is its own, and stays what it was through the turn's attempts."""
        wished = after.wishes.git if after.wishes else None
        if wished and wished != self.sessions[after.work_id].metadata[PREFIX + "git"]:
            self.violations.append(f"{after.work_id} was given another session's wishes")
        if before and before.turn == after.turn and before.wishes not in (None, after.wishes):
            self.violations.append(f"{after.work_id} lost what it asked for")

    def _check_death(self, before: Record, after: Record) -> None:
        """Nothing is terminal, and no next attempt starts, before the container is dead."""
        if after.is_live and after.attempt == before.attempt:
            return
        name = lifecycle.started_by(before.work_id, before.turn, before.attempt)
        alive = [t.arn for t in self.fargate.tasks.values() if t.started_by == name and t.status != "STOPPED"]
        if alive:
            self.violations.append(f"{after.work_id} became {after.phase} while {alive} lived")

    def _check_reaped(self, task: Task, reason: str) -> None:
        """The janitor stops nobody who serves a live record."""
        record = self.records.get(task.environment["FLEET_WORK_ID"])
        serves = record and record.phase in (Phase.LAUNCHING, Phase.RUNNING) and record.started_by == task.started_by
        if serves and "no live record" in reason and record and record.task_arn in (None, task.arn):
            self.violations.append(f"{task.arn} was stopped as an orphan while it served {record.work_id}")

    def _check_loss(self, before: Record | None, after: Record) -> None:
        """A lease is given up only when it is gone, or as near to it as we can know.

        The reply to the last beat that the server took may have been lost: then we count from the one before.
        """
        self._check_given_up(before, after)
        if after.stop_outcome is not Outcome.LOST or (before and before.stop_outcome is Outcome.LOST):
            return
        item = self.queue.get(after.work_id)
        beaten = item.latest_heartbeat_at
        if item.state != "active" or self.queue.holder(item) != "fleet" or beaten is None:
            return
        left = item.ttl_seconds - (self.queue._now() - beaten).total_seconds()
        if left * 1000 > CONFIG.beat_interval_seconds * 1000 + lifecycle.LEASE_MARGIN_MS + 1_000:
            self.violations.append(f"the lease of {item.id} was given up {left:.0f} s before its end")

    def heard(self, line: str, work_id: str | None) -> None:
        """A log line of the code under test."""
        if "item stranded" in line and work_id:
            self.reported.add(work_id)
        self.machine.note(self.machine.running(), line)
        if "SECRET" in line or "KEY-" in line or "TICKET" in line or SECRET_START in line:
            self.violations.append(f"a secret was logged: {line}")

    # --- assembly ------------------------------------------------------------------------------------------------

    def _secret_of(self, work_id: str) -> str:
        """As the API makes them: base64url JSON without padding (W§10)."""
        payload = json.dumps({"sessions_token": f"SECRET-{work_id}"}).encode()
        return base64.urlsafe_b64encode(payload).rstrip(b"=").decode()

    def _build_api(self, skew_ms: int) -> None:
        self.queue = WatchedQueue(ENVIRONMENT, server_clock(self.machine, skew_ms))
        self.queue.lapsed = self._lapsed
        self.transport = ApiTransport(
            self.outside,
            self.queue,
            "fleet",
            self.keys,
            self._secret_of,
            self._check_stop,
            self._events_of,
            lambda session_id: self.sessions[session_id].metadata,
            may_update=self.seed % 2 == 0,
        )

    def _build_functions(self) -> None:
        machine, config, functions = self.machine, self.config, self.functions

        def now() -> int:
            return machine.now

        def sleep(seconds: float) -> None:
            machine.sleep(seconds * 1000)

        def read_secret(**_: Any) -> dict[str, str]:
            value: dict[str, str] = self.outside.call("secrets.get", lambda: {"SecretString": self.secret_value})
            return value

        count = iter(range(1_000_000))
        client: Any = SimpleNamespace(get_secret_value=read_secret)
        key = StoredKey(client, "secret", name="key", prefix="sk-", until="nothing", now=lambda: machine.now / 1000)
        api = WorkApi(
            "http://simulated",
            ENVIRONMENT,
            key,
            transport=AnsweringTransport(self.transport),
            sleep=sleep,
            now=lambda: machine.now / 1000,
            jitter=machine.rng.random,
        )
        store: Any = self.store
        sandboxes = Sandboxes(self.fargate, config)  # type: ignore[arg-type]
        queue = LaunchQueue(self.messages, "launches")  # type: ignore[arg-type]
        loop = LeaseLoop(self.loops, config.state_machine_arn, store)  # type: ignore[arg-type]

        def wake(work_id: str) -> None:
            self.outside.call("lambda.invoke", lambda: functions.send("stopper", {"work_ids": [work_id]}))

        keeper = Keeper(config, api, key, store, now)
        claimer = Claimer(config, api, key, store, queue, loop, now, sleep)
        observer = Observer(config, store, queue, wake, now)
        self.operator = Operator(store, queue, wake, now)
        place = OutputsPlace("bucket", "fleet", 9, 9, 9, lambda key, *_: Post(url="", fields={"key": key}))
        sources = StagingPlaces(frozenset(), frozenset({"example.com"}), 9, lambda bucket, key: "")
        parts: dict[str, Any] = {
            "claimer": claimer,
            "janitor": Janitor(config, api, store, sandboxes, claimer, observer, wake, now),
            "launcher": Launcher(config, api, store, sandboxes, now, lambda: f"TICKET-{next(count)}", sleep),
            "keeper": keeper,
            "stopper": Stopper(config, api, keeper, store, sandboxes, queue, now),
            "observer": observer,
            "tickets": Tickets(store, wake, now, None, lambda: f"SECRET-callback-{next(count)}", place, sources),
        }

        def replace(module: ModuleType, name: str, by: Any) -> None:
            self._replaced.enter_context(patch.object(module, name, by))

        for name, module in APPS.items():
            built = "claimer" if name == "poller" else name
            replace(module, built, lambda part=parts[built]: part)
            functions.handlers[name] = module.handler
        replace(APPS["launcher"], "config", lambda: config)
        replace(APPS["launcher"], "sqs", lambda: self.messages)
        functions.timeouts.update(TIMEOUTS_MS)
        for module in (shared.claiming, shared.keeping, shared.stopping):
            replace(module, "ThreadPoolExecutor", machine.pool)
        replace(shared.wiring, "now", now)
        replace(shared.metrics, "flush", self._publish)

    def _publish(self) -> None:
        """In place of EMF: what a handler has counted, at its end."""
        for label, found in shared.metrics._sink.provider.metric_set.items():
            for value in found["Value"]:
                self.measured.add(self.machine.now, label, value)
        shared.metrics._sink.clear_metrics()

    def _measure(self) -> None:
        """The services' own metrics, as far as an alarm or the dashboard looks at them."""

        def add(namespace: str, metric: str, value: float, resource: str) -> None:
            self.measured.add(self.machine.now, metric, value, namespace=namespace, resource=resource)

        def of_call(kind: str) -> None:
            if kind.startswith("store."):
                units = "Write" if kind.startswith(("store.save", "store.raise")) else "Read"
                add("AWS/DynamoDB", f"Consumed{units}CapacityUnits", 1, "WorkTable")

        letters = "ApproximateNumberOfMessagesVisible"
        self.outside.measure = of_call
        self.functions.measure = lambda name, metric, value: add(
            "AWS/Lambda", metric, value, f"{name.capitalize()}Function"
        )
        self.messages.measure = lambda count: add("AWS/SQS", letters, count, "LaunchDeadLetters")
        self.loops.measure = lambda failed: add("AWS/States", "ExecutionsFailed", failed, "LeaseLoop")


def _turn_of(task: Task) -> tuple[str, str]:
    return task.environment["FLEET_WORK_ID"], task.environment["FLEET_TURN"]


TIMEOUTS_MS = {
    "poller": 120_000,
    "launcher": 60_000,
    "keeper": 30_000,
    "stopper": 30_000,
    "observer": 30_000,
    "tickets": 10_000,
    "janitor": 300_000,
}


def _load(function: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"simulated_{function}", FUNCTIONS / function / "app.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


APPS = {name: _load(name) for name in TIMEOUTS_MS}


class _Ear(logging.Handler):
    """Hears every log line of the run that is on."""

    fleet: Fleet | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.fleet is not None:
            known = logging.makeLogRecord({}).__dict__
            extras = {k: v for k, v in record.__dict__.items() if k not in known and k != "message"}
            trace = f" {record.exc_info[1]!r}" if record.exc_info else ""
            line = f"{record.levelname} {record.getMessage()} {extras or ''}{trace}"
            self.fleet.heard(line, extras.get("work_id"))


_EAR = _Ear()


def _listen(fleet: Fleet, replaced: ExitStack) -> None:
    logger = logging.getLogger(log._logger.name)
    for name, by in (("handlers", [_EAR]), ("propagate", False)):
        replaced.enter_context(patch.object(logger, name, by))
    _EAR.fleet = fleet
