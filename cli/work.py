"""`fleet work`: each call of the Work API by hand, for diagnosis. It goes around the control plane; harm asks first."""

import contextlib
import difflib
import os
from collections.abc import Callable
from itertools import islice
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, SecretStr

from cli.stack import Fleet
from cli.terminal import Code, Failure, confirm, note, print_json, print_table, say
from shared import wiring
from shared.work_api import NO_HEARTBEAT, Gone, LeaseLost, Work, WorkApi, WorkApiError

ORGANISATION_KEY = "ANTHROPIC_API_KEY"
_NEAR_AMONG = 1000  # items, newest or oldest as the server likes

_Found = TypeVar("_Found")
ItemId = Annotated[str, typer.Argument(metavar="ID", help="The work item's id.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def get(ctx: typer.Context, work_id: ItemId) -> None:
    """Read one item; with the organisation key in ANTHROPIC_API_KEY."""
    fleet: Fleet = ctx.obj
    api = _with_organisation_key(fleet, "get")
    _show(fleet, _of_item(fleet, work_id, lambda: api.retrieve(work_id)))


def list_(
    ctx: typer.Context,
    state: Annotated[str | None, typer.Option(help="Only items in this state, as the API spells it.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most items read.")] = 1000,
) -> None:
    """List the environment's items; with the environment key. The API neither sorts nor filters them."""
    fleet: Fleet = ctx.obj
    items = list(islice(fleet.api.list_all(), limit + 1))
    if len(items) > limit:
        note(f"There are more than {limit} items; raise --limit to see them.")
    items = [item for item in items[:limit] if state in (None, item.state)]
    if fleet.json:
        print_json([as_json(item) for item in items])
        return
    columns = ("ID", "STATE", "TYPE", "CREATED", "ACKED", "LAST BEAT", "STOP REQUESTED")
    print_table(columns, [_row(item) for item in items])
    if not items:
        note("No item is listed." if state is None else f"No item is in state {state!r}.")


def stats(ctx: typer.Context) -> None:
    """Read the queue's counters; with the environment key. Acked items are in none of them."""
    fleet: Fleet = ctx.obj
    _show(fleet, fleet.api.stats())


def poll(ctx: typer.Context) -> None:
    """Take the next queued item to look at; with the environment key.

    Nobody acks it here, so the queue offers it again after about five seconds.
    """
    fleet: Fleet = ctx.obj
    item = fleet.api.poll()
    if item is None:
        note("The queue is empty.")
        if fleet.json:
            print_json(None)
        return
    _show(fleet, item)
    note("Hidden from other polls for about five seconds, then offered again.")


def ack(ctx: typer.Context, work_id: ItemId, yes: Yes = False) -> None:
    """Take a queued item off the queue; with the environment key. It then needs a claim (heartbeat), by you."""
    fleet: Fleet = ctx.obj
    question = f"The queue never offers an acked item again until somebody claims it. Ack {work_id}?"
    confirm(_warned(fleet, work_id, question), yes=yes)
    _show(fleet, _of_item(fleet, work_id, lambda: fleet.api.ack(work_id)))
    note(f"Claim it now, or it stays in `starting`: fleet work heartbeat {work_id} --expected {NO_HEARTBEAT}")


def heartbeat(
    ctx: typer.Context,
    work_id: ItemId,
    expected: Annotated[str, typer.Option(help=f"The last value received, byte for byte, or {NO_HEARTBEAT} to claim.")],
    ttl: Annotated[int | None, typer.Option(min=1, help="Time to live to ask for, in seconds.")] = None,
    yes: Yes = False,
) -> None:
    """Claim or extend an item's lease; with the environment key. The lease's holder loses it to you."""
    fleet: Fleet = ctx.obj
    if not expected:
        raise Failure(f"--expected is empty: give the last value received, or {NO_HEARTBEAT}.", Code.USAGE)
    question = f"A beat changes the lease's value, so whoever serves {work_id} may take it for lost. Beat?"
    confirm(_warned(fleet, work_id, question), yes=yes)
    try:
        beat = _of_item(fleet, work_id, lambda: fleet.api.heartbeat(work_id, expected, desired_ttl_seconds=ttl))
    except LeaseLost as lost:
        if fleet.json:
            print_json(lost.current_state.model_dump(mode="json") if lost.current_state else None)
        elif lost.current_state:
            _show(fleet, lost.current_state)
        raise Failure(f"Not extended: {lost.message}", Code.NOT_DONE) from None
    _show(fleet, beat)


def stop(
    ctx: typer.Context,
    work_id: ItemId,
    force: Annotated[bool, typer.Option("--force", help="End it now rather than ask its holder to.")] = False,
    yes: Yes = False,
) -> None:
    """Post a stop; with the environment key. It names no lease: it ends whatever turn the item is in."""
    fleet: Fleet = ctx.obj
    how = "ends its turn at once, whoever serves it" if force else "asks whoever serves it to end its turn"
    confirm(_warned(fleet, work_id, f"A stop {how}. Stop {work_id}?"), yes=yes)
    item = _of_item(fleet, work_id, lambda: fleet.api.stop(work_id, force=force))
    if item is None:
        note("Taken; the reply carries no item.")
        if fleet.json:
            print_json(None)
        return
    _show(fleet, item)


def update(
    ctx: typer.Context,
    work_id: ItemId,
    to_set: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="May be repeated.")] = [],  # noqa: B006  typer copies it
    to_delete: Annotated[list[str], typer.Option("--delete", metavar="KEY", help="May be repeated.")] = [],  # noqa: B006
) -> None:
    """Change an item's metadata; with the organisation key in ANTHROPIC_API_KEY. Other keys stay."""
    fleet: Fleet = ctx.obj
    changes: dict[str, str | None] = dict.fromkeys(to_delete)
    for pair in to_set:
        name, given, value = pair.partition("=")
        if not given or not name:
            raise Failure(f"--set takes KEY=VALUE, not {pair!r}.", Code.USAGE)
        changes[name] = value
    if not changes:
        raise Failure("Nothing to change: give --set KEY=VALUE or --delete KEY.", Code.USAGE)
    api = _with_organisation_key(fleet, "update")
    _show(fleet, _of_item(fleet, work_id, lambda: api.update(work_id, changes)))


