"""`fleet work` and `fleet key` against the emulator over HTTP; the stack's table and secret are moto's."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from moto import mock_aws
from typer.testing import CliRunner, Result

from cli import app as fleet
from cli import key as key_command
from cli.stack import Fleet
from cli.terminal import Code, Failure
from shared.config import SHARD, Config
from shared.record import Phase, Record
from shared.store import DynamoStore
from tests.contract.conftest import RunningEmulator
from tests.unit.conftest import dynamo_table

NEW_KEY = "sk-ant-oat01-rotated-key-of-the-same-environment"
Run = Callable[..., Result]


@pytest.fixture
def stack(emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """A Fleet whose stack is found: its look-up through CloudFormation is tests/e2e's."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with (
        mock_aws(config={"core": {"mock_credentials": True, "passthrough": {"urls": ["http://127.0.0.1.*"]}}}),
        dynamo_table() as client,
    ):
        secret = boto3.client("secretsmanager").create_secret(Name="key", SecretString=emulator.environment_key)
        found = Config(
            table="work",
            environment_id=emulator.environment_id,
            base_url=emulator.url,
            key_secret_arn=secret["ARN"],
        )
        monkeypatch.setattr(Fleet, "config", found)
        monkeypatch.setattr(Fleet, "store", DynamoStore(client, "work"))
        yield Fleet()


@pytest.fixture
def run(stack: Fleet) -> Run:
    def invoke(*words: str, given: str = "") -> Result:
        return CliRunner().invoke(fleet.app, fleet.global_options_first(list(words)), input=given)

    return invoke


def queued(emulator: RunningEmulator) -> str:
    return str(emulator.control("POST", "sessions", {"script": []})["sessions"][0]["work_id"])


def stored_key() -> str:
    return str(boto3.client("secretsmanager").get_secret_value(SecretId="key")["SecretString"])


def test_each_call_by_hand_takes_an_item_through_its_life(
    emulator: RunningEmulator, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_id = queued(emulator)
    assert json.loads(run("work", "stats", "--json").output)["depth"] == 1
    polled = run("work", "poll", "--json")
    shown = json.loads(polled.stdout)
    assert (shown["id"], shown["state"], shown["secret"]) == (work_id, "queued", "present, not shown")
    assert run("work", "ack", work_id, "--yes").exit_code == 0
    beat = json.loads(run("work", "heartbeat", work_id, "--expected", "NO_HEARTBEAT", "--yes", "--json").stdout)
    assert (beat["state"], beat["lease_extended"]) == ("active", True)
    refused = run("work", "heartbeat", work_id, "--expected", "NO_HEARTBEAT", "--yes")
    assert isinstance(refused.exception, Failure)
    assert refused.exception.code is Code.NOT_DONE
    assert beat["last_heartbeat"] in refused.stdout
    assert work_id in run("work", "list", "--state", "active").output
    assert work_id not in run("work", "list", "--state", "queued").output
    monkeypatch.setenv("ANTHROPIC_API_KEY", emulator.org_key)
    changed = json.loads(run("work", "update", work_id, "--set", "owner=ana", "--json").stdout)
    assert changed["metadata"] == {"owner": "ana"}
    assert json.loads(run("work", "get", work_id, "--json").stdout)["metadata"] == {"owner": "ana"}
    assert "stopped" in run("work", "stop", work_id, "--force", "--yes").output
    everything = polled.output + refused.output
    assert not [secret for secret in emulator.control("GET", "secrets")["secrets"] if secret in everything]


@pytest.mark.parametrize(
    "words", [("ack",), ("heartbeat", "--expected", "NO_HEARTBEAT"), ("stop",), ("stop", "--force")], ids=" ".join
)
def test_a_call_that_can_harm_is_not_made_without_a_yes(
    emulator: RunningEmulator, run: Run, words: tuple[str, ...]
) -> None:
    work_id = queued(emulator)
    refused = run("work", words[0], work_id, *words[1:])
    assert isinstance(refused.exception, Failure)
    assert refused.exception.code is Code.NOT_DONE
    assert "--yes" in str(refused.exception)
    assert emulator.control("GET", "state")["work"][0]["state"] == "queued"


def test_an_item_that_this_stack_serves_is_named_so(emulator: RunningEmulator, stack: Fleet, run: Run) -> None:
    work_id = queued(emulator)
    live = Record(work_id=work_id, environment_id="env", kind="session", turn=1, phase=Phase.RUNNING, shard=SHARD)
    stack.store.save(live)
    refused = run("work", "stop", work_id)
    assert "This stack serves it (running)" in str(refused.exception)


def test_an_unknown_item_brings_the_nearest_ids(emulator: RunningEmulator, run: Run) -> None:
    work_id = queued(emulator)
    refused = run("work", "ack", work_id[:-1], "--yes")
    assert isinstance(refused.exception, Failure)
    assert refused.exception.code is Code.NOT_FOUND
    assert work_id in str(refused.exception)


def test_what_needs_the_organisation_key_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    assert "set ANTHROPIC_API_KEY" in str(run("work", "get", "work_1").exception)


def test_a_key_that_the_api_refuses_is_not_put(emulator: RunningEmulator, run: Run) -> None:
    refused = run("key", "rotate", given=NEW_KEY)
    assert isinstance(refused.exception, Failure)
    assert "refuses this key" in str(refused.exception)
    assert stored_key() == emulator.environment_key
    assert NEW_KEY not in refused.output + str(refused.exception)


@pytest.mark.parametrize("given", ["", "no key at all", "sk-ant-oat01-two words", "sk-ant-oat01-ü"])
def test_what_is_no_key_is_neither_put_nor_quoted(emulator: RunningEmulator, run: Run, given: str) -> None:
    refused = run("key", "rotate", given=given)
    assert isinstance(refused.exception, Failure)
    assert refused.exception.code is Code.USAGE
    assert not given or given not in refused.output + str(refused.exception)
    assert stored_key() == emulator.environment_key


def test_the_key_in_use_is_not_put_again(emulator: RunningEmulator, run: Run) -> None:
    assert "uses already" in str(run("key", "rotate", given=emulator.environment_key).exception)


def test_a_good_key_is_put_and_waited_for(emulator: RunningEmulator, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator.control("POST", "keys", {"key": NEW_KEY})
    waited: list[float] = []
    monkeypatch.setattr(key_command, "_wait_until", lambda end: waited.append(end - time.time()))
    done = run("key", "rotate", given=f"{NEW_KEY}\n")
    assert done.exit_code == 0, done.output
    assert stored_key() == NEW_KEY
    assert waited[0] > 60  # what a function may go on with the key that it read
    assert "may be revoked now" in done.output
    assert NEW_KEY not in done.output


def test_sandboxes_that_were_handed_the_old_key_are_named(
    emulator: RunningEmulator, stack: Fleet, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator.control("POST", "keys", {"key": NEW_KEY})
    monkeypatch.setattr(Fleet, "config", stack.config.model_copy(update={"hand_over_environment_key": True}))
    live: dict[str, Any] = {
        "environment_id": "env",
        "kind": "session",
        "turn": 1,
        "phase": Phase.RUNNING,
        "shard": SHARD,
    }
    stack.store.save(Record(work_id="work_handed", **live))
    done = run("key", "rotate", "--no-wait", "--json", given=NEW_KEY)
    assert json.loads(done.stdout)["old_key_in_sandboxes_of"] == ["work_handed"]
