"""What is served and where; what cannot or must not be served is refused before Java starts."""

import base64
import ipaddress
import json
import socket
import ssl
import urllib.parse
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rampart.hardening.model.presence import check_archive

RSA = bytes.fromhex("2a864886f70d010101")  # 1.2.840.113549.1.1.1, as a PKCS #8 key names its kind
JAVA_LEAST = 64  # MB with which TorchServe still starts


class LaunchError(RuntimeError):
    """Why the server cannot run; the message names the remedy."""


def read_model(archive: Path) -> tuple[str, str]:
    """Name and version of an archive's model. Raises LaunchError where it is none."""
    try:
        check_archive(archive)
    except (OSError, ValueError) as error:
        raise LaunchError(str(error)) from error
    try:
        with zipfile.ZipFile(archive) as content:
            model = json.loads(content.read("MAR-INF/MANIFEST.json"))["model"]
            return str(model["modelName"]), str(model["modelVersion"])
    except (zipfile.BadZipFile, OSError, KeyError, TypeError, ValueError) as error:
        raise LaunchError(f"{archive} is not a TorchServe archive: rebuild it") from error


@dataclass(frozen=True)
class Endpoint:
    """A `.mar`, where it is served, and how.

    Management is on `port` + 1, metrics on `port` + 2, both on loopback. A `host` beyond loopback
    needs token authorization; management wants a token always.
    """

    archive: Path
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1  # processes, each with an equal share of the cores
    device: str = "cpu"  # cpu, cuda, tensorrt, plan or auto
    token_authorization: bool = False
    grpc_port: int = 0  # on `host`; gRPC cannot be switched off: 0 is any free port, and shut
    model_api: bool = False  # management registers and removes models, from any folder
    tls: tuple[Path, Path] | None = None  # certificate chain and its key, PEM
    token_minutes: int = 60  # that a token lives
    query_store: str | None = None  # a folder, or the address of a Redis
    quarantine: Path | None = None  # for flagged images
    explain: bool = False  # verdicts, to who asks
    java_memory: int = 300  # MB of heap, and as many beside it for bodies under way
    log_folder: Path | None = None  # else the user's own for such

    @cached_property
    def name(self) -> str:
        """What the archive calls its model. Raises LaunchError where it is none."""
        return read_model(self.archive)[0]

    @property
    def scheme(self) -> str:
        """How predictions are reached; management and metrics, on loopback, stay http."""
        return "https" if self.tls else "http"

    @property
    def local_host(self) -> str:
        """The address by which this machine reaches the predictions."""
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host

    @property
    def management(self) -> str:
        """Where models are described and their workers are set, by who has a token."""
        return f"http://127.0.0.1:{self.port + 1}"

    def check(self) -> None:
        """Raise LaunchError where it cannot or must not be served."""
        read_model(self.archive)
        if "," in self.archive.name:
            raise LaunchError(f"{self.archive}: TorchServe ends a name at a comma: rename it")
        if not _is_loopback(self.host) and not self.token_authorization:
            raise LaunchError(
                f"{self.host} is open to other machines: that needs token authorization"
                " (--token-authorization), or serve on 127.0.0.1 behind a gateway"
            )
        if self.tls:
            check_tls(*self.tls)
        if self.token_minutes < 1:
            raise LaunchError("a token must be valid for at least a minute")
        if self.java_memory < JAVA_LEAST:
            raise LaunchError(f"Java needs at least {JAVA_LEAST} MB of memory (--java-memory)")
        if self.workers < 1:
            raise LaunchError(f"--workers {self.workers}: at least one worker is needed")
        self._check_ports()

    def _check_ports(self) -> None:
        if not 1 <= self.port <= 65533:
            raise LaunchError(
                "the port must be between 1 and 65533: TorchServe also uses the next two"
            )
        _check_free("predictions", self.host, self.port)
        _check_free("management", "127.0.0.1", self.port + 1)
        _check_free("metrics", "127.0.0.1", self.port + 2)
        if self.grpc_port:
            if not 1 <= self.grpc_port <= 65535 or 0 <= self.grpc_port - self.port <= 2:
                raise LaunchError(
                    "the gRPC port must be between 1 and 65535, and differ from the other three"
                )
            _check_free("gRPC", self.host, self.grpc_port)


def check_tls(certificate: Path, key: Path) -> None:
    """Raise LaunchError where these are no certificate chain and its RSA key."""
    try:
        # With a password, or it would ask for one.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, password="")
        body = "".join(line for line in key.read_text().splitlines() if "-----" not in line)
        rsa = "RSA PRIVATE" in key.read_text() or RSA in base64.b64decode(body)
    except (OSError, ValueError) as error:  # of ssl, of base64
        raise LaunchError(
            f"{certificate} and {key} are not a PEM certificate chain and its key: {error}"
        ) from error
    if not rsa:
        raise LaunchError(f"{key} is not an RSA key: TorchServe supports only RSA keys")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        if host == "localhost":
            return True
    raise LaunchError("the host must be an IPv4 address or localhost: TorchServe supports no other")


def _check_free(purpose: str, host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise port_error(purpose, host, port, error) from error


def port_error(purpose: str, host: str, port: int, error: OSError) -> LaunchError:
    """What to do about a port that cannot be listened on."""
    return LaunchError(
        f"port {port} ({purpose}) on {host} cannot be used: {error.strerror}. Stop the program"
        " that listens there, or choose another --port; management and metrics use the next two"
    )


def redis_failure(address: str) -> str | None:
    """Why the Redis at `address` cannot be used, if it is one and does not answer."""
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
    alive = answer.startswith((b"+PONG", b"-NOAUTH"))  # it is not given its password
    return None if alive else f"{place[0]}:{place[1]} does not answer like Redis"
