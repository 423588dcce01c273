"""Hostile bodies: mutated pictures, JSON, tensors, forms and multipart parts, by the thousand.

    .venv/bin/python benchmarks/fuzz.py --bodies 100000
    .venv/bin/python benchmarks/fuzz.py --bodies 100000 --serve model_store/cifar10.mar
    .venv/bin/python benchmarks/fuzz.py --serve model_store/cifar10.mar --server http --clients 4
    .venv/bin/python benchmarks/fuzz.py --bodies 5000 --serve model_store/cifar10.mar --grpc

In process every body goes through the handler's own reading and decoding; with --serve through a
real server, over HTTP in each of its protocols and in mixtures, or over gRPC. Asked for: no answer
of 500 or above from Rampart, no worker that died, memory that grows by less than 50 MB, and nothing
of a body in the server's logs. What TorchServe answers with 5xx before Rampart sees it is counted
by cause. A body that fails is written to --out: keep it as a test.
"""

import argparse
import base64
import contextlib
import gzip
import hashlib
import json
import random
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes

import grpc
import psutil
import requests
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.server import endpoint, free_ports
from rampart.handlers.defended import incoming
from rampart.handlers.errors import ImageError
from rampart.handlers.http.messages import CLASSES, SERVICE
from rampart.handlers.image import MAX_PIXELS, pictures_of, view_of
from rampart.handlers.protocols.choice import read
from rampart.handlers.types import Pixels

Fields = dict[str, object]
Sent = tuple[str, bytes, dict[str, str]]  # route of a model, body, headers
Statuses = dict[str, Counter[str]]  # by protocol
LENGTHS = ("1", "58", "999", "-1", "x", "9" * 40)
ROUTES = ("/predictions/{}", "/v1/models/{}:predict", "/v2/models/{}/infer")
SIZE = 32
GROWTH = 50_000_000
WORKERS = ("model_service_worker.py", "spawn_main")  # of TorchServe, of our own server
KINDS = ("image/png", "application/json", "application/octet-stream", "text/plain", "", "x/y; q=")
# What TorchServe answers before Rampart sees the request: its front cannot be changed from here.
FRONT = {"500 ErrorDataDecoderException", "500 ArrayIndexOutOfBoundsException"}
INFERENCE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService"
INFER, STREAM_INFER = f"/{SERVICE}/ModelInfer", f"/{SERVICE}/ModelStreamInfer"
PREDICT, STREAM = f"{INFERENCE}/Predictions", f"{INFERENCE}/StreamPredictions"
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


class Seeds(NamedTuple):
    """Bodies that are answered, by protocol."""

    files: list[bytes]
    v1: list[bytes]
    v2: list[bytes]
    binary: list[tuple[bytes, bytes]]  # the JSON and the tensor after it

    @property
    def all(self) -> list[bytes]:
        """Each as one body."""
        return [*self.files, *self.v1, *self.v2, *(head + data for head, data in self.binary)]


