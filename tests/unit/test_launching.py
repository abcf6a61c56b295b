"""From a launch message to a task: the launcher and the observer over a memory store and a real boto3 client.

Only ECS's replies are played here; whatever botocore does on the way to them is its own.
"""

import base64
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse, HTTPHeaders
from botocore.exceptions import ReadTimeoutError
from pydantic import SecretStr

from shared import lifecycle, sizes, wiring
from shared.config import Config
from shared.launching import Launcher, LaunchMessage, PutOff
from shared.observing import Observer
from shared.record import Outcome, Phase, Record
from shared.sandboxes import Sandboxes
from shared.store import Conflict, MemoryStore
from shared.wishes import Wishes
from shared.work_api import Busy, Gone, NotAllowed, Session, Work

NOW = 1_800_000_000_000
CONFIG = Config(
    table="work",
    cluster_arn="arn:aws:ecs:us-east-1:123456789012:cluster/c",
    task_definition_arn="definition",
    subnets="subnet-a,subnet-b",
    security_groups="sg-1",
)
SECRET = base64.urlsafe_b64encode(b'{"sessions_token": "SESSION-TOKEN"}').decode().rstrip("=")
MESSAGE = LaunchMessage(work_id="w", turn=NOW, attempt=1)


def arn_of(token: str) -> str:
    return f"arn:aws:ecs:us-east-1:123456789012:task/c/{token[:8]}"


class _Body(io.BytesIO):
    def stream(self, **_: object) -> Iterator[bytes]:
        yield self.read()


class Ecs:
    """ECS's end of the wire: a token stands for its first request; `answers` come first, in order."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers: list[tuple[int, dict[str, Any]] | Exception] = []
        self.tasks: dict[str, dict[str, Any]] = {}
        self.inside: Callable[[], None] | None = None

    def answer(self, request: Any, **_: object) -> AWSResponse:
        asked = json.loads(request.body)
        call = request.headers["X-Amz-Target"].decode().split(".")[-1]
        self.asked.append((call, asked))
        status, reply = self._run(asked) if call == "RunTask" else (200, {"taskArns": []})
        inside, self.inside = self.inside, None
        if inside:
            inside()
        if self.answers:
            given = self.answers.pop(0)
            if isinstance(given, Exception):
                raise given
            status, reply = given
        raw: Any = _Body(json.dumps(reply).encode())
        return AWSResponse(request.url, status, HTTPHeaders(), raw)

    def _run(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        token = asked["clientToken"]
        arn = arn_of(token)
        if self.tasks.setdefault(token, asked) != asked:
            return 400, {"__type": "ConflictException", "message": "another request", "resourceIds": [arn]}
        return 200, {"tasks": [{"taskArn": arn}], "failures": []}

    def requests(self, call: str = "RunTask") -> list[dict[str, Any]]:
        return [asked for name, asked in self.asked if name == call]


class Sessions:
    """The API's end of a session's reading: its metadata, or what goes wrong instead."""

    def __init__(self) -> None:
        self.told: dict[str, Any] | Exception = {}
        self.asked: list[tuple[str, SecretStr | None]] = []
        self.updates: list[tuple[str, dict[str, str], SecretStr | None]] = []
        self.refuses: Exception | None = None

    def update(self, work_id: str, metadata: dict[str, str], *, token: SecretStr | None = None) -> None:
        self.updates.append((work_id, metadata, token))
        if self.refuses:
            raise self.refuses

    def session(self, session_id: str, *, token: SecretStr | None = None) -> Session:
        self.asked.append((session_id, token))
        if isinstance(self.told, Exception):
            raise self.told
        return Session(id=session_id, metadata=self.told)


class Room:
    """One held turn, its launcher and its observer."""

    def __init__(self, store: MemoryStore) -> None:
        self.store, self.ecs, self.sent, self.woken = store, Ecs(), list[tuple[str, int]](), list[str]()
        self.sandboxes: Sandboxes = wiring.sandboxes(CONFIG)
        answer: Any = self.ecs.answer  # botocore's stubs know no handler that answers
        self.sandboxes._client.meta.events.register("before-send.ecs", answer)
        tickets = (f"TICKET-{n}" for n in range(99))
        self.sessions, self.now = Sessions(), NOW
        api: Any = self.sessions
        self.launcher = Launcher(
            CONFIG, api, store, self.sandboxes, lambda: self.now, lambda: next(tickets), lambda _: None
        )
        queue: Any = self
        self.observer = Observer(CONFIG, store, queue, self.woken.append, lambda: NOW)
        work = Work.model_validate(
            {
                "id": "w",
                "environment_id": "env_1",
                "data": {"type": "session", "id": "w"},
                "state": "queued",
                "secret": SECRET,
            }
        )
        received = store.save(lifecycle.open_turn(None, work, now=NOW, owner="me", until=NOW, shard="0"))
        store.save(lifecycle.held(received, NOW))

    def send(self, record: Record) -> None:
        self.sent.append((record.work_id, record.attempt))

    def record(self) -> Record:
        record = self.store.get("w")
        assert record
        return record

    def told(
        self,
        status: str,
        version: int,
        reason: str | None = None,
        exit_code: int | None = None,
        *,
        attempt: int = 1,
        stop_code: str | None = None,
    ) -> None:
        """ECS's event."""
        container = {"name": "sandbox"} | ({} if exit_code is None else {"exitCode": exit_code})
        name = {"taskArn": f"arn:task/{attempt}", "startedBy": f"w/{NOW}/{attempt}"}
        state = {"lastStatus": status, "version": version, "stoppedReason": reason, "stopCode": stop_code}
        self.observer.observe({**name, **state, "containers": [container]})


