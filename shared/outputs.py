"""What a sandbox may put into the outputs bucket, and under which keys: rules and shapes. The keys come from the record
and the limits from the stack; what the sandbox says is data (ticketing.py checks who says it, buckets.py signs)."""

import hashlib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints

from shared.buckets import Post
from shared.lifecycle import SAFE_ID, WorkId
from shared.record import Outputs, Record

MOST_LISTED = 1_000
MOST_REQUESTS = 5  # of one attempt: the first, and its lost replies
NOT_REPORTED = "granted; the sandbox has not said what it put"
LONGEST_MANIFEST = 2 << 20  # bytes
_LONGEST_NAME = 512  # bytes: with what stands before it a key stays under S3's 1,024
# Controls, formatting (it can reverse how a name reads), lone surrogates, line and paragraph separators
_NOT_IN_NAMES = {"Cc", "Cf", "Cs", "Zl", "Zp"}


class FoundFile(BaseModel):
    model_config = ConfigDict(frozen=True)
    name: Annotated[str, Field(max_length=4_096)]  # relative to the outputs folder
    size: Annotated[int, Field(ge=0, lt=2**63)]  # bytes


class OutputsRequest(BaseModel):
    """`ended`: the turn is over and its item stopped, so that only the upload is left to do."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)
    work_id: WorkId
    turn: int
    attempt: int
    callback_secret: SecretStr
    ended: bool = False
    files: Annotated[tuple[FoundFile, ...], Field(min_length=1, max_length=MOST_LISTED)]

    @property
    def listing(self) -> str:
        """What the request asks for, as a hash."""
        return hashlib.sha256("\n".join(file.model_dump_json() for file in self.files).encode()).hexdigest()


class OutputsPut(BaseModel):
    """The sandbox's word on what it put; `problem` is shown to operators."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)
    work_id: WorkId
    turn: int
    attempt: int
    callback_secret: SecretStr
    files: Annotated[int, Field(ge=0)]
    bytes: Annotated[int, Field(ge=0)]
    problem: Annotated[str, StringConstraints(pattern=r"^[ -~]{1,200}$")] | None = None


class NamedPost(Post):
    """`name` as the sandbox gave it, `key` as it is stored."""

    name: str
    key: str


class LeftOut(BaseModel):
    model_config = ConfigDict(frozen=True)
    name: str
    why: str


class OutputsGrant(BaseModel):
    model_config = ConfigDict(frozen=True)
    posts: tuple[NamedPost, ...]
    left_out: tuple[LeftOut, ...]
    manifest: NamedPost


@dataclass(frozen=True)
class OutputsPlace:
    """Where outputs go and how much of them: the stack's owner's choice. `presign` takes key, least and most bytes."""

    bucket: str
    prefix: str
    max_files: int
    max_file_bytes: int
    max_total_bytes: int
    presign: Callable[[str, int, int], Post]

    def key_prefix(self, record: Record) -> str | None:
        """The attempt's own, from the record alone; None if its session id could name another place."""
        if record.session_id is None or not SAFE_ID.fullmatch(record.session_id):
            return None
        return f"{self.prefix}/{record.session_id}/{record.turn}/{record.attempt}/"

    def admit(self, files: tuple[FoundFile, ...]) -> tuple[dict[str, FoundFile], tuple[LeftOut, ...]]:
        """What may be put, by the name that it is stored under; and why the rest may not."""
        admitted: dict[str, FoundFile] = {}
        left_out = []
        total = 0
        for file in files:
            name = stored_name(file.name)
            if name is None:
                why = "its name cannot be stored"
            elif name in admitted:
                why = "another file is stored under the same name"
            elif file.size > self.max_file_bytes:
                why = f"longer than {self.max_file_bytes} bytes"
            elif len(admitted) == self.max_files:
                why = f"more than {self.max_files} files"
            elif total + file.size > self.max_total_bytes:
                why = f"more than {self.max_total_bytes} bytes in all"
            else:
                admitted[name] = file
                total += file.size
                continue
            left_out.append(LeftOut(name=file.name, why=why))
        return admitted, tuple(left_out)

    def grant(self, admitted: dict[str, FoundFile], left_out: tuple[LeftOut, ...], prefix: str) -> OutputsGrant:
        """A signed form a file, good for exactly its key and its size; one more for the manifest."""
        posts = (
            self._post(file.name, f"{prefix}files/{stored}", file.size, file.size) for stored, file in admitted.items()
        )
        manifest = self._post("", manifest_key(prefix), 1, LONGEST_MANIFEST)
        return OutputsGrant(posts=tuple(posts), left_out=left_out, manifest=manifest)

    def _post(self, name: str, key: str, least: int, most: int) -> NamedPost:
        return NamedPost(name=name, key=key, **dict(self.presign(key, least, most)))


def stored_name(name: str) -> str | None:
    """A relative path as part of a key: composed form (NFC), `/` between its parts; None for any that could be read
    as another place, or that S3 would fill in (`${filename}`)."""
    normal = unicodedata.normalize("NFC", name)
    parts = normal.split("/")
    bad = (
        any(part in ("", ".", "..") for part in parts)
        or "\\" in normal
        or "${" in normal
        or any(unicodedata.category(character) in _NOT_IN_NAMES for character in normal)
        or len(normal.encode(errors="replace")) > _LONGEST_NAME
    )
    return None if bad else normal


def manifest_key(prefix: str) -> str:
    return f"{prefix}manifest.json"


def granted(
    record: Record, request: OutputsRequest, bucket: str, prefix: str, admitted: dict[str, FoundFile]
) -> Record | None:
    """The record with one more request on it; None if the attempt asked for something else before, or too often."""
    before = record.outputs if record.outputs and record.outputs.attempt == record.attempt else None
    if before is not None:
        if before.listing != request.listing or before.requests >= MOST_REQUESTS:
            return None
        return record.model_copy(
            update={"outputs": before.model_copy(update={"requests": before.requests + 1})},
        )
    outputs = Outputs(
        attempt=record.attempt,
        prefix=f"s3://{bucket}/{prefix}",
        manifest=manifest_key(prefix),
        listing=request.listing,
        granted_files=len(admitted),
        granted_bytes=sum(file.size for file in admitted.values()),
        problem=NOT_REPORTED,
    )
    return record.model_copy(update={"outputs": outputs})


def reported(record: Record, word: OutputsPut, now: int) -> Record | None:
    """The record with the sandbox's word, within what was granted; None if it has one already, or nothing was."""
    before = record.outputs
    if before is None or before.attempt != record.attempt or before.problem != NOT_REPORTED:
        return None
    files, size = min(word.files, before.granted_files), min(word.bytes, before.granted_bytes)
    outputs = before.model_copy(update={"files": files, "bytes": size, "problem": word.problem})
    said = f"outputs: {files} files, {size} bytes" + (f"; {word.problem}" if word.problem else "")
    return record.noted(now, said, outputs=outputs)
