"""The requests of one model in the order they came, and the thread that answers them."""

import asyncio
import logging
import threading
import time
from collections import deque
from typing import NamedTuple

from rampart.handlers.errors import BUSY, INTERNAL, TOO_LATE
from rampart.handlers.http.traces import Traces
from rampart.handlers.service import Service
from rampart.handlers.telemetry import Metrics, Pulse
from rampart.handlers.types import Incoming, Reply

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0  # for which a request may wait and be at work
CAPACITY = 100  # requests that wait; more are refused: better at once than too late
HELD = 64 << 20  # bytes of the bodies that wait
LARGEST = 32  # requests of one batch


class Waiting(NamedTuple):
    """A request, where its reply goes, and until when somebody waits for it."""

    incoming: Incoming
    reply: "asyncio.Future[Reply]"
    deadline: float  # of time.monotonic
    came: int  # in ns since 1970


class Lane:
    """What has come while a batch ran is the next batch, so nothing waits while the graph idles.

    With `delay` a batch waits so many seconds for company: where a GPU is, that may pay. `metrics`
    know how many requests wait or are at work, and what is answered goes into `traces`.
    """

    def __init__(
        self,
        service: Service,
        metrics: Metrics,
        *,
        delay: float = 0.0,
        traces: Traces | None = None,
    ) -> None:
        self.service, self._pulse, self._metrics = service, Pulse(), metrics
        self._delay, self._traces = delay, traces
        self._waiting: deque[Waiting] = deque()
        self._news = threading.Condition()
        self._held = self._in_flight = 0
        self._count(0)  # of an idle server too: who scales by it must see that
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="lane", daemon=True)
        self._thread.start()

    async def answer(self, incoming: Incoming, *, seconds: float) -> Reply:
        """The reply to one request, for which its client waits `seconds`."""
        size = sum(map(len, incoming.parts))
        if len(self._waiting) >= CAPACITY or self._held + size > HELD:
            return self.service.refuse(incoming, BUSY)
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        with self._news:
            deadline = time.monotonic() + seconds
            self._waiting.append(Waiting(incoming, reply, deadline, time.time_ns()))
            self._news.notify()
        self._held += size
        self._count(1)
        try:
            async with asyncio.timeout(seconds):
                return await reply
        except TimeoutError:
            return self.service.refuse(incoming, TOO_LATE)
        finally:
            if reply.cancelled():  # by its deadline, or its client has gone
                self._forget(reply)
            self._held -= size
            self._count(-1)

    def _forget(self, reply: "asyncio.Future[Reply]") -> None:
        """Let go of one that nobody awaits: what has a place in memory must count as held."""
        with self._news:
            self._waiting = deque(one for one in self._waiting if one.reply is not reply)

    def _count(self, change: int) -> None:
        self._in_flight += change
        self._metrics.set("rampart_requests_in_flight", self._in_flight)

    def alive(self) -> bool:
        """Whether its thread runs and its batch does not hang."""
        return self._thread.is_alive() and self._pulse.alive()

    def close(self) -> None:
        """Answer what waits, take no more, and return when all is answered, or a batch hangs."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join(ANSWER_SECONDS)

    def _run(self) -> None:
        while batch := self._next():
            with self._pulse.busy():
                replies = self._replies(batch)
            batch[0].reply.get_loop().call_soon_threadsafe(_give, replies)
            if self._traces:
                spans = [(one.incoming, one.came, reply) for one, reply in replies]
                self._traces.add(spans, self.service.stages)

    def _next(self) -> list[Waiting]:
        """The next batch; none when the lane is closed and empty."""
        with self._news:
            while True:
                self._news.wait_for(lambda: self._waiting or self._closed)
                if self._delay:
                    self._news.wait_for(
                        lambda: len(self._waiting) >= LARGEST or self._closed, self._delay
                    )
                count = min(LARGEST, len(self._waiting))
                if count or self._closed:  # not where all have left meanwhile
                    return [self._waiting.popleft() for _ in range(count)]

    def _replies(self, batch: list[Waiting]) -> list[tuple[Waiting, Reply]]:
        """Replies to those for which somebody still waits."""
        now = time.monotonic()
        inside = [one for one in batch if one.deadline > now and not one.reply.cancelled()]
        return list(zip(inside, self._answers([one.incoming for one in inside]), strict=True))

    def _answers(self, batch: list[Incoming]) -> list[Reply]:
        """Replies to all, also where the service fails: this thread must not end."""
        if not batch:
            return []
        try:
            return self.service.answer(batch)
        except Exception as error:
            logger.error("A batch failed: %s", type(error).__name__)
            return [self.service.refuse(incoming, INTERNAL) for incoming in batch]


def _give(replies: list[tuple[Waiting, Reply]]) -> None:
    for one, reply in replies:
        if not one.reply.done():  # its client may have gone
            one.reply.set_result(reply)
