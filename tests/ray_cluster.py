"""A real Ray of two nodes, in an environment of its own: `make .venv/ray` installs it."""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml
from servers import free_port

PYTHON = Path(sys.prefix) / "ray" / "bin" / "python"
CONFIG = Path("deploy/ray/serve.yaml")
TOKEN, SLOW = "a" * 20, "s" * 20  # of which the second may send 5 requests to a replica


def environment(temp: Path) -> dict[str, str]:
    """What Ray's own Python wants: a cluster that keeps to itself."""
    return os.environ | {
        "PYTHONPATH": str(Path.cwd()),
        "RAY_TMPDIR": str(temp),
        # Nodes listen on this machine's own address, whatever one asks for.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "1000",
    }


class Ray:
    """Serves an archive by deploy/ray/serve.yaml, a replica on each node."""

    def __init__(self, archive: Path) -> None:
        if not PYTHON.exists():
            pytest.skip("needs Ray: `make .venv/ray` installs it")
        self.port = free_port()
        self.root = f"http://127.0.0.1:{self.port}"
        self._temp = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))  # sockets want a short path
        self._log = (self._temp / "log").open("w")
        self._nodes = subprocess.Popen(
            [PYTHON, "tests/ray_nodes.py", self._configuration(archive)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=environment(self._temp),
            text=True,
        )

    def _configuration(self, *archives: Path, tls: tuple[Path, ...] = ()) -> Path:
        """Of the first archive at the root, and of the others under their names."""
        config = yaml.safe_load(CONFIG.read_text())
        config["http_options"] = {"host": "127.0.0.1", "port": self.port}
        if tls:
            config["http_options"] |= {"ssl_certfile": str(tls[0]), "ssl_keyfile": str(tls[1])}
        config["proxy_location"] = "HeadOnly"  # the nodes of one machine cannot share a port
        (application,) = config["applications"]
        tokens = self._temp / "tokens"
        tokens.write_text(f"team {TOKEN}\nslow {SLOW} 0.01 5\n")
        application["args"] |= {"archive": str(archives[0]), "tokens": str(tokens)}
        for other in archives[1:]:
            deployment = {"name": "Rampart", "ray_actor_options": {"num_cpus": 0}}
            own = {"name": other.stem, "route_prefix": f"/{other.stem}", "args": {}}
            own["args"] |= {"archive": str(other)}
            config["applications"].append(application | own | {"deployments": [deployment]})
        written = self._temp / "serve.yaml"
        written.write_text(yaml.safe_dump(config))
        return written

    def deploy(self, *archives: Path) -> None:
        """Put other archives in the place of what is served; return when they are there."""
        old, end = set(self.replicas()), time.monotonic() + 120
        self._tell(self._configuration(*archives))
        while old & (now := set(self.replicas())) or len(now) < len(archives) + 1:
            assert self._nodes.poll() is None and time.monotonic() < end, self.log()
            time.sleep(0.2)

    def again(self, archive: Path, tls: tuple[Path, ...]) -> None:
        """Stop serving, and serve by TLS."""
        self._tell("again", self._configuration(archive, tls=tls))

    def wait(self, replicas: int) -> None:
        """Return when so many replicas run and one answers."""
        end = time.monotonic() + 120
        while len(self.replicas()) < replicas or not self._answers():
            assert self._nodes.poll() is None and time.monotonic() < end, self.log()
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.root}/v2/health/ready", timeout=5).ok
        except requests.RequestException:
            return False

    def replicas(self) -> list[psutil.Process]:
        """The processes that answer."""
        family = psutil.Process(self._nodes.pid).children(recursive=True)
        return [one for one in family if _title(one).startswith("ray::ServeReplica")]

    def figures(self) -> str:
        """What Prometheus would read of all nodes."""
        addresses = [f"http://{target}/metrics" for target in self.targets()]
        return "".join(requests.get(address, timeout=10).text for address in addresses)

    def targets(self) -> list[str]:
        """HOST:PORT of each node's figures."""
        files = self._temp.glob("ray/session_*/metrics_export_port_*")
        (host,) = re.findall("^host (.+)$", self.log(), re.MULTILINE)
        return sorted({f"{host}:{file.read_text()}" for file in files})

    def verdict(self, picture: Path) -> dict[str, Any]:
        """What another deployment would get by the handle."""
        known, end = len(self._verdicts()), time.monotonic() + 60
        self._tell(picture)
        while len(self._verdicts()) == known:
            assert self._nodes.poll() is None and time.monotonic() < end, self.log()
            time.sleep(0.1)
        found: dict[str, Any] = json.loads(self._verdicts()[-1])
        return found

    def _tell(self, *words: object) -> None:
        assert self._nodes.stdin is not None
        self._nodes.stdin.write(f"{' '.join(map(str, words))}\n")
        self._nodes.stdin.flush()

    def _verdicts(self) -> list[str]:
        return re.findall(r"^verdict (.+)$", self.log(), re.MULTILINE)

    def log(self) -> str:
        """What Ray has said."""
        return (self._temp / "log").read_text()

    def end(self) -> int:
        """Stop all nodes; the exit code."""
        assert self._nodes.stdin is not None
        self._nodes.stdin.close()
        code = self._nodes.wait(60)
        self._log.close()
        shutil.rmtree(self._temp)
        return code


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


class Nodes:
    """Two nodes of one core each, and commands by Ray's own Python; `code` runs first in all."""

    def __init__(self, home: Path, code: str = "") -> None:
        self._environment = environment(home) | {"HOME": str(home)}
        # What Ray's own Python lacks is this one's, after its own: what both have is Ray's.
        beside = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n"
        (home / "sitecustomize.py").write_text(beside + code)
        self._environment["PYTHONPATH"] += f":{home}"
        self._log = (home / "log").open("w")
        self._process = subprocess.Popen(
            [PYTHON, "tests/ray_pair.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=self._environment,
            text=True,
        )
        self.address = self._line()
        self._environment["RAY_ADDRESS"] = self.address

    def _line(self) -> str:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if ":" in line or line == "killed\n":
                return line.strip()
        raise AssertionError(Path(self._log.name).read_text())

    def kill_one(self) -> None:
        """End a node and all its processes at once."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        assert self._line() == "killed"

    def processes(self, title: str) -> list[psutil.Process]:
        """Those of all nodes whose titles begin so."""
        family = psutil.Process(self._process.pid).children(recursive=True)
        return [one for one in family if _title(one).startswith(title)]

    def start(self, module: str, *words: str) -> "subprocess.Popen[str]":
        """A command of this cluster, at work."""
        return subprocess.Popen(
            [PYTHON, "-m", module, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment,
            text=True,
        )

    def end(self) -> None:
        """Stop what is left of it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
        self._log.close()


@contextlib.contextmanager
def two_nodes(code: str = "") -> Iterator[Nodes]:
    """A cluster, where Ray is installed; `code` runs first in each of its processes."""
    if not PYTHON.exists():
        pytest.skip("needs Ray: `make .venv/ray` installs it")
    home = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))  # sockets want a short path
    try:
        nodes = Nodes(home, code)
        yield nodes
        nodes.end()
    finally:
        shutil.rmtree(home)
