"""What a query store sees, what it misses, and what it costs.

    .venv/bin/python benchmarks/queries.py attacks --images HELD.npz    hours; goes on where it was
    .venv/bin/python benchmarks/queries.py alarms --images HELD.npz     5 minutes
    .venv/bin/python benchmarks/queries.py cost                         10 minutes, needs wrk
    .venv/bin/python benchmarks/queries.py size                         10 minutes

attacks  ART's Square and HopSkipJump, and OARS, which adapts, on a model that nothing defends
alarms   clean images: distinct ones, the same again, saved anew, frames of a video
cost     requests/s of the served model without a store, with LMDB, with Redis
size     look-up and insertion by stored queries, and bytes of each
Needs `redis-server`, a package of every Linux distribution.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import ratios
from endpoint import CONCURRENCY, DONE, load_with_wrk
from PIL import Image
from server import Redis, endpoint, pack, pngs
from skimage.data import data_dir
from sklearn.datasets import load_digits
from tqdm import tqdm

from rampart.export.archive import archive
from rampart.handlers.image import decode
from rampart.handlers.queries.stores import Store, open_store
from rampart.handlers.queries.watch import DIGESTS, ENTRIES, PROBED, Entry, Watch, _items
from rampart.hardening.judge.metrics import wilson
from rampart.hardening.model.images import Images
from rampart.hardening.report import redteam
from rampart.hardening.train.data import load

STORES = ("lmdb", "redis")
SIDES = ("off", *STORES)
RUNS = [
    f"{policy}-{kind}-{attack}"
    for kind in STORES
    for policy in ("alert", "reject")
    for attack in ("square", "hopskipjump", "oars")
]


@contextlib.contextmanager
def fresh(kind: str) -> Iterator[str]:
    """The address of an empty store of this kind."""
    with tempfile.TemporaryDirectory(prefix="rampart-queries-") as folder:
        if kind == "lmdb":
            yield folder
            return
        redis = Redis(Path(folder))
        try:
            yield redis.address
        finally:
            redis.stop()


def attacks(options: argparse.Namespace) -> list[str]:
    """Each attack on each image, with both policies and stores; no two runs share a store.

    A run goes on where it was, with an empty store; several are made side by side with --run.
    """
    images, lines = load(options.images, size=32), []
    for run in options.run or RUNS:
        policy, kind, name = run.split("-")
        out = options.out / run
        if len(redteam.read(out)) < options.limit:
            attacked(options, images, out, policy, kind, name)
        lines.append(f"{policy:6} {kind:5} {redteam.summary(redteam.read(out))}")
    return lines


def attacked(
    options: argparse.Namespace, images: Images, out: Path, policy: str, kind: str, name: str
) -> None:
    """One attack on all images of an endpoint of its own."""
    with tempfile.TemporaryDirectory() as scratch, fresh(kind) as store:
        packed = Path(scratch) / "weak.mar"
        settings = {"rampart": {"on_query_attack": policy, "false_alarm_rate": 0}}
        archive(options.weak, packed, variant="lean", settings=settings)
        # A run goes on only at the address where it began.
        port = 18_000 + 10 * RUNS.index(out.name)
        with endpoint(packed, "--query-store", store, port=port) as url:
            where = redteam.Endpoint(url, images.classes)
            counts = {"limit": options.limit, "budget": options.budget}
            redteam.redteam(where, images, out, attacks=[name], **counts)


def saved(image: np.ndarray, format: str, quality: int) -> np.ndarray:
    """What an image is after it was saved with losses."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, format, quality=quality)
    return decode(buffer.getvalue())


