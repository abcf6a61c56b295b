"""Each set of parameters that docs/operations.md names, deployed to the local AWS; what the template refuses.

One local AWS: `sam deploy` for the defaults, then the template that it packaged for the other sets. Types that are only
recorded (local/aws/recorded.py) are linted, not tried.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from cfnlint import decode

from local import stack
from local.aws.recorded import RECORDED_ONLY

GIVEN = {"EnvironmentId": "env_sets"}
IMAGE = "111122223333.dkr.ecr.us-east-1.amazonaws.com/sandbox@sha256:" + "0" * 64
EXISTING = {"NetworkMode": "existing", "SubnetIds": "subnet-0a,subnet-0b", "SecurityGroupIds": "sg-0a"}
MADE_IN_EVERY_NETWORK = ("Vpc", "PublicSubnetA", "PublicSubnetB", "SandboxSecurityGroup")
MADE_FOR_THE_IMAGE = ("SandboxRepository", "ImageBuild", "ImageFunction", "SandboxImageBuild")


class Deployer:
    """The local AWS with the template built, and what the tests ask of it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.cloudformation, self.bucket = self.client("cloudformation"), "templates"
        self.client("s3").create_bucket(Bucket=self.bucket)

    def client(self, service: str) -> Any:
        session: Any = boto3.Session("test", "test", region_name="us-east-1")
        return session.client(service, endpoint_url=self.url)

    def deploy(self, name: str, **parameters: str) -> dict[str, str]:
        """A stack of the template as `sam deploy` packaged it for the default one, or an update of it; its outputs."""
        body = self.cloudformation.get_template(StackName=stack.STACK, TemplateStage="Original")["TemplateBody"]
        self.client("s3").put_object(Bucket=self.bucket, Key="template", Body=body.encode())
        apply, done = self.cloudformation.create_stack, "stack_create_complete"
        if name == stack.STACK:
            apply, done = self.cloudformation.update_stack, "stack_update_complete"
        apply(
            StackName=name,
            TemplateURL=f"{self.url}/{self.bucket}/template",
            Capabilities=["CAPABILITY_IAM", "CAPABILITY_AUTO_EXPAND"],
            Parameters=_asked(parameters),
        )
        self.cloudformation.get_waiter(done).wait(StackName=name, WaiterConfig={"Delay": 1, "MaxAttempts": 60})
        described = self.cloudformation.describe_stacks(StackName=name)["Stacks"][0]
        return {output["OutputKey"]: output["OutputValue"] for output in described["Outputs"]}

    def resources(self, name: str) -> dict[str, str]:
        """Physical id by logical id."""
        pages = self.cloudformation.get_paginator("list_stack_resources").paginate(StackName=name)
        return {
            resource["LogicalResourceId"]: resource["PhysicalResourceId"]
            for page in pages
            for resource in page["StackResourceSummaries"]
        }

    def launch_settings(self, resources: dict[str, str]) -> dict[str, str]:
        """What the launcher is told, by variable."""
        found = self.client("lambda").get_function_configuration(FunctionName=resources["LauncherFunction"])
        settings: dict[str, str] = found["Environment"]["Variables"]
        return settings

    def image(self, outputs: dict[str, str]) -> str:
        found = self.client("ecs").describe_task_definition(taskDefinition=outputs["TaskDefinitionArn"])
        image: str = found["taskDefinition"]["containerDefinitions"][0]["image"]
        return image

    def delete(self, name: str) -> None:
        self.cloudformation.delete_stack(StackName=name)
        self.cloudformation.get_waiter("stack_delete_complete").wait(
            StackName=name, WaiterConfig={"Delay": 1, "MaxAttempts": 60}
        )

    def propose(self, name: str, parameters: dict[str, str]) -> None:
        """An update of the stack's parameters, as far as CloudFormation checks it. Raises ClientError."""
        self.cloudformation.create_change_set(
            StackName=name,
            ChangeSetName="proposed",
            UsePreviousTemplate=True,
            Capabilities=["CAPABILITY_IAM"],
            Parameters=_asked(parameters),
        )
        self.cloudformation.delete_change_set(StackName=name, ChangeSetName="proposed")


@pytest.fixture(scope="module")
def deployer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployer]:
    folder, printed = tmp_path_factory.mktemp("sets"), list[str]()
    with stack.local_aws(folder, printed, time_scale=1.0) as url:
        stack.build(folder, print)
        yield Deployer(folder, url)


@pytest.fixture(scope="module")
def default(deployer: Deployer) -> Iterator[dict[str, str]]:
    """The outputs of a stack that was given an environment id and nothing else."""
    yield stack.deploy(deployer.folder, deployer.url, GIVEN, print)
    deployer.delete(stack.STACK)
    vpcs = deployer.client("ec2").describe_vpcs(Filters=[{"Name": "tag:Name", "Values": [stack.STACK]}])
    assert not vpcs["Vpcs"]
    assert not deployer.client("ecr").describe_repositories()["repositories"], "the image keeps its repository"


