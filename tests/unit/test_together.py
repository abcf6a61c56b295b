"""Group commit: who asks while requests are under way shares the next one, and everybody gets an answer of his own."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import pytest

from shared.together import Together

PATIENCE = 20.0  # seconds until something counts as stuck
MOST = 3


class Requests:
    """Sends in place of a client: requests wait until `let` is set, and answer a number with its double."""

    def __init__(self) -> None:
        self.sent: list[list[int]] = []
        self.let = Event()
        self.answer: Callable[[int], int | Exception] = lambda number: 2 * number
        self.together = Together(self._send, MOST)
        self._pool = ThreadPoolExecutor(50)

    def _send(self, numbers: Sequence[int]) -> list[int | Exception]:
        self.sent.append(list(numbers))
        assert self.let.wait(PATIENCE)
        return [self.answer(number) for number in numbers]

    def ask(self, *numbers: int) -> "list[Future[int]]":
        """Each by a thread of its own, in order: the next starts when this one is sent or waits."""
        asked = []
        for number in numbers:
            before = self._taken()
            asked.append(self._pool.submit(self.together.ask, number))
            until = time.monotonic() + PATIENCE
            while self._taken() == before:
                assert time.monotonic() < until
                time.sleep(0.001)
        return asked

    def _taken(self) -> int:
        return sum(map(len, self.sent)) + len(self.together._waiting)


def results(asked: "list[Future[int]]") -> list[int]:
    return [one.result(PATIENCE) for one in asked]


def test_who_asks_alone_is_sent_alone_and_at_once() -> None:
    requests = Requests()
    requests.let.set()
    assert results([*requests.ask(1), *requests.ask(2)]) == [2, 4]
    assert requests.sent == [[1], [2]]


def test_who_asks_while_requests_are_under_way_shares_the_next_ones_in_order() -> None:
    requests = Requests()
    asked = requests.ask(1, 2, 3, 4, 5, 6, 7)
    assert requests.sent == [[1], [2]], "two requests at a time"
    requests.let.set()
    assert results(asked) == [2, 4, 6, 8, 10, 12, 14]
    assert sorted(requests.sent) == [[1], [2], [3, 4, 5], [6, 7]]
    assert results(requests.ask(8)) == [16]
    assert requests.sent[-1] == [8], "nobody waits any more"


def test_an_answer_of_its_own_may_be_a_failure() -> None:
    requests = Requests()
    requests.answer = lambda number: ValueError(f"no {number}") if number == 4 else number
    asked = requests.ask(1, 2, 3, 4, 5)
    requests.let.set()
    with pytest.raises(ValueError, match="no 4"):
        asked[3].result(PATIENCE)
    assert results([*asked[:3], *asked[4:]]) == [1, 2, 3, 5]


def test_the_failure_of_a_request_is_raised_for_each_that_shared_it_and_for_nobody_else() -> None:
    requests = Requests()

    def answer(number: int) -> int:
        if number == 4:
            raise ConnectionError("gone")
        return number

    requests.answer = answer
    asked = requests.ask(1, 2, 3, 4, 5, 6)
    requests.let.set()
    for shared in asked[2:5]:
        with pytest.raises(ConnectionError):
            shared.result(PATIENCE)
    assert results([asked[0], asked[1], asked[5]]) == [1, 2, 6]


def test_who_shared_with_an_interrupted_request_is_told_so_and_the_next_goes_on() -> None:
    requests = Requests()

    def answer(number: int) -> int:
        if number == 3:
            raise KeyboardInterrupt
        return number

    requests.answer = answer
    asked = requests.ask(1, 2, 3, 4, 5, 6)
    requests.let.set()
    with pytest.raises(KeyboardInterrupt):
        asked[2].result(PATIENCE)
    for shared in asked[3:5]:
        with pytest.raises(InterruptedError):
            shared.result(PATIENCE)
    assert results([asked[0], asked[1], asked[5]]) == [1, 2, 6]


def test_a_request_that_hangs_holds_up_no_other() -> None:
    requests = Requests()
    hangs = requests.ask(1)
    let, requests.let = requests.let, Event()
    requests.let.set()
    assert results(requests.ask(2, 3, 4)) == [4, 6, 8]
    let.set()
    assert results(hangs) == [2]


def test_no_answer_is_lost_or_mixed_up_among_many_threads() -> None:
    requests = Requests()
    requests.let.set()
    with ThreadPoolExecutor(40) as pool:
        assert list(pool.map(requests.together.ask, range(2000))) == list(range(0, 4000, 2))
    assert sorted(number for sent in requests.sent for number in sent) == list(range(2000))
    assert max(map(len, requests.sent)) <= MOST
