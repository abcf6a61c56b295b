"""What a sandbox may put and where: the rules of outputs, the forms that are signed, who may ask for them."""

import base64
import json
from typing import Any

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from shared import lifecycle, wiring
from shared.buckets import POST_SECONDS, Buckets, Post
from shared.config import Config
from shared.outputs import (
    MOST_REQUESTS,
    NOT_REPORTED,
    FoundFile,
    OutputsGrant,
    OutputsPlace,
    OutputsPut,
    OutputsRequest,
    stored_name,
)
from shared.record import Outcome, Phase, Record
from shared.store import MemoryStore
from shared.ticketing import TicketRefused, Tickets

NOW = 1_795_500_000_000
CALLBACK = "callback-secret-that-nobody-may-see"


def place(**limits: int) -> OutputsPlace:
    def presign(key: str, least: int, most: int) -> Post:
        return Post(url="https://bucket.example.com/", fields={"key": key, "bytes": f"{least}-{most}"})

    defaults = {"max_files": 3, "max_file_bytes": 100, "max_total_bytes": 150}
    return OutputsPlace(bucket="bucket", prefix="fleet", presign=presign, **defaults | limits)


def files(*named: str | tuple[str, int]) -> tuple[FoundFile, ...]:
    pairs = [one if isinstance(one, tuple) else (one, 1) for one in named]
    return tuple(FoundFile(name=name, size=size) for name, size in pairs)


class Fleet:
    """Tickets over one running attempt."""

    def __init__(self) -> None:
        self.store, self.woken = MemoryStore(), list[str]()
        self.tickets = Tickets(self.store, self.woken.append, lambda: NOW, outputs=place())
        record = Record(
            work_id="work_1",
            environment_id="env_1",
            kind="session",
            session_id="sesn_1",
            turn=7,
            attempt=2,
            phase=Phase.RUNNING,
            callback_hash=lifecycle.hash_secret(CALLBACK),
            shard="0",
        )
        self.store.save(record)

    @property
    def record(self) -> Record:
        found = self.store.get("work_1")
        assert found
        return found

    def change(self, **changes: Any) -> None:
        self.store.save(self.record.model_copy(update=changes))

    def ask(self, *named: str | tuple[str, int], **changes: Any) -> OutputsGrant:
        asked: dict[str, Any] = {"work_id": "work_1", "turn": 7, "attempt": 2, "callback_secret": SecretStr(CALLBACK)}
        return self.tickets.grant_outputs(OutputsRequest(files=files(*named), **asked | changes))

    def tell(self, **changes: Any) -> None:
        said: dict[str, Any] = {"work_id": "work_1", "turn": 7, "attempt": 2, "callback_secret": SecretStr(CALLBACK)}
        self.tickets.note_outputs(OutputsPut(**said | {"files": 1, "bytes": 1} | changes))


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


# --- names and limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "..",
        "../other",
        "a/../../other",
        "a/./b",
        "a//b",
        "a/",
        "a\\..\\b",
        "${filename}",
        "line\nbreak",
        "nul\0",
        "\u202ecod.exe",
        "lone\ud800",
        "a" * 513,
        "é" * 257,
    ],
)
def test_a_name_that_could_be_read_as_another_place_is_not_stored(name: str) -> None:
    assert stored_name(name) is None


def test_names_are_stored_composed() -> None:
    assert stored_name("re\u0301sume\u0301/a b.txt") == "résumé/a b.txt"


@given(st.text(max_size=60))
def test_whatever_the_name_it_stays_below_its_prefix(name: str) -> None:
    stored = stored_name(name)
    if stored is not None:
        assert not {"", ".", ".."} & set(stored.split("/"))
        assert stored_name(stored) == stored


def test_limits_leave_out_what_exceeds_them_and_say_why() -> None:
    listed = files(("big", 101), ("a", 100), ("../b", 1), ("c", 51), ("d", 20), ("d", 1), ("e", 30), ("f", 0))
    admitted, left_out = place().admit(listed)
    assert {name: file.size for name, file in admitted.items()} == {"a": 100, "d": 20, "e": 30}
    assert {one.name: one.why for one in left_out} == {
        "big": "longer than 100 bytes",
        "../b": "its name cannot be stored",
        "c": "more than 150 bytes in all",
        "d": "another file is stored under the same name",
        "f": "more than 3 files",
    }


# --- the form -----------------------------------------------------------------------------------------------


def test_a_form_is_good_for_one_key_one_length_and_three_minutes() -> None:
    client = boto3.client(
        "s3",
        region_name="eu-central-1",
        aws_access_key_id="AKIAEXAMPLE",
        aws_secret_access_key="example",
        aws_session_token="example-token",
        config=wiring.SIGNING,
    )
    post = Buckets(client).presign_post("my-bucket", "fleet/sesn_1/7/2/files/a", 5, 9)
    assert post.url == "https://my-bucket.s3.eu-central-1.amazonaws.com/"  # as DNS Firewall is told
    assert post.fields["x-amz-algorithm"] == "AWS4-HMAC-SHA256"
    policy = json.loads(base64.b64decode(post.fields["policy"]))
    conditions = [c if isinstance(c, list) else next(iter(c.items())) for c in policy["conditions"]]
    assert ["content-length-range", 5, 9] in conditions
    assert ("key", "fleet/sesn_1/7/2/files/a") in conditions
    assert ("bucket", "my-bucket") in conditions
    assert ("Content-Type", "application/octet-stream") in conditions
    assert not [c for c in conditions if c[0] == "starts-with"]
    assert POST_SECONDS == 180
    assert post.fields["x-amz-signature"] not in repr(post)


