"""Small corrections of ministack live here, one function each; ECS is in ecs.py, IAM in iam.py.

Each docstring says what AWS does and what ministack 1.5.33 does.
"""

import hashlib
import json
import os
import re
import threading
import time
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from ministack import app
from ministack.core import lambda_runtime
from ministack.services import codebuild, ecr, eventbridge, lambda_svc, scheduler, stepfunctions
from ministack.services.cloudformation import provisioners

from local.aws.recorded import RECORDED_ONLY

_TICK_SECONDS = 0.2
_TRACEBACK = "Traceback (most recent call last):"
_EXCEPTION_LINE = re.compile(r"([A-Za-z_][\w.]*)(?::|$)")


def exception_names() -> None:
    """AWS puts the class name of the exception into `errorType`; ministack says Runtime.HandlerError for all.

    Step Functions' Retry and Catch match on that name.
    """
    invoke: Callable[[dict[str, Any], Any, str], dict[str, Any]] = lambda_svc._execute_function_warm

    def named(function: dict[str, Any], event: Any, request_id: str) -> dict[str, Any]:
        result = invoke(function, event, request_id)
        body, log = result.get("body"), result.get("log") or ""
        if not (result.get("error") and isinstance(body, dict) and _TRACEBACK in log):
            return result
        if body.get("errorType") == "Runtime.HandlerError":
            lines = log.rsplit(_TRACEBACK, 1)[1].splitlines()
            names = (match[1] for line in lines if (match := _EXCEPTION_LINE.match(line)))
            body["errorType"] = next(names, "Runtime.HandlerError").rsplit(".", 1)[-1]
            body["stackTrace"] = [line for line in lines if line.startswith("  ")]
        return result

    lambda_svc._execute_function_warm = named


def schedules(time_scale: float) -> None:
    """AWS fires a `rate()` schedule within its minute; ministack looks every 10 s.

    Here it looks every 0.2 s, and the rates of EventBridge rules and Scheduler are multiplied by `time_scale`
    (`cron()` and `at()` are not).
    """
    eventbridge._SCHEDULER_TICK_INTERVAL = scheduler._SCHEDULE_TICK_INTERVAL = _TICK_SECONDS
    seconds: Callable[[str], int | None] = eventbridge._parse_rate_seconds

    def scaled(expression: str) -> float | None:
        interval = seconds(expression)
        return None if interval is None else interval * time_scale

    eventbridge._parse_rate_seconds = scaled


def callable_function_urls(endpoint: str) -> None:
    """`Fn::GetAtt Url.FunctionUrl` is an address that answers; ministack gives AWS's, which does not here.

    The attribute becomes `<endpoint>/_aws/lambda-url/<id>/`, under which ministack serves the function.
    GetFunctionUrlConfig still tells the AWS-shaped address.
    """
    attributes: Callable[[dict[str, str]], dict[str, str]] = provisioners._lambda_url_attributes

    def local(config: dict[str, str]) -> dict[str, str]:
        url_id = lambda_svc._function_url_id(config["FunctionUrl"])
        return attributes(config) | {"FunctionUrl": f"{endpoint}/_aws/lambda-url/{url_id}/"}

    provisioners._lambda_url_attributes = local


def as_if_over_tls() -> None:
    """Requests count as sent over TLS, which the local AWS does not speak: a policy that asks for it lets them pass."""
    pin = app.pin_request_origin
    app.pin_request_origin = lambda source_ip, _: pin(source_ip, True)


def yaml_definitions() -> None:
    """CloudFormation takes a state machine's definition as JSON or YAML; ministack runs JSON only."""
    definition: Callable[[dict[str, Any]], str] = provisioners._sfn_definition

    def as_json(properties: dict[str, Any]) -> str:
        return json.dumps(yaml.safe_load(definition(properties)))

    provisioners._sfn_definition = as_json


