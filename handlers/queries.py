"""Query attacks: images that are nearly ones that were asked about before.

A black-box attack asks about one picture hundreds of times, changed a little each time. Here each
image leaves a fingerprint, as in Blacklight (Li et al., USENIX Security 2022, section 4), and an
image that shares much of a stored one raises an alert. That makes attacks dearer and stops none
that adapts: OARS (Feng et al., CCS 2023) found its way around all such defences.

Other than Blacklight this leaves out windows without structure, as of a white border and its edge,
which different pictures share. False alerts become so rare that a fifth of a fingerprint in common
is enough, where Blacklight wants half. A picture with hardly any structure is not watched.
"""

import hashlib
import logging
import struct
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from handlers.open_inference import Pixels
from handlers.stores import Store, StoreError

logger = logging.getLogger(__name__)

Digests = NDArray[np.uint64]
Response = Literal["alert", "throttle", "reject"]
RESPONSES: tuple[Response, ...] = get_args(Response)

STEP = 50  # of quantization, in units of 1/255
LEVELS = 6  # quantization levels: 256 / STEP, rounded up
WINDOW = 20  # values; LEVELS to this power is less than 2 ** 64, so no two windows look the same
KEPT = 50  # digests of a fingerprint
SHARED = 10  # an image that has more digests than this in common with a stored one is near it
INDEXED = 16  # greatest digests, under which a stored query is found
PROBED = 24  # and under which it is sought: what two images share is among the greatest of both
ROW = 3  # values of one pixel, after which those of its neighbour follow
PAUSE = 1.0  # seconds between two images near the same stored one that `throttle` answers
RETRY = 5.0  # seconds for which a store that failed is left alone
ENTRIES = INDEXED + 1  # keys in the store of one query
REMEMBERED = 16  # newest queries that one digest leads to
CANDIDATES = 4  # stored queries that an image is compared with
WHEN = struct.Struct("<d")
SIZE = WHEN.size + 8 * KEPT  # bytes of a stored query
QUERY = b"q"  # before a query's name as a key: digests are keys of 8 bytes too


class Fingerprints:
    """What makes fingerprints: nobody without `secret` can tell which images will share one."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._salt = np.zeros(0, dtype=np.uint8)

    def digests(self, image: Pixels, owner: str = "") -> Digests:
        """The at most KEPT digests of an image uint8 (H, W, 3), as of one `owner` of queries."""
        flat = image.reshape(-1)
        if len(self._salt) != len(flat):
            stream = hashlib.shake_256(self._secret).digest(len(flat))
            self._salt = np.frombuffer(stream, dtype=np.uint8)
        windows = _windows((flat + self._salt) // STEP)
        mixed = self._mix(windows, owner)
        mixed[_is_plain(flat // STEP)] = 0
        kept = np.partition(mixed, max(0, len(mixed) - KEPT))[-KEPT:]
        digests: Digests = np.unique(kept[kept > 0])[::-1]
        return digests

    def name(self, image: Pixels, owner: str = "") -> bytes:
        """8 bytes that stand for exactly this image."""
        return self._key(owner, image.tobytes())

    def _mix(self, windows: Digests, owner: str) -> Digests:
        """A keyed one-to-one map, so that which digests are greatest is anybody's guess."""
        first, second, third = (
            np.frombuffer(self._key(owner, purpose), dtype="<u8")[0] | np.uint64(1)
            for purpose in (b"first", b"second", b"third")
        )
        mixed: Digests = (windows ^ first) * second
        mixed ^= mixed >> np.uint64(32)
        mixed *= third
        mixed ^= mixed >> np.uint64(29)
        return mixed

    def _key(self, owner: str, data: bytes) -> bytes:
        whose = hashlib.blake2b(owner.encode(), key=self._secret, digest_size=32).digest()
        return hashlib.blake2b(data, key=whose, digest_size=8).digest()


def _windows(levels: NDArray[np.uint8]) -> Digests:
    """Each WINDOW successive levels of (n,) as one number in base LEVELS: (n - WINDOW + 1,)."""

    def join(numbers: Digests, more: Digests, length: int) -> Digests:
        return numbers[: len(more)] * np.uint64(LEVELS**length) + more

    two = join(levels.astype(np.uint64), levels[1:].astype(np.uint64), 1)
    four = join(two, two[2:], 2)
    eight = join(four, four[4:], 4)
    sixteen = join(eight, eight[8:], 8)
    return join(sixteen, four[16:], 4)


