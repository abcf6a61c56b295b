"""moto's ASL interpreter in process: Task states call Python handlers, waits take no time. Holds no test."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import botocore.session
import pytest
import yaml
from moto.awslambda_simple.models import LambdaSimpleBackend
from moto.core.exceptions import JsonRESTError
from moto.stepfunctions.parser.asl.component.common.retry import retrier_decl
from moto.stepfunctions.parser.asl.component.state.exec.state_task.service import state_task_service_lambda
from moto.stepfunctions.parser.asl.component.state.exec.state_task.service.state_task_service import StateTaskService
from moto.stepfunctions.parser.asl.component.state.wait.wait_function.wait_function import WaitFunction

if TYPE_CHECKING:
    from types_boto3_stepfunctions import SFNClient

REGION = "us-east-1"
ACCOUNT = "123456789012"
MOTO_CONFIG: Any = {"stepfunctions": {"execute_state_machine": True}, "lambda": {"use_docker": False}}
_DEADLINE_SECONDS = 60.0

Handler = Callable[[dict[str, Any]], Any]


class NotInvoked(JsonRESTError):
    """Raised by a handler: Lambda itself refuses the invocation."""

    def __init__(self) -> None:
        super().__init__("ServiceException", "not invoked")


def lambda_arn(name: str) -> str:
    return f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:{name}"


def state_machine_arn(name: str) -> str:
    return f"arn:aws:states:{REGION}:{ACCOUNT}:stateMachine:{name}"


def load(path: Path, substitutions: dict[str, str]) -> dict[str, Any]:
    """The definition as SAM deploys it: parsed, with `${Name}` replaced."""
    text = path.read_text()
    for name, value in substitutions.items():
        text = text.replace("${" + name + "}", value)
    definition: dict[str, Any] = yaml.safe_load(text)
    return definition


@dataclass
class Asl:
    """A Step Functions of the test's own; use it within `mock_aws(config=MOTO_CONFIG)`."""

    client: "SFNClient"
    waits: list[float]

    def create(self, name: str, definition: dict[str, Any]) -> str:
        role = f"arn:aws:iam::{ACCOUNT}:role/any"
        created = self.client.create_state_machine(name=name, definition=json.dumps(definition), roleArn=role)
        return created["stateMachineArn"]

    def run(self, arn: str, name: str, state: dict[str, Any]) -> str:
        """Starts an execution and returns its final status."""
        self.client.start_execution(stateMachineArn=arn, name=name, input=json.dumps(state))
        return self.ended(arn, name)

    def ended(self, arn: str, name: str) -> str:
        """Its status once it runs no more: threads that outlive the mock would call the real AWS."""
        deadline = time.monotonic() + _DEADLINE_SECONDS
        execution = execution_arn(arn, name)
        while (status := self.client.describe_execution(executionArn=execution)["status"]) == "RUNNING":
            if time.monotonic() > deadline:
                self.client.stop_execution(executionArn=execution)
                raise AssertionError(f"{name} still ran after {_DEADLINE_SECONDS} s")
            time.sleep(0.005)
        return str(status)

    def input_of(self, arn: str, name: str) -> dict[str, Any]:
        described = self.client.describe_execution(executionArn=execution_arn(arn, name))
        parsed: dict[str, Any] = json.loads(described["input"])
        return parsed

    def names(self, arn: str) -> set[str]:
        return {e["name"] for e in self.client.list_executions(stateMachineArn=arn)["executions"]}

    def events(self, arn: str, name: str) -> list[str]:
        """The types of its history's events."""
        pages = self.client.get_paginator("get_execution_history").paginate(executionArn=execution_arn(arn, name))
        return [event["type"] for page in pages for event in page["events"]]


def execution_arn(arn: str, name: str) -> str:
    return f"{arn.replace(':stateMachine:', ':execution:')}:{name}"


def install(monkeypatch: pytest.MonkeyPatch, handlers: dict[str, Handler]) -> Asl:
    """Patches the interpreter for one test; `handlers` go by function name."""
    waits: list[float] = []

    def invoke(
        _self: Any, function_name: str, _qualifier: Any, body: Any, headers: Any, response_headers: dict[str, str]
    ) -> bytes:
        asynchronous = headers.get("X-Amz-Invocation-Type") == "Event"
        try:
            answer = handlers[function_name.rsplit(":", 1)[-1]](json.loads(body or "{}"))
        except NotInvoked:
            raise
        except Exception as error:  # noqa: BLE001  Lambda reports any error of a handler in this shape
            if not asynchronous:
                response_headers["x-amz-function-error"] = "Unhandled"
            answer = {"errorMessage": str(error), "errorType": type(error).__name__}
        return json.dumps("" if asynchronous else answer).encode()

    def wait_interval(_self: Any, env: Any, wait_seconds: float) -> None:
        waits.append(wait_seconds)

    class NoSleep:
        """Retriers sleep through their module's `time`."""

        @staticmethod
        def sleep(_seconds: float) -> None: ...

        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

    monkeypatch.setattr(LambdaSimpleBackend, "invoke", invoke)
    monkeypatch.setitem(  # AWS takes it, moto 5.2.5 drops it
        state_task_service_lambda._SUPPORTED_API_PARAM_BINDINGS,
        "invoke",
        {"FunctionName", "InvocationType", "Payload"},
    )
    monkeypatch.setattr(WaitFunction, "_wait_interval", wait_interval)
    monkeypatch.setattr(retrier_decl, "time", NoSleep())
    _mend_service_stubs(monkeypatch)
    return Asl(boto3.client("stepfunctions", region_name=REGION), waits)


def _mend_service_stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """moto 5.2.5 leaves the casing of service integrations' parameters as it is; boto3's differs."""
    session = botocore.session.get_session()

    def shapes(task: Any, service: str | None, action: str | None) -> Any:
        model = session.get_service_model(task._get_boto_service_name(service))
        wanted = task._get_boto_service_action(action).replace("_", "").lower()
        return next((model.operation_model(n) for n in model.operation_names if n.lower() == wanted), None)

    def parameters(
        self: Any, parameters: Any, boto_service_name: str | None = None, service_action_name: str | None = None
    ) -> None:
        operation = shapes(self, boto_service_name, service_action_name)
        if operation is not None and operation.input_shape is not None:
            self._to_boto_request(parameters, operation.input_shape)

    def response(
        self: Any, response: Any, boto_service_name: str | None = None, service_action_name: str | None = None
    ) -> None:
        operation = shapes(self, boto_service_name, service_action_name)
        if operation is not None and operation.output_shape is not None:
            self._from_boto_response(response, operation.output_shape)

    monkeypatch.setattr(StateTaskService, "_normalise_parameters", parameters)
    monkeypatch.setattr(StateTaskService, "_normalise_response", response)
