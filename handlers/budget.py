"""How long a batch may take, and which of its pictures come first.

TorchServe replaces a worker that does not answer in time, and drops its other requests too. So a
batch ends well before that. And a few clients with huge pictures must not hold up all others:
beside cheap pictures, dear ones get the worker's idle time and a tenth of the rest. Explanations
get as much once more, whatever is beside them: one takes the graph for as long as 65 pictures.
"""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from rampart.handlers.errors import BUSY, DEAR_BUSY, TOO_SLOW, ImageError

Result = TypeVar("Result")
BATCH_SECONDS = 10.0  # below half of the 30 that an archive's responseTimeout allows
REQUEST_SECONDS = 2.0  # to decode the images of one request
DEAR = 2**18  # a picture that costs more pixels is dear: it takes some milliseconds
SHARE = 0.1  # of a busy worker's time goes to dear pictures
MAX_CREDIT = 1.0  # seconds of that time that a worker saves up, for each of the two


class Budget:
    """The time of one worker, by `clock` in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._ended = clock()
        self._credit = MAX_CREDIT  # seconds for dear pictures
        self._explaining = MAX_CREDIT  # seconds for explanations
        self._reserved = self._last = 0.0  # for those of this batch; what the last one took

    def begin(self) -> None:
        """A batch begins; until now the worker was idle."""
        self._began = self._clock()
        self._reserved = 0.0
        self._earn(self._began - self._ended)

    def end(self) -> None:
        """The batch is answered."""
        self._ended = self._clock()
        self._earn(SHARE * (self._ended - self._began))

    def _earn(self, seconds: float) -> None:
        self._credit = min(MAX_CREDIT, self._credit + seconds)
        self._explaining = min(MAX_CREDIT, self._explaining + seconds)

    def may_explain(self) -> bool:
        """Whether there is time for one more explanation in this batch; if so, it is kept free."""
        free = self._explaining > self._reserved
        self._reserved += self._last if free else 0.0
        return free

    def explain(self, task: Callable[[], Result]) -> Result:
        """What `task` gives, at the expense of the time for explanations."""
        began = self._clock()
        try:
            return task()
        finally:
            self._last = self._clock() - began
            self._explaining -= self._last

    def is_spent(self) -> bool:
        """Whether the batch has used up its time."""
        return self._clock() - self._began > BATCH_SECONDS

    def spend(
        self, work: Sequence[tuple[int, int]], task: Callable[[int], Result]
    ) -> list[Result | ImageError]:
        """`task(i)` for each (request, cost) of `work`, cheap work first, or an error in its place.

        Costs are in pixels, as in `handlers.image.Picture`.
        """
        results: list[Result | ImageError] = [BUSY] * len(work)
        dear = {request for request, cost in work if cost > DEAR}
        contended = any(request not in dear for request, _ in work)
        spent: dict[int, float] = {}
        for at in sorted(range(len(work)), key=lambda at: work[at][1]):
            request, cost = work[at]
            if self.is_spent():
                break
            if spent.get(request, 0.0) > REQUEST_SECONDS:
                results[at] = TOO_SLOW
            elif cost > DEAR and contended and self._credit <= 0:
                results[at] = DEAR_BUSY
            else:
                began = self._clock()
                results[at] = task(at)
                duration = self._clock() - began
                spent[request] = spent.get(request, 0.0) + duration
                self._credit -= duration if cost > DEAR else 0.0
        return results