@pytest.mark.parametrize("role", ["", "arn:aws:iam::123456789012:role/exec"])
def test_a_sandbox_may_be_entered_and_has_a_role_only_where_the_owner_turned_it_on(room: Room, role: str) -> None:
    room.sandboxes._config = CONFIG.model_copy(update={"exec_role_arn": role})
    room.launcher.launch(MESSAGE)
    [asked] = room.ecs.requests()
    assert asked["enableExecuteCommand"] is bool(role)
    assert asked["overrides"].get("taskRoleArn", "") == role


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def room() -> Room:
    return Room(MemoryStore())


class Interfered(MemoryStore):
    """Another actor writes just before our write, as often as there are `moves`."""

    moves: list[Callable[[Record], Record]]

    def save(self, record: Record) -> Record:
        if getattr(self, "moves", []):
            move, now_there = self.moves.pop(0), self.get(record.work_id)
            assert now_there
            super().save(move(now_there))
        return super().save(record)


def noted(record: Record) -> Record:
    return record.noted(NOW, "something else")


def stopped(record: Record) -> Record:
    return lifecycle.want_stop(record, lifecycle.LEASE_LOST, NOW)


@pytest.mark.parametrize(("move", "launched"), [(noted, 1), (stopped, 0)])
def test_a_launch_is_decided_anew_when_another_wrote_first(move: Callable[[Record], Record], launched: int) -> None:
    """FIELD_NOTES 7: only the conditional write says whether a launch is still due, never an earlier look."""
    store = Interfered()
    room = Room(store)
    store.moves = [move]
    room.launcher.launch(MESSAGE)
    assert len(room.ecs.requests()) == launched
    assert room.record().phase is (Phase.LAUNCHING if launched else Phase.STOPPING)


def test_a_launch_that_cannot_be_written_comes_back() -> None:
    """FIELD_NOTES 7: the message was silently acked."""
    store = Interfered()
    room = Room(store)
    store.moves = [noted] * 100
    with pytest.raises(Conflict):
        room.launcher.launch(MESSAGE)
    assert room.ecs.asked == []


def test_a_task_that_was_accepted_and_never_ran_is_launched_again(room: Room) -> None:
    """FIELD_NOTES 8: a turn is not served because RunTask said 200."""
    room.launcher.launch(MESSAGE)
    assert room.record().phase is Phase.LAUNCHING
    room.told("STOPPED", 3, "Timeout waiting for network interface provisioning to complete.")
    assert (room.record().phase, room.record().attempt) == (Phase.HELD, 2)
    assert room.sent == [("w", 2)]


