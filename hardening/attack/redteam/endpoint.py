"""What a red team sees of an endpoint: pictures go out, verdicts come back, nothing else."""

import base64
import http.client
import ipaddress
import json
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from rampart.handlers.image import as_png
from rampart.hardening.attack.redteam.protocols import JSON, Speech, Wire, speech_of
from rampart.hardening.attack.redteam.said import UNNAMED, Answer, Reading
from rampart.hardening.model.arrays import Pixels

SIMILAR = "similar_query"  # how the endpoint calls what it throttles
PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before a busy endpoint is asked again, if it does not say
LONGEST = 60.0  # seconds of a pause that it asks for
AT_ONCE = 8  # requests to a server that takes one picture each, which may batch them itself


@dataclass(frozen=True)
class Endpoint:
    """Where to send images of `size` pixels a side, and the `classes` of its labels, in the order
    of its scores. `wire` says what is known of a server that is not Rampart's, `headers` go along.

    Raises ValueError for no prediction URL, and for a foreign host unless it is `owned`: attacking
    it is a crime in most places.
    """

    url: str
    classes: tuple[str, ...]
    owned: bool = False
    size: int = 32
    wire: Wire = Wire()  # noqa: RUF009  # of constants
    headers: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.url} is not a URL like http://127.0.0.1:8080/predictions/NAME")
        if not self.owned and not _is_loopback(parts.hostname, parts.port):
            raise ValueError(
                f"{parts.hostname} is not this machine: attack only your own endpoints, and confirm"
                " it with --i-own-this-endpoint"
            )

    @cached_property
    def _speech(self) -> Speech | None:
        """How the server is asked; None for Rampart's own protocol."""
        try:
            return speech_of(self.wire, self.url, self.size, self._fetch)
        except (LookupError, TypeError) as error:
            reason = f"{self.url} does not describe its model as protocol v2 requires ({error})"
            raise ValueError(reason) from error

    @cached_property
    def reading(self) -> Reading:
        """What was found out about its answers."""
        return Reading(self.classes)

    def ask(self, images: Pixels) -> list[Answer]:
        """Answers for uint8 (N, H, W, 3) in as few requests as it takes. Raises ConnectionError or
        ValueError.
        """
        speech = self._speech
        if speech is None:
            return self._ask_rampart(images)
        pieces = [images[i : i + speech.most] for i in range(0, len(images), speech.most)]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            said = threads.map(lambda piece: self._ask(speech, piece), pieces)
            return [answer for answers in said for answer in answers]

    def _ask(self, speech: Speech, images: Pixels) -> list[Answer]:
        """Answers to one request."""
        status, text = self._send("POST", self.url, *speech.request(images))
        if status != 200:
            raise ValueError(f"{self.url} answers with status {status}: {_short(text)}")
        try:
            said = speech.read(json.loads(text), len(images))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.url} gives an unexpected answer ({type(error).__name__}: {error}),"
                f" {_short(text)}: pass its protocol with --protocol"
            ) from error
        if len(said) != len(images):
            raise ValueError(f"{self.url} does not answer {len(images)} images: {_short(text)}")
        try:
            return [self.reading.answer(one) for one in said]
        except ValueError as error:
            raise ValueError(f"{self.url}: {error}") from error

    def _ask_rampart(self, images: Pixels) -> list[Answer]:
        instances = [{"b64": base64.b64encode(as_png(image)).decode()} for image in images]
        body = json.dumps({"instances": instances}).encode()
        status, text = self._send("POST", self.url, body, JSON)
        content: Any = None
        with suppress(ValueError):
            content = json.loads(text)
        if not isinstance(content, dict) or (status != 200 and content.get("type") != SIMILAR):
            message = content.get("message", text) if isinstance(content, dict) else text
            raise ValueError(f"{self.url} answers with status {status}: {_short(message)}")
        verdicts = content.get("predictions", [content])  # a single image's comes without a list
        if not isinstance(verdicts, list) or len(verdicts) != len(images):
            raise ValueError(f"{self.url} does not answer {len(images)} images: {_short(text)}")
        return [self._parse(verdict) for verdict in verdicts]

    def _fetch(self, url: str) -> Any:
        """The JSON at a URL. Raises ValueError."""
        status, text = self._send("GET", url)
        try:
            if status == 200:
                return json.loads(text)
        except ValueError:
            pass
        raise ValueError(f"{url} answers with status {status}: {_short(text)}")

    def _send(self, verb: str, url: str, body: bytes = b"", kind: str = JSON) -> tuple[int, str]:
        """Status and text, of an endpoint that says when it has time after that."""
        for pause in (*PAUSES, None):
            status, text, after = self._send_once(verb, url, body, kind)
            if not _is_busy(status, text, after):
                break
            if pause is None:
                raise self._overloaded(text)
            time.sleep(min(float(after) if after.isdecimal() else pause, LONGEST))
        return status, text

    def _send_once(self, verb: str, url: str, body: bytes, kind: str) -> tuple[int, str, str]:
        """Status, text, and the header that says when to come again, where there is one.

        Neither proxies nor redirects, which might lead to another machine.
        """
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        client = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Content-Type": kind, **(self.headers or {})}
        try:
            with closing(client(str(parts.hostname), parts.port, timeout=60)) as connection:
                connection.request(verb, target, body, headers)
                response = connection.getresponse()
                text = response.read().decode("utf-8", "replace")
                return response.status, text, response.getheader("retry-after", "")
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"{self.url} does not answer ({error or type(error).__name__}): is it running?"
                " `rampart serve` starts one"
            ) from error

    def _overloaded(self, message: str) -> ConnectionError:
        return ConnectionError(
            f"{self.url} is overloaded ({_short(message)}): run the same command again when it"
            " has time, and what was found is kept"
        )

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
                f"{self.url} does not return a Rampart verdict, but {_short(json.dumps(verdict))}:"
                " pass its protocol with --protocol"
            ) from error

    def _index(self, label: str) -> int:
        if label not in self.classes:
            raise ValueError(
                f"{self.url} answers {label!r}, which is not a class of these images"
                f" ({_short(', '.join(self.classes))}): take images with the model's classes"
            )
        return self.classes.index(label)


def _is_busy(status: int, text: str, after: str) -> bool:
    """Whether an answer, or that to one of its images, says to come `after` some time: TorchServe
    gives a 503 for what fails, too.
    """
    if status == 200:
        return '"type": "busy"' in text
    return status in (429, 503) and bool(after) and f'"{SIMILAR}"' not in text


def _is_loopback(host: str, port: int | None) -> bool:
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port)}
    except OSError as error:
        raise ValueError(f"unknown host {host} ({error}): check the URL") from error
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _short(text: object) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= 200 else words[:200] + " ..."
