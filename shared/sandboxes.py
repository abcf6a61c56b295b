"""Sandboxes as ECS tasks: run, stop, describe, find. Which of these is done when is not decided here."""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError
from pydantic import ValidationError

from shared.config import Config
from shared.diagnose import LaunchProblem, classify_failure, classify_launch_error
from shared.lifecycle import on_spot, started_by, subnets_to_try
from shared.record import Record, Spent
from shared.sizes import SizeClass

if TYPE_CHECKING:
    from types_boto3_ecs import ECSClient
    from types_boto3_ecs.type_defs import TagTypeDef, TaskOverrideTypeDef

CONTAINER = "sandbox"
_TAG_VALUE = re.compile(r"[A-Za-z0-9 _.:/=+@-]{1,256}")  # what every service takes
FREE_DISK = 20  # GiB that every task on Fargate has
DESCRIBED_AT_ONCE = 100  # the most that DescribeTasks takes (FIELD_NOTES 18)


class LaunchFailed(Exception):
    """RunTask started nothing; `problem` says whether trying again can help."""

    def __init__(self, problem: LaunchProblem, message: str) -> None:
        super().__init__(message)
        self.problem = problem


class Sandboxes:
    """One Fargate task a (work, turn, attempt)."""

    def __init__(self, client: "ECSClient", config: Config) -> None:
        self._client, self._config = client, config

    def run(self, record: Record, ticket: str) -> str:
        """Start the attempt's task and return its arn; the same attempt again is the same task. Raises LaunchFailed.

        Nothing but ids, the single-use ticket, the size class's numbers and, with EnableExec, ECS Exec's role goes into
        the overrides (DESIGN §6).
        """
        name = started_by(record.work_id, record.turn, record.attempt)
        provider = "FARGATE_SPOT" if on_spot(record, self._config.spot_weight) else "FARGATE"
        environment = {
            "FLEET_WORK_ID": record.work_id,
            "FLEET_TURN": str(record.turn),
            "FLEET_ATTEMPT": str(record.attempt),
            "FLEET_TICKET": ticket,
        }
        try:
            reply = self._client.run_task(
                cluster=self._config.cluster_arn,
                taskDefinition=self._config.task_definition_of(record.size),
                clientToken=hashlib.sha256(name.encode()).hexdigest(),
                startedBy=name,
                capacityProviderStrategy=[{"capacityProvider": provider, "weight": 1}],
                count=1,
                networkConfiguration={
                    "awsvpcConfiguration": {
                        "subnets": subnets_to_try(record, self._config.subnets.split(",")),
                        "securityGroups": self._config.security_groups.split(","),
                        "assignPublicIp": "ENABLED" if self._config.assign_public_ip == "ENABLED" else "DISABLED",
                    }
                },
                overrides={
                    "containerOverrides": [
                        {
                            "name": CONTAINER,
                            "environment": [{"name": n, "value": v} for n, v in environment.items()],
                        }
                    ],
                    **_machine(record.size),
                    **self._exec_role(),
                },
                enableExecuteCommand=bool(self._config.exec_role_arn),
                tags=_tags(record),
            )
        except ClientError as error:
            return _arn_of_twin(error)
        if reply["tasks"]:
            return reply["tasks"][0]["taskArn"]
        reason = "; ".join(str(f.get("reason") or f.get("detail")) for f in reply["failures"]) or "no task"
        raise LaunchFailed(classify_failure(reason), f"RunTask started nothing: {reason}")

    def _exec_role(self) -> "TaskOverrideTypeDef":
        """The task definition has no task role: without EnableExec no code in a sandbox finds AWS credentials."""
        return {"taskRoleArn": self._config.exec_role_arn} if self._config.exec_role_arn else {}

    def stop(self, arn: str, reason: str) -> None:
        """SIGTERM now, SIGKILL after the stop timeout. A task that is gone is stopped already."""
        try:
            self._client.stop_task(cluster=self._config.cluster_arn, task=arn, reason=reason[:255])
        except ClientError as error:
            message = str(error.response["Error"].get("Message", ""))
            if "not found" not in message.lower() and "missing" not in message.lower():
                raise

    def describe(self, arns: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The tasks that ECS still knows, by arn; asked for in batches."""
        wanted, found = list(arns), dict[str, dict[str, Any]]()
        for start in range(0, len(wanted), DESCRIBED_AT_ONCE):
            reply = self._client.describe_tasks(
                cluster=self._config.cluster_arn, tasks=wanted[start : start + DESCRIBED_AT_ONCE]
            )
            found |= {task["taskArn"]: dict(task) for task in reply["tasks"]}
        return found

    def meant_to_run(self) -> list[str]:
        """The arns of every task of the cluster that nobody has stopped, pending ones included."""
        pages = self._client.get_paginator("list_tasks").paginate(
            cluster=self._config.cluster_arn, desiredStatus="RUNNING"
        )
        return [arn for page in pages for arn in page["taskArns"]]

    def find(self, name: str) -> list[str]:
        """The arns of the tasks started by this name, stopping ones included."""
        found: list[str] = []
        for status in ("RUNNING", "STOPPED"):
            reply = self._client.list_tasks(
                cluster=self._config.cluster_arn,
                startedBy=name,
                desiredStatus=status,
            )
            found += reply["taskArns"]
        return found


def _tags(record: Record) -> "list[TagTypeDef]":
    """For cost allocation. An id that no tag may hold is left out: RunTask would refuse the task for it."""
    named = {"environment-id": record.environment_id, "session-id": record.session_id, "work-id": record.work_id}
    return [
        {"key": f"sandbox-fleet:{name}", "value": value}
        for name, value in named.items()
        if value and _TAG_VALUE.fullmatch(value)
    ]


def _machine(size: SizeClass | None) -> "TaskOverrideTypeDef":
    """What RunTask overrides of the task definition's machine."""
    if size is None:
        return {}
    disk: TaskOverrideTypeDef = {"ephemeralStorage": {"sizeInGiB": size.disk}} if size.disk else {}
    return {"cpu": str(size.cpu), "memory": str(size.memory), **disk}


def _arn_of_twin(error: ClientError) -> str:
    """A retried launcher minted a second ticket: ECS refuses the changed request, but names the task (AWS_FACTS)."""
    code, message = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
    twins = error.response.get("resourceIds")
    if code == "ConflictException" and isinstance(twins, list) and twins:
        return str(twins[0])
    raise LaunchFailed(classify_launch_error(code, message), f"RunTask failed: {code}: {message}") from None


def exit_code_of(task: dict[str, Any]) -> int | None:
    """The sandbox container's exit code, if it ever ran."""
    for container in task.get("containers") or ():
        if container.get("name") == CONTAINER:
            code = container.get("exitCode")
            return int(code) if code is not None else None
    return None


def charged_seconds(task: Mapping[str, Any]) -> float | None:
    """What Fargate charges a stopped task for: from its image's pull to its end, a minute at least; None if not told.

    https://aws.amazon.com/fargate/pricing/
    """
    began, ended = _charged_from(task), _time(task.get("stoppedAt"))
    return None if began is None or ended is None else max(60.0, (ended - began).total_seconds())


def spent_on(task: Mapping[str, Any], now: datetime | None = None) -> Spent | None:
    """What Fargate charges a task for, until `now` if it has not stopped; None if not told, or nothing was pulled."""
    began, seconds = _charged_from(task), charged_seconds({"stoppedAt": now, **task})
    if began is None or seconds is None:
        return None
    disk = task.get("ephemeralStorage")
    try:
        return Spent(
            day=began.astimezone(UTC).date().isoformat(),
            cpu=task.get("cpu"),
            memory=task.get("memory"),
            disk=disk.get("sizeInGiB") if isinstance(disk, Mapping) else FREE_DISK,
            spot=task.get("capacityProviderName") == "FARGATE_SPOT",
            seconds=math.ceil(seconds),
        )
    except ValidationError:
        return None


def _charged_from(task: Mapping[str, Any]) -> datetime | None:
    return _time(task.get("pullStartedAt") or task.get("startedAt"))


def _time(told: object) -> datetime | None:
    """A description holds times, an event their text."""
    if isinstance(told, datetime):
        return told
    try:
        found = datetime.fromisoformat(str(told))
    except ValueError:
        return None
    return found if found.tzinfo else None
