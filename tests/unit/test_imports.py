"""What each function may load and build: every package and client costs at each cold start (bench/cold_start.py)."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from bench.as_lambda import BUILDERS
from shared.config import Config

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = {
    "poller": {"dynamodb", "secretsmanager", "sqs", "stepfunctions"},
    "launcher": {"dynamodb", "ecs", "sqs"},
    "keeper": {"dynamodb", "secretsmanager"},
    "stopper": {"dynamodb", "secretsmanager", "ecs", "sqs"},
    "observer": {"dynamodb", "sqs"},  # these four wake another function by a client that is built then
    "janitor": {"dynamodb", "secretsmanager", "ecs", "sqs", "stepfunctions"},
    "webhook": {"secretsmanager"},
    "tickets": {"dynamodb"},
    "image": {"lambda", "codebuild", "ecr"},
}
CALL_THE_API = {"poller", "launcher", "keeper", "stopper", "janitor"}
LOADED_BY = {
    "shared.sandboxes": {"launcher", "stopper", "observer", "janitor"},
    "shared.outputs": {"tickets"},
    "shared.staging": {"tickets"},
}
NEVER = {
    "anthropic",
    "aws_xray_sdk",
    "aws_lambda_powertools.utilities.idempotency",
    "aws_lambda_powertools.utilities.parameters",
    "aws_lambda_powertools.event_handler",
}

# One process; each function in a fork of its own, after what all of them load.
REPORT = """
import json, os, sys
import boto3
import shared.metrics, shared.wiring
from bench import as_lambda
built = []
boto3.client = lambda service, **_: built.append(service) or object()
for function in as_lambda.BUILDERS:
    sys.stdout.flush()
    if os.fork() == 0:
        as_lambda.build(function, as_lambda.load(function))
        print(json.dumps([function, sorted(built), sorted(sys.modules)]), flush=True)
        os._exit(0)
    os.wait()
"""


@cache
def loaded() -> dict[str, tuple[list[str], set[str]]]:
    """Of each function, the clients built and the modules loaded."""
    settings = {
        f"FLEET_{name.upper()}": "given"
        for name in Config.model_fields
        if Config.model_fields[name].default in ("", ...)
    }
    environment = {**settings, "FLEET_TABLE": "given", "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {function: (clients, set(modules)) for function, clients, modules in lines}


def test_every_function_is_looked_at() -> None:
    assert set(BUILDERS) == set(CLIENTS) == {app.parent.name for app in ROOT.glob("functions/*/app.py")}


@pytest.mark.parametrize("function", CLIENTS)
def test_a_function_builds_only_the_clients_that_it_uses(function: str) -> None:
    clients, modules = loaded()[function]
    assert sorted(clients) == sorted(CLIENTS[function])
    assert ("shared.work_api" in modules) == (function in CALL_THE_API)


@pytest.mark.parametrize("function", CLIENTS)
def test_a_function_loads_nothing_that_only_costs_time(function: str) -> None:
    _, modules = loaded()[function]
    assert not modules & NEVER
    assert ("standardwebhooks" in modules) == (function == "webhook")
    assert {module: function in users for module, users in LOADED_BY.items()} == {
        module: module in modules for module in LOADED_BY
    }
