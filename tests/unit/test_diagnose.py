"""Every known word of ECS about a task that stopped or did not start, as tables; no AWS here."""

from typing import Any

import pytest

from shared.diagnose import Diagnosis, Kind, LaunchProblem, classify_failure, classify_launch_error, diagnose

EXITED = "Essential container in task exited"
ECR = "111122223333.dkr.ecr.us-east-1.amazonaws.com/sandbox:1"
SUBNET_FULL = (
    "Unexpected EC2 error while attempting to Create Network Interface with public IP assignment enabled in "
    "subnet 'subnet-1': InsufficientFreeAddressesInSubnet"
)


def stopped(
    stop_code: str | None,
    reason: str | None,
    exit_code: int | None = None,
    container_reason: str | None = None,
    **task: Any,
) -> Diagnosis:
    container = {"name": "sandbox", "exitCode": exit_code, "reason": container_reason}
    described: dict[str, Any] = {
        "stopCode": stop_code,
        "stoppedReason": reason,
        "containers": [container],
        **task,
    }
    return diagnose({key: value for key, value in described.items() if value is not None})


@pytest.mark.parametrize(
    ("exit_code", "container_reason", "kind", "words"),
    [
        (0, None, Kind.CLEAN_EXIT, "ended by itself"),
        (11, None, Kind.CLEAN_EXIT, "unserved"),
        (1, None, Kind.CRASH, "exit code 1"),
        (64, None, Kind.CRASH, "exit code 64"),
        (255, None, Kind.CRASH, "exit code 255"),
        (137, "OutOfMemoryError: Container killed due to memory usage", Kind.CRASH, "out of memory"),
        (137, None, Kind.CRASH, "SIGKILL"),
        (143, None, Kind.CRASH, "SIGTERM"),
        (139, None, Kind.CRASH, "signal 11"),
    ],
)
def test_a_container_that_ended_is_told_by_its_exit_code(
    exit_code: int, container_reason: str | None, kind: Kind, words: str
) -> None:
    found = stopped("EssentialContainerExited", EXITED, exit_code, container_reason, startedAt="2026-09-02T00:08:33Z")
    assert found.kind is kind
    assert words in found.summary
    assert EXITED in found.detail
    assert f"exit code {exit_code}" in found.detail


@pytest.mark.parametrize(
    ("stop_code", "reason", "words"),
    [
        ("SpotInterruption", "Your Spot Task was interrupted.", "Spot"),
        ("TerminationNotice", "Your Spot Task was interrupted.", "Spot"),
        (None, "SpotInterruption: Your Spot Task was interrupted.", "Spot"),
        ("EssentialContainerExited", "Your Spot Task was interrupted.", "Spot"),
        ("TerminationNotice", None, "host"),
        (
            "ServiceSchedulerInitiated",
            "ECS is performing maintenance on the underlying infrastructure",
            "host",
        ),
        ("UserInitiated", "Amazon ECS is performing maintenance on the underlying infrastructure", "host"),
        (None, "Host EC2 (instance i-1) terminated.", "host"),
        (None, "CannotStopContainerError: failed sending SIGTERM to container: gone", "host"),
    ],
)
@pytest.mark.parametrize("exit_code", [None, 0, 137, 143])
def test_spot_and_host_are_interruptions_whatever_the_exit_code(
    stop_code: str | None, reason: str | None, words: str, exit_code: int | None
) -> None:
    found = stopped(stop_code, reason, exit_code)
    assert found.kind is Kind.INTERRUPTED
    assert words in found.summary


@pytest.mark.parametrize(("provider", "kind"), [("FARGATE_SPOT", Kind.INTERRUPTED), ("FARGATE", Kind.CRASH)])
def test_a_sigterm_without_a_notice_is_spot_only_on_spot_capacity(provider: str, kind: Kind) -> None:
    """FIELD_NOTES 24: the notice may be missing from the event."""
    assert stopped("EssentialContainerExited", EXITED, 143, capacityProviderName=provider).kind is kind


