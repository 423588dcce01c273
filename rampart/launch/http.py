"""Start Rampart's own HTTP server: workers that share a port; a new archive brings new workers."""

import os
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn
from uvicorn.supervisors import Multiprocess

from rampart.handlers.http.tokens import read_tokens
from rampart.launch.addresses import is_loopback
from rampart.launch.archives import Archives
from rampart.launch.asking import authorization, status
from rampart.launch.certificate import Certificate
from rampart.launch.connection import Connection
from rampart.launch.console import say
from rampart.launch.endpoint import LaunchError, read_model
from rampart.launch.job import Job
from rampart.launch.sample import ANY, Sample, samples_of

GRACE = 30  # seconds that a worker that stops may take for what it has begun
HUNG = 60  # seconds after which a worker that does not answer the launcher is replaced
IDLE = 75  # seconds for which a connection is kept: longer than gateways keep theirs
BACKLOG = 1024
TOKENS = "RAMPART_TOKENS"  # of the environment: the lines of a token file, or commas between them
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s | %(process)d | %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    # uvicorn's warnings are about what clients send, and could fill a disk.
    "loggers": {"uvicorn": {"level": "ERROR"}, "rampart": {"level": "INFO"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
}


@dataclass(frozen=True)
class Front:
    """What is served, where, and to whom.

    With `grpc_port` it speaks gRPC too. `tokens` is a file of lines `NAME TOKEN`, and a must beyond
    loopback; `tls` are files of a certificate chain and its key, PEM. A batch waits `delay` seconds
    for company. With `explain` it explains verdicts to who asks.
    """

    archives: tuple[Path, ...]
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    device: str = "auto"
    grpc_port: int = 0
    tokens: Path | None = None
    tls: tuple[Path, Path] | None = None
    delay: float = 0.0
    query_store: str | None = None
    quarantine: Path | None = None
    explain: bool = False

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"{'https' if self.tls else 'http'}://{_address(host, self.port)}"


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve(front: Front) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit code. Call it from the main thread.

    Prints `Rampart is ready` when a real prediction has come back, with lines to try it. An archive
    or a certificate that is replaced brings new workers; the old ones finish what they have begun.
    """
    with tempfile.TemporaryDirectory(prefix="rampart-") as folder:
        return _serve(replace(front, tokens=front.tokens or _given_tokens(Path(folder))), folder)


def _given_tokens(folder: Path) -> Path | None:
    """The tokens of the environment as a file, which only this user reads; no process inherits."""
    if not (lines := os.environ.pop(TOKENS, "")):
        return None
    file = folder / "tokens"
    file.touch(0o600)
    file.write_text(lines.replace(",", "\n"))
    return file


def _serve(front: Front, folder: str) -> int:
    try:
        models = [read_model(archive) for archive in front.archives]
        _check(front, models)
        certificate = Certificate(front.tls, Path(folder)) if front.tls else None
        if front.grpc_port:
            listen(front.host, front.grpc_port).close()  # each worker opens its own
        listener = listen(front.host, front.port)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    with listener:
        job = Job(
            archives=[str(archive.resolve()) for archive in front.archives],
            folder=folder,
            workers=front.workers,
            tokens=str(front.tokens.resolve()) if front.tokens else None,
            delay=front.delay,
            grpc=_address(front.host, front.grpc_port) if front.grpc_port else None,
            certificate=str(certificate.copy) if certificate else None,
        )
        os.environ.update(job.environment() | _settings(front))
        samples = {
            name: samples_of(archive, Path(folder) / f"samples-{number}")
            for number, (archive, (name, _)) in enumerate(zip(front.archives, models, strict=True))
        }
        try:
            archives = Archives(job)
        except LaunchError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
        return _supervise(front, samples, archives, certificate, listener)


class Workers(Multiprocess):
    """uvicorn's supervisor, which notices at once when a worker dies that it waits for."""

    def keep_subprocess_alive(self) -> None:
        """Replace each worker that is gone."""
        for worker in self.processes:
            # While this end is open here, a killed worker's pipe has no end: HUNG would pass.
            worker.child_conn.close()
        super().keep_subprocess_alive()


def _supervise(
    front: Front,
    samples: dict[str, list[Sample]],
    archives: Archives,
    certificate: Certificate | None,
    listener: socket.socket,
) -> int:
    """Run workers until the end; returns the exit code."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # as under nohup
    supervisor = Workers(_config(front, certificate), [listener])

    def end(*_: object) -> None:
        supervisor.should_exit.set()  # at once: uvicorn would first bring all workers of a swap

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    # The end of the terminal is the end; uvicorn would begin anew.
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else end)
    ready = threading.Event()
    announce = threading.Thread(target=_announce, args=(front, samples, supervisor, ready))
    watch = threading.Thread(target=_watch, args=(archives, certificate, supervisor, ready))
    for thread in (announce, watch):
        thread.daemon = True
        thread.start()
    supervisor.run()
    watch.join()  # or the trial of a new archive would outlive us
    return 0 if ready.is_set() else 1


def _settings(front: Front) -> dict[str, str]:
    """What overrides an archive's settings, as variables of the environment."""
    store, folder = front.query_store, front.quarantine
    settings = {
        "RAMPART_DEVICE": front.device,
        "RAMPART_EXPLAIN": "true" if front.explain else None,
        "RAMPART_QUERY_STORE": store if not store or "://" in store else str(Path(store).resolve()),
        "RAMPART_QUARANTINE": str(folder.resolve()) if folder else None,
    }
    return {name: value for name, value in settings.items() if value}


def _config(front: Front, certificate: Certificate | None) -> uvicorn.Config:
    return uvicorn.Config(
        "rampart.launch.worker:open_application",
        factory=True,
        workers=front.workers,
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=LOGGING,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=GRACE,
        timeout_worker_healthcheck=HUNG,
        ssl_certfile=certificate.copy if certificate else None,
    )


def _check(front: Front, models: list[tuple[str, str]]) -> None:
    if doubled := [model for model in models if models.count(model) > 1]:
        name, version = doubled[0]
        raise LaunchError(
            f"two archives have the name and version {name} {version}: rename one, or give it"
            " another --model-version"
        )
    if not is_loopback(front.host) and not front.tokens:
        raise LaunchError(
            f"{front.host} is open to other machines: pass a token file (--tokens), tokens in"
            f" {TOKENS}, or serve on 127.0.0.1 behind a gateway"
        )
    if front.workers < 1:
        raise LaunchError(f"--workers {front.workers}: at least one worker is needed")
    try:
        if front.tokens:
            read_tokens(front.tokens)
    except (OSError, ValueError) as error:
        raise LaunchError(str(error)) from error


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address. Raises LaunchError where it cannot be used."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise LaunchError(
            f"port {port} on {host} cannot be used: {error.strerror}. Stop what listens"
            " there, or choose another"
        ) from error
    listener.set_inheritable(True)
    return listener


