"""Where stored queries live: LMDB for the workers of one machine, Redis for several machines.

Both map short keys to short values in two generations. New values go into the newer one. When that
is half as old as `expiry`, or holds half of the entries, the older one is dropped and a new one
begins. So nothing is ever deleted singly.
"""

import contextlib
import logging
import secrets
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from rampart.handlers import private_folder

logger = logging.getLogger(__name__)

MAP_BYTES = 1 << 24  # of LMDB besides its entries: a map costs disk only as it fills
ENTRY_BYTES = 1024  # for a key and its value, the longest of half that, on pages half empty
TIMEOUT = 0.1  # seconds for Redis: waiting longer is worse than not watching
LONGEST, MOST = 1e9, 10**9  # seconds and entries: beyond, Redis or LMDB take no such number
HEAD = struct.Struct("<Qd")  # the number of the newest generation, and when it began


class StoreError(RuntimeError):
    """Why the store cannot be used now, on one line; the next call may find it working."""


class Store(Protocol):
    """What detection needs of a store. Every method raises StoreError."""

    def secret(self) -> bytes:
        """32 random bytes, the same for all who share this store."""
        ...

    def find(self, keys: Sequence[bytes]) -> list[bytes]:
        """The value under each key, the older generation's first; empty where there is none."""
        ...

    def add(self, items: Mapping[bytes, bytes]) -> None:
        """Put values into the newest generation, in place of what it has under these keys."""
        ...


def open_store(address: str, *, entries: int, expiry: float) -> Store:
    """The store at a `redis://` address, or else in a folder; the first call opens it.

    It keeps about `entries` keys and forgets them after `expiry` seconds at the latest. Raises
    ValueError, on one line, where its package is missing or a setting makes no sense.
    """
    if not 0 < expiry < LONGEST or not 2 <= entries < MOST:
        raise ValueError(
            f"query_expiry must be above 0 and below {LONGEST:.0e} seconds, query_capacity above 1"
            f" and below {MOST:.0e} queries"
        )
    try:
        if "://" not in address:
            return LmdbStore(Path(address), entries=entries, expiry=expiry)
        return RedisStore(address, entries=entries, expiry=expiry)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"query_store needs the package {error.name}: install it for the server, or leave"
            " query_store out"
        ) from error


class LmdbStore:
    """An LMDB file in a folder that only its owner may enter.

    Forgotten entries leave the file at the next `add`, or when a worker opens it.
    """

    def __init__(self, folder: Path, *, entries: int, expiry: float) -> None:
        import lmdb

        self._lmdb, self._folder = lmdb, folder
        self._half, self._age = entries // 2, expiry / 2
        self._bytes = MAP_BYTES + entries * ENTRY_BYTES
        self._env: Any = None

    def _open(self) -> None:
        """Open the file, or a new one in place of a damaged one."""
        lmdb, folder = self._lmdb, self._folder
        damage = (lmdb.CorruptedError, lmdb.InvalidError, lmdb.PageNotFoundError, struct.error)
        try:
            # Who can write the file knows the secret, and can hide an attack or feign one.
            private_folder.claim(folder, "data.mdb", "lock.mdb")
            try:
                self._open_file()
            except damage:
                logger.warning("The query store was damaged and starts empty")
                (folder / "data.mdb").unlink()
                self._open_file()
        except private_folder.ForeignFolderError as error:
            raise StoreError(f"query_store {error}") from error
        except Exception as error:  # also of the operating system, and of a path with a zero byte
            reason = " ".join(str(error).split())
            raise StoreError(
                f"query_store {folder}: {reason}. Name a folder on a local disk that the"
                " server may write to, or a redis:// address"
            ) from error

    def _open_file(self) -> None:
        # Not a writable map: where the disk is full, that ends the process with SIGBUS. Not
        # synchronous, so a crash of the machine can damage the file; nothing in it is dear.
        env = self._lmdb.open(
            str(self._folder), map_size=self._bytes, max_dbs=3, mode=0o600,
            sync=False, metasync=False, max_readers=1024,
        )  # fmt: skip
        try:
            env.reader_check()  # slots of workers that were killed
            self._generations = [env.open_db(name) for name in (b"even", b"odd")]
            with env.begin(write=True) as txn:
                if time.time() - _head(txn)[1] >= 3 * self._age:  # even the youngest has expired
                    for generation in self._generations:
                        txn.drop(generation, delete=False)
        except Exception:
            env.close()  # a process opens a file once
            raise
        self._env = env

    def secret(self) -> bytes:
        """32 random bytes, made at first use."""
        with self._transaction(write=True) as txn:
            txn.put(b"secret", secrets.token_bytes(32), overwrite=False)
            return bytes(txn.get(b"secret", b""))

    def find(self, keys: Sequence[bytes]) -> list[bytes]:
        """The value under each key."""
        with self._transaction() as txn:
            number, _ = _head(txn)
            older, newer = (
                dict(txn.cursor(self._generations[at % 2]).getmulti(keys))
                for at in (number - 1, number)
            )
        return [older.get(key, b"") + newer.get(key, b"") for key in keys]

    def add(self, items: Mapping[bytes, bytes]) -> None:
        """Put values into the newest generation."""
        with self._transaction(write=True) as txn:
            number, began = _head(txn)
            newest = self._generations[number % 2]
            entries = txn.stat(newest)["entries"]
            if entries >= self._half or time.time() - began >= self._age:
                newest = self._generations[~number % 2]
                txn.drop(newest, delete=False)
                txn.put(b"head", HEAD.pack(number + 1, time.time()))
            txn.cursor(newest).putmulti(items.items())

    @contextlib.contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[Any]:
        if self._env is None:
            self._open()
        try:
            with self._env.begin(write=write) as txn:
                yield txn
        except self._lmdb.Error as error:
            if isinstance(error, self._lmdb.MapResizedError):  # by a worker with other settings
                self._env.set_mapsize(0)
            raise StoreError(type(error).__name__) from error