def test_the_forms_address_is_the_regions_own_in_us_east_1_too() -> None:
    client = boto3.client(
        "s3",
        region_name="us-east-1",
        aws_access_key_id="AKIAEXAMPLE",
        aws_secret_access_key="example",
        config=wiring.SIGNING,
    )
    assert Buckets(client).presign_post("b-1", "k", 1, 1).url == "https://b-1.s3.us-east-1.amazonaws.com/"


def test_without_a_bucket_outputs_are_off(fleet: Fleet) -> None:
    assert wiring.outputs_place(Config(table="t")) is None
    fleet.tickets.outputs = None
    with pytest.raises(TicketRefused):
        fleet.ask("a")


# --- who may ask --------------------------------------------------------------------------------------------


def test_keys_come_from_the_record_and_sizes_from_the_list(fleet: Fleet) -> None:
    grant = fleet.ask(("report/a.txt", 12), "../../../sesn_2/7/1/files/b")
    assert [(post.name, post.key, post.fields["bytes"]) for post in grant.posts] == [
        ("report/a.txt", "fleet/sesn_1/7/2/files/report/a.txt", "12-12")
    ]
    assert grant.manifest.key == "fleet/sesn_1/7/2/manifest.json"
    assert [one.name for one in grant.left_out] == ["../../../sesn_2/7/1/files/b"]
    outputs = fleet.record.outputs
    assert outputs
    assert (outputs.prefix, outputs.manifest) == ("s3://bucket/fleet/sesn_1/7/2/", grant.manifest.key)
    assert (outputs.granted_files, outputs.granted_bytes, outputs.problem) == (1, 12, NOT_REPORTED)


@pytest.mark.parametrize(
    "changes",
    [{"callback_secret": SecretStr("guess")}, {"turn": 6}, {"attempt": 1}, {"work_id": "work_2"}],
)
def test_only_the_current_attempt_is_given_anything(fleet: Fleet, changes: dict[str, Any]) -> None:
    before = fleet.record
    with pytest.raises(TicketRefused):
        fleet.ask("a", **changes)
    with pytest.raises(TicketRefused):
        fleet.tell(**changes)
    assert fleet.record == before


@pytest.mark.parametrize("session_id", [None, "../sesn_2", "a/b", ""])
def test_a_session_id_that_could_name_another_place_gets_no_place(fleet: Fleet, session_id: str | None) -> None:
    fleet.change(session_id=session_id)
    with pytest.raises(TicketRefused):
        fleet.ask("a")


def test_an_attempts_first_list_is_its_only_one_and_may_be_sent_again_a_few_times(fleet: Fleet) -> None:
    first = fleet.ask("a")
    with pytest.raises(TicketRefused):
        fleet.ask("b")
    for _ in range(MOST_REQUESTS - 1):
        assert fleet.ask("a") == first
    with pytest.raises(TicketRefused):
        fleet.ask("a")
    fleet.change(attempt=3)
    assert fleet.ask("b", attempt=3).posts[0].key == "fleet/sesn_1/7/3/files/b"


def test_a_request_lists_something_and_not_too_much() -> None:
    asked: dict[str, Any] = {"work_id": "work_1", "turn": 7, "attempt": 2, "callback_secret": SecretStr(CALLBACK)}
    for listed in (files(), files(*map(str, range(1001)))):
        with pytest.raises(ValidationError) as malformed:
            OutputsRequest(files=listed, **asked)
        assert CALLBACK not in str(malformed.value)


# --- the end of the turn ------------------------------------------------------------------------------------


def test_a_sandbox_whose_item_is_stopped_gets_the_time_to_put_its_outputs(fleet: Fleet) -> None:
    """Else the keeper, who sees a stopped item, has it ended within seconds; and its death by then is no crash."""
    fleet.ask("a", ended=True)
    record = fleet.record
    assert (record.phase, record.stop_outcome, record.post_stop) == (Phase.STOPPING, Outcome.COMPLETED, False)
    assert record.stop_task_from is not None
    assert record.stop_task_from > NOW + 120_000
    assert lifecycle.want_stop(record, lifecycle.ALREADY_STOPPED, NOW) == record
    assert fleet.woken == []


def test_a_sandbox_that_was_told_to_end_changes_no_phase(fleet: Fleet) -> None:
    fleet.ask("a")
    assert fleet.record.phase is Phase.RUNNING
    fleet.store.save(lifecycle.want_stop(fleet.record, lifecycle.STOP_REQUESTED, NOW))
    before = fleet.record
    fleet.ask("a", ended=True)
    assert fleet.record.stop_outcome == before.stop_outcome == Outcome.STOPPED
    assert fleet.record.post_stop


def test_the_record_lists_what_was_put_within_what_was_granted(fleet: Fleet) -> None:
    with_nothing_granted = fleet.record
    fleet.tell()
    assert fleet.record == with_nothing_granted
    fleet.ask(("a", 10), ("b", 5))
    fleet.tell(files=99, bytes=10**12, problem="1 left out; see the manifest")
    outputs = fleet.record.outputs
    assert outputs
    assert (outputs.files, outputs.bytes, outputs.problem) == (2, 15, "1 left out; see the manifest")
    fleet.tell(files=0, bytes=0)  # a repeated word, or another, changes nothing
    assert fleet.record.outputs == outputs
    assert fleet.record.timeline[-1].event == "outputs: 2 files, 15 bytes; 1 left out; see the manifest"


def test_what_was_put_stays_in_the_history_of_the_session(fleet: Fleet) -> None:
    fleet.ask("a")
    fleet.tell()
    assert lifecycle.past_turn(fleet.record).outputs == fleet.record.outputs
