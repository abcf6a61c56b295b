"""ECS tasks as local processes live here: the five task actions, lifecycle and events; who may call does not.

Replaces ministack's RunTask, StopTask, DescribeTasks, ListTasks and ExecuteCommand, which need Docker, mark a
task STOPPED before its container is dead, ignore `clientToken` and raise no events. Clusters, task definitions
and tags stay ministack's. As on AWS: states, versions, codes, reasons, errors. Not as on AWS: no start-up delays,
no network interfaces, no credentials for a task role, the execution role's permissions are not checked, stopped
tasks are not forgotten, no session of ECS Exec.
"""

import copy
import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ministack.core.arn import parse_arn
from ministack.core.responses import (
    error_response_json,
    get_account_id,
    get_region,
    json_response,
    new_uuid,
    now_iso,
    request_scope,
)
from ministack.services import ecs, ecs_metadata, eventbridge

from local.aws.containers import Container, Images, base_environment
from local.aws.processes import RUN_MARK, TASK_MARK, kill_marked
from local.aws.tokens import ClientTokens, TokenConflictError

Json = dict[str, Any]
Response = tuple[int, dict[str, str], bytes]

DEFAULT_STOP_TIMEOUT = 30  # seconds; `stopTimeout` of a container definition
_MAX_OVERRIDES = 8192  # characters of the overrides as JSON; API_TaskOverride
_MAX_STARTED_BY = 128
_MAX_TOKEN = 64
_DRAIN_SECONDS = 2.0
_LEAST_DISK, _MOST_DISK = 21, 200  # GiB, of an override
FARGATE_MEMORY = {  # MiB by CPU units
    256: (512, 1024, 2048),
    512: range(1024, 4097, 1024),
    1024: range(2048, 8193, 1024),
    2048: range(4096, 16385, 1024),
    4096: range(8192, 30721, 1024),
    8192: range(16384, 61441, 4096),
    16384: range(32768, 122881, 8192),
}


class _Refused(Exception):
    """The request is answered with this error code and message (HTTP 400)."""

    def __init__(self, code: str, message: str, **members: Any) -> None:
        super().__init__(message)
        self.response: Response = error_response_json(code, message, 400, members or None)


class _CannotStartError(Exception):
    """The task cannot start; the message is its `stoppedReason`."""


@dataclass
class _Life:
    """One task's running side. `record` is what the API shows; it changes under the engine's lock only."""

    record: Json
    definition: Json
    overrides: Mapping[str, Json]
    scratch: Path
    wake: threading.Event = field(default_factory=threading.Event)
    containers: dict[str, Container] = field(default_factory=dict)
    metadata_tokens: list[str] = field(default_factory=list)

    @property
    def arn(self) -> str:
        return str(self.record["taskArn"])

    @property
    def id(self) -> str:
        return self.arn.rsplit("/", 1)[-1]


