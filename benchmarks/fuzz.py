"""Hostile bodies: mutated pictures, JSON, tensors and multipart parts, by the thousand.

    .venv/bin/python benchmarks/fuzz.py --bodies 100000
    .venv/bin/python benchmarks/fuzz.py --bodies 5000 --serve model_store/cifar10.mar

In process every body goes through the handler's own reading and decoding; with --serve through a
real TorchServe. Asked for: no answer of 500 or above, no worker that died, memory that grows by
less than 50 MB. A body that fails is written to --out: keep it in tests/handlers/hostile/.
"""

import argparse
import base64
import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import psutil
import requests
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.server import endpoint
from handlers.defended import examined, pixels_of
from handlers.image import MAX_PIXELS, ImageError
from handlers.open_inference import Pixels
from handlers.protocol import read

Fields = dict[str, object]
SIZE = 32
GROWTH = 50_000_000
INTERESTING = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
)
WORDS = (
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"[]",
    b"{}",
    b'""',
    b"true",
    b"0",
    b"[[",
    b"}}",
    b"\\u0000",
)


def pictures() -> Iterator[bytes]:
    """Real files of each format and mode."""
    noise = random.Random(0)
    colour = Image.frombytes("RGB", (40, 30), noise.randbytes(3600))
    for mode in ("RGB", "L", "P", "1", "RGBA", "LA", "I;16"):
        image = Image.new("I;16", (9, 9), 999) if mode == "I;16" else colour.convert(mode)
        for format, options in (
            ("PNG", {}),
            ("JPEG", {"progressive": True}),
            ("JPEG", {"quality": 5}),
            ("WEBP", {}),
            ("WEBP", {"lossless": True}),
        ):
            out = BytesIO()
            try:
                image.save(out, format, **options)
            except OSError:  # a mode that the format lacks
                continue
            yield out.getvalue()
    turned, out = Image.Exif(), BytesIO()
    turned[0x0112] = 6
    colour.save(out, "JPEG", exif=turned)
    yield out.getvalue()


def seeds() -> list[bytes]:
    """Bodies that are answered: pictures, KServe v1, Open Inference v2 in JSON and binary."""
    files = list(pictures())
    text = [base64.b64encode(file).decode() for file in files[:6]]
    raw = {"name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [7] * 12}
    encoded = {"name": "image", "datatype": "BYTES", "shape": [2], "data": text[:2]}
    bodies: list[object] = [{"instances": [{"b64": one} for one in text]}]
    bodies += [
        {"id": "7", "inputs": [tensor], "outputs": [{"name": "label"}]} for tensor in (raw, encoded)
    ]
    binary = json.dumps({"inputs": [{"name": "i", "datatype": "UINT8", "shape": [1, 2, 2, 3]}]})
    return [*files, *(json.dumps(body).encode() for body in bodies), binary.encode() + bytes(12)]


def mutated(body: bytes, known: list[bytes], draw: random.Random) -> bytes:
    """`body` with one to eight changes: bits, bytes, cuts, repeats, words, parts of others."""
    data = bytearray(body)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        at, length = draw.randrange(len(data) + 1), draw.choice((1, 2, 4, 16, 64))
        match draw.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
            case 1:
                data[at : at + length] = draw.choice(INTERESTING)
            case 2:
                data[at : at + length] = draw.choice(WORDS)
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length] * draw.choice((1, 2, 100))
            case 5:
                other = draw.choice(known)
                data[at:] = other[draw.randrange(len(other)) :]
            case _:
                del data[at:]
    return bytes(data)


