"""A lane: requests in order, batches of what has come, nothing waits too long, none is lost."""

import asyncio
import gc
import threading
import time
import weakref
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


class Parts(list[bytes]):
    """Whose end can be seen."""


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
        await asyncio.sleep(0)
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
        late = await ask(lane, b"1", seconds=0.01)
        waiting = [ask(lane, b"2"), ask(lane, b"3")]
        await asyncio.sleep(0)
        refused = await asyncio.wait_for(ask(lane, b"4"), 30)
        echo.go_on.set()
        replies = await asyncio.gather(first, *waiting)
        lane.close()
        return [reply.status for reply in (late, *replies, refused)]

    assert asyncio.run(run()) == [504, 200, 200, 200, 503]
    assert echo.sizes == [1, 2]


def test_a_deadline_is_told_when_it_comes_though_the_graph_still_runs() -> None:
    echo = Echo()

    async def run() -> int:
        lane: Any = Lane(echo, Metrics())  # type: ignore[arg-type]
        task = ask(lane, b"0", seconds=0.1)
        await until(lambda: echo.sizes == [1])
        status = (await asyncio.wait_for(task, 30)).status
        echo.go_on.set()
        lane.close()
        return status

    assert asyncio.run(run()) == 504


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


def test_a_lane_whose_batch_hangs_closes_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.1)
    echo = Echo()

    async def run() -> None:
        lane: Any = Lane(echo, Metrics())  # type: ignore[arg-type]
        task = ask(lane, b"a")
        await until(lambda: echo.sizes)
        await asyncio.wait_for(asyncio.to_thread(lane.close), 5)
        task.cancel()

    asyncio.run(run())


@pytest.mark.parametrize(("delay", "company"), [(60.0, 2), (0.2, 1)])
def test_a_delay_gathers_company_and_no_longer_than_it_says(
    monkeypatch: pytest.MonkeyPatch, delay: float, company: int
) -> None:
    monkeypatch.setattr(module, "LARGEST", 2)
    echo = Echo()
    echo.go_on.set()

    async def run() -> float:
        lane: Any = Lane(echo, Metrics(), delay=delay)  # type: ignore[arg-type]
        began = time.monotonic()
        tasks = [ask(lane, b"0")]
        await asyncio.sleep(0.02)
        tasks += [ask(lane, b"1") for _ in range(company - 1)]
        await asyncio.wait_for(asyncio.gather(*tasks), 30)
        took = time.monotonic() - began
        await asyncio.wait_for(asyncio.to_thread(lane.close), 30)
        return took

    assert asyncio.run(run()) >= (delay if company == 1 else 0)
    assert echo.sizes == [company]


def test_a_lane_answers_on_where_all_have_left_while_it_waited_for_company() -> None:
    echo = Echo()
    echo.go_on.set()

    async def run() -> list[int]:
        lane: Any = Lane(echo, Metrics(), delay=0.1)  # type: ignore[arg-type]
        statuses = [(await ask(lane, b"0", seconds=0.01)).status]
        await asyncio.sleep(0.2)
        statuses.append((await asyncio.wait_for(ask(lane, b"1", seconds=30), 30)).status)
        lane.close()
        return statuses

    assert asyncio.run(run()) == [504, 200]


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


@pytest.mark.parametrize("gone", ["its deadline is over", "its client has left"])
def test_who_is_awaited_no_more_holds_neither_memory_nor_a_place(gone: str) -> None:
    """Or requests of a millisecond each would fill memory beyond HELD, a batch of them unread."""
    echo = Echo()

    async def run() -> Any:
        lane: Any = Lane(echo, Metrics())  # type: ignore[arg-type]
        first = ask(lane, b"0")
        await until(lambda: echo.sizes == [1])
        incoming = Incoming({}, Parts([b"1"]))
        seconds = 0.001 if gone == "its deadline is over" else 9
        late = asyncio.create_task(lane.answer(incoming, seconds=seconds))
        await asyncio.sleep(0)
        if seconds == 9:
            late.cancel()
        await asyncio.wait([late])
        held = weakref.ref(incoming.parts)
        del incoming, late
        gc.collect()
        left = held()
        echo.go_on.set()
        await first
        lane.close()
        return left

    assert asyncio.run(run()) is None
    assert echo.sizes == [1]


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