class TaskEngine:
    """The tasks of one local AWS."""

    def __init__(self, images: Images, scratch_root: Path, logs_root: Path, sessions: Path, run_id: str) -> None:
        self._images = images
        self._scratch_root = scratch_root
        self._logs_root = logs_root
        self._sessions = sessions  # where each container's is noted, for the watchdog
        self._run_id = run_id
        self._lock = threading.RLock()
        self._tokens = ClientTokens(time.time)
        self._lives: dict[str, _Life] = {}
        self._events: queue.SimpleQueue[Json] = queue.SimpleQueue()

    def install(self) -> None:
        """Put the five actions in place of ministack's and start delivering events."""
        for name, attribute, action in (
            ("RunTask", "_run_task", self._run_task),
            ("StopTask", "_stop_task", self._stop_task),
            ("DescribeTasks", "_describe_tasks", self._describe_tasks),
            ("ListTasks", "_list_tasks", self._list_tasks),
            ("ExecuteCommand", "_execute_command", self._execute_command),
        ):
            answered = _answered(action)
            ecs._ACTION_MAP[name] = answered
            setattr(ecs, attribute, answered)
        threading.Thread(target=self._deliver_events, daemon=True, name="ecs-events").start()

    # --- RunTask --------------------------------------------------------------------------------------------

    def _run_task(self, data: Json) -> Response:
        cluster = _cluster(data)
        definition = _task_definition(data)
        _check_run_task(data, definition)
        with self._lock:
            made = self._made_before(data, cluster)
            if made is not None:
                return _reply({"tasks": [_shown(self._lives[arn].record) for arn in made], "failures": []})
            lives = [self._register(data, cluster, definition) for _ in range(data.get("count", 1))]
            if token := data.get("clientToken"):
                self._tokens.remember(cluster["clusterArn"], token, _request(data), [life.arn for life in lives])
            answer = _reply({"tasks": [_shown(life.record) for life in lives], "failures": []})
        for life in lives:
            threading.Thread(target=self._live, args=(life,), daemon=True, name=f"ecs-{life.id[:8]}").start()
        return answer

    def _made_before(self, data: Json, cluster: Json) -> Sequence[str] | None:
        if not data.get("clientToken"):
            return None
        try:
            return self._tokens.find(cluster["clusterArn"], data["clientToken"], _request(data))
        except TokenConflictError as conflict:
            raise _Refused("ConflictException", str(conflict), resourceIds=list(conflict.task_arns)) from conflict

    def _register(self, data: Json, cluster: Json, definition: Json) -> _Life:
        task_id = new_uuid().replace("-", "")
        cluster_name = cluster["clusterArn"].rsplit("/", 1)[-1]
        arn = f"arn:aws:ecs:{get_region()}:{get_account_id()}:task/{cluster_name}/{task_id}"
        overrides = copy.deepcopy(data.get("overrides") or {})
        overrides.setdefault("containerOverrides", [])
        overrides.setdefault("inferenceAcceleratorOverrides", [])
        launch_type, strategy, _ = ecs._launch_choice(data, cluster)
        launch_type, capacity_provider = ecs._task_capacity(launch_type, strategy)
        now = now_iso()
        record: Json = {
            "taskArn": arn,
            "clusterArn": cluster["clusterArn"],
            "taskDefinitionArn": definition["taskDefinitionArn"],
            "attachments": [],
            "attributes": [],
            "availabilityZone": f"{get_region()}a",
            "capacityProviderName": capacity_provider,
            "connectivity": "CONNECTED",
            "connectivityAt": now,
            "containers": [_container_record(arn, container) for container in definition["containerDefinitions"]],
            "cpu": overrides.get("cpu") or definition.get("cpu", "256"),
            "createdAt": now,
            "desiredStatus": "RUNNING",
            "enableExecuteCommand": bool(data.get("enableExecuteCommand")),
            "group": data.get("group") or f"family:{definition['family']}",
            "healthStatus": "UNKNOWN",
            "lastStatus": "PROVISIONING",
            "launchType": launch_type,
            "memory": overrides.get("memory") or definition.get("memory", "512"),
            "overrides": overrides,
            "platformFamily": "Linux" if launch_type == "FARGATE" else None,
            "platformVersion": "1.4.0" if launch_type == "FARGATE" else None,
            "startedBy": data.get("startedBy") or None,
            "tags": [],
            "updatedAt": now,
            "version": 1,
            "ephemeralStorage": (
                overrides.get("ephemeralStorage") or definition.get("ephemeralStorage") or {"sizeInGiB": 20}
            ),
        }
        life = _Life(
            record,
            copy.deepcopy(definition),
            {override["name"]: override for override in overrides["containerOverrides"]},
            self._scratch_root / task_id,
        )
        self._lives[arn] = life
        ecs._tasks[arn] = record
        if data.get("tags"):
            ecs._tags[arn] = list(data["tags"])
        self._events.put(_shown(record))
        return life

    # --- StopTask, DescribeTasks, ListTasks -----------------------------------------------------------------

    def _stop_task(self, data: Json) -> Response:
        record = _find(data.get("task", ""), _cluster(data))
        if record is None:
            raise _Refused("InvalidParameterException", "The referenced task was not found.")
        life = self._lives[record["taskArn"]]
        self._want_stop(life, "UserInitiated", data.get("reason") or "Task stopped by user")
        with self._lock:
            return _reply({"task": _shown(record)})

    def _describe_tasks(self, data: Json) -> Response:
        cluster = _cluster(data)
        references = data.get("tasks") or []
        if not references:
            raise _Refused("InvalidParameterException", "Tasks cannot be empty.")
        if len(references) > 100:
            raise _Refused("InvalidParameterException", "Tasks cannot be more than 100 elements.")
        tasks, failures = [], []
        with self._lock:
            for reference in references:
                record = _find(reference, cluster)
                if record is None:
                    failures.append({"arn": _task_arn(reference, cluster), "reason": "MISSING"})
                    continue
                tags = ecs._tags.get(record["taskArn"], []) if "TAGS" in data.get("include", []) else []
                tasks.append(_shown(record) | {"tags": tags})
        return _reply({"tasks": tasks, "failures": failures})

    def _list_tasks(self, data: Json) -> Response:
        cluster = _cluster(data)
        if data.get("startedBy") and any(data.get(name) for name in ("family", "serviceName")):
            raise _Refused("InvalidParameterException", "When you specify startedBy, it must be the only filter.")
        wanted = {
            "clusterArn": cluster["clusterArn"],
            "desiredStatus": data.get("desiredStatus", "RUNNING"),
            "startedBy": data.get("startedBy"),
            "launchType": data.get("launchType"),
            "group": f"service:{data['serviceName']}" if data.get("serviceName") else None,
        }
        family = data.get("family")
        with self._lock:
            arns = [
                arn
                for arn, record in ecs._tasks.items()
                if all(value is None or record.get(name) == value for name, value in wanted.items())
                and (not family or f"/{family}:" in record["taskDefinitionArn"])
            ]
        start, size = int(data.get("nextToken") or 0), min(int(data.get("maxResults") or 100), 100)
        answer: Json = {"taskArns": arns[start : start + size]}
        if start + size < len(arns):
            answer["nextToken"] = str(start + size)
        return _reply(answer)

    def _execute_command(self, data: Json) -> Response:
        """AWS's refusals, then one more: no SSM agent runs in a local sandbox, so there is no session to give."""
        if not data.get("interactive"):
            raise _Refused("InvalidParameterException", "Interactive is the only mode supported currently.")
        if not data.get("command"):
            raise _Refused("InvalidParameterException", "Command cannot be empty.")
        record = _find(data.get("task", ""), _cluster(data))
        if record is None:
            raise _Refused("InvalidParameterException", "The task provided in the request was not found.")
        with self._lock:
            names = [container["name"] for container in record["containers"]]
            enabled, status = record["enableExecuteCommand"], record["lastStatus"]
        if data.get("container", names[0]) not in names:
            raise _Refused("InvalidParameterException", "The container was not found in the task.")
        if not enabled or status != "RUNNING":
            raise _Refused(
                "InvalidParameterException",
                "The execute command failed because execute command was not enabled when the task was run or the "
                "execute command agent isn't running. Wait and try again or run a new task with execute command "
                "enabled and try again.",
            )
        raise _Refused(
            "TargetNotConnectedException", "The execute command failed due to an internal error. Try again later."
        )

    # --- a task's life --------------------------------------------------------------------------------------

    def _live(self, life: _Life) -> None:
        account, region = _scope(life.arn)
        with request_scope(account, region):
            try:
                if self._change(life, lastStatus="PENDING", pullStartedAt=now_iso()):
                    self._start(life)
                    self._watch(life)
            except _CannotStartError as error:
                for container in life.record["containers"]:
                    container["reason"] = str(error)
                self._want_stop(life, "TaskFailedToStart", str(error))
            finally:
                self._end(life)

    def _start(self, life: _Life) -> None:
        life.scratch.mkdir(parents=True)
        for definition in life.definition["containerDefinitions"]:
            life.containers[definition["name"]] = self._start_container(life, definition)
        now = now_iso()
        with self._lock:
            for container in life.record["containers"]:
                container["lastStatus"] = "RUNNING"
                container["runtimeId"] = f"{life.id}-{life.containers[container['name']].session.pid}"
        if self._change(life, lastStatus="RUNNING", pullStoppedAt=now, startedAt=now):
            ecs_metadata.set_task_status(life.arn, known_status="RUNNING")
            for token in life.metadata_tokens:
                ecs_metadata.set_container_status(token, "RUNNING")

    def _start_container(self, life: _Life, definition: Json) -> Container:
        image = self._images.find(definition["image"])
        if image is None:
            raise _CannotStartError(
                "CannotPullContainerError: pull image manifest has been retried 1 time(s): failed to resolve "
                f"ref {definition['image']}: not found (it is not in the images file of the local AWS)"
            )
        override = life.overrides.get(definition["name"], {})
        command = override.get("command") or definition.get("command") or []
        env = (
            base_environment(life.scratch)
            | dict(image.env)
            | _pairs(definition.get("environment"))
            | _secrets(definition)
            | _pairs(override.get("environment"))
            | self._injected(life, definition)
        )
        on_line = self._log_sink(life, definition)
        try:
            container = Container([*image.argv, *command], env, image.cwd or str(life.scratch), on_line, life.wake.set)
        except OSError as error:
            raise _CannotStartError(f"CannotStartContainerError: {error}") from error
        container.session.note(self._sessions)
        return container

    def _injected(self, life: _Life, definition: Json) -> dict[str, str]:
        """What Fargate itself sets: metadata address and region; no credentials, there being no task role."""
        registered: dict[str, str] = {}
        life.metadata_tokens.append(
            ecs._register_metadata(
                life.arn,
                life.record["clusterArn"],
                life.definition,
                definition,
                life.record["launchType"],
                registered,
                True,
                None,
            )
        )
        return {
            "AWS_EXECUTION_ENV": "AWS_ECS_FARGATE",
            "AWS_REGION": get_region(),
            "AWS_DEFAULT_REGION": get_region(),
            "ECS_CONTAINER_METADATA_URI_V4": registered["ECS_CONTAINER_METADATA_URI_V4"],
            RUN_MARK: self._run_id,
            TASK_MARK: life.id,
        }

    def _log_sink(self, life: _Life, definition: Json) -> Callable[[str], None]:
        """Where a container's lines go: its awslogs stream, else a file of the state directory."""
        config = ecs._awslogs_config(definition, life.id, life.id)
        if config is None:
            self._logs_root.mkdir(parents=True, exist_ok=True)
            path = self._logs_root / f"{life.id}-{definition['name']}.log"

            def to_file(line: str) -> None:
                with path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")

            return to_file
        account, region = _scope(life.arn)
        region = config["region"] or region
        with request_scope(account, region):
            if not ecs._ensure_awslogs_stream(config):
                raise _CannotStartError(
                    "ResourceInitializationError: failed to validate logger args: create stream has been "
                    "retried 1 times: failed to create Cloudwatch log stream: ResourceNotFoundException: "
                    f"The specified log group does not exist: {config['group']}"
                )

        def to_logs(line: str) -> None:
            with request_scope(account, region):
                ecs._emit_awslogs_event(config, line)

        return to_logs

    def _watch(self, life: _Life) -> None:
        """Return when the task is to stop: it was asked to, or an essential container ended, or all did."""
        while life.record["desiredStatus"] != "STOPPED":
            life.wake.wait()
            life.wake.clear()
            ended = [
                definition.get("essential", True)
                for definition in life.definition["containerDefinitions"]
                if life.containers[definition["name"]].exited.is_set()
            ]
            if any(ended) or len(ended) == len(life.containers):
                self._want_stop(life, "EssentialContainerExited", "Essential container in task exited")

    def _want_stop(self, life: _Life, code: str, reason: str) -> None:
        """Set the desired status, once: the first code and reason stay."""
        self._change(life, desiredStatus="STOPPED", stopCode=code, stoppedReason=reason, stoppingAt=now_iso())
        life.wake.set()

    def _end(self, life: _Life) -> None:
        """Stop what runs (SIGTERM, then SIGKILL after `stopTimeout`), clear up, and only then say STOPPED."""
        ecs_metadata.set_task_status(life.arn, desired_status="STOPPED")
        for container in life.containers.values():
            container.terminate()
        terminated = time.monotonic()
        for definition in life.definition["containerDefinitions"]:
            running = life.containers.get(definition["name"])
            if running is None:
                continue
            # CloudFormation hands a Number parameter on as text
            patience = int(definition.get("stopTimeout") or DEFAULT_STOP_TIMEOUT)
            if not running.exited.wait(max(0.0, terminated + patience - time.monotonic())):
                running.kill()
                running.exited.wait()
        sessions = [container.session for container in life.containers.values()]
        kill_marked(TASK_MARK, life.id, sessions)  # the end of a container's process 1 is the end of all its processes
        for container in life.containers.values():
            container.drain(_DRAIN_SECONDS)
        for token in life.metadata_tokens:
            ecs_metadata.unregister_token(token)
        with self._lock:
            for container_record in life.record["containers"]:
                container_record["lastStatus"] = "STOPPED"
                ended = life.containers.get(container_record["name"])
                container_record["exitCode"] = None if ended is None else ended.exit_code
        shutil.rmtree(life.scratch, ignore_errors=True)
        self._change(life, final=True, lastStatus="DEPROVISIONING", executionStoppedAt=now_iso())
        self._change(life, final=True, lastStatus="STOPPED", stoppedAt=now_iso())

    def _change(self, life: _Life, final: bool = False, **members: Any) -> bool:
        """Write members, count the version, raise the event. A stopping task changes by `final` only."""
        with self._lock:
            if life.record["desiredStatus"] == "STOPPED" and not final:
                return False
            life.record.update(members, updatedAt=now_iso())
            life.record["version"] += 1
            self._events.put(_shown(life.record))
        account, region = _scope(life.arn)
        with request_scope(account, region):
            ecs._recount_cluster(life.record["clusterArn"].rsplit("/", 1)[-1])
        return True

    def _deliver_events(self) -> None:
        """One thread, so that they leave in the order in which they happened (AWS promises no order)."""
        while True:
            detail = self._events.get()
            detail.pop("tags", None)
            account, region = _scope(detail["taskArn"])
            entry = {
                "Source": "aws.ecs",
                "DetailType": "ECS Task State Change",
                "Detail": json.dumps(detail),
                "Resources": [detail["taskArn"]],
            }
            with request_scope(account, region):
                eventbridge._put_events({"Entries": [entry]}, allow_aws_source=True)


