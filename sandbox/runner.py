"""One turn of one session, from ticket to exit code: the process of a sandbox. The HTTP answers that keep the
lease with the control plane are in lease_guard.py, the talk with the control plane in control_plane.py, the upload of
outputs in outputs.py, the log's form in json_log.py.

The official SDK's worker does the session (events, tools, skills, memory stores); this module gives it its
credential, ends it in time, and closes the turn (DESIGN §7, §8).
Its exit code says how the turn went (`ExitCode`); whether a stop was wanted only the control plane's record
knows.
"""

import asyncio
import ctypes
import enum
import logging
import math
import os
import secrets
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field

import anyio
import httpx2
import psutil
from anthropic import APIError, APIStatusError, AsyncAnthropic, DefaultAsyncHttpxClient
from control_plane import Attempt, ControlPlane, ControlPlaneUnanswered, Grant, TicketRefused
from json_log import JsonLines, configure_logging, describe, say
from lease_guard import LeaseGuard
from outputs import PUT_SECONDS, Uploads
from staging import StagingFailed, StagingUnanswered, stage

POST_STOP_SECONDS = 5.0
# Within the grace that tickets gives a turn which ended by itself (shared/ticketing.py).
HAVE_STOPPED_SECONDS = 20.0
STOPPED_YET_SECONDS = 2.0
READ_HISTORY_SECONDS = 20.0
# A tool may be about to finish by itself when a stop comes; then it is asked to end, then made to.
TOOL_GRACE_SECONDS = 2.0
TOOL_KILL_SECONDS = 3.0
# Share of the stop timeout after which the process ends itself, its result and memory flushed or not.
STOP_DEADLINE_SHARE = 0.9
# Share of it after which no more outputs are put: what was put is still to be listed.
OUTPUTS_DEADLINE_SHARE = 0.75

SANDBOX_MARK = "FLEET_SANDBOX"


class ExitCode(enum.IntEnum):
    """How the turn went. `docker` and shells use 2 and 125 upward themselves: none of those is used here."""

    FINISHED = 0
    """The SDK's worker ended cleanly: the turn is over, its stop posted or handed to the control plane."""
    CRASH = 1
    """Anything unexpected: the turn is not over and may be served by another attempt."""
    STOPPED = 10
    """SIGTERM or SIGINT came before the turn was over. No stop was posted: that is the control plane's."""
    UNSERVED = 11
    """As FINISHED, but a message slipped in before the stop and nobody works on it."""
    TICKET_REFUSED = 12
    """The ticket is spent or this attempt not the current one: another sandbox has the turn, or none may."""
    TICKET_UNANSWERED = 13
    """The tickets function gave no usable answer in time: another attempt may."""
    CREDENTIAL_REFUSED = 14
    """The API refused the session's token (401, 403), or the work secret holds none."""
    SESSION_GONE = 15
    """The API does not know the session (404): it was deleted."""
    BAD_CONFIGURATION = 16
    """An environment variable is missing or makes no sense; the log names it and what sets it."""
    NOT_STOPPED = 17
    """The turn is over, but its item could not be stopped: a message may come and wait in it."""
    STAGING_FAILED = 18
    """What the session's metadata wants in the workspace cannot be had: the log says why. No relaunch mends it."""
    STAGING_UNANSWERED = 19
    """It could not be had in time: another attempt may."""


# --- configuration ----------------------------------------------------------------------------------------

_LAUNCHER = "the launcher sets it in the RunTask overrides"
_TEMPLATE = "template.yaml sets it in the task definition"
_SET_BY = {
    "FLEET_WORK_ID": _LAUNCHER,
    "FLEET_TURN": _LAUNCHER,
    "FLEET_ATTEMPT": _LAUNCHER,
    "FLEET_TICKET": _LAUNCHER,
    "FLEET_TICKETS_URL": _TEMPLATE,
    "FLEET_MAX_IDLE_SECONDS": _TEMPLATE,
    "FLEET_STOP_TIMEOUT_SECONDS": _TEMPLATE,
    "FLEET_WORKDIR": _TEMPLATE,
    "FLEET_OUTPUTS": _TEMPLATE,
    "ANTHROPIC_BASE_URL": _TEMPLATE,
    "ANTHROPIC_ENVIRONMENT_ID": _TEMPLATE,
}
# What an agent's tools may see of our variables: which sandbox they run in, nothing to call with.
_TOOLS_MAY_SEE = {"FLEET_WORK_ID", "FLEET_TURN", "FLEET_ATTEMPT"}


