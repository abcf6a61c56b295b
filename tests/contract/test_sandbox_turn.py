"""The real runner as a process, against the Work API emulator: whole turns, stops and refusals.

The test plays the control plane: it polls, acks and claims, exchanges the ticket, and looks at every request
that leaves the sandbox, which reaches the emulator only through the test.
"""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil
import pytest
import runner
import uvicorn
from runner import ExitCode
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

WAIT_SECONDS = 60.0
# The task definition drops all capabilities: with root's, a tool would be refused nothing
AS_IN_A_TASK = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
TICKET, CALLBACK_SECRET = "ticket-that-nobody-may-see", "callback-secret-that-nobody-may-see"
SIGNATURE = "signature-that-nobody-may-see"
WRITES = "mkdir -p outputs; echo 42 > outputs/a.txt"


class Emulator(Protocol):
    """What this file uses of tests/contract/conftest.py's fixture."""

    url: str
    environment_id: str
    environment_key: str


@dataclass
class Between:
    """Stands between the sandbox and the outside: forwards to the emulator, plays the tickets function, and
    notes what it saw. `refuse` gives a status to answer instead of forwarding; `before_stop` runs first."""

    api: str
    grant: dict[str, Any] = field(default_factory=dict)
    ticket_status: int = 200
    refuse: Callable[[str, str], int | None] = lambda method, path: None
    before_stop: Callable[[], None] = lambda: None
    calls: list[str] = field(default_factory=list)
    stop_credentials: list[str] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    words: list[dict[str, Any]] = field(default_factory=list)
    words_until_stopped: int = 2
    order: list[str] = field(default_factory=list)  # of the stop and of all about outputs
    listed: list[dict[str, Any]] = field(default_factory=list)
    put: dict[str, bytes] = field(default_factory=dict)
    before_put: Callable[[], None] = lambda: None
    archive: bytes = b""
    url: str = ""

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/tickets/", self._ticket, methods=["POST"]),
                Route("/tickets/turn-ended", self._word, methods=["POST"]),
                Route("/tickets/staging", self._staging, methods=["POST"]),
                Route("/sources/a.zip", self._archive, methods=["GET"]),
                Route("/tickets/outputs", self._outputs, methods=["POST"]),
                Route("/tickets/outputs-put", self._outputs_put, methods=["POST"]),
                Route("/bucket/{key:path}", self._bucket, methods=["POST"]),
                Route("/{path:path}", self._forward, methods=["GET", "POST"]),
            ]
        )

    async def _ticket(self, request: Request) -> Response:
        assert (await request.json())["ticket"] == TICKET
        return JSONResponse(self.grant if self.ticket_status == 200 else {}, self.ticket_status)

    async def _word(self, request: Request) -> Response:
        self.words.append(await request.json())
        return JSONResponse({"stopped": len(self.words) >= self.words_until_stopped}, 202)

    async def _staging(self, request: Request) -> Response:
        assert (await request.json())["callback_secret"] == CALLBACK_SECRET
        return JSONResponse(
            {"archive": {"name": "a.zip", "url": f"{self.url}/sources/a.zip?{SIGNATURE}"}, "max_bytes": 10_000}
        )

    async def _archive(self, request: Request) -> Response:
        assert SIGNATURE in str(request.url)
        return Response(self.archive) if self.archive else Response(status_code=403)

    async def _outputs(self, request: Request) -> Response:
        self.listed.append(await request.json())
        self.order.append(f"ask ended={self.listed[-1]['ended']}")
        names = [file["name"] for file in self.listed[-1]["files"]]
        forms = [
            {"name": name, "key": name, "url": f"{self.url}/bucket/{name}", "fields": {"x-amz-signature": SIGNATURE}}
            for name in (*names, "manifest.json")
        ]
        return JSONResponse({"posts": forms[:-1], "left_out": [], "manifest": forms[-1]})

    async def _bucket(self, request: Request) -> Response:
        await asyncio.to_thread(self.before_put)
        body, key = await request.body(), request.path_params["key"]
        self.put[key] = body.split(b' name="file"')[1].split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n--", 1)[0]
        self.order.append(f"put {key}")
        return Response(status_code=204)

    async def _outputs_put(self, request: Request) -> Response:
        self.order.append(f"told {(await request.json())['files']}")
        return JSONResponse({}, 202)

    async def _forward(self, request: Request) -> Response:
        path, body = request.url.path, await request.body()
        self.calls.append(f"{request.method} {path}")
        if path.endswith("/stop"):
            self.stop_credentials.append(request.headers["authorization"])
            self.order.append("stop")
            await asyncio.to_thread(self.before_stop)
        if request.method == "POST" and path.endswith("/events"):
            self.results += json.loads(body)["events"]
        if status := self.refuse(request.method, path):
            error = {"type": "refused", "message": "refused by the test"}
            return JSONResponse({"type": "error", "error": error}, status)
        client = httpx.AsyncClient(base_url=self.api, timeout=WAIT_SECONDS)
        headers = {name: value for name, value in request.headers.items() if name not in ("host", "accept-encoding")}
        outgoing = client.build_request(
            request.method, path, params=request.query_params, headers=headers, content=body
        )
        incoming = await client.send(outgoing, stream=True)

        async def content() -> AsyncIterator[bytes]:
            try:
                async for chunk in incoming.aiter_raw():
                    yield chunk
            finally:
                await incoming.aclose()
                await client.aclose()

        kept = {name: value for name, value in incoming.headers.items() if name in ("content-type", "retry-after")}
        return StreamingResponse(content(), incoming.status_code, kept)

    @property
    def work_calls(self) -> list[str]:
        return [call for call in self.calls if "/work/" in call]

    @property
    def result_texts(self) -> list[str]:
        return [event["content"][0]["text"] for event in self.results]