def test_a_task_without_a_free_address_is_launched_again_in_one_subnet_after_the_other(room: Room) -> None:
    """FIELD_NOTES 15: RunTask said 200, the reason came with the STOPPED task."""
    for attempt in (1, 2, 3):
        room.launcher.launch(MESSAGE.model_copy(update={"attempt": attempt}))
        reason = "Unexpected EC2 error: InsufficientFreeAddressesInSubnet: subnet-a has no free addresses"
        room.told("STOPPED", 3, reason, attempt=attempt)
        assert (room.record().phase, room.record().attempt) == (Phase.HELD, attempt + 1)
    tried = [asked["networkConfiguration"]["awsvpcConfiguration"]["subnets"] for asked in room.ecs.requests()]
    assert tried == [["subnet-a", "subnet-b"], ["subnet-a"], ["subnet-b"]]


def test_an_interruption_is_no_attempt_of_ours(room: Room) -> None:
    """`MaxAttempts` counts crashes: the session is not to blame for its host. The wall clock bounds both."""
    for attempt in range(1, 3 * CONFIG.max_attempts):
        room.launcher.launch(MESSAGE.model_copy(update={"attempt": attempt}))
        room.told("RUNNING", 2, attempt=attempt)
        room.told("STOPPED", 3, "Your Spot Task was interrupted.", 137, attempt=attempt, stop_code="SpotInterruption")
        assert (room.record().phase, room.record().attempt) == (Phase.HELD, attempt + 1)
    for crash in range(CONFIG.max_attempts):
        assert room.record().phase is Phase.HELD, f"after {crash} crashes"
        attempt = room.record().attempt
        room.launcher.launch(MESSAGE.model_copy(update={"attempt": attempt}))
        room.told("RUNNING", 2, attempt=attempt)
        room.told("STOPPED", 3, exit_code=137, attempt=attempt, stop_code="EssentialContainerExited")
    assert (room.record().phase, room.record().stop_outcome) == (Phase.STOPPING, Outcome.FAILED)


REFUSED = [
    (400, {"__type": "ThrottlingException", "message": "Rate exceeded"}),
    (400, {"__type": "InvalidParameterException", "message": "Rate exceeded"}),
    (200, {"tasks": [], "failures": [{"reason": "InvalidParameterException: Rate exceeded"}]}),
    (500, {"__type": "ServerException", "message": "Service Unavailable. Please try again later."}),
]


@pytest.mark.parametrize("answer", REFUSED)
def test_a_throttled_launch_is_asked_for_once_and_put_off(room: Room, answer: tuple[int, dict[str, Any]]) -> None:
    """FIELD_NOTES 12, 13: botocore's retries burned the launch quota; a throttle may come under another name."""
    room.ecs.answers = [answer]
    with pytest.raises(PutOff):
        room.launcher.launch(MESSAGE)
    assert len(room.ecs.requests()) == 1
    assert (room.record().phase, room.record().stop_reason) == (Phase.LAUNCHING, None)
    room.launcher.launch(MESSAGE)
    assert room.record().task_arn


def test_a_launch_whose_reply_was_lost_finds_its_task_again(room: Room) -> None:
    """FIELD_NOTES 16: RunTask "failed" though the task had started; the retry made a ghost."""
    room.ecs.answers = [ReadTimeoutError(endpoint_url="ecs")]
    with pytest.raises(ReadTimeoutError):
        room.launcher.launch(MESSAGE)
    assert len(room.ecs.requests()) == 1
    room.launcher.launch(MESSAGE)
    first, second = room.ecs.requests()
    assert first["clientToken"] == second["clientToken"]
    assert first["startedBy"] == second["startedBy"] == f"w/{NOW}/1"
    [token] = room.ecs.tasks
    assert room.record().task_arn == arn_of(token)


def test_two_launchers_of_one_message_start_one_task(room: Room) -> None:
    """FIELD_NOTES 22: an idempotency lock that ran out let the side effect happen twice; we hold none."""
    room.ecs.inside = lambda: room.launcher.launch(MESSAGE)
    room.launcher.launch(MESSAGE)
    assert len(room.ecs.requests()) == 2
    [token] = room.ecs.tasks
    assert room.record().task_arn == arn_of(token)
    assert room.ecs.requests("StopTask") == []


