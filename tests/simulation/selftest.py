"""The simulation tested: each rule is broken in turn, and some seed must notice. `python -m tests.simulation.selftest`.

A broken rule that no seed catches means that the simulation does not hold that rule.
"""

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from typing import Any
from unittest.mock import patch

import shared.launching
from shared import breaker, lifecycle, progress
from shared.claiming import Claimer
from shared.config import SHARD
from shared.lifecycle import BeatResult, Offer, StopWish, Verdict
from shared.loop import LeaseLoop
from shared.record import Lease, Outcome, Phase, Record
from shared.sandboxes import Sandboxes
from shared.stopping import Stopper
from shared.sweeping import Janitor, Marks
from shared.ticketing import Tickets
from shared.work_api import NotQueued, WorkApi
from tests.simulation.fleet import APPS
from tests.simulation.scenario import run

Break = Callable[[ExitStack], None]
MOST_SEEDS = 600


def _ack_before_the_record(stack: ExitStack) -> None:
    def take(self: Claimer, work: Any, owner: str, until: int) -> bool:
        record = self.store.get(work.id)
        if lifecycle.judge_offer(record, work, self.now()) is not Offer.CLAIM:
            return False
        try:
            acked_at = self.api.ack(work.id).acknowledged_at
        except NotQueued:
            return False
        fresh = lifecycle.open_turn(record, work, now=self.now(), owner=owner, until=until, shard=SHARD)
        saved = self.store.save(lifecycle.acked(fresh, acked_at, self.now()))
        self.loop.ensure(SHARD)
        return self.claim(saved, repair=False)

    stack.enter_context(patch.object(Claimer, "_take", take))


def _stop_after_a_lost_lease(stack: ExitStack) -> None:
    def lost(lease: Lease) -> BeatResult:
        return BeatResult(lease.model_copy(update={"over": "lost"}), StopWish("lost", Outcome.LOST, post=True))

    stack.enter_context(patch.object(lifecycle, "lease_lost", lost))
    _stop_without_an_echo(stack)


def _stop_without_an_echo(stack: ExitStack) -> None:
    def post(self: Stopper, record: Record) -> Record:
        self.api.stop(record.work_id, force=True)
        return record

    stack.enter_context(patch.object(Stopper, "_post", post))


def _operator_stops_what_is_being_claimed(stack: ExitStack) -> None:
    real = lifecycle.operator_stop

    def always(record: Record, now: int, *, force: bool) -> Record | None:
        if record.phase is Phase.RECEIVED:
            return lifecycle.want_stop(record, lifecycle.OPERATOR_STOP, now)
        return real(record, now, force=force)

    stack.enter_context(patch.object(lifecycle, "operator_stop", always))


def _no_client_token(stack: ExitStack) -> None:
    real = Sandboxes.run

    class Without:
        def __init__(self, client: Any) -> None:
            self._client = client

        def __getattr__(self, name: str) -> Any:
            return getattr(self._client, name)

        def run_task(self, *, clientToken: str, **request: Any) -> Any:
            return self._client.run_task(**request)

    def started(self: Sandboxes, record: Record, ticket: str) -> str:
        client = self._client
        self._client = Without(client)  # type: ignore[assignment]
        try:
            return real(self, record, ticket)
        finally:
            self._client = client

    stack.enter_context(patch.object(Sandboxes, "run", started))


def _launch_without_condition(stack: ExitStack) -> None:
    real = lifecycle.begin_launch

    def always(record: Record, turn: int, attempt: int, **rest: Any) -> Record | None:
        return real(record.model_copy(update={"phase": Phase.HELD, "task_arn": None}), turn, attempt, **rest)

    stack.enter_context(patch.object(lifecycle, "begin_launch", always))
    _no_client_token(stack)


