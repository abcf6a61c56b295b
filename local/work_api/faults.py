"""Injected faults: which call fails next and how; pure. Carrying one out is the server's."""

from random import Random
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Call = Literal["poll", "ack", "heartbeat", "stop", "retrieve", "list", "update", "stats", "session"]


class Fault(BaseModel):
    """One kind of failure at the calls it names.

    `status`, `malformed` and `content_type` answer without doing the action; `lost` does it and closes the connection
    unanswered; `delay` does it `seconds` later; `away` closes the connection and does nothing.
    `any` is every call under /v1, `session` every session's; `work_id` narrows it to one item (a poll names none).
    `times` is how many calls it hits (null: until the faults are deleted), each matching call with `probability`,
    drawn from `seed`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["status", "malformed", "content_type", "lost", "delay", "away"]
    call: Call | Literal["any"] = "any"
    work_id: str | None = None
    times: int | None = Field(default=1, ge=1)
    probability: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0
    status: int = Field(default=500, ge=400, le=599)
    retry_after: int | None = Field(default=None, ge=0)
    seconds: float = Field(default=0.0, ge=0, le=600)


class Faults:
    """The faults in force, in the order they were set."""

    def __init__(self) -> None:
        self._armed: list[_Armed] = []

    def add(self, fault: Fault) -> None:
        self._armed.append(_Armed(fault))

    def clear(self) -> None:
        self._armed.clear()

    def left(self) -> list[Fault]:
        """What still can hit; `times` is what remains."""
        return [armed.fault.model_copy(update={"times": armed.left}) for armed in self._armed]

    def due(self, call: Call, work_id: str | None) -> Fault | None:
        """The fault that hits this call, counted as used."""
        for armed in self._armed:
            if armed.hits(call, work_id):
                if armed.left == 0:
                    self._armed.remove(armed)
                return armed.fault
        return None


class _Armed:
    def __init__(self, fault: Fault) -> None:
        self.fault, self.left, self._random = fault, fault.times, Random(fault.seed)

    def hits(self, call: Call, work_id: str | None) -> bool:
        fault = self.fault
        if fault.call not in ("any", call) or fault.work_id not in (None, work_id):
            return False
        if self._random.random() >= fault.probability:
            return False
        if self.left is not None:
            self.left -= 1
        return True
