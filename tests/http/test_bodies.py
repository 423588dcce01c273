"""Bodies of requests: bounded in size, time and memory, taken out of forms."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from rampart.handlers.errors import ImageError
from rampart.handlers.http import bodies
from rampart.handlers.http.bodies import MAX_BUFFERED, Bodies, files, parts
from rampart.handlers.protocols.content_encoding import MAX_BODY


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


def read(*data: bytes, **headers: str) -> bytes:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return asyncio.run(Bodies().read(named, pieces(*data)))


def form(*contents: bytes, kind: bytes = b"image/png") -> bytes:
    lines = [
        b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n'
        b"Content-Type: %s\r\n\r\n%s\r\n" % (kind, content)
        for content in contents
    ]
    return b"".join(lines) + b"--x--\r\n"


def test_a_body_is_joined() -> None:
    assert read(b"ab", b"c") == b"abc"


@pytest.mark.parametrize("size", [MAX_BODY, MAX_BODY + 1])
def test_a_body_has_a_largest_size_however_it_comes(size: int) -> None:
    data = bytes(size)
    ways = [
        lambda: read(data),
        lambda: read(data[:9], data[9:]),
    ]
    for way in ways:
        if size > MAX_BODY:
            with pytest.raises(ImageError, match="send fewer or smaller images"):
                way()
        else:
            assert way() == data


def test_a_body_that_says_that_it_is_too_large_is_not_read() -> None:
    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("was read")
        yield b""

    with pytest.raises(ImageError) as caught:
        asyncio.run(Bodies().read({"content-length": str(MAX_BODY + 1)}, unread()))
    assert caught.value.code == 413


def test_a_compressed_form_is_told_and_another_compressed_body_goes_on_as_it_came() -> None:
    coded = {"content-encoding": "Deflate"}
    with pytest.raises(ImageError) as caught:
        parts({"content-type": "multipart/form-data; boundary=x"} | coded, b"x\x9c")
    assert (caught.value.code, caught.value.type) == (415, "encoded_form")
    curl = {"content-type": "application/x-www-form-urlencoded"}
    assert parts(curl | coded, b"x\x9c=") == [b"x\x9c="]


def test_all_bodies_together_take_bounded_memory_and_give_it_back() -> None:
    async def run() -> list[bytes | BaseException]:
        shared, go_on = Bodies(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield bytes(MAX_BODY)
            await go_on.wait()

        tasks = [
            asyncio.create_task(shared.read({}, slow()))
            for _ in range(MAX_BUFFERED // MAX_BODY + 1)
        ]
        await asyncio.sleep(0.1)
        refused = [task for task in tasks if task.done()]
        assert len(refused) == 1 and isinstance(refused[0].exception(), ImageError)
        go_on.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        return [await shared.read({}, pieces(bytes(MAX_BODY))) for _ in range(20)]

    assert len(asyncio.run(run())) == 20


def test_small_bodies_come_through_while_large_ones_fill_the_memory() -> None:
    async def run() -> list[int]:
        shared = Bodies()

        async def held(size: int) -> AsyncIterator[bytes]:
            yield bytes(size)
            await asyncio.Event().wait()

        tasks = [asyncio.create_task(shared.read({}, held(2 << 20))) for _ in range(50)]
        await asyncio.sleep(0.1)
        for _ in range(20):
            assert await shared.read({}, pieces(b"small")) == b"small"
        refused = [task.exception() for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await shared.read({}, pieces(bytes(MAX_BODY))) == bytes(MAX_BODY)
        return [error.code for error in refused if isinstance(error, ImageError)]

    assert asyncio.run(run()) == [503] * 18  # 32 of 2 MB stay


def test_a_large_body_that_comes_is_read_while_smaller_ones_that_do_not_fill_the_memory() -> None:
    async def run() -> None:
        shared = Bodies()

        async def stalled() -> AsyncIterator[bytes]:
            yield bytes(900_000)
            await asyncio.Event().wait()

        async def coming() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield bytes(MAX_BODY // 20)
                await asyncio.sleep(0.02)

        tasks = [asyncio.create_task(shared.read({}, stalled())) for _ in range(74)]
        await asyncio.sleep(0.5)
        for _ in range(3):
            assert len(await shared.read({}, coming())) == MAX_BODY // 20 * 20
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def test_a_slow_body_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.01)
            yield b"x"

    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.1)
    with pytest.raises(ImageError) as caught:
        asyncio.run(Bodies().read({}, endless()))
    assert caught.value.code == 408


def test_files_of_a_form_come_in_order_and_fields_do_not_count() -> None:
    data = form(b"one", b"two\r\n--y")
    field = b'--x\r\nContent-Disposition: form-data; name="n"\r\n\r\n5\r\n'
    assert files(field + data, b"x") == [b"one", b"two\r\n--y"]
    assert parts({"content-type": "multipart/form-data; boundary=x"}, data) == files(data, b"x")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (form(b"a")[:-20], "broken_form"),
        (b"", "broken_form"),
        (b"no form", "broken_form"),
        (form(*[b"a"] * 65), "too_many_parts"),
        (b"--x\r\n" + b"A: b\r\n" * 100 + b"\r\n\r\n--x--", "broken_form"),
        (b"--x\r\nA: " + b"b" * 5_000_000 + b"\r\n\r\n\r\n--x--", "broken_form"),
    ],
)
def test_a_form_that_cannot_be_used_is_told_to_its_client_and_not_to_the_log(
    data: bytes, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ImageError) as caught:
        parts({"content-type": "multipart/form-data; boundary=x"}, data)
    assert caught.value.type == kind
    assert not caplog.messages


@pytest.mark.parametrize("boundary", ["", "; boundary=" + "x" * 257])
def test_a_form_without_a_boundary_or_with_a_long_one_is_told(boundary: str) -> None:
    with pytest.raises(ImageError, match="cannot be read"):
        parts({"content-type": f"multipart/form-data{boundary}"}, form(b"a"))


def test_curl_d_may_call_a_picture_a_form_and_fields_are_told() -> None:
    kind = {"content-type": "application/x-www-form-urlencoded"}
    assert parts(kind, b"\x89PNG=") == [b"\x89PNG="]
    assert parts(kind, b'{"instances": "="}') == [b'{"instances": "="}']
    with pytest.raises(ImageError) as caught:
        parts(kind, b"image=abc")
    assert caught.value.type == "form_fields"
