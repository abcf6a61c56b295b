"""`fleet local` from outside: a stack that is kept up serves an environment it was given the key of, agents shut in."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from botocore.exceptions import ClientError

from local import kept

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT, KEY = "env_of_a_user", f"sk-ant-oat01-{secrets.token_urlsafe(24)}"
PATIENCE = 240.0


def fleet(*words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "cli.app", *words],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
        check=False,
    )


@pytest.fixture
def api() -> Iterator[str]:
    """The vendor's side: here our emulator, which the stack is told nothing more about than its address."""
    command = [sys.executable, "-m", "local.work_api", "--port", "0", "--environment-id", ENVIRONMENT]
    keys = {"ANTHROPIC_ENVIRONMENT_KEY": KEY, "ANTHROPIC_API_KEY": "sk-ant-api03-e2e"}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **keys}, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    line = process.stdout.readline()
    try:
        yield line.rsplit(" ", 1)[-1].strip()
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def up(api: str, tmp_path: Path) -> Iterator[kept.Kept]:
    file = tmp_path / "key"
    file.write_text(KEY)
    options = ["--real", "--environment-id", ENVIRONMENT, "--base-url", api, "--key-file", str(file)]
    started = fleet("local", "up", *options, "--time-scale", "0.05")
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        assert KEY not in started.stdout + started.stderr + kept.LOG.read_text()
        found = kept.find()
        assert found
        yield found
    finally:
        ended = fleet("local", "down")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert kept.find() is None


def test_a_real_environment_is_served_with_its_agents_shut_in(api: str, up: kept.Kept, tmp_path: Path) -> None:
    # What an agent's command finds of this machine: neither its files nor its processes
    command = (
        f"test -e {ROOT}/template.yaml || echo no checkout; test -e {tmp_path}/key || echo no key file; "
        "grep -aq 'py[t]est' /proc/[0-9]*/cmdline || echo no process"
    )
    script = [{"tool": "bash", "input": {"command": command}, "expect": "no checkout\nno key file\nno process"}]
    work_id = httpx.post(f"{api}/_control/sessions", json={"script": script}).json()["sessions"][0]["work_id"]
    where = {"AWS_ENDPOINT_URL": up.aws_url}
    end = time.monotonic() + PATIENCE
    record: dict[str, Any] = {}
    while record.get("phase") != "stopped":
        assert time.monotonic() < end, record
        time.sleep(1)
        listed = json.loads(fleet("ls", "--all", "--json", **where).stdout or "[]")
        record = next((known for known in listed if known["work_id"] == work_id), {})
    assert (record["outcome"], record["exit_code"]) == ("completed", 0)
    (session,) = httpx.get(f"{api}/_control/state").json()["sessions"]
    assert (len(session["results"]), session["mismatches"]) == (1, [])

    status = json.loads(fleet("local", "status", "--json").stdout)
    assert (status["real"], status["aws_url"], status["environment_id"]) == (True, up.aws_url, ENVIRONMENT)
    assert fleet("local", "queue").returncode == 4, "sessions of a real environment are made at the vendor's"
    assert fleet("local", "up").returncode == 1, "one at a time"

    for known in ("test", "000000000000"):
        with pytest.raises(ClientError, match="AccessDenied"):
            read_key(up, known, "test")
    assert read_key(up, up.access_key, up.secret_key) == KEY


def read_key(up: kept.Kept, key_id: str, secret: str) -> str:
    """The environment key out of the stack's secret, as whoever holds the given credential."""
    session = boto3.Session(key_id, secret, region_name="us-east-1")
    client: Any = session.client("secretsmanager", endpoint_url=up.aws_url)
    with contextlib.closing(client):
        name = client.list_secrets()["SecretList"]
        keys = [
            client.get_secret_value(SecretId=one["ARN"]).get("SecretString") for one in name if "Key" in one["Name"]
        ]
    return str(next(key for key in keys if key))