def _drop_on_unknown_error(stack: ExitStack) -> None:
    real = APPS["launcher"].handler

    def forgetful(event: Any, context: Any) -> dict[str, list[str]]:
        real(event, context)
        return {"batchItemFailures": []}

    stack.enter_context(patch.object(APPS["launcher"], "handler", forgetful))
    stack.enter_context(patch("shared.claiming._RESEND_AFTER_MS", 10**12))


def _no_repair_of_received(stack: ExitStack) -> None:
    stack.enter_context(patch.object(Claimer, "repair", lambda *_: False))


def _dedupe_on_work_id_alone(stack: ExitStack) -> None:
    real = lifecycle.begin_launch

    def once(record: Record, turn: int, attempt: int, **rest: Any) -> Record | None:
        if record.history or attempt > 1:
            return None
        return real(record, turn, attempt, **rest)

    stack.enter_context(patch.object(lifecycle, "begin_launch", once))


def _beat_value_reformatted(stack: ExitStack) -> None:
    real = lifecycle.after_beat

    def reformatted(*arguments: Any) -> BeatResult:
        result = real(*arguments)
        value = datetime.fromisoformat(result.lease.value).isoformat()
        return BeatResult(result.lease.model_copy(update={"value": value}), result.wish, result.accepted)

    stack.enter_context(patch.object(lifecycle, "after_beat", reformatted))


def _every_412_is_ours(stack: ExitStack) -> None:
    def ours(_base: str, _window: int, state: Any, **_: Any) -> Verdict:
        return Verdict.OURS if state and state.last_heartbeat else Verdict.UNKNOWN

    stack.enter_context(patch.object(lifecycle, "_judge_refusal", ours))


def _every_412_is_a_loss(stack: ExitStack) -> None:
    stack.enter_context(patch.object(lifecycle, "_judge_refusal", lambda *_, **__: Verdict.LOST))


def _events_of_any_attempt(stack: ExitStack) -> None:
    stack.enter_context(
        patch.object(lifecycle, "is_current", lambda record, turn, _attempt: record.is_live and record.turn == turn)
    )


def _loop_never_restarted(stack: ExitStack) -> None:
    def start(self: LeaseLoop, shard: str) -> None:
        self._start(shard, 0)

    stack.enter_context(patch.object(LeaseLoop, "ensure", start))


def _unserved_untold(stack: ExitStack) -> None:
    real = Tickets.turn_ended
    stack.enter_context(
        patch.object(Tickets, "turn_ended", lambda self, word: real(self, word.model_copy(update={"unserved": False})))
    )
    after = lifecycle.after_container_stopped

    def as_if_finished(record: Record, diagnosis: Any, exit_code: int | None, *rest: Any, **more: Any) -> Any:
        told = lifecycle.FINISHED if exit_code == lifecycle.UNSERVED else exit_code
        return after(record, diagnosis, told, *rest, **more)

    stack.enter_context(patch.object(lifecycle, "after_container_stopped", as_if_finished))


def _secret_kept(stack: ExitStack) -> None:
    real = lifecycle.closed

    def kept(record: Record, *arguments: Any, **rest: Any) -> Record:
        return real(record, *arguments, **rest).model_copy(update={"secret": record.secret})

    stack.enter_context(patch.object(lifecycle, "closed", kept))


def _reaper_without_a_second_look(stack: ExitStack) -> None:
    """A task that is merely new, its arn not yet stored, would be taken for nobody's."""
    stack.enter_context(patch.object(Marks, "seen_before", lambda *_: True))
    stack.enter_context(
        patch.object(
            lifecycle, "is_orphan", lambda record, _turn, _attempt, arn: record is None or record.task_arn != arn
        )
    )


def _no_start_deadline(stack: ExitStack) -> None:
    stack.enter_context(patch.object(Stopper, "_stop_stalled_launch", lambda *_: None))


