"""`fleet doctor`: everything that a deployment needs, a line each, with the mend of what is wrong. Changes nothing."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import typer
from botocore.exceptions import BotoCoreError, ClientError

from cli.rehearsal import loop_runs
from cli.stack import FUNCTIONS, Fleet
from cli.stats import messages
from cli.terminal import Code, Failure, out, print_json, say, span, working
from shared import wiring
from shared.config import Missing
from shared.work_api import NO_HEARTBEAT, Gone, NotAllowed, WorkApiError

OK, WARNING, FAILED, NOT_CHECKED = "ok", "warning", "failed", "not checked"
_NOBODY = "fleet-doctor-asks-for-nobody"  # an id that no item and no session has: what is allowed answers 404
_ON_DEMAND_QUOTA = "L-3032A538"
_SKEW_WARNING, _SKEW_FAILED = 30, 240  # seconds; webhooks are refused beyond 300
_ECR_IMAGE = re.compile(r"(\d{12})\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com[a-z.]*/([^@:]+)(?:@(sha256:\w+)|:(.+))")
_DENIED = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation")


@dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    status: str
    what: str
    found: str
    mend: str = ""


Check = Callable[[Fleet], Iterator[Line]]


def doctor(ctx: typer.Context) -> None:
    """Check everything that the stack needs to serve.

    Each line is ok, warning, failed or not checked, with what mends it. Ends with 1 if one has failed. Changes nothing;
    the key is tried with calls that only read, and with the id of no item.
    """
    fleet: Fleet = ctx.obj
    lines: list[Line] = []
    with working("looking"):
        for name, check in CHECKS.items():
            for line in guarded(fleet, name, check):
                lines.append(line)
                if not fleet.json:
                    _print(line)
    count = {status: sum(line.status == status for line in lines) for status in (OK, WARNING, FAILED, NOT_CHECKED)}
    if fleet.json:
        print_json({"lines": [asdict(line) for line in lines], "count": count})
    else:
        say(", ".join(f"{number} {status}" for status, number in count.items()))
    if count[FAILED]:
        raise typer.Exit(Code.FAILED)


def _print(line: Line) -> None:
    style = {OK: "green", WARNING: "yellow", FAILED: "bold red"}.get(line.status, "dim")
    out.print(f"{line.status:11}", style=style, end="  ")
    say(f"{line.what:15}{line.found}")
    if line.mend:
        say(f"{'':13}-> {line.mend}")


def guarded(fleet: Fleet, name: str, check: Check) -> Iterator[Line]:
    """A check that cannot be made says so; none keeps the others from being made."""
    try:
        yield from check(fleet)
    except Failure as failure:
        yield Line(FAILED, name, str(failure))
    except Missing as missing:
        yield Line(FAILED, name, str(missing), _PUT_KEY)
    except WorkApiError as error:
        yield Line(FAILED, name, error.message)
    except (ClientError, BotoCoreError) as error:
        code = error.response["Error"].get("Code", "") if isinstance(error, ClientError) else type(error).__name__
        if fleet.is_local:
            yield Line(NOT_CHECKED, name, "the local AWS has no such thing")
        elif code in _DENIED and isinstance(error, ClientError):
            yield Line(NOT_CHECKED, name, f"you may not call {error.operation_name}", "See docs/cli.md.")
        else:
            yield Line(
                FAILED, name, f"AWS did not answer as it should ({code})", "Repeat it; look at your credentials."
            )


_PUT_KEY = "Put the key: aws secretsmanager put-secret-value (docs/operations.md, Deploy)."


def _credentials(fleet: Fleet) -> Iterator[Line]:
    told = fleet.client("sts").get_caller_identity()
    yield Line(OK, "credentials", f"account {told['Account']} as {told['Arn'].rsplit(':', 1)[-1]}")


def _stack(fleet: Fleet) -> Iterator[Line]:
    status = str(fleet.description["StackStatus"])
    needed = ("TableName", "QueueUrl", "DlqUrl", "StateMachineArn", "ClusterArn", "EnvironmentKeySecretArn")
    lacks = [name for name in needed if name not in fleet.outputs]
    if lacks:
        yield Line(FAILED, "stack", f"{status}, without the outputs {', '.join(lacks)}", "Deploy it: sam deploy.")
    elif not status.endswith("_COMPLETE") or "ROLLBACK" in status:
        yield Line(WARNING, "stack", f"{fleet.name} is {status}", "Look at its events; docs/operations.md, Upgrade.")
    else:
        yield Line(OK, "stack", f"{fleet.name} is {status}, its outputs are there")


def _functions(fleet: Fleet) -> Iterator[Line]:
    odd = []
    for name in FUNCTIONS:
        told = fleet.client("lambda").get_function_configuration(FunctionName=fleet.function(name))
        state, update = told.get("State", "Active"), told.get("LastUpdateStatus", "Successful")
        if state not in ("Active", "Inactive") or update == "Failed":
            odd.append(f"{name.lower()} is {state}, its update {update}")
    if odd:
        yield Line(FAILED, "functions", "; ".join(odd), "Deploy again; Lambda's page of the function says why.")
    else:
        yield Line(OK, "functions", f"all {len(FUNCTIONS)} are active")


def _key(fleet: Fleet) -> Iterator[Line]:
    fleet.key()
    where = f"environment {fleet.config.environment_id} at {fleet.config.base_url}"
    try:
        fleet.api.stats()
    except NotAllowed as error:
        yield Line(
            FAILED, "key", f"not accepted for {where}: {error.message}", "Put a current key of this environment."
        )
        return
    yield Line(OK, "key", f"valid for {where}")
    tried: dict[str, Callable[[], object]] = {
        "list": lambda: fleet.api.list(limit=1),
        "heartbeat": lambda: fleet.api.heartbeat(_NOBODY, NO_HEARTBEAT),
        "events": lambda: fleet.api.newest_events(_NOBODY),
        "retrieve": lambda: fleet.api.retrieve(_NOBODY),
    }
    may = {"stats": True} | {name: _allowed(call) for name, call in tried.items()}
    told = ", ".join(name for name, allowed in may.items() if allowed)
    refused = ", ".join(name for name, allowed in may.items() if not allowed)
    found = f"it may: {told}" + (f"; refused: {refused}" if refused else "") + "; not tried: poll, ack, stop, update"
    if not may["heartbeat"]:
        yield Line(FAILED, "key's calls", found, "Leases cannot be kept with it: put an environment key.")
    elif not may["list"]:
        yield Line(WARNING, "key's calls", found, "Without list, stranded items are not found.")
    elif not may["events"]:
        yield Line(WARNING, "key's calls", found, "Without events, sandboxes that hang may not be noticed.")
    else:
        yield Line(OK, "key's calls", found + " (retrieve and update need an organisation key)")


def _allowed(call: Callable[[], object]) -> bool:
    try:
        call()
    except NotAllowed:
        return False
    except Gone:
        return True
    return True


def _webhook(fleet: Fleet) -> Iterator[Line]:
    try:
        wiring.webhook_key(fleet.config)()
    except Missing:
        mend = "Register WebhookUrl with the vendor and put its signing key, if a minute is too long."
        yield Line(WARNING, "webhook", "no signing key: sessions are picked up within a minute, not at once", mend)
    else:
        yield Line(OK, "webhook", "its signing key is there")


def _subnets(fleet: Fleet) -> Iterator[Line]:
    ids = fleet.config.subnets.split(",")
    told = fleet.client("ec2").describe_subnets(SubnetIds=ids)["Subnets"]
    free = sum(int(subnet["AvailableIpAddressCount"]) for subnet in told)
    wanted = max(0, fleet.config.max_sessions - len(fleet.live()))
    found = f"{free} free addresses in {len(told)} subnets, {wanted} more sessions may come"
    if len(told) < len(ids):
        yield Line(FAILED, "subnets", f"{len(ids) - len(told)} of {len(ids)} are gone", "Correct SubnetIds; deploy.")
    elif free < wanted:
        yield Line(WARNING, "subnets", found, "Give larger or more subnets, or lower MaxSessions.")
    else:
        yield Line(OK, "subnets", found)


def _image(fleet: Fleet) -> Iterator[Line]:
    told = fleet.client("ecs").describe_task_definition(taskDefinition=fleet.output("TaskDefinitionArn"))
    image = str(told["taskDefinition"]["containerDefinitions"][0]["image"])
    parts = _ECR_IMAGE.fullmatch(image)
    if parts is None:
        yield Line(NOT_CHECKED, "image", f"{image} is in no ECR")
        return
    account, _, repository, digest, tag = parts.groups()
    named = {"imageDigest": digest} if digest else {"imageTag": tag}
    try:
        fleet.client("ecr").describe_images(registryId=account, repositoryName=repository, imageIds=[named])
    except ClientError as error:
        if error.response["Error"].get("Code") not in ("ImageNotFoundException", "RepositoryNotFoundException"):
            raise
        yield Line(FAILED, "image", f"there is no {image}", "Build it: sam deploy (docs/operations.md, The image).")
    else:
        yield Line(OK, "image", f"{repository} has {(digest or tag)[:19]}")


def _quotas(fleet: Fleet) -> Iterator[Line]:
    told = fleet.client("ecs").describe_task_definition(taskDefinition=fleet.output("TaskDefinitionArn"))
    needed = fleet.config.max_sessions * int(told["taskDefinition"]["cpu"]) / 1024
    quota = fleet.client("service-quotas").get_service_quota(ServiceCode="fargate", QuotaCode=_ON_DEMAND_QUOTA)
    value = float(quota["Quota"]["Value"])
    found = f"{value:g} vCPU on demand, MaxSessions {fleet.config.max_sessions} needs {needed:g}"
    if value < needed:
        yield Line(WARNING, "Fargate quota", found, f"Raise quota {_ON_DEMAND_QUOTA}, or lower MaxSessions.")
    else:
        yield Line(OK, "Fargate quota", found)


def _concurrency(fleet: Fleet) -> Iterator[Line]:
    limit = fleet.client("lambda").get_account_settings()["AccountLimit"]
    free = int(limit["UnreservedConcurrentExecutions"])
    if free < len(FUNCTIONS) + 2:
        mend = "Raise Lambda's quota of concurrent executions (L-B99A9384)."
        yield Line(WARNING, "Lambda quota", f"{free} runs at once, shared by {len(FUNCTIONS)} functions", mend)
    else:
        yield Line(OK, "Lambda quota", f"{free} runs at once")


def _claiming(fleet: Fleet) -> Iterator[Line]:
    breaker = fleet.store.breaker()
    if breaker.opened_at is not None:
        ago = span(wiring.now() - breaker.opened_at)
        found = f"the circuit breaker is open for {ago}: {breaker.reason}"
        yield Line(FAILED, "claiming", found, "Mend the cause; it then closes by itself.")
    elif breaker.paused:
        yield Line(WARNING, "claiming", "paused by hand: nothing new is claimed", "fleet resume")
    elif fleet.config.max_sessions == 0:
        yield Line(WARNING, "claiming", "MaxSessions is 0: nothing new is claimed", "Give MaxSessions its value.")
    else:
        live = len(fleet.live())
        yield Line(OK, "claiming", f"{live} of at most {fleet.config.max_sessions} sessions are live")


def _loop(fleet: Fleet) -> Iterator[Line]:
    live, runs = len(fleet.live()), loop_runs(fleet)
    if live and not runs:
        mend = "The next poll starts it, within a minute; `fleet repair` does at once."
        yield Line(FAILED, "lease loop", f"{live} live sessions and no loop runs", mend)
    else:
        yield Line(OK, "lease loop", "runs" if runs else "rests: no session is live")


def _schedules(fleet: Fleet) -> Iterator[Line]:
    names = [
        str(part["PhysicalResourceId"])
        for part in fleet.resources.values()
        if part["ResourceType"] == "AWS::Scheduler::Schedule"
    ]
    off = [name for name in names if _schedule_state(fleet, name) != "ENABLED"]
    if off or not names:
        found = f"not enabled: {', '.join(off)}" if off else "the stack has none"
        yield Line(FAILED, "schedules", found, "Enable them in EventBridge Scheduler, or deploy again.")
    else:
        yield Line(OK, "schedules", f"all {len(names)} are enabled")


def _schedule_state(fleet: Fleet, physical_id: str) -> str:
    group, _, name = physical_id.rpartition("/")
    named = {"Name": name} | ({"GroupName": group.rpartition("/")[2]} if group else {})
    return str(fleet.client("scheduler").get_schedule(**named)["State"])


def _dead_letters(fleet: Fleet) -> Iterator[Line]:
    count = messages(fleet, fleet.output("DlqUrl"))
    if count:
        yield Line(WARNING, "dead letters", f"{count} are there", "fleet redrive")
    else:
        yield Line(OK, "dead letters", "none")


def _alarms(fleet: Fleet) -> Iterator[Line]:
    names = [
        str(part["PhysicalResourceId"])
        for part in fleet.resources.values()
        if part["ResourceType"] == "AWS::CloudWatch::Alarm"
    ]
    told: list[dict[str, Any]] = fleet.client("cloudwatch").describe_alarms(AlarmNames=names)["MetricAlarms"]
    on = [alarm for alarm in told if alarm["StateValue"] == "ALARM"]
    for alarm in on:
        yield Line(FAILED, "alarm", str(alarm["AlarmName"]), str(alarm.get("AlarmDescription", "")))
    if len(told) < len(names):
        yield Line(FAILED, "alarms", f"{len(names) - len(told)} of {len(names)} are gone", "Deploy again.")
    elif all(alarm["StateValue"] == "INSUFFICIENT_DATA" for alarm in told):
        yield Line(NOT_CHECKED, "alarms", f"none of the {len(told)} has been evaluated yet")
    elif not on:
        yield Line(OK, "alarms", f"none of {len(told)} is on")


def _clocks(fleet: Fleet) -> Iterator[Line]:
    """This machine's only misleads what `fleet` shows; the API's decides whether webhooks are taken."""
    reply = fleet.client("sts").get_caller_identity()
    aws = _date(reply["ResponseMetadata"]["HTTPHeaders"].get("date"))
    here = time.time()
    try:
        api = _date(httpx.head(fleet.config.base_url, timeout=10).headers.get("date"))
    except httpx.HTTPError as error:
        yield Line(WARNING, "clocks", f"the API was not reached from here ({type(error).__name__})")
        return
    if aws is None or api is None:
        yield Line(NOT_CHECKED, "clocks", "a reply had no date")
        return
    skews = {"this machine": here - aws, "the API": api - time.time() + here - aws}
    worst = max(abs(skew) for skew in skews.values())
    found = ", ".join(f"{name} {skew:+.0f} s" for name, skew in skews.items()) + " against AWS"
    if worst < _SKEW_WARNING:
        yield Line(OK, "clocks", found)
    else:
        status = FAILED if abs(skews["the API"]) >= _SKEW_FAILED else WARNING
        yield Line(status, "clocks", found, "Set this machine's clock; if it is the API's, webhooks may be refused.")


def _date(text: str | None) -> float | None:
    return parsedate_to_datetime(text).timestamp() if text else None


CHECKS: dict[str, Check] = {
    "credentials": _credentials,
    "stack": _stack,
    "functions": _functions,
    "key": _key,
    "webhook": _webhook,
    "claiming": _claiming,
    "lease loop": _loop,
    "schedules": _schedules,
    "dead letters": _dead_letters,
    "alarms": _alarms,
    "image": _image,
    "subnets": _subnets,
    "Fargate quota": _quotas,
    "Lambda quota": _concurrency,
    "clocks": _clocks,
}