class ConfigurationError(Exception):
    """A variable is missing or makes no sense; the message names it and what sets it."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem} ({_SET_BY[name]})")


@dataclass(frozen=True)
class Config:
    """The process's environment, read once. The two durations are in seconds."""

    attempt: Attempt
    ticket: str = field(repr=False)
    tickets_url: str
    base_url: str
    environment_id: str
    max_idle: float
    stop_timeout: float
    workdir: str
    outputs: str

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Config":
        """Raises ConfigurationError."""

        def text(name: str, default: str | None = None) -> str:
            value = environ.get(name) or default
            if value is None:
                raise ConfigurationError(name, "is not set")
            return value

        def number(name: str) -> int:
            if not (value := text(name)).isdecimal():
                raise ConfigurationError(name, f"must be a whole number, not {value!r}")
            return int(value)

        def seconds(name: str, default: str) -> float:
            value = text(name, default)
            try:
                parsed = float(value)
            except ValueError:
                parsed = math.nan
            if not (math.isfinite(parsed) and parsed > 0):
                raise ConfigurationError(name, f"must be a number of seconds above 0, not {value!r}")
            return parsed

        def url(name: str) -> str:
            value = text(name)
            try:
                parsed = httpx2.URL(value)
            except httpx2.InvalidURL:
                parsed = httpx2.URL("")
            if parsed.scheme not in ("http", "https") or not parsed.host:
                raise ConfigurationError(name, "must be an http or https URL")
            return value

        def directory(name: str, default: str) -> str:
            value = text(name, default)
            try:
                os.makedirs(value, exist_ok=True)
            except OSError as error:
                raise ConfigurationError(name, f"cannot be made: {error}") from error
            if not os.access(value, os.W_OK | os.X_OK):
                raise ConfigurationError(name, f"is not writable: {value}")
            return value

        return cls(
            attempt=Attempt(text("FLEET_WORK_ID"), number("FLEET_TURN"), number("FLEET_ATTEMPT")),
            ticket=text("FLEET_TICKET"),
            tickets_url=url("FLEET_TICKETS_URL"),
            base_url=url("ANTHROPIC_BASE_URL"),
            environment_id=text("ANTHROPIC_ENVIRONMENT_ID"),
            max_idle=seconds("FLEET_MAX_IDLE_SECONDS", "60"),
            stop_timeout=seconds("FLEET_STOP_TIMEOUT_SECONDS", "120"),
            workdir=directory("FLEET_WORKDIR", "/workspace"),
            outputs=text("FLEET_OUTPUTS", "/mnt/session/outputs"),
        )


def scrub_environment(environ: MutableMapping[str, str]) -> None:
    """Leave nothing that a tool may not see, or that the SDK would take as another credential or header."""
    for name in list(environ):
        if name.startswith("ANTHROPIC_") or (name.startswith("FLEET_") and name not in _TOOLS_MAY_SEE):
            del environ[name]


# prctl(2), by the numbers of <linux/prctl.h>
_PROTECTIONS = (("PR_SET_DUMPABLE", 4, 0), ("PR_SET_NO_NEW_PRIVS", 38, 1))