def as_json(reply: BaseModel) -> dict[str, Any]:
    """The fields that we know, as sent; of a secret only whether it came: one that we do not know may be another."""
    known = set(type(reply).model_fields)
    shown = reply.model_dump(mode="json", include=known - {"secret"})
    if isinstance(reply, Work):
        shown["data"] = reply.data.model_dump(mode="json", include={"type", "id"})
        shown["secret"] = "present, not shown" if reply.secret else None
    return shown


def _show(fleet: Fleet, reply: BaseModel) -> None:
    shown = as_json(reply)
    if fleet.json:
        print_json(shown)
        return
    width = max(map(len, shown)) + 2
    for name, value in shown.items():
        text = ", ".join(f"{key}={part}" for key, part in value.items()) if isinstance(value, dict) else value
        say(f"{name:{width}}{'-' if text in (None, '') else text}")


def _row(item: Work) -> tuple[str, ...]:
    times = (item.created_at, item.acknowledged_at, item.latest_heartbeat_at, item.stop_requested_at)
    return (item.id, item.state, item.data.type, *(time or "" for time in times))


def _with_organisation_key(fleet: Fleet, command: str) -> WorkApi:
    """Raises Failure where there is none: the environment key may not make this call (W§8)."""
    key = os.environ.get(ORGANISATION_KEY, "").strip()
    if not key:
        raise Failure(
            f"`fleet work {command}` needs an organisation key, which the stack does not have: set {ORGANISATION_KEY}.",
            Code.NOT_DONE,
        )
    return wiring.work_api(fleet.config, lambda: SecretStr(key))


def _warned(fleet: Fleet, work_id: str, question: str) -> str:
    """The question, with a better way if this stack serves the item."""
    record = fleet.store.get(work_id)
    if record is None or not record.is_live:
        return question
    better = f"This stack serves it ({record.phase}); `fleet stop` and `fleet show` know its lease, this does not."
    return f"{better} {question}"


def _of_item(fleet: Fleet, work_id: str, call: Callable[[], _Found]) -> _Found:
    """Makes the call. Raises Failure, with the nearest ids, for an item that the API does not know."""
    try:
        return call()
    except ValueError as wrong:
        raise Failure(f"{wrong}", Code.USAGE) from None
    except Gone:
        known: list[str] = []
        with contextlib.suppress(WorkApiError):
            known = [item.id for item in islice(fleet.api.list_all(), _NEAR_AMONG)]
        near = difflib.get_close_matches(work_id, known, n=3, cutoff=0.5)
        hint = f"Did you mean {', '.join(near)}?" if near else "`fleet work list` lists the items."
        raise Failure(f"The API knows no work item {work_id!r}. {hint}", Code.NOT_FOUND) from None