@pytest.fixture
def between(emulator: Emulator) -> Iterator[Between]:
    between = Between(emulator.url)
    server = uvicorn.Server(
        uvicorn.Config(between.app(), host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    between.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield between
    server.should_exit = True
    thread.join()


@dataclass
class Sandbox:
    """A claimed work item, and the runner's process serving it."""

    emulator: Emulator
    between: Between
    workdir: Path
    stop_timeout: float = 10.0
    keeps_outputs: bool = False
    stages: bool = False
    without_secret: bool = False  # the control plane hands over the environment key instead
    session_id: str = ""
    process: subprocess.Popen[str] | None = None
    output: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)

    def control(self, path: str, body: dict[str, Any]) -> Any:
        return httpx.post(f"{self.emulator.url}/_control/{path}", json=body).raise_for_status().json()

    def start(self, *script: dict[str, Any]) -> None:
        """Queue a session, claim its item as the poller would, start the runner on it."""
        queued = self.control("sessions", {"script": list(script)})["sessions"][0]
        self.session_id = queued["session_id"]
        work = f"{self.emulator.url}/v1/environments/{self.emulator.environment_id}/work"
        headers = {
            "authorization": f"Bearer {self.emulator.environment_key}",
            "anthropic-beta": "managed-agents-2026-04-01",
        }
        with httpx.Client(headers=headers) as poller:
            item = poller.get(f"{work}/poll").raise_for_status().json()
            assert item["id"] == queued["work_id"]
            poller.post(f"{work}/{item['id']}/ack").raise_for_status()
            claim = {"expected_last_heartbeat": "NO_HEARTBEAT"}
            poller.post(f"{work}/{item['id']}/heartbeat", params=claim).raise_for_status()
        self.between.grant = {
            "work_id": item["id"],
            "environment_id": item["environment_id"],
            "session_id": self.session_id,
            "callback_secret": CALLBACK_SECRET,
            "outputs": self.keeps_outputs,
            "staging": self.stages,
        } | (
            {"environment_key": self.emulator.environment_key}
            if self.without_secret
            else {"work_secret": item["secret"]}
        )
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(runner.__file__).parent),
            "PYTHONDONTWRITEBYTECODE": "1",
            "FLEET_WORK_ID": item["id"],
            "FLEET_TURN": "1700000000000",
            "FLEET_ATTEMPT": "1",
            "FLEET_TICKET": TICKET,
            "FLEET_TICKETS_URL": f"{self.between.url}/tickets/",
            "FLEET_MAX_IDLE_SECONDS": "0.5",
            "FLEET_STOP_TIMEOUT_SECONDS": str(self.stop_timeout),
            "FLEET_WORKDIR": str(self.workdir),
            "FLEET_OUTPUTS": str(self.workdir / "outputs"),
            "ANTHROPIC_BASE_URL": self.between.url,
            "ANTHROPIC_ENVIRONMENT_ID": item["environment_id"],
            # What an image or a user may have set, and what must change nothing.
            "ANTHROPIC_API_KEY": "another-credential",
            "ANTHROPIC_CUSTOM_HEADERS": "authorization: Bearer another-credential",
            "ANTHROPIC_LOG": "debug",
        }
        self.process = subprocess.Popen(
            [*AS_IN_A_TASK, sys.executable, "-P", "-m", "runner"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ends(self) -> ExitCode:
        """Wait for the runner's end; nothing that it said may hold a secret."""
        assert self.process is not None
        self.output, _ = self.process.communicate(timeout=WAIT_SECONDS)
        ids = {"work_id", "environment_id", "session_id", "outputs", "staging"}
        granted = [value for name, value in self.between.grant.items() if name not in ids]
        for secret in (TICKET, SIGNATURE, *granted, "another-credential"):
            assert secret not in self.output
        self.lines = [json.loads(line) for line in self.output.splitlines()]
        assert self.lines[-1]["exit_code"] == self.process.returncode, self.output
        return ExitCode(self.process.returncode)


@pytest.fixture
def sandbox(emulator: Emulator, between: Between, tmp_path: Path) -> Iterator[Sandbox]:
    sandbox = Sandbox(emulator, between, tmp_path / "work")
    yield sandbox
    if sandbox.process is not None:
        sandbox.process.kill()
        sandbox.process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another process or thread is about to do; there is no clock of ours to move here."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def bash(command: str, expect: str | None = None) -> dict[str, Any]:
    return {"tool": "bash", "input": {"command": command}} | ({"expect": expect} if expect else {})


def test_a_turn_runs_on_the_sessions_token_and_makes_one_work_call(sandbox: Sandbox) -> None:
    sandbox.start(bash(f"{WRITES}; echo hi > note; echo hi", "hi"), bash("cat note; pwd", str(sandbox.workdir)))
    assert sandbox.ends() is ExitCode.FINISHED
    between = sandbox.between
    assert between.result_texts == ["hi", f"hi\n{sandbox.workdir}"]
    grant = between.grant
    assert between.work_calls == [f"POST /v1/environments/{grant['environment_id']}/work/{grant['work_id']}/stop"]
    [credential] = between.stop_credentials
    assert credential.startswith("Bearer ")
    assert credential not in (f"Bearer {sandbox.emulator.environment_key}", "Bearer another-credential")
    assert credential.removeprefix("Bearer ") not in sandbox.output
    assert between.words == []
    assert between.order == ["stop"], "without a bucket nothing is asked about outputs"
    [first] = [line for line in sandbox.lines if line["message"] == "first tool result"]
    assert first["first_result_seconds"] > 0, "what the template's metric filter reads"
    named = {"work_id": grant["work_id"], "session_id": grant["session_id"], "attempt": 1, "service": "sandbox"}
    assert named.items() <= first.items()


def test_a_turn_runs_on_the_environment_key_where_it_was_handed_over(sandbox: Sandbox) -> None:
    sandbox.without_secret = True
    sandbox.start(bash("echo hi", "hi"))
    assert sandbox.ends() is ExitCode.FINISHED
    assert sandbox.between.result_texts == ["hi"]
    assert sandbox.between.stop_credentials == [f"Bearer {sandbox.emulator.environment_key}"]
    assert sandbox.emulator.environment_key not in sandbox.output


def test_tools_find_no_ticket_token_or_key_in_their_environment(sandbox: Sandbox) -> None:
    sandbox.start(bash("env"))
    assert sandbox.ends() is ExitCode.FINISHED
    [shown] = sandbox.between.result_texts
    names = {line.partition("=")[0] for line in shown.splitlines()}
    assert {name for name in names if name.startswith(("ANTHROPIC_", "FLEET_"))} == {
        "FLEET_WORK_ID",
        "FLEET_TURN",
        "FLEET_ATTEMPT",
        "FLEET_SANDBOX",
    }
    token = sandbox.between.stop_credentials[0].removeprefix("Bearer ")
    for secret in (TICKET, CALLBACK_SECRET, token, "another-credential"):
        assert secret not in shown


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and prctl are Linux's")
def test_tools_can_look_into_nothing_of_the_runner(sandbox: Sandbox) -> None:
    looks = [bash(f"cat /proc/$PPID/{what}") for what in ("environ", "mem", "maps", "fd/0")]
    sandbox.start(*looks, bash("cat /proc/$PPID/comm; grep NoNewPrivs /proc/self/status"))
    assert sandbox.ends() is ExitCode.FINISHED
    *refused, shown = sandbox.between.result_texts
    assert ["Permission denied" in text for text in refused] == [True] * 4, refused
    assert "not protected" not in sandbox.output
    parent, _, no_new_privileges = shown.partition("\n")
    assert parent.startswith("python")
    assert no_new_privileges.split() == ["NoNewPrivs:", "1"]


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]])
def test_a_signal_mid_tool_ends_the_tool_posts_its_result_and_no_stop(
    sandbox: Sandbox, signals: list[signal.Signals]
) -> None:
    """FIELD_NOTES 24: SIGTERM is all the notice that a Spot task is sure to get."""
    pid_file = sandbox.workdir / "pid"
    sandbox.start(bash(f"echo before; trap '' TERM; sleep 100 & echo $! > {pid_file}; wait; echo after"))
    wait_until(lambda: pid_file.exists() and pid_file.read_text().strip() != "")
    tool = psutil.Process(int(pid_file.read_text()))
    assert sandbox.process is not None
    for number in signals:
        sandbox.process.send_signal(number)
    assert sandbox.ends() is ExitCode.STOPPED
    assert not tool.is_running() or tool.status() == psutil.STATUS_ZOMBIE
    [result] = sandbox.between.results
    assert result["is_error"]
    assert result["content"][0]["text"].startswith("before")
    assert "after" not in result["content"][0]["text"]
    assert sandbox.between.work_calls == []
    assert sandbox.between.words == []


