"""Puts what the agent left in the outputs folder into a bucket, once, by forms that the tickets function signed.

What lies in the folder is the agent's: only regular files are read, no link is followed, and each is sent at the size
that it was listed with. Where a file goes and how much may be put is decided there, not here.
"""

import hashlib
import io
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import anyio
import httpx2
from control_plane import ControlPlane, Grant, LeftOut, OutputsGrant, Post
from json_log import describe, say

# Longest time from the end of a turn; the forms are good for 180 s (shared/buckets.py)
PUT_SECONDS = 120.0
# The list of what was put, and the word on it, come after that
LAST_SECONDS = 10.0
REQUEST_SECONDS = 60.0
TRIES = 2

# What tickets reads at once (functions/tickets/app.py, shared/outputs.py)
MOST_LISTED = 1_000
LONGEST_LISTING = 200_000  # bytes
_MOST_LOOKED_AT = 10_000
_MOST_TOLD_LEFT_OUT = 200
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
# O_NONBLOCK: to open a pipe that took a file's place must not wait for its other end
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_S3_CODE = re.compile(r"<Code>(\w{1,60})</Code>")


class NotPut(Exception):
    """This file was not put; the message says why."""


@dataclass
class Found:
    """What the folder holds: names relative to it, with sizes in bytes; and what is not even asked for."""

    files: dict[str, int] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    more: bool = False  # there is more than was looked at


