"""Every policy of the template grants what exists, on what it is needed for; a fault planted in it is seen."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit import cloudformation, policies

Template = dict[str, Any]
DOCUMENT = cloudformation.ROOT / "docs" / "security.md"


@pytest.fixture(scope="module")
def template() -> Template:
    return cloudformation.expand(cloudformation.load(cloudformation.ROOT / "template.yaml"))


def test_the_templates_policies_have_no_fault(template: Template) -> None:
    assert policies.faults(template) == set()


def test_every_waiver_is_still_needed(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    waivers = dict(policies.NOT_A_FAULT)
    monkeypatch.setattr(policies, "NOT_A_FAULT", {})
    faults = policies.faults(template)
    assert [waiver for waiver in waivers if not any(policies.excuses(waiver, fault) for fault in faults)] == []
    assert policies.WITHOUT_RESOURCE.keys() <= {action for _, action in policies.allowed_actions(template)}


def test_every_condition_that_a_policy_depends_on_is_tried_both_ways(template: Template) -> None:
    outcomes = cloudformation.outcomes(template)
    assert outcomes.keys() >= {"CreateSecret", "HandOverKey", "CustomerKey"}
    assert [name for name, values in outcomes.items() if values != {True, False}] == []


@pytest.mark.parametrize(
    ("image", "repository"),
    [
        ("123456789012.dkr.ecr.us-east-1.amazonaws.com/sandbox:1.2", "sandbox"),
        ("123456789012.dkr.ecr.us-east-1.amazonaws.com/team/sandbox@sha256:ab12", "team/sandbox"),
        ("123456789012.dkr.ecr.us-east-1.amazonaws.com/team/sandbox:1@sha256:ab12", "team/sandbox"),
        ("public.ecr.aws/team/sandbox:1", "none"),
        ("sandbox:local", "none"),
        ("", "SandboxRepository"),  # built by the stack
    ],
)
@pytest.mark.parametrize("second", ["", "123456789012.dkr.ecr.us-east-1.amazonaws.com/second:1"])
def test_the_execution_role_pulls_from_the_images_repositories_only(
    template: Template, monkeypatch: pytest.MonkeyPatch, image: str, repository: str, second: str
) -> None:
    monkeypatch.setitem(cloudformation.SAMPLES, "SandboxImage", [image])
    monkeypatch.setitem(cloudformation.SAMPLES, "SandboxImage2", [second])
    pulled = {
        resource.split("repository/")[-1]
        for resources in cloudformation.branches(template)
        if ("SandboxRepository" in resources) == (image == "")
        for policy in policies.policies(resources)
        for statement in policy.statements
        if "ecr:BatchGetImage" in statement["Action"]
        for resource in statement["Resource"]
    }
    assert pulled == {repository, "second" if second else "none", "none"}


# --- planted faults ------------------------------------------------------------------------------------------


def statement(template: Template, role: str, action: str) -> dict[str, Any]:
    """The statement of a role that grants an action."""
    (policy,) = template["Resources"][role]["Properties"]["Policies"]
    (found,) = (s for s in policy["PolicyDocument"]["Statement"] if action in policies.as_list(s.get("Action", [])))
    assert isinstance(found, dict)
    return found


def properties(template: Template, name: str) -> dict[str, Any]:
    found = template["Resources"][name]["Properties"]
    assert isinstance(found, dict)
    return found


def misspelt_action(t: Template) -> None:
    statement(t, "PollerRole", "sqs:SendMessage")["Action"] = ["sqs:SendMesage"]


def unknown_service(t: Template) -> None:
    statement(t, "PollerRole", "sqs:SendMessage")["Action"] = ["queue:SendMessage"]


def resource_of_another_type(t: Template) -> None:
    statement(t, "PollerRole", "sqs:SendMessage")["Resource"] = {"Fn::GetAtt": ["WorkTable", "Arn"]}


def resource_of_another_type_in_one_branch(t: Template) -> None:
    granted = statement(t, "PollerRole", "secretsmanager:GetSecretValue")
    granted["Resource"] = {
        "Fn::If": ["CreateSecret", {"Fn::GetAtt": ["WorkTable", "Arn"]}, granted["Resource"]["Fn::If"][2]]
    }


def resource_of_no_stack(t: Template) -> None:
    statement(t, "PollerRole", "sqs:SendMessage")["Resource"] = "arn:aws:sqs:us-east-1:123456789012:another"


def name_that_no_resource_has(t: Template) -> None:
    properties(t, "LeaseLoop")["StateMachineName"] = "renamed"


def unknown_condition_key(t: Template) -> None:
    statement(t, "StopperRole", "ecs:StopTask")["Condition"]["ArnEquals"]["ecs:clusterArn"] = "x"


def condition_key_of_another_action(t: Template) -> None:
    statement(t, "PollerRole", "sqs:SendMessage")["Condition"] = {"StringEquals": {"ecs:CreateAction": "RunTask"}}


def unknown_operator(t: Template) -> None:
    granted = statement(t, "StopperRole", "ecs:StopTask")
    granted["Condition"]["ArnEqual"] = granted["Condition"].pop("ArnEquals")


def wildcard_action(t: Template) -> None:
    statement(t, "PollerRole", "sqs:SendMessage")["Action"] = ["sqs:Send*"]


def all_but_some_actions(t: Template) -> None:
    granted = statement(t, "PollerRole", "sqs:SendMessage")
    granted["NotAction"] = granted.pop("Action")


def wildcard_resource(t: Template) -> None:
    statement(t, "PollerRole", "sqs:SendMessage")["Resource"] = "*"


def wildcard_resource_unbounded(t: Template) -> None:
    del statement(t, "StopperRole", "ecs:ListTasks")["Condition"]


def pass_role_unconditional(t: Template) -> None:
    del statement(t, "LauncherRole", "iam:PassRole")["Condition"]


def pass_role_in_lower_case(t: Template) -> None:
    granted = statement(t, "LauncherRole", "iam:PassRole")
    granted["Action"] = "iam:passrole"
    del granted["Condition"]


def access_key(t: Template) -> None:
    t["Resources"]["Key"] = {"Type": "AWS::IAM::AccessKey", "Properties": {"UserName": "operator"}}


def pass_role_to_another_service(t: Template) -> None:
    statement(t, "LauncherRole", "iam:PassRole")["Condition"] = {
        "StringEquals": {"iam:PassedToService": ["ecs-tasks.amazonaws.com", "lambda.amazonaws.com"]}
    }


def run_task_in_any_cluster(t: Template) -> None:
    del statement(t, "LauncherRole", "ecs:RunTask")["Condition"]


def tags_at_any_time(t: Template) -> None:
    del statement(t, "LauncherRole", "ecs:TagResource")["Condition"]


def key_statement(t: Template, role: str) -> dict[str, Any]:
    """The statement that lets a role use the customer's key."""
    (policy,) = properties(t, role)["Policies"]
    (found,) = (
        s["Fn::If"][1] for s in policy["PolicyDocument"]["Statement"] if s.get("Fn::If", [""])[0] == "CustomerKey"
    )
    assert isinstance(found, dict)
    return found


