"""One HTTP connection, which may not be slow, nor send heads without end.

uvicorn bounds neither the time nor the size of a request's head, nor how many requests wait.
"""

import asyncio
import json
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rampart.handlers.errors import ImageError
from rampart.launch.share import Share

HEAD_SECONDS = 10.0  # in which a head must be complete
HEAD_BYTES = 64 << 10
MAX_WAITING = 100  # requests of a connection that wait for the answer to the one before
DRAIN = 2.0  # seconds for which a worker that ends still takes a connection's next request
TAKE_SECONDS = 20.0  # for which an answer may wait for its client to read
LINGER = 2.0  # seconds for which a client that still sends may read its answer
NO_HTTP = ImageError(400, "no_http", "this is not valid HTTP/1.1")


class Closing:
    """A transport that closes once the client has had its answer.

    To close a socket that holds unread data resets it, and the client may lose the answer. An
    answer's head goes out with the body, which uvicorn writes next: one packet wakes a client once.
    """

    def __init__(self, transport: Any, connection: "Connection") -> None:
        self._transport, self._connection = transport, connection
        self._answered: Any = None  # the cycle whose head was written
        self._head = b""
        self.lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send, once the body of an answer's head is there."""
        cycle = self._connection.cycle
        begins = cycle and cycle.response_started and cycle is not self._answered
        if begins and cycle.scope["method"] != "HEAD":  # which has no body
            self._answered, self._head = cycle, data
        else:
            self._transport.write(self._head + data)
            self._head = b""

    def is_closing(self) -> bool:
        """As of any transport."""
        return self.lingers or bool(self._transport.is_closing())

    def close(self) -> None:
        """Close, at once unless a body is still on its way."""
        if self._head:
            self.write(b"")
        cycle = self._connection.cycle
        if self.is_closing() or not (cycle and cycle.more_body and cycle.response_complete):
            self._transport.close()
            self._connection.await_end()
            return
        self.lingers = True
        self._connection.linger()


class Connection(HttpToolsProtocol):
    """As uvicorn's, with a deadline and a limit for the head of each request."""

    _deadline: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None
    _pending = 0  # bytes since a head ended or a body grew: of a head, or of a body's frame
    _begun = False  # whether a head is under way
    _seen = -1  # the look at which this one was counted last
    ends: ClassVar[bool] = False  # the worker, and each connection after its next answer
    looks: ClassVar[int] = 0
    asked: ClassVar[int] = 0  # connections with a request since the last look
    # Of them, those that end after an answer, to begin anew with another worker.
    surplus: ClassVar[int] = 0

    def connection_made(self, transport: Any) -> None:
        """The deadline of the first request begins."""
        super().connection_made(Closing(transport, self))  # type: ignore[arg-type]
        if self.ends:
            self._drain()
        else:
            self._await_head()

    def _await_head(self) -> None:
        self._end_deadline()
        self._pending = 0
        self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _end_deadline(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def await_end(self) -> None:
        """It closes once all is sent: a client that does not read gets little time for that."""
        self._end_deadline()
        self._deadline = self.loop.call_later(TAKE_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        """The client reads slower than we answer."""
        super().pause_writing()
        self._stall = self.loop.call_later(TAKE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        if self._stall:
            self._stall.cancel()
            self._stall = None

    def linger(self) -> None:
        """Say that no more is read, and let what comes fall, for a while."""
        self._end_deadline()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._deadline = self.loop.call_later(LINGER, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Close where a head is too long, or what stands between the parts of a body."""
        if self.transport.lingers:  # type: ignore[attr-defined]
            return
        if not self._deadline and (not self.cycle or self.cycle.response_complete):
            self._await_head()  # the next request begins
        for begin in range(0, len(data), HEAD_BYTES):
            part = data[begin : begin + HEAD_BYTES]
            self._pending += len(part)
            super().data_received(part)
            if self._pending > HEAD_BYTES:
                self.transport.abort()
            if self.transport.is_closing():
                return
        self._hurry()

    def _hurry(self) -> None:
        """A head that is under way has a deadline, unless we do not read."""
        if self._begun and not self._deadline and not self.pipeline:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def on_message_begin(self) -> None:
        """A head begins, perhaps while another request is at work."""
        super().on_message_begin()
        self._begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """One line of a head. Those after a body, of which there is no end, are left out."""
        if self._begun:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """A part of a body, which has limits of its own."""
        self._pending = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        """The head is here. Raises ConnectionError, which ends the parser, where too many wait."""
        self._begun, self._pending = False, 0
        self._end_deadline()
        super().on_headers_complete()
        if len(self.pipeline) > MAX_WAITING:
            self.transport.abort()
            raise ConnectionError("too many requests wait")
        if self._seen != self.looks:
            self._seen = self.looks
            type(self).asked += 1
        if self.ends or self._leaves():
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        """The next request begins. While others wait we read no more."""
        super().on_response_complete()
        if self.pipeline:
            self.flow.pause_reading()
        self._hurry()

    def _leaves(self) -> bool:
        if not self.surplus or self.pipeline:
            return False
        type(self).surplus -= 1
        return True

    @classmethod
    def look(cls, share: Share) -> None:
        """Once a second: see whether this worker has more clients than others."""
        clients, cls.asked = cls.asked, 0
        cls.looks += 1
        cls.surplus = share.surplus(clients)

    def shutdown(self) -> None:
        """The worker ends. A request may be on its way: uvicorn would reset it."""
        type(self).ends = True
        if self.cycle and not self.cycle.response_complete:
            super().shutdown()
        elif not self._pending or not self._deadline:
            self._drain()

    def _drain(self) -> None:
        self._end_deadline()
        self._deadline = self.loop.call_later(DRAIN, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """Tell in our form that this is no HTTP."""
        body = json.dumps(NO_HTTP.to_dict()).encode() + b"\n"
        head = (
            f"HTTP/1.1 {NO_HTTP.code} Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        super().connection_lost(exc)
        self._end_deadline()
        self.resume_writing()