class _Hashed(io.FileIO):
    """A file that knows the hash of what was read of it since its beginning."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "rb")
        self.sha256 = hashlib.sha256()

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self.sha256 = hashlib.sha256()
        return super().seek(offset, whence)

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self.sha256.update(data)
        return data


def find_files(folder: str) -> Found:
    """What can be put, in the order of its names as far as it was looked at. Raises OSError if there is no folder."""
    found, looked_at, listed = Found(), 0, 0
    for where, folders, names, descriptor in os.fwalk(folder, follow_symlinks=False):
        folders.sort()
        for name in sorted(names):
            looked_at += 1
            path = os.path.relpath(os.path.join(where, name), folder)
            try:
                about = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                listed += len(json.dumps(path.encode().decode())) + 40
            except OSError:  # gone meanwhile
                continue
            except UnicodeError:
                found.left_out.append(LeftOut(name=ascii(path), why="its name is not UTF-8"))
                continue
            if not stat.S_ISREG(about.st_mode):
                found.left_out.append(LeftOut(name=path, why="not a regular file"))
            elif len(found.files) == MOST_LISTED or listed > LONGEST_LISTING or looked_at > _MOST_LOOKED_AT:
                found.more = True
                return found
            else:
                found.files[path] = about.st_size
    return found


def open_file(folder: str, name: str) -> _Hashed:
    """A found file, reached through no link, whatever took its place since. Raises OSError, NotPut."""
    descriptor = os.open(folder, _DIRECTORY)
    try:
        *folders, last = name.split("/")
        for part in folders:
            inner = os.open(part, _DIRECTORY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        file = _Hashed(os.open(last, _FILE, dir_fd=descriptor))
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise NotPut("not a regular file any more")
    return file


@dataclass
class Uploads:
    """The one upload of an attempt. `hide` is told what must not be shown in a log."""

    control_plane: ControlPlane
    http: httpx2.AsyncClient
    grant: Grant
    folder: str
    hide: Callable[[Iterable[str]], None]
    put: list[dict[str, object]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    problem: str | None = None

    async def run(self, until: anyio.CancelScope, *, ended: bool) -> None:
        """Put what there is, until the scope's deadline; then list it and say so. A failure is told, never raised.

        `ended`: the turn's item is stopped, so that nothing but this is left to do.
        """
        try:
            found = find_files(self.folder)
        except (OSError, RecursionError) as error:
            say(logging.WARNING, "outputs folder not read", error=describe(error))
            return
        self.left_out = found.left_out
        if found.more:
            self.left_out.append(LeftOut(name="...", why="there is more than is looked at"))
        if not found.files:
            if self.left_out:
                say(logging.WARNING, "outputs hold nothing that can be put", left_out=len(self.left_out))
            return
        granted = None
        try:
            with until:
                granted = await self.control_plane.ask_outputs(
                    self.grant.callback_secret.get_secret_value(), found.files, ended=ended
                )
                self.hide(granted.secret_values())
                self.left_out += granted.left_out
                await self._put_files(granted, found.files)
            if until.cancelled_caught:
                self.problem = "time was up"
                done = {one["name"] for one in self.put} | {one.name for one in self.left_out}
                waiting = [post.name for post in granted.posts if post.name not in done] if granted else []
                self.left_out += [LeftOut(name=name, why=self.problem) for name in waiting]
        except Exception as error:  # noqa: BLE001 - the turn is over, or to go on elsewhere: this must not change how
            self.problem = describe(error)
        if granted is None:
            say(logging.ERROR, "outputs not put", left_out=len(found.files), reason=self.problem)
            return
        with anyio.move_on_after(LAST_SECONDS):
            await self._tell(granted)

    async def _put_files(self, granted: OutputsGrant, sizes: dict[str, int]) -> None:
        for post in granted.posts:
            try:
                with open_file(self.folder, post.name) as file:
                    if os.fstat(file.fileno()).st_size != sizes[post.name]:
                        raise NotPut("it changed after it was listed")  # noqa: TRY301
                    await self._post(post, file)
                    digest = file.sha256.hexdigest()
            except (OSError, NotPut) as error:
                self.left_out.append(LeftOut(name=post.name, why=describe(error)))
                self.problem = f"a file was not put: {error}"
            else:
                size = sizes[post.name]
                self.put.append({"name": post.name, "key": post.key, "bytes": size, "sha256": digest})

    async def _post(self, post: Post, content: io.FileIO | bytes) -> None:
        """One object; a lost answer or a fault of the service is tried again. Raises NotPut."""
        problem = ""
        for _ in range(TRIES):
            try:
                # The file last: S3 ignores the fields after it
                answer = await self.http.post(
                    post.url, data=post.fields, files={"file": ("file", content)}, timeout=REQUEST_SECONDS
                )
            except httpx2.HTTPError as error:
                problem = f"no answer from the bucket ({type(error).__name__})"
                continue
            if answer.is_success:
                return
            code = _S3_CODE.search(answer.text[:2_000])
            problem = f"the bucket answered HTTP {answer.status_code} {code[1] if code else ''}".rstrip()
            if answer.status_code < 500:
                break
        raise NotPut(problem)

    async def _tell(self, granted: OutputsGrant) -> None:
        """Put the list of what was put; have the record list it; log it."""
        attempt = self.control_plane.attempt.as_fields()
        listing = {
            "session_id": self.grant.session_id,
            **attempt,
            "files": self.put,
            "left_out": [one.model_dump() for one in self.left_out[:_MOST_TOLD_LEFT_OUT]],
            "left_out_count": len(self.left_out),
        }
        size = sum(int(str(one["bytes"])) for one in self.put)
        try:
            await self._post(granted.manifest, json.dumps(listing, ensure_ascii=False).encode(errors="replace"))
        except NotPut as error:
            self.problem = f"the manifest was not put: {error}"
        if self.problem is None and self.left_out:
            self.problem = f"{len(self.left_out)} left out; see the manifest"
        say(
            logging.WARNING if self.problem else logging.INFO,
            "outputs put",
            count=len(self.put),
            bytes=size,
            left_out=len(self.left_out),
            reason=self.problem,
        )
        try:
            await self.control_plane.tell_outputs(
                self.grant.callback_secret.get_secret_value(), files=len(self.put), size=size, problem=self.problem
            )
        except Exception as error:  # noqa: BLE001 - the files are there, only the record does not say so
            say(logging.ERROR, "outputs put, but the record could not be told", error=describe(error))
