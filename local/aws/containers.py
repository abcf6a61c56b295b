"""Containers as local processes live here: the images file, one container's life; ECS does not."""

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from local.aws.processes import Session


class ImagesFileError(ValueError):
    """The images file cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Image:
    """What stands in for a container image: its entry point, environment and working directory."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None


class Images:
    """The images by name, as `docker run` would find them by repository."""

    def __init__(self, by_name: Mapping[str, Image]) -> None:
        self._by_name = dict(by_name)

    @classmethod
    def from_file(cls, path: Path | None) -> "Images":
        """Read `{name: argv}` or `{name: {"argv": [...], "env": {...}, "cwd": "..."}}`.

        Raises ImagesFileError.
        """
        if path is None:
            return cls({})
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ImagesFileError(f"cannot read the images file {path}: {error.strerror}") from error
        except ValueError as error:
            raise ImagesFileError(f"the images file {path} is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ImagesFileError(f"the images file {path} must hold an object of image names")
        return cls({name: _image(path, name, entry) for name, entry in raw.items()})

    def find(self, reference: str) -> Image | None:
        """The image of `registry/repository:tag@digest`: by reference, by repository, or by its last part."""
        repository = reference.split("@", 1)[0]
        head, slash, tail = repository.rpartition("/")
        name = tail.split(":", 1)[0]
        for key in (reference, f"{head}{slash}{name}", name):
            if key in self._by_name:
                return self._by_name[key]
        return None


def _image(path: Path, name: str, entry: Any) -> Image:
    entry = {"argv": entry} if isinstance(entry, list) else entry
    argv, env, cwd = (
        (entry.get("argv"), entry.get("env", {}), entry.get("cwd")) if isinstance(entry, dict) else (None, None, None)
    )
    if not (
        isinstance(argv, list)
        and argv
        and all(isinstance(word, str) for word in argv)
        and isinstance(env, dict)
        and all(isinstance(value, str) for value in env.values())
        and (cwd is None or isinstance(cwd, str))
    ):
        raise ImagesFileError(
            f'image {name!r} in {path} must be a list of words or {{"argv": [...], "env": {{...}}, "cwd": "..."}}'
        )
    return Image(tuple(argv), env, cwd)


class Container:
    """One started process. `on_exit` is called once, from another thread, when it has ended."""

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str,
        on_line: Callable[[str], None],
        on_exit: Callable[[], None],
    ) -> None:
        """Raises OSError if there is no such program or directory."""
        self.exited = threading.Event()
        self.exit_code: int | None = None
        self._process = subprocess.Popen(
            list(argv),
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.session = Session.of(self._process.pid)
        output = self._process.stdout
        assert output is not None  # noqa: S101 - a pipe was asked for
        self._reader = threading.Thread(target=_forward, args=(output, on_line), daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, args=(on_exit,), daemon=True).start()

    def terminate(self) -> None:
        """SIGTERM to the main process alone, as to process 1 of a container."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the main process."""
        self._signal(signal.SIGKILL)

    def drain(self, timeout: float) -> None:
        """Wait until its whole output has been forwarded, at most `timeout` seconds."""
        self._reader.join(timeout)

    def _signal(self, signum: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signum)

    def _wait(self, on_exit: Callable[[], None]) -> None:
        code = self._process.wait()
        self.exit_code = code if code >= 0 else 128 - code
        self.exited.set()
        on_exit()


def _forward(output: BinaryIO, on_line: Callable[[str], None]) -> None:
    with output:
        for line in output:
            on_line(line.decode("utf-8", errors="replace").rstrip("\r\n"))


def base_environment(home: Path) -> dict[str, str]:
    """What every container starts from: nothing that leads to a credential; `home` as HOME and TMPDIR."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": os.environ.get("LANG", "C.UTF-8"),
        "HOME": str(home),
        "TMPDIR": str(home),
    }