def _announce(
    front: Front, samples: dict[str, list[Sample]], supervisor: Multiprocess, ready: threading.Event
) -> None:
    """Say when each model has answered, with a picture to try each with."""
    waiting = list(samples)
    while waiting and not supervisor.should_exit.is_set():
        waiting = [name for name in waiting if _predict(front, name) != 200]
        time.sleep(0.1)
    if waiting:
        return
    ready.set()
    token = '-H "Authorization: Bearer $TOKEN" ' if front.tokens else ""
    trust = f"--cacert {shlex.quote(str(front.tls[0]))} " if front.tls else ""
    lines = [
        sample.curl(f"{trust}{token}", f"{front.url}/predictions/{name}")
        for name, pictures in samples.items()
        for sample in pictures
    ]
    say("\n".join(["Rampart is ready", *lines]))


def _predict(front: Front, name: str) -> int:
    """Status of one prediction; 0 without an answer."""
    chain = front.tls[0] if front.tls else None
    headers = authorization(front.tokens) if front.tokens else {}
    return status(f"{front.url}/predictions/{name}", ANY.file.read_bytes(), headers, chain)


def _watch(
    archives: Archives,
    certificate: Certificate | None,
    supervisor: Multiprocess,
    ready: threading.Event,
) -> None:
    """Have workers replaced one after the other when what they have opened is, and is good."""
    while not supervisor.should_exit.wait(1.0):
        if not ready.is_set():
            continue
        changed = ["An archive"] if archives.renew(supervisor.should_exit) else []
        changed += ["The certificate"] if certificate and certificate.renew() else []
        if changed:
            supervisor.signal_queue.append(signal.SIGHUP)
        for what in changed:
            say(f"{what} has changed: new workers take over")