def _stop_task_taken_for_death(stack: ExitStack) -> None:
    real = Stopper._look_or_stop

    def hasty(self: Stopper, record: Record, arn: str, why: str, tasks: dict[str, Any]) -> Record | None:
        after = real(self, record, arn, why, tasks)
        if after is not None and after.stop_task_sent_at and not after.dead:
            return self.store.save(after.model_copy(update={"dead": True}))
        return after

    stack.enter_context(patch.object(Stopper, "_look_or_stop", hasty))


def _spot_for_ever(stack: ExitStack) -> None:
    stack.enter_context(patch.object(lifecycle, "MOST_INTERRUPTIONS", 99))


def _secret_in_the_log(stack: ExitStack) -> None:
    real = WorkApi.ack

    def telling(self: WorkApi, work_id: str) -> Any:
        APPS["poller"].log.info("acking", key=self._key().get_secret_value())
        return real(self, work_id)

    stack.enter_context(patch.object(WorkApi, "ack", telling))


def _hung_sandboxes_kept(stack: ExitStack) -> None:
    stack.enter_context(patch.object(Janitor, "_watch_progress", lambda *_: None))


def _a_person_s_wait_taken_for_a_stall(stack: ExitStack) -> None:
    stack.enter_context(patch.object(progress, "_wait_for_people", lambda *_: None))


def _every_requires_action_taken_for_a_person_s(stack: ExitStack) -> None:
    """But each tool call waits so for its sandbox (W§11.2)."""
    stack.enter_context(patch.object(progress, "_wait_for_people", lambda *_: progress.ACTION))


def _breaker_never_opens(stack: ExitStack) -> None:
    stack.enter_context(patch.object(breaker, "FAILURES_TO_OPEN", 10**9))


def _breaker_never_closes(stack: ExitStack) -> None:
    stack.enter_context(patch.object(breaker, "after_running", lambda _: None))


def _no_hold_without_an_image(stack: ExitStack) -> None:
    stack.enter_context(patch.object(breaker, "holds", lambda *_: False))


def _every_launch_is_a_probe(stack: ExitStack) -> None:
    stack.enter_context(patch.object(breaker, "admits", lambda *_: True))


def _a_class_s_image_counted_for_all(stack: ExitStack) -> None:
    stack.enter_context(patch.object(breaker, "has_own_image", lambda _: False))


def _the_first_class_for_everybody(stack: ExitStack) -> None:
    stack.enter_context(patch.object(lifecycle, "granted_size", lambda _, config: config.size_classes["small"]))


def _asks_on_for_what_was_refused(stack: ExitStack) -> None:
    stack.enter_context(patch.object(shared.launching, "FORBIDDEN", 0))


def _metadata_forgotten_by_the_next_attempt(stack: ExitStack) -> None:
    following = lifecycle._next_attempt

    def next_attempt(*args: Any, **named: Any) -> Record:
        return following(*args, **named).model_copy(update={"wishes": None})

    stack.enter_context(patch.object(lifecycle, "_next_attempt", next_attempt))


BROKEN: dict[str, Break] = {
    name.removeprefix("_").replace("_", " "): function
    for name, function in list(globals().items())
    if name.startswith("_") and getattr(function, "__annotations__", {}).get("stack") is ExitStack
}


def caught_by(name: str, most: int = MOST_SEEDS) -> tuple[str, int | None, str]:
    """The first seed that notices this broken rule, and what it says."""
    with ExitStack() as stack:
        BROKEN[name](stack)
        for seed in range(most):
            violations = run(seed).violations
            if violations:
                return name, seed, violations[0]
    return name, None, ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.selftest", description=__doc__)
    parser.add_argument("--rule", choices=sorted(BROKEN), help="break this one alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    names = [options.rule] if options.rule else list(BROKEN)
    caught = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        for name, seed, violation in pool.map(caught_by, names):
            caught += seed is not None
            print(f"{name}: {'NOT CAUGHT' if seed is None else f'seed {seed}: {violation}'}", flush=True)
    print(f"selftest: broken={len(names)} caught={caught}")
    return 0 if caught == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