def key_used_directly(t: Template) -> None:
    del key_statement(t, "KeeperRole")["Condition"]


def key_used_through_another_service(t: Template) -> None:
    key_statement(t, "KeeperRole")["Condition"]["StringEquals"]["kms:ViaService"].append("ec2.us-east-1.amazonaws.com")


def any_key(t: Template) -> None:
    key_statement(t, "KeeperRole")["Resource"] = "*"


def shared_role(t: Template) -> None:
    properties(t, "KeeperFunction")["Role"] = {"Fn::GetAtt": ["StopperRole", "Arn"]}


def role_from_elsewhere(t: Template) -> None:
    properties(t, "KeeperFunction")["Role"] = "arn:aws:iam::123456789012:role/admin"


def managed_policy(t: Template) -> None:
    properties(t, "KeeperRole")["ManagedPolicyArns"] = ["arn:aws:iam::aws:policy/AdministratorAccess"]


def trust_in_an_account(t: Template) -> None:
    trust = properties(t, "KeeperRole")["AssumeRolePolicyDocument"]
    trust["Statement"][0]["Principal"] = {"AWS": "123456789012"}


def task_role(t: Template) -> None:
    properties(t, "SandboxTask")["TaskRoleArn"] = {"Fn::GetAtt": ["SandboxExecutionRole", "Arn"]}


