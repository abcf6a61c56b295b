"""The console's pages, in each partition. The forms are the console's own; whether they open is not tried."""

import pytest

from shared.links import links

TASK = "task/fleet-Cluster-1/0123abcd"


@pytest.mark.parametrize(
    ("partition", "region", "host"),
    [
        ("aws", "eu-west-1", "eu-west-1.console.aws.amazon.com"),
        ("aws-cn", "cn-north-1", "cn-north-1.console.amazonaws.cn"),
        ("aws-us-gov", "us-gov-west-1", "us-gov-west-1.console.amazonaws-us-gov.com"),
    ],
)
def test_a_task_its_log_and_the_loop_have_a_page_in_their_partition_s_console(
    partition: str, region: str, host: str
) -> None:
    machine = f"arn:{partition}:states:{region}:123456789012:stateMachine:fleet-lease-loop"
    assert links(f"arn:{partition}:ecs:{region}:123456789012:{TASK}", "/fleet/sandbox", machine) == {
        "task": f"https://{host}/ecs/v2/clusters/fleet-Cluster-1/tasks/0123abcd?region={region}",
        "log": f"https://{host}/cloudwatch/home?region={region}#logsV2:log-groups/log-group/$252Ffleet$252Fsandbox"
        "/log-events/sandbox$252Fsandbox$252F0123abcd",
        "loop": f"https://{host}/states/home?region={region}#/statemachines/view/{machine}",
    }


@pytest.mark.parametrize("arn", [f"arn:aws-iso:ecs:us-iso-east-1:1:{TASK}", "arn:aws:ecs:eu-west-1:1:task/1", "task"])
def test_no_page_is_made_up(arn: str) -> None:
    assert links(arn, "/fleet/sandbox", "machine") == {}
