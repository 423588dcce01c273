"""Bodies to images, and their answers to one, in whichever protocol the body speaks."""

import base64
import json

import pytest

from rampart.handlers.budget import DEAR
from rampart.handlers.errors import TOO_LONG, ImageError
from rampart.handlers.image import MAX_IMAGES
from rampart.handlers.protocols.choice import (
    MAX_NUMBERS,
    MAX_VALUES,
    NO_IMAGE,
    read,
    reading_cost,
)
from rampart.handlers.types import Incoming, Route

PICTURE = b"\x89PNG\r\n\x1a\n and so on"
B64 = base64.b64encode(PICTURE).decode()


def instances(*images: object) -> bytes:
    return json.dumps({"instances": list(images)}).encode()


def images(*parts: bytes, **headers: str) -> list[object]:
    known = {name.replace("_", "-"): value for name, value in headers.items()}
    return list(read(Incoming(known, parts)).images)


def refusal(*parts: bytes, **headers: str) -> ImageError:
    (error,) = images(*parts, **headers)
    assert isinstance(error, ImageError)
    return error


def test_a_raw_body_is_the_image_and_several_parts_come_in_order() -> None:
    assert images(PICTURE) == [PICTURE]
    assert images(b"1", b"2") == [b"1", b"2"]


def test_a_request_without_a_body_hears_how_to_send_one() -> None:
    error = refusal()
    assert (error.code, error.type) == (415, "no_image")
    assert "with -H 'Content-Type: application/json', which curl -d leaves out" in error.message


def test_what_the_server_found_wrong_is_the_answer() -> None:
    (error,) = read(Incoming({}, [PICTURE], refusal=TOO_LONG)).images
    assert isinstance(error, ImageError) and error.type == TOO_LONG.type


def test_an_error_that_all_requests_share_gathers_none_of_them() -> None:
    """A raised exception keeps the frames that it passes through, and what they hold."""
    for shared, incoming in (
        (NO_IMAGE, Incoming({}, [])),
        (TOO_LONG, Incoming({}, [PICTURE], refusal=TOO_LONG)),
    ):
        read(incoming)
        assert shared.__traceback__ is None


@pytest.mark.parametrize("before", [b"", b"\n  ", b"\xef\xbb\xbf"])  # a mark of byte order
def test_json_is_known_by_its_first_character(before: bytes) -> None:
    assert images(before + instances({"b64": B64}, {"b64": ""})) == [PICTURE, b""]


@pytest.mark.parametrize("body", [b"{", b'{"instances": [}', b"[" * 200_000, b'{"a": \xff}'])
def test_malformed_json_is_400(body: bytes) -> None:
    error = refusal(body)
    assert (error.code, error.type) == (400, "malformed_json")


@pytest.mark.parametrize("body", [b"[]", b"[1]", b"{}"])
def test_json_without_images_is_422(body: bytes) -> None:
    error = refusal(body)
    assert (error.code, error.type) == (422, "no_instances")


def test_too_many_images_are_413() -> None:
    most = [{"b64": B64}] * MAX_IMAGES
    assert len(images(instances(*most))) == MAX_IMAGES
    for parts in ([instances(*most, most[0])], [PICTURE] * (MAX_IMAGES + 1)):
        error = refusal(*parts)
        assert (error.code, error.type) == (413, "too_many_images")


def test_errors_do_not_quote_the_request() -> None:
    secret = "Q0FOQVJZ"
    bodies = [f'{{"{secret}"', f'{{"{secret}": 1}}', f'{{"instances": [{{"b64": "{secret}!"}}]}}']
    for body in bodies:
        assert secret not in refusal(body.encode()).message


@pytest.mark.parametrize("route", ["v1", "v2"])
def test_one_image_is_answered_by_itself_and_on_kserves_routes_in_a_list(route: Route) -> None:
    good, bad = (200, {"label": "cat"}), (415, {"code": 415, "message": "no"})
    body = instances({"b64": B64})
    own, kserve = read(Incoming({}, [body])), read(Incoming({}, [body], route))
    assert own.reply([good]) == good
    assert kserve.reply([good]) == (200, {"predictions": [good[1]]})
    assert own.reply([good, bad]) == kserve.reply([good, bad])
    assert own.reply([bad]) == kserve.reply([bad]) == bad
    assert read(Incoming({}, [PICTURE], route)).reply([good]) == good


def test_binary_tensors_follow_as_many_bytes_of_json_as_the_header_says() -> None:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
    text = json.dumps({"inputs": [tensor]}).encode()
    body = text + len(PICTURE).to_bytes(4, "little") + PICTURE
    assert images(body, inference_header_content_length=str(len(text))) == [PICTURE]
    for wrong in ("1", "-1", "x", "9" * 5000, str(len(text) - 1)):
        assert refusal(body, inference_header_content_length=wrong).code in (400, 422)


def test_numbers_in_json_are_what_makes_reading_dear() -> None:
    numbers, picture = b"[1,2,3]", b"\x89PNG,,,,"
    assert reading_cost(Incoming({}, [picture])) == 0
    marked = b"\xef\xbb\xbf" + numbers  # of byte order, which is read all the same
    assert reading_cost(Incoming({}, [b" " + numbers, picture, numbers, marked])) == 150


@pytest.mark.parametrize("value", ["[]", "{}", '""', "[1,2]", "7"])
def test_json_of_more_values_than_memory_has_room_for_is_413(value: str) -> None:
    many = MAX_NUMBERS + 2 if value == "7" else MAX_VALUES + 1
    error = refusal(('{"instances": [' + ",".join([value] * many) + "]}").encode())
    assert (error.code, error.type) == (413, "too_many_values")
    few = ('{"instances": [' + ",".join([value] * 32) + "]}").encode()
    assert len(images(few)) == 32


def test_what_takes_long_to_read_is_told_before_it_is_read() -> None:
    def cost(body: bytes) -> int:
        return reading_cost(Incoming({}, [body]))

    numbers = b'{"inputs": [{"data": [' + b"7," * 100_000 + b"7]}]}"
    assert cost(numbers) > DEAR > cost(numbers[:20_000])
    assert cost(b"\x89PNG" + b"," * 100_000) == 0