def request(draw: random.Random, known: list[bytes]) -> tuple[Fields, Fields]:
    """Fields and headers as TorchServe would hand them over."""
    headers: Fields = {"url_path": ""} if draw.random() < 0.5 else {}
    if draw.random() < 0.3:
        headers["Inference-Header-Content-Length"] = draw.choice(
            ("1", "58", "999", "-1", "x", "9" * 40)
        )
    if draw.random() < 0.2:
        names = draw.sample(("a", "b", "body", "data", "c"), draw.randrange(1, 5))
        kinds = {name: {"content-type": draw.choice(("image/png", ""))} for name in names}
        return {name: mutated(draw.choice(known), known, draw) for name in names}, headers | kinds
    body: object = mutated(draw.choice(known), known, draw)
    if isinstance(body, bytes) and draw.random() < 0.1:
        body = body.decode("utf-8", "surrogateescape")
    return {"body": body}, headers


def answered(fields: Fields, headers: Fields) -> Sequence[bytes | Pixels | ImageError]:
    """The images of a request; where reading it raises, which it never should, a 500."""
    try:
        return read(fields, headers).images
    except Exception as error:
        return [ImageError(500, "raised", type(error).__name__)]


def in_process(count: int, draw: random.Random, out: Path) -> Counter[int]:
    """Read and decode `count` requests; how often each status came."""
    known, statuses = seeds(), Counter[int]()
    for _ in tqdm(range(count), desc="in process", leave=False):
        fields, headers = request(draw, known)
        for picture in examined(answered(fields, headers), SIZE, MAX_PIXELS):
            pixels = pixels_of(picture, SIZE)
            code = pixels.code if isinstance(pixels, ImageError) else 200
            statuses[code] += 1
            if code >= 500:
                keep(fields, out)
    return statuses


def over_http(
    count: int, draw: random.Random, archive: Path, out: Path
) -> tuple[Counter[int], list[int]]:
    """Send `count` bodies to a server; statuses, and by how much each worker's memory grew."""
    known, statuses = seeds(), Counter[int]()
    with endpoint(archive) as url, requests.Session() as session:
        workers = processes(url)
        before = [process.memory_info().rss for process in workers]
        for _ in tqdm(range(count), desc="over HTTP", leave=False):
            body = mutated(draw.choice(known), known, draw)
            kind = draw.choice(("image/png", "application/json", "application/octet-stream"))
            answer = session.post(url, data=body, headers={"Content-Type": kind}, timeout=60)
            statuses[answer.status_code] += 1
            if answer.status_code >= 500:
                keep({"body": body}, out)
        if processes(url) != workers:
            raise SystemExit("a worker died and was started anew")
        return statuses, [p.memory_info().rss - b for p, b in zip(workers, before, strict=True)]


def processes(url: str) -> list[psutil.Process]:
    """The workers behind `url`."""
    root, name = url.split("/predictions/")
    address, port = root.rsplit(":", 1)
    known = requests.get(f"{address}:{int(port) + 1}/models/{name}", timeout=30).json()
    return [psutil.Process(worker["pid"]) for worker in known[0]["workers"]]


def keep(fields: dict[str, object], out: Path) -> None:
    """Write what failed, to be looked at and kept as a test."""
    out.mkdir(parents=True, exist_ok=True)
    for value in fields.values():
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")
        (out / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def main() -> int:
    """Fuzz, print; the exit code says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bodies", type=int, default=100_000)
    parser.add_argument("--serve", type=Path, help="archive to fuzz over HTTP")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/hostile"))
    options = parser.parse_args()
    draw = random.Random(options.seed)
    if options.serve:
        statuses, growth = over_http(options.bodies, draw, options.serve, options.out)
    else:
        in_process(1000, draw, options.out)  # what is loaded once
        before = psutil.Process().memory_info().rss
        statuses = in_process(options.bodies, draw, options.out)
        growth = [psutil.Process().memory_info().rss - before]
    bad = sum(count for code, count in statuses.items() if code >= 500)
    print(f"{options.bodies} bodies, images answered: {dict(sorted(statuses.items()))}")
    print(f"of 500 and above: {bad}; memory grew by {max(growth) / 1e6:.1f} MB (at most 50)")
    return 1 if bad or max(growth) > GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