def streams(images: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
    """Images (N, 32, 32, 3) in the order in which they are sent, by what they are, and of how many
    at the end the alerts are counted."""
    noise = np.random.default_rng(0)
    digits = load_digits().images / 16 * 255
    cat = decode((Path(data_dir) / "chelsea.png").read_bytes())

    def resized(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image.astype(np.uint8)).resize((32, 32)).convert("RGB"))

    def shaken(levels: float) -> np.ndarray:
        frames = np.repeat(images[:500], 2, axis=0) + noise.normal(0, levels, (1000, 32, 32, 3))
        return np.clip(np.rint(frames), 0, 255).astype(np.uint8)

    def panned(step: int) -> np.ndarray:
        rows = range(0, 260, 20)
        return np.stack([cat[y : y + 32, x : x + 32] for y in rows for x in range(0, 400, step)])

    bordered = np.full((1000, 96, 96, 3), 255, dtype=np.uint8)
    bordered[:, 32:64, 32:64] = images[:1000]
    first, again = images[:500], [("JPEG", 95), ("JPEG", 75), ("WEBP", 90)]
    out = {
        "distinct photographs": (images, len(images)),
        "distinct digits (scikit-learn's)": (np.stack([resized(one) for one in digits]), 1797),
        "distinct, on white": (np.stack([resized(one) for one in bordered]), 1000),
        "the same file by two clients": (np.concatenate([first, first]), 500),
    }
    for format, quality in again:
        copies = np.stack([saved(image, format, quality) for image in first])
        name = f"the same again as {format} {quality}"
        out[name] = (np.concatenate([first, copies]), 500)
    for levels in (1.0, 2.0, 4.0):
        out[f"two frames with noise of {levels:g}/255"] = (shaken(levels), 500)
    for step in (1, 2, 4):
        frames = panned(step)
        out[f"a camera that moves {step} px a frame"] = (frames, len(frames))
    return out


def alarms(options: argparse.Namespace) -> list[str]:
    """Share of clean images that raise an alert, image by image."""
    images = load(options.images, size=32).image.numpy()[:5000]
    lines = []
    for kind in STORES:
        for name, (sent, counted) in streams(images).items():
            with fresh(kind) as address:
                store = open_store(address, entries=100_000 * ENTRIES, expiry=3600)
                watch = Watch(store, "", response="alert", expiry=3600)
                seen = [watch.look([image], [""])[0] for image in tqdm(sent, desc=name)]
            alerts = sum(response is not None for response in seen)
            low, high = wilson(alerts / counted, counted)
            lines.append(
                f"{kind:6} {name:36} {alerts:5} of {counted:5}, {alerts / counted:6.2%}"
                f" ({low:.2%} to {high:.2%})"
            )
    return lines


SCRIPT = """
local bodies, at, who = {}, 0, os.time() * 1000
for i = 1, COUNT do
  local file = io.open("FOLDER/" .. i .. ".png", "rb")
  bodies[i] = file:read("*a"); file:close()
end
request = function()
  at, who = at % COUNT + 1, who + 1
  -- Each comes from another client, so that no image is known and every one is stored.
  return wrk.format("POST", nil, {["Content-Type"] = "image/png", ["X-Owner"] = who}, bodies[at])
end
"""


