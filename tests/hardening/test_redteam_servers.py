"""The red team against servers of others, which serve a model of brightness as their own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import torch
from kserve_server import PYTHON
from prometheus_client.parser import text_string_to_metric_families
from servers import Server, free_port
from started import Started
from triton_server import Triton

from rampart.hardening.attack import redteam
from rampart.hardening.attack.redteam import Endpoint, Wire
from rampart.hardening.model.images import Images

pytestmark = pytest.mark.server
CLASSES = ("dark", "bright", "third", "fourth", "fifth")  # TorchServe tells the first five
SIDE = 32
# Logits of the mean of pixels in [0, 1]: bright above the middle; the others never win.
BRIGHT = 128 / 255
RULE = f"(({BRIGHT} - mean) * 20, (mean - {BRIGHT}) * 20, -9.0, -9.0, -9.0)"


def flat(*values: int) -> np.ndarray:
    return np.stack([np.full((SIDE, SIDE, 3), value, np.uint8) for value in values])


def fools(
    endpoint: Endpoint, out: Path, levels: tuple[int, int] = (127, 140), **options: Any
) -> redteam.Outcome:
    """One image just below the middle under attack; the other is where some attacks begin."""
    images = Images(torch.from_numpy(flat(*levels)), torch.tensor([0, 1]), CLASSES)
    (outcome,) = redteam.redteam(endpoint, images, out, limit=1, budget=200, **options)
    return outcome


def check_batches(endpoint: Endpoint, out: Path, sent: Callable[[], float]) -> None:
    """Three pictures are one request, and an attack asks far more than it sends, as the server
    counts requests.
    """
    before = sent()
    endpoint.ask(flat(100, 160, 120))
    assert sent() - before == 1
    outcome = fools(endpoint, out, (90, 170), attacks=["hopskipjump"])
    assert (outcome.queries, outcome.success) == (200, None)
    assert sent() - before < 150


def counted(root: str, name: str, **labels: str) -> float:
    """A counter that a server shows to Prometheus."""
    families = text_string_to_metric_families(requests.get(f"{root}/metrics", timeout=10).text)
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(s.value for s in found if labels.items() <= s.labels.items())


TRITON = f"""
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb.get_input_tensor_by_name(request, "x").as_numpy()
            mean = x.mean((1, 2, 3))
            logits = np.stack(np.broadcast_arrays(*{RULE}), 1).astype(np.float32)
            answers.append(pb.InferenceResponse([pb.Tensor("logits", logits)]))
        return answers
"""
CONFIG = """
backend: "python"
max_batch_size: 64
input { name: "x" data_type: TYPE_FP32 dims: [3, 32, 32] }
output { name: "logits" data_type: TYPE_FP32 dims: [5] }
"""


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    repository = tmp_path_factory.mktemp("repository")
    (repository / "bright" / "1").mkdir(parents=True)
    (repository / "bright" / "1" / "model.py").write_text(TRITON)
    (repository / "bright" / "config.pbtxt").write_text(CONFIG)
    server = Triton(repository, tmp_path_factory.mktemp("triton"), free_port())
    server.wait()
    yield server
    assert server.end() == 0


def test_triton_answers_a_batch_of_pixels_in_logits_and_is_fooled(
    triton: Triton, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{triton.port}/v2/models/bright/infer"
    endpoint = Endpoint(url, CLASSES)
    answers = endpoint.ask(flat(100, 160, 120))
    assert [answer.label for answer in answers] == [0, 1, 0]
    assert endpoint.reading.kind == "logits"
    lead = (BRIGHT - 100 / 255) * 20
    assert answers[0].top[0] == (
        0,
        pytest.approx(1 / (1 + np.exp(-2 * lead) + 3 * np.exp(-9 - lead))),
    )
    outcome = fools(endpoint, tmp_path / "any", attacks=["square"])
    assert outcome.success is not None and outcome.success > 1
    outcome = fools(endpoint, tmp_path / "wanted", attacks=["simba"], target="bright")
    assert outcome.success is not None and outcome.settings.target == 1
    assert fools(endpoint, tmp_path / "not", attacks=["oars"], target="third").success is None

    def sent() -> float:
        (stats,) = requests.get(url.replace("infer", "stats"), timeout=10).json()["model_stats"]
        return float(stats["inference_stats"]["success"]["count"])

    check_batches(endpoint, tmp_path / "many", sent)
    with pytest.raises(ValueError, match="takes 32 pixels a side: pass --image-size 32"):
        Endpoint(url, CLASSES, size=64).ask(flat(100))
    with pytest.raises(ValueError, match="2 classes of these images"):
        Endpoint(url, CLASSES[:2]).ask(flat(100))
    with pytest.raises(ValueError, match="models/dim answers with status 40"):
        Endpoint(url.replace("bright", "dim"), CLASSES).ask(flat(100))


KSERVE = f"""
import kserve
import numpy as np

