"""Whatever comes in, the answer is a verdict or an error of the client's; benchmarks/fuzz.py does
the same by the hundred thousand, and over HTTP."""

import json
import random
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import in_process
from rampart.handlers.defended import incoming
from rampart.handlers.errors import ImageError
from rampart.handlers.image import MAX_PIXELS, pictures_of, view_of
from rampart.handlers.protocols.choice import read

NAMES = ("instances", "inputs", "outputs", "b64", "name", "datatype", "shape", "data", "id")
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["UINT8", "BYTES", "FP32", "aGk=", "image"])
)
BODIES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5)
    ),
    max_leaves=30,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(body=BODIES, parsed=st.booleans(), tail=st.binary(max_size=40), length=st.text(max_size=6))
def test_json_of_any_shape_is_answered_and_never_a_server_error(
    body: object, parsed: bool, tail: bytes, length: str
) -> None:
    sent = body if parsed else json.dumps(body).encode() + tail
    request = read(incoming({"body": sent}, {"Inference-Header-Content-Length": length}))
    answers = []
    for picture in pictures_of(request.images, 8, MAX_PIXELS):
        pixels = view_of(picture, 8)
        assert not isinstance(pixels, ImageError) or 400 <= pixels.code < 500
        bad = {"code": 422, "type": "t", "message": "m"}
        answers.append((422, bad) if isinstance(pixels, ImageError) else (200, VERDICT))
    code, content = request.reply(answers)
    assert code < 500
    json.dumps(content, allow_nan=False)


VERDICT = {
    "label": "cat",
    "index": 3,
    "confidence": 0.5,
    "decision": "accept",
    "model": {"name": "m", "version": "1.0"},
    "detail": {"p_value": 0.25},
}


def test_mutated_pictures_and_bodies_are_answered_and_never_a_server_error(tmp_path: Path) -> None:
    statuses = in_process(3000, random.Random(1), tmp_path)
    assert max(map(int, statuses)) < 500 and not list(tmp_path.iterdir())
    assert {"200", "400", "415", "422"} <= set(statuses)