def test_a_kill_on_spot_capacity_without_a_notice_counts_as_a_crash() -> None:
    assert stopped("EssentialContainerExited", EXITED, 137, capacityProviderName="FARGATE_SPOT").kind is Kind.CRASH


@pytest.mark.parametrize("exit_code", [None, 0, 1, 137, 143])
@pytest.mark.parametrize("reason", ["Task stopped by user", "sandbox-fleet: session wall-clock", None])
def test_a_stop_task_is_a_stop_whatever_the_exit_code(exit_code: int | None, reason: str | None) -> None:
    found = stopped("UserInitiated", reason, exit_code)
    assert found.kind is Kind.USER_STOPPED
    assert ("stop timeout" in found.summary) is (exit_code == 137)


def test_a_failed_health_check_is_a_crash() -> None:
    assert stopped("EssentialContainerExited", "Task failed container health checks", 137).kind is Kind.CRASH


CAN_START_LATER = [
    SUBNET_FULL,
    "InsufficientFreeAddressesInSubnet",
    "Unexpected EC2 error while attempting to Create Network Interface: RequestLimitExceeded",
    "Unexpected EC2 error while attempting to Create Network Interface: Unavailable",
    "Timeout waiting for network interface provisioning to complete.",
    "Timeout waiting for EphemeralStorage provisioning to complete.",
    "Network interface provision complete error timeout wait for network interface provision.",
    "Capacity is unavailable at this time. Please try again later or in another zone",
    "TaskFailedToStart: RESOURCE:MEMORY",
    "TaskFailedToStart: AGENT",
    f"CannotPullContainerError: ref pull has been retried 5 time(s): dial tcp {ECR}: i/o timeout",
    "CannotPullContainerError: pull image manifest has been retried 5 time(s): toomanyrequests",
    f"CannotPullContainerError: cannot pull '{ECR}'. There is a connection issue between the task and ECR",
    "CannotPullContainerError: net/http: request canceled (Client.Timeout exceeded)",
    "CannotPullContainerError: unexpected status code 503 Service Unavailable",
    "ResourceInitializationError: unable to pull secrets: pull command failed: : signal: killed",
    "ResourceInitializationError: unable to pull registry auth from ECR: RequestError: dial tcp: i/o timeout",
    "ContainerRuntimeTimeoutError: Could not transition to running; timed out after waiting 1m: x",
    "DockerTimeoutError: Could not transition to running; timed out after waiting 1m: x",
    "InternalError: The task failed due to internal error",
    "ContainerRuntimeError: failed to create container task",
    "CannotCreateContainerError: API error (500): devmapper",
    "CannotStartContainerError: failed to get container status: x",
    "CannotInspectContainerError: x",
]
CANNOT_START = [
    (f"CannotPullContainerError: failed to resolve ref {ECR}: not found", "no such image"),
    ("CannotPullContainerError: The image can\u2019t be found. Check the image name", "no such image"),
    ("CannotPullContainerError: manifest unknown: Requested image not found", "no such image"),
    (f"CannotPullContainerError: {ECR}: repository does not exist", "no such image"),
    (
        "CannotPullContainerError: image Manifest does not contain descriptor matching platform",
        "architecture",
    ),
    ("CannotPullContainerError: no matching manifest for linux/arm64/v8", "architecture"),
    ("CannotStartContainerError: exec /usr/bin/python: exec format error", "architecture"),
    ("CannotPullContainerError: pull access denied for sandbox", "permission"),
    (
        "CannotPullContainerError: AccessDeniedException: role/x is not authorized to perform: ecr:x",
        "permission",
    ),
    (
        "CannotPullContainerError: The task can't pull the image. Check that the role has the permissions",
        "permission",
    ),
    ("CannotPullContainerError: unexpected status code 403 Forbidden", "permission"),
    ("CannotPullContainerError: write /var/lib/x: no space left on device", "disk"),
    ("ResourceInitializationError: unable to retrieve secret from asm: AccessDeniedException", "permission"),
    ("ResourceInitializationError: unable to retrieve secret: ResourceNotFoundException", "does not exist"),
    (
        "ResourceInitializationError: failed to validate logger args: The specified log group does not exist",
        "does not exist",
    ),
    (
        "ECS was unable to assume the role 'arn:aws:iam::1:role/x' that was provided for this task",
        "permission",
    ),
    ('CannotStartContainerError: exec: "runner": executable file not found in $PATH', "entry point"),
    (
        "Unexpected EC2 error while attempting to Create Network Interface: UnauthorizedOperation",
        "permission",
    ),
    ("Unexpected EC2 error while attempting to Create Network Interface: InvalidSubnetID.NotFound", "subnet"),
    (
        "Unexpected EC2 error while attempting to Create Network Interface: InvalidGroup.NotFound",
        "security group",
    ),
    ("CannotCreateVolumeError: x", "cannot place"),
    ("TaskFailedToStart: ATTRIBUTE", "cannot place"),
    ("TaskFailedToStart: EMPTY CAPACITY PROVIDER", "cannot place"),
    ("MemberOf placement constraint unsatisfied", "cannot place"),
]


