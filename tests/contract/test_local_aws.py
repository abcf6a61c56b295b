"""What the local AWS promises, tested from outside, lives here; what ministack itself promises does not."""

import io
import json
import re
import signal
import subprocess
import uuid
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx
import psutil
import pytest
from botocore.exceptions import ClientError

from local.aws.containers import Images, ImagesFileError
from local.aws.tokens import TOKEN_LIFETIME, ClientTokens, TokenConflictError
from shared.buckets import Buckets
from shared.wiring import SIGNING
from tests.contract.local_aws import PATIENCE, PYTHON, ROOT, LocalAws, eventually, request, start

STATES = ["PROVISIONING", "PENDING", "RUNNING", "RUNNING", "DEPROVISIONING", "STOPPED"]

FOREVER = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + FOREVER
DETACHED = (
    "import subprocess, sys; child = subprocess.Popen(['sleep', '600'], start_new_session=True); "
    "print('grandchild', child.pid, flush=True); "
)
# Its environment cannot be read, as that of a runner which guards its memory: here because it has none
HIDDEN = (
    "import os, sys; "
    "os.execve(sys.executable, [sys.executable, '-c', 'import os, time; print(\"hidden\", os.getpid(), flush=True); "
    "time.sleep(600)'], {})"
)
CALLER = """
import os
import boto3
from botocore.awsrequest import AWSRequest
from botocore.auth import SigV4Auth
import urllib.request

def handler(event, context):
    if "namespace" in event:  # in the Query form
        body = f"Action=PutMetricData&Version=2010-08-01&Namespace={event['namespace']}"
        body += "&MetricData.member.1.MetricName=m&MetricData.member.1.Value=1"
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        request = AWSRequest("POST", os.environ["AWS_ENDPOINT_URL"] + "/", headers, body.encode())
        SigV4Auth(boto3.Session().get_credentials(), "monitoring", "us-east-1").add_auth(request)
        try:
            made = urllib.request.Request(request.url, request.data, dict(request.headers))
            return urllib.request.urlopen(made).status == 200 and "allowed"
        except urllib.error.HTTPError as error:
            return "AccessDenied" if b"AccessDenied" in error.read() else "failed"
    client = boto3.client(event.get("service", "ecs"))
    try:
        getattr(client, event["call"])(**event["arguments"])
    except client.exceptions.ClientError as error:
        return error.response["Error"]["Code"]
    return "allowed"
"""


@pytest.fixture(scope="session")
def queue(aws: LocalAws) -> str:
    """A queue that receives every ECS task event."""
    sqs, events = aws.client("sqs"), aws.client("events")
    url = str(sqs.create_queue(QueueName="task-events")["QueueUrl"])
    arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    pattern = {"source": ["aws.ecs"], "detail-type": ["ECS Task State Change"]}
    events.put_rule(Name="tasks", EventPattern=json.dumps(pattern))
    events.put_targets(Rule="tasks", Targets=[{"Id": "queue", "Arn": arn}])
    return url


def zipped(source: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("index.py", source)
    return buffer.getvalue()


# --- RunTask's client token ---------------------------------------------------------------------------------


def test_same_token_and_request_is_the_same_task(aws: LocalAws) -> None:
    again = request(aws.define(), FOREVER, clientToken="same", startedBy="w/1/1")
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: aws.ecs.run_task(**again), range(6)))
    assert len({answer["tasks"][0]["taskArn"] for answer in answers}) == 1
    assert len(aws.ecs.list_tasks(cluster="main", startedBy="w/1/1")["taskArns"]) == 1


def test_same_token_for_another_request_conflicts_and_names_the_tasks(aws: LocalAws) -> None:
    definition = aws.define()
    arn = aws.run(FOREVER, definition, clientToken="other")
    with pytest.raises(aws.ecs.exceptions.ConflictException) as refused:
        aws.run(FOREVER, definition, clientToken="other", startedBy="someone-else")
    assert refused.value.response["resourceIds"] == [arn]
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400


def test_a_token_is_its_clusters_own(aws: LocalAws) -> None:
    aws.ecs.create_cluster(clusterName="second")
    definition = aws.define()
    first = aws.run(FOREVER, definition, clientToken="scoped")
    second = aws.run(FOREVER, definition, clientToken="scoped", cluster="second")
    assert first != second


