"""What ECS's words mean: why a task stopped, why a launch failed. Pure; decides no phase, calls nothing.

Sources: the ECS guide on stopped-task errors and API failure reasons; FIELD_NOTES rows 13-16 and 24.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

NO_IMAGE = "there is no such image"


class Kind(StrEnum):
    """What the control plane does about a stopped task (DESIGN §7, "Sandbox gone")."""

    CLEAN_EXIT = "clean_exit"  # the turn is over
    CRASH = "crash"  # relaunch, counted against MaxAttempts
    INTERRUPTED = "interrupted"  # relaunch, not counted: Spot or host, not our doing
    USER_STOPPED = "user_stopped"  # whether it was wanted is in the record
    LAUNCH_CAPACITY = "launch_capacity"  # never ran; a later launch may
    LAUNCH_PERMANENT = "launch_permanent"  # never ran; no launch will until someone mends it
    UNKNOWN = "unknown"  # treat as retryable (FIELD_NOTES 5)


class LaunchProblem(StrEnum):
    """Why a launch failed; UNKNOWN is to be retried like the first three (FIELD_NOTES 5)."""

    CAPACITY = "capacity"  # another subnet or capacity provider may serve
    THROTTLED = "throttled"  # slow down
    QUOTA = "quota"  # wait for running tasks to end, or have the quota raised
    PERMANENT = "permanent"  # retrying cannot cure it: opens the circuit breaker (DESIGN §6)
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Diagnosis:
    """A stopped task in words: `summary` for a table, `detail` in ECS's words, `what_to_do` for people."""

    kind: Kind
    summary: str
    detail: str
    what_to_do: str


@dataclass(frozen=True)
class _Reason:
    """One known form of ECS's words."""

    pattern: re.Pattern[str]
    problem: LaunchProblem
    summary: str
    what_to_do: str


def _reason(pattern: str, problem: LaunchProblem, summary: str, what_to_do: str) -> _Reason:
    return _Reason(re.compile(pattern, re.IGNORECASE | re.DOTALL), problem, summary, what_to_do)


_WAIT = "Nothing, it is retried; if it goes on, "
_PULL = r"CannotPull|failed to (?:resolve|pull|copy)|pull (?:command|image)"

