"""How a sandbox puts its outputs (sandbox/outputs.py): which files, at which size, and that no failure ends a turn."""

import asyncio
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import httpx2
import outputs
import pytest
from control_plane import Attempt, ControlPlane, Grant
from outputs import NotPut, Uploads, find_files, open_file
from pydantic import SecretStr

GRANT = Grant(
    work_id="work_1",
    environment_id="env_1",
    session_id="sesn_1",
    callback_secret=SecretStr("callback-secret"),
    outputs=True,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "outputs"
    made.mkdir()
    return made


class FarSide:
    """The tickets function and the bucket: grants all that is asked, keeps what is put."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[dict[str, Any]] = []
        self.told: list[dict[str, Any]] = []
        self.objects: dict[str, bytes] = {}
        self.hidden: set[str] = set()
        self.bucket: Callable[[str], httpx2.Response | None] = lambda key: None
        self.tickets_status = 200

    async def _answer(self, request: httpx2.Request) -> httpx2.Response:
        content = await request.aread()
        if request.url.host == "bucket.test":
            return self._put(request, content)
        body = json.loads(content)
        assert body["callback_secret"] == "callback-secret"
        if request.url.path.endswith("/outputs-put"):
            self.told.append(body)
            return httpx2.Response(202, json={})
        self.asked.append(body)
        if self.tickets_status != 200:
            return httpx2.Response(self.tickets_status)
        return httpx2.Response(
            200,
            json={
                "posts": [self._form(file["name"], f"files/{file['name']}") for file in body["files"]],
                "left_out": [{"name": "x", "why": "too long"}] if any(f["name"] == "y" for f in body["files"]) else [],
                "manifest": self._form("", "manifest.json"),
            },
        )

    def _form(self, name: str, key: str) -> dict[str, Any]:
        fields = {"key": key, "x-amz-signature": f"signature of {key}"}
        return {"name": name, "key": key, "url": "http://bucket.test/", "fields": fields}

    def _put(self, request: httpx2.Request, content: bytes) -> httpx2.Response:
        assert int(request.headers["content-length"]) == len(content)  # S3 takes no chunked form
        boundary = request.headers["content-type"].split("boundary=")[1].encode()
        parts = content.split(b"--" + boundary)[1:-1]
        heads, bodies = zip(*(part[2:-2].split(b"\r\n\r\n", 1) for part in parts), strict=True)
        assert b'name="file"' in heads[-1]  # S3 ignores what comes after it
        key = bodies[next(i for i, head in enumerate(heads) if b'name="key"' in head)].decode()
        if (refusal := self.bucket(key)) is not None:
            return refusal
        self.objects[key] = bodies[-1]
        return httpx2.Response(204)

    def put(self, *, ended: bool = True, within: float = 60.0) -> Uploads:
        async def run() -> Uploads:
            async with httpx2.AsyncClient(transport=httpx2.MockTransport(self._answer)) as http:
                plane = ControlPlane(http, "http://tickets.test/", Attempt("work_1", 5, 2))
                uploads = Uploads(plane, http, GRANT, str(self.folder), self.hidden.update)
                await uploads.run(anyio.CancelScope(deadline=anyio.current_time() + within), ended=ended)
                return uploads

        return asyncio.run(run())

    @property
    def manifest(self) -> dict[str, Any]:
        listing: dict[str, Any] = json.loads(self.objects["manifest.json"])
        return listing


@pytest.fixture
def far(folder: Path) -> FarSide:
    return FarSide(folder)


def test_every_file_is_put_listed_and_told(folder: Path, far: FarSide) -> None:
    (folder / "charts").mkdir()
    (folder / "charts" / "a.png").write_bytes(b"\r\n--binary\0" * 20_000)
    (folder / "empty").touch()
    far.put()
    assert far.asked[0]["ended"] is True
    assert far.asked[0]["files"] == [{"name": "empty", "size": 0}, {"name": "charts/a.png", "size": 220_000}]
    assert far.objects["files/charts/a.png"] == b"\r\n--binary\0" * 20_000
    assert far.manifest["files"][1] == {
        "name": "charts/a.png",
        "key": "files/charts/a.png",
        "bytes": 220_000,
        "sha256": hashlib.sha256(b"\r\n--binary\0" * 20_000).hexdigest(),
    }
    assert (far.manifest["session_id"], far.manifest["turn"], far.manifest["attempt"]) == ("sesn_1", 5, 2)
    [word] = far.told
    assert (word["files"], word["bytes"], word["problem"]) == (2, 220_000, None)
    assert "signature of files/empty" in far.hidden


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.rmdir()])
def test_without_files_nothing_is_asked(folder: Path, far: FarSide, make: Callable[[Path], None]) -> None:
    make(folder)
    far.put()
    assert (far.asked, far.told, far.objects) == ([], [], {})


def test_links_pipes_and_names_that_are_no_text_are_not_read(tmp_path: Path, folder: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("of another place")
    (folder / "link").symlink_to(secret / "key")
    (folder / "folder").symlink_to(secret)
    os.mkfifo(folder / "pipe")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff")).touch()
    found = find_files(str(folder))
    assert found.files == {}
    assert {one.why for one in found.left_out} == {"not a regular file", "its name is not UTF-8"}
    aside = tmp_path / "aside"
    folder.rename(aside)
    folder.symlink_to(secret)
    assert find_files(str(folder)).files == {}


def test_a_link_that_took_a_found_files_place_is_not_followed(tmp_path: Path, folder: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("of another place")
    (folder / "file").symlink_to(secret / "key")
    (folder / "folder").symlink_to(secret)
    os.mkfifo(folder / "pipe")
    for name in ("file", "folder/key"):
        with pytest.raises(OSError, match=r"symbolic|directory"):
            open_file(str(folder), name)
    with pytest.raises(NotPut):
        open_file(str(folder), "pipe")


def test_a_file_that_changed_since_it_was_listed_is_left_out(folder: Path, far: FarSide) -> None:
    (folder / "a").write_text("first")
    (folder / "b").write_text("second")

    def grow(key: str) -> None:
        (folder / "b").write_text("second and more")

    far.bucket = grow
    far.put()
    assert set(far.objects) == {"files/a", "manifest.json"}
    assert far.manifest["left_out"] == [{"name": "b", "why": "NotPut: it changed after it was listed"}]
    assert far.told[0]["problem"] == "a file was not put: it changed after it was listed"


def test_a_folder_with_too_much_in_it_is_cut(folder: Path, far: FarSide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "MOST_LISTED", 3)
    for number in range(5):
        (folder / f"{number}").touch()
    far.put()
    assert [file["name"] for file in far.asked[0]["files"]] == ["0", "1", "2"]
    assert far.manifest["left_out_count"] == 1
    assert far.told[0]["problem"] == "1 left out; see the manifest"


def test_what_tickets_leave_out_is_in_the_manifest(folder: Path, far: FarSide) -> None:
    (folder / "y").touch()
    far.put()
    assert far.manifest["left_out"] == [{"name": "x", "why": "too long"}]


def test_a_refused_file_is_told_and_the_others_are_put(folder: Path, far: FarSide) -> None:
    (folder / "a").touch()
    (folder / "b").touch()
    body = "<Error><Code>EntityTooLarge</Code></Error>"
    far.bucket = lambda key: httpx2.Response(400, text=body) if key == "files/a" else None
    far.put()
    assert set(far.objects) == {"files/b", "manifest.json"}
    assert far.told[0]["problem"] == "a file was not put: the bucket answered HTTP 400 EntityTooLarge"


def test_a_fault_of_the_bucket_is_tried_again_whole(folder: Path, far: FarSide) -> None:
    (folder / "a").write_text("whole")
    tries: list[str] = []

    def fault(key: str) -> httpx2.Response | None:
        tries.append(key)
        return httpx2.Response(503) if len(tries) == 1 else None

    far.bucket = fault
    far.put()
    assert far.objects["files/a"] == b"whole"
    assert far.manifest["files"][0]["sha256"] == hashlib.sha256(b"whole").hexdigest()
    assert far.told[0]["problem"] is None


@pytest.mark.parametrize("status", [400, 403])
def test_a_refusal_ends_the_upload_and_nothing_else(folder: Path, far: FarSide, status: int) -> None:
    (folder / "a").touch()
    far.tickets_status = status
    far.put()
    assert (len(far.asked), far.told, far.objects) == (1, [], {})


def test_when_time_is_up_the_rest_is_left_out_and_told(folder: Path, far: FarSide) -> None:
    for name in ("a", "b", "c"):
        (folder / name).write_text(name)

    async def run() -> None:
        until = anyio.CancelScope()

        async def answer(request: httpx2.Request) -> httpx2.Response:
            if "files/b" in far.objects:
                until.cancel()
                await anyio.sleep(0)
            return await far._answer(request)

        async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer)) as http:
            plane = ControlPlane(http, "http://tickets.test/", Attempt("work_1", 5, 2))
            await Uploads(plane, http, GRANT, str(folder), far.hidden.update).run(until, ended=False)

    asyncio.run(run())
    assert [file["name"] for file in far.manifest["files"]] == ["a", "b"]
    assert far.manifest["left_out"] == [{"name": "c", "why": "time was up"}]
    assert far.told[0]["problem"] == "time was up"
