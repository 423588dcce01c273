import json
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

from rampart.export import shipped
from rampart.export.archive import archive, export_variant
from rampart.export.shipped import bare, find
from rampart.handlers.engine import Engine
from rampart.handlers.verdict import p_values
from rampart.hardening.model.files import Precision, graph_file, load_variant
from rampart.launch.sample import ANY

STORE = Path(__file__).parents[2] / "model_store"
SHIPPED: list[tuple[str, str, Precision]] = [
    ("cifar10", "lean", "int8"),
    ("cifar10-vgg11", "lean", "int8"),
    ("traffic-signs", "lean", "int8"),
    ("blood-cells", "lean", "int8"),
]

# Of `views`, by the archive that was exported before graphs were shipped.
LABELS = [8, 8, 0, 8]
P_VALUES = [0.8008, 0.7885, 0.4639, 0.6275]


@pytest.fixture
def copied(tiny_shipped: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_shipped, tmp_path / "tiny")
    return tmp_path / "tiny"


def test_every_graph_in_the_store_is_what_its_weights_and_this_code_make() -> None:
    """Where this fails, the code that exports has changed: `make graphs`."""
    assert {file.parent.name for file in STORE.glob("*/graph-*.onnx")} == {n for n, *_ in SHIPPED}
    for name, variant, precision in SHIPPED:
        graph = find(STORE / name, variant, precision)
        assert graph and not graph.parity.decisions_differ
        labels = "unmatched" if name == "blood-cells" else "labels_differ"
        assert getattr(graph.parity, labels) == 0
        assert graph.file.stat().st_size < 16_000_000


def test_a_graph_that_is_there_is_packed_as_it_is_and_without_torch(
    tiny_shipped: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.mar"
    code = (
        "import sys; hidden = ('torch', 'torchvision', 'onnx', 'skimage', 'safetensors', 'tqdm')\n"
        "for name in hidden: sys.modules[name] = None\n"
        "from rampart.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "archive", str(tiny_shipped), "--variant", "lean"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert "parity on 96 images" in done.stdout, done.stderr
    with ZipFile(out) as packed:
        assert packed.read("graph.onnx") == graph_file(tiny_shipped, "lean").read_bytes()


@pytest.mark.parametrize("name", ["weights.safetensors", "calibration-lean.json"])
def test_a_graph_of_other_weights_or_calibration_is_stale(copied: Path, name: str) -> None:
    assert find(copied, "lean")
    with (copied / name).open("ab") as file:
        file.write(b" ")
    assert find(copied, "lean") is None


def test_a_graph_of_other_code_is_stale(
    tiny_shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shipped.CODE, "classify", shipped.CODE["classify"][1:])
    assert find(tiny_shipped, "lean") is None


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("classify", "hardening/model/wrapping.py"),
        ("classify", "hardening/model/pixels.py"),
        ("detect", "hardening/model/pixels.py"),
        ("detect", "hardening/objects/own.py"),
    ],
)
def test_a_graph_depends_on_what_turns_pixels_and_networks_of_your_own_into_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, file: str
) -> None:
    for name in shipped.CODE[task] + (file,):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shipped.PACKAGE / name, tmp_path / name)
    before = shipped.code(task)
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path)
    assert shipped.code(task) == before
    with (tmp_path / file).open("a") as code:
        code.write("def other() -> None: ...\n")
    assert shipped.code(task) != before


def test_words_about_the_code_and_its_imports_make_no_other_graph() -> None:
    one = 'import a\n\n\ndef f(x):\n    """Twice."""\n    return 2 * x\n'
    other = "# Doubles.\nfrom b import (\n    c,\n)\ndef f(x):\n    return 2 * x\n"
    assert list(bare(one)) == list(bare(other))
    assert list(bare(one)) != list(bare(one.replace("2 * x", "3 * x")))


def test_a_damaged_graph_is_refused(copied: Path) -> None:
    with graph_file(copied, "lean").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="damaged"):
        find(copied, "lean")


def test_without_a_graph_and_without_torch_the_remedy_is_named(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"rampart-endpoint\[harden\]"):
        export_variant(tiny_folder, "lean", tmp_path / "graph.onnx")


def test_an_archive_is_laid_out_as_torch_model_archiver_does(
    tiny_shipped: Path, tmp_path: Path
) -> None:
    ours, content, theirs = tmp_path / "a.mar", tmp_path / "content", tmp_path / "theirs"
    archive(tiny_shipped, ours, variant="lean", version="3.1")
    added = {"MAR-INF/MANIFEST.json", "defended.py", "model-config.yaml"}
    with ZipFile(ours) as packed:
        packed.extractall(content)
        own = json.loads(packed.read("MAR-INF/MANIFEST.json"))
        files = {name: packed.read(name) for name in packed.namelist() if name not in added}
        config = content / "model-config.yaml"
    for name in added - {"model-config.yaml"}:
        (content / name).unlink()
    (content / "MAR-INF").rmdir()
    shutil.move(config, tmp_path / "model-config.yaml")
    theirs.mkdir()
    command = [Path(sys.executable).with_name("torch-model-archiver"), "--model-name", "a"]
    command += ["--version", "3.1", "--config-file", tmp_path / "model-config.yaml"]
    command += ["--handler", content / "rampart" / "handlers" / "defended.py"]
    command += ["--extra-files", content, "--export-path", theirs]
    subprocess.run([str(word) for word in command], check=True, env={"TMPDIR": str(tmp_path)})
    with ZipFile(theirs / "a.mar") as packed:
        manifest = json.loads(packed.read("MAR-INF/MANIFEST.json"))
        names = {name for name in packed.namelist() if not name.endswith("/")}
    assert own | {"createdOn": manifest["createdOn"]} == manifest
    assert names == {*files, *added}


def views() -> np.ndarray:
    """The sample picture whole, mirrored, and two parts of it, as uint8 (4, 32, 32, 3)."""
    picture = Image.open(ANY.file).convert("RGB")
    boxes = [(0, 0, 256, 256), (256, 0, 0, 256), (64, 32, 224, 192), (0, 128, 128, 256)]
    parts = [picture.transform((256, 256), Image.Transform.EXTENT, box) for box in boxes]
    return np.stack([np.asarray(part.reduce(8)) for part in parts])


def test_the_shipped_graph_gives_the_labels_and_p_values_that_it_gave(tmp_path: Path) -> None:
    folder = STORE / "cifar10"
    export_variant(folder, "lean", tmp_path / "graph.onnx", precision="int8")
    out = Engine(tmp_path / "graph.onnx", device="cpu").run(views())
    p = p_values(out.scores.astype(np.float64), load_variant(folder, "lean", "int8"))
    assert out.logits.argmax(1).tolist() == LABELS
    # Other CPUs multiply 8-bit numbers with other roundings.
    assert p.tolist() == pytest.approx(P_VALUES, abs=0.02)
