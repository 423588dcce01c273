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
from numpy.typing import NDArray

from rampart.handlers.budget import Budget
from rampart.handlers.contents import load_engine, verify
from rampart.handlers.engine import Outputs, Runs, run_in_pieces
from rampart.handlers.errors import (
    BUSY,
    ENGINE_FAILURE,
    RETRY_AFTER,
    TOO_LONG,
    TOO_SIMILAR,
    ImageError,
    outcome,
)
from rampart.handlers.explanation import (
    NOT_EXPLAINED,
    ONE_PICTURE,
    explanation,
    occlusions,
)
from rampart.handlers.image import MAX_IMAGES, Picture, View, pictures_of, view_of
from rampart.handlers.protocols.choice import plain, read, reading_cost
from rampart.handlers.protocols.content_encoding import unpacked, unpacking_cost
from rampart.handlers.quarantine import Quarantine
from rampart.handlers.queries.lookup import Lookup, open_watch
from rampart.handlers.queries.watch import Response
from rampart.handlers.scenes import SceneJudge, SceneVerdict
from rampart.handlers.settings import read_explain, read_max_pixels, read_policy, read_threads
from rampart.handlers.summary import summary
from rampart.handlers.tasks import task_of, terms
from rampart.handlers.telemetry import Metrics
from rampart.handlers.types import Answer, Images, Incoming, Pixels, Reply, Request
from rampart.handlers.verdict import Calibration, Judge, Verdict

logger = logging.getLogger(__name__)

AnyVerdict = Verdict | SceneVerdict
# What the model sees of an image, its verdict, what it gets as one of a query attack.
Judged = tuple[View | ImageError, AnyVerdict | ImageError, Response | None]
Reasons = Mapping[str, Any] | ImageError | None

ECHOED = ("x-request-id", "traceparent")  # headers of a request that its reply repeats
_ENCODER = json.JSONEncoder(allow_nan=False)  # json.dumps would make one each time
MAX_REPLY = 1 << 22  # bytes; TorchServe ends a worker whose reply has more than 6,553,500


