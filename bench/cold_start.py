"""Cold starts: import and build of every function, against importing the official SDK.

Each start is a fresh process (as_lambda.py). The figures are CPU time: a start is single-threaded, so on an idle
machine that is its length, and a busy one disturbs it least. Also the sizes of what is deployed.
"""

import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.as_lambda import BUILDERS, LAYER, SDK
from bench.measuring import ROOT, child, medians
from shared.config import Config

CACHED, SOURCE = "cached", "source"
_ROUNDS = {CACHED: 5, SOURCE: 2}
_STEPS = (  # in the order in which a function loads them; each line's cost is what it adds to those before
    ("boto3", "import boto3"),
    ("pydantic", "import pydantic; pydantic.BaseModel, pydantic.SecretStr, pydantic.ValidationError"),
    ("Powertools Logger, Metrics", "from aws_lambda_powertools import Logger, Metrics"),
    ("the records and rules (shared/lifecycle.py and what it needs)", "import shared.lifecycle"),
    ("the store (shared/store.py)", "import shared.store"),
    ("httpx", "import httpx"),
    ("the Work API client (shared/work_api.py)", "import shared.work_api"),
    ("at the first call of the API: its TLS context", "httpx.create_ssl_context()"),
    ("build: dynamodb client, the first of boto3", "boto3.client('dynamodb')"),
    ("build: secretsmanager client", "boto3.client('secretsmanager')"),
    ("build: sqs client", "boto3.client('sqs')"),
    ("build: stepfunctions client", "boto3.client('stepfunctions')"),
    ("build: ecs client", "boto3.client('ecs')"),
    ("build: lambda client", "boto3.client('lambda')"),
)
_TIMED_STEPS = """
import json, sys, time
sys.path.append({root!r})
from bench import as_lambda
as_lambda.surround()
took = {{}}
for name, step in {steps!r}:
    began = time.process_time()
    exec(step)
    took[name] = (time.process_time() - began) * 1000
print(json.dumps(took))
"""


def settings() -> dict[str, str]:
    """Values for every setting that has no default: enough to build a function, not to call anything."""
    needed = [name for name, field in Config.model_fields.items() if field.default == "" or field.is_required()]
    return {f"FLEET_{name.upper()}": "given" for name in needed}


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """All functions and the SDK, in turns; see the module. The packages must be built (local.stack.build)."""
    subjects = [SDK, *BUILDERS]
    starts: dict[str, dict[str, Any]] = {}
    for kind, rounds in _ROUNDS.items():
        say(f"cold starts, bytecode {kind}: {rounds} rounds of {len(subjects)} processes")
        runs: dict[str, list[dict[str, float]]] = {subject: [] for subject in subjects}
        for _ in range(rounds):
            for subject in subjects:
                runs[subject].append(child(["-I", "-S", ROOT / "bench/as_lambda.py", subject, kind], settings()))
        starts[kind] = {subject: medians(each) for subject, each in runs.items()}
        of_sdk = starts[kind][SDK]["import_ms"]
        for one in starts[kind].values():
            one["ratio"] = round((one["import_ms"] + one["build_ms"]) / of_sdk, 3)
    steps = [
        child(["-I", "-S", "-c", _TIMED_STEPS.format(root=str(ROOT), steps=_STEPS)]) for _ in range(_ROUNDS[CACHED])
    ]
    worst = max(BUILDERS, key=lambda function: starts[CACHED][function]["ratio"])
    return {
        "starts": starts,
        "imports": medians(steps),
        "worst": worst,
        "coldstart_ratio": starts[CACHED][worst]["ratio"],
        "sizes": sizes(),
    }


def sizes() -> dict[str, Any]:
    """What a deploy uploads, in MB, zipped and not; and whether the layer carries bytecode."""
    parts = {"layer": _zipped(LAYER.parent), "sandbox source": _zipped(ROOT / "sandbox")}
    for function in BUILDERS:
        parts[f"function {function}"] = _zipped(ROOT / "functions" / function)
    return {
        "parts": parts,
        "zipped_mb": round(sum(part["zipped_mb"] for part in parts.values()), 2),
        "layer_bytecode": _bytecode(),
    }


def _zipped(folder: Path) -> dict[str, float]:
    packed, plain = io.BytesIO(), 0
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and (folder == LAYER.parent or "__pycache__" not in file.parts):
                archive.write(file, file.relative_to(folder))
                plain += file.stat().st_size
    return {"zipped_mb": round(packed.tell() / 1e6, 3), "mb": round(plain / 1e6, 3)}


def _bytecode() -> str:
    """Which Python's bytecode the layer carries, and how it is checked: "none" if it has only source."""
    found = next(iter((LAYER / "shared").glob("__pycache__/store.*.pyc")), None)
    if found is None:
        return "none"
    version = re.sub(r"store\.cpython-(\d)(\d+)\.pyc", r"Python \1.\2", found.name)
    flags = int.from_bytes(found.read_bytes()[4:8], "little")  # PEP 552: bit 0 hash-based, bit 1 checked
    return f"{version}, {('checked by time', 'unchecked hash', '', 'checked hash')[flags & 3]}"
