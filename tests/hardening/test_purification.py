from pathlib import Path

import pytest
import torch
from blobs import Learned
from torch import Tensor, nn
from torch.nn import functional as F

from rampart.hardening.judge import purification
from rampart.hardening.judge.outside import CORRUPTIONS
from rampart.hardening.model.card import Row
from rampart.hardening.model.images import Images
from rampart.hardening.model.pixels import to_uint8
from rampart.hardening.train import cifar10


class Negative(nn.Module):
    """As on a film."""

    def forward(self, x: Tensor) -> Tensor:
        return 1 - x


class Smooth(nn.Module):
    """The mean of 3x3 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "replicate"), 3, 1)


def measured(
    learned: Learned, purifier: nn.Module, folder: Path, own: nn.Module | None = None
) -> list[Row]:
    images = Images(to_uint8(learned.x), learned.label, cifar10.CLASSES)
    nets = {"classifier": own or learned.model, "undefended": learned.model}
    found = purification.rows(purifier, nets, {}, images, learned.threat, folder=folder)
    return list(found)


def by_name(rows: list[Row], subject: str = "classifier") -> dict[str, Row]:
    return {row["name"]: row for row in rows if row["subject"] == subject}


def test_a_purifier_that_changes_nothing_gains_nothing_and_is_to_be_left_off(
    learned: Learned, tmp_path: Path
) -> None:
    rows = measured(learned, nn.Identity(), tmp_path)
    assert len(rows) == 2 * (len(CORRUPTIONS) + 8)
    assert all(row["gain"]["value"] == 0 and row["with"] == row["without"] for row in rows)
    assert not any(row["beyond_chance"] for row in rows)
    words = purification.advice(rows)
    assert [line.partition(", leave it off")[0] for line in words] == [
        "In front of the classifier",
        "In front of the undefended twin",
    ]
    head, body = purification.table(rows)
    assert {len(cells) for cells in body} == {len(head)} == {8}
    assert body[0][0] == "clean" and body[0][4].startswith("+0.0 (")


def test_where_it_helps_and_what_it_costs_is_told_of_each_classifier(
    learned: Learned, tmp_path: Path
) -> None:
    own = nn.Sequential(Negative(), learned.model).eval()
    rows = measured(learned, Negative(), tmp_path, own)
    helped, harmed = by_name(rows), by_name(rows, "undefended")
    assert helped["clean"]["with"]["value"] == 1 and helped["clean"]["beyond_chance"]
    assert harmed["clean"]["without"]["value"] == 1 and harmed["clean"]["beyond_chance"]
    assert harmed["clean"]["gain"]["value"] == -helped["clean"]["gain"]["value"] < -0.5
    for row in rows:
        assert row["gained"] - row["lost"] == round(row["gain"]["value"] * row["n"])
    on, off = purification.advice(rows)
    assert "In front of the classifier, switch it on for clean (+" in on
    assert "it costs nothing beyond chance, and an attack that knows it leaves " in on
    assert "the undefended twin, leave it off" in off and "it costs accuracy on clean (-" in off


def test_what_it_holds_off_unknown_falls_once_it_is_known(learned: Learned, tmp_path: Path) -> None:
    mine = by_name(measured(learned, Smooth(), tmp_path))
    static, known = mine["PGD-20 on the classifier"], mine["PGD-20 that knows the purifier"]
    assert static["kind"] == "static attack" and static["gain"]["value"] > 0.1
    assert known["with"]["value"] < static["with"]["value"] - 0.05


@pytest.mark.parametrize(
    ("gained", "lost", "looks", "beyond"),
    [
        (9, 0, 1, True),
        (9, 0, 20, False),
        (12, 0, 20, True),
        (0, 12, 20, True),
        (5, 5, 1, False),
        (0, 0, 1, False),
    ],
)
def test_a_gain_is_beyond_chance_by_mcnemar_shared_among_all_looks(
    gained: int, lost: int, looks: int, beyond: bool
) -> None:
    row = {"gained": gained, "lost": lost}
    assert purification.beyond(row, looks) == {"beyond_chance": beyond}


def test_jpeg_and_noise_of_phones_come_through_the_endpoints_decoder(learned: Learned) -> None:
    images = Images(to_uint8(learned.x), learned.label, cifar10.CLASSES)
    every = {one.name: one.pixels[0] for one in purification.corrupted(images)}
    assert torch.equal(every["clean"], images.image)
    for name in purification.COMPRESSED:
        gap = (every[name].int() - images.image.int()).abs().float().mean()
        assert 0.3 < gap < 30
