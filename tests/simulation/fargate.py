"""Fargate, simulated: tasks with their states, reasons and events; the container is a process given by the fleet."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from tests.simulation.machine import Died, Machine, Process
from tests.simulation.outside import Lambda, Outside, client_error

FORGOTTEN_AFTER_MS = 3_600_000


@dataclass
class Task:
    """One task. `told_to_stop` is what its container sees as SIGTERM."""

    arn: str
    started_by: str
    request: dict[str, Any]
    created_at: int
    status: str = "PROVISIONING"
    desired: str = "RUNNING"
    version: int = 1
    reason: str | None = None
    code: str | None = None
    exit_code: int | None = None
    told_to_stop: bool = False
    process: Process | None = None
    started_at: int | None = None
    stopped_at: int | None = None

    @property
    def provider(self) -> str:
        (chosen,) = self.request["capacityProviderStrategy"]
        return str(chosen["capacityProvider"])

    @cached_property
    def environment(self) -> dict[str, str]:
        given = self.request["overrides"]["containerOverrides"][0]["environment"]
        return {one["name"]: one["value"] for one in given}

    @property
    def definition(self) -> str:
        return str(self.request["taskDefinition"])

    @property
    def runs(self) -> bool:
        return self.status == "RUNNING"

    def described(self) -> dict[str, Any]:
        container: dict[str, Any] = {"name": "sandbox"}
        if self.exit_code is not None:
            container["exitCode"] = self.exit_code
        shown = {
            "taskArn": self.arn,
            "startedBy": self.started_by,
            "capacityProviderName": self.provider,
            "lastStatus": self.status,
            "desiredStatus": self.desired,
            "version": self.version,
            "stoppedReason": self.reason,
            "stopCode": self.code,
            "cpu": "1024",
            "memory": "2048",
            "startedAt": _told(self.started_at),
            "stoppedAt": _told(self.stopped_at),
            "containers": [container],
        }
        return {name: value for name, value in shown.items() if value is not None}


def _told(at: int | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at / 1000, UTC).isoformat()


@dataclass
class Fargate:
    """The four calls that the fleet makes of ECS, in boto3's shapes, and the events that follow."""

    machine: Machine
    outside: Outside
    functions: Lambda
    container: Callable[[Task], int]
    stop_timeout_ms: int
    watch: Callable[[Task], None]  # after every change of a task's state
    stopping: Callable[[Task, str], None]  # before a StopTask, with its reason
    created: Callable[[Task], None]
    tasks: dict[str, Task] = field(default_factory=dict)
    ever: list[Task] = field(default_factory=list)  # those that ECS has forgotten as well
    tokens: dict[str, Task] = field(default_factory=dict)
    full_until: int = 0
    image_missing_until: int = 0
    image_missing_from: int = 0
    image_missing: str = "definition"  # the task definition whose image it is
    subnets_full_until: dict[str, int] = field(default_factory=dict)
    reclaiming_spot_until: int = 0

    def run_task(self, *, clientToken: str | None = None, startedBy: str, **request: Any) -> dict[str, Any]:
        return self.outside.call(
            "ecs.run_task", lambda: self._run(clientToken, startedBy, request), refuse=self._refusal
        )

    def stop_task(self, *, cluster: str, task: str, reason: str) -> None:
        self.outside.call("ecs.stop_task", lambda: self.stop(self.tasks[task], reason, "UserInitiated"))

    def describe_tasks(self, *, cluster: str, tasks: list[str]) -> dict[str, Any]:
        def described() -> dict[str, Any]:
            if len(tasks) > 100:
                raise client_error("InvalidParameterException", "Tasks can have at most 100 items.")
            known = [self.tasks[arn] for arn in tasks if arn in self.tasks and not self._unseen(self.tasks[arn])]
            return {"tasks": [task.described() for task in known], "failures": []}

        return self.outside.call("ecs.describe_tasks", described)

    def list_tasks(self, *, cluster: str, desiredStatus: str, startedBy: str | None = None, **_: Any) -> dict[str, Any]:
        def listed() -> dict[str, Any]:
            arns = [
                task.arn
                for task in self.tasks.values()
                if task.desired == desiredStatus and startedBy in (None, task.started_by) and not self._unseen(task)
            ]
            return {"taskArns": arns}

        return self.outside.call("ecs.list_tasks", listed)

    def get_paginator(self, operation: str) -> Any:
        assert operation == "list_tasks"
        return SimpleNamespace(paginate=lambda **request: [self.list_tasks(**request)])

    def stop(self, task: Task, reason: str, code: str) -> None:
        """SIGTERM; SIGKILL after the stop timeout."""
        if task.desired == "STOPPED":
            return
        self.stopping(task, reason)
        task.desired, task.told_to_stop = "STOPPED", True
        task.reason, task.code = task.reason or reason, task.code or code
        if task.process is None:
            self.machine.later(500, lambda: self._stopped(task, None))
            return
        process = task.process
        self.machine.later(self.stop_timeout_ms, lambda: self.machine.kill(process, "SIGKILL"))

    def reclaims(self, task: Task) -> bool:
        """Whether the capacity of this task is wanted back now; asked every second. Only ever Spot's."""
        if task.provider != "FARGATE_SPOT":
            return False
        if self.machine.now < self.reclaiming_spot_until:
            return self.machine.rng.random() < 0.2
        return self.outside.faults.happens(self.machine, 0.002, "Spot interruption")

    def crash(self, task: Task, code: str, reason: str) -> None:
        """The container is gone at once: its own crash, its host's, or an interruption."""
        if task.process is not None and task.process.alive:
            task.reason, task.code = reason, code
            self.machine.kill(task.process, reason)

    def image_goes_missing(self, ms: int, definition: str = "definition") -> None:
        """Every task of this definition that starts within this time cannot pull its image."""
        self.image_missing = definition
        self.image_missing_from, self.image_missing_until = self.machine.now, self.machine.now + ms

    def _refusal(self) -> Exception:
        return self.machine.rng.choice(
            [
                client_error("ThrottlingException", "Rate exceeded"),
                client_error("InvalidParameterException", "Rate exceeded"),
                client_error("ServerException", "Service Unavailable. Please try again later."),
                client_error("ClientException", "Capacity is unavailable at this time. Please try again later"),
            ]
        )

    def _run(self, token: str | None, started_by: str, request: dict[str, Any]) -> dict[str, Any]:
        known = self.tokens.get(token) if token else None
        if known is not None:
            if known.request != request:
                raise client_error("ConflictException", "another request", resourceIds=[known.arn])
            return {"tasks": [known.described()], "failures": []}
        task = Task(
            f"arn:aws:ecs:us-east-1:123456789012:task/c/{len(self.ever) + 1}", started_by, request, self.machine.now
        )
        spot = task.provider == "FARGATE_SPOT"
        no_spot = spot and self.outside.faults.happens(self.machine, 0.1, "no Spot capacity")
        if self.machine.now < self.full_until or no_spot:
            return {"tasks": [], "failures": [{"reason": "Capacity is unavailable at this time."}]}
        self.tasks[task.arn] = task
        self.ever.append(task)
        if token:
            self.tokens[token] = task
        self.machine.note(task.arn, f"created by {started_by}")
        self.created(task)
        stuck = self.outside.faults.happens(self.machine, 0.02, "never leaves PENDING")
        if not stuck:
            self.machine.later(self.machine.rng.randint(800, 40_000), lambda: self._start(task))
        return {"tasks": [task.described()], "failures": []}

    def _start(self, task: Task) -> None:
        if task.desired == "STOPPED":
            return
        missing = self.machine.now < self.image_missing_until and task.definition == self.image_missing
        if missing:
            task.desired, task.code = "STOPPED", "TaskFailedToStart"
            task.reason = "CannotPullContainerError: pull image manifest: manifest unknown: not found"
            self._stopped(task, None)
            return
        given = task.request["networkConfiguration"]["awsvpcConfiguration"]["subnets"]
        full = self.machine.now < self.subnets_full_until.get(self.machine.rng.choice(given), 0)
        if full or self.outside.faults.happens(self.machine, 0.02, "no free address"):
            task.desired, task.code = "STOPPED", "TaskFailedToStart"
            task.reason = "InsufficientFreeAddressesInSubnet"
            self._stopped(task, None)
            return

        def ended(result: Any, error: BaseException | None) -> None:
            exit_code = result if error is None else 137 if isinstance(error, Died) else 1
            task.code = task.code or "EssentialContainerExited"
            task.reason = task.reason or "Essential container in task exited"
            self._stopped(task, exit_code)

        task.process = self.machine.spawn(task.arn, lambda: self.container(task), ended=ended)
        task.started_at = self.machine.now
        self._changed(task, "RUNNING")

    def _stopped(self, task: Task, exit_code: int | None) -> None:
        if task.status == "STOPPED":
            return
        task.desired, task.exit_code, task.stopped_at = "STOPPED", exit_code, self.machine.now
        self.machine.later(FORGOTTEN_AFTER_MS, lambda: self.tasks.pop(task.arn, None))
        self._changed(task, "STOPPED")

    def _changed(self, task: Task, status: str) -> None:
        task.status, task.version = status, task.version + 1
        self.machine.note(task.arn, f"{status} {task.reason or ''} {'' if task.exit_code is None else task.exit_code}")
        self.watch(task)
        event = {"source": "aws.ecs", "detail": task.described()}
        faults, rng = self.outside.faults, self.machine.rng
        if faults.happens(self.machine, 0.05, "event lost"):
            return
        late = faults.happens(self.machine, 0.05, "event late")
        times = 2 if faults.happens(self.machine, 0.05, "event twice") else 1
        for _ in range(times):
            delay = rng.randint(5_000, 180_000) if late else rng.randint(50, 2_000)
            self.machine.later(delay, lambda: self.functions.send("observer", event))

    def _unseen(self, task: Task) -> bool:
        """A fresh task may read MISSING."""
        fresh = self.machine.now - task.created_at < 10_000
        return fresh and self.outside.faults.happens(self.machine, 0.5, "fresh task MISSING")
