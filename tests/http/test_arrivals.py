"""Messages under way: a few at once, and slow ones make room."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from rampart.handlers.errors import ImageError
from rampart.handlers.http import arrivals as module
from rampart.handlers.http.arrivals import AT_ONCE, SHARE_SECONDS, Arrivals

Receive = Callable[[], Awaitable[bytes]]


async def never() -> bytes:
    await asyncio.Event().wait()
    return b""


async def quick() -> bytes:
    await asyncio.sleep(0)
    return b"quick"


def started(
    arrivals: Arrivals, receive: Receive, count: int, peer: str = "one"
) -> "list[asyncio.Task[bytes]]":
    return [asyncio.create_task(arrivals.read(receive, peer)) for _ in range(count)]


async def ended(tasks: "list[asyncio.Task[bytes]]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_no_more_are_read_at_once_than_memory_has_room_for() -> None:
    reading = most = 0

    async def receive() -> bytes:
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        await asyncio.sleep(0.001)
        reading -= 1
        return b"one"

    async def run() -> list[bytes]:
        return await asyncio.gather(*started(Arrivals(), receive, 100))

    assert asyncio.run(run()) == [b"one"] * 100
    assert most == AT_ONCE


def test_messages_that_never_end_make_room_one_after_the_other() -> None:
    async def run() -> list[int]:
        arrivals = Arrivals()
        endless = started(arrivals, never, AT_ONCE)
        await asyncio.sleep(SHARE_SECONDS * 1.5)
        assert not any(task.done() for task in endless)  # as long as nobody waits
        for number in range(1, 4):
            good = asyncio.create_task(arrivals.read(quick, "other"))
            for _ in range(20):  # turns of the loop, in which nothing sleeps
                await asyncio.sleep(0)
            assert good.done() and await good == b"quick"
            assert sum(task.done() for task in endless) <= number
        refused = [task.exception() for task in endless if task.done()]
        await ended(endless)
        return [error.code for error in refused if isinstance(error, ImageError)]

    codes = asyncio.run(run())
    assert codes and set(codes) == {503}


def test_connections_that_fill_up_do_not_hold_up_another() -> None:
    async def run() -> None:
        arrivals = Arrivals()
        crowd = started(arrivals, never, 200) + started(arrivals, never, 200, "two")
        await asyncio.sleep(0.01)
        for _ in range(3):
            ended_before = sum(task.done() for task in crowd)
            good = asyncio.create_task(arrivals.read(quick, "other"))
            await asyncio.sleep(0)
            crowd += started(arrivals, never, 200)  # newer than the good one
            assert await good == b"quick"
            # One made room for it, and not all that came before.
            assert sum(task.done() for task in crowd) - ended_before <= 2
        await ended(crowd)
        assert await asyncio.gather(*started(arrivals, quick, 3 * AT_ONCE))

    asyncio.run(run())


def test_time_in_which_the_process_stood_still_is_no_messages_fault() -> None:
    async def run() -> None:
        arrivals, come = Arrivals(), asyncio.Event()

        async def last() -> bytes:
            await come.wait()
            for _ in range(3):  # what has come takes a few turns of the loop to be seen
                await asyncio.sleep(0)
            return b"seen"

        good = started(arrivals, last, 1, "good")[0]  # the oldest, which would go first
        peers = [f"peer {number}" for number in range(AT_ONCE + 5)]  # one call each, as it has
        crowd = [task for peer in peers for task in started(arrivals, never, 1, peer)]
        await asyncio.sleep(SHARE_SECONDS / 4)
        come.set()
        time.sleep(SHARE_SECONDS * 3)
        assert await good == b"seen"
        await asyncio.sleep(SHARE_SECONDS * 2)
        assert any(task.done() for task in crowd)  # which make room as before
        await ended(crowd)

    asyncio.run(run())


def test_too_many_that_wait_are_refused_and_those_of_the_fullest_connection_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 20)

    async def run() -> list[int]:
        arrivals = Arrivals()
        crowd = started(arrivals, never, AT_ONCE + 15) + started(arrivals, never, 9, "two")
        await asyncio.sleep(0.01)
        refused = [number for number, task in enumerate(crowd) if task.done()]
        await ended(crowd)
        return refused

    assert asyncio.run(run()) == list(range(AT_ONCE, AT_ONCE + 4))  # the oldest that waited


def test_calls_that_are_cancelled_give_their_places_back() -> None:
    async def run() -> None:
        arrivals = Arrivals()
        for _ in range(3):
            crowd = started(arrivals, never, 2 * AT_ONCE)
            await asyncio.sleep(0.01)
            await ended(crowd)
        one_by_one = started(arrivals, never, AT_ONCE - 1)
        await asyncio.sleep(0.01)
        assert await asyncio.wait_for(arrivals.read(quick, "other"), 30) == b"quick"
        assert not any(task.done() for task in one_by_one)
        await ended(one_by_one)

    asyncio.run(run())


def test_a_message_that_takes_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BODY_SECONDS", 0.05)
    with pytest.raises(ImageError) as caught:
        asyncio.run(Arrivals().read(never, "one"))
    assert caught.value.code == 408