def cost(options: argparse.Namespace) -> tuple[list[str], list[dict[str, Any]]]:
    """Requests/s of the archive that `make serve` serves, each image new to the store."""
    photo = decode((Path(data_dir) / "chelsea.png").read_bytes())
    crops = [photo[y : y + 32, x : x + 32] for y in range(0, 260, 32) for x in range(0, 400, 32)]
    rates = {side: {c: [] for c in CONCURRENCY} for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        for number, body in enumerate(pngs(np.stack(crops)), 1):
            (folder / f"{number}.png").write_bytes(body)
        script = folder / "load.lua"
        load = SCRIPT.replace("COUNT", str(len(crops))).replace("FOLDER", scratch)
        script.write_text(load + DONE)
        packed = pack(options.model, folder / "model.mar", "--query-owner", "X-Owner")
        urls = {"off": stack.enter_context(endpoint(packed))}
        for kind in STORES:
            address = stack.enter_context(fresh(kind))
            urls[kind] = stack.enter_context(endpoint(packed, "--query-store", address))
        for url in urls.values():
            load_with_wrk(url, script, 8, 3)
        for _ in tqdm(range(options.rounds), desc="rounds"):
            for concurrency in CONCURRENCY:
                for side, url in urls.items():
                    found = load_with_wrk(url, script, concurrency, options.seconds)
                    rates[side][concurrency].append(found.rate)
                    time.sleep(0.5)  # what was in flight would slow the next side down
    lines, claims = [], []
    for concurrency in CONCURRENCY:
        for side in SIDES:
            of = rates[side][concurrency]
            lines.append(f"c={concurrency:<3} {side:6} {np.median(of):6.0f} requests/s"
                         f" ({min(of):.0f} to {max(of):.0f})")  # fmt: skip
        for side in STORES:
            off = rates["off"][concurrency]
            claims.append(
                ratios.claim(
                    f"{side} / off", f"c={concurrency}", rates[side][concurrency], off, 0.95
                )
            )
            lines.append(ratios.in_words(claims[-1]))
    return lines, claims


class Plain:
    """A dict as a store: what the others are measured against. It forgets nothing."""

    def __init__(self) -> None:
        self.items: dict[bytes, bytes] = {}

    def secret(self) -> bytes:
        """Always the same."""
        return bytes(32)

    def find(self, keys: Sequence[bytes]) -> list[bytes]:
        """What is known under each key."""
        return [self.items.get(key, b"") for key in keys]

    def add(self, items: Mapping[bytes, bytes]) -> None:
        """Keep values."""
        self.items.update(items)


def resident(address: str) -> int:
    """Bytes that a store takes: of LMDB's file, or of Redis's memory."""
    if "://" not in address:
        return sum(file.stat().st_blocks * 512 for file in Path(address).iterdir())
    import redis

    return int(redis.Redis.from_url(address).info("memory")["used_memory"])


def spent(address: str) -> float:
    """Seconds of CPU that a Redis has taken."""
    import redis

    about = redis.Redis.from_url(address).info("cpu")
    return float(about["used_cpu_user"]) + float(about["used_cpu_sys"])


def size(options: argparse.Namespace) -> list[str]:
    """Microseconds to look up and to store one query, by how many are stored."""
    noise, lines = np.random.default_rng(0), []
    with fresh("lmdb") as folder, fresh("redis") as address:
        entries = 4 * options.most * ENTRIES
        stores: dict[str, tuple[Store, Callable[[], int]]] = {
            "dict": (Plain(), lambda: 0),
            "lmdb": (open_store(folder, entries=entries, expiry=1e6), lambda: resident(folder)),
            "redis": (open_store(address, entries=entries, expiry=1e6), lambda: resident(address)),
        }
        for name, (store, taken) in stores.items():
            store.secret()
            before, stored = taken(), 0
            for target in (10**power for power in range(4, 7) if 10**power <= options.most):
                while stored < target - 1000:
                    store.add(made(noise, 1000))
                    stored += 1000
                cpu = spent(address)
                times = np.array([timed(store, noise) for _ in range(1000)])
                cpu = spent(address) - cpu
                stored += 1000
                look, add = np.median(times, axis=0) * 1e6
                line = (
                    f"{name:6} {stored:8} stored: look-up {look:4.0f} us, insertion {add:4.0f} us"
                )
                each = (taken() - before) / stored
                line += f", {each:.0f} bytes a query" if each else ""
                line += f", {cpu * 1e3:.0f} us of the server's CPU" if name == "redis" else ""
                lines.append(line)
    return lines


def made(noise: np.random.Generator, count: int) -> dict[bytes, bytes]:
    """What storing so many different queries writes."""
    digests = noise.integers(1, 2**63, (count, DIGESTS)).tolist()
    entries = {noise.bytes(8): Entry(time.time(), tuple(one)) for one in digests}
    return _items(entries, {})


def timed(store: Store, noise: np.random.Generator) -> tuple[float, float]:
    """Seconds to look up a new query, and to store it."""
    items = made(noise, 1)
    keys = [noise.bytes(8) for _ in range(PROBED)]
    began = time.perf_counter()
    store.find(keys)
    found = time.perf_counter()
    store.add(items)
    return found - began, time.perf_counter() - found


def main() -> None:
    """One of the four parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["attacks", "alarms", "cost", "size"])
    parser.add_argument("--images", type=Path, help="labelled images, .npz")
    parser.add_argument("--model", type=Path, default=Path("model_store/cifar10"))
    parser.add_argument("--weak", type=Path, default=Path("model_store/cifar10-undefended"))
    parser.add_argument("--out", type=Path, default=Path("runs/queries"), help="of attacks")
    parser.add_argument("--run", action="append", choices=RUNS, help="of attacks; default all")
    parser.add_argument("--limit", type=int, default=100, help="images under attack")
    parser.add_argument("--budget", type=int, default=2000, help="queries an image may cost")
    parser.add_argument("--most", type=int, default=10**6, help="stored queries to grow to")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.part in ("attacks", "alarms") and not options.images:
        parser.error("this part needs --images")
    if options.part == "cost":
        lines, claims = cost(options)
    else:
        parts = {"attacks": attacks, "alarms": alarms, "size": size}
        lines, claims = parts[options.part](options), []
    print("\n".join(lines))
    if options.json:
        ratios.write(options.json, claims)


if __name__ == "__main__":
    main()