def protect_process() -> None:
    """Keep this process's memory, first environment and files from its tools, which are of the same user.

    Without dumpability `/proc` and ptrace refuse them, and the SDK's file tools, which run in this process, are refused
    `/proc/self` in the image, where it is not root. A tool is dumpable again, and can gain no privilege by a setuid
    program. Linux only. A failure is logged and the turn goes on: Fargate's kernel knows both, so only another host's
    system call filter can forbid them, and refusing every session there would protect none.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for name, option, value in _PROTECTIONS:
        if libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))) != 0:
            why = os.strerror(ctypes.get_errno())
            say(logging.ERROR, "process not protected from its tools", reason=f"{name} failed", error=why)


# --- ending a turn early ----------------------------------------------------------------------------------


class EarlyEnd:
    """Ends the turn before the worker is done. The first reason given stands.

    Cancelling the scope is what the SDK itself does when a beat is answered `stopping` (the running tool is
    shielded, memory is flushed, cleanup runs), without waiting up to 30 s for the next beat.
    """

    def __init__(self, config: Config, mark: str) -> None:
        self.scope = anyio.CancelScope()
        self.uploads = anyio.CancelScope()
        self.reason: ExitCode | None = None
        self._stop_timeout = config.stop_timeout
        self._mark = mark
        self._ending_tools: asyncio.Task[None] | None = None

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def request(self, reason: ExitCode, why: str) -> None:
        """End the turn; harmless when repeated. Call it in the event loop's thread."""
        if self.reason is not None:
            return
        self.reason = reason
        say(logging.WARNING, "turn told to end", exit_name=reason.name, reason=why)
        loop = asyncio.get_running_loop()
        loop.call_later(self._stop_timeout * STOP_DEADLINE_SHARE, self._give_up)
        self.uploads_end_within(self._stop_timeout * OUTPUTS_DEADLINE_SHARE)
        self._ending_tools = loop.create_task(self._end_tools())
        self.scope.cancel()

    def uploads_end_within(self, seconds: float) -> None:
        """Whichever end is the earlier stands."""
        self.uploads.deadline = min(self.uploads.deadline, asyncio.get_running_loop().time() + seconds)

    def on_refused(self, status: int) -> None:
        """End the turn because the API refuses the session for good."""
        reason = {
            401: ExitCode.CREDENTIAL_REFUSED,
            403: ExitCode.CREDENTIAL_REFUSED,
            404: ExitCode.SESSION_GONE,
        }.get(status, ExitCode.CRASH)
        self.request(reason, f"the API answered HTTP {status} for the session")

    async def _end_tools(self) -> None:
        """The SDK waits for a running tool (bash: up to 120 s): end it, so its result is still posted."""
        await asyncio.sleep(min(TOOL_GRACE_SECONDS, self._stop_timeout / 10))
        end_tool_processes(self._mark, signal.SIGTERM)
        while True:
            await asyncio.sleep(min(TOOL_KILL_SECONDS, self._stop_timeout / 10))
            end_tool_processes(self._mark, signal.SIGKILL)

    def _give_up(self) -> None:
        # SIGKILL is near: leave with a code and a line that say so, rather than without.
        code = self.reason or ExitCode.STOPPED
        say(logging.WARNING, "stop timeout nearly over: a result or memory may be lost")
        end_tool_processes(self._mark, signal.SIGKILL)
        say_end(code)
        os._exit(code)


def end_tool_processes(mark: str, with_signal: signal.Signals) -> None:
    """Signal every process that a tool started: our descendants, and what left the tree but carries our mark.

    The SDK's shell shares our process group, so that a signal to the group would hit this process too.
    """
    own = psutil.Process()
    # Parents first: a shell whose command alone dies would go on with its next.
    found = dict.fromkeys(own.children(recursive=True))
    for process in psutil.process_iter():
        try:
            if process.pid != own.pid and process.environ().get(SANDBOX_MARK) == mark:
                found.setdefault(process)
        except (psutil.Error, OSError):  # gone meanwhile, or not ours to look at: then not our tool either
            continue
    for process in found:
        try:
            process.send_signal(with_signal)
        except psutil.Error:  # gone meanwhile
            continue


# --- the turn ---------------------------------------------------------------------------------------------


async def run_sandbox(config: Config, formatter: JsonLines) -> ExitCode:
    """Serve the turn and close it. Unexpected errors are raised."""
    mark = uuid.uuid4().hex
    os.environ[SANDBOX_MARK] = mark
    early = EarlyEnd(config, mark)
    for number in (signal.SIGTERM, signal.SIGINT):
        name = number.name
        asyncio.get_running_loop().add_signal_handler(number, early.request, ExitCode.STOPPED, name)
    nonce = secrets.token_urlsafe(32)
    formatter.hide([nonce])
    uploads: Uploads | None = None
    try:
        async with httpx2.AsyncClient() as http:
            control_plane = ControlPlane(http, config.tickets_url, config.attempt)
            try:
                with early.scope:
                    grant = await control_plane.exchange(config.ticket, nonce)
                    formatter.hide(grant.secret_values())
                    formatter.add_fields({"session_id": grant.session_id})
                    say(logging.INFO, "ticket exchanged")
                    token = usable_token(config, grant)
                    formatter.hide([token])
                    if grant.outputs:
                        uploads = Uploads(control_plane, http, grant, config.outputs, formatter.hide)
                    if grant.staging:
                        sources = await control_plane.ask_staging(grant.callback_secret.get_secret_value())
                        formatter.hide([sources.archive.url] if sources.archive else [])
                        await stage(sources, http, config.workdir)
                    await serve_turn(config, grant, early)
                if early.reason is None:
                    say(logging.INFO, "worker ended")
                    async with AsyncAnthropic(auth_token=token, base_url=config.base_url) as client:
                        code = await close_turn(client, grant, control_plane)
                else:
                    code = early.reason
                    say(logging.WARNING, "turn ended early", exit_name=code.name)
            except Exception as error:
                if early.reason is None:
                    raise
                code = early.reason
                say(logging.WARNING, "turn ended early", exit_name=code.name, error=describe(error))
            if uploads and code in _PUTS_OUTPUTS:
                end_tool_processes(mark, signal.SIGKILL)  # they could change what is being put
                early.uploads_end_within(PUT_SECONDS)
                await uploads.run(early.uploads, ended=code in (ExitCode.FINISHED, ExitCode.UNSERVED))
            return code
    finally:
        end_tool_processes(mark, signal.SIGKILL)  # what an agent left running in the background


