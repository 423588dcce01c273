"""What is decoded first and what is put off, by a clock of the test's own."""

import pytest
from clock import Clock

from rampart.handlers.budget import BATCH_SECONDS, DEAR, MAX_CREDIT, REQUEST_SECONDS, Budget
from rampart.handlers.errors import BUSY, DEAR_BUSY, ImageError
from rampart.handlers.errors import TOO_SLOW as SLOW

CHEAP = DEAR


@pytest.fixture
def clock() -> Clock:
    return Clock()


def batch(
    budget: Budget, clock: Clock, pictures: list[tuple[int, int]], seconds: float
) -> list[int | ImageError]:
    """One batch in which each picture takes so long."""

    def decoded(at: int) -> int:
        clock.now += seconds
        return at

    budget.begin()
    results = budget.spend(pictures, decoded)
    budget.end()
    return results


def test_results_stand_where_their_pictures_do(clock: Clock) -> None:
    pictures = [(0, 10), (0, 5), (1, 7), (2, 0)]
    assert batch(Budget(clock.monotonic), clock, pictures, 0.01) == [0, 1, 2, 3]


def test_cheap_pictures_come_before_dear_ones(clock: Clock) -> None:
    order: list[int] = []
    Budget(clock.monotonic).spend([(0, 4 * DEAR), (1, 1), (2, 2 * DEAR), (3, 2)], order.append)
    assert order == [1, 3, 2, 0]


def test_dear_pictures_beside_cheap_ones_get_a_tenth_of_a_busy_workers_time(clock: Clock) -> None:
    budget, dear, began = Budget(clock.monotonic), 0.0, clock.now
    for _ in range(500):
        results = batch(budget, clock, [(0, CHEAP), (1, 2 * DEAR), (2, 2 * DEAR)], 0.02)
        assert results[0] == 0
        dear += 0.02 * sum(result is not DEAR_BUSY for result in results[1:])
    assert dear <= MAX_CREDIT + 0.12 * (clock.now - began)
    assert dear >= 0.08 * (clock.now - began)


def test_dear_pictures_get_all_the_time_in_which_the_worker_is_idle(clock: Clock) -> None:
    budget = Budget(clock.monotonic)
    for _ in range(200):
        assert batch(budget, clock, [(0, CHEAP), (1, 2 * DEAR)], 0.02) == [0, 1]
        clock.now += 0.03


def test_dear_pictures_alone_are_never_put_off(clock: Clock) -> None:
    budget = Budget(clock.monotonic)
    for _ in range(200):
        assert batch(budget, clock, [(0, 2 * DEAR), (1, 3 * DEAR)], 0.05) == [0, 1]


def test_a_dear_request_does_not_make_its_own_cheap_pictures_a_reason_to_wait(clock: Clock) -> None:
    budget = Budget(clock.monotonic)
    for _ in range(100):
        assert batch(budget, clock, [(0, 2 * DEAR), (0, CHEAP)], 0.05) == [0, 1]


def test_a_batch_ends_in_time_and_what_is_left_is_put_off(clock: Clock) -> None:
    began = clock.now
    results = batch(Budget(clock.monotonic), clock, [(request, 1) for request in range(8)], 2.0)
    assert results == [0, 1, 2, 3, 4, 5, BUSY, BUSY]
    assert clock.now - began <= BATCH_SECONDS + 2.0


def test_a_request_ends_in_time_whoever_else_is_there(clock: Clock) -> None:
    results = batch(
        Budget(clock.monotonic), clock, [(0, 2)] * 5 + [(1, 9)], REQUEST_SECONDS / 2 + 0.01
    )
    assert results == [0, 1, SLOW, SLOW, SLOW, 5]
