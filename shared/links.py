"""Where an operator looks: pages of the AWS console, built from ARNs alone. Pure; whether they open is IAM's matter."""

import re
from urllib.parse import quote

CONSOLES = {
    "aws": "console.aws.amazon.com",
    "aws-cn": "console.amazonaws.cn",
    "aws-us-gov": "console.amazonaws-us-gov.com",
}
_TASK = re.compile(r"arn:(?P<partition>[^:]+):ecs:(?P<region>[^:]+):\d+:task/(?P<cluster>[^/]+)/(?P<task>[^/]+)")
STREAM = "sandbox/sandbox/"  # awslogs' prefix and the container's name (template.yaml), before the task's id


def links(task_arn: str, log_group: str, state_machine_arn: str) -> dict[str, str]:
    """The pages of a task, of its log stream and of the lease loop; empty if it is no task of a console that we know.

    The loop's is its state machine's, which lists executions, the running one first: one may hand over at any time.
    """
    parts = _TASK.fullmatch(task_arn)
    if parts is None or parts["partition"] not in CONSOLES:
        return {}
    partition, region, cluster, task = parts["partition"], parts["region"], parts["cluster"], parts["task"]
    console = f"https://{region}.{CONSOLES[partition]}"
    log = f"log-group/{_twice(log_group)}/log-events/{_twice(STREAM + task)}"
    return {
        "task": f"{console}/ecs/v2/clusters/{cluster}/tasks/{task}?region={region}",
        "log": f"{console}/cloudwatch/home?region={region}#logsV2:log-groups/{log}",
        "loop": f"{console}/states/home?region={region}#/statemachines/view/{state_machine_arn}",
    }


def _twice(part: str) -> str:
    """The console wants its own path encoded twice, with $ for %."""
    return quote(quote(part, safe=""), safe="").replace("%", "$")
