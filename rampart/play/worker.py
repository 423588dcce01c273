"""A thread for what would hold up a server."""

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Worker:
    """Does one task after the other. Its thread never ends while the process lives.

    With threads that ended before Python did, about one end in forty aborted the process (on a
    busy machine, torch 2.12). Why is not known.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def do(self, task: Callable[..., Any], *arguments: Any) -> "asyncio.Future[Any]":
        """What `task` returns or raises, once those before it are done."""
        future: Future[Any] = Future()
        self._tasks.put((future, lambda: task(*arguments)))
        return asyncio.wrap_future(future)

    def _work(self) -> None:
        while True:
            self._one(*self._tasks.get())

    def _one(self, future: Future[Any], task: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return  # whoever asked has gone
        try:
            future.set_result(task())
        except Exception as error:
            future.set_exception(error)