# After the stop, never before it: an active item with nobody listening loses messages (docs/decisions/0009)
_PUTS_OUTPUTS = (ExitCode.FINISHED, ExitCode.UNSERVED, ExitCode.NOT_STOPPED, ExitCode.STOPPED)


class NoUsableCredential(Exception):
    """The grant cannot serve this session."""


def usable_token(config: Config, grant: Grant) -> str:
    """The session's token, else the environment key if one was handed over.

    Raises NoUsableCredential, ConfigurationError.
    """
    if grant.environment_id != config.environment_id:
        raise ConfigurationError(
            "ANTHROPIC_ENVIRONMENT_ID",
            f"is {config.environment_id}, but the work item is of {grant.environment_id}",
        )
    if token := grant.sessions_token():
        return token
    if grant.environment_key:
        return grant.environment_key.get_secret_value()
    raise NoUsableCredential("the work secret holds no sessions token")


class FirstResult:
    """Says once how long the turn took to its first tool result that the API took; a metric filter reads the line."""

    def __init__(self, turn: int) -> None:
        self._turn_began = turn / 1000  # a turn's number is when it began, in epoch ms (DESIGN §1)
        self._told = False

    def seen(self) -> None:
        if not self._told:
            self._told = True
            say(logging.INFO, "first tool result", first_result_seconds=round(time.time() - self._turn_began, 1))


async def serve_turn(config: Config, grant: Grant, early: EarlyEnd) -> None:
    """Let the SDK's worker serve the session until its turn is over.

    Returning says that the worker ended by itself, which is a clean end unless `early` has a reason by then.
    """
    guard = LeaseGuard(
        session_id=grant.session_id,
        stopping=lambda: early.requested,
        on_refused=early.on_refused,
        on_result=FirstResult(config.attempt.turn).seen,
    )
    # The worker signs with the session's token, or the key; one given here keeps the SDK from looking for others.
    async with AsyncAnthropic(
        auth_token="unused",  # noqa: S106
        base_url=config.base_url,
        http_client=DefaultAsyncHttpxClient(transport=guard),
    ) as client:
        worker = client.beta.environments.work.worker(workdir=config.workdir, max_idle=config.max_idle)
        say(logging.INFO, "worker starts")
        await worker.handle_item(
            work_id=grant.work_id,
            environment_id=grant.environment_id,
            session_id=grant.session_id,
            work_secret=grant.work_secret.get_secret_value() if grant.work_secret else None,
            environment_key=grant.environment_key.get_secret_value() if grant.environment_key else None,
        )


async def close_turn(client: AsyncAnthropic, grant: Grant, control_plane: ControlPlane) -> ExitCode:
    """Have the item stopped, then look for a message that slipped in before (DESIGN §7).

    While the item stays active with nobody listening, a new message is lost: do not wait for ECS.
    """
    if not await post_stop(client, grant) and not await have_it_stopped(control_plane, grant):
        say(logging.WARNING, "the item could not be stopped: another attempt must look for messages")
        return ExitCode.NOT_STOPPED
    if not await left_unserved(client, grant.session_id):
        return ExitCode.FINISHED
    say(logging.ERROR, "a message came before the stop and nobody works on it")
    await tell_turn_ended(control_plane, grant, unserved=True)
    return ExitCode.UNSERVED


async def have_it_stopped(control_plane: ControlPlane, grant: Grant) -> bool:
    """Repeat the word until the control plane has stopped the item: after that no message slips in unseen.

    Returns whether it has, within `HAVE_STOPPED_SECONDS`.
    """
    stopped: bool | None = False
    with anyio.move_on_after(HAVE_STOPPED_SECONDS):
        while (stopped := await tell_turn_ended(control_plane, grant, unserved=False)) is False:
            await anyio.sleep(STOPPED_YET_SECONDS)
    return bool(stopped)


