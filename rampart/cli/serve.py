"""Verbs that start a server and watch it."""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer
from typer import Option

from rampart.cli import options as o

DEVICE = "ONNX Runtime on one of these, or the archive's TensorRT plan"
TOKENS = "Require TorchServe's tokens; a must beyond loopback"
CHAIN = "Serve predictions by https: certificate chain, PEM"
API = "Let this machine register and remove models"
QUARANTINE = "Keep the newest 1,000 flagged images in this folder"
JAVA = "MB of Java's heap, and as many beside it for bodies under way"
LOGS = "Keep logs in this folder"
WHERE = "~/.local/state/rampart/..."
SHIPPED = Path("model_store/cifar10.mar")
METRICS = "http://127.0.0.1:8082/metrics"
Device = Literal["cpu", "cuda", "tensorrt", "plan", "auto"]

verb, app = o.theme("Serve")


class Settings(NamedTuple):
    """What an Endpoint is served with, by the names of its fields, but for the certificate."""

    archive: Annotated[Path, Option("--archive", "--model", help="The .mar to serve")] = SHIPPED
    host: Annotated[str, Option(help="Address to listen on")] = "127.0.0.1"
    port: Annotated[int, Option(help="Of predictions; management is the next one")] = 8080
    workers: Annotated[int, Option(help="Processes that share the cores")] = 1
    device: Annotated[Device, Option(help=DEVICE)] = "auto"
    token_authorization: Annotated[bool, Option(help=TOKENS)] = False
    grpc_port: Annotated[int, Option(help="TorchServe's gRPC as well, on this port")] = 0
    token_minutes: Annotated[int, Option(help="That a token lives")] = 60
    model_api: Annotated[bool, Option("--model-api", help=API)] = False
    query_store: o.QueryStore = None
    quarantine: Annotated[Path | None, Option(help=QUARANTINE)] = None
    java_memory: Annotated[int, Option(help=JAVA)] = 300
    log_folder: Annotated[Path | None, Option("--logs", help=LOGS, show_default=WHERE)] = None


@verb(
    "serve --archive model_store/mine.mar",
    "serve --archive mine.mar --host 0.0.0.0 --token-authorization",
)
def serve(
    settings: Settings,
    certificate: Annotated[Path | None, Option(help=CHAIN)] = None,
    certificate_key: Annotated[Path | None, Option(help="Its private key, PEM")] = None,
) -> None:
    """Serve an archive with TorchServe; the Java runtime comes along. Ctrl-C stops it."""
    from rampart.launch.endpoint import Endpoint
    from rampart.launch.torchserve import serve as launch

    if (certificate is None) != (certificate_key is None):
        raise ValueError("--certificate and --certificate-key go together")
    tls = (certificate, certificate_key) if certificate and certificate_key else None
    raise typer.Exit(launch(Endpoint(**settings._asdict(), tls=tls)))


@verb("probe --within 30")
def probe(
    metrics: Annotated[str, Option(help="Where Prometheus asks")] = METRICS,
    within: Annotated[float, Option(help="Seconds that a model may be silent")] = 15.0,
    name: Annotated[str | None, Option(help="This model alone, not all")] = None,
) -> None:
    """Whether the served models are alive, for liveness checks: needs no token."""
    from rampart.launch.probe import probe as look

    for model, age in look(metrics, within, name).items():
        o.say(f"{model}: alive {age:.0f} s ago")