# The first match decides, so causes that pass stand before the wider forms that do not.
_REASONS = (
    _reason(
        r"rate exceeded|throttl|RequestLimitExceeded|toomanyrequests|too many requests",
        LaunchProblem.THROTTLED,
        "AWS or the image registry throttled the launch",
        _WAIT + "ask for a higher rate quota or serve the image from ECR.",
    ),
    _reason(
        r"reached the (?:limit|maximum)|limit on the number of|vCPU.{0,20}limit|quota|LimitExceeded",
        LaunchProblem.QUOTA,
        "the account's Fargate quota is used up",
        _WAIT + "raise the Fargate vCPU quota or lower MaxSessions.",
    ),
    _reason(
        r"InsufficientFreeAddresses|(?:not enough|no|insufficient) free (?:ip )?addresses",
        LaunchProblem.CAPACITY,
        "the subnet has no free address",
        _WAIT + "add subnets or larger ones to the stack's parameters.",
    ),
    _reason(
        r"capacity is unavailable|insufficient.{0,20}capacity|RESOURCE:|^(?:TaskFailedToStart: )?AGENT$",
        LaunchProblem.CAPACITY,
        "no capacity for the task at this moment",
        _WAIT + "add subnets in other availability zones or allow on-demand capacity.",
    ),
    _reason(
        r"no space left on device",
        LaunchProblem.PERMANENT,
        "the image does not fit the task's disk",
        "Make the image smaller or the task's ephemeral storage larger.",
    ),
    _reason(
        r"exec format error|no matching manifest|does not contain descriptor matching platform",
        LaunchProblem.PERMANENT,
        "the image is built for another architecture",
        "Build the image for the architecture that the stack's parameter names.",
    ),
    _reason(
        r"unable to assume|not authorized|unauthorized|access ?denied|denied|forbidden|no basic auth"
        r"|check that the role has the permissions",
        LaunchProblem.PERMANENT,
        "a role lacks a permission that the launch needs",
        "Give the role named in the detail the permission named there (image pull, logs, PassRole).",
    ),
    _reason(
        rf"(?:{_PULL}).*(?:not found|can.{{1,2}}t be found|manifest unknown|does not exist|invalid reference)"
        r"|image.{0,80}not found",
        LaunchProblem.PERMANENT,
        NO_IMAGE,
        "Push the image, or correct the image parameter of the stack.",
    ),
    _reason(
        r"log (?:group|stream).{0,60}(?:does not exist|not found)|ResourceNotFoundException",
        LaunchProblem.PERMANENT,
        "something that the task definition names does not exist",
        "Create it or deploy the stack again; the detail names it.",
    ),
    _reason(
        r"(?:subnet|security ?group|InvalidGroup|network interface|cluster|task ?definition).{0,80}"
        r"(?:not ?found|not exist|not valid|inactive|same (?:vpc|network))",
        LaunchProblem.PERMANENT,
        "the cluster, task definition, subnet or security group does not exist or does not fit",
        "Correct the stack's network parameters or deploy the stack again.",
    ),
    _reason(
        r"executable file not found|CannotStartContainer.*(?:no such file|permission denied)",
        LaunchProblem.PERMANENT,
        "the image's entry point cannot be run",
        "Build the image from this project's Dockerfile and deploy it.",
    ),
    _reason(
        r"^(?:TaskFailedToStart: )?(?:MISSING|INACTIVE|LOCATION|ATTRIBUTE)\b|EMPTY CAPACITY PROVIDER"
        r"|NO ACTIVE INSTANCES|no container instances|placement constraint|CannotCreateVolume",
        LaunchProblem.PERMANENT,
        "the cluster cannot place such a task",
        "Check that the cluster, region and capacity providers are those that the stack made.",
    ),
    _reason(
        rf"(?:{_PULL}|ResourceInitialization).*(?:time(?:d )?-?out|deadline|i/o|connection|reset|EOF"
        r"|cancell?ed|signal: killed|no route|dial tcp|\b50\d\b)",
        LaunchProblem.CAPACITY,
        "the task could not reach a service that it starts from",
        _WAIT + "check that its subnets have a route (public address, NAT, endpoints) to ECR and Logs.",
    ),
    _reason(
        r"(?:timeout|timed out).{0,20} waiting|provision(?:ing)?.{0,40}(?:time|error)"
        r"|RuntimeTimeout|DockerTimeout",
        LaunchProblem.CAPACITY,
        "Fargate did not set the task up in time",
        _WAIT + "look at the AWS health page.",
    ),
    _reason(
        r"InternalError|internal error|ServerException|RuntimeError|CannotCreateContainer"
        r"|CannotStartContainer|CannotInspectContainer|unexpected EC2 error|ServiceUnavailable",
        LaunchProblem.CAPACITY,
        "Fargate failed inside",
        _WAIT + "look at the AWS health page.",
    ),
)

_SPOT = re.compile(r"spot (?:task|interruption)|spot capacity.{0,20}reclaim", re.IGNORECASE)
# A StopTask's reason is anyone's free text, so these are ECS's whole phrases.
_HOST = re.compile(
    r"performing maintenance|task retirement|host ec2|underlying (?:infrastructure|host|hardware)"
    r"|instance.{0,40}terminated|CannotStopContainer",
    re.IGNORECASE,
)
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory", re.IGNORECASE)
_UNHEALTHY = re.compile(r"health check", re.IGNORECASE)

_PERMANENT_CODES = frozenset(
    {
        "AccessDeniedException",
        "BlockedException",
        "ClusterNotFoundException",
        "InvalidParameterException",  # after its messages were looked at: throttles arrive under it (row 13)
        "InvalidSignatureException",
        "PlatformTaskDefinitionIncompatibilityException",
        "PlatformUnknownException",
        "UnrecognizedClientException",
        "UnsupportedFeatureException",
        "ValidationException",
    }
)
_INJECTED_CONTAINERS = ("aws-guardduty-agent", "ecs-service-connect")
_LONGEST_DETAIL = 500


def classify_launch_error(error_code: str, message: str) -> LaunchProblem:
    """Why RunTask raised: the message first, as one code carries throttles and mistakes (FIELD_NOTES 13)."""
    known = _known(f"{error_code}: {message}")
    if known:
        return known.problem
    return LaunchProblem.PERMANENT if error_code in _PERMANENT_CODES else LaunchProblem.UNKNOWN


def classify_failure(reason: str) -> LaunchProblem:
    """Why a RunTask that answered 200 launched nothing: the `reason` of one of its `failures[]`."""
    known = _known(reason.strip())
    return known.problem if known else LaunchProblem.UNKNOWN


def advice(message: str) -> str:
    """What to do about a launch that failed for good, from the words of its error."""
    known = _known(message)
    return known.what_to_do if known else "Correct what the message names, in the stack's parameters or roles."