def test_a_token_still_stands_for_its_task_when_that_has_stopped(aws: LocalAws) -> None:
    definition = aws.define()
    arn = aws.run("pass", definition, clientToken="stopped")
    aws.until(arn, "STOPPED")
    assert aws.run("pass", definition, clientToken="stopped") == arn


def test_a_token_is_forgotten_after_24_hours() -> None:
    now = 0.0
    tokens = ClientTokens(lambda: now)
    tokens.remember("cluster", "token", "request", ["arn"])
    now = TOKEN_LIFETIME - 1
    assert tokens.find("cluster", "token", "request") == ("arn",)
    with pytest.raises(TokenConflictError):
        tokens.find("cluster", "token", "other request")
    now = TOKEN_LIFETIME
    assert tokens.find("cluster", "token", "other request") is None


# --- a task's end -------------------------------------------------------------------------------------------


def test_a_clean_end_is_told_state_by_state_with_growing_versions(aws: LocalAws, queue: str) -> None:
    arn = aws.run("pass", startedBy="work/1/1", group="sandboxes")
    details = aws.events(queue, arn)
    assert [detail["lastStatus"] for detail in details] == STATES
    assert [detail["version"] for detail in details] == [1, 2, 3, 4, 5, 6]
    assert [detail["desiredStatus"] for detail in details] == ["RUNNING"] * 3 + ["STOPPED"] * 3
    last = details[-1]
    assert (last["startedBy"], last["group"], last["launchType"]) == ("work/1/1", "sandboxes", "FARGATE")
    assert last["overrides"]["containerOverrides"] == [{"name": "main", "command": ["pass"]}]
    assert (last["stopCode"], last["containers"][0]["exitCode"]) == ("EssentialContainerExited", 0)
    assert last["createdAt"] <= last["startedAt"] <= last["stoppingAt"] <= last["stoppedAt"]
    assert "stopCode" not in details[2]


def test_a_capacity_provider_is_named_in_task_and_event(aws: LocalAws, queue: str) -> None:
    arguments = request(aws.define(), "pass", capacityProviderStrategy=[{"capacityProvider": "FARGATE_SPOT"}])
    del arguments["launchType"]
    arn = aws.ecs.run_task(**arguments)["tasks"][0]["taskArn"]
    assert aws.events(queue, arn)[-1]["capacityProviderName"] == "FARGATE_SPOT"


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [("raise SystemExit(7)", 7), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137)],
)
def test_a_process_that_ends_by_itself_keeps_its_exit_code(aws: LocalAws, code: str, exit_code: int) -> None:
    task = aws.until(aws.run(code), "STOPPED")
    assert task["stopCode"] == "EssentialContainerExited"
    assert task["containers"][0]["exitCode"] == exit_code


def test_stop_is_sigterm_and_keeps_the_callers_reason(aws: LocalAws, queue: str) -> None:
    arn = aws.run(FOREVER)
    aws.until(arn, "RUNNING")
    answer = aws.ecs.stop_task(cluster="main", task=arn, reason="lease lost")["task"]
    assert answer["desiredStatus"] == "STOPPED"
    task = aws.until(arn, "STOPPED")
    assert (task["stopCode"], task["stoppedReason"]) == ("UserInitiated", "lease lost")
    assert task["containers"][0]["exitCode"] == 143
    assert [detail["lastStatus"] for detail in aws.events(queue, arn)] == STATES


def test_stop_is_sigkill_once_stop_timeout_has_passed(aws: LocalAws) -> None:
    logs = aws.client("logs")
    logs.create_log_group(logGroupName="stubborn")
    options = {"awslogs-group": "stubborn", "awslogs-region": "us-east-1", "awslogs-stream-prefix": "p"}
    definition = aws.define(stopTimeout=2, logConfiguration={"logDriver": "awslogs", "options": options})
    arn = aws.run(STUBBORN, definition)
    aws.printed("stubborn", "up")
    aws.ecs.stop_task(cluster="main", task=arn)
    assert aws.task(arn)["lastStatus"] == "RUNNING"  # not STOPPED while its process lives
    assert aws.until(arn, "STOPPED")["containers"][0]["exitCode"] == 137


def test_a_task_stopped_at_once_never_runs_on(aws: LocalAws) -> None:
    arn = aws.run(FOREVER)
    aws.ecs.stop_task(cluster="main", task=arn, reason="first")
    aws.ecs.stop_task(cluster="main", task=arn, reason="second")
    assert aws.until(arn, "STOPPED")["stoppedReason"] == "first"


