"""Both stores, against a real LMDB file and a real Redis."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
from clock import Clock
from servers import Redis
from test_private_folder import give_away

from rampart.handlers.queries import stores
from rampart.handlers.queries.stores import LmdbStore, RedisStore, Store, StoreError, open_store

pytestmark = pytest.mark.usefixtures("patience")
Open = Callable[..., Store]


@pytest.fixture(params=["lmdb", pytest.param("redis", marks=pytest.mark.server)])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens an empty store."""

    def empty(*, entries: int = 1_000, expiry: float = 60.0) -> Store:
        if request.param == "lmdb":
            return open_store(str(tmp_path / "queries"), entries=entries, expiry=expiry)
        redis: Redis = request.getfixturevalue("redis")
        redis.flush()
        store = open_store(redis.address, entries=entries, expiry=expiry)
        store.secret()
        return store

    return empty


def test_what_is_added_is_found_and_replaced_by_what_is_added_later(opened: Open) -> None:
    store = opened()
    store.add({b"one": b"1", b"two": b"22"})
    store.add({b"two": b"2"})
    assert store.find([b"two", b"three", b"one"]) == [b"2", b"", b"1"]
    assert store.find([]) == []


def test_everything_is_forgotten_after_its_expiry_and_nothing_before_half_of_it(
    opened: Open, clock: Clock
) -> None:
    store = opened(expiry=100.0)
    store.add({b"old": b"1"})
    clock.now += 40
    store.add({b"new": b"2"})
    assert store.find([b"old", b"new"]) == [b"1", b"2"]
    clock.now += 40
    for _ in range(2):  # one of these begins a new generation: the older one's values come first
        store.add({b"more": b"3"})
    store.add({b"new": b"4"})
    assert store.find([b"old", b"new"]) == [b"1", b"24"]
    clock.now += 60
    for _ in range(2):
        store.add({b"last": b"5"})
    assert store.find([b"old", b"new"]) == [b"", b"4"]


def test_a_start_removes_what_lmdb_has_forgotten_and_nothing_else(
    tmp_path: Path, clock: Clock
) -> None:
    def opened(expiry: float) -> LmdbStore:
        return LmdbStore(tmp_path, entries=1_000, expiry=expiry)

    opened(60.0).add({b"one": b"1"})
    secret = opened(60.0).secret()
    clock.now += 40
    assert opened(60.0).find([b"one"]) == [b"1"]
    assert opened(20.0).find([b"one"]) == [b""]
    assert opened(60.0).secret() == secret


def test_a_store_keeps_about_as_many_entries_as_it_may(opened: Open) -> None:
    store = opened(entries=100)
    keys = [f"{number:04}".encode() for number in range(1_000)]
    for start in range(0, 1_000, 10):
        store.add(dict.fromkeys(keys[start : start + 10], b"1"))
    known = [key for key, value in zip(keys, store.find(keys), strict=True) if value]
    assert 50 <= len(known) <= 120
    assert known == keys[-len(known) :]


def test_all_who_share_a_store_share_its_secret(opened: Open) -> None:
    store = opened()
    secret = store.secret()
    assert len(secret) == 32 and store.secret() == secret and len(set(secret)) > 8


def test_another_process_finds_what_this_one_added(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), entries=100, expiry=60)
    store.add({b"key": b"value"})
    code = """if True:
        import sys
        from rampart.handlers.queries.stores import open_store
        store = open_store(sys.argv[1], entries=100, expiry=60)
        print(store.find([b"key"])[0].decode(), store.secret().hex())
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert answer.split() == ["value", store.secret().hex()]
    assert (tmp_path / "data.mdb").stat().st_mode & 0o077 == 0


def test_a_disk_that_takes_no_more_is_an_error_and_the_process_lives(tmp_path: Path) -> None:
    code = """if True:
        import resource, sys
        from rampart.handlers.queries.stores import StoreError, open_store
        store = open_store(sys.argv[1], entries=100_000, expiry=60)
        store.add({b"first": b"1"})
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))
        try:
            for number in range(1_000):
                store.add({f"{number}".encode(): b"x" * 500})
        except StoreError as error:
            print(error, store.find([b"first", b"0"])[0])
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        store.add({b"late": b"2"})
        print(store.find([b"late"]))
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[0].endswith("b'1'")
    assert answer.stdout.splitlines()[1] == "[b'2']"


def test_a_damaged_file_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data.mdb").write_bytes(b"damaged!" * 2_000)
    store = open_store(str(tmp_path), entries=100, expiry=60)
    store.add({b"key": b"1"})
    assert store.find([b"key"]) == [b"1"]
    assert caplog.messages == ["The query store was damaged and starts empty"]


def test_a_file_whose_head_makes_no_sense_is_begun_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with lmdb.open(str(tmp_path), max_dbs=3) as env, env.begin(write=True) as txn:
        txn.put(b"head", b"x")
    store = open_store(str(tmp_path), entries=100, expiry=60)
    store.add({b"key": b"1"})
    assert store.find([b"key"]) == [b"1"]
    assert caplog.messages == ["The query store was damaged and starts empty"]


