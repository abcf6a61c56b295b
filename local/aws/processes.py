"""How child processes are marked, found and killed lives here; nothing that knows AWS does.

A mark is a variable in a process's initial environment: unlike a process group or a session, it is inherited
by whatever the process starts, setsid or not. What escapes is a process that clears its environment and
outlives its parent.
"""

import contextlib
import time
from collections.abc import Iterator

import psutil

RUN_MARK = "LOCAL_AWS_RUN"  # carried by every child of one local AWS
TASK_MARK = "LOCAL_AWS_TASK"  # carried by every process of one ECS task

_ROUND_SECONDS = 0.02


def kill_marked(mark: str, value: str, give_up_after: float = 10.0) -> bool:
    """Kill all processes carrying `mark=value`, and their descendants, until none is left.

    Returns whether none was left within `give_up_after` seconds. Waits for no process: reaping belongs to the
    process's parent, and a wait here would take its exit code away.
    """
    deadline = time.monotonic() + give_up_after
    while found := list(_marked(mark, value)):
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if time.monotonic() > deadline:
            return False
        time.sleep(_ROUND_SECONDS)
    return True


def _marked(mark: str, value: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(mark) == value:
                yield from process.children(recursive=True)
                yield process
