"""The demo, run and judged from outside as a user sees it."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
LAST_LINE = re.compile(
    r"demo: sessions=12 completed=8 stopped=3 lost=1 failed=0 stranded=0 sandboxes_left=0 seconds=\d+"
)


def test_every_kind_of_session_is_served_to_its_right_end() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "local.demo", "--timeout", "300"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert LAST_LINE.fullmatch(done.stdout.strip().splitlines()[-1]), done.stdout


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process_and_no_folder(ending: signal.Signals, tmp_path: Path) -> None:
    """A second signal, sent while it cleans up, changes nothing."""
    mark = {"FLEET_TEST_RUN": str(tmp_path), "TMPDIR": str(tmp_path)}
    demo = subprocess.Popen(
        [sys.executable, "-m", "local.demo"],
        cwd=ROOT,
        env={**os.environ, **mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    serving = threading.Event()

    def read() -> None:
        for line in demo.stderr or ():
            said.append(line)
            if ": launching" in line:
                serving.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert serving.wait(240), "".join(said)
        demo.send_signal(ending)
        threading.Event().wait(0.5)  # into the clean-up
        demo.send_signal(ending)
        assert demo.wait(120) == 130
    finally:
        demo.kill()
        reader.join()
    assert said[-1].startswith("interrupted")
    assert "Traceback" not in "".join(said)
    assert [p for p in psutil.process_iter() if _has(p, mark)] == []
    assert list(tmp_path.iterdir()) == []


def _has(process: psutil.Process, mark: dict[str, str]) -> bool:
    try:
        return mark.items() <= process.environ().items()
    except psutil.Error:
        return False
