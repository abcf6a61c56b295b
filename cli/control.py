"""Commands that change what the fleet does: stop, retry, pause, resume, drain, redrive, repair.

Each writes a wish by shared's rules or has a function of the stack act; none acts around them (shared/operating.py).
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from pydantic import SecretStr, ValidationError

from cli import rehearsal
from cli.stack import Fleet
from cli.terminal import Code, Failure, clock, confirm, note, print_json, print_table, say, span, wait_for, working
from shared import lifecycle, wiring
from shared.launching import LaunchMessage
from shared.operating import Operator
from shared.record import Phase, Record
from shared.work_api import WorkApi

ID = Annotated[str, typer.Argument(metavar="ID", help="A session's or a work item's id.")]
YES = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
TIMEOUT = Annotated[int, typer.Option(help="Seconds to wait at most.")]
WAITS, OVER, MALFORMED = "waits", "over", "malformed"
_CLAIM_SECONDS = 150  # a poller's claim lock is over then
_LOOK_SECONDS = 30  # how long messages that were looked at stay hidden from other readers
_MOST_LETTERS = 100
_TOKEN_LIKE = re.compile(r"sk-ant-[\w-]+|whsec_[\w+/=-]+|[\w-]{50,}")


def _operator(fleet: Fleet) -> Operator:
    config = fleet.config
    return Operator(fleet.store, wiring.queue(config), wiring.wake_stopper(config), wiring.now)


# --- one session ----------------------------------------------------------------------------------------------


def stop(
    ctx: typer.Context,
    ident: ID,
    force: Annotated[bool, typer.Option("--force", help="Stop its item first, then the sandbox.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended.")] = False,
    timeout: TIMEOUT = 300,
    yes: YES = False,
) -> None:
    """Stop a session: its sandbox, then its work item.

    The sandbox gets SIGTERM and StopTimeoutSeconds to save its work; once it is dead the item is stopped. --force stops
    the item at once, so that the session asks nothing more of the sandbox while that ends. A new message to the session
    queues it again.
    """
    fleet: Fleet = ctx.obj
    record = fleet.find(ident)
    if not record.is_live:
        _tell(fleet, record, f"{record.work_id} is over already: {record.outcome}, {clock(record.timeline[-1].at)}.")
        return
    age = span(wiring.now() - record.turn)
    confirm(f"Stop {record.work_id}, {record.phase}, for {age}?", yes=yes)
    if record.phase is Phase.RECEIVED:

        def claimed() -> Record | None:
            found = fleet.store.get(record.work_id)
            return found if found and found.phase is not Phase.RECEIVED else None

        record = wait_for(claimed, f"{record.work_id} is being claimed", _CLAIM_SECONDS)
    changed = _operator(fleet).stop(record.work_id, force=force)
    turn = record.turn
    if not wait:
        newest = changed or fleet.store.get(record.work_id) or record
        already = "" if changed else f" already: {newest.stop_reason or newest.outcome}"
        _tell(fleet, newest, f"{record.work_id} is {newest.phase}{already}. `fleet show {record.work_id}` tells more.")
        return
    ended = wait_for(lambda: _ended(fleet, record.work_id, turn), f"{record.work_id} stops", timeout)
    _tell(fleet, ended, f"{record.work_id} has ended: {ended.outcome}.")


def _ended(fleet: Fleet, work_id: str, turn: int) -> Record | None:
    """The record once this turn is over; a later turn proves it as well."""
    record = fleet.store.get(work_id)
    return record if record and (not record.is_live or record.turn != turn) else None


def retry(ctx: typer.Context, ident: ID, yes: YES = False) -> None:
    """Try a session again: a new sandbox, a launch now, or a new turn.

    Running: its sandbox is stopped and another goes on (what the session has is on the server). Waiting for a sandbox:
    launched now, with the whole launch deadline anew. Ended: an interrupt is sent, which queues the session again; that
    needs an organisation key in ANTHROPIC_API_KEY, since the environment key may not.
    """
    fleet: Fleet = ctx.obj
    record = fleet.find(ident)
    if not record.is_live:
        _queue_again(fleet, record, yes=yes)
        return
    if record.phase in (Phase.RECEIVED, Phase.STOPPING):
        why = "being claimed" if record.phase is Phase.RECEIVED else f"being stopped ({record.stop_reason})"
        raise Failure(f"{record.work_id} is {why}: try again once that is over.", Code.NOT_DONE)
    if not lifecycle.waits_for_launch(record):
        confirm(f"Stop the sandbox of {record.work_id} and start another?", yes=yes)
    changed = _operator(fleet).retry(record.work_id)
    if changed is None:
        newest = fleet.store.get(record.work_id) or record
        why = f"already {newest.restart_reason}" if newest.restart_reason else f"{newest.phase}"
        raise Failure(f"{record.work_id} is {why}: there is nothing to try again now.", Code.NOT_DONE)
    breaker = fleet.store.breaker()
    if breaker.opened_at is not None and lifecycle.waits_for_launch(changed):
        note(f"The circuit breaker is open: it is tried when its minute comes. {breaker.reason}")
    _tell(fleet, changed, f"{record.work_id}: {changed.timeline[-1].event}.")


def _queue_again(fleet: Fleet, record: Record, *, yes: bool) -> None:
    if record.session_id is None:
        raise Failure(f"{record.work_id} has ended and is no session: nothing to retry.", Code.NOT_DONE)
    key = os.environ.get("ANTHROPIC_API_KEY", "").strip()
    if not key:
        raise Failure(
            f"{record.work_id} has ended ({record.outcome}). Send the session a message, or set ANTHROPIC_API_KEY to "
            "an organisation key and repeat this: it then sends an interrupt, which queues the session again.",
            Code.NOT_DONE,
        )
    confirm(f"Send session {record.session_id} an interrupt, so that it is queued again?", yes=yes)
    api = WorkApi(fleet.config.base_url, fleet.config.environment_id, lambda: SecretStr(key))
    api.interrupt(record.session_id)
    wiring.wake_poller(fleet.config)()
    _tell(fleet, record, f"{record.session_id}: interrupt sent and the poller woken. Watch it with `fleet watch`.")


def _tell(fleet: Fleet, record: Record, text: str) -> None:
    if fleet.json:
        told = record.model_dump(mode="json", include={"work_id", "session_id", "turn", "attempt", "phase", "outcome"})
        print_json(told | {"said": text})
    else:
        say(text)


# --- all of them ----------------------------------------------------------------------------------------------


def pause(ctx: typer.Context) -> None:
    """Claim nothing new; what runs goes on.

    Work waits safely in the vendor's queue. It stays so, whatever is deployed, until `fleet resume`.
    """
    _switch(ctx.obj, paused=True)


def resume(ctx: typer.Context) -> None:
    """Claim new work again, at once."""
    fleet: Fleet = ctx.obj
    _switch(fleet, paused=False)
    wiring.wake_poller(fleet.config)()


def drain(
    ctx: typer.Context,
    wait: Annotated[bool, typer.Option("--wait", help="Until no session is live.")] = False,
    timeout: TIMEOUT = 3600,
) -> None:
    """Pause, and say what still runs (--wait: until nothing does).

    `fleet resume` ends it.
    """
    fleet: Fleet = ctx.obj
    _operator(fleet).pause(paused=True)
    live = fleet.live()
    if wait and live:
        wait_for(lambda: True if not fleet.live() else None, f"{len(live)} sessions end", timeout)
        live = []
    if fleet.json:
        print_json({"paused": True, "live": [entry.work_id for entry in live], "drained": not live})
    elif live:
        say(f"Paused. {len(live)} sessions still run: {', '.join(sorted(entry.work_id for entry in live)[:10])}.")
    else:
        say("Paused and drained: no session is live. `fleet resume` claims new work again.")


def _switch(fleet: Fleet, *, paused: bool) -> None:
    changed = _operator(fleet).pause(paused=paused)
    live = len(fleet.live())
    state = "paused: nothing new is claimed" if paused else "resumed: new work is claimed"
    if fleet.json:
        print_json({"paused": paused, "changed": changed, "live": live})
    else:
        say(f"{state.capitalize()}; {live} sessions are live{'' if changed else ' (it was so already)'}.")


# --- repairs --------------------------------------------------------------------------------------------------


def redrive(
    ctx: typer.Context,
    drop: Annotated[bool, typer.Option("--drop", help="Also delete what can never be launched.")] = False,
    yes: YES = False,
) -> None:
    """Look at the dead letters, then send the good ones again.

    A letter whose turn still waits for its sandbox goes back to the launch queue. One whose turn is over and one that
    is no launch message stay, unless --drop deletes them. No session waits in the dead letters alone: the poller and
    the janitor send its launch message again.
    """
    fleet: Fleet = ctx.obj
    letters = _letters(fleet)
    again = [letter for letter in letters if letter.verdict == WAITS]
    lost = [letter for letter in letters if letter.verdict != WAITS] if drop else []
    if letters and not fleet.json:
        print_table(("SENT", "VERDICT", "WHY", "BODY"), [letter.row() for letter in letters])
    sqs, dead, gone = fleet.client("sqs"), fleet.output("DlqUrl"), set[str]()
    try:
        if again or lost:
            confirm(f"Send {len(again)} again and delete {len(lost)}?", yes=yes)
        for letter in again:
            sqs.send_message(QueueUrl=fleet.output("QueueUrl"), MessageBody=letter.body)
        for letter in (*again, *lost):
            sqs.delete_message(QueueUrl=dead, ReceiptHandle=letter.receipt)
            gone.add(letter.receipt)
    finally:  # what stays is to be seen by the next look
        for letter in letters:
            if letter.receipt not in gone:
                sqs.change_message_visibility(QueueUrl=dead, ReceiptHandle=letter.receipt, VisibilityTimeout=0)
    if fleet.json:
        print_json([dict(zip(("sent", "verdict", "why", "body"), letter.row(), strict=True)) for letter in letters])
    elif letters:
        say(f"{len(again)} sent again, {len(lost)} deleted, {len(letters) - len(gone)} left.")
    else:
        say("No dead letters.")


@dataclass(frozen=True)
class Letter:
    """A message of the dead-letter queue that was looked at; `receipt` deletes it."""

    sent_at: int
    body: str
    receipt: str
    verdict: str
    why: str

    def row(self) -> tuple[str, str, str, str]:
        """For people: the body short, and without what looks like a token."""
        shown = _TOKEN_LIKE.sub("[hidden]", " ".join(self.body.split()))[:80]
        return clock(self.sent_at), self.verdict, self.why, shown


def _letters(fleet: Fleet) -> list[Letter]:
    """Up to _MOST_LETTERS, hidden from others for a while; each with what to do about it."""
    sqs, found = fleet.client("sqs"), dict[str, Letter]()
    while len(found) < _MOST_LETTERS:
        reply = sqs.receive_message(
            QueueUrl=fleet.output("DlqUrl"),
            MaxNumberOfMessages=10,
            VisibilityTimeout=_LOOK_SECONDS,
            AttributeNames=["SentTimestamp"],
        )
        fresh = [message for message in reply.get("Messages", ()) if message["MessageId"] not in found]
        if not fresh:
            break
        for message in fresh:
            verdict, why = judge_letter(fleet.store.get, str(message["Body"]))
            sent_at = int(message.get("Attributes", {}).get("SentTimestamp", 0))
            receipt = str(message["ReceiptHandle"])
            found[message["MessageId"]] = Letter(sent_at, str(message["Body"]), receipt, verdict, why)
    return list(found.values())


def judge_letter(get: Callable[[str], Record | None], body: str) -> tuple[str, str]:
    """WAITS, OVER or MALFORMED, and why; `get` reads a record."""
    try:
        message = LaunchMessage.model_validate_json(body)
    except ValidationError as error:
        wrong = sorted({".".join(map(str, part["loc"])) or "the whole body" for part in error.errors()})
        return MALFORMED, f"wrong or missing: {', '.join(wrong)}"
    record = get(message.work_id)
    if record is None:
        return OVER, "no record of it is kept"
    if not lifecycle.is_current(record, message.turn, message.attempt):
        return OVER, "its turn or attempt is over"
    if not lifecycle.waits_for_launch(record):
        return OVER, f"it is {record.phase} already"
    return WAITS, "its turn waits for a sandbox"


def repair(ctx: typer.Context, yes: YES = False) -> None:
    """Run one janitor round: show what it would do, then do it.

    The plan is a rehearsal by the same code that changes nothing. What needs a second look (a task that no record
    names, an item that nobody serves) is only acted on if an earlier round has seen it, at least two minutes ago.
    """
    fleet: Fleet = ctx.obj
    with working("looking at what a round would do"):
        plan = rehearsal.plan(fleet)
    if not fleet.json:
        say("A round would:" if plan.steps else "A round would change nothing.")
        for step in plan.steps:
            say(f"- {step}")
        for remark in plan.remarks:
            say(f"  {remark}")
    if plan.steps:
        confirm("Run it?", yes=yes)
        with working("the janitor works"):
            reply = fleet.client("lambda").invoke(FunctionName=fleet.function("Janitor"), Payload=b"{}")
        if reply.get("FunctionError"):
            kind = json.loads(reply["Payload"].read() or b"{}").get("errorType", "unknown")
            raise Failure(f"The janitor failed ({kind}): its log group {fleet.resource('JanitorLogs')} says more.")
    if fleet.json:
        print_json(asdict(plan) | {"done": bool(plan.steps)})
    elif plan.steps:
        say("Done. What a woken stopper does takes some seconds more; `fleet repair` shows what is left.")
