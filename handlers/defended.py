"""The TorchServe handler: requests to images, images through the graph, verdicts to JSON.

TorchServe imports this file by its own name and wants exactly one class in it.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np

from handlers import wire
from handlers.budget import BUSY, RETRY, Budget
from handlers.cores import available_cores
from handlers.engine import Engine, EngineError, Runs
from handlers.image import (
    MAX_IMAGES,
    MAX_PIXELS,
    Allowance,
    ImageError,
    Picture,
    default_pixels,
    examine,
    fit,
)
from handlers.open_inference import Answer, Pixels
from handlers.plan import PlanEngine
from handlers.protocol import Request, plain, read, reading_cost
from handlers.quarantine import Quarantine
from handlers.queries import ENTRIES, PAUSE, Response, Watch
from handlers.stores import FolderError, LateStore, Store, open_store
from handlers.summary import summary
from handlers.telemetry import Metrics
from handlers.verdict import Calibration, Judge, Policy, Verdict

logger = logging.getLogger(__name__)

HASHES = "sha256.json"
# What runs inside the worker is packed beside the graph; the launcher stays outside.
NEEDED = (
    "graph.onnx",
    "calibration.json",
    "card.json",
    "labels.json",
    "handlers/__init__.py",
    "handlers/budget.py",
    "handlers/containers.py",
    "handlers/cores.py",
    "handlers/defended.py",
    "handlers/image.py",
    "handlers/engine.py",
    "handlers/plan.py",
    "handlers/private_folder.py",
    "handlers/verdict.py",
    "handlers/protocol.py",
    "handlers/open_inference.py",
    "handlers/quarantine.py",
    "handlers/queries.py",
    "handlers/stores.py",
    "handlers/summary.py",
    "handlers/telemetry.py",
    "handlers/wire.py",
)
# Headers of a request that its answer repeats; TorchServe writes an x-request-id of its own.
ECHOED = {"x-request-id": "x-client-request-id", "traceparent": "traceparent"}
# What the management API's question for a description comes without, and a prediction with.
PREDICTION = {"url_path", "explain", "content-type"}
TOO_SIMILAR = ImageError(
    429,
    "similar_query",
    f"the image is nearly one of a moment ago: wait {PAUSE:g} s before you send another like it",
)
PLAN = "graph.plan"  # of TensorRT; an archive may hold one beside the graph
POLICY = {"false_alarm_rate", "on_detection", "on_failure", "detail"}
QUERIES = {"query_store", "on_query_attack", "query_owner", "query_expiry", "query_capacity"}
SETTINGS = POLICY | QUERIES | {"threads", "device", "quarantine", "max_pixels"}
MAX_REPLY = 1 << 22  # bytes; TorchServe ends a worker whose reply has more than 6,553,500
TOO_LONG = ImageError(
    500, "reply_too_long", "the answer is too long to send: ask about fewer images at once"
)
QUERY_WAIT = 1.0  # seconds that answers wait for the query store once the graph is done


class DefendedHandler:
    """One defended classifier behind TorchServe. No request's fault reaches another request."""

    def initialize(self, context: Any) -> None:
        """Check the archive's hashes, load it, run the graph once.

        Raises ValueError, which ends the worker with one line that names the file and the remedy.
        """
        try:
            self._load(context)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"Rampart cannot serve this archive: {reason}") from None

    def _load(self, context: Any) -> None:
        wire.bound()
        logging.getLogger("PIL").setLevel(logging.CRITICAL)  # or pictures could fill the log
        warnings.filterwarnings("ignore", module="PIL")
        folder = Path(context.system_properties["model_dir"])
        verify(folder)
        settings = context.model_yaml_config.get("rampart") or {}
        told = os.environ.get("RAMPART_WORKERS") or context.model_yaml_config.get("maxWorkers")
        workers = int(told or 1)
        labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        card = json.loads((folder / "card.json").read_bytes())
        self._summary = summary(card)
        self._judge = Judge(
            labels=tuple(map(str, labels)),
            calibration=Calibration.load(folder / "calibration.json"),
            policy=read_policy(settings),
            model={
                "name": context.model_name,
                "version": str(context.manifest["model"].get("modelVersion", "")),
            },
        )
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="queries")
        self._looked: Future[list[Response | None]] | None = None  # how the store answered last
        self._watch = read_watch(settings, context.model_name)
        self._owner = str(settings.get("query_owner") or "").lower()
        aside = os.environ.get("RAMPART_QUARANTINE") or settings.get("quarantine")
        self._quarantine = Quarantine(Path(aside)) if aside else None
        device = os.environ.get("RAMPART_DEVICE") or settings.get("device", "cpu")
        gpu = context.system_properties.get("gpu_id") or 0
        self._engine = load_engine(folder, device, threads_for(workers, settings), gpu)
        self._size = self._engine.image_shape[0]
        self._max_pixels = read_max_pixels(settings, self._size)
        self._budget = Budget()
        calibration = self._judge.calibration
        self._metrics = Metrics(context.metrics, context.model_name, calibration.images)
        self._judge_zeros()
        logger.info("Rampart serves on %s", self._engine.device)
        precision = card.get("precision", "fp32")
        known = (self._engine.device, precision, calibration.variant)
        self._metrics.set("rampart_engine_info", 1, *known)
        self._metrics.set("rampart_false_alarm_rate", self._judge.policy.false_alarm_rate)
        if self._watch:
            self._aside.submit(self._begin_watch, self._watch)
        self._metrics.start()

    def _judge_zeros(self) -> None:
        """Fail now, and not at the first request, if graph, calibration and labels do not fit."""
        self._infer([np.zeros(self._engine.image_shape, dtype=np.uint8)])

    def handle(self, data: Sequence[Mapping[str, object]], context: Any) -> list[bytes]:
        """Answer a batch of requests, one JSON body each; statuses go to the context."""
        self._budget.begin()
        with self._metrics.busy():
            with self._timed("decode"):
                requests = self._requests(data, context)
                images = self._decoded(requests)
                owners = [
                    self._owner_of(context.get_all_request_header(index))
                    for index, asked in enumerate(requests)
                    for _ in asked.images
                ]
            looked = self._ask_store(images, owners)
            with self._timed("graph"):
                answers = self._infer_all(images)
            responses = self._responses(looked, len(images))
            judged = map(self._judged, images, answers, responses)
            with self._timed("response"):
                replies = [
                    _replied(asked, [next(judged) for _ in asked.images]) for asked in requests
                ]
                bodies = [
                    self._respond(context, index, reply) for index, reply in enumerate(replies)
                ]
            if self._quarantine:
                self._metrics.set("rampart_quarantine_up", float(self._quarantine.works))
        self._budget.end()
        return bodies

    def _decoded(self, requests: Sequence[Request]) -> list[Pixels | ImageError]:
        """The pixels of all images of a batch, in order, or what is wrong with each."""
        pictures = [
            (index, picture)
            for index, asked in enumerate(requests)
            for picture in examined(asked.images, self._size, self._max_pixels)
        ]
        costs = [
            (index, picture.cost if isinstance(picture, Picture) else 0)
            for index, picture in pictures
        ]
        return self._budget.spend(costs, lambda at: pixels_of(pictures[at][1], self._size))

    def _requests(self, data: Sequence[Mapping[str, object]], context: Any) -> list[Request]:
        """The requests of a batch; one that takes long to read may be put off."""

        def reading(index: int) -> Request:
            return self._read(data[index], context.get_all_request_header(index))

        costs = [(index, reading_cost(fields)) for index, fields in enumerate(data)]
        return [
            Request([asked], plain) if isinstance(asked, ImageError) else asked
            for asked in self._budget.spend(costs, reading)
        ]

    def _read(self, fields: Mapping[str, object], headers: Mapping[str, object]) -> Request:
        """One request. TorchServe asks for a description by a header, which any client can send."""
        described = headers.get("describe") == "True" and not fields
        if described and PREDICTION.isdisjoint(map(str.lower, headers)):
            return Request([], lambda _: (200, self._summary))
        try:
            return read(fields, headers)
        except Exception as error:
            return Request([_unexpected(error)], plain)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._metrics.observe("rampart_stage_seconds", time.perf_counter() - began, stage)

    def _owner_of(self, headers: Mapping[str, object]) -> str:
        """Whose query it is, by the header that the operator's gateway writes."""
        known = {name.lower(): value for name, value in headers.items()} if self._owner else {}
        return str(known.get(self._owner, ""))

    def _ask_store(
        self, images: Sequence[Pixels | ImageError], owners: Sequence[str]
    ) -> Future[list[Response | None]] | None:
        """Look for near queries beside the graph, which computes without Python: so a store adds
        hardly any latency. One that still has not answered is asked nothing more."""
        if self._watch is None or (self._looked and not self._looked.done()):
            return None
        self._looked = self._aside.submit(self._watched, self._watch, images, owners)
        return self._looked

    def _responses(
        self, looked: Future[list[Response | None]] | None, count: int
    ) -> list[Response | None]:
        """What the store says of each image; nothing where it takes too long: a name server or a
        lock that hangs must not hold up predictions."""
        if looked is None:
            return [None] * count
        if wait([looked], QUERY_WAIT).done:
            return looked.result()
        logger.error("No watch for query attacks: the store has not answered for %g s", QUERY_WAIT)
        self._metrics.set("rampart_query_store_up", 0.0)
        return [None] * count

    def _begin_watch(self, watch: Watch) -> None:
        watch.begin()
        self._metrics.set("rampart_query_store_up", float(watch.up))

    def _watched(
        self, watch: Watch, images: Sequence[Pixels | ImageError], owners: Sequence[str]
    ) -> list[Response | None]:
        """What becomes of each image because of those before it, None for nothing."""
        with self._timed("queries"):
            read = {i: image for i, image in enumerate(images) if not isinstance(image, ImageError)}
            seen = watch.look(list(read.values()), [owners[i] for i in read])
        self._metrics.set("rampart_query_store_up", float(watch.up))
        for response in filter(None, seen):
            self._metrics.count("rampart_query_alerts_total", response)
        responses = dict(zip(read, seen, strict=True))
        return [responses.get(i) for i in range(len(images))]

    def _infer_all(self, images: Sequence[Pixels | ImageError]) -> list[Verdict | ImageError]:
        """A whole batch by few runs of the graph; what is left when its time is up is put off."""
        pixels = [image for image in images if not isinstance(image, ImageError)]
        verdicts: list[Verdict | ImageError] = []
        for start in range(0, len(pixels), MAX_IMAGES):
            some = pixels[start : start + MAX_IMAGES]
            if self._budget.is_spent():
                verdicts += [BUSY] * len(some)
                continue
            self._metrics.observe("rampart_batch_images", len(some))
            verdicts += self._try_infer(some)
        each = iter(verdicts)
        return [image if isinstance(image, ImageError) else next(each) for image in images]

    def _judged(
        self,
        image: Pixels | ImageError,
        answer: Verdict | ImageError,
        response: Response | None,
    ) -> Answer:
        """An image's answer, once it is counted, and kept where that is wanted."""
        if self._quarantine and isinstance(answer, Verdict) and answer.detected:
            assert not isinstance(image, ImageError)
            self._quarantine.keep(image, answer)
        answer = _after_query(answer, response)
        if isinstance(answer, ImageError):
            self._metrics.count("rampart_images_total", "error")
            self._metrics.count("rampart_errors_total", answer.type)
            return answer.code, _error(answer)
        self._metrics.judged(answer, "query" if response == "reject" else None)
        return 200, answer.to_dict()

    def _try_infer(self, pixels: Sequence[Pixels]) -> list[Verdict | ImageError]:
        """Verdicts; if the batch fails, image by image, so that only the image at fault fails."""
        try:
            return list(self._infer(pixels))
        except Exception as error:
            if len(pixels) > 1:
                return [answer for image in pixels for answer in self._try_infer([image])]
            # Not the message: TorchServe reads meaning into some.
            logger.error("The graph failed on an image: %s", type(error).__name__)
            return [ImageError(500, "engine_failure", "the model failed on this image: retry")]

    def _infer(self, pixels: Sequence[Pixels]) -> list[Verdict]:
        outputs = self._engine.run(np.stack(pixels))  # (N, H, W, 3)
        return self._judge.verdicts(outputs.logits, outputs.raw_logits, outputs.scores)

    def _respond(self, context: Any, index: int, answer: Answer) -> bytes:
        """One request's body; its status too. Phrases are HTTP's own: others can end a worker."""
        code, body = answer
        reply = json.dumps(body, allow_nan=False).encode() + b"\n"
        if len(reply) > MAX_REPLY:
            code, reply = TOO_LONG.code, json.dumps(_error(TOO_LONG)).encode() + b"\n"
        context.set_response_status(code, HTTPStatus(code).phrase, index)
        context.set_response_content_type(index, "application/json")
        if code in (TOO_SIMILAR.code, BUSY.code):
            wait = PAUSE if code == TOO_SIMILAR.code else RETRY
            context.set_response_header(index, "Retry-After", f"{wait:.0f}")
        headers = {
            name.lower(): str(value)
            for name, value in context.get_all_request_header(index).items()
        }
        if "content-length" not in headers:
            # So the call came by gRPC. One that streams ends the worker where this is not said.
            context.set_response_header(index, "ts_stream_next", "false")
        for name, echo in ECHOED.items():
            if re.fullmatch(r"[!-~]{1,256}", headers.get(name, "")):  # a line break would end it
                context.set_response_header(index, echo, headers[name])
        self._metrics.count("rampart_requests_total", str(code))
        return reply


