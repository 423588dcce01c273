import subprocess
import sys
from pathlib import Path

import numpy as np

from hardening.data import Images

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "agreement.py"


def test_the_endpoint_answers_as_the_torch_pipeline_on_every_image(
    tmp_path: Path, tiny_archive: Path, tiny_images: Images
) -> None:
    few = tiny_images[slice(-60, None)]
    np.savez(tmp_path / "test.npz", image=few.image.numpy(), label=few.label.numpy())
    command = [sys.executable, str(SCRIPT), "--data", str(tmp_path / "test.npz")]
    command += ["--model", str(tiny_archive.with_suffix(""))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "same label as the torch pipeline: 60 of 60" in done.stdout, done.stderr
    assert "clean images flagged: " in done.stdout