class Bright(kserve.Model):
    def __init__(self):
        super().__init__("bright")
        self.ready = True

    def predict(self, payload, headers=None):
        scores = []
        for x in payload["instances"]:
            mean = np.mean(x)
            scores.append(np.array({RULE}))
        shares = [np.exp(row) / np.exp(row).sum() for row in scores]
        return {{"predictions": [row.tolist() for row in shares]}}

if __name__ == "__main__":
    kserve.ModelServer(workers=1).start([Bright()])
"""


@pytest.fixture
def kserve(tmp_path: Path) -> Iterator[Started]:
    """A real server of the protocol, which KServe has as v1: TensorFlow Serving has no wheel."""
    (tmp_path / "bright.py").write_text(KSERVE)
    port = free_port()
    words = [PYTHON, "bright.py", "--http_port", port, "--grpc_port", port + 1]
    server = Started(words, port, tmp_path, os.environ)
    server.wait()
    yield server
    assert server.end() == 0


def test_a_server_of_tensorflow_servings_predictions_answers_batches_and_is_fooled(
    kserve: Started, tmp_path: Path
) -> None:
    url = f"{kserve.root}/v1/models/bright:predict"
    endpoint = Endpoint(url, CLASSES)
    answers = endpoint.ask(flat(*range(90, 170, 8)))
    assert [answer.label for answer in answers] == [0] * 5 + [1] * 5
    assert endpoint.reading.kind == "probabilities"
    outcome = fools(endpoint, tmp_path / "any", attacks=["square"])
    assert outcome.success is not None and outcome.success > 1

    def sent() -> float:
        return counted(kserve.root, "request_predict_seconds_count", model_name="bright")

    check_batches(endpoint, tmp_path / "many", sent)
    with pytest.raises(ValueError, match="dim:predict answers with status 404"):
        Endpoint(url.replace("bright", "dim"), CLASSES).ask(flat(100))
    with pytest.raises(ValueError, match="5 scores do not fit the 2 classes of these images"):
        Endpoint(url, CLASSES[:2]).ask(flat(100))


STOCK = f"""
import torch

class Bright(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        mean = (x * std + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)).mean((1, 2, 3))
        return torch.stack([mean * 0 + logit for logit in {RULE}], 1)
"""


@pytest.mark.slow
def test_torchserves_stock_classifier_answers_in_probabilities_of_its_labels_and_is_fooled(
    launch: Callable[..., Server], tmp_path: Path
) -> None:
    (tmp_path / "bright.py").write_text(STOCK)
    (tmp_path / "index_to_name.json").write_text(
        '{"0": "dark", "1": "bright", "2": "third", "3": "fourth", "4": "fifth"}'
    )
    torch.save({"unused": torch.zeros(1)}, tmp_path / "bright.pt")
    command = [str(Path(sys.executable).with_name("torch-model-archiver")), "--version", "1.0"]
    command += ["--model-name", "bright", "--model-file", str(tmp_path / "bright.py")]
    command += ["--serialized-file", str(tmp_path / "bright.pt"), "--handler", "image_classifier"]
    command += ["--extra-files", str(tmp_path / "index_to_name.json")]
    command += ["--export-path", str(tmp_path)]
    own = os.environ | {"TMPDIR": str(tmp_path)}  # it empties $TMPDIR/NAME
    subprocess.run(command, check=True, capture_output=True, env=own)
    port = free_port()
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    server = launch(tmp_path / "bright.mar", cache, port=port)
    url = f"http://127.0.0.1:{port}/predictions/bright"
    endpoint = answering(lambda: Endpoint(url, CLASSES, wire=Wire("torchserve")))
    answers = endpoint.ask(flat(*range(90, 170, 8)))
    assert [answer.label for answer in answers] == [0] * 5 + [1] * 5
    assert endpoint.reading.kind == "probabilities"
    assert fools(endpoint, tmp_path / "out", attacks=["square"]).success is not None
    with pytest.raises(ValueError, match="status 503"):
        Endpoint(url, CLASSES).ask(flat(100))
    server.end()


LIT = f"""
import base64, io, sys
import litserve
import numpy as np
from PIL import Image

