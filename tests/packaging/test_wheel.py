"""The wheel as its users meet it: in an environment of its own, away from the tree."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from zipfile import ZipFile

import pytest
import requests
from servers import free_port

from rampart.export.archive import archive

pytestmark = pytest.mark.server
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy of the tree, by way of the source distribution."""
    tree, out = tmp_path_factory.mktemp("tree") / "rampart", tmp_path_factory.mktemp("dist")
    for folder in ("rampart", "handlers", "hardening", "export"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True)
    for file in ("pyproject.toml", "README.md", "LICENSE", "config.properties"):
        shutil.copy(ROOT / file, tree / file)
    quietly(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment that has the wheel and what serving needs."""
    home = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(home)
    quietly(*pip(home / "bin"), "install", "-q", "--no-compile", f"{wheel}[torchserve]")
    return home / "bin"


def pip(scripts: Path) -> list[object]:
    """Our own pip, at work in that environment: one for it alone would take seconds to install."""
    return [sys.executable, "-m", "pip", "--python", scripts / "python"]


def quietly(*command: object, cwd: Path | None = None) -> str:
    """What a command prints; its complaints, where it fails."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=own)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_puts_one_name_at_the_top_and_holds_its_data(wheel: Path) -> None:
    with ZipFile(wheel) as packed:
        names = packed.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"rampart", "rampart_endpoint"}
    data = {Path(name).name for name in names if name.startswith("rampart/data/")}
    assert (
        {"config.properties", "metrics.yaml", "sample.png"}
        <= data
        == {file.name for file in (ROOT / "rampart" / "data").iterdir()}
    )
    pages = {"rampart/play/page.html", "rampart/hardening/report/page.html"}
    assert {"rampart/handlers/defended.py", "rampart/export/archive.py", *pages} <= set(names)


def test_serving_installs_no_torch_and_no_other_module(scripts: Path, tmp_path: Path) -> None:
    known = json.loads(quietly(*pip(scripts), "list", "--format", "json"))
    names = {package["name"].lower() for package in known}
    assert "rampart-endpoint" in names
    assert not names & {"torch", "torchvision", "onnx", "scikit-image", "onnxruntime-gpu"}
    (site,) = scripts.parent.glob("lib/python*/site-packages")
    rooms = ("handlers", "hardening", "export", "tests", "benchmarks")
    assert not [name for name in rooms if list(site.glob(f"{name}*"))]
    code = f"import importlib.util as u; assert not [n for n in {rooms} if u.find_spec(n)]"
    quietly(scripts / "python", "-c", code, cwd=tmp_path)


def test_an_installed_rampart_serves_an_archive_from_anywhere(
    scripts: Path, tiny_archive: Path, tmp_path: Path
) -> None:
    with serving(scripts, tiny_archive, tmp_path) as curl:
        verdict = json.loads(quietly(*curl, cwd=tmp_path))
    assert verdict["decision"] in ("accept", "flag")
    assert verdict["model"]["name"] == "tiny"


def test_an_installed_rampart_packs_a_shipped_model_without_torch(
    scripts: Path, tmp_path: Path
) -> None:
    model, out = ROOT / "model_store" / "traffic-signs", tmp_path / "traffic-signs.mar"
    said = quietly(scripts / "rampart", "archive", model, "--out", out, cwd=tmp_path)
    assert "labels differ on 0" in said
    archive(model, tmp_path / "ours.mar", variant="lean", precision="int8")
    with ZipFile(out) as there, ZipFile(tmp_path / "ours.mar") as here:
        assert there.namelist() == here.namelist()
        assert there.read("graph.onnx") == here.read("graph.onnx")


@contextlib.contextmanager
def serving(scripts: Path, served: Path, folder: Path) -> Iterator[list[str]]:
    """The curl line, as words, that the running server tells to try it with."""
    port, said = free_port(), folder / "said"
    command = [scripts / "rampart", "serve", "--archive", served, "--port", port]
    with said.open("w") as log:
        words = [str(word) for word in command]
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        until = time.monotonic() + 120
        while "Rampart is ready" not in said.read_text():
            assert process.poll() is None and time.monotonic() < until, said.read_text()
            time.sleep(0.2)
        line = next(line for line in said.read_text().splitlines() if "curl -T" in line)
        yield ["curl", "-sS", *line.split()[1:]]
    finally:
        process.terminate()
        assert process.wait(60) == 0, said.read_text()


