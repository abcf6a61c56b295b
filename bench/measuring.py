"""What the measurements share: processes of their own that answer with one line of JSON, and medians."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
AWS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
_LONGEST_SECONDS = 300.0


class ChildFailed(Exception):
    """A measured process did not answer; the message holds its last lines."""


def child(
    arguments: Iterable[str | Path], environment: Mapping[str, str] | None = None, given: object = None
) -> dict[str, Any]:
    """Run Python with `given` as JSON on its input; the last line that it prints is its answer. Raises ChildFailed."""
    argv = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        argv,
        cwd=ROOT,
        env=surroundings(environment or {}),
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=_LONGEST_SECONDS,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise ChildFailed(f"{' '.join(argv[1:6])} failed ({done.returncode}):\n  {said}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def surroundings(environment: Mapping[str, str]) -> dict[str, str]:
    """What a measured process is given: nothing of ours but what it needs."""
    return {"PATH": os.environ["PATH"], **AWS, **environment}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure, the median over the runs."""
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def side(
    name: str, arguments: Iterable[object], environment: Mapping[str, str], given: object = None
) -> dict[str, Any]:
    """The answer of `bench/{name}.py`."""
    argv, given_to_it = isolated_python(name, arguments, environment)
    return child(argv[1:], given_to_it, given)


def isolated_python(
    name: str, arguments: Iterable[object], environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """How `bench/{name}.py` is run, and in what environment: it finds only the packages that it puts on its path."""
    start = f"import sys; sys.path.append({str(ROOT)!r}); from bench import {name}; {name}.main()"
    return [sys.executable, "-I", "-S", "-c", start, *map(str, arguments)], surroundings(environment)