def test_a_worker_with_room_for_more_does_not_lock_the_other_out(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), entries=10, expiry=60)
    store.secret()
    code = """if True:
        import sys
        from rampart.handlers.queries.stores import open_store
        store = open_store(sys.argv[1], entries=100_000, expiry=60)
        for number in range(50_000):
            if number % 1_000 == 0:
                store.add({f"{n}".encode(): bytes(500) for n in range(number, number + 1_000)})
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    with pytest.raises(StoreError, match="MapResizedError"):
        store.find([b"49999"])
    assert store.find([b"49999"]) == [bytes(500)]


def test_without_redis_a_store_fails_at_once_and_works_again_when_it_is_back(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(_: float) -> None:
        raise AssertionError("it waits between attempts")

    monkeypatch.setattr("redis.retry.sleep", wait)
    store = open_store(redis.address, entries=100, expiry=60)
    secret = store.secret()
    store.add({b"key": b"1"})
    redis.stop()
    for call in (store.secret, lambda: store.find([b"key"]), lambda: store.add({b"key": b"2"})):
        with pytest.raises(StoreError, match="ConnectionError"):
            call()
    redis.start()
    with pytest.raises(StoreError, match="it was emptied"):
        store.find([b"key"])
    assert store.secret() != secret
    store.add({b"key": b"3"})
    assert store.find([b"key"]) == [b"3"]


def test_a_redis_that_hangs_is_an_error_and_is_asked_again_once_it_answers(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "TIMEOUT", 0.2)
    store = open_store(redis.address, entries=100, expiry=60)
    redis.flush()
    store.secret()
    redis.halt()
    end = threading.Timer(20, redis.go_on)  # of a call that waits for ever
    end.start()
    try:
        with pytest.raises(StoreError, match="TimeoutError"):
            store.find([b"key"])
    finally:
        end.cancel()
        redis.go_on()
    monkeypatch.undo()
    assert open_store(redis.address, entries=100, expiry=60).find([b"key"]) == [b""]


def test_an_address_decides_which_store_it_is(tmp_path: Path) -> None:
    assert isinstance(open_store(str(tmp_path), entries=2, expiry=1), LmdbStore)
    assert isinstance(open_store("redis://127.0.0.1:1/0", entries=2, expiry=1), RedisStore)


@pytest.mark.parametrize(
    ("address", "settings", "message"),
    [
        ("ftp://somewhere", {}, "query_store must be a folder or redis://"),
        ("redis://:word@127.0.0.1:x/0", {}, "must be a folder or redis://HOST"),
        ("redis://:word@127.0.0.1:1/0?nonsense=1", {}, "must be a folder or redis://HOST"),
        ("queries", {"expiry": 0.0}, "query_expiry must be above 0"),
        ("queries", {"expiry": float("nan")}, "query_expiry must be above 0"),
        ("redis://127.0.0.1:1/0", {"expiry": float("inf")}, "and below"),
        ("queries", {"entries": 10**18}, "and below"),
        ("queries", {"entries": 0}, "query_capacity above 1"),
    ],
)
def test_what_cannot_be_a_store_is_refused_with_the_remedy(
    address: str, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        open_store(address, **({"entries": 100, "expiry": 60.0} | settings))  # type: ignore[arg-type]
    assert "\n" not in str(refused.value) and "word" not in str(refused.value)
    assert not Path("queries").exists()


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("/proc/nowhere", "query_store /proc/nowhere: .*Name a folder on a local disk"),
        ("/proc/a\0b", "query_store /proc/a.b: embedded null byte.*Name a folder"),
    ],
)
def test_a_folder_that_cannot_be_made_is_named_at_each_call(folder: str, message: str) -> None:
    store = open_store(folder, entries=100, expiry=60)
    for _ in range(2):
        with pytest.raises(StoreError, match=message) as failure:
            store.secret()
        assert "\n" not in str(failure.value)


@pytest.mark.parametrize("name", ["folder", "data.mdb", "lock.mdb"])
def test_a_store_that_somebody_else_owns_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    open_store(str(tmp_path / "mine"), entries=100, expiry=60).secret()
    theirs = tmp_path / "mine" / ("" if name == "folder" else name)
    give_away(theirs, monkeypatch)
    with pytest.raises(StoreError, match=r"query_store /.* belongs to somebody else: chmod 700"):
        open_store(str(tmp_path / "mine"), entries=100, expiry=60).secret()


def test_a_store_that_others_may_enter_or_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o750)
    with pytest.raises(StoreError, match=r"query_store /.*open is open to others: chmod 700"):
        open_store(str(tmp_path / "open"), entries=100, expiry=60).secret()
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(StoreError, match=r"query_store /.*link is a link: name the folder"):
        open_store(str(tmp_path / "link"), entries=100, expiry=60).secret()
    (tmp_path / "mine" / "data.mdb").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"query_store /.*data\.mdb is not a regular file"):
        open_store(str(tmp_path / "mine"), entries=100, expiry=60).secret()
    assert not (tmp_path / "elsewhere").exists() and not list((tmp_path / "open").iterdir())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match="query_store needs the package lmdb: install it"):
        open_store(str(tmp_path), entries=100, expiry=60)
    assert not list(tmp_path.iterdir())
