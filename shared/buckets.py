"""Signs single requests to S3, for a sandbox without AWS credentials. What may be signed is not decided here."""

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

GET_SECONDS = 120  # until the reading has begun
POST_SECONDS = 180  # the sandbox's own limit for putting its outputs, and some for clocks that differ
# Whatever a file holds, no browser takes it for a page
CONTENT_TYPE = "application/octet-stream"


class Post(BaseModel):
    """A form that puts one object. It is a secret: who has it can put that object until it expires."""

    model_config = ConfigDict(frozen=True)
    url: str
    fields: dict[str, str] = Field(repr=False)


class Buckets:
    """Signed with the function's own role, which must allow what the signature is to allow."""

    def __init__(self, client: "S3Client") -> None:
        self._client = client

    def presign_post(self, bucket: str, key: str, least: int, most: int) -> Post:
        """A SigV4 POST policy: this key, this type, so many bytes, for 180 s (S3 API, "POST Policy")."""
        signed = self._client.generate_presigned_post(
            bucket,
            key,
            Fields={"Content-Type": CONTENT_TYPE},
            Conditions=[{"Content-Type": CONTENT_TYPE}, ["content-length-range", least, most]],
            ExpiresIn=POST_SECONDS,
        )
        return Post(url=signed["url"], fields=signed["fields"])

    def presign_get(self, bucket: str, key: str) -> str:
        """An address that reads this object, if asked within 120 s. A secret."""
        return self._client.generate_presigned_url(
            "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=GET_SECONDS
        )