@pytest.mark.parametrize("stop_code", ["TaskFailedToStart", None])
@pytest.mark.parametrize("reason", CAN_START_LATER)
def test_a_launch_that_a_later_one_may_cure(reason: str, stop_code: str | None) -> None:
    found = stopped(stop_code, reason)
    assert found.kind is Kind.LAUNCH_CAPACITY
    assert found.summary.startswith("did not start: ")
    assert "retried" in found.what_to_do


@pytest.mark.parametrize("stop_code", ["TaskFailedToStart", None])
@pytest.mark.parametrize(("reason", "words"), CANNOT_START)
def test_a_launch_that_someone_must_mend(reason: str, words: str, stop_code: str | None) -> None:
    found = stopped(stop_code, reason)
    assert found.kind is Kind.LAUNCH_PERMANENT
    assert words in found.summary
    assert "retried" not in found.what_to_do
    assert reason in found.detail


def test_the_reason_may_stand_with_the_container_only() -> None:
    found = stopped("TaskFailedToStart", "Task failed to start", None, f"CannotPullContainerError: {ECR}: not found")
    assert found.kind is Kind.LAUNCH_PERMANENT


def test_a_fault_of_the_host_after_the_start_is_an_interruption() -> None:
    found = stopped(None, "InternalError: The task failed due to internal error", startedAt="2026-09-02T00:08:33Z")
    assert found.kind is Kind.INTERRUPTED


@pytest.mark.parametrize(
    "task",
    [
        {},
        {"stopCode": None, "stoppedReason": None, "containers": None},
        {"stopCode": "NewCode", "stoppedReason": "something new", "containers": [{}]},
        {"stopCode": "TaskFailedToStart", "stoppedReason": "something new"},
        {"stopCode": "EssentialContainerExited", "stoppedReason": EXITED, "containers": []},
    ],
)
def test_what_is_not_known_is_said_to_be_unknown(task: dict[str, Any]) -> None:
    found = diagnose(task)
    assert found.kind is Kind.UNKNOWN
    assert "retried" in found.what_to_do


def test_a_container_that_aws_put_beside_ours_does_not_count() -> None:
    agent = {"name": "aws-guardduty-agent-x1", "exitCode": 137, "reason": "OutOfMemoryError"}
    ours = {"name": "sandbox", "exitCode": 0}
    task = {"stopCode": "EssentialContainerExited", "stoppedReason": EXITED, "containers": [agent, ours]}
    assert diagnose(task).kind is Kind.CLEAN_EXIT


def test_a_long_reason_is_cut() -> None:
    assert len(stopped("TaskFailedToStart", "x" * 5000).detail) <= 500


CAPACITY, THROTTLED, QUOTA, PERMANENT, UNKNOWN = LaunchProblem