def _answered(action: Callable[[Json], Response]) -> Callable[[Json], Response]:
    def answer(data: Json) -> Response:
        try:
            return action(data)
        except _Refused as refused:
            return refused.response

    return answer


def _reply(data: Json) -> Response:
    reply: Response = json_response(data)
    return reply


def _cluster(data: Json) -> Json:
    name = ecs._resolve_cluster_name(data.get("cluster") or "default")
    cluster: Json | None = ecs._clusters.get(name)
    if cluster is None:
        raise _Refused("ClusterNotFoundException", "Cluster not found.")
    return cluster


def _task_definition(data: Json) -> Json:
    definition: Json | None = ecs._task_defs.get(ecs._resolve_td_key(data.get("taskDefinition", "")))
    if definition is None:
        raise _Refused("ClientException", "TaskDefinition not found.")
    if definition.get("status") != "ACTIVE":
        raise _Refused("ClientException", "TaskDefinition is inactive")
    return definition


def _check_run_task(data: Json, definition: Json) -> None:
    """What AWS refuses before it places anything (API_RunTask, API_TaskOverride)."""
    invalid = "InvalidParameterException"
    if not 1 <= data.get("count", 1) <= 10:
        raise _Refused(invalid, "Count must be between 1 and 10.")
    if data.get("launchType") and data.get("capacityProviderStrategy"):
        raise _Refused(invalid, ecs._BOTH_LAUNCH_CHOICES)
    if len(data.get("clientToken", "")) > _MAX_TOKEN:
        raise _Refused(invalid, f"clientToken must be at most {_MAX_TOKEN} characters.")
    if len(data.get("startedBy", "")) > _MAX_STARTED_BY:
        raise _Refused(invalid, f"startedBy must be at most {_MAX_STARTED_BY} characters.")
    if definition["networkMode"] == "awsvpc" and not data.get("networkConfiguration"):
        raise _Refused(invalid, "Network Configuration must be provided when networkMode 'awsvpc' is specified.")
    overrides = data.get("overrides") or {}
    if len(json.dumps(overrides, separators=(",", ":"))) > _MAX_OVERRIDES:
        raise _Refused(invalid, f"Container Overrides length must be at most {_MAX_OVERRIDES}")
    _check_size(overrides, definition)
    names = {container["name"] for container in definition["containerDefinitions"]}
    for override in overrides.get("containerOverrides", []):
        if override.get("name") not in names:
            raise _Refused(
                invalid,
                f"Override for container named {override.get('name')} is not a container in the TaskDefinition.",
            )


