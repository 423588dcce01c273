"""Asks an endpoint for verdicts over HTTP: TorchServe's, or Rampart's own server.

client = rampart.Client("http://127.0.0.1:8080/predictions/traffic-signs")
print(client.predict("sign.png").label)
"""

import asyncio
import ssl
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from rampart.handlers.image import as_png
from rampart.handlers.verdict import Verdict

try:
    import httpx2 as httpx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'the client needs httpx2: `pip install "rampart-endpoint[client]"`', name="httpx2"
    ) from error

PREDICTIONS, EXPLANATIONS = "/predictions/", "/explanations/"
RETRIES = 3  # of one question, where the server is busy
LONGEST = 10.0  # seconds: a server that asks for a longer pause is not asked again
NO_ANSWER = 0  # the code where no status came
DOWN = {NO_ANSWER, 500, 503}  # of a question after health

Picture = str | Path | bytes | Image.Image | NDArray[np.uint8]
Several = TypeVar("Several", bound=Picture)


class EndpointError(Exception):
    """An error of the endpoint: `code` is its status, `type` for programs, `message` for people.

    Where no answer came, `code` is 0 and `type` is `no_answer`.
    """

    def __init__(self, code: int, type: str, message: str) -> None:
        super().__init__(f"{code} {type}: {message}")
        self.code = code
        self.type = type
        self.message = message


Answer = Verdict | EndpointError


class Address(NamedTuple):
    """Where a model's predictions are: `root` is all of the address that comes before."""

    root: str
    model: str

    @classmethod
    def read(cls, url: str) -> "Address":
        """Take an address apart. Raises ValueError where it is none of predictions."""
        root, _, model = url.rstrip("/").partition(PREDICTIONS)
        if not root.startswith(("http://", "https://")) or not model or model.count("/") > 1:
            raise ValueError(
                f"{url} is not an address for predictions: pass the one that `rampart serve`"
                " prints, http://HOST:PORT/predictions/MODEL, perhaps with /VERSION"
            )
        return cls(root, model)

    def verdicts(self, explain: bool) -> str:
        """Takes pictures; TorchServe hands no query to a model, so explanations have a path."""
        return f"{self.root}{EXPLANATIONS if explain else PREDICTIONS}{self.model}"

    @property
    def health(self) -> str:
        """Tells whether the server is up."""
        return f"{self.root}/ping"

    @property
    def metadata(self) -> str:
        """Describes the model, by the Open Inference Protocol."""
        return f"{self.root}/v2/models/{self.model.replace('/', '/versions/')}"


class Client:
    """Asks one model. Close it, or use it in `with`.

    `url` is the address of predictions, as `rampart serve` prints it. `timeout` is in seconds, for
    each time that the server lets you wait. `certificate` is a PEM file to trust instead of the
    machine's own authorities. A busy server (503 with Retry-After) is asked again, `RETRIES` times.
    Questions raise EndpointError.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        timeout: float = 30.0,
        certificate: Path | str | None = None,
    ) -> None:
        self._address = Address.read(url)
        self._http = httpx.Client(**_options(token, timeout, certificate))

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End its connections."""
        self._http.close()

    @overload
    def predict(self, pictures: Picture, *, explain: bool = False) -> Verdict: ...
    @overload
    def predict(self, pictures: list[Several]) -> list[Answer]: ...
    def predict(
        self, pictures: Picture | list[Several], *, explain: bool = False
    ) -> Verdict | list[Answer]:
        """The verdict on a picture; of a list, sent as one request, an answer to each.

        A picture is a file, its bytes, a Pillow image or pixels uint8 (H, W, 3). One at fault among
        several has its EndpointError in its place. `explain` wants one picture and an endpoint that
        explains; the verdict's `explanation` holds what came.
        """
        content = self._ask("POST", self._address.verdicts(explain), **_body(pictures))
        return _answers(content, pictures)

    def health(self) -> bool:
        """Whether the server is up; Rampart's own tells of its models too."""
        try:
            return bool(self._ask("GET", self._address.health))
        except EndpointError as error:
            return _is_up(error)

    def metadata(self) -> dict[str, Any]:
        """Versions, tensors and, under `card`, data, threat model, figures and hashes.

        TorchServe tells them at its management address alone.
        """
        return self._ask("GET", self._address.metadata)

    def _ask(self, method: str, url: str, **body: Any) -> dict[str, Any]:
        for left in reversed(range(RETRIES + 1)):
            try:
                response = self._http.request(method, url, **body)
            except httpx.HTTPError as error:
                raise _no_answer(url, error) from error
            pause = _pause(response)
            if pause is None or not left:
                break
            time.sleep(pause)
        return _content(response)


