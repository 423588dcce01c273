"""Query attacks: images that are nearly the same as earlier ones.

A black-box attack queries one picture hundreds of times, changed a little each time. Here each
image leaves a fingerprint, as in Blacklight (Li et al., USENIX Security 2022, section 4), and an
image that shares much of a stored one raises an alert. That makes attacks more expensive; it stops
none that adapts: OARS (Feng et al., CCS 2023) found its way around all such defences.

Unlike Blacklight this leaves out windows without structure, such as a white border and its edge,
which different pictures share. So false alerts are rare, and a fifth of a fingerprint in common is
enough where Blacklight wants half. A picture with hardly any structure is not watched.
"""

import functools
import hashlib
import logging
import struct
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from rampart.handlers.errors import PAUSE
from rampart.handlers.queries.stores import Store, StoreError
from rampart.handlers.types import Pixels

logger = logging.getLogger(__name__)

Digests = NDArray[np.uint64]
Response = Literal["alert", "throttle", "reject"]
RESPONSES: tuple[Response, ...] = get_args(Response)

STEP = 50  # of quantization, in units of 1/255
LEVELS = 6  # quantization levels: 256 / STEP, rounded up
WINDOW = 20  # values; LEVELS to this power is less than 2 ** 64, so each window is one number
STRIDE = 4  # values from the start of one window to that of the next
POWERS = LEVELS ** np.arange(STRIDE - 1, -1, -1, dtype=np.uint32)
DIGESTS = 50  # of a fingerprint
SHARED = 10  # an image that has more digests than this in common with a stored one is near it
INDEXED = 8  # greatest digests of a stored query, which lead to it
PROBED = 12  # greatest digests of an image, to look up: two images share some of their greatest
CHANNELS = 3  # values of one pixel, after which those of its neighbour follow
RETRY = 5.0  # seconds for which a store that failed is left alone
ENTRIES = INDEXED + 1  # keys of one query in the store
NAMES = 16  # newest queries that one digest leads to
CANDIDATES = 4  # stored queries that an image is compared with
ENTRY = struct.Struct(f"<d{DIGESTS}Q")  # of a stored query
QUERY = b"q"  # before a query's name as a key: digests are keys of 8 bytes too


