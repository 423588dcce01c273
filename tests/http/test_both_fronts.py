"""The same requests to TorchServe's front and to our own: the same answers."""

import gzip

import pytest
from sent import Sent, ask
from servers import Server

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
