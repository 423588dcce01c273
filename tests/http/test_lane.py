"""A lane: requests in order, batches of what has come, nothing waits too long, none is lost."""

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from rampart.handlers.errors import ImageError
from rampart.handlers.http import lane as module
from rampart.handlers.http.lane import Lane
from rampart.handlers.telemetry import Metrics
from rampart.handlers.types import Incoming, Reply


class Echo:
    """Answers with what came, when it is let; keeps the sizes of batches."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.sizes: list[int] = []

    def answer(self, batch: Sequence[Incoming]) -> list[Reply]:
        self.sizes.append(len(batch))
        self.go_on.wait()
        return [Reply(200, {}, incoming.parts[0]) for incoming in batch]

    def refuse(self, incoming: Incoming, error: ImageError) -> Reply:
        return Reply(error.code, {}, b"")


def ask(lane: Lane, text: bytes, seconds: float = 9.0) -> "asyncio.Task[Reply]":
    return asyncio.create_task(lane.answer(Incoming({}, [text]), seconds=seconds))


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_what_came_while_a_batch_ran_is_the_next_and_each_gets_its_own() -> None:
    echo = Echo()

    async def run() -> list[Reply]:
        lane: Any = Lane(echo, Metrics())  # type: ignore[arg-type]
        first = ask(lane, b"0")
        await until(lambda: echo.sizes == [1])
        others = [ask(lane, b"%d" % n) for n in range(1, 40)]
        await asyncio.sleep(0.05)
        echo.go_on.set()
        replies = await asyncio.gather(first, *others)
        lane.close()
        return replies

    assert [reply.body for reply in asyncio.run(run())] == [b"%d" % n for n in range(40)]
    assert echo.sizes == [1, 32, 7]


def test_a_full_lane_refuses_at_once_and_a_deadline_that_is_over_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CAPACITY", 2)
    echo = Echo()

    async def run() -> list[int]:
        lane: Any = Lane(echo, Metrics())  # type: ignore[arg-type]
        first = ask(lane, b"0")
        await until(lambda: echo.sizes == [1])
        waiting = [ask(lane, b"1", seconds=0.01), ask(lane, b"2")]
        await asyncio.sleep(0.05)
        refused = await asyncio.wait_for(ask(lane, b"3"), 1)
        echo.go_on.set()
        replies = await asyncio.gather(first, *waiting)
        lane.close()
        return [reply.status for reply in (*replies, refused)]

    assert asyncio.run(run()) == [200, 504, 200, 503]
    assert echo.sizes == [1, 1]


def test_a_deadline_is_told_when_it_comes_though_the_graph_still_runs() -> None:
    echo = Echo()

    async def run() -> tuple[int, float]:
        lane: Any = Lane(echo, Metrics())  # type: ignore[arg-type]
        began = time.monotonic()
        threading.Timer(3.0, echo.go_on.set).start()
        status = (await ask(lane, b"0", seconds=0.1)).status
        took = time.monotonic() - began
        echo.go_on.set()
        lane.close()
        return status, took

    status, took = asyncio.run(run())
    assert status == 504 and 0.1 <= took < 2


def test_one_whose_client_has_gone_is_not_answered_and_holds_up_nobody() -> None:
    echo = Echo()

    async def run() -> bytes:
        lane: Any = Lane(echo, Metrics())  # type: ignore[arg-type]
        first, gone = ask(lane, b"0"), ask(lane, b"1")
        await until(lambda: echo.sizes)
        later = ask(lane, b"2")
        await asyncio.sleep(0.01)
        first.cancel(), gone.cancel()
        await asyncio.sleep(0.01)
        echo.go_on.set()
        body = (await asyncio.wait_for(later, 5)).body
        lane.close()
        return body

    assert asyncio.run(run()) == b"2"


def test_it_counts_who_waits_or_is_at_work_and_not_who_has_gone_or_is_answered() -> None:
    echo, metrics = Echo(), Metrics()

    def in_flight() -> float:
        return metrics.take()["rampart_requests_in_flight", ()]

    async def run() -> list[float]:
        lane: Any = Lane(echo, metrics)  # type: ignore[arg-type]
        seen = [in_flight()]
        tasks = [ask(lane, b"%d" % n) for n in range(5)]
        late = ask(lane, b"5", seconds=0.01)
        await until(lambda: echo.sizes)
        seen.append(in_flight())
        tasks.pop().cancel()
        await late
        seen.append(in_flight())
        echo.go_on.set()
        await asyncio.gather(*tasks)
        seen.append(in_flight())
        lane.close()
        return seen

    assert asyncio.run(run()) == [0, 6, 4, 0]


def test_a_lane_that_closes_answers_what_waits() -> None:
    echo = Echo()

    async def run() -> list[Reply]:
        lane: Any = Lane(echo, Metrics())  # type: ignore[arg-type]
        tasks = [ask(lane, b"%d" % n) for n in range(5)]
        await asyncio.sleep(0.01)
        threading.Timer(0.05, echo.go_on.set).start()
        await asyncio.to_thread(lane.close)
        return await asyncio.wait_for(asyncio.gather(*tasks), 5)

    assert len(asyncio.run(run())) == 5


def test_a_delay_gathers_company_and_no_longer_than_it_says() -> None:
    echo = Echo()
    echo.go_on.set()

    async def run() -> None:
        lane: Any = Lane(echo, Metrics(), delay=0.2)  # type: ignore[arg-type]
        began = time.monotonic()
        first = ask(lane, b"0")
        await asyncio.sleep(0.02)
        await asyncio.wait_for(asyncio.gather(first, ask(lane, b"1")), 5)
        assert time.monotonic() - began >= 0.2
        lane.close()

    asyncio.run(run())
    assert echo.sizes == [2]


def test_a_batch_that_fails_is_answered_and_the_next_one_too() -> None:
    class Broken(Echo):
        def answer(self, batch: Sequence[Incoming]) -> list[Reply]:
            if batch[0].parts[0] == b"0":
                raise RuntimeError("of ours")
            return [Reply(200, {}, b"") for _ in batch]

    async def run() -> list[int]:
        lane: Any = Lane(Broken(), Metrics())  # type: ignore[arg-type]
        statuses = [(await asyncio.wait_for(ask(lane, text), 5)).status for text in (b"0", b"1")]
        assert lane.alive()
        lane.close()
        return statuses

    assert asyncio.run(run()) == [500, 200]


def test_bodies_that_wait_take_bounded_memory_and_give_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "HELD", 5)
    echo = Echo()

    async def run() -> list[int]:
        lane: Any = Lane(echo, Metrics())  # type: ignore[arg-type]
        first = [ask(lane, b"abc"), ask(lane, b"abc")]
        await until(lambda: echo.sizes == [1])
        echo.go_on.set()
        later = [*await asyncio.gather(*first), await ask(lane, b"abcde")]
        lane.close()
        return [reply.status for reply in later]

    assert asyncio.run(run()) == [200, 503, 200]