async def post_stop(client: AsyncAnthropic, grant: Grant) -> bool:
    """Post the forced stop, once: repeated late it would kill the session's next turn (DESIGN §7).

    Returns whether the item is known to be stopped; 409 says that it already was (W§7.1).
    """
    once = client.with_options(max_retries=0, timeout=POST_STOP_SECONDS)
    try:
        with anyio.fail_after(POST_STOP_SECONDS):
            await once.beta.environments.work.stop(grant.work_id, environment_id=grant.environment_id, force=True)
    except APIStatusError as error:
        already_stopped = error.status_code == 409
        level = logging.INFO if already_stopped else logging.WARNING
        say(level, "stop posted", status=error.status_code)
        return already_stopped
    except (APIError, TimeoutError) as error:
        say(logging.WARNING, "stop posted, no answer", error=describe(error))
        return False
    say(logging.INFO, "stop posted", status=200)
    return True


async def tell_turn_ended(control_plane: ControlPlane, grant: Grant, *, unserved: bool) -> bool | None:
    """Give the control plane the word; failing that, it learns the end from ECS and the exit code.

    Returns whether the item is stopped; None if the word was not taken.
    """
    try:
        stopped = await control_plane.turn_ended(grant.callback_secret.get_secret_value(), unserved=unserved)
    except (ControlPlaneUnanswered, TicketRefused) as error:
        say(logging.WARNING, "the end of the turn could not be told", error=describe(error))
        return None
    say(logging.INFO, "end of the turn told", unserved=unserved, stopped=stopped)
    return stopped


async def left_unserved(client: AsyncAnthropic, session_id: str) -> bool:
    """Read the session's history and say whether it ends in work that nobody does."""
    try:
        with anyio.fail_after(READ_HISTORY_SECONDS):
            events = [event async for event in client.beta.sessions.events.list(session_id, limit=1000)]
    except (APIError, TimeoutError) as error:
        say(logging.WARNING, "history not read; a message may be left unserved", error=describe(error))
        return False
    return ends_in_unserved_work(events)


def ends_in_unserved_work(events: Iterable[object]) -> bool:
    """Whether a message or a new outcome to reach came after the turn's last end.

    Only an idle that is not `requires_action` ends a turn (W§11.3), as does the session's own end.
    """
    turn_is_over = unserved = False
    for event in events:
        kind = getattr(event, "type", None)
        if kind in ("session.status_terminated", "session.deleted"):
            return False
        if kind == "session.status_idle":
            reason = getattr(getattr(event, "stop_reason", None), "type", None)
            if reason != "requires_action":
                turn_is_over, unserved = True, False
        elif kind in ("user.message", "user.define_outcome") and turn_is_over:
            unserved = True
    return unserved


# --- the process ------------------------------------------------------------------------------------------


def main() -> ExitCode:
    """Run the sandbox's one turn; every error becomes one line and an exit code."""
    formatter = configure_logging()
    protect_process()
    known: list[tuple[type[Exception], ExitCode]] = [
        (ConfigurationError, ExitCode.BAD_CONFIGURATION),
        (TicketRefused, ExitCode.TICKET_REFUSED),
        (ControlPlaneUnanswered, ExitCode.TICKET_UNANSWERED),
        (NoUsableCredential, ExitCode.CREDENTIAL_REFUSED),
        (StagingFailed, ExitCode.STAGING_FAILED),
        (StagingUnanswered, ExitCode.STAGING_UNANSWERED),
    ]
    formatter.hide([os.environ.get("FLEET_TICKET", "")])
    try:
        config = Config.from_environment(os.environ)
        formatter.add_fields(config.attempt.as_fields())
        scrub_environment(os.environ)
        code = asyncio.run(run_sandbox(config, formatter))
    except Exception as error:  # noqa: BLE001 - the last line of defence: no traceback, a code that says crash
        code = next((code for kind, code in known if isinstance(error, kind)), ExitCode.CRASH)
        known_error = str(error) if code is not ExitCode.CRASH else f"unexpected: {describe(error)}"
        say(logging.ERROR, "sandbox failed", error=known_error)
    say_end(code)
    return code


def say_end(code: ExitCode) -> None:
    say(logging.INFO, "sandbox ends", exit_code=int(code), exit_name=code.name)


if __name__ == "__main__":
    sys.exit(main())
