"""The runner's rules one by one (sandbox/runner.py, json_log.py); whole turns are in tests/contract."""

import asyncio
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx2
import psutil
import pytest
import runner
from anthropic import AsyncAnthropic, DefaultAsyncHttpxClient
from anthropic.lib.environments import MEMORY_FLUSH_TIMEOUT
from control_plane import Attempt, ControlPlane, Grant
from json_log import configure_logging, say
from pydantic import SecretStr
from runner import Config, ConfigurationError, ExitCode

GRANT = Grant(
    work_id="work_1",
    environment_id="env_1",
    session_id="sesn_1",
    work_secret=SecretStr("work-secret"),
    callback_secret=SecretStr("callback-secret"),
)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {
        "FLEET_WORK_ID": "work_1",
        "FLEET_TURN": "1700000000000",
        "FLEET_ATTEMPT": "1",
        "FLEET_TICKET": "the-ticket",
        "FLEET_TICKETS_URL": "http://tickets.test/",
        "FLEET_WORKDIR": str(tmp_path / "work"),
        "ANTHROPIC_BASE_URL": "http://api.test",
        "ANTHROPIC_ENVIRONMENT_ID": "env_1",
    }


# --- configuration ----------------------------------------------------------------------------------------


def test_the_environment_is_read_with_its_defaults(environ: dict[str, str]) -> None:
    config = Config.from_environment(environ)
    assert config.attempt == Attempt("work_1", 1700000000000, 1)
    assert (config.max_idle, config.stop_timeout) == (60.0, 120.0)
    assert Path(config.workdir).is_dir()


@pytest.mark.parametrize(
    "name",
    [
        "FLEET_WORK_ID",
        "FLEET_TURN",
        "FLEET_ATTEMPT",
        "FLEET_TICKET",
        "FLEET_TICKETS_URL",
        "ANTHROPIC_BASE_URL",
        "ANTHROPIC_ENVIRONMENT_ID",
    ],
)
@pytest.mark.parametrize("value", [None, ""])
def test_a_missing_variable_is_named_with_what_sets_it(environ: dict[str, str], name: str, value: str | None) -> None:
    environ.pop(name)
    if value is not None:
        environ[name] = value
    with pytest.raises(ConfigurationError, match=rf"^{name} is not set \(.* sets it .*\)$"):
        Config.from_environment(environ)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FLEET_TURN", "soon"),
        ("FLEET_ATTEMPT", "-1"),
        ("FLEET_TICKETS_URL", "tickets.test"),
        ("ANTHROPIC_BASE_URL", "ftp://api.test"),
        ("FLEET_MAX_IDLE_SECONDS", "0"),
        ("FLEET_MAX_IDLE_SECONDS", "nan"),
        ("FLEET_STOP_TIMEOUT_SECONDS", "two minutes"),
        ("FLEET_WORKDIR", "/dev/null/work"),
    ],
)
def test_a_malformed_variable_is_named(environ: dict[str, str], name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} "):
        Config.from_environment({**environ, name: value})


def test_a_work_item_of_another_environment_is_a_configuration_error(environ: dict[str, str]) -> None:
    config = Config.from_environment({**environ, "ANTHROPIC_ENVIRONMENT_ID": "env_2"})
    with pytest.raises(ConfigurationError, match=r"env_2.*env_1"):
        runner.usable_token(config, GRANT)


def test_the_configuration_shows_no_ticket(environ: dict[str, str]) -> None:
    assert "the-ticket" not in repr(Config.from_environment(environ))


