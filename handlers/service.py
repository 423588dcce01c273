"""Requests to images, images through the graph, verdicts to replies; for whichever server asks."""

import contextlib
import itertools
import json
import logging
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rampart.handlers.budget import Budget
from rampart.handlers.contents import load_engine, verify
from rampart.handlers.engine import Runner
from rampart.handlers.errors import (
    BUSY,
    ENGINE_FAILURE,
    RETRY_AFTER,
    TOO_LONG,
    TOO_SIMILAR,
    ImageError,
    outcome,
)
from rampart.handlers.image import MAX_IMAGES, Picture, pictures_of, pixels_of
from rampart.handlers.protocols.choice import plain, read, reading_cost
from rampart.handlers.protocols.content_encoding import unpacked, unpacking_cost
from rampart.handlers.quarantine import Quarantine
from rampart.handlers.queries.lookup import Lookup, open_watch
from rampart.handlers.queries.watch import Response
from rampart.handlers.settings import read_max_pixels, read_policy, read_threads
from rampart.handlers.summary import summary
from rampart.handlers.telemetry import Metrics
from rampart.handlers.types import Answer, Images, Incoming, Pixels, Reply, Request
from rampart.handlers.verdict import Calibration, Judge, Verdict

logger = logging.getLogger(__name__)

ECHOED = ("x-request-id", "traceparent")  # headers of a request that its reply repeats
MAX_REPLY = 1 << 22  # bytes; TorchServe ends a worker whose reply has more than 6,553,500