def _is_plain(levels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which windows of unsalted levels (n,) are of one colour, or two with one edge between."""
    changes = np.cumsum(levels[ROW:] != levels[:-ROW], dtype=np.int32)
    changes = np.concatenate([np.zeros(1, dtype=np.int32), changes])
    span = WINDOW - ROW
    result: NDArray[np.bool_] = changes[span:] - changes[:-span] <= ROW
    return result


class Entry(NamedTuple):
    """A stored query: when it was last answered or refreshed, and its digests."""

    when: float
    digests: frozenset[int]

    def pack(self) -> bytes:
        """In SIZE bytes, digests in descending order, zeros behind them."""
        array = np.zeros(KEPT, dtype="<u8")
        array[: len(self.digests)] = sorted(self.digests, reverse=True)
        return WHEN.pack(self.when) + array.tobytes()

    @classmethod
    def unpack(cls, data: bytes) -> "Entry":
        """From the last SIZE bytes: of two generations' values the newer one."""
        digests = np.frombuffer(data[-KEPT * 8 :], dtype="<u8").tolist()
        return cls(WHEN.unpack(data[-SIZE : -KEPT * 8])[0], frozenset(digests) - {0})


class Watch:
    """Compares every image with those that came before it, whichever worker took them.

    `response` is what becomes of an image near a stored one: `alert` answers it as ever, `throttle`
    answers one in PAUSE seconds, `reject` gives it no label. A picture that comes again as it was
    is none of them: its answer is known already.
    """

    def __init__(self, store: Store, model: str, *, response: Response, expiry: float) -> None:
        if response not in RESPONSES:
            raise ValueError(f"on_query_attack must be one of {', '.join(RESPONSES)}")
        self._store, self._model, self._response = store, model, response
        self._expiry = expiry
        # An entry that is still met with is written anew at this age.
        self._stale = min(PAUSE, expiry / 8) if response == "throttle" else expiry / 8
        self._prints: Fingerprints | None = None
        self._down_until = 0.0
        self.up = True  # whether the store worked when last asked

    def look(self, images: Sequence[Pixels], owners: Sequence[str]) -> list[Response | None]:
        """What becomes of each image (H, W, 3), None for nothing. Images are compared with those of
        the same owner. Where the store fails nobody is watched, which is logged once."""
        if time.monotonic() < self._down_until:
            return [None] * len(images)
        try:
            seen = self._look(images, owners)
        except Exception as error:  # whatever it is, predictions go on
            if self.up:
                what = error if isinstance(error, StoreError) else type(error).__name__
                logger.error("No watch for query attacks, the store fails: %s", what)
            self.up, self._down_until = False, time.monotonic() + RETRY
            self._prints = None  # the secret may be another one then
            return [None] * len(images)
        if not self.up:
            logger.warning("Watching for query attacks again")
        self.up = True
        return seen

    def _look(self, images: Sequence[Pixels], owners: Sequence[str]) -> list[Response | None]:
        if self._prints is None:
            self._prints = Fingerprints(self._store.secret())
        pairs = [
            (image, f"{self._model}\n{owner}") for image, owner in zip(images, owners, strict=True)
        ]
        names = [self._prints.name(*pair) for pair in pairs]
        prints = [self._prints.digests(*pair) for pair in pairs]
        keys = [key for digests in prints for key in _keys(digests[:PROBED])]
        index = dict(zip(keys, self._store.find(keys), strict=True))
        known = self._entries(prints, index)
        seen: list[Response | None] = []
        changed: dict[bytes, Entry] = {}
        for name, digests in zip(names, prints, strict=True):
            now, own = time.time(), frozenset(digests.tolist())
            nearest, response = _nearest(known, own), None
            if nearest is None or name in known:
                nearest = name
            else:
                response = self._respond(now - known[nearest].when)
            seen.append(response)
            entry = known.get(nearest, Entry(0.0, own))
            if now - entry.when > self._stale:
                known[nearest] = changed[nearest] = Entry(now, entry.digests)
        if changed:
            self._store.add(_items(changed, index))
        return seen

    def _respond(self, age: float) -> Response:
        if self._response == "throttle" and age > PAUSE:
            return "alert"
        return self._response

    def _entries(
        self, prints: Sequence[Digests], index: Mapping[bytes, bytes]
    ) -> dict[bytes, Entry]:
        """The stored queries that share most with each of these, by name."""
        nearest: dict[bytes, None] = {}
        for digests in prints:
            found = [index[key] for key in _keys(digests[:PROBED])]
            met = Counter(name for names in filter(None, found) for name in _names(names))
            nearest |= dict.fromkeys(name for name, _ in met.most_common(CANDIDATES))
        found = self._store.find([QUERY + name for name in nearest]) if nearest else []
        pairs = zip(nearest, found, strict=True)
        known = {name: Entry.unpack(data) for name, data in pairs if data}
        oldest = time.time() - self._expiry
        return {name: entry for name, entry in known.items() if entry.when > oldest}


def _keys(digests: Digests) -> list[bytes]:
    data = digests.tobytes()
    return [data[start : start + 8] for start in range(0, len(data), 8)]


def _names(value: bytes) -> set[bytes]:
    """The names that stand under a digest, each once though both generations may have it."""
    return {value[start : start + 8] for start in range(0, len(value), 8)}


def _nearest(known: Mapping[bytes, Entry], own: frozenset[int]) -> bytes | None:
    """The name of the entry that shares most with an image's digests, if that is enough."""
    shared = {name: len(entry.digests & own) for name, entry in known.items()}
    name = max(shared, key=shared.__getitem__, default=b"")
    return name if shared.get(name, 0) > SHARED else None


def _items(changed: Mapping[bytes, Entry], index: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """What the store has to keep: the entries, and their names under their greatest digests."""
    items: dict[bytes, bytes] = {}
    for name, entry in changed.items():
        items[QUERY + name] = entry.pack()
        for digest in sorted(entry.digests, reverse=True)[:INDEXED]:
            key = digest.to_bytes(8, "little")
            before = items.get(key, index.get(key, b""))
            items[key] = before[-8 * (REMEMBERED - 1) :] + name
    return items