class Service:
    """One defended model. No request's fault reaches another request.

    It answers one batch at a time: a server with several threads calls it from one of them.
    """

    def __init__(
        self,
        engine: Runs[Any],
        judge: Judge | SceneJudge,
        card: Mapping[str, Any],
        *,
        settings: Mapping[str, Any],
        metrics: Metrics,
    ) -> None:
        # What a client may ask about.
        self.summary = summary({**card, **terms(card, settings)})
        self.policy, self.calibration = judge.policy, judge.calibration
        self.explains = read_explain(settings)
        if self.explains and not isinstance(judge, Judge):
            raise ValueError("object detectors do not explain their verdicts: leave explain out")
        # When each stage of the last batch began and ended, in ns since 1970.
        self.stages: dict[str, tuple[int, int]] = {}
        task = task_of(card)
        self.outputs = task.outputs  # as tensors
        self._fitting = task.fitting
        self._engine, self._judge, self._metrics = engine, judge, metrics
        self._size = engine.image_shape[0]
        self._max_pixels = read_max_pixels(settings, self._size)
        self._owner = str(settings.get("query_owner") or "").lower()
        self._budget = Budget()
        watch = open_watch(settings, judge.model["name"])
        folder = settings.get("quarantine")
        self._quarantine = Quarantine(Path(folder)) if folder else None
        # Fail now, and not at the first request, if graph, calibration and labels do not fit.
        blank = view_of(np.zeros(engine.image_shape, np.uint8), self._size, self._fitting)
        assert isinstance(blank, View)
        self._infer([blank])
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
            judge = load_judge(folder, card, settings, model)
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
            views = self._decode([request.images for request in requests])
            owners = [
                incoming.headers.get(self._owner, "") if self._owner else ""
                for incoming, request in zip(batch, requests, strict=True)
                for _ in request.images
            ]
        company = [len(request.images) for request in requests for _ in request.images]
        judged = self._explained(requests, list(self._judged(views, owners, company)))
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
            views = self._decode(requests)
        company = [len(images) for images in requests for _ in images]
        judged = self._judged(views, [""] * len(views), company)
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
    ) -> list[tuple[Pixels | ImageError, AnyVerdict | ImageError]]:
        """The pixels of each picture, and the verdict on them, for who has time.

        Nothing is counted, kept or compared with other queries.
        """
        views = [view_of(picture, self._size, self._fitting) for picture in pictures]
        good = [view for view in views if isinstance(view, View)]
        verdicts = iter(self._try_infer(good) if good else [])
        return [(v.pixels, next(verdicts)) if isinstance(v, View) else (v, v) for v in views]

    def _judged(
        self, views: Sequence[View | ImageError], owners: Sequence[str], company: Sequence[int]
    ) -> Iterable[Judged]:
        """Each view with its verdict, and what it gets as one of a query attack; `company` is how
        many images its request has.
        """
        images = [view.pixels if isinstance(view, View) else view for view in views]
        question = self._lookup.ask(images, owners)
        with self._timed("graph"):
            verdicts = self._infer_all(views, company)
        return zip(views, verdicts, self._lookup.responses(question, len(views)), strict=True)

    def _end(self) -> None:
        if self._quarantine:
            self._metrics.set("rampart_quarantine_up", float(self._quarantine.works))
            if dropped := self._quarantine.take_dropped():
                self._metrics.count("rampart_quarantine_dropped_total", times=dropped)
        self._budget.end()

    def refuse(self, incoming: Incoming, error: ImageError) -> Reply:
        """The reply to a request that is not answered; any thread may ask for it."""
        self._metrics.count("rampart_errors_total", error.type)
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
        if incoming.explain and not self.explains:
            return NOT_EXPLAINED
        request = outcome(read, incoming, self.outputs)
        if isinstance(request, Request) and request.explain:
            if len(request.images) != 1:
                return Request([ONE_PICTURE], request.reply)
            if not self._budget.may_explain():
                return Request([BUSY], request.reply)
        return request

    def _decode(self, requests: Sequence[Images]) -> list[View | ImageError]:
        """What the model sees of all images of a batch, in order, or what is wrong with each."""
        pictures = [
            (index, picture)
            for index, images in enumerate(requests)
            for picture in pictures_of(images, self._size, self._max_pixels)
        ]
        costs = [
            (index, picture.cost if isinstance(picture, Picture) else 0)
            for index, picture in pictures
        ]
        return self._budget.spend(
            costs, lambda at: view_of(pictures[at][1], self._size, self._fitting)
        )

    def _infer_all(
        self, views: Sequence[View | ImageError], company: Sequence[int]
    ) -> list[AnyVerdict | ImageError]:
        """Verdicts on a whole batch by few runs of the graph; BUSY for what time is up for.

        Those of the fewest images come first: a request of many must not take the time of others.
        """
        good = [(at, view) for at, view in enumerate(views) if isinstance(view, View)]
        good.sort(key=lambda item: company[item[0]])
        answers: list[AnyVerdict | ImageError] = [
            view if isinstance(view, ImageError) else BUSY for view in views
        ]
        for start in range(0, len(good), MAX_IMAGES):
            piece = good[start : start + MAX_IMAGES]
            if self._budget.is_spent():
                break
            self._metrics.observe("rampart_batch_images", len(piece))
            found = self._try_infer([view for _, view in piece])
            for (at, _), verdict in zip(piece, found, strict=True):
                answers[at] = verdict
        return answers

    def _try_infer(self, views: Sequence[View]) -> list[AnyVerdict | ImageError]:
        """Verdicts; if the batch fails, image by image, so that only the image at fault fails."""
        try:
            return list(self._infer(views))
        except Exception as error:
            if len(views) > 1:
                return [answer for view in views for answer in self._try_infer([view])]
            # Not the message: TorchServe interprets some.
            logger.error("The graph failed on an image: %s", type(error).__name__)
            return [ENGINE_FAILURE]

    def _infer(self, views: Sequence[View]) -> Sequence[AnyVerdict]:
        outputs = self._engine.run(np.stack([view.pixels for view in views]))  # (N, H, W, 3)
        return self._judge.of(outputs, views)

    def _explained(
        self, requests: Sequence[Request], judged: Sequence[Judged]
    ) -> Sequence[tuple[*Judged, Reasons]]:
        """Each image with the reasons for its verdict, where its request asks for them."""
        asked = [request.explain for request in requests for _ in request.images]
        if not any(asked):
            return [(*one, None) for one in judged]
        with self._timed("explanation"):
            return [
                (*one, self._reasons(*one) if explain else None)
                for one, explain in zip(judged, asked, strict=True)
            ]

    def _reasons(
        self, view: View | ImageError, verdict: AnyVerdict | ImageError, response: Response | None
    ) -> Reasons:
        """Why an image got its verdict; of what is refused or part of a query attack, nothing."""
        if isinstance(view, ImageError) or isinstance(verdict, ImageError) or response:
            return None
        return self._budget.explain(lambda: outcome(self._explanation, view.pixels))

    def _explanation(self, image: Pixels) -> Reasons:
        assert isinstance(self._judge, Judge)
        outputs = run_in_pieces(self._run_in_time, occlusions(image), MAX_IMAGES, Outputs)
        return explanation(image, outputs, self._judge)

    def _run_in_time(self, images: NDArray[np.uint8]) -> Any:
        if self._budget.is_spent():
            raise BUSY.bare()
        return self._engine.run(images)

    def _answer(
        self,
        view: View | ImageError,
        verdict: AnyVerdict | ImageError,
        response: Response | None,
        reasons: Reasons = None,
    ) -> Answer:
        """An image's answer; counts it, and keeps a detected image where that is wanted."""
        if self._quarantine and not isinstance(verdict, ImageError) and verdict.detected:
            assert isinstance(view, View)
            self._quarantine.keep(view.pixels, verdict)
        verdict = _after_query(verdict, response)
        verdict = _with_reasons(verdict, reasons)
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


def load_judge(
    folder: Path, card: Mapping[str, Any], settings: Mapping[str, Any], model: Mapping[str, str]
) -> Judge | SceneJudge:
    """A judge by an unpacked archive's calibration and card, and an operator's settings."""
    labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    return task_of(card).judge(
        labels=tuple(map(str, labels)),
        calibration=Calibration.load(folder / "calibration.json"),
        policy=read_policy(settings),
        model=model,
        **terms(card, settings),
    )


def _after_query(
    verdict: AnyVerdict | ImageError, response: Response | None
) -> AnyVerdict | ImageError:
    """The verdict after the response to a query attack, if there is one."""
    if response is None or isinstance(verdict, ImageError):
        return verdict
    if response == "throttle":
        return TOO_SIMILAR
    if verdict.detail is not None:
        verdict = replace(verdict, detail={**verdict.detail, "similar_query": True})
    return verdict.rejected() if response == "reject" else verdict


def _with_reasons(verdict: AnyVerdict | ImageError, reasons: Reasons) -> AnyVerdict | ImageError:
    """The verdict with its explanation, or why that failed; objects get none."""
    if not isinstance(verdict, Verdict) or reasons is None:
        return verdict
    return reasons if isinstance(reasons, ImageError) else replace(verdict, explanation=reasons)


def _json(content: Mapping[str, Any]) -> bytes:
    return _ENCODER.encode(content).encode() + b"\n"