def exec_role_reads_parameters(t: Template) -> None:
    statement(t, "SandboxExecRole", "ssmmessages:CreateDataChannel")["Action"].append("ssm:GetParameter")


def execution_role_reads_secrets(t: Template) -> None:
    granted = statement(t, "SandboxExecutionRole", "logs:PutLogEvents")
    granted["Action"].append("secretsmanager:GetSecretValue")


def execution_role_writes_another_log(t: Template) -> None:
    statement(t, "SandboxExecutionRole", "logs:PutLogEvents")["Resource"] = {"Fn::GetAtt": ["KeeperLogs", "Arn"]}


def execution_role_pulls_any_image(t: Template) -> None:
    statement(t, "SandboxExecutionRole", "ecr:BatchGetImage")["Resource"] = {
        "Fn::Sub": "arn:${AWS::Partition}:ecr:${AWS::Region}:${AWS::AccountId}:repository/*"
    }


def public_queue(t: Template) -> None:
    t["Resources"]["OpenQueue"] = {
        "Type": "AWS::SQS::QueuePolicy",
        "Properties": {
            "Queues": [{"Ref": "LaunchQueue"}],
            "PolicyDocument": {
                "Version": "2012-10-17",
                "Statement": [
                    {
                        "Effect": "Allow",
                        "Principal": "*",
                        "Action": ["sqs:SendMessage"],
                        "Resource": {"Fn::GetAtt": ["LaunchQueue", "Arn"]},
                    }
                ],
            },
        },
    }


def public_bucket(t: Template) -> None:
    properties(t, "OutputsBucketPolicy")["PolicyDocument"]["Statement"][0]["Effect"] = "Allow"


def bucket_whose_access_is_not_blocked(t: Template) -> None:
    properties(t, "OutputsBucket")["PublicAccessBlockConfiguration"]["BlockPublicPolicy"] = False


def bucket_without_encryption(t: Template) -> None:
    del properties(t, "OutputsBucket")["BucketEncryption"]


def outputs_anywhere_in_the_bucket(t: Template) -> None:
    (policy,) = properties(t, "TicketsRole")["Policies"]
    (put,) = (
        s["Fn::If"][1] for s in policy["PolicyDocument"]["Statement"] if s.get("Fn::If", [""])[0] == "KeepOutputs"
    )
    put["Resource"] = "arn:aws:s3:::*"


def public_function(t: Template) -> None:
    del properties(t, "TicketsFunctionUrlPublicPermissions")["FunctionUrlAuthType"]


def function_for_every_rule(t: Template) -> None:
    del properties(t, "ObserverFunctionTaskStatePermission")["SourceArn"]


def misspelt_permission(t: Template) -> None:
    properties(t, "ObserverFunctionTaskStatePermission")["Action"] = "lambda:InvokeFunctions"


def intrinsic_that_cannot_be_read(t: Template) -> None:
    statement(t, "PollerRole", "sqs:SendMessage")["Resource"] = {"Fn::ImportValue": "queue"}


