"""How child processes are marked, found and killed lives here; nothing that knows AWS does.

A mark is a variable in a process's initial environment: unlike a process group or a session, it is inherited
by whatever the process starts, setsid or not. But a process that guards its memory shows its environment to root alone
(the sandbox's runner does, `protect_process`): it is found by its session, which its container began. What escapes both
is a process that clears its environment, begins a session and outlives its parent.
"""

import contextlib
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

RUN_MARK = "LOCAL_AWS_RUN"  # carried by every child of one local AWS
TASK_MARK = "LOCAL_AWS_TASK"  # carried by every process of one ECS task

_ROUND_SECONDS = 0.02


class Session(NamedTuple):
    """A container's session: its first process's id, and when that began, which tells it from a later namesake."""

    pid: int
    began: float

    @classmethod
    def of(cls, pid: int) -> "Session":
        """Of a child that is not reaped yet."""
        return cls(pid, psutil.Process(pid).create_time())

    def note(self, folder: Path) -> None:
        """For whoever clears up after us."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(self.pid)).write_text(repr(self.began))

    def is_another_s(self) -> bool:
        """Whether the id was given anew, which the kernel does only once the session is empty."""
        try:
            return psutil.Process(self.pid).create_time() != self.began
        except psutil.Error:
            return False


def noted_sessions(folder: Path) -> list[Session]:
    """All that were noted in `folder`."""
    return [Session(int(file.name), float(file.read_text())) for file in folder.glob("*")] if folder.exists() else []


def kill_marked(mark: str, value: str, sessions: Collection[Session] = (), give_up_after: float = 10.0) -> bool:
    """Kill all processes carrying `mark=value` or of `sessions`, and their descendants, until none is left.

    Returns whether none was left within `give_up_after` seconds. Waits for no process: reaping belongs to the
    process's parent, and a wait here would take its exit code away.
    """
    deadline = time.monotonic() + give_up_after
    while found := list(_marked(mark, value, sessions)):
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if time.monotonic() > deadline:
            return False
        time.sleep(_ROUND_SECONDS)
    return True


def _marked(mark: str, value: str, sessions: Collection[Session]) -> Iterator[psutil.Process]:
    ours = {session.pid for session in sessions if not session.is_another_s()}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:  # dead, and its parent's to reap
                continue
            if os.getsid(process.pid) in ours or process.environ().get(mark) == value:
                yield from process.children(recursive=True)
                yield process
