"""What a sandbox puts into its workspace, and what it refuses to (sandbox/staging.py)."""

import asyncio
import io
import os
import stat
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
import staging
from control_plane import Archive, StagingGrant
from staging import StagingFailed, StagingUnanswered

MAX = 20_480


def tar(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as archive:  # type: ignore[call-overload]
        for member, content in members:
            archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


def member(name: str, size: int = 0, **about: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size = size
    for key, value in about.items():
        setattr(made, key, value)
    return made


def zipped(*members: tuple[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return made.getvalue()


def _kind(value: object) -> str:
    """Names a case: an archive's bytes hold the time at which it was made."""
    return value if isinstance(value, str) else "content"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    made = tmp_path / "workspace"
    made.mkdir()
    return made


def staged(workspace: Path, name: str, content: bytes, status: int = 200) -> None:
    async def run() -> None:
        answer = httpx2.MockTransport(lambda request: httpx2.Response(status, stream=httpx2.ByteStream(content)))
        async with httpx2.AsyncClient(transport=answer) as http:
            grant = StagingGrant(archive=Archive(name=name, url="http://bucket.test/a?secret"), max_bytes=MAX)
            await staging.stage(grant, http, str(workspace))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tar", tar((member("src/a", 2), b"hi"), mode="w")),
        ("a.tar.gz", tar((member("src/a", 2), b"hi"))),
        ("a.tar.xz", tar((member("src/a", 2), b"hi"), mode="w:xz")),
        ("a.zip", zipped(("src/a", b"hi"))),
    ],
    ids=_kind,
)
def test_an_archive_is_unpacked_into_the_workspace(workspace: Path, name: str, content: bytes) -> None:
    staged(workspace, name, content)
    assert (workspace / "src" / "a").read_text() == "hi"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tar.gz", tar((member("../out", 2), b"hi"))),
        ("a.tar.gz", tar((member("a/../../out", 2), b"hi"))),
        ("a.tar.gz", tar((member("link", type=tarfile.SYMTYPE, linkname="../out"), b""), (member("link", 2), b"hi"))),
        ("a.tar.gz", tar((member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b""))),
        ("a.tar.gz", tar((member("link", type=tarfile.LNKTYPE, linkname="../secret"), b""))),
        ("a.tar.gz", tar((member("device", type=tarfile.CHRTYPE), b""))),
        ("a.zip", zipped(("../out", b"hi"))),
        ("a.zip", zipped(("a\\..\\..\\out", b"hi"))),
        ("a.zip", zipped(("/out", b"hi"))),
        ("a.tar.gz", b"no archive"),
        ("a.zip", b"no archive"),
        ("a.zip", zipped(("a", b"hi"))[:-4]),
        ("a.tar.gz", tar((member("bomb", 10_000_000), bytes(10_000_000)))),
        ("a.tar.gz", tar(*((member(f"{n}", 12_000), bytes(12_000)) for n in range(2)))),
        ("a.zip", zipped(("bomb", bytes(10_000_000)))),
        ("a.tar", bytes(MAX + 1)),
    ],
    ids=_kind,
)
def test_what_leads_outside_or_is_too_much_or_no_archive_fails_for_good(
    workspace: Path, name: str, content: bytes
) -> None:
    (workspace.parent / "secret").write_text("of another place")
    with pytest.raises(StagingFailed):
        staged(workspace, name, content)
    assert sorted(path.name for path in workspace.parent.iterdir()) == ["secret", "workspace"]
    assert not (workspace / "bomb").exists()


def test_an_absolute_tar_name_stays_inside(workspace: Path) -> None:
    staged(workspace, "a.tar.gz", tar((member("/etc/a", 2), b"hi")))
    assert (workspace / "etc" / "a").read_text() == "hi"


def test_no_member_gets_a_special_mode(workspace: Path) -> None:
    staged(workspace, "a.tar.gz", tar((member("a", 2, mode=0o6777), b"hi")))
    assert stat.S_IMODE((workspace / "a").stat().st_mode) & 0o7022 == 0


def test_a_member_past_the_time_is_left_to_another_attempt(workspace: Path) -> None:
    file = io.BytesIO(zipped(("a", b"hi")))
    with pytest.raises(StagingUnanswered):
        staging.unpack_zip(file, str(workspace), MAX, time.monotonic() - 1)


@pytest.mark.parametrize(("status", "error"), [(403, StagingFailed), (404, StagingFailed), (503, StagingUnanswered)])
def test_a_missing_archive_fails_for_good_and_a_fault_for_now(
    workspace: Path, status: int, error: type[Exception]
) -> None:
    with pytest.raises(error) as failed:
        staged(workspace, "a.tar", b"", status)
    assert "secret" not in str(failed.value)


def test_a_refusal_is_told_in_its_words(workspace: Path) -> None:
    grant = StagingGrant(refused="the archive's bucket is not among StagingBuckets", max_bytes=1)
    with pytest.raises(StagingFailed, match="not among StagingBuckets"):
        asyncio.run(staging.stage(grant, httpx2.AsyncClient(), str(workspace)))


# --- git ----------------------------------------------------------------------------------------------------


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A program in git's place; it notes its arguments and environment and does as told."""

    def install(script: str) -> Path:
        folder, noted = tmp_path / "bin", tmp_path / "noted"
        folder.mkdir()
        (folder / "git").write_text(f'#!/bin/sh\n{{ echo "$@"; env; }} > {noted}\nfor last; do :; done\n{script}\n')
        (folder / "git").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("SECRET", "of the runner")
        return noted

    return install


def test_git_runs_shallow_with_https_alone_and_nothing_of_ours(workspace: Path, git: Callable[[str], Path]) -> None:
    noted = git("mkdir $last; echo hi > $last/a")
    asyncio.run(staging.clone("https://example.com/team/tool.git", "v1.2", str(workspace), MAX))
    assert (workspace / "tool" / "a").read_text() == "hi\n"
    said = noted.read_text()
    arguments = said.splitlines()[0]
    assert f"--branch v1.2 -- https://example.com/team/tool.git {workspace / 'tool'}" in arguments
    for needed in ("--depth=1", "core.hooksPath=/dev/null", "http.followRedirects=false", "submodule.recurse=false"):
        assert needed in arguments
    for needed in ("GIT_ALLOW_PROTOCOL=https", "GIT_TERMINAL_PROMPT=0", "GIT_CONFIG_NOSYSTEM=1"):
        assert needed in said
    assert "of the runner" not in said


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo 'fatal: repository not found' >&2; exit 128", StagingFailed),
        ("echo 'could not resolve host' >&2; exit 128", StagingUnanswered),
        ("mkdir $last; head -c 30000 /dev/zero > $last/a", StagingFailed),
        ("mkdir $last; head -c 30000 /dev/zero > $last/a; sleep 100", StagingFailed),
    ],
)
def test_a_clone_that_fails_or_is_too_much_says_whether_another_may_do(
    workspace: Path, git: Callable[[str], Path], script: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_WATCH_SECONDS", 0.05)
    git(script)
    with pytest.raises(error):
        asyncio.run(staging.clone("https://example.com/team/tool", None, str(workspace), MAX))


@pytest.mark.parametrize("url", ["file:///", "ext::sh -c id", "http://example.com/a", "ssh://example.com/a"])
def test_git_itself_refuses_every_other_protocol(workspace: Path, url: str) -> None:
    with pytest.raises(StagingFailed):
        asyncio.run(staging.clone(url, None, str(workspace), MAX))
