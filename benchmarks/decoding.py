"""What one request may cost: milliseconds and megabytes per kilobyte sent, for every decoder path.

    .venv/bin/python benchmarks/decoding.py [--size 224] [--json FILE]

Each case is the dearest request of its kind that the default limits let through, or the dearest
refusal. It runs in a process of its own, through the same reading, judging and decoding as at the
endpoint. Bodies count in begun kilobytes: an empty HTTP request has a fifth of one. Asked for: at
most 50 ms a kilobyte and 100 MB.
"""

import argparse
import base64
import json
import math
import multiprocessing
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from rampart.handlers.containers import segments
from rampart.handlers.engine import cpu_features
from rampart.handlers.errors import ImageError
from rampart.handlers.image import FREE_PIXELS, default_pixels, pictures_of, view_of
from rampart.handlers.protocols.choice import read
from rampart.handlers.protocols.content_encoding import MAX_BODY
from rampart.handlers.types import Incoming

ROUNDS = 5
MAX_MILLISECONDS, MAX_MEGABYTES = 50.0, 100.0
FREE = math.isqrt(FREE_PIXELS)  # side of the largest picture that may be as small as it can
EXIF = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 60_000) + bytes(65_000)


@dataclass(frozen=True)
class Cost:
    """What one case took, the median of its rounds."""

    case: str
    bytes: int
    milliseconds: float
    megabytes: float
    answers: str

    @property
    def per_kilobyte(self) -> float:
        """Milliseconds per begun kilobyte."""
        return self.milliseconds / math.ceil(max(1, self.bytes) / 1024)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    """`image` as a file."""
    out = BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_text(png: bytes, kind: bytes, data: bytes) -> bytes:
    """A PNG with another chunk after its header."""
    return png[:33] + chunk(kind, data) + png[33:]


def emptied(jpeg: bytes, scans: int) -> bytes:
    """A JPEG whose scans have lost their data, its last one `scans` times more."""
    parts = []
    for kind, start, end in segments(jpeg):
        (length,) = struct.unpack_from(">H", jpeg, start + 2) if end - start > 2 else (0,)
        parts.append(jpeg[start : start + 2 + length] if kind == 0xDA else jpeg[start:end])
    return jpeg[:2] + b"".join(parts[:-1]) + parts[-2] * scans + parts[-1]


