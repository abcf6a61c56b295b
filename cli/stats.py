"""`fleet stats`: the API's counters and ours side by side, and why they may differ."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import typer

from cli.stack import Fleet
from cli.terminal import print_json, print_table, say, span
from shared import lifecycle, wiring
from shared.record import LiveEntry, Phase
from shared.work_api import NotAllowed, Work

MOST_PAGES = 50  # of the API's list, a hundred items each
_UNFINISHED = ("starting", "active", "stopping")


@dataclass
class Seen:
    """Both sides at one time. `items` are the API's unfinished ones by id, None where the key may not list."""

    now: int
    depth: int
    pending: int
    oldest_queued_at: str | None
    workers_polling: int | None
    items: dict[str, str] | None
    items_cut: bool
    live: dict[str, Phase]
    max_sessions: int
    tasks: int
    launches_waiting: int
    dead_letters: int
    paused: bool
    breaker: str | None
    remarks: list[str] = field(default_factory=list)


def stats(ctx: typer.Context) -> None:
    """Compare the API's queue with our sessions.

    What differs is explained: which side knows what the other does not, and what that means.
    """
    fleet: Fleet = ctx.obj
    seen = look(fleet)
    seen.remarks = remarks(seen)
    if fleet.json:
        print_json(asdict(seen))
        return
    phases, states = Counter(seen.live.values()), Counter((seen.items or {}).values())
    queued = lifecycle.server_time(seen.oldest_queued_at)
    rows = [
        ("waits in the queue", str(seen.depth + seen.pending), ""),
        ("oldest waits for", span(seen.now - queued * 1000) if queued else "", ""),
        ("workers that polled in 30 s", _number(seen.workers_polling), ""),
        (
            "unfinished items, live sessions",
            _number(None if seen.items is None else len(seen.items)),
            f"{len(seen.live)}",
        ),
        ("most sessions at once", "", str(seen.max_sessions)),
        ("claimed, not yet run", str(states["starting"]), str(sum(phases[p] for p in list(Phase)[:3]))),
        ("running", str(states["active"]), str(phases[Phase.RUNNING])),
        ("being stopped", str(states["stopping"]), str(phases[Phase.STOPPING])),
        ("sandboxes at ECS", "", str(seen.tasks)),
        ("launches that wait", "", str(seen.launches_waiting)),
        ("dead letters", "", str(seen.dead_letters)),
    ]
    print_table(("", "API", "OURS"), rows)
    for remark in seen.remarks:
        say(f"- {remark}")


def _number(value: int | None) -> str:
    return "not told" if value is None else str(value)


def look(fleet: Fleet) -> Seen:
    """The API first: what is claimed meanwhile then shows as ours, not as nobody's."""
    told = fleet.api.stats()
    items, cut = _unfinished(fleet)
    live: list[LiveEntry] = fleet.live()
    breaker = fleet.store.breaker()
    return Seen(
        now=wiring.now(),
        depth=told.depth,
        pending=told.pending,
        oldest_queued_at=told.oldest_queued_at,
        workers_polling=told.workers_polling,
        items=items,
        items_cut=cut,
        live={entry.work_id: entry.phase for entry in live},
        max_sessions=fleet.config.max_sessions,
        tasks=len(wiring.sandboxes(fleet.config).meant_to_run()),
        launches_waiting=messages(fleet, fleet.output("QueueUrl")),
        dead_letters=messages(fleet, fleet.output("DlqUrl")),
        paused=breaker.paused,
        breaker=breaker.reason if breaker.opened_at is not None else None,
    )


def _unfinished(fleet: Fleet) -> tuple[dict[str, str] | None, bool]:
    found: list[Work] = []
    try:
        for number, page in enumerate(fleet.api.list_pages(), 1):
            found += [work for work in page.data if work.state in _UNFINISHED]
            if number == MOST_PAGES and page.next_page:
                return {work.id: work.state for work in found}, True
    except NotAllowed:
        return None, False
    return {work.id: work.state for work in found}, False


def messages(fleet: Fleet, url: str) -> int:
    """Of a queue, those being worked on included."""
    names = [
        "ApproximateNumberOfMessages",
        "ApproximateNumberOfMessagesNotVisible",
        "ApproximateNumberOfMessagesDelayed",
    ]
    told: dict[str, Any] = fleet.client("sqs").get_queue_attributes(QueueUrl=url, AttributeNames=names)
    return sum(int(told.get("Attributes", {}).get(name, 0)) for name in names)


def remarks(seen: Seen) -> list[str]:
    """What the two sides tell together, the disagreements first."""
    found = []
    waiting, free = seen.depth + seen.pending, seen.max_sessions - len(seen.live)
    if seen.items is None:
        found.append("The key may not list items, so only counts can be compared.")
    else:
        foreign = sorted(seen.items.keys() - seen.live.keys())
        if foreign:
            found.append(
                f"The API has {_some(foreign)} unfinished, but no live record is ours: another worker serves "
                "them, they were claimed just now, or they are stranded; then the janitor tells after 15 minutes."
            )
        ended = sorted(work_id for work_id in seen.live if work_id not in seen.items)
        if ended and not seen.items_cut:
            found.append(
                f"We hold {_some(ended)}, which the API has queued, stopped or not at all: the lease was lost or a "
                "stop is on its way; the next beat ends such a turn."
            )
    if seen.items_cut:
        found.append(f"The list was cut after {MOST_PAGES * 100} items.")
    running = sum(phase is Phase.RUNNING for phase in seen.live.values())
    if seen.tasks < running:
        found.append(
            f"{running} sessions run by our records and {seen.tasks} sandboxes at ECS: `fleet repair` looks why."
        )
    if seen.tasks > len(seen.live):
        found.append(
            f"{seen.tasks} sandboxes for {len(seen.live)} live sessions: the janitor stops what no record names."
        )
    if seen.paused:
        found.append("Paused by hand: nothing new is claimed until `fleet resume`.")
    if seen.breaker is not None:
        found.append(f"The circuit breaker is open, one launch a minute is tried: {seen.breaker}")
    if waiting and not seen.paused and seen.breaker is None:
        why = "every slot is taken: raise MaxSessions" if free <= 0 else "the next poll, within a minute, takes it"
        found.append(f"{waiting} wait in the queue; {why}.")
    if seen.dead_letters:
        found.append(f"{seen.dead_letters} dead letters: look at them with `fleet redrive`.")
    if seen.workers_polling == 0:
        found.append("Nobody polled within 30 s; our schedule polls once a minute, so that alone is no fault.")
    return found or ["Both sides agree."]


def _some(ids: list[str]) -> str:
    shown = ", ".join(ids[:5])
    return f"{len(ids)} ({shown}{', ...' if len(ids) > 5 else ''})"
