"""One process of the HTTP server, of which the launcher starts several."""

import asyncio
import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette

from rampart.handlers.http.admission import Admission
from rampart.handlers.http.application import application
from rampart.handlers.http.exposition import Exposition
from rampart.handlers.http.lane import Lane
from rampart.handlers.http.metadata import Models
from rampart.handlers.http.tokens import Tokens
from rampart.handlers.http.traces import open_traces
from rampart.handlers.telemetry import Metrics
from rampart.launch.connection import Connection
from rampart.launch.job import CONFIG, FAILED, Job
from rampart.launch.opening import open_archive, openapi
from rampart.launch.share import Share

logger = logging.getLogger(__name__)

GRACE = 20.0  # seconds that gRPC's last requests may take


def open_application() -> Starlette:
    """What uvicorn serves in this process. Ends it with one line where that cannot be opened."""
    job = Job(**json.loads(os.environ[CONFIG]))
    if launcher := multiprocessing.parent_process():
        threading.Thread(target=_outlive, args=(launcher, job.folder), daemon=True).start()
    try:
        return _application(job)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(FAILED)


def _outlive(launcher: Any, folder: str) -> None:
    """End this worker once its launcher was killed, which nobody would replace or end."""
    launcher.join()
    os.kill(os.getpid(), signal.SIGTERM)
    shutil.rmtree(folder, ignore_errors=True)


def _application(job: Job) -> Starlette:
    lanes: dict[tuple[str, str], Lane] = {}
    traces = open_traces()
    figures: list[tuple[str, Metrics]] = []
    for index, archive in enumerate(map(Path, job.archives)):
        metrics = Metrics()
        service, name, version = open_archive(
            archive, metrics, copy=job.copy_of(index), workers=job.workers
        )
        lanes[name, version] = Lane(service, metrics, delay=job.delay, traces=traces)
        figures.append((name, metrics))
    folder, refused = Path(job.folder), Metrics()  # before it is known which model is asked
    share = Share(folder)
    exposition = Exposition([*figures, ("", refused)], folder)
    admission = Admission(Tokens(Path(job.tokens)), folder, refused) if job.tokens else None
    app = application(lanes, exposition, openapi(lanes.keys()), admission)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        watch = asyncio.create_task(_watch(lanes, figures, exposition, share))
        server = await _serve_grpc(job, lanes, admission)
        yield
        if server:
            await server.stop(GRACE)
        watch.cancel()
        for lane in lanes.values():
            await asyncio.to_thread(lane.close)
        if traces:
            await asyncio.to_thread(traces.close)
        exposition.save()

    app.router.lifespan_context = lifespan
    return app


async def _serve_grpc(job: Job, lanes: Models, admission: Admission | None) -> Any:
    if not job.grpc:
        return None
    from rampart.handlers.http.inference import listen  # grpc takes time and memory

    certificate = Path(job.certificate) if job.certificate else None
    server = listen(lanes, job.grpc, admission, certificate)
    await server.start()
    return server


async def _watch(
    lanes: dict[tuple[str, str], Lane],
    figures: list[tuple[str, Metrics]],
    exposition: Exposition,
    share: Share,
) -> None:
    """Once a second: leave the figures for the others, and end the process where a batch hangs."""
    works = True
    while True:
        for lane, (_, metrics) in zip(lanes.values(), figures, strict=True):
            if not lane.alive():
                logger.error("A batch hung: this worker stops, and a new one starts")
                os._exit(1)
            metrics.set("rampart_heartbeat_seconds", int(time.time()))
        try:
            exposition.save()
            Connection.look(share)
        except OSError as error:  # a full disk must not end this watch
            if works:
                logger.error("Cannot leave figures for other workers: %s", error.strerror)
            works = False
        else:
            works = True
        await asyncio.sleep(1)
