"""Reads every policy out of the template, with concrete ARNs, and says what is wrong with it.

Three readers: cfn-lint (the current list of actions), parliament (condition keys and their types, as of April 2025),
and the project's own rules. Which role needs what is not decided here; that is template.yaml and docs/security.md.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import cfnlint.config
import cfnlint.decode
import cfnlint.runner
import parliament

from tests.unit.cloudformation import PSEUDO, SAMPLES, SHAPES, Resources, branches, documents, strings

# What ECS Exec's agent needs (Amazon ECS Developer Guide, "ECS Exec"), and all that a sandbox may ever hold
EXEC_ACTIONS = {f"ssmmessages:{verb}{kind}Channel" for verb in ("Create", "Open") for kind in ("Control", "Data")}
# Actions for which AWS knows no resource, so that only "*" can be said, and the condition that must bound each
WITHOUT_RESOURCE: dict[str, tuple[str | None, str]] = {
    "ecs:ListTasks": ("ecs:cluster", "its only resource type is a container instance, which Fargate has none of"),
    "xray:PutTraceSegments": (None, "knows no resource: a trace is the account's; it only writes"),
    "xray:PutTelemetryRecords": (None, "as PutTraceSegments"),
    "xray:GetSamplingRules": (None, "knows no resource that all of X-Ray's data agree on; it reads how much to trace"),
    "xray:GetSamplingTargets": (None, "as GetSamplingRules"),
    "ecr:GetAuthorizationToken": (None, "knows neither resource nor condition; the token opens only what IAM allows"),
    **dict.fromkeys(EXEC_ACTIONS, (None, "know neither resource nor condition; granted only with EnableExec")),
}
# The services that may use the customer's key for a function; logs use it by the key's own policy
KEY_USERS = {"dynamodb", "s3", "sqs", "secretsmanager"}
# What parliament says that does not hold, by its finding and what it is about, and why
NOT_A_FAULT = {
    ("NO_VERSION", "FunctionEvery"): "SAM writes schedules' roles so; without variables every version means the same",
    ("RESOURCE_STAR", "ecs:ListTasks"): "see WITHOUT_RESOURCE",
    ("RESOURCE_MISMATCH", "states:DescribeExecution"): "its data ask for an express execution besides a standard one",
    ("UNKNOWN_CONDITION_FOR_ACTION", "lambda:InvokedViaFunctionUrl"): "a key younger than its data",
}
# Callers without AWS credentials come in only by a function URL, whose function checks them itself
PUBLIC = {
    "lambda:InvokeFunctionUrl": ("lambda:FunctionUrlAuthType", "NONE"),
    "lambda:InvokeFunction": ("lambda:InvokedViaFunctionUrl", "true"),
}


@dataclass(frozen=True)
class Policy:
    owner: str  # the resource that holds it, or for a permission the function that it opens
    kind: str  # "identity", "trust" or "resource"
    text: str

    @property
    def statements(self) -> list[dict[str, Any]]:
        return as_list(json.loads(self.text)["Statement"])


def policies(resources: Resources) -> list[Policy]:
    """Every policy document, a role's trust and a function's permissions included."""
    found = []
    for owner, resource in resources.items():
        if resource["Type"] == "AWS::Lambda::Permission":
            found.append(_permission(resource["Properties"]))
        for key, document in documents(resource["Properties"]):
            if key == "AssumeRolePolicyDocument":
                kind = "trust"
            else:
                kind = "identity" if resource["Type"].startswith("AWS::IAM::") else "resource"
            found.append(Policy(owner, kind, json.dumps(document, sort_keys=True)))
    return found


def _permission(properties: dict[str, Any]) -> Policy:
    """The statement that Lambda makes of a permission (AddPermission, Lambda API reference)."""
    function, principal = properties["FunctionName"], properties["Principal"]
    keys = {
        "SourceArn": ("ArnLike", "aws:SourceArn"),
        "SourceAccount": ("StringEquals", "aws:SourceAccount"),
        "FunctionUrlAuthType": ("StringEquals", "lambda:FunctionUrlAuthType"),
        "InvokedViaFunctionUrl": ("Bool", "lambda:InvokedViaFunctionUrl"),
    }
    condition: dict[str, dict[str, str]] = defaultdict(dict)
    for name, (operator, key) in keys.items():
        if name in properties:
            value = properties[name]
            condition[operator][key] = str(value).lower() if isinstance(value, bool) else value
    statement = {
        "Effect": "Allow",
        "Principal": "*" if principal == "*" else {"Service": principal},
        "Action": properties["Action"],
        "Resource": function if function.startswith("arn:") else SHAPES["AWS::Lambda::Function"].arn.format(function),
        "Condition": condition,
    }
    return Policy(function, "resource", json.dumps({"Version": "2012-10-17", "Statement": [statement]}))


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def allowed_actions(template: dict[str, Any]) -> set[tuple[str, str]]:
    """(role, action) for every action that some branch of an expanded template grants."""
    return {
        (policy.owner, action)
        for resources in branches(template)
        for policy in policies(resources)
        if policy.kind == "identity"
        for statement in policy.statements
        for action in as_list(statement.get("Action", []))
    }


# --- faults --------------------------------------------------------------------------------------------------


def faults(template: dict[str, Any]) -> set[str]:
    """Everything that is wrong with the policies of an expanded template, a line each; empty if all is well."""
    found: set[str] = set()
    checked: set[tuple[Policy, frozenset[str]]] = set()
    for resources in branches(template):
        found |= {*_role_faults(resources), *_sandbox_faults(resources), *_bucket_faults(resources)}
        known = frozenset(_known_arns(resources))
        for policy in policies(resources):
            if (policy, known) not in checked:
                checked.add((policy, known))
                found |= {f"{policy.owner}: {fault}" for fault in _statement_faults(policy, known)}
        for name, resource in resources.items():
            if any(documents(resource["Properties"])):
                found |= _lint_faults(name, json.dumps(resource, sort_keys=True))
    for policy in {policy for policy, _ in checked}:
        found |= {f for f in _parliament_faults(policy) if not any(excuses(waiver, f) for waiver in NOT_A_FAULT)}
    return found


def excuses(waiver: tuple[str, str], fault: str) -> bool:
    """Whether an entry of NOT_A_FAULT speaks of this fault."""
    finding, about = waiver
    return fault.startswith(f"parliament {finding}:") and about in fault


@cache
def _lint_faults(name: str, resource: str) -> frozenset[str]:
    """What cfn-lint says of the policies in one resource (JSON); cached, since most resources recur."""
    text = f'{{"AWSTemplateFormatVersion": "2010-09-09", "Resources": {{"{name}": {resource}}}}}'
    template, errors = cfnlint.decode.decode_str(text)
    matches = errors or list(_linter().validate_template(template))
    return frozenset(
        f"cfn-lint {match.rule.id}: {name}: {match.message[:200]}"
        for match in matches
        if errors or any("Polic" in str(step) for step in list(match.path)[2:])
    )


@cache
def _linter() -> Any:
    return cfnlint.runner.Runner(cfnlint.config.ConfigMixIn(include_checks=["I"], regions=[PSEUDO["AWS::Region"]]))


@cache
def _parliament_faults(policy: Policy) -> frozenset[str]:
    document = json.loads(policy.text)
    for statement in as_list(document["Statement"]):
        if policy.kind == "trust":  # it stands on the role itself, and says so nowhere
            statement["Resource"] = SHAPES["AWS::IAM::Role"].arn.format(policy.owner)
    findings = parliament.analyze_policy_string(json.dumps(document)).findings
    return frozenset(f"parliament {finding.issue}: {policy.owner}: {finding.detail}" for finding in findings)


def _statement_faults(policy: Policy, known: frozenset[str]) -> Iterator[str]:
    if "unresolved:" in policy.text:
        yield f"a policy refers to what tests/unit/cloudformation.py cannot resolve: {policy.text}"
    for statement in policy.statements:
        actions, text = as_list(statement.get("Action", [])), json.dumps(statement)
        if policy.kind == "resource" and statement["Effect"] == "Deny":
            continue  # takes away only
        conditions = {key: value for block in statement.get("Condition", {}).values() for key, value in block.items()}
        for forbidden in {"NotAction", "NotResource", "NotPrincipal"} & statement.keys():
            yield f"{forbidden} allows what nobody listed: {text}"
        for action in actions:
            if "*" in action or "?" in action:
                yield f"wildcard action {action}"
        if policy.kind == "trust":
            services = as_list(statement["Principal"].get("Service", [])) if len(statement["Principal"]) == 1 else []
            if actions != ["sts:AssumeRole"] or len(services) != 1:
                yield f"a role is assumed by one service and nobody else: {text}"
            continue
        if policy.kind == "resource":
            if statement.get("Principal") in ("*", {"AWS": "*"}):
                if any(conditions.get(key) != value for key, value in (PUBLIC.get(a, ("", "")) for a in actions)):
                    yield f"open to everybody: {text}"
            elif not {"aws:SourceArn", "aws:SourceAccount"} & conditions.keys():
                yield f"open to a service on anybody's behalf: {text}"
            continue
        if policy.kind == "identity":
            yield from _resource_faults(statement, actions, conditions, known)
        yield from _action_faults(statement, actions, known)


def _resource_faults(
    statement: dict[str, Any], actions: list[str], conditions: dict[str, Any], known: frozenset[str]
) -> Iterator[str]:
    for resource in as_list(statement.get("Resource", [])):
        if resource == "*":
            for action in actions:
                bound, _ = WITHOUT_RESOURCE.get(action, ("no bound will do: name the resource", ""))
                if bound is not None and bound not in conditions:
                    yield f"wildcard resource for {action} without {bound}"
        elif not any(resource == arn or (arn.endswith("/") and resource.startswith(arn)) for arn in known):
            yield f"{actions} on {resource}, which is no one resource of this template"


def _action_faults(statement: dict[str, Any], actions: list[str], known: frozenset[str]) -> Iterator[str]:
    condition = statement.get("Condition", {})
    equal, cluster = condition.get("StringEquals", {}), condition.get("ArnEquals", {}).get("ecs:cluster", "")
    for action in actions:
        match action.lower().split(":"):  # IAM does not mind the case
            case "iam", "passrole":
                if condition != {"StringEquals": {"iam:PassedToService": "ecs-tasks.amazonaws.com"}}:
                    yield "iam:PassRole to more than ECS tasks"
            case "kms", _:
                via = as_list(equal.get("kms:ViaService", []))
                if not via or {str(service).split(".")[0] for service in via} - KEY_USERS:
                    yield f"{action} other than through {sorted(KEY_USERS)}"
            case "ecs", "tagresource":  # knows no ecs:cluster
                if equal.get("ecs:CreateAction") != "RunTask":
                    yield "ecs:TagResource for more than RunTask"
            case "ecs", _:
                if cluster not in known or ":cluster/" not in cluster:
                    yield f"{action} outside the cluster"


def _known_arns(resources: Resources) -> Iterator[str]:
    """The ARNs a policy may name: this stack's resources and their parts, and what a parameter names."""
    for name, resource in resources.items():
        if shape := SHAPES.get(resource["Type"]):
            called = resource["Properties"].get(shape.name, name)
            yield from (form.format(called) for form in (shape.arn, shape.ref, *shape.parts))
    yield from (value for values in SAMPLES.values() for value in values if value.startswith("arn:"))
    yield from (SHAPES["AWS::S3::Bucket"].parts[0].format(name) for name in SAMPLES["Outputs"])
    listed = {name for names in SAMPLES["StagingBuckets"] for name in names.split(",") if name} | {"x2", "x3"}
    yield from (SHAPES["AWS::S3::Bucket"].parts[0].format(name) for name in listed)
    for definition in _of_type(resources, "AWS::ECS::TaskDefinition").values():
        for container in definition["ContainerDefinitions"]:
            repository = re.fullmatch(
                r"\d{12}\.dkr\.ecr\.[a-z0-9-]+\.amazonaws\.com/([^:@]+)[:@].+", container["Image"]
            )
            if repository:
                yield SHAPES["AWS::ECR::Repository"].arn.format(repository[1])
    yield SHAPES["AWS::ECR::Repository"].arn.format("none")  # the template's word for an image from elsewhere


