"""One round of the lease loop: beats all that is due, and says what the loop does next (DESIGN §7)."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from shared import lifecycle
from shared.config import Config
from shared.lifecycle import BeatResult
from shared.log import log, log_fields
from shared.metrics import Metric, emit
from shared.record import Lease, LiveEntry, Phase, Record
from shared.store import Conflict, Store, change
from shared.stored_key import StoredKey
from shared.work_api import Gone, LeaseLost, NotAllowed, TryAgain, WorkApi, WorkApiError

BEATS_AT_ONCE = 96
_IDLE_WAIT_MS = 10_000
_STOP_WAIT_MS = 3_000
_CLAIMED = (Phase.HELD, Phase.LAUNCHING, Phase.RUNNING, Phase.STOPPING)
_WISH_OF_OVER = {
    "stopped": lifecycle.ALREADY_STOPPED,
    "lost": lifecycle.LEASE_LOST,
    "gone": lifecycle.ITEM_GONE,
}


class RoundState(BaseModel):
    """What the loop carries from round to round (lease_loop.asl.yaml)."""

    model_config = ConfigDict(frozen=True)
    shard: str
    generation: int
    round: int
    empty_rounds: int


class RoundReply(RoundState):
    """`wait_until` is RFC 3339: the earliest beat due, so that a long round does not stretch the period."""

    live: int
    to_stop: int
    wait_until: str


@dataclass
class Keeper:
    config: Config
    api: WorkApi
    key: StoredKey
    store: Store
    now: Callable[[], int]

    def round(self, state: RoundState) -> RoundReply:
        """Beat what is due; one slow or failing item holds up no other."""
        entries = self.store.live(state.shard)
        claimed = [entry for entry in entries if entry.phase in _CLAIMED]
        leases = self.store.get_leases(entry.work_id for entry in claimed)
        kept = self._beat_due(claimed, leases)
        now = self.now()
        to_stop = sum(lifecycle.needs_stopper(entry, self.config, now) for entry in entries) + kept.wishes
        # A turn without a lease may get one of a shorter time to live than ours had
        idle_ms = self.config.beat_interval_seconds * 1000 if entries and len(leases) == len(entries) else _IDLE_WAIT_MS
        wait_until = min([now + (_STOP_WAIT_MS if to_stop else idle_ms), *kept.due])
        return RoundReply(
            shard=state.shard,
            generation=state.generation,
            round=state.round + 1,
            empty_rounds=0 if entries else state.empty_rounds + 1,
            live=len(entries),
            to_stop=to_stop,
            wait_until=_rfc3339(max(wait_until, now + 1_000)),
        )

    def _beat_due(self, entries: list[LiveEntry], leases: dict[str, Lease]) -> "_Kept":
        now = self.now()
        mine = [
            (entry, lease) for entry in entries if (lease := leases.get(entry.work_id)) and lease.turn == entry.turn
        ]
        kept = [pair for pair in mine if not pair[1].over]
        named = lifecycle.due_now(
            [lease for _, lease in kept], now, longest_ms=self.config.beat_interval_seconds * 1000
        )
        due = [pair for pair in kept if pair[1].work_id in named]
        answers, wishes = self._beat_all(due)
        if None in answers:  # a round of few would tell too little: those that are due later are asked as well
            others = [pair for pair in kept if pair[1].work_id not in named]
            more, more_wishes = self._beat_all(others)
            due, answers, wishes = due + others, answers + more, wishes + more_wishes
        _count(due, answers)
        beaten = {entry.work_id for entry, _ in due}
        gone = sum(answer is None for answer in answers)
        doubted = gone > 3 and gone * 2 > len(due)
        if doubted:
            emit(Metric.MOST_ITEMS_GONE)
            log.error("most work items answer 404: check base URL and environment id", count=gone, live=len(entries))
        result = _Kept([lease.due_at for entry, lease in kept if entry.work_id not in beaten], wishes)
        for (_, lease), answered in zip(due, answers, strict=True):
            after_404 = lifecycle.after_no_answer(lease, now, None) if doubted else lifecycle.item_gone(lease)
            answer = answered or after_404
            if answered is None:
                result.wishes += self._apply(lease, answer)
            if not answer.lease.over:
                result.due.append(answer.lease.due_at)
        for entry, lease in mine:
            if lease.over and entry.phase is not Phase.STOPPING:  # a crash came between lease and record
                result.wishes += self._wish(lease, BeatResult(lease, _WISH_OF_OVER[lease.over]))
        return result

    def _beat_all(self, pairs: list[tuple[LiveEntry, Lease]]) -> tuple[list[BeatResult | None], int]:
        """The answers, each stored at once by the thread that got it, and how many stops they made wanted."""

        def keep(pair: tuple[LiveEntry, Lease]) -> tuple[BeatResult | None, int]:
            answer = self.beat(pair[1])
            return answer, self._apply(pair[1], answer) if answer else 0

        with ThreadPoolExecutor(BEATS_AT_ONCE) as pool:
            kept = list(pool.map(keep, pairs))
        return [answer for answer, _ in kept], sum(wishes for _, wishes in kept)

    def beat(self, lease: Lease) -> BeatResult | None:
        """One echo; None for a 404, which is judged over the whole round."""
        sent_at = self.now()
        if sent_at >= lease.deadline(lifecycle.LEASE_MARGIN_MS):
            return lifecycle.lease_lost(lease)
        try:
            beat = self.api.heartbeat(lease.work_id, lease.value, desired_ttl_seconds=self.config.lease_ttl_seconds)
        except LeaseLost as lost:
            state = lost.current_state
            log.info("echo refused", **log_fields(lease), state=state and state.state)
            return lifecycle.after_refused_echo(lease, state, sent_at)
        except Gone:
            return None
        except NotAllowed as error:
            self.key.forget()
            emit(Metric.KEY_REFUSED)
            log.error("beat not allowed", **log_fields(lease), error=error.message)
            return lifecycle.after_no_answer(lease, self.now(), None)
        except TryAgain as error:
            log.warning("beat not answered", **log_fields(lease), error=error.message)
            return lifecycle.after_no_answer(lease, self.now(), error.wait_seconds)
        except WorkApiError as error:
            log.error("beat refused; kept until the lease deadline", **log_fields(lease), error=error.message)
            return lifecycle.after_no_answer(lease, self.now(), None)
        return lifecycle.after_beat(lease, beat, sent_at, longest_ms=self.config.beat_interval_seconds * 1000)

    def _apply(self, lease: Lease, result: BeatResult) -> int:
        """The lease first, on its own condition; whoever changed it meanwhile knows more than this reply."""
        try:
            self.store.save_lease(result.lease, lease)
        except Conflict:
            log.info("a beat's reply dropped: the lease has changed", **log_fields(lease))
            return 0
        return self._wish(lease, result)

    def _wish(self, lease: Lease, result: BeatResult) -> int:
        wish, now = result.wish, self.now()
        if wish is None:
            return 0
        changed = change(
            self.store,
            lease.work_id,
            lambda r: _changed(r, lifecycle.want_stop(r, wish, now)) if r.is_live and r.turn == lease.turn else None,
        )
        if changed is None:
            return 0
        log.info("stop wanted", **log_fields(changed), reason=wish.reason)
        return 1


@dataclass
class _Kept:
    due: list[int]
    wishes: int


def _count(due: list[tuple[LiveEntry, Lease]], answers: list[BeatResult | None]) -> None:
    """Once a round, whatever it holds: beats, and the least of their margins."""
    accepted = [(lease, a.lease) for (_, lease), a in zip(due, answers, strict=True) if a and a.accepted]
    over = sum(1 for answer in answers if answer and answer.lease.over == "stopped")
    emit(Metric.BEATS, len(accepted))
    emit(Metric.BEATS_FAILED, len(answers) - len(accepted) - over)
    if accepted:
        emit(Metric.LEASE_MARGIN, min(lifecycle.margin_percent(before, after) for before, after in accepted))


def _changed(before: Record, after: Record) -> Record | None:
    return None if after is before else after


def _rfc3339(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
