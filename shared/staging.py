"""What a session's metadata may have put into its workspace: only from places that the stack's owner listed. Rules,
shapes; who asks is checked by ticketing.py. The metadata is whoever's who may create a session (wishes.py): data."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from shared.lifecycle import WorkId
from shared.wishes import Wishes

MOST_REQUESTS = 10  # of one attempt: the first, and its lost replies
KINDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
_BUCKET = r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]"
_ARCHIVE = re.compile(rf"s3://({_BUCKET})/([!-~]+)")
_REPOSITORY = re.compile(r"(/[A-Za-z0-9_~][A-Za-z0-9._~-]*)+")
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")


class NotAllowed(Exception):
    """Cannot be staged, now or later; the message says why and what to do."""


class StagingRequest(BaseModel):
    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)
    work_id: WorkId
    turn: int
    attempt: int
    callback_secret: SecretStr


class ArchiveSource(BaseModel):
    """`url` is a secret: who has it can read that object until it expires."""

    model_config = ConfigDict(frozen=True)
    name: str
    url: str = Field(repr=False)


class GitSource(BaseModel):
    """A public repository, and a branch or tag of it."""

    model_config = ConfigDict(frozen=True)
    url: str
    reference: str | None = None


class StagingGrant(BaseModel):
    model_config = ConfigDict(frozen=True)
    archive: ArchiveSource | None = None
    git: GitSource | None = None
    refused: str | None = None
    max_bytes: int


@dataclass(frozen=True)
class StagingPlaces:
    """What the stack's owner listed. `presign` takes bucket and key and gives an address to read from."""

    buckets: frozenset[str]
    git_hosts: frozenset[str]
    max_bytes: int
    presign: Callable[[str, str], str]

    def judge(self, wishes: Wishes) -> StagingGrant:
        """Where to read what is asked for, or why it may not be."""
        try:
            granted: dict[str, Any] = {
                "git": self._git(wishes.git) if wishes.git else None,
                "archive": self._archive(wishes.archive) if wishes.archive else None,
            }
        except NotAllowed as refusal:
            granted = {"refused": str(refusal)}
        return StagingGrant(max_bytes=self.max_bytes, **granted)

    def _archive(self, wish: str) -> ArchiveSource:
        found = _ARCHIVE.fullmatch(wish)
        if found is None or not found[2].endswith(KINDS):
            raise NotAllowed(f"the archive must be s3://BUCKET/KEY, its key ending in {', '.join(KINDS)}")
        if found[1] not in self.buckets:
            raise NotAllowed("the archive's bucket is not among StagingBuckets")
        return ArchiveSource(name=found[2].rsplit("/", 1)[-1], url=self.presign(found[1], found[2]))

    def _git(self, wish: str) -> GitSource:
        """Nothing but https, a listed host and a path: no credential, port or query."""
        url, _, reference = wish.partition("#")
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = urlsplit("")
        if (
            parts.scheme != "https"
            or url != f"https://{parts.netloc}{parts.path}"
            or not _REPOSITORY.fullmatch(parts.path)
        ):
            raise NotAllowed("the repository must be https://HOST/PATH, optionally with #BRANCH-OR-TAG")
        if parts.netloc not in self.git_hosts:
            raise NotAllowed("the repository's host is not among StagingGitHosts")
        if reference and (not _REFERENCE.fullmatch(reference) or ".." in reference):
            raise NotAllowed("the repository's branch or tag cannot be a name of one")
        return GitSource(url=url, reference=reference or None)
