"""The sandbox image: built once of each source, then found by its tag. How CloudFormation is told: functions/image."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_pascal

if TYPE_CHECKING:
    from types_boto3_codebuild import CodeBuildClient
    from types_boto3_codebuild.type_defs import BuildTypeDef
    from types_boto3_ecr import ECRClient
    from types_boto3_lambda import LambdaClient

_LOOK_SECONDS = 5.0
_MARGIN_SECONDS = 30.0  # to stop a build that takes too long and still answer


class BuildFailed(Exception):
    """There is no image; the message says why and where to look."""


class ImageRequest(BaseModel):
    """What template.yaml's custom resource asks for."""

    model_config = ConfigDict(alias_generator=to_pascal, frozen=True)
    source: str  # ARN of the layer version that holds sandbox/
    project: str
    repository: str
    repository_uri: str
    architecture: str
    revision: str


class ImageBuilder:
    """Makes sure that the image of a source is in the repository."""

    def __init__(
        self,
        layers: "LambdaClient",
        codebuild: "CodeBuildClient",
        ecr: "ECRClient",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._layers, self._codebuild, self._ecr, self._sleep = layers, codebuild, ecr, sleep

    def ensure(self, request: ImageRequest, token: str, seconds_left: Callable[[], float]) -> str:
        """The image's URI with its digest; builds it only if the repository lacks it. Raises BuildFailed.

        `token` names the request: asked again within five minutes, CodeBuild starts no second build.
        """
        tag = self._tag(request)
        digest = self._digest(request.repository, tag)
        if digest is None:
            failure = self._build(request, tag, token, seconds_left)
            # Whatever the build says: a repeated request may have pushed the tag first, which refuses the second push
            digest = self._digest(request.repository, tag)
            if digest is None:
                raise BuildFailed(failure or f"The build ended well but left no image {tag} in {request.repository}.")
        return f"{request.repository_uri}@{digest}"

    def _tag(self, request: ImageRequest) -> str:
        """The same for the same content, so that going back to an older source finds its image again."""
        content = self._layers.get_layer_version_by_arn(Arn=request.source)["Content"]
        # Base64 with the characters that a tag may have
        source = content["CodeSha256"].translate(str.maketrans("+/", "-_", "="))
        return f"source-{source}-{request.architecture}-{request.revision}"

    def _digest(self, repository: str, tag: str) -> str | None:
        try:
            found = self._ecr.describe_images(repositoryName=repository, imageIds=[{"imageTag": tag}])
        except self._ecr.exceptions.ImageNotFoundException:
            return None
        return next((image["imageDigest"] for image in found["imageDetails"]), None)

    def _build(self, request: ImageRequest, tag: str, token: str, seconds_left: Callable[[], float]) -> str | None:
        """Builds to the end; returns why it failed, or None."""
        build = self._codebuild.start_build(
            projectName=request.project,
            idempotencyToken=token,
            environmentVariablesOverride=[
                {"name": "SOURCE", "value": request.source},
                {"name": "REPOSITORY", "value": request.repository},
                {"name": "REPOSITORY_URI", "value": request.repository_uri},
                {"name": "IMAGE_TAG", "value": tag},
            ],
        )["build"]
        while build["buildStatus"] == "IN_PROGRESS":
            if seconds_left() < _MARGIN_SECONDS:
                return self._give_up(build)
            self._sleep(_LOOK_SECONDS)
            build = self._codebuild.batch_get_builds(ids=[build["id"]])["builds"][0]
        return None if build["buildStatus"] == "SUCCEEDED" else _why(build)

    def _give_up(self, build: "BuildTypeDef") -> str:
        stopped = "it was stopped"
        try:
            self._codebuild.stop_build(id=build["id"])
        except ClientError as error:
            stopped = f"stopping it failed ({error.response['Error']['Code']})"
        return f"Build {build['id']} did not end in time; {stopped}. Its log is in CloudWatch Logs."


def _why(build: "BuildTypeDef") -> str:
    """The first phase that went wrong, in CodeBuild's words."""
    said = next(
        (
            f"{phase['phaseType']}: " + "; ".join(context.get("message", "") for context in phase.get("contexts", []))
            for phase in build.get("phases", [])
            if phase.get("phaseStatus", "SUCCEEDED") != "SUCCEEDED"
        ),
        "no phase says why",
    )
    return f"Build {build['id']} ended {build['buildStatus']}, {said}. Its log is in CloudWatch Logs."
