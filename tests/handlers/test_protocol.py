"""Request bodies to encoded images."""

import base64
import json

import pytest

from handlers.budget import DEAR
from handlers.image import MAX_IMAGES, ImageError
from handlers.protocol import MAX_NUMBERS, MAX_VALUES, read, reading_cost

PICTURE = b"\x89PNG\r\n\x1a\n and so on"
B64 = base64.b64encode(PICTURE).decode()


def instances(*images: object) -> dict[str, object]:
    return {"instances": list(images)}


def images(fields: dict[str, object], headers: dict[str, object] | None = None) -> list[object]:
    return list(read(fields, headers or {}).images)


def refusal(fields: dict[str, object], headers: dict[str, object] | None = None) -> ImageError:
    (error,) = images(fields, headers)
    assert isinstance(error, ImageError)
    return error


@pytest.mark.parametrize("name", ["body", "data"])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_raw_body_is_the_image(name: str, kind: type) -> None:
    assert images({name: kind(PICTURE)}) == [PICTURE]


def test_multipart_files_come_in_order() -> None:
    headers = {name: {"content-type": "image/png"} for name in ("first", "second")}
    assert images({"first": b"1", "second": bytearray(b"2")}, headers) == [b"1", b"2"]


def test_query_parameters_and_plain_form_fields_are_no_images() -> None:
    headers = {"note": {"content-type": ""}, "body": {"content-type": ""}}
    assert images({"note": bytearray(b"hello"), "body": PICTURE}, headers) == [PICTURE]
    assert images({"data": bytearray(b"hello"), "body": PICTURE}) == [PICTURE]
    error = refusal({"note": bytearray(b"hello")}, headers)
    assert (error.code, error.type) == (415, "no_image")


@pytest.mark.parametrize("form", ["parsed", "bytes", "text", "indented", "with a mark"])
def test_json_instances_are_decoded_in_every_form_torchserve_gives(form: str) -> None:
    body = instances({"b64": B64}, {"b64": ""})
    text = json.dumps(body, indent=2)
    forms = {
        "parsed": body,
        "bytes": bytearray(json.dumps(body).encode()),
        "text": json.dumps(body),
        "indented": f"\n  {text}".encode(),
        "with a mark": b"\xef\xbb\xbf" + text.encode(),  # of byte order, as Windows writes it
    }
    assert images({"body": forms[form]}) == [PICTURE, b""]


@pytest.mark.parametrize("body", [b"{", b'{"instances": [}', b"[" * 200_000, b'{"a": \xff}'])
def test_malformed_json_is_400(body: bytes) -> None:
    error = refusal({"body": body})
    assert (error.code, error.type) == (400, "malformed_json")


@pytest.mark.parametrize(
    "body", [{}, {"instances": []}, {"instances": {}}, {"instances": None}, [], [1], 7, None]
)
def test_json_without_images_is_422(body: object) -> None:
    error = refusal({"body": body})
    assert (error.code, error.type) == (422, "no_instances")


@pytest.mark.parametrize("instance", [{}, {"b64": 1}, {"b64": None}, "text", 3, None, [B64]])
def test_an_instance_without_base64_is_an_error_in_its_place(instance: object) -> None:
    first, second = images({"body": instances(instance, {"b64": B64})})
    assert isinstance(first, ImageError) and (first.code, first.type) == (422, "no_base64")
    assert second == PICTURE


@pytest.mark.parametrize(
    "text", ["a", "!!!!", B64[:8] + "\n" + B64[8:], "data:image/png;base64," + B64, "é" * 4]
)
def test_malformed_base64_is_refused_and_not_repaired(text: str) -> None:
    error = refusal({"body": instances({"b64": text})})
    assert (error.code, error.type) == (422, "malformed_base64")


def test_too_many_images_are_413() -> None:
    most = [{"b64": B64}] * MAX_IMAGES
    assert len(images({"body": instances(*most)})) == MAX_IMAGES
    error = refusal({"body": instances(*most, most[0])})
    assert (error.code, error.type) == (413, "too_many_images")
    names = [f"part{index}" for index in range(MAX_IMAGES + 1)]
    headers: dict[str, object] = {name: {"content-type": "image/png"} for name in names}
    assert refusal(dict.fromkeys(names, PICTURE), headers).type == "too_many_images"


def test_errors_do_not_quote_the_request() -> None:
    secret = "Q0FOQVJZ"
    bodies = [f'{{"{secret}"', f'{{"{secret}": 1}}', f'{{"instances": [{{"b64": "{secret}!"}}]}}']
    for body in bodies:
        assert secret not in refusal({"body": body.encode()}).message


def test_one_image_is_answered_by_itself_and_on_kserves_route_in_a_list() -> None:
    good, bad = (200, {"label": "cat"}), (415, {"code": 415, "message": "no"})
    body = {"body": instances({"b64": B64})}
    own, kserve = read(body, {"url_path": ""}), read(body, {})
    assert own.reply([good]) == good
    assert kserve.reply([good]) == (200, {"predictions": [good[1]]})
    assert own.reply([good, bad]) == kserve.reply([good, bad])
    assert own.reply([bad]) == kserve.reply([bad]) == bad
    assert read({"body": PICTURE}, {}).reply([good]) == good


@pytest.mark.parametrize(
    "header", ["Inference-Header-Content-Length", "inference-header-content-length"]
)
def test_binary_tensors_follow_as_many_bytes_of_json_as_the_header_says(header: str) -> None:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
    text = json.dumps({"inputs": [tensor]}).encode()
    body = {"body": bytearray(text + len(PICTURE).to_bytes(4, "little") + PICTURE)}
    assert images(body, {header: str(len(text))}) == [PICTURE]
    for wrong in ("1", "-1", "x", "9" * 5000, str(len(text) - 1)):
        assert refusal(body, {header: wrong}).code in (400, 422)


@pytest.mark.parametrize("value", ["[]", "{}", '""', "[1,2]", "7"])
def test_json_of_more_values_than_memory_has_room_for_is_413(value: str) -> None:
    many = MAX_NUMBERS + 2 if value == "7" else MAX_VALUES + 1
    body = ('{"instances": [' + ",".join([value] * many) + "]}").encode()
    (error,) = read({"body": body}, {}).images
    assert isinstance(error, ImageError)
    assert (error.code, error.type) == (413, "too_many_values")
    few = ('{"instances": [' + ",".join([value] * 32) + "]}").encode()
    assert len(read({"body": few}, {}).images) == 32


def test_what_takes_long_to_read_is_told_before_it_is_read() -> None:
    numbers = b'{"inputs": [{"data": [' + b"7," * 100_000 + b"7]}]}"
    assert reading_cost({"body": numbers}) > DEAR > reading_cost({"body": numbers[:20_000]})
    assert reading_cost({"body": b"\x89PNG" + b"," * 100_000}) == 0
