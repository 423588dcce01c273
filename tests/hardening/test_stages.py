from pathlib import Path

import pytest
from blobs import blobs

from rampart.hardening.train.stages import digest, stages


class Job:
    """One stage that counts how often it runs."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folders: list[Path] = []

    def run(self, **inputs: object) -> Path:
        with stages(self.home, 1) as job:
            return job.once("train", inputs, self.folders.append)


def test_a_stage_runs_once_for_the_same_inputs_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(tmp_path)
    folders = {job.run(images=blobs(4), epochs=3) for _ in range(2)}
    assert folders == set(job.folders)
    assert len(job.folders) == 1
    out, bar = capsys.readouterr()
    said = ["[1/1] train", f"[1/1] train: done before, in {job.folders[0]}"]
    assert out.splitlines() == said
    assert "1/1 stages" in bar


@pytest.mark.parametrize("change", ["epochs", "images", "file"])
def test_a_stage_runs_again_elsewhere_when_anything_it_is_made_from_changes(
    change: str, tmp_path: Path
) -> None:
    job, file = Job(tmp_path), tmp_path / "weights"
    file.write_text("old")
    first = {"images": blobs(4), "epochs": 3, "weights": file}
    kept = job.run(**first)
    if change == "file":
        file.write_text("new")
    changed = {"epochs": {"epochs": 4}, "images": {"images": blobs(4, seed=1)}, "file": {}}
    assert job.run(**first | changed[change]) != kept
    assert len(set(job.folders)) == 2


def test_an_interrupted_stage_goes_on_in_its_folder(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "state").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), stages(tmp_path, 1) as whole:
        whole.once("train", {"epochs": 3}, interrupted)
    job = Job(tmp_path)
    assert (job.run(epochs=3) / "state").read_text() == "half"
    assert len(job.folders) == 1


def test_labels_and_classes_count_among_images() -> None:
    images = blobs(4)
    moved = type(images)(images.image, images.label + 1, images.classes)
    renamed = type(images)(images.image, images.label, images.classes[::-1])
    assert len({digest(images), digest(moved), digest(renamed)}) == 3