def diagnose(task: Mapping[str, Any]) -> Diagnosis:
    """Why a STOPPED task stopped, from its description or its event's `detail`; any field may be missing."""
    stop_code = str(task.get("stopCode") or "")
    containers = _own_containers(task)
    reasons = [str(part) for part in (task.get("stoppedReason"), *(c.get("reason") for c in containers)) if part]
    text = "; ".join(dict.fromkeys(reasons))
    exit_code = _exit_code(containers)
    detail = _detail(stop_code, exit_code, text)
    on_spot = task.get("capacityProviderName") == "FARGATE_SPOT"
    ran = bool(task.get("startedAt")) or exit_code is not None

    def found(kind: Kind, summary: str, what_to_do: str) -> Diagnosis:
        return Diagnosis(kind, summary, detail, what_to_do)

    if stop_code == "SpotInterruption" or _SPOT.search(text):
        return found(Kind.INTERRUPTED, "Spot took the capacity back", "Nothing: the turn goes on in a new sandbox.")
    if stop_code == "TerminationNotice" or _HOST.search(text):
        return found(Kind.INTERRUPTED, "its host was taken away", "Nothing: the turn goes on in a new sandbox.")
    if _OUT_OF_MEMORY.search(text):
        return found(
            Kind.CRASH,
            "out of memory (exit code 137)",
            "Raise the stack's sandbox memory parameter if this repeats.",
        )
    if stop_code in ("UserInitiated", "ServiceSchedulerInitiated"):
        late = " and killed: it did not end within its stop timeout" if exit_code == 137 else ""
        return found(Kind.USER_STOPPED, f"stopped by a StopTask{late}", "Nothing if the stop was wanted.")
    if _UNHEALTHY.search(text):
        return found(Kind.CRASH, "failed its container health check", "Read the sandbox's log of that time.")
    if ran and stop_code != "TaskFailedToStart" and exit_code is not None:
        return found(*_of_exit(exit_code, on_spot=on_spot))

    known = _known(text)
    if known is None:
        began = "stopped" if ran else "did not start"
        return found(Kind.UNKNOWN, f"{began}, for a reason not known here", "Read the detail; it is retried meanwhile.")
    if ran:
        return found(Kind.INTERRUPTED, f"lost while it ran: {known.summary}", known.what_to_do)
    permanent = known.problem is LaunchProblem.PERMANENT
    kind = Kind.LAUNCH_PERMANENT if permanent else Kind.LAUNCH_CAPACITY
    return found(kind, f"did not start: {known.summary}", known.what_to_do)


def _known(text: str) -> _Reason | None:
    return next((reason for reason in _REASONS if reason.pattern.search(text)), None)


def _of_exit(exit_code: int, *, on_spot: bool) -> tuple[Kind, str, str]:
    log = "Read the sandbox's log; exit codes are listed with the runner."
    if exit_code == 0:
        return Kind.CLEAN_EXIT, "ended by itself", "Nothing."
    if exit_code == 11:  # the runner's UNSERVED
        return Kind.CLEAN_EXIT, "ended by itself; a message was left unserved (exit code 11)", "Send the message again."
    if exit_code == 143 and on_spot:  # the event may not say that it was Spot (FIELD_NOTES 24)
        return (
            Kind.INTERRUPTED,
            "ended by SIGTERM on Spot capacity",
            "Nothing: the turn goes on in a new sandbox.",
        )
    if exit_code == 143:
        return Kind.CRASH, "ended by SIGTERM (exit code 143) that no StopTask sent", log
    if exit_code == 137:
        return (
            Kind.CRASH,
            "killed by SIGKILL (exit code 137)",
            "Likely out of memory: look at the memory metric, raise the stack's sandbox memory parameter.",
        )
    if 128 < exit_code <= 192:
        return Kind.CRASH, f"died of signal {exit_code - 128} (exit code {exit_code})", log
    return Kind.CRASH, f"ended with exit code {exit_code}", log


def _own_containers(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Without what AWS puts beside ours: a monitoring agent's exit is not the sandbox's."""
    containers = task.get("containers") or []
    return [c for c in containers if not str(c.get("name", "")).startswith(_INJECTED_CONTAINERS)]


def _exit_code(containers: list[Mapping[str, Any]]) -> int | None:
    """The worst of the containers' exit codes; None if none ran."""
    codes = [int(c["exitCode"]) for c in containers if c.get("exitCode") is not None]
    return max(codes, default=None)


def _detail(stop_code: str, exit_code: int | None, text: str) -> str:
    parts = [stop_code or "no stop code", "no exit code" if exit_code is None else f"exit code {exit_code}"]
    return f"{', '.join(parts)}: {text or 'no reason given'}"[:_LONGEST_DETAIL]