def recorded_only_types() -> None:
    """CloudFormation creates every type of a template; ministack refuses those it lacks.

    Here the types of recorded.py get an id and stand in the stack; nothing is created.
    """
    for resource_type, (prefix, attributes) in RECORDED_ONLY.items():
        if resource_type in provisioners._RESOURCE_HANDLERS:
            raise RuntimeError(f"ministack creates {resource_type} now: remove it from local/aws/recorded.py")

        def create(*_: Any, prefix: str = prefix, attributes: tuple[str, ...] = attributes) -> tuple[str, Any]:
            made_up = prefix + uuid.uuid4().hex[:17]
            return made_up, dict.fromkeys(attributes, made_up)

        provisioners._RESOURCE_HANDLERS[resource_type] = {"create": create, "delete": lambda *_: None}


def builds_push_an_image() -> None:
    """A CodeBuild build runs its commands; ministack's does nothing and succeeds.

    Here a build that is given REPOSITORY and IMAGE_TAG leaves an image of that tag in that repository.
    """
    start: Callable[[dict[str, Any]], Any] = codebuild._start_build

    def pushing(data: dict[str, Any]) -> Any:
        reply = start(data)
        given = {entry["name"]: entry["value"] for entry in data.get("environmentVariablesOverride", [])}
        if reply[0] == 200 and {"REPOSITORY", "IMAGE_TAG"} <= given.keys():
            manifest = json.dumps({"schemaVersion": 2, "tag": given["IMAGE_TAG"]})
            pushed = {"repositoryName": given["REPOSITORY"], "imageTag": given["IMAGE_TAG"], "imageManifest": manifest}
            ecr._put_image(pushed)
        return reply

    codebuild._start_build = pushing


def asynchronous_invocations() -> None:
    """Step Functions' `lambda:invoke` starts an `Event` invocation and goes on; ministack waits for its result."""
    invoke: Callable[[str, Any], Any] = stepfunctions._invoke_resource

    def by_type(resource: str, parameters: Any) -> Any:
        if resource != "arn:aws:states:::lambda:invoke" or parameters.get("InvocationType") != "Event":
            return invoke(resource, parameters)
        function, config, name = lambda_svc._get_func_record_for_ref(parameters["FunctionName"])
        if not function or not config:
            raise stepfunctions._ExecutionError("Lambda.ResourceNotFoundException", f"Function not found: {name}")
        execution = lambda_svc._execution_record_for_config(function, config)
        lambda_svc.invoke_async_with_retry(execution, parameters.get("Payload", {}))
        return {"StatusCode": 202, "Payload": ""}

    stepfunctions._invoke_resource = by_type


def packages_unpacked_once(folder: Path) -> None:
    """AWS mounts a function's code and layers read-only; ministack unpacks them anew for each worker.

    Here each archive is unpacked once, into `folder`, and every worker's directory is a link to it: starting
    workers was four fifths of this process's time.
    """
    unpacking = threading.Lock()

    class Once(zipfile.ZipFile):
        def extractall(self, path: Any = None, *_: Any, **__: Any) -> None:
            with open(str(self.filename), "rb") as archive:
                unpacked = folder / hashlib.file_digest(archive, "sha256").hexdigest()
            with unpacking:
                if not unpacked.exists():
                    partial = unpacked.with_suffix(".partial")
                    super().extractall(partial)
                    partial.rename(unpacked)
            Path(path).rmdir()  # made empty for this worker
            os.symlink(unpacked, path, target_is_directory=True)

    lambda_runtime.zipfile = SimpleNamespace(**vars(zipfile) | {"ZipFile": Once})


def few_workers(at_once: int) -> None:
    """AWS starts a worker for each call that finds none free; so does ministack, and a burst chokes a small machine.

    Here a call waits for one of `at_once` workers of its function. A function that called itself would wait for ever.
    """
    acquire = lambda_svc.acquire_worker

    def waiting(*args: Any, **kwargs: Any) -> tuple[Any, str]:
        while True:
            worker, how = acquire(*args, **kwargs | {"max_concurrency": at_once})
            if worker is not None:
                return worker, how
            time.sleep(_TICK_SECONDS / 10)

    lambda_svc.acquire_worker = waiting
