"""The same requests to TorchServe's front and to our own: the same answers."""

import gzip
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from allowed import rows
from sent import Sent, ask
from servers import Server, peak_memory

from benchmarks.fuzz import FRONT, over_http

feature = pytest.mark.feature

SECRETS = re.compile(
    r"Traceback|File \"|line \d+, in|/(home|root|tmp|usr|opt)/|site-packages|\.py\b"
    r"|uvicorn|starlette|python/|torchserve/|onnxruntime",
    re.IGNORECASE,
)


@feature("Same verdicts as every other server", "TorchServe", "Rampart")
@feature("Raw pictures and forms", "TorchServe", "Rampart")
@feature("KServe v1", "TorchServe", "Rampart")
@feature("Open Inference v2, JSON", "TorchServe", "Rampart")
@feature("Open Inference v2, binary tensors", "TorchServe", "Rampart")
@feature("A bad picture does not affect the others", "TorchServe", "Rampart")
def test_both_fronts_give_the_same_answers(
    server: Server, front: Server, requests_of_all_kinds: dict[str, Sent]
) -> None:
    statuses = set()
    for name, sent in requests_of_all_kinds.items():
        ours, theirs = ask(front.root, sent), ask(server.root, sent)
        assert ours == theirs, name
        statuses.add(ours[0])
    assert {200, 400, 415, 422} <= statuses


@feature("Compressed bodies", "TorchServe", "Rampart")
def test_a_compressed_body_gets_the_same_answer(
    server: Server, front: Server, requests_of_all_kinds: dict[str, Sent]
) -> None:
    for name in ("png", "v1 of many", "v2", "text"):
        path, body, headers = requests_of_all_kinds[name]
        packed = (path, gzip.compress(body), headers | {"Content-Encoding": "gzip"})
        plain = ask(server.root, (path, body, headers))
        assert ask(front.root, packed) == ask(server.root, packed) == plain, name


def test_a_compressed_bomb_is_refused_before_it_is_unpacked_whole(
    server: Server, front: Server
) -> None:
    bomb = gzip.compress(bytes(300 << 20))
    sent = ("/predictions/tiny", bomb, {"Content-Encoding": "gzip", "Content-Type": "image/png"})
    process = psutil.Process(front.process.pid)
    ours, theirs = ask(front.root, sent), ask(server.root, sent)
    assert ours == theirs and ours[0] == 413
    assert sum(peak_memory(child.pid) for child in process.children()) < 500 * 1024


def test_both_fronts_hold_to_what_an_image_may_be(
    server: Server, front: Server, encode: Callable[..., bytes], pixels: np.ndarray
) -> None:
    for row, body, status in rows(encode, pixels):
        sent = ("/predictions/tiny", body, {"Content-Type": "image/png"})
        ours, theirs = ask(front.root, sent), ask(server.root, sent)
        if body:
            assert ours == theirs and ours[0] == status, row
        else:  # in which our own front finds no picture, and TorchServe an empty one
            assert (ours[0], theirs[0]) == (415, 422)
        assert not SECRETS.search(str(ours)), row


@pytest.mark.slow
@pytest.mark.parametrize("name", ["server", "front"])
def test_no_fuzzed_body_is_a_servers_fault(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    one: Server = request.getfixturevalue(name)
    before = one.family()
    statuses = over_http(1400, random.Random(7), one.url, tmp_path)
    total = sum(statuses.values(), Counter[str]())
    assert total.total() == 1400 and {"200", "400", "415", "422"} <= {told[:3] for told in total}
    assert {told for told in total if told.startswith("5")} <= (
        FRONT if name == "server" else set()
    )
    assert one.family() == before
    assert not [*tmp_path.iterdir()]


def test_no_answer_tells_of_paths_versions_or_code(
    server: Server, front: Server, requests_of_all_kinds: dict[str, Sent]
) -> None:
    paths = ("/", "/nothing", "/v2/models/none/infer", "/predictions/none", "/metrics/none")
    odd: list[Sent] = [(path, b"{" * 9, {"Content-Type": "application/json"}) for path in paths]
    for root in (front.root, server.root):
        for path, body, given in [*requests_of_all_kinds.values(), *odd]:
            answer = requests.post(root + path, body, headers=given, timeout=30)
            heads = "".join(f"{name}: {value}\n" for name, value in answer.headers.items())
            assert not (found := SECRETS.search(heads + answer.text)), (path, found)
