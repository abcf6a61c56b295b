"""Gives a starting sandbox its own session's credential for its ticket, signed uploads for its callback secret; takes
its words on the end of a turn and on what it put (DESIGN §6, §7)."""

import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, SecretStr

from shared import lifecycle, outputs, staging
from shared.lifecycle import StopWish, WorkId
from shared.log import log, log_fields
from shared.outputs import OutputsGrant, OutputsPlace, OutputsPut, OutputsRequest
from shared.record import Outcome, Phase, Record
from shared.staging import StagingGrant, StagingPlaces, StagingRequest
from shared.store import Store, change

REPLAY_MS = 60_000
_MOST_REPLIES = 10
_OWN_EXIT_GRACE_MS = 45_000  # the sandbox waits for its item's stop, then reads the history once more
_UPLOAD_GRACE_MS = 140_000  # what the sandbox takes at most to put its outputs (sandbox/outputs.py), and to end


class TicketRefused(Exception):
    """The ticket or callback secret is not good, or not any more. The reply tells no detail."""


class TicketRequest(BaseModel):
    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)
    work_id: WorkId
    turn: int
    attempt: int
    ticket: SecretStr
    nonce: SecretStr


class Credential(BaseModel):
    """What the sandbox gets: nothing that reaches another session.

    The exception is the environment key, for an item without a secret, if the stack's owner allows it (DESIGN §6).
    """

    model_config = ConfigDict(frozen=True)
    work_id: str
    environment_id: str
    session_id: str
    work_secret: SecretStr | None
    environment_key: SecretStr | None
    callback_secret: SecretStr
    staging: bool  # whether it is to ask what to put into the workspace first
    outputs: bool  # whether it may ask where to put what its agent leaves


class TurnEnded(BaseModel):
    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)
    work_id: WorkId
    turn: int
    attempt: int
    callback_secret: SecretStr
    unserved: bool = False


