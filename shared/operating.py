"""What an operator's command does to sessions: a wish put into the record by the rules, its executor woken.

Nothing is stopped or posted here: a wish whose author dies right after is obeyed all the same (DESIGN §3).
"""

from collections.abc import Callable
from dataclasses import dataclass

from shared import breaker, lifecycle
from shared.launch_queue import LaunchQueue
from shared.record import Record
from shared.store import Store, change, change_breaker


@dataclass
class Operator:
    store: Store
    queue: LaunchQueue
    wake_stopper: Callable[[str], None]  # by work id; the loop's next round does it anyway
    now: Callable[[], int]  # epoch milliseconds

    def stop(self, work_id: str, *, force: bool = False) -> Record | None:
        """The changed record, or None where there was nothing to change. Raises Conflict."""
        changed = change(self.store, work_id, lambda r: lifecycle.operator_stop(r, self.now(), force=force))
        if changed is not None:
            self.wake_stopper(work_id)
        return changed

    def retry(self, work_id: str) -> Record | None:
        """As `stop`: another sandbox for a turn that runs, or another launch for one that waits."""
        changed = change(self.store, work_id, lambda r: lifecycle.operator_retry(r, self.now()))
        if changed is None:
            return None
        if lifecycle.waits_for_launch(changed):
            self.queue.send(changed, at_once=True)
        else:
            self.wake_stopper(work_id)
        return changed

    def pause(self, *, paused: bool) -> bool:
        """Claim nothing new, or claim again; whether that changed anything. Raises Conflict."""
        return change_breaker(self.store, lambda b: breaker.switched(b, paused=paused)) is not None