def test_the_arn_is_stored_before_anything_is_waited_for_and_an_ended_task_is_not_run_again(room: Room) -> None:
    """FIELD_NOTES 17: finished tasks were rerun; STOPPED wins over whatever is told later."""
    room.launcher.launch(MESSAGE)
    assert room.record().task_arn
    room.told("STOPPED", 5, exit_code=0)
    ended = room.record()
    assert (ended.phase, ended.dead) == (Phase.STOPPING, True)
    room.told("RUNNING", 4)
    room.launcher.launch(MESSAGE)
    assert room.record() == ended
    assert len(room.ecs.requests()) == 1


def test_a_task_is_looked_for_among_the_stopped_ones_too(room: Room) -> None:
    """FIELD_NOTES 17: only running tasks were seen."""
    room.sandboxes.find(f"w/{NOW}/1")
    assert {asked["desiredStatus"] for asked in room.ecs.requests("ListTasks")} == {"RUNNING", "STOPPED"}


def test_a_launch_carries_ids_and_a_ticket_and_no_other_secret(room: Room) -> None:
    """FIELD_NOTES 19: whoever may describe tasks reads their overrides."""
    room.launcher.launch(MESSAGE)
    [asked] = room.ecs.requests()
    [container] = asked["overrides"]["containerOverrides"]
    given = {variable["name"]: variable["value"] for variable in container["environment"]}
    assert given == {
        "FLEET_WORK_ID": "w",
        "FLEET_TURN": str(NOW),
        "FLEET_ATTEMPT": "1",
        "FLEET_TICKET": "TICKET-0",
    }
    assert room.record().secret == SecretStr(SECRET)
    assert SECRET not in json.dumps(asked)
    assert "SESSION-TOKEN" not in json.dumps(asked)
    assert "TICKET-0" not in room.record().model_dump_json()


@pytest.mark.parametrize("code", ["InvalidParameterException", "ClientException"])
def test_a_task_that_is_absent_counts_as_stopped(room: Room, code: str) -> None:
    """FIELD_NOTES 20: a cancel that failed on a task already gone stayed "cancelling"."""
    room.ecs.answers = [(400, {"__type": code, "message": "The referenced task was not found."})]
    room.sandboxes.stop("arn:task/1", "over")
    assert len(room.ecs.requests("StopTask")) == 1


# --- what the session asks for in its metadata ------------------------------------------------------------------


def test_a_session_s_metadata_is_read_once_with_its_own_token_and_kept_over_the_turn_s_attempts(room: Room) -> None:
    room.sessions.told = {"sandbox-fleet.size": "large", "sandbox-fleet.git": "https://example.com/a.git", "mine": "x"}
    room.launcher.launch(MESSAGE)
    assert room.sessions.asked == [("w", SecretStr("SESSION-TOKEN"))]
    wishes = Wishes(size="large", git="https://example.com/a.git")
    assert room.record().wishes == wishes
    room.told("RUNNING", 2)
    room.told("STOPPED", 3, exit_code=1)
    room.launcher.launch(MESSAGE.model_copy(update={"attempt": 2}))
    assert (room.record().attempt, room.record().wishes) == (2, wishes)
    assert len(room.sessions.asked) == 1


@pytest.mark.parametrize("error", [NotAllowed("403"), Gone("404"), ValueError("no id of a session")])
def test_metadata_that_cannot_be_read_fails_no_launch_and_is_read_by_the_next_attempt(
    room: Room, error: Exception
) -> None:
    room.sessions.told = error
    room.launcher.launch(MESSAGE)
    assert room.record().task_arn
    assert room.record().wishes is None
    room.told("STOPPED", 3, exit_code=1)
    room.sessions.told = {"sandbox-fleet.size": "large"}
    room.launcher.launch(MESSAGE.model_copy(update={"attempt": 2}))
    assert room.record().wishes == Wishes(size="large")


def test_an_api_in_trouble_delays_a_launch_for_some_seconds_only(room: Room) -> None:
    room.sessions.told = Busy("503")
    with pytest.raises(PutOff):
        room.launcher.launch(MESSAGE)
    assert room.record().phase is Phase.HELD
    room.now += lifecycle.WISHES_PATIENCE_MS
    room.launcher.launch(MESSAGE)
    assert room.record().task_arn
    assert room.record().wishes is None


def test_no_session_is_read_for_a_message_whose_moment_is_over(room: Room) -> None:
    room.launcher.launch(MESSAGE)
    room.sessions.asked.clear()
    room.launcher.launch(MESSAGE)
    assert room.sessions.asked == []