def test_by_default_the_stack_brings_a_public_network_and_builds_the_image(
    deployer: Deployer, default: dict[str, str]
) -> None:
    made = deployer.resources(stack.STACK)
    assert {*MADE_IN_EVERY_NETWORK, *MADE_FOR_THE_IMAGE} <= set(made)
    settings = deployer.launch_settings(made)
    assert settings["FLEET_SUBNETS"] == f"{made['PublicSubnetA']},{made['PublicSubnetB']}"
    assert settings["FLEET_SECURITY_GROUPS"] == made["SandboxSecurityGroup"]
    assert settings["FLEET_ASSIGN_PUBLIC_IP"] == "ENABLED"
    assert "SandboxExecRole" not in made
    assert not settings["FLEET_EXEC_ROLE_ARN"]
    repository, digest = deployer.image(default).split("@")
    assert repository.endswith(f"/{made['SandboxRepository']}")
    assert digest.startswith("sha256:")


def test_sandboxes_are_reached_by_nothing_and_reach_443_only(deployer: Deployer, default: dict[str, str]) -> None:
    group = deployer.resources(stack.STACK)["SandboxSecurityGroup"]
    rules = deployer.client("ec2").describe_security_groups(GroupIds=[group])["SecurityGroups"][0]
    assert rules["IpPermissions"] == []
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in rules["IpPermissionsEgress"]] == [
        ("tcp", 443, 443)
    ]


def test_a_new_revision_builds_another_image_in_place(deployer: Deployer, default: dict[str, str]) -> None:
    made = deployer.resources(stack.STACK)
    outputs = deployer.deploy(stack.STACK, SandboxImageRevision="2")
    assert deployer.image(outputs) != deployer.image(default)
    assert {name: deployer.resources(stack.STACK)[name] for name in MADE_FOR_THE_IMAGE} == {
        name: made[name] for name in MADE_FOR_THE_IMAGE
    }


def test_a_private_network_with_allowed_domains(deployer: Deployer, default: dict[str, str]) -> None:
    domains = {"NetworkMode": "private", "AllowedDomains": "example.com,*.example.org"}
    deployer.deploy("private", **domains, EnableExec="true", SandboxImage=IMAGE)
    made = deployer.resources("private")
    settings = deployer.launch_settings(made)
    assert settings["FLEET_SUBNETS"] == f"{made['PrivateSubnetA']},{made['PrivateSubnetB']}"
    assert settings["FLEET_ASSIGN_PUBLIC_IP"] == "DISABLED"
    assert {"NatGateway", "PrivateDefaultRoute", "S3Endpoint", "DomainRulesOfVpc"} <= set(made)
    assert stack.recorded_only(deployer.cloudformation, "private") == sorted(RECORDED_ONLY)
    assert settings["FLEET_EXEC_ROLE_ARN"].endswith(f":role/{made['SandboxExecRole']}")
    deployer.delete("private")


def test_an_existing_network_and_a_given_image_make_neither(deployer: Deployer, default: dict[str, str]) -> None:
    outputs = deployer.deploy("existing", **EXISTING, AssignPublicIp="DISABLED", SandboxImage=IMAGE)
    made = deployer.resources("existing")
    assert not {*MADE_IN_EVERY_NETWORK, *MADE_FOR_THE_IMAGE} & set(made)
    settings = deployer.launch_settings(made)
    assert settings["FLEET_SUBNETS"] == EXISTING["SubnetIds"]
    assert settings["FLEET_SECURITY_GROUPS"] == EXISTING["SecurityGroupIds"]
    assert settings["FLEET_ASSIGN_PUBLIC_IP"] == "DISABLED"
    assert deployer.image(outputs) == IMAGE
    deployer.delete("existing")


def test_a_customers_key_encrypts_queues_logs_and_secrets(deployer: Deployer, default: dict[str, str]) -> None:
    key = deployer.client("kms").create_key()["KeyMetadata"]["Arn"]
    outputs = deployer.deploy("keyed", KmsKeyArn=key, SandboxImage=IMAGE)
    for url in (outputs["QueueUrl"], outputs["DlqUrl"]):
        queue = deployer.client("sqs").get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        assert (queue["KmsMasterKeyId"], queue["SqsManagedSseEnabled"]) == (key, "false")
    groups = deployer.client("logs").describe_log_groups(logGroupNamePrefix="/keyed/")["logGroups"]
    assert groups
    assert {group.get("kmsKeyId") for group in groups} == {key}
    for arn in (outputs["EnvironmentKeySecretArn"], outputs["WebhookSecretArn"]):
        assert deployer.client("secretsmanager").describe_secret(SecretId=arn)["KmsKeyId"] == key
    deployer.delete("keyed")