def test_what_a_container_left_running_ends_with_it(aws: LocalAws) -> None:
    aws.client("logs").create_log_group(logGroupName="leftovers")
    options = {"awslogs-group": "leftovers", "awslogs-region": "us-east-1", "awslogs-stream-prefix": "p"}
    definition = aws.define(logConfiguration={"logDriver": "awslogs", "options": options})
    arn = aws.run(DETACHED, definition)
    pid = int(aws.printed("leftovers", "grandchild").split()[1])
    aws.until(arn, "STOPPED")
    assert not alive(pid)


def test_unknown_image_stops_the_task_with_the_reason(aws: LocalAws, queue: str) -> None:
    task = aws.until(aws.run("pass", aws.define("nowhere/unknown:1")), "STOPPED")
    assert task["stopCode"] == "TaskFailedToStart"
    assert task["stoppedReason"].startswith("CannotPullContainerError: ")
    assert "nowhere/unknown:1" in task["containers"][0]["reason"]
    assert "exitCode" not in task["containers"][0]
    assert aws.events(queue, task["taskArn"])[-1]["stopCode"] == "TaskFailedToStart"


def test_a_program_that_is_missing_stops_the_task_with_the_reason(aws: LocalAws) -> None:
    task = aws.until(aws.run("pass", aws.define("no-such-program")), "STOPPED")
    assert task["stopCode"] == "TaskFailedToStart"
    assert task["stoppedReason"].startswith("CannotStartContainerError: ")


def test_a_missing_log_group_stops_the_task_with_the_reason(aws: LocalAws) -> None:
    options = {"awslogs-group": "missing", "awslogs-region": "us-east-1", "awslogs-stream-prefix": "p"}
    definition = aws.define(logConfiguration={"logDriver": "awslogs", "options": options})
    task = aws.until(aws.run("pass", definition), "STOPPED")
    assert task["stoppedReason"].startswith("ResourceInitializationError: ")


# --- what a container sees, what the API tells --------------------------------------------------------------


def test_a_container_has_its_environment_and_no_credentials(aws: LocalAws) -> None:
    aws.client("logs").create_log_group(logGroupName="environment")
    options = {"awslogs-group": "environment", "awslogs-region": "us-east-1", "awslogs-stream-prefix": "p"}
    definition = aws.define(
        environment=[{"name": "FROM", "value": "definition"}, {"name": "KEPT", "value": "yes"}],
        logConfiguration={"logDriver": "awslogs", "options": options},
    )
    code = (
        "import json, os, urllib.request as web; "
        "task = web.urlopen(os.environ['ECS_CONTAINER_METADATA_URI_V4'] + '/task').read().decode(); "
        "print(json.dumps({'env': dict(os.environ), 'cwd': os.getcwd(), 'task': json.loads(task)}))"
    )
    arguments = request(definition, code)
    container = arguments["overrides"]["containerOverrides"][0]
    container["environment"] = [{"name": "FROM", "value": "override"}]
    arn = aws.ecs.run_task(**arguments)["tasks"][0]["taskArn"]
    seen = json.loads(aws.printed("environment", '"env"'))
    assert (seen["env"]["FROM"], seen["env"]["KEPT"]) == ("override", "yes")
    assert seen["task"]["TaskARN"] == arn
    assert {name for name in seen["env"] if name.startswith(("AWS_", "ANTHROPIC_"))} == {
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_EXECUTION_ENV",
    }
    assert "the-users-own" not in seen["env"].values()
    assert seen["cwd"] == seen["env"]["HOME"]
    aws.until(arn, "STOPPED")
    assert not Path(seen["cwd"]).exists()


def test_describe_tells_missing_tasks_and_refuses_more_than_100(aws: LocalAws) -> None:
    arn = aws.run(FOREVER)
    missing = arn.rsplit("/", 1)[0] + "/" + "0" * 32
    answer = aws.ecs.describe_tasks(cluster="main", tasks=[arn, missing, "1" * 32])
    assert [task["taskArn"] for task in answer["tasks"]] == [arn]
    assert {failure["reason"] for failure in answer["failures"]} == {"MISSING"}
    assert len(aws.ecs.describe_tasks(cluster="main", tasks=["2" * 32] * 100)["failures"]) == 100
    with pytest.raises(aws.ecs.exceptions.InvalidParameterException):
        aws.ecs.describe_tasks(cluster="main", tasks=["2" * 32] * 101)