def test_tools_and_the_sdk_find_no_credential_in_the_environment(environ: dict[str, str]) -> None:
    environ |= {
        "ANTHROPIC_API_KEY": "k",
        "ANTHROPIC_ENVIRONMENT_KEY": "k",
        "ANTHROPIC_CUSTOM_HEADERS": "a: b",
    }
    environ |= {"PATH": "/bin", "HOME": "/home/agent"}
    runner.scrub_environment(environ)
    assert set(environ) == {"FLEET_WORK_ID", "FLEET_TURN", "FLEET_ATTEMPT", "PATH", "HOME"}


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_protection_that_the_kernel_refuses_is_logged_and_the_turn_goes_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    configure_logging()
    monkeypatch.setattr(runner, "_PROTECTIONS", (("PR_NONE", -1, 0),))
    runner.protect_process()
    line = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (line["level"], line["reason"], line["error"]) == ("ERROR", "PR_NONE failed", "Invalid argument")


def test_bad_configuration_ends_with_one_clear_line_and_its_own_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runner"],
        env={"PYTHONPATH": str(Path(runner.__file__).parent), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    errors = [line for line in map(json.loads, done.stdout.splitlines()) if line["level"] == "ERROR"]
    assert done.returncode == ExitCode.BAD_CONFIGURATION
    assert [line["error"] for line in errors] == [
        "FLEET_WORK_ID is not set (the launcher sets it in the RunTask overrides)"
    ]
    assert done.stderr == ""


def test_exit_codes_are_distinct_and_none_is_one_that_shells_and_engines_use() -> None:
    codes = [int(code) for code in ExitCode]
    assert len(set(codes)) == len(ExitCode.__members__) == 12
    assert all(code == 0 or (code != 2 and code < 64) for code in codes)


# --- log --------------------------------------------------------------------------------------------------


@pytest.fixture
def log_restored() -> Iterator[None]:
    root, raises = logging.getLogger(), logging.raiseExceptions
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers, logging.raiseExceptions = handlers, raises
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.mark.usefixtures("log_restored")
def test_a_line_is_json_with_the_attempt_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging().add_fields(Attempt("work_1", 5, 2).as_fields())
    say(logging.INFO, "turn started", extra_field=1)
    line = json.loads(capsys.readouterr().out)
    assert line["message"] == "turn started"
    assert (line["work_id"], line["turn"], line["attempt"], line["extra_field"]) == ("work_1", 5, 2, 1)


@pytest.mark.usefixtures("log_restored")
def test_a_secret_is_shown_nowhere_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    secret = 'se"cret\\value-é'
    configure_logging().hide([secret])
    say(logging.ERROR, f"in the message {secret}", in_a_field={"deep": [secret]})
    logging.getLogger("anthropic.lib").error("raised with %s", secret, exc_info=ValueError(secret))
    shown = capsys.readouterr().out
    first, second = map(json.loads, shown.splitlines())
    assert (first["message"], first["in_a_field"]) == ("in the message [hidden]", {"deep": ["[hidden]"]})
    assert (second["message"], second["error"]) == ("raised with [hidden]", "ValueError: [hidden]")


@pytest.mark.usefixtures("log_restored")
def test_libraries_are_heard_from_warning_up_even_if_the_environment_asked_for_more() -> None:
    logging.getLogger("anthropic").setLevel(logging.DEBUG)  # what ANTHROPIC_LOG=debug does at import
    configure_logging()
    for name in ("anthropic", "httpx2"):
        assert not logging.getLogger(f"{name}.client").isEnabledFor(logging.INFO)
        assert logging.getLogger(f"{name}.client").isEnabledFor(logging.WARNING)


# --- the end of a turn ------------------------------------------------------------------------------------


def event(kind: str, stop_reason: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(type=kind, stop_reason=SimpleNamespace(type=stop_reason) if stop_reason else None)


MESSAGE = event("user.message")
CALL = event("agent.tool_use")
END_TURN = event("session.status_idle", "end_turn")
WAITS_FOR_TOOL = event("session.status_idle", "requires_action")


@pytest.mark.parametrize(
    ("history", "unserved"),
    [
        ([], False),
        ([MESSAGE, CALL, WAITS_FOR_TOOL, event("user.tool_result"), END_TURN], False),
        ([MESSAGE, END_TURN, MESSAGE], True),
        ([MESSAGE, END_TURN, MESSAGE, event("session.status_running"), CALL, WAITS_FOR_TOOL], True),
        ([MESSAGE, END_TURN, MESSAGE, event("session.status_running"), END_TURN], False),
        ([MESSAGE, event("session.status_idle", "retries_exhausted"), MESSAGE], True),
        ([MESSAGE, event("session.status_idle", "a_reason_to_come"), event("user.define_outcome")], True),
        ([MESSAGE, END_TURN, event("user.interrupt"), event("session.updated")], False),
        ([MESSAGE, END_TURN, MESSAGE, event("session.status_terminated")], False),
        ([MESSAGE], False),  # no end of a turn to compare with: a session that was terminated before
    ],
)
def test_a_message_after_the_last_end_of_a_turn_is_unserved(history: list[SimpleNamespace], unserved: bool) -> None:
    assert runner.ends_in_unserved_work(history) is unserved


class FarSide:
    """API and tickets function in one: answers stop and history as told, and notes what it was sent."""

    def __init__(
        self, stop: int | Exception, history: list[dict[str, object]] | int | None = None, word: int = 200
    ) -> None:
        self.stop, self.word = stop, word
        self.history: list[dict[str, object]] | int = [] if history is None else history
        self.sent: list[str] = []
        self.words_until_stopped = 1
        self.stop_request: httpx2.Request | None = None

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("/stop"):
            self.sent.append("stop")
            self.stop_request = request
            if isinstance(self.stop, Exception):
                raise self.stop
            return httpx2.Response(self.stop, json={"type": "work", "id": "work_1"} if self.stop != 204 else None)
        if request.url.path.endswith("/turn-ended"):
            body = json.loads(request.content)
            assert body["callback_secret"] == "callback-secret"
            self.sent.append(f"word unserved={body['unserved']}")
            return httpx2.Response(
                self.word, json={"stopped": self.sent.count(self.sent[-1]) >= self.words_until_stopped}
            )
        self.sent.append("history")
        if isinstance(self.history, int):
            return httpx2.Response(self.history, headers={"x-should-retry": "false"}, json={})
        return httpx2.Response(200, json={"data": self.history, "next_page": None})

    def close(self) -> ExitCode:
        async def run() -> ExitCode:
            http = DefaultAsyncHttpxClient(transport=httpx2.MockTransport(self._answer))
            async with AsyncAnthropic(auth_token="token", base_url="http://api.test", http_client=http) as client:
                plane = ControlPlane(http, "http://tickets.test/", Attempt("work_1", 5, 1))
                return await runner.close_turn(client, GRANT, plane)

        return asyncio.run(run())


SLIPPED_IN: list[dict[str, object]] = [
    {"type": "session.status_idle", "id": "sevt_1", "stop_reason": {"type": "end_turn"}},
    {"type": "user.message", "id": "sevt_2", "content": []},
]


def test_the_stop_is_forced_and_signed_with_the_sessions_token() -> None:
    far = FarSide(200)
    far.close()
    request = far.stop_request
    assert request is not None
    assert str(request.url) == "http://api.test/v1/environments/env_1/work/work_1/stop"
    assert json.loads(request.content) == {"force": True}
    assert request.headers["authorization"] == "Bearer token"
    assert request.headers["anthropic-beta"] == "managed-agents-2026-04-01"
    assert request.headers["anthropic-version"] == "2026-10-21"


@pytest.mark.parametrize("status", [200, 204, 409])
def test_a_stop_taken_needs_no_word(status: int) -> None:
    far = FarSide(status)
    assert far.close() is ExitCode.FINISHED
    assert far.sent == ["stop", "history"]


@pytest.mark.parametrize("stop", [401, 403, 429, 500, 503, httpx2.ReadTimeout("slow"), httpx2.ConnectError("no")])
def test_a_stop_refused_or_unanswered_is_posted_once_and_handed_to_the_control_plane(
    stop: int | Exception,
) -> None:
    far = FarSide(stop)
    assert far.close() is ExitCode.FINISHED
    assert far.sent == ["stop", "word unserved=False", "history"]


def test_a_message_that_slipped_in_before_the_stop_is_told_as_unserved() -> None:
    far = FarSide(200, SLIPPED_IN)
    assert far.close() is ExitCode.UNSERVED
    assert far.sent == ["stop", "history", "word unserved=True"]


def test_the_history_is_read_after_the_word_that_makes_the_control_plane_stop() -> None:
    far = FarSide(403, SLIPPED_IN)
    assert far.close() is ExitCode.UNSERVED
    assert far.sent == ["stop", "word unserved=False", "history", "word unserved=True"]


def test_the_word_is_repeated_until_the_item_is_stopped_and_only_then_is_the_history_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A message that came between the two would be lost without a word."""
    monkeypatch.setattr(runner, "STOPPED_YET_SECONDS", 0.01)
    far = FarSide(403)
    far.words_until_stopped = 3
    assert far.close() is ExitCode.FINISHED
    assert far.sent == ["stop", *["word unserved=False"] * 3, "history"]


def test_an_item_that_could_not_be_stopped_is_told_by_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "STOPPED_YET_SECONDS", 0.01)
    monkeypatch.setattr(runner, "HAVE_STOPPED_SECONDS", 0.1)
    far = FarSide(403)
    far.words_until_stopped = 10**9
    assert far.close() is ExitCode.NOT_STOPPED
    assert FarSide(403, word=403).close() is ExitCode.NOT_STOPPED
    assert "history" not in far.sent


def test_an_unreadable_history_does_not_undo_a_finished_turn() -> None:
    assert FarSide(200, 403).close() is ExitCode.FINISHED


# --- tools' processes -------------------------------------------------------------------------------------


ENDS_ITS_TOOLS = '''
import os, signal, subprocess, sys
import runner
leaves = """import os, time
os.setsid()
os.fork() and os._exit(0)
print(os.getpid(), flush=True)
time.sleep(600)"""
marked = {runner.SANDBOX_MARK: "this sandbox's"}
left = subprocess.Popen([sys.executable, "-c", leaves], env=marked, stdout=subprocess.PIPE, text=True)
child = subprocess.Popen(["/bin/sleep", "600"], env={})
left_pid = int(left.stdout.readline())
runner.end_tool_processes("this sandbox's", signal.SIGKILL)
print(left_pid, child.wait(60))
'''


def test_a_tools_processes_end_even_if_they_left_the_process_tree() -> None:
    """In a process of its own: ending its descendants must not end those of the tests."""
    other = subprocess.Popen(["/bin/sleep", "600"], env={runner.SANDBOX_MARK: "another sandbox's"})
    try:
        done = subprocess.run(
            [sys.executable, "-c", ENDS_ITS_TOOLS],
            env={"PYTHONPATH": str(Path(runner.__file__).parent), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        left_pid, child_status = map(int, done.stdout.split())
        assert child_status == -signal.SIGKILL
        assert _ends(left_pid)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def _ends(pid: int) -> bool:
    try:
        process = psutil.Process(pid)
        return process.status() == psutil.STATUS_ZOMBIE or process.wait(10) is None
    except psutil.NoSuchProcess:
        return True


def test_a_stop_fits_between_sigterm_and_sigkill() -> None:
    """FIELD_NOTES 24: a tool's grace, its end and a memory flush (the SDK's bound) fit in what ECS grants at most."""
    ecs_grants = 120.0
    needed = runner.TOOL_GRACE_SECONDS + runner.TOOL_KILL_SECONDS + MEMORY_FLUSH_TIMEOUT
    assert needed < ecs_grants * runner.STOP_DEADLINE_SHARE < ecs_grants
