"""Group commit: what many threads ask for while requests are under way goes out together in the next one."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Generic, TypeVar

_LANES = 2  # requests at a time: one that hangs does not hold up what comes after it

_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")


@dataclass(eq=False)
class _Entry(Generic[_Asked, _Answer]):
    asked: _Asked
    turn: Lock = field(default_factory=Lock)  # released when there is an answer, or a batch to send
    batch: "list[_Entry[_Asked, _Answer]] | None" = None  # set for whoever is to send it
    answer: "_Answer | BaseException" = field(default_factory=lambda: InterruptedError("its sender was interrupted"))


class Together(Generic[_Asked, _Answer]):
    """Calls `send` with what was asked for: one thing if nobody else waits, at most `most`.

    `send` answers in order, an exception where one failed; what it raises itself is raised for each.
    """

    def __init__(self, send: "Callable[[Sequence[_Asked]], Sequence[_Answer | Exception]]", most: int) -> None:
        self._send, self._most = send, most
        self._waiting, self._free, self._lock = deque[_Entry[_Asked, _Answer]](), _LANES, Lock()

    def ask(self, asked: _Asked) -> _Answer:
        """The answer, once its request is through. Raises the failure of its own part, or of the whole request."""
        mine = _Entry[_Asked, _Answer](asked)
        mine.turn.acquire()
        with self._lock:
            if self._free:
                self._free -= 1
                mine.batch = [mine]
            else:
                self._waiting.append(mine)
        if mine.batch is None:
            mine.turn.acquire()
        if mine.batch is not None:
            self._lead(mine.batch)
        if isinstance(mine.answer, BaseException):
            raise mine.answer
        return mine.answer

    def _lead(self, batch: list[_Entry[_Asked, _Answer]]) -> None:
        try:
            answers = self._send([entry.asked for entry in batch])
            for entry, answer in zip(batch, answers, strict=True):
                entry.answer = answer
        except Exception as error:  # noqa: BLE001  raised by each that asked
            for entry in batch:
                entry.answer = error
        finally:
            self._hand_on()
            for entry in batch[1:]:
                entry.turn.release()

    def _hand_on(self) -> None:
        """The first that waits sends the next request; nobody sends for others more than once."""
        with self._lock:
            if not self._waiting:
                self._free += 1
                return
            size = min(self._most, len(self._waiting))
            batch = [self._waiting.popleft() for _ in range(size)]
            batch[0].batch = batch
            batch[0].turn.release()