@pytest.mark.parametrize(
    ("code", "message", "problem"),
    [
        ("ThrottlingException", "Rate exceeded", THROTTLED),
        ("ThrottlingException", "", THROTTLED),
        ("Throttling", "", THROTTLED),
        ("RequestLimitExceeded", "", THROTTLED),
        ("TooManyRequestsException", "Too Many Requests", THROTTLED),
        ("InvalidParameterException", "Rate exceeded", THROTTLED),
        ("ClientException", "Rate exceeded", THROTTLED),
        ("LimitExceededException", "", QUOTA),
        ("ServiceQuotaExceededException", "", QUOTA),
        (
            "ClientException",
            "You've reached the limit on the number of tasks you can run concurrently",
            QUOTA,
        ),
        (
            "InvalidParameterException",
            "You\u2019ve reached the limit on the number of vCPUs you can run",
            QUOTA,
        ),
        ("ClientException", "Capacity is unavailable at this time. Please try again later", CAPACITY),
        ("InvalidParameterException", SUBNET_FULL, CAPACITY),
        ("ServerException", "Service Unavailable. Please try again later.", CAPACITY),
        ("ServiceUnavailableException", "", CAPACITY),
        ("AccessDeniedException", "User is not authorized to perform: iam:PassRole", PERMANENT),
        ("UnrecognizedClientException", "The security token included in the request is invalid", PERMANENT),
        ("ClusterNotFoundException", "Cluster not found.", PERMANENT),
        ("ClientException", "TaskDefinition not found.", PERMANENT),
        ("ClientException", "TaskDefinition is inactive", PERMANENT),
        ("ClientException", "ECS was unable to assume the role that was provided", PERMANENT),
        ("InvalidParameterException", "The subnet ID 'subnet-1' does not exist", PERMANENT),
        ("InvalidParameterException", "Network Configuration must be provided", PERMANENT),
        (
            "InvalidParameterException",
            "The specified capacity provider strategy cannot contain a capacity provider that is not associated with "
            "the cluster.",
            PERMANENT,
        ),
        ("AmazonECSException", "Capacity is unavailable at this time. Please try again later", CAPACITY),
        ("ServerException", "", CAPACITY),
        ("InvalidParameterException", "No Container Instances were found in your cluster.", PERMANENT),
        ("PlatformTaskDefinitionIncompatibilityException", "", PERMANENT),
        ("PlatformUnknownException", "", PERMANENT),
        ("UnsupportedFeatureException", "", PERMANENT),
        ("BlockedException", "Your account is currently blocked", PERMANENT),
        ("ClientException", "something new", UNKNOWN),
        ("ConflictException", "", UNKNOWN),
        ("SomethingNew", "", UNKNOWN),
        ("", "", UNKNOWN),
    ],
)
def test_a_launch_error_is_told_by_its_message_then_its_code(code: str, message: str, problem: LaunchProblem) -> None:
    """FIELD_NOTES 13: a throttle arrives as `InvalidParameterException`."""
    assert classify_launch_error(code, message) is problem


@pytest.mark.parametrize(
    ("reason", "problem"),
    [
        ("RESOURCE:CPU", CAPACITY),
        ("RESOURCE:MEMORY", CAPACITY),
        ("RESOURCE:ENI", CAPACITY),
        ("RESOURCE:FARGATE", CAPACITY),
        ("RESOURCE:PORTS", CAPACITY),
        ("Capacity is unavailable at this time. Please try again later or in a different availability zone", CAPACITY),
        ("AGENT", CAPACITY),
        (
            "Capacity is unavailable at this time. Please try again later or in another zone",
            CAPACITY,
        ),
        (SUBNET_FULL, CAPACITY),
        ("You've reached the limit on the number of tasks you can run concurrently", QUOTA),
        ("You\u2019ve reached the limit on the number of vCPUs you can run concurrently", QUOTA),
        ("InvalidParameterException: Rate exceeded", THROTTLED),
        ("Rate exceeded", THROTTLED),
        ("MISSING", PERMANENT),
        ("INACTIVE", PERMANENT),
        ("ATTRIBUTE", PERMANENT),
        ("LOCATION", PERMANENT),
        ("EMPTY CAPACITY PROVIDER", PERMANENT),
        ("something new", UNKNOWN),
        ("", UNKNOWN),
    ],
)
def test_a_failure_inside_a_200_is_told_by_its_reason(reason: str, problem: LaunchProblem) -> None:
    assert classify_failure(reason) is problem
