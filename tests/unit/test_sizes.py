"""Size classes: what the template takes, what becomes of it, and what a session gets by naming one."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from shared import breaker, lifecycle, sizes
from shared.config import Config, Missing, from_env
from shared.diagnose import NO_IMAGE
from shared.record import LiveEntry, Outcome, Phase, Record
from shared.store import MemoryStore
from shared.wishes import Wishes
from tests.unit import cloudformation

PARAMETER: dict[str, Any] = cloudformation.load(cloudformation.ROOT / "template.yaml")["Parameters"]["SizeClasses"]
LISTED = "large:cpu=4096:memory=16384:disk=100:spot=no:wall=600,web:cpu=2048:memory=4096:image=2"
CONFIG = Config.model_validate(
    {"table": "work", "size_classes": LISTED, "task_definition_arn": "first", "task_definition_2_arn": "second"}
)
NOW = 1_800_000_000_000
RECORD = Record(work_id="w", environment_id="e", kind="session", turn=NOW, phase=Phase.HELD, shard="0")
# https://docs.aws.amazon.com/AmazonECS/latest/developerguide/task-cpu-memory-error.html
FARGATE = {
    256: [512, 1024, 2048],
    512: [*range(1024, 4097, 1024)],
    1024: [*range(2048, 8193, 1024)],
    2048: [*range(4096, 16385, 1024)],
    4096: [*range(8192, 30721, 1024)],
    8192: [*range(16384, 61441, 4096)],
    16384: [*range(32768, 122881, 8192)],
}


def taken(classes: str) -> bool:
    return re.fullmatch(PARAMETER["AllowedPattern"], classes) is not None


def test_the_template_takes_exactly_what_fargate_offers() -> None:
    tried = [(cpu, memory) for cpu in FARGATE for memory in (256, 512, *range(1024, 131073, 1024))]
    assert {one for one in tried if taken("a:cpu={}:memory={}".format(*one))} == {
        (cpu, memory) for cpu, memories in FARGATE.items() for memory in memories
    }


@pytest.mark.parametrize("classes", ["", LISTED, "a-1:cpu=256:memory=512:wall=604800", "a:cpu=256:memory=512:disk=200"])
def test_what_the_template_takes_can_be_read(classes: str) -> None:
    assert taken(classes)
    assert len(sizes.parse(classes)) == len([one for one in classes.split(",") if one])


def test_the_example_in_the_sentence_is_taken() -> None:
    (example,) = re.findall(r"such as (\S+),\s", PARAMETER["ConstraintDescription"])
    assert taken(example)


@pytest.mark.parametrize(
    "classes",
    [
        "large",
        "Large:cpu=256:memory=512",
        "a:memory=512:cpu=256",
        "a:cpu=256:memory=512,",
        "a:cpu=256:memory=512, b:cpu=256:memory=512",
        "a:cpu=256:memory=512,b:cpu=256:memory=512,a:cpu=512:memory=1024",
        "a:cpu=256:memory=512:disk=20",
        "a:cpu=256:memory=512:disk=201",
        "a:cpu=256:memory=512:spot=100",
        "a:cpu=256:memory=512:wall=59",
        "a:cpu=256:memory=512:wall=604801",
        "a:cpu=256:memory=512:image=4",
        "a:cpu=256:memory=512:gpu=1",
    ],
)
def test_a_wrong_class_fails_the_deploy(classes: str) -> None:
    assert not taken(classes)


def test_a_class_says_its_machine_and_leaves_the_rest_to_the_stack() -> None:
    assert sizes.parse(LISTED)["large"] == sizes.SizeClass(
        name="large", cpu=4096, memory=16384, disk=100, spot=False, wall=600
    )
    assert sizes.parse(LISTED)["web"] == sizes.SizeClass(name="web", cpu=2048, memory=4096, image=2)


@pytest.mark.parametrize("classes", ["large", "a:cpu=many:memory=512", "a:cpu=256", "a:cpu=256:memory=512:gpu=1"])
def test_a_list_that_no_deploy_took_is_named_as_such(classes: str) -> None:
    with pytest.raises((ValueError, ValidationError)):
        sizes.parse(classes)
    with pytest.raises(Missing, match="FLEET_SIZE_CLASSES"):
        from_env(environ={"FLEET_TABLE": "work", "FLEET_SIZE_CLASSES": classes})


@pytest.mark.parametrize(
    ("wishes", "name"),
    [
        (None, None),
        (Wishes(), None),
        (Wishes(size="large"), "large"),
        (Wishes(size="huge"), None),
        (Wishes(size="cpu=16384"), None),
        (Wishes(size="large:cpu=16384"), None),
    ],
)
def test_a_session_gets_a_class_of_the_list_or_the_default(wishes: Wishes | None, name: str | None) -> None:
    size = lifecycle.granted_size(wishes, CONFIG)
    assert (size.name if size else None) == name


@pytest.mark.parametrize(("name", "definition"), [("large", "first"), ("web", "second"), (None, "first")])
def test_a_class_has_the_task_definition_of_its_image(name: str | None, definition: str) -> None:
    assert CONFIG.task_definition_of(CONFIG.size_classes[name] if name else None) == definition


def sized(name: str, **changes: Any) -> Record:
    return RECORD.model_copy(update={"size": CONFIG.size_classes[name], **changes})


@pytest.mark.parametrize(("spot", "weight", "on_spot"), [(False, 100, False), (True, 0, True), (None, 100, True)])
def test_a_class_decides_on_spot_if_it_says_so(spot: bool | None, weight: int, on_spot: bool) -> None:
    size = CONFIG.size_classes["web"].model_copy(update={"spot": spot})
    assert lifecycle.on_spot(sized("web", size=size), weight) is on_spot


@pytest.mark.parametrize("changes", [{"interruptions": 2}, {"refusals": 1}])
def test_a_class_on_spot_goes_on_demand_where_spot_does_not_serve(changes: dict[str, int]) -> None:
    size = CONFIG.size_classes["web"].model_copy(update={"spot": True})
    assert not lifecycle.on_spot(sized("web", size=size, **changes), 100)


def test_the_wall_clock_of_the_class_ends_the_turn_and_wakes_the_stopper() -> None:
    running = {"phase": Phase.RUNNING, "served_since": NOW}
    entry = LiveEntry(work_id="w", phase=Phase.RUNNING, turn=NOW, attempt=1)
    assert lifecycle.overdue(sized("large", **running), CONFIG, NOW + 599_000) is None
    assert not lifecycle.needs_stopper(entry, CONFIG, NOW + 599_000)
    wish = lifecycle.overdue(sized("large", **running), CONFIG, NOW + 600_000)
    assert wish
    assert wish.outcome is Outcome.TIMED_OUT
    assert lifecycle.needs_stopper(entry, CONFIG, NOW + 600_000)
    assert lifecycle.overdue(sized("web", **running), CONFIG, NOW + 600_000) is None
    assert lifecycle.overdue(sized("web", **running), CONFIG, NOW + CONFIG.session_timeout_seconds * 1000)


def test_an_image_that_sessions_choose_cannot_stop_the_others() -> None:
    store = MemoryStore()
    for _ in range(2 * breaker.FAILURES_TO_OPEN):
        breaker.failed(store, sized("web"), "no such image", NOW)
    assert store.breaker().opened_at is None
    for _ in range(breaker.FAILURES_TO_OPEN):
        breaker.failed(store, sized("large"), "no such image", NOW)
    assert store.breaker().opened_at == NOW


def test_an_image_that_sessions_choose_does_not_prove_the_other_one_pushed() -> None:
    store = MemoryStore()
    for reason, other_proves in ((f"did not start: {NO_IMAGE}", False), ("did not start: the role lacks it", True)):
        for _ in range(breaker.FAILURES_TO_OPEN):
            breaker.failed(store, sized("large"), reason, NOW)
        breaker.ran(store, sized("web"))
        assert (store.breaker().opened_at is None) is other_proves
        breaker.ran(store, sized("large"))
        assert store.breaker().opened_at is None


def test_without_the_breaker_s_pace_such_a_session_is_tried_later_and_later() -> None:
    assert lifecycle.relaunch_delay(sized("web", refused=1)) > 0
    assert lifecycle.relaunch_delay(sized("web", refused=4)) > lifecycle.relaunch_delay(sized("web", refused=1))
    assert lifecycle.relaunch_delay(sized("large", refused=4)) == 0
