"""Ray Serve: the HTTP of our own server, in replicas that Ray places, scales and replaces.

    serve run rampart.ray:app archive=/models/cifar10.mar

Each replica opens the archive where it runs, so all nodes need it under the same path.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.metrics import Counter, Gauge
from starlette.applications import Starlette

from rampart.handlers.hand_over import HandOver
from rampart.handlers.http.admission import Admission
from rampart.handlers.http.application import application
from rampart.handlers.http.exposition import Exposition
from rampart.handlers.http.lane import ANSWER_SECONDS, CAPACITY, Lane
from rampart.handlers.http.tokens import Tokens, read_tokens
from rampart.handlers.telemetry import Labels, Metrics, declared
from rampart.handlers.types import Incoming
from rampart.launch.opening import open_archive, openapi

ARCHIVE, TOKENS = "RAMPART_ARCHIVE", "RAMPART_TOKENS"  # of the environment


# No `serve.batch`: what has come while the graph runs is the next batch, and a lone request waits
# for none. So many requests are let in as a replica holds.
@serve.deployment(max_ongoing_requests=CAPACITY, health_check_period_s=5)
@serve.ingress()
class Rampart:
    """One replica: answers over HTTP, and other deployments by its handle."""

    def __init__(self, archive: str, tokens: str | None) -> None:
        # Ray says there how many cores a replica has.
        if cores := os.environ.get("OMP_NUM_THREADS"):
            os.environ.setdefault("RAMPART_THREADS", cores)
        self._folder = tempfile.TemporaryDirectory(prefix="rampart-")  # of buckets of tokens
        self._metrics = metrics = Metrics()
        service, self._name, self._version = open_archive(Path(archive), metrics)
        self._lane = Lane(service, metrics)
        if tokens:
            read_tokens(Path(tokens))  # or a mistake would show in the log alone
        self._tokens = Tokens(Path(tokens)) if tokens else None
        # Ray shows no gauge that was not set within its last intervals.
        HandOver(metrics, Sinks(), self._name, forgets=True).start()

    def __serve_build_asgi_app__(self) -> Starlette:
        """As Ray calls it in a replica. Figures are among Ray's own, and not at /metrics."""
        models, folder = {(self._name, self._version): self._lane}, Path(self._folder.name)
        tokens = self._tokens
        admission = Admission(tokens, folder, self._metrics) if tokens else None
        return application(models, Exposition((), folder), openapi(models.keys()), admission)

    async def predict(self, picture: bytes) -> dict[str, Any]:
        """The verdict on one encoded picture, or the error with its `code`, for other deployments.

        It wants no token.
        """
        reply = await self._lane.answer(Incoming({}, [picture]), seconds=ANSWER_SECONDS)
        verdict: dict[str, Any] = json.loads(reply.body)
        return verdict

    def check_health(self) -> None:
        """As Ray calls it, which replaces a replica for which this raises."""
        if not self._lane.alive():
            raise RuntimeError("a batch has hung: this replica must be replaced")


class Sinks:
    """Ray's metrics under our names, as HandOver takes those of TorchServe."""

    def __init__(self) -> None:
        self.cache = {
            kind: {name: Sink(kind, name, labels) for name, labels in names.items()}
            for kind, names in declared().items()
        }


class Sink:
    """One metric of Ray's."""

    def __init__(self, kind: str, name: str, labels: Labels) -> None:
        self._labels = labels
        metric = (Counter if kind == "counter" else Gauge)(name, tag_keys=labels)
        self._record = metric.inc if kind == "counter" else metric.set
        self._least = 0.0 if kind == "counter" else -float("inf")

    def add_or_update(self, value: float, labels: Sequence[str]) -> None:
        """Add to a counter, which takes no zero, or set a gauge."""
        if value > self._least:
            self._record(value, dict(zip(self._labels, labels, strict=True)))


def app(arguments: Mapping[str, str]) -> serve.Application:
    """The application of one archive, by the arguments `archive` and, where wanted, `tokens`.

    Raises ValueError for other arguments, and for tokens that it could not hand on in secret.
    """
    if unknown := set(arguments) - {"archive", "tokens"}:
        raise ValueError(f"unknown argument {min(unknown)}: use archive and tokens")
    archive = arguments.get("archive") or os.environ.get(ARCHIVE)
    if not archive:
        raise ValueError(f"no archive: pass archive=FILE, or set {ARCHIVE}")
    tokens = arguments.get("tokens")
    if not tokens and os.environ.get(TOKENS):
        raise ValueError(
            f"{TOKENS} is set, but Ray would show the tokens to who sees its applications: write"
            " its lines to a file on each node, and pass tokens=FILE"
        )
    deployment: Any = Rampart  # which the decorators have made of it
    return deployment.bind(archive, tokens)
