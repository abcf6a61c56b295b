"""`fleet exec`: whether a sandbox can be entered, what ECS is asked, how the plugin is started. No session is tried."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError
from typer.testing import CliRunner

from cli import app as fleet_app
from cli import exec as command
from cli.stack import Fleet
from cli.terminal import Code, Failure
from shared import wiring
from shared.config import Config
from shared.record import Outcome, Phase, Record

CLUSTER = "arn:aws:ecs:us-east-1:123456789012:cluster/c"
ARN = "arn:aws:ecs:us-east-1:123456789012:task/c/abc"
TOKEN = "TOKEN-OF-THE-SESSION"
SESSION = {"sessionId": "ecs-execute-command-1", "streamUrl": "wss://example.com", "tokenValue": TOKEN}
RECORD = Record(work_id="w", environment_id="env", kind="session", turn=1, phase=Phase.RUNNING, task_arn=ARN)
TASK: dict[str, Any] = {
    "taskArn": ARN,
    "clusterArn": CLUSTER,
    "lastStatus": "RUNNING",
    "enableExecuteCommand": True,
    "containers": [{"name": "sandbox", "runtimeId": "abc-1"}],
}


class Ecs:
    """ECS's answers, as boto3 gives them."""

    def __init__(self) -> None:
        self.task, self.asked = dict(TASK), list[dict[str, Any]]()
        self.error: ClientError | None = None
        self.meta = SimpleNamespace(region_name="us-east-1", endpoint_url="https://ssm.us-east-1.amazonaws.com")

    def describe(self, arns: list[str]) -> dict[str, dict[str, Any]]:
        return dict.fromkeys(arns, self.task)

    def execute_command(self, **asked: Any) -> dict[str, Any]:
        self.asked.append(asked)
        if self.error:
            raise self.error
        return {"session": SESSION}


@pytest.fixture
def ecs(monkeypatch: pytest.MonkeyPatch) -> Ecs:
    """A stack with EnableExec whose session `w` runs."""
    ecs = Ecs()
    monkeypatch.setattr(wiring, "sandboxes", lambda config: ecs)
    monkeypatch.setattr(Fleet, "config", Config(table="work", exec_role_arn="arn:aws:iam::123456789012:role/exec"))
    monkeypatch.setattr(Fleet, "outputs", {"ClusterArn": CLUSTER})
    monkeypatch.setattr(Fleet, "client", lambda self, service: ecs)
    monkeypatch.setattr(Fleet, "find", lambda self, ident: RECORD)
    return ecs


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plugin that writes down how it was started; the file."""
    seen = tmp_path / "seen.json"
    program = tmp_path / command.PLUGIN
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], dict(os.environ)], open({str(seen)!r}, 'w'))\nsys.exit(7)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return seen


def test_the_plugin_gets_the_session_without_its_token_among_the_arguments(ecs: Ecs, plugin: Path) -> None:
    ended = CliRunner().invoke(fleet_app.app, ["exec", "w", "--", "ls", "-l", "a b"])
    assert ended.exit_code == 7, "the plugin's own"
    [asked] = ecs.asked
    assert asked == {
        "cluster": CLUSTER,
        "task": ARN,
        "container": "sandbox",
        "interactive": True,
        "command": "ls -l 'a b'",
    }
    arguments, environment = json.loads(plugin.read_text())
    assert arguments[1:3] == ["us-east-1", "StartSession"]
    assert json.loads(arguments[4]) == {"Target": "ecs:c_abc_abc-1"}
    assert json.loads(environment[arguments[0]])["TokenValue"] == TOKEN
    assert TOKEN not in str(arguments) + ended.output


def test_without_a_command_it_is_a_shell(ecs: Ecs, plugin: Path) -> None:
    CliRunner().invoke(fleet_app.app, ["exec", "w"])
    assert ecs.asked[0]["command"] == "/bin/bash"


def test_json_says_that_it_can_be_done_and_starts_nothing(ecs: Ecs, plugin: Path) -> None:
    told = json.loads(CliRunner().invoke(fleet_app.app, ["--json", "exec", "w"]).output)
    assert told == {"possible": True, "task_arn": ARN, "plugin": True}
    assert not ecs.asked


def test_no_session_is_asked_for_without_the_plugin(ecs: Ecs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Failure, match=r"session-manager-plugin is not installed; .* how to get it: https://"):
        CliRunner().invoke(fleet_app.app, ["exec", "w"], catch_exceptions=False)
    assert not ecs.asked


@pytest.mark.parametrize(
    ("record", "task", "said"),
    [
        ({}, {"enableExecuteCommand": False}, "started before EnableExec was on. `fleet retry w`"),
        ({}, {"lastStatus": "PENDING"}, "is PENDING"),
        ({}, {"lastStatus": "DEPROVISIONING"}, "is DEPROVISIONING"),
        ({"phase": Phase.STOPPED, "outcome": Outcome.COMPLETED}, {}, "it ended completed"),
        ({"phase": Phase.HELD, "task_arn": None}, {}, "it is held"),
        (
            {},
            {
                "containers": [
                    {"name": "sandbox", "managedAgents": [{"name": "ExecuteCommandAgent", "lastStatus": "STOPPED"}]}
                ]
            },
            "is STOPPED",
        ),
    ],
)
def test_a_sandbox_that_cannot_be_entered_is_refused_in_words(
    ecs: Ecs, record: dict[str, Any], task: dict[str, Any], said: str
) -> None:
    ecs.task |= task
    with pytest.raises(Failure, match=said) as refused:
        command.reachable(Fleet(), RECORD.model_copy(update=record))
    assert refused.value.code == Code.NOT_DONE


def test_where_it_is_off_the_way_to_turn_it_on_is_told(ecs: Ecs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fleet, "config", Config(table="work"))
    with pytest.raises(Failure, match=r"EnableExec=true .* docs/security.md") as refused:
        command.reachable(Fleet(), RECORD)
    assert refused.value.code == Code.NOT_DONE


@pytest.mark.parametrize("code", ["TargetNotConnectedException", "InvalidParameterException"])
def test_ecs_s_own_refusal_is_one_sentence(ecs: Ecs, code: str) -> None:
    ecs.error = ClientError({"Error": {"Code": code, "Message": "its words"}}, "ExecuteCommand")
    with pytest.raises(Failure, match="its words") as refused:
        command.start(Fleet(), TASK, "ls")
    assert refused.value.code == Code.NOT_DONE
