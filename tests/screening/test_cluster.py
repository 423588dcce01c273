"""Whole runs by a real Ray of two nodes."""

import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import deadly
import pytest
from pyarrow import parquet
from ray_cluster import Nodes, two_nodes
from screened import every_kind, folder, pack, picture, table
from servers import free_port

from rampart.screening import near
from rampart.screening.run import PARTS
from rampart.screening.screen import Wanted, screen

pytestmark = [pytest.mark.server, pytest.mark.slow]
EACH, SHARDS = 100, 30
COMPARED = ("shard", "name", "decision", "label", "width", "sha256", "error", "message")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with two_nodes(deadly.CODE) as nodes:
        yield nodes


def start(nodes: Nodes, store: Path, model: Path, out: Path, *more: str) -> "subprocess.Popen[str]":
    """The command as one types it, at work; of options that come twice the last one counts."""
    words = [str(store), "--model", str(model), "--out", str(out), "--ray", nodes.address]
    return nodes.start("rampart", "screen", *words, *more)


def said(run: "subprocess.Popen[str]") -> str:
    """What a command says until it ends well."""
    text, _ = run.communicate(timeout=240)
    assert run.returncode == 0, text
    return text


def wait(out: Path, parts: int, run: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 120
    while len(list((out / PARTS).glob("*.parquet"))) < parts:
        assert run.poll() is None and time.monotonic() < end, run.communicate()[0]
        time.sleep(0.01)


def test_a_cluster_writes_the_rows_and_copies_that_one_machine_writes(
    nodes: Nodes, tiny_archive: Path, tmp_path: Path
) -> None:
    store = folder(tmp_path / "store", every_kind() | {"same.png": picture(1)})
    here, there = tmp_path / "here", tmp_path / "there"
    wanted = Wanted(copies=here / "copies", near_duplicates=True)
    screen(str(store), tiny_archive, here, wanted, workers=1)
    more = [
        "--near-duplicates",
        "--copy-flagged",
        str(there / "copies"),
        "--workers",
        "1",
        "--ray",
        "auto",
    ]
    said(start(nodes, store, tiny_archive, there, *more))
    assert rows(here) == rows(there)
    copied = [sorted(p.relative_to(o) for p in (o / "copies").rglob("*")) for o in (here, there)]
    assert copied[0] == copied[1]
    near_duplicates = [parquet.read_table(o / near.FILE) for o in (here, there)]
    assert near_duplicates[0] == near_duplicates[1] and near_duplicates[0].num_rows


def test_an_address_where_no_cluster_is_gets_an_error_at_once(
    nodes: Nodes, tiny_archive: Path, tmp_path: Path
) -> None:
    store = folder(tmp_path / "store", {"1.png": picture(1)})
    run = start(nodes, store, tiny_archive, tmp_path / "o", "--ray", f"127.0.0.1:{free_port()}")
    text, _ = run.communicate(timeout=30)
    assert run.returncode == 1
    assert "no Ray cluster answers at 127.0.0.1" in text and "check --ray" in text


def test_a_picture_that_kills_its_process_each_time_ends_its_shard_alone_which_is_named(
    nodes: Nodes, tiny_archive: Path, tmp_path: Path
) -> None:
    source, others = deadly.listed(tmp_path / "store")
    run = start(nodes, source, tiny_archive, tmp_path / "o")
    text, _ = run.communicate(timeout=120)
    assert run.returncode == 1, text
    assert f"no verdicts, such as {source}/000001 (its processes or nodes died 4 times" in text
    assert Counter(row["name"] for row in table(tmp_path / "o" / PARTS)) == Counter(others)


def test_a_node_that_is_killed_and_a_command_that_is_killed_lose_no_picture_and_double_none(
    nodes: Nodes, tiny_archive: Path, tmp_path: Path
) -> None:
    store, out = tmp_path / "store", tmp_path / "o"
    store.mkdir()
    some = [picture(number) for number in range(EACH)]
    for shard in range(SHARDS):
        pack(store / f"{shard:03d}.tar", {f"{shard}-{n}.png": data for n, data in enumerate(some)})
    run = start(nodes, store, tiny_archive, out)
    wait(out, 4, run)
    run.kill()
    run.communicate()
    before = {file: file.stat().st_mtime_ns for file in (out / PARTS).glob("*.parquet")}
    assert len(before) < SHARDS - 4
    run = start(nodes, store, tiny_archive, out)
    wait(out, len(before) + 4, run)
    nodes.kill_one()
    assert run.poll() is None and len(list((out / PARTS).glob("*.parquet"))) < SHARDS
    assert f"{SHARDS * EACH:,} pictures in {SHARDS} shards" in said(run)
    expected = Counter(f"{shard}-{n}.png" for shard in range(SHARDS) for n in range(EACH))
    assert Counter(row["name"] for row in table(out / PARTS)) == expected
    assert all(file.stat().st_mtime_ns == when for file, when in before.items())
    assert {file.suffix for file in (out / PARTS).iterdir()} == {".parquet"}


def rows(out: Path) -> Sequence[object]:
    return [[row[name] for name in COMPARED] for row in table(out / PARTS)]
