"""Looks queries up while the graph runs, which needs no Python: so a store adds hardly any latency,
and one that hangs holds up no answer."""

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from rampart.handlers.errors import ImageError
from rampart.handlers.queries.stores import open_store
from rampart.handlers.queries.watch import ENTRIES, RETRY, Response, Watch
from rampart.handlers.telemetry import Metrics
from rampart.handlers.types import Pixels

logger = logging.getLogger(__name__)

QUERY_WAIT = 0.15  # seconds that answers wait for the query store once the graph is done
Responses = list[Response | None]  # to each image, None for none


def open_watch(settings: Mapping[str, Any], model: str) -> Watch | None:
    """The watch for query attacks, None without a `query_store`.

    Raises ValueError for settings that make no sense.
    """
    address = settings.get("query_store")
    if not address:
        return None
    expiry = float(settings.get("query_expiry", 3600))
    entries = ENTRIES * int(settings.get("query_capacity", 100_000))
    store = open_store(str(address), entries=entries, expiry=expiry)
    response = settings.get("on_query_attack", "alert")
    return Watch(store, model, response=response, expiry=expiry)


class Lookup:
    """Asks a watch about batch after batch, in a thread of its own; without a watch, nothing."""

    def __init__(self, watch: Watch | None, metrics: Metrics) -> None:
        self._watch, self._metrics = watch, metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="queries")
        self._last: Future[Responses] | None = None
        self._slow, self._resume = False, 0.0  # when a store that was slow is asked again
        if watch:
            self._thread.submit(self._begin, watch)

    def ask(
        self, images: Sequence[Pixels | ImageError], owners: Sequence[str]
    ) -> Future[Responses] | None:
        """Start to look for near queries, unless the store has not answered the last question, or
        answered it late a short while ago.
        """
        if self._watch is None or (self._last and not self._last.done()):
            return None
        if time.monotonic() < self._resume:
            return None
        self._last = self._thread.submit(self._look, self._watch, images, owners)
        return self._last

    def responses(self, question: Future[Responses] | None, count: int) -> Responses:
        """The response to each of `count` images, none where the store takes too long: a name
        server or a lock that hangs must not hold up predictions, nor may one that is slow."""
        if self._watch is None or question is None:
            return [None] * count
        in_time = bool(wait([question], QUERY_WAIT).done)
        if not in_time:
            self._resume = time.monotonic() + RETRY
            if not self._slow:
                logger.error("Query attacks are not detected: the store took over %g s", QUERY_WAIT)
        self._slow = not in_time
        self._metrics.set("rampart_query_store_up", float(in_time and self._watch.up))
        return question.result() if in_time else [None] * count

    def _begin(self, watch: Watch) -> None:
        watch.begin()
        self._metrics.set("rampart_query_store_up", float(watch.up))

    def _look(
        self, watch: Watch, images: Sequence[Pixels | ImageError], owners: Sequence[str]
    ) -> Responses:
        began = time.perf_counter()
        pixels = {i: image for i, image in enumerate(images) if not isinstance(image, ImageError)}
        responses = watch.look(list(pixels.values()), [owners[i] for i in pixels])
        self._metrics.observe("rampart_stage_seconds", time.perf_counter() - began, "queries")
        for response in filter(None, responses):
            self._metrics.count("rampart_query_alerts_total", response)
        by_index = dict(zip(pixels, responses, strict=True))
        return [by_index.get(i) for i in range(len(images))]
