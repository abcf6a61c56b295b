"""What commands show of sessions: ls. Reads only."""

from typing import Annotated, Any

import typer

from cli.stack import Fleet
from cli.terminal import note, print_json, print_table, span
from shared import wiring
from shared.record import Lease, Record

_HIDDEN = {"secret", "ticket_hashes", "ticket_nonce_hash", "callback_hash"}
COLUMNS = ("ID", "PHASE", "TURN", "ATTEMPT", "AGE", "LEASE", "WHAT")


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
    if record.put_off:
        return f"put off: {record.put_off}"
    return ""
