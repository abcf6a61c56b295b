"""The image's custom resource over doubles of AWS: CloudFormation gets its answer in every case."""

import itertools
import json
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError

from shared.image import ImageBuilder
from tests.unit.test_handlers import app, sample

URI = "111122223333.dkr.ecr.us-east-1.amazonaws.com/sandbox-fleet-sandboxrepository-example"
BUILD = {"id": "ImageBuild-example:1", "buildStatus": "IN_PROGRESS"}
FAILED = {
    **BUILD,
    "buildStatus": "FAILED",
    "phases": [
        {"phaseType": "QUEUED", "phaseStatus": "SUCCEEDED"},
        {"phaseType": "BUILD", "phaseStatus": "FAILED", "contexts": [{"message": "exit status 1 of docker build"}]},
        {"phaseType": "COMPLETED"},
    ],
}


def refused(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": f"{code} of the example"}}, "Example")


class ImageNotFoundException(Exception):
    pass


class Account:
    """Lambda, CodeBuild and ECR in one double, with a clock that only sleep moves."""

    def __init__(self) -> None:
        self.seconds_left = 900.0
        self.content = "sha256+of/source="
        self.images: dict[str, str] = {}  # digest by tag
        self.ends_as: dict[str, Any] = {**BUILD, "buildStatus": "SUCCEEDED"}
        self.looks_until_end = 2
        self.pushes = True
        self.start_error: ClientError | None = None
        self.stop_error: ClientError | None = None
        self.started: list[dict[str, Any]] = []
        self.stopped: list[str] = []
        self.exceptions = SimpleNamespace(ImageNotFoundException=ImageNotFoundException)

    def sleep(self, seconds: float) -> None:
        self.seconds_left -= seconds

    def get_remaining_time_in_millis(self) -> float:
        return self.seconds_left * 1000

    def get_layer_version_by_arn(self, Arn: str) -> dict[str, Any]:
        return {"Content": {"CodeSha256": self.content}}

    def start_build(self, **request: Any) -> dict[str, Any]:
        if self.start_error:
            raise self.start_error
        self.started.append(request)
        return {"build": BUILD}

    def batch_get_builds(self, ids: list[str]) -> dict[str, Any]:
        self.looks_until_end -= 1
        if self.looks_until_end > 0:
            return {"builds": [BUILD]}
        if self.pushes and self.ends_as["buildStatus"] == "SUCCEEDED":
            given = {entry["name"]: entry["value"] for entry in self.started[-1]["environmentVariablesOverride"]}
            self.images[given["IMAGE_TAG"]] = f"sha256:{len(self.started)}"
        return {"builds": [self.ends_as]}

    def stop_build(self, id: str) -> None:
        self.stopped.append(id)
        if self.stop_error:
            raise self.stop_error

    def describe_images(self, repositoryName: str, imageIds: list[dict[str, str]]) -> dict[str, Any]:
        digest = self.images.get(imageIds[0]["imageTag"])
        if digest is None:
            raise ImageNotFoundException
        return {"imageDetails": [{"imageDigest": digest}]}


class CloudFormation:
    """What was put to the answer's address; refuses the first `refusals` of it."""

    def __init__(self) -> None:
        self.answers: list[dict[str, Any]] = []
        self.refusals = 0

    def put(self, url: str, content: str, headers: dict[str, str], **_: Any) -> httpx.Response:
        if self.refusals:
            self.refusals -= 1
            if self.refusals % 2:
                raise httpx.ConnectError(f"no route to {url}")
            return httpx.Response(503)
        assert url == sample("image_create")["ResponseURL"]
        assert headers["content-type"] == ""  # any other breaks the address's signature
        assert len(content) < 4096
        self.answers.append(json.loads(content))
        return httpx.Response(200)


@pytest.fixture
def account() -> Account:
    return Account()


@pytest.fixture
def cloudformation() -> CloudFormation:
    return CloudFormation()


@pytest.fixture
def image(account: Account, cloudformation: CloudFormation, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module, client = app("image"), account
    builder = ImageBuilder(client, client, client, account.sleep)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "builder", lambda: builder)
    monkeypatch.setattr(module.httpx, "put", cloudformation.put)
    monkeypatch.setattr(module.time, "sleep", account.sleep)
    return module


def run(image: ModuleType, account: Account, cloudformation: CloudFormation, **properties: Any) -> dict[str, Any]:
    """The answer to the sample request, with its properties changed."""
    event = sample("image_create")
    event["ResourceProperties"] |= properties
    image.handler(event, account)
    answer = cloudformation.answers[-1]
    for name in ("StackId", "RequestId", "LogicalResourceId"):
        assert answer[name] == event[name]
    assert answer["PhysicalResourceId"] == "SandboxImageBuild"
    return answer


def test_a_new_source_is_built_once_and_named_by_its_digest(
    image: ModuleType, account: Account, cloudformation: CloudFormation
) -> None:
    first = run(image, account, cloudformation)
    again = run(image, account, cloudformation, Source="arn:aws:lambda:us-east-1:111122223333:layer:other:8")
    assert first["Status"] == "SUCCESS"
    assert first["Data"] == again["Data"] == {"ImageUri": f"{URI}@sha256:1"}
    assert len(account.started) == 1
    assert account.started[0]["idempotencyToken"] == sample("image_create")["RequestId"]


@pytest.mark.parametrize("change", [{"Revision": "2"}, {"Architecture": "x86_64"}])
def test_another_revision_or_architecture_is_another_image(
    change: dict[str, str], image: ModuleType, account: Account, cloudformation: CloudFormation
) -> None:
    run(image, account, cloudformation)
    account.looks_until_end = 1
    assert run(image, account, cloudformation, **change)["Data"] == {"ImageUri": f"{URI}@sha256:2"}


def test_an_older_source_gets_its_older_image(
    image: ModuleType, account: Account, cloudformation: CloudFormation
) -> None:
    run(image, account, cloudformation)
    account.content, account.looks_until_end = "another", 1
    run(image, account, cloudformation)
    account.content = "sha256+of/source="
    assert run(image, account, cloudformation)["Data"] == {"ImageUri": f"{URI}@sha256:1"}


def test_tags_have_only_characters_that_ecr_takes(
    image: ModuleType, account: Account, cloudformation: CloudFormation
) -> None:
    run(image, account, cloudformation)
    assert list(account.images) == ["source-sha256-of_source-arm64-1"]


def test_a_failed_build_is_told_in_codebuilds_words(
    image: ModuleType, account: Account, cloudformation: CloudFormation
) -> None:
    account.ends_as = FAILED
    answer = run(image, account, cloudformation)
    assert answer["Status"] == "FAILED"
    assert "ended FAILED, BUILD: exit status 1 of docker build" in answer["Reason"]


@pytest.mark.parametrize("status", ["FAULT", "TIMED_OUT", "STOPPED"])
def test_a_build_that_ends_without_a_word_has_a_reason_too(
    status: str, image: ModuleType, account: Account, cloudformation: CloudFormation
) -> None:
    account.ends_as = {**BUILD, "buildStatus": status}
    assert f"ended {status}, no phase says why" in run(image, account, cloudformation)["Reason"]


def test_a_build_beyond_the_functions_time_is_stopped_and_answered(
    image: ModuleType, account: Account, cloudformation: CloudFormation
) -> None:
    account.looks_until_end = 10_000
    answer = run(image, account, cloudformation)
    assert answer["Status"] == "FAILED"
    assert "did not end in time; it was stopped" in answer["Reason"]
    assert account.stopped == [BUILD["id"]]
    assert account.seconds_left > 20


def test_a_build_that_cannot_be_stopped_is_answered_too(
    image: ModuleType, account: Account, cloudformation: CloudFormation
) -> None:
    account.looks_until_end, account.stop_error = 10_000, refused("ThrottlingException")
    assert "stopping it failed (ThrottlingException)" in run(image, account, cloudformation)["Reason"]


def test_a_build_without_an_image_is_a_failure(
    image: ModuleType, account: Account, cloudformation: CloudFormation
) -> None:
    account.pushes = False
    assert "left no image source-" in run(image, account, cloudformation)["Reason"]


def test_an_image_that_another_build_pushed_meanwhile_serves(
    image: ModuleType, account: Account, cloudformation: CloudFormation
) -> None:
    """Tags are immutable: the later of two builds fails to push, but the image is there."""
    account.ends_as = FAILED
    tags = itertools.repeat("sha256:other")
    account.describe_images = lambda **_: (  # type: ignore[method-assign]
        {"imageDetails": [{"imageDigest": next(tags)}] if account.looks_until_end <= 0 else []}
    )
    assert run(image, account, cloudformation)["Data"] == {"ImageUri": f"{URI}@sha256:other"}


def test_a_refused_start_is_told(image: ModuleType, account: Account, cloudformation: CloudFormation) -> None:
    account.start_error = refused("AccountLimitExceededException")
    answer = run(image, account, cloudformation)
    assert answer["Status"] == "FAILED"
    assert "AccountLimitExceededException of the example" in answer["Reason"]


def test_malformed_properties_are_told(image: ModuleType, account: Account, cloudformation: CloudFormation) -> None:
    answer = run(image, account, cloudformation, Source=None)
    assert answer["Status"] == "FAILED"
    assert "Source" in answer["Reason"]


def test_a_long_reason_is_cut(image: ModuleType, account: Account, cloudformation: CloudFormation) -> None:
    account.ends_as = {**FAILED, "phases": [{**FAILED["phases"][1], "contexts": [{"message": "x" * 9000}]}]}  # type: ignore[dict-item]
    assert run(image, account, cloudformation)["Status"] == "FAILED"


def test_a_delete_is_answered_without_a_call(
    image: ModuleType, cloudformation: CloudFormation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "builder", lambda: pytest.fail("nothing is to be built"))
    image.handler(sample("image_delete"), None)
    assert cloudformation.answers[0]["Status"] == "SUCCESS"


def test_the_answer_is_tried_again(image: ModuleType, account: Account, cloudformation: CloudFormation) -> None:
    cloudformation.refusals = 3
    assert run(image, account, cloudformation)["Status"] == "SUCCESS"


def test_an_answer_that_is_never_taken_fails_the_call_and_keeps_the_address(
    image: ModuleType, account: Account, cloudformation: CloudFormation, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lambda then repeats the event; whoever knows the address could answer in our place."""
    cloudformation.refusals = 100
    with pytest.raises(image.Unanswered) as raised:
        image.handler(sample("image_create"), account)
    assert "example-signature" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert "example-signature" not in "".join(capsys.readouterr())
