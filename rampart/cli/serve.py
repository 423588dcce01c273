"""Verbs that start a server and watch it."""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer
from typer import Option

from rampart.cli import options as o

SHIPPED = Path("model_store/traffic-signs.mar")
ARCHIVE = "The .mar to serve, or a folder of them; http serves several models or versions"
SERVER = "http is Rampart's own server"
DEFAULT = "torchserve on loopback, else http"
DEVICE = "Device for ONNX Runtime; plan: the archive's TensorRT plan"
GRPC = "Also serve gRPC on this port: Open Inference Protocol with http, else TorchServe's own"
CHAIN = "Serve predictions over https: certificate chain, PEM"
QUARANTINE = "Keep the newest 1,000 flagged images in this folder"
EXPLAIN = "Explain verdicts on request; an explanation costs as much as 65 pictures"
OWN = "http: file with lines NAME TOKEN [REQUESTS_PER_SECOND [BURST]]; required beyond loopback"
DELAY = "http: microseconds that a batch waits for more requests; may help on a GPU"
TOKENS = "torchserve: require its tokens; required beyond loopback"
LIFE = "torchserve: minutes until a token expires"
API = "torchserve: let this machine register and remove models"
JAVA = "torchserve: MB of Java heap, and the same again for request bodies in flight"
LOGS = "torchserve: keep logs in this folder"
WHERE = "~/.local/state/rampart/..."
PROBED = "http: the server's token file; the probe sends one of its tokens"
METRICS = "http://127.0.0.1:8082/metrics"
Device = Literal["cpu", "cuda", "tensorrt", "plan", "auto"]
Name = Literal["http", "torchserve"]
# Options that one server alone has, by parameter, and what the other offers in their place.
ONLY: dict[Name, dict[str, str]] = {
    "http": {"tokens": ", or use TorchServe's tokens with --token-authorization", "delay": ""},
    "torchserve": {
        "token_authorization": ", or pass a token file with --tokens",
        "token_minutes": ", or edit the --tokens file at any time",
        "model_api": ", or replace the archive file: http loads the new one",
        "java_memory": "",
        "log_folder": ", or redirect the output of http",
    },
}

verb, app = o.theme("Serve")


class Shared(NamedTuple):
    """What both servers take, by the names of their fields."""

    host: Annotated[str, Option(help="Address to listen on")] = "127.0.0.1"
    port: Annotated[int, Option(help="Port; TorchServe's management uses the next one")] = 8080
    workers: Annotated[int, Option(help="Worker processes, which share the cores")] = 1
    device: Annotated[Device, Option(help=DEVICE)] = "auto"
    grpc_port: Annotated[int, Option(help=GRPC)] = 0
    query_store: o.QueryStore = None
    quarantine: Annotated[Path | None, Option(help=QUARANTINE)] = None
    explain: Annotated[bool, Option("--explain", help=EXPLAIN)] = False


class Tls(NamedTuple):
    """Files of a certificate chain and its key."""

    certificate: Annotated[Path | None, Option(help=CHAIN)] = None
    certificate_key: Annotated[Path | None, Option(help="Private key, PEM")] = None

    def pair(self) -> tuple[Path, Path] | None:
        """Both, or neither; ValueError for one alone."""
        if (self.certificate is None) != (self.certificate_key is None):
            raise ValueError("--certificate and --certificate-key go together")
        chain, key = self
        return (chain, key) if chain and key else None


class Http(NamedTuple):
    """What Rampart's own server takes."""

    tokens: Annotated[Path | None, Option(help=OWN)] = None
    delay: Annotated[int, Option(min=0, max=1_000_000, help=DELAY)] = 0


class TorchServe(NamedTuple):
    """What TorchServe takes, by the names of an Endpoint's fields."""

    token_authorization: Annotated[bool, Option(help=TOKENS)] = False
    token_minutes: Annotated[int, Option(help=LIFE)] = 60
    model_api: Annotated[bool, Option("--model-api", help=API)] = False
    java_memory: Annotated[int, Option(help=JAVA)] = 300
    log_folder: Annotated[Path | None, Option("--logs", help=LOGS, show_default=WHERE)] = None


Archives = Annotated[
    list[Path] | None, Option("--archive", "--model", help=ARCHIVE, show_default=str(SHIPPED))
]
Server = Annotated[Name | None, Option(help=SERVER, show_default=DEFAULT)]


@verb(
    "serve --archive model_store/mine.mar",
    "serve --archive mine.mar --server http --workers 2 --grpc-port 8081",
    "serve --archive mine.mar --host 0.0.0.0 --tokens tokens.txt",
)
def serve(
    context: typer.Context,
    shared: Shared,
    tls: Tls,
    http: Http,
    torchserve: TorchServe,
    *,
    archive: Archives = None,
    server: Server = None,
) -> None:
    """Serve an archive with TorchServe (Java is included) or with Rampart's own server.

    Ctrl-C stops it.
    """
    from rampart.launch.addresses import is_loopback
    from rampart.launch.endpoint import Endpoint

    name = server or ("torchserve" if is_loopback(shared.host) else "http")
    _check_options(context, name)
    archives, common = _files(archive or [SHIPPED]), shared._asdict() | {"tls": tls.pair()}
    if name == "http":
        from rampart.launch import http as own

        front = own.Front(tuple(archives), tokens=http.tokens, delay=http.delay / 1e6, **common)
        raise typer.Exit(own.serve(front))
    from rampart.launch.torchserve import serve as launch

    if len(archives) > 1:
        raise ValueError("TorchServe takes one --archive: add --server http to serve several")
    raise typer.Exit(launch(Endpoint(archives[0], **torchserve._asdict(), **common)))


def _files(archives: list[Path]) -> list[Path]:
    """The archives; a folder stands for those in it. Raises ValueError for one that has none."""
    files = [sorted(path.glob("*.mar")) if path.is_dir() else [path] for path in archives]
    for path, found in zip(archives, files, strict=True):
        if not found:
            raise ValueError(f"{path} contains no archive: put a .mar there, or pass a .mar file")
    return [file for found in files for file in found]


def _check_options(context: typer.Context, server: Name) -> None:
    """Raise ValueError for an option that was given and that the other server alone has."""
    other: Name = "torchserve" if server == "http" else "http"
    for name, instead in ONLY[other].items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--logs" if name == "log_folder" else f"--{name.replace('_', '-')}"
            raise ValueError(
                f"this would start {server}, which has no {option}: add --server {other}{instead}"
            )


@verb("probe --within 30", "probe --metrics http://127.0.0.1:8080/metrics --tokens tokens.txt")
def probe(
    metrics: Annotated[str, Option(help="Address of the metrics")] = METRICS,
    within: Annotated[float, Option(help="Maximum age of a heartbeat, in seconds")] = 15.0,
    name: Annotated[str | None, Option(help="Check only this model")] = None,
    tokens: Annotated[Path | None, Option(help=PROBED)] = None,
    certificate: Annotated[Path | None, Option(help="http: its certificate chain, PEM")] = None,
) -> None:
    """Check that the served models are alive. TorchServe needs no token for this.

    Rampart's own server has its metrics on its serving port. If it has a token file, pass --tokens.
    """
    from rampart.launch.probe import probe as look

    ages = look(metrics, within, name, tokens=tokens, certificate=certificate)
    for model, age in ages.items():
        o.say(f"{model}: alive {age:.0f} s ago")
