"""What stands in the table, whatever a store is made of."""

import hashlib
import json
import os
import ssl
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from scipy.stats import beta, binomtest
from screened import as_png, every_kind, folder, pack, picture, rows, table
from servers import certificate_and_key

from rampart.handlers.image import decode
from rampart.handlers.service import Service
from rampart.handlers.types import Incoming
from rampart.handlers.verdict import drift
from rampart.screening import near, parts, shards, summary
from rampart.screening.run import PARTS
from rampart.screening.worker import Screener, Setup, told

if TYPE_CHECKING:
    from rampart.hardening.model.images import Images


@pytest.fixture(scope="module")
def screener(tiny_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Screener:
    setup = Setup(tiny_archive, tmp_path_factory.mktemp("unused"), 2, fingerprints=True)
    return Screener(setup, setup.open())


@pytest.fixture(autouse=True)
def as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "screener" in request.fixturenames:
        screener: Screener = request.getfixturevalue("screener")
        screener._setup = screener._setup._replace(only_flagged=False, copies=None)


def test_a_picture_gets_the_verdict_or_the_error_that_the_endpoint_gives(
    screener: Screener, unpacked: Path, tmp_path: Path
) -> None:
    content = every_kind()
    found, tally = rows(screener, folder(tmp_path / "store", content), tmp_path / "out")
    endpoint = Service.open(unpacked, {"false_alarm_rate": 0.01}, name="tiny")
    by_name = {Path(row["name"]).name: row for row in found}
    assert by_name.keys() == content.keys()
    for name, data in content.items():
        (reply,) = endpoint.answer([Incoming({}, [data])])
        answer, row = json.loads(reply.body), by_name[name]
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        if reply.status != 200:
            assert (row["error"], row["message"]) == (answer["type"], answer["message"]), name
            assert row["label"] is row["decision"] is row["p_value"] is None
            continue
        assert [row[k] for k in ("decision", "label", "index")] == [
            answer[k] for k in ("decision", "label", "index")
        ], name
        assert row["confidence"] == pytest.approx(answer["confidence"], abs=1e-4)
        assert row["p_value"] == pytest.approx(answer["detail"]["p_value"], abs=1e-5)
        assert row["scores"] == pytest.approx(answer["detail"]["scores"], rel=1e-3, abs=1e-4)
    assert (tally.images, tally.judged) == (11, 6)
    assert tally.errors.total() == 5 and tally.decisions.total() == tally.ranks.total() == 6


def test_a_turned_picture_has_the_width_that_one_sees(screener: Screener, tmp_path: Path) -> None:
    found, _ = rows(screener, folder(tmp_path / "store", every_kind()), tmp_path / "out")
    sizes = {Path(row["name"]).name: (row["width"], row["height"]) for row in found}
    assert sizes["good.jpg"] == (40, 48)
    assert sizes["turned.jpg"] == (48, 40)
    assert sizes["words.jpg"] == (None, None)


def stored(home: Path, kind: str, content: dict[str, bytes]) -> str:
    """The same pictures in a store of a kind."""
    files = folder(home / "files", content)
    cells = list(content.values())
    if kind == "folder":
        return str(files)
    if kind == "address":
        return files.as_uri()
    if kind == "list":
        (home / "all.txt").write_text("".join(f"files/{name}\n\n" for name in content))
        return str(home / "all.txt")
    if kind == "tar":
        pack(home / "a-000.tar", dict(list(content.items())[:2]))
        pack(home / "a-001.tar", dict(list(content.items())[2:]))
        return str(home / "a-{000..001}.tar")
    columns: dict[str, dict[str, Any]] = {
        "bytes": {"label": range(len(cells)), "jpeg": cells},
        "paths": {"label": range(len(cells)), "path": [f"files/{name}" for name in content]},
        "both": {"image": [{"bytes": cell, "path": "gone.png"} for cell in cells]},
    }
    parquet.write_table(pa.table(columns[kind]), home / "all.parquet")
    return str(home / "*.parquet")


KINDS = ("folder", "address", "list", "tar", "bytes", "paths", "both")


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_of_any_kind_gives_the_same_verdicts_in_order(
    kind: str, screener: Screener, tmp_path: Path
) -> None:
    content = {f"{number}.png": picture(number) for number in range(4)}
    found, tally = rows(screener, stored(tmp_path, kind, content), tmp_path / "out")
    digests = [hashlib.sha256(data).hexdigest() for data in content.values()]
    assert sorted(row["sha256"] for row in found) == sorted(digests)
    service = screener._service
    judged = service.judge([service.examine(data) for data in content.values()])
    labels = {d: told(verdict)["label"] for d, (_, verdict) in zip(digests, judged, strict=True)}
    assert {row["sha256"]: row["label"] for row in found} == labels
    assert tally.images == 4
    whole = {"folder", "address", "list"}
    names = {"tar": [*content], "bytes": [*"0123"], "paths": [*"0123"], "both": [*"0123"]}
    if kind not in whole:
        assert sorted(row["name"] for row in found) == names[kind]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Nothing."""


def test_shards_come_over_http(screener: Screener, tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", {"1.png": picture(1), "2.png": picture(2)})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/a.tar"
        found, _ = rows(screener, address, tmp_path / "out")
        server.shutdown()
    assert [(row["shard"], row["name"]) for row in found] == [
        (address, "1.png"), (address, "2.png"),
    ]  # fmt: skip
    assert all(row["label"] for row in found)


def test_https_is_read_where_its_certificate_is_trusted_and_refused_elsewhere(
    tiny_archive: Path, tmp_path: Path
) -> None:
    pack(tmp_path / "a.tar", {"1.png": picture(1), "2.png": picture(2)})
    trusted, key = certificate_and_key(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trusted, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of who hangs up
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        address = f"https://127.0.0.1:{server.server_address[1]}/a.tar"
        words = ["screen", address, "--model", tiny_archive, "--out", tmp_path / "o"]
        command = [sys.executable, "-m", "rampart", *map(str, words), "--workers", "1"]
        runs = [
            subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
            for own in ({}, {"SSL_CERT_FILE": str(trusted)})
        ]
        server.shutdown()
    assert [run.returncode for run in runs] == [1, 0], runs
    assert f"{address} cannot be listed" in runs[0].stderr
    assert [row["name"] for row in table(tmp_path / "o" / PARTS)] == ["1.png", "2.png"]


def test_what_cannot_be_read_is_a_row_and_the_rest_goes_on(
    screener: Screener, tmp_path: Path
) -> None:
    whole = pack(tmp_path / "b.tar", {f"{n}.png": picture(n) for n in range(6)})
    whole.write_bytes(whole.read_bytes()[: 4 * 2048])
    pack(tmp_path / "a.tar", {"1.png": picture(1)})
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    found, tally = rows(screener, tmp_path, tmp_path / "out")
    errors = {row["name"]: row["message"] for row in found if row["error"] == "unreadable"}
    assert errors.keys() == {str(tmp_path / "b.tar"), str(tmp_path / "c.parquet")}
    assert all("screen again" in message for message in errors.values())
    assert 2 <= tally.judged < 7
    (tmp_path / "list.txt").write_text("a.tar/none.png\n")
    found, tally = rows(screener, tmp_path / "list.txt", tmp_path / "other")
    assert tally.errors == {"unreadable": 1}


def test_a_huge_file_is_refused_before_it_fills_memory(
    screener: Screener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "LARGEST", 100)
    pack(tmp_path / "a.tar", {"1.png": picture(1)})
    folder(tmp_path / "files", {"1.png": picture(1)})
    _, tally = rows(screener, tmp_path / "a.tar", tmp_path / "out")
    assert tally.errors == {"file_too_large": 1}
    assert rows(screener, tmp_path / "files", tmp_path / "out2")[1].errors == tally.errors


def test_files_that_hold_no_picture_by_their_name_are_left_out_and_counted(tmp_path: Path) -> None:
    content = {"a.png": b"", "b/c.JPG": b"", "noending": b"", "a.json": b"", ".hidden.png": b""}
    store = shards.find(str(folder(tmp_path / "store", content)))
    assert store.left_out == 2
    assert [Path(name).name for name in store.shards[0].files] == ["a.png", "c.JPG", "noending"]
    packed = pack(tmp_path / "a.tar", content)
    items = [*shards.read(shards.find(str(packed)).shards[0])]
    assert [item.name for item in items if isinstance(item, shards.Item)] == [
        "a.png", "b/c.JPG", "noending",
    ]  # fmt: skip
    left = [item.name for item in items if isinstance(item, shards.LeftOut)]
    assert left == ["a.json", ".hidden.png"]


def test_a_name_with_brackets_or_of_no_store_costs_no_other_picture_its_verdict(
    screener: Screener, tmp_path: Path
) -> None:
    names = [f"{n}.png" for n in range(4)] + ["b[1].png", "b*.png"]
    source = folder(tmp_path / "store", {name: picture(1) for name in names})
    found, tally = rows(screener, source, tmp_path / "out")
    assert tally.images == 6 and not tally.errors and all(row["label"] for row in found)
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(["nosuch://a.png", *(f"store/{name}" for name in names)]))
    _, tally = rows(screener, listed, tmp_path / "out2")
    assert tally.errors == {"unreadable": 1} and tally.judged == 6


@pytest.mark.parametrize("where", ["header", "between", "within"])
def test_a_tar_that_is_cut_or_damaged_says_so_after_what_came_before(
    where: str, screener: Screener, tmp_path: Path
) -> None:
    file = pack(tmp_path / "a.tar", {f"{n}.png": picture(n) for n in range(5)})
    with tarfile.open(file) as packed:
        third = packed.getmembers()[2]
    content = bytearray(file.read_bytes())
    if where == "header":
        content[third.offset + 3] ^= 1
    file.write_bytes(
        content[: third.offset + {"between": 0, "within": 100}.get(where, len(content))]
    )
    _, tally = rows(screener, file, tmp_path / "out")
    assert tally.judged == 2 and tally.errors == {"unreadable": 1}


def test_a_header_of_a_tar_that_says_it_is_huge_is_not_read(
    screener: Screener, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as packed:
        about = tarfile.TarInfo("a.png")
        about.pax_headers = {"comment": "a" * 2_000_000}
        packed.addfile(about)
    found, tally = rows(screener, tmp_path / "a.tar", tmp_path / "out")
    assert tally.errors == {"unreadable": 1} and "has a header of 2,000," in found[0]["message"]


def test_what_a_table_names_elsewhere_is_read_only_if_that_is_wanted(
    screener: Screener, tmp_path: Path
) -> None:
    inside, outside = tmp_path / "set", tmp_path / "outside.png"
    folder(inside, {"1.png": picture(1), "deep/2.png": picture(2)})
    outside.write_bytes(picture(3))
    (inside / "link.png").symlink_to(outside)
    named = ["1.png", str(inside / "deep/2.png"), "../outside.png", str(outside), "link.png"]
    parquet.write_table(pa.table({"path": [*named, "/dev/zero"]}), inside / "a.parquet")
    _, tally = rows(screener, inside / "a.parquet", tmp_path / "out")
    assert tally.judged == 2 and tally.errors == {"elsewhere": 4}
    (shard,) = shards.find(str(inside / "a.parquet"), elsewhere=True).shards
    data = [item.data for item in shards.read(shard) if isinstance(item, shards.Item)]
    assert [isinstance(one, bytes) for one in data] == [True] * 5 + [False]
    assert "no regular file" in str(data[-1])


def test_a_large_file_is_not_read_into_memory(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(300_000_000)
    (tmp_path / "a.txt").write_text("a.png\nb.png")
    for source in (tmp_path, tmp_path / "a.txt"):
        (shard,) = shards.find(str(source)).shards
        tracemalloc.start()
        items = [*shards.read(shard._replace(sizes=(0, 0)))]  # as of a store that tells no size
        assert tracemalloc.get_traced_memory()[1] < 3 * shards.LARGEST
        tracemalloc.stop()
        assert {item.data.type for item in items} == {"file_too_large"}  # type: ignore
        assert [str(item.data) for item in shards.read(shard)] == [str(item.data) for item in items]


def test_a_file_of_a_list_that_changes_is_screened_anew(tmp_path: Path) -> None:
    folder(tmp_path, {"1.png": picture(1)})
    (tmp_path / "a.txt").write_text("1.png")
    (before,) = shards.find(str(tmp_path / "a.txt")).shards
    (tmp_path / "1.png").write_bytes(picture(2) + b"more")
    (after,) = shards.find(str(tmp_path / "a.txt")).shards
    assert before.digest != after.digest and before.part == after.part


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nope", "nope cannot be listed: there is no such file or folder"),
        ("nope/*.tar", "holds nothing to screen"),
        ("nope.txt", "No such file"),
        ("nosuch://bucket/a", "nosuch"),
    ],
)
def test_a_source_of_nothing_is_refused(source: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        shards.find(source if "://" in source else str(tmp_path / source))


def test_a_table_without_pictures_asks_for_its_column(screener: Screener, tmp_path: Path) -> None:
    content = {"label": [1], "where": [str(folder(tmp_path, {"1.png": picture(1)}) / "1.png")]}
    parquet.write_table(pa.table(content), tmp_path / "a.parquet")
    source = tmp_path / "a.parquet"
    found, _ = rows(screener, source, tmp_path / "out")
    assert "name it with --column" in found[0]["message"]
    found, _ = rows(screener, source, tmp_path / "out2", column="where")
    assert found[0]["label"] is not None


def test_a_shard_has_one_part_in_each_run_and_another_digest_once_it_changes(
    tmp_path: Path,
) -> None:
    file = pack(tmp_path / "a.tar", {"1.png": picture(1)})
    (first,), (again,) = shards.find(str(tmp_path)).shards, shards.find(str(tmp_path)).shards
    assert first == again
    pack(file, {"1.png": picture(1), "2.png": picture(2)})
    (changed,) = shards.find(str(tmp_path)).shards
    assert changed.part == first.part and changed.digest != first.digest


def test_a_part_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    columns = parts.schema(["energy"], fingerprints=False)
    with pytest.raises(RuntimeError), parts.Part(tmp_path / "a.parquet", columns, "d") as part:
        part.write({"name": "a"})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with parts.Part(tmp_path / "a.parquet", columns, "d") as part:
        part.tally.images, part.tally.ranks[3] = 1, 1
        part.write({"name": "a"})
    assert parts.read(tmp_path / "a.parquet", "other") is None
    assert parts.read(tmp_path / "a.parquet", "d") == part.tally
    assert table(tmp_path)[0]["name"] == "a"


def test_only_flagged_pictures_and_those_at_fault_are_written_and_all_are_counted(
    screener: Screener, tiny_images: "Images", tmp_path: Path
) -> None:
    clean = {f"{n:03d}.png": as_png(image) for n, image in enumerate(tiny_images.image[:8].numpy())}
    content = clean | {"unlike.png": picture(1), "bad.png": b"?"}
    store = pack(tmp_path / "a.tar", content)
    everything, whole = rows(screener, store, tmp_path / "all")
    flagged = {row["name"] for row in everything if row["detected"]}
    assert flagged and len(flagged) < 9
    some, tally = rows(
        screener, store, tmp_path / "some", only_flagged=True, copies=tmp_path / "copies"
    )
    assert {row["name"] for row in some} == flagged | {"bad.png"}
    assert tally == whole
    copies = {file.name[7:]: file.read_bytes() for file in (tmp_path / "copies").rglob("*.png")}
    assert copies == {name: content[name] for name in flagged}


def test_pictures_that_are_nearly_the_same_are_found_with_the_first_of_them(
    screener: Screener, tmp_path: Path
) -> None:
    pixels = decode(picture(1), 32)
    content = {"0.png": picture(0), "1.png": as_png(pixels), "2.png": picture(2)}
    pixels[0, 0] ^= 8
    content |= {"near.png": as_png(pixels), "same.png": content["1.png"]}
    rows(screener, pack(tmp_path / "a.tar", content), tmp_path / "out")
    assert near.write(tmp_path / "out", tmp_path) == {"near": 2, "identical": 1}
    pairs = parquet.read_table(tmp_path / near.FILE).to_pylist()
    assert [(p["name"], p["near_name"], p["identical"]) for p in pairs] == [
        ("near.png", "1.png", False), ("same.png", "1.png", True),
    ]  # fmt: skip


def test_intervals_and_drift_are_those_of_scipy_and_of_single_values() -> None:
    for held, n in ((0, 10), (3, 50), (120, 10_000)):
        expected = binomtest(held, n).proportion_ci(method="wilson")
        assert summary.wilson(held, n) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert summary.spread(0.01, 2670) == pytest.approx(beta(26, 2645).interval(0.95), rel=0.02)
    values = np.random.default_rng(0).integers(1, 21, 500) / 20
    distinct, counts = np.unique(values, return_counts=True)
    assert drift(distinct, counts) == pytest.approx(drift(values))
    ordered, rank = np.sort(values), np.arange(1, 501) / 500
    expected = max((rank - ordered).max(), (ordered - rank + 1 / 500).max())
    assert drift(values) == pytest.approx(expected)


def test_scores_are_told_though_clients_may_not_see_them(
    tiny_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAMPART_QUERY_STORE", str(tmp_path / "queries"))
    monkeypatch.setenv("RAMPART_QUARANTINE", str(tmp_path / "kept"))
    service = Setup(tiny_archive, tmp_path, 2).open()
    assert service.policy.detail == "full"
    service.judge([service.examine(picture(1))])
    assert sorted(path.name for path in tmp_path.iterdir()) == []