class Fingerprints:
    """Makes fingerprints; only who has `secret` can tell which images will share one."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._owners = functools.lru_cache(1024)(self._owner)
        self._salt = np.zeros(0, dtype=np.uint8)

    def digests(self, images: Sequence[Pixels], owners: Sequence[str]) -> list[Digests]:
        """At most DIGESTS digests, greatest first, of each image uint8 (H, W, 3) and its owner."""
        flat = np.stack(images).reshape(len(images), -1)
        if len(self._salt) != flat.shape[1]:
            stream = hashlib.shake_256(self._secret).digest(flat.shape[1])
            self._salt = np.frombuffer(stream, dtype=np.uint8)
        windows = _windows((flat + self._salt) // STEP)  # (N, W)
        keys = np.array([[self._number(owner, b"windows")] for owner in owners], dtype=np.uint64)
        mixed = _mix(windows, keys, self._number("", b"factor") | np.uint64(1))
        mixed[_is_plain(flat // STEP)] = 0
        # Not `np.partition`: among so many zeros it takes ten times as long.
        greatest = np.sort(mixed, axis=1)[:, : -DIGESTS - 1 : -1]
        return [row[row > 0] for row in greatest]

    def name(self, image: Pixels, owner: str = "") -> bytes:
        """8 bytes for exactly this image."""
        return self._key(owner, image.tobytes())

    def _number(self, owner: str, purpose: bytes) -> np.uint64:
        number: np.uint64 = np.frombuffer(self._key(owner, purpose), dtype="<u8")[0]
        return number

    def _key(self, owner: str, data: bytes) -> bytes:
        return hashlib.blake2b(data, key=self._owners(owner), digest_size=8).digest()

    def _owner(self, owner: str) -> bytes:
        return hashlib.blake2b(owner.encode(), key=self._secret, digest_size=32).digest()


def _windows(levels: NDArray[np.uint8]) -> Digests:
    """WINDOW successive levels of (N, L), from every STRIDE-th on, as one number in base LEVELS.

    Blacklight takes every window. Since salt differs from place to place, no window ever matches
    one of another place, so the ones between would add little and cost four times as much.
    """
    blocks = _blocks(levels) @ POWERS  # (N, L / STRIDE)
    parts = _shifted(blocks.astype(np.uint64), WINDOW // STRIDE)
    windows = parts[0]
    for part in parts[1:]:
        windows = windows * np.uint64(LEVELS**STRIDE) + part
    return windows


def _mix(windows: Digests, keys: Digests, factor: np.uint64) -> Digests:
    """A keyed one-to-one map of (N, W) by keys (N, 1): nobody can guess which are greatest."""
    mixed = (windows ^ keys) * factor
    mixed ^= mixed >> np.uint64(32)
    mixed *= factor
    mixed ^= mixed >> np.uint64(29)
    return mixed


def _is_plain(levels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which windows of unsalted levels (N, L) have one colour, or two with one edge between."""
    changes = np.zeros_like(levels)
    changes[:, :-CHANNELS] = levels[:, CHANNELS:] != levels[:, :-CHANNELS]
    blocks = _blocks(changes)
    of_block = blocks[..., 0] + blocks[..., 1] + blocks[..., 2] + blocks[..., 3]
    # The changes of a window's last block lead to pixels beyond it.
    first, *more, _ = _shifted(of_block, WINDOW // STRIDE)
    result: NDArray[np.bool_] = sum(more, start=first) <= CHANNELS
    return result


def _blocks(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, L) as (N, L / STRIDE, STRIDE), without what is left over."""
    whole = values.shape[1] // STRIDE * STRIDE
    return values[:, :whole].reshape(len(values), -1, STRIDE)


def _shifted(blocks: NDArray[Any], length: int) -> list[NDArray[Any]]:
    """(N, B) from its first column on, from its second, ...: `length` arrays of equal width."""
    count = blocks.shape[1] - length + 1
    return [blocks[:, start : start + count] for start in range(length)]


class Entry(NamedTuple):
    """A stored query: when it was last answered or refreshed, and its digests, greatest first."""

    when: float
    digests: tuple[int, ...]

    def pack(self) -> bytes:
        """In ENTRY.size bytes, zeros after the digests."""
        return ENTRY.pack(self.when, *self.digests, *(0,) * (DIGESTS - len(self.digests)))

    @classmethod
    def unpack(cls, data: bytes) -> "Entry":
        """From the last bytes: the newer of two generations' values."""
        when, *digests = ENTRY.unpack(data[-ENTRY.size :])
        return cls(when, tuple(filter(None, digests)))


class Watch:
    """Compares every image with earlier ones, whichever worker took them.

    `response` is for an image near a stored one: `alert` answers it as ever, `throttle` answers one
    in PAUSE seconds, `reject` gives it no label. An exact copy of a stored picture gets no
    response: its sender has the answer already.
    """

    def __init__(self, store: Store, model: str, *, response: Response, expiry: float) -> None:
        if response not in RESPONSES:
            raise ValueError(f"on_query_attack must be one of {', '.join(RESPONSES)}")
        self._store, self._model, self._response = store, model, response
        self._expiry = expiry
        # An entry that still has matches is renewed at this age. Rejected queries do not renew it,
        # or one query of a stranger would keep a picture from its owner for good.
        self._stale = {"alert": expiry / 8, "throttle": PAUSE, "reject": expiry}[response]
        self._prints: Fingerprints | None = None
        self._down_until = 0.0
        self.up = True  # whether the store worked when last asked

    def begin(self) -> None:
        """Find out now, and not at the first image, whether the store works."""
        try:
            self._store.secret()
        except Exception as error:  # whatever it is, the server starts
            self._fail(error)

    def look(self, images: Sequence[Pixels], owners: Sequence[str]) -> list[Response | None]:
        """The response to each image (H, W, 3), None for none; compares images of one owner.

        Where the store fails, nobody is watched, which the log says once.
        """
        responses: list[Response | None] = [None] * len(images)
        if not images or time.monotonic() < self._down_until:
            return responses
        try:
            responses, items = self._look(images, owners)
            if items:
                self._store.add(items)
        except Exception as error:  # whatever it is, predictions go on
            self._fail(error)
            return responses
        if items and not self.up:  # a store that cannot be written to does not work
            logger.warning("Detecting query attacks again")
            self.up = True
        return responses

    def _fail(self, error: Exception) -> None:
        if self.up:
            reason = error if isinstance(error, StoreError) else type(error).__name__
            logger.error("Query attacks are not detected: the store fails: %s", reason)
        self.up, self._down_until = False, time.monotonic() + RETRY
        self._prints = None  # the store may come back with another secret

    def _look(
        self, images: Sequence[Pixels], owners: Sequence[str]
    ) -> tuple[list[Response | None], dict[bytes, bytes]]:
        """The response to each image, and the items to store."""
        if self._prints is None:
            self._prints = Fingerprints(self._store.secret())
        pairs = [
            (image, f"{self._model}\n{owner}") for image, owner in zip(images, owners, strict=True)
        ]
        names = [self._prints.name(*pair) for pair in pairs]
        prints = self._prints.digests(images, [owner for _, owner in pairs])
        keys = [key for digests in prints for key in _keys(digests[:PROBED])]
        index = dict(zip(keys, self._store.find(keys), strict=True))
        entries = self._entries(prints, index)
        responses: list[Response | None] = [None] * len(images)
        changed: dict[bytes, Entry] = {}
        for number, (name, digests) in enumerate(zip(names, prints, strict=True)):
            now, own = time.time(), tuple(digests.tolist())
            nearest = _nearest(entries, own)
            if nearest is None or name in entries:
                nearest = name
            else:
                responses[number] = self._respond(now - entries[nearest].when)
            entry = entries.get(nearest, Entry(0.0, own))
            # Nothing could ever be near a fingerprint of so few digests.
            if abs(now - entry.when) > self._stale and len(own) > SHARED:
                entries[nearest] = changed[nearest] = Entry(now, entry.digests)
        return responses, _items(changed, index)

    def _respond(self, age: float) -> Response:
        # Clocks of several machines may differ.
        if self._response == "throttle" and abs(age) > PAUSE:
            return "alert"
        return self._response

    def _entries(
        self, prints: Sequence[Digests], index: Mapping[bytes, bytes]
    ) -> dict[bytes, Entry]:
        """The stored queries that share most with each fingerprint, by name."""
        nearest: dict[bytes, None] = {}
        for digests in prints:
            values = [index[key] for key in _keys(digests[:PROBED])]
            counts = Counter(name for names in filter(None, values) for name in _names(names))
            nearest |= dict.fromkeys(name for name, _ in counts.most_common(CANDIDATES))
        values = self._store.find([QUERY + name for name in nearest]) if nearest else []
        pairs = zip(nearest, values, strict=True)
        entries = {name: Entry.unpack(data) for name, data in pairs if data}
        oldest = time.time() - self._expiry
        return {name: entry for name, entry in entries.items() if entry.when > oldest}


def _keys(digests: Digests) -> list[bytes]:
    data = digests.tobytes()
    return [data[start : start + 8] for start in range(0, len(data), 8)]


def _names(value: bytes) -> set[bytes]:
    """The names under a digest, each once though both generations may have it."""
    return {value[start : start + 8] for start in range(0, len(value), 8)}


def _nearest(entries: Mapping[bytes, Entry], own: tuple[int, ...]) -> bytes | None:
    """The name of the entry that shares most with an image's digests, if that is enough."""
    digests = frozenset(own)
    shared = {name: len(digests.intersection(entry.digests)) for name, entry in entries.items()}
    name = max(shared, key=shared.__getitem__, default=b"")
    return name if shared.get(name, 0) > SHARED else None


def _items(changed: Mapping[bytes, Entry], index: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """The items to store: the entries, and their names under their greatest digests."""
    items: dict[bytes, bytes] = {}
    for name, entry in changed.items():
        items[QUERY + name] = entry.pack()
        for digest in entry.digests[:INDEXED]:
            key = digest.to_bytes(8, "little")
            before = items.get(key, index.get(key, b""))
            items[key] = before[-8 * (NAMES - 1) :] + name
    return items