def seeds() -> Seeds:
    """Pictures, KServe v1, Open Inference v2 in JSON and binary."""
    files = list(pictures())
    text = [base64.b64encode(file).decode() for file in files[:6]]
    raw = {"name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [7] * 12}
    encoded = {"name": "image", "datatype": "BYTES", "shape": [2], "data": text[:2]}
    v1 = {"instances": [{"b64": one} for one in text]}
    v2 = [
        {"id": "7", "inputs": [tensor], "outputs": [{"name": "label"}]} for tensor in (raw, encoded)
    ]
    packed = b"".join(len(file).to_bytes(4, "little") + file for file in files[:2])
    binary = [
        ({"name": "i", "datatype": "UINT8", "shape": [1, 2, 2, 3]}, bytes(12)),
        ({"name": "i", "datatype": "BYTES", "shape": [2]}, packed),
    ]
    return Seeds(
        files,
        [json.dumps(v1).encode()],
        [json.dumps(body).encode() for body in v2],
        [(json.dumps({"inputs": [tensor]}).encode(), data) for tensor, data in binary],
    )


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
        headers["Inference-Header-Content-Length"] = draw.choice(LENGTHS)
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
        return read(incoming(fields, headers)).images
    except Exception as error:
        return [ImageError(500, "raised", type(error).__name__)]


def in_process(count: int, draw: random.Random, out: Path) -> Counter[str]:
    """Read and decode `count` requests; how often each status came."""
    known, statuses = seeds().all, Counter[str]()
    for _ in tqdm(range(count), desc="in process", leave=False):
        fields, headers = request(draw, known)
        for picture in pictures_of(answered(fields, headers), SIZE, MAX_PIXELS):
            pixels = view_of(picture, SIZE)
            code = pixels.code if isinstance(pixels, ImageError) else 200
            statuses[str(code)] += 1
            if code >= 500:
                keep(fields, out)
    return statuses


def form(draw: random.Random, body: bytes) -> tuple[bytes, str]:
    """`body` as one of several fields of a form, urlencoded or not."""
    fields = [f"f{i}={draw.randrange(99)}".encode() for i in range(draw.randrange(4))]
    data = quote_from_bytes(body).encode() if draw.random() < 0.5 else body
    return b"&".join([*fields, b"image=" + data]), "application/x-www-form-urlencoded"


def multipart(draw: random.Random, body: bytes) -> tuple[bytes, str]:
    """`body` as one of several parts, whose headers are whole or not."""
    boundary, out = b"rampart", b""
    for number in range(draw.randrange(1, 4)):
        kind = draw.choice(("image/png", "application/json", "text/plain", "\xff"))
        head = f'Content-Disposition: form-data; name="p{number}"; filename="f"\r\n'
        head += f"Content-Type: {kind}\r\n"
        out += b"--" + boundary + b"\r\n" + head.encode("latin-1") + b"\r\n" + body + b"\r\n"
    out += b"--" + boundary + b"--\r\n"
    if draw.random() < 0.5:
        out = mutated(out, [out], draw)
    return out, "multipart/form-data; boundary=rampart"


def octets(draw: random.Random, known: Seeds) -> Sent:
    """A picture as it is."""
    return "/predictions/{}", mutated(draw.choice(known.files), known.all, draw), {}


def form_of_fields(draw: random.Random, known: Seeds) -> Sent:
    """A picture as a field of a form."""
    body, kind = form(draw, mutated(draw.choice(known.files), known.all, draw))
    return "/predictions/{}", body, {"Content-Type": kind}


def form_of_parts(draw: random.Random, known: Seeds) -> Sent:
    """A picture as parts of a form."""
    body, kind = multipart(draw, mutated(draw.choice(known.files), known.all, draw))
    return "/predictions/{}", body, {"Content-Type": kind}


def text(draw: random.Random, known: Seeds) -> str:
    """A broken picture in base64."""
    return base64.b64encode(mutated(draw.choice(known.files), known.all, draw)).decode()


def v1(draw: random.Random, known: Seeds) -> Sent:
    """KServe v1, broken itself or with a broken picture."""
    body = mutated(draw.choice(known.v1), known.all, draw)
    if draw.random() < 0.5:
        body = json.dumps({"instances": [{"b64": text(draw, known)}]}).encode()
    return "/v1/models/{}:predict", body, {"Content-Type": "application/json"}


def v2(draw: random.Random, known: Seeds) -> Sent:
    """Open Inference Protocol v2 in JSON, broken itself or with a broken picture."""
    body = mutated(draw.choice(known.v2), known.all, draw)
    if draw.random() < 0.5:
        tensor = {"name": "i", "datatype": "BYTES", "shape": [1], "data": [text(draw, known)]}
        body = json.dumps({"inputs": [tensor]}).encode()
    return "/v2/models/{}/infer", body, {"Content-Type": "application/json"}


def v2_binary(draw: random.Random, known: Seeds) -> Sent:
    """The same with a binary tensor, whole or broken at one end or the other."""
    head, data = draw.choice(known.binary)
    head = mutated(head, known.all, draw) if draw.random() < 0.5 else head
    data = mutated(data, known.all, draw) if draw.random() < 0.7 else data
    length = draw.choice(LENGTHS) if draw.random() < 0.1 else str(len(head))
    return "/v2/models/{}/infer", head + data, {"Inference-Header-Content-Length": length}


def mixture(draw: random.Random, known: Seeds) -> Sent:
    """Any body as any kind anywhere, compressed at times."""
    body, kind = mutated(draw.choice(known.all), known.all, draw), draw.choice(KINDS)
    headers = {"Content-Type": kind}
    if draw.random() < 0.1:
        headers["Inference-Header-Content-Length"] = draw.choice(LENGTHS)
    if draw.random() < 0.1:
        coding = draw.choice(("gzip", "deflate"))
        packed = gzip.compress(body) if coding == "gzip" else zlib.compress(body)
        body = mutated(packed, known.all, draw) if draw.random() < 0.5 else packed
        headers["Content-Encoding"] = coding
    return draw.choice(ROUTES), body, headers


PROTOCOLS = (octets, form_of_fields, form_of_parts, v1, v2, v2_binary, mixture)


def cause(answer: requests.Response) -> str:
    """Status and type of an answer."""
    try:
        return f"{answer.status_code} {answer.json()['type']}"
    except (ValueError, KeyError, TypeError):
        return str(answer.status_code)


def over_http(count: int, draw: random.Random, url: str, out: Path) -> Statuses:
    """Send `count` bodies to a server, by protocol; how often each status came."""
    root, name = url.split("/predictions/")
    known, statuses = seeds(), {protocol.__name__: Counter[str]() for protocol in PROTOCOLS}
    with requests.Session() as session:
        for number in tqdm(range(count), desc="over HTTP", leave=False, disable=None):
            protocol = PROTOCOLS[number % len(PROTOCOLS)]
            route, body, headers = protocol(draw, known)
            try:
                told = cause(
                    session.post(root + route.format(name), body, headers=headers, timeout=60)
                )
            except requests.RequestException as error:
                told = f"5xx {type(error).__name__}"  # no answer is as bad as one of ours
            statuses[protocol.__name__][told] += 1
            if told.startswith("5") and told not in FRONT:
                keep({"body": body, "sent": json.dumps([route, headers])}, out)
    return statuses


def by_clients(count: int, options: argparse.Namespace, url: str) -> Statuses:
    """The same by several clients at a time, each with bodies of its own."""
    draws = [random.Random(options.seed * 1000 + number) for number in range(options.clients)]
    with ThreadPoolExecutor(len(draws)) as pool:
        share = count // len(draws)
        told = list(pool.map(lambda draw: over_http(share, draw, url, options.out), draws))
    return {name: sum((one[name] for one in told), Counter[str]()) for name in told[0]}


def field(number: int, data: bytes) -> bytes:
    """One field of a protobuf message that holds bytes, a text or a message."""
    length, out = len(data), bytes([number << 3 | 2])
    while length > 127:
        out, length = out + bytes([length & 127 | 128]), length >> 7
    return out + bytes([length]) + data


def grpc_request(model: str, inputs: Mapping[str, bytes]) -> bytes:
    """TorchServe's PredictionsRequest."""
    entries = [field(1, name.encode()) + field(2, data) for name, data in inputs.items()]
    return field(1, model.encode()) + b"".join(field(3, entry) for entry in entries)


def grpc_answer(reply: bytes) -> dict[str, Any]:
    """What the bytes of TorchServe's PredictionResponse hold: one field, as JSON."""
    at = 1  # after the field's number comes its length, seven bits a byte
    while reply[at] > 127:
        at += 1
    answer: dict[str, Any] = json.loads(reply[at + 1 :])
    return answer


def over_v2(count: int, draw: random.Random, port: int, model: str, out: Path) -> Counter[str]:
    """Send `count` ModelInferRequests, a third of them by a stream; statuses as by HTTP."""
    known, statuses = seeds(), Counter[str]()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        one, stream = (channel.unary_unary(INFER), channel.stream_stream(STREAM_INFER))
        for _ in tqdm(range(count), desc="over gRPC", leave=False):
            asked = CLASSES["ModelInferRequest"](model_name=model)
            asked.inputs.add(name="i", datatype="BYTES", shape=[1])
            file = mutated(draw.choice(known.files), known.all, draw)
            asked.raw_input_contents.append(len(file).to_bytes(4, "little") + file)
            sent = asked.SerializeToString()
            sent = mutated(sent, known.all, draw) if draw.random() < 0.5 else sent
            try:
                if draw.random() < 0.3:
                    list(stream(iter([sent, sent]), timeout=60))
                    told = "streamed"
                else:
                    one(sent, timeout=60)
                    told = "200"
            except grpc.RpcError as error:
                told = dict(error.trailing_metadata() or ()).get("http-status", error.code().name)
            statuses[told] += 1
            if not (told[:1] in "234" or told == "streamed"):
                keep({"body": sent}, out)
    return statuses


def over_grpc(count: int, draw: random.Random, port: int, model: str, out: Path) -> Counter[str]:
    """Send `count` maps of inputs, a third of them by a call that streams; statuses as by HTTP."""
    known, statuses = seeds().all, Counter[str]()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        one, stream = (channel.unary_unary(PREDICT), channel.unary_stream(STREAM))
        for _ in tqdm(range(count), desc="over gRPC", leave=False):
            names = draw.sample(("data", "body", "a", "\u2028", ""), draw.randrange(1, 4))
            fields = {name: mutated(draw.choice(known), known, draw) for name in names}
            asked = grpc_request(model, fields)
            broken = draw.random() < 0.1
            asked = mutated(asked, [asked], draw) if broken else asked
            try:
                if draw.random() < 0.3:
                    reply = list(stream(asked, timeout=60))[-1]
                else:
                    reply = one(asked, timeout=60)
                content = grpc_answer(reply)
                told = f"{content['code']} {content['type']}" if "code" in content else "200"
            except grpc.RpcError as error:
                told = f"{'front' if broken else 500} {error.code().name}"
            statuses[told] += 1
            if told.startswith("5"):
                keep(dict(fields), out)
    return statuses


def processes() -> list[psutil.Process]:
    """The workers of the server that this process has started."""
    family = psutil.Process().children(recursive=True)
    return [one for one in family if any(name in " ".join(one.cmdline()) for name in WORKERS)]


def keep(fields: dict[str, object], out: Path) -> None:
    """Write what failed, to be looked at and kept as a test."""
    out.mkdir(parents=True, exist_ok=True)
    for value in fields.values():
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")
        (out / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


class Outcome(NamedTuple):
    """What a server answered, and what became of its workers."""

    statuses: Statuses
    restarts: int
    memory: list[tuple[int, int]]  # of each worker before and after, in bytes


def served(options: argparse.Namespace) -> Outcome:
    """Fuzz a server."""
    with contextlib.ExitStack() as stack:
        port, draw = free_ports(), random.Random(options.seed)
        own = options.server == "http"
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        more = ["--server", options.server, *([] if own else ["--logs", str(logs)])]
        more += ["--grpc-port", str(port + (1 if own else 3))] if options.grpc else []
        log = logs / "said" if own else None
        url = stack.enter_context(endpoint(options.serve, *more, port=port, log=log))
        warm_up(url)
        workers = processes()
        before = [process.memory_info().rss for process in workers]
        if options.grpc:
            send = over_v2 if own else over_grpc
            name, grpc_port = options.serve.stem, port + (1 if own else 3)
            statuses = {"grpc": send(options.bodies, draw, grpc_port, name, options.out)}
        else:
            statuses = by_clients(options.bodies, options, url)
        left = processes()
        memory = [
            (was, one.memory_info().rss)
            for one, was in zip(workers, before, strict=True)
            if one in left
        ]
        found = [file.name for file in logs.iterdir() if told(file.read_bytes())]
        if found:
            raise SystemExit(f"pieces of bodies stand in {', '.join(found)}")
    return Outcome(statuses, len(set(workers) - set(left)), memory)


def warm_up(url: str) -> None:
    """Have loaded what is loaded once."""
    for file in pictures():
        requests.post(url, file, timeout=60)


def told(log: bytes) -> bool:
    """Whether a log has pieces of what was sent: of base64, of pictures, of JSON's names."""
    return any(piece in log for piece in (b"IHDR", b"JFIF", b"b64", b"iVBOR", b'"inputs"', b"f0="))


def main() -> int:
    """Fuzz, print; the exit code says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bodies", type=int, default=100_000)
    parser.add_argument("--serve", type=Path, help="archive to fuzz over HTTP")
    parser.add_argument("--grpc", action="store_true", help="over gRPC, with --serve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/hostile"))
    parser.add_argument("--server", choices=("torchserve", "http"), default="torchserve")
    parser.add_argument("--clients", type=int, default=1, help="that send at a time over HTTP")
    options = parser.parse_args()
    if options.serve:
        outcome = served(options)
    else:
        draw = random.Random(options.seed)
        in_process(1000, draw, options.out)  # what is loaded once
        before = psutil.Process().memory_info().rss
        statuses = {"in process": in_process(options.bodies, draw, options.out)}
        outcome = Outcome(statuses, 0, [(before, psutil.Process().memory_info().rss)])
    return report(outcome)


def report(outcome: Outcome) -> int:
    """Print what came; 1 where not all held, else 0."""
    for protocol, statuses in outcome.statuses.items():
        print(f"{protocol}, {statuses.total()} bodies: {dict(sorted(statuses.items()))}")
    causes = sum(outcome.statuses.values(), Counter[str]())
    bad = sum(n for cause, n in causes.items() if cause.startswith("5") and cause not in FRONT)
    memory = ", ".join(f"{was / 1e6:.1f} to {now / 1e6:.1f} MB" for was, now in outcome.memory)
    print(f"{causes.total()} bodies; of 500 and above from Rampart: {bad}")
    print(f"restarts: {outcome.restarts}; memory: {memory}")
    grown = any(now - was > GROWTH for was, now in outcome.memory)
    return 1 if bad or outcome.restarts or grown else 0


if __name__ == "__main__":
    sys.exit(main())
