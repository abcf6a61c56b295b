"""What a session's metadata may have staged, from where, and who is told (shared/staging.py, ticketing.py)."""

import boto3
import pytest
from pydantic import SecretStr

from shared import lifecycle, wiring
from shared.buckets import Buckets
from shared.config import Config
from shared.diagnose import diagnose
from shared.record import Outcome, Phase, Record
from shared.staging import MOST_REQUESTS, StagingGrant, StagingPlaces, StagingRequest
from shared.store import MemoryStore
from shared.ticketing import TicketRefused, Tickets
from shared.wishes import Wishes

NOW = 1_795_500_000_000
CALLBACK = "callback-secret-that-nobody-may-see"
PLACES = StagingPlaces(
    buckets=frozenset({"listed"}),
    git_hosts=frozenset({"git.example.com"}),
    max_bytes=1_000,
    presign=lambda bucket, key: f"https://{bucket}.example.com/{key}?signed",
)


def test_an_archive_in_a_listed_bucket_and_a_repository_of_a_listed_host_are_granted() -> None:
    wishes = Wishes(archive="s3://listed/team/src.tar.gz", git="https://git.example.com/team/tool.git#v1.2")
    grant = PLACES.judge(wishes)
    assert grant.refused is None
    assert grant.archive
    assert (grant.archive.name, grant.archive.url) == (
        "src.tar.gz",
        "https://listed.example.com/team/src.tar.gz?signed",
    )
    assert grant.git
    assert (grant.git.url, grant.git.reference) == ("https://git.example.com/team/tool.git", "v1.2")
    assert "signed" not in repr(grant)


@pytest.mark.parametrize(
    "archive",
    [
        "s3://other/src.tar.gz",
        "s3://listed.example.com/src.tar.gz",
        "s3://listed/",
        "s3://listed/src.exe",
        "https://listed/src.tar.gz",
        "/src.tar.gz",
        "s3://listed/a b.zip",
    ],
)
def test_another_bucket_or_kind_is_refused(archive: str) -> None:
    refused = PLACES.judge(Wishes(archive=archive))
    assert refused.refused
    assert refused.archive is None


@pytest.mark.parametrize(
    "git",
    [
        "https://other.example.com/a",
        "https://git.example.com.other.example.com/a",
        "https://user:pass@git.example.com/a",
        "https://git.example.com:8443/a",
        "https://git.example.com/a?b=c",
        "https://git.example.com",
        "https://git.example.com/",
        "https://git.example.com/..",
        "https://git.example.com/a/../b",
        "https://git.example.com/a/-upload-pack",
        "https://git.example.com/a b",
        "https://[git.example.com/a",
        "http://git.example.com/a",
        "ssh://git.example.com/a",
        "git@git.example.com:a",
        "file:///etc",
        "ext::sh -c id",
        "https://git.example.com/a#--upload-pack=id",
        "https://git.example.com/a#b..c",
        "https://git.example.com/a#b c",
    ],
)
def test_any_other_repository_is_refused(git: str) -> None:
    refused = PLACES.judge(Wishes(git=git))
    assert refused.refused
    assert refused.git is None


def test_nothing_is_listed_by_default() -> None:
    places = wiring.staging_places(Config(table="t"))
    assert places.judge(Wishes(archive="s3://listed/a.zip")).refused
    assert places.judge(Wishes(git="https://git.example.com/a")).refused


def test_an_address_reads_one_object_for_two_minutes_at_the_regions_own_host() -> None:
    client = boto3.client(
        "s3",
        region_name="eu-central-1",
        aws_access_key_id="AKIAEXAMPLE",
        aws_secret_access_key="example",
        config=wiring.SIGNING,
    )
    url = Buckets(client).presign_get("listed", "team/a b.zip")
    assert url.startswith(
        "https://listed.s3.eu-central-1.amazonaws.com/team/a%20b.zip?X-Amz-Algorithm=AWS4-HMAC-SHA256&"
    )
    assert "X-Amz-Expires=120" in url


# --- who may ask --------------------------------------------------------------------------------------------


def tickets(wishes: Wishes | None) -> Tickets:
    store = MemoryStore()
    record = Record(
        work_id="work_1",
        environment_id="env_1",
        kind="session",
        session_id="sesn_1",
        turn=7,
        attempt=2,
        phase=Phase.RUNNING,
        callback_hash=lifecycle.hash_secret(CALLBACK),
        wishes=wishes,
        shard="0",
    )
    store.save(record)
    return Tickets(store, lambda work_id: None, lambda: NOW, staging=PLACES)


def ask(part: Tickets, *, secret: str = CALLBACK, attempt: int = 2) -> StagingGrant:
    asked = StagingRequest(work_id="work_1", turn=7, attempt=attempt, callback_secret=SecretStr(secret))
    return part.grant_staging(asked)


def test_only_the_current_attempt_is_told_and_only_a_few_times() -> None:
    part = tickets(Wishes(archive="s3://listed/a.zip"))
    for wrong in ({"secret": "guess"}, {"attempt": 1}):
        with pytest.raises(TicketRefused):
            ask(part, **wrong)
    for _ in range(MOST_REQUESTS):
        assert ask(part).archive
    with pytest.raises(TicketRefused):
        ask(part)


def test_a_refusal_is_in_the_records_timeline() -> None:
    part = tickets(Wishes(archive="s3://other/a.zip"))
    ask(part)
    record = part.store.get("work_1")
    assert record
    assert record.timeline[-1].event == "not staged: the archive's bucket is not among StagingBuckets"


# --- the end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("exit_code", "phase"), [(18, Phase.STOPPING), (19, Phase.HELD)])
def test_what_cannot_be_staged_ends_the_turn_and_what_could_not_be_had_in_time_is_tried_again(
    exit_code: int, phase: Phase
) -> None:
    record = tickets(None).store.get("work_1")
    assert record
    task = {"stopCode": "EssentialContainerExited", "containers": [{"name": "sandbox", "exitCode": exit_code}]}
    after = lifecycle.after_container_stopped(record, diagnose(task), exit_code, 9, now=NOW, max_attempts=3)
    assert after
    assert after.phase is phase
    if exit_code == 18:
        assert after.stop_outcome is Outcome.FAILED
        assert after.stop_reason
        assert "cannot be had" in after.stop_reason
