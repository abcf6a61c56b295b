"""`fleet exec`: a shell or a command in a live sandbox by ECS Exec, and why there can be none."""

import json
import os
import shlex
import shutil
import signal
import subprocess
from typing import Annotated, Any

import typer
from botocore.exceptions import ClientError

from cli.stack import Fleet
from cli.terminal import Code, Failure, print_json
from shared import wiring
from shared.record import Record
from shared.sandboxes import CONTAINER

PLUGIN = "session-manager-plugin"
_SHELL = "/bin/bash"
_AGENT = "ExecuteCommandAgent"
_PLUGIN_PAGE = (
    "https://docs.aws.amazon.com/systems-manager/latest/userguide/session-manager-working-with-install-plugin.html"
)
# Its argument names this variable, which holds the session: the token stays out of the list of processes
_SESSION_VARIABLE = "AWS_SSM_START_SESSION_RESPONSE"


def exec_(
    ctx: typer.Context,
    ident: Annotated[str, typer.Argument(metavar="ID", help="A session's or a work item's id.")],
    command: Annotated[list[str] | None, typer.Argument(metavar="CMD", help=f"After `--`; else {_SHELL}.")] = None,
) -> None:
    """Open a shell in a live sandbox, or run a command there.

    Needs EnableExec (off by default) and AWS's session-manager-plugin. --json only says whether it can be done.
    """
    fleet: Fleet = ctx.obj
    task = reachable(fleet, fleet.find(ident))
    if fleet.json:
        print_json({"possible": True, "task_arn": task["taskArn"], "plugin": shutil.which(PLUGIN) is not None})
        return
    if shutil.which(PLUGIN) is None:
        raise Failure(f"{PLUGIN} is not installed; AWS's page says how to get it: {_PLUGIN_PAGE}")
    session = start(fleet, task, shlex.join(command) if command else _SHELL)
    raise typer.Exit(_attach(fleet, task, session))


def reachable(fleet: Fleet, record: Record) -> dict[str, Any]:
    """ECS's description of its sandbox, into which a session can be asked for. Raises Failure that says why not."""
    if not fleet.config.exec_role_arn:
        raise Failure(
            f"ECS Exec is off in stack {fleet.name!r}. EnableExec=true turns it on for sandboxes started from then on; "
            "read docs/security.md first, which says what the agent's code then holds.",
            Code.NOT_DONE,
        )
    arn = record.task_arn
    task = wiring.sandboxes(fleet.config).describe([arn]).get(arn) if arn else None
    if not record.is_live or task is None:
        state = f"ended {record.outcome}" if not record.is_live else f"is {record.phase}"
        raise Failure(f"No sandbox runs for {record.work_id}: it {state}.", Code.NOT_DONE)
    status = task.get("lastStatus")
    if status != "RUNNING":
        raise Failure(f"The sandbox of {record.work_id} is {status}: it can be entered while RUNNING.", Code.NOT_DONE)
    if not task.get("enableExecuteCommand"):
        raise Failure(
            f"The sandbox of {record.work_id} was started before EnableExec was on. "
            f"`fleet retry {record.work_id}` has another one go on with the session.",
            Code.NOT_DONE,
        )
    if (agent := _agent(task)) not in (None, "RUNNING"):
        raise Failure(
            f"ECS Exec's agent in the sandbox of {record.work_id} is {agent}: PENDING passes within a minute, STOPPED "
            "means that this sandbox cannot be entered.",
            Code.NOT_DONE,
        )
    return task


def _container(task: dict[str, Any]) -> dict[str, Any]:
    return next((one for one in task.get("containers", ()) if one.get("name") == CONTAINER), {})


def _agent(task: dict[str, Any]) -> str | None:
    """What ECS says of its agent; None where it says nothing."""
    agents = _container(task).get("managedAgents", ())
    return next((one.get("lastStatus") for one in agents if one.get("name") == _AGENT), None)


def start(fleet: Fleet, task: dict[str, Any], command: str) -> dict[str, str]:
    """The session that ECS opens; its token is a secret. Raises Failure where ECS refuses."""
    try:
        reply: dict[str, Any] = fleet.client("ecs").execute_command(
            cluster=fleet.output("ClusterArn"),
            task=task["taskArn"],
            container=CONTAINER,
            interactive=True,  # ECS knows no other way
            command=command,
        )
    except ClientError as error:
        code, said = error.response["Error"].get("Code"), error.response["Error"].get("Message")
        if code == "TargetNotConnectedException":
            raise Failure(
                f"ECS does not reach its agent in the sandbox ({said}). It needs some seconds after the start, and the "
                "way to ssmmessages on port 443.",
                Code.NOT_DONE,
            ) from None
        if code == "InvalidParameterException":
            raise Failure(f"ECS opens no session: {said}", Code.NOT_DONE) from None
        raise
    session: dict[str, str] = reply["session"]
    return session


def _attach(fleet: Fleet, task: dict[str, Any], session: dict[str, str]) -> int:
    """The plugin in this terminal until the session ends; its exit code."""
    cluster, name = task["clusterArn"].rsplit("/", 1)[-1], task["taskArn"].rsplit("/", 1)[-1]
    target = {"Target": f"ecs:{cluster}_{name}_{_container(task).get('runtimeId', '')}"}
    meta = fleet.client("ssm").meta
    # By the plugin's names, which are Session Manager's and not ECS's
    told = {"SessionId": session["sessionId"], "StreamUrl": session["streamUrl"], "TokenValue": session["tokenValue"]}
    arguments = [_SESSION_VARIABLE, meta.region_name, "StartSession", fleet.profile or "", json.dumps(target)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the shell in the sandbox
    try:
        return subprocess.run(  # noqa: S603
            [PLUGIN, *arguments, meta.endpoint_url],
            env={**os.environ, _SESSION_VARIABLE: json.dumps(told)},
            check=False,
        ).returncode
    finally:
        signal.signal(signal.SIGINT, before)