def _check_size(overrides: Json, definition: Json) -> None:
    """Fargate's sizes (task-cpu-memory-error.html of the ECS guide), as overridden."""
    if "FARGATE" not in (definition.get("requiresCompatibilities") or ()):
        return
    cpu, memory = (int(overrides.get(name) or definition.get(name) or 0) for name in ("cpu", "memory"))
    if memory not in FARGATE_MEMORY.get(cpu, ()):
        raise _Refused("ClientException", "No Fargate configuration exists for given values.")
    disk = overrides.get("ephemeralStorage", {}).get("sizeInGiB", _LEAST_DISK)
    if not _LEAST_DISK <= disk <= _MOST_DISK:
        raise _Refused("InvalidParameterException", "Ephemeral storage must be 21 to 200 GiB.")


def _request(data: Json) -> str:
    """What must be equal when a client token is repeated; the cluster is the token's scope."""
    return json.dumps({k: v for k, v in data.items() if k not in ("clientToken", "cluster")}, sort_keys=True)


def _container_record(task_arn: str, definition: Json) -> Json:
    spec = parse_arn(task_arn)
    cluster_and_task = spec.resource.removeprefix("task/")
    return {
        "containerArn": (f"arn:aws:ecs:{spec.region}:{spec.account_id}:container/{cluster_and_task}/{new_uuid()}"),
        "taskArn": task_arn,
        "name": definition["name"],
        "image": definition["image"],
        "lastStatus": "PENDING",
        "exitCode": None,
        "reason": None,
        "networkInterfaces": [],
        "cpu": str(definition.get("cpu", 0)),
        "memory": str(definition["memory"]) if definition.get("memory") else None,
    }


def _find(reference: str, cluster: Json) -> Json | None:
    record: Json | None = ecs._tasks.get(_task_arn(reference, cluster))
    return record if record is not None and record["clusterArn"] == cluster["clusterArn"] else None


def _task_arn(reference: str, cluster: Json) -> str:
    if reference.startswith("arn:"):
        return reference
    arn: str = cluster["clusterArn"].replace(":cluster/", ":task/") + f"/{reference}"
    return arn


def _shown(record: Json) -> Json:
    """A copy as the API shows it: without members that have no value."""
    shown: Json = copy.deepcopy(ecs._sanitize(record))
    return shown


def _scope(arn: str) -> tuple[str, str]:
    spec = parse_arn(arn)
    return spec.account_id, spec.region


def _pairs(environment: Sequence[Json] | None) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in environment or ()}


def _secrets(definition: Json) -> dict[str, str]:
    try:
        resolved: dict[str, str] = ecs._resolve_container_secrets(definition)
    except ecs._SecretResolutionError as error:
        raise _CannotStartError(
            "ResourceInitializationError: unable to pull secrets or registry auth: execution resource "
            f"retrieval failed: {error}"
        ) from error
    return resolved
