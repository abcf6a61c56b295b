"""What the template must say for a rule of the field to hold; its policies and alarms have tests of their own."""

import copy
import re
from typing import Any

import pytest
from cfnlint.schema.manager import PROVIDER_SCHEMA_MANAGER

from tests.unit import cloudformation, policies

Template = dict[str, Any]


@pytest.fixture(scope="module")
def template() -> Template:
    return cloudformation.expand(cloudformation.load(cloudformation.ROOT / "template.yaml"))


def of_type(template: Template, kind: str) -> dict[str, dict[str, Any]]:
    """Properties by logical id; at least one."""
    resources: dict[str, Any] = template["Resources"]
    found = {name: one.get("Properties", {}) for name, one in resources.items() if one["Type"] == kind}
    assert found, kind
    return found


def test_no_function_may_write_parameters_or_secrets(template: Template) -> None:
    """FIELD_NOTES 11: a parameter-store write a launch was throttled. A session's secret is in its record alone."""
    actions = policies.allowed_actions(template)
    assert len(actions) > 20
    kept_elsewhere = {
        action
        for role, action in actions
        if role != "SandboxExecRole" and re.match(r"(ssm|ssmmessages|secretsmanager):", action)
    }
    assert kept_elsewhere == {"secretsmanager:GetSecretValue"}


def test_only_where_its_owner_turns_it_on_may_a_sandbox_be_entered(template: Template) -> None:
    """The role, its passing on, and a root file system that ECS Exec's agent can write to."""
    assert template["Parameters"]["EnableExec"]["Default"] == "false"
    assert template["Conditions"]["Exec"] == {"Fn::Equals": [{"Ref": "EnableExec"}, "true"]}
    resources, role = template["Resources"], {"Fn::GetAtt": ["SandboxExecRole", "Arn"]}
    assert resources["SandboxExecRole"]["Condition"] == "Exec"
    launcher = resources["LauncherFunction"]["Properties"]["Environment"]["Variables"]
    assert launcher["FLEET_EXEC_ROLE_ARN"] == {"Fn::If": ["Exec", role, ""]}
    for task in of_type(template, "AWS::ECS::TaskDefinition").values():
        assert "TaskRoleArn" not in task
        [container] = task["ContainerDefinitions"]
        assert container["ReadonlyRootFilesystem"] == {"Fn::If": ["Exec", False, True]}
    named, by_condition = str(resources).count(str(role)), str(resources).count(f"['Exec', {role}, ")
    assert named == by_condition == 2, "the launcher's variable and its permission to pass it on"


def test_launches_are_bounded_at_their_event_source(template: Template) -> None:
    """FIELD_NOTES 23: reserved concurrency had Lambda's throttling push good messages to the dead letters."""
    [source] = of_type(template, "AWS::Lambda::EventSourceMapping").values()
    assert source["ScalingConfig"]["MaximumConcurrency"] >= 2, "the least that SQS takes"
    assert source["FunctionResponseTypes"] == ["ReportBatchItemFailures"]


def test_no_function_reserves_concurrency_unless_told_to(template: Template) -> None:
    """FIELD_NOTES 23, 25: a new account has none to reserve; overlapping runs are harmless instead."""
    functions = of_type(template, "AWS::Lambda::Function")
    reserving = {
        n: f["ReservedConcurrentExecutions"] for n, f in functions.items() if "ReservedConcurrentExecutions" in f
    }
    only_if_told = {"Fn::If": ["LimitPublic", {"Ref": "PublicConcurrency"}, {"Ref": "AWS::NoValue"}]}
    assert reserving == dict.fromkeys(["TicketsFunction", "WebhookFunction"], only_if_told)
    assert template["Parameters"]["PublicConcurrency"]["Default"] == 0


def test_a_launch_message_stays_hidden_while_its_launcher_may_still_run(template: Template) -> None:
    """FIELD_NOTES 22: six times the function's time-out, as Lambda asks for."""
    queue = of_type(template, "AWS::SQS::Queue")["LaunchQueue"]
    launcher = of_type(template, "AWS::Lambda::Function")["LauncherFunction"]
    assert queue["VisibilityTimeout"] >= 6 * launcher["Timeout"]


def test_a_sandbox_has_the_longest_time_to_stop_and_an_init_that_passes_sigterm_on(template: Template) -> None:
    """FIELD_NOTES 24: 120 s is Fargate's most."""
    task = of_type(template, "AWS::ECS::TaskDefinition")["SandboxTask"]
    [container] = task["ContainerDefinitions"]
    assert container["StopTimeout"] == {"Ref": "StopTimeoutSeconds"}
    assert container["LinuxParameters"]["InitProcessEnabled"] is True
    parameter = template["Parameters"]["StopTimeoutSeconds"]
    assert parameter["Default"] == parameter["MaxValue"] == 120


@pytest.mark.parametrize("number", ["2", "3"])
def test_a_sandbox_of_another_image_is_in_all_else_the_same(template: Template, number: str) -> None:
    tasks = of_type(template, "AWS::ECS::TaskDefinition")
    task, other = tasks["SandboxTask"], copy.deepcopy(tasks[f"SandboxTask{number}"])
    [container], [same] = other["ContainerDefinitions"], task["ContainerDefinitions"]
    assert container["Image"] == {"Fn::If": [f"Image{number}", {"Ref": f"SandboxImage{number}"}, same["Image"]]}
    assert other.pop("Family") != task["Family"]
    container["Image"] = same["Image"]
    assert other == {name: value for name, value in task.items() if name != "Family"}