def test_a_result_that_cannot_be_posted_does_not_outlast_the_stop_timeout(sandbox: Sandbox) -> None:
    """The SDK sends a result again for 300 s, and shields that from the stop."""
    sandbox.between.refuse = lambda method, path: 503 if method == "POST" and path.endswith("/events") else None
    sandbox.stop_timeout = 2.0
    sandbox.start(bash("true"))
    wait_until(lambda: bool(sandbox.between.results))
    assert sandbox.process is not None
    sandbox.process.terminate()
    assert sandbox.ends() is ExitCode.STOPPED
    assert "stop timeout nearly over" in sandbox.output
    assert sandbox.between.work_calls == []


def test_a_signal_between_tools_ends_the_turn_without_a_stop(sandbox: Sandbox) -> None:
    sandbox.between.refuse = lambda method, path: 503 if path.endswith("/stream") else None
    sandbox.start(bash("true"))
    wait_until(lambda: any(call.endswith("/stream") for call in sandbox.between.calls))
    assert sandbox.process is not None
    sandbox.process.terminate()
    assert sandbox.ends() is ExitCode.STOPPED
    assert sandbox.between.work_calls == []


def test_what_an_agent_left_running_ends_with_the_sandbox(sandbox: Sandbox) -> None:
    pid_file = sandbox.workdir / "pid"
    sandbox.start(bash(f"setsid sleep 100 >/dev/null 2>&1 & echo $! > {pid_file}; echo started", "started"))
    assert sandbox.ends() is ExitCode.FINISHED
    pid = int(pid_file.read_text())
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_a_refused_ticket_touches_nothing_of_the_session(sandbox: Sandbox) -> None:
    sandbox.between.ticket_status = 403
    sandbox.start(bash("true"))
    assert sandbox.ends() is ExitCode.TICKET_REFUSED
    assert sandbox.between.calls == []


