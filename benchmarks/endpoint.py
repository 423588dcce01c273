"""Requests per second of defended endpoints and of undefended ones, side by side.

    .venv/bin/python benchmarks/endpoint.py --images cifar10-test.npz --plot endpoint.png
    .venv/bin/python benchmarks/endpoint.py --images cifar10-test.npz --open-loop

Sides, alternated round by round in one run on one machine, one PNG a request:
    http, torchserve, triton     Rampart's `lean` int8 archive on each of these servers
    http x2, torchserve x2       the same by a worker process for each core
    http full                    purifier and all detectors as well, int8, on Rampart's own server
    stock                        TorchServe's image_classifier, eager, only its transform changed
    tuned                        the same in batches, channels last, on all cores
    litserve, litserve onnx      LitServe with torch, with ONNX Runtime
    bentoml onnx                 BentoML with ONNX Runtime
    litserve int8, bentoml int8  the same two with the very file that Rampart's `lean` serves
    floor                        that file and Rampart's decoder in this process, without HTTP
All but Rampart's and the int8 ones serve the bare classifier in fp32, which is what their users
would do. A TorchServe that waits takes 0.4% of a core; LitServe takes 13%, so servers of others are
halted while they wait (a halted TorchServe would make up for its timers). Load is closed (so many
clients, each waiting for its answer) by `wrk`, a package of every Linux distribution; with
--open-loop requests come at a fixed rate, answered or not, from locust. `make .venv/peers` sets up
locust and the other servers, `make .venv/triton` Triton. About 30 minutes; --sides starts fewer.
"""

import argparse
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import psutil
import ratios
import requests
import torch
from server import endpoint, free_ports, pngs, triton
from tqdm import tqdm

from rampart.export.archive import archive
from rampart.export.build import sample_crops
from rampart.handlers.engine import Engine, cpu_features, dots_bytes
from rampart.handlers.image import decode
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.train.data import load

PEERS = Path(__file__).parent / "peers"
CONCURRENCY = (1, 8, 32)
ARRIVALS = (50, 200)  # a second
CORES = len(os.sched_getaffinity(0))
TENSORS = 160  # bytes of JSON before a picture for Triton
FULL_BATCH = 32  # as many pictures as Rampart runs at once
# Ours: server, variant and worker processes, all in int8.
OURS = {
    "http": ("http", "lean", 1),
    "http x2": ("http", "lean", CORES),
    "http full": ("http", "full", 1),
    "torchserve": ("torchserve", "lean", 1),
    "torchserve x2": ("torchserve", "lean", CORES),
    "triton": ("triton", "lean", 1),
}
FP32_PEERS = ("stock", "tuned", "litserve", "litserve onnx", "bentoml onnx")
INT8_PEERS = ("litserve int8", "bentoml int8")
SIDES = (*OURS, *FP32_PEERS, *INT8_PEERS)
# (our side, those whose best counts, clients, ratio of requests/s that is wanted)
CLAIMS = (
    ("http x2", ("floor",), (8, 32), 0.85),
    ("http", ("torchserve",), (1,), 2.0),
    ("http x2", ("torchserve", "torchserve x2"), (32,), 1.6 if dots_bytes(cpu_features()) else 1.3),
    ("http", ("stock",), CONCURRENCY, 2.5),
    ("http", FP32_PEERS, CONCURRENCY, 1.2),
    ("http", INT8_PEERS, CONCURRENCY, 1.0),
    ("torchserve", ("stock",), CONCURRENCY, 1.0),
)
# (our side, those whose best counts, clients, how many times as long their p99 must be)
TAILS = (
    ("http", ("torchserve",), (1,), 2.0),
    ("http", FP32_PEERS, CONCURRENCY, 1.0),
    ("http", INT8_PEERS, CONCURRENCY, 1.0),
)
CPU, MEGABYTES, START = 0.4, 300, 2.0  # ms a request at 32 clients, resident, s to an answer
# Sends the bodies in turn; wrk is written in C, so the load costs the server little CPU.
SCRIPT = """
local bodies, at = {}, 0
for i = 1, COUNT do
  local file = io.open("FOLDER/" .. i, "rb")
  bodies[i] = file:read("*a"); file:close()
end
request = function()
  at = at % COUNT + 1
  return wrk.format("POST", nil, HEADERS, bodies[at])
end
"""
# How wrk prints what `load_with_wrk` reads.
DONE = """
done = function(summary, latency)
  local errors = summary.errors
  io.write(string.format("RESULT %f %f %f %d\\n", summary.requests / summary.duration * 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.status + errors.connect + errors.read + errors.write + errors.timeout))
end
"""
STOCK_MODEL = """
from rampart.hardening.model.classifier import Classifier, ClassifierConfig


class Stock(Classifier):
    def __init__(self):
        super().__init__(ClassifierConfig(**CONFIG))
"""
STOCK_HANDLER = """
from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier


class Small(ImageClassifier):
    image_processing = transforms.Compose(
        [transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.ToTensor()]
    )
"""
TUNED_HANDLER = (
    STOCK_HANDLER
    + """
    def initialize(self, context):
        import torch

        super().initialize(context)
        torch.set_num_threads(CORES)
        # Not compiled: on CPU that took 4.1 and 15.4 ms for 1 and 8 images, this 3.5 and 13.4.
        self.model = self.model.to(memory_format=torch.channels_last)
"""
)