def verify(folder: Path) -> None:
    """Check every listed file's SHA-256. Raises ValueError that names the file and the remedy."""
    try:
        listed = json.loads((folder / HASHES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{HASHES} is missing or unreadable: build the archive anew") from error
    for name in NEEDED:
        if name not in listed:
            raise ValueError(f"{name} is not listed in {HASHES}: build the archive anew")
    if (folder / PLAN).exists() and PLAN not in listed:
        raise ValueError(f"{PLAN} is not listed in {HASHES}, and is code: build the archive anew")
    for name, digest in listed.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing from the archive: build the archive anew")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError(
                f"{name} is not the file that was packed (its SHA-256 differs from {HASHES}):"
                " build the archive anew, or fetch it again"
            )


def load_engine(folder: Path, device: str, threads: int, gpu: int) -> Runs:
    """What runs an unpacked archive's graph: ONNX Runtime, or for the device `plan` TensorRT.

    `auto` takes a plan where there is one that works, and says so where it does not; an int8 graph
    runs on the CPU. Raises EngineError.
    """
    precision = json.loads((folder / "card.json").read_text(encoding="utf-8")).get("precision")
    if precision == "int8":
        if device not in ("cpu", "auto"):
            raise EngineError(f"an int8 archive is for CPUs, not {device}: build one with fp32")
        device = "cpu"
    if precision == "fp16" and device == "tensorrt":
        raise EngineError(
            "TensorRT's provider would compute scores in fp16 too: serve an fp16 archive with"
            " --device cuda, or pack a plan"
        )
    plan, graph = folder / PLAN, folder / "graph.onnx"
    if device == "plan" and not plan.is_file():
        raise EngineError(f"the archive has no {PLAN}: `rampart archive --plan` packs one")
    if device in ("plan", "auto") and plan.is_file():
        try:
            return PlanEngine(plan, graph, device_id=gpu)
        except EngineError as error:
            if device == "plan":
                raise
            logger.warning("Running the graph and not its plan: %s", error)
    return Engine(graph, device, threads, device_id=gpu)


def read_policy(settings: Mapping[str, Any]) -> Policy:
    """The policy among the YAML's `rampart` settings. Raises ValueError, for unknown names too."""
    unknown = set(settings) - SETTINGS
    if unknown:
        raise ValueError(f"unknown rampart setting {sorted(unknown)}: known are {sorted(SETTINGS)}")
    return Policy(
        false_alarm_rate=float(settings.get("false_alarm_rate", Policy.false_alarm_rate)),
        on_detection=settings.get("on_detection", Policy.on_detection),
        detail=settings.get("detail", Policy.detail),
        on_failure=settings.get("on_failure", Policy.on_failure),
    )


def read_watch(settings: Mapping[str, Any], model: str) -> Watch | None:
    """The watch for query attacks, where RAMPART_QUERY_STORE or `query_store` names a store.

    Raises ValueError for settings that make no sense.
    """
    address = os.environ.get("RAMPART_QUERY_STORE") or settings.get("query_store")
    if not address:
        return None
    expiry = float(settings.get("query_expiry", 3600))
    entries = ENTRIES * int(settings.get("query_capacity", 100_000))
    make = partial(open_store, str(address), entries=entries, expiry=expiry)
    store: Store
    try:
        store = make()
    except FolderError:  # of a restart too, so the server serves without it; `begin` says so
        store = LateStore(make)
    response = settings.get("on_query_attack", "alert")
    return Watch(store, model, response=response, expiry=expiry)


def threads_for(workers: int, settings: Mapping[str, Any]) -> int:
    """Threads of one worker: RAMPART_THREADS, the YAML's `threads`, or its share of the cores."""
    chosen = os.environ.get("RAMPART_THREADS") or settings.get("threads")
    return int(chosen) if chosen else max(1, available_cores() // workers)


def read_max_pixels(settings: Mapping[str, Any], size: int) -> int:
    """How many pixels the images of a request may have: `max_pixels`, or what fits the model.

    Raises ValueError.
    """
    told = settings.get("max_pixels", default_pixels(size))
    if type(told) is not int or not size * size <= told <= MAX_PIXELS:
        raise ValueError(
            f"max_pixels must be a whole number from {size * size}, which the model takes, to"
            f" {MAX_PIXELS}"
        )
    return told


def examined(
    images: Sequence[bytes | Pixels | ImageError], size: int, max_pixels: int
) -> list[Picture | Pixels | ImageError]:
    """The images of one request by what their headers tell, or what is wrong with them."""
    allowance = Allowance(max_pixels)
    return [_examined_one(image, size, allowance) for image in images]


def _examined_one(
    image: bytes | Pixels | ImageError, size: int, allowance: Allowance
) -> Picture | Pixels | ImageError:
    try:
        return examine(image, size, allowance) if isinstance(image, bytes) else image
    except ImageError as error:
        return error.bare()
    except Exception as error:
        return _unexpected(error)


def pixels_of(image: Picture | Pixels | ImageError, size: int) -> Pixels | ImageError:
    """Pixels (size, size, 3) of an image that was examined, or what is wrong with it."""
    try:
        if isinstance(image, Picture):
            return image.pixels()
        return image if isinstance(image, ImageError) else fit(image, size)
    except ImageError as error:
        return error.bare()
    except Exception as error:
        return _unexpected(error)


def _after_query(answer: Verdict | ImageError, response: Response | None) -> Verdict | ImageError:
    """An answer to an image that is nearly one that came before, if there is a response to it."""
    if response is None or isinstance(answer, ImageError):
        return answer
    if response == "throttle":
        return TOO_SIMILAR
    if answer.detail is not None:
        answer = replace(answer, detail={**answer.detail, "similar_query": True})
    return answer.rejected() if response == "reject" else answer


def _replied(asked: Request, answers: Sequence[Answer]) -> Answer:
    try:
        return asked.reply(answers)
    except Exception as error:  # or it would be the answer to every request of the batch
        failure = _unexpected(error)
        return failure.code, _error(failure)


def _unexpected(error: Exception) -> ImageError:
    logger.error("Reading a request failed: %s", type(error).__name__)
    return ImageError(500, "internal_error", "the request could not be read: retry or report it")


def _error(error: ImageError) -> dict[str, Any]:
    return {"code": error.code, "type": error.type, "message": error.message}