def interlaced(side: int) -> bytes:
    """A PNG of one colour in the seven passes of Adam7."""
    rows = b""
    for x, y, dx, dy in (  # the first column and row of each pass, and its steps
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        width, height = -(-(side - x) // dx), -(-(side - y) // dy)
        rows += (b"\0" + bytes(3 * width)) * height
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 1)
    whole = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + whole


def pictures(pixels: int) -> dict[str, Callable[[], bytes]]:
    """The dearest file of each kind, by name, where a request may have `pixels`."""
    most = math.isqrt(pixels)
    cases: dict[str, Callable[[], bytes]] = {}

    def add(name: str, side: int, mode: str, format: str, **options: object) -> None:
        def make() -> bytes:
            # A corner of noise buys the bytes that the picture's pixels want.
            image = Image.new("RGB", (side, side), (90, 120, 30))
            noise = math.isqrt(max(0, side * side - FREE_PIXELS) // 2000)
            if noise:
                image.paste(Image.frombytes("RGB", (noise, noise), os.urandom(3 * noise**2)))
            if mode == "I;16":
                return encoded(Image.new("I;16", (side, side), 9), format, **options)
            return encoded(image.convert(mode), format, **options)

        cases[f"{name}, {side}x{side}"] = make

    for side in (FREE, most):
        for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "I;16"):
            add(f"PNG {mode}", side, mode, "PNG", compress_level=9)
        add("PNG RGB, colour key", side, "RGB", "PNG", transparency=(1, 2, 3))
        add("PNG P, opaque alphas", side, "P", "PNG", transparency=bytes([255] * 256))
        add("WebP lossless", side, "RGB", "WEBP", lossless=True)
        add("WebP lossless with alpha", side, "RGBA", "WEBP", lossless=True)
        add("WebP lossy", side, "RGB", "WEBP", quality=30)
    for side in (FREE, most, 2 * most):
        add("JPEG", side, "RGB", "JPEG")
        add("JPEG gray", side, "L", "JPEG")
        add("JPEG CMYK, 4:4:4", side, "CMYK", "JPEG")
    for side in (FREE, most, math.isqrt(2 * pixels)):
        add("JPEG progressive", side, "RGB", "JPEG", progressive=True)
        add("JPEG progressive, 4:4:4", side, "RGB", "JPEG", progressive=True, subsampling=0)
    cases["PNG interlaced"] = lambda: interlaced(FREE)
    base = Image.new("RGB", (FREE, FREE))
    cases["JPEG without data"] = lambda: emptied(encoded(base, "JPEG"), 0)
    for scans in (0, 12, 80):
        cases[f"JPEG progressive without data, {scans} more scans"] = lambda scans=scans: emptied(
            encoded(base, "JPEG", progressive=True), scans
        )
    small = encoded(Image.new("RGB", (32, 32)), "PNG")
    text = zlib.compress(b"Raw profile type exif\n" + b"00" * 500_000, 9)
    cases["PNG with 1 MB of packed text"] = lambda: with_text(small, b"zTXt", b"a\0\0" + text)
    cases["PNG with 60,000 EXIF tags"] = lambda: with_text(small, b"eXIf", EXIF[6:])
    cases["PNG of 500,000 chunks"] = lambda: small[:33] + chunk(b"tEXt", b"") * 500_000 + small[33:]
    jpeg = encoded(Image.new("RGB", (32, 32)), "JPEG", exif=EXIF)
    cases["JPEG with 60,000 EXIF tags"] = lambda: jpeg
    cases["JPEG of 1.6 million markers"] = lambda: jpeg[:2] + b"\xff\xfe\0\2" * 1_600_000 + jpeg[2:]
    return cases


def bodies(pixels: int) -> dict[str, Callable[[], bytes]]:
    """The dearest bodies beside pictures, by name."""
    picture = encoded(Image.new("RGB", (FREE, FREE)), "WEBP", lossless=True)
    tiny = encoded(Image.new("RGB", (1, 1)), "WEBP", lossless=True)

    def instances(data: bytes) -> bytes:
        text = base64.b64encode(data).decode()
        return json.dumps({"instances": [{"b64": text}] * 32}).encode()

    def listed(item: str, shape: str = "[1,9,9,3]") -> bytes:
        head = '{"inputs":[{"name":"i","datatype":"UINT8","shape":' + shape + ',"data":['
        return (head + item * ((MAX_BODY - 200) // len(item)) + "1]}]}").encode()

    return {
        "JSON, 32 WebPs of a million pixels": lambda: instances(picture),
        "JSON, 32 WebPs of one pixel": lambda: instances(tiny),
        "JSON, 6 MB of base64": lambda: instances(bytes(150_000)),
        "JSON, numbers": lambda: listed("7,"),
        "JSON, long numbers": lambda: listed("99999,"),
        "JSON, fractions": lambda: listed("1.5,"),
        "JSON, lists": lambda: listed("[],"),
        "JSON, triples": lambda: listed("[1,2,3],"),
        "JSON, objects": lambda: listed("{},"),
        "JSON, texts": lambda: listed('"ab",'),
        "JSON, nested": lambda: b"[" * (MAX_BODY - 1),
        "JSON, one text": lambda: b'{"instances":"' + "é".encode() * (MAX_BODY // 2 - 20) + b'"}',
        "JSON, a number of 6 MB": lambda: b'{"instances":' + b"9" * (MAX_BODY - 20) + b"}",
        "JSON, 16 pictures as numbers": lambda: json.dumps(
            {
                "inputs": [
                    {
                        "name": "i",
                        "datatype": "UINT8",
                        "shape": [16, 260, 260, 3],
                        "data": [0] * (16 * 260 * 260 * 3),
                    }
                ]
            },
            separators=(",", ":"),
        ).encode(),
        "no image": lambda: b"\0" * MAX_BODY,
    }


def answered(body: bytes, size: int, pixels: int) -> str:
    """Read and decode a request as the handler does; how many images of which kind it had."""
    kinds: dict[str, int] = {}
    for picture in pictures_of(read(Incoming({}, [body])).images, size, pixels):
        result = view_of(picture, size)
        kind = result.type if isinstance(result, ImageError) else "decoded"
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def memory(name: str) -> int:
    """One of this process's figures of memory, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])


def measured(case: str, body: bytes, size: int, pixels: int) -> Cost:
    """Run one case; call it in a process of its own."""
    answered(encoded(Image.new("RGB", (40, 40)), "PNG"), size, pixels)  # what is loaded once
    Path("/proc/self/clear_refs").write_text("5")
    before, times, answers = memory("VmRSS"), [], ""
    for _ in range(ROUNDS):
        began = time.perf_counter()
        answers = answered(body, size, pixels)
        times.append(1e3 * (time.perf_counter() - began))
    return Cost(
        case, len(body), sorted(times)[ROUNDS // 2], (memory("VmHWM") - before) / 1e6, answers
    )


def main() -> int:
    """Measure every case, print a table; the exit code says whether all lie within the bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=32, help="side of the model's images")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    options = parser.parse_args()
    pixels = default_pixels(options.size)
    costs = []
    for name, make in (pictures(pixels) | bodies(pixels)).items():
        body = make()
        with multiprocessing.get_context("fork").Pool(1) as pool:
            costs.append(pool.apply(measured, (name, body, options.size, pixels)))
        print(".", end="", file=sys.stderr, flush=True)
    print(f"\n{'ms/KB':>7} {'ms':>8} {'MB':>6} {'bytes':>9}  case: answers")
    for cost in sorted(costs, key=lambda cost: -cost.per_kilobyte):
        print(
            f"{cost.per_kilobyte:7.2f} {cost.milliseconds:8.1f} {cost.megabytes:6.1f}"
            f" {cost.bytes:9,}  {cost.case}: {cost.answers}"
        )
    features = ", ".join(sorted(cpu_features() & {"avx2", "avx512_vnni", "avx512_bf16"}))
    print(f"{len(costs)} cases, model of {options.size} pixels, {pixels:,} a request; {features}")
    if options.json:
        options.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1))
    worst = max(cost.per_kilobyte for cost in costs), max(cost.megabytes for cost in costs)
    print(f"worst: {worst[0]:.1f} ms/KB (at most 50), {worst[1]:.0f} MB (at most 100)")
    return int(worst[0] > MAX_MILLISECONDS or worst[1] > MAX_MEGABYTES)


if __name__ == "__main__":
    sys.exit(main())