def _role_faults(resources: Resources) -> Iterator[str]:
    roles = _of_type(resources, "AWS::IAM::Role")
    arns = {SHAPES["AWS::IAM::Role"].arn.format(role.get("RoleName", name)): name for name, role in roles.items()}
    for name, role in roles.items():
        if role.get("ManagedPolicyArns"):
            yield f"{name}: managed policies grant what AWS changes at will"
    for name, resource in resources.items():
        if resource["Type"].startswith("AWS::IAM::") and resource["Type"] != "AWS::IAM::Role":
            yield f"{name}: {resource['Type']}, where a role with policies of its own does"
        if resource["Type"] == "AWS::Lambda::Function" and resource["Properties"].get("Role") not in arns:
            yield f"{name}: its role is not of this template"
    users: dict[str, list[str]] = {arn: [] for arn in arns}
    for name, resource in resources.items():
        if resource["Type"] != "AWS::IAM::Role":
            for arn in set(strings(resource["Properties"])) & arns.keys():
                users[arn].append(name)
    tasks = set(_of_type(resources, "AWS::ECS::TaskDefinition"))  # the same machine with other images
    for arn, names in users.items():
        if len(names) != 1 and not (names and set(names) <= tasks):
            yield f"{arns[arn]}: a role is for one resource, this one for {sorted(names)}"


def _exec_faults(roles: Resources, execution_role: str) -> Iterator[str]:
    """The other role that tasks can have: RunTask's override gives it to the container, so to the agent's code."""
    for name, role in roles.items():
        trusted = "ecs-tasks.amazonaws.com" in str(role["AssumeRolePolicyDocument"])
        if not trusted or name == execution_role:
            continue
        for policy in policies({name: {"Type": "AWS::IAM::Role", "Properties": role}}):
            for statement in policy.statements if policy.kind == "identity" else []:
                if more := set(as_list(statement.get("Action", []))) - EXEC_ACTIONS:
                    yield f"{name}: the agent's code would hold {sorted(more)}"


def _sandbox_faults(resources: Resources) -> Iterator[str]:
    roles = _of_type(resources, "AWS::IAM::Role")
    may = {"ecr:GetAuthorizationToken", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"}
    may |= {"ecr:BatchCheckLayerAvailability", "logs:CreateLogStream", "logs:PutLogEvents"}
    for name, task in _of_type(resources, "AWS::ECS::TaskDefinition").items():
        if "TaskRoleArn" in task:
            yield f"{name}: a task role would hand AWS credentials to the agent's code"
        role = str(task.get("ExecutionRoleArn", "")).rsplit("/", 1)[-1]
        yield from _exec_faults(roles, role)
        groups = {
            SHAPES["AWS::Logs::LogGroup"].arn.format(container["LogConfiguration"]["Options"]["awslogs-group"])
            for container in task["ContainerDefinitions"]
        }
        for policy in policies({role: {"Type": "AWS::IAM::Role", "Properties": roles.get(role, {})}}):
            for statement in policy.statements if policy.kind == "identity" else []:
                actions = set(as_list(statement.get("Action", [])))
                if not actions <= may:
                    yield f"{role}: starting a sandbox does not need {sorted(actions - may)}"
                writes = any(action.startswith("logs:") for action in actions)
                if writes and {*as_list(statement["Resource"])} != groups:
                    yield f"{role}: writes to more than {sorted(groups)}"


def _bucket_faults(resources: Resources) -> Iterator[str]:
    """A bucket is private, encrypted, and answers over TLS only."""
    denied = [
        (statement["Resource"], statement.get("Principal"), statement["Action"])
        for policy in policies(resources)
        for statement in policy.statements
        if policy.kind == "resource"
        and statement["Effect"] == "Deny"
        and statement.get("Condition") == {"Bool": {"aws:SecureTransport": "false"}}
    ]
    for name, bucket in _of_type(resources, "AWS::S3::Bucket").items():
        arn = SHAPES["AWS::S3::Bucket"].arn.format(bucket.get("BucketName", name))
        block = bucket.get("PublicAccessBlockConfiguration", {})
        if len(block) != 4 or not all(value is True for value in block.values()):
            yield f"{name}: public access is not blocked"
        if "BucketEncryption" not in bucket:
            yield f"{name}: not encrypted"
        if ([arn, f"{arn}/*"], "*", "s3:*") not in denied:
            yield f"{name}: answers without TLS"


def _of_type(resources: Resources, kind: str) -> dict[str, Any]:
    return {name: resource["Properties"] for name, resource in resources.items() if resource["Type"] == kind}
