"""What the previous version left (fixtures/previous) under the present code: its records, its running loop."""

import importlib.util
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws
from pydantic import SecretStr

from local.work_api.server import Emulator
from shared import lifecycle
from shared.record import Outcome, Phase
from shared.store import DynamoStore
from shared.ticketing import TicketRequest, TurnEnded
from tests.contract.conftest import RunningEmulator, fresh, running
from tests.contract.fixtures.previous.make import create_table
from tests.contract.test_control_plane import Plane
from tests.unit import moto_asl

PREVIOUS = Path(__file__).parent / "fixtures" / "previous"
ROOT = Path(__file__).resolve().parents[2]
PRESENT_LOOP = ROOT / "statemachine" / "lease_loop.asl.yaml"
LEFT: dict[str, Any] = json.loads((PREVIOUS / "items.json").read_text())
CASES: dict[str, dict[str, Any]] = LEFT["cases"]
WORKING = ["received", "held", "launching", "running", "second_attempt"]


def _load(function: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"upgraded_{function}", ROOT / "functions" / function / "app.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


APPS = {name: _load(name) for name in ("keeper", "stopper")}


class Upgraded(Plane):
    """The present control plane over the previous one's table, tasks and leases."""

    def __init__(self, emulator: RunningEmulator, api: Emulator, table: Any) -> None:
        super().__init__(emulator)
        self.items = api._queue
        self.time, self.table, self.ecs.tasks = LEFT["now"], table, json.loads(json.dumps(LEFT["tasks"]))
        self.store: Any = DynamoStore(table, "work")
        parts = (self.claimer, self.launcher, self.keeper, self.stopper, self.observer, self.tickets, self.janitor)
        for part in parts:
            part.store = self.store

    def work(self, seconds: int) -> None:
        """So long, everything runs as its schedule has it; tasks start."""
        for _ in range(seconds // 20):
            self.pass_seconds(20)
            self.poll()
            while self.queue.sent:
                self.launcher.launch(self.queue.sent.pop(0))
            for arn, task in list(self.ecs.tasks.items()):
                if task["lastStatus"] == "PENDING":
                    self.observer.observe(self.ecs.becomes(arn, "RUNNING"))
            if self.beat().to_stop:
                self.stop()

    def dies(self, work_id: str, exit_code: int) -> None:
        arn = self.record(work_id).task_arn
        assert arn
        self.observer.observe(self.ecs.becomes(arn, "STOPPED", exit_code))
        self.stop()

    def finish(self, work_id: str) -> None:
        """As the runner ends a turn: the item's stop, then its exit."""
        self.emulator.control("POST", f"work/{work_id}/stop", {"force": True})
        self.dies(work_id, 0)


def restored() -> Emulator:
    """The emulator as the previous version's last call left it, its clock with it."""
    emulator = fresh()
    moments = ("created_at", "started_at", "acknowledged_at", "latest_heartbeat_at", "stop_requested_at", "stopped_at")
    newest = datetime.min.replace(tzinfo=UTC)
    for shown in LEFT["work"]:
        item = emulator._queue.enqueue(shown["id"])
        item.state, item.ttl_seconds = shown["state"], 60
        for name in moments:
            moment = datetime.fromisoformat(shown[name]) if shown[name] else None
            setattr(item, name, moment)
            newest = max(newest, moment or newest)
    emulator._ahead = newest - datetime.now(UTC)
    return emulator


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with running() as started:
        yield started


@pytest.fixture
def upgraded(server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Upgraded]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with mock_aws():
        table = boto3.client("dynamodb", region_name="us-east-1")
        create_table(table)
        for item in LEFT["items"]:
            table.put_item(TableName="work", Item=item)
        api = restored()
        server[0].serve_instead(api)
        yield Upgraded(server[1], api, table)


def test_the_fixture_has_a_record_in_each_phase() -> None:
    phases = {item["phase"]["S"] for item in LEFT["items"] if item["sk"]["S"] == "record"}
    assert phases == set(Phase)


@pytest.mark.parametrize("case", CASES)
def test_a_previous_record_is_read_and_written_again_without_a_loss(upgraded: Upgraded, case: str) -> None:
    work_id = CASES[case]["work_id"]
    before = next(i for i in LEFT["items"] if i["pk"]["S"] == work_id and i["sk"]["S"] == "record")
    upgraded.store.save(upgraded.record(work_id))
    after = upgraded.table.get_item(TableName="work", Key={"pk": {"S": work_id}, "sk": {"S": "record"}})["Item"]
    revision = {"N": str(int(before["revision"]["N"]) + 1)}
    assert {name: after[name] for name in before} == before | {"revision": revision}


def test_previous_leases_and_the_loop_s_generation_are_read(upgraded: Upgraded) -> None:
    leases = upgraded.store.get_leases(case["work_id"] for case in CASES.values())
    written = {i["pk"]["S"]: i["value"]["S"] for i in LEFT["items"] if i["sk"]["S"] == "lease"}
    assert {work_id: lease.value for work_id, lease in leases.items()} == written
    assert upgraded.store.loop_generation("0") == 2


def test_previous_turns_are_kept_past_their_ttl_and_completed(upgraded: Upgraded) -> None:
    ids = [CASES[case]["work_id"] for case in WORKING]
    before = {work_id: upgraded.record(work_id) for work_id in ids}
    upgraded.work(120)
    for work_id in ids:
        record, old = upgraded.record(work_id), before[work_id]
        assert (record.phase, record.turn, record.attempt) == (Phase.RUNNING, old.turn, old.attempt)
        assert upgraded.api_state(work_id) == "active"
    tasks = [t["startedBy"] for t in upgraded.ecs.tasks.values() if t["lastStatus"] == "RUNNING"]
    assert [tasks.count(str(upgraded.record(work_id).started_by)) for work_id in ids] == [1] * len(ids)
    for work_id in ids:
        upgraded.finish(work_id)
        assert (upgraded.record(work_id).outcome, upgraded.api_state(work_id)) == (Outcome.COMPLETED, "stopped")
    assert not {call["work_id"] for call in upgraded.stops()} & set(ids)


def test_a_sandbox_launched_by_the_previous_version_redeems_its_ticket(upgraded: Upgraded) -> None:
    case = CASES["launching"]
    record = upgraded.record(case["work_id"])
    asked = {"work_id": record.work_id, "turn": record.turn, "attempt": record.attempt}
    grant = upgraded.tickets.redeem(TicketRequest(**asked, ticket=SecretStr(case["ticket"]), nonce=SecretStr("n")))
    assert grant.work_secret == record.secret


def last_word(upgraded: Upgraded, case: dict[str, Any]) -> TurnEnded:
    record = upgraded.record(case["work_id"])
    said = {"work_id": record.work_id, "turn": record.turn, "attempt": record.attempt}
    return TurnEnded(**said, callback_secret=SecretStr(case["callback_secret"]))


def test_the_last_word_of_a_previous_sandbox_is_taken(upgraded: Upgraded) -> None:
    case = CASES["running"]
    upgraded.tickets.turn_ended(last_word(upgraded, case))
    upgraded.stopper.settle([case["work_id"]])
    upgraded.dies(case["work_id"], 0)
    record = upgraded.record(case["work_id"])
    assert (record.outcome, upgraded.api_state(record.work_id)) == (Outcome.COMPLETED, "stopped")


def test_a_turn_whose_last_word_the_previous_version_took_is_completed(upgraded: Upgraded) -> None:
    work_id = CASES["turn_ended"]["work_id"]
    upgraded.stop()
    upgraded.dies(work_id, 0)
    assert (upgraded.record(work_id).outcome, upgraded.api_state(work_id)) == (Outcome.COMPLETED, "stopped")


def test_a_previous_sandbox_that_exits_before_its_item_is_stopped_strands_nothing(upgraded: Upgraded) -> None:
    """The previous sandbox did not wait for its stop, which came after its death; the present rule trusts its exit."""
    work_id = CASES["turn_ended"]["work_id"]
    first = upgraded.record(work_id).turn
    upgraded.dies(work_id, 0)
    upgraded.work(120)
    record = upgraded.record(work_id)
    assert (record.phase, record.turn > first) == (Phase.RUNNING, True)
    upgraded.finish(work_id)
    assert (upgraded.record(work_id).outcome, upgraded.api_state(work_id)) == (Outcome.COMPLETED, "stopped")


def test_a_stop_that_the_previous_version_began_is_ended(upgraded: Upgraded) -> None:
    work_id = CASES["stopping"]["work_id"]
    upgraded.dies(work_id, 10)
    assert (upgraded.record(work_id).outcome, upgraded.api_state(work_id)) == (Outcome.STOPPED, "stopped")
    assert [call["work_id"] for call in upgraded.stops()].count(work_id) == 1


def test_an_ended_turn_of_the_previous_version_becomes_history(upgraded: Upgraded) -> None:
    work_id = CASES["stopped"]["work_id"]
    before = upgraded.record(work_id)
    upgraded.items.message_arrived(work_id)
    upgraded.work(40)
    record = upgraded.record(work_id)
    assert record.phase is Phase.RUNNING
    assert [past.turn for past in record.history] == [*(past.turn for past in before.history), before.turn]


def test_the_janitor_finds_nothing_wrong_in_what_the_previous_version_left(upgraded: Upgraded) -> None:
    for _ in range(2):
        upgraded.work(140)  # the second look comes two minutes after the first
        upgraded.janitor.sweep(upgraded.time + 240_000)
    records = [upgraded.record(CASES[case]["work_id"]) for case in WORKING]
    assert [(record.is_live, record.history) for record in records] == [(True, ())] * len(records)
    told_to_stop = {arn for arn, task in upgraded.ecs.tasks.items() if task.get("desiredStatus") == "STOPPED"}
    assert not told_to_stop & {record.task_arn for record in records}


def test_a_running_previous_loop_works_on_with_the_present_functions_and_hands_over_to_the_present_loop(
    upgraded: Upgraded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running execution keeps its old definition, but calls the functions' new code."""
    names = {
        "KeeperArn": moto_asl.lambda_arn("keeper"),
        "StopperArn": moto_asl.lambda_arn("stopper"),
        "LoopArn": moto_asl.state_machine_arn("loop"),
    }
    previous = moto_asl.load(PREVIOUS / "lease_loop.asl.yaml", names)
    present = moto_asl.load(PRESENT_LOOP, names)
    present["States"]["Beat"]["Parameters"]["asked_by"] = "present"
    limits = {c["Next"]: c.get("NumericGreaterThanEquals") for c in previous["States"]["AfterBeat"]["Choices"]}
    beats: list[tuple[str, int]] = []
    apps = {"keeper": upgraded.keeper, "stopper": upgraded.stopper}
    for name, part in apps.items():
        monkeypatch.setattr(APPS[name], name, lambda part=part: part)

    def keeper(state: dict[str, Any]) -> Any:
        beats.append((state.pop("asked_by", "previous"), state["generation"]))
        if len(beats) == 2:
            asl.client.update_state_machine(stateMachineArn=loop, definition=json.dumps(present))
        if len(beats) == 6:
            for name in CASES:
                _end(upgraded, CASES[name]["work_id"])
        reply = APPS["keeper"].handler(state, None)
        return reply | {"wait_until": "2020-01-01T00:00:00Z"}  # no time passes here

    def stopper(event: dict[str, Any]) -> Any:
        return APPS["stopper"].handler(event, None)

    with mock_aws(config=moto_asl.MOTO_CONFIG):
        asl = moto_asl.install(monkeypatch, {"keeper": keeper, "stopper": stopper})
        loop = asl.create("loop", previous)
        state = {"shard": "0", "generation": 2, "round": limits["HandOver"] - 4, "empty_rounds": 0}
        assert asl.run(loop, "lease-loop-0-2", state) == "SUCCEEDED"
        assert asl.ended(loop, "lease-loop-0-3") == "SUCCEEDED"
    assert beats == [("previous", 2)] * 4 + [("present", 3)] * (len(beats) - 4)
    assert len(beats) == 8, "three empty rounds after the sixth ended it"


def _end(upgraded: Upgraded, work_id: str) -> None:
    record = upgraded.record(work_id)
    if record.is_live:
        upgraded.store.save(lifecycle.closed(record, upgraded.time, retention_seconds=60, outcome=Outcome.COMPLETED))