def test_list_finds_by_started_by_and_desired_status(aws: LocalAws) -> None:
    mine, other = aws.run(FOREVER, startedBy="list/1"), aws.run(FOREVER, startedBy="list/2")
    aws.ecs.stop_task(cluster="main", task=other)
    assert aws.ecs.list_tasks(cluster="main", startedBy="list/1")["taskArns"] == [mine]
    assert aws.ecs.list_tasks(cluster="main", startedBy="list/2")["taskArns"] == []
    stopped = aws.ecs.list_tasks(cluster="main", startedBy="list/2", desiredStatus="STOPPED")
    assert stopped["taskArns"] == [other]


@pytest.mark.parametrize(
    ("members", "code"),
    [
        ({"cluster": "none"}, "ClusterNotFoundException"),
        ({"taskDefinition": "none"}, "ClientException"),
        ({"networkConfiguration": {}}, "InvalidParameterException"),
        ({"clientToken": "t" * 65}, "InvalidParameterException"),
        ({"startedBy": "s" * 129}, "InvalidParameterException"),
        ({"overrides": {"containerOverrides": [{"name": "other"}]}}, "InvalidParameterException"),
    ],
)
def test_run_task_refuses_what_aws_refuses(aws: LocalAws, members: dict[str, Any], code: str) -> None:
    arguments = {**request(aws.define(), "pass"), **members}
    with pytest.raises(ClientError) as refused:
        aws.ecs.run_task(**arguments)
    assert refused.value.response["Error"]["Code"] == code


@pytest.mark.parametrize(
    ("members", "code", "said"),
    [
        ({"interactive": False}, "InvalidParameterException", "Interactive"),
        ({"container": "other"}, "InvalidParameterException", "container"),
        ({"task": "0" * 32}, "InvalidParameterException", "not found"),
        ({"cluster": "none"}, "ClusterNotFoundException", "Cluster"),
        ({}, "TargetNotConnectedException", "internal error"),  # asked for as AWS wants it, but no agent runs here
    ],
)
def test_execute_command_refuses_what_aws_refuses(aws: LocalAws, members: dict[str, Any], code: str, said: str) -> None:
    arn = aws.run(FOREVER, enableExecuteCommand=True)
    aws.until(arn, "RUNNING")
    asked = {"cluster": "main", "task": arn, "container": "main", "command": "/bin/sh", "interactive": True}
    with pytest.raises(ClientError, match=said) as refused:
        aws.ecs.execute_command(**{**asked, **members})
    assert refused.value.response["Error"]["Code"] == code


def test_a_task_that_was_started_without_ecs_exec_cannot_be_entered(aws: LocalAws) -> None:
    arn = aws.run(FOREVER)
    aws.until(arn, "RUNNING")
    with pytest.raises(ClientError, match="was not enabled when the task was run"):
        aws.ecs.execute_command(cluster="main", task=arn, command="/bin/sh", interactive=True)


# --- who may call -------------------------------------------------------------------------------------------

PREFIX = "arn:aws:ecs:us-east-1:000000000000:"
TABLE = "arn:aws:dynamodb:us-east-1:000000000000:table/"
OURS = {"ArnEquals": {"ecs:cluster": f"{PREFIX}cluster/main"}}
THEIRS = {"ArnEquals": {"ecs:cluster": f"{PREFIX}cluster/other"}}
FLEET = {"StringEquals": {"aws:ResourceTag/part": "fleet"}}
TAGGED: dict[str, Any] = {"tags": [{"key": "part", "value": "fleet"}]}
PASSED = {"StringEquals": {"iam:PassedToService": "ecs-tasks.amazonaws.com"}}
NAMESPACE = {"StringEquals": {"cloudwatch:namespace": "Fleet"}}


