"""Stores in S3: moto's server, over HTTP, and s3fs as users have it."""

import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import requests
from pyarrow import parquet
from screened import folder, pack, picture, table
from servers import free_port

from rampart.screening import shards
from rampart.screening.run import PARTS
from rampart.screening.screen import screen

pytest.importorskip("moto", reason="needs moto's server")
s3fs = pytest.importorskip("s3fs", reason="needs s3fs")

pytestmark = pytest.mark.server
BUCKET = "s3://pictures"
CONTENT = {f"{number}.png": picture(number) for number in range(6)} | {"bad.png": b"?"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 of our own."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, **quiet) as process:
        try:
            end = time.monotonic() + 60
            while not answers(url):
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.1)
            yield url
        finally:
            process.kill()


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file system as users get it: all that it knows is in the environment."""
    known = {"ENDPOINT_URL": server, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
    for name, value in known.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    if system.exists(BUCKET):
        system.rm(BUCKET, recursive=True)
    system.mkdir(BUCKET)
    system.invalidate_cache()
    return system


def put(s3: Any, kind: str, home: Path) -> str:
    """A store of that kind in the bucket; its address."""
    folder(home / "files", CONTENT)
    pack(home / "a.tar", CONTENT)
    cells = [*CONTENT.values()]
    parquet.write_table(pa.table({"image": cells}), home / "bytes.parquet")
    parquet.write_table(
        pa.table({"path": [f"files/{name}" for name in CONTENT]}), home / "paths.parquet"
    )
    (home / "list.txt").write_text("".join(f"{BUCKET}/files/{name}\n" for name in CONTENT))
    s3.put(f"{home}/", f"{BUCKET}/", recursive=True)
    return f"{BUCKET}/{kind}"


@pytest.mark.parametrize(
    "kind", ["files", "list.txt", "{a..a}.tar", "bytes.parquet", "paths.parquet"]
)
@pytest.mark.slow
def test_a_bucket_gives_the_verdicts_that_a_folder_gives(
    kind: str, s3: Any, tiny_archive: Path, tmp_path: Path
) -> None:
    address = put(s3, kind.replace("{a..a}", "a"), tmp_path / "store")
    screen(str(tmp_path / "store" / "files"), tiny_archive, tmp_path / "here", workers=1)
    found = screen(address, tiny_archive, tmp_path / "there", workers=2)
    assert verdicts(tmp_path / "here") == verdicts(tmp_path / "there")
    assert found.figures["images"] == len(CONTENT)
    assert found.figures["errors"] == {"unsupported_format": 1}


def verdicts(out: Path) -> dict[str, Any]:
    return {
        row["sha256"]: (row["decision"], row["label"], row["p_value"], row["width"], row["error"])
        for row in table(out / PARTS)
    }


def test_an_object_that_was_written_anew_is_screened_anew(
    s3: Any, tiny_archive: Path, tmp_path: Path
) -> None:
    for number in range(2):
        s3.pipe(f"{BUCKET}/{number}.tar", packed(tmp_path, number))
    screen(f"{BUCKET}/{{0..1}}.tar", tiny_archive, tmp_path / "o", workers=1)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "o" / PARTS).iterdir()}
    s3.pipe(f"{BUCKET}/1.tar", packed(tmp_path, 2))
    s3.invalidate_cache()
    screen(f"{BUCKET}/{{0..1}}.tar", tiny_archive, tmp_path / "o", workers=1)
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "o" / PARTS).iterdir()}
    assert [name[0] for name in before if before[name] != after[name]] == ["1"]
    assert sorted(row["name"] for row in table(tmp_path / "o" / PARTS)) == ["0.png", "2.png"]


def packed(home: Path, number: int) -> bytes:
    return pack(home / "a.tar", {f"{number}.png": picture(number)}).read_bytes()


def test_what_cannot_be_listed_is_named(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="s3://no-such-bucket/a cannot be listed"):
        shards.find("s3://no-such-bucket/a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ValueError, match=f"{BUCKET} cannot be listed: Could not connect"):
        shards.find(BUCKET)


def test_without_s3fs_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = import_module("fsspec.registry")  # fsspec has another thing of that name
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(registry._registry, "s3", raising=False)
    with pytest.raises(ValueError, match=r'needs s3fs: `pip install "rampart-endpoint\[s3\]"`'):
        shards.find("s3://bucket/a")
