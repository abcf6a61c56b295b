"""What commands show of one or many sessions: ls, show, watch. Reads only; what a record means in words is here too."""

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live

from cli.stack import Fleet
from cli.terminal import clock, note, out, print_json, print_json_line, print_row, print_table, say, span, table
from shared import links as pages
from shared import wiring
from shared.config import SHARD
from shared.diagnose import advice, diagnose
from shared.lifecycle import FINISHED, HOPELESS_EXITS, NOT_STOPPED, UNSERVED
from shared.record import Breaker, Lease, Moment, Outcome, PastTurn, Phase, Record

REFRESH_SECONDS = 2.0
COLUMNS = ("ID", "PHASE", "TURN", "ATTEMPT", "AGE", "LEASE", "WHAT")
_HIDDEN = {"secret", "ticket_hashes", "ticket_nonce_hash", "callback_hash"}
_RETRY = "Once the cause is mended, `fleet retry {id}` has the session go on."
_ENDS = {  # what an ended turn calls for, if anything
    Outcome.LOST: "Another worker may serve the session; if none does, its item is offered again and served.",
    Outcome.NOT_OURS: "Another worker claimed it first: see to it that only one serves this environment.",
    Outcome.LAUNCH_FAILED: _RETRY,
    Outcome.FAILED: "`fleet logs {id}` shows what the sandbox said. " + _RETRY,
    Outcome.TIMED_OUT: "`fleet logs {id}` shows what it did so long; SessionTimeoutSeconds is the limit.",
    Outcome.UNSERVED: "A message came as the turn ended: send it again, or `fleet retry {id}`.",
}
_EXITS = {
    **HOPELESS_EXITS,
    FINISHED: "the turn is finished",
    UNSERVED: "finished, but a message slipped in",
    NOT_STOPPED: "finished, but its item could not be stopped",
    1: "it crashed",
    10: "ended by SIGTERM before its turn was over",
    13: "the tickets function gave no usable answer",
    137: "killed: out of memory, or its stop timeout ran out",
    143: "ended by SIGTERM",
}


def ls(
    ctx: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="Ended sessions as well.")] = False,
) -> None:
    """List the live sessions (--all: ended ones as well).

    TURN counts the session's turns, AGE is the present turn's, LEASE is what is left of the lease.
    """
    fleet: Fleet = ctx.obj
    records = sorted(fleet.records() if everything else fleet.live_records(), key=lambda record: record.turn)
    leases = fleet.leases([record for record in records if record.is_live])
    now = wiring.now()
    if fleet.json:
        print_json([as_json(record, leases.get(record.work_id)) for record in records])
        return
    print_table(COLUMNS, [row(record, leases.get(record.work_id), now) for record in records])
    if not records:
        note("No session is known." if everything else "No session is live. `fleet ls --all` lists ended ones.")


def show(
    ctx: typer.Context,
    ident: Annotated[str, typer.Argument(metavar="ID", help="A session's or a work item's id.")],
) -> None:
    """Show one session: what it does now and why, its turns, its links.

    The times of a turn count from its start; `now` says in words where it stands, `do` what to do about it.
    """
    fleet: Fleet = ctx.obj
    record = fleet.find(ident)
    lease = fleet.leases([record]).get(record.work_id)
    arn = record.task_arn
    task = wiring.sandboxes(fleet.config).describe([arn]).get(arn) if arn else None
    breaker, now = fleet.store.breaker(), wiring.now()
    state, to_do = story(record, task, breaker, now)
    where = links(fleet, record)
    if fleet.json:
        told = {"now": state, "do": to_do, "links": where, "task_status": (task or {}).get("lastStatus")}
        print_json(as_json(record, lease) | told)
        return
    facts = {
        "session": record.session_id if record.session_id != record.work_id else None,
        "turn": f"{len(record.history) + 1}, attempt {record.attempt}, since {clock(record.turn)}",
        "lease": lease_in_words(lease, now) if lease and record.is_live else None,
        "sandbox": f"{arn.rsplit('/', 1)[-1]} ({(task or {}).get('lastStatus', 'not known to ECS any more')})"
        if arn
        else None,
        "now": state,
        "do": to_do,
        **where,
    }
    say(f"{record.work_id}  {record.phase if record.is_live else record.outcome or record.phase}")
    for name, value in facts.items():
        if value:
            say(f"  {name:9}{value}")
    turns: list[Record | PastTurn] = [*record.history, record]
    for number, turn in enumerate(turns, 1):
        say("")
        say(turn_line(number, turn))
        for line in timeline(turn.timeline):
            say(line)


