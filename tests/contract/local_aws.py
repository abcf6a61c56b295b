"""A local AWS in a process of its own, and what tests do with it; its fixture is in conftest.py."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import boto3
from botocore.config import Config

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")
PYTHON = os.environ.get("FLEET_LOCAL_AWS_PYTHON", str(ROOT / ".venv-aws/bin/python"))
PATIENCE = 20.0  # seconds until a promise counts as broken; nothing takes that long
NETWORK = {"awsvpcConfiguration": {"subnets": ["subnet-1"]}}


class LocalAws:
    """A started local AWS and what the tests do with it."""

    def __init__(self, process: "subprocess.Popen[str]", endpoint: str) -> None:
        self.process = process
        self.endpoint = endpoint
        self.ecs = self.client("ecs")
        self.seen: list[dict[str, Any]] = []

    def client(self, service: str, config: Config | None = None) -> Any:
        session = boto3.Session("test", "test", region_name="us-east-1")
        return cast(Any, session).client(
            service, endpoint_url=self.endpoint, config=config or Config(retries={"total_max_attempts": 1})
        )

    def define(self, image: str = "python", **members: Any) -> str:
        """A task definition's ARN; its task's command is Python code."""
        task_members = {name: members.pop(name) for name in ("executionRoleArn", "tags") if name in members}
        definition = self.ecs.register_task_definition(
            family=f"family-{uuid.uuid4().hex[:8]}",
            requiresCompatibilities=["FARGATE"],
            networkMode="awsvpc",
            cpu="256",
            memory="512",
            containerDefinitions=[{"name": "main", "image": image, "essential": True, **members}],
            **task_members,
        )
        return str(definition["taskDefinition"]["taskDefinitionArn"])

    def run(self, code: str, definition: str | None = None, **members: Any) -> str:
        """The ARN of a task that runs this code."""
        answer = self.ecs.run_task(**request(definition or self.define(), code, **members))
        return str(answer["tasks"][0]["taskArn"])

    def task(self, arn: str) -> dict[str, Any]:
        return cast(dict[str, Any], self.ecs.describe_tasks(cluster="main", tasks=[arn])["tasks"][0])

    def until(self, arn: str, status: str) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            task = self.task(arn)
            return task if task["lastStatus"] == status else None

        return eventually(reached)

    def printed(self, group: str, wanted: str) -> str:
        """The first line with this text in a log group."""

        def line() -> str | None:
            events = self.client("logs").filter_log_events(logGroupName=group)["events"]
            return next((event["message"] for event in events if wanted in event["message"]), None)

        return eventually(line)

    def events(self, queue: str, arn: str) -> list[dict[str, Any]]:
        """The details of a stopped task's state changes, in the order of their version."""

        def all_of_it() -> list[dict[str, Any]] | None:
            for message in (
                self.client("sqs").receive_message(QueueUrl=queue, MaxNumberOfMessages=10).get("Messages", [])
            ):
                self.seen.append(json.loads(message["Body"]))
                self.client("sqs").delete_message(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"])
            mine = [event["detail"] for event in self.seen if event["resources"] == [arn]]
            return mine if any(detail["lastStatus"] == "STOPPED" for detail in mine) else None

        return sorted(eventually(all_of_it), key=lambda detail: int(detail["version"]))


def request(definition: str, code: str, **members: Any) -> dict[str, Any]:
    overrides = {"containerOverrides": [{"name": "main", "command": [code]}]}
    return {
        "cluster": "main",
        "taskDefinition": definition,
        "launchType": "FARGATE",
        "networkConfiguration": NETWORK,
        "overrides": overrides,
        **members,
    }


def eventually(probe: Callable[[], T | None]) -> T:
    """What the probe finds, as soon as it finds something."""
    deadline = time.monotonic() + PATIENCE
    while (found := probe()) is None:
        assert time.monotonic() < deadline, f"nothing found within {PATIENCE} s"
        time.sleep(0.05)
    return found


def start(tmp_path: Path, *options: str) -> LocalAws:
    images = tmp_path / "images.json"
    program = [sys.executable, "-u", "-c"]
    images.write_text(json.dumps({"python": program, "no-such-program": [str(tmp_path / "missing")]}))
    process = subprocess.Popen(
        [PYTHON, "-m", "local.aws", "--port", "0", "--images", str(images), "--stop-at-stdin-eof", *options],
        cwd=ROOT,
        env={**os.environ, "AWS_SECRET_ACCESS_KEY": "the-users-own", "ANTHROPIC_API_KEY": "the-users-own"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("local aws ready on http://127.0.0.1:"), line
    aws = LocalAws(process, line.split()[-1])
    aws.ecs.create_cluster(clusterName="main")
    return aws
