"""The same requests to TorchServe's front and to our own: the same answers."""

import gzip
import re

import psutil
import pytest
import requests
from sent import Sent, ask
from servers import Server, peak_memory

feature = pytest.mark.feature


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


def test_no_answer_tells_of_paths_versions_or_code(
    server: Server, front: Server, requests_of_all_kinds: dict[str, Sent]
) -> None:
    secrets = re.compile(
        r"Traceback|File \"|line \d+, in|/(home|root|tmp|usr|opt)/|site-packages|\.py\b"
        r"|uvicorn|starlette|python/|torchserve/|onnxruntime",
        re.IGNORECASE,
    )
    paths = ("/", "/nothing", "/v2/models/none/infer", "/predictions/none", "/metrics/none")
    odd: list[Sent] = [(path, b"{" * 9, {"Content-Type": "application/json"}) for path in paths]
    for root in (front.root, server.root):
        for path, body, given in [*requests_of_all_kinds.values(), *odd]:
            answer = requests.post(root + path, body, headers=given, timeout=30)
            heads = "".join(f"{name}: {value}\n" for name, value in answer.headers.items())
            assert not (found := secrets.search(heads + answer.text)), (path, found)
