"""The types that the modules of serving exchange; none belongs to a server."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rampart.handlers.errors import ImageError

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB
Images = Sequence[bytes | Pixels | ImageError]  # of a request, encoded, decoded or at fault
Answer = tuple[int, dict[str, Any]]  # HTTP status and JSON body, of an image or a request
Replier = Callable[[Sequence[Answer]], Answer]
# TorchServe's route, KServe's two, or a describe call.
Route = Literal["predictions", "v1", "v2", "describe"]


class Incoming(NamedTuple):
    """A request from any server."""

    headers: Mapping[str, str]  # names in lower case
    parts: Sequence[bytes]  # the body, or the files of a form in their order
    route: Route = "predictions"
    refusal: ImageError | None = None  # why the server's own code refuses it
    explain: bool = False  # its verdict


class Request(NamedTuple):
    """Its images, an ImageError for an unreadable one, and `reply`, which joins their answers."""

    images: Images
    reply: Replier
    explain: bool = False  # the verdict on its one image


class Reply(NamedTuple):
    """A JSON reply; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes
