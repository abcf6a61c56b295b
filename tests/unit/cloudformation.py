"""Stands in for CloudFormation: a template's resources with concrete ARNs, for every way its conditions turn out.

Knows only what the policies need (policies.py judges them); SAM itself is expanded by sam_transform.py.
"""

import itertools
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cfnlint.decode.cfn_yaml

ROOT = Path(__file__).parents[2]
Resources = dict[str, Any]

PSEUDO = {
    "AWS::Partition": "aws",
    "AWS::Region": "us-east-1",
    "AWS::AccountId": "123456789012",
    "AWS::StackName": "fleet",
    "AWS::URLSuffix": "amazonaws.com",
}
# Values of parameters whose shape a policy depends on, every one of them tried; others get their default or a word
SAMPLES = {
    "EnvironmentKeySecretArn": ["", "arn:aws:secretsmanager:us-east-1:123456789012:secret:given-AbCdEf"],
    "WebhookSecretArn": ["", "arn:aws:secretsmanager:us-east-1:123456789012:secret:webhook-AbCdEf"],
    "KmsKeyArn": ["", "arn:aws:kms:us-east-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"],
    "StagingBuckets": ["", "staging-one,staging-two"],
    "Outputs": ["off", "on", "given-bucket"],
    "SandboxImage": ["123456789012.dkr.ecr.us-east-1.amazonaws.com/team/sandbox:1", "public.example/sandbox@sha256:ab"],
}


@dataclass(frozen=True)
class Shape:
    """What Ref and GetAtt give for a resource type, and the ARNs that stand for parts of such a resource."""

    name: str  # the property that names it; without it, its logical id does
    ref: str
    arn: str
    parts: tuple[str, ...] = ()


_HERE = "us-east-1:123456789012"
SHAPES = {
    "AWS::DynamoDB::Table": Shape(
        "TableName", "{}", f"arn:aws:dynamodb:{_HERE}:table/{{}}", (f"arn:aws:dynamodb:{_HERE}:table/{{}}/index/",)
    ),
    "AWS::CodeBuild::Project": Shape("Name", "{}", f"arn:aws:codebuild:{_HERE}:project/{{}}"),
    "AWS::ECS::Cluster": Shape(
        "ClusterName", "{}", f"arn:aws:ecs:{_HERE}:cluster/{{}}", (f"arn:aws:ecs:{_HERE}:task/{{}}/*",)
    ),
    "AWS::ECS::TaskDefinition": Shape(
        "Family", f"arn:aws:ecs:{_HERE}:task-definition/{{}}:1", f"arn:aws:ecs:{_HERE}:task-definition/{{}}:1"
    ),
    "AWS::ECR::Repository": Shape("RepositoryName", "{}", f"arn:aws:ecr:{_HERE}:repository/{{}}"),
    "AWS::Events::Rule": Shape("Name", "{}", f"arn:aws:events:{_HERE}:rule/{{}}"),
    "AWS::IAM::Role": Shape("RoleName", "{}", "arn:aws:iam::123456789012:role/{}"),
    "AWS::Lambda::Function": Shape("FunctionName", "{}", f"arn:aws:lambda:{_HERE}:function:{{}}"),
    "AWS::Lambda::LayerVersion": Shape(
        "LayerName",
        f"arn:aws:lambda:{_HERE}:layer:{{}}:1",
        f"arn:aws:lambda:{_HERE}:layer:{{}}:1",
        (f"arn:aws:lambda:{_HERE}:layer:{{}}:*",),
    ),
    "AWS::Logs::LogGroup": Shape("LogGroupName", "{}", f"arn:aws:logs:{_HERE}:log-group:{{}}:*"),
    "AWS::S3::Bucket": Shape("BucketName", "{}", "arn:aws:s3:::{}", ("arn:aws:s3:::{}/",)),
    "AWS::SecretsManager::Secret": Shape(
        "Name",
        f"arn:aws:secretsmanager:{_HERE}:secret:{{}}-AbCdEf",
        f"arn:aws:secretsmanager:{_HERE}:secret:{{}}-AbCdEf",
    ),
    "AWS::SNS::Topic": Shape("TopicName", f"arn:aws:sns:{_HERE}:{{}}", f"arn:aws:sns:{_HERE}:{{}}"),
    "AWS::SQS::Queue": Shape("QueueName", "https://sqs/{}", f"arn:aws:sqs:{_HERE}:{{}}"),
    "AWS::StepFunctions::StateMachine": Shape(
        "StateMachineName",
        f"arn:aws:states:{_HERE}:stateMachine:{{}}",
        f"arn:aws:states:{_HERE}:stateMachine:{{}}",
        (f"arn:aws:states:{_HERE}:execution:{{}}:*",),
    ),
}


