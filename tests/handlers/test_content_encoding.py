"""Compressed bodies: what was sent comes out, within bounds, or the error names the encoding."""

import base64
import gzip
import json
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from inprocess import ask, png, post

from rampart.handlers.errors import ImageError
from rampart.handlers.protocols.choice import MAX_NUMBERS
from rampart.handlers.protocols.content_encoding import MAX_BODY, unpacked, unpacking_cost
from rampart.handlers.service import Service
from rampart.handlers.types import Incoming

BODY = b"\x89PNG\r\n\x1a\n and so on" * 9


@pytest.fixture(scope="module")
def service(unpacked: Path) -> Service:
    return Service.open(unpacked, name="tiny", version="1.0")


def bare(data: bytes) -> bytes:
    """Deflate without zlib's header and sum."""
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


def gzipped(data: bytes) -> bytes:
    """Without the time, so that tests have the same names in every process."""
    return gzip.compress(data, mtime=0)


def sent(data: bytes, name: str) -> Incoming:
    return Incoming({"content-encoding": name}, [data])


def refusal(data: bytes, name: str) -> ImageError:
    with pytest.raises(ImageError) as caught:
        unpacked(sent(data, name))
    return caught.value


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("gzip", gzipped(BODY)),
        (" GZIP ", gzipped(BODY)),
        ("x-gzip", gzipped(BODY)),
        ("deflate", zlib.compress(BODY)),
        ("deflate", zlib.compress(BODY, 0)),
        ("deflate", bare(BODY)),
        ("identity", BODY),
        ("", BODY),
    ],
)
def test_what_was_sent_comes_out(name: str, data: bytes) -> None:
    assert list(unpacked(sent(data, name)).parts) == [BODY]


@pytest.mark.parametrize("name", ["br", "zstd", "gzip, gzip", "SECRET"])
def test_another_encoding_is_named_as_the_fault_and_not_quoted(name: str) -> None:
    error = refusal(BODY, name)
    assert (error.code, error.type) == (415, "unsupported_encoding")
    assert "Content-Encoding" in error.message and name not in error.message


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("gzip", BODY),
        ("gzip", b""),
        ("gzip", gzipped(BODY)[:-1]),
        ("gzip", gzipped(BODY) + b"more"),
        ("gzip", zlib.compress(BODY)),
        ("deflate", BODY),
        ("deflate", zlib.compress(BODY)[:-1]),
        ("deflate", gzipped(BODY)),
    ],
)
def test_what_is_not_compressed_as_its_header_says_is_400(name: str, data: bytes) -> None:
    error = refusal(data, name)
    assert (error.code, error.type) == (400, "malformed_encoding")
    assert f"one complete {name} stream" in error.message


@pytest.mark.parametrize("name", ["gzip", "deflate"])
def test_a_bomb_is_413_and_costs_no_more_than_a_plain_body(name: str) -> None:
    pack = gzip.compress if name == "gzip" else zlib.compress
    assert len(unpacked(sent(pack(bytes(MAX_BODY)), name)).parts[0]) == MAX_BODY
    bomb = pack(bytes(400_000_000), 1)
    tracemalloc.start()
    try:
        error = refusal(bomb, name)
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_BODY
    finally:
        tracemalloc.stop()
    assert (error.code, error.type) == (413, "body_too_large")


def test_the_files_of_a_form_and_an_empty_request_are_left_as_they_are() -> None:
    for parts in ([], [BODY, BODY]):
        incoming = Incoming({"content-encoding": "gzip"}, parts)
        assert unpacked(incoming) is incoming and unpacking_cost(incoming) == 0


def test_a_compressed_request_is_answered_as_a_plain_one(
    service: Service, pixels: np.ndarray
) -> None:
    own = ask(service, png(pixels))
    body = json.dumps({"instances": [{"b64": base64.b64encode(png(pixels)).decode()}]}).encode()
    for plain in (png(pixels), body):
        for name, data in (("gzip", gzip.compress(plain)), ("deflate", zlib.compress(plain))):
            assert ask(service, data, content_encoding=name) == own
    reply = post(service, png(pixels), content_encoding="br")
    assert (reply.status, json.loads(reply.body)["type"]) == (415, "unsupported_encoding")


def test_bounds_of_json_hold_for_what_was_unpacked(service: Service) -> None:
    body = gzip.compress(b"[" + b"1," * MAX_NUMBERS + b"1,1]")
    reply = post(service, body, content_encoding="gzip")
    assert (reply.status, json.loads(reply.body)["type"]) == (413, "too_many_values")


def test_a_bad_body_of_a_batch_spoils_no_other(service: Service, pixels: np.ndarray) -> None:
    batch = [
        sent(gzip.compress(png(pixels)), "gzip"),
        sent(b"broken", "gzip"),
        Incoming({}, [png(pixels)]),
    ]
    first, second, third = service.answer(batch)
    assert (first.status, second.status, third.status) == (200, 400, 200)
    assert first.body == third.body