@pytest.mark.parametrize(
    ("ending", "status", "code"),
    [
        ("", 404, ExitCode.SESSION_GONE),
        ("/events/stream", 404, ExitCode.SESSION_GONE),  # the SDK's worker ends here as if all were well
        ("/events/stream", 403, ExitCode.CREDENTIAL_REFUSED),
        ("/events", 401, ExitCode.CREDENTIAL_REFUSED),
    ],
)
def test_a_session_that_is_refused_or_gone_is_told_apart_and_not_stopped(
    sandbox: Sandbox, ending: str, status: int, code: ExitCode
) -> None:
    sandbox.between.refuse = lambda method, path: (
        status if path == f"/v1/sessions/{sandbox.session_id}{ending}" else None
    )
    sandbox.start(bash("true"))
    assert sandbox.ends() is code
    assert sandbox.between.work_calls == []


def test_an_unexpected_end_is_a_crash_and_not_stopped(sandbox: Sandbox) -> None:
    sandbox.between.refuse = lambda method, path: 500 if path == f"/v1/sessions/{sandbox.session_id}" else None
    sandbox.start(bash("true"))
    assert sandbox.ends() is ExitCode.CRASH
    assert sandbox.between.work_calls == []
    assert "Traceback" not in sandbox.output


def test_a_stop_that_the_token_may_not_post_is_handed_to_the_control_plane(sandbox: Sandbox) -> None:
    sandbox.between.refuse = lambda method, path: 403 if path.endswith("/stop") else None
    sandbox.start(bash("echo hi", "hi"))
    assert sandbox.ends() is ExitCode.FINISHED
    assert len(sandbox.between.work_calls) == 1
    word, again = sandbox.between.words  # until the control plane says that the item is stopped
    assert again == word
    assert word == {
        "work_id": sandbox.between.grant["work_id"],
        "turn": 1700000000000,
        "attempt": 1,
        "callback_secret": CALLBACK_SECRET,
        "unserved": False,
    }