def test_the_image_starts_its_runner_without_a_shell_that_would_keep_sigterm() -> None:
    """FIELD_NOTES 24."""
    dockerfile = (cloudformation.ROOT / "sandbox" / "Dockerfile").read_text()
    [entry] = re.findall(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)
    assert entry.startswith('["')
    assert not re.search(r"^(CMD|STOPSIGNAL)\b", dockerfile, re.MULTILINE)


def test_a_customers_key_encrypts_all_that_can_hold_something_of_a_session(template: Template) -> None:
    key = {"Fn::If": ["CustomerKey", {"Ref": "KmsKeyArn"}, {"Ref": "AWS::NoValue"}]}
    encrypted = {
        "AWS::SQS::Queue": "KmsMasterKeyId",
        "AWS::Logs::LogGroup": "KmsKeyId",
        "AWS::SecretsManager::Secret": "KmsKeyId",
    }
    given = {
        name: one.get(member) for kind, member in encrypted.items() for name, one in of_type(template, kind).items()
    }
    assert given == dict.fromkeys(given, key)
    [table] = of_type(template, "AWS::DynamoDB::Table").values()
    assert table["SSESpecification"] == {"SSEEnabled": True, "SSEType": "KMS", "KMSMasterKeyId": key}


def test_a_sandbox_may_look_up_needed_and_listed_names_and_no_others(template: Template) -> None:
    """The local AWS has no DNS Firewall. A lower priority comes first; what no rule meets would be allowed."""
    lists = {
        name: one["Domains"] for name, one in of_type(template, "AWS::Route53Resolver::FirewallDomainList").items()
    }
    [group] = of_type(template, "AWS::Route53Resolver::FirewallRuleGroup").values()
    rules = [
        (rule["Action"], rule["FirewallDomainListId"]["Ref"])
        for rule in sorted(group["FirewallRules"], key=lambda rule: int(rule["Priority"]))
    ]
    assert rules == [("ALLOW", "NeededDomains"), ("ALLOW", "ListedDomains"), ("BLOCK", "OtherDomains")]
    assert lists["ListedDomains"] == {"Fn::Split": [",", {"Ref": "AllowedDomains"}]}
    assert lists["OtherDomains"] == ["*"]
    needed = str(lists["NeededDomains"])
    for name in ("BaseUrl", "TicketsFunctionUrl", "api.ecr.", ".dkr.ecr.", "starport-layer-bucket", "logs."):
        assert name in needed
    [association] = of_type(template, "AWS::Route53Resolver::FirewallRuleGroupAssociation").values()
    assert association["VpcId"] == {"Ref": "Vpc"}
    assert association["FirewallRuleGroupId"] == {"Ref": "DomainRules"}


def test_a_stack_that_is_deleted_leaves_at_most_a_bucket(template: Template) -> None:
    """Whatever CloudFormation would retain, or refuse to delete while it is not empty."""
    resources: dict[str, Any] = template["Resources"]
    kept = {one["Type"] for one in resources.values() if one.get("DeletionPolicy", "Delete") != "Delete"}
    assert kept <= {"AWS::S3::Bucket", "AWS::S3::BucketPolicy"}
    [repository] = of_type(template, "AWS::ECR::Repository").values()
    assert repository["EmptyOnDelete"] is True
    [table] = of_type(template, "AWS::DynamoDB::Table").values()
    assert not table.get("DeletionProtectionEnabled")


# --- cost allocation, traces -------------------------------------------------------------------------------------

TAG = {"Key": "sandbox-fleet:environment-id", "Value": {"Ref": "EnvironmentId"}}


def takes_tags(kind: str) -> bool:
    """By AWS's own schema of the type."""
    schema = PROVIDER_SCHEMA_MANAGER.get_resource_schema("us-east-1", kind).schema
    tagging = schema.get("tagging", {"taggable": "Tags" in schema["properties"]})
    return bool(tagging["taggable"]) and "Tags" in schema["properties"]


def test_every_resource_that_takes_tags_has_the_environment_s(template: Template) -> None:
    untagged, tagged = [], 0
    for name, resource in template["Resources"].items():
        if resource["Type"].startswith("Custom::") or not takes_tags(resource["Type"]):
            continue
        tags = resource.get("Properties", {}).get("Tags", [])
        tagged += TAG in tags
        untagged += [] if TAG in tags else [f"{name} ({resource['Type']})"]
    # SAM passes a function's tags on to its schedules' roles alone; neither of these is charged for
    assert untagged == [
        "LauncherFunctionHeld (AWS::Lambda::EventSourceMapping)",
        "ObserverFunctionTaskState (AWS::Events::Rule)",
    ]
    assert tagged > 80


def test_every_function_and_the_loop_are_traced_and_none_brings_an_sdk_for_it(template: Template) -> None:
    """AWS_FACTS: importing the Powertools Tracer costs more than the rest of a cold start."""
    functions = of_type(template, "AWS::Lambda::Function")
    assert [name for name, one in functions.items() if one.get("TracingConfig") != {"Mode": "Active"}] == []
    [loop] = of_type(template, "AWS::StepFunctions::StateMachine").values()
    assert loop["TracingConfiguration"] == {"Enabled": True}
    allowed = policies.allowed_actions(template)
    traced = {str(one["Role"]["Fn::GetAtt"][0]) for one in functions.values()} | {"LeaseLoopRole"}
    assert {role for role, action in allowed if action == "xray:PutTraceSegments"} == traced
    code = [path.read_text() for path in cloudformation.ROOT.glob("shared/*.py")]
    code += [path.read_text() for path in cloudformation.ROOT.glob("functions/*/app.py")]
    assert not any("Tracer" in text or "xray" in text for text in code)
