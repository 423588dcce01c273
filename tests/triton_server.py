"""A real Triton without a container: NVIDIA's wheel `nvidia-pytriton` carries one.

It has the Python backend alone, and lives in an environment of its own, `.venv/triton`, which
`make .venv/triton` installs.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from started import Started

HOME = Path(__file__).parents[1] / ".venv" / "triton"


class Triton(Started):
    """A server of one repository, which takes up new versions when it is told."""

    def __init__(self, repository: Path, work: Path, port: int, *options: object) -> None:
        self.grpc, self.metrics = port + 1, port + 2
        site = _site_packages()
        backends = work / "backends"
        shutil.copytree(site / "pytriton" / "tritonserver" / "backends", backends)
        version = site.parent.name.removeprefix("python")
        stubs = site / "pytriton" / "tritonserver" / "python_backend_stubs" / version
        shutil.copy(stubs / "triton_python_backend_stub", backends / "python")
        code = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
        python = [str(HOME / "bin" / "python"), "-c", code]
        own = subprocess.run(python, check=True, capture_output=True, text=True).stdout.strip()
        libraries = [site / "nvidia_pytriton.libs", own]
        command = [
            site / "pytriton" / "tritonserver" / "bin" / "tritonserver",
            *("--model-repository", repository, "--backend-directory", backends),
            *("--model-control-mode", "explicit", "--load-model", "*"),
            *("--http-address", "127.0.0.1", "--http-port", port),
            *("--grpc-address", "127.0.0.1", "--grpc-port", self.grpc),
            *("--metrics-address", "127.0.0.1", "--metrics-port", self.metrics),
            *options,
        ]
        environment = {
            "PATH": f"{HOME / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
            "PYTHONPATH": str(site),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        super().__init__(command, port, work, environment)


def _site_packages() -> Path:
    found = list(HOME.glob("lib/python3.*/site-packages"))
    if not (found and (found[0] / "pytriton" / "tritonserver").is_dir()):
        pytest.skip("needs Triton's server: `make .venv/triton` installs it")
    return found[0]