def _head(txn: Any) -> tuple[int, float]:
    """The number of the newest generation and when it began."""
    head = txn.get(b"head")
    return HEAD.unpack(head) if head else (0, 0.0)


class RedisStore:
    """Two hashes of a Redis server, which all machines with this address share."""

    def __init__(self, address: str, *, entries: int, expiry: float) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._error: type[Exception] = redis.RedisError
        self._half, self._age = entries // 2, expiry / 2
        try:
            self._redis = redis.Redis.from_url(
                address,
                socket_timeout=TIMEOUT,
                socket_connect_timeout=TIMEOUT,
                retry=Retry(NoBackoff(), 1),  # for a connection that a restart has cut
            )
            self._redis.connection_pool.make_connection()  # checks settings, does not connect
        except Exception as error:  # whose message may hold the password
            raise ValueError(
                "query_store must be a folder or redis://HOST:PORT/NUMBER (rediss:// for TLS)"
            ) from error
        self._secret, self._number, self._began = b"", 0, 0.0

    def secret(self) -> bytes:
        """32 random bytes, made at first use and after Redis has lost them."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.hsetnx("rampart", "secret", secrets.token_bytes(32))
        pipe.hsetnx("rampart", "head", HEAD.pack(0, time.time()))
        self._secret = b""
        self._run(pipe)
        return self._secret

    def find(self, keys: Sequence[bytes]) -> list[bytes]:
        """The value under each key."""
        if not keys:
            return []
        pipe = self._redis.pipeline(transaction=False)
        for number in (self._number - 1, self._number):
            pipe.hmget(_hash(number), keys)
        older, newer = self._run(pipe)
        return [(a or b"") + (b or b"") for a, b in zip(older, newer, strict=True)]

    def add(self, items: Mapping[bytes, bytes]) -> None:
        """Put values into the newest generation."""
        used = self._number
        pipe = self._redis.pipeline(transaction=False)
        pipe.hset(_hash(used), mapping=cast(Any, items))
        pipe.expire(_hash(used), int(2 * self._age) + 1)
        pipe.hlen(_hash(used))
        entries = self._run(pipe)[-1]
        full = entries >= self._half or time.time() - self._began >= self._age
        if full and used == self._number:
            # Two workers that get here at once write the same: no generation is skipped.
            pipe.hset("rampart", "head", HEAD.pack(used + 1, time.time()))
            pipe.unlink(_hash(used - 1))
            self._run(pipe)

    def _run(self, pipe: Any) -> list[Any]:
        """The answers to a pipeline's commands; takes over what other workers changed meanwhile."""
        pipe.hmget("rampart", "secret", "head")
        try:
            answers: list[Any] = pipe.execute()
        except (self._error, OSError) as error:
            raise StoreError(type(error).__name__) from error
        secret, head = answers.pop()
        if not head or self._secret not in (b"", secret):
            raise StoreError("it was emptied")
        self._secret, (self._number, self._began) = secret, HEAD.unpack(head)
        return answers


def _hash(number: int) -> str:
    return f"rampart:{number}"