def watch(ctx: typer.Context) -> None:
    """Watch the live sessions until Ctrl-C.

    In a pipe: a line for each change, from then on; with --json an object a line.
    """
    fleet: Fleet = ctx.obj
    if out.is_terminal and not fleet.json:
        with Live(console=out, auto_refresh=False) as live:
            while True:
                live.update(_picture(fleet), refresh=True)
                time.sleep(REFRESH_SECONDS)
    seen: dict[str, tuple[int, int, str]] = {}
    while True:
        for record in _changed(fleet, seen):
            if fleet.json:
                print_json_line(as_json(record, None))
            else:
                print_row((clock(wiring.now()), *row(record, None, wiring.now())))
        time.sleep(REFRESH_SECONDS)


def _picture(fleet: Fleet) -> Group:
    records = sorted(fleet.live_records(), key=lambda record: record.turn)
    leases, now = fleet.leases(records), wiring.now()
    head = f"{clock(now)}  {len(records)} live of at most {fleet.config.max_sessions}"
    breaker = fleet.store.breaker()
    if breaker.paused:
        head += "  PAUSED: nothing new is claimed"
    if breaker.opened_at is not None:
        head += f"  CIRCUIT BREAKER OPEN: {breaker.reason}"
    return Group(head, table(COLUMNS, [row(record, leases.get(record.work_id), now) for record in records]))


def _changed(fleet: Fleet, seen: dict[str, tuple[int, int, str]]) -> list[Record]:
    """Records whose turn, attempt or phase is not what `seen` says; those that left the index are read once more."""
    ids = {entry.work_id for entry in fleet.store.live(SHARD)}
    found = []
    for work_id in sorted(ids | seen.keys()):
        record = fleet.store.get(work_id)
        if record is None:
            seen.pop(work_id, None)
            continue
        mark = (record.turn, record.attempt, str(record.phase))
        if seen.get(work_id) != mark:
            found.append(record)
        if record.is_live:
            seen[work_id] = mark
        else:
            seen.pop(work_id, None)
    return found


# --- a record in words ----------------------------------------------------------------------------------------


def as_json(record: Record, lease: Lease | None) -> dict[str, Any]:
    """The record without anything secret, and its lease."""
    shown = record.model_dump(mode="json", exclude=_HIDDEN, exclude_none=True)
    return shown | {"lease": lease.model_dump(mode="json", exclude_none=True) if lease and record.is_live else None}


def row(record: Record, lease: Lease | None, now: int) -> tuple[str, ...]:
    """One line of `ls`."""
    return (
        record.work_id,
        str(record.phase if record.is_live else record.outcome or record.phase),
        str(len(record.history) + 1),
        str(record.attempt),
        span(now - record.turn),
        span(lease.deadline(0) - now) if lease and record.is_live and not lease.over else "",
        what(record, now),
    )


def what(record: Record, now: int) -> str:
    """The one thing worth knowing about a record, in a few words."""
    if not record.is_live:
        return record.reason or ""
    if record.stop_reason:
        return record.stop_reason
    if record.restart_reason:
        return f"restarting: {record.restart_reason}"
    if record.waits_for:
        return f"waits for {record.waits_for} since {span(now - (record.waiting_since or now))}"
    if record.put_off and record.phase is not Phase.RUNNING:
        return f"put off: {record.put_off}"
    return ""