def test_a_message_that_slips_in_before_the_stop_is_unserved(sandbox: Sandbox) -> None:
    def slip_in() -> None:
        sandbox.control(f"sessions/{sandbox.session_id}/messages", {"script": [bash("echo again", "again")]})

    sandbox.between.before_stop = slip_in
    sandbox.start(bash("echo hi", "hi"))
    assert sandbox.ends() is ExitCode.UNSERVED
    assert [word["unserved"] for word in sandbox.between.words] == [True]
    assert len(sandbox.between.work_calls) == 1
    assert sandbox.between.result_texts == ["hi"]


def test_outputs_are_put_after_the_stop_and_told(sandbox: Sandbox) -> None:
    """While the item is active with nobody listening, a message is lost: nothing may hold up its stop."""
    sandbox.keeps_outputs = True
    sandbox.start(bash(f"{WRITES}; ln -s /etc/passwd outputs/link; echo done", "done"))
    assert sandbox.ends() is ExitCode.FINISHED
    assert sandbox.between.order == ["stop", "ask ended=True", "put a.txt", "put manifest.json", "told 1"]
    assert sandbox.between.put["a.txt"] == b"42\n"


def test_a_signal_puts_what_is_there(sandbox: Sandbox) -> None:
    sandbox.keeps_outputs = True
    sandbox.start(bash(f"{WRITES}; touch ready; sleep 100"))
    wait_until((sandbox.workdir / "ready").exists)
    assert sandbox.process is not None
    sandbox.process.terminate()
    assert sandbox.ends() is ExitCode.STOPPED
    assert sandbox.between.order == ["ask ended=False", "put a.txt", "put manifest.json", "told 1"]


def test_a_signal_amid_an_upload_that_hangs_ends_it_in_time_and_changes_no_outcome(sandbox: Sandbox) -> None:
    sandbox.keeps_outputs, sandbox.stop_timeout = True, 4.0
    seen, given_up = threading.Event(), threading.Event()

    def hang() -> None:
        if seen.is_set():  # the manifest: the file was given up
            given_up.set()
            return
        seen.set()
        assert sandbox.process is not None
        sandbox.process.terminate()
        given_up.wait(WAIT_SECONDS)

    sandbox.between.before_put = hang
    sandbox.start(bash(WRITES))
    assert sandbox.ends() is ExitCode.FINISHED
    assert "time was up" in sandbox.output
    assert json.loads(sandbox.between.put["manifest.json"])["left_out"] == [{"name": "a.txt", "why": "time was up"}]


def test_a_workspace_is_staged_before_the_turn(sandbox: Sandbox) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("src/note", "staged")
    sandbox.stages, sandbox.between.archive = True, packed.getvalue()
    sandbox.start(bash("cat src/note", "staged"))
    assert sandbox.ends() is ExitCode.FINISHED


def test_what_cannot_be_staged_ends_the_turn_before_it_touches_the_session(sandbox: Sandbox) -> None:
    sandbox.stages = True
    sandbox.start(bash("true"))
    assert sandbox.ends() is ExitCode.STAGING_FAILED
    assert sandbox.between.calls == []
    assert "may not be read (HTTP 403)" in sandbox.output
