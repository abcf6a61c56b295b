"""The far sides of a measurement: the Work API emulator, with a round trip, and a local AWS with what is needed."""

import contextlib
import json
import secrets
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
import yaml
from boto3.dynamodb.types import TypeSerializer

from local.stack import ENVIRONMENT_ID, ROOT, local_aws, work_api
from shared.config import SHARD

KEY = f"sk-ant-oat01-{secrets.token_urlsafe(24)}"


@dataclass(frozen=True)
class Emulator:
    """A running emulator."""

    url: str

    def queue(self, items: int) -> list[str]:
        """Queue so many sessions; their work ids."""
        made = self.control("POST", "sessions", {"count": items})
        return [session["work_id"] for session in made["sessions"]]

    def delay(self, round_trip_ms: int) -> None:
        """From now on every call of the Work API takes so much longer."""
        if round_trip_ms:
            fault = {"kind": "delay", "call": "any", "times": None, "seconds": round_trip_ms / 1000}
            self.control("POST", "faults", fault)

    def control(self, method: str, path: str, body: Any = None) -> Any:
        answer = httpx.request(method, f"{self.url}/_control/{path}", json=body, timeout=60)
        return answer.raise_for_status().json()

    def settings(self) -> dict[str, str]:
        """What a measured process is told of it."""
        return {"FLEET_ENVIRONMENT_ID": ENVIRONMENT_ID, "FLEET_BASE_URL": self.url, "ENVIRONMENT_KEY": KEY}


@contextlib.contextmanager
def emulator(round_trip_ms: int) -> Iterator[Emulator]:
    """A fresh one in a process of its own."""
    with work_api(KEY, f"sk-ant-api03-{secrets.token_urlsafe(24)}", []) as url:
        started = Emulator(url)
        started.delay(round_trip_ms)
        yield started


@dataclass(frozen=True)
class Aws:
    """A local AWS; `fresh` makes a table, a queue, a secret and a lease loop that no earlier run has touched."""

    url: str

    def client(self, service: str) -> Any:
        given = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        return boto3.client(service, endpoint_url=self.url, **given)  # type: ignore[call-overload]

    def fresh(self) -> dict[str, str]:
        """What a measured process is told of them."""
        name = f"bench-{uuid.uuid4().hex[:8]}"
        role = self.client("iam").create_role(RoleName=name, AssumeRolePolicyDocument=_TRUSTING)["Role"]["Arn"]
        self.client("dynamodb").create_table(TableName=name, **table())
        return {
            "AWS_ENDPOINT_URL": self.url,
            "FLEET_TABLE": name,
            "FLEET_QUEUE_URL": self.client("sqs").create_queue(QueueName=name)["QueueUrl"],
            "FLEET_KEY_SECRET_ARN": self.client("secretsmanager").create_secret(Name=name, SecretString=KEY)["ARN"],
            "FLEET_STATE_MACHINE_ARN": self.client("stepfunctions").create_state_machine(
                name=name, definition=_WAITING_LOOP, roleArn=role
            )["stateMachineArn"],
            "FLEET_MAX_SESSIONS": "10000",
        }

    def live(self, name: str, leases: list[list[str]]) -> None:
        """Put running turns with these leases, (work id, value) each, into a table; all are due."""
        items: list[dict[str, Any]] = []
        now = int(time.time() * 1000)
        for work_id, value in leases:
            record = {"shard": SHARD, "work_id": work_id, "phase": "running", "turn": now, "attempt": 1}
            lease = {"work_id": work_id, "turn": now, "value": value, "ttl_seconds": 300, "due_at": 0}
            lease["accepted_sent_at"] = now
            items += [{"pk": work_id, "sk": "record", **record}, {"pk": work_id, "sk": "lease", **lease}]
        typed, client = TypeSerializer().serialize, self.client("dynamodb")
        puts = [{"PutRequest": {"Item": {key: typed(value) for key, value in item.items()}}} for item in items]
        for start in range(0, len(puts), 25):
            client.batch_write_item(RequestItems={name: puts[start : start + 25]})


_WAITING_LOOP = json.dumps({"StartAt": "Wait", "States": {"Wait": {"Type": "Wait", "Seconds": 86_400, "End": True}}})

_TRUST = {"Effect": "Allow", "Principal": {"Service": "states.amazonaws.com"}, "Action": "sts:AssumeRole"}
_TRUSTING = json.dumps({"Version": "2012-10-17", "Statement": [_TRUST]})


def table() -> dict[str, Any]:
    """The `work` table as template.yaml has it: its keys and its index."""

    class Loader(yaml.SafeLoader):
        """Ignores what CloudFormation's tags mean."""

    Loader.add_multi_constructor("!", lambda *_: None)
    template = yaml.load((ROOT / "template.yaml").read_text(), Loader)  # noqa: S506  a SafeLoader
    properties = template["Resources"]["WorkTable"]["Properties"]
    wanted = ("BillingMode", "AttributeDefinitions", "KeySchema", "GlobalSecondaryIndexes")
    return {name: properties[name] for name in wanted}


def cpu_ms() -> dict[str, float]:
    """The CPU time that the running far sides have used so far."""
    used = {"emulator": 0.0, "local_aws": 0.0}
    for process in psutil.Process().children():
        words = process.cmdline()
        for name, module in (("emulator", "local.work_api"), ("local_aws", "local.aws")):
            if module in words:
                used[name] += sum(process.cpu_times()[:4]) * 1000  # its children too
    return used


@contextlib.contextmanager
def aws() -> Iterator[Aws]:
    """A fresh one in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="sandbox-fleet-") as folder, local_aws(Path(folder), [], 1.0) as url:
        yield Aws(url)
