"""Messages of gRPC that are on their way, and the memory that they take together.

gRPC gathers a message before it shows a byte, and nobody tells its size before. So a few are read
at once, each perhaps of the largest size; those that wait hold no more than gRPC's window.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from rampart.handlers.errors import BUSY
from rampart.handlers.http.bodies import BODY_SECONDS, MAX_BUFFERED, TOO_SLOW
from rampart.handlers.protocols.content_encoding import MAX_BODY

AT_ONCE = MAX_BUFFERED // MAX_BODY
SHARE_SECONDS = 0.2  # that a message has before it makes room for one that waits
LATE = 0.05  # seconds after which a look was held up
MAX_WAITING = 4096  # calls; where there are more, one of the peer that has most gives up

Message = TypeVar("Message")


class Turn:
    """A call of `peer`, a connection, that waits until it may read."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.granted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def tell(self, granted: bool) -> bool:
        """End the wait; whether there was still one to end."""
        if self.granted.done():  # its client has gone
            return False
        self.granted.set_result(granted)
        return True


class Arrival:
    """A message of `peer` that is being read; `deadline` ends the wait for it."""

    def __init__(self, peer: str, deadline: asyncio.Timeout) -> None:
        self.peer, self.deadline, self.began = peer, deadline, time.monotonic()
        self.given_up = False  # to make room for others


class Arrivals:
    """All messages that are on their way in one process; connections share it evenly."""

    def __init__(self) -> None:
        self._free = AT_ONCE
        self._arriving: list[Arrival] = []  # oldest first
        self._waiting: list[Turn] = []  # oldest first
        self._next_look = 0.0  # when `_make_room` was to look again

    async def read(self, receive: Callable[[], Awaitable[Message]], peer: str) -> Message:
        """What `receive` gives. Raises ImageError where it takes too long."""
        await self._turn(peer)
        arrival = None
        try:
            async with asyncio.timeout(BODY_SECONDS) as deadline:
                arrival = Arrival(peer, deadline)
                self._arriving.append(arrival)
                return await receive()
        except TimeoutError:
            raise (BUSY if arrival and arrival.given_up else TOO_SLOW).bare() from None
        finally:
            if arrival in self._arriving:
                self._arriving.remove(arrival)
            self._pass_on()

    async def _turn(self, peer: str) -> None:
        """Wait for leave to read."""
        if self._free:
            self._free -= 1
            return
        turn = Turn(peer)
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            self._next_look = time.monotonic()
            self._make_room()
        elif len(self._waiting) > MAX_WAITING:
            most = Counter(one.peer for one in self._waiting).most_common(1)[0][0]
            self._forget(next(one for one in self._waiting if one.peer == most)).tell(False)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                if not await turn.granted:
                    raise BUSY.bare()
        except TimeoutError:
            self._leave(turn)
            raise BUSY.bare() from None
        except asyncio.CancelledError:
            self._leave(turn)
            raise

    def _leave(self, turn: Turn) -> None:
        """Its call waits no more; it may have been granted in this very moment."""
        if turn in self._waiting:
            self._forget(turn)
        elif not turn.granted.cancelled() and turn.granted.result():
            self._pass_on()

    def _forget(self, turn: Turn) -> Turn:
        self._waiting.remove(turn)
        return turn

    def _pass_on(self) -> None:
        """The connection that reads least goes first, and of its calls the newest.

        What has waited long is more likely of one who fills up.
        """
        reading = Counter(one.peer for one in self._arriving)
        while self._waiting:
            turn = min(reversed(self._waiting), key=lambda one: reading[one.peer])
            if self._forget(turn).tell(True):
                return
        self._free += 1

    def _make_room(self) -> None:
        """Give up what has had its share, as long as others wait."""
        if not self._waiting:
            return
        now = time.monotonic()
        # A look that comes late was held up, and so were the messages: that time is nobody's, and
        # what has come meanwhile is seen before the next look.
        held_up = now - self._next_look > LATE
        for one in self._arriving:
            one.began += now - max(one.began, min(now, self._next_look))
        due = [one for one in self._arriving if now - one.began >= SHARE_SECONDS and not held_up]
        if due:
            reading = Counter(one.peer for one in self._arriving)
            arrival = max(due, key=lambda one: reading[one.peer])  # the oldest of those
            self._arriving.remove(arrival)
            arrival.given_up = True
            arrival.deadline.reschedule(0.0)
        began = min((one.began for one in self._arriving), default=now)
        delay = max(0.01, began + SHARE_SECONDS - now)
        self._next_look = now + delay
        asyncio.get_running_loop().call_later(delay, self._make_room)
