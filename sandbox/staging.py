"""Puts what the session's metadata names into the workspace before the turn: an archive, a repository.

Both are a stranger's: an archive is unpacked member by member inside the workspace and within a limit of bytes, git
runs with one protocol, no hooks, no submodules and no credentials. What may be had from where tickets decides.
"""

import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import IO

import anyio
import anyio.to_thread
import httpx2
from control_plane import StagingGrant
from json_log import say

STAGING_SECONDS = 300.0
MOST_MEMBERS = 100_000
_WATCH_SECONDS = 1.0
_GIT_ENVIRONMENT = {
    "GIT_ALLOW_PROTOCOL": "https",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_LFS_SKIP_SMUDGE": "1",
    "GIT_TERMINAL_PROMPT": "0",
}
_GIT_OPTIONS = (
    "core.hooksPath=/dev/null",
    "credential.helper=",
    "http.followRedirects=false",  # to a host that nobody listed
    "submodule.recurse=false",
)
# What git says when another try would not help
_GONE = ("not found", "could not read username", "authentication", "redirect", "not allowed", "error: 3", "error: 4")


class StagingFailed(Exception):
    """What is to be staged cannot be, now or later: the message says why."""


class StagingUnanswered(Exception):
    """It could not be had in time: another attempt may fare better."""


async def stage(grant: StagingGrant, http: httpx2.AsyncClient, workspace: str) -> None:
    """Raises StagingFailed, StagingUnanswered."""
    if grant.refused:
        raise StagingFailed(grant.refused)
    began = time.monotonic()
    try:
        with anyio.fail_after(STAGING_SECONDS):
            if grant.archive:
                with tempfile.TemporaryFile() as file:
                    await _fetch(http, grant.archive.url, file, grant.max_bytes)
                    until = began + STAGING_SECONDS
                    unpack = unpack_zip if grant.archive.name.endswith(".zip") else unpack_tar
                    await anyio.to_thread.run_sync(unpack, file, workspace, grant.max_bytes, until)
            if grant.git:
                await clone(grant.git.url, grant.git.reference, workspace, grant.max_bytes)
    except TimeoutError:
        raise StagingUnanswered(f"not staged within {STAGING_SECONDS:g} s") from None
    say(logging.INFO, "workspace staged", staging_seconds=round(time.monotonic() - began, 3))


async def _fetch(http: httpx2.AsyncClient, url: str, file: IO[bytes], max_bytes: int) -> None:
    try:
        async with http.stream("GET", url, timeout=60.0) as answer:
            if answer.status_code in (403, 404):
                raise StagingFailed(f"the archive is not there, or may not be read (HTTP {answer.status_code})")
            if not answer.is_success:
                raise StagingUnanswered(f"the archive's bucket answered HTTP {answer.status_code}")
            size = 0
            async for part in answer.aiter_raw():
                size += len(part)
                if size > max_bytes:
                    raise StagingFailed(f"the archive is longer than {max_bytes} bytes")
                file.write(part)
    except httpx2.HTTPError as error:
        raise StagingUnanswered(f"the archive could not be read ({type(error).__name__})") from None
    file.seek(0)


class _Bounds:
    """Counts what is unpacked, by what each member says of itself before it is."""

    def __init__(self, max_bytes: int, until: float) -> None:
        self._bytes, self._members, self._max, self._until = 0, 0, max_bytes, until

    def add(self, size: int) -> None:
        self._bytes, self._members = self._bytes + size, self._members + 1
        if self._bytes > self._max or self._members > MOST_MEMBERS:
            raise StagingFailed(f"the archive unpacks to more than {self._max} bytes or {MOST_MEMBERS} members")
        if time.monotonic() > self._until:
            raise StagingUnanswered("the archive was not unpacked in time")


def unpack_tar(file: IO[bytes], workspace: str, max_bytes: int, until: float) -> None:
    """Compressed or not; links that lead outside, devices and absolute paths are refused (tarfile's `data` filter).

    Raises StagingFailed, StagingUnanswered.
    """
    bounds = _Bounds(max_bytes, until)
    try:
        with tarfile.open(fileobj=file, mode="r:*") as archive:
            for member in archive:
                bounds.add(member.size)
                archive.extract(member, workspace, filter="data")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise StagingFailed(f"the archive cannot be unpacked: {type(error).__name__}: {error}") from None


def unpack_zip(file: IO[bytes], workspace: str, max_bytes: int, until: float) -> None:
    """Files and folders only. Raises StagingFailed, StagingUnanswered."""
    bounds = _Bounds(max_bytes, until)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            for member in members:
                bounds.add(member.file_size)  # no more than this is read of it
                if member.filename.startswith(("/", "\\")) or ".." in member.filename.replace("\\", "/").split("/"):
                    raise StagingFailed(f"the archive has a member outside of it: {member.filename!r:.100}")
            for member in members:
                bounds.add(0)
                archive.extract(member, workspace)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, NotImplementedError) as error:
        raise StagingFailed(f"the archive cannot be unpacked: {type(error).__name__}: {error}") from None


async def clone(url: str, reference: str | None, workspace: str, max_bytes: int) -> None:
    """The newest commit alone, into a folder named like the repository. Raises StagingFailed, StagingUnanswered.

    A reference is a branch or a tag; git's own words may repeat what the server said, so none of them is kept.
    """
    folder = Path(workspace) / url.rsplit("/", 1)[-1].removesuffix(".git")
    if folder.exists():
        raise StagingFailed("the repository's folder is already there, from the archive")
    options = [word for option in _GIT_OPTIONS for word in ("-c", option)]
    branch = ["--branch", reference] if reference else []
    command = ["git", *options, "clone", "--quiet", "--depth=1", "--no-tags", "--template=", *branch, "--", url]
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": os.devnull, **_GIT_ENVIRONMENT}
    try:
        process = await anyio.open_process(
            [*command, str(folder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    except OSError as error:
        raise StagingFailed(f"git cannot be run: {error}") from None
    said = bytearray()

    async def listen() -> None:
        if process.stderr:
            async for part in process.stderr:
                said.extend(part[: max(0, 20_000 - len(said))])

    async def watch() -> None:
        while True:
            await anyio.sleep(_WATCH_SECONDS)
            if await anyio.to_thread.run_sync(_size, folder) > max_bytes:
                raise StagingFailed(f"the repository is larger than {max_bytes} bytes")

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(listen)
            group.start_soon(watch)
            code = await process.wait()
            group.cancel_scope.cancel()
    except* StagingFailed as failed:
        raise failed.exceptions[0] from None
    finally:
        if process.returncode is None:
            process.kill()
        with anyio.CancelScope(shield=True):
            await process.wait()
            await process.aclose()
    if code != 0:
        shutil.rmtree(folder, ignore_errors=True)
        words = said.decode(errors="replace").lower()
        if any(word in words for word in _GONE):
            raise StagingFailed("the repository, or its branch or tag, is not there for everybody to read")
        raise StagingUnanswered(f"git clone ended with code {code}")
    if _size(folder) > max_bytes:
        raise StagingFailed(f"the repository is larger than {max_bytes} bytes")


def _size(folder: Path) -> int:
    """Bytes of all files below, links not followed."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(where, name)).st_size
            except OSError:  # gone meanwhile
                continue
    return total
