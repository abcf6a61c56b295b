"""What ECS, CloudWatch, CodeBuild, PartiQL and layer calls are authorized against; policy evaluation is ministack's.

Source: AWS Service Authorization Reference, "Actions, resources, and condition keys" for each service.
ministack checks every ECS action against the cluster's ARN and supplies no `ecs:*` or `cloudwatch:namespace` keys;
it takes reading a layer for listing all, names no project for calls on builds, and checks the call that brings PartiQL
statements in place of each statement's action on its table. A policy that does not pass here would not pass on AWS.
"""

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs

from ministack import app
from ministack.core import iam_actions, iam_evaluator, router
from ministack.core.responses import get_account_id, get_region, new_uuid
from ministack.services import ecs, tagging

Response = tuple[int, dict[str, str], bytes]
Check = tuple[str, str, dict[str, Any]]  # action, resource, condition keys

# Actions for which the reference lists no resource type: a policy must say "*".
_NO_RESOURCE = {"CreateCluster", "DeregisterTaskDefinition", "DescribeTaskDefinition", "ListClusters"}
_NO_RESOURCE |= {"ListTaskDefinitions", "ListTaskDefinitionFamilies", "ListServices"}
_ON_TASKS = {"StopTask", "DescribeTasks", "ExecuteCommand", "GetTaskProtection", "UpdateTaskProtection"}
_STATEMENT = re.compile(r'\s*(?:(INSERT)\s+INTO|(UPDATE))\s+"?([\w.-]+)', re.I)
_IN_A_CLUSTER = _ON_TASKS | {"RunTask", "StartTask", "ListTasks"}


def install() -> None:
    """Correct what is checked, add the condition keys, and make the checks beyond the first."""
    action_of, resource_of, keys_of = (
        iam_actions.extract_iam_action,
        iam_actions.extract_resource_arn,
        iam_actions.request_tag_context,
    )

    def extract_iam_action(
        service: str, method: str, path: str, headers: dict[str, str], body: bytes, params: dict[str, Any]
    ) -> str | None:
        if service == "lambda" and _layer_version(method, path, params):
            return "lambda:GetLayerVersion"
        if service == "dynamodb" and (checks := _of_statements(headers, body, get_region(), get_account_id())):
            return checks[0][0]
        action: str | None = action_of(service, method, path, headers, body, params)
        return action

    def extract_resource_arn(
        service: str,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
        params: dict[str, Any],
        region: str,
        account_id: str,
    ) -> str:
        if service == "lambda" and (version := _layer_version(method, path, params)):
            return version
        if service == "codebuild" and (project := _project_of_build(_json(body), region, account_id)):
            return project
        if service == "dynamodb" and (checks := _of_statements(headers, body, region, account_id)):
            return checks[0][1]
        action = _target(headers) if service == "ecs" else None
        resources = ecs_resources(action, _json(body), region, account_id) if action else None
        return (
            resources[0]
            if resources
            else str(resource_of(service, method, path, headers, body, params, region, account_id))
        )

    def request_tag_context(service: str, iam_action: str, body: bytes, params: dict[str, Any]) -> dict[str, Any]:
        keys: dict[str, Any] = dict(keys_of(service, iam_action, body, params))
        if service == "ecs":
            keys |= _cluster_key(iam_action.split(":", 1)[-1], _json(body), get_region(), get_account_id())
        elif iam_action == "cloudwatch:PutMetricData" and (namespace := _metric_namespace(body, params)):
            keys["cloudwatch:namespace"] = namespace
        return keys

    def checking(service: str) -> Any:
        handle = app.SERVICE_HANDLERS[service]

        async def checked(
            method: str, path: str, headers: dict[str, str], body: bytes, query: dict[str, Any]
        ) -> Response:
            denied = _further_denial(service, headers, body, query) if app.AUTH else None
            return denied or await handle(method, path, headers, body, query)

        return checked

    iam_actions.extract_iam_action = extract_iam_action
    iam_actions.extract_resource_arn = extract_resource_arn
    iam_actions.request_tag_context = request_tag_context
    for service in ("ecs", "dynamodb"):
        app.SERVICE_HANDLERS[service] = checking(service)
    tagging._RESOURCE_TAG_COLLECTORS["ecs"] = tagging._collect_ecs  # aws:ResourceTag of tasks and definitions


def ecs_resources(action: str, data: dict[str, Any], region: str, account_id: str) -> list[str] | None:
    """The ARNs an action is checked against, all of which must be allowed; None where ministack is right."""
    prefix = f"arn:aws:ecs:{region}:{account_id}:"
    cluster = _name(data.get("cluster") or "default")
    if action in _NO_RESOURCE:
        return ["*"]
    if action in ("RunTask", "StartTask"):
        reference = str(data.get("taskDefinition", ""))  # as given: without its revision if it is given so
        return [reference if reference.startswith("arn:") else f"{prefix}task-definition/{reference}"]
    if action == "RegisterTaskDefinition":
        return [f"{prefix}task-definition/{data.get('family', '')}:*"]
    if action in _ON_TASKS:
        references = data.get("tasks") or [data.get("task", "")]
        return [ref if ref.startswith("arn:") else f"{prefix}task/{cluster}/{ref}" for ref in references]
    if action == "ListTasks":
        instance = _name(data.get("containerInstance") or "*")
        return [f"{prefix}container-instance/{cluster}/{instance}"]
    if action in ("TagResource", "UntagResource", "ListTagsForResource"):
        return [str(data.get("resourceArn", "*"))]
    return None