def lease_in_words(lease: Lease, now: int) -> str:
    """Whether it is ours and for how long."""
    if lease.over:
        return f"over: {lease.over}"
    return f"{span(lease.deadline(0) - now)} left, last beat accepted {span(now - lease.accepted_sent_at)} ago"


Told = tuple[str, str | None]


def story(record: Record, task: Mapping[str, Any] | None, breaker: Breaker, now: int) -> Told:
    """Where the turn stands, in words, and what to do about it (None: nothing)."""
    return _live(record, task, breaker, now) if record.is_live else _ended(record, task)


def _live(record: Record, task: Mapping[str, Any] | None, breaker: Breaker, now: int) -> Told:
    since = span(now - record.timeline[-1].at) if record.timeline else span(now - record.turn)
    match record.phase:
        case Phase.RECEIVED:
            return f"offered by the queue and being claimed for {since}", "Nothing: it is repaired by itself."
        case Phase.HELD | Phase.LAUNCHING:
            return _waiting(record, task, breaker, since)
        case Phase.STOPPING:
            dead = "its sandbox is dead" if record.dead else "its sandbox is being ended"
            return f"stopping: {record.stop_reason}; {dead}; {since} since the last step", None
    running = span(now - (record.running_since or now))
    if record.restart_reason:
        return f"its sandbox is being replaced: {record.restart_reason}", None
    if record.waits_for:
        waited = span(now - (record.waiting_since or now))
        return f"runs for {running}; waits for {record.waits_for} for {waited}", "Answer it in the session."
    progress = f"; last sign of progress {span(now - record.progress_at)} ago" if record.progress_at else ""
    return f"runs for {running}{progress}", None


def _waiting(record: Record, task: Mapping[str, Any] | None, breaker: Breaker, since: str) -> Told:
    if breaker.opened_at is not None:
        reason = f"held: no sandbox can be started at present ({breaker.reason})"
        return reason, "Mend the cause; one launch a minute tries whether it is mended."
    if task is not None:
        return f"its sandbox is {task.get('lastStatus')} for {since}", None
    if record.put_off:
        return f"waits for a sandbox: {record.put_off}; {since} since the last try", advice(record.put_off)
    return f"waits for a sandbox for {since}", None


def _ended(record: Record, task: Mapping[str, Any] | None) -> Told:
    outcome = record.outcome or Outcome.STOPPED
    state = f"ended {outcome}"
    if record.reason:
        state += f": {record.reason}"
    if record.exit_code is not None:
        state += f" (exit code {record.exit_code}: {_EXITS.get(record.exit_code, 'it crashed')})"
    if task is not None and task.get("lastStatus") == "STOPPED":
        found = diagnose(task)
        state += f"; ECS: {found.summary}, {found.detail}"
    to_do = _ENDS.get(outcome)
    return state, to_do.format(id=record.work_id) if to_do else None


def turn_line(number: int, turn: Record | PastTurn) -> str:
    """The head of a turn's timeline."""
    end = str(turn.outcome) if turn.outcome else "live"
    code = f", exit code {turn.exit_code}" if turn.exit_code is not None else ""
    reason = f": {turn.reason}" if turn.reason else ""
    return f"turn {number}, {clock(turn.turn)}, attempt {turn.attempt}, {end}{code}{reason}"


def timeline(moments: Sequence[Moment]) -> list[str]:
    """A line a moment, in seconds from the first."""
    return [f"  {(moment.at - moments[0].at) / 1000:8.1f} s  {moment.event}" for moment in moments]


def links(fleet: Fleet, record: Record) -> dict[str, str]:
    """Pages of the AWS console; none for a local AWS, which has no console."""
    if fleet.is_local or record.task_arn is None:
        return {}
    return pages.links(record.task_arn, fleet.resource("SandboxLogs"), fleet.output("StateMachineArn"))