def load(path: Path) -> dict[str, Any]:
    """A template with its intrinsics in their long form."""
    template: dict[str, Any] = json.loads(json.dumps(cfnlint.decode.cfn_yaml.load(str(path))))
    return template


def expand(template: dict[str, Any]) -> dict[str, Any]:
    """The template without SAM. Raises CalledProcessError if SAM refuses it."""
    done = subprocess.run(
        [ROOT / ".venv-aws/bin/python", "-m", "tests.unit.sam_transform"],
        input=json.dumps(template),
        cwd=ROOT,
        env=os.environ | {"AWS_DEFAULT_REGION": PSEUDO["AWS::Region"]},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    expanded: dict[str, Any] = json.loads(done.stdout)
    return expanded


def branches(template: dict[str, Any]) -> Iterator[Resources]:
    """The resolved resources of an expanded template, once for every way in which its policies can turn out."""
    for resolver in _resolvers(template):
        yield resolver.resources()


def outcomes(template: dict[str, Any]) -> dict[str, set[bool]]:
    """What each condition that a policy depends on comes out as, over all branches."""
    found: dict[str, set[bool]] = {name: set() for name in _deciding(template)[0]}
    for resolver in _resolvers(template):
        for name, values in found.items():
            values.add(resolver.holds({"Condition": name}))
    return found


def _resolvers(template: dict[str, Any]) -> Iterator["_Resolver"]:
    """For each resource with a policy every choice of what decides it, beside one choice of what decides others."""
    compared = [template["Conditions"][name] for name in _deciding(template)[0]]
    parameters = template.get("Parameters", {})
    first = {name: parameter.get("Default", "word") for name, parameter in parameters.items()}
    seen = set()
    for owner in template["Resources"]:
        deciding = sorted(_deciding(template, owner)[1])
        for values in itertools.product(*(_values_of(name, parameters[name], compared) for name in deciding)):
            chosen = first | dict(zip(deciding, values, strict=True))
            if (key := tuple(chosen.values())) not in seen:
                seen.add(key)
                yield _Resolver(template, chosen)


def _deciding(template: dict[str, Any], owner: str | None = None) -> tuple[set[str], set[str]]:
    """The conditions, and the parameters, that decide what policies (one resource's) say or whether they are there."""
    parts: list[Any] = []
    for name, resource in template["Resources"].items():
        policies = [document for _, document in documents(resource.get("Properties", {}))]
        if owner in (None, name) and (policies or resource["Type"] == "AWS::Lambda::Permission"):
            parts += [*policies, {"Condition": resource.get("Condition")}]
    conditions: set[str] = set()
    while new := {name for part in parts for name in _named(part, template.get("Conditions", {}))} - conditions:
        conditions |= new
        parts += [template["Conditions"][name] for name in new]
    texts = set(strings(parts))
    names = texts.union(*(re.findall(r"\$\{(\w+)\}", text) for text in texts))
    return conditions, names & template.get("Parameters", {}).keys()


def _named(node: Any, conditions: dict[str, Any]) -> Iterator[str]:
    """The conditions that a part of a template names."""
    if isinstance(node, dict):
        names = [node.get("Condition"), *node.get("Fn::If", [])[:1]]
        yield from (name for name in names if isinstance(name, str) and name in conditions)
    for child in _children(node):
        yield from _named(child, conditions)


def _values_of(name: str, parameter: dict[str, Any], conditions: list[Any]) -> list[Any]:
    """Every value that the conditions tell apart, one that equals none of them, and the samples."""
    compared = list(_compared(conditions, name))
    choices = [*SAMPLES.get(name, []), *parameter.get("AllowedValues", []), parameter.get("Default", "word"), "word"]
    other = next(choice for choice in choices if choice not in compared)
    return list(dict.fromkeys([*SAMPLES.get(name, []), *compared, other]))


def _compared(node: Any, parameter: str) -> Iterator[str]:
    if isinstance(node, dict) and {"Ref": parameter} in (sides := node.get("Fn::Equals", [])):
        yield from (side for side in sides if isinstance(side, str))
    for child in _children(node):
        yield from _compared(child, parameter)


def _children(node: Any) -> list[Any]:
    return [*node.values()] if isinstance(node, dict) else node if isinstance(node, list) else []


class _Resolver:
    """Stands in for CloudFormation. What it does not know becomes text with `unresolved:`, a fault if in a policy."""

    def __init__(self, template: dict[str, Any], parameters: dict[str, Any]) -> None:
        self._template, self._values = template, PSEUDO | parameters

    def resources(self) -> Resources:
        live = {
            name: resource
            for name, resource in self._template["Resources"].items()
            if "Condition" not in resource or self.holds({"Condition": resource["Condition"]})
        }
        return {
            name: {"Type": resource["Type"], "Properties": self._value(resource.get("Properties", {}))}
            for name, resource in live.items()
        }

    def _value(self, node: Any) -> Any:
        if isinstance(node, list):
            return [value for value in map(self._value, node) if value is not None]
        if not isinstance(node, dict):
            return node
        if len(node) == 1:
            ((function, argument),) = node.items()
            if function == "Ref" or function.startswith("Fn::"):
                return self._call(function, argument)
        resolved = {key: self._value(value) for key, value in node.items()}
        return {key: value for key, value in resolved.items() if value is not None}

    def _call(self, function: str, argument: Any) -> Any:
        match function:
            case "Ref":
                return self._ref(argument)
            case "Fn::GetAtt":
                name, attribute = argument.split(".", 1) if isinstance(argument, str) else argument
                return self._attribute(name, attribute)
            case "Fn::If":
                return self._value(argument[1 if self.holds({"Condition": argument[0]}) else 2])
            case "Fn::Sub":
                return self._sub(argument)
            case "Fn::Join":
                parts = self._value(argument[1])
                return argument[0].join(map(str, parts if isinstance(parts, list) else [parts]))
            case "Fn::Split":
                return str(self._value(argument[1])).split(argument[0])
            case "Fn::Select":
                choices = self._value(argument[1])
                return choices[int(argument[0])] if isinstance(choices, list) else f"unresolved:{function}"
        return f"unresolved:{function}"

    def _ref(self, name: str) -> Any:
        if name == "AWS::NoValue":
            return None
        return self._values[name] if name in self._values else self._attribute(name, "Ref")

    def _attribute(self, name: str, attribute: str) -> str:
        resource = self._template["Resources"].get(name, {})
        shape = SHAPES.get(resource.get("Type", ""))
        if shape is None or attribute not in ("Ref", "Arn", "Id"):
            return f"unresolved:{name}.{attribute}"
        called = str(self._value(resource.get("Properties", {}).get(shape.name, name)))
        return (shape.arn if attribute == "Arn" else shape.ref).format(called)

    def _sub(self, argument: Any) -> str:
        text, local = argument if isinstance(argument, list) else (argument, {})

        def fill(match: re.Match[str]) -> str:
            name = match[1]
            if name.startswith("!"):
                return f"${{{name[1:]}}}"
            if name in local:
                return str(self._value(local[name]))
            return str(self._attribute(*name.split(".", 1)) if "." in name else self._ref(name))

        return re.sub(r"\$\{([^}]+)\}", fill, text)

    def holds(self, node: Any) -> bool:
        """Whether a condition is true in this branch."""
        ((function, argument),) = node.items()
        match function:
            case "Condition":
                return self.holds(self._template["Conditions"][argument])
            case "Fn::Equals":
                left, right = map(self._value, argument)
                return str(left) == str(right)
            case "Fn::Not":
                return not self.holds(argument[0])
            case "Fn::And":
                return all(map(self.holds, argument))
            case "Fn::Or":
                return any(map(self.holds, argument))
        raise NotImplementedError(function)


def documents(node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The policy documents within a part of a template, each with the name of its property."""
    for key, value in node.items() if isinstance(node, dict) else (("", item) for item in node):
        if isinstance(value, dict) and "Statement" in value:
            yield key, value
        elif isinstance(value, dict | list):
            yield from documents(value)


def strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    for child in _children(node):
        yield from strings(child)
