"""A session's log tells its whole story by its ids, in the order in which it happened."""

import logging
from typing import Any

from shared.log import log
from tests.simulation.script import Play

ITEM = {"work_id", "session_id", "turn", "attempt", "phase"}
STORY = ["received", "held", "launched", "sandbox runs", "ticket used", "container dead", "turn ended"]


class Lines(logging.Handler):
    """Keeps what each line says, by its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.__dict__ | {"message": record.getMessage()})


def test_every_transition_of_a_turn_is_one_line_with_the_session_s_ids() -> None:
    play, lines = Play(0), Lines()
    logger = logging.getLogger(log._logger.name)
    logger.addHandler(lines)
    try:
        session = play.running(messages=1)
        play.settle()
    finally:
        logger.removeHandler(lines)
        play.fleet.close()
    about = [line for line in lines.kept if line.get("work_id") == session.work_id]
    told = [line["message"] for line in about if line["message"] in STORY]
    # What runs and what asks for its ticket do so at the same time
    assert sorted(told) == sorted(STORY)
    assert [one for one in told if one != "ticket used"] == [one for one in STORY if one != "ticket used"]
    for line in about:
        if line["message"] in STORY:
            assert line.keys() >= ITEM, line["message"]
    by_message = {line["message"]: line for line in about}
    assert by_message["held"]["pickup_seconds"] >= 0
    assert by_message["sandbox runs"]["launch_seconds"] > 0
    assert by_message["turn ended"]["outcome"] == "completed"
    assert by_message["container dead"]["task"] == play.task(session).arn
    assert not [line["message"] for line in about if line["levelname"] == "ERROR"]