class Round(NamedTuple):
    """What one side did in one round: requests/s (images/s for the floor), milliseconds, CPU
    milliseconds a request, and the share that failed."""

    rate: float
    p50: float
    p99: float
    cpu: float = 0.0
    failed: float = 0.0


Load = Callable[[str, Path, int, int], Round]  # of a URL, with a script, at a level, for seconds
Results = dict[int, dict[str, list[Round]]]  # by level of load, by side


class Side(NamedTuple):
    """A server: where it answers, what to send, its processes, its seconds to the first answer, and
    whether it can be halted."""

    url: str
    script: Path
    root: psutil.Process
    start: float
    halts: bool

    def family(self) -> list[psutil.Process]:
        """All its processes."""
        return [self.root, *self.root.children(recursive=True)]

    def signal(self, number: signal.Signals) -> None:
        """Halt all of it, or let it go on."""
        for process in self.family():
            process.send_signal(number)

    def cpu(self) -> float:
        """Seconds of CPU so far, children that ended included."""
        return sum(sum(process.cpu_times()[:4]) for process in self.family())

    def settle(self) -> None:
        """Wait until what was in flight when the load ended is answered: two servers that compute
        at once, each on all cores, take thirty times as long."""
        before = -1.0
        while (now := self.cpu()) - before > 0.08:
            before = now
            time.sleep(0.2)

    def megabytes(self) -> float:
        """Resident memory."""
        return sum(process.memory_info().rss for process in self.family()) / 1e6


def stock_archive(model: Path, folder: Path, name: str, handler: str) -> Path:
    """The same classifier for TorchServe's own image_classifier."""
    classifier = pipelines.load_classifier(model / "weights.safetensors")
    torch.save(classifier.state_dict(), folder / "weights.pt")
    config = classifier.config
    (folder / "stock.py").write_text(STOCK_MODEL.replace("CONFIG", repr(config._asdict())))
    size = str(config.image_size)
    file = folder / f"{name}_handler.py"
    file.write_text(handler.replace("SIZE", size).replace("CORES", str(CORES)))
    command = [str(Path(sys.executable).with_name("torch-model-archiver"))]
    command += ["--model-name", name, "--version", "1.0", "--export-path", str(folder)]
    command += ["--model-file", str(folder / "stock.py"), "--handler", str(file)]
    command += ["--serialized-file", str(folder / "weights.pt")]
    if name == "tuned":
        settings = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 8, "maxBatchDelay": 1}
        (folder / "tuned.yaml").write_text(json.dumps(settings))
        command += ["--config-file", str(folder / "tuned.yaml")]
    own = os.environ | {"TMPDIR": str(folder)}  # it empties $TMPDIR/NAME
    subprocess.run(command, check=True, capture_output=True, env=own)
    return folder / f"{name}.mar"