class AsyncClient:
    """`Client` for asyncio: the same questions, each to be awaited."""

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        timeout: float = 30.0,
        certificate: Path | str | None = None,
    ) -> None:
        self._address = Address.read(url)
        self._http = httpx.AsyncClient(**_options(token, timeout, certificate))

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End its connections."""
        await self._http.aclose()

    @overload
    async def predict(self, pictures: Picture, *, explain: bool = False) -> Verdict: ...
    @overload
    async def predict(self, pictures: list[Several]) -> list[Answer]: ...
    async def predict(
        self, pictures: Picture | list[Several], *, explain: bool = False
    ) -> Verdict | list[Answer]:
        """As `Client.predict`."""
        content = await self._ask("POST", self._address.verdicts(explain), **_body(pictures))
        return _answers(content, pictures)

    async def health(self) -> bool:
        """As `Client.health`."""
        try:
            return bool(await self._ask("GET", self._address.health))
        except EndpointError as error:
            return _is_up(error)

    async def metadata(self) -> dict[str, Any]:
        """As `Client.metadata`."""
        return await self._ask("GET", self._address.metadata)

    async def _ask(self, method: str, url: str, **body: Any) -> dict[str, Any]:
        for left in reversed(range(RETRIES + 1)):
            try:
                response = await self._http.request(method, url, **body)
            except httpx.HTTPError as error:
                raise _no_answer(url, error) from error
            pause = _pause(response)
            if pause is None or not left:
                break
            await asyncio.sleep(pause)
        return _content(response)


def _options(token: str, timeout: float, certificate: Path | str | None) -> dict[str, Any]:
    """What both kinds of httpx's clients are made with."""
    options: dict[str, Any] = {"timeout": timeout}
    if token:
        options["headers"] = {"Authorization": f"Bearer {token}"}
    if certificate is not None:
        options["verify"] = ssl.create_default_context(cafile=certificate)
        # As newer Pythons have it: the chain's root need not be in the file.
        options["verify"].verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return options


def _body(pictures: Picture | list[Several]) -> dict[str, Any]:
    """A picture as it is, or a form of several."""
    kind = "application/octet-stream"  # TorchServe reads others of a form as text
    if not isinstance(pictures, list):
        return {"content": _encoded(pictures), "headers": {"Content-Type": kind}}
    # TorchServe passes on only the last of two parts of one name.
    parts = {f"image{i}": (f"{i}", _encoded(one), kind) for i, one in enumerate(pictures)}
    if not parts:
        raise ValueError("there are no pictures in the list: give at least one")
    return {"files": parts}


def _encoded(picture: Picture) -> bytes:
    """The bytes of a picture's file. Raises OSError, or ValueError for what is no picture."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | Path):
        return Path(picture).read_bytes()
    if isinstance(picture, Image.Image):
        return _png(picture)
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.shape[2:] == (3,):
        return as_png(picture)
    what = getattr(picture, "shape", ""), getattr(picture, "dtype", type(picture).__name__)
    raise ValueError(
        "a picture is a file, bytes, a Pillow image or pixels uint8 (H, W, 3), not"
        f" {' '.join(map(str, what)).strip()}"
    )


def _png(image: Image.Image) -> bytes:
    """A Pillow image as it is shown: a PNG has no place for a camera's turn, or for CMYK."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        upright = upright.convert("RGB")
    stream = BytesIO()
    upright.save(stream, "PNG")
    return stream.getvalue()


def _pause(response: httpx.Response) -> float | None:
    """Seconds until a busy server wants to be asked again; None where it does not."""
    seconds = response.headers.get("retry-after", "")
    if response.status_code != 503 or not seconds.isdecimal() or int(seconds) > LONGEST:
        return None
    return float(seconds)


def _content(response: httpx.Response) -> dict[str, Any]:
    """The JSON of a good answer. Raises EndpointError for any other."""
    try:
        content = response.json()
    except ValueError:
        content = None
    if response.status_code != 200 or not isinstance(content, dict):
        raise _error(content, response.status_code)
    return content


def _error(content: object, status: int) -> EndpointError:
    """The error that an answer holds. Gateways and servers have forms of their own."""
    known: Mapping[str, Any] = content if isinstance(content, dict) else {}
    silent = f"the answer, with status {status}, is not one of Rampart: check the address"
    message = str(known.get("message") or silent)
    return EndpointError(status, str(known.get("type") or "unknown"), message)


def _no_answer(url: str, error: Exception) -> EndpointError:
    reason = str(error) or type(error).__name__
    return EndpointError(
        NO_ANSWER, "no_answer", f"{url} does not answer ({reason}): is it serving?"
    )


def _is_up(error: EndpointError) -> bool:
    """False for the error of a server that is down; raises any other."""
    if error.code in DOWN:
        return False
    raise error


def _answers(
    content: Mapping[str, Any], pictures: Picture | list[Several]
) -> Verdict | list[Answer]:
    """The answer to each picture of a request."""
    if not isinstance(pictures, list):
        return _verdict(content)
    rows = [content] if len(pictures) == 1 else content.get("predictions")
    if not isinstance(rows, list) or len(rows) != len(pictures):
        raise _error(None, 200)
    return [_answer(row) for row in rows]


def _answer(row: object) -> Answer:
    """One of several: a verdict, or what is wrong with that picture."""
    if isinstance(row, dict) and isinstance(row.get("code"), int):
        return _error(row, row["code"])
    return _verdict(row)


def _verdict(content: Any) -> Verdict:
    if isinstance(content, dict) and "boxes" in content:
        raise EndpointError(200, "boxes", "this endpoint detects objects: ask it over plain HTTP")
    try:
        return Verdict.from_dict(content)
    except (AttributeError, KeyError, TypeError) as error:
        raise _error(None, 200) from error