@dataclass
class Tickets:
    store: Store
    wake_stopper: Callable[[str], None]
    now: Callable[[], int]
    environment_key: Callable[[], SecretStr] | None = None  # given only if it may be handed over
    new_secret: Callable[[], str] = lambda: secrets.token_urlsafe(32)
    outputs: OutputsPlace | None = None  # given only if they are kept
    staging: StagingPlaces | None = None

    def redeem(self, request: TicketRequest) -> Credential:
        """First use binds the attempt to the nonce, which may repeat it for 60 s. Raises TicketRefused."""
        ticket, nonce = (lifecycle.hash_secret(s.get_secret_value()) for s in (request.ticket, request.nonce))
        callback = self.new_secret()
        now = self.now()

        def bind(record: Record) -> Record | None:
            if not _may_start(record, request.turn, request.attempt) or not _among(ticket, record.ticket_hashes):
                return None
            if record.ticket_nonce_hash is None:
                return record.noted(
                    now,
                    "ticket used",
                    ticket_nonce_hash=nonce,
                    ticket_used_at=now,
                    callback_hash=lifecycle.hash_secret(callback),
                )
            same = hmac.compare_digest(nonce, record.ticket_nonce_hash)
            if not same or now > (record.ticket_used_at or 0) + REPLAY_MS:
                return None
            again = (*record.callback_hashes_again, lifecycle.hash_secret(callback))[-_MOST_REPLIES:]
            return record.model_copy(update={"callback_hashes_again": again})

        record = change(self.store, request.work_id, bind)
        servable = record and record.session_id and (record.secret or self.environment_key)
        if record is None or record.session_id is None or not servable:
            log.warning("ticket refused", **log_fields(request))
            raise TicketRefused
        log.info("ticket used", **log_fields(record))
        return Credential(
            work_id=record.work_id,
            environment_id=record.environment_id,
            session_id=record.session_id,
            work_secret=record.secret,
            environment_key=self.environment_key() if record.secret is None and self.environment_key else None,
            callback_secret=SecretStr(callback),
            staging=bool(record.wishes and (record.wishes.archive or record.wishes.git)),
            outputs=self.outputs is not None,
        )

    def turn_ended(self, word: TurnEnded) -> bool:
        """The sandbox could not stop its item, so we do; returns whether that is done. Repeated until it is.

        Raises TicketRefused.
        """
        outcome = Outcome.UNSERVED if word.unserved else Outcome.COMPLETED
        wish = StopWish("the turn ended", outcome, post=True, grace_ms=_OWN_EXIT_GRACE_MS)
        now = self.now()
        known = stopped = False

        def end(record: Record) -> Record | None:
            nonlocal known, stopped
            stopped = record.phase is Phase.STOPPING and not record.post_stop
            known = _calls_back(record, word)
            if not known:
                return None
            if record.phase is Phase.STOPPING:
                worse = word.unserved and record.stop_outcome is Outcome.COMPLETED
                return record.noted(now, "a message was left unserved", stop_outcome=outcome) if worse else None
            return lifecycle.want_stop(record, wish, now)

        changed = change(self.store, word.work_id, end)
        if not known:
            log.warning("last word refused", **log_fields(word))
            raise TicketRefused
        if changed is not None:
            log.info("stop wanted", **log_fields(changed), reason=wish.reason)
            self.wake_stopper(word.work_id)
        return stopped

    def grant_staging(self, request: StagingRequest) -> StagingGrant:
        """Where the sandbox reads what its session's metadata asks for, or why not. Raises TicketRefused."""
        places, now = self.staging, self.now()
        if places is None:
            raise TicketRefused
        granted: StagingGrant | None = None

        def grant(record: Record) -> Record | None:
            nonlocal granted
            granted = None
            often = record.staging_requests >= staging.MOST_REQUESTS
            if often or record.wishes is None or not _calls_back(record, request):
                return None
            granted = places.judge(record.wishes)
            asked = {"staging_requests": record.staging_requests + 1}
            if granted.refused is None:
                return record.model_copy(update=asked)
            return record.noted(now, f"not staged: {granted.refused}", **asked)

        changed = change(self.store, request.work_id, grant)
        if changed is None or granted is None:
            log.warning("staging refused", **log_fields(request))
            raise TicketRefused
        log.info("staging granted", **log_fields(changed), reason=granted.refused)
        return granted

    def grant_outputs(self, request: OutputsRequest) -> OutputsGrant:
        """Signed uploads for what the sandbox lists, within the limits, under the attempt's own prefix.

        Its first list is the attempt's only one; it may be sent again a few times. Raises TicketRefused.
        """
        place, now = self.outputs, self.now()
        if place is None:
            raise TicketRefused
        admitted, left_out = place.admit(request.files)
        prefix = None

        def grant(record: Record) -> Record | None:
            nonlocal prefix
            prefix = place.key_prefix(record) if _calls_back(record, request) else None
            if prefix is None:
                return None
            granted = outputs.granted(record, request, place.bucket, prefix, admitted)
            if granted is None or not request.ended or record.phase is Phase.STOPPING:
                return granted
            # Whatever becomes of the sandbox now, its turn is over: no other attempt, and time enough for the upload
            done = StopWish("the turn ended", Outcome.COMPLETED, post=False, grace_ms=_UPLOAD_GRACE_MS)
            return lifecycle.want_stop(granted, done, now)

        changed = change(self.store, request.work_id, grant)
        if changed is None or prefix is None:
            log.warning("outputs refused", **log_fields(request))
            raise TicketRefused
        log.info("outputs granted", **log_fields(changed), count=len(admitted), left_out=len(left_out))
        return place.grant(admitted, left_out, prefix)

    def note_outputs(self, word: OutputsPut) -> None:
        """Lists on the record what the sandbox says that it put. Raises TicketRefused."""
        now = self.now()
        known = False

        def note(record: Record) -> Record | None:
            nonlocal known
            known = _calls_back(record, word)
            return outputs.reported(record, word, now) if known else None

        changed = change(self.store, word.work_id, note)
        if not known:
            log.warning("word on outputs refused", **log_fields(word))
            raise TicketRefused
        if changed is not None and (put := changed.outputs) is not None:
            log.info(
                "outputs put",
                **log_fields(changed),
                count=put.files,
                bytes=put.bytes,
                prefix=put.prefix,
                reason=put.problem,
            )


def _may_start(record: Record, turn: int, attempt: int) -> bool:
    return lifecycle.is_current(record, turn, attempt) and record.phase in (Phase.LAUNCHING, Phase.RUNNING)


def _calls_back(record: Record, word: TurnEnded | StagingRequest | OutputsRequest | OutputsPut) -> bool:
    """Whether the word is of the record's current attempt: its callback secret says so."""
    given = lifecycle.hash_secret(word.callback_secret.get_secret_value())
    return lifecycle.is_current(record, word.turn, word.attempt) and _among(
        given, (record.callback_hash or "", *record.callback_hashes_again)
    )


def _among(given: str, stored: tuple[str, ...]) -> bool:
    matches = [hmac.compare_digest(given, one) for one in stored]  # all of them: constant time
    return any(matches)