def test_a_customers_key_encrypts_the_table() -> None:
    """The local AWS makes every table without a key, so this is read from the template."""
    encryption = _template()["Resources"]["WorkTable"]["Properties"]["SSESpecification"]
    assert encryption["KMSMasterKeyId"]["Fn::If"][:2] == ["CustomerKey", {"Ref": "KmsKeyArn"}]
    assert (encryption["SSEEnabled"], encryption["SSEType"]) == (True, "KMS")


def test_two_stacks_have_schedules_of_their_own(deployer: Deployer, default: dict[str, str]) -> None:
    deployer.deploy("second", **EXISTING, SandboxImage=IMAGE)
    names = ("PollerFunctionEveryMinute", "JanitorFunctionEveryFiveMinutes")
    schedules = [deployer.resources(name)[schedule] for name in (stack.STACK, "second") for schedule in names]
    known = {one["Name"] for one in deployer.client("scheduler").list_schedules()["Schedules"]}
    assert set(schedules) <= known
    assert len(set(schedules)) == 4
    deployer.delete("second")


def test_a_later_deploy_leaves_the_values_of_the_secrets(deployer: Deployer, default: dict[str, str]) -> None:
    secrets = deployer.client("secretsmanager")
    put = {default[name]: f"put-for-{name}" for name in ("EnvironmentKeySecretArn", "WebhookSecretArn")}
    for arn, value in put.items():
        secrets.put_secret_value(SecretId=arn, SecretString=value)
    for retention in ("30", "60"):  # an update, and another from the state that the first one left
        deployer.deploy(stack.STACK, LogRetentionDays=retention)
    assert {arn: secrets.get_secret_value(SecretId=arn)["SecretString"] for arn in put} == put


def test_a_sandbox_is_hardened_and_gets_the_disk_asked_for() -> None:
    """The local AWS drops most of this, so it is read from the template."""
    task = _template()["Resources"]["SandboxTask"]["Properties"]
    (container,) = task["ContainerDefinitions"]
    assert container["ReadonlyRootFilesystem"] == {"Fn::If": ["Exec", False, True]}
    assert container["LinuxParameters"] == {"InitProcessEnabled": True, "Capabilities": {"Drop": ["ALL"]}}
    assert "User" not in container  # the image's own, which is not root
    dockerfile = (stack.ROOT / "sandbox/Dockerfile").read_text()
    (volumes,) = (json.loads(line.removeprefix("VOLUME")) for line in dockerfile.splitlines() if "VOLUME [" in line)
    assert [mount["ContainerPath"] for mount in container["MountPoints"]] == volumes, "no VOLUME: it would be root's"
    assert [mount["SourceVolume"] for mount in container["MountPoints"]] == [v["Name"] for v in task["Volumes"]]
    assert "\nUSER 10001:10001\n" in dockerfile
    assert task["EphemeralStorage"]["Fn::If"][:2] == ["MoreStorage", {"SizeInGiB": {"Ref": "EphemeralStorageGiB"}}]


def test_only_the_functions_that_anybody_can_call_are_limited() -> None:
    """The local AWS keeps no reserved concurrency, so this is read from the template."""
    functions = {
        name: resource["Properties"]
        for name, resource in _template()["Resources"].items()
        if resource["Type"] == "AWS::Serverless::Function"
    }
    limits = {
        name: f["ReservedConcurrentExecutions"] for name, f in functions.items() if "ReservedConcurrentExecutions" in f
    }
    assert limits.keys() == {name for name, given in functions.items() if "FunctionUrlConfig" in given}
    for limit in limits.values():
        assert limit == {"Fn::If": ["LimitPublic", {"Ref": "PublicConcurrency"}, {"Ref": "AWS::NoValue"}]}


