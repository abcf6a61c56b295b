"""The Work API emulator, in a thread of the test's process, and the local AWS as fixtures; no doubles of ours."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from local.work_api.server import Emulator, Server
from tests.contract import local_aws

START_SECONDS = 30.0
_HTTP = httpx.Client(timeout=10.0)  # one for all: each loads the machine's certificates


@dataclass(frozen=True)
class RunningEmulator:
    """A fresh emulator that listens on `base_url` (also `url`)."""

    base_url: str
    environment_id: str
    environment_key: str = field(repr=False)
    org_key: str = field(repr=False)

    @property
    def url(self) -> str:
        return self.base_url

    def control(self, method: str, path: str, json: Any = None) -> Any:
        """Calls `/_control/{path}` and returns the parsed reply."""
        url = f"{self.base_url}/_control/{path.lstrip('/')}"
        return _HTTP.request(method, url, json=json).raise_for_status().json()


def fresh() -> Emulator:
    """An emulator with the credentials that `RunningEmulator` names."""
    return Emulator("env_contract", "sk-ant-oat01-contract", "sk-ant-api03-contract")


@contextlib.contextmanager
def running() -> Iterator[tuple[Server, RunningEmulator]]:
    """A server in a thread of its own; its end asserts that nothing held it up."""
    server = Server(fresh(), "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_SECONDS
    while not server.started:
        assert thread.is_alive(), "the emulator ended before it listened"
        assert time.monotonic() < deadline, "the emulator did not start in time"
        time.sleep(0.01)
    yield server, RunningEmulator(server.url, "env_contract", "sk-ant-oat01-contract", "sk-ant-api03-contract")
    server.should_exit = True
    thread.join(START_SECONDS)
    assert not thread.is_alive(), "the emulator did not end"


@pytest.fixture
def emulator() -> Iterator[RunningEmulator]:
    with running() as (_, reached):
        yield reached


@pytest.fixture(scope="session")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local_aws.LocalAws]:
    started = local_aws.start(tmp_path_factory.mktemp("local-aws"), "--time-scale", "0.01")
    yield started
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(local_aws.PATIENCE) == 0