class Bright(litserve.LitAPI):
    def setup(self, device):
        pass

    def decode_request(self, request):
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(request["image"]["data"]))))

    def predict(self, x):
        mean = x.mean() / 255
        return np.array({RULE})

    def encode_response(self, output):
        shares = np.exp(output) / np.exp(output).sum()
        names = {CLASSES}
        return {{"result": {{"label": names[int(output.argmax())], "score": float(shares.max())}},
                "all": dict(zip(names, map(float, shares)))}}

if __name__ == "__main__":
    server = litserve.LitServer(Bright(), accelerator="cpu")
    server.run(port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
"""
BENTO = f"""
import base64, io
import bentoml
import numpy as np
from PIL import Image

@bentoml.service(workers=1)
class Bright:
    @bentoml.api(batchable=True, max_batch_size=64)
    def classify(self, images: list[str]) -> list[int]:
        files = [io.BytesIO(base64.b64decode(image)) for image in images]
        means = [np.asarray(Image.open(file)).mean() / 255 for file in files]
        return [int(np.argmax({RULE})) for mean in means]
"""


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Starts one of a name, by its source; the port that it listens on."""
    running: list[subprocess.Popen[bytes]] = []

    def start(package: str, source: str, *command: str) -> int:
        pytest.importorskip(package, reason="`make .venv/peers` installs it")
        port = free_port()
        (tmp_path / "bright.py").write_text(source)
        words = [word.replace("PORT", str(port)) for word in command]
        own = os.environ | {"BENTOML_DO_NOT_TRACK": "1", "BENTOML_HOME": str(tmp_path / "home")}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, *words], cwd=tmp_path, env=own, **quiet)
        running.append(process)
        return port

    yield start
    for process in running:
        stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a server and what it has started."""
    family = [*psutil.Process(process.pid).children(recursive=True), process]
    for one in family:
        one.terminate()
    process.wait(30)
    psutil.wait_procs([one for one in family if one is not process], 10)


def answering(endpoint: Callable[[], Endpoint]) -> Endpoint:
    """The endpoint, once its server answers."""
    end = time.monotonic() + 40
    while True:
        found = endpoint()
        try:
            found.ask(flat(100))
        except (ConnectionError, ValueError) as error:  # TorchServe listens before it has a worker
            assert time.monotonic() < end, error
            time.sleep(0.3)
        else:
            return found


def test_litserve_is_asked_by_a_template_and_answers_by_paths(
    begin: Callable[..., int], tmp_path: Path
) -> None:
    port = begin("litserve", LIT, "bright.py", "PORT")
    url = f"http://127.0.0.1:{port}/predict"
    send = '{"image": {"data": "$b64"}}'
    both = Wire(send=send, label="$.result.label", score="$['result'].score")
    endpoint = answering(lambda: Endpoint(url, CLASSES, wire=both))
    answers = endpoint.ask(flat(*range(90, 170, 8)))
    assert [answer.label for answer in answers] == [0] * 5 + [1] * 5
    assert endpoint.reading.kind == "a confidence"
    every = Endpoint(url, CLASSES, wire=Wire(send=send, score="$.all"))
    assert fools(every, tmp_path / "out", attacks=["oars"]).success is not None
    assert every.reading.kind == "probabilities"
    with pytest.raises(ValueError, match=r"gives an unexpected answer \(KeyError: 'none'"):
        Endpoint(url, CLASSES, wire=Wire(send=send, score="$.none")).ask(flat(100))


def test_bentoml_answers_batches_with_labels_alone_and_decision_based_attacks_fool_it(
    begin: Callable[..., int], tmp_path: Path
) -> None:
    port = begin("bentoml", BENTO, "-m", "bentoml", "serve", "bright:Bright", "--port", "PORT")
    url = f"http://127.0.0.1:{port}/classify"
    wire = Wire(send='{"images": "$b64*"}', label="$[*]")
    endpoint = answering(lambda: Endpoint(url, CLASSES, wire=wire))
    assert [answer.label for answer in endpoint.ask(flat(100, 160, 120))] == [0, 1, 0]
    assert endpoint.reading.kind == "labels"
    images = Images(torch.from_numpy(flat(127, 140)), torch.tensor([0, 1]), CLASSES)
    outcomes = redteam.redteam(endpoint, images, tmp_path / "out", limit=1, budget=300)
    assert [outcome.attack for outcome in outcomes] == ["hopskipjump", "boundary"]
    assert outcomes[0].success is not None

    def sent() -> float:
        root = url.removesuffix("/classify")
        return counted(root, "bentoml_service_request_total", endpoint="/classify")

    check_batches(endpoint, tmp_path / "many", sent)