class Caller:
    """A Lambda function, and what its role allows it."""

    def __init__(self, aws: LocalAws) -> None:
        self.aws = aws
        self._iam, self._lambda = aws.client("iam"), aws.client("lambda")
        self.execution_role = self._role("execution", "ecs-tasks.amazonaws.com")
        self.definition = aws.define(executionRoleArn=self.execution_role, **TAGGED)
        self.tasks = [aws.run(FOREVER, self.definition, **TAGGED), aws.run(FOREVER, self.definition)]
        role = self._role("caller", "lambda.amazonaws.com")
        self._lambda.create_function(
            FunctionName="caller",
            Runtime="python3.13",
            Handler="index.handler",
            Role=role,
            Code={"ZipFile": zipped(CALLER)},
            Timeout=20,
        )

    def _role(self, name: str, service: str) -> str:
        statement = {"Effect": "Allow", "Principal": {"Service": service}, "Action": "sts:AssumeRole"}
        trust = {"Version": "2012-10-17", "Statement": [statement]}
        role = self._iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(trust))
        return str(role["Role"]["Arn"])

    def answer(self, allowed: Sequence[tuple[str, str, dict[str, Any]]], event: dict[str, Any]) -> str:
        """What the function is answered when its role allows just this."""
        statements = [
            {"Effect": "Allow", "Action": action, "Resource": self._filled(on), "Condition": condition}
            for action, on, condition in allowed
        ]
        document = {"Version": "2012-10-17", "Statement": statements or [NOTHING]}
        self._iam.put_role_policy(RoleName="caller", PolicyName="p", PolicyDocument=json.dumps(document))
        answer = self._lambda.invoke(FunctionName="caller", Payload=json.dumps(event))
        return str(json.loads(answer["Payload"].read()))

    def _filled(self, resource: str) -> str:
        values = {"definition": self.definition, "first": self.tasks[0], "second": self.tasks[1]}
        return resource.format(**values, execution_role=self.execution_role)

    def event(self, call: str) -> dict[str, Any]:
        """The function's event for a call named in the table below."""
        run = request(self.definition, "pass")
        events: dict[str, dict[str, Any]] = {
            "run": {"call": "run_task", "arguments": run},
            "run tagged": {"call": "run_task", "arguments": {**run, **TAGGED}},
            "stop": {"call": "stop_task", "arguments": {"cluster": "main", "task": self.tasks[0]}},
            "stop untagged": {"call": "stop_task", "arguments": {"cluster": "main", "task": self.tasks[1]}},
            "describe both": {
                "call": "describe_tasks",
                "arguments": {"cluster": "main", "tasks": self.tasks},
            },
            "list": {"call": "list_tasks", "arguments": {"cluster": "main", "startedBy": "x"}},
            "write": {"service": "dynamodb", "call": "batch_execute_statement", "arguments": {"Statements": WRITES}},
            "measure": {"namespace": "Fleet"},
            "measure elsewhere": {"namespace": "Other"},
        }
        return events[call]


WRITES = [{"Statement": f'UPDATE "{name}" SET a = 1 WHERE pk = 1'} for name in ("one", "two")]
WRITES.append({"Statement": "INSERT INTO \"one\" VALUE {'pk': 1}"})
UPDATE_ONE, UPDATE_TWO = (("dynamodb:PartiQLUpdate", f"{TABLE}{name}", dict[str, Any]()) for name in ("one", "two"))
INSERT_ONE: tuple[str, str, dict[str, Any]] = ("dynamodb:PartiQLInsert", f"{TABLE}one", {})
NOTHING: dict[str, Any] = {"Effect": "Allow", "Action": "sts:GetCallerIdentity", "Resource": "*"}
RUN = ("ecs:RunTask", "{definition}", OURS)
PASS = ("iam:PassRole", "{execution_role}", PASSED)
TAG = ("ecs:TagResource", f"{PREFIX}task/main/*", {"StringEquals": {"ecs:CreateAction": "RunTask"}})


@pytest.fixture(scope="session")
def caller(aws: LocalAws) -> Caller:
    return Caller(aws)