@pytest.mark.parametrize(
    ("plant", "reports"),
    [
        (misspelt_action, ["cfn-lint W3037: PollerRole", "parliament UNKNOWN_ACTION: PollerRole"]),
        (unknown_service, ["cfn-lint W3037: PollerRole", "parliament UNKNOWN_PREFIX: PollerRole"]),
        (resource_of_another_type, ["cfn-lint I3510: PollerRole", "parliament RESOURCE_MISMATCH: PollerRole"]),
        (resource_of_another_type_in_one_branch, ["parliament RESOURCE_MISMATCH: PollerRole"]),
        (resource_of_no_stack, ["no one resource of this template"]),
        (name_that_no_resource_has, ["PollerRole: ['states:StartExecution'] on"]),
        (unknown_condition_key, ["parliament UNKNOWN_CONDITION_FOR_ACTION: StopperRole"]),
        (condition_key_of_another_action, ["parliament UNKNOWN_CONDITION_FOR_ACTION: PollerRole"]),
        (unknown_operator, ["cfn-lint E3510: StopperRole", "parliament UNKNOWN_OPERATOR: StopperRole"]),
        (wildcard_action, ["PollerRole: wildcard action sqs:Send*"]),
        (all_but_some_actions, ["PollerRole: NotAction"]),
        (wildcard_resource, ["PollerRole: wildcard resource", "parliament RESOURCE_STAR: PollerRole"]),
        (wildcard_resource_unbounded, ["StopperRole: wildcard resource for ecs:ListTasks without ecs:cluster"]),
        (pass_role_unconditional, ["LauncherRole: iam:PassRole to more than ECS tasks"]),
        (pass_role_in_lower_case, ["LauncherRole: iam:PassRole to more than ECS tasks"]),
        (access_key, ["Key: AWS::IAM::AccessKey"]),
        (pass_role_to_another_service, ["LauncherRole: iam:PassRole to more than ECS tasks"]),
        (run_task_in_any_cluster, ["LauncherRole: ecs:RunTask outside the cluster"]),
        (tags_at_any_time, ["LauncherRole: ecs:TagResource for more than RunTask"]),
        (key_used_directly, ["KeeperRole: kms:Decrypt other than through"]),
        (key_used_through_another_service, ["KeeperRole: kms:Decrypt other than through"]),
        (any_key, ["KeeperRole: wildcard resource for kms:Decrypt"]),
        (
            shared_role,
            ["StopperRole: a role is for one resource", "KeeperRole: a role is for one resource, this one for []"],
        ),
        (role_from_elsewhere, ["KeeperFunction: its role is not of this template"]),
        (managed_policy, ["KeeperRole: managed policies"]),
        (trust_in_an_account, ["KeeperRole: a role is assumed by one service"]),
        (task_role, ["SandboxTask: a task role"]),
        (exec_role_reads_parameters, ["SandboxExecRole: the agent's code would hold ['ssm:GetParameter']"]),
        (execution_role_reads_secrets, ["SandboxExecutionRole: starting a sandbox does not need"]),
        (execution_role_writes_another_log, ["SandboxExecutionRole: writes to more than"]),
        (execution_role_pulls_any_image, ["SandboxExecutionRole: ['ecr:BatchGetImage'"]),
        (public_queue, ["OpenQueue: open to everybody"]),
        (public_bucket, ["OutputsBucketPolicy: open to everybody", "OutputsBucket: answers without TLS"]),
        (bucket_whose_access_is_not_blocked, ["OutputsBucket: public access is not blocked"]),
        (bucket_without_encryption, ["OutputsBucket: not encrypted"]),
        (outputs_anywhere_in_the_bucket, ["TicketsRole: ['s3:PutObject'] on"]),
        (public_function, ["TicketsFunction: open to everybody"]),
        (function_for_every_rule, ["ObserverFunction: open to a service"]),
        (misspelt_permission, ["parliament UNKNOWN_ACTION: ObserverFunction"]),
        (intrinsic_that_cannot_be_read, ["cannot resolve"]),
    ],
)
def test_a_planted_fault_is_seen(template: Template, plant: Callable[[Template], None], reports: list[str]) -> None:
    planted = copy.deepcopy(template)
    plant(planted)
    faults = policies.faults(planted)
    assert [report for report in reports if not any(report in fault for fault in faults)] == [], faults


def test_a_managed_policy_by_way_of_sam_is_seen() -> None:
    source = cloudformation.load(cloudformation.ROOT / "template.yaml")
    keeper = properties(source, "KeeperFunction")
    del keeper["Role"]
    keeper["Policies"] = ["arn:aws:iam::aws:policy/AmazonDynamoDBFullAccess"]
    faults = policies.faults(cloudformation.expand(source))
    assert any(fault.startswith("KeeperFunctionRole: managed policies") for fault in faults), faults


# --- docs/security.md ----------------------------------------------------------------------------------------


def documented_actions(text: str) -> set[tuple[str, str]]:
    """(role, action) of each row of the table of roles; a row without a role goes on with the one above it."""
    found, role = set(), ""
    table = text.split("\n| Role |", 1)[1].split("\n\n", 1)[0]
    for row in table.splitlines()[2:]:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        role = cells[0].strip("`") or role
        found |= {(role, action) for action in cells[1].replace("`", "").split(", ")}
    return found


def test_the_documented_roles_and_actions_are_the_templates(template: Template) -> None:
    assert documented_actions(DOCUMENT.read_text()) == policies.allowed_actions(template)
