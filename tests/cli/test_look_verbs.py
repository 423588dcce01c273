import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command import run
from PIL import Image

from rampart.hardening.model.files import CAPTION, SAMPLES


@pytest.mark.training
def test_attack_writes_8_bit_pictures_within_eps_that_change_the_label(
    tmp_path: Path, tiny_folder: Path
) -> None:
    output = run("attack", "--model", tiny_folder, "--out", tmp_path, "--eps", 8)
    clean, attacked = (
        np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
        for name in ("clean", "attacked")
    )
    assert clean.shape == attacked.shape == (32, 32, 3)
    assert 1 <= np.abs(clean - attacked).max() <= 8
    labels = re.findall(r"png: (\w+) \d+%", output)
    assert len(set(labels)) == 2
    with Image.open(tmp_path / "panel.png") as panel:
        assert panel.size[0] > 3 * 288
    run("attack", "--model", tiny_folder, "--out", tmp_path, "--variant", "lean")
    with Image.open(tmp_path / "panel.png") as panel:  # it has no purifier to show
        assert 2 * 288 < panel.size[0] < 3 * 288


@pytest.mark.training
def test_attack_shows_what_an_undefended_twin_says_and_another_picture(
    tmp_path: Path, tiny_folder: Path, encode: Callable[..., bytes]
) -> None:
    own = tmp_path / "own"
    shutil.copytree(tiny_folder, own)
    pixels = np.tile(np.arange(0, 256, 8, dtype=np.uint8)[:, None, None], (1, 32, 3))
    (own / "sample.png").write_bytes(encode(pixels))
    (tmp_path / "red.png").write_bytes(encode(np.full((32, 32, 3), (255, 0, 0), np.uint8)))
    out = tmp_path / "out"
    more = ["--twin", tiny_folder, "--also", tmp_path / "red.png", "--variant", "lean"]
    lines = run("attack", "--model", own, "--out", out, "--eps", 4, *more).splitlines()
    names = ["clean", "attacked-twin", "attacked", "also"]
    assert [Path(line.split(":")[0]).stem for line in lines] == [*names, "panel"]
    for line in lines[:4]:
        # The twin is the model's own network: both say the same.
        rampart, twin = re.findall(r"(?:Rampart|undefended): (\w+ \d+%)", line)
        assert rampart == twin
    found = {name: np.asarray(Image.open(out / f"{name}.png")).astype(int) for name in names}
    assert (found["clean"] == pixels).all() and (found["also"] == (255, 0, 0)).all()
    assert 1 <= np.abs(found["attacked-twin"] - found["clean"]).max() <= 4
    with Image.open(out / "panel.png") as panel:  # two lines of words below two of captions
        assert panel.size == (4 * 304 + 16, 288 + 5 * 24 + 32 + 8)


@pytest.mark.training
@pytest.mark.parametrize("twin", [True, False])
def test_an_attack_leaves_its_pictures_as_the_models_samples_with_captions(
    tmp_path: Path, tiny_folder: Path, pixels: np.ndarray, encode: Callable[..., bytes], twin: bool
) -> None:
    own = shutil.copytree(tiny_folder, tmp_path / "own")
    for name in ("mine.png", "red.png"):
        (tmp_path / name).write_bytes(encode(pixels))
    more = ["--eps", 4, "--variant", "lean", *(["--twin", tiny_folder] if twin else [])]
    more += ["--also", tmp_path / "red.png", "--as-samples", "--out", tmp_path / "out"]
    told = run("attack", tmp_path / "mine.png", "--model", own, *more)
    captions = []
    for name, view in zip(SAMPLES, ("clean", "attacked", "also"), strict=True):
        view += "-twin" if twin and view == "attacked" else ""
        with Image.open(own / name) as picture, Image.open(tmp_path / "out" / f"{view}.png") as out:
            assert (np.asarray(picture) == np.asarray(out)).all()
            captions.append(picture.info[CAPTION])
        assert f"{own / name}: {captions[-1]}" in told
    assert captions[0] == "mine.png" and captions[2] == "red.png, not attacked"
    assert captions[1].startswith("mine.png, attacked within Linf 4/255")
    assert ("an undefended network answers" in captions[1]) == twin


@pytest.mark.parametrize("twin", [True, False])
def test_the_words_below_an_attack_tell_what_its_numbers_mean(twin: bool) -> None:
    from rampart.hardening.attack.pgd import Threat
    from rampart.hardening.model.classifier import Classifier, ClassifierConfig
    from rampart.looks import Aim, legend

    net = Classifier(ClassifierConfig("resnet10", 2, 0.125)) if twin else None
    said = legend(Aim(Threat("Linf", 4 / 255), net, rate=0.02))
    assert "no colour by more than 4 of 255" in said and "Below 0.02 Rampart flags" in said
    assert ("trained without attacks" in said) == twin
    assert "stays within L2 0.5." in legend(Aim(Threat("L2", 0.5)))
    assert ["Lead:" in legend(Aim(Threat()), v) for v in ("lean", "guarded")] == [False, True]


@pytest.mark.parametrize("verb", ["attack", "certify", "purify"])
def test_a_picture_that_cannot_be_read_is_named(
    tmp_path: Path, tiny_folder: Path, verb: str
) -> None:
    (tmp_path / "note.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"note\.txt: .*PNG"):
        run(verb, tmp_path / "note.txt", "--model", tiny_folder)


def test_a_purified_picture_stands_beside_the_one_sent(tmp_path: Path, tiny_folder: Path) -> None:
    sheet, size = tmp_path / "purified.png", 32
    out = run("purify", "--model", tiny_folder, "--out", sheet)
    assert [line.split(":")[0] for line in out.splitlines()][:2] == ["as sent", "purified"]
    out = run("purify", "--model", tiny_folder, "--out", sheet, "--hide", 0, 0, 8, 8)
    assert "projected: " in out
    with Image.open(sheet) as panel:
        assert panel.size[0] > 3 * 288
    with pytest.raises(ValueError, match=rf"--hide .*{size}x{size} picture"):
        run("purify", "--model", tiny_folder, "--out", sheet, "--hide", size, 0, 8, 8)


def test_a_picture_is_certified_or_abstained_on(tiny_folder: Path) -> None:
    sure = run("certify", "--model", tiny_folder, "--samples", 300, "--sigma", 0.001)
    assert re.search(r"holds within an L2 radius of 0\.00\d .* 300 of 300 noisy", sure)
    lost = run("certify", "--model", tiny_folder, "--samples", 3, "--sigma", 0.001)
    assert lost.startswith("abstains: ")


def test_a_certified_label_is_told_to_be_wrong_or_right(tmp_path: Path, tiny_folder: Path) -> None:
    certify = ["certify", "--model", tiny_folder, "--samples", 300, "--sigma", 0.001]
    label = run(*certify).partition(":")[0]
    other = "dog" if label != "dog" else "ship"
    assert f"{label} is right" in run(*certify, "--label", label)
    assert f"{label} is wrong: the picture shows {other}" in run(*certify, "--label", other)
    shown = f"{label} is right" if label == "cat" else "wrong: the picture shows cat"
    assert shown in run(*certify)  # scikit-image's is one
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    assert "pass --label to check" in run("certify", tmp_path / "red.png", *certify[1:])
    with pytest.raises(ValueError, match="--label lion: the model's classes are airplane, "):
        run(*certify, "--label", "lion")