def _further_denial(service: str, headers: dict[str, str], body: bytes, query: dict[str, Any]) -> Response | None:
    """AWS's reply if a check beyond the first (ministack's, which authenticates) does not pass."""
    key = router.extract_access_key_id(headers, query)
    for checked, resource, keys in _further_checks(headers, body, get_region(), get_account_id()):
        denied = iam_evaluator.enforce(
            key, checked, checked.split(":", 1)[0], get_region(), resource_arn=resource, service_context=keys
        )
        if denied is None:
            continue
        who, explicit = denied.principal_arn, denied.decision == "Deny"
        message = iam_actions.identity_denial_message(checked, who, resource, explicit)
        answer: Response = iam_actions.access_denied_response(
            service, checked, who, new_uuid(), message=message, headers=headers
        )
        return answer
    return None


def _further_checks(headers: dict[str, str], body: bytes, region: str, account_id: str) -> Iterator[Check]:
    for checked, table in _of_statements(headers, body, region, account_id)[1:]:
        yield checked, table, {}
    action, data = _target(headers), _json(body)
    cluster = _cluster_key(action, data, region, account_id)
    for resource in (ecs_resources(action, data, region, account_id) or [])[1:]:
        yield f"ecs:{action}", resource, cluster
    if action != "RunTask":
        return
    if data.get("tags"):
        # "Grant permission to tag resources on creation", Amazon ECS Developer Guide
        name = _name(data.get("cluster") or "default")
        keys = {f"aws:requesttag/{tag.get('key')}".lower(): tag.get("value", "") for tag in data["tags"]}
        keys |= {"aws:tagkeys": [tag.get("key") for tag in data["tags"]], "ecs:createaction": "RunTask"}
        yield "ecs:TagResource", f"arn:aws:ecs:{region}:{account_id}:task/{name}/*", cluster | keys
    definition = ecs._task_defs.get(ecs._resolve_td_key(data.get("taskDefinition", ""))) or {}
    overrides = data.get("overrides") or {}
    for member in ("taskRoleArn", "executionRoleArn"):
        if role := overrides.get(member) or definition.get(member):
            # "Grant a user permissions to pass a role to an AWS service", IAM User Guide
            yield "iam:PassRole", role, {"iam:passedtoservice": "ecs-tasks.amazonaws.com"}


def _of_statements(headers: dict[str, str], body: bytes, region: str, account_id: str) -> list[tuple[str, str]]:
    """The action and table of each PartiQL statement that a call brings; none where one is not known here.

    "IAM security policies with PartiQL for DynamoDB", Amazon DynamoDB Developer Guide.
    """
    if _target(headers) != "BatchExecuteStatement":
        return []
    found = [_STATEMENT.match(str(one.get("Statement"))) for one in _json(body).get("Statements", [])]
    tables = f"arn:aws:dynamodb:{region}:{account_id}:table/"
    checks = [(f"dynamodb:PartiQL{(one[1] or one[2]).title()}", tables + one[3]) for one in found if one]
    return list(dict.fromkeys(checks)) if all(found) else []


def _cluster_key(action: str, data: dict[str, Any], region: str, account_id: str) -> dict[str, Any]:
    if action not in _IN_A_CLUSTER:
        return {}
    return {"ecs:cluster": f"arn:aws:ecs:{region}:{account_id}:cluster/{_name(data.get('cluster') or 'default')}"}


def _layer_version(method: str, path: str, params: dict[str, Any]) -> str | None:
    """The ARN that GetLayerVersionByArn asks for; None for any other call."""
    if method != "GET" or not path.rstrip("/").endswith("/layers"):
        return None
    arn = params.get("Arn")
    return str(arn[0] if isinstance(arn, list) else arn) if arn else None


def _project_of_build(data: dict[str, Any], region: str, account_id: str) -> str | None:
    """The project of the first build that a call names; None where it names none."""
    build = next(iter(data.get("ids") or []), data.get("id"))
    return f"arn:aws:codebuild:{region}:{account_id}:project/{str(build).split(':', 1)[0]}" if build else None


def _metric_namespace(body: bytes, params: dict[str, Any]) -> str | None:
    """PutMetricData's namespace from the Query, JSON or CBOR form of the request."""
    found = params.get("Namespace") or parse_qs(body.decode("latin-1")).get("Namespace")
    if found:
        return str(found[0] if isinstance(found, list) else found)
    if body[:1] == b"{":
        return _json(body).get("Namespace")
    try:
        import cbor2  # noqa: PLC0415 - only this form of this one call needs it
    except ImportError:  # then ministack cannot read the call either
        return None
    data = cbor2.loads(body)
    return data.get("Namespace") if isinstance(data, dict) else None


def _target(headers: dict[str, str]) -> str:
    return headers.get("x-amz-target", "").rsplit(".", 1)[-1]


def _json(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body or b"{}")
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _name(reference: str) -> str:
    return str(reference).rsplit("/", 1)[-1]