class Bare(torch.nn.Module):
    """The classifier alone, of uint8 images as they are decoded."""

    def __init__(self, classifier: torch.nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Images uint8 (N, H, W, 3) to logits (N, K)."""
        logits: torch.Tensor = self.classifier(image.permute(0, 3, 1, 2).float() / 255)
        return logits


def bare_graph(model: Path, out: Path) -> Path:
    """The classifier alone as an ONNX file."""
    net = Bare(pipelines.load_classifier(model / "weights.safetensors")).eval()
    x = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    names = {"input_names": ["image"], "output_names": ["logits"]}
    free = ({0: torch.export.Dim("n")},)
    torch.onnx.export(net, (x,), out, **names, dynamic_shapes=free, dynamo=True, verbose=False)
    return out


def as_tensor(body: bytes) -> bytes:
    """A picture in Open Inference's binary form, whose JSON is always TENSORS bytes long."""
    size = {"binary_data_size": len(body) + 4}
    tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": size}
    head = json.dumps({"inputs": [tensor]}).encode().ljust(TENSORS)
    return head + len(body).to_bytes(4, "little") + body


@contextlib.contextmanager
def peer(command: Sequence[str], url: str, body: bytes, **env: str) -> Iterator[psutil.Process]:
    """A server that is no TorchServe, once it answers."""
    process = subprocess.Popen(
        command, env=os.environ | env, cwd=PEERS, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(requests.ConnectionError):
                answer = requests.post(url, body, headers={"Content-Type": "application/json"})
                if answer.status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not serve: make .venv/peers sets it up")
            time.sleep(0.1)
        yield psutil.Process(process.pid)
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.terminate()
        process.wait()


class Bench:
    """All sides of one run, started in `folder` one after the other."""

    def __init__(self, model: Path, images: np.ndarray, folder: Path) -> None:
        self.model, self.folder, self.stack = model, folder, contextlib.ExitStack()
        self.sides: dict[str, Side] = {}
        bodies = pngs(images)
        encoded = [base64.b64encode(body).decode() for body in bodies]
        picture, text = {"Content-Type": "image/png"}, {"Content-Type": "application/json"}
        lit = [json.dumps({"image": one}).encode() for one in encoded]
        bento = [json.dumps({"images": [one]}).encode() for one in encoded]
        binary = {"Inference-Header-Content-Length": str(TENSORS)}
        self.scripts = {
            "png": self._script("png", bodies, picture),
            "lit": self._script("lit", lit, text),
            "bento": self._script("bento", bento, text),
            "triton": self._script("triton", list(map(as_tensor, bodies)), picture | binary),
        }
        self.first = {"lit": lit[0], "bento": bento[0]}

    def _script(self, name: str, bodies: Sequence[bytes], headers: Mapping[str, str]) -> Path:
        place = self.folder / name
        place.mkdir()
        for number, body in enumerate(bodies, 1):
            (place / str(number)).write_bytes(body)
        text = SCRIPT.replace("COUNT", str(len(bodies))).replace("FOLDER", str(place))
        lines = ", ".join(f'["{key}"] = "{value}"' for key, value in headers.items())
        script = self.folder / f"{name}.lua"
        script.write_text(text.replace("HEADERS", f"{{{lines}}}") + DONE)
        return script

    def start(self, sides: Sequence[str]) -> None:
        """Start these sides."""
        for name in filter(sides.__contains__, OURS):
            server, variant, workers = OURS[name]
            self._ours(name, server, self._packed(server, variant), workers)
        for name, handler in (("stock", STOCK_HANDLER), ("tuned", TUNED_HANDLER)):
            if name in sides:
                made = stock_archive(self.model, self.folder, name, handler)
                self._ours(name, "torchserve", made, 1)
        weights = str((self.model / "weights.safetensors").resolve())
        bare = str(bare_graph(self.model, self.folder / "bare.onnx"))
        with zipfile.ZipFile(self._packed("http", "lean")) as mar:
            self.graph = Path(mar.extract("graph.onnx", self.folder))
        if "litserve" in sides:
            self._litserve("litserve", "eager", weights)
        for end, file in (("onnx", bare), ("int8", str(self.graph))):
            if f"litserve {end}" in sides:
                self._litserve(f"litserve {end}", "onnx", file)
            if f"bentoml {end}" in sides:
                self._bentoml(f"bentoml {end}", file)

    def _packed(self, server: str, variant: str) -> Path:
        packed = self.folder / variant / f"{server}.mar"
        if not packed.is_file():
            packed.parent.mkdir(exist_ok=True)
            archive(self.model, packed, variant=variant, precision="int8")
        return packed

    def _ours(self, name: str, server: str, packed: Path, workers: int) -> None:
        began, before = time.monotonic(), set(psutil.Process().children())
        if server == "triton":
            url = self.stack.enter_context(triton(packed, self.folder / "triton-server"))
        else:
            asked = ("--server", server, "--workers", str(workers))
            url = self.stack.enter_context(endpoint(packed, *asked))
        (root,) = set(psutil.Process().children()) - before
        start = time.monotonic() - began
        script = self.scripts["triton" if server == "triton" else "png"]
        self._keep(name, Side(url, script, root, start, False))

    def _litserve(self, name: str, kind: str, file: str) -> None:
        port = str(free_ports())
        command = [sys.executable, "lit.py", kind, file, port, str(CORES)]
        self._peer(name, command, f"http://127.0.0.1:{port}/predict", "lit")

    def _bentoml(self, name: str, file: str) -> None:
        port = str(free_ports())
        command = [sys.executable, "-m", "bentoml", "serve", "bento:Classify", "--port", port]
        known = {"MODEL": file, "THREADS": str(CORES), "BENTOML_DO_NOT_TRACK": "1"}
        self._peer(name, command, f"http://127.0.0.1:{port}/classify", "bento", **known)

    def _peer(self, name: str, command: Sequence[str], url: str, kind: str, **env: str) -> None:
        began, body = time.monotonic(), self.first[kind]
        root = self.stack.enter_context(peer(command, url, body, **env))
        self._keep(name, Side(url, self.scripts[kind], root, time.monotonic() - began, True))

    def _keep(self, name: str, side: Side) -> None:
        load_with_wrk(side.url, side.script, 8, 3)  # warm it up before anything counts
        side.settle()
        if side.halts:
            side.signal(signal.SIGSTOP)
            self.stack.callback(side.signal, signal.SIGCONT)  # or it could not end
        self.sides[name] = side

    def run(self, name: str, load: Load, level: int, seconds: int) -> Round:
        """One round of one side under `load` of `level` clients or arrivals a second."""
        side = self.sides[name]
        if side.halts:
            side.signal(signal.SIGCONT)
        before = side.cpu()
        found = load(side.url, side.script, level, seconds)
        used = side.cpu() - before
        side.settle()
        if side.halts:
            side.signal(signal.SIGSTOP)
        return found._replace(cpu=used / (found.rate * seconds) * 1e3)


def load_with_wrk(url: str, script: Path, concurrency: int, seconds: int) -> Round:
    """One round of closed-loop load. Raises RuntimeError where a request failed."""
    command = ["wrk", "-t1", f"-c{concurrency}", f"-d{seconds}s", "--timeout", "30s"]
    out = subprocess.run(
        [*command, "-s", str(script), url], check=True, capture_output=True, text=True
    ).stdout
    found = re.search(r"RESULT (\S+) (\S+) (\S+) (\d+)", out)
    if found is None or found[4] != "0" or not float(found[1]):
        raise RuntimeError(f"{url}: requests failed: {out}")
    return Round(float(found[1]), float(found[2]), float(found[3]))


def load_with_locust(url: str, script: Path, arrivals: int, seconds: int) -> Round:
    """One round of open-loop load; the bodies lie in the folder beside the script."""
    known = {"KIND": "image/png" if script.stem == "png" else "application/json"}
    place = urlsplit(url)
    known |= {"WHERE": place.path, "BODIES": str(script.with_suffix(""))}
    command = [sys.executable, "-m", "locust", "-f", str(PEERS / "arrivals.py"), "--headless"]
    command += ["--users", str(arrivals), "--spawn-rate", str(arrivals), "--json", "--skip-log"]
    command += ["--run-time", f"{seconds}s", "--stop-timeout", "30"]  # waits for what is open
    command += ["--host", f"{place.scheme}://{place.netloc}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | known)
    (found,) = json.loads(done.stdout)
    times = sorted((float(ms), count) for ms, count in found["response_times"].items())
    spread = np.repeat(*np.array(times).T.astype(int))  # (requests,)
    p50, p99 = np.percentile(spread, [50, 99])
    failed = found["num_failures"] / found["num_requests"]
    return Round(found["num_requests"] / seconds, float(p50), float(p99), failed=failed)


def run_floor(engine: Engine, bodies: Sequence[bytes], batch: int, seconds: float) -> Round:
    """Decoder and graph alone, `batch` pictures a run."""
    times, end, cpu = [], time.perf_counter() + seconds, time.process_time()
    size = engine.image_shape[0]
    while time.perf_counter() < end:
        start = time.perf_counter()
        engine.run(np.stack([decode(body, size) for body in bodies[:batch]]))
        times.append(time.perf_counter() - start)
    done = len(bodies[:batch]) * len(times)
    p50, p99 = np.percentile(times, [50, 99]) * 1e3
    used = (time.process_time() - cpu) / done * 1e3
    return Round(done / sum(times), float(p50), float(p99), used)


def claims_of(clients: int, sides: Mapping[str, Sequence[Round]]) -> list[dict[str, Any]]:
    """Every claim about this many clients, round by round against the best of its peers."""
    setting, made = f"c={clients}", list[dict[str, Any]]()

    def values(field: str, names: Sequence[str]) -> np.ndarray:
        return np.array([[getattr(r, field) for r in sides[name]] for name in names])  # (S, R)

    for ours, named, levels, target in CLAIMS:
        peers = [name for name in named if name in sides]
        if clients in levels and peers and ours in sides:
            (rates,), best = values("rate", [ours]), values("rate", peers)
            claimed = f"{ours} / {best_of(peers)}"
            made.append(ratios.claim(claimed, setting, rates, best.max(axis=0), target))
    for ours, named, levels, target in TAILS:
        peers = [name for name in named if name in sides]
        if clients in levels and peers and ours in sides:
            (tails,), best = values("p99", [ours]), values("p99", peers)
            claimed = f"p99 of {best_of(peers)} / {ours}"
            made.append(ratios.claim(claimed, setting, best.min(axis=0), tails, target))
    if clients == FULL_BATCH and {"http", "floor"} <= sides.keys():
        spent, floor = values("cpu", ["http", "floor"])
        claimed = f"{CPU} ms / CPU of http beyond floor"
        made.append(ratios.claim(claimed, setting, np.full_like(spent, CPU), spent - floor, 1.0))
    return made


def best_of(peers: Sequence[str]) -> str:
    """How a claim names them."""
    return peers[0] if len(peers) == 1 else f"best of {', '.join(peers)}"


def table(results: Results) -> tuple[list[str], list[dict[str, Any]]]:
    """The printed table, and the claims for --json."""
    head = f"{'c':>3}  {'side':14} {'per s':>6} {'spread':>12} {'p50 ms':>7} {'p99 ms':>7}"
    lines, claims = [f"{head} {'CPU ms each':>12}"], list[dict[str, Any]]()
    for clients, sides in results.items():
        for side, rounds in sides.items():
            rate, p50, p99, cpu, _ = np.median(np.array(rounds), axis=0)
            low, high = min(r.rate for r in rounds), max(r.rate for r in rounds)
            lines.append(
                f"{clients:3}  {side:14} {rate:6.0f} {low:5.0f} ..{high:5.0f}"
                f" {p50:7.1f} {p99:7.1f} {cpu:12.2f}"
            )
        made = claims_of(clients, sides)
        lines += map(ratios.in_words, made)
        claims += made
    return lines, claims


# What the sides are, for people who see the picture alone.
TITLES = {
    "http": "Rampart, its own server",
    "http x2": "its own server, a worker a core",
    "http full": "with every detector and the purifier",
    "torchserve": "Rampart in TorchServe",
    "torchserve x2": "in TorchServe, a worker a core",
    "triton": "Rampart in Triton",
    "stock": "TorchServe's image_classifier",
    "tuned": "the same, tuned",
    "litserve": "LitServe, PyTorch",
    "litserve onnx": "LitServe, ONNX Runtime",
    "bentoml onnx": "BentoML, ONNX Runtime",
    "litserve int8": "LitServe, Rampart's int8 file",
    "bentoml int8": "BentoML, Rampart's int8 file",
    "floor": "no server: that file in a loop",
}
GROUPS = {
    "defended by Rampart": ("#0072B2", ""),
    "other servers": ("#BBBBBB", "//"),
    "the most that a server could reach": ("white", ""),
}


def group_of(side: str) -> str:
    """Which of GROUPS a side belongs to."""
    defended, others, most = GROUPS
    return most if side == "floor" else defended if side in OURS else others


def picture(results: Results, path: Path) -> None:
    """Draw requests/s by side and concurrency, as a PNG: medians, and lines from least to most."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = list(next(iter(results.values())))
    figure = Figure(figsize=(11, 5.2), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for own, (concurrency, sides) in zip(axes, results.items(), strict=True):
        rates = np.array([[r.rate for r in sides[name]] for name in names])  # (sides, rounds)
        middle = np.median(rates, axis=1)
        spread = np.abs(np.stack([rates.min(1), rates.max(1)]) - middle)
        looks = [GROUPS[group_of(name)] for name in names]
        colours, hatches = zip(*looks, strict=True)
        titles = [TITLES.get(name, name) for name in names]
        style = {"color": colours, "hatch": hatches, "edgecolor": "#444444", "linewidth": 0.6}
        own.barh(titles, middle, xerr=spread, ecolor="black", **style)
        own.set_title(f"{concurrency} client{'s' * (concurrency > 1)} at a time")
        own.set_xlabel("requests per second")
        own.grid(axis="x", alpha=0.3)
        own.set_axisbelow(True)
        own.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    patches = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="#444444", label=name)
        for name, (colour, hatch) in GROUPS.items()
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    cores = len(os.sched_getaffinity(0))
    rounds = len(next(iter(next(iter(results.values())).values())))
    figure.suptitle(
        f"Answers a second, all on the same {cores} cores: longer is better\n"
        f"Black lines: least and most of {rounds} rounds. Each panel has a scale of its own."
    )
    figure.savefig(path, format="png")


def alternate(
    levels: Sequence[int], names: Sequence[str], rounds: int, run: Callable[[str, int], Round]
) -> Results:
    """Every side at every level of load, alternating within each round."""
    results: Results = {level: {name: [] for name in names} for level in levels}
    turns = [(level, name) for _ in range(rounds) for level in levels for name in names]
    for level, name in tqdm(turns):
        results[level][name].append(run(name, level))
    return results


def arrivals_table(results: Results) -> list[str]:
    """What is printed of open loop."""
    head = f"{'arrive':>6}  {'side':14} {'sent':>6} {'failed':>7} {'p50 ms':>7} {'p99 ms':>7}"
    lines = [f"{head}  p99's spread"]
    for arrivals, sides in results.items():
        for side, rounds in sides.items():
            rate, p50, p99, _, failed = np.median(np.array(rounds), axis=0)
            low, high = min(r.p99 for r in rounds), max(r.p99 for r in rounds)
            lines.append(
                f"{arrivals:6}  {side:14} {rate:6.0f} {failed:7.1%} {p50:7.0f} {p99:7.0f}"
                f"  {low:.0f} to {high:.0f}"
            )
    return lines


def main() -> None:
    """Start all servers, alternate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("model_store/cifar10"))
    parser.add_argument("--images", type=Path, help=".npz; without it crops of a photograph")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--open-loop", action="store_true", help="fixed rates of arrival")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="only these")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("this benchmark drives its load with wrk: install the package wrk")
    images = (load(options.images).image[:64] if options.images else sample_crops(32)).numpy()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bench = Bench(options.model, images, folder)
        with bench.stack:
            bench.start(options.sides)
            if options.open_loop:
                open_loop(bench, options)
            else:
                closed_loop(bench, Engine(bench.graph, "cpu"), pngs(images), options)


def open_loop(bench: Bench, options: argparse.Namespace) -> None:
    """Latency of every side where requests come at a fixed rate."""

    def run(name: str, arrivals: int) -> Round:
        return bench.run(name, load_with_locust, arrivals, options.seconds)

    results = alternate(ARRIVALS, list(bench.sides), options.rounds, run)
    print("\n".join(arrivals_table(results)))


def closed_loop(
    bench: Bench, engine: Engine, bodies: Sequence[bytes], options: argparse.Namespace
) -> None:
    """Requests/s of every side and of the graph alone, with so many clients."""

    def run(name: str, clients: int) -> Round:
        if name == "floor":
            return run_floor(engine, bodies, clients, options.seconds)
        return bench.run(name, load_with_wrk, clients, options.seconds)

    results = alternate(CONCURRENCY, [*bench.sides, "floor"], options.rounds, run)
    lines, claims = table(results)
    for name, side in bench.sides.items():
        size = f"{side.megabytes():6.0f} MB resident"
        lines.append(f"     {name:14} {side.start:5.1f} s to the first answer, {size}")
    once = [
        (claimed, bound, value)
        for http in (side for name, side in bench.sides.items() if name == "http")
        for claimed, bound, value in (
            (f"{MEGABYTES} MB / http resident", MEGABYTES, http.megabytes()),
            (f"{START} s / http's first answer", START, http.start),
        )
    ]
    for claimed, bound, value in once:
        claims.append(ratios.claim(claimed, "once", [bound], [value], 1.0))
        lines.append(ratios.in_words(claims[-1]))
    lines.append(f"{sum(c['holds'] for c in claims)} of {len(claims)} targets hold")
    print("\n".join(lines))
    if options.json:
        ratios.write(options.json, claims)
    if options.plot:
        picture(results, options.plot)


if __name__ == "__main__":
    main()