def test_a_cluster_takes_both_capacities_and_the_launcher_its_share_of_spot(
    deployer: Deployer, default: dict[str, str]
) -> None:
    deployer.deploy("spot", SpotWeight="70", SandboxImage=IMAGE)
    made = deployer.resources("spot")
    assert deployer.launch_settings(made)["FLEET_SPOT_WEIGHT"] == "70"
    (cluster,) = deployer.client("ecs").describe_clusters(clusters=[made["Cluster"]])["clusters"]
    assert cluster["capacityProviders"] == ["FARGATE", "FARGATE_SPOT"]
    deployer.delete("spot")


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"NetworkMode": "existing"}, "needs both SubnetIds and SecurityGroupIds"),
        (EXISTING | {"SecurityGroupIds": ""}, "needs both SubnetIds and SecurityGroupIds"),
        (EXISTING | {"SubnetIds": ""}, "needs both SubnetIds and SecurityGroupIds"),
        (EXISTING | {"NetworkMode": "public"}, "belong to NetworkMode existing"),
        ({"NetworkMode": "private", "SubnetIds": "subnet-0a"}, "belong to NetworkMode existing"),
        (EXISTING | {"AllowedDomains": "example.com"}, "AllowedDomains needs a VPC of the stack's own"),
        ({"AssignPublicIp": "DISABLED"}, "Public subnets need public addresses"),
        ({"SandboxCpu": "256", "SandboxMemory": "3072"}, "With SandboxCpu 256 Fargate allows"),
        ({"SandboxCpu": "512", "SandboxMemory": "512"}, "With SandboxCpu 512 Fargate allows"),
        ({"SandboxCpu": "1024", "SandboxMemory": "2500"}, "With SandboxCpu 1024 Fargate allows"),
        ({"SandboxCpu": "2048"}, "With SandboxCpu 2048 Fargate allows"),
        ({"SandboxCpu": "4096", "SandboxMemory": "31744"}, "With SandboxCpu 4096 Fargate allows"),
        ({"SandboxCpu": "8192", "SandboxMemory": "17408"}, "With SandboxCpu 8192 Fargate allows"),
        ({"SandboxCpu": "16384", "SandboxMemory": "30720"}, "With SandboxCpu 16384 Fargate allows"),
        ({"NetworkMode": "vpn"}, "AllowedValues"),
        ({"SubnetIds": "subnet-0a, subnet-0b"}, "subnet ids joined by commas without spaces"),
        ({"SecurityGroupIds": stack.STACK}, "security group ids joined by commas without spaces"),
        ({"AllowedDomains": "https://example.com"}, "domain names joined by commas without spaces"),
        ({"SandboxImage": "sandbox"}, "an image URI with a tag or a digest"),
        ({"SandboxImageRevision": "of today"}, "up to 20 letters and digits"),
        ({"KmsKeyArn": "alias/fleet"}, "the ARN of a KMS key, not of an alias"),
        ({"EphemeralStorageGiB": "201"}, "EphemeralStorageGiB"),
        ({"LeaseTtlSeconds": "10"}, "LeaseTtlSeconds"),
        ({"SpotWeight": "101"}, "SpotWeight"),
        ({"EnvironmentId": ""}, "an environment id, such as env_01ABC"),
    ],
)
def test_a_wrong_combination_is_refused_with_a_sentence(
    parameters: dict[str, str], sentence: str, deployer: Deployer, default: dict[str, str]
) -> None:
    with pytest.raises(ClientError) as refused:
        deployer.propose(stack.STACK, parameters)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("cpu", "least", "most"),
    [
        (256, 512, 2048),
        (512, 1024, 4096),
        (1024, 2048, 8192),
        (2048, 4096, 16384),
        (4096, 8192, 30720),
        (8192, 16384, 61440),
        (16384, 32768, 122880),
    ],
)
def test_every_size_that_fargate_offers_is_taken(
    cpu: int, least: int, most: int, deployer: Deployer, default: dict[str, str]
) -> None:
    for memory in (least, most):
        deployer.propose(stack.STACK, {"SandboxCpu": str(cpu), "SandboxMemory": str(memory)})


def test_a_type_that_is_neither_known_nor_listed_fails(deployer: Deployer) -> None:
    body = '{"Resources": {"Odd": {"Type": "AWS::EC2::Instant", "Properties": {}}}}'
    with pytest.raises(ClientError, match=r"Unrecognized resource types: \[AWS::EC2::Instant\]"):
        deployer.cloudformation.create_stack(StackName="odd", TemplateBody=body)


def test_every_type_that_is_only_recorded_is_used() -> None:
    used = {resource["Type"] for resource in _template()["Resources"].values()}
    assert set(RECORDED_ONLY) <= used


def test_a_guided_deploy_needs_the_environment_id_alone() -> None:
    parameters = _template()["Parameters"]
    assert [name for name, given in parameters.items() if "Default" not in given] == ["EnvironmentId"]


def test_every_parameter_is_described_and_constrained() -> None:
    for name, given in _template()["Parameters"].items():
        assert given["Description"].endswith("."), name
        patterned = {"AllowedPattern", "ConstraintDescription"} <= given.keys()
        assert patterned or "AllowedValues" in given or {"MinValue", "MaxValue"} <= given.keys(), name


def _asked(parameters: dict[str, str]) -> list[dict[str, str]]:
    given = GIVEN | {"Architecture": stack.architecture()} | parameters
    return [{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()]


def _template() -> dict[str, Any]:
    template, faults = decode.decode(str(stack.ROOT / "template.yaml"))
    assert not faults
    return dict(template or {})
