"""The process that cleans up after the local AWS, however that ends, lives here; what it cleans up does not.

Its standard input is a pipe whose only write end the local AWS holds, so the kernel tells of its death even
after SIGKILL. It runs in a session of its own, where Ctrl-C does not reach it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from local.aws.processes import RUN_MARK, kill_marked, noted_sessions

_PROJECT_ROOT = Path(__file__).resolve().parents[2]


class Watchdog:
    """The running watchdog, seen from the local AWS."""

    def __init__(self, run_id: str, sessions: Path, directories: Sequence[Path]) -> None:
        """`sessions`: where each container's is noted."""
        read_end, self._write_end = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "local.aws.watchdog", run_id, *map(str, (sessions, *directories))],
            stdin=read_end,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=_PROJECT_ROOT,
            env={"PATH": os.defpath},  # not the mark: it must not find itself
            start_new_session=True,
        )
        os.close(read_end)

    def clean_up(self) -> None:
        """Have everything cleaned up now; returns when it is."""
        os.close(self._write_end)
        self._process.wait()


def main(run_id: str, sessions: str, *directories: str) -> None:
    """Wait for the end of standard input, then kill what is the run's, remove the directories."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        while os.read(sys.stdin.fileno(), 1024):
            pass
    kill_marked(RUN_MARK, run_id, noted_sessions(Path(sessions)))
    for directory in (sessions, *directories):
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