SIZES = "large:cpu=4096:memory=16384:disk=100:spot=yes:wall=600,web:cpu=2048:memory=4096:image=2"


def with_sizes(room: Room) -> None:
    config = CONFIG.model_copy(update={"size_classes": sizes.parse(SIZES), "task_definition_2_arn": "second"})
    room.launcher.config = room.sandboxes._config = config


def test_a_session_s_class_is_what_is_asked_of_ecs_and_what_the_record_says(room: Room) -> None:
    with_sizes(room)
    room.sessions.told = {"sandbox-fleet.size": "large"}
    room.launcher.launch(MESSAGE)
    [asked] = room.ecs.requests()
    machine = {name: value for name, value in asked["overrides"].items() if name != "containerOverrides"}
    assert machine == {"cpu": "4096", "memory": "16384", "ephemeralStorage": {"sizeInGiB": 100}}
    assert asked["capacityProviderStrategy"] == [{"capacityProvider": "FARGATE_SPOT", "weight": 1}]
    assert asked["taskDefinition"] == "definition"
    assert room.record().size == sizes.parse(SIZES)["large"]


def test_a_class_with_an_image_is_launched_from_its_own_task_definition(room: Room) -> None:
    with_sizes(room)
    room.sessions.told = {"sandbox-fleet.size": "web"}
    room.launcher.launch(MESSAGE)
    [asked] = room.ecs.requests()
    assert asked["taskDefinition"] == "second"
    assert "ephemeralStorage" not in asked["overrides"]


@pytest.mark.parametrize("size", ["huge", "large:cpu=16384", "LARGE"])
def test_a_class_that_is_not_listed_gets_the_default(room: Room, size: str) -> None:
    with_sizes(room)
    room.sessions.told = {"sandbox-fleet.size": size}
    room.launcher.launch(MESSAGE)
    [asked] = room.ecs.requests()
    assert asked["overrides"].keys() == {"containerOverrides"}
    assert asked["taskDefinition"] == "definition"
    assert room.record().size is None


# --- where is it? -----------------------------------------------------------------------------------------------


def next_attempt(room: Room) -> None:
    attempt = room.record().attempt
    room.told("STOPPED", 3, exit_code=1, attempt=attempt)
    room.launcher.launch(MESSAGE.model_copy(update={"attempt": attempt + 1}))


def test_the_record_and_the_work_item_say_where_the_sandbox_of_each_attempt_is(room: Room) -> None:
    room.launcher.launch(MESSAGE)
    first = room.record().links
    assert first.keys() == {"task", "log", "loop"}
    told = {f"sandbox-fleet.{name}": page for name, page in first.items()}
    assert room.sessions.updates == [("w", told, SecretStr("SESSION-TOKEN"))]
    next_attempt(room)
    assert room.record().links["task"] != first["task"]
    assert room.sessions.updates[-1][1]["sandbox-fleet.task"] == room.record().links["task"]


def test_an_event_that_comes_first_keeps_no_record_without_its_links(room: Room) -> None:
    def running() -> None:
        arn = arn_of(room.ecs.requests()[0]["clientToken"])
        task = {"taskArn": arn, "startedBy": f"w/{NOW}/1", "lastStatus": "RUNNING", "version": 2}
        room.observer.observe({**task, "containers": [{"name": "sandbox"}]})

    room.ecs.inside = running
    room.launcher.launch(MESSAGE)
    assert room.record().phase is Phase.RUNNING
    assert room.record().links


def test_a_403_to_an_update_turns_it_off_and_fails_nothing(room: Room) -> None:
    room.sessions.refuses = NotAllowed("403", status=403)
    room.launcher.launch(MESSAGE)
    next_attempt(room)
    assert room.record().task_arn
    assert len(room.sessions.updates) == 1


@pytest.mark.parametrize("error", [Busy("503", status=503), NotAllowed("401", status=401), Gone("404", status=404)])
def test_any_other_fault_leaves_the_next_launch_to_try(room: Room, error: Exception) -> None:
    room.sessions.refuses = error
    room.launcher.launch(MESSAGE)
    next_attempt(room)
    assert len(room.sessions.updates) == 2
