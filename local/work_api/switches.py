"""The switches: one for each point that no source settles (W§15, W§16); the first value of each is the default."""

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Switches(BaseModel):
    """How the emulator answers where WORK_API.md has no answer. Every value is a word, so that a shell can name it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # The queue's rules (state.py)
    work_id: Literal["session", "own"] = Field("session", description="an item's id: its session's, or work_...")
    healthcheck_data: Literal["id", "no_id"] = Field("id", description="whether a healthcheck's data has an id")
    unpolled: Literal["accepted", "refused"] = Field(
        "accepted", description="ack or heartbeat of a queued item that no poll has handed out; refused: 409 or 412"
    )
    ack_repeat: Literal["409", "200"] = Field("409", description="an ack of an item that is starting or active")
    startup_lease: Literal["off", "on"] = Field(
        "off", description="on: an item acked but not beaten for 30 s is queued again"
    )
    expiry: Literal["read", "poll"] = Field(
        "read", description="what settles a lapsed lease: any call, or the next poll"
    )
    late_echo: Literal["refused", "revives"] = Field(
        "refused", description="the holder's echo after its lease lapsed and before the item is polled again"
    )
    ttl_bounds: Literal["10-600", "1-300"] = Field("10-600", description="seconds that a desired ttl is clamped to")
    claim_queued: Literal["412", "409", "claim"] = Field("412", description="NO_HEARTBEAT on a queued item")
    claim_stopped: Literal["200", "412"] = Field("200", description="NO_HEARTBEAT on a stopped item")
    graceful_queued: Literal["stopped", "stopping"] = Field(
        "stopped", description="what a graceful stop makes of a queued item"
    )
    graceful_again: Literal["unchanged", "stopped"] = Field(
        "unchanged", description="what a second graceful stop makes of a stopping item"
    )
    abandoned_stopping: Literal["stays", "stopped"] = Field(
        "stays", description="stopped: a stopping item ends 60 s after its lease lapsed"
    )
    message_stopping: Literal["ignored", "queues", "queues_after"] = Field(
        "ignored", description="a message to a stopping item; queues_after: queued again once it is stopped"
    )
    requeue_created_at: Literal["kept", "new"] = Field("kept", description="created_at of an item queued again")
    requeue_metadata: Literal["kept", "cleared"] = Field("kept", description="metadata of an item queued again")
    empty_patch: Literal["unchanged", "400"] = Field("unchanged", description="an update without metadata, or null")
    list_order: Literal["newest", "oldest"] = Field("newest", description="which items the list shows first")
    list_limit: Literal["400", "cap"] = Field("400", description="a list limit out of 1..100")
    list_cursor: Literal["400", "ignored"] = Field("400", description="a page that is no cursor of the list")
    list_stopped: Literal["shown", "hidden"] = Field("shown", description="stopped items in the list")

    # Who may do what (access.py)
    list_org_key: Literal["403", "200"] = Field("403", description="the list under the organisation key")
    org_key: Literal["403", "401"] = Field("403", description="poll, ack and heartbeat under the organisation key")
    secret: Literal["given", "null"] = Field("given", description="the secret of a polled item")
    update: Literal["org_key", "anybody"] = Field(
        "org_key", description="who may update an item; anybody: the environment key and its sessions token as well"
    )
    credential_events: Literal["accepted", "refused"] = Field(
        "accepted", description="a tool result posted under a sessions token; refused: 403"
    )
    credential_lifetime: Literal["unlimited", "hour"] = Field(
        "unlimited", description="how long a sessions token is good"
    )

    # The shape of replies and requests (server.py)
    stop_reply: Literal["item", "204", "409"] = Field(
        "item", description="a stop's reply; 409: to an item that is stopped already"
    )
    long_block: Literal["400", "clamp"] = Field("400", description="block_ms over 999")
    reclaim_range: Literal["400", "default"] = Field("400", description="reclaim_older_than_ms that is no number >= 0")
    unknown_fields: Literal["ignored", "400"] = Field("ignored", description="query and body fields nobody knows")
    unknown_work: Literal["envelope", "bare"] = Field("envelope", description="the body of a 404")
    rate_limit: Literal["none", "60"] = Field("none", description="work calls a minute; more are answered 429")

    def changed(self, changes: Any) -> "Switches":
        """These with `changes` (name to value) made; raises ValueError that says what is wrong."""
        if not isinstance(changes, dict):
            raise ValueError("switches are an object of names and values")  # noqa: TRY004 - one error for callers
        try:
            return Switches.model_validate(self.model_dump() | changes)
        except ValidationError as error:
            raise ValueError(f"bad switch: {wrong_in(error)}") from None


def wrong_in(error: ValidationError) -> str:
    """What is wrong with a setting, in one line."""
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())


def values_of(name: str) -> tuple[str, ...]:
    """The values of a switch, its default first."""
    return get_args(Switches.model_fields[name].annotation)


def described() -> str:
    """One line a switch, for people."""
    fields = Switches.model_fields.items()
    return "\n".join(f"  {name}={'|'.join(values_of(name))}: {field.description}" for name, field in fields)