@pytest.mark.parametrize(
    ("call", "allowed", "passes"),
    [
        ("run", [RUN, PASS], True),
        ("run", [PASS], False),
        ("run", [RUN], False),
        ("run", [("ecs:RunTask", f"{PREFIX}task-definition/another:*", {}), PASS], False),
        ("run", [("ecs:RunTask", f"{PREFIX}cluster/main", {}), PASS], False),
        ("run", [("ecs:RunTask", "{definition}", THEIRS), PASS], False),
        ("run", [("ecs:RunTask", "{definition}", FLEET), PASS], True),
        ("run tagged", [RUN, PASS, TAG], True),
        ("run tagged", [RUN, PASS], False),
        (
            "run tagged",
            [("ecs:RunTask", "*", {"StringEquals": {"aws:RequestTag/part": "x"}}), PASS, TAG],
            False,
        ),
        ("stop", [("ecs:StopTask", f"{PREFIX}task/main/*", OURS)], True),
        ("stop", [("ecs:StopTask", f"{PREFIX}cluster/main", {})], False),
        ("stop", [("ecs:StopTask", "*", THEIRS)], False),
        ("stop", [("ecs:StopTask", "*", FLEET)], True),
        ("stop untagged", [("ecs:StopTask", "*", FLEET)], False),
        ("describe both", [("ecs:DescribeTasks", f"{PREFIX}task/main/*", OURS)], True),
        ("describe both", [("ecs:DescribeTasks", "{first}", {})], False),
        ("describe both", [("ecs:DescribeTasks", "{second}", {})], False),
        ("list", [("ecs:ListTasks", "*", OURS)], True),
        ("list", [("ecs:ListTasks", f"{PREFIX}container-instance/main/*", {})], True),
        ("list", [("ecs:ListTasks", "*", THEIRS)], False),
        ("list", [("ecs:ListTasks", f"{PREFIX}cluster/main", {})], False),
        ("write", [UPDATE_ONE, UPDATE_TWO, INSERT_ONE], True),
        ("write", [UPDATE_ONE, UPDATE_TWO], False),
        ("write", [UPDATE_ONE, INSERT_ONE], False),
        ("write", [("dynamodb:PutItem", "*", {}), ("dynamodb:BatchExecuteStatement", "*", {})], False),
        ("measure", [("cloudwatch:PutMetricData", "*", NAMESPACE)], True),
        ("measure elsewhere", [("cloudwatch:PutMetricData", "*", NAMESPACE)], False),
    ],
)
def test_a_functions_role_decides_what_it_may_do(
    caller: Caller, call: str, allowed: list[tuple[str, str, dict[str, Any]]], passes: bool
) -> None:
    expected = {"allowed"} if passes else {"AccessDenied", "AccessDeniedException"}
    assert caller.answer(allowed, caller.event(call)) in expected


# --- Lambda, function URLs, schedules -----------------------------------------------------------------------


def test_a_function_url_of_a_stack_is_callable_and_speaks_payload_v2(aws: LocalAws) -> None:
    source = (
        "import json\n"
        "def handler(event, context):\n"
        "    return {'statusCode': 418, 'headers': {'x-mine': 'yes'}, 'body': json.dumps(event)}\n"
    )
    trust = {"Effect": "Allow", "Principal": {"Service": "lambda.amazonaws.com"}, "Action": "sts:AssumeRole"}
    function = {
        "Runtime": "python3.13",
        "Handler": "index.handler",
        "Role": {"Fn::GetAtt": ["Role", "Arn"]},
        "Code": {"ZipFile": source},
    }
    template = {
        "Resources": {
            "Role": {
                "Type": "AWS::IAM::Role",
                "Properties": {"AssumeRolePolicyDocument": {"Version": "2012-10-17", "Statement": [trust]}},
            },
            "Function": {"Type": "AWS::Lambda::Function", "Properties": function},
            "Url": {
                "Type": "AWS::Lambda::Url",
                "Properties": {"TargetFunctionArn": {"Ref": "Function"}, "AuthType": "NONE"},
            },
        },
        "Outputs": {"Url": {"Value": {"Fn::GetAtt": ["Url", "FunctionUrl"]}}},
    }
    stacks = aws.client("cloudformation")
    stacks.create_stack(StackName="url", TemplateBody=json.dumps(template), Capabilities=["CAPABILITY_NAMED_IAM"])

    def outputs() -> list[dict[str, str]] | None:
        stack = stacks.describe_stacks(StackName="url")["Stacks"][0]
        return stack["Outputs"] if stack["StackStatus"] == "CREATE_COMPLETE" else None

    url = eventually(outputs)[0]["OutputValue"]
    assert url.startswith(f"{aws.endpoint}/")
    assert url.endswith("/")
    headers = {"authorization": "Bearer t"}
    reply = httpx.post(f"{url}turn-ended?a=1", json={"x": 1}, headers=headers, timeout=PATIENCE)
    assert (reply.status_code, reply.headers["x-mine"]) == (418, "yes")
    event = reply.json()
    assert (event["version"], event["rawPath"], event["rawQueryString"]) == ("2.0", "/turn-ended", "a=1")
    assert event["requestContext"]["http"]["method"] == "POST"
    assert event["headers"]["authorization"] == "Bearer t"
    assert (json.loads(event["body"]), event["isBase64Encoded"]) == ({"x": 1}, False)
    binary = httpx.put(url, content=b"\xff", headers={"content-type": "application/octet-stream"}).json()
    assert (binary["body"], binary["isBase64Encoded"], binary["rawPath"]) == ("/w==", True, "/")