class Service:
    """One defended classifier. No request's fault reaches another request.

    It answers one batch at a time: a server with several threads calls it from one of them.
    """

    def __init__(
        self,
        engine: Runner,
        judge: Judge,
        card: Mapping[str, Any],
        *,
        settings: Mapping[str, Any],
        metrics: Metrics,
    ) -> None:
        self.summary = summary(card)  # what a client may ask about
        self.policy, self.calibration = judge.policy, judge.calibration
        # When each stage of the last batch began and ended, in ns since 1970.
        self.stages: dict[str, tuple[int, int]] = {}
        self._engine, self._judge, self._metrics = engine, judge, metrics
        self._size = engine.image_shape[0]
        self._max_pixels = read_max_pixels(settings, self._size)
        self._owner = str(settings.get("query_owner") or "").lower()
        self._budget = Budget()
        watch = open_watch(settings, judge.model["name"])
        folder = settings.get("quarantine")
        self._quarantine = Quarantine(Path(folder)) if folder else None
        # Fail now, and not at the first request, if graph, calibration and labels do not fit.
        self._infer([np.zeros(engine.image_shape, dtype=np.uint8)])
        precision, calibration = card.get("precision", "fp32"), judge.calibration
        metrics.calibration_images = calibration.images
        metrics.set("rampart_engine_info", 1, engine.device, precision, calibration.variant)
        metrics.set("rampart_false_alarm_rate", judge.policy.false_alarm_rate)
        self._lookup = Lookup(watch, metrics)

    @classmethod
    def open(
        cls,
        folder: Path,
        settings: Mapping[str, Any] | None = None,
        metrics: Metrics | None = None,
        *,
        name: str = "",
        version: str = "",
        workers: int | str = 1,
        gpu: int = 0,
    ) -> "Service":
        """Check the hashes of an unpacked archive, load it, run its graph once.

        `name` is the card's by default; all `workers` share the cores. Raises ValueError on one
        line that names the file and the remedy.
        """
        logging.getLogger("PIL").setLevel(logging.CRITICAL)  # pictures could fill the log
        warnings.filterwarnings("ignore", module="PIL")
        settings = settings or {}
        try:
            verify(folder)
            card = json.loads((folder / "card.json").read_bytes())
            model = {"name": name or str(card.get("name", "")), "version": version}
            judge = load_judge(folder, settings, model)
            threads = read_threads(settings, int(workers))
            engine = load_engine(folder, settings.get("device", "cpu"), threads, gpu)
            metrics = metrics or Metrics()
            service = cls(engine, judge, card, settings=settings, metrics=metrics)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"Rampart cannot serve this archive: {reason}") from None
        logger.info("Rampart serves on %s", engine.device)
        return service

    def answer(self, batch: Sequence[Incoming]) -> list[Reply]:
        """A reply to each request of a batch."""
        self.stages.clear()
        self._budget.begin()
        with self._timed("decode"):
            requests = self._read(batch)
            images = self._decode([request.images for request in requests])
            owners = [
                incoming.headers.get(self._owner, "") if self._owner else ""
                for incoming, request in zip(batch, requests, strict=True)
                for _ in request.images
            ]
        judged = self._judged(images, owners)
        with self._timed("response"):
            answers = itertools.starmap(self._answer, judged)
            parts = [[next(answers) for _ in request.images] for request in requests]
            replies = list(map(self._reply, batch, requests, parts))
        self._end()
        return replies

    def answer_images(self, requests: Sequence[Images]) -> list[list[Answer]]:
        """An answer to each image of each request, for a server that has read them itself.

        For query attacks all clients count as one.
        """
        self._budget.begin()
        with self._timed("decode"):
            images = self._decode(requests)
        judged = self._judged(images, [""] * len(images))
        with self._timed("response"):
            answers = itertools.starmap(self._answer, judged)
            parts = [[next(answers) for _ in request] for request in requests]
        self._end()
        return parts

    def examine(self, data: bytes) -> Picture | ImageError:
        """A picture as that of a request, not yet decoded, or what is wrong with it."""
        (picture,) = pictures_of([data], self._size, self._max_pixels)
        assert not isinstance(picture, np.ndarray)
        return picture

    def judge(
        self, pictures: Sequence[Picture | ImageError]
    ) -> list[tuple[Pixels | ImageError, Verdict | ImageError]]:
        """The pixels of each picture, and the verdict on them, for who has time.

        Nothing is counted, kept or compared with other queries.
        """
        images = [pixels_of(picture, self._size) for picture in pictures]
        pixels = [image for image in images if not isinstance(image, ImageError)]
        verdicts = iter(self._try_infer(pixels) if pixels else [])
        return [(i, i if isinstance(i, ImageError) else next(verdicts)) for i in images]

    def _judged(
        self, images: Sequence[Pixels | ImageError], owners: Sequence[str]
    ) -> Iterable[tuple[Pixels | ImageError, Verdict | ImageError, Response | None]]:
        """Each image with its verdict, and what it gets as one of a query attack."""
        question = self._lookup.ask(images, owners)
        with self._timed("graph"):
            verdicts = self._infer_all(images)
        return zip(images, verdicts, self._lookup.responses(question, len(images)), strict=True)

    def _end(self) -> None:
        if self._quarantine:
            self._metrics.set("rampart_quarantine_up", float(self._quarantine.works))
        self._budget.end()

    def refuse(self, incoming: Incoming, error: ImageError) -> Reply:
        """The reply to a request that is not answered; any thread may ask for it."""
        return self._reply_with(incoming, (error.code, error.to_dict()))

    def _read(self, batch: Sequence[Incoming]) -> list[Request]:
        """The requests of a batch; one that takes long to read may have to come again."""
        batch = self._unpack(batch)
        costs = [(index, reading_cost(incoming)) for index, incoming in enumerate(batch)]
        return [
            Request([request], plain) if isinstance(request, ImageError) else request
            for request in self._budget.spend(costs, lambda index: self._read_one(batch[index]))
        ]

    def _unpack(self, batch: Sequence[Incoming]) -> list[Incoming]:
        """The requests of a batch without compression, a refusal where that fails."""
        costs = [(index, unpacking_cost(incoming)) for index, incoming in enumerate(batch)]
        bodies = self._budget.spend(costs, lambda index: outcome(unpacked, batch[index]))
        return [
            incoming._replace(parts=[], refusal=body) if isinstance(body, ImageError) else body
            for incoming, body in zip(batch, bodies, strict=True)
        ]

    def _read_one(self, incoming: Incoming) -> Request | ImageError:
        if incoming.route == "describe":
            return Request([], lambda _: (200, self.summary))
        return outcome(read, incoming)

    def _decode(self, requests: Sequence[Images]) -> list[Pixels | ImageError]:
        """The pixels of all images of a batch, in order, or what is wrong with each."""
        pictures = [
            (index, picture)
            for index, images in enumerate(requests)
            for picture in pictures_of(images, self._size, self._max_pixels)
        ]
        costs = [
            (index, picture.cost if isinstance(picture, Picture) else 0)
            for index, picture in pictures
        ]
        return self._budget.spend(costs, lambda at: pixels_of(pictures[at][1], self._size))

    def _infer_all(self, images: Sequence[Pixels | ImageError]) -> list[Verdict | ImageError]:
        """Verdicts on a whole batch by few runs of the graph; BUSY for what time is up for."""
        pixels = [image for image in images if not isinstance(image, ImageError)]
        verdicts: list[Verdict | ImageError] = []
        for start in range(0, len(pixels), MAX_IMAGES):
            piece = pixels[start : start + MAX_IMAGES]
            if self._budget.is_spent():
                verdicts += [BUSY] * len(piece)
                continue
            self._metrics.observe("rampart_batch_images", len(piece))
            verdicts += self._try_infer(piece)
        in_order = iter(verdicts)
        return [image if isinstance(image, ImageError) else next(in_order) for image in images]

    def _try_infer(self, pixels: Sequence[Pixels]) -> list[Verdict | ImageError]:
        """Verdicts; if the batch fails, image by image, so that only the image at fault fails."""
        try:
            return list(self._infer(pixels))
        except Exception as error:
            if len(pixels) > 1:
                return [answer for image in pixels for answer in self._try_infer([image])]
            # Not the message: TorchServe interprets some.
            logger.error("The graph failed on an image: %s", type(error).__name__)
            return [ENGINE_FAILURE]

    def _infer(self, pixels: Sequence[Pixels]) -> list[Verdict]:
        outputs = self._engine.run(np.stack(pixels))  # (N, H, W, 3)
        return self._judge.verdicts(outputs.logits, outputs.raw_logits, outputs.scores)

    def _answer(
        self,
        image: Pixels | ImageError,
        verdict: Verdict | ImageError,
        response: Response | None,
    ) -> Answer:
        """An image's answer; counts it, and keeps a detected image where that is wanted."""
        if self._quarantine and isinstance(verdict, Verdict) and verdict.detected:
            assert not isinstance(image, ImageError)
            self._quarantine.keep(image, verdict)
        verdict = _after_query(verdict, response)
        if isinstance(verdict, ImageError):
            self._metrics.count("rampart_images_total", "error")
            self._metrics.count("rampart_errors_total", verdict.type)
            return verdict.code, verdict.to_dict()
        self._metrics.count_verdict(verdict, "query" if response == "reject" else None)
        return 200, verdict.to_dict()

    def _reply(self, incoming: Incoming, request: Request, answers: Sequence[Answer]) -> Reply:
        """A request's reply out of the answers to its images."""
        # An error here must not become the answer to every request of the batch.
        answer = outcome(request.reply, answers)
        if isinstance(answer, ImageError):
            return self.refuse(incoming, answer)
        return self._reply_with(incoming, answer)

    def _reply_with(self, incoming: Incoming, answer: Answer) -> Reply:
        status, content = answer
        body = _json(content)
        if len(body) > MAX_REPLY:
            status, body = TOO_LONG.code, _json(TOO_LONG.to_dict())
        headers = {"content-type": "application/json"}
        if status in RETRY_AFTER:
            headers["retry-after"] = f"{RETRY_AFTER[status]:.0f}"
        for name in ECHOED:
            value = incoming.headers.get(name, "")
            if re.fullmatch(r"[!-~]{1,256}", value):  # a line break would end the header
                headers[name] = value
        self._metrics.count("rampart_requests_total", str(status))
        return Reply(status, headers, body)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began, at = time.perf_counter(), time.time_ns()
        yield
        self.stages[stage] = (at, time.time_ns())
        self._metrics.observe("rampart_stage_seconds", time.perf_counter() - began, stage)


def load_judge(folder: Path, settings: Mapping[str, Any], model: Mapping[str, str]) -> Judge:
    """A judge by an unpacked archive's calibration and an operator's settings."""
    labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    return Judge(
        labels=tuple(map(str, labels)),
        calibration=Calibration.load(folder / "calibration.json"),
        policy=read_policy(settings),
        model=model,
    )


def _after_query(verdict: Verdict | ImageError, response: Response | None) -> Verdict | ImageError:
    """The verdict after the response to a query attack, if there is one."""
    if response is None or isinstance(verdict, ImageError):
        return verdict
    if response == "throttle":
        return TOO_SIMILAR
    if verdict.detail is not None:
        verdict = replace(verdict, detail={**verdict.detail, "similar_query": True})
    return verdict.rejected() if response == "reject" else verdict


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False).encode() + b"\n"