# As a container runtime has it: no file may be written but those in TMPDIR, by a user who is nobody
# here, and there is no shared memory. Only that user may read what is root's, since the interpreter
# may be.
NAMESPACE = """
mount --make-rprivate / && mount -t tmpfs -o mode=1777 tmpfs "$1" &&
mount -t tmpfs -o ro tmpfs /dev/shm && mount -o remount,bind,ro / && shift &&
exec setpriv --reuid=65532 --regid=65532 --clear-groups --no-new-privs \\
    --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search \\
    --bounding-set=-all,+dac_read_search "$@"
"""


def contained(scratch: Path) -> list[str]:
    """What begins a command in a container's place; nothing where we may not make one."""
    words = ["unshare", "--mount", "sh", "-c", NAMESPACE, "sh", str(scratch)]
    refused = f"! touch {scratch.parent}/b && ! touch /dev/shm/c"
    tried = [*words, "sh", "-c", f"touch {scratch}/a && {refused} && id -u"]
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run(tried, capture_output=True, text=True)
        if done.stdout == "65532\n":
            return words
    assert os.geteuid(), "root could not make a namespace of mounts: see `unshare --mount`"
    return []


@pytest.fixture
def image() -> Iterator[Path]:
    """A folder that every user may read."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def as_the_image_installs(wheel: Path) -> list[list[str]]:
    """The words of each call of pip in the Containerfile, with this tree's files."""
    text = (ROOT / "deploy" / "Containerfile").read_text()
    there = {"/tmp/http.txt": ROOT / "requirements" / "http.txt", "/tmp/*.whl": wheel}
    calls = re.findall(r"pip (install [^&]*) &&", text)
    assert len(calls) == 2
    return [[str(there.get(word, word)) for word in call.split()] for call in calls]


@pytest.mark.slow
def test_a_container_serves_with_a_read_only_root_no_home_and_a_user_that_nobody_knows(
    wheel: Path, tiny_archive: Path, image: Path
) -> None:
    home, scratch, models = (image / name for name in ("venv", "scratch", "models"))
    venv.create(home)
    for words in as_the_image_installs(wheel):
        quietly(*pip(home / "bin"), *words)
    taken = sum(file.stat().st_blocks for file in home.rglob("*") if not file.is_symlink()) * 512
    assert taken < 300e6, f"{taken / 1e6:.0f} MB"
    scratch.mkdir()
    models.mkdir()
    shutil.copy(tiny_archive, models)
    tokens, said, port = image / "tokens", image / "said", free_port()
    tokens.write_text(f"team {'a' * 20}\n")
    served = ["--host", "0.0.0.0", "--port", port, "--grpc-port", port + 1]
    command = [home / "bin" / "rampart", "serve", "--server", "http", *served]
    command += ["--archive", models, "--tokens", tokens]
    words = [*contained(scratch), *map(str, command)]
    with said.open("w") as log:
        process = subprocess.Popen(
            words,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={"PATH": os.environ["PATH"], "TMPDIR": str(scratch)},
        )
    try:
        until = time.monotonic() + 120
        while "Rampart is ready" not in said.read_text():
            assert process.poll() is None and time.monotonic() < until, said.read_text()
            time.sleep(0.2)
        root, picture = f"http://127.0.0.1:{port}", (ROOT / "rampart/data/sample.png").read_bytes()
        assert requests.get(f"{root}/v2/health/ready", timeout=10).status_code == 200
        known = {"Authorization": f"Bearer {'a' * 20}"}
        ask = partial(requests.post, f"{root}/predictions/tiny", picture, timeout=30)
        assert ask().status_code == 401
        assert ask(headers=known).json()["model"]["name"] == "tiny"
    finally:
        process.terminate()
        assert process.wait(60) == 0, said.read_text()
    assert "rror" not in said.read_text() and "arning" not in said.read_text()
