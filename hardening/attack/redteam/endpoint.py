"""What a red team sees of an endpoint: pictures go out, verdicts come back, nothing else."""

import base64
import http.client
import ipaddress
import json
import socket
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from PIL import Image

from rampart.hardening.model.arrays import Pixels
from rampart.hardening.model.pixels import as_file

SIMILAR = "similar_query"  # how the endpoint calls what it throttles
UNNAMED = ("", "")  # a throttled answer tells no model


class Answer(NamedTuple):
    """What the endpoint says of one image: `top` are (index, confidence), `model` name, version."""

    label: int | None
    top: tuple[tuple[int, float], ...]
    model: tuple[str, str]
    similar: bool = False


@dataclass(frozen=True)
class Endpoint:
    """Where to send images, and the `classes` of its labels. Raises ValueError for no prediction
    URL, and for a foreign host unless it is `owned`: attacking it is a crime in most places.
    """

    url: str
    classes: tuple[str, ...]
    owned: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.url} is not a URL like http://127.0.0.1:8080/predictions/NAME")
        if not self.owned and not _is_loopback(parts.hostname, parts.port):
            raise ValueError(
                f"{parts.hostname} is not this machine: attack only your own endpoints, and confirm"
                " it with --i-own-this-endpoint"
            )

    def ask(self, images: Pixels) -> list[Answer]:
        """Answers for uint8 (N, H, W, 3) in one request. Raises ConnectionError or ValueError."""
        files = [as_file(Image.fromarray(image)) for image in images]
        instances = [{"b64": base64.b64encode(file).decode()} for file in files]
        status, text = self._post(json.dumps({"instances": instances}))
        body: Any = None
        with suppress(ValueError):
            body = json.loads(text)
        if not isinstance(body, dict) or (status != 200 and body.get("type") != SIMILAR):
            message = body.get("message", text) if isinstance(body, dict) else text
            raise ValueError(f"{self.url} answers with status {status}: {_short(message)}")
        verdicts = body.get("predictions", [body])  # a single image's comes without a list
        if not isinstance(verdicts, list) or len(verdicts) != len(images):
            raise ValueError(f"{self.url} does not answer {len(images)} images: {_short(text)}")
        return [self._parse(verdict) for verdict in verdicts]

    def _post(self, body: str) -> tuple[int, str]:
        """Status and text. Neither proxies nor redirects, which might lead to another machine."""
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            with closing(kind(str(parts.hostname), parts.port, timeout=60)) as connection:
                connection.request("POST", target, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                return response.status, response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"{self.url} does not answer ({error or type(error).__name__}): is it running?"
                " `rampart serve` starts one"
            ) from error

    def _parse(self, verdict: Mapping[str, Any]) -> Answer:
        if verdict.get("type") == SIMILAR:
            return Answer(None, (), UNNAMED, similar=True)
        try:
            accepted = verdict["decision"] == "accept"
            top = tuple((self._index(t["label"]), float(t["confidence"])) for t in verdict["top"])
            model = (str(verdict["model"]["name"]), str(verdict["model"]["version"]))
            similar = bool((verdict.get("detail") or {}).get("similar_query"))
            return Answer(self._index(verdict["label"]) if accepted else None, top, model, similar)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.url} does not return a Rampart verdict, but {_short(json.dumps(verdict))}"
            ) from error

    def _index(self, label: str) -> int:
        if label not in self.classes:
            raise ValueError(
                f"{self.url} answers {label!r}, which is not a class of these images"
                f" ({_short(', '.join(self.classes))}): take images with the model's classes"
            )
        return self.classes.index(label)


def _is_loopback(host: str, port: int | None) -> bool:
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port)}
    except OSError as error:
        raise ValueError(f"unknown host {host}: {error}") from error
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _short(text: object) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= 200 else words[:200] + " ..."