def test_a_signed_upload_is_good_for_its_key_its_length_and_its_time(
    aws: LocalAws, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the outputs of sandboxes rest on (shared/buckets.py); ministack enforces it as S3 does."""
    s3, bucket = aws.client("s3"), f"uploads-{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=bucket)
    signer = Buckets(aws.client("s3", SIGNING))

    def upload(content: bytes, **changed: str) -> tuple[int, str]:
        post = signer.presign_post(bucket, "fleet/sesn_1/files/a", 3, 3)
        answer = httpx.post(post.url, data=post.fields | changed, files={"file": content})
        return answer.status_code, (re.findall("<Code>(.*)</Code>", answer.text) or [""])[0]

    assert upload(b"123") == (204, "")
    assert s3.get_object(Bucket=bucket, Key="fleet/sesn_1/files/a")["Body"].read() == b"123"
    assert upload(b"1234") == (400, "EntityTooLarge")
    assert upload(b"12") == (400, "EntityTooSmall")
    assert upload(b"123", key="fleet/sesn_2/files/a") == (403, "AccessDenied")
    assert upload(b"123", **{"Content-Type": "text/html"}) == (403, "AccessDenied")
    assert upload(b"123", **{"x-amz-signature": "0" * 64}) == (403, "SignatureDoesNotMatch")
    monkeypatch.setattr("shared.buckets.POST_SECONDS", -1)
    assert upload(b"123") == (403, "AccessDenied")


def test_an_exceptions_class_is_the_error_type(aws: LocalAws, caller: Caller) -> None:
    source = "class LeaseLost(Exception): pass\ndef handler(event, context): raise LeaseLost('w: gone\\nfor good')\n"
    functions = aws.client("lambda")
    functions.create_function(
        FunctionName="raises",
        Runtime="python3.13",
        Handler="index.handler",
        Role=caller.execution_role,
        Code={"ZipFile": zipped(source)},
    )
    answer = functions.invoke(FunctionName="raises", Payload="{}")
    payload = json.loads(answer["Payload"].read())
    assert (payload["errorType"], payload["errorMessage"]) == ("LeaseLost", "w: gone\nfor good")


def test_an_event_invocation_of_a_state_machine_is_not_waited_for(aws: LocalAws, caller: Caller) -> None:
    source = "import time\ndef handler(event, context): time.sleep(event['seconds']); print('slept'); return event\n"
    functions, loops = aws.client("lambda"), aws.client("stepfunctions")
    function = functions.create_function(
        FunctionName="sleeps",
        Runtime="python3.13",
        Handler="index.handler",
        Role=caller.execution_role,
        Code={"ZipFile": zipped(source)},
        Timeout=120,
    )
    parameters = {
        "FunctionName": function["FunctionArn"],
        "InvocationType": "Event",
        "Payload": {"seconds.$": "$.seconds"},
    }
    state = {"Type": "Task", "Resource": "arn:aws:states:::lambda:invoke", "Parameters": parameters, "End": True}
    machine = loops.create_state_machine(
        name="starts",
        definition=json.dumps({"StartAt": "Start", "States": {"Start": state}}),
        roleArn=caller.execution_role,
    )["stateMachineArn"]

    def ended(seconds: float) -> dict[str, Any]:
        execution = loops.start_execution(stateMachineArn=machine, input=json.dumps({"seconds": seconds}))

        def described() -> dict[str, Any] | None:
            found = loops.describe_execution(executionArn=execution["executionArn"])
            return cast(dict[str, Any], found) if found["status"] != "RUNNING" else None

        return eventually(described)

    assert json.loads(ended(100)["output"])["StatusCode"] == 202, "it did not wait the 100 s"


def test_workers_share_one_unpacked_package(aws: LocalAws, caller: Caller) -> None:
    functions = aws.client("lambda")
    source = "import os\ndef handler(event, context): return os.path.realpath(os.path.dirname(__file__))\n"
    for name in ("one", "two"):
        functions.create_function(
            FunctionName=name,
            Runtime="python3.13",
            Handler="index.handler",
            Role=caller.execution_role,
            Code={"ZipFile": zipped(source)},
        )
    places = [json.loads(functions.invoke(FunctionName=name)["Payload"].read()) for name in ("one", "two")]
    assert len(set(places)) == 1


def test_a_rate_is_scaled(aws: LocalAws) -> None:
    sqs, events = aws.client("sqs"), aws.client("events")
    url = sqs.create_queue(QueueName="ticks")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    events.put_rule(Name="tick", ScheduleExpression="rate(1 minute)")
    events.put_targets(Rule="tick", Targets=[{"Id": "queue", "Arn": arn}])

    def tick() -> dict[str, Any] | None:
        found = sqs.receive_message(QueueUrl=url).get("Messages")
        return cast(dict[str, Any], json.loads(found[0]["Body"])) if found else None

    assert eventually(tick)["detail-type"] == "Scheduled Event"
    events.delete_rule(Name="tick", Force=True)


# --- its own life -------------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _close_stdin(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.close()


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda process: process.kill(), id="SIGKILL"),
        pytest.param(lambda process: process.terminate(), id="SIGTERM"),
        pytest.param(lambda process: process.send_signal(signal.SIGINT), id="SIGINT"),
        pytest.param(_close_stdin, id="end of its parent"),
    ],
)
def test_nothing_it_started_outlives_it(tmp_path: Path, end: Callable[["subprocess.Popen[str]"], None]) -> None:
    state = tmp_path / "state"
    aws = start(tmp_path, "--state-dir", str(state))
    aws.client("logs").create_log_group(logGroupName="g")
    options = {"awslogs-group": "g", "awslogs-region": "us-east-1", "awslogs-stream-prefix": "p"}
    definition = aws.define(logConfiguration={"logDriver": "awslogs", "options": options})
    aws.run(DETACHED + FOREVER, definition)
    aws.run(HIDDEN, definition)
    grandchild, hidden = (int(aws.printed("g", word).split()[1]) for word in ("grandchild", "hidden"))
    Caller(aws).answer([], {"call": "list_clusters", "arguments": {}})  # a warm worker
    children = [child.pid for child in psutil.Process(aws.process.pid).children(recursive=True)]
    assert {grandchild, hidden} <= set(children)
    assert any("_worker.py" in " ".join(psutil.Process(pid).cmdline()) for pid in children)
    end(aws.process)
    aws.process.wait(PATIENCE)
    eventually(lambda: None if any(alive(pid) for pid in children) else True)
    eventually(lambda: None if (state / "tasks").exists() or (state / "tmp").exists() else True)


def test_a_port_in_use_is_one_clear_line(aws: LocalAws) -> None:
    port = aws.endpoint.rsplit(":", 1)[1]
    ended = subprocess.run(
        [PYTHON, "-m", "local.aws", "--port", port],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read the images file"),
        ("{", "is not JSON"),
        ("[]", "must hold an object"),
        ('{"a": "sh"}', "image 'a'"),
        ('{"a": {"argv": []}}', "image 'a'"),
    ],
)
def test_an_unusable_images_file_is_one_clear_line(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "images.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ImagesFileError, match=said) as refused:
        Images.from_file(path)
    assert "\n" not in str(refused.value)


def test_an_image_is_found_by_repository_whatever_its_tag(tmp_path: Path) -> None:
    path = tmp_path / "images.json"
    path.write_text('{"sandbox": ["run"], "host:5000/team/other": {"argv": ["o"], "env": {"A": "1"}, "cwd": "/x"}}')
    images = Images.from_file(path)
    for reference in ("sandbox", "sandbox:1", "1.dkr.ecr.example/fleet/sandbox:v2", "r/sandbox@sha256:00"):
        image = images.find(reference)
        assert image is not None
        assert image.argv == ("run",)
    other = images.find("host:5000/team/other:3")
    assert other is not None
    assert (other.env, other.cwd) == ({"A": "1"}, "/x")
    assert images.find("host:5000/else:1") is None
