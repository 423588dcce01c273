"""Start TorchServe on one archive, say when it really answers, leave nothing behind but logs.

It runs beside the server, not in it: it imports neither torch nor TorchServe.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rampart.launch import java, logs, management
from rampart.launch.client import SOCKET, Client
from rampart.launch.console import say
from rampart.launch.endpoint import (
    Endpoint,
    LaunchError,
    port_error,
    redis_failure,
)
from rampart.launch.listeners import shut_listeners
from rampart.launch.sample import Sample, samples_of
from rampart.launch.watch import Watch

GRAY = java.DATA / "gray.png"  # 32x32: no server refuses it for its size
START_SECONDS = 900.0
SHORT = "/tmp"  # for where TMPDIR is too long
SOCKET_BYTES = 100  # that the path of a unix socket may have, and a bit
STARTED = "Model server started."  # Java prints it when all its listeners are open


class Stopped(Exception):
    """A signal came while the server was being waited for."""


def serve(endpoint: Endpoint) -> int:
    """Serve a `.mar` until Ctrl-C or SIGTERM; returns the exit code.

    Prints `Rampart is ready` once a real prediction has come back, with curl lines to try it. Call
    it from the main thread: it handles signals.
    """
    try:
        endpoint.check()
        with _stop_on_signal() as stop, _work_folder() as work:
            _serve(endpoint, work, stop)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _serve(endpoint: Endpoint, work: Path, stop: threading.Event) -> None:
    """Serve until `stop` is set, with nothing left running at the end. Raises LaunchError."""
    try:
        folder = logs.place(endpoint.log_folder, endpoint.name, endpoint.port, work)
    except OSError as error:
        raise LaunchError(f"cannot write logs to {endpoint.log_folder}: {error}") from error
    if failure := endpoint.query_store and redis_failure(endpoint.query_store):
        say(f"warning: query attacks are not detected until Redis answers ({failure})")
    client = Client(endpoint, work)
    with _door(client):
        say(
            f"Starting TorchServe for {endpoint.name}: predictions on"
            f" {endpoint.host}:{endpoint.port}, management and metrics on"
            f" 127.0.0.1:{endpoint.port + 1} and {endpoint.port + 2},"
            f" {endpoint.workers} worker(s) on {endpoint.device}, logs in {folder}"
        )
        process = java.start(endpoint, work, folder)
        try:
            with java.guarded(process, work):
                samples = samples_of(endpoint.archive, work / "samples")
                _Run(endpoint, client, process, folder, stop, samples).run()
        except Stopped:
            say("Stopping")
        finally:
            java.end(process)


def _door(client: Client) -> management.Door:
    """The management address: it is ours, and hands on what has a token."""
    port = client.endpoint.port + 1
    try:
        return management.Door(port, client.socket, client.manager_keys)
    except OSError as error:
        raise port_error("management", "127.0.0.1", port, error) from error


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM or the end of the terminal sets."""
    stop = threading.Event()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _work_folder() -> Iterator[Path]:
    """A private folder for keys, sockets and the unpacked archive; gone afterwards."""
    # The path of a socket must be short, so where TMPDIR is long the folder lies in /tmp.
    name = f"rampart-xxxxxxxx/{SOCKET}"
    long = len(os.fsencode(Path(tempfile.gettempdir()) / name)) > SOCKET_BYTES
    try:
        folder = Path(tempfile.mkdtemp(prefix="rampart-", dir=SHORT if long else None))
    except OSError as error:
        raise LaunchError(
            f"cannot create the server's sockets: {error}. Set TMPDIR to a folder that you"
            f" may write to, whose path has at most {SOCKET_BYTES - len(name) - 1} bytes"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Run:
    """A server from its start to its end; what waits raises Stopped on a signal, or LaunchError."""

    endpoint: Endpoint
    client: Client
    process: subprocess.Popen[bytes]
    logs: Path
    stop: threading.Event
    samples: list[Sample]  # pictures to try it with

    def run(self) -> None:
        """Wait for a prediction, announce it, wait for the end."""
        self.await_listeners()
        self.await_prediction()
        self.set_workers()
        say("Rampart is ready")
        for line in self.curl_lines():
            say(line)
        watch = Watch(lambda: self.client.manage(timeout=5))
        while True:
            self.pause(0.2)
            if self.process.poll() is not None:
                raise LaunchError(f"TorchServe stopped unexpectedly: {self.last_words()}")
            if failure := watch.failure():
                words = logs.worker_failure(self.logs) or self.last_words()
                raise LaunchError(f"{self.endpoint.name} cannot answer, {failure}: {words}")

    def pause(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise Stopped

    def last_words(self) -> str:
        return logs.last_words(self.logs)

    def await_listeners(self) -> None:
        """Once all is open, close what nobody asked for: gRPC, but for predictions on its port."""
        began = time.monotonic()
        while STARTED not in logs.read(self.logs, logs.JAVA):
            self.pause(0.05)
            if self.process.poll() is not None or time.monotonic() - began > START_SECONDS:
                raise LaunchError(f"TorchServe did not start: {self.last_words()}")
        port, grpc = self.endpoint.port, self.endpoint.grpc_port
        try:
            if left := shut_listeners(self.process.pid, {port, port + 2, grpc}):
                ports = " and ".join(map(str, left))
                say(
                    f"warning: gRPC stays open on 127.0.0.1, port {ports}: it cannot be closed here"
                )
        except OSError as error:
            say(f"warning: gRPC stays open on 127.0.0.1, on unknown ports: {error}")

    def await_prediction(self) -> None:
        """Return once a prediction came back."""
        picture = GRAY.read_bytes()
        began = told = time.monotonic()
        while True:
            self.pause(0.1)
            # A prediction asked for earlier would wait in the queue, and this loop with it.
            status, model = self.client.manage()
            if status == 200 and b'"READY"' in model and self.client.predict(picture) == 200:
                return
            failure = logs.worker_failure(self.logs)
            if failure or self.process.poll() is not None:
                raise LaunchError(failure or f"TorchServe did not start: {self.last_words()}")
            now = time.monotonic()
            if status == 404 or now - began > START_SECONDS:
                raise LaunchError(f"the model was not loaded: {self.last_words()}")
            if now - told > 10:
                told = now
                say(f"Still starting after {now - began:.0f} s")

    def set_workers(self) -> None:
        """Scale to the number asked for: an archive's own figure wins over TorchServe's setting."""
        count = self.endpoint.workers
        query = f"?min_worker={count}&max_worker={count}&synchronous=true"
        status, _ = self.client.manage(query, method="PUT")
        if status != 200:
            raise LaunchError(
                f"could not start {count} workers (status {status}): {self.last_words()}"
            )

    def curl_lines(self) -> Iterator[str]:
        """Lines to paste into a shell on this machine."""
        endpoint, keys = self.endpoint, self.client.key_file
        code = "import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]]['key'])"
        python = f"python3 -c {shlex.quote(code)} {shlex.quote(str(keys))}"
        yield f"  rampart_key() {{ {python} $1; }}"
        header = '-H "Authorization: Bearer $(rampart_key {})"'
        options = ""
        if endpoint.tls:
            options += f"--cacert {shlex.quote(str(endpoint.tls[0].resolve()))} "
        if endpoint.token_authorization:
            options += f"{header.format('inference')} "
        url = f"{endpoint.scheme}://{endpoint.local_host}:{endpoint.port}"
        for sample in self.samples:
            yield sample.curl(options, f"{url}/predictions/{endpoint.name}")
        manager = header.format("management")
        yield f"  curl '{endpoint.management}/models/{endpoint.name}?customized=true' {manager}"
        if endpoint.token_authorization:
            api = f"{endpoint.management}/token?type=inference"
            yield f"Keys are in {keys} and live {endpoint.token_minutes} min; for a new one:"
            yield f"  curl {header.format('API')} '{api}'"
