"""RunTask's client tokens live here: which request each stands for, and how long; the tasks do not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

TOKEN_LIFETIME = 24 * 3600.0  # seconds; "Ensuring idempotency", Amazon ECS API Reference


class TokenConflictError(Exception):
    """The token stands for another request, which made `task_arns`."""

    def __init__(self, task_arns: Sequence[str]) -> None:
        super().__init__("The clientToken is already in use with a different RunTask request.")
        self.task_arns = tuple(task_arns)


@dataclass(frozen=True)
class _Use:
    request: str
    task_arns: tuple[str, ...]
    expires: float


class ClientTokens:
    """The tokens in use, each scoped to its cluster. `clock` gives seconds. Not thread-safe by itself."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._uses: dict[tuple[str, str], _Use] = {}

    def find(self, cluster_arn: str, token: str, request: str) -> tuple[str, ...] | None:
        """The tasks that this request made before, or None. Raises TokenConflictError."""
        use = self._uses.get((cluster_arn, token))
        if use is None or use.expires <= self._clock():
            return None
        if use.request != request:
            raise TokenConflictError(use.task_arns)
        return use.task_arns

    def remember(self, cluster_arn: str, token: str, request: str, task_arns: Sequence[str]) -> None:
        """Keep what a request with this token made."""
        self._uses[cluster_arn, token] = _Use(request, tuple(task_arns), self._clock() + TOKEN_LIFETIME)
