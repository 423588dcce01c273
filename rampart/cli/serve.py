"""Verbs that start a server and watch it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rampart.cli import options as o

DEVICE = "ONNX Runtime on one of these, or the archive's TensorRT plan"
TOKENS = "Require TorchServe's tokens; a must beyond loopback"
CHAIN = "Serve predictions by https: certificate chain, PEM"
API = "Let this machine register and remove models"
QUARANTINE = "Keep the newest 1,000 flagged images in this folder"
JAVA = "MB of Java's heap, and as many beside it for bodies under way"
WHERE = "~/.local/state/rampart/..."
METRICS = "http://127.0.0.1:8082/metrics"


def add_to(app: typer.Typer) -> None:
    """Put these verbs into the command line."""
    verbs: o.Verbs = {
        serve: (
            "serve --archive model_store/mine.mar",
            "serve --archive mine.mar --host 0.0.0.0 --token-authorization",
        ),
        probe: ("probe --within 30",),
    }
    o.add(app, o.SERVE, verbs)


def serve(
    archive: Annotated[Path, typer.Option("--archive", "--model", help="The .mar to serve")] = Path(
        "model_store/cifar10.mar"
    ),
    host: Annotated[str, typer.Option(help="Address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of predictions; management is the next one")] = 8080,
    workers: Annotated[int, typer.Option(help="Processes that share the cores")] = 1,
    device: Annotated[
        Literal["cpu", "cuda", "tensorrt", "plan", "auto"], typer.Option(help=DEVICE)
    ] = "auto",
    token_authorization: Annotated[bool, typer.Option(help=TOKENS)] = False,
    grpc_port: Annotated[int, typer.Option(help="TorchServe's gRPC as well, on this port")] = 0,
    token_minutes: Annotated[int, typer.Option(help="That a token lives")] = 60,
    certificate: Annotated[Path | None, typer.Option(help=CHAIN)] = None,
    certificate_key: Annotated[Path | None, typer.Option(help="Its private key, PEM")] = None,
    model_api: Annotated[bool, typer.Option("--model-api", help=API)] = False,
    query_store: o.QueryStore = None,
    quarantine: Annotated[Path | None, typer.Option(help=QUARANTINE)] = None,
    java_memory: Annotated[int, typer.Option(help=JAVA)] = 300,
    logs: Annotated[
        Path | None, typer.Option(help="Keep logs in this folder", show_default=WHERE)
    ] = None,
) -> None:
    """Serve an archive with TorchServe; the Java runtime comes along. Ctrl-C stops it."""
    from rampart.launch import torchserve as launch

    if (certificate is None) != (certificate_key is None):
        raise ValueError("--certificate and --certificate-key go together")
    code = launch.serve(
        archive,
        host=host,
        port=port,
        workers=workers,
        device=device,
        token_authorization=token_authorization,
        grpc_port=grpc_port,
        model_api=model_api,
        tls=(certificate, certificate_key) if certificate and certificate_key else None,
        token_minutes=token_minutes,
        query_store=query_store,
        quarantine=quarantine,
        java_memory=java_memory,
        log_folder=logs,
        samples=[launch.SAMPLE],
    )
    raise typer.Exit(code)


def probe(
    metrics: Annotated[str, typer.Option(help="Where Prometheus asks")] = METRICS,
    within: Annotated[float, typer.Option(help="Seconds that a model may be silent")] = 15.0,
    name: Annotated[str | None, typer.Option(help="This model alone, not all")] = None,
) -> None:
    """Whether the served models are alive, for liveness checks: needs no token."""
    from rampart.launch.probe import probe as look

    for model, age in look(metrics, within, name).items():
        print(f"{model}: alive {age:.0f} s ago")
