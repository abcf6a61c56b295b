"""The local stack kept running in the background: what `fleet local up` starts, and where others find it."""

import argparse
import fcntl
import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / ".cache/local-stack.log"
_STATE = ROOT / ".cache/local-stack.json"
_LOCK = ROOT / ".cache/local-stack.lock"
# Sandboxes of this machine: few at once, and polls all the time where no webhook comes
_PARAMETERS = {"MaxSessions": "8", "StopTimeoutSeconds": "20"}
_REAL = {"MaxSessions": "4", "StopTimeoutSeconds": "20", "PollWindowSeconds": "55"}


@dataclass(frozen=True)
class Kept:
    """The stack that runs: where its parts answer, and the local AWS's root credential."""

    pid: int
    started_at: float  # epoch seconds
    environment_id: str
    api_url: str
    aws_url: str
    real: bool  # serves the vendor's API rather than the emulator
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)


def find() -> Kept | None:
    """The stack, if one runs and is ready."""
    if not _runs():
        return None
    try:
        return Kept(**json.loads(_STATE.read_text()))
    except (OSError, ValueError, TypeError):  # not ready yet, or of another version
        return None


def starting_or_running() -> bool:
    """Whether there is one, ready or not."""
    return _runs()


def _runs() -> bool:
    """The process holds the lock for as long as it lives, however it ends."""
    if not _LOCK.exists():
        return False
    with _LOCK.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _only_one() -> TextIO:
    _LOCK.parent.mkdir(exist_ok=True)
    lock = _LOCK.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit("a local stack runs already: fleet local status")
    return lock


def main() -> None:
    """Serve until SIGTERM. With --environment-id the environment key is read from standard input."""
    from local.stack import ENVIRONMENT_ID, Real, StackFailed, running  # noqa: PLC0415 - find() is to stay light

    parser = argparse.ArgumentParser(prog="python -m local.kept", description=__doc__)
    parser.add_argument(
        "--environment-id", help="serve this environment of the vendor's with sandboxes of this machine"
    )
    parser.add_argument("--base-url", default="https://api.anthropic.com", help="where its API is")
    parser.add_argument("--time-scale", type=float, default=1.0, help="speed of schedules: 0.05 makes a minute 3 s")
    options = parser.parse_args()
    real = None
    if options.environment_id:
        real = Real(options.environment_id, options.base_url, sys.stdin.readline().strip())
    ended = threading.Event()
    for ending in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ending, lambda *_: ended.set())
    with _only_one():
        try:
            with running(options.time_scale, _say, _REAL if real else _PARAMETERS, real) as stack:
                kept = Kept(
                    pid=os.getpid(),
                    started_at=time.time(),
                    environment_id=options.environment_id or ENVIRONMENT_ID,
                    api_url=stack.api_url,
                    aws_url=stack.aws_url,
                    real=real is not None,
                    access_key=stack.root.key_id,
                    secret_key=stack.root.secret,
                )
                _STATE.touch(0o600)
                _STATE.chmod(0o600)
                _STATE.write_text(json.dumps(asdict(kept)))
                _say("ready")
                ended.wait()
                _say("ending")
        except StackFailed as failure:
            sys.exit(f"{failure}")
        finally:
            _STATE.unlink(missing_ok=True)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
